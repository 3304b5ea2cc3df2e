"""A seed on real clouds: updated while its guest writes, cut over to days later, whatever was done meanwhile; and back without an answer."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clouds.conftest import (
    DESTINATION,
    SOURCE,
    MiB,
    Operator,
    boots,
    ended,
    has_been_put_back,
    has_moved,
    last_record,
    left_on,
    wait_for_console,
)
from clouds.test_refusals import resize
from clouds.test_warm import went_on
from lab.api import Api
from lab.clouds import Clouds
from lab.guest import guest_image
from lab.processes import wait_until

pytestmark = pytest.mark.timeout(900)
ANSWERS = "console:GUEST boots=\\d+ last=\\d+ broken=0"


def seed(operator: Operator, source: str, *words: str) -> str:
    """The run of a new seed."""
    report = operator.report("-s", source, *operator.to(DESTINATION), "-a", "dst", "--seed", *words)
    assert report["result"] == "seeded" and report["started"] == [] and report["downtime_seconds"] is None
    return str(report["run"])


def is_seeded(src: Api, dst: Api, source: str, run: str) -> str:
    """The id of the destination, which is stopped and locked, while the source runs and is marked."""
    (made,) = dst.call("GET", "nova", "/servers/detail?all_tenants=1")["servers"]
    server = src.server(source)
    assert (made["status"], made["locked"], made["metadata"]["migrena:made"]) == ("SHUTOFF", True, run)
    assert (server["status"], server["locked"], server["metadata"]["migrena:run"]) == ("ACTIVE", False, run)
    return str(made["id"])


def test_a_seed_is_updated_and_cut_over_to_without_a_record_lost(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, running: str) -> None:
    run = seed(operator, running)
    id = is_seeded(src, dst, running, run)
    for _ in range(3):
        time.sleep(3)
        report = operator.report("resume", run, "--seed")
        assert report["result"] == "seeded" and report["copy"]["passes"][0]["changed"] < 32 * MiB
        assert is_seeded(src, dst, running, run) == id
    shown = operator.run("status", run)
    assert re.search(r"seed +\S+ \S+ old; in the last pass .* had changed; stopped now, it would be down for about", shown.stdout)
    report = operator.report("resume", run, "--await", ANSWERS)
    assert report["result"] == "done" and report["answer_seconds"] > 0 and report["copy"]["bytes"] < 32 * MiB
    went_on(clouds, dst, running, id)
    assert has_moved(src, running, id) and left_on(clouds.host(SOURCE)) == left_on(clouds.host(DESTINATION)) == []


def test_a_seed_that_is_not_wanted_is_removed(operator: Operator, clouds: Clouds, src: Api, dst: Api, running: str) -> None:
    run = seed(operator, running)
    done = operator.run("rollback", run)
    assert done.returncode == 0, done.stderr
    assert has_been_put_back(src, running, "ACTIVE") and not dst.find("nova", "servers", "arrived")
    assert left_on(clouds.host(SOURCE)) == left_on(clouds.host(DESTINATION)) == []


def restart(src: Api, id: str) -> None:
    src.act(id, "os-stop", until="SHUTOFF")
    src.act(id, "os-start", until="ACTIVE")


def reboot(src: Api, id: str) -> None:
    src.call("POST", "nova", f"/servers/{id}/action", {"reboot": {"type": "HARD"}})
    wait_until("the reboot", lambda: not src.server(id)["OS-EXT-STS:task_state"] and src.server(id)["status"] == "ACTIVE", 120)


def snapshot(src: Api, id: str) -> None:
    src.call("POST", "nova", f"/servers/{id}/action", {"createImage": {"name": "before-the-move"}})
    wait_until("the snapshot", lambda: not src.server(id)["OS-EXT-STS:task_state"] and (
        src.find("glance", "images", "before-the-move") or {}).get("status") == "active", 240)
    src.call("DELETE", "glance", f"/images/{src.need('glance', 'images', 'before-the-move')}")


@pytest.mark.long
@pytest.mark.parametrize("what", [restart, reboot, snapshot])
def test_what_happens_to_a_source_between_seed_and_cut_over_arrives(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, running: str, what: object) -> None:
    run = seed(operator, running)
    assert callable(what)
    what(src, running)
    wait_for_console(src, running, "GUEST wrote=")
    report = operator.report("resume", run, "--await", ANSWERS)
    went_on(clouds, dst, running, report["destination"]["id"])
    assert has_moved(src, running, report["destination"]["id"])


@pytest.fixture
def movable(clouds: Clouds, src: Api, running: str) -> Iterator[str]:
    """The running instance, for which both of its cloud's hypervisors have disks of one kind; it is on the first again afterwards."""
    clouds.set_images_type("src-cmp2", "qcow2")
    yield running
    if src.server(running)["OS-EXT-SRV-ATTR:host"] != SOURCE:
        if src.server(running)["locked"]:
            src.act(running, "unlock")
        if src.server(running)["status"] != "ACTIVE":
            src.act(running, "os-start", until="ACTIVE")
        move(src, running, SOURCE)
    clouds.set_images_type("src-cmp2", "raw")


def move(src: Api, id: str, host: str) -> None:
    """Live-migrates an instance."""
    src.call("POST", "nova", f"/servers/{id}/action", {"os-migrateLive": {"host": host, "block_migration": "auto"}})
    wait_until("the live migration", lambda: src.server(id)["OS-EXT-SRV-ATTR:host"] == host and src.server(id)["status"] == "ACTIVE", 240)


