"""What others do to both instances while a run has them: nothing is destroyed that is not ours, never two machines, never none.

Each test brings a run to one line of its journal, where it stands still or is killed, does what an admin, a tenant or a second operator
does, and then looks at Nova, libvirt and the files.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from clouds.conftest import (
    DESTINATION,
    SOURCE,
    MiB,
    Operator,
    as_before,
    disk,
    has_been_put_back,
    left_on,
    same_to_both_guests,
    write_random,
)
from clouds.middle import PASS, Middle, middle
from lab.api import Api, ApiError
from lab.clouds import Clouds
from lab.hosts import Host
from lab.processes import wait_until

KILL, INT = signal.SIGKILL.value, signal.SIGINT.value
SWAPPED = "SRC_CREDS, DST_CREDS = DST_CREDS, SRC_CREDS"  # the two clouds, confused
NOBODYS = "00000000-0000-4000-8000-000000000000"
ONE_CLOUD = "DST_CREDS = SRC_CREDS"
HASTY = ("OUTAGE_LIMIT: Final = 120.0", "OUTAGE_LIMIT: Final = 3.0")  # an API that is away is given up sooner


def is_there(api: Api, id: str) -> bool:
    """Whether Nova has this instance."""
    return api.find("nova", "servers", id) is not None


@dataclass
class Victims:
    """Instances of the source cloud that may be lost: a new one is made when the last one is gone."""

    clouds: Clouds
    src: Api
    image: str
    ids: list[str] = field(default_factory=list)

    def one(self) -> str:
        """The id of one that is stopped and has data on its disk."""
        if not self.ids or not is_there(self.src, self.ids[-1]):
            self.ids.append(self.src.create("victim", self.image, availability_zone=f"nova:{SOURCE}"))
            self.src.act(self.ids[-1], "os-stop", until="SHUTOFF")
            write_random(self.clouds.host(SOURCE), self.ids[-1], (200 * MiB, 16 * MiB))
        elif self.clouds.host(SOURCE).run("virsh", "domstate", self.ids[-1], check=False).returncode:
            for act, status in (("os-start", "ACTIVE"), ("os-stop", "SHUTOFF")):  # after a start that has failed Nova leaves no domain
                self.src.act(self.ids[-1], act, until=status)
        return self.ids[-1]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy is in the middle for a while: some chunks are there, and others are not."""
    monkeypatch.setenv("MIGRENA_CHUNK", "4M")


@pytest.fixture(scope="module")
def victims(clouds: Clouds, src: Api, quick: str) -> Iterator[Victims]:
    """What the tests of this file share."""
    found = Victims(clouds, src, quick)
    yield found
    for server in src.call("GET", "nova", "/servers?all_tenants=1")["servers"]:
        if server["id"] in found.ids:
            src.delete(server["id"])


@pytest.fixture
def victim(src: Api, dst: Api, victims: Victims) -> Iterator[str]:
    """An instance of the source cloud, stopped, while the destination is empty; afterwards both are so again."""
    id = victims.one()
    before = {server["id"] for server in src.call("GET", "nova", "/servers?all_tenants=1")["servers"]}
    as_before(src, dst, id)
    yield id
    for server in src.call("GET", "nova", "/servers?all_tenants=1")["servers"]:
        if server["id"] not in before:
            src.delete(server["id"])
    if is_there(src, id):
        as_before(src, dst, id)
    for server in dst.call("GET", "nova", "/servers?all_tenants=1")["servers"]:
        dst.delete(server["id"])


def words(operator: Operator, victim: str, name: str = "arrived") -> list[str]:
    """The words of a copy to the destination."""
    return ["-s", victim, *operator.to(DESTINATION, name=name)]


def within_one_cloud(src: Api, victim: str, network: str = "net1") -> list[str]:
    """The words of a move to the source cloud's other hypervisor."""
    extra = {"nics": [{"net-id": src.need("neutron", "networks", network) if network else NOBODYS}],
             "availability_zone": "nova:src-cmp2"}
    return ["-s", victim, "-d", "arrived", "-f", "tiny", "-i", "guest", "-e", str(extra)]


def running_on(clouds: Clouds) -> set[str]:
    """The instances whose qemu runs on any hypervisor, whatever Nova says."""
    return {id for name in clouds.options.hosts
            for id in clouds.host(name).run("virsh", "-q", "list", "--uuid", "--state-running").stdout.split()}


def works_on_a_deleted_file(host: Host) -> list[str]:
    """The disks that a qemu has open although something else is in their place."""
    script = 'for pid in $(pidof qemu-system-x86_64); do readlink "/proc/$pid/fd/"* || true; done'
    return [line for line in host.run("sh", "-c", script).stdout.splitlines() if "/disk" in line and line.endswith("(deleted)")]


