"""What the journals tell of runs: read whole or cut, shown as a table, a detail and JSON, and what may be gone on with or undone."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import REPOSITORY, Migrena
from migrena import (
    ROOT,
    DiskRecord,
    Journal,
    Refused,
    RunRecord,
    Screen,
    Settings,
    StateError,
    Step,
    Undo,
    UsageError,
    as_begun,
    find_run,
    only_run_of,
    read_run,
    refuse_state,
    slots,
    still_to_write,
    table_lines,
    way_on,
)
from unit.makers import UUID

MiB = 1024**2
RUN = "20261120T210000-a1b2c3"


def told(folder: Path, *entries: dict[str, Any], run: str = RUN) -> Path:
    """A journal with its first line and these, a second apart."""
    lines = [{"event": "run", "pid": 1, "source": UUID, "source_name": "web", "name": "web-1", "clouds": ["http://a", "http://b"],
              "was_running": True, "source_host": "cmp-a1", "settings": {"chunk": MiB}}, *entries]
    path = folder / f"{run}.jsonl"
    path.write_text("".join(json.dumps({"at": f"2026-11-20T21:00:{number:02}+00:00", **line}) + "\n" for number, line in enumerate(lines)))
    return path


CREATED = ({"event": "intent", "act": "create destination", "name": "web-1"}, {"event": "done", "act": "create destination", "server": "new"})
COPYING = ({"event": "job", "new": "/x", "stand": "1 2 3", "inode": "7", "host": "cmp-b1"}, {"event": "intent", "act": "copy"},
           {"event": "progress", "done": 0, "total": 100 * MiB}, {"event": "chunk", "offset": 0, "length": MiB},
           {"event": "progress", "done": 25 * MiB, "total": 100 * MiB})


@pytest.mark.parametrize(("entries", "state"), [
    ((), "killed"), (CREATED, "killed"), (({"event": "ended", "result": "done"},), "done"), (({"event": "ended", "result": "failed"},), "failed"),
    (({"event": "ended", "result": "left", "left": ["x"]},), "left"), (({"event": "ended", "result": "left"}, {"event": "resume"}), "killed"),
    (({"event": "ended", "result": "left"}, {"event": "rollback"}, {"event": "ended", "result": "rolled back"}), "rolled back"),
])
def test_the_state_is_that_of_the_last_process_of_the_run(tmp_path: Path, entries: tuple[dict[str, Any], ...], state: str) -> None:
    told(tmp_path, *entries)
    assert read_run(tmp_path, RUN).state == state


def test_a_rollback_that_goes_on_keeps_the_destination_if_it_was_begun_so(tmp_path: Path) -> None:
    for asked, before, keeps in ((False, True, True), (True, False, True), (False, False, False)):
        told(tmp_path, *COPYING, {"event": "rollback", "keep_destination": before})
        assert as_begun(Settings(keep_destination=asked), read_run(tmp_path, RUN)).keep_destination is keeps


@pytest.mark.parametrize(("entries", "way"), [
    (CREATED, f"./migrena.py resume {RUN}, or ./migrena.py rollback {RUN}"), (({"event": "rollback"},), f"./migrena.py rollback {RUN}"),
    ((), f"./migrena.py rollback {RUN}"), (({"event": "ended", "result": "done"},), f"./migrena.py rollback {RUN}"),
    (({"event": "ended", "result": "failed"},), f"./migrena.py rollback --run-of {UUID}"),
    (({"event": "rollback"}, {"event": "ended", "result": "rolled back"}), f"./migrena.py rollback --run-of {UUID}")])
def test_what_goes_on_with_a_run_is_named_and_nothing_that_would_refuse(tmp_path: Path, entries: tuple[dict[str, Any], ...], way: str) -> None:
    told(tmp_path, *entries)
    assert way_on(tmp_path, RUN) == way and way_on(tmp_path, "another") == ""


@pytest.mark.parametrize("end", [(), ({"event": "ended", "result": "left", "left": ["x"]},)], ids=["killed", "left"])
def test_a_rollback_that_was_interrupted_is_resumed_by_rollback_alone(tmp_path: Path, end: tuple[dict[str, Any], ...]) -> None:
    told(tmp_path, *COPYING, {"event": "rollback"}, *end)
    record = read_run(tmp_path, RUN)
    with pytest.raises(Refused, match="was being rolled back"):
        refuse_state(record)
    lines = "\n".join(table_lines([record]))
    assert f"undo: ./migrena.py rollback {RUN}" in lines and "resume" not in lines


def test_a_run_whose_lock_is_held_is_running_and_only_that_one(tmp_path: Path) -> None:
    told(tmp_path)
    told(tmp_path, run="another")
    with only_run_of(tmp_path, UUID, RUN):
        assert [read_run(tmp_path, run).state for run in (RUN, "another")] == ["running", "killed"]
        assert read_run(tmp_path, RUN, is_ours=True).state == "killed"
    assert read_run(tmp_path, RUN).state == "killed"
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".lock"] == []


def test_bytes_done_are_what_was_held_and_not_how_long_the_chunks_were(tmp_path: Path) -> None:
    """A disk of 300 MiB with 100 MiB in it."""
    chunk = {"event": "chunk", "offset": 0, "length": 200 * MiB, "done": 60 * MiB}
    told(tmp_path, *CREATED, *COPYING, chunk)
    assert read_run(tmp_path, RUN).done == 60 * MiB
    told(tmp_path, *CREATED, *COPYING, chunk, {**chunk, "offset": 200 * MiB, "length": 100 * MiB, "done": 100 * MiB})
    record = read_run(tmp_path, RUN)
    assert record.done == record.total == 100 * MiB and " 100 " in list(table_lines([record]))[1]


def test_all_that_the_journal_tells_is_read(tmp_path: Path) -> None:
    told(tmp_path, *CREATED, *COPYING)
    record = read_run(tmp_path, RUN)
    assert (record.source, record.destination, record.was_running, record.step) == (UUID, "new", True, "copy")
    assert (record.done, record.total, record.disks[ROOT].arrived, record.rate) == (25 * MiB, 100 * MiB, ((0, MiB),), 25 * MiB / 2)
    assert record.has_done("create destination") and not record.has_done("copy")


@pytest.mark.parametrize("cut", [1, 7, 30])
def test_a_journal_that_was_cut_in_its_last_line_is_read_and_can_be_resumed(tmp_path: Path, cut: int) -> None:
    path = told(tmp_path, *CREATED)
    path.write_bytes(path.read_bytes()[:-cut])
    assert [act.result for act in read_run(tmp_path, RUN).acts] == [""]
    journal = Journal(tmp_path, RUN)
    journal.write("resume")
    journal.close()
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["run", "intent", "resume"]


@pytest.mark.parametrize("broken", ["{\"event\": ", "[]", "\0\0\0", "5"])
def test_a_line_that_is_broken_elsewhere_is_refused(tmp_path: Path, broken: str) -> None:
    path = told(tmp_path, *CREATED)
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, broken, *rest]) + "\n")
    with pytest.raises(UsageError, match="line 2"):
        read_run(tmp_path, RUN)


def test_a_run_is_named_by_the_beginning_of_its_id_where_that_is_enough(tmp_path: Path) -> None:
    for run in ("20260101T1-a", "20260101T2-b", "20260101T2-bc"):
        told(tmp_path, run=run)
    assert [find_run(tmp_path, beginning) for beginning in ("20260101T1", "20260101T2-b")] == ["20260101T1-a", "20260101T2-b"]
    for beginning in ("2026", "x"):
        with pytest.raises(Refused):
            find_run(tmp_path, beginning)


def test_an_empty_name_means_no_run_and_what_is_no_journal_is_said_to_be_none(tmp_path: Path) -> None:
    told(tmp_path, *CREATED)
    with pytest.raises(UsageError, match="RUN is empty"):
        find_run(tmp_path, "")
    (tmp_path / "link.jsonl").symlink_to("nowhere")
    with pytest.raises(UsageError, match="cannot be read"):
        read_run(tmp_path, "link")
    (tmp_path / "other.jsonl").write_text('{"event": "intent"}\n{"event": "chunk"}\n')
    with pytest.raises(UsageError, match="not a journal of migrena"):
        read_run(tmp_path, "other")


def test_a_state_folder_that_is_full_fails_the_run_once_and_does_not_stop_the_undoing() -> None:
    journal = Journal.__new__(Journal)
    journal.path, journal.entries, journal.is_broken, journal._writing = Path("/dev/full"), [], False, threading.Lock()
    journal._file = open("/dev/full", "ab", buffering=0)
    with pytest.raises(StateError, match="No space left"):
        journal.write("intent")
    journal.write("done")
    journal.close()


def test_what_a_run_has_left_is_in_its_journal(tmp_path: Path) -> None:
    told(tmp_path)
    undo = Undo(Screen(stream=io.StringIO()))
    with pytest.raises(ValueError), Journal(tmp_path, RUN).ending(undo):
        undo.left.append("the mark")
        raise ValueError("bad")
    record = read_run(tmp_path, RUN)
    assert (record.state, record.error, record.left) == ("left", "bad", ("the mark",))


STATUS = """\
RUN                     STATE   STEP  BYTES     %   RATE        LEFT  SOURCE -> DESTINATION
20261120T210000-a1b2c3  killed  copy  25.0 MiB  25  12.5 MiB/s  -     web -> web-1
    it may have left the new instance, and the mark and the lock on the source
    continue: ./migrena.py resume 20261120T210000-a1b2c3    undo: ./migrena.py rollback 20261120T210000-a1b2c3
