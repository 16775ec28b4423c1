"""``kvoffload top`` as a command, against real HTTP servers."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from kvoffload.cli import top
from kvoffload.cli.main import app
from kvoffload.cli.top_model import frame
from kvoffload.cli.top_view import screen
from kvoffload.metrics import Recorder
from kvoffload.types import Tier

GOLDEN = Path(__file__).parents[1] / "golden" / "top"
Answer = tuple[int, bytes]


@contextmanager
def serving(answer: Callable[[int], Answer], port: int = 0) -> Iterator[str]:
    """A server on loopback; ``answer(n)`` is the status and body of the n-th request."""
    seen = iter(range(1 << 30))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answer(next(seen)) if self.path == "/metrics" else (404, b"")
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def text(name: str) -> bytes:
    return (GOLDEN / f"{name}.txt").read_bytes()


def scripted(*answers: Answer) -> Callable[[int], Answer]:
    return lambda n: answers[min(n, len(answers) - 1)]


HEALTHY = scripted((200, text("before")), (200, text("after")))


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["top", *args])


@pytest.fixture
def steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples exactly as far apart as they were asked to be."""
    now = [0.0]
    monkeypatch.setattr(top, "_clock", lambda: now[0])
    monkeypatch.setattr(top, "_sleep", lambda s: now.__setitem__(0, now[0] + s))


@pytest.mark.usefixtures("steady_clock")
def test_json_golden() -> None:
    with serving(HEALTHY) as url:
        result = run(url, "--json", "--interval", "2")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown.pop("url") == f"{url}/metrics"
    assert abs(shown.pop("time") - time.time()) < 60
    assert shown == json.loads((GOLDEN / "frame.json").read_text())


@pytest.mark.usefixtures("steady_clock")
def test_screen_golden() -> None:
    with serving(HEALTHY) as url:
        result = run(url, "--once")
    lines = [line.rstrip() for line in result.stdout.replace(url, "URL").splitlines()]
    lines[1] = re.sub(r"^\d\d:\d\d:\d\d", "HH:MM:SS", lines[1])
    assert result.exit_code == 0
    assert lines == (GOLDEN / "screen.txt").read_text().splitlines()
    assert "\x1b" not in result.stdout and max(map(len, lines)) <= 80


@pytest.mark.usefixtures("steady_clock")
def test_a_restart_between_the_samples() -> None:
    with serving(scripted((200, text("after")), (200, text("before")))) as url:
        shown = json.loads(run(url, "--json").stdout)
        assert shown["restarted"] and shown["lookups"] == {"total": 5, "added": 5, "per_s": 2.5}
    with serving(scripted((200, text("after")), (200, text("before")))) as url:
        assert "server restarted" in run(url, "--once").stdout.splitlines()[1]


NOTHING = {
    "not found": ((404, b"gone"), "HTTP 404 Not Found"),
    "a code nobody knows": ((599, b""), "HTTP 599\n"),
    "other metrics": (
        (200, b"# TYPE a_total counter\na_total 1\n"),
        "no kvoffload metrics; was the server started with KVOffloadConnector?",
    ),
    "no metrics": ((200, b""), "no kvoffload metrics"),
    "a web page": ((200, b"<html><body>hello</body></html>"), "not Prometheus text"),
    "bytes": ((200, bytes(range(256)) * 4), "not Prometheus text"),
    "a number that is none": ((200, b"kvoffload_lookups_total one\n"), "not Prometheus text"),
    "labels cut off": ((200, b'kvoffload_lookups_total{engine="'), "not Prometheus text"),
}


@pytest.mark.parametrize("case", NOTHING)
@pytest.mark.parametrize("option", ["--once", "--json"])
def test_nothing_to_show_is_one_line_and_status_2(case: str, option: str) -> None:
    answer, line = NOTHING[case]
    with serving(scripted(answer)) as url:
        result = run(url, option, "--interval", "0.1")
    assert result.exit_code == 2 and result.stdout == ""
    assert line in result.stderr and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"{url}/metrics: ")


def test_a_server_that_is_gone() -> None:
    with serving(HEALTHY) as url:
        pass
    result = run(url, "--once")
    assert result.exit_code == 2 and result.stderr == f"{url}/metrics: Connection refused\n"


def test_a_server_that_goes_between_the_samples() -> None:
    with serving(scripted((200, text("before")), (503, b""))) as url:
        result = run(url, "--once", "--interval", "0.1")
    assert result.exit_code == 2 and "HTTP 503 Service Unavailable" in result.stderr


def test_a_server_that_hangs() -> None:
    go = threading.Event()

    def hang(_: int) -> Answer:
        go.wait(20)
        return 200, b""

    with ExitStack() as stack:
        stack.callback(go.set)
        url = stack.enter_context(serving(hang))
        stack.callback(go.set)
        with pytest.raises(top.ScrapeError, match="no answer in"):
            top.scrape(f"{url}/metrics", timeout_s=0.1)


def test_an_endless_answer_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top, "MAX_BYTES", 1 << 20)
    with (
        serving(scripted((200, b"\n" * ((1 << 20) + 1)))) as url,
        pytest.raises(top.ScrapeError, match="more than 1 MiB"),
    ):
        top.scrape(f"{url}/metrics")


def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(HEALTHY) as url:
        assert top.scrape(f"{url}/metrics").has_ours


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("localhost:8000", "http://localhost:8000/metrics"),
        ("10.0.0.7", "http://10.0.0.7/metrics"),
        ("https://host/", "https://host/metrics"),
        ("http://host/v2/metrics?a=b", "http://host/v2/metrics?a=b"),
        ("[::1]:8000", "http://[::1]:8000/metrics"),
    ],
)
def test_addresses(given: str, url: str) -> None:
    assert top.metrics_url(given) == url