def started(api: Api, id: str) -> str:
    """How an admin's start of an instance ended: ACTIVE, or Error where qemu did not get its disk."""
    api.act(id, "os-start")

    def outcome() -> str:
        server = api.server(id)
        if server["OS-EXT-STS:task_state"]:
            return ""
        latest = api.call("GET", "nova", f"/servers/{id}/os-instance-actions")["instanceActions"][0]
        return str(server["status"] if server["status"] == "ACTIVE" else latest["message"] or "" if latest["action"] == "start" else "")

    wait_until(f"the start of {id} to succeed or to fail", lambda: bool(outcome()), 60)
    return outcome()


def is_kept(done: subprocess.CompletedProcess[str], *ids: str) -> None:
    """The run ended with 4, and tells of these instances and of the ways on."""
    assert done.returncode == 4 and "Traceback" not in done.stderr, (done.returncode, done.stderr)
    assert all(id in done.stderr for id in ids) and re.search(r"\./migrena\.py (rollback|resume) 2\w+-\w+", done.stderr), done.stderr


def another(operator: Operator) -> Operator:
    """Somebody on another machine, who gives a run a few seconds, not more than a minute, to show that it has ended."""
    folder = operator.folder / "elsewhere"
    folder.mkdir()
    return dataclasses.replace(operator, folder=folder).with_build(("LEASE_LIMIT: Final = 75.0", "LEASE_LIMIT: Final = 5.0"))


def arrived_at(dst: Api) -> str:
    """The id of the instance in the destination."""
    return dst.need("nova", "servers", "arrived")


def clean(clouds: Clouds) -> bool:
    """Whether nothing of ours is left on the hypervisors of these tests."""
    return left_on(clouds.host(SOURCE)) == left_on(clouds.host("src-cmp2")) == left_on(clouds.host(DESTINATION)) == []


# ---- 1: source and destination are in one cloud ----


@pytest.mark.parametrize("end", ["a network that nobody knows", "Ctrl-C in mid-copy"])
def test_a_run_within_one_cloud_that_fails_deletes_what_it_made_and_never_the_source(
        operator: Operator, clouds: Clouds, src: Api, victim: str, end: str) -> None:
    before = clouds.host(SOURCE).run("sha256sum", disk(victim)).stdout
    if end == "Ctrl-C in mid-copy":
        done = operator.go_on(operator.halted("chunk", *within_one_cloud(src, victim), extra=ONE_CLOUD), INT)
    else:
        done = operator.run(*within_one_cloud(src, victim, network=""), extra=ONE_CLOUD)
    assert is_there(src, victim), done.stderr
    assert done.returncode == (128 + INT if end == "Ctrl-C in mid-copy" else 1), done.stderr
    assert clouds.host(SOURCE).run("sha256sum", disk(victim)).stdout == before
    assert has_been_put_back(src, victim, "SHUTOFF") and not src.find("nova", "servers", "arrived") and clean(clouds)


@pytest.mark.long
def test_a_move_within_one_cloud_is_a_move_like_any_other(operator: Operator, clouds: Clouds, src: Api, victim: str) -> None:
    id = operator.report(*within_one_cloud(src, victim), extra=ONE_CLOUD)["destination"]["id"]
    assert id != victim and same_to_both_guests(clouds.host(SOURCE), victim, clouds.host("src-cmp2"), id)
    assert has_been_put_back(src, victim, "SHUTOFF") and src.server(id)["status"] == "SHUTOFF"
    assert operator.run("rollback", operator.last_run, "--yes", extra=ONE_CLOUD).returncode == 0
    assert is_there(src, victim) and not is_there(src, id) and clean(clouds)


# ---- 2: the clouds are swapped in the config ----


@pytest.mark.long
def test_a_run_is_not_undone_with_the_clouds_swapped_nor_resumed(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, victim: str) -> None:
    assert operator.run(*words(operator, victim), throw=[("chunk", KILL)]).returncode == -KILL
    id = arrived_at(dst)
    seen = src.server(victim), dst.server(id)
    for word in (["rollback", operator.last_run], ["rollback", operator.last_run, "--yes"], ["resume", operator.last_run]):
        done = operator.run(*word, extra=SWAPPED)
        assert is_there(src, victim), done.stderr
        assert done.returncode == 3 and "cloud" in done.stderr, (done.returncode, done.stderr)
    assert (src.server(victim), dst.server(id)) == seen
    assert operator.run("rollback", operator.last_run).returncode == 0
    assert has_been_put_back(src, victim, "SHUTOFF") and not is_there(dst, id) and clean(clouds)


