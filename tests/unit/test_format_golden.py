"""The format to the byte: golden files, a second implementation of docs/format.md, the store agree.

tests/golden/store/v1 is a directory of format 1, v1.json what it serves. It is never regenerated for a change of the code:
a change that breaks these tests is a change of the format, and docs/format.md says what that needs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from kvoffload import _core
from kvoffload.errors import StoreError
from kvoffload.store import open_store
from tests.support import store_format as fmt
from tests.support.store_format import BLOCK, DELETE, PUT, Header, Record

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "store" / "v1"
UUID = bytes(range(16, 32))
SEGMENT, BOUND = 64 << 10, 1 << 20
SEQ = 1_700_000_000_000_000
GEN = 1_700_000_000
CHECKSUM = 0xC7153FD24DAA4482  # of b"kvoffload" * 4000 under the key 00 01 .. 0f
SIZES = {"one": 1, "block": 4096, "odd": 5000, "leaf": 16384, "leaves": 20001, "again": 3000}
SIZES |= {"gone": 100, "cut": 7000, "open": 900, "tail": 4097}


def key(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()[:16]


def payload(name: str, life: int = 0) -> bytes:
    return hashlib.shake_128(f"{name} {life}".encode()).digest(SIZES[name] + life)


class Writer:
    """One segment: payload blocks and the records that name them."""

    def __init__(self, seg: int, first_seq: int) -> None:
        self.header = Header(seg, UUID, 0, GEN + seg, SEGMENT)
        self.blocks, self.records, self.seq = self.header.pack(), list[Record](), first_seq

    def put(self, name: str, life: int = 0) -> None:
        data, at = payload(name, life), len(self.blocks) // BLOCK
        self.blocks += fmt.padded(data)
        checksum = fmt.payload_checksum(data, key(name))
        self._add(Record(PUT, 0, key(name), 0, 0, at, len(data), checksum, 7, len(self.records)))

    def delete(self, name: str) -> None:
        self._add(Record(DELETE, 0, key(name), 0, 0))

    def _add(self, record: Record) -> None:
        self.seq += 1
        header = self.header
        self.records.append(replace(record, seq=self.seq, seg=header.seg, gen=header.gen))


def golden() -> dict[str, bytes]:
    """What tests/golden/store/v1 holds, made by the second implementation."""
    full, cut, live = Writer(1, SEQ), Writer(2, SEQ + 100), Writer(3, SEQ + 200)
    for name in ("one", "block", "odd", "gone", "again", "leaves"):
        full.put(name)
    cut.put("cut")
    cut.delete("gone")
    cut.delete("again")
    cut.put("again", 1)  # larger seq than the one in segment 1
    live.put("leaf")
    live.put("open")
    live.put("tail")
    journal = [r.pack(UUID) for r in live.records]
    stale = replace(live.records[0], gen=GEN + 1, key=key("one"), seq=SEQ + 900)
    torn = bytearray(replace(live.records[0], key=key("odd"), seq=SEQ + 901).pack(UUID))
    torn[20] ^= 4
    journal[1:1] = [stale.pack(UUID), bytes(torn), bytes(64)]
    short = len(cut.blocks) + 2 * BLOCK  # sealed at recovery: cut right behind its footer
    return {
        "MANIFEST": fmt.manifest(UUID, SEGMENT, BOUND),
        "w0/seg-00001.kv": fmt.seal(full.blocks, full.header, full.records, SEGMENT),
        "w0/seg-00002.kv": fmt.seal(cut.blocks, cut.header, cut.records, short),
        "w0/seg-00003.kv": live.blocks.ljust(SEGMENT, b"\0"),
        f"w0/journal-{live.header.gen}": fmt.journal(journal),
    }


def expected() -> dict[str, str | None]:
    """Hex key -> SHA-256 of what a store of these files serves; None: nothing."""
    held = {name: payload(name, int(name == "again")) for name in SIZES if name != "gone"}
    out: dict[str, str | None] = {
        key(name).hex(): hashlib.sha256(data).hexdigest() for name, data in held.items()
    }
    return out | {key("gone").hex(): None}


def write_golden() -> None:
    """Made the files once; for a new format there will be a new folder beside them."""
    for name, data in golden().items():
        (GOLDEN / name).parent.mkdir(parents=True, exist_ok=True)
        (GOLDEN / name).write_bytes(data)
    GOLDEN.with_suffix(".json").write_text(json.dumps(expected(), indent=1) + "\n")


def files_in(folder: Path) -> dict[str, bytes]:
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != "LOCK")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def served() -> dict[str, str | None]:
    out: dict[str, str | None] = json.loads(GOLDEN.with_suffix(".json").read_text())
    return out


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The golden directory with the modes the store asks for (git keeps none)."""
    path = tmp_path / "store"
    shutil.copytree(GOLDEN, path)
    for item in [path, *path.rglob("*")]:
        os.chmod(item, 0o700 if item.is_dir() else 0o600)
    return path


