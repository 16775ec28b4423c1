"""A disk of our own that can be slow or hang below the process: ext4 on a loop device.

The block-I/O controller (cgroup v1) throttles the processes that are told to ``join``. At one byte
per second nothing comes back until the limit is taken away: a hung disk, with real I/O in flight.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from common import Skip

CONTROLLER = Path("/sys/fs/cgroup/blkio")
STOPPED = 1  # bytes per second; 0 is no limit


def _do(*command: str) -> str:
    """Standard output. Raises Skip when the command is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        raise Skip(f"no disk of our own: {command[0]}: {said}") from error
    return done.stdout.strip()


class LoopDisk:
    """A mounted disk. ``limit_files`` says what to write where for a rate."""

    def __init__(self, path: Path, device: str, group: Path) -> None:
        self.path, self._group = path, group
        self._number = f"{os.major(os.stat(device).st_rdev)}:{os.minor(os.stat(device).st_rdev)}"

    def join(self, pids: list[int]) -> None:
        """These processes, with all threads, do their I/O on this disk under its limits."""
        for pid in pids:
            (self._group / "cgroup.procs").write_text(str(pid))

    def limit_files(self, bytes_per_s: int) -> dict[str, str]:
        """Control files and their text for a limit on reads and on writes; 0: no limit."""
        return {
            str(self._group / f"blkio.throttle.{way}_bps_device"): f"{self._number} {bytes_per_s}"
            for way in ("read", "write")
        }

    def limit(self, bytes_per_s: int) -> None:
        """Set it from here."""
        for file, text in self.limit_files(bytes_per_s).items():
            Path(file).write_text(text)


@contextlib.contextmanager
def loop_disk(scratch: Path, nbytes: int) -> Iterator[LoopDisk]:
    """A fresh disk below ``scratch``. Raises Skip where this machine does not let us have one."""
    if os.geteuid() != 0 or not (CONTROLLER / "blkio.throttle.read_bps_device").exists():
        raise Skip("no disk of our own: needs root and the blkio controller (cgroup v1)")
    image, mount = scratch / "disk.img", scratch / "disk"
    group = CONTROLLER / f"kvbench-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        with image.open("wb") as file:
            file.truncate(nbytes)
        stack.callback(image.unlink, missing_ok=True)
        _do("mkfs.ext4", "-q", "-F", "-m", "0", str(image))
        device = _do("losetup", "-f", "--show", str(image))
        stack.callback(_do, "losetup", "-d", device)
        mount.mkdir()
        _do("mount", device, str(mount))
        stack.callback(_do, "umount", "-l", str(mount))
        os.chmod(mount, 0o700)
        shutil.rmtree(mount / "lost+found", ignore_errors=True)
        group.mkdir()
        stack.callback(_leave, group)
        disk = LoopDisk(mount, device, group)
        disk.limit(STOPPED)  # whether the controller knows this device is seen now, not later
        disk.limit(0)
        yield disk


def _leave(group: Path) -> None:
    """Whoever is left goes back to the root group; then the group can go."""
    for pid in (group / "cgroup.procs").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            (CONTROLLER / "cgroup.procs").write_text(pid)
    group.rmdir()
