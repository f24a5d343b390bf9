import pytest
from rich.console import Console

from qvlm_plugin import progress
from qvlm_plugin.progress import Progress, duration, track


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is set."""
    times = {"now": 100.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: times["now"])
    return times


def test_without_a_terminal_a_line_comes_at_most_every_half_minute_and_at_the_end(clock, capsys):
    with Progress("searching", 100) as shown:
        for _ in range(100):
            clock["now"] += 1
            shown.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "searching: 30 of 100, 30 s",
        "searching: 60 of 100, 1 min 0 s",
        "searching: 90 of 100, 1 min 30 s",
        "searching: 100 of 100, 1 min 40 s",
    ]


def test_a_line_says_the_newest_description_and_total(clock, capsys):
    with Progress("dependencies") as shown:
        clock["now"] += 31
        shown.advance()
        shown.describe("blocks", 3)
        shown.advance(2)
    assert capsys.readouterr().err.splitlines() == ["dependencies: 1, 31 s", "blocks: 3 of 3, 31 s"]


def test_what_is_not_shown_prints_nothing(clock, capsys):
    with Progress("searching", 2, shown=False) as shown:
        clock["now"] += 100
        shown.advance(2)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_a_bar_and_no_lines(monkeypatch, capsys):
    monkeypatch.setattr(progress, "Console", lambda **options: Console(**options, force_terminal=True))
    assert [*track([1, 2, 3], "searching")] == [1, 2, 3]
    shown = capsys.readouterr().err
    assert "━" in shown and "3/3" in shown
    assert "3 of 3" not in shown


def test_what_is_tracked_comes_through_whatever_its_length_says(capsys):
    assert [*track(iter("abc"), "reading", 3)] == ["a", "b", "c"]
    assert [*track("ab", "reading")] == ["a", "b"]
    assert capsys.readouterr().err.splitlines() == ["reading: 3 of 3, 0 s", "reading: 2 of 2, 0 s"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
