"""A seed days before the cut-over: it is updated and cut over to, whatever happened meanwhile; and a source that comes back by itself."""

from __future__ import annotations

import json
import math
import re
import signal
import time
from datetime import datetime, timedelta

import pytest

from hosts.operators import Operator, ended, has_arrived
from hosts.rig import INSTANCES, Instance, MiB, base, remains, same_guest, wait_for
from hosts.test_warm import Guest, events, guest, runs

__all__ = ["guest"]
FAIL, ANSWER = ("--await", "command:false", "--await-timeout", "2s"), ("--await", "command:true")


def seeded(operator: Operator, *words: str) -> str:
    """The run of a seed that was just made; all is as it must be with one."""
    done = operator.copy("--seed", *words)
    assert done.returncode == 0, done.stderr
    return is_seeded(operator)


def is_seeded(operator: Operator) -> str:
    """The only run, which has a seed: the source runs, the destination is stopped and locked, nobody holds anything."""
    ((run, state),) = operator.states()
    (made,), source = operator.made(), operator.clouds[0].rows()[operator.id]
    assert state == "seeded" and (made["status"], made["locked"]) == ("SHUTOFF", True)
    assert (source["status"], source["locked"], source["metadata"]["migrena:run"]) == ("ACTIVE", False, run)
    wait_for("nothing of ours on the hosts", lambda: all("qemu-io" in line for host in operator.lab for line in remains(host)))  # the guest's
    return run


def passes(operator: Operator) -> list[int]:
    """The bytes that each pass so far has sent."""
    (path,) = (operator.folder / "state").glob("*.jsonl")
    return [line["changed"] for line in map(json.loads, path.read_text().splitlines()) if line["event"] == "pass"]


def test_a_seed_is_updated_and_cut_over_to(operator: Operator, guest: Guest) -> None:
    guest()
    run = seeded(operator)
    first = len(passes(operator))
    assert operator.run("resume", run, "--seed").returncode == 0
    assert is_seeded(operator) == run and runs(operator)
    assert passes(operator)[0] > 26 * MiB and max(passes(operator)[first:]) < 4 * MiB
    shown = operator.run("status").stdout
    assert re.search(r"seeded .*\n +seed +\S+ \S+ old; in the last pass .* had changed; stopped now, it would be down for about", shown), shown
    assert "--seed    cut over: ./migrena.py resume" in shown
    told = json.loads(operator.run("status", run, "--json").stdout)
    assert told["result"] == "seeded" and told["seed"]["downtime"] > 0 and told["seed"]["disks"] == {"root": 64 * MiB}
    assert operator.run("resume", run).returncode == 0
    has_arrived(operator, run)


def test_a_seed_is_removed_and_nothing_is_left(operator: Operator, guest: Guest) -> None:
    guest()
    done = operator.run("rollback", seeded(operator))
    assert done.returncode == 0, done.stderr
    operator.is_as_found()
    assert operator.made() == [] and runs(operator)


@pytest.mark.long
def test_a_second_run_of_a_source_with_a_seed_is_refused_with_the_commands_for_it(operator: Operator, guest: Guest) -> None:
    guest()
    run = seeded(operator)
    done = operator.copy()
    assert done.returncode == 3 and f"./migrena.py resume {run}" in done.stderr
    assert is_seeded(operator) == run


@pytest.mark.long
@pytest.mark.parametrize("line", [
    "run", "intent of mark source", "done of mark source", "intent of create destination", "asked", "done of create destination",
    "intent of stop destination", "done of stop destination", "space", "intent of warm copy", "progress", "pass", "done of warm copy",
    "seeded", "ended"])
def test_a_seed_that_is_killed_goes_on(operator: Operator, guest: Guest, line: str) -> None:
    guest()
    assert operator.copy("--seed", throw=[(line, signal.SIGKILL)]).returncode == -signal.SIGKILL
    ((run, _),) = operator.states()
    if not operator.made():  # nothing can go on
        assert operator.run("rollback", run).returncode == 0
        operator.is_as_found()
        return
    assert operator.run("resume", run, "--seed").returncode == 0
    assert is_seeded(operator) == run and operator.run("resume", run).returncode == 0
    has_arrived(operator, run)


