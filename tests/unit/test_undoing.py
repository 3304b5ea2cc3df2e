"""The undoing does every step, whatever breaks meanwhile: the journal at any of its lines, or the screen."""

from __future__ import annotations

import errno
import io
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from migrena import CloudError, Journal, Kept, Run, Screen, StateError, Undo, ask_for_destination, made_late
from unit.makers import UUID, some_settings


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
    assert ("lacks the run's end" in said.getvalue()) == (lines < 7)


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


class Asked:
    """A stand-in for a Nova that is asked for an instance, and for the journal of the run that asks."""

    def __init__(self, code: int | None, *, shows_up: bool) -> None:
        self.code, self.shows_up, self.entries, self.is_broken, self.now, self.asked = code, shows_up, list[dict[str, str]](), False, 0.0, 0

    def write(self, event: str, **facts: object) -> None:
        self.entries.append({"event": event})

    def create(self, *_: object) -> str:
        self.asked += 1
        if self.code is None:
            return "new"
        raise CloudError("spoiled", code=self.code)

    def made_by(self, run: str, origin: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(id="late")] if self.shows_up and self.now > 30 else []

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("code", "shows_up", "late", "waited"), [
    (403, False, [], 0), (409, False, [], 0), (500, False, [], 11), (504, True, ["late"], 31), (0, False, Kept, 72), (502, False, Kept, 72)])
def test_what_was_asked_for_is_looked_for_as_long_as_nobody_knows_whether_it_is_made(
        monkeypatch: pytest.MonkeyPatch, code: int, shows_up: bool, late: list[str] | type[Kept], waited: int) -> None:
    nova = Asked(code, shows_up=shows_up)
    monkeypatch.setattr("migrena.time", SimpleNamespace(monotonic=lambda: nova.now, sleep=nova.sleep))
    some = SimpleNamespace(id=UUID)
    plan = SimpleNamespace(run="r", image=some, flavor=some, server=some, marks=lambda key: {}, extra={})
    record = SimpleNamespace(volumes={}, made=lambda kind: {})
    run = cast(Run, SimpleNamespace(plan=plan, settings=some_settings(), journal=nova, destination=nova, record=record))
    assert made_late(run) == [] and nova.now == 0  # nothing was asked for yet
    with pytest.raises(CloudError):
        ask_for_destination(run)
    if late is Kept:
        with pytest.raises(Kept, match="may still make it"):
            made_late(run)
    else:
        assert made_late(run) == late
    assert nova.asked == 1 and waited <= nova.now <= waited + 2
