"""A warm copy on real clouds: a guest that writes records all the time goes on with the next one in the destination, and none is torn or lost."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest

from clouds.conftest import (
    DESTINATION,
    SOURCE,
    MiB,
    Operator,
    boots,
    disk,
    ended,
    has_been_put_back,
    has_moved,
    last_record,
    left_on,
    same_to_both_guests,
    wait_for_console,
)
from lab.api import Api
from lab.clouds import Clouds
from lab.hosts import Host


def went_on(clouds: Clouds, dst: Api, source: str, id: str, host: str = SOURCE) -> None:
    """The new instance has booted once more than the source, and found all records up to the last one that was written there."""
    shown = wait_for_console(dst, id, "GUEST boots=")
    one = clouds.host(host)
    assert f"GUEST boots={boots(one, source) + 1} last={last_record(one, source)} broken=0" in shown


def carries_no_bitmap(host: Host, source: str) -> bool:
    """Neither the source's file nor the qemu that may run on it has a bitmap of ours, and libvirt knows of no checkpoint."""
    if host.run("virsh", "-q", "domstate", source).stdout.strip() == "running":
        shown = host.run("virsh", "qemu-monitor-command", source, '{"execute": "query-named-block-nodes"}').stdout
    else:
        shown = host.run("qemu-img", "info", disk(source)).stdout
    return "migrena-" not in shown and not host.run("virsh", "-q", "checkpoint-list", source).stdout.strip()


@pytest.mark.parametrize("words", [(), ("--limit-rate", "60M", "--no-tls"), ("--bitmap",)])
def test_a_guest_that_writes_goes_on_with_its_next_record(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, running: str, words: tuple[str, ...]) -> None:
    report = operator.report("-s", running, *operator.to(DESTINATION), "--warm", "-a", "dst", *words)
    copy, id = report["copy"], report["destination"]["id"]
    assert (copy["view"], copy["verified"], report["started"]) == ("file", True, ["destination"])
    assert len(copy["passes"]) >= 2 and copy["passes"][0]["changed"] > 64 * MiB > copy["bytes"]
    assert report["downtime_seconds"] > 0 and not report["warnings"]
    assert (copy["proven_by_bitmap"] > 48 * MiB) == ("--bitmap" in words) and carries_no_bitmap(clouds.host(SOURCE), running)
    went_on(clouds, dst, running, id)
    assert has_moved(src, running, id)
    assert left_on(clouds.host(SOURCE)) == left_on(clouds.host(DESTINATION)) == []


def test_what_a_running_guest_sees_goes_over_where_the_bases_differ(
        operator: Operator, clouds: Clouds, dst: Api, running: str) -> None:
    report = operator.report("-s", running, *operator.to(DESTINATION, image="guest-other"), "--warm", "--bitmap")
    id = report["destination"]["id"]
    assert report["copy"]["view"] == "guest"
    assert report["warnings"] == ["no dirty bitmap: what the guest sees is copied, not the file"]
    assert same_to_both_guests(clouds.host(SOURCE), running, clouds.host(DESTINATION), id)
    dst.act(id, "os-start", until="ACTIVE")
    went_on(clouds, dst, running, id)


@pytest.fixture
def raw(src: Api) -> Iterator[str]:
    """The id of a running instance whose disk is raw."""
    id = src.create("raw", availability_zone="nova:src-cmp2")
    wait_for_console(src, id, "GUEST wrote=")
    yield id
    src.delete(id)


def test_a_raw_disk_goes_over_while_its_guest_writes(operator: Operator, clouds: Clouds, dst: Api, raw: str, source: str) -> None:
    report = operator.report("-s", raw, *operator.to("dst-cmp2"), "--warm", "--bitmap", "-a", "dst")
    assert (report["copy"]["view"], report["copy"]["why_view"]) == ("file", "both disks are raw")
    assert "no dirty bitmap: a raw disk has none" in report["warnings"]
    went_on(clouds, dst, raw, report["destination"]["id"], "src-cmp2")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_instance_whose_warm_copy_was_interrupted_runs_on(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, running: str, number: signal.Signals) -> None:
    wait_for_console(src, running, "GUEST boots=")
    started = boots(clouds.host(SOURCE), running)
    process = operator.begin("-s", running, *operator.to(DESTINATION), "--warm", "--bitmap", "--limit-rate", "8M")
    assert process.stderr
    while "has the dirty bitmap" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(number)
    assert ended(process).returncode == (128 + number if number == signal.SIGINT else -number)
    assert src.server(running)["status"] == "ACTIVE" and boots(clouds.host(SOURCE), running) == started
    if number == signal.SIGKILL:
        done = operator.run("rollback", operator.last_run)
        assert done.returncode == 0, done.stderr
    assert has_been_put_back(src, running, "ACTIVE") and not dst.find("nova", "servers", "arrived")
    assert boots(clouds.host(SOURCE), running) == started and carries_no_bitmap(clouds.host(SOURCE), running)


def test_a_run_that_was_killed_goes_on_with_a_bitmap_of_its_own(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, running: str) -> None:
    process = operator.begin("-s", running, *operator.to(DESTINATION), "--warm", "--bitmap", "--limit-rate", "60M", "-a", "dst")
    assert process.stderr
    while "Pass 1: " not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    assert ended(process).returncode == -signal.SIGKILL
    done = operator.run("resume", operator.last_run, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["copy"]["proven_by_bitmap"] > 48 * MiB and carries_no_bitmap(clouds.host(SOURCE), running)
    went_on(clouds, dst, running, report["destination"]["id"])
    assert has_moved(src, running, report["destination"]["id"])


@pytest.mark.parametrize(("line", "number"), [
    ("Stop source instance", signal.SIGINT), ("Stop source instance", signal.SIGKILL), ("Migrate disk to", signal.SIGKILL)])
def test_a_source_that_is_started_again_carries_no_bitmap(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, running: str, line: str, number: signal.Signals) -> None:
    process = operator.begin("-s", running, *operator.to(DESTINATION), "--warm", "--bitmap", "--no-tls")
    assert process.stderr
    while line not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(number)
    assert ended(process).returncode == (128 + number if number == signal.SIGINT else -number)
    if number == signal.SIGKILL:
        done = operator.run("rollback", operator.last_run)
        assert done.returncode == 0, done.stderr
    assert has_been_put_back(src, running, "ACTIVE") and not dst.find("nova", "servers", "arrived")
    assert carries_no_bitmap(clouds.host(SOURCE), running)
    assert "broken=0" in wait_for_console(src, running, "GUEST boots=")
