"""LMCache's disk backends, driven alone in LMCache's own venv: the best that this venv has.

That is raw_block (O_DIRECT, io_uring; a Rust extension of its own), else fs_native (O_DIRECT, a
native thread pool, one file per chunk).

``Lmcache`` is the side in the benchmark's process: the same calls as ``Driver``, which runs in the
child: ``python peer_lmcache.py``, commands and samples as JSON lines.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    # The benchmarks' modules, not this folder's.
    sys.path = [p for p in sys.path if Path(p).resolve() != HERE]
    sys.path.insert(0, str(HERE.parent))
    for name, value in (("LMCACHE_TRACK_USAGE", "false"), ("DO_NOT_TRACK", "1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")
    os.environ.setdefault("PYTHONHASHSEED", "0")

from stores.drive import Driver, Ring, Sample  # noqa: E402  (the path is set above)

MIB = 1 << 20
HEADER, META = 4096, 16 * MIB


class Lmcache:
    """A child that has LMCache imported, and one open backend in it at a time.

    Raises RuntimeError with the child's last words.
    """

    def __init__(self, python: Path, log: Path) -> None:
        self._log, self._folder, self.backend = log, log, ""
        with log.open("w") as errors:
            self._child = subprocess.Popen(
                [str(python), str(HERE / "peer_lmcache.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def open(self, folder: Path, rows: int, size: int, held: int) -> Lmcache:
        """A fresh backend in ``folder``, which must not exist, with room for ``held`` chunks."""
        self._folder = folder
        self.backend = self._ask("open", str(folder), rows, size, held)
        return self

    def _answer(self) -> Any:
        assert self._child.stdout is not None
        while line := self._child.stdout.readline():
            if line.startswith("@"):
                return json.loads(line[1:])
        said = self._log.read_text(errors="replace").strip().splitlines()
        raise RuntimeError(f"lmcache: {said[-1] if said else 'the child ended'}")

    def _ask(self, what: str, *values: Any) -> Any:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps([what, *values]) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        return self._answer()

    def batch(self, chunks: list[int], write: bool, per_job: int) -> Sample:
        return Sample(**self._ask("batch", chunks, write, per_job))

    def singles(self, chunks: list[int], write: bool, depth: int) -> Sample:
        return Sample(**self._ask("singles", chunks, write, depth))

    def beside_load(self, puts: list[int], held: list[int], depth: int) -> Sample:
        return Sample(**self._ask("beside_load", puts, held, depth))

    def forget(self, chunks: list[int]) -> None:
        self._ask("forget", chunks)

    def close(self) -> None:
        """Closes the backend and removes its folder; the child stays."""
        self._ask("close")
        shutil.rmtree(self._folder, ignore_errors=True)

    def stop(self) -> None:
        """Ends the child."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            self._child.wait(20)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


# -- in the child ----------------------------------------------------------------------------


