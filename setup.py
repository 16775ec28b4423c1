"""Builds the native core, ``kvoffload._core``, from csrc/. Everything else is in pyproject.toml."""

from __future__ import annotations

from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

sources = sorted(glob("csrc/*.cpp"))
with_store = "csrc/bind_store.cpp" in sources
if not with_store:
    sources = [s for s in sources if not s.startswith("csrc/store")]

core = Pybind11Extension(
    "kvoffload._core",
    sources,
    depends=sorted(glob("csrc/*.h") + glob("csrc/*.inc")),
    cxx_std=20,
    define_macros=[("KVO_HAVE_STORE", "1")] if with_store else [],
    # No -march=native: wider vector units are chosen at run time (csrc/checksum.cpp).
    extra_compile_args=["-O3", "-fvisibility=hidden", "-Wall", "-Wextra"],
)

setup(ext_modules=[core])
