"""The journal holds the intent before and the result after each act; one run per source at a time; undo goes newest first."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import REPOSITORY
from migrena import Interrupted, Journal, Kept, Reason, Refused, Screen, Settings, Undo, UsageError, last_rate, only_run_of, state_folder
from unit.makers import UUID, a_screen


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = Journal(tmp_path, "run-1")
    yield made
    made.close()


def lines(journal: Journal) -> list[dict[str, Any]]:
    """What stands in the file just now, without the time of day."""
    entries = [json.loads(line) for line in journal.path.read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "at"} for entry in entries]


def test_the_intent_is_in_the_file_before_the_act_and_the_result_after(journal: Journal) -> None:
    with journal.act("create", name="new") as result:
        assert lines(journal) == [{"event": "intent", "act": "create", "name": "new"}]
        result["server"] = "id-1"
    assert lines(journal)[1:] == [{"event": "done", "act": "create", "server": "id-1"}]


@pytest.mark.parametrize("error", [RuntimeError("no such thing"), Interrupted(2), KeyboardInterrupt("now")])
def test_a_failed_act_is_written_down_and_its_error_goes_on(journal: Journal, error: BaseException) -> None:
    with pytest.raises(type(error)), journal.act("create"):
        raise error
    assert lines(journal) == [{"event": "intent", "act": "create"}, {"event": "failed", "act": "create", "error": str(error)}]


def test_each_line_is_on_the_disk_before_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, int]] = []
    fsync = os.fsync

    def counted(fd: int) -> None:
        fsync(fd)
        synced.append((os.fstat(fd).st_ino, os.fstat(fd).st_size))

    monkeypatch.setattr(os, "fsync", counted)
    journal = Journal(tmp_path, "run-1")
    for number in range(3):
        journal.write("step", number=number)
        assert synced[-1] == (journal.path.stat().st_ino, journal.path.stat().st_size)
    journal.close()
    assert len(synced) == 3


def test_a_journal_is_for_its_owner_s_eyes_and_is_never_shortened(tmp_path: Path) -> None:
    for _ in range(2):
        journal = Journal(tmp_path, "run-1")
        journal.write("run")
        journal.close()
    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600
    assert len(lines(journal)) == 2


def test_every_line_has_the_time_of_day_in_utc(journal: Journal) -> None:
    journal.write("run")
    assert json.loads(journal.path.read_text())["at"].endswith("+00:00")


HOLD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from migrena import only_run_of
with only_run_of(Path(sys.argv[2]), sys.argv[3], "run-1"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def another_run(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """A process that holds the lock on a source, until it is ended."""
    begun: list[subprocess.Popen[str]] = []

    def start(source: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", HOLD, str(REPOSITORY), str(tmp_path), source]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        begun.append(process)
        assert process.stdout and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def test_a_second_run_of_the_same_source_is_refused_with_the_process_that_has_it(
        tmp_path: Path, another_run: Callable[[str], subprocess.Popen[str]]) -> None:
    other = another_run(UUID)
    with pytest.raises(Refused, match=f"process {other.pid}"), only_run_of(tmp_path, UUID, "run-2"):
        pass
    with only_run_of(tmp_path, "another source", "run-2"):
        pass


def test_the_lock_of_a_run_that_was_killed_stops_nobody(tmp_path: Path, another_run: Callable[[str], subprocess.Popen[str]]) -> None:
    other = another_run(UUID)
    other.kill()
    other.wait()
    with only_run_of(tmp_path, UUID, "run-2"):
        assert (tmp_path / f"source-{UUID}.lock").read_text() == f"{os.getpid()} run-2\n"
    with only_run_of(tmp_path, UUID, "run-2"):
        pass


def entry(**facts: object) -> str:
    return json.dumps({"event": "finished", "clouds": ["a", "b"], **facts}) + "\n"


def test_the_last_rate_is_that_of_the_newest_run_between_the_same_clouds(tmp_path: Path) -> None:
    (tmp_path / "20260101.jsonl").write_text(entry(rate=1))
    (tmp_path / "20260102.jsonl").write_text(entry(rate=2) + entry(rate=3) + entry(rate=0))
    (tmp_path / "20260103.jsonl").write_text(entry(rate=4, clouds=["b", "a"]) + "half a li")
    (tmp_path / "20260104.jsonl").write_bytes(b"\xff\xfe\n[]\n5\nnull\n{\"event\": \"finished\"}\n")
    assert last_rate(tmp_path, ["a", "b"]) == 3.0
    assert last_rate(tmp_path, ["b", "a"]) == 4.0
    assert last_rate(tmp_path, ["a", "c"]) == 0.0


def test_the_state_folder_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    folder = state_folder(Settings(), {"XDG_STATE_HOME": str(tmp_path / "state")})
    assert folder == tmp_path / "state/migrena"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert state_folder(Settings(state_folder=str(tmp_path / "x/y")), {}) == tmp_path / "x/y"


def test_a_state_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="state folder"):
        state_folder(Settings(state_folder=str(tmp_path / "file")), {})


class Undone:
    """An Undo whose steps note down that they were done."""

    def __init__(self) -> None:
        self.shown = io.StringIO()
        self.undo = Undo(Screen(stream=self.shown))
        self.done: list[str] = []

    def step(self, name: str, error: Exception | None = None) -> Callable[[], None]:
        def action() -> None:
            self.done.append(name)
            if error:
                raise error
        return action

    def run(self, failure: BaseException | None, mishap: Exception | None = None) -> None:
        """Makes a, b and c, b's undoing fails with the mishap, and ends in the failure."""
        with self.undo as undo:
            undo.always("a", self.step("a"))
            undo.on_failure("b", self.step("b", mishap))
            undo.on_failure("c", self.step("c"))
            if failure:
                raise failure