class L2Adapter:
    """An LMCache L2 adapter as an ``Engine``; ``path``: a folder of its own."""

    def __init__(self, path: Path, rows: int, size: int, held: int) -> None:
        import mmap

        path.mkdir()
        self.ring = Ring(mmap.mmap(-1, rows * size), rows, size)
        try:
            self._adapter = self._open("raw_block", self._block_file(path / "blocks", size, held))
            self.backend = "raw_block"
        except RuntimeError as error:
            if "not installed" not in str(error):
                raise
            (path / "blocks").unlink()
            settings = {"base_path": str(path), "num_workers": 4, "use_odirect": True}
            self._adapter = self._open("fs_native", settings)
            self.backend = "fs_native (raw_block: its Rust extension is not installed)"
        self._jobs: dict[tuple[str, int], tuple[int, list[Any], list[Any]]] = {}
        self._done: list[tuple[int, bool]] = []
        self._describe(rows, size)
        self._poller = select.poll()
        adapter = self._adapter
        self._events = {
            adapter.get_store_event_fd(): self._stored,
            adapter.get_lookup_and_lock_event_fd(): self._found,
            adapter.get_load_event_fd(): self._loaded,
        }
        for fd in self._events:
            self._poller.register(fd, select.POLLIN)

    def _open(self, kind: str, settings: dict[str, Any]) -> Any:
        from lmcache.v1.distributed.internal_api import L1MemoryDesc
        from lmcache.v1.distributed.l2_adapters import config, create_l2_adapter, factory

        factory.ensure_adapter_loaded(kind)
        made = config.get_l2_adapter_config_class(kind).from_dict({"type": kind} | settings)
        data = self.ring.data
        memory = L1MemoryDesc(ptr=data.ctypes.data, size=data.nbytes, align_bytes=4096)
        adapter = create_l2_adapter(made, memory)
        if hasattr(adapter, "set_backend_identity"):
            adapter.set_backend_identity(kind)
        return adapter

    @staticmethod
    def _block_file(path: Path, size: int, held: int) -> dict[str, Any]:
        """Settings of raw_block on a file with room for twice ``held`` chunks."""
        import numpy as np

        slot = size + HEADER
        nbytes = META + slot * (2 * held + 2)
        nbytes = -(-nbytes // HEADER) * HEADER
        with path.open("wb") as file:  # written once, as the other systems' space is
            noise = np.random.default_rng(1).integers(0, 256, 4 * MIB, dtype=np.uint8).tobytes()
            file.write(bytes(META))
            for at in range(META, nbytes, 4 * MIB):
                file.write(noise[: nbytes - at])
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        settings = {"device_path": str(path), "slot_bytes": slot, "use_odirect": True}
        return settings | {"meta_total_bytes": META, "io_engine": "io_uring"}

    def _describe(self, rows: int, size: int) -> None:
        import torch
        from lmcache.v1.distributed.api import MemoryLayoutDesc
        from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

        shape = torch.Size([size])
        whole = torch.from_numpy(self.ring.data)
        self._layout = {0: MemoryLayoutDesc(shapes=[shape], dtypes=[torch.uint8])}
        self._objects = []
        for row in range(rows):
            meta = MemoryObjMetadata(
                shape=shape,
                dtype=torch.uint8,
                address=row * size,
                phy_size=size,
                ref_count=1,
                fmt=MemoryFormat.BINARY_BUFFER,
            )
            self._objects.append(TensorMemoryObj(whole[row], meta, parent_allocator=None))

    @staticmethod
    def _key(chunk: int) -> Any:
        from lmcache.v1.distributed.api import ObjectKey

        return ObjectKey(chunk_hash=chunk.to_bytes(32, "big"), model_name="bench", kv_rank=0)

    def prepare(self, chunks: list[int], rows: list[int], write: bool) -> None:
        """Nothing."""

    def start(self, job: int, chunks: list[int], rows: list[int], write: bool) -> None:
        keys, objects = [self._key(c) for c in chunks], [self._objects[r] for r in rows]
        if write:
            task = self._adapter.submit_store_task(keys, objects)
            self._jobs["store", task] = (job, keys, objects)
        else:
            task = self._adapter.submit_lookup_and_lock_task(keys, self._layout)
            self._jobs["lookup", task] = (job, keys, objects)

    def _stored(self) -> None:
        for task, result in self._adapter.pop_completed_store_tasks().items():
            job, _, _ = self._jobs.pop(("store", task))
            self._done.append((job, bool(result.is_successful())))

    def _found(self) -> None:
        for kind, task in [k for k in self._jobs if k[0] == "lookup"]:
            hits = self._adapter.query_lookup_and_lock_result(task)
            if hits is None:
                continue
            job, keys, objects = self._jobs.pop((kind, task))
            if hits.popcount() < len(keys):
                self._done.append((job, False))
                continue
            loading = self._adapter.submit_load_task(keys, objects)
            self._jobs["load", loading] = (job, keys, objects)

    def _loaded(self) -> None:
        for kind, task in [k for k in self._jobs if k[0] == "load"]:
            loaded = self._adapter.query_load_result(task)
            if loaded is None:
                continue
            job, keys, _ = self._jobs.pop((kind, task))
            self._adapter.submit_unlock(keys)
            self._done.append((job, loaded.popcount() == len(keys)))

    def next_done(self) -> tuple[int, bool]:
        while not self._done:
            ready = self._poller.poll(60_000)
            if not ready:
                raise TimeoutError("lmcache finished no job in a minute")
            for fd, _ in ready:
                os.read(fd, 8)
                self._events[fd]()
        return self._done.pop()

    def forget(self, chunks: list[int]) -> None:
        self._adapter.delete([self._key(c) for c in chunks])

    def close(self) -> None:
        self._adapter.close()


def serve() -> None:
    """Commands from stdin until it ends; each is answered with one line."""
    driver: Driver | None = None
    for line in sys.stdin:
        what, *values = json.loads(line)
        answer: Any = None
        if what == "open":
            folder, rows, size, held = values
            engine = L2Adapter(Path(folder), rows, size, held)
            driver, answer = Driver(engine, engine.ring), engine.backend
        else:
            sample = getattr(driver, what)(*values)
            answer = asdict(sample) if sample else None
        print("@" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
    sys.stdout.flush()
    os._exit(0)  # its threads do not all end
