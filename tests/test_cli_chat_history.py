"""The history file of qaflora chat"""

from pathlib import Path

import pytest

from qaflora_edge.cli.chat.terminal_input import BYTES_MAX, open_history


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    return tmp_path / "qaflora-edge" / "chat-history"


def test_messages_come_back_newest_first(path: Path) -> None:
    history, why = open_history()
    history.store_string("one\n# two")
    history.store_string("three")
    again, _ = open_history()
    assert why is None
    assert list(again.load_history_strings()) == ["three", "one\n# two"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_oldest_messages_are_forgotten_when_the_file_is_large(path: Path) -> None:
    history, _ = open_history()
    messages = [f"{number}\n# {'x' * 1000}" for number in range(1 + BYTES_MAX // 1000)]
    for message in messages:
        history.store_string(message)
    assert path.stat().st_size > BYTES_MAX
    history, _ = open_history()
    kept = list(history.load_history_strings())
    assert kept == messages[: -len(kept) - 1 : -1]
    assert 400 < len(kept) < 600
    assert path.stat().st_size <= BYTES_MAX // 2
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_one_message_larger_than_the_file_may_be_is_forgotten(path: Path) -> None:
    history, _ = open_history()
    history.store_string("x" * 2 * BYTES_MAX)
    history, _ = open_history()
    assert list(history.load_history_strings()) == []


def test_a_message_that_cannot_be_kept_stops_nothing(path: Path) -> None:
    history, _ = open_history()
    path.unlink()
    path.parent.rmdir()
    history.store_string("one")
    assert not path.exists()


def test_what_is_no_file_is_told(path: Path) -> None:
    path.mkdir(parents=True)
    _, why = open_history()
    assert why == f"{path} cannot be used (Is a directory)"
