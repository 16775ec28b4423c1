"""Prompts of a file, sent once each through a server's OpenAI API. No terminal, no third party."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

MAX_ANSWER = 16 << 20
MAX_TIMEOUT_S = 86400.0
_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_OURS = ("max_tokens", "max_completion_tokens", "n", "stream", "kv_transfer_params")
_sleep = time.sleep
_WAKE_S = 0.5


class WarmError(Exception):
    """What stops a line or all of it; the text is one line for a person."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request: the number of its line (from 1) and the body as far as the file says."""

    line: int
    body: Mapping[str, Any]

    @property
    def path(self) -> str:
        """The endpoint."""
        return "/v1/chat/completions" if "messages" in self.body else "/v1/completions"


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a prompt. ``cached``: prompt tokens that were not computed, where told."""

    line: int
    seconds: float = 0.0
    tokens: int = 0
    cached: int | None = None
    tries: int = 1
    error: str | None = None


# -- the file


def read_prompts(file: Path) -> list[Prompt]:
    """Prompts of a text or JSON-lines file; empty lines are skipped.

    A line that starts with ``{`` is an object with ``prompt`` (text or token ids) or ``messages``;
    what else it holds (``cache_salt``, ``tools``, ...) is sent along. Any other line is a prompt.
    Raises WarmError naming file and line.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise WarmError(f"{file}: {error.strerror}") from error
    out: list[Prompt] = []
    for number, raw in enumerate(lines, 1):
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise WarmError(f"{file}:{number}: not UTF-8 text") from error
        if text.strip():
            body = _object(text, f"{file}:{number}") if text.lstrip()[0] == "{" else None
            out.append(Prompt(number, body if body is not None else {"prompt": text}))
    if not out:
        raise WarmError(f"{file}: no prompts in it")
    return out


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WarmError(f"{where}: starts like JSON but is not: {error}") from error
    prompt, messages = body.get("prompt"), body.get("messages")
    if (prompt is None) == (messages is None):
        raise WarmError(f'{where}: give "prompt" or "messages", one of them')
    ids = isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt)
    if prompt is not None and not ids and not (isinstance(prompt, str) and prompt):
        raise WarmError(f'{where}: "prompt" must be a text or a list of token ids')
    listed = isinstance(messages, list) and messages
    if messages is not None and not (listed and all(isinstance(m, dict) for m in messages)):
        raise WarmError(f'{where}: "messages" must be a list of objects')
    for key in _OURS:
        if key in body:
            raise WarmError(f"{where}: {key} is set by warm itself, take it out")
    return {k: v for k, v in body.items() if v is not None}


# -- the server


@dataclass(frozen=True, slots=True)
class Server:
    """An OpenAI-compatible server. Any thread. Proxies of the environment are not used."""

    url: str  # scheme, host and port; a path before /v1 is kept
    api_key: str | None = None
    timeout_s: float = 600.0

    @classmethod
    def at(cls, text: str, api_key: str | None, timeout_s: float) -> Server:
        """``text`` completed with http and without a final /v1. Raises WarmError that names the
        option of ``kvoffload warm``."""
        url = text if "://" in text else f"http://{text}"
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname)
            _ = parts.port  # raises on a bad number
        except ValueError:
            good = False
        if not good or parts.query or any(c.isspace() or not c.isprintable() for c in url):
            raise WarmError(f"--url: {text!r} is not an address such as http://127.0.0.1:8000")
        if api_key and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
            raise WarmError(  # a secret: never shown
                "--api-key (or VLLM_API_KEY, OPENAI_API_KEY): give printable ASCII without spaces "
                "or line breaks, also at its end"
            )
        if not 0.1 <= timeout_s <= MAX_TIMEOUT_S:
            most = f"{MAX_TIMEOUT_S:.0f}"
            raise WarmError(f"--timeout {timeout_s:g}: give seconds from 0.1 to {most}")
        return cls(url.rstrip("/").removesuffix("/v1"), api_key, timeout_s)

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One answer. Raises WarmError; ``HTTPError`` where the server answered with a status."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data=data, headers=headers)
        try:
            with build_opener(ProxyHandler({})).open(request, timeout=self.timeout_s) as answer:
                raw = answer.read(MAX_ANSWER)
        except HTTPError:
            raise
        except URLError as error:
            raise WarmError(self._why(error.reason)) from error
        except (OSError, HTTPException) as error:
            raise WarmError(self._why(error)) from error
        except UnicodeError as error:  # as in cli/top.py
            raise WarmError(f"{self.url}: not an address that can be asked") from error
        try:
            got = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise WarmError(f"{self.url}{path}: the answer is not JSON") from error
        return got if isinstance(got, dict) else {}

    def _why(self, error: object) -> str:
        if isinstance(error, TimeoutError):
            return f"{self.url}: no answer in {self.timeout_s:g} s"
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return f"{self.url}: {' '.join(text.split()) or type(error).__name__}"

    def model(self, wanted: str | None) -> str:
        """The model to name in requests. Raises WarmError where it is not clear."""
        if wanted:
            return wanted
        try:
            listed = self.ask("/v1/models").get("data")
        except HTTPError as error:
            raise WarmError(f"{self.url}/v1/models: {said(error)}") from error
        rows = listed if isinstance(listed, list) else []
        # An adapter has its base model as parent: the base is what is meant.
        names = [str(r.get("id")) for r in rows if isinstance(r, dict) and not r.get("parent")]
        if len(names) != 1:
            seen = ", ".join(names) or "none"
            raise WarmError(f"{self.url} serves {seen}: name one with --model")
        return names[0]


