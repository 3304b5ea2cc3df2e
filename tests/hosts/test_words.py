"""The copy, status, resume and rollback as an operator calls them: real hosts, and a stand-in for the clouds."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from hosts.operators import Operator, an_operator, is_complete
from hosts.rig import INSTANCES
from lab.hosts import Lab
from migrena import MARK, ORIGIN
from unit.makers import UUID


def test_a_copy_and_the_same_command_again_which_is_success_too(operator: Operator) -> None:
    done = operator.copy()
    assert done.returncode == 0, done.stderr
    is_complete(operator, operator.state()[0][0])
    again = operator.copy()
    assert (again.returncode, again.stdout) == (0, done.stdout)
    silent = operator.copy("-q", "--log-file", str(operator.folder / "log"))
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")
    assert f"already migrated: {UUID} is new" in (operator.folder / "log").read_text()
    assert json.loads(operator.copy("--json").stdout)["result"] == "already"


def test_a_killed_run_is_reported_refused_and_resumed(operator: Operator) -> None:
    run = operator.killed()
    assert operator.state() == [(run, "killed")]
    again = operator.copy()
    assert again.returncode == 3 and again.stderr.count(f"./migrena.py resume {run}, or ./migrena.py rollback {run}") == 2, again.stderr
    done = operator.run("resume", run[:12])
    assert (done.returncode, done.stdout) == (0, f"{operator.made()[0]['id']}\n"), done.stderr
    is_complete(operator, run)
    over = operator.run("resume", run)
    assert over.returncode == 3 and "was successful: there is nothing to resume" in over.stderr


def test_a_killed_run_is_undone(operator: Operator) -> None:
    run = operator.killed()
    done = operator.run("rollback", run)
    assert done.returncode == 0, done.stderr
    assert operator.made() == [] and operator.state() == [(run, "rolled back")]
    operator.is_as_found()
    again = operator.run("rollback", run)
    assert again.returncode == 0 and "was rolled back already" in again.stderr


def test_a_killed_run_is_undone_although_its_destination_was_given_another_name(operator: Operator) -> None:
    run = operator.killed()
    operator.clouds[1].put(operator.made()[0]["id"], name="renamed")
    assert operator.run("rollback", run).returncode == 0
    assert operator.made() == []


def test_a_killed_run_whose_journal_is_lost_is_undone_by_its_source(operator: Operator) -> None:
    run = operator.killed()
    (operator.folder / "state" / f"{run}.jsonl").unlink()
    again = operator.copy()
    assert again.returncode == 3 and f"./migrena.py rollback --run-of {UUID}" in again.stderr
    done = operator.run("rollback", "--run-of", UUID)
    assert done.returncode == 0, done.stderr
    assert operator.made() == [] and operator.state() == [(run, "rolled back")]
    operator.is_as_found()
    assert operator.run("rollback", "--run-of", UUID).returncode == 3


def test_a_killed_run_is_undone_and_its_destination_kept(operator: Operator) -> None:
    run = operator.killed()
    assert operator.run("rollback", run, "--keep-destination").returncode == 0
    (row,) = operator.made()
    assert (row["status"], row["metadata"]) == ("SHUTOFF", {ORIGIN: UUID})
    assert operator.lab["dst"].run("ls", f"{INSTANCES}/{row['id']}").stdout.split() == ["disk", "disk.info"]
    operator.is_as_found()


def test_a_successful_run_is_undone_only_with_yes(operator: Operator) -> None:
    assert operator.copy().returncode == 0
    run, id = operator.state()[0][0], operator.made()[0]["id"]
    refused = operator.run("rollback", run)
    assert refused.returncode == 3 and f"new {id} (SHUTOFF) would be deleted" in refused.stderr and operator.made()
    assert operator.run("rollback", run, "--yes").returncode == 0
    assert operator.made() == [] and operator.state() == [(run, "rolled back")]
    operator.is_as_found()


def test_a_source_that_somebody_started_meanwhile_is_refused_and_can_be_undone(operator: Operator) -> None:
    run = operator.killed()
    operator.clouds[0].start(UUID)
    refused = operator.run("resume", run)
    assert refused.returncode == 3 and "was started or its disk changed" in refused.stderr, refused.stderr
    operator.clouds[0].stop(UUID)
    assert operator.run("resume", run).returncode == 3
    assert operator.run("rollback", run).returncode == 0
    operator.is_as_found()


def test_of_two_runs_that_start_at_once_one_is_refused_and_touches_nothing(operator: Operator) -> None:
    both = [operator.begin("-s", UUID, "-d", "new") for _ in range(2)]
    ended = [(*process.communicate(timeout=200), process.returncode) for process in both]
    assert sorted(code for *_, code in ended) == [0, 3], ended
    assert "another run is moving" in next(said for _, said, code in ended if code == 3)
    assert len(operator.made()) == 1 and len(operator.state()) == 1


def test_a_run_from_another_machine_that_was_quicker_keeps_the_source(operator: Operator) -> None:
    operator.clouds[0].set_meta(UUID, {MARK: "20200101T000000-other"})
    refused = operator.copy()
    assert refused.returncode == 3 and "run 20200101T000000-other is moving the source" in refused.stderr
    assert operator.clouds[0].rows()[UUID]["metadata"] == {MARK: "20200101T000000-other"} and operator.made() == []


def test_each_side_is_reached_and_looked_at_as_is_reported_for_it_alone(lab: Lab, tmp_path: Path) -> None:
    nowhere = {host.name: "192.0.2.1" for host in lab}
    per_side: dict[str, Any] = {f"{side.upper()}_HOSTS": {side: lab[side].address} for side in ("src", "dst")}
    per_side |= {f"{side}_DISK_PATH": f"{INSTANCES}/%s/disk" for side in ("SRC", "DST")}
    operator = an_operator(lab, tmp_path, HOSTS=nowhere, DISK_PATH="/nowhere/%s/disk", **per_side)
    done = operator.copy("--json", throw=[("chunk", signal.SIGKILL.value)])
    assert done.returncode == -signal.SIGKILL, done.stderr
    run = operator.states()[0][0]
    done = operator.run("resume", run)
    assert done.returncode == 0, done.stderr
    is_complete(operator, run)
    assert operator.run("rollback", run, "--yes").returncode == 0 and operator.made() == []


def test_a_copy_that_would_leave_too_little_space_is_refused_while_the_source_runs(lab: Lab, tmp_path: Path) -> None:
    operator = an_operator(lab, tmp_path, SPACE_RESERVE="500G")
    done = operator.copy()
    assert done.returncode == 1 and "500.0 GiB are needed" in done.stderr and "Stop source" not in done.stderr
    operator.is_as_found()
