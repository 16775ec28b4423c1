"""Chunks to a file and back: round trips, what others read, and files that are damaged or hostile."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import stat
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from kvoffload._core import Arena, checksum
from kvoffload.cli.store import app
from kvoffload.errors import StoreError
from kvoffload.store import Store, open_store
from kvoffload.tiers.nvme import chunk_file
from kvoffload.types import StoreResult

MIB = 1 << 20
DEEP = 64 << 10  # payload of the chunks that have a depth


def key_of(i: int) -> bytes:
    return hashlib.sha256(b"file %d" % i).digest()[:16]


def payload_of(i: int, nbytes: int | None = None) -> bytes:
    rng = np.random.default_rng(i)
    return rng.bytes(nbytes or int(rng.integers(1, 60_000)))


def small(path: Path, **kw: Any) -> Store:
    return open_store(path, **{"max_bytes": 16 * MIB, "segment_bytes": 512 << 10} | kw)


def put_deep(store: Store, ids: range, namespace: int) -> None:
    """As a connector does: from slots, with a depth per chunk."""
    n = len(ids)
    arena = Arena.create(8 * MIB, n, 1, False)
    numbers = np.arange(n, dtype=np.uint32)
    offsets = numbers.astype(np.uint64) * np.uint64(DEEP)
    generations = np.array([arena.begin_fill(i, 1) for i in range(n)], np.uint64)
    for at, i in enumerate(ids):
        arena.view(at * DEEP, DEEP)[:] = payload_of(i, DEEP)
        arena.hash_leaves(at * DEEP, DEEP, key_of(i))
        arena.fill_done(at, int(generations[at]))
    keys = b"".join(key_of(i) for i in ids)
    results = store.submit(
        n,
        lambda native, job, late: native.put_slots(
            job, arena, keys, numbers, generations, offsets, DEEP, namespace, numbers
        ),
    )
    assert set(results) == {StoreResult.OK}


def content(store: Store) -> dict[bytes, tuple[int, int, bytes | None]]:
    return {c.key: (c.namespace, c.depth, store.get(c.key)) for c in store.ls()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Plain chunks of odd sizes in two namespaces, and 20 with depths."""
    with small(tmp_path / "source") as store:
        for i in range(30):
            store.put(key_of(i), payload_of(i), namespace=i % 2)
        put_deep(store, range(100, 120), 0xABCD1234)
    return tmp_path / "source"


@pytest.fixture
def file(source: Path, tmp_path: Path) -> Path:
    with open_store(source, read_only=True) as store:
        assert store.export(tmp_path / "chunks.safetensors").chunks == 50
    return tmp_path / "chunks.safetensors"


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(file: Path, header: Any, payload: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + payload)


class TestRoundTrip:
    @pytest.mark.parametrize("segment", [128 << 10, 512 << 10, 2 * MIB])
    def test_to_a_store_of_another_segment_size(
        self, source: Path, file: Path, tmp_path: Path, segment: int
    ) -> None:
        with open_store(source, read_only=True) as store:
            want = content(store)
        with small(tmp_path / "target", segment_bytes=segment) as store:
            report = store.import_(file)
            assert (report.chunks, report.imported, report.held) == (50, 50, 0)
            assert (report.bad, report.refused) == (0, 0)
            assert content(store) == want
            assert store.verify().bad == 0
            again = store.import_(file)
            assert (again.imported, again.held) == (0, 50)
            store.check()

    def test_between_drives(self, file: Path, tmp_path: Path) -> None:
        paths = [tmp_path / "a", tmp_path / "b"]
        with open_store(paths, max_bytes=32 * MIB) as store:
            assert store.import_(file).imported == 50
            store.export(tmp_path / "again")
            want = content(store)
        with small(tmp_path / "one") as store:
            assert store.import_(tmp_path / "again").imported == 50
            assert content(store) == want

    def test_safetensors_reads_it(self, file: Path) -> None:
        safetensors = pytest.importorskip("safetensors")
        with safetensors.safe_open(file, framework="numpy") as opened:
            notes = opened.metadata()
            assert (notes["format"], notes["version"]) == ("kvoffload-chunks", "1")
            assert len(list(opened.keys())) == 50
            for i, nbytes in [
                *((i, None) for i in range(30)),
                *((i, DEEP) for i in range(100, 120)),
            ]:
                name = key_of(i).hex()
                tensor = opened.get_tensor(name)
                assert tensor.dtype == np.uint8 and tensor.tobytes() == payload_of(i, nbytes)
                namespace, depth, root = notes[name].split(" ")
                assert int(root, 16) == checksum(tensor, key_of(i))
                if i >= 100:
                    assert (namespace, int(depth)) == ("abcd1234", i - 100)

    def test_older_chunks_come_first(self, file: Path) -> None:
        header, _ = header_of(file)
        names = [n for n in header if n != "__metadata__"]
        assert names[:30] == [key_of(i).hex() for i in range(30)]

    def test_an_empty_store(self, tmp_path: Path) -> None:
        with small(tmp_path / "empty") as store:
            assert store.export(tmp_path / "f").chunks == 0
            assert store.import_(tmp_path / "f").chunks == 0

    def test_memory_stays_bounded(self, tmp_path: Path) -> None:
        with open_store(tmp_path / "s", max_bytes=512 * MIB) as store:
            for i in range(40):
                store.put(key_of(i), payload_of(i, 5 * MIB))
            tracemalloc.start()
            store.export(tmp_path / "f")
            exported = tracemalloc.get_traced_memory()[1]
            with open_store(tmp_path / "t", max_bytes=512 * MIB) as target:
                tracemalloc.reset_peak()
                assert target.import_(tmp_path / "f").imported == 40
                imported = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert max(exported, imported) < 64 * MIB


