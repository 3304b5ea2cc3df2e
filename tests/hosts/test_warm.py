"""A warm copy: the source runs while its disk goes over, and nothing that its guest wrote is lost, whatever happens meanwhile."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from hosts.faults import fill, small_folder
from hosts.operators import Operator, ended, has_arrived, is_complete
from hosts.rig import INSTANCES, MiB, base, processes, running, wait_for, wait_until_clean
from hosts.test_networks import IMPATIENT, cut, without_sshd
from hosts.test_state_folder import pad
from hosts.test_storage import own_file_system, proxy
from lab.processes import command

# A guest that writes 64 KiB somewhere in PLACES of its disk, again and again with PAUSE seconds between, until it is asked to end.
GUEST = """
import os, random, signal, subprocess, sys, time
disk, format, places, pause = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
pidfile, going = os.path.dirname(disk) + "/guest.pid", [True]
signal.signal(signal.SIGTERM, lambda *_: going.clear())
qemu = subprocess.Popen(["qemu-io", "-f", format, disk], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True)
number = 0
while going:
    number += 1
    qemu.stdin.write("write -P %d %d 65536\\n" % (number % 255 + 1, random.randrange(places) * 65536))
    qemu.stdin.flush()
    if number == 8:
        with open(pidfile, "w") as file:
            file.write(str(os.getpid()))
    time.sleep(pause)
qemu.stdin.write("flush\\nquit\\n")
qemu.stdin.close()
qemu.wait()
os.remove(pidfile)
"""
Guest = Callable[..., None]


@pytest.fixture
def guest(operator: Operator) -> Iterator[Guest]:
    """Starts the source's guest, which writes to so many places of its disk."""
    with_guest: list[object] = []
    host, folder = operator.source.host, operator.source.path.rpartition("/")[0]

    def start(places: int = 16, pause: float = 0.02) -> None:
        words = ("python3", "-c", GUEST, operator.source.path, operator.source.format, str(places), str(pause))
        scope = running(host, *words)
        scope.__enter__()
        with_guest.append(scope)
        wait_for("the guest", lambda: runs(operator))

    yield start
    end = 'pid=$(cat "$1/guest.pid" 2>/dev/null) && kill "$pid"; sleep 0.5; rm -f "$1/guest.pid"'
    operator.lab[host.name].run("sh", "-c", end, "sh", folder, check=False)
    for scope in with_guest:
        scope.__exit__(None, None, None)  # type: ignore[attr-defined]


def runs(operator: Operator) -> bool:
    """Whether the guest is there, and writes."""
    return operator.source.host.run("test", "-e", f"{operator.source.path.rpartition('/')[0]}/guest.pid", check=False).returncode == 0


def events(operator: Operator) -> list[str]:
    """What the journal of the only run says has happened, by name."""
    (path,) = (operator.folder / "state").glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [f"{line['event']} {str(line.get('act', '')).partition(' 0')[0]}".strip() for line in lines]


def has_progress(operator: Operator) -> bool:
    """Whether something is on its way by the journal."""
    return any(path.read_text().count('"progress"') for path in (operator.folder / "state").glob("*.jsonl"))


def in_a_pass(operator: Operator, *words: str, **different: str) -> subprocess.Popen[str]:
    """A warm copy whose first pass is under way, in an environment that may be different."""
    process = operator.begin("-s", operator.id, "-d", "new", "--warm", "--limit-rate", "6M", *words, throw=(), **different)
    wait_for("the first pass", lambda: has_progress(operator))
    return process


def goes_on(operator: Operator, process: subprocess.Popen[str]) -> None:
    """The run needed a further attempt, while the source ran on, and was successful."""
    assert "the source runs on" in ended(process, 0)
    ((run, _),) = operator.states()
    has_arrived(operator, run)


def done(operator: Operator, *words: str) -> dict[str, object]:
    """The report of a warm copy that must succeed, held to all that must be so."""
    ended = operator.copy("--warm", "--json", *words)
    assert ended.returncode == 0, ended.stderr
    report: dict[str, object] = json.loads(ended.stdout)
    is_complete(operator, str(report["run"]))
    return report


@pytest.mark.parametrize("words", [(), ("--no-tls",), ("--compress", "on"), ("--limit-rate", "20M"), ("--warm-passes", "1"), ("--no-verify",)])
def test_what_a_guest_writes_meanwhile_arrives(operator: Operator, guest: Guest, words: tuple[str, ...]) -> None:
    guest()
    copy = done(operator, *words)["copy"]
    assert isinstance(copy, dict)
    passes = copy["passes"]
    assert len(passes) == 1 if "--warm-passes" in words else len(passes) >= 2
    assert passes[0]["changed"] > 26 * MiB and copy["bytes"] < 8 * MiB  # what is left to be sent is what the guest has written to
    assert copy["verified"] and len(str(copy["digest"])) == 64


def test_the_source_runs_until_little_is_left(operator: Operator, guest: Guest) -> None:
    guest()
    done(operator)
    happened = events(operator)
    assert happened.index("done warm copy") < happened.index("intent stop source") < happened.index("intent copy")