@pytest.mark.long
def test_a_source_that_was_live_migrated_after_its_seed_is_found_where_it_is(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, movable: str) -> None:
    run = seed(operator, movable)
    move(src, movable, "src-cmp2")
    assert operator.report("resume", run, "--seed")["result"] == "seeded"
    report = operator.report("resume", run, "--await", ANSWERS)
    shown = wait_for_console(dst, report["destination"]["id"], "GUEST boots=")
    assert f"last={last_record(clouds.host('src-cmp2'), movable)} broken=0" in shown  # how often it had booted is on the other's console


@pytest.mark.long
def test_a_destination_that_somebody_started_is_repaired_and_reported(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, running: str) -> None:
    run = seed(operator, running)
    id = is_seeded(src, dst, running, run)
    dst.act(id, "os-start", until="ACTIVE")
    done = operator.run("resume", run, "--seed")
    assert done.returncode == 3 and f"the destination {id} (ACTIVE) runs or has run" in done.stderr
    dst.act(id, "os-stop", until="SHUTOFF")
    report = operator.report("resume", run)
    assert any("was started after the seed" in warning for warning in report["warnings"])
    went_on(clouds, dst, running, id)


def test_a_source_comes_back_by_itself_when_the_destination_does_not_answer(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, running: str) -> None:
    wait_for_console(src, running, "GUEST wrote=")
    begun = boots(clouds.host(SOURCE), running)
    done = operator.run("-s", running, *operator.to(DESTINATION), "--warm", "-a", "dst", "--await", "console:never said",
                        "--await-timeout", "10s", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 4 and report["result"] == "left", done.stderr
    (made,) = dst.call("GET", "nova", "/servers/detail?all_tenants=1")["servers"]
    assert (made["status"], made["locked"]) == ("SHUTOFF", True) and "is ACTIVE again" in report["not_undone"][1]
    server = src.server(running)
    assert (server["status"], server["locked"]) == ("ACTIVE", False)
    wait_for_console(src, running, f"GUEST boots={begun + 1} ")
    wait_for_console(src, running, "GUEST wrote=")
    report = operator.report("resume", report["run"], "--await", ANSWERS)  # what its guest wrote meanwhile is not lost
    went_on(clouds, dst, running, made["id"])
    assert has_moved(src, running, made["id"])


@pytest.mark.long
def test_a_guest_that_cannot_boot_there_gives_the_source_back(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, running: str) -> None:
    """Its disk has code for a BIOS, and the firmware there is UEFI."""
    wait_for_console(src, running, "GUEST wrote=")
    begun, image = boots(clouds.host(SOURCE), running), dst.upload("other-firmware", guest_image(), hw_firmware_type="uefi")
    try:
        done = operator.run("-s", running, *operator.to(DESTINATION, image="other-firmware"), "--ignore-properties", "-a", "dst",
                            "--await", ANSWERS, "--await-timeout", "30s", "--json")
        report = json.loads(done.stdout)
        assert done.returncode == 4 and "is ACTIVE again" in report["not_undone"][1], done.stderr
        wait_for_console(src, running, f"GUEST boots={begun + 1} ")
        assert operator.run("rollback", report["run"]).returncode == 0
        assert has_been_put_back(src, running, "ACTIVE") and not dst.find("nova", "servers", "arrived")
    finally:
        dst.call("DELETE", "glance", f"/images/{image}")


@pytest.mark.long
def test_an_answer_that_comes_late_is_waited_for(operator: Operator, dst: Api, running: str, tmp_path: Path) -> None:
    process = operator.begin("-s", running, *operator.to(DESTINATION), "-a", "dst", "--await", f"command:test -e {tmp_path}/answers", "--json")
    assert process.stderr
    while "Wait for the answer" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(10)
    (tmp_path / "answers").touch()
    done = ended(process)
    assert done.returncode == 0 and json.loads(done.stdout)["answer_seconds"] > 9, done.stderr


@pytest.mark.long
def test_a_source_that_was_resized_after_its_seed_is_refused_by_name(operator: Operator, src: Api, dst: Api, running: str) -> None:
    id = src.create("to-resize", availability_zone="nova:src-cmp1")
    try:
        wait_for_console(src, id, "GUEST wrote=")
        run = seed(operator, id)
        resize(src, id)
        done = operator.run("resume", run)
        assert done.returncode == 3 and "the source is VERIFY_RESIZE" in done.stderr
        src.act(id, "confirmResize", until="ACTIVE")
        done = operator.run("resume", run)
        assert done.returncode == 3 and "the source was resized" in done.stderr, done.stderr
        assert operator.run("rollback", run).returncode == 0 and dst.find("nova", "servers", "arrived") is None
    finally:
        src.delete(id)


@pytest.mark.long
def test_a_stopped_source_is_cut_over_to_at_once_and_stays_as_it_was_if_that_fails(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, running: str) -> None:
    run = seed(operator, running)
    src.act(running, "os-stop", until="SHUTOFF")
    done = operator.run("resume", run, "--seed")
    assert done.returncode == 3 and "nothing to copy while it runs" in done.stderr
    done = operator.run("resume", run, "--await", "console:never said", "--await-timeout", "5s")
    assert done.returncode == 4 and "is SHUTOFF again" in done.stderr, done.stderr
    last = last_record(clouds.host(SOURCE), running)
    report = operator.report("resume", run, "--await", ANSWERS)
    shown = wait_for_console(dst, report["destination"]["id"], "GUEST boots=")
    assert f"last={last} broken=0" in shown and report["downtime_seconds"] is None
