"""Progress where there is no terminal: a line a minute, of one rank."""

import io
import sys

import pytest

from selectsampler.progress import ProgressLines, progress_bar


class Clock:
    now = 5000.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_a_line_a_minute_with_share_rate_and_what_is_left():
    clock, log = Clock(), io.StringIO()
    with ProgressLines("embed", 1000, unit="image", initial=100, stream=log, clock=clock) as progress:
        for _ in range(170):
            clock.now += 1
            progress.update(5)
    assert log.getvalue().splitlines() == [
        "embed: 40 %, 400 of 1000 images, 5.00image/s, 02:00 left",
        "embed: 70 %, 700 of 1000 images, 5.00image/s, 01:00 left",
    ]


def test_lines_stay_a_minute_apart_where_updates_are_rare():
    clock, log, lines = Clock(), io.StringIO(), []
    progress = ProgressLines("score", 100, unit="row", stream=log, clock=clock)
    for seconds in (100, 50, 20, 30):
        clock.now += seconds
        progress.update(10)
        lines.append(log.getvalue().count("\n"))
    assert lines == [1, 1, 2, 2]


@pytest.mark.parametrize(("rank", "show", "lines"), [("0", True, 1), ("1", True, 0), ("0", False, 0)])
def test_lines_are_of_the_first_rank_where_standard_error_is_no_terminal(monkeypatch, rank, show, lines):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("selectsampler.progress.EVERY", 0.0)
    with progress_bar("copy", 10, unit="row", show=show) as progress:
        progress.update(3)
    assert log.getvalue().count("copy: 30 %, 3 of 10 rows") == lines
    assert len(log.getvalue().splitlines()) == lines


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar("copy", 10, unit="row") as progress:
        assert not isinstance(progress, ProgressLines)
        assert not progress.disable
        progress.update(3)
