"""The main job on two real clouds, in every form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

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
    write_random,
)
from conftest import short_are
from lab.api import Api
from lab.clouds import Clouds
from migrena import SAMPLE

# Makes a disk of 2 GiB whose first blocks of 4 KiB hold random bytes and are holes in turn: PATH COUNT
SCATTER = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_TRUNC)
os.truncate(fd, 2 << 30)
for number in range(int(sys.argv[2])):
    os.pwrite(fd, os.urandom(4096), number * 8192)
os.fsync(fd)
"""


def test_what_the_report_says_is_what_happened(operator: Operator, clouds: Clouds, src: Api, dst: Api, source: str) -> None:
    one, other = clouds.host(SOURCE), clouds.host(DESTINATION)
    before, sent = one.run("sha256sum", disk(source)).stdout, one.counters()[1]
    report = operator.report("-s", source, *operator.to(DESTINATION))
    sent = one.counters()[1] - sent
    copy, id = report["copy"], report["destination"]["id"]
    assert (report["result"], report["started"], report["downtime_seconds"], report["not_undone"]) == ("done", [], None, [])
    assert (copy["view"], copy["why_view"], copy["tls"], copy["verified"]) == ("file", "both bases have the same content", True, True)
    assert 64 * MiB < copy["bytes"] < copy["sent"] < sent < copy["bytes"] * 1.03 + SAMPLE * 1.03 + 3 * MiB  # with the rehearsal
    assert copy["sent_per_held"] == pytest.approx(copy["sent"] / copy["bytes"], abs=1e-4)
    assert all(10 < report["api_calls"][cloud] < 100 for cloud in ("source", "destination"))
    assert all(10 < report["ssh_commands"][host] < 100 for host in (SOURCE, DESTINATION))
    assert {"Survey", "Migrate disk to destination instance"} < set(report["seconds"])
    assert copy["length"] == int(one.run("stat", "-c", "%s", disk(source)).stdout)
    assert one.run("sha256sum", disk(source)).stdout == before
    assert same_to_both_guests(one, source, other, id)
    assert left_on(one) == left_on(other) == []
    assert has_been_put_back(src, source, "SHUTOFF") and dst.server(id)["status"] == "SHUTOFF"
    assert report["destination"]["host"] == dst.server(id)["OS-EXT-SRV-ATTR:hypervisor_hostname"]


def test_hazard_a_rebase_that_needs_the_old_base_though_image_ids_differ(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, running: str) -> None:
    report = operator.report("-s", running, *operator.to(DESTINATION), "--no-tls", "-a", "dst")
    last = last_record(clouds.host(SOURCE), running)
    assert src.server(running)["image"]["id"] != dst.server(report["destination"]["id"])["image"]["id"]
    shown = wait_for_console(dst, report["destination"]["id"], "GUEST boots=")
    assert f"GUEST boots={boots(clouds.host(SOURCE), running) + 1} last={last} broken=0" in shown
    assert report["started"] == ["destination"] and report["copy"]["tls"] is False and report["downtime_seconds"] > 0
    assert has_moved(src, running, report["destination"]["id"])


def test_the_source_can_be_started_instead(operator: Operator, clouds: Clouds, src: Api, dst: Api, source: str) -> None:
    report = operator.report("-s", source, *operator.to(DESTINATION), "--transport", "qemu", "--no-verify", "-a", "src")
    id = report["destination"]["id"]
    assert report["copy"]["verified"] is False and report["started"] == ["source"]
    assert has_been_put_back(src, source, "ACTIVE") and dst.server(id)["status"] == "SHUTOFF"
    src.act(source, "os-stop", until="SHUTOFF")


def test_flavor_and_image_are_matched_with_every_kind_of_credentials_and_both_are_started(
        operator: Operator, src: Api, dst: Api, running: str, application: dict[str, str], clouds_yaml: Path) -> None:
    words = ("-s", running, *operator.to(DESTINATION, flavor="", image=""), "--dst-cloud", "there", "-a")
    report = operator.report(*words, extra=f"SRC_CREDS = {application}", env={"OS_CLIENT_CONFIG_FILE": str(clouds_yaml)})
    server = dst.server(report["destination"]["id"])
    assert (server["flavor"]["original_name"], server["image"]["id"]) == ("tiny", dst.need("glance", "images", "guest"))
    assert report["started"] == ["destination", "source"] and server["status"] == "ACTIVE"
    assert has_been_put_back(src, running, "ACTIVE")