def test_a_disk_that_grows_meanwhile_arrives_whole(operator: Operator, guest: Guest) -> None:
    guest(places=1000, pause=0.002)
    done(operator, "--limit-rate", "12M", "--warm-passes", "2")


def test_what_the_guest_sees_goes_over_where_the_bases_differ(operator: Operator, guest: Guest) -> None:
    operator.lab["dst"].run("rm", f"{INSTANCES}/_base/debian")
    base(operator.lab["dst"], "another", path=f"{INSTANCES}/_base/debian")
    guest()
    try:
        done(operator)
    finally:
        operator.lab["dst"].run("rm", f"{INSTANCES}/_base/debian")


def test_a_source_that_is_stopped_is_copied_as_ever(operator: Operator) -> None:
    operator.clouds[0].stop(operator.id)
    ended = operator.copy("--warm")
    assert ended.returncode == 0 and "while the source runs" not in ended.stderr, ended.stderr


def is_untouched(operator: Operator) -> None:
    """The source and its guest run, nobody else has the disk open, and nothing is left in the destination."""
    operator.is_as_found()
    assert runs(operator) and operator.made() == []
    operator.clouds[0].stop(operator.id)
    for host in operator.lab:
        wait_until_clean(host)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("line", ["intent of warm copy", "progress", "pass"])
def test_an_interrupted_warm_pass_leaves_the_source_running(operator: Operator, guest: Guest, line: str, number: signal.Signals) -> None:
    guest()
    ended = operator.copy("--warm", throw=[(line, number)])
    assert ended.returncode == 128 + number, ended.stderr
    is_untouched(operator)


@pytest.mark.parametrize(("line", "runs_on"), [
    ("intent of warm copy", True), ("progress", True), ("pass", True), ("done of warm copy", True), ("intent of stop source", True),
    ("done of stop source", False), ("intent of copy", False), ("done of copy", False), ("intent of swap in", False)])
def test_a_run_that_is_killed_goes_on_from_where_it_was(operator: Operator, guest: Guest, line: str, runs_on: bool) -> None:
    guest()
    assert operator.copy("--warm", throw=[(line, signal.SIGKILL)]).returncode == -signal.SIGKILL
    assert runs(operator) == runs_on
    ((run, _),) = operator.states()
    ended = operator.run("resume", run)
    assert ended.returncode == 0, ended.stderr
    has_arrived(operator, run)


def test_a_downtime_that_is_not_in_reach_leaves_the_source_running(operator: Operator, guest: Guest) -> None:
    guest(places=900, pause=0.001)
    ended = operator.copy("--warm", "--max-downtime", "1s", "--warm-timeout", "2s")
    assert ended.returncode == 1 and "would still be down for about" in ended.stderr, ended.stderr
    assert "--max-downtime" in ended.stderr
    is_untouched(operator)


def test_a_downtime_that_is_in_reach_is_waited_for(operator: Operator, guest: Guest) -> None:
    guest()
    report = done(operator, "--max-downtime", "10m")
    assert isinstance(report["copy"], dict) and len(report["copy"]["passes"]) == 2


def test_a_limit_of_the_downtime_without_a_warm_copy_is_refused(operator: Operator) -> None:
    ended = operator.copy("--max-downtime", "30s")
    assert ended.returncode == 2 and "give --warm too" in ended.stderr and operator.made() == []


def test_a_source_that_is_stopped_by_somebody_meanwhile_ends_it(operator: Operator, guest: Guest) -> None:
    guest()
    process = in_a_pass(operator)
    operator.clouds[0].stop(operator.id)
    said = ended(process, 1)
    assert "somebody stopped it" in said
    assert operator.made() == [] and operator.clouds[0].rows()[operator.id]["status"] == "SHUTOFF"


@pytest.mark.parametrize(("side", "word"), [("src", "qemu-nbd"), ("dst", "qemu-img")])
def test_a_program_that_dies_in_a_warm_pass_costs_an_attempt(operator: Operator, guest: Guest, side: str, word: str) -> None:
    guest()
    process = in_a_pass(operator)
    host, found = operator.lab[side], list[int]()

    def is_there() -> bool:  # between two chunks it is not
        found[:] = [pid for pid, words in processes(host).items() if words[0] == word and (
            "convert" in words if side == "dst" else "--pid-file" in " ".join(words))]
        return bool(found)

    wait_for(word, is_there)
    for pid in found:
        host.run("kill", "-9", str(pid))
    goes_on(operator, process)


@pytest.mark.parametrize("name", ["src", "dst"])
def test_a_cable_that_is_pulled_in_a_warm_pass_costs_an_attempt(operator: Operator, guest: Guest, name: str) -> None:
    guest()
    process = in_a_pass(operator, *IMPATIENT)
    cable = operator.lab.spec.link(name)
    command("ip", "link", "set", cable, "down")
    time.sleep(15)  # longer than the pause that a rate makes between two chunks
    assert runs(operator)
    command("ip", "link", "set", cable, "up")
    goes_on(operator, process)


