"""``kvoffload warm`` against real HTTP servers on loopback."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvoffload.cli import warm_client
from kvoffload.cli.warm import app
from kvoffload.cli.warm_client import Server, WarmError, read_prompts

Answer = tuple[int, Any]
MODELS = {"data": [{"id": "tiny"}, {"id": "lora", "parent": "tiny"}]}


def counters(refused: float = 0, short: float = 0, bad: float = 0) -> str:
    """A page of metrics with a server's refused hints."""
    rows = {"pin_refused": refused, "pin_too_short": short, "bad_value": bad}
    lines = ["# TYPE kvoffload_hints_refused_total counter"]
    for reason, value in rows.items():
        labels = f'engine="0",reason="{reason}"'
        lines.append(f"kvoffload_hints_refused_total{{{labels}}} {value}")
    return "\n".join((*lines, ""))


def good(body: dict[str, Any]) -> Answer:
    tokens = len(str(body.get("prompt", body.get("messages"))))
    details = {"cached_tokens": 2}
    return 200, {"usage": {"prompt_tokens": tokens, "prompt_tokens_details": details}}


class Seen:
    """What a server was asked, and how it answers: ``complete(body)``, ``metrics(n)``."""

    def __init__(self) -> None:
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.keys: set[str | None] = set()
        self.models: Answer = (200, MODELS)
        self.complete: Callable[[dict[str, Any]], Answer] = good
        self.metrics: Callable[[int], str | None] = lambda n: counters()
        self.scrapes = 0
        self.most = 0  # requests at a time
        self.now = 0
        self.lock = threading.Lock()

    def answer(self, path: str, body: dict[str, Any] | None) -> Answer:
        if path == "/v1/models":
            return self.models
        if path == "/metrics":
            self.scrapes += 1
            text = self.metrics(self.scrapes)
            return (404, "") if text is None else (200, text)
        assert body is not None
        with self.lock:
            self.bodies.append((path, body))
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            return self.complete(body)
        finally:
            with self.lock:
                self.now -= 1