# ---- 3 and 4: somebody starts one of the two ----


def test_a_source_that_an_admin_starts_before_the_destination_starts_is_the_only_machine_that_runs(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, victim: str) -> None:
    process = operator.halted("done of swap in", *words(operator, victim), "-a", "dst")
    id = arrived_at(dst)
    if src.server(victim)["locked"]:
        src.act(victim, "unlock")
    was_started = started(src, victim)
    done = operator.go_on(process)
    assert running_on(clouds) & {victim, id} == ({victim} if was_started == "ACTIVE" else set()), done.stderr
    is_kept(done, victim, id)
    assert dst.server(id)["status"] == "SHUTOFF" and src.server(victim)["status"] in done.stderr
    if was_started != "ACTIVE":
        assert same_to_both_guests(clouds.host(SOURCE), victim, clouds.host(DESTINATION), id)
    done = operator.run("rollback", operator.last_run)
    if done.returncode == 3:  # the source may have been written to since: the destination has what it was
        assert "--yes" in done.stderr and is_there(dst, id), done.stderr
        done = operator.run("rollback", operator.last_run, "--yes")
    assert done.returncode == 0, done.stderr
    assert not is_there(dst, id) and running_on(clouds) & {victim} == ({victim} if was_started == "ACTIVE" else set())
    assert has_been_put_back(src, victim, src.server(victim)["status"]) and clean(clouds)


def test_a_destination_that_somebody_starts_in_mid_copy_does_not_get_its_disk_swapped_under_it(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, victim: str) -> None:
    process = operator.halted("chunk", *words(operator, victim))
    id = arrived_at(dst)
    was_started = started(dst, id)
    done = operator.go_on(process)
    assert works_on_a_deleted_file(clouds.host(DESTINATION)) == [], done.stderr
    if was_started == "ACTIVE" or done.returncode:  # it ran for a while at least: what it has written is somebody's
        is_kept(done, victim, id)
        assert src.server(victim)["status"] == "SHUTOFF" and dst.server(id)["status"] == was_started.replace("Error", "SHUTOFF")
        return
    assert dst.server(id)["status"] == "SHUTOFF" and has_been_put_back(src, victim, "SHUTOFF") and clean(clouds)
    assert same_to_both_guests(clouds.host(SOURCE), victim, clouds.host(DESTINATION), id)


@pytest.mark.long
def test_a_user_cannot_start_the_destination_while_its_disk_is_on_the_way(
        operator: Operator, clouds: Clouds, dst: Api, victim: str) -> None:
    process = operator.halted("chunk", *words(operator, victim))
    member, id = clouds.api("dst", "demo"), arrived_at(dst)
    member.project = "admin"
    role, user, project = (dst.need("keystone", kind, name) for kind, name in (("roles", "member"), ("users", "demo"), ("projects", "admin")))
    dst.call("PUT", "keystone", f"/projects/{project}/users/{user}/roles/{role}")
    try:
        with pytest.raises(ApiError) as refused:
            member.act(id, "os-start")
        assert refused.value.status == 409 and "locked" in str(refused.value)
        assert operator.last_run in str(dst.server(id)["locked_reason"])
    finally:
        dst.call("DELETE", "keystone", f"/projects/{project}/users/{user}/roles/{role}")
    assert operator.go_on(process).returncode == 0 and not dst.server(id)["locked"]


# ---- 5: the complete destination is in use ----


@pytest.mark.long
def test_a_destination_that_was_started_after_the_run_was_killed_is_not_deleted_without_yes(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, victim: str) -> None:
    assert operator.run(*words(operator, victim), throw=[("done of swap in", KILL)]).returncode == -KILL
    id = arrived_at(dst)
    assert started(dst, id) == "ACTIVE"
    done = operator.run("rollback", operator.last_run)
    assert is_there(dst, id), done.stderr
    assert done.returncode == 3 and "--yes" in done.stderr and id in done.stderr, (done.returncode, done.stderr)
    assert dst.server(id)["status"] == "ACTIVE" and running_on(clouds) & {victim, id} == {id}
    dst.act(id, "os-stop", until="SHUTOFF")  # what it wrote is there all the same
    assert operator.run("rollback", operator.last_run).returncode == 3 and is_there(dst, id)
    assert operator.run("rollback", operator.last_run, "--yes").returncode == 0
    assert not is_there(dst, id) and has_been_put_back(src, victim, "SHUTOFF") and clean(clouds)


# ---- 6: another operator ----


