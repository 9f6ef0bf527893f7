"""Signs of life of long work."""

import itertools
import logging

import pytest

from flsl_d2.engine import progress as module
from flsl_d2.engine.progress import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def reported(items, clock, seconds, caplog):
    """Return the lines of work whose items take so many seconds."""
    caplog.set_level(logging.INFO, module.__name__)
    for _ in progress(items, "work"):
        clock.now += seconds
    return list(caplog.messages)


def test_first_line_comes_with_the_fifth_item_or_the_tenth_second(clock, caplog):
    fast = reported(range(40), clock, 0.5, caplog)
    assert fast[0].startswith("work: 5 of 40 done, 0.5 s each, 0:00:18 left")
    caplog.clear()
    slow = reported(range(3), clock, 11.0, caplog)
    assert slow[0].startswith("work: 1 of 3 done")


def test_later_lines_are_at_most_a_minute_apart_and_few(clock, caplog):
    lines = reported(range(3600), clock, 1.0, caplog)
    done = [int(line.split()[1]) for line in lines]
    gaps = [b - a for a, b in itertools.pairwise(done)]
    assert done[0] == 5
    assert max(gaps) <= 60
    assert len(done) < 70


def test_a_log_that_nobody_reads_is_replaced_by_stderr(clock, capsys, monkeypatch):
    monkeypatch.setattr(module.logger, "hasHandlers", lambda: False)
    for _ in progress(iter(range(9)), "work"):
        clock.now += 11
    assert "work: 1 done, 11 s each" in capsys.readouterr().err
