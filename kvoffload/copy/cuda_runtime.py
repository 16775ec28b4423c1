"""The few CUDA calls the copy engine needs, behind a protocol, and pinning of the arena.

Copies that any memory takes: ``cudaMemcpyAsync`` with ``cudaMemcpyDefault`` through ctypes on the
libcudart that torch has loaded (torch does not expose it); streams and events are torch's. ctypes
and torch release the GIL during the calls. Errors are taken off the thread's error state at once:
a refused call of ours is never reported by the next kernel launch of somebody else. The faster ways
are in movers.py and kernels.py.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from kvoffload.copy.runs import Run
from kvoffload.errors import UnsupportedError

logger = logging.getLogger("vllm.kvoffload")

PIECE_BYTES = 128 << 20
"""The arena is pinned in pieces of this many bytes. Smaller ones hold the driver's locks, for which
the model's launches may have to wait, less long at a time. Unmeasured on a GPU, as is the size."""

_MEMCPY_DEFAULT = 4  # direction from the addresses (unified addressing: every 64-bit Linux)
_HOST_REGISTER_FLAGS = 1 | 2  # portable, mapped: kernels read and write the arena themselves
_ATTRIBUTE_USE_HOST_POINTER = 91  # cudaDevAttrCanUseHostPointerForRegisteredMem
_CAPTURE_MODE_RELAXED = 2


class Runtime(Protocol):
    """What the engine needs of CUDA. Any thread may call anything after ``enter_thread``.

    Every method raises on an error of the device or driver (RuntimeError, OSError).
    """

    def enter_thread(self) -> None:
        """Make the engine's device current in the calling host thread."""

    def stream(self, high_priority: bool) -> Any:
        """A new stream."""

    def mark(self) -> Any:
        """Event at the end of what the calling thread's current (compute) stream holds now."""

    def record(self, stream: Any) -> Any:
        """Event at the end of what ``stream`` holds now."""

    def wait_event(self, stream: Any, event: Any) -> None:
        """Later work on ``stream`` starts after ``event``. Does not block the host."""

    def synchronize(self, event: Any) -> None:
        """Block the calling host thread, without the GIL, until ``event`` is complete."""

    def drain(self, stream: Any) -> None:
        """Block the calling host thread, without the GIL, until ``stream`` holds nothing."""

    def copy(self, runs: Sequence[Run], arena: int, to_device: bool, stream: Any) -> None:
        """Enqueue the copies between device and the arena's data at address ``arena``, in order.

        May block the host where the arena piece is not pinned. On an error the copies before the
        failing one are enqueued.
        """

    def host_register(self, address: int, nbytes: int) -> None:
        """Pin host memory."""

    def host_unregister(self, address: int) -> None:
        """Undo ``host_register``."""


def load_cudart() -> ctypes.CDLL:
    """The CUDA runtime library torch uses. Raises UnsupportedError without one (CPU, ROCm)."""
    version = torch.version.cuda
    if not version:
        raise UnsupportedError(f"torch {torch.__version__} is not a CUDA build")
    name = f"libcudart.so.{version.split('.')[0]}"
    try:
        # torch has loaded it under this soname: this finds that very copy, wherever it lies.
        lib = ctypes.CDLL(name)
    except OSError as exc:
        raise UnsupportedError(f"cannot use torch's CUDA runtime: {exc}") from exc
    declare(lib)
    return lib


def declare(lib: ctypes.CDLL) -> None:
    """Give the functions their C signatures. Raises AttributeError where one is missing."""
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    lib.cudaMemcpyAsync.argtypes = [pointer, pointer, size, ctypes.c_int, pointer]
    lib.cudaHostRegister.argtypes = [pointer, size, ctypes.c_uint]
    lib.cudaHostUnregister.argtypes = [pointer]
    lib.cudaThreadExchangeStreamCaptureMode.argtypes = [ctypes.POINTER(ctypes.c_int)]
    lib.cudaDeviceGetAttribute.argtypes = [ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int]
    lib.cudaGetLastError.argtypes = []
    lib.cudaGetErrorString.argtypes = [ctypes.c_int]
    lib.cudaGetErrorString.restype = ctypes.c_char_p


def check_status(lib: ctypes.CDLL, call: str, status: int) -> None:
    """Raise RuntimeError unless ``status`` is cudaSuccess; clears the calling thread's error."""
    if status:
        lib.cudaGetLastError()
        text = lib.cudaGetErrorString(status).decode(errors="replace")
        raise RuntimeError(f"{call}: {text} ({status})")


