"""Build the native core in place with what this Python and machine have; nothing is downloaded.

``python scripts/gpu_build.py [--force]``: exit status 0 when kvoffload/_core is there and loads, 1
when the build failed, 3 when a tool or header is missing (one line names what and where to get it).

setup.py needs setuptools and pybind11 (Python packages), a C++20 compiler, Python.h and xxhash.h.
The last is looked for where the compiler looks, in $KVOFFLOAD_XXHASH_INCLUDE, in installed Python
packages that carry it, and beside a CUDA or conda installation.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MISSING = 3
#: Enough of xxhash.h: the checksum code inlines it and calls the seeded 64-bit hash.
PROBE = (
    "#define XXH_INLINE_ALL\n#include <xxhash.h>\n"
    "int main() { return (int)XXH3_64bits_withSeed(0, 0, 1); }\n"
)


class Missing(Exception):
    """A tool or header that is not here; the message is one line."""


def target() -> Path:
    """The extension module's file for this Python."""
    return ROOT / "kvoffload" / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"


def is_current() -> bool:
    """Whether the extension is newer than all it is made of."""
    sources = [ROOT / "setup.py", *(ROOT / "csrc").glob("*.cpp")]
    sources += [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc").glob("*.inc")]
    file = target()
    return file.exists() and file.stat().st_mtime >= max(s.stat().st_mtime for s in sources)


def loads() -> str:
    """Why the extension does not load, empty when it does. In a fresh process."""
    code = "import kvoffload._core as c; print(' '.join(c.cpu_features()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def compiler() -> list[str]:
    """The C++ compiler's command. Raises Missing."""
    named = os.environ.get("CXX")
    command = shlex.split(named) if named else ["g++"]
    if shutil.which(command[0]) is None:
        raise Missing(f"no C++ compiler: {command[0]} is not on PATH (install g++ or set CXX)")
    return command


def xxhash_folders() -> Iterator[Path]:
    """Folders where xxhash.h may lie, besides the compiler's own."""
    if named := os.environ.get("KVOFFLOAD_XXHASH_INCLUDE"):
        yield Path(named)
    for entry in map(Path, sys.path):
        yield entry / "pyarrow" / "include" / "arrow" / "vendored" / "xxhash"
    for prefix in (os.environ.get("CONDA_PREFIX"), sys.prefix, "/usr/local", "/usr/local/cuda"):
        if prefix:
            yield Path(prefix) / "include"


def find_xxhash(command: Sequence[str], folders: Iterator[Path]) -> Path | None:
    """A folder to add for <xxhash.h>, None when the compiler finds it by itself. Raises Missing."""
    if _compiles(command, None):
        return None
    for folder in folders:
        if (folder / "xxhash.h").is_file() and _compiles(command, folder):
            return folder
    raise Missing(
        "no xxhash.h (0.8 or newer): install libxxhash-dev or the Python package pyarrow, or set "
        "KVOFFLOAD_XXHASH_INCLUDE to a folder that has it"
    )


def _compiles(command: Sequence[str], folder: Path | None) -> bool:
    extra = ["-I", str(folder)] if folder else []
    call = [*command, "-std=c++20", "-x", "c++", "-fsyntax-only", *extra, "-"]
    return subprocess.run(call, input=PROBE, capture_output=True, text=True).returncode == 0


def check_python_parts() -> None:
    """setuptools, pybind11 and Python.h. Raises Missing."""
    for package in ("setuptools", "pybind11"):
        if importlib.util.find_spec(package) is None:
            raise Missing(f"the Python package {package} is not installed for {sys.executable}")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.exists():
        raise Missing(f"no Python.h in {header.parent}: install Python's development headers")


def build(scratch: Path) -> None:
    """Compile below ``scratch``, then put the module in place in one move. Raises on failure."""
    check_python_parts()
    folder = find_xxhash(compiler(), xxhash_folders())
    env = dict(os.environ)
    if folder is not None:
        print(f"xxhash.h from {folder}", flush=True)
        env["CPLUS_INCLUDE_PATH"] = os.pathsep.join(
            [str(folder), *filter(None, [env.get("CPLUS_INCLUDE_PATH")])]
        )
    # setup.py with pybind11's parallel compiler: one extension of many files.
    code = (
        "import runpy, sys\nfrom pybind11.setup_helpers import ParallelCompile\n"
        "ParallelCompile('KVOFFLOAD_BUILD_JOBS', default=0).install()\n"
        "sys.argv = ['setup.py', *sys.argv[1:]]\nrunpy.run_path('setup.py', run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, "-q", "build_ext"]
    command += ["--build-lib", str(scratch / "lib"), "--build-temp", str(scratch / "temp")]
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    (made,) = (scratch / "lib" / "kvoffload").glob("_core*")
    part = target().with_name(f".{made.name}.{os.getpid()}")
    shutil.copy2(made, part)
    part.replace(target())


def main() -> int:
    """Command line."""
    if is_current() and "--force" not in sys.argv[1:] and not loads():
        print("up to date")
        return 0
    try:
        with tempfile.TemporaryDirectory(prefix="kvo-build-") as scratch:
            build(Path(scratch))
    except Missing as error:
        print(f"missing: {error}")
        return MISSING
    except (subprocess.CalledProcessError, OSError, ValueError) as error:
        print(f"build failed: {error}")
        return 1
    if reason := loads():
        print(f"built, but it does not load: {reason}")
        return 1
    print("built")
    return 0


if __name__ == "__main__":
    sys.exit(main())