def said(error: HTTPError) -> str:
    """Status and message of a refusal, one line."""
    text = ""
    with suppress(OSError, HTTPException, ValueError):
        got = json.loads(error.read(1 << 16))
        inner = got.get("error", got) if isinstance(got, dict) else {}
        text = str(inner.get("message", "")) if isinstance(inner, dict) else str(inner)
    error.close()
    shown = "".join(c if c.isprintable() else " " for c in text)
    return f"HTTP {error.code} {' '.join(shown.split())[:200]}".rstrip()


# -- the work


@dataclass(frozen=True, slots=True)
class Warmer:
    """Sends prompts with one new token each. ``hints``: what goes under ``kvoffload``."""

    server: Server
    model: str
    hints: Mapping[str, Any]
    retries: int = 3

    def send(self, prompt: Prompt) -> Done:
        """One prompt, tried again where that may help. Never raises for what a server does."""
        extra = {"max_tokens": 1, "temperature": 0, "kv_transfer_params": {"kvoffload": self.hints}}
        body = {"model": self.model, **prompt.body, **extra}
        began = time.monotonic()
        why = ""
        for tried in range(1, self.retries + 2):
            try:
                answer = self.server.ask(prompt.path, body)
                return _done(prompt, answer, time.monotonic() - began, tried)
            except HTTPError as error:
                why, again = said(error), error.code in _AGAIN
            except WarmError as error:
                why, again = str(error), True
            if not again or tried > self.retries:
                break
            _sleep(min(8.0, 0.5 * 2 ** (tried - 1)))
        return Done(prompt.line, time.monotonic() - began, tries=tried, error=why)

    def run(self, prompts: Sequence[Prompt], concurrency: int) -> Iterator[Done]:
        """All prompts, ``concurrency`` at a time, as they are done.

        Who stops iterating waits for nothing: what is under way is left to daemon threads.
        """
        todo: SimpleQueue[Prompt] = SimpleQueue()
        for prompt in prompts:
            todo.put(prompt)
        out: SimpleQueue[Done | Exception] = SimpleQueue()
        stop = threading.Event()

        def work() -> None:
            with suppress(Empty):
                while not stop.is_set():
                    prompt = todo.get_nowait()
                    try:
                        out.put(self.send(prompt))
                    except Exception as error:  # raised where the prompts are waited for
                        out.put(error)

        for _ in range(min(concurrency, len(prompts))):
            threading.Thread(target=work, name="warm", daemon=True).start()
        try:
            for _ in prompts:
                done = _next(out)
                if isinstance(done, Exception):
                    raise done
                yield done
        finally:
            stop.set()


def _next(out: SimpleQueue[Done | Exception]) -> Done | Exception:
    while True:
        # A Ctrl-C just before the thread begins to wait does not wake it: it wakes by itself.
        with suppress(Empty):
            return out.get(timeout=_WAKE_S)


def _done(prompt: Prompt, answer: Mapping[str, Any], seconds: float, tries: int) -> Done:
    usage = answer.get("usage")
    if not isinstance(usage, dict):
        return Done(prompt.line, seconds, tries=tries, error="the answer is not a completion")
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return Done(prompt.line, seconds, int(usage.get("prompt_tokens") or 0), cached, tries)


Progress = Callable[[Done], None]