@pytest.mark.parametrize(
    "given",
    ["", "file:///etc/passwd", "ftp://host/metrics", "http://", "host:port", "a b", "http://[::1"],
)
def test_bad_addresses_are_one_line(given: str) -> None:
    result = run(given, "--once")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1 and "http or https" in result.stderr


@pytest.mark.parametrize("interval", ["0", "-1", "nan"])
def test_bad_intervals(interval: str) -> None:
    result = run("--once", "--interval", interval)
    assert result.exit_code == 2 and "interval" in result.stderr


# -- the live view, as a process -----------------------------------------------------------------


COMMAND = [sys.executable, "-c", "from kvoffload.cli.main import main; main()", "top"]


def test_into_a_pipe_it_waits_shows_and_survives_a_restart(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def wait_for(needle: str, times: int = 1) -> None:
        end = time.monotonic() + 60
        while out.read_text().count(needle) < times:
            assert time.monotonic() < end and process.poll() is None, out.read_text()
            time.sleep(0.02)

    with serving(HEALTHY) as url:
        port = int(url.rsplit(":", 1)[1])
    with out.open("wb") as sink:
        process = subprocess.Popen([*COMMAND, url, "--interval", "0.1"], stdout=sink)
    try:
        wait_for("Connection refused; trying again every 0.1 s")
        with serving(scripted((200, text("after"))), port):
            wait_for("now: the last ")
        wait_for("Connection refused", 2)
        time.sleep(0.5)  # said once for as long as it lasts, not every tenth of a second
        with serving(scripted((200, text("before"))), port):
            wait_for("server restarted")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    shown = out.read_text()
    assert "\x1b" not in shown
    assert shown.count("Connection refused") == 2
    assert "restarted" not in shown[: shown.rindex("Connection refused")]


def test_on_a_terminal_it_redraws_one_screen_and_leaves_nothing() -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "50"}
    with serving(scripted((200, text("after")))) as url:
        process = subprocess.Popen(
            [*COMMAND, url, "--interval", "0.1"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
        )
        os.close(theirs)
        shown = b""
        try:
            while shown.count(b"half-open") < 2:
                shown += os.read(ours, 65536)
            process.send_signal(signal.SIGINT)
            while True:
                try:
                    shown += os.read(ours, 65536)
                except OSError:  # the other end is closed
                    break
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
            os.close(ours)
    assert b"\x1b[?1049h" in shown and shown.count(b"\x1b[?1049l") == 1
    assert b"Traceback" not in shown


def test_imports_are_light() -> None:
    code = (
        "import sys, kvoffload.cli.top\n"
        "print([m for m in ('prometheus_client', 'rich.live', 'urllib.request', 'torch', 'vllm')"
        " if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


# -- what the project's own exporter writes ------------------------------------------------------


def exporter(engines: int) -> Any:
    pytest.importorskip("vllm")
    from prometheus_client import Counter, Gauge, Histogram

    from kvoffload.engines.vllm.stats import KVOffloadPromMetrics

    types = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}
    values: dict[int, list[object]] = {i: ["m", str(i)] for i in range(engines)}
    config: Any = SimpleNamespace(kv_transfer_config=None)
    return KVOffloadPromMetrics(config, types, ["model_name", "engine"], values)


@pytest.mark.usefixtures("steady_clock")
def test_our_own_exporter_is_understood() -> None:
    prom = exporter(engines=2)
    from prometheus_client import REGISTRY, generate_latest

    rec = Recorder()

    def busy(n: int) -> Answer:
        if n:
            rec.lookup(queried=1000, hit=800)
            rec.hit({Tier.DRAM: 600, Tier.NVME: 200})
            rec.load_done(0.002, 800)
            rec.failure("corrupt")
            rec.dram(1 << 30, 4 << 30, 1 << 20, 7)
            stats = {"bytes_read": 4 << 20, "bytes_written": 0, "bytes_used": 5, "bytes_max": 50}
            rec.manager({"evicted": 3}, stats)
            prom.observe(rec.take(), engine_idx=1)
        return 200, generate_latest(REGISTRY)

    with serving(busy) as url:
        result = run(url, "--json", "--interval", "4")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert not shown["restarted"] and shown["engines"] == 2 and shown["window_s"] == 4
    dram, nvme = shown["tiers"]["dram"], shown["tiers"]["nvme"]
    assert (dram["hit_rate_now"], nvme["hit_rate_now"], shown["hit_rate_now"]) == (0.6, 0.2, 0.8)
    assert (dram["used_bytes"], dram["size_bytes"], dram["chunks"]) == (1 << 30, 4 << 30, 7)
    assert nvme["load_bytes"] == {"total": 4 << 20, "added": 4 << 20, "per_s": 1 << 20}
    assert 0.001 < shown["times"]["load"]["now"]["p50_s"] <= 0.003
    assert shown["failures"]["corrupt"]["added"] == 1 and shown["misses"]["no_hit"]["total"] == 0
    assert shown["events"]["evicted"]["added"] == 3


def test_words_of_the_server_do_not_steer_the_terminal() -> None:
    from rich.console import Console

    evil = b'kvoffload_failures_total{kind="[red]\x1b]0;owned\x07"} 3\n'
    with serving(scripted((200, evil))) as url:
        sample = top.scrape(f"{url}/metrics")
    console = Console(width=80, force_terminal=False)
    with console.capture() as captured:
        console.print(screen(frame(None, sample), "[bold]title"))
    assert "\x1b" not in captured.get() and "\x07" not in captured.get()
    assert "[red]" in captured.get() and "[bold]title" in captured.get()
