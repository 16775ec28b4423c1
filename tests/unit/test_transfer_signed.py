"""Signed chunk files: what is not signed with the key is refused whole."""

from __future__ import annotations

import json
import os
import random
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvoffload.cli.store import app
from kvoffload.errors import StoreError
from kvoffload.signing import read_key
from kvoffload.store import open_store
from tests.unit.test_transfer import MIB, content, header_of, key_of, payload_of, small, write

KEY = b"0123456789abcdef"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    with small(tmp_path / "source") as store:
        for i in range(6):
            store.put(key_of(i), payload_of(i), namespace=i % 2)
    return tmp_path / "source"


@pytest.fixture
def signed(source: Path, tmp_path: Path) -> Path:
    with open_store(source, read_only=True) as store:
        store.export(tmp_path / "signed", sign_key=KEY)
    return tmp_path / "signed"


def refused(file: Path, folder: Path, key: bytes = KEY) -> str:
    """The one line; nothing was put."""
    with small(folder) as store:
        with pytest.raises(StoreError) as caught:
            store.import_(file, verify_key=key)
        assert len(store) == 0 and store.stats()["puts"] == 0
    line = str(caught.value)
    assert str(file) in line and "\n" not in line
    return line


def test_there_and_back(source: Path, signed: Path, tmp_path: Path) -> None:
    with open_store(source, read_only=True) as store:
        want = content(store)
    for key in (KEY, None):
        with small(tmp_path / f"t{key is None}") as store:
            assert store.import_(signed, verify_key=key).imported == 6
            assert content(store) == want
    notes = header_of(signed)[0]["__metadata__"]
    assert notes["version"] == "2" and re.fullmatch("[0-9a-f]{64}", notes["hmac-sha256"])


def test_an_empty_store_is_signed_too(tmp_path: Path) -> None:
    with small(tmp_path / "empty") as store:
        store.export(tmp_path / "f", sign_key=KEY)
        assert store.import_(tmp_path / "f", verify_key=KEY).chunks == 0
        with pytest.raises(StoreError):
            store.import_(tmp_path / "f", verify_key=KEY + b"x")


def test_unsigned_or_another_key(source: Path, signed: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    with open_store(source, read_only=True) as store:
        store.export(plain)
    assert header_of(plain)[0]["__metadata__"]["version"] == "1"
    assert "not signed" in refused(plain, tmp_path / "t")
    assert "not of this key" in refused(signed, tmp_path / "t", b"fedcba9876543210")


def test_any_changed_bit_is_refused(signed: Path, tmp_path: Path) -> None:
    raw = signed.read_bytes()
    rng = random.Random(1)
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    places = [8, start - 1, start, len(raw) - 1, *(rng.randrange(len(raw)) for _ in range(40))]
    places += [rng.randrange(8, start) for _ in range(40)]
    for at in places:
        bad = bytearray(raw)
        bad[at] ^= 1 << rng.randrange(8)
        signed.write_bytes(bad)
        refused(signed, tmp_path / "t")
    signed.write_bytes(raw + b"x")
    refused(signed, tmp_path / "t")


def test_a_payload_with_a_right_checksum_is_refused(signed: Path, tmp_path: Path) -> None:
    """What a signature is for: the checksum in the header can be computed by anybody."""
    from kvoffload._core import checksum

    header, payload = header_of(signed)
    name = key_of(0).hex()
    begin, end = header[name]["data_offsets"]
    forged = bytearray(payload)
    forged[begin] ^= 1
    root = checksum(bytes(forged[begin:end]), key_of(0))
    space, depth, _ = header["__metadata__"][name].split()
    header["__metadata__"][name] = f"{space} {depth} {root:016x}"
    text = json.dumps(header, separators=(",", ":"))
    write(signed, text.encode(), bytes(forged))
    with small(tmp_path / "trusting") as store:
        assert store.import_(signed).imported == 6, "the forgery is a good one"
    refused(signed, tmp_path / "t")


HOSTILE = {
    "no signature": lambda notes: notes.pop("hmac-sha256"),
    "one that is none": lambda notes: notes.update({"hmac-sha256": "zz"}),
    "an unsigned version": lambda notes: notes.update(version="1"),
    "a newer version": lambda notes: notes.update(version="3"),
    "a number": lambda notes: notes.update({"hmac-sha256": 7}),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_notes(signed: Path, tmp_path: Path, what: str) -> None:
    header, payload = header_of(signed)
    HOSTILE[what](header["__metadata__"])
    write(signed, json.dumps(header, separators=(",", ":")).encode(), payload)
    refused(signed, tmp_path / "t")
    with small(tmp_path / "t") as store, pytest.raises(StoreError):
        store.import_(signed)


def test_memory_and_larger_files(tmp_path: Path) -> None:
    with open_store(tmp_path / "s", max_bytes=64 * MIB) as store:
        for i in range(5):
            store.put(key_of(i), payload_of(i, 3 * MIB + 7))
        store.export(tmp_path / "f", sign_key=KEY)
    with open_store(tmp_path / "t", max_bytes=64 * MIB) as store:
        assert store.import_(tmp_path / "f", verify_key=KEY).imported == 5


# -- the key file


def test_key_files(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(KEY + b"\n")
    file.chmod(0o600)
    assert read_key(file) == KEY
    file.chmod(0o400)
    assert read_key(file) == KEY
    file.chmod(0o600)
    file.write_bytes(bytes(range(32)))
    assert read_key(file) == bytes(range(32))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777])
def test_a_key_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "key"
    file.write_bytes(KEY)
    file.chmod(mode)
    with pytest.raises(StoreError, match=r"key file .*chmod 600"):
        read_key(file)


def test_other_bad_key_files(tmp_path: Path) -> None:
    file = tmp_path / "key"
    for text in (b"", b"short\n", b"x" * 15, b"x" * 4097, b"x" * 10_000):
        file.write_bytes(text)
        file.chmod(0o600)
        with pytest.raises(StoreError, match="16 to 4096 bytes"):
            read_key(file)
    with pytest.raises(StoreError, match="No such file"):
        read_key(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe", 0o600)
    for other in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(StoreError, match=r"not a file|directory"):
            read_key(other)


def run(*args: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


def test_cli(source: Path, tmp_path: Path) -> None:
    key, other, out, target = (tmp_path / n for n in ("key", "other", "out", "t"))
    for file, text in ((key, KEY), (other, KEY[::-1])):
        file.write_bytes(text)
        file.chmod(0o600)
    small(target).close()
    assert run("export", source, out, "--sign-key", key).exit_code == 0
    bad = run("import", target, out, "--verify-key", other)
    assert bad.exit_code == 2 and bad.stderr.count("\n") == 1 and "nothing imported" in bad.stderr
    key.chmod(0o644)
    for args in (("import", target, out, "--verify-key"), ("export", source, out, "--sign-key")):
        bad = run(*args, key)
        assert bad.exit_code == 2 and "chmod 600" in bad.stderr and bad.stderr.count("\n") == 1
    key.chmod(0o600)
    done = run("import", target, out, "--verify-key", key, "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["imported"] == 6
