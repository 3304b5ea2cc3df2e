"""migrena is killed outright, or told to end, at every line of its journal: nothing is lost, and resume and rollback put it right."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from conftest import short_are
from hosts.operators import Operator, Throw, an_operator, ended, has_arrived
from hosts.rig import MiB, wait_until_clean
from lab.hosts import Lab
from migrena import MADE, read_run, what_to_do

Operators = Callable[[int], list[Operator]]
KILL, TERM = signal.SIGKILL.value, signal.SIGTERM.value
GUEST = ((MiB, 12 * MiB),)  # chunks of 1 MiB: when the first has arrived, some have not even begun

# The lines of a whole run, in their order; those that stand alone name no act. Left out are intents that follow a result at once.
UNTIL_ASKED = ("run", "intent of mark source")
UNTIL_MADE = (*UNTIL_ASKED, "intent of create destination")
UNTIL_STOPPED = ("done of create destination", "done of stop destination", "intent of stop source")
UNTIL_COPIED = ("done of stop source", "intent of copy", "chunk", "done of copy", "intent of swap in")
UNTIL_STARTED = ("done of swap in", "intent of start destination")
STARTED = ("done of start destination", "intent of mark destination done", "done of mark destination done")
LINES = (*UNTIL_MADE, *UNTIL_STOPPED, *UNTIL_COPIED, *UNTIL_STARTED, *STARTED)


@pytest.fixture
def operators(lab: Lab, tmp_path: Path) -> Operators:
    """So many people who know nothing of each other, each with an instance that runs on the one source host."""
    def make(count: int) -> list[Operator]:
        made = []
        for _ in range(count):
            id = str(uuid.uuid4())
            (tmp_path / id).mkdir()
            made.append(an_operator(lab, tmp_path / id, id, GUEST, CHUNK="1M", TLS=False))
        return made

    return make


def copies(operator: Operator, throw: Sequence[Throw]) -> subprocess.Popen[str]:
    """A whole run, into which signals are thrown."""
    return operator.begin("-s", operator.id, "-d", "new", "-a", "dst", throw=throw)


def clean(operator: Operator) -> None:
    """Nothing of ours runs or lies on a host any more, at the latest when the leases have ended."""
    for name in ("src", "dst"):
        wait_until_clean(operator.lab[name])


def killed_at(operators: Sequence[Operator], line: str) -> list[str]:
    """The runs of these operators, each killed outright at this line, and shown as that by status."""
    for process in [copies(operator, [(line, KILL)]) for operator in operators]:
        ended(process, -KILL)
    clean(operators[0])
    runs = []
    for operator in operators:
        ((run, state),) = operator.states()
        assert state == "killed"
        runs.append(run)
        said = "\n".join(what_to_do(read_run(operator.folder / "state", run)))
        assert f"undo: ./migrena.py rollback {run}" in said
        assert (f"continue: ./migrena.py resume {run}" in said) == (line not in UNTIL_ASKED)
    return runs


def is_undone(operator: Operator, run: str, state: str = "rolled back") -> None:
    """Everything is as the run had found it; that the hosts are clean is seen at the end of each test."""
    operator.is_as_found()
    assert operator.made() == [] and operator.states() == [(run, state)]


def undo(operator: Operator, run: str, *, was_started: bool = False) -> None:
    """Rolls a run back; a destination that has been started is deleted only with --yes."""
    if was_started:
        assert "it may have newer data" in ended(operator.begin("rollback", run), 3)
    ended(operator.begin("rollback", run, *(("--yes",) if was_started else ())), 0)
    is_undone(operator, run)


@pytest.mark.parametrize("line", short_are(["chunk"], LINES))
def test_after_a_kill_the_one_run_is_undone_and_the_other_resumed(operators: Operators, line: str) -> None:
    one, other = both = operators(2)
    before = [operator.source.sha256() for operator in both]
    first, second = killed_at(both, line)
    going_on = other.begin("resume", second)
    undo(one, first, was_started=line in STARTED)
    if line in UNTIL_MADE:
        assert "does not exist" in ended(going_on, 3)
        undo(other, second)
    else:
        ended(going_on, 0)
        has_arrived(other, second, "ACTIVE")
    assert [operator.source.sha256() for operator in both] == before


# At its first line there is nothing to undo.
@pytest.mark.parametrize("line", short_are(["chunk"], [line for line in LINES[1:] if line not in STARTED]))
def test_a_run_that_is_told_to_end_undoes_itself(operators: Operators, line: str) -> None:
    (operator,) = operators(1)
    before = operator.source.sha256()
    ended(copies(operator, [(line, TERM)]), 128 + TERM)
    ((run, _),) = operator.states()
    is_undone(operator, run, "failed")
    assert operator.source.sha256() == before


@pytest.mark.parametrize("line", short_are(["done of start destination"], STARTED))
def test_a_run_that_is_told_to_end_when_the_destination_runs_keeps_it_and_is_resumed(operators: Operators, line: str) -> None:
    (operator,) = operators(1)
    said = ended(copies(operator, [(line, TERM)]), 4)
    ((run, state),) = operator.states()
    (row,) = operator.made()
    assert state == "left" and row["status"] == "ACTIVE" and f"destination {row['id']}: ACTIVE" in said and f"resume {run}" in said
    ended(operator.begin("resume", run), 0)
    has_arrived(operator, run, "ACTIVE")


def test_a_run_that_is_told_to_end_when_it_has_ended_is_done(operators: Operators) -> None:
    (operator,) = operators(1)
    ended(copies(operator, [("ended", TERM)]), 0)
    ((run, state),) = operator.states()
    assert state == "done"
    has_arrived(operator, run, "ACTIVE")


@pytest.mark.parametrize("line", short_are(
    ["done of delete destination"], ["intent of start source", "done of start source", "done of delete destination"]))
def test_a_kill_in_the_middle_of_the_undoing_leaves_what_rollback_undoes(operators: Operators, line: str) -> None:
    one, other = both = operators(2)
    for process in [copies(operator, [("done of copy", TERM), (line, KILL)]) for operator in both]:
        ended(process, -KILL)
    clean(one)
    runs = [operator.states()[0][0] for operator in both]
    assert [operator.states() for operator in both] == [[(run, "killed")] for run in runs]
    undo(one, runs[0])
    if line != "intent of start source":  # the source has been started, or the destination is gone
        assert "rollback" in ended(other.begin("resume", runs[1]), 3)
        undo(other, runs[1])
    else:
        ended(other.begin("resume", runs[1]), 0)
        has_arrived(other, runs[1], "ACTIVE")


@pytest.mark.parametrize("line", short_are(
    ["chunk"], ["resume", "done of adopt destination", "chunk", "done of swap in", "done of start destination"]))
def test_a_resume_that_is_killed_is_undone_or_resumed_again(operators: Operators, line: str) -> None:
    one, other = both = operators(2)
    runs = killed_at(both, "chunk")
    for process in [operator.begin("resume", run, throw=[(line, KILL)]) for operator, run in zip(both, runs, strict=True)]:
        ended(process, -KILL)
    clean(one)
    going_on = other.begin("resume", runs[1])
    undo(one, runs[0], was_started=line in STARTED)
    ended(going_on, 0)
    has_arrived(other, runs[1], "ACTIVE")


@pytest.mark.parametrize(("at", "line"), short_are([("chunk", "chunk")], [
    ("done of stop source", "resume"), ("chunk", "done of adopt destination"), ("chunk", "chunk"),
    ("done of swap in", "intent of start destination"),
]))
def test_a_resume_that_is_told_to_end_undoes_the_whole_run(operators: Operators, at: str, line: str) -> None:
    (operator,) = operators(1)
    (run,) = killed_at([operator], at)
    ended(operator.begin("resume", run, throw=[(line, TERM)]), 128 + TERM)
    is_undone(operator, run, "failed")


@pytest.mark.parametrize("line", short_are(["resume"], ["resume", "done of adopt destination"]))
def test_a_resume_that_is_told_to_end_never_deletes_a_destination_that_had_been_started(operators: Operators, line: str) -> None:
    (operator,) = operators(1)
    (run,) = killed_at([operator], "done of start destination")
    ended(operator.begin("resume", run, throw=[(line, TERM)]), 4)
    assert [row["status"] for row in operator.made()] == ["ACTIVE"] and operator.states() == [(run, "left")]
    ended(operator.begin("resume", run), 0)
    has_arrived(operator, run, "ACTIVE")


@pytest.mark.parametrize(("line", "number"), short_are([("done of delete destination", KILL)], [
    ("rollback", KILL), ("done of delete destination", KILL), ("done of unlock source", KILL), ("intent of start source", KILL),
    ("rollback", TERM), ("intent of delete destination", TERM), ("done of start source", TERM),
]))
def test_a_rollback_that_was_interrupted_is_given_again(operators: Operators, line: str, number: int) -> None:
    (operator,) = operators(1)
    (run,) = killed_at([operator], "done of swap in")
    said = ended(operator.begin("rollback", run, throw=[(line, number)]), -KILL if number == KILL else 4)
    assert number == KILL or "left behind: take the mark off source" in said
    assert operator.states() == [(run, "killed" if number == KILL else "left")]
    assert f"./migrena.py rollback {run}" in ended(operator.begin("resume", run), 3)
    undo(operator, run)


def cut(operator: Operator, run: str) -> None:
    """The journal loses the end of its last line."""
    path = operator.folder / "state" / f"{run}.jsonl"
    os.truncate(path, path.stat().st_size - 7)


@pytest.mark.parametrize("line", short_are(
    ["chunk"], ["intent of mark source", "done of create destination", "chunk", "done of start destination"]))
def test_a_journal_whose_last_line_was_cut_is_good_enough(operators: Operators, line: str) -> None:
    one, other = both = operators(2)
    runs = killed_at(both, line)
    for operator, run in zip(both, runs, strict=True):
        cut(operator, run)
        assert operator.states() == [(run, "killed")]
    going_on = other.begin("resume", runs[1])
    undo(one, runs[0], was_started=line in STARTED)
    if line == "intent of mark source":
        ended(going_on, 3)
        undo(other, runs[1])
    else:
        ended(going_on, 0)
        has_arrived(other, runs[1], "ACTIVE")


def test_a_journal_whose_only_line_was_cut_tells_of_a_run_that_has_begun_nothing(operators: Operators) -> None:
    (operator,) = operators(1)
    (run,) = killed_at([operator], "run")
    cut(operator, run)
    assert operator.states() == [(run, "killed")]
    for word in ("resume", "rollback"):
        assert "does not name a source" in ended(operator.begin(word, run), 3)
    operator.is_as_found()
    ended(copies(operator, []), 0)


def test_a_destination_that_was_given_another_name_is_found_in_a_cloud_with_many_instances(operators: Operators) -> None:
    one, other, third = all_three = operators(3)
    for operator in all_three:
        for number in range(30):
            operator.clouds[1].add(f"00000000-0000-0000-0000-{number:012}", f"stranger {number}")
    runs = killed_at([one, other], "chunk")
    for operator in (one, other):
        operator.clouds[1].put(operator.made()[-1]["id"], name="renamed")
    ended(one.begin("rollback", runs[0]), 0)
    ended(other.begin("resume", runs[1], throw=[("chunk", TERM)]), 128 + TERM)
    ended(third.begin("-s", third.id, "-d", "new", throw=[("chunk", TERM)]), 128 + TERM)
    for operator in all_three:
        assert len(operator.made()) == 30 and not any(MADE in row["metadata"] for row in operator.made())
        operator.is_as_found()


def test_a_resumed_run_tells_the_downtime_by_its_journal(operators: Operators) -> None:
    (operator,) = operators(1)
    (run,) = killed_at([operator], "done of swap in")
    out, said = operator.begin("resume", run, "--json").communicate(timeout=200)
    assert (measured := json.loads(out)["downtime_seconds"]) and measured > 0, said
