"""How a frame of ``kvoffload top`` looks: rich renderables that fit 80 columns.

A number the server does not export is "-". Imported by the command only: rich is not light.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvoffload.cli.top_model import Frame, Saved, TierFrame
from kvoffload.cli.top_samples import Flow, Spread, Times
from kvoffload.cli.units import count, seconds, share, size

_ALARM = "bold red"
_SHOWN_EVENTS = ("lookup", "hit_tokens_", "load_chunks_", "load_bytes_", "planner_", "follow")
_TIMES = {
    "load": "load",
    "load_wait": "  wait for bytes",
    "load_copy": "  copy",
    "store": "store copy",
    "scheduler_step": "scheduler step",
}


def screen(frame: Frame, url: str, clock: str = "") -> RenderableType:
    """The whole screen of the server at ``url``; ``clock``: the time of day, if it matters."""
    parts = (_traffic(frame), _held(frame), _work(frame), _reasons(frame))
    spaced: list[RenderableType] = [_title(frame, url, clock)]
    for part in parts:
        spaced += [Text(), part]
    return Group(*spaced)


def _title(frame: Frame, url: str, clock: str) -> Text:
    facts = [clock] if clock else []
    if frame.engines > 1:
        facts.append(f"{frame.engines} engines")
    if frame.window_s is None:
        facts.append("first sample")
    else:
        facts.append(f"now: the last {seconds(frame.window_s)}")
    text = Text.assemble(("kvoffload top", "bold"), f"  {url}\n", "  ".join(facts))
    if frame.restarted:
        text.append("  server restarted", style="yellow")
    return text


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def _traffic(frame: Frame) -> Table:
    table = _table("tier", "hits now", "since start", "loading", "storing", "learned rate")
    hbm = (frame.hbm_hit_rate_now, frame.hbm_hit_rate_total)
    table.add_row("hbm", *(_maybe(share, rate) for rate in hbm), "", "", "")
    for name, tier in _shown(frame):
        table.add_row(
            name,
            _maybe(share, tier.hit_rate_now),
            _maybe(share, tier.hit_rate_total),
            _speed(tier.load_bytes),
            _speed(tier.store_bytes),
            _maybe(_per_s, tier.learned_bytes_per_s),
        )
    ours = (frame.hit_rate_now, frame.hit_rate_total)
    table.add_row("all tiers", *(_maybe(share, rate) for rate in ours), "", "", "")
    return table


def _held(frame: Frame) -> Table:
    table = _table("tier", "used", "size", "full", "pinned", "chunks", "in flight", "breaker")
    for column in table.columns[-2:]:
        column.no_wrap = False
    for name, tier in _shown(frame):
        full = None
        if tier.used_bytes is not None and tier.size_bytes:
            full = tier.used_bytes / tier.size_bytes
        moving = " ".join(f"{_word(d)} {size(n)}" for d, n in tier.inflight_bytes.items() if n)
        table.add_row(
            name,
            _maybe(size, tier.used_bytes),
            "off" if name != "dram" and tier.size_bytes == 0 else _maybe(size, tier.size_bytes),
            _maybe(share, full),
            _maybe(size, tier.pinned_bytes),
            _maybe(count, tier.chunks),
            Text(moving) if moving else ("0 B" if tier.inflight_bytes else "-"),
            _breakers(tier.breakers),
        )
    return table


def _breakers(states: Mapping[str, str]) -> Text:
    """One word where both directions agree, else what is not closed."""
    words = sorted(set(states.values()))
    if len(words) > 1:
        words = [f"{_word(way)} {state}" for way, state in states.items() if state != "closed"]
    style = _ALARM if "open" in states.values() else ""
    return Text(", ".join(words) or "-", style=style)


def _shown(frame: Frame) -> list[tuple[str, TierFrame]]:
    return [(n, t) for n, t in frame.tiers.items() if t.active or n != "remote"]


def _work(frame: Frame) -> Table:
    table = _table("", "now", "since start")
    for label, flow in (
        ("lookups", frame.lookups),
        ("tokens looked up", frame.queried_tokens),
        ("tokens worth loading", frame.offered_tokens),
        ("tokens loaded", frame.loaded_tokens),
    ):
        now = flow.per_s if flow else None
        table.add_row(label, _maybe(lambda n: f"{count(n)}/s", now), _total(flow))
    for name, label in _TIMES.items():
        times = frame.times.get(name)
        if times is None:
            table.add_row(f"{label} p50 / p99", "-", "-")
        else:
            row = (_spread(times, s) for s in (times.now, times.total))
            table.add_row(f"{label} p50 / p99", *row)
    table.add_row("time saved", *_saved(frame.saved))
    failed = frame.failed_loads
    style = _ALARM if failed and failed.added else ""
    table.add_row("failed loads", Text(_added(failed), style=style), _total(failed))
    return table


def _saved(saved: Saved | None) -> tuple[Text, Text]:
    values = (None, None) if saved is None else (saved.now_s, saved.total_s)
    now, total = (
        Text(
            "-" if value is None else f"{'+' if value > 0 else ''}{seconds(value)}",
            style=_ALARM if value is not None and value < 0 else "",
        )
        for value in values
    )
    return now, total


def _spread(times: Times, spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return " / ".join(
        f">= {seconds(value)}" if value >= times.bound_s else seconds(value)
        for value in (spread.p50_s, spread.p99_s)
    )


def _reasons(frame: Frame) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    requests = "  ".join(f"{_word(name)} {count(n)}" for name, n in frame.requests.items())
    grid.add_row("requests", Text(requests or "-"))
    rate = frame.prefill_tokens_per_s
    grid.add_row("prefill", _maybe(lambda n: f"{count(n)} tokens/s", rate))
    for label, flows in (
        ("plans", frame.plans),
        ("followers", frame.followers),
        ("misses", frame.misses),
        ("failures", frame.failures),
    ):
        bad = label == "failures" and any(flow.added for flow in flows.values())
        grid.add_row(label, Text(_counts(flows), style=_ALARM if bad else ""))
    grid.add_row("resets", _total(frame.resets))
    moved = {n: f for n, f in frame.events.items() if f.added and not _said_elsewhere(n)}
    known = frame.window_s is not None and bool(frame.events)
    grid.add_row("events now", Text(_counts(moved) if moved else "none" if known else "-"))
    return grid


def _said_elsewhere(event: str) -> bool:
    """Whether other rows already show what this event of the Manager counts."""
    return event.startswith(_SHOWN_EVENTS) or event.endswith("_bytes")


def _counts(flows: Mapping[str, Flow]) -> str:
    """Totals by name, zeros left out, what the window added in brackets."""
    if not flows:
        return "-"
    shown = [
        f"{_word(name)} {count(flow.total)}" + (f" (+{count(flow.added)})" if flow.added else "")
        for name, flow in flows.items()
        if flow.total
    ]
    return "  ".join(shown) or "none"


def _word(name: str) -> str:
    """A label value from the server, without what a terminal would obey."""
    return name if name.isprintable() else repr(name)


def _maybe(show: Callable[[float], str], value: float | None) -> str:
    return "-" if value is None else show(value)


def _per_s(value: float) -> str:
    return f"{size(value)}/s"


def _speed(flow: Flow | None) -> str:
    return _maybe(_per_s, flow.per_s if flow else None)


def _total(flow: Flow | None) -> str:
    return _maybe(count, flow.total if flow else None)


def _added(flow: Flow | None) -> str:
    return _maybe(count, flow.added if flow else None)