def test_hazard_the_two_bases_are_not_equal(operator: Operator, clouds: Clouds, source: str) -> None:
    report = operator.report("-s", source, *operator.to(DESTINATION, image="guest-other"), "--compress", "on")
    assert report["copy"]["compressed"] and report["copy"]["sent"] < 1.1 * report["copy"]["bytes"]
    assert (report["copy"]["view"], report["copy"]["why_view"]) == ("guest", "the bases are not proven equal")
    assert same_to_both_guests(clouds.host(SOURCE), source, clouds.host(DESTINATION), report["destination"]["id"])


@pytest.mark.long
def test_hazard_21_an_unshelved_instance_stands_on_the_shelve_s_snapshot_and_not_on_the_image_that_nova_names(
        operator: Operator, clouds: Clouds, src: Api, dst: Api) -> None:
    id = src.create("shelved", availability_zone=f"nova:{SOURCE}")
    services = src.call("GET", "nova", "/os-services?binary=nova-compute")["services"]
    other = next(service["id"] for service in services if service["host"] == "src-cmp2")
    src.call("PUT", "nova", f"/os-services/{other}", {"status": "disabled"})  # its disks are raw
    try:
        src.act(id, "os-stop", until="SHUTOFF")
        write_random(clouds.host(SOURCE), id, (8 * MiB, 8 * MiB))
        src.act(id, "shelve", until="SHELVED_OFFLOADED")
        src.act(id, "unshelve", until="ACTIVE")
        src.act(id, "os-stop", until="SHUTOFF")
        assert src.server(id)["image"]["id"] == src.need("glance", "images", "guest")
        report = operator.report("-s", id, *operator.to(DESTINATION, image=""))  # matched with the one that Nova names
        arrived = report["destination"]["id"]
        assert dst.server(arrived)["image"]["id"] == dst.need("glance", "images", "guest")
        is_file = report["copy"]["view"] == "file"  # this Nova may have put the image's base below it again
        assert report["copy"]["why_view"] == ("both bases have the same content" if is_file else "the bases are not proven equal")
        assert same_to_both_guests(clouds.host(SOURCE), id, clouds.host(DESTINATION), arrived)
        shown = clouds.host(DESTINATION).run("qemu-img", "info", "--output=json", disk(arrived)).stdout
        assert ("backing-filename" in json.loads(shown)) == is_file
    finally:
        src.call("PUT", "nova", f"/os-services/{other}", {"status": "enabled"})
        src.delete(id)


@pytest.fixture(scope="module")
def raw_source(src: Api) -> Iterator[str]:
    """The id of a stopped instance whose disk is raw."""
    id = src.create("raw", flavor="small", availability_zone="nova:src-cmp2")
    src.act(id, "os-stop", until="SHUTOFF")
    yield id
    src.delete(id)


@pytest.mark.parametrize(("place", "view", "fragments"), short_are(
    [("dst-cmp1", "guest", 2_000)], [("dst-cmp1", "guest", 2_000), ("dst-cmp2", "file", 200_000)]))
def test_hazard_no_backing_file_but_a_raw_disk_of_many_fragments(
        operator: Operator, clouds: Clouds, source: str, raw_source: str, place: str, view: str, fragments: int) -> None:
    one = clouds.host("src-cmp2")
    one.run("python3", "-c", SCATTER, disk(raw_source), str(fragments))
    sent = one.counters()[1]
    report = operator.report("-s", raw_source, *operator.to(place, flavor="small"))
    # the holes stayed off the wire, and so did all but the rehearsal
    assert report["copy"]["bytes"] == fragments * 4096 < one.counters()[1] - sent < fragments * 4096 * 1.4 + SAMPLE * 1.03 + 3 * MiB
    assert report["copy"]["view"] == view
    assert same_to_both_guests(one, raw_source, clouds.host(place), report["destination"]["id"])


def test_hazard_the_destination_uses_raw_disks(operator: Operator, clouds: Clouds, source: str) -> None:
    report = operator.report("-s", source, *operator.to("dst-cmp2"))
    assert report["copy"]["view"] == "guest"
    assert same_to_both_guests(clouds.host(SOURCE), source, clouds.host("dst-cmp2"), report["destination"]["id"])


