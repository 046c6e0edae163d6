"""Progress: a redrawn line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io
import re

import pytest

from planish.search.progress import Progress, duration


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_left_is_the_pace_of_this_session_times_what_is_left() -> None:
    clock, stream = _Clock(), io.StringIO()
    progress = Progress(stream, terminal=False, clock=clock)
    progress.begin("search", total=100, done=40)
    clock.now = 60
    progress.advance(20)
    # 20 items a minute, 40 to go.
    assert progress.line() == "search 60/100, 2 min left"


def test_without_a_terminal_a_line_is_written_now_and_then_and_at_the_end() -> None:
    clock, stream = _Clock(), io.StringIO()
    progress = Progress(stream, terminal=False, clock=clock, every_s=15)
    progress.begin("search", total=100)
    for _ in range(100):
        clock.now += 1
        progress.advance()
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [f"search {n}/100" for n in (0, 15, 30, 45, 60, 75, 90, 100)]
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_on_a_terminal_one_line_is_redrawn_and_notes_stay_above_it() -> None:
    clock, stream = _Clock(), io.StringIO()
    progress = Progress(stream, terminal=True, clock=clock)
    progress.begin("search", total=4)
    for _ in range(4):
        clock.now += 1
        progress.best("91.2 % at 0.43x")
        progress.advance()
    progress.note("found it")
    progress.close()
    kept = [line for line in re.sub(r"[^\n]*\r\x1b\[2K", "", stream.getvalue()).splitlines() if line]
    assert kept[0] == "found it"
    assert kept[1:] == [progress.line()]
    assert "[########################]" in kept[1]
    assert "best 91.2 % at 0.43x" in kept[1]


def test_without_a_stream_nothing_happens() -> None:
    progress = Progress(None)
    progress.begin("search", total=0)
    progress.note("x")
    progress.close()
    assert progress.line() == "search 0/0"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3599, "1 h 0 min"), (7500, "2 h 5 min"), (273600, "3 d 4 h")],
)
def test_duration_is_worded_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
