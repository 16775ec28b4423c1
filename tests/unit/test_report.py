"""``kvoffload report`` against canned metrics: figures, advice, terminal, JSON and HTML."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvoffload.cli.main import app
from kvoffload.cli.report_html import page
from kvoffload.cli.report_model import Curve, Rates, Report, report, size_advice, worth
from kvoffload.cli.report_view import SHOWN, screen
from kvoffload.cli.top import parse
from kvoffload.core.ledger import Ledger
from kvoffload.core.lookup import primary
from kvoffload.engines.vllm.account import Accounts
from kvoffload.engines.vllm.guard import HookGuard
from kvoffload.metric_table import METRICS
from kvoffload.metrics import Recorder, split_series
from kvoffload.types import CacheLayout, GroupKind, GroupLayout, Tier

HOSTILE = '<script src="http://evil/x.js">alert(1)</script>\x1b[31m[red]&"\''
ALL_RATES = Rates("USD", 3.6, 0.72, 0.5, 0.25)
FULL = GroupLayout(0, GroupKind.FULL, 16, 8, 1 << 16, 1)
LAYOUT = CacheLayout((FULL,), 16, 16, 1)


def quoted(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def exposition(rows: list[tuple[str, dict[str, str], float]], engine: str = "0") -> str:
    """Prometheus text."""
    out = []
    for name, labels, value in rows:
        have = {"engine": engine, "model_name": "m"} | labels
        inner = ",".join(f'{k}="{quoted(v)}"' for k, v in have.items())
        out.append(f"{name}{{{inner}}} {value}")
    return "\n".join(out) + "\n"


def ledger_rows() -> list[tuple[str, dict[str, str], float]]:
    """Two tenants; the second one's loads cost more than they save."""
    rows = []
    for tenant, saved, lost in (("acme", 7200.0, 0.0), ("slow", 36.0, 1836.0)):
        who = {"model": "org/m", "tenant": tenant}
        for name, labels, value in (
            ("requests_total", {}, 10),
            ("tokens_total", {"source": "hbm"}, 1000),
            ("tokens_total", {"source": "miss"}, 2000),
            ("tokens_total", {"source": "dram"}, 6000),
            ("tokens_total", {"source": "nvme"}, 1000),
            ("loads_total", {"tier": "dram"}, 8),
            ("loads_total", {"tier": "nvme"}, 2),
            ("bytes_total", {"tier": "dram", "direction": "load"}, 1 << 30),
            ("bytes_total", {"tier": "dram", "direction": "store"}, 1 << 31),
            ("saved_gpu_seconds_total", {"tier": "dram"}, saved),
            ("lost_gpu_seconds_total", {"tier": "nvme"}, lost),
            ("load_seconds_total", {"tier": "dram"}, 5),
            ("lookup_seconds_total", {}, 0.001),
        ):
            rows.append((f"kvoffload_ledger_{name}", who | labels, float(value)))
    return rows


def curve_rows(tokens: float = 1e6, top: float = 0.6) -> list[tuple[str, dict[str, str], float]]:
    rows = [("kvoffload_curve_tokens", {}, tokens)]
    for tier, ratios in (("dram", (0.2, 0.3, 0.4, 0.5, top)), ("nvme", (0.65, 0.7, 0.7, 0.7, 0.7))):
        for factor, ratio in zip(("0.25", "0.5", "1", "2", "4"), ratios, strict=True):
            labels = {"tier": tier, "factor": factor}
            rows.append(("kvoffload_curve_hit_ratio", labels, ratio))
    rows.append(("kvoffload_dram_total_bytes", {}, float(16 << 30)))
    rows.append(("kvoffload_nvme_max_bytes", {}, float(1 << 40)))
    return rows


def made(text: str, rates: Rates = ALL_RATES) -> Report:
    out = report(parse(0.0, text, "canned"), rates)
    assert out is not None
    return out


def canned() -> str:
    return exposition(ledger_rows() + curve_rows())


def shown(of: Report) -> str:
    out = io.StringIO()
    Console(file=out, width=120, color_system="standard", force_terminal=True).print(
        screen(of, "canned")
    )
    return out.getvalue()


def test_accounts_add_up() -> None:
    got = made(canned())
    assert got.total.requests == 20 and got.total.asked == 20_000
    assert [t.name for t in got.tenants] == ["acme", "slow"]
    assert [m.name for m in got.models] == ["org/m"]
    by_tier = {t.name: t for t in got.tiers}
    assert set(by_tier) == {"dram", "nvme"}
    assert by_tier["dram"].saved_s == 7236 and by_tier["nvme"].lost_s == 1836
    assert by_tier["dram"].tokens == 12_000 and by_tier["dram"].load_bytes == 2 << 30
    acme, slow = got.tenants
    assert acme.net_s == 7200 and slow.net_s == -1800
    assert got.total.net_s == sum(t.net_s for t in got.tenants) == sum(t.net_s for t in got.tiers)


