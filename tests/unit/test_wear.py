"""Drive wear: device bytes, the last hour's rate, and what ``store stats --url`` says."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvoffload.cli.store import app
from kvoffload.core.wear import HourOf, Wear, days_left
from kvoffload.store import open_store
from kvoffload.tiers.base import device_bytes

PAGE = """\
# TYPE kvoffload_nvme_payload_bytes_total counter
kvoffload_nvme_payload_bytes_total{engine="0"} 1.0e12
kvoffload_nvme_device_bytes_total{engine="0"} 1.25e12
kvoffload_nvme_written_per_day_bytes{engine="0"} 5.0e12
kvoffload_nvme_endurance_bytes{engine="0"} 7.0e15
kvoffload_nvme_admission_probability{engine="0"} 0.25
kvoffload_nvme_value{engine="0"} 0.125
kvoffload_events_total{engine="0",event="nvme_admitted_coin"} 17
kvoffload_events_total{engine="0",event="nvme_refused_value"} 4
"""


def test_the_last_hour_is_what_counts() -> None:
    hour = HourOf()
    assert hour.per_day(0, 0.0) == 0.0
    assert hour.per_day(1000, 60.0) == 24_000, "the first minute is no rate"
    for minute in range(2, 181):
        shown = hour.per_day(1000 * minute, 60.0 * minute)
    assert shown == pytest.approx(60_000 * 24, rel=0.02)
    for minute in range(181, 260):
        shown = hour.per_day(180_000, 60.0 * minute)
    assert shown == 0.0
    assert len(hour._seen) <= 62


def test_device_bytes_are_all_that_is_written() -> None:
    assert device_bytes({"bytes_written": 5, "journal_bytes": 3, "zeroed_bytes": 2, "x": 9}) == 10
    assert Wear(8, 10, 0.0, 1.0, 0.0).amplification() == 1.25
    assert Wear(0, 10, 0.0, 1.0, 0.0).amplification() == 0.0
    assert days_left(100.0, 4.0) == 25.0 and days_left(1.0, 0.0) is None


def test_a_real_store_counts_what_it_writes(tmp_path: Path) -> None:
    with open_store(tmp_path / "s", max_bytes=64 << 20, segment_bytes=4 << 20) as store:
        store.put(b"k" * 16, bytes(1 << 20))
        store.flush()
        assert device_bytes(store.stats()) >= 1 << 20


@pytest.fixture
def server() -> Iterator[str]:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PAGE.encode())

        def log_message(self, *args: object) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/metrics"
    http.shutdown()
    http.server_close()


@pytest.fixture
def path(tmp_path: Path) -> str:
    open_store(tmp_path / "s", max_bytes=64 << 20, segment_bytes=4 << 20).close()
    return str(tmp_path / "s")


def test_store_stats_shows_wear(path: str, server: str) -> None:
    got = CliRunner().invoke(app, ["stats", path, "--url", server])
    assert got.exit_code == 0, got.output
    for text in ("1.25", "5.000", "1,400 days", "chunks coin", "chunks no_value"):
        assert text in got.output, text
    got = CliRunner().invoke(app, ["stats", path, "--url", server, "--json"])
    wear = json.loads(got.stdout)["wear"]
    assert (wear["days_left"], wear["amplification"]) == (1400.0, 1.25)
    assert wear["chunks"]["coin"] == 17 and wear["chunks"]["no_value"] == 4


def test_store_stats_without_or_with_a_wrong_url(path: str) -> None:
    got = CliRunner().invoke(app, ["stats", path, "--json"])
    assert got.exit_code == 0 and "wear" not in json.loads(got.stdout)
    got = CliRunner().invoke(app, ["stats", path, "--url", "http://127.0.0.1:9/metrics"])
    assert got.exit_code == 2
