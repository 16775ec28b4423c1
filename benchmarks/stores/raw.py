"""The disk's limit: O_DIRECT through io_uring by a small native loop (raw.cpp), registered memory.

The file is written once before anything is measured, as the store's segments are.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
from common import Skip

from stores.drive import Sample


def build(folder: Path) -> ctypes.CDLL:
    """Compiles raw.cpp. Raises Skip where there is no compiler or no liburing."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        raise Skip("no C++ compiler to build the raw io_uring loop with")
    out = folder / "raw.so"
    source = Path(__file__).with_name("raw.cpp")
    command = [compiler, "-std=c++20", "-O2", "-shared", "-fPIC", "-o", str(out), str(source)]
    done = subprocess.run([*command, "-luring"], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise Skip(f"the raw io_uring loop does not build: {done.stderr.strip()[-300:]}")
    return ctypes.CDLL(str(out))


class Raw:
    """``rows`` pieces of memory, a file of ``held`` pieces; the same calls as ``Driver``."""

    def __init__(self, lib: ctypes.CDLL, path: Path, rows: int, size: int, held: int) -> None:
        self._lib, self._path, self._rows, self._size, self._held = lib, path, rows, size, held
        self._memory = mmap.mmap(-1, rows * size)
        self._base = np.frombuffer(self._memory, dtype=np.uint8)
        self._base[:] = np.random.default_rng(0).integers(0, 256, rows * size, dtype=np.uint8)
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        except OSError as error:
            raise Skip(f"no O_DIRECT file here: {error.strerror}") from error
        os.posix_fallocate(self._fd, 0, held * size)
        self._transfer(list(range(held)), True, 4)

    def _transfer(self, chunks: list[int], write: bool, depth: int, first_row: int = 0) -> Sample:
        n = len(chunks)
        offsets = np.array(chunks, dtype=np.uint64) % np.uint64(self._held) * np.uint64(self._size)
        rows = first_row + np.arange(n, dtype=np.uint64) % np.uint64(self._rows - first_row)
        memory, ms = rows * np.uint64(self._size), np.zeros(n)
        seconds, cpu = ctypes.c_double(), ctypes.c_double()
        err = self._lib.kvo_raw(
            ctypes.c_int(self._fd),
            ctypes.c_int(write),
            ctypes.c_uint(depth),
            ctypes.c_uint64(n),
            ctypes.c_uint64(self._size),
            offsets.ctypes.data_as(ctypes.c_void_p),
            memory.ctypes.data_as(ctypes.c_void_p),
            self._base.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_uint64(self._base.size),
            ms.ctypes.data_as(ctypes.c_void_p),
            ctypes.byref(seconds),
            ctypes.byref(cpu),
        )
        if err:
            raise Skip(f"raw io_uring: {os.strerror(err)}")
        return Sample(n * self._size, seconds.value, cpu.value, ms.tolist())

    def batch(self, chunks: list[int], write: bool, per_job: int) -> Sample:
        """All chunks, 16 at a time: the depth of the store's ring."""
        return self._transfer(chunks, write, 16)

    def singles(self, chunks: list[int], write: bool, depth: int) -> Sample:
        return self._transfer(chunks, write, depth)

    def beside_load(self, puts: list[int], held: list[int], depth: int) -> Sample:
        """Single writes while another thread keeps ``depth`` reads in flight."""
        over, failed = threading.Event(), []

        def load() -> None:
            rng = random.Random(1)
            try:
                while not over.is_set():
                    self._transfer(rng.choices(held, k=8 * depth), False, depth, 1)
            except Skip as error:
                failed.append(error)

        reader = threading.Thread(target=load)
        reader.start()
        try:
            sample = self._transfer(puts, True, 1)
        finally:
            over.set()
            reader.join()
        if failed:
            raise failed[0]
        return sample

    def forget(self, chunks: list[int]) -> None:
        """The file is written over."""

    def close(self) -> None:
        os.close(self._fd)
        self._path.unlink(missing_ok=True)
