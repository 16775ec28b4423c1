"""Settings and start-up check of ``KVOffloadTier``, our tier under vLLM's OffloadingConnector.

vLLM hands a tier a part of the engine's configuration, and no part of it says which weights or
which model settings made the bytes. ``wrap_factory`` notes the whole configuration while vLLM
builds a connector, so that the tier, built inside that call, can name its chunks by content.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from kvoffload.config import Config
from kvoffload.engines.vllm import compat
from kvoffload.errors import ConfigError, UnsupportedError

TIER = "KVOffloadTier"
TIER_MODULE = "kvoffload.engines.vllm.native_tier"
NATIVE_CONNECTOR = "OffloadingConnector"

OUR_KEYS = ("nvme_path", "nvme_gib", "io_engine")
#: Keys of a ``secondary_tiers`` entry that vLLM reads itself.
VLLM_KEYS = ("type", "module_path", "locality", "backpressure")
LOCALITIES = ("LOCAL", "REMOTE")

_WRAPPED = "_kvoffload_wrapped"
_building: list[tuple[Any, Any]] = []


# -- settings ------------------------------------------------------------------------------------


def tier_config(entry: Mapping[str, Any]) -> Config:
    """Our settings in one ``secondary_tiers`` entry. Raises ConfigError: one line with the key."""
    for key in entry:
        if key not in OUR_KEYS and key not in VLLM_KEYS:
            raise ConfigError(
                f"kvoffload: unknown key {key!r} of the tier {TIER}: known keys: "
                + ", ".join((*OUR_KEYS, *VLLM_KEYS))
            )
    locality = entry.get("locality")
    if locality is not None and locality not in LOCALITIES:
        raise ConfigError(
            f"kvoffload: locality={locality!r} is not allowed: choose one of "
            + ", ".join(LOCALITIES)
        )
    if entry.get("nvme_path") is None:
        raise ConfigError(
            f"kvoffload: the tier {TIER} needs nvme_path: give one absolute directory path"
        )
    return Config.from_extra_config({k: entry[k] for k in OUR_KEYS if k in entry})


def our_tiers(kv_transfer_config: Any) -> Iterator[Mapping[str, Any]]:
    """Entries of ``secondary_tiers`` that name our tier, those of MultiConnector's children too."""
    yield from _tiers_of(
        {
            "kv_connector": getattr(kv_transfer_config, "kv_connector", None),
            "kv_connector_extra_config": getattr(
                kv_transfer_config, "kv_connector_extra_config", None
            ),
        }
    )


def _tiers_of(child: Any) -> Iterator[Mapping[str, Any]]:
    if not isinstance(child, Mapping):
        return
    extra = child.get("kv_connector_extra_config") or {}
    if not isinstance(extra, Mapping):
        return
    if child.get("kv_connector") == "MultiConnector":
        for inner in _listed(extra, "connectors"):
            yield from _tiers_of(inner)
    elif child.get("kv_connector") == NATIVE_CONNECTOR:
        for entry in _listed(extra, "secondary_tiers"):
            if isinstance(entry, Mapping) and entry.get("module_path") == TIER_MODULE:
                yield entry


def _listed(extra: Mapping[str, Any], key: str) -> Sequence[Any]:
    """What a list in the settings holds; nothing where it is none: vLLM says so."""
    found = extra.get(key)
    return found if isinstance(found, list | tuple) else ()


def check_native_tiers(vllm_config: Any) -> None:
    """Check every entry that names our tier. Raises ConfigError or UnsupportedError (one line)."""
    transfer = getattr(vllm_config, "kv_transfer_config", None)
    entries = list(our_tiers(transfer)) if transfer is not None else []
    for entry in entries:
        if entry.get("type") != TIER:
            raise ConfigError(
                f"kvoffload: type={entry.get('type')!r} is not allowed: with "
                f'"module_path": "{TIER_MODULE}" the type is {TIER}'
            )
        tier_config(entry)
    if entries:
        check_engine(vllm_config)


def check_engine(vllm_config: Any) -> None:
    """Refuse engines the tier cannot serve. Raises UnsupportedError (one line)."""
    if compat.is_reduced(version := compat.vllm_version()):
        raise UnsupportedError(
            f"kvoffload: {TIER} needs vLLM 0.30 or newer, not {'.'.join(map(str, version))}"
        )
    if getattr(vllm_config, "lora_config", None) is not None:
        raise UnsupportedError(
            f"kvoffload: --enable-lora is not supported by {TIER}: vLLM's keys name an adapter, "
            "not its bytes; use KVOffloadConnector or leave LoRA off"
        )


# -- the engine that is being built --------------------------------------------------------------


def wrap_factory() -> None:
    """Note the configuration vLLM builds a connector from. Idempotent; needs an importable vLLM."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    original = KVConnectorFactory.create_connector.__func__
    if getattr(original, _WRAPPED, False):
        return

    @functools.wraps(original)
    def create_connector(cls: Any, config: Any, role: Any, kv_cache_config: Any) -> Any:
        with building(config, kv_cache_config):
            return original(cls, config, role, kv_cache_config)

    setattr(create_connector, _WRAPPED, True)
    KVConnectorFactory.create_connector = classmethod(create_connector)


@contextmanager
def building(vllm_config: Any, kv_cache_config: Any) -> Iterator[None]:
    """A connector of this engine is being built by this process (one at a time, as vLLM does)."""
    _building.append((vllm_config, kv_cache_config))
    try:
        yield
    finally:
        _building.pop()


def engine_being_built() -> tuple[Any, Any]:
    """(VllmConfig, KVCacheConfig) of the engine being built. Raises UnsupportedError (one line)."""
    if not _building:
        raise UnsupportedError(
            f"kvoffload: {TIER} needs kvoffload's vLLM plugin, which is not loaded: name kvoffload "
            "in VLLM_PLUGINS or leave that variable unset"
        )
    return _building[-1]