class CudaRuntime:
    """Runtime on the current torch device of the thread that makes it."""

    def __init__(self) -> None:
        self._lib = load_cudart()
        self._device = torch.cuda.current_device()

    def enter_thread(self) -> None:
        """See Runtime. Our calls must not break a CUDA graph capture in another thread."""
        torch.cuda.set_device(self._device)
        mode = ctypes.c_int(_CAPTURE_MODE_RELAXED)
        self._check(
            "cudaThreadExchangeStreamCaptureMode",
            self._lib.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode)),
        )

    def stream(self, high_priority: bool) -> Any:
        """See Runtime. 0 is CUDA's lowest priority, that of ordinary compute streams."""
        return torch.cuda.Stream(device=self._device, priority=-1 if high_priority else 0)

    def mark(self) -> Any:
        """See Runtime."""
        return self.record(torch.cuda.current_stream(self._device))

    def record(self, stream: Any) -> Any:
        """See Runtime. Blocking events: a host thread that waits sleeps instead of spinning."""
        event = torch.cuda.Event(blocking=True)
        event.record(stream)
        return event

    def wait_event(self, stream: Any, event: Any) -> None:
        """See Runtime."""
        stream.wait_event(event)

    def synchronize(self, event: Any) -> None:
        """See Runtime."""
        event.synchronize()

    def drain(self, stream: Any) -> None:
        """See Runtime."""
        stream.synchronize()

    def copy(self, runs: Sequence[Run], arena: int, to_device: bool, stream: Any) -> None:
        """See Runtime."""
        call, handle = self._lib.cudaMemcpyAsync, stream.cuda_stream
        for address, offset, nbytes in runs:
            host = arena + offset
            target, source = (address, host) if to_device else (host, address)
            status = call(target, source, nbytes, _MEMCPY_DEFAULT, handle)
            if status:
                self._check("cudaMemcpyAsync", status)

    def host_register(self, address: int, nbytes: int) -> None:
        """See Runtime."""
        flags = _HOST_REGISTER_FLAGS
        self._check("cudaHostRegister", self._lib.cudaHostRegister(address, nbytes, flags))

    def host_unregister(self, address: int) -> None:
        """See Runtime."""
        self._check("cudaHostUnregister", self._lib.cudaHostUnregister(address))

    def same_addresses(self) -> bool:
        """Whether the device sees registered host memory at its host address.

        Not so under paravirtualisation: there only ``copy`` may be given arena addresses; batched
        copies of them fault (sglang issue 40232) and kernels would, too.
        """
        value = ctypes.c_int(0)
        status = self._lib.cudaDeviceGetAttribute(
            ctypes.byref(value), _ATTRIBUTE_USE_HOST_POINTER, self._device
        )
        self._check("cudaDeviceGetAttribute", status)
        return bool(value.value)

    def _check(self, call: str, status: int) -> None:
        check_status(self._lib, call, status)


def unregister_all(runtime: Runtime, addresses: Sequence[int]) -> None:
    """Unpin each. Raises what the driver raised first, after all were tried."""
    first: Exception | None = None
    for address in addresses:
        try:
            runtime.host_unregister(address)
        except Exception as exc:
            first = first or exc
    if first is not None:
        raise first


class ArenaPinner:
    """Pins [address, address+nbytes) piece by piece on a background thread.

    A piece is used pinned as soon as it is; before, and after a refusal, copies of it go through
    the driver's staging buffer: slower, never wrong. ``close`` after the last copy has ended.
    """

    def __init__(self, runtime: Runtime, address: int, nbytes: int, piece_bytes: int) -> None:
        self._runtime = runtime
        self._address, self._nbytes, self._piece = address, nbytes, piece_bytes
        self._pinned: list[int] = []  # addresses of pinned pieces, ascending
        self._stop = threading.Event()
        self.refused = ""
        """Why pinning stopped early, empty if it did not."""
        self._thread = threading.Thread(target=self._run, name="kvo-cuda-pin", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._runtime.enter_thread()
            for at in range(0, self._nbytes, self._piece):
                if self._stop.is_set():
                    return
                size = min(self._piece, self._nbytes - at)
                self._runtime.host_register(self._address + at, size)
                self._pinned.append(self._address + at)
        except Exception as exc:  # the driver's answer decides, whatever its type
            self.refused = f"{type(exc).__name__}: {exc}"
            logger.warning(
                "kvoffload: the driver pinned only %d of %d MiB of the arena (%s); the rest is "
                "copied unpinned, which is slower. Check ulimit -l and free memory; a confidential "
                "computing GPU pins none.",
                self.pinned_bytes() >> 20, self._nbytes >> 20, self.refused,
            )  # fmt: skip

    def covers(self, offset: int, nbytes: int) -> bool:
        """Whether these bytes are pinned: then they stay so until ``close``."""
        return offset + nbytes <= self.pinned_bytes()

    def pinned_bytes(self) -> int:
        """Bytes pinned so far: a prefix of the arena."""
        return min(len(self._pinned) * self._piece, self._nbytes)

    def wait(self, timeout_s: float) -> bool:
        """True when pinning has ended, well or not."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Pin no further piece."""
        self._stop.set()

    def close(self, timeout_s: float) -> bool:
        """Unpin everything. False when a registration does not end: then nothing is unpinned.

        Raises what the driver raised first, after every piece was tried.
        """
        self.stop()
        if not self.wait(timeout_s):
            return False
        pieces = self._pinned[::-1]
        self._pinned.clear()
        unregister_all(self._runtime, pieces)
        return True

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        pinned = list(self._pinned)
        expected = [self._address + i * self._piece for i in range(len(pinned))]
        assert pinned == expected, "pinned pieces are not a prefix of the arena"
