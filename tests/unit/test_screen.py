"""Bold, bars and overwritten lines on a terminal; plain lines with the date elsewhere; hardly anything when quiet."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import re
import struct
import termios
import threading
import time
from collections.abc import Callable

import pytest

from migrena import LogProgress, Screen
from unit.makers import a_screen

STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")


def on_a_terminal(use: Callable[[Screen], None], **how: bool) -> str:
    """What a real pseudo-terminal of 100 columns receives."""
    master, slave = os.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    received = bytearray()

    def read() -> None:
        try:
            while piece := os.read(master, 65536):
                received.extend(piece)
        except OSError:  # Linux's way to say that the other end is closed
            return

    reader = threading.Thread(target=read)
    with open(slave, "w", encoding="utf-8") as stream:
        reader.start()
        use(a_screen(stream, **how))
    reader.join(30)
    os.close(master)
    return received.decode()


def off_terminal(use: Callable[[Screen], None], **how: bool) -> str:
    """What a log file receives."""
    stream = io.StringIO()
    use(a_screen(stream, **how))
    return stream.getvalue()


def a_step(screen: Screen) -> None:
    """What every step does."""
    with screen.step("Stop source instance."):
        screen.status("Current status: ACTIVE powering-off")
        screen.note("Done.")
        screen.trace("cmp1$ true")
    screen.warn("mind the gap")


def a_copy(screen: Screen) -> None:
    """What a copy shows."""
    with screen.progress(100 * 1024**2) as show:
        for done in range(0, 101, 10):
            show(done * 1024**2)


def a_step_and_a_copy(screen: Screen) -> None:
    """Both, one after the other."""
    a_step(screen)
    a_copy(screen)


def test_a_terminal_gets_bold_titles_and_no_dates() -> None:
    shown = on_a_terminal(a_step)
    assert "\033[1mStop source instance.\033[0m" in shown
    assert not STAMP.search(shown)


def test_a_status_is_wiped_before_the_next_line() -> None:
    shown = on_a_terminal(a_step)
    assert "  Current status: ACTIVE powering-off\r\033[K  Done." in shown


def test_a_terminal_gets_a_bar_in_bytes() -> None:
    shown = on_a_terminal(a_copy)
    assert "100%" in shown and "100M/100M" in shown and "█" in shown


def test_a_log_gets_dated_lines_without_any_escape_code() -> None:
    shown = off_terminal(a_step_and_a_copy)
    assert "\033" not in shown and "\r" not in shown
    assert all(STAMP.match(line) for line in shown.splitlines())
    assert [line[20:] for line in shown.splitlines()] == ["Stop source instance.", "  Done.", "  warning: mind the gap"]


def test_remote_commands_are_shown_only_to_those_who_want_them() -> None:
    assert "cmp1$ true" not in off_terminal(a_step)
    assert "cmp1$ true" in off_terminal(a_step, verbose=True)


@pytest.mark.parametrize("where", [on_a_terminal, off_terminal])
def test_quiet_shows_warnings_alone(where: Callable[..., str]) -> None:
    shown = where(a_step_and_a_copy, quiet=True)
    assert [STAMP.sub("", line) for line in shown.splitlines()] == ["  warning: mind the gap"]


def test_warnings_and_the_seconds_of_each_step_are_kept_for_the_report() -> None:
    screen = a_screen(io.StringIO(), quiet=True)
    a_step(screen)
    assert screen.warnings == ["mind the gap"]
    assert set(screen.seconds) == {"Stop source instance"}


def test_a_step_that_fails_keeps_its_seconds_too() -> None:
    screen = Screen(stream=io.StringIO())
    with pytest.raises(RuntimeError), screen.step("Fail."):
        raise RuntimeError
    assert "Fail" in screen.seconds


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.monotonic)
    return clock


def milestones(clock: Clock, seconds: float, parts: int) -> list[str]:
    """The lines of a copy of 1000 MiB in so many equal parts that takes so long."""
    stream = io.StringIO()
    show = LogProgress(Screen(stream=stream).note, 1000 * 1024**2)
    for part in range(parts + 1):
        show(part * 1000 * 1024**2 // parts)
        clock.now += seconds / parts
    return [line[20:].strip() for line in stream.getvalue().splitlines()]


def test_a_log_gets_a_line_at_each_tenth(clock: Clock) -> None:
    lines = milestones(clock, 600, 1000)
    assert [line.split("%")[0] for line in lines][:10] == ["10", "20", "30", "40", "50", "60", "70", "80", "90", "100"]
    assert "500.0 MiB of 1000.0 MiB, 1.7 MiB/s, 0:05:00 left" in lines[4]


def test_a_quick_copy_does_not_fill_the_log(clock: Clock) -> None:
    assert len(milestones(clock, 4, 1000)) <= 2


def test_a_slow_copy_says_something_every_minute(clock: Clock) -> None:
    assert len(milestones(clock, 3600, 3600)) >= 55


def test_a_log_and_a_terminal_that_both_fail_do_not_stop_an_undo() -> None:
    class Full(io.StringIO):
        def write(self, line: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    screen = Screen(stream=Full())
    screen.log = Full()
    screen.record("a line")
    screen.say("another")
    assert screen.log is None


def test_a_disk_that_is_tried_again_counts_once_in_the_bar_of_the_sums() -> None:
    def two_disks(screen: Screen) -> None:
        with screen.progress(2**20, "other: ") as other:
            other(0)
            with screen.progress(2**20, "root: ") as first:
                first(2**19)
            with screen.progress(2**20, "root: ") as again:
                again(2**20)
            other(2**20)
            time.sleep(0.2)

    shown = on_a_terminal(two_disks)
    assert "/2.00M" in shown and "/3.00M" not in shown
