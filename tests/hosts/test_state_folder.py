"""The folder of journals: full, read-only, gone, or with a broken journal in it. Nothing stays undone because of it."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import pytest

from hosts.faults import Fault, fill, small_folder
from lab.processes import command
from migrena import DONE
from unit.makers import UUID

FULL = "can no longer be written: [Errno 28] No space left on device"


def pad(journal: Path) -> None:
    """Lets a journal fill its last page to 9 bytes: the next line does not fit where no page is free."""
    line = json.dumps({"at": "2026-01-01T00:00:00+00:00", "event": "note"})
    with journal.open("ab") as file:
        file.write(f"{line:{(-journal.stat().st_size - 10 - len(line)) % 4096 + len(line)}}\n".encode())


@pytest.mark.parametrize("room", [0, 4096], ids=["nothing", "lock"])
def test_a_state_folder_that_is_full_is_reported_before_anything_is_touched(fault: Fault, room: int) -> None:
    with small_folder(fault.state, "64k"):
        filler = fill(fault.state)
        with filler.open("r+b") as file:
            file.truncate(filler.stat().st_size - room)
        fault.end(fault.start(), 2, "No space left on device", "name another folder in STATE_FOLDER")
        assert [path.name for path in fault.state.iterdir()] == ["filler"]
    fault.is_undone()


def test_a_state_folder_that_cannot_be_written_to_still_tells_its_runs(fault: Fault) -> None:
    with small_folder(fault.state, "64k"):
        run = fault.operator.killed()
        command("mount", "-o", "remount,ro", fault.state)
        fault.end(fault.start(), 2, "cannot be used", "name another folder in STATE_FOLDER")
        fault.call(2, "rollback", run, said=("cannot be used",))
        assert fault.operator.state() == [(run, "killed")]
        command("mount", "-o", "remount,rw", fault.state)
        fault.rolls_back()


def test_a_state_folder_that_fills_up_in_mid_copy_ends_the_run_which_is_undone_and_says_what_its_journal_lacks(fault: Fault) -> None:
    with small_folder(fault.state, "64k"):
        process = fault.begin()
        pad(fault.journal)
        filler = fill(fault.state)
        said = fault.end(process, 1, FULL, "free space there, then run it again", "lacks the run's end")
        assert "left behind" not in said
        fault.is_undone()
        run = fault.journal.stem
        assert fault.operator.state() == [(run, "killed")]
        fault.call(2, "rollback", run, said=("No space left on device",))
        filler.unlink()
        fault.call(0, "rollback", run, said=(f"Neither cloud has anything of run {run} to undo; the source is ACTIVE",))
        assert fault.operator.state() == [(run, "rolled back")]
        fault.is_undone()


@pytest.mark.parametrize("room", [0, 200], ids=str)
def test_a_journal_that_breaks_while_the_run_is_being_undone_leaves_no_step_out(fault: Fault, room: int) -> None:
    process = fault.begin()
    size = fault.journal.stat().st_size + room
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))  # as a full disk, but at exactly this byte
    process.send_signal(signal.SIGTERM)
    fault.end(process, 128 + signal.SIGTERM, "interrupted by SIGTERM", "lacks the run's end")
    fault.is_undone()
    run = fault.journal.stem
    assert fault.operator.state() == [(run, "killed")]
    fault.call(3, "resume", run, said=("the source carries no mark", f"./migrena.py rollback {run}"))
    fault.operator.clouds[0].stop(UUID)
    fault.call(0, "rollback", run, said=("the source is SHUTOFF",))
    assert fault.operator.clouds[0].rows()[UUID]["status"] == "SHUTOFF"  # by its owner, after the run: that is not for us to change


def test_a_state_folder_that_is_removed_in_mid_copy_does_not_stop_the_run(fault: Fault) -> None:
    process = fault.begin()
    command("rm", "-r", fault.state)
    fault.end(process, 0)
    (row,) = fault.operator.made()
    assert DONE in row["metadata"]
    assert fault.operator.state() == []
    assert fault.operator.clouds[0].rows()[UUID]["metadata"] == {}


def test_a_full_state_folder_refuses_what_would_go_on_with_a_run_and_changes_nothing(fault: Fault) -> None:
    with small_folder(fault.state, "64k"):
        run = fault.operator.killed()
        there = (fault.operator.clouds[0].rows(), fault.operator.made())
        journal = fault.journal
        pad(journal)
        written = journal.read_bytes()
        filler = fill(fault.state)  # all but the page of the killed run's lock
        for word in ("resume", "rollback"):
            fault.call(2, word, run, said=("No space left on device", "free space there"))
        assert (fault.operator.clouds[0].rows(), fault.operator.made()) == there and journal.read_bytes().startswith(written)
        filler.unlink()
        fault.rolls_back()


def test_a_lock_that_cannot_be_made_in_mid_run_is_a_failure_and_no_wrong_call(fault: Fault) -> None:
    for number in range(2):
        (fault.state / f"slot-src-{number}.lock").mkdir(parents=True)
    fault.end(fault.start(), 1, "slot-src-0.lock cannot be created", "The run failed; undo.")
    fault.is_undone()
    assert fault.operator.state() == [(fault.journal.stem, "failed")]


def test_a_journal_whose_last_line_was_cut_is_resumed(fault: Fault) -> None:
    run = fault.operator.killed()
    with fault.journal.open("r+b") as file:
        file.truncate(fault.journal.stat().st_size - 9)
    fault.call(0, "resume", run)
    assert fault.operator.state() == [(run, "done")]


def test_a_journal_with_garbage_in_it_is_reported_and_the_run_is_undone_without_it(fault: Fault) -> None:
    run = fault.operator.killed()
    lines = fault.journal.read_bytes().splitlines(keepends=True)
    fault.journal.write_bytes(b"".join([*lines[:3], b"\0\xff garbage \x1b[2J\n", *lines[3:]]))
    for word in ("status", "resume", "rollback"):
        fault.call(2, word, run, said=("line 4: this is not a journal's line", "move the file away, then: ./migrena.py rollback --run-of SRC_UUID"))
    assert "line 4" in fault.call(0, "status")
    fault.journal.rename(fault.state / "broken")
    fault.call(0, "rollback", "--run-of", UUID)
    fault.is_undone()