@contextmanager
def serving(seen: Seen) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(None)

        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            self.reply(json.loads(self.rfile.read(size)))

        def reply(self, body: dict[str, Any] | None) -> None:
            if self.path != "/metrics":
                seen.keys.add(self.headers.get("Authorization"))
            status, said = seen.answer(self.path, body)
            raw = said.encode() if isinstance(said, str) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that was interrupted has gone: no failure, and no traceback in the tests' output."""
            if not isinstance(sys.exc_info()[1], ConnectionError):
                super().handle_error(request, client_address)

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def url(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(warm_client, "_sleep", lambda s: None)
    for name in ("VLLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with serving(seen) as address:
        yield address


@pytest.fixture
def file(tmp_path: Path) -> Path:
    chat = {"messages": [{"role": "user", "content": "hi"}], "cache_salt": "s", "user": None}
    lines = ["Once upon a time", "", json.dumps(chat), '{"prompt": [1, 2, 3]}', "  ", " kept  "]
    (tmp_path / "prompts").write_text("\n".join(lines))
    return tmp_path / "prompts"


def run(*args: object, **kw: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args], **kw)


def test_every_line_is_sent_once_with_the_pin(seen: Seen, url: str, file: Path) -> None:
    done = run(file, "--url", url, "--json", "--concurrency", 1)
    assert done.exit_code == 0, done.output
    ours = {"prefetch": True, "pin": True}
    extra = {"max_tokens": 1, "temperature": 0, "kv_transfer_params": {"kvoffload": ours}}
    chat = {"messages": [{"role": "user", "content": "hi"}], "cache_salt": "s"}
    assert seen.bodies == [
        ("/v1/completions", {"model": "tiny", "prompt": "Once upon a time", **extra}),
        ("/v1/chat/completions", {"model": "tiny", **chat, **extra}),
        ("/v1/completions", {"model": "tiny", "prompt": [1, 2, 3], **extra}),
        ("/v1/completions", {"model": "tiny", "prompt": " kept  ", **extra}),
    ]
    told = json.loads(done.stdout)
    assert (told["prompts"], told["sent"], told["failed"], told["retried"]) == (4, 4, 0, 0)
    assert told["cached_tokens"] == 8 and told["prompt_tokens"] > 30
    assert told["pins_refused"] == told["pins_too_short"] == 0
    assert told["errors"] == [] and seen.keys == {None}


@pytest.mark.parametrize(
    ("options", "hints"),
    [
        (["--no-pin"], {"prefetch": True}),
        (["--unpin"], {"prefetch": True, "pin": False}),
        (["--retain", "60"], {"prefetch": True, "retain_s": 60.0}),
    ],
)
def test_hints(seen: Seen, url: str, file: Path, options: list[str], hints: Any) -> None:
    assert run(file, "--url", f"{url}/v1/", "--model", "m", *options).exit_code == 0
    assert {json.dumps(b["kv_transfer_params"]["kvoffload"]) for _, b in seen.bodies} == {
        json.dumps(hints)
    }
    assert {b["model"] for _, b in seen.bodies} == {"m"}


def test_table_and_key(seen: Seen, url: str, file: Path) -> None:
    done = run(file, "--url", url, env={"OPENAI_API_KEY": "sk-very-secret"})
    assert done.exit_code == 0 and "prompt tokens" in done.stdout and "yes" in done.stdout
    assert seen.keys == {"Bearer sk-very-secret"} and "secret" not in done.output


def test_what_may_pass_is_tried_again_what_may_not_is_not(
    seen: Seen, url: str, tmp_path: Path
) -> None:
    tries: dict[str, int] = {}

    def complete(body: dict[str, Any]) -> Answer:
        name = body["prompt"]
        tries[name] = tries.get(name, 0) + 1
        if name == "busy" and tries[name] < 3:
            return 503, {"error": {"message": "over\nloaded"}}
        if name == "down":
            return 500, "no json"
        if name == "long":
            return 400, {"error": {"message": "too long:\x1b[2J 5000 tokens"}}
        if name == "odd":
            return 200, {"hello": 1}
        return good(body)

    seen.complete = complete
    (tmp_path / "p").write_text("busy\nfine\n\nlong\ndown\nodd\n")
    done = run(tmp_path / "p", "--url", url, "--retries", 2)
    assert done.exit_code == 1
    assert tries == {"busy": 3, "fine": 1, "long": 1, "down": 3, "odd": 1}
    errors = done.stderr.splitlines()
    assert len(errors) == 3 and "\x1b" not in done.output
    assert errors[0].startswith(f"{tmp_path / 'p'}:4: HTTP 400 too long: [2J 5000")
    assert errors[1].startswith(f"{tmp_path / 'p'}:5: HTTP 500")
    assert errors[2].startswith(f"{tmp_path / 'p'}:6: the answer is not a completion")
    told = json.loads(run(tmp_path / "p", "--url", url, "--retries", 0, "--json").stdout)
    assert [e["line"] for e in told["errors"]] == [4, 5, 6]


def test_many_at_a_time_but_no_more(seen: Seen, url: str, tmp_path: Path) -> None:
    both = threading.Barrier(3, timeout=10)

    def complete(body: dict[str, Any]) -> Answer:
        both.wait()
        return good(body)

    seen.complete = complete
    (tmp_path / "p").write_text("\n".join(f"prompt {i}" for i in range(9)))
    assert run(tmp_path / "p", "--url", url, "--concurrency", 3).exit_code == 0
    assert len(seen.bodies) == 9 and seen.most == 3


def test_refused_pins_are_told(seen: Seen, url: str, file: Path) -> None:
    seen.metrics = lambda n: counters(refused=n, bad=10 * n)
    done = run(file, "--url", url)
    assert done.exit_code == 1 and "1 refused" in " ".join(done.stdout.split())
    assert json.loads(run(file, "--url", url, "--json").stdout)["pins_refused"] == 1
    assert run(file, "--url", url, "--no-pin").exit_code == 0


def test_a_prompt_that_is_too_short_to_pin_is_said_and_is_no_failure(
    seen: Seen, url: str, file: Path
) -> None:
    seen.metrics = lambda n: counters(short=n)
    done = run(file, "--url", url)
    said = " ".join(done.stdout.split())
    assert done.exit_code == 0 and "1 too short" in said and "refused" not in said
    told = json.loads(run(file, "--url", url, "--json").stdout)
    assert (told["pins_refused"], told["pins_too_short"]) == (0, 1)


@pytest.mark.parametrize(
    "metrics",
    [
        lambda n: None,
        lambda n: "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 0.0\n",
        lambda n: counters(refused=9 - n),
    ],
    ids=["no metrics", "not ours", "restarted"],
)
def test_pins_that_nobody_confirms_are_not_claimed(
    seen: Seen, url: str, file: Path, metrics: Callable[[int], str | None]
) -> None:
    seen.metrics = metrics
    done = run(file, "--url", url)
    said = " ".join(done.stdout.split())
    assert done.exit_code == 1 and "not known" in said and "yes" not in said
    assert json.loads(run(file, "--url", url, "--json").stdout)["pins_refused"] is None
    for options in (["--no-pin"], ["--unpin"], ["--retain", "60"]):
        assert run(file, "--url", url, *options).exit_code == 0


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ok\n{broken", ":2: starts like JSON"),
        ('ok\n\n{"text": "x"}', ':3: give "prompt" or "messages"'),
        ('{"prompt": "x", "messages": []}', ':1: give "prompt" or "messages"'),
        ('{"prompt": ""}', ':1: "prompt" must be'),
        ('{"prompt": [1, "2"]}', ':1: "prompt" must be'),
        ('{"prompt": {"a": 1}}', ':1: "prompt" must be'),
        ('{"messages": "hi"}', ':1: "messages" must be'),
        ('{"messages": ["hi"]}', ':1: "messages" must be'),
        ('{"prompt": "x", "max_tokens": 5}', ":1: max_tokens is set by warm"),
        ("{" * 100_000, ":1: starts like JSON"),
        ("", "no prompts"),
        (" \n\n", "no prompts"),
    ],
)
def test_a_bad_line_stops_it_before_anything_is_sent(
    seen: Seen, url: str, tmp_path: Path, text: str, why: str
) -> None:
    (tmp_path / "p").write_text(text)
    done = run(tmp_path / "p", "--url", url)
    assert done.exit_code == 2 and not seen.bodies
    assert str(tmp_path / "p") in done.stderr and why in done.stderr
    assert done.stderr.count("\n") == 1


