"""The main job over nbd-server and nbd-client: the destination's hypervisor is a virtual machine with a kernel and an nbd module of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest

from clouds.conftest import HYPERVISORS, SOURCE, MiB, Operator, disk, ended, format_of, has_been_put_back, last_record, left_on, wait_for_console
from lab.api import Api
from lab.clouds import Clouds
from lab.hosts import Host

MACHINE = "dst-vm1"
# A virtual machine without KVM boots, joins the cloud and starts a guest, which is emulated twice.
pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]
PATIENCE = 900.0  # seconds for Nova to make an instance there, and for a guest to boot, while other tests have the cores


@pytest.fixture(scope="module")
def machine(clouds: Clouds) -> Iterator[Host]:
    """A virtual machine that has joined the destination cloud, and leaves it again."""
    more = Clouds(HYPERVISORS.with_hosts(MACHINE))
    more.up()
    yield more.host(MACHINE)
    more.host(MACHINE).kill()
    HYPERVISORS.keep()


def seen_by_guest(host: Host, id: str) -> str:
    """The sha256 of all that a guest sees on its disk, by qemu-img on its own host."""
    script = 'qemu-img convert -f "$1" -O raw "$2" /var/lib/nova/flat; sha256sum < /var/lib/nova/flat; rm /var/lib/nova/flat'
    return host.run("sh", "-ec", script, "sh", format_of(host, id), disk(id)).stdout


def test_an_instance_goes_over_nbd_server_and_nbd_client_and_boots(
        operator: Operator, clouds: Clouds, machine: Host, src: Api, dst: Api, source: str) -> None:
    one = clouds.host(SOURCE)
    before, seen = one.run("sha256sum", disk(source)).stdout, seen_by_guest(one, source)
    report = replace(operator, patience=PATIENCE).report("-s", source, *operator.to(MACHINE))
    copy, id = report["copy"], report["destination"]["id"]
    assert (copy["transport"], copy["why_transport"]) == ("nbd", "nbd-server and nbd-client are available")
    assert copy["tls"] and copy["verified"] and copy["bytes"] > 64 * MiB
    assert seen_by_guest(machine, id) == seen
    assert one.run("sha256sum", disk(source)).stdout == before
    assert machine.run("cat", "/sys/block/nbd0/size").stdout == "0\n"
    assert json.loads(machine.run("qemu-img", "info", "--output=json", disk(id)).stdout)["backing-filename-format"] == "raw"
    assert has_been_put_back(src, source, "SHUTOFF")
    dst.act(id, "os-start", until="ACTIVE")
    assert f"last={last_record(one, source)} broken=0" in wait_for_console(dst, id, "GUEST boots=", PATIENCE, 15)


def test_a_hypervisor_that_is_killed_outright_in_mid_copy_costs_nothing_but_the_copy(
        operator: Operator, clouds: Clouds, machine: Host, src: Api, dst: Api, source: str) -> None:
    """Nova deletes an instance without its host when it takes the host for dead, a minute later; whoever asks before is not heard."""
    before = clouds.host(SOURCE).run("sha256sum", disk(source)).stdout
    process = operator.at_a_third("-s", source, *operator.to(MACHINE), "--stall-timeout", "10", "--retries", "1")
    machine.kill()
    done = ended(process, PATIENCE)
    assert done.returncode == 4 and "attempt 2 of 2 follows" in done.stderr and f"{MACHINE} did not confirm the end" in done.stderr, done.stderr
    assert clouds.host(SOURCE).run("sha256sum", disk(source)).stdout == before
    assert has_been_put_back(src, source, "SHUTOFF") and not dst.find("nova", "servers", "arrived")
    assert left_on(clouds.host(SOURCE)) == []
