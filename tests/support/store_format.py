"""The chunk store's format a second time, written from docs/format.md and sharing no code with csrc/.

Writes and reads whole files as bytes; slow and strict. Raises ValueError where a structure does not
count.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace

import xxhash

BLOCK = 4096
LEAF = 16384
PUT, DELETE = 1, 2
_RECORD = struct.Struct("<2sBBIQ16sIIIIQII")
_HEADER = struct.Struct("<8sII16sIIQQQ")
_TRAILER = struct.Struct("<8sII16sQQQI")
assert _RECORD.size == 64 and _HEADER.size == 64 and _TRAILER.size == 60


def _table() -> list[int]:
    out = []
    for n in range(256):
        for _ in range(8):
            n = (n >> 1) ^ (0x82F63B78 if n & 1 else 0)
        out.append(n)
    return out


_CRC = _table()


@functools.lru_cache(1 << 16)  # crash tests look at the same pages again and again
def crc32c(data: bytes, crc: int = 0) -> int:
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _CRC[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def payload_checksum(payload: bytes, key: bytes) -> int:
    low, high = struct.unpack("<QQ", key)
    seed = low ^ high
    leaves = [payload[i : i + LEAF] for i in range(0, len(payload), LEAF)]
    hashes = b"".join(struct.pack("<Q", xxhash.xxh3_64_intdigest(x, seed)) for x in leaves)
    return xxhash.xxh3_64_intdigest(hashes, seed)


def manifest(uuid: bytes, segment_bytes: int, max_bytes: int, version: int = 1) -> bytes:
    text = f"kvoffload chunk store\nformat {version}\nuuid {uuid.hex()}\n"
    text += f"segment_bytes {segment_bytes}\nmax_bytes {max_bytes}\n"
    return f"{text}crc32c {crc32c(text.encode()):08x}\n".encode()


def manifest_uuid(text: bytes) -> bytes:
    lines = dict(line.split(" ", 1) for line in text.decode().splitlines()[1:])
    uuid = bytes.fromhex(lines["uuid"])
    if text != manifest(uuid, int(lines["segment_bytes"]), int(lines["max_bytes"])):
        raise ValueError("damaged MANIFEST")
    return uuid


@dataclass(frozen=True)
class Header:
    seg: int
    uuid: bytes
    writer: int
    gen: int
    nbytes: int
    version: int = 1

    def pack(self) -> bytes:
        head = _HEADER.pack(
            b"KVOSEG1\0",
            self.version,
            self.seg,
            self.uuid,
            self.writer,
            0,
            self.gen,
            self.gen,
            self.nbytes,
        )
        page = head + bytes(4092 - len(head))
        return page + struct.pack("<I", crc32c(page))

    @staticmethod
    def parse(page: bytes) -> Header:
        magic, version, seg, uuid, writer, zero, gen, epoch, nbytes = _HEADER.unpack_from(page)
        out = Header(seg, uuid, writer, gen, nbytes, version)
        if magic != b"KVOSEG1\0" or zero or epoch != gen or version != 1 or out.pack() != page:
            raise ValueError("no segment header")
        return out


@dataclass(frozen=True)
class Record:
    kind: int
    seq: int
    key: bytes
    seg: int
    gen: int
    off4k: int = 0
    nbytes: int = 0
    checksum: int = 0
    namespace: int = 0
    depth: int = 0

    def pack(self, uuid: bytes) -> bytes:
        def fields(crc: int) -> bytes:
            return _RECORD.pack(
                b"KR",
                self.kind,
                0,
                crc,
                self.seq,
                self.key,
                self.seg,
                self.gen,
                self.off4k,
                self.nbytes,
                self.checksum,
                self.namespace,
                self.depth,
            )

        return fields(crc32c(uuid + fields(0)))

    @staticmethod
    def parse(raw: bytes, uuid: bytes) -> Record:
        magic, kind, flags, _, seq, key, *rest = _RECORD.unpack(raw)
        out = Record(kind, seq, key, *rest)
        if magic != b"KR" or flags or kind not in (PUT, DELETE) or out.pack(uuid) != raw:
            raise ValueError("no record")
        return out

    def counts(self, header: Header, file_bytes: int) -> bool:
        """Whether it belongs to the file and life that ``header`` names."""
        if (self.seg, self.gen) != (header.seg, header.gen) or self.seq >= 1 << 63:
            return False
        end = self.off4k * BLOCK + -(-self.nbytes // BLOCK) * BLOCK
        if self.kind == DELETE:
            return self.off4k == self.nbytes == 0
        return self.nbytes > 0 and self.off4k > 0 and end <= file_bytes


@dataclass(frozen=True)
class Trailer:
    seg: int
    uuid: bytes
    gen: int
    records_off: int
    count: int
    records_crc: int

    def pack(self) -> bytes:
        fields = (1, self.seg, self.uuid, self.gen, self.records_off, self.count, self.records_crc)
        head = _TRAILER.pack(b"KVOFOOT1", *fields)
        page = head + bytes(4092 - len(head))
        return page + struct.pack("<I", crc32c(page))

    @staticmethod
    def parse(page: bytes) -> Trailer:
        magic, version, seg, uuid, *rest = _TRAILER.unpack_from(page)
        out = Trailer(seg, uuid, *rest)
        if magic != b"KVOFOOT1" or version != 1 or out.pack() != page:
            raise ValueError("no trailer")
        return out


def journal(records: Iterable[bytes]) -> bytes:
    return padded(b"".join(records))


def records_in(raw: bytes, uuid: bytes) -> list[Record]:
    """Those of an array that count by themselves; others are skipped."""
    out = []
    for at in range(0, len(raw) - 63, 64):
        if raw[at : at + 2] == b"KR":
            try:
                out.append(Record.parse(raw[at : at + 64], uuid))
            except ValueError:
                continue
    return out


def footer_records(data: bytes, header: Header) -> list[Record] | None:
    """The records of a sealed segment, None where the footer does not count."""
    try:
        trailer = Trailer.parse(data[-BLOCK:])
    except ValueError:
        return None
    if (trailer.seg, trailer.uuid, trailer.gen) != (header.seg, header.uuid, header.gen):
        return None
    end = trailer.records_off + 64 * trailer.count
    raw = data[trailer.records_off : end]
    if trailer.records_off % BLOCK or end > len(data) or crc32c(raw) != trailer.records_crc:
        return None
    return records_in(raw, header.uuid)


def seal(data: bytes, header: Header, records: list[Record], nbytes: int) -> bytes:
    """A segment of ``nbytes`` from header and payload blocks ``data``, with its footer."""
    raw = b"".join(r.pack(header.uuid) for r in records)
    off = len(data)
    body = (data + padded(raw)).ljust(nbytes - BLOCK, b"\0")
    trailer = Trailer(header.seg, header.uuid, header.gen, off, len(records), crc32c(raw))
    return body + trailer.pack()


def segments(files: dict[str, bytes]) -> dict[str, tuple[Header, list[Record], bool]]:
    """Per segment file with a header that counts: header, records that count, whether sealed."""
    if "MANIFEST" not in files:  # lost before the store was ever used
        return {}
    uuid = manifest_uuid(files["MANIFEST"])
    out: dict[str, tuple[Header, list[Record], bool]] = {}
    for name, data in sorted(files.items()):
        folder, _, base = name.rpartition("/")
        if not (base.startswith("seg-") and base.endswith(".kv")):
            continue
        try:
            header = Header.parse(data[:BLOCK])
        except (ValueError, struct.error):
            continue
        if (header.uuid, f"w{header.writer}") != (uuid, folder) or header.seg != int(base[4:-3]):
            continue
        records = footer_records(data, header)
        sealed = records is not None
        if records is None:
            journals = (d for n, d in sorted(files.items()) if n.startswith(f"{folder}/journal-"))
            records = [r for raw in journals for r in records_in(raw, uuid)]
        out[name] = header, [r for r in records if r.counts(header, len(data))], sealed
    return out


def read_store(files: dict[str, bytes]) -> dict[bytes, bytes]:
    """What a directory (paths below it -> content) serves: every key with a payload that fits."""
    best: dict[bytes, tuple[Record, bytes]] = {}
    for name, (_, records, _) in segments(files).items():
        for record in records:
            if record.key not in best or best[record.key][0].seq < record.seq:
                at = record.off4k * BLOCK
                best[record.key] = record, files[name][at : at + record.nbytes]
    return {
        key: payload
        for key, (record, payload) in best.items()
        if record.kind == PUT and payload_checksum(payload, key) == record.checksum
    }


def forge_checksums(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same store, every record naming whatever its extent holds: a store that never verifies."""
    out = dict(files)
    for name, (header, records, sealed) in segments(files).items():
        data, uuid = files[name], header.uuid

        def signed(record: Record, data: bytes = data) -> Record:
            at = record.off4k * BLOCK
            found = payload_checksum(data[at : at + record.nbytes], record.key)
            return replace(record, checksum=found) if record.kind == PUT else record

        if sealed:
            trailer = Trailer.parse(data[-BLOCK:])
            out[name] = seal(
                data[: trailer.records_off], header, list(map(signed, records)), len(data)
            )
        else:  # a journal of its own, read beside the others; the records keep their seq
            folder = name.rpartition("/")[0]
            raw = journal(replace(signed(r), seq=r.seq + 1).pack(uuid) for r in records)
            out[f"{folder}/journal-{header.gen}"] = raw
    return out


def forget_generations(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same store as if no header had been rewritten before its segment was overwritten."""
    out = dict(files)
    for name, (header, _, sealed) in segments(files).items():
        if not sealed:
            try:
                old = Trailer.parse(files[name][-BLOCK:])
            except ValueError:
                continue
            out[name] = replace(header, gen=old.gen).pack() + files[name][BLOCK:]
    return out
