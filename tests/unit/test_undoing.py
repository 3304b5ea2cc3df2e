"""The undoing does every step, whatever breaks meanwhile: the journal at any of its lines, or the screen."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import pytest

from migrena import Journal, Screen, StateError, Undo


class Gone(io.StringIO):
    """A terminal that was closed."""

    def write(self, line: str) -> int:
        raise OSError(errno.EIO, line)


class Breaking(Journal):
    """A journal whose disk is full after so many lines."""

    lines = 0

    def write(self, event: str, **facts: object) -> None:
        self.lines -= 1
        if self.lines < 0 and not self._file.closed and self._file.name != "/dev/full":
            self._file.close()
            self._file = open("/dev/full", "ab", buffering=0)
        super().write(event, **facts)


@pytest.mark.parametrize("lines", range(8))
def test_a_journal_that_breaks_at_any_line_of_the_undoing_leaves_no_step_out(tmp_path: Path, lines: int) -> None:
    journal, said, done = Breaking(tmp_path, "run"), io.StringIO(), []
    journal.lines = lines
    undo = Undo(Screen(stream=said))

    def step(name: str) -> None:
        with journal.act(name):
            done.append(name)

    with pytest.raises(ValueError, match="the cause"), journal.ending(undo), undo:
        undo.always("unmark", lambda: step("unmark"))
        undo.on_failure("start", lambda: step("start"))
        undo.on_failure("delete", lambda: step("delete"))
        raise ValueError("the cause")
    assert list(dict.fromkeys(done)) == ["delete", "start", "unmark"] and len(done) <= 4
    assert undo.left == []
    assert ("does not tell how the run has ended" in said.getvalue()) == (lines < 7)


def test_an_act_that_fails_while_the_journal_breaks_tells_its_own_error(tmp_path: Path) -> None:
    journal = Breaking(tmp_path, "run")
    journal.lines = 1
    with pytest.raises(ValueError, match="the cause"), journal.act("copy"):
        raise ValueError("the cause")
    journal.close()


def test_control_an_act_is_not_begun_when_its_intent_is_not_on_the_disk(tmp_path: Path) -> None:
    journal = Breaking(tmp_path, "run")
    with pytest.raises(StateError), journal.act("copy"):
        raise AssertionError("it was begun")
    journal.close()


@pytest.mark.parametrize("lines", [0, 100])
def test_a_terminal_that_is_gone_stops_no_undoing(tmp_path: Path, lines: int) -> None:
    journal, done = Breaking(tmp_path, "run"), []
    journal.lines = lines
    undo = Undo(Screen(stream=Gone()))
    with pytest.raises(ValueError, match="the cause"), journal.ending(undo), undo:
        undo.always("unmark", lambda: done.append("unmark"))
        undo.on_failure("delete", lambda: done.append("delete"))
        raise ValueError("the cause")
    assert done == ["delete", "unmark"] and undo.left == []