def test_other_bad_files(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"ok\n\xff\xfe\n")
    with pytest.raises(WarmError, match=":2: not UTF-8"):
        read_prompts(tmp_path / "p")
    with pytest.raises(WarmError, match="No such file"):
        read_prompts(tmp_path / "none")
    (tmp_path / "p").write_bytes(b"a\r\nb\r\n")
    assert [p.body["prompt"] for p in read_prompts(tmp_path / "p")] == ["a", "b"]


@pytest.mark.parametrize(
    "text", ["", "ftp://x", "http://", "http://x:99999", "http://a b", "http://x/?q=1"]
)
def test_bad_urls(file: Path, text: str) -> None:
    done = run(file, "--url", text)
    assert done.exit_code == 2 and "--url" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--retain", "1000000"], "--retain 1e+06: give seconds above 0, at most 604800"),
        (["--retain", "nan"], "--retain nan: give"),
        (["--retain", "inf"], "--retain inf: give"),
        (["--retain", "0"], "--retain 0: give"),
        (["--timeout", "nan"], "--timeout nan: give seconds from 0.1 to 86400"),
        (["--timeout", "inf"], "--timeout inf: give"),
        (["--timeout", "0"], "--timeout 0: give"),
        (["--api-key", "sk-secret\n"], "--api-key (or VLLM_API_KEY, OPENAI_API_KEY): give"),
        (["--api-key", "sk-secr\u20act"], "--api-key"),
    ],
)
def test_bad_options_are_one_line_before_anything_is_sent(
    seen: Seen, url: str, file: Path, options: list[str], why: str
) -> None:
    done = run(file, "--url", url, *options)
    assert done.exit_code == 2 and why in done.stderr and done.stderr.count("\n") == 1
    assert not seen.bodies and not seen.keys and "secr" not in done.output