@pytest.mark.long
def test_a_run_that_lives_on_another_machine_is_not_undone(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, victim: str) -> None:
    process = operator.halted("chunk", *words(operator, victim))
    elsewhere = another(operator)
    for more in ((), ("--yes",)):
        done = elsewhere.run("rollback", "--run-of", victim, *more)
        assert done.returncode == 3 and operator.last_run in done.stderr, (done.returncode, done.stderr)
    done = operator.go_on(process)
    assert done.returncode == 0, done.stderr
    assert same_to_both_guests(clouds.host(SOURCE), victim, clouds.host(DESTINATION), done.stdout.strip())
    assert has_been_put_back(src, victim, "SHUTOFF") and clean(clouds)


@pytest.mark.long
def test_a_rollback_that_is_at_work_on_another_machine_is_not_met_by_a_second_one(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, victim: str) -> None:
    assert operator.run(*words(operator, victim), throw=[("chunk", KILL)]).returncode == -KILL
    run = operator.last_run
    process = operator.halted("asked to roll back", "rollback", run)
    hasty = another(operator).with_build(("LEASE_LIMIT: Final = 75.0", "LEASE_LIMIT: Final = 5.0"))
    done = hasty.run("rollback", "--run-of", victim)
    assert done.returncode == 3 and run in done.stderr, (done.returncode, done.stderr)
    assert operator.go_on(process).returncode == 0
    assert has_been_put_back(src, victim, "SHUTOFF") and clean(clouds)


# ---- 7: the source is rebuilt ----


def rebuild(api: Api, id: str) -> None:
    """Has Nova make an instance's disk anew; returns while the hypervisor is at it."""
    api.act(id, "rebuild", {"imageRef": api.need("glance", "images", "guest")})
    wait_until("the rebuild", lambda: str(api.server(id)["OS-EXT-STS:task_state"]) == "rebuild_spawning", 60)


@pytest.mark.long
def test_a_source_that_was_rebuilt_during_a_run_can_be_moved_again(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, victim: str) -> None:
    """Where the unlocking falls into the rebuild, Nova keeps `locked_reason` although `locked` is false, and the mark comes back."""
    process = operator.halted("chunk", *words(operator, victim))
    reason = src.server(victim)["locked_reason"]
    rebuild(src, victim)
    done = operator.go_on(process, INT)
    src.await_status(victim, "SHUTOFF")
    assert done.returncode in (4, 128 + INT) and "Traceback" not in done.stderr, (done.returncode, done.stderr)
    again = operator.run(*words(operator, victim), "-n")
    if again.returncode == 3:  # what is advised helps
        assert f"rollback {operator.last_run}" in again.stderr, again.stderr
        assert operator.run("rollback", operator.last_run, "--yes").returncode == 0
    src.act(victim, "lock", {"locked_reason": reason})
    rebuild(src, victim)
    src.act(victim, "unlock")
    src.await_status(victim, "SHUTOFF")
    kept, again = src.server(victim), operator.run(*words(operator, victim), "-n")
    src.delete(victim)  # its data is gone
    assert (kept["locked"], kept["locked_reason"]) == (False, reason)
    assert again.returncode == 0, again.stderr


# ---- 11 to 13: runs that are over ----


@pytest.fixture
def between() -> Iterator[Middle]:
    """What stands between migrena and both clouds."""
    with middle() as found:
        yield found


@pytest.mark.long
def test_a_rollback_of_an_old_run_does_not_start_a_source_that_a_later_run_has_moved(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, victim: str, between: Middle) -> None:
    src.act(victim, "os-start", until="ACTIVE")
    between.spoil = lambda name, before: "403" if name == "dst DELETE server" else PASS
    done = operator.go_on(operator.halted("chunk", *words(operator, victim), env=between.environment), INT)
    old = operator.last_run
    assert done.returncode == 4 and arrived_at(dst) in done.stderr, (done.returncode, done.stderr)
    dst.delete(arrived_at(dst))  # by hand, as it was told
    id = operator.report(*words(operator, victim), "-a", "dst")["destination"]["id"]
    assert running_on(clouds) & {victim, id} == {id}
    done = operator.run("rollback", old)
    assert running_on(clouds) & {victim, id} == {id} and src.server(victim)["status"] == "SHUTOFF", (done.returncode, done.stderr)
    assert done.returncode in (0, 3), done.stderr  # there is nothing of it to undo
    assert f"rollback {old}" not in operator.run("status", old).stdout or done.returncode == 3