@pytest.mark.parametrize("name", ["src", "dst"])
def test_a_hypervisor_that_dies_in_a_warm_pass_and_comes_up_again_costs_an_attempt(operator: Operator, guest: Guest, name: str) -> None:
    """All that runs on it ends at once; and a part of the new file is lost, as where a kernel had not written it yet."""
    if name == "dst":  # else the guest would end with its host
        guest()
    process = in_a_pass(operator, *IMPATIENT)
    operator.lab[name].kill()
    host = operator.lab.start(name)
    if name == "dst":
        host.run("sh", "-ec", f"fallocate -p -o 4M -l 8M {INSTANCES}/*/disk.migrena-*")
    else:
        operator = replace(operator, source=replace(operator.source, host=host))
    goes_on(operator, process)


def test_a_destination_that_fills_up_in_a_warm_pass_leaves_the_source_running(operator: Operator, guest: Guest) -> None:
    host = operator.lab["dst"]
    with own_file_system(host, "250m"):
        guest()
        process = in_a_pass(operator)
        host.run("sh", "-c", f"head -c 1G /dev/zero > {INSTANCES}/filler", check=False)
        assert "No space left on device" in ended(process, 1)
        is_untouched(operator)


def test_a_warm_pass_that_would_fill_the_destination_for_its_other_guests_ends_the_run(operator: Operator, guest: Guest) -> None:
    with own_file_system(operator.lab["dst"], "400m"):
        guest()
        process = in_a_pass(operator, "--limit-rate", "1M", MIGRENA_SPACE_RESERVE="100M")
        operator.lab["dst"].run("sh", "-c", f"fallocate -l $(($(stat -f -c %a*%S {INSTANCES}) - 90 * 1048576)) {INSTANCES}/filler")
        said = ended(process, 1)
        assert "are left beside" in said and "Stop source instance" not in said
        is_untouched(operator)


def test_a_disk_that_is_resized_in_a_warm_pass_ends_the_run_before_the_stop(operator: Operator, guest: Guest) -> None:
    resize = 'import os, sys; os.pwrite(os.open(sys.argv[1], os.O_WRONLY), int(sys.argv[2]).to_bytes(8, "big"), 24)'  # in the header of a qcow2
    size = operator.source.node()["virtual-size"]
    guest()
    process = in_a_pass(operator)
    operator.source.host.run("python3", "-c", resize, operator.source.path, str(size + MiB))
    said = ended(process, 1)
    operator.source.host.run("python3", "-c", resize, operator.source.path, str(size))
    assert "was replaced or resized since the survey" in said and "Stop source instance" not in said
    is_untouched(operator)


@pytest.mark.parametrize("name", ["src", "dst"])
def test_an_sshd_that_ends_in_a_warm_pass_and_is_started_again_costs_an_attempt(operator: Operator, guest: Guest, name: str) -> None:
    guest()
    process = in_a_pass(operator)
    with without_sshd(operator.lab[name]):
        wait_for("another attempt", lambda: "retry" in " ".join(events(operator)), 150)
    goes_on(operator, process)


def test_a_loss_of_the_operator_s_network_in_a_warm_pass_costs_an_attempt(operator: Operator, guest: Guest) -> None:
    guest()
    process = in_a_pass(operator, *IMPATIENT)
    with cut(operator.lab, "", "src", "dst"):
        wait_for("another attempt", lambda: "retry" in " ".join(events(operator)), 150)
        assert runs(operator)
    goes_on(operator, process)


def test_a_loss_for_good_of_the_operator_s_network_in_a_warm_pass_leaves_the_source_running(operator: Operator, guest: Guest) -> None:
    guest()
    process = in_a_pass(operator, *IMPATIENT, "--retries", "0", LEASE_SECONDS="20")
    with cut(operator.lab, "", "src", "dst"):
        assert "left behind: check that nothing of ours is left on src did not succeed" in ended(process, 4)
        assert runs(operator)
    ((run, _),) = operator.states()
    assert operator.run("rollback", run).returncode == 0
    is_untouched(operator)


def test_a_byte_that_changes_on_the_way_in_a_warm_pass_is_sent_again(operator: Operator) -> None:
    with proxy(operator.lab, str(13 * MiB)):  # the rehearsal has taken 8
        copy = done(operator, "--no-tls")["copy"]
    assert isinstance(copy, dict) and [one["changed"] // MiB for one in copy["passes"]][1:] == [1]  # nobody else has changed anything


def test_a_state_folder_that_fills_up_in_a_warm_pass_leaves_the_source_running(operator: Operator, guest: Guest) -> None:
    guest()
    with small_folder(operator.folder / "state", "64k"):
        process = in_a_pass(operator)
        (journal,) = (operator.folder / "state").glob("*.jsonl")
        pad(journal)
        fill(operator.folder / "state")
        assert f"the journal {journal} can no longer be written" in ended(process, 1)
        is_untouched(operator)
