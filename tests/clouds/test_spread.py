"""Instances are spread over the hypervisors of one real cloud while they run, and their records go on without a gap."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from clouds.conftest import DISKS, Operator, ended, last_record, wait_for_console
from clouds.middle import LOST, PASS, middle
from lab.api import Api
from lab.clouds import Clouds, credentials
from lab.hosts import Host

NAMES = ("web-0", "db-0", "db-1")
ASKED = "src POST os-migrateLive"
pytestmark = pytest.mark.timeout(900)  # three guests are emulated, and several migrations follow each other


@pytest.fixture(scope="module")
def three(clouds: Clouds, src: Api) -> Iterator[dict[str, str]]:
    """The ids of three guests that run and write, all on the first hypervisor; Nova moves a disk only to a host that makes such ones too."""
    clouds.set_images_type("src-cmp2", "qcow2")
    ids = {name: src.create(name, availability_zone="nova:src-cmp1") for name in NAMES}
    for id in ids.values():
        wait_for_console(src, id, "GUEST wrote=")
    yield ids
    for id in ids.values():
        src.delete(id)
    clouds.set_images_type("src-cmp2", "raw")


def place_of(api: Api, id: str) -> str:
    """The hypervisor of an instance."""
    return str(api.server(id)["OS-EXT-SRV-ATTR:host"])


def spread(operator: Operator, wanted: object, *words: str) -> list[str]:
    """The words that spread instances as this map says."""
    path = operator.folder / "map.json"
    path.write_text(wanted if isinstance(wanted, str) else json.dumps(wanted))
    return ["live-migrate", "--host-map", str(path), "--cloud", "src", *words]


def writes_on(api: Api, id: str) -> None:
    """A guest goes on with its records; on another host its console begins anew."""
    *_, last = re.findall(r"GUEST wrote=(\d+)", wait_for_console(api, id, "GUEST wrote="))
    wait_for_console(api, id, f"GUEST wrote={int(last) + 20}")


def test_instances_go_where_the_map_says_while_they_run(operator: Operator, clouds: Clouds, src: Api, three: dict[str, str]) -> None:
    wanted = {"src-cmp2": ["web-0", three["db-1"]], "src-cmp1": ["db-0"]}
    report = operator.report(*spread(operator, wanted, "-y"))
    assert [(row["name"], row["result"]) for row in report["moves"]] == [("web-0", "moved"), ("db-1", "moved")]
    assert [place_of(src, three[name]) for name in NAMES] == ["src-cmp2", "src-cmp1", "src-cmp2"]
    writes_on(src, three["web-0"])
    last = {}
    for id in (three["web-0"], three["db-1"]):
        src.act(id, "os-stop", until="SHUTOFF")
        last[id] = last_record(clouds.host("src-cmp2"), id)
        src.act(id, "os-start", until="ACTIVE")
    for id, number in last.items():
        wait_for_console(src, id, f"boots=2 last={number} broken=0")
    again = operator.run(*spread(operator, wanted))
    assert again.returncode == 0 and "All instances are on their hosts" in again.stderr
    asked = answering(operator, spread(operator, {"src-cmp1": list(NAMES)}), "no", "y")
    assert asked.returncode == 0 and "Move web-0 from src-cmp2 to src-cmp1? [y/N]" in asked.stderr, asked.stderr
    assert [place_of(src, three[name]) for name in NAMES] == ["src-cmp2", "src-cmp1", "src-cmp1"]
    with middle() as between:  # the answer to the request gets lost, and then Nova fails for a while
        between.spoil = lambda name, before: LOST if name == ASKED and not before else (
            "500" if name == "src GET server" and ASKED in between.seen and len(between.spoiled) < 4 else PASS)
        done = operator.run(*spread(operator, {"src-cmp1": list(NAMES)}, "-y"), env=between.environment)
    assert done.returncode == 0 and len(between.spoiled) == 4, done.stderr
    assert {place_of(src, id) for id in three.values()} == {"src-cmp1"}


def answering(operator: Operator, words: list[str], *answers: str) -> subprocess.CompletedProcess[str]:
    """A run on a terminal, where somebody gives these answers."""
    ours, theirs = os.openpty()
    with open(ours, "w") as keyboard, open(theirs) as terminal:
        keyboard.write("".join(f"{answer}\n" for answer in answers))
        keyboard.flush()
        process = subprocess.Popen(operator.words(*words), stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return ended(process)


def test_without_a_terminal_nothing_is_moved_unasked(operator: Operator, src: Api, three: dict[str, str]) -> None:
    wanted = {"src-cmp2": ["web-0"]}
    refused = operator.run(*spread(operator, wanted))
    assert refused.returncode == 3 and "-y" in refused.stderr
    planned = operator.run(*spread(operator, wanted, "-n"))
    assert planned.returncode == 0 and re.search(r"web-0 .* src-cmp1 +src-cmp2", planned.stderr) and place_of(src, three["web-0"]) == "src-cmp1"


@pytest.mark.parametrize(("wanted", "code", "words"), [
    ({"cmp9": ["web-0"], "src-cmp2": ["nobody"]}, 3, ("no compute host 'cmp9'", "no instance 'nobody'")),
    ('{"src-cmp2": [}', 2, ("line 1 column 15",)), ([], 2, ("not a map of hosts",))])
def test_a_map_that_cannot_be_is_refused(operator: Operator, three: dict[str, str], wanted: object, code: int, words: tuple[str, ...]) -> None:
    refused = operator.run(*spread(operator, wanted, "-y"))
    assert refused.returncode == code
    for word in words:
        assert word in refused.stderr


def test_whoever_is_no_admin_is_refused(operator: Operator, src: Api) -> None:
    login = {f"OS_{key.upper()}": value for key, value in credentials(src.cloud, "demo").items()}
    refused = operator.run("live-migrate", "--host-map", spread(operator, {"src-cmp1": ["web-0"]})[2], "-y", env=login)
    assert refused.returncode == 3 and "list servers: Policy doesn't allow" in refused.stderr, refused.stderr


def test_a_disabled_host_takes_nothing(operator: Operator, src: Api, three: dict[str, str]) -> None:
    (service,) = [one for one in src.call("GET", "nova", "/os-services?binary=nova-compute")["services"] if one["host"] == "src-cmp2"]
    src.call("PUT", "nova", f"/os-services/{service['id']}", {"status": "disabled"})
    try:
        refused = operator.run(*spread(operator, {"src-cmp2": ["web-0"]}, "-y"))
    finally:
        src.call("PUT", "nova", f"/os-services/{service['id']}", {"status": "enabled"})
    assert refused.returncode == 3 and "src-cmp2 is disabled" in refused.stderr


@contextmanager
def nearly_full(api: Api, host: str) -> Iterator[None]:
    """Placement has 64 MB left on a hypervisor, half of what a guest needs: the rest is allocated to what is no instance."""
    version, taken = {"OpenStack-API-Version": "placement 1.28"}, list[str]()
    (id,) = [one["uuid"] for one in api.call("GET", "placement", "/resource_providers")["resource_providers"] if one["name"].startswith(host)]
    memory = api.call("GET", "placement", f"/resource_providers/{id}/inventories")["inventories"]["MEMORY_MB"]
    servers = {one["id"] for one in api.call("GET", "nova", "/servers?all_tenants=1")["servers"]}
    while (there := api.call("GET", "placement", f"/resource_providers/{id}/allocations")["allocations"]).keys() - servers:
        time.sleep(0.5)  # what a migration holds yet of an instance that has left
    used = sum(one["resources"]["MEMORY_MB"] for one in there.values())
    left = int((memory["total"] - memory["reserved"]) * memory["allocation_ratio"]) - used - 64
    while left > 0:
        taken.append(str(uuid.uuid4()))
        api.call("PUT", "placement", f"/allocations/{taken[-1]}", {
            "allocations": {id: {"resources": {"MEMORY_MB": min(left, memory["max_unit"])}}}, "consumer_generation": None,
            "project_id": taken[0], "user_id": taken[0]}, version)
        left -= memory["max_unit"]
    try:
        yield
    finally:
        for consumer in taken:
            api.call("DELETE", "placement", f"/allocations/{consumer}")


def test_moves_wait_for_the_room_that_others_leave_and_a_ring_of_full_hosts_is_refused(
        operator: Operator, src: Api, three: dict[str, str]) -> None:
    assert operator.run(*spread(operator, {"src-cmp2": ["db-0"]}, "-y")).returncode == 0
    swap = spread(operator, {"src-cmp2": ["web-0"], "src-cmp1": ["db-0"]}, "-y")
    with nearly_full(src, "src-cmp2"):
        with nearly_full(src, "src-cmp1"):
            refused = operator.run(*swap)
        assert refused.returncode == 3, refused.stderr
        assert "room to begin: web-0 to src-cmp2 (too little MEMORY_MB), db-0 to src-cmp1 (too little MEMORY_MB)" in refused.stderr
        report = operator.report(*swap)
    assert [(row["name"], row["result"]) for row in report["moves"]] == [("db-0", "moved"), ("web-0", "moved")]
    assert [place_of(src, three[name]) for name in NAMES] == ["src-cmp2", "src-cmp1", "src-cmp1"]
    assert operator.run(*spread(operator, {"src-cmp1": list(NAMES)}, "-y")).returncode == 0


def test_a_move_that_nova_gives_up_is_reported_and_the_rest_goes_on_with_keep_going(
        operator: Operator, clouds: Clouds, src: Api, three: dict[str, str]) -> None:
    """Nova copies a disk to no host that has something in its place."""
    clouds.host("src-cmp2").run("mkdir", f"{DISKS}/{three['web-0']}")
    done = operator.run(*spread(operator, {"src-cmp2": ["web-0", "db-0"]}, "-y", "--keep-going"))
    assert done.returncode == 1 and "error: web-0 is ACTIVE on src-cmp1: migration" in done.stderr, done.stderr
    assert f"{three['web-0']}) already exists" in done.stderr and "1 of 2 instances were not moved: web-0" in done.stderr, done.stderr
    assert [place_of(src, three[name]) for name in NAMES] == ["src-cmp1", "src-cmp2", "src-cmp1"]
    writes_on(src, three["web-0"])
    clouds.host("src-cmp2").run("rm", "-rf", f"{DISKS}/{three['web-0']}")
    assert operator.run(*spread(operator, {"src-cmp1": list(NAMES)}, "-y")).returncode == 0


@pytest.fixture
def narrow(clouds: Clouds) -> Iterator[None]:
    """Both hypervisors' cables carry so little that no migration comes to its end."""
    hosts = [clouds.host(name) for name in ("src-cmp1", "src-cmp2")]
    for host in hosts:
        host.run("tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", "2mbit", "burst", "16kb", "latency", "400ms")
    yield
    for host in hosts:
        if host.alive():
            widen(host)