def test_worth_keeps_the_sign_and_unknown_rates_stay_unknown() -> None:
    loss = worth(-1800, ALL_RATES)
    assert loss.gpu_hours == -0.5 and loss.money == pytest.approx(-1.8)
    assert loss.kwh == pytest.approx(-0.36) and loss.energy_cost == pytest.approx(-0.18)
    assert loss.kg_co2 == pytest.approx(-0.09)
    bare = worth(3600, Rates())
    assert (bare.money, bare.kwh, bare.energy_cost, bare.kg_co2) == (None, None, None, None)


def test_engines_add_up_and_their_curves_are_weighted() -> None:
    second = exposition(ledger_rows() + curve_rows(3e6, top=0.8), engine="1")
    got = made(exposition(ledger_rows() + curve_rows()) + second)
    assert got.total.requests == 40 and got.curve_tokens == 4e6
    dram, nvme = got.curves
    assert dram.ratios[4.0] == pytest.approx(0.25 * 0.6 + 0.75 * 0.8)
    assert dram.size_bytes == 32 << 30 and nvme.size_bytes == 1 << 40


def test_the_screen_shows_losses_in_red() -> None:
    text = shown(made(canned()))
    assert "-1.8000" in text and "-30 min" in text
    for loss in ("-30 min", "-1.8000"):
        assert re.search(rf"\x1b\[1;31m *{loss}", text), "a loss that is not red"
    assert " 2.0 h" in text and "For tenant slow loads cost more than they saved." in text


def test_sizing_advice_in_words() -> None:
    lines = "\n".join(made(canned()).advice)
    assert "With 2x DRAM (32.0 GiB) 10.0 % more of all prompt tokens would hit." in lines
    assert "With 0.5x DRAM (8.0 GiB) 10.0 % fewer would." in lines
    assert "Advice: 2x DRAM (32.0 GiB) brings most for its size." in lines
    assert "Advice: 0.5x NVMe (512.0 GiB) would do as well." in lines


def test_advice_needs_tokens_and_a_curve() -> None:
    assert (
        "No sizing advice yet: 99,999 prompt tokens"
        in size_advice([Curve("dram", None, {1.0: 0.5})], 99_999)[0]
    )
    assert "no hit-ratio curve" in size_advice([], 1e9)[0]
    flat = Curve("dram", None, {0.5: 0.4, 1.0: 0.5, 2.0: 0.505})
    assert size_advice([flat], 1e6)[-1] == "Advice: leave DRAM as it is."


def test_just_below_a_cliff_growing_is_said_first() -> None:
    """LRU finds little until the whole working set fits: half of too little is as good."""
    cliff = Curve("dram", float(1 << 30), {0.25: 0.02, 0.5: 0.02, 1.0: 0.02, 2.0: 0.62, 4.0: 0.62})
    lines = size_advice([cliff], 1e6)
    assert lines[-2] == "Advice: 2x DRAM (2.0 GiB) brings most for its size."
    without = "Without more DRAM, 0.25x DRAM (256.0 MiB) would do as well as what is there."
    assert lines[-1] == without
    assert [x for x in lines if x.startswith("Advice")] == [lines[-2]]


class Page(HTMLParser):
    """Collects tags and refuses what does not nest."""

    VOID = ("meta",)

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(text: str) -> Page:
    got = Page()
    got.feed(text)
    got.close()
    assert got.open == []
    return got


def hostile() -> str:
    rows = [
        (
            name,
            {k: HOSTILE if k in ("tenant", "model", "tier") else v for k, v in labels.items()},
            x,
        )
        for name, labels, x in ledger_rows() + curve_rows()
    ]
    return exposition(rows)


@pytest.mark.parametrize("text", [canned(), hostile()], ids=["canned", "hostile"])
def test_the_page_is_whole_and_fetches_nothing(text: str) -> None:
    got = parsed(page(made(text), HOSTILE, "now"))
    tags = {tag for tag, _ in got.seen}
    assert {"table", "svg", "polyline", "rect"} <= tags
    assert not tags & {"script", "link", "img", "iframe", "object", "image", "use", "a"}
    for _, attrs in got.seen:
        assert not any(k in ("src", "href", "xlink:href") or k.startswith("on") for k in attrs)
    assert "url(" not in text and "@import" not in page(made(text), "x", "now")
    assert "\x1b" not in page(made(text), HOSTILE, "now")


def test_hostile_names_are_shown_as_text() -> None:
    got = parsed(page(made(hostile()), "here", "now"))
    assert "<script src=" in got.text  # as text: the parser has unescaped it
    plain = shown(made(hostile()))
    assert "\x1b[31m[red]" not in plain and "[red]" in plain


def test_losses_are_marked_in_the_page() -> None:
    text = page(made(canned()), "here", "now")
    assert re.search(r'<td class="loss">-30 min</td>', text)
    assert re.search(r'<rect[^>]*fill="#c00"[^>]*><title>slow: -30 min</title>', text)