"""


def test_status_is_a_table_a_detail_and_json_and_needs_no_credentials(migrena: Migrena, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    told(state, *CREATED, *COPYING)
    config = f"STATE_FOLDER = {str(state)!r}\n"
    table = migrena("status", config=config)
    assert (table.returncode, table.stdout, table.stderr) == (0, STATUS, "")
    one = migrena("status", RUN[:8], config=config)
    assert "  2026-11-20 21:00:01  create destination: done in 1.0 s\n" in one.stdout and "copy: interrupted" in one.stdout
    shown = json.loads(migrena("status", "--json", config=config).stdout)
    assert [(run["run"], run["result"], run["copy"]["done"], run["destination"]["id"]) for run in shown] == [(RUN, "killed", 25 * MiB, "new")]
    assert json.loads(migrena("status", RUN, "--json", config=config).stdout)["step"] == "copy"


def test_status_without_runs_says_so(migrena: Migrena) -> None:
    done = migrena("status")
    assert (done.returncode, done.stdout) == (0, "") and "No runs in" in done.stderr
    assert json.loads(migrena("status", "--json").stdout) == []
    assert migrena("status", "x").returncode == 3


def test_a_running_copy_tells_the_time_left() -> None:
    record = RunRecord(RUN, "running", "", {}, disks={ROOT: DiskRecord(done=MiB, total=4 * MiB)}, rate=float(MiB))
    assert "3.0 s" in list(table_lines([record]))[1]


@pytest.mark.parametrize(("words", "code", "said"), [
    (("resume", "x"), 3, "no runs in"), (("rollback", "x"), 3, "no runs in"), (("rollback",), 2, "give either"),
    (("rollback", "x", "--run-of", UUID), 2, "give either"), (("rollback", "--run-of", "web"), 2, "not an instance id"), (("resume",), 2, "RUN"),
    (("status", "--dry-run"), 2, "unrecognized"),
])
def test_command_lines_that_cannot_be_are_reported(migrena: Migrena, words: tuple[str, ...], code: int, said: str) -> None:
    done = migrena(*words)
    assert (done.returncode, done.stdout) == (code, "") and said in done.stderr, done.stderr


@pytest.mark.parametrize("word", ["status", "resume", "rollback"])
def test_the_help_of_a_subcommand_names_it_and_its_flags_alone(migrena: Migrena, word: str) -> None:
    shown = migrena(word, "--help").stdout
    assert f"migrena.py {word}" in shown and "--json" in shown and "--flavor" not in shown
    assert f"  {word} " in migrena("--help").stdout


RECORD = RunRecord(RUN, "killed", "", {"source": UUID, "name": "web-1"}, disks={ROOT: DiskRecord(job={"stand": "1 2 3", "inode": "7"})})
def test_a_run_whose_journal_tells_no_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="does not name a source"), only_run_of(tmp_path, "", RUN):
        pass


@pytest.mark.parametrize(("acts", "minute"), [(["mark source", "stop source"], 1), (["stop source", "copy", "stop source"], 0), ([], None)])
def test_the_downtime_counts_from_the_first_stop(acts: list[str], minute: int | None) -> None:
    record = replace(RECORD, acts=tuple(Step(act, f"2026-11-20T21:{number:02}:00+00:00") for number, act in enumerate(acts)))
    assert (record.stopped_at.minute if record.stopped_at else None) == minute


@pytest.mark.parametrize("state", ["done", "failed", "rolled back"])
def test_a_run_that_is_over_is_not_resumed(state: str) -> None:
    with pytest.raises(Refused, match="nothing to resume"):
        refuse_state(replace(RECORD, state=state))
    refuse_state(RECORD)


SLOT = """
import io, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from migrena import Screen, slots
with slots(Path(sys.argv[2]), sys.argv[3:], 2, Screen()):
    print("in", flush=True)
    sys.stdin.read()