@pytest.mark.long
def test_a_lock_that_an_admin_sets_during_a_run_that_fails_stays_and_the_source_is_not_started(
        operator: Operator, clouds: Clouds, src: Api, victim: str) -> None:
    src.act(victim, "os-start", until="ACTIVE")
    process = operator.halted("chunk", *words(operator, victim))
    src.act(victim, "unlock")  # Nova takes no notice of a second lock by the owner's own project
    src.act(victim, "lock", {"locked_reason": "an audit"})
    done = operator.go_on(process, INT)
    server = src.server(victim)
    assert (server["locked"], server["locked_reason"], server["status"]) == (True, "an audit", "SHUTOFF"), done.stderr
    is_kept(done, victim)
    assert "an audit" in done.stderr and victim not in running_on(clouds)


@pytest.mark.long
def test_a_source_that_was_moved_is_not_moved_again_under_another_name(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, victim: str) -> None:
    id = operator.report(*words(operator, victim), "-a", "dst")["destination"]["id"]
    done = operator.run(*words(operator, victim, name="once-more"), "-a", "dst")
    assert running_on(clouds) == {id} and not dst.find("nova", "servers", "once-more"), done.stderr
    server = src.server(victim)
    assert (server["status"], server["locked"]) == ("SHUTOFF", True) and id in server["locked_reason"], server
    assert done.returncode == 3 and id in done.stderr and "--yes" in done.stderr, (done.returncode, done.stderr)
    src.act(victim, "unlock")
    assert operator.run(*words(operator, victim, name="once-more"), "-n").returncode == 3
    assert operator.run(*words(operator, victim, name="once-more"), "--yes", "-n").returncode == 0
    assert operator.run("rollback", operator.last_run, "--yes").returncode == 0
    assert has_been_put_back(src, victim, "SHUTOFF") and not is_there(dst, id)


# ---- 14 and 15: what is told ----


@pytest.mark.long
def test_a_rollback_that_is_interrupted_does_not_say_that_it_has_rolled_back(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, victim: str) -> None:
    src.act(victim, "os-start", until="ACTIVE")
    assert operator.run(*words(operator, victim), throw=[("chunk", KILL)]).returncode == -KILL
    run = operator.last_run
    done = operator.run("rollback", run, throw=[("intent of delete destination", INT)])
    assert not has_been_put_back(src, victim, "ACTIVE")
    assert done.returncode == 4 and "left behind: " in done.stderr and victim in done.stderr, (done.returncode, done.stderr)
    assert f"{run}  left" in operator.run("status").stdout
    done = operator.run("rollback", run)
    assert done.returncode == 0, done.stderr
    assert has_been_put_back(src, victim, "ACTIVE") and not dst.find("nova", "servers", "arrived") and clean(clouds)


@pytest.mark.long
def test_a_complete_copy_is_not_undone_because_an_api_stays_away(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, victim: str, between: Middle) -> None:
    hasty = operator.with_build(HASTY)
    between.spoil = lambda name, before: "500" if name in ("src POST unlock", "src POST lock") and "swapped" in between.seen else PASS
    process = hasty.halted("done of swap in", *words(operator, victim), env=between.environment)
    between.seen.append("swapped")
    done = operator.go_on(process)
    assert dst.find("nova", "servers", "arrived"), done.stderr
    id = arrived_at(dst)
    is_kept(done, victim, id)
    assert same_to_both_guests(clouds.host(SOURCE), victim, clouds.host(DESTINATION), id)
    done = operator.run("resume", operator.last_run)
    assert done.returncode == 0, done.stderr
    assert has_been_put_back(src, victim, "SHUTOFF") and clean(clouds)


@pytest.mark.long
def test_apis_that_stay_away_are_reported_all_the_time_that_they_are_waited_for(
        operator: Operator, clouds: Clouds, src: Api, victim: str, between: Middle) -> None:
    hasty = operator.with_build((HASTY[0], "OUTAGE_LIMIT: Final = 40.0"))
    away: list[bool] = []
    between.spoil = lambda name, before: "503" if away else PASS
    process = hasty.halted("chunk", *words(operator, victim), env=between.environment)
    away.append(True)
    process.send_signal(signal.SIGINT)
    hasty.halt(hasty.begun.index(process)).unlink()
    assert process.stderr
    said, moments = "", [time.monotonic()]
    for line in process.stderr:
        said, moments = said + line, [*moments, time.monotonic()]
    process.communicate(timeout=60)
    assert process.returncode == 4, said
    assert max(later - sooner for sooner, later in itertools.pairwise(moments)) < 20, said
    assert operator.run("rollback", operator.last_run).returncode == 0
    assert has_been_put_back(src, victim, "SHUTOFF") and clean(clouds)