def test_a_key_from_the_environment_is_checked_too(seen: Seen, url: str, file: Path) -> None:
    done = run(file, "--url", url, env={"VLLM_API_KEY": "sk-secret\n"})
    assert done.exit_code == 2 and "VLLM_API_KEY" in done.stderr and "secret" not in done.output


def test_urls_are_completed() -> None:
    assert Server.at("host:9", None, 1).url == "http://host:9"
    assert Server.at("https://h/x/v1/", None, 1).url == "https://h/x"


def test_no_server(file: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    done = run(file, "--url", url)
    assert done.exit_code == 2 and "refused" in done.stderr.lower()
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("models", "why"),
    [
        ((200, {"data": [{"id": "a"}, {"id": "b"}]}), "serves a, b: name one with --model"),
        ((200, {"data": []}), "serves none"),
        ((200, "[]"), "serves none"),
        ((200, "<html>"), "not JSON"),
        ((401, {"error": {"message": "Unauthorized"}}), "HTTP 401 Unauthorized"),
        ((401, {"error": "Unauthorized"}), "HTTP 401 Unauthorized"),
    ],
)
def test_the_model_must_be_clear(
    seen: Seen, url: str, file: Path, models: Answer, why: str
) -> None:
    seen.models = models
    done = run(file, "--url", url)
    assert done.exit_code == 2 and why in done.stderr and not seen.bodies
    assert done.stderr.count("\n") == 1


def test_a_server_that_hangs(seen: Seen, url: str, tmp_path: Path) -> None:
    stop = threading.Event()
    seen.complete = lambda body: (stop.wait(10), good(body))[1]
    (tmp_path / "p").write_text("x")
    try:
        done = run(tmp_path / "p", "--url", url, "--timeout", 0.2, "--retries", 1)
    finally:
        stop.set()
    assert done.exit_code == 1 and "no answer in 0.2 s" in done.stderr


def test_ctrl_c_says_how_far_it_came(seen: Seen, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def run_(self: Any, prompts: Any, concurrency: int) -> Iterator[Any]:
        yield warm_client.Done(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(warm_client.Warmer, "run", run_)
    (tmp_path / "p").write_text("a\nb\nc")
    done = run(tmp_path / "p", "--url", url)
    assert done.exit_code == 130 and "1 of 3" in done.stderr


@pytest.mark.parametrize("wakes", [True, False])
def test_ctrl_c_waits_for_no_answer(seen: Seen, url: str, tmp_path: Path, wakes: bool) -> None:
    """A server that hangs, and retries: the process ends at once all the same, also where the
    signal does not wake the main thread (it came just before that began to wait; here another
    thread takes it)."""
    stop, asked = threading.Event(), threading.Event()

    def complete(body: dict[str, Any]) -> Answer:
        asked.set()
        stop.wait(60)
        return good(body)

    seen.complete = complete
    (tmp_path / "p").write_text("a\nb\nc")
    # A runner in the background of a shell has SIGINT ignored, and its children inherit that.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    if not wakes:
        code += "import threading, time\n"
        code += "threading.Thread(target=time.sleep, args=(90,), daemon=True).start()\n"
        code += "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})\n"
    code += "from kvoffload.cli.main import app; app()"
    args = ["warm", str(tmp_path / "p"), "--url", url, "--concurrency", "2"]
    child = subprocess.Popen(
        [sys.executable, "-c", code, *args], stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert asked.wait(60)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=50)  # a hanging answer would take 60
    finally:
        child.kill()
        child.wait()
        stop.set()
    assert child.returncode == 130 and b"stopped: 0 of 3" in said


def test_a_bug_in_a_sender_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    def send(self: Any, prompt: Any) -> Any:
        raise RuntimeError("bug")

    monkeypatch.setattr(warm_client.Warmer, "send", send)
    warmer = warm_client.Warmer(Server("http://127.0.0.1:1"), "m", {})
    with pytest.raises(RuntimeError, match="bug"):
        list(warmer.run([warm_client.Prompt(1, {"prompt": "x"})], 4))