@pytest.mark.long
@pytest.mark.parametrize("line", [
    "asked to resume", "resume", "intent of mark source", "done of mark source", "done of adopt destination", "intent of swap out",
    "done of swap out", "intent of stop destination", "done of stop destination", "space", "progress", "pass", "done of warm copy",
    "seeded", "ended"])
def test_an_update_that_is_killed_costs_no_seed(operator: Operator, guest: Guest, line: str) -> None:
    guest()
    run = seeded(operator)
    assert operator.run("resume", run, "--seed", throw=[(line, signal.SIGKILL)]).returncode == -signal.SIGKILL
    assert runs(operator) and operator.run("resume", run).returncode == 0
    has_arrived(operator, run)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("line", ["progress", "done of warm copy", "done of stop source", "intent of copy", "done of copy", "done of swap in"])
def test_an_interrupted_cut_over_gives_the_source_back_and_keeps_the_seed(
        operator: Operator, guest: Guest, line: str, number: signal.Signals) -> None:
    guest()
    run = seeded(operator)
    done = operator.run("resume", run, throw=[(line, number)])
    assert done.returncode == 128 + number, done.stderr
    assert is_seeded(operator) == run
    done = operator.run("resume", run)
    assert done.returncode == 0, done.stderr
    has_arrived(operator, run)


@pytest.mark.long
@pytest.mark.parametrize("line", [
    "intent of stop source", "done of stop source", "intent of copy", "job", "done of copy", "intent of swap in", "done of swap in",
    "intent of mark destination done", "done of mark destination done"])
def test_a_cut_over_that_is_killed_is_completed(operator: Operator, guest: Guest, line: str) -> None:
    guest()
    run = seeded(operator)
    guest_wrote(operator)
    assert operator.run("resume", run, throw=[(line, signal.SIGKILL)]).returncode == -signal.SIGKILL
    done = operator.run("resume", run, "--seed")
    if line == "intent of stop source":  # it was never stopped
        assert done.returncode == 0 and is_seeded(operator) == run, done.stderr
    else:
        assert done.returncode == 3 and "has stopped the source for the cut-over" in done.stderr
    done = operator.run("resume", run)
    assert done.returncode == 0, done.stderr
    has_arrived(operator, run)


def test_a_cut_over_that_is_interrupted_once_all_is_swapped_in_is_a_seed_again(operator: Operator, guest: Guest) -> None:
    guest()
    run = seeded(operator)
    assert operator.run("resume", run, throw=[("done of swap in", signal.SIGINT)]).returncode == 128 + signal.SIGINT
    assert is_seeded(operator) == run
    guest()
    done = operator.run("resume", run)
    assert done.returncode == 0, done.stderr
    has_arrived(operator, run)


def guest_wrote(operator: Operator) -> None:
    """Waits until the guest has written once more."""
    before = operator.source.host.run("stat", "-c", "%Y", operator.source.path).stdout
    wait_for("the guest to write", lambda: operator.source.host.run("stat", "-c", "%Y", operator.source.path).stdout != before)


