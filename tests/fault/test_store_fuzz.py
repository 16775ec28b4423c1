"""Hostile files: whatever a directory holds, opening ends in time and what is served is right.

The same idea under ASan and UBSan, with 2,000 cases, is csrc/tests/run_fuzz.sh; here the built
extension is met through Python, with fields forged by the second implementation of the format.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from kvoffload.errors import StoreError
from kvoffload.store import open_store
from tests.support import store_format as fmt
from tests.support.store_engines import io_engine  # noqa: F401  (every test runs on both engines)
from tests.support.store_format import BLOCK, DELETE, PUT, Record, Trailer

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "store" / "v1"
JOURNAL, OPEN_SEGMENT = "w0/journal-1700000003", "w0/seg-00003.kv"
OPEN_LIMIT_S = 5.0
Files = dict[str, bytes]
_EDGES = [0, 1, 2, 63, 64, 4095, 4096, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 63, (1 << 64) - 1]
_WIDTH = {"kind": 8, "seq": 64, "checksum": 64, "records_off": 64, "count": 64, "nbytes": 32}
_WIDTH |= {"gen": 32, "version": 32}


def read(folder: Path) -> Files:
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != "LOCK")
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(found)}


def write(files: Files, path: Path) -> None:
    path.mkdir(mode=0o700)
    for name, data in files.items():
        target = path / name
        target.parent.mkdir(mode=0o700, exist_ok=True)
        target.write_bytes(data)
        os.chmod(target, 0o600)


def remove(path: Path) -> None:
    for item in sorted(path.rglob("*"), reverse=True):
        item.rmdir() if item.is_dir() else item.unlink()
    path.rmdir()


EXPECTED: dict[str, str | None] = json.loads(GOLDEN.with_suffix(".json").read_text())
BASE = read(GOLDEN)
UUID = fmt.manifest_uuid(BASE["MANIFEST"])


def forged(rng: random.Random, item: Any, *keep: str) -> Any:
    """``item`` with one number changed to something awkward that still fits its field."""
    names = [f.name for f in fields(item) if isinstance(getattr(item, f.name), int)]
    name = rng.choice([n for n in names if n not in keep])
    was = getattr(item, name)
    value = rng.choice(
        [rng.choice(_EDGES), was + rng.choice((-1, 1)), was ^ 1 << rng.randrange(64)]
    )
    return replace(item, **{name: value % (1 << _WIDTH.get(name, 32))})


def forge_header(rng: random.Random, files: Files) -> None:
    name = rng.choice([n for n in files if "/seg-" in n])
    header = fmt.Header.parse(BASE[name][:BLOCK])
    files[name] = forged(rng, header).pack() + files[name][BLOCK:]


def forge_trailer(rng: random.Random, files: Files) -> None:
    name = rng.choice([n for n in files if "/seg-" in n and n != OPEN_SEGMENT])
    trailer = Trailer.parse(BASE[name][-BLOCK:])
    files[name] = files[name][:-BLOCK] + forged(rng, trailer).pack()


def forge_records(rng: random.Random, files: Files) -> None:
    name = rng.choice(list(fmt.segments(BASE)))
    header, records, sealed = fmt.segments(BASE)[name]
    index = rng.randrange(len(records))
    records = [*records[:index], forged(rng, records[index]), *records[index + 1 :]]
    if rng.random() < 0.3:
        records[index] = replace(records[index], kind=rng.choice((PUT, DELETE)))
    if sealed:
        off = Trailer.parse(BASE[name][-BLOCK:]).records_off
        files[name] = fmt.seal(BASE[name][:off], header, records, len(BASE[name]))
    else:
        files[JOURNAL] = fmt.journal(r.pack(UUID) for r in records)


def flip(rng: random.Random, files: Files) -> None:
    name = rng.choice(list(files))
    data = bytearray(files[name])
    for _ in range(rng.randint(1, 12) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    files[name] = bytes(data)


def resize(rng: random.Random, files: Files) -> None:
    name = rng.choice(list(files))
    data = files[name]
    files[name] = rng.choice(
        (
            data[: rng.randrange(len(data) + 1)],
            data[: rng.randrange(len(data) // BLOCK + 1) * BLOCK],
            data + rng.randbytes(rng.randrange(2 * BLOCK)),
            data + bytes(BLOCK * rng.randrange(64)),
        )
    )


def swap(rng: random.Random, files: Files) -> None:
    one, two = rng.choice(list(files)), rng.choice(list(files))
    if rng.random() < 0.5:
        files[one], files[two] = files[two], files[one]
        return
    at, to = (rng.randrange(max(1, len(files[n]) // BLOCK)) * BLOCK for n in (one, two))
    block = files[one][at : at + BLOCK]
    files[two] = files[two][:to] + block + files[two][to + len(block) :]


HOW: list[Callable[[random.Random, Files], None]] = [
    *[forge_header, forge_trailer, forge_records, forge_records],
    *[flip, resize, swap],
]


def look(path: Path, read_only: bool) -> int:
    """Chunks served, each compared; -1: refused with one line that names the path."""
    start = time.monotonic()
    try:
        store = open_store(path, read_only=read_only, threads=1)
    except StoreError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        assert time.monotonic() - start < OPEN_LIMIT_S
        return -1
    assert time.monotonic() - start < OPEN_LIMIT_S
    with store:
        hits = 0
        for key, found in zip(
            EXPECTED, store.get_many(list(map(bytes.fromhex, EXPECTED))), strict=True
        ):
            if found is not None:
                # Forging may bring back the deleted chunk, or the older of two: bytes once put.
                assert hashlib.sha256(found).hexdigest() in KNOWN[key]
                hits += 1
        return hits


def known() -> dict[str, set[str]]:
    """All payloads the golden files hold for a key, deleted and replaced ones included."""
    out: dict[str, set[str]] = {key: set() for key in EXPECTED}
    for name, (_, records, _) in fmt.segments(BASE).items():
        for r in records:
            data = BASE[name][r.off4k * BLOCK : r.off4k * BLOCK + r.nbytes]
            out[r.key.hex()].add(hashlib.sha256(data).hexdigest())
    return out


KNOWN = known()


@pytest.mark.parametrize("batch", range(4))
def test_mutated_directories(tmp_path: Path, batch: int) -> None:
    hits: list[int] = []
    for case in range(batch * 200, batch * 200 + 200):
        rng = random.Random(case)
        files = dict(BASE)
        for _ in range(rng.randint(1, 3)):
            rng.choice(HOW)(rng, files)
        path = tmp_path / "s"
        write(files, path)
        before = sum(map(len, files.values()))
        try:
            hits.append(look(path, read_only=case % 4 == 0))
            after = sum(p.lstat().st_size for p in path.rglob("*") if p.is_file())
            assert after <= max(before, 1 << 20) + 4 * BLOCK
        except BaseException:
            print(f"case {case}")
            raise
        remove(path)
    whole = sum(1 for digest in EXPECTED.values() if digest)
    assert sum(h > 0 for h in hits) > 100 and whole in hits and -1 in hits


def test_a_delete_that_names_an_extent_moves_nothing(tmp_path: Path) -> None:
    """Its extent would end terabytes behind the file: the open segment must not be sealed there."""
    header, records, _ = fmt.segments(BASE)[OPEN_SEGMENT]
    seq = records[-1].seq + 1
    bad = Record(DELETE, seq, b"x" * 16, header.seg, header.gen, (1 << 32) - 16, 5)
    files = BASE | {JOURNAL: fmt.journal(r.pack(UUID) for r in [*records, bad])}
    write(files, tmp_path / "s")
    assert look(tmp_path / "s", read_only=False) == sum(1 for d in EXPECTED.values() if d)
    size = (tmp_path / "s" / OPEN_SEGMENT).stat().st_size
    assert size < 64 << 10


@pytest.fixture
def descriptors() -> Iterator[Callable[[], int]]:
    yield lambda: len(os.listdir("/proc/self/fd"))


def test_a_refused_directory_leaves_no_descriptor_open(
    tmp_path: Path, descriptors: Callable[[], int]
) -> None:
    write({"foreign": b"x"}, tmp_path / "s")
    before = descriptors()
    for _ in range(20):
        with pytest.raises(StoreError, match="not empty"):
            open_store(tmp_path / "s")
    assert descriptors() <= before
