"""Builds the native core, ``kvoffload._core``, from csrc/. Everything else is in pyproject.toml."""

from __future__ import annotations

from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

core = Pybind11Extension(
    "kvoffload._core",
    sorted(glob("csrc/*.cpp")),
    depends=sorted(glob("csrc/*.h") + glob("csrc/*.inc")),
    cxx_std=20,
    # No -march=native: wider vector units are chosen at run time (csrc/checksum.cpp).
    extra_compile_args=["-O3", "-fvisibility=hidden", "-Wall", "-Wextra"],
)

setup(ext_modules=[core])