def widen(host: Host) -> None:
    """A cable carries what it can again."""
    host.run("tc", "qdisc", "del", "dev", "eth0", "root", check=False)


def under_way(operator: Operator) -> subprocess.Popen[str]:
    """A run whose migration goes on since five seconds."""
    process = operator.begin(*spread(operator, {"src-cmp2": ["web-0"]}, "-y", "--timeout", "5", "--keep-waiting"))
    assert process.stderr
    for line in process.stderr:
        if "still waiting" in line:
            return process
    raise AssertionError("it ended")


def is_back(src: Api, id: str) -> None:
    """Returns when an instance runs on the first hypervisor, and nothing is under way."""
    src.await_status(id, "ACTIVE")
    assert place_of(src, id) == "src-cmp1"


def test_a_migration_that_takes_too_long_is_ended_with_abort(
        operator: Operator, src: Api, three: dict[str, str], narrow: None) -> None:
    """Nova calls it failed where its look at libvirt, twice a second, comes too late to see it cancelled (find_job_type)."""
    done = operator.run(*spread(operator, {"src-cmp2": ["web-0"]}, "-y", "--timeout", "10", "--abort"))
    words = r"migration \d+ is (cancelled|failed): aborted by --abort"
    assert done.returncode == 1 and "aborting" in done.stderr and re.search(words, done.stderr), done.stderr
    is_back(src, three["web-0"])
    writes_on(src, three["web-0"])


