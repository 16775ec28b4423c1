"""Builds the native core, ``kvoffload._core``, from csrc/. Everything else is in pyproject.toml."""

from __future__ import annotations

import os
import tempfile
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError, LinkError

# What csrc/checksum.cpp needs of xxhash (0.8 or newer: XXH3).
XXHASH_PROBE = """
#define XXH_INLINE_ALL
#include <xxhash.h>
extern "C" XXH64_hash_t kvo_probe(const void *at) { return XXH3_64bits_withSeed(at, 1, 2); }
"""
# What csrc/store_ring.cpp needs of liburing (2.3 or newer).
URING_PROBE = """
#include <liburing.h>
extern "C" int kvo_probe(io_uring *r) {
    io_uring_cqe *cqe;
    __kernel_timespec ts{};
    return io_uring_queue_init(8, r, IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN) +
           io_uring_register_buffers_sparse(r, 1) +
           io_uring_submit_and_wait_timeout(r, &cqe, 1, &ts, nullptr);
}
"""
# The static library first: a wheel then runs where liburing is not installed.
URING_LINKS = (["-l:liburing.a", "-Wl,--exclude-libs,liburing.a"], ["-luring"])


class BuildCore(build_ext):
    """Links liburing where it is there; without it, or with KVOFFLOAD_NO_URING=1, no io_uring."""

    def build_extensions(self) -> None:
        # A compiler that compiles nothing at all says so itself, below.
        if not self.compiles(XXHASH_PROBE) and self.compiles("int kvo_probe();"):
            raise SystemExit(
                "kvoffload: no xxhash.h (0.8 or newer) for the C++ compiler: install it (Debian: "
                "apt-get install libxxhash-dev), or set CPLUS_INCLUDE_PATH to a folder that has it"
            )
        link = None if os.environ.get("KVOFFLOAD_NO_URING") == "1" else self.uring_link()
        for extension in self.extensions:
            if link is None:
                extension.define_macros.append(("KVO_NO_URING", "1"))
            else:
                extension.extra_link_args += link
        if link is None:
            print("kvoffload: building without io_uring (no liburing 2.3 or newer, or not wanted)")
        super().build_extensions()

    def compiles(self, text: str) -> bool:
        """Whether the compiler takes this source."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(text)
            try:
                self.compiler.compile([str(source)], output_dir="/", extra_postargs=["-w"])
            except CompileError:
                return False
        return True

    def uring_link(self) -> list[str] | None:
        """Linker flags with which a shared object that uses liburing links, or None."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(URING_PROBE)
            try:
                objects = self.compiler.compile(
                    [str(source)], output_dir="/", extra_postargs=["-fPIC", "-w"]
                )
            except CompileError:
                return None
            for link in URING_LINKS:
                try:
                    self.compiler.link_shared_object(
                        objects, f"{folder}/probe.so", extra_postargs=[*link, "-Wl,-z,defs"]
                    )
                except LinkError:
                    continue
                return link
        return None


core = Pybind11Extension(
    "kvoffload._core",
    sorted(glob("csrc/*.cpp")),
    depends=sorted(glob("csrc/*.h") + glob("csrc/*.inc")),
    cxx_std=20,
    # No -march=native: wider vector units are chosen at run time (csrc/checksum.cpp).
    extra_compile_args=["-O3", "-fvisibility=hidden", "-Wall", "-Wextra"],
)

setup(ext_modules=[core], cmdclass={"build_ext": BuildCore})