class TestSelection:
    def names(self, file: Path) -> list[str]:
        return [n for n in header_of(file)[0] if n != "__metadata__"]

    def test_newest_namespace_keys_chain(self, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "f"
        with open_store(source, read_only=True) as store:
            newest = [c.key.hex() for c in store.ls(3)][::-1]
            store.export(out, newest=3)
            assert self.names(out) == newest
            assert store.export(out, namespace=1, overwrite=True).chunks == 15
            assert set(self.names(out)) == {key_of(i).hex() for i in range(1, 30, 2)}
            store.export(out, namespace=(7 << 32) | 1, newest=2, overwrite=True)
            assert self.names(out) == [key_of(27).hex(), key_of(29).hex()]
            report = store.export(out, keys=[key_of(2), key_of(999), key_of(1)], overwrite=True)
            assert (report.chunks, report.missing) == (2, 1)
            assert self.names(out) == [key_of(2).hex(), key_of(1).hex()]
            chain = [key_of(i) for i in (100, 101, 999, 102)]
            report = store.export(out, chain=chain, overwrite=True)
            assert (report.chunks, report.missing) == (2, 2)
            with pytest.raises(ValueError, match="one of them"):
                store.export(out, keys=chain, newest=3)
            with pytest.raises(ValueError, match="16 bytes"):
                store.export(out, keys=[b"short"])

    def test_gone_or_damaged_meanwhile_is_left_out(self, source: Path, tmp_path: Path) -> None:
        (first, *_) = sorted((source / "w0").glob("seg-*.kv"))
        with first.open("r+b") as segment:
            segment.seek(4096)
            byte = segment.read(1)[0]
            segment.seek(4096)
            segment.write(bytes([byte ^ 1]))
        with open_store(source, read_only=True, direct=False) as store:
            report = store.export(tmp_path / "f")
        assert (report.chunks, report.lost) == (49, 1)
        with small(tmp_path / "t") as store:
            assert store.import_(tmp_path / "f").imported == 49

    def test_the_file(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out = tmp_path / "f"
        old = os.umask(0)
        try:
            with open_store(source, read_only=True) as store:
                store.export(out)
                assert stat.S_IMODE(out.stat().st_mode) == 0o600
                before = out.read_bytes()
                with pytest.raises(StoreError, match="already exists"):
                    store.export(out)
                with pytest.raises(StoreError, match="No such file"):
                    store.export(tmp_path / "none" / "f")

                def stop(*_: int) -> None:
                    raise KeyboardInterrupt

                with pytest.raises(KeyboardInterrupt):
                    store.export(out, overwrite=True, progress=stop)
                monkeypatch.setattr(chunk_file, "MAX_HEADER", 1000)
                with pytest.raises(StoreError, match="too many chunks"):
                    store.export(tmp_path / "g")
        finally:
            os.umask(old)
        assert out.read_bytes() == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "source"]


def test_a_killed_export_is_not_in_the_way(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it leaves has another name than the next one's, though in a container the pid is the
    same; one that fails leaves nothing."""
    out = tmp_path / "out"
    out.mkdir()

    def unlink(path: str) -> None:
        raise OSError("killed before")

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with open_store(source, read_only=True) as store:
        with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
            killed.setattr(os, "unlink", unlink)
            store.export(out / "f", progress=stop)
        (left,) = out.iterdir()
        assert left.name.startswith("f.part-")
        with pytest.raises(KeyboardInterrupt):
            store.export(out / "f", progress=stop)
        assert store.export(out / "f").chunks == store.export(out / "f", overwrite=True).chunks
    assert set(out.iterdir()) == {left, out / "f"}


def set_note(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda h: h["__metadata__"].__setitem__(name, value)


A, B = key_of(0).hex(), key_of(1).hex()
HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no metadata": lambda h: h.pop("__metadata__"),
    "metadata is a list": lambda h: h.update(__metadata__=[]),
    "another format": set_note("format", "pt"),
    "a newer version": set_note("version", "2"),
    "no version": lambda h: h["__metadata__"].pop("version"),
    "a note too many": set_note("author", "x"),
    "a note too few": lambda h: h["__metadata__"].pop(A),
    "a note that is none": set_note(A, "zz"),
    "a note that is a number": set_note(A, 7),
    "a depth too large": set_note(A, "00000000 4294967296 0000000000000000"),
    "another dtype": lambda h: h[A].update(dtype="F16"),
    "two dimensions": lambda h: h[A].update(shape=[1, h[A]["shape"][0]]),
    "a wrong shape": lambda h: h[A].update(shape=[1]),
    "negative": lambda h: h[A].update(data_offsets=[-1, h[A]["shape"][0] - 1]),
    "reversed": lambda h: h[A].update(data_offsets=[10, 0], shape=[-10]),
    "floats": lambda h: h[A].update(data_offsets=[0.0, float(h[A]["shape"][0])]),
    "booleans": lambda h: h[A].update(data_offsets=[False, True], shape=[True]),
    "huge": lambda h: h[A].update(data_offsets=[0, 1 << 70], shape=[1 << 70]),
    "overlapping": lambda h: h[B].update(
        data_offsets=[0, h[B]["data_offsets"][1] - h[B]["data_offsets"][0]]
    ),
    "an extra field": lambda h: h[A].update(more=1),
    "a tensor that is a text": lambda h: h.update({A: "x"}),
    "a name that is no key": lambda h: (
        h.update({"../../etc/passwd": h.pop(A)}),
        h["__metadata__"].update({"../../etc/passwd": h["__metadata__"].pop(A)}),
    ),
    "an upper-case name": lambda h: (
        h.update({A.upper(): h.pop(A)}),
        h["__metadata__"].update({A.upper(): h["__metadata__"].pop(A)}),
    ),
}


def test_a_key_is_written_once(tmp_path: Path) -> None:
    """Two payloads under one name are a file that nobody can read."""
    planned = [chunk_file.FileChunk(key_of(i), 0, 0, 0, 0, 3) for i in range(2)]
    writer = chunk_file.ChunkWriter(str(tmp_path / "f"), planned, overwrite=False)
    for i in range(2):
        writer.add(key_of(i), 0, 0, checksum(b"abc", key_of(i)), b"abc")
    with pytest.raises(ValueError, match=key_of(0).hex()):
        writer.add(key_of(0), 0, 0, checksum(b"abc", key_of(0)), b"abc")
    writer.finish()
    with chunk_file.ChunkReader(str(tmp_path / "f")) as reader:
        assert [c.key for c in reader.chunks] == [key_of(0), key_of(1)]


class TestNoRoom:
    @pytest.mark.parametrize("where", ["add", "finish", "replace"])
    def test_leaves_nothing_behind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        """What is buffered cannot be written either when the file is given up."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        out = tmp_path / "out"
        out.mkdir()
        file = out / "chunks.safetensors"
        with small(tmp_path / "s") as store:
            store.put_many((key_of(i), payload_of(i, 3000)) for i in range(100))
            assert store.flush()
            if where == "replace":
                file.mkdir()  # what nothing can be renamed to
            else:
                most = 100_000 if where == "add" else 100  # finish: all of it is in the buffer
                chosen = None if where == "add" else [key_of(1)]
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
            try:
                with pytest.raises(StoreError, match=r"chunk file .*chunks\.safetensors") as caught:
                    if where == "replace":
                        store.export(file, overwrite=True)
                    else:
                        store.export(file, keys=chosen)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.errno == (errno.EISDIR if where == "replace" else errno.EFBIG)
        assert [p.name for p in out.iterdir() if ".part-" in p.name] == []


class TestBadFiles:
    def refused(self, file: Path, tmp_path: Path) -> str:
        """The one line; nothing was put."""
        with small(tmp_path / "target") as store:
            with pytest.raises(StoreError) as caught:
                store.import_(file)
            assert len(store) == 0 and store.stats()["puts"] == 0
        line = str(caught.value)
        assert str(file) in line and "\n" not in line and len(line) < 400
        return line

    @pytest.mark.parametrize("what", HOSTILE)
    def test_hostile_headers(self, file: Path, tmp_path: Path, what: str) -> None:
        header, payload = header_of(file)
        HOSTILE[what](header)
        write(file, header, payload)
        self.refused(file, tmp_path)

    @pytest.mark.parametrize(
        "raw",
        [
            b"",
            b"1234",
            b"PK\x03\x04 a zip, or anything else",
            struct.pack("<Q", 1 << 63) + b"{}",
            struct.pack("<Q", 40 << 20) + b"{}",
            struct.pack("<Q", 100) + b"{}",
            struct.pack("<Q", 2) + b"{}",
            struct.pack("<Q", 2) + b"[]",
            struct.pack("<Q", 4) + b"null",
            struct.pack("<Q", 100_000) + b"[" * 100_000,
            struct.pack("<Q", 4) + b"\xff\xfe{}",
        ],
        ids=range(11),
    )
    def test_not_a_chunk_file(self, tmp_path: Path, raw: bytes) -> None:
        (tmp_path / "f").write_bytes(raw)
        self.refused(tmp_path / "f", tmp_path)

    def test_a_name_given_twice(self, file: Path, tmp_path: Path) -> None:
        header, payload = header_of(file)
        text = json.dumps(header)
        write(file, (text[:-1] + f', "{A}": {json.dumps(header[A])}}}').encode(), payload)
        assert "twice" in self.refused(file, tmp_path)

    def test_another_safetensors_file(self, tmp_path: Path) -> None:
        numpy = pytest.importorskip("safetensors.numpy")
        numpy.save_file({"weight": np.zeros(8, np.float32)}, tmp_path / "f")
        assert "not written by kvoffload" in self.refused(tmp_path / "f", tmp_path)

    def test_truncated_anywhere_or_longer(self, file: Path, tmp_path: Path) -> None:
        raw = file.read_bytes()
        rng = random.Random(1)
        for cut in (1, 8, 100, len(raw) - 1, *(rng.randrange(len(raw)) for _ in range(20))):
            file.write_bytes(raw[:cut])
            self.refused(file, tmp_path)
        file.write_bytes(raw + b"x")
        assert "longer" in self.refused(file, tmp_path)

    def test_missing_and_a_directory(self, tmp_path: Path) -> None:
        assert "No such file" in self.refused(tmp_path / "none", tmp_path)
        (tmp_path / "dir").mkdir()
        assert "directory" in self.refused(tmp_path / "dir", tmp_path)

    def test_flipped_bits_cost_their_chunk(self, file: Path, tmp_path: Path) -> None:
        """Anywhere in the file: nothing, or whole chunks that were exported, and a count."""
        raw = file.read_bytes()
        header, _ = header_of(file)
        start = len(raw) - max(t["data_offsets"][1] for n, t in header.items() if n[0] != "_")
        rng = random.Random(2)
        taken = 0
        for at in [*(rng.randrange(start, len(raw)) for _ in range(12)), *(rng.randrange(start) for _ in range(60))]:  # fmt: skip
            bad = bytearray(raw)
            bad[at] ^= 1 << rng.randrange(8)
            file.write_bytes(bad)
            with small(tmp_path / f"t{at}") as store:
                try:
                    report = store.import_(file)
                except StoreError:
                    assert len(store) == 0 and at < start
                    continue
                taken += 1
                assert report.imported + report.bad == 50 and report.bad <= 1
                assert report.bad == 1 or at < start
                for key, (_, _, payload) in content(store).items():
                    i = next(i for i in range(120) if key_of(i) == key)
                    assert payload == payload_of(i, DEEP if i >= 100 else None)
        assert taken >= 12

    def test_too_large_for_the_store(self, file: Path, tmp_path: Path) -> None:
        with small(tmp_path / "t", segment_bytes=64 << 10) as store:
            report = store.import_(file)
            assert report.refused >= 20 and report.bad == 0
            assert report.imported == 50 - report.refused == len(store)


class TestCli:
    def run(self, *args: object) -> Any:
        return CliRunner().invoke(app, [str(a) for a in args])

    def test_export_import(self, source: Path, tmp_path: Path) -> None:
        out, target = tmp_path / "f", tmp_path / "t"
        small(target).close()
        done = self.run("export", source, out, "--json")
        assert done.exit_code == 0 and json.loads(done.stdout)["chunks"] == 50
        done = self.run("import", target, out, "--json")
        assert done.exit_code == 0 and json.loads(done.stdout)["imported"] == 50
        done = self.run("import", target, out)
        assert done.exit_code == 0 and "50 held before" in done.stdout
        done = self.run("export", source, out)
        assert done.exit_code == 2 and "--force" in done.stderr and done.stderr.count("\n") == 1
        done = self.run("export", source, out, "--force", "--namespace", "abcd1234", "--json")
        assert json.loads(done.stdout)["chunks"] == 20
        done = self.run("export", source, out, "--force", "--newest", 2, "--json")
        assert json.loads(done.stdout)["chunks"] == 2
        keys = [key_of(i).hex() for i in (1, 2, 3)]
        done = self.run(
            "export", source, out, "--force", "--key", keys[0], "--key", keys[1], "--json"
        )
        assert json.loads(done.stdout)["chunks"] == 2
        done = self.run("export", source, out, "--force", "--chain", ",".join(keys), "--json")
        assert json.loads(done.stdout)["chunks"] == 3
        done = self.run("export", source, out, "--force", "--key", "ab" * 16)
        assert done.exit_code == 1 and "1 not held" in done.stdout

    def test_wrong_options_are_one_line(self, source: Path, file: Path, tmp_path: Path) -> None:
        for args in (
            ("export", source, tmp_path / "o", "--key", "xyz"),
            ("export", source, tmp_path / "o", "--namespace", "xyz"),
            ("export", source, tmp_path / "o", "--key", "00" * 16, "--newest", 1),
            ("export", tmp_path / "none", tmp_path / "o"),
            ("import", source, tmp_path / "none"),
            ("import", tmp_path, file),
        ):
            done = self.run(*args)
            assert done.exit_code == 2, done.output
            assert done.stderr.strip() and done.stderr.count("\n") == 1
        assert not (tmp_path / "o").exists()

    def test_damage_is_exit_status_1(self, source: Path, file: Path, tmp_path: Path) -> None:
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
        small(tmp_path / "t").close()
        done = self.run("import", tmp_path / "t", file, "--json")
        assert done.exit_code == 1
        assert {k: json.loads(done.stdout)[k] for k in ("imported", "bad")} == {
            "imported": 49,
            "bad": 1,
        }

    def test_several_drives(self, tmp_path: Path) -> None:
        a, b = tmp_path / "a", tmp_path / "b"
        with open_store([a, b], max_bytes=16 * MIB) as store:
            for i in range(8):
                store.put(key_of(i), payload_of(i))
        done = json.loads(self.run("stats", b, a, "--json").stdout)
        assert done["entries"] == 8 and done["drives_up"] == 2
        assert [d["path"] for d in done["per_drive"]] == [str(b), str(a)]
        assert [d["entries"] for d in done["per_drive"]] == [4, 4]
        shown = self.run("stats", a, b)
        assert shown.exit_code == 0 and "drive" in shown.stdout
        done = json.loads(self.run("ls", a, b, "--json").stdout)
        assert [c["key"] for c in done["chunks"]] == [key_of(i).hex() for i in reversed(range(8))]
        done = json.loads(self.run("verify", a, b, "--json").stdout)
        assert (done["checked"], done["bad"]) == (8, 0)
        done = json.loads(self.run("export", a, b, tmp_path / "f", "--json").stdout)
        assert done["chunks"] == 8
        for command in ("stats", "ls", "verify"):
            bad = self.run(command, a, tmp_path / "none", b)
            assert bad.exit_code == 2 and bad.stderr.count("\n") == 1
            assert str(tmp_path / "none") in bad.stderr
            bad = self.run(command, a, a)
            assert bad.exit_code == 2 and "same directory" in bad.stderr