def test_a_migration_that_takes_too_long_is_nova_s_and_may_be_waited_for(
        operator: Operator, clouds: Clouds, src: Api, three: dict[str, str], narrow: None) -> None:
    words = spread(operator, {"src-cmp2": ["web-0"]}, "-y", "--timeout", "5")
    left = operator.run(*words)
    assert left.returncode == 4 and re.search(r"left behind: migration \d+ of web-0 to src-cmp2 continues", left.stderr), left.stderr
    refused = operator.run(*words)
    assert refused.returncode == 3 and "web-0 is MIGRATING migrating, and cannot be" in refused.stderr, refused.stderr
    for name in ("src-cmp1", "src-cmp2"):
        widen(clouds.host(name))
    src.await_status(three["web-0"], "ACTIVE")
    assert place_of(src, three["web-0"]) == "src-cmp2"
    done = operator.run(*spread(operator, {"src-cmp1": ["web-0"]}, "-y", "--timeout", "1", "--keep-waiting"))
    assert done.returncode == 0 and "still waiting" in done.stderr, done.stderr
    is_back(src, three["web-0"])


def test_ctrl_c_leaves_a_migration_to_nova_and_says_so(operator: Operator, src: Api, three: dict[str, str], narrow: None) -> None:
    process = under_way(operator)
    process.send_signal(signal.SIGINT)
    done = ended(process)
    number, = re.findall(r"left behind: migration (\d+) of web-0 to src-cmp2 continues", done.stderr)
    assert done.returncode == 4
    src.call("DELETE", "nova", f"/servers/{three['web-0']}/migrations/{number}")
    is_back(src, three["web-0"])


def test_a_target_that_is_killed_in_mid_migration_costs_nothing(
        operator: Operator, clouds: Clouds, src: Api, three: dict[str, str], narrow: None) -> None:
    """By default TCP, and so libvirt and Nova, wait a quarter of an hour for a host that is gone."""
    clouds.host("src-cmp1").run("sysctl", "-qw", "net.ipv4.tcp_retries2=5")
    process = under_way(operator)
    clouds.host("src-cmp2").kill()
    widen(clouds.host("src-cmp1"))
    try:
        done = ended(process)
        assert done.returncode == 1 and "web-0 is ACTIVE on src-cmp1: migration" in done.stderr, done.stderr
        is_back(src, three["web-0"])
        writes_on(src, three["web-0"])
    finally:
        clouds.up()
