"""The copy kernels compiled for sm_80, sm_90 and sm_100: registers, spills and access widths.

No GPU is needed. tests/support/triton_aot.py says how to regenerate the expected table.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kvoffload.copy.kernels_table import SPECS
from tests.support.triton_aot import ARCHES, GOLDEN, figures, name_of

triton = pytest.importorskip("triton", reason="triton is not installed: nothing to compile with")

MAX_REGISTERS = 224
"""A leaf in registers is 64 of them with two warps; 255 is where the compiler starts to spill."""


@pytest.fixture(autouse=True, scope="module")
def fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What is looked at is compiled now, not found in a cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(Path(GOLDEN).read_text())
    return loaded


def test_golden_table_is_whole(golden: dict[str, Any]) -> None:
    assert set(golden) == {"triton", *(f"sm_{arch}" for arch in ARCHES)}
    for arch in ARCHES:
        assert list(golden[f"sm_{arch}"]) == [name_of(spec) for spec in SPECS]


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiles_as_expected(spec: Any, arch: int, golden: dict[str, Any]) -> None:
    got, ptx = figures(spec, arch)
    assert got["spill_bytes"] == 0
    assert got["registers"] <= MAX_REGISTERS
    per_thread = 16384 // (32 * spec.warps) // 16
    checked = spec.kernel != "copy_pieces"
    if spec.align == 16:  # every byte of the blocks and of the arena goes 16 bytes at a time
        assert got["loads_of_16"] >= per_thread and got["stores_of_16"] >= per_thread
        assert re.search(r"ld\.global(\.\w+)*\.v[24]\.b(64|32)", ptx)
        assert re.search(r"st\.global(\.\w+)*\.v[24]\.b(64|32)", ptx)
    elif spec.kernel == "store_leaves":  # blocks narrow, the arena's side is always aligned
        assert got["stores_of_16"] >= per_thread
    elif spec.kernel == "load_leaves":
        assert got["loads_of_16"] >= per_thread and got["stores_of_16"] == 0
        assert got["narrowest_store"] == spec.element
    else:
        assert got["stores_of_16"] == 0 and got["widest_store"] == spec.element
    assert checked or got["shared_bytes"] == 0
    if triton.__version__ == golden["triton"]:
        assert got == golden[f"sm_{arch}"][name_of(spec)]