def test_what_somebody_did_to_a_destination_that_was_swapped_in_is_repaired(operator: Operator, guest: Guest) -> None:
    guest()
    run = seeded(operator, "-a", "dst", *FAIL)
    done = operator.run("resume", run)
    assert done.returncode == 4 and "gave no answer within" in done.stderr and "is ACTIVE again" in done.stderr, done.stderr
    (made,), source = operator.made(), operator.clouds[0].rows()[operator.id]
    assert (made["status"], made["locked"], source["status"], source["locked"]) == ("SHUTOFF", True, "ACTIVE", False)
    assert operator.states() == [(run, "left")]
    assert f"./migrena.py resume {run} sends what has changed, and tries again" in done.stderr
    guest()  # it was started again
    new = Instance(operator.lab["dst"], f"{INSTANCES}/{made['id']}/disk", "qcow2")
    new.write("inspected", (2 * MiB, MiB))
    done = operator.run("resume", run, *ANSWER)
    assert done.returncode == 0, done.stderr
    assert same_guest(operator.source, new)
    has_arrived(operator, run, "ACTIVE")
    done_before = events(operator)[: events(operator).index("intent swap out")]
    assert done_before[-1] == "done stop destination"  # and locked by that


def test_a_cold_copy_without_an_answer_goes_back_and_is_tried_again_warm(operator: Operator, guest: Guest) -> None:
    guest()
    done = operator.copy("-a", "dst", *FAIL, "--json")
    assert done.returncode == 4, done.stderr
    report = json.loads(done.stdout)
    assert report["result"] == "left" and len(report["not_undone"]) == 2 and report["answer_seconds"] is None
    guest()
    done = operator.run("resume", report["run"], "--await", "command:sh -c 'test \"$INSTANCE_NAME\" = new && test -n \"$INSTANCE_ID\"'", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["answer_seconds"] >= 0 and len(report["copy"]["passes"]) > 1
    has_arrived(operator, report["run"], "ACTIVE")


def test_a_destination_without_an_answer_is_deleted_by_rollback(operator: Operator, guest: Guest) -> None:
    guest()
    assert operator.copy("-a", "dst", *FAIL).returncode == 4
    ((run, _),) = operator.states()
    done = operator.run("rollback", run)
    assert done.returncode == 0, done.stderr
    operator.is_as_found()
    assert operator.made() == []


def test_a_run_that_is_killed_while_it_waits_for_the_answer_goes_on_waiting(operator: Operator, guest: Guest) -> None:
    guest()
    assert operator.copy("-a", "dst", *ANSWER, throw=[("intent of await answer", signal.SIGKILL)]).returncode == -signal.SIGKILL
    ((run, _),) = operator.states()
    done = operator.run("resume", run)
    assert done.returncode == 0 and "It answers" in done.stderr, done.stderr
    has_arrived(operator, run, "ACTIVE")


def at(seconds: float) -> str:
    """A time from now, with its zone, as an operator writes it."""
    return f"{datetime.now().astimezone() + timedelta(seconds=seconds):%Y-%m-%d %H:%M:%S%z}"


def test_a_cut_over_waits_for_its_time_and_others_have_the_slot_meanwhile(operator: Operator, guest: Guest) -> None:
    guest()
    due = at(40)
    process = operator.begin("-s", operator.id, "-d", "new", "--cutover-at", due, "--every", "4s")
    wait_for("the seed", lambda: "seeded" in "".join(path.read_text() for path in (operator.folder / "state").glob("*.jsonl")), 60)
    wait_for("a free slot", lambda: not list((operator.folder / "state").glob("slot-*")), 30)
    said = ended(process, 0)
    ((run, _),) = operator.states()
    has_arrived(operator, run)
    happened = events(operator)
    assert happened.count("pass") > 3 and happened.index("seeded") < happened.index("intent stop source"), said
    (path,) = (operator.folder / "state").glob("*.jsonl")
    (stop,) = [line["at"] for line in map(json.loads, path.read_text().splitlines()) if (line["event"], line.get("act")) == ("intent", "stop source")]
    assert datetime.fromisoformat(stop) >= datetime.fromisoformat(due).astimezone() and "Cut-over at" in said


@pytest.mark.long
def test_a_machine_that_slept_does_not_cut_over_and_keeps_the_seed(operator: Operator, guest: Guest) -> None:
    guest()
    process = operator.begin("-s", operator.id, "-d", "new", "--cutover-at", at(20), "--every", "10m", "--late", "3s")
    wait_for("the seed", lambda: "seeded" in "".join(path.read_text() for path in (operator.folder / "state").glob("*.jsonl")), 60)
    process.send_signal(signal.SIGSTOP)
    time.sleep(27)
    process.send_signal(signal.SIGCONT)
    said = ended(process, 1)
    assert "--late allows 3" in said and is_seeded(operator) and runs(operator)


@pytest.mark.long
def test_a_downtime_that_does_not_hold_at_the_time_is_named(operator: Operator, guest: Guest) -> None:
    guest()
    said = ended(operator.begin("-s", operator.id, "-d", "new", "--cutover-at", at(15), "--late", "5s", "--max-downtime", "1s"), 1)
    assert "--max-downtime does not hold" in said and is_seeded(operator) and runs(operator)


@pytest.mark.parametrize(("words", "code", "said"), [
    (("--seed", "--cutover-at", "2999-01-01 01:00"), 2, "--seed ends before the cut-over"),
    (("--cutover-at", "2001-01-01 01:00"), 3, "has passed"),
    (("--cutover-at", ""), 2, "no time is given"), (("--cutover-at", "now"), 2, "is for `resume`"),
    (("--every", "5m"), 2, "need --cutover-at"),
    (("--await", "tcp:22"), 2, "give -a dst or -a all too"),
    (("-a", "dst", "--await", "ping:22"), 2, "is not console:REGEX, tcp:PORT or command:WORDS"),
    (("-a", "dst", "--await", "command:nowhere-to-be-found"), 2, "there is no such command"),
    (("-a", "dst", "--await", "console:("), 2, "console:("),
    (("--await-timeout", "5m"), 2, "needs --await"),
    (("--limit-rate", "8-18=20M"), 2, "is not a")])
def test_what_does_not_fit_is_said_before_anything_is_made(operator: Operator, words: tuple[str, ...], code: int, said: str) -> None:
    done = operator.copy(*words)
    assert done.returncode == code and said in done.stderr and operator.made() == [], done.stderr


def test_a_seed_of_a_stopped_source_is_refused(operator: Operator) -> None:
    operator.clouds[0].stop(operator.id)
    done = operator.copy("--seed")
    assert done.returncode == 3 and "nothing to copy while it runs" in done.stderr and operator.made() == []


@pytest.mark.long
def test_a_seed_of_another_base_goes_over_too(operator: Operator, guest: Guest) -> None:
    operator.lab["dst"].run("rm", f"{INSTANCES}/_base/debian")
    base(operator.lab["dst"], "another", path=f"{INSTANCES}/_base/debian")
    guest()
    try:
        run = seeded(operator, "-a", "dst", *FAIL)
        assert operator.run("resume", run).returncode == 4
        guest()
        assert operator.run("resume", run, *ANSWER).returncode == 0
        has_arrived(operator, run, "ACTIVE")
    finally:
        operator.lab["dst"].run("rm", f"{INSTANCES}/_base/debian")


@pytest.mark.long
def test_a_rate_by_the_hour_is_that_of_the_hour(operator: Operator, guest: Guest) -> None:
    guest()
    change = (datetime.now() + timedelta(seconds=75)).replace(second=0, microsecond=0)  # in 15 to 75 seconds
    ended(operator.begin("-s", operator.id, "-d", "new", "--limit-rate", f"{change:%H:%M}-23:59=0,{MiB // 4}"), 0)
    (path,) = (operator.folder / "state").glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    told = [(datetime.fromisoformat(line["at"]).timestamp(), line["done"]) for line in lines if line["event"] == "progress"]
    slow = [(at - told[0][0], done) for at, done in told if at < change.timestamp()]
    assert slow and all(done <= (seconds + 10) * MiB / 4 for seconds, done in slow)
    first = next((at for at, done in told if done > 26 * MiB), math.inf)  # at the slow rate it would take another half a minute
    assert first < change.timestamp() + 15
    assert told[-1][1] > 26 * MiB