def test_after_success_only_what_is_always_done_is_done() -> None:
    undone = Undone()
    undone.run(None)
    assert (undone.done, undone.undo.left) == (["a"], [])


@pytest.mark.parametrize("failure", [ValueError("bad"), Interrupted(15), KeyboardInterrupt()])
def test_after_a_failure_all_is_undone_newest_first(failure: BaseException) -> None:
    undone = Undone()
    with pytest.raises(type(failure)):
        undone.run(failure)
    assert (undone.done, undone.undo.left, undone.undo.doing) == (["c", "b", "a"], [], "")


def test_undo_goes_on_past_a_failing_step_and_keeps_what_is_left() -> None:
    undone = Undone()
    with pytest.raises(ValueError, match=r"^bad$"):
        undone.run(ValueError("bad"), mishap=OSError("no way"))
    assert undone.done == ["c", "b", "a"]
    assert undone.undo.left == ["b did not succeed: no way"]


def test_undo_does_not_hide_the_error_that_caused_it() -> None:
    undone, cause = Undone(), ValueError("bad")
    with pytest.raises(ValueError) as caught:
        undone.run(cause, mishap=OSError("no way"))
    assert caught.value is cause


def test_a_failing_cleanup_after_success_is_kept_too() -> None:
    undone = Undone()
    with undone.undo as undo:
        undo.always("a", undone.step("a", OSError("no way")))
    assert undone.undo.left == ["a did not succeed: no way"]


def test_what_a_step_registers_while_undoing_does_not_stop_the_others() -> None:
    undone = Undone()
    with pytest.raises(ValueError), undone.undo as undo:
        undo.always("a", undone.step("a"))
        undo.on_failure("b", lambda: undo.always("late", undone.step("late")))
        raise ValueError
    assert "a" in undone.done


def test_a_run_that_ends_because_both_copies_are_to_be_kept_undoes_nothing_and_tells_each_way_on_once() -> None:
    done: list[str] = []
    undo = Undo(a_screen(io.StringIO(), quiet=True))
    with pytest.raises(Kept), undo:
        undo.always("see what is left", lambda: done.append("seen"))
        undo.on_failure("delete destination", lambda: done.append("deleted"))
        raise Kept.of([Reason("the source runs", "resume"), Reason("the source runs", "resume"), Reason("locked", "")])
    assert (done, undo.left, undo.ways) == (["seen"], ["the source runs", "locked"], ["resume"])


def test_a_step_that_keeps_something_on_purpose_does_not_stop_the_others() -> None:
    undone = Undone()
    with pytest.raises(ValueError), undone.undo as undo:
        undo.on_failure("a", undone.step("a"))
        undo.on_failure("b", undone.step("b", Kept("the destination runs", "rollback --yes")))
        raise ValueError
    assert (undone.done, undo.left, undo.ways) == (["b", "a"], ["the destination runs"], ["rollback --yes"])