def test_second_implementation_writes_the_golden_bytes() -> None:
    assert files_in(GOLDEN) == golden()
    assert served() == expected()


def test_second_implementation_reads_them() -> None:
    found = fmt.read_store(files_in(GOLDEN))
    assert {k.hex(): hashlib.sha256(v).hexdigest() for k, v in found.items()} == {
        k: v for k, v in served().items() if v
    }


@pytest.mark.parametrize("read_only", [True, False])
def test_store_serves_them(copy: Path, read_only: bool) -> None:
    with open_store(copy, read_only=read_only) as store:
        store.check()
        for name, digest in served().items():
            found = store.get(bytes.fromhex(name))
            assert (found and hashlib.sha256(found).hexdigest()) == digest
        assert len(store) == sum(1 for digest in served().values() if digest)
        assert store.stats()["corrupt"] == 0 and store.stats()["io_errors"] == 0
        chunk = next(row for row in store.ls() if row.key == key("cut"))
        assert (chunk.namespace, chunk.depth, chunk.nbytes, chunk.segment) == (7, 0, 7000, 2)
    if read_only:
        assert files_in(copy) == files_in(GOLDEN)


def test_recovery_seals_as_the_page_says(copy: Path) -> None:
    """The open segment gets its footer right behind the last extent; nothing else is touched."""
    open_store(copy).close()
    before, after = files_in(GOLDEN), files_in(copy)
    segment, journal = "w0/seg-00003.kv", f"w0/journal-{GEN + 3}"
    header, records, _ = fmt.segments(before)[segment]
    blocks = before[segment][: 8 * BLOCK]  # header, 4 + 1 + 2 blocks of payload
    want = fmt.seal(blocks, header, records, len(blocks) + 2 * BLOCK)
    assert after == {k: v for k, v in before.items() if k != journal} | {segment: want}


def test_what_the_store_writes_reads_by_the_page(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with open_store(path, max_bytes=BOUND, segment_bytes=SEGMENT) as store:
        for name in SIZES:
            store.put(key(name), payload(name), namespace=9)
        store.delete(key("gone"))
        assert store.flush()
        live = fmt.read_store(files_in(path))  # journals, and footers of full segments
    want = {key(name): payload(name) for name in SIZES if name != "gone"}
    assert live == want
    assert fmt.read_store(files_in(path)) == want
    kinds = {sealed for _, records, sealed in fmt.segments(files_in(path)).values() if records}
    assert kinds == {True, False}  # footers and a journal were both read
    assert fmt.manifest_uuid((path / "MANIFEST").read_bytes())


def test_checksum_of_record() -> None:
    for name in SIZES:
        data = payload(name)
        assert _core.checksum(data, key(name)) == fmt.payload_checksum(data, key(name))
    assert fmt.crc32c(b"123456789") == 0xE3069283
    # Written down: both implementations could err alike.
    assert fmt.payload_checksum(b"kvoffload" * 4000, bytes(range(16))) == CHECKSUM


def test_a_newer_format_is_refused(copy: Path) -> None:
    (copy / "MANIFEST").write_bytes(fmt.manifest(UUID, SEGMENT, BOUND, version=2))
    before = files_in(copy)
    for read_only in (True, False):
        with pytest.raises(StoreError, match="format 2 is newer"):
            open_store(copy, read_only=read_only)
    assert files_in(copy) == before


def test_a_segment_of_another_version_is_not_read(copy: Path) -> None:
    path = copy / "w0" / "seg-00002.kv"
    data = path.read_bytes()
    path.write_bytes(replace(Header.parse(data[:BLOCK]), version=2).pack() + data[BLOCK:])
    with open_store(copy) as store:
        assert store.get(key("cut")) is None
        assert store.get(key("odd")) == payload("odd")
