"""Cache files: replaced as a whole, private, and nothing left behind by a failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvoffload.files import replace_json, user_cache_file


def test_a_file_is_replaced_and_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "kept.json"
    replace_json(path, {"n": 1})
    replace_json(path, {"n": 2})
    assert json.loads(path.read_text()) == {"n": 2}
    assert [p.name for p in path.parent.iterdir()] == ["kept.json"]
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("data", "error"), [(object(), TypeError), ({"n": 2}, OSError)])
def test_a_failure_leaves_what_was_there(tmp_path: Path, data: object, error: type) -> None:
    path = tmp_path / "kept.json"
    if error is OSError:
        path.mkdir()  # cannot be renamed over
    else:
        replace_json(path, {"n": 1})
    with pytest.raises(error):
        replace_json(path, data)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.json"]
    assert path.is_dir() or json.loads(path.read_text()) == {"n": 1}


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache_file("a.json") == tmp_path / "kvoffload" / "a.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_cache_file("a.json") == tmp_path / "home" / ".cache" / "kvoffload" / "a.json"
