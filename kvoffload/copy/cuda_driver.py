"""``cuMemcpyBatchAsync`` through ctypes: found at run time, because drivers before 12.8 lack it.

From cuda.h (CUDA 12.8 to 13.x); the structs did not change, the call did::

    typedef enum { ..., CU_MEMCPY_SRC_ACCESS_ORDER_STREAM = 0x1, ... } CUmemcpySrcAccessOrder;
    typedef enum { CU_MEMCPY_FLAG_DEFAULT = 0x0, CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE = 0x1 }
        CUmemcpyFlags;
    typedef struct {
        CUmemLocationType type;                // int          offset 0
        int id;                                // int          offset 4
    } CUmemLocation;                           // 8 bytes
    typedef struct {
        CUmemcpySrcAccessOrder srcAccessOrder; // int          offset 0
        CUmemLocation srcLocHint;              //              offset 4
        CUmemLocation dstLocHint;              //              offset 12
        unsigned int flags;                    // unsigned int offset 20
    } CUmemcpyAttributes;                      // 24 bytes

    // 12.8: PFN_cuMemcpyBatchAsync_v12080
    CUresult cuMemcpyBatchAsync(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count,
        CUmemcpyAttributes *attrs, size_t *attrIdxs, size_t numAttrs, size_t *failIdx, CUstream);
    // 13.0: PFN_cuMemcpyBatchAsync_v13000, the same without failIdx
    CUresult cuMemcpyBatchAsync_v2(..., size_t *attrsIdxs, size_t numAttrs, CUstream);

``attrs`` and ``attrIdxs`` have numAttrs entries: one set for all copies is one entry, index 0.
cuGetProcAddress is asked by version, so which of the two was got is known, not guessed.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

logger = logging.getLogger("vllm.kvoffload")

U64 = npt.NDArray[np.uint64]

MAX_BATCH = 1024
"""Most copies of one driver call. Calls of tens of thousands have crashed and hung drivers
(vLLM issue 49276, driver 580.159); at this many the call's own cost is already spread thin."""

_SRC_ORDER_STREAM = 1
_LEGACY_STREAMS = (0, 1)  # the NULL stream and CU_STREAM_LEGACY: the batch call refuses both
_ABIS = ((12080, True), (13000, False))  # (version to ask for, the call takes failIdx)


class MemLocation(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class MemcpyAttributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = (
        ("srcAccessOrder", ctypes.c_int),
        ("srcLocHint", MemLocation),
        ("dstLocHint", MemLocation),
        ("flags", ctypes.c_uint),
    )


def _prototype(fail_index: bool) -> Any:
    p, n = ctypes.c_void_p, ctypes.c_size_t
    tail = (p, p) if fail_index else (p,)
    return ctypes.CFUNCTYPE(ctypes.c_int, p, p, p, n, p, p, n, *tail)


@dataclass(frozen=True, slots=True, eq=False)
class BatchCopy:
    """The driver's call. Safe from any thread whose current context is the device's."""

    call: Callable[..., int]
    fail_index: bool
    """Whether the call has the failIdx argument (12.8 ABI)."""
    error_name: Callable[[int], str]

    def submit(self, targets: U64, sources: U64, sizes: U64, stream: int) -> None:
        """Enqueue copies on the stream with this handle; the arrays may go when it returns.

        Sources are read in stream order: a laxer order lets the device read KV before the kernel
        that writes it has run. Raises RuntimeError on a refusal, and ValueError on the legacy
        default stream, which the driver would refuse.
        """
        if stream in _LEGACY_STREAMS:
            raise ValueError("cuMemcpyBatchAsync takes no legacy default stream")
        attributes = MemcpyAttributes(srcAccessOrder=_SRC_ORDER_STREAM)
        index = ctypes.c_size_t(0)
        failed = ctypes.c_size_t(0)
        for at in range(0, len(sizes), MAX_BATCH):
            part = slice(at, at + MAX_BATCH)
            to, frm, size = (np.ascontiguousarray(a[part], np.uint64) for a in
                             (targets, sources, sizes))  # fmt: skip
            args = [to.ctypes.data, frm.ctypes.data, size.ctypes.data, len(size)]
            args += [ctypes.addressof(attributes), ctypes.addressof(index), 1]
            if self.fail_index:
                args.append(ctypes.addressof(failed))
            status = self.call(*args, stream)
            if status:
                which = f" at copy {at + failed.value}" if self.fail_index else ""
                raise RuntimeError(f"cuMemcpyBatchAsync{which}: {self.error_name(status)}")


def find_batch_copy(lib: Any = None) -> BatchCopy | None:
    """The driver's batch call; None, with the reason at debug level, where it has none.

    ``lib``: libcuda, replaced in tests.
    """
    try:
        lib = lib if lib is not None else ctypes.CDLL("libcuda.so.1")
        look = lib.cuGetProcAddress_v2
        error_name = _error_name(lib)
    except (OSError, AttributeError) as exc:
        logger.debug("kvoffload: no batched copies: %s", exc)
        return None
    look.restype = ctypes.c_int
    look.argtypes = [
        ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, ctypes.c_uint64,
        ctypes.POINTER(ctypes.c_int),
    ]  # fmt: skip
    for version, fail_index in _ABIS:
        address, found = ctypes.c_void_p(), ctypes.c_int(-1)
        status = look(b"cuMemcpyBatchAsync", ctypes.byref(address), version, 0, ctypes.byref(found))
        if status == 0 and found.value == 0 and address.value:
            call = _prototype(fail_index)(address.value)
            return BatchCopy(call, fail_index, error_name)
    logger.debug("kvoffload: no batched copies: the driver has no cuMemcpyBatchAsync (CUDA 12.8)")
    return None


def _error_name(lib: Any) -> Callable[[int], str]:
    get = lib.cuGetErrorName
    get.restype = ctypes.c_int
    get.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]

    def name(status: int) -> str:
        text = ctypes.c_char_p()
        known = get(status, ctypes.byref(text)) == 0 and text.value
        return f"{known.decode(errors='replace') if known else 'error'} ({status})"

    return name