def test_many_tenants_are_cut_short_and_said() -> None:
    rows = [
        ("kvoffload_ledger_requests_total", {"model": "m", "tenant": f"t{i}"}, 1.0)
        for i in range(SHOWN + 5)
    ]
    got = made(exposition(rows))
    assert len(got.tenants) == SHOWN + 5
    assert f"Tables show {SHOWN} rows; --json has all." in shown(got)


def run(*args: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["report", *args])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def saved(tmp_path: Path) -> str:
    path = tmp_path / "metrics.txt"
    path.write_text(canned())
    return str(path)


def test_the_command_reads_a_file_and_writes_a_page(saved: str, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    code, shown, _ = run("--file", saved, "--html", str(out), "--per-gpu-hour", "2.5")
    assert code == 0 and "GPU time by tenant" in shown and "EUR" in shown
    parsed(out.read_text())


def test_json_has_everything(saved: str) -> None:
    rates = ("--currency", "USD", "--per-gpu-hour", "3.6", "--kwh-per-gpu-hour", "0.72")
    code, out, _ = run("--file", saved, "--json", *rates, "--price-per-kwh", "0.5")
    got = json.loads(out)
    assert code == 0 and got["total"]["net_s"] == 5400
    assert got["total"]["worth"]["money"] == pytest.approx(5.4)
    assert got["total"]["worth"]["energy_cost"] == pytest.approx(1.5 * 0.72 * 0.5)
    assert got["tenants"][1]["worth"]["money"] == pytest.approx(-1.8)
    assert got["curves"][0]["ratios"]["2.0"] == 0.5 and got["rates"]["currency"] == "USD"


@pytest.mark.parametrize(
    "args, said",
    [
        (("--per-gpu-hour", "nan"), "--per-gpu-hour=nan: give a number of at least 0"),
        (("--kwh-per-gpu-hour", "-1"), "--kwh-per-gpu-hour=-1.0: give a number of at least 0"),
        (("--price-per-kwh", "1"), "--price-per-kwh needs --kwh-per-gpu-hour"),
        (("--currency", ""), "--currency: give 1 to 8 printable characters"),
        (("--url", "x"), "--file and --url: give one of them"),
        (("--html", "/no/such/folder/x.html"), "--html /no/such/folder/x.html: No such file"),
    ],
)
def test_bad_input_is_one_line(saved: str, args: tuple[str, ...], said: str) -> None:
    code, out, err = run("--file", saved, *args)
    assert code == 2 and not out
    assert said in err and err.count("\n") == 1


def test_nothing_to_report_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "m.txt"
    for text, said in (
        ("kvoffload_lookups_total 3\n", "no ledger in these metrics yet"),
        ("up 1\n", "no kvoffload metrics"),
        ("{{{\n", "not Prometheus text"),
    ):
        path.write_text(text)
        code, _, err = run("--file", str(path))
        assert code == 2 and said in err and err.count("\n") == 1
    code, _, err = run("--file", str(tmp_path / "none"))
    assert code == 2 and "No such file" in err
    code, _, err = run("--url", "http://127.0.0.1:1/metrics")
    assert code == 2 and "127.0.0.1:1" in err


def test_what_the_connector_exports_is_what_the_report_reads() -> None:
    """Names and labels, end to end: accounts -> recorder -> Prometheus text -> report."""
    metrics = Recorder()
    accounts = Accounts(LAYOUT, metrics, HookGuard("scheduler"), "org/m", 1 << 30, 1 << 33)
    ledger: Ledger = accounts.ledger
    ledger.begin("r", "org/m", "acme")
    ledger.asked("r", 1000, 100)
    ledger.load("r", {Tier.DRAM: 300, Tier.NVME: 300}, {Tier.NVME: 9}, 1.0, 11.0)
    ledger.stored("r", 77)
    ledger.end("r")
    assert accounts.curve is not None and primary(LAYOUT) is FULL
    accounts.curve.query([], 2 * 10**5)
    accounts.report(100.0)
    assert not accounts.guard.take_errors()
    payload = metrics.take()
    rows = []
    for series, value in (payload["c"] | payload["g"]).items():
        name, labels = split_series(series)
        rows.append((name, dict(zip(METRICS[name].labels, labels, strict=True)), float(value)))
    got = made(exposition(rows))
    (tenant,) = got.tenants
    assert (tenant.name, tenant.requests, tenant.asked) == ("acme", 1, 1000)
    assert tenant.net_s == pytest.approx(10.0) and tenant.store_bytes == 77
    assert tenant.loaded == {"dram": 300, "nvme": 300} and tenant.missed == 300
    assert [c.tier for c in got.curves] == ["dram", "nvme"]
    assert sorted(got.curves[0].ratios) == [0.25, 0.5, 1.0, 2.0, 4.0]