"""


def test_a_third_copy_on_a_host_waits_says_so_once_and_goes_on_when_one_is_killed(tmp_path: Path) -> None:
    def start(*hosts: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", SLOT, str(REPOSITORY), str(tmp_path), *hosts], stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    holders = [start("cmp1", "cmp2"), start("cmp2", "cmp1")]
    assert [holder.stdout.readline() for holder in holders if holder.stdout] == ["in\n", "in\n"]
    waiting, free = start("cmp2", "cmp3"), start("cmp3")
    assert waiting.stderr and "Waiting: cmp2 already has 2 copies" in waiting.stderr.readline()
    assert free.stdout and free.stdout.readline() == "in\n"
    time.sleep(1.2)
    holders[0].kill()
    assert waiting.stdout and waiting.stdout.readline() == "in\n"
    for process in (*holders, free, waiting):
        process.kill()
    assert "Waiting" not in waiting.communicate()[1]
    for process in (*holders, free):
        process.communicate()


def test_waiting_for_a_place_keeps_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []

    def sleep(seconds: float) -> None:
        counted.append(len(os.listdir("/proc/self/fd")))
        if len(counted) == 20:
            raise InterruptedError

    monkeypatch.setattr(time, "sleep", sleep)
    screen = Screen(stream=io.StringIO())
    with slots(tmp_path, ["h"], 1, screen), pytest.raises(InterruptedError), slots(tmp_path, ["h"], 1, screen):
        pass
    assert len(set(counted)) == 1


def test_the_log_file_gets_every_line_also_when_quiet(migrena: Migrena, tmp_path: Path) -> None:
    log = tmp_path / "migrena.log"
    for _ in range(2):
        done = migrena("status", "-q", "--log-file", str(log))
        assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
    assert log.stat().st_mode & 0o777 == 0o600
    assert [line[20:].startswith("No runs in") for line in log.read_text().splitlines()] == [True, True]
    for place in ("/nowhere/x.log", str(tmp_path)):
        assert migrena("status", "--log-file", place).returncode == 2


def test_a_name_that_would_move_the_cursor_is_written_out(tmp_path: Path) -> None:
    stream = io.StringIO()
    Screen(stream=stream).say("name \x1b[2J\x07 end")
    assert "\x1b" not in stream.getvalue() and "\\x1b[2J\\x07 end" in stream.getvalue()


def test_what_earlier_runs_have_yet_to_write_on_a_host_counts_as_taken_and_later_ones_wait(tmp_path: Path) -> None:
    def space(need: int, at: int, host: str = "b") -> dict[str, Any]:
        return {"event": "space", "host": host, "need": need * MiB, "at": f"2026-11-20T21:00:{at:02}"}

    def journal(run: str, source: str, *entries: dict[str, Any]) -> None:
        lines = [{"event": "run", "source": source, "at": "2026-11-20T21:00:00"}, *entries]
        (tmp_path / f"{run}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    elsewhere = {"event": "progress", "disk": "volume-1", "at": "2026-11-20T21:00:05", "done": 60 * MiB, "total": 90 * MiB}
    journal("1", "one", {**space(100, 1), "disks": [ROOT]}, elsewhere,
            {"event": "progress", "at": "2026-11-20T21:00:05", "done": 30 * MiB, "total": 90 * MiB})
    journal("2", "two", space(50, 2))
    journal("3", "three", space(200, 3, host="c"))
    journal("4", "four", space(500, 4))  # it has ended, or was killed: nobody holds its lock
    with only_run_of(tmp_path, "one", "1"), only_run_of(tmp_path, "two", "2"), only_run_of(tmp_path, "three", "3"):
        assert [still_to_write(tmp_path, run, "b") for run in ("1", "2", "4")] == [0, 70 * MiB, 120 * MiB]
        copied = {"event": "done", "act": "copy", "at": "2026-11-20T21:00:06"}
        journal("2", "two", space(50, 2), copied)
        assert still_to_write(tmp_path, "4", "b") == 70 * MiB
        journal("2", "two", space(50, 2), copied, space(50, 2))  # it was killed then, and copies again
        assert [still_to_write(tmp_path, run, "b") for run in ("2", "4")] == [70 * MiB, 120 * MiB]