@pytest.mark.long
def test_a_disk_of_10_gib_with_2_gib_of_data(operator: Operator, clouds: Clouds, src: Api, source: str) -> None:
    one, other = clouds.host(SOURCE), clouds.host(DESTINATION)
    large = src.create("large", flavor="large", availability_zone=f"nova:{SOURCE}")
    try:
        src.act(large, "os-stop", until="SHUTOFF")
        write_random(one, large, *((offset * 160 * MiB, 32 * MiB) for offset in range(1, 65)))
        before, sent = one.run("sha256sum", disk(large)).stdout, one.counters()[1]
        report = operator.report("-s", large, *operator.to(DESTINATION, flavor="large"))
        assert 2048 * MiB < report["copy"]["bytes"] < one.counters()[1] - sent < report["copy"]["bytes"] * 1.02
        assert one.run("sha256sum", disk(large)).stdout == before
        assert same_to_both_guests(one, large, other, report["destination"]["id"])
    finally:
        src.delete(large)


def test_a_user_with_sudo_behind_a_jump_host_and_another_port(operator: Operator, clouds: Clouds, source: str) -> None:
    one, other = clouds.host(SOURCE), clouds.host(DESTINATION)
    config = operator.folder / "ssh_config"
    config.write_text(f"Host {other.address}\n  ProxyJump operator@{one.address}:2222\n"
                      f"Host *\n  IdentityFile {one.key}\n  UserKnownHostsFile {one.known_hosts}\n")
    row = {"port": 2222, "user": "operator", "key": str(one.key)}
    settings = {"HOSTS": {host.name: {"address": host.address, **row} for host in (one, other)}, "SSH_CONFIG": str(config), "KNOWN_HOSTS": ""}
    report = operator.report("-s", source, *operator.to(DESTINATION), extra="\n".join(f"{name} = {value!r}" for name, value in settings.items()))
    assert same_to_both_guests(one, source, other, report["destination"]["id"])


def test_hazard_no_two_runs_at_once(operator: Operator, clouds: Clouds, src: Api, source: str) -> None:
    one, other = clouds.host(SOURCE), clouds.host(DESTINATION)
    second = src.create("second", availability_zone=f"nova:{SOURCE}")
    try:
        runs = {id: operator.begin("-s", id, *operator.to(DESTINATION, name=f"arrived-{id[:4]}"), "--json", "--limit-rate", "20M")
                for id in (source, second)}
        for id, run in runs.items():
            done = ended(run)
            assert done.returncode == 0, done.stderr
            assert same_to_both_guests(one, id, other, json.loads(done.stdout)["destination"]["id"])
        assert left_on(one) == left_on(other) == []
    finally:
        src.delete(second)


AWKWARD = "-rf $(touch /root/oops) `id` 'it\"s' ; \\n %s {} ☃ größe 大 "


def test_names_from_the_clouds_that_would_harm_a_shell_do_none(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, source: str) -> None:
    """Instance, flavor, image and destination have such names, the instances' as long as Nova takes them."""
    name, base = (AWKWARD * 9)[:250].strip() + " web", dst.need("glance", "images", "guest")
    patch = {"Content-Type": "application/openstack-images-v2.1-json-patch"}
    src.call("PUT", "nova", f"/servers/{source}", {"server": {"name": name}})
    dst.call("PATCH", "glance", f"/images/{base}", [{"op": "replace", "path": "/name", "value": f"{AWKWARD}image"}], patch)
    sizes = {"vcpus": 1, "ram": 128, "disk": 1, "name": f"{AWKWARD[1:]}flavor"}
    flavor = dst.call("POST", "nova", "/flavors", {"flavor": sizes})["flavor"]["id"]
    try:
        words = operator.to(DESTINATION, image="", name="", flavor="")
        done = operator.run("-s", source, f"--dst-name={name}", f"--flavor={sizes['name']}", f"--image-id={AWKWARD}image", *words)
        assert done.returncode == 0, done.stderr
        assert dst.server(done.stdout.strip())["name"] == name
        assert same_to_both_guests(clouds.host(SOURCE), source, clouds.host(DESTINATION), done.stdout.strip())
        assert operator.last_run in (shown := operator.run("status", operator.last_run).stdout) and name in shown
        assert all(host.run("find", "/root", "-name", "oops").stdout == "" for host in (clouds.host(SOURCE), clouds.host(DESTINATION)))
    finally:
        src.call("PUT", "nova", f"/servers/{source}", {"server": {"name": "source"}})
        dst.call("PATCH", "glance", f"/images/{base}", [{"op": "replace", "path": "/name", "value": "guest"}], patch)
        dst.call("DELETE", "nova", f"/flavors/{flavor}")
