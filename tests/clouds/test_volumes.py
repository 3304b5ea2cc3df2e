"""Instances whose disks are volumes or lie on Ceph: each arrives on whatever the destination has, or nothing of it is left."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from clouds.conftest import MACHINE, STORAGE, WITH_MACHINE, MiB, Operator, as_before, ended, has_been_put_back, left_on, wait_for_console
from clouds.middle import LATE, LOST, middle
from lab.api import Api
from lab.ceph import Cluster
from lab.clouds import Clouds
from lab.guest import guest_image
from lab.hosts import Host
from lab.processes import command, wait_until
from lab.roster import Roster
from lab.volumes import exported

pytestmark = pytest.mark.timeout(900)
KILL = signal.SIGKILL.value
BLANK = {"source_type": "blank", "destination_type": "local", "boot_index": -1, "delete_on_termination": True}
PLACES = ((0, 3 * MiB), (500 * MiB + 4096, 5 * MiB), (1020 * MiB, 4 * MiB))


def disks(clouds: Clouds, place: str, id: str) -> dict[str, ElementTree.Element]:
    """The disks of a stopped instance's domain, by their names in the guest."""
    tree = ElementTree.fromstring(clouds.host(place).run("virsh", "dumpxml", "--inactive", id).stdout)
    return {disk.find("target").get("dev", ""): disk for disk in tree.iterfind("devices/disk") if disk.get("device") == "disk"}  # type: ignore[union-attr]


def opened(clouds: Clouds, place: str, disk: ElementTree.Element) -> str:
    """A disk as this machine's own qemu opens it."""
    source, driver = disk.find("source"), disk.find("driver")
    assert source is not None and driver is not None
    cloud = clouds.api(place[:3]).cloud
    if disk.get("type") == "network":
        pool, _, image = source.get("name", "").partition("/")
        return f"driver=raw,file.driver=rbd,file.pool={pool},file.image={image},file.conf={Cluster(cloud).folder}/ceph.conf"
    path = source.get("file", "")
    if (serial := disk.findtext("serial")):
        return f"driver={driver.get('type')},file.filename={exported(cloud)}/volume-{serial}"
    root = clouds.host(place).root
    opts, below = f"driver={driver.get('type')},file.filename={root}{path}", f"{root}/var/lib/nova/instances/_base"
    backing = re.search(r"backing file: \S*/(\S+)", clouds.host(place).run("qemu-img", "info", path).stdout)
    return f"{opts},backing.driver=raw,backing.file.filename={below}/{backing[1]}" if backing else opts


def same(clouds: Clouds, source: str, id: str, place: str, arrived: str) -> dict[str, bool]:
    """Of each disk whether qemu-img, which has no part in migrena's proof, finds both equal."""
    one, other = disks(clouds, source, id), disks(clouds, place, arrived)
    assert [(name, disk.find("target").get("bus")) for name, disk in one.items()] == [  # type: ignore[union-attr]
        (name, disk.find("target").get("bus")) for name, disk in other.items()]  # type: ignore[union-attr]
    return {name: subprocess.run(["qemu-img", "compare", "--image-opts", opened(clouds, source, disk), opened(clouds, place, other[name])],
                                 check=False, capture_output=True).returncode == 0 for name, disk in one.items()}


def fill(clouds: Clouds, place: str, id: str, folder: Path, *names: str) -> None:
    """Random bytes at some places of these disks of a stopped instance."""
    found = disks(clouds, place, id)
    for name in names:
        for offset, length in PLACES:
            noise = folder / "noise"
            command("sh", "-c", 'head -c "$1" /dev/urandom > "$2"', "sh", str(length), noise)
            command("qemu-io", "-c", f"write -q -s {noise} {offset} {length}", "--image-opts", opened(clouds, place, found[name]))


@pytest.fixture(scope="module")
def source_of(storage: Clouds, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Makes an instance with these volumes attached, runs it once, and stops it; all is deleted in the end."""
    api, made, volumes = storage.api("src"), list[str](), list[str]()

    def make(*types: str, place: str = "src-cmp1", again: int = -1, **more: Any) -> str:
        id = api.create(f"source-{uuid.uuid4().hex[:6]}", availability_zone=f"nova:{place}", **more)
        made.append(id)
        wait_for_console(api, id, "GUEST wrote=")
        own = [api.create_volume(f"data {number}", volume_type=type, description=f"number {number}", metadata={"tier": str(number)})
               for number, type in enumerate(types)]
        volumes.extend(own)
        for volume in own:
            api.attach(id, volume)
        if again >= 0:
            api.detach(id, own[again])
            api.attach(id, own[again])
        api.act(id, "os-stop", until="SHUTOFF")
        fill(storage, place, id, tmp_path_factory.mktemp("noise"), *(name for name in disks(storage, place, id) if name != "vda"))
        return id

    yield make
    for id in made:
        api.delete(id)
    for volume in volumes:
        api.delete_volume(volume)


@pytest.fixture(scope="module")
def laden(source_of: Callable[..., str]) -> str:
    """The id of an instance with a root disk and three volumes of one size, one of which was attached again."""
    return source_of("nfs", "rbd", "nfs", again=0)


@pytest.fixture
def empty(storage: Clouds, laden: str) -> Iterator[Api]:
    """The destination without instances and volumes, before and after; the source is as it was."""
    src, dst = storage.api("src"), storage.api("dst")

    def clear() -> None:
        as_before(src, dst, laden)
        for volume in dst.volumes():
            dst.delete_volume(volume["id"])

    clear()
    yield dst
    clear()


def words(operator: Operator, id: str, place: str = "dst-cmp1", image: str = "guest", flavor: str = "tiny") -> list[str]:
    """The command that moves it; types of volumes that the destination lacks get another there."""
    return ["-s", id, *operator.to(place, image, flavor=flavor), "--volume-type", "nfs=standard"]


def marks(volume: dict[str, Any]) -> set[str]:
    """The marks of ours that a volume has."""
    return {key for key in volume["metadata"] if key.startswith("migrena:")}


def test_volumes_in_files_and_on_ceph_arrive_on_ceph_with_all_that_they_have(
        operator: Operator, storage: Clouds, laden: str, empty: Api) -> None:
    src, dst = storage.api("src"), empty
    plan = operator.run(*words(operator, laden), "-n")
    assert plan.returncode == 0 and plan.stderr.count("into a new volume of 1 GiB, type ") == 3, plan.stderr
    assert dst.volumes() == []
    report = operator.report(*words(operator, laden))
    id = report["destination"]["id"]
    assert same(storage, "src-cmp1", laden, "dst-cmp1", id) == dict.fromkeys(("vda", "vdb", "vdc", "vdd"), True)
    assert report["copy"]["verified"] and report["copy"]["bytes"] > 3 * 12 * MiB and report["left_behind"] == []
    told = "name", "description", "size", "status", "bootable"
    one, other = (sorted([entry[key] for key in told] + [entry["metadata"]["tier"]] for entry in api.volumes() if entry["attachments"])
                  for api in (src, dst))
    assert one == other
    assert {entry["volume_type"] for entry in dst.volumes()} == {"standard", "rbd"}
    assert all(marks(entry) == {"migrena:done", "migrena:source"} for entry in dst.volumes())
    assert left_on(storage.host("src-cmp1")) == left_on(storage.host("dst-cmp1")) == []
    assert has_been_put_back(src, laden, "SHUTOFF")
    dst.act(id, "os-start", until="ACTIVE")
    shown = wait_for_console(dst, id, "GUEST wrote=")
    assert "GUEST boots=2 " in shown and " broken=0 " in shown
    assert all(f"GUEST disk {name} serial={disk.findtext('serial', '')[:20]} " in shown
               for name, disk in disks(storage, "dst-cmp1", id).items() if name != "vda")


@pytest.mark.long
@pytest.mark.parametrize("line", ["done of create volume on volume-", "chunk on volume-", "intent of swap in"])
def test_a_run_that_was_killed_amid_its_volumes_is_rolled_back_and_leaves_none(
        operator: Operator, storage: Clouds, laden: str, empty: Api, line: str) -> None:
    line = line if not line.endswith("-") else f"{line}{disks(storage, 'src-cmp1', laden)['vdc'].findtext('serial')}"
    assert operator.run(*words(operator, laden), throw=[(line, KILL)]).returncode == -KILL
    done = operator.run("rollback", operator.last_run, "--yes")
    assert done.returncode == 0, done.stderr
    assert empty.volumes() == [] and empty.call("GET", "nova", "/servers?all_tenants=1")["servers"] == []
    assert has_been_put_back(storage.api("src"), laden, "SHUTOFF")
    wait_until("the end of what was killed", lambda: left_on(storage.host("src-cmp1")) == left_on(storage.host("dst-cmp1")) == [], 60)


@pytest.mark.long
@pytest.mark.parametrize("line", ["chunk on volume-", "intent of swap in on volume-", "done of swap in"])
def test_a_run_that_was_killed_amid_its_volumes_is_resumed(operator: Operator, storage: Clouds, laden: str, empty: Api, line: str) -> None:
    line = line if not line.endswith("-") else f"{line}{disks(storage, 'src-cmp1', laden)['vdc'].findtext('serial')}"
    assert operator.run(*words(operator, laden), throw=[(line, KILL)]).returncode == -KILL
    done = operator.run("resume", operator.last_run)
    assert done.returncode == 0, done.stderr
    assert all(same(storage, "src-cmp1", laden, "dst-cmp1", done.stdout.strip()).values())
    wait_until("the end of what was killed", lambda: left_on(storage.host("src-cmp1")) == left_on(storage.host("dst-cmp1")) == [], 60)


@pytest.mark.long
def test_a_run_that_fails_leaves_no_volume(operator: Operator, storage: Clouds, laden: str, empty: Api) -> None:
    done = operator.run(*words(operator, laden, image="guest-other"), "--retries", "0", "--stall-timeout", "1",
                        extra="NBD_SERVER_PORT = 22")  # in use: the rehearsal fails
    assert done.returncode == 1, done.stderr
    assert empty.volumes() == [] and empty.call("GET", "nova", "/servers?all_tenants=1")["servers"] == []
    assert has_been_put_back(storage.api("src"), laden, "SHUTOFF")


@contextmanager
def full(cluster: Cluster) -> Iterator[None]:
    """A Ceph that takes no more, for as long as the scope."""
    def ratios(*values: str) -> None:
        for kind, value in zip(("nearfull", "backfillfull", "full"), values, strict=True):
            cluster.ask("osd", f"set-{kind}-ratio", value)

    def is_full() -> bool:
        return any("full" in osd["state"] for osd in cluster.ask("osd", "dump")["osds"])

    ratios("0.00001", "0.00002", "0.00003")
    wait_until("Ceph to be full", is_full, 60)
    try:
        yield
    finally:
        ratios("0.85", "0.9", "0.95")
        wait_until("Ceph to have room", lambda: not is_full(), 60)


@pytest.mark.long
def test_a_ceph_that_is_full_fails_the_run_and_in_the_end_nothing_is_left(operator: Operator, storage: Clouds, laden: str, empty: Api) -> None:
    line = f"chunk on volume-{disks(storage, 'src-cmp1', laden)['vdc'].findtext('serial')}"
    process = operator.halted(line, *words(operator, laden), "--retries", "1", "--stall-timeout", "10")
    journal = operator.folder / "state" / f"{operator.last_run}.jsonl"
    with full(Cluster(empty.cloud)):
        operator.halt(0).unlink()  # Cinder deletes a volume only once there is room again
        wait_until("the end of the copy", lambda: '"act": "delete volume"' in journal.read_text() or process.poll() is not None, 400)
        assert not storage.api("src").server(laden)["locked"]
    done = ended(process)
    assert done.returncode == 1 and "the storage may be full or down" in done.stderr, done.stderr
    assert empty.volumes() == [] and empty.call("GET", "nova", "/servers?all_tenants=1")["servers"] == []
    assert has_been_put_back(storage.api("src"), laden, "SHUTOFF")
    assert left_on(storage.host("src-cmp1")) == left_on(storage.host("dst-cmp1")) == []


@pytest.mark.long
def test_an_osd_that_dies_in_mid_copy_and_returns_costs_time_only(operator: Operator, storage: Clouds, laden: str, empty: Api) -> None:
    line = f"chunk on volume-{disks(storage, 'src-cmp1', laden)['vdc'].findtext('serial')}"
    process, cluster, roster = operator.halted(line, *words(operator, laden)), Cluster(empty.cloud), Roster(storage.folder)
    roster.stop(["dst-ceph-osd"])
    timer = threading.Timer(15, cluster.start, [roster])
    timer.start()
    done = operator.go_on(process)
    timer.join()
    assert done.returncode == 0, done.stderr
    assert all(same(storage, "src-cmp1", laden, "dst-cmp1", done.stdout.strip()).values())


@pytest.mark.long
def test_the_variables_of_the_firmware_arrive(operator: Operator, storage: Clouds, empty: Api) -> None:
    src = storage.api("src")
    with own_image(src, empty, "guest-uefi", guest_image(), hw_firmware_type="uefi"), an_instance(src, "guest-uefi", "src-cmp1") as id:
        src.act(id, "os-stop", until="SHUTOFF")
        path = variables(storage, "src-cmp1", id)
        storage.host("src-cmp1").run("sh", "-ec", 'head -c 512 /dev/urandom | dd of="$1" bs=512 seek=200 conv=notrunc', "sh", path)
        report = operator.report("-s", id, *operator.to("dst-cmp1", "guest-uefi"))
        there = variables(storage, "dst-cmp1", report["destination"]["id"])
        told = [storage.host(place).run("sh", "-ec", 'sha256sum <"$1"; stat -c "%U %G %a" "$1"', "sh", file).stdout
                for place, file in (("src-cmp1", path), ("dst-cmp1", there))]
        assert told[0] == told[1] and report["warnings"] == []
        empty.act(report["destination"]["id"], "os-start", until="ACTIVE")


@contextmanager
def own_image(src: Api, dst: Api, name: str, file: Path, format: str = "qcow2", **properties: str) -> Iterator[None]:
    """An image of this name in both clouds, for as long as the scope; then no instance in the destination has it either."""
    images = [(api, api.upload(name, file, format, os_shutdown_timeout="1", **properties)) for api in (src, dst)]
    try:
        yield
    finally:
        for server in dst.call("GET", "nova", "/servers?all_tenants=1")["servers"]:
            dst.delete(server["id"])
        for api, image in images:
            api.call("DELETE", "glance", f"/images/{image}")


@contextmanager
def an_instance(api: Api, image: str, place: str) -> Iterator[str]:
    """The id of an instance of this image, gone with the scope."""
    id = api.create("of-its-own", image, availability_zone=f"nova:{place}")
    try:
        yield id
    finally:
        api.delete(id)


def variables(clouds: Clouds, place: str, id: str) -> str:
    """The file in which an instance's firmware keeps its variables."""
    tree = ElementTree.fromstring(clouds.host(place).run("virsh", "dumpxml", "--inactive", id).stdout)
    return tree.findtext("os/nvram", "")


@pytest.mark.long
def test_only_chosen_disks_are_moved(operator: Operator, storage: Clouds, laden: str, empty: Api) -> None:
    wrong = operator.run(*words(operator, laden), "-n", "--disks", "vdz")
    assert wrong.returncode == 3 and "no disk vdz" in wrong.stderr
    report = operator.report(*words(operator, laden), "--disks", "vdc")
    id = report["destination"]["id"]
    assert len(report["left_behind"]) == 2 and len(empty.volumes()) == 1
    one, other = disks(storage, "src-cmp1", laden)["vdc"], disks(storage, "dst-cmp1", id)["vdb"]
    command("qemu-img", "compare", "--image-opts", opened(storage, "src-cmp1", one), opened(storage, "dst-cmp1", other))


@pytest.mark.long
def test_types_and_quotas_of_volumes_are_imported_and_removed(operator: Operator, storage: Clouds) -> None:
    src, dst = storage.api("src"), storage.api("dst")
    demo = {api.cloud.name: api.need("keystone", "projects", "demo") for api in (src, dst)}
    gold = {"name": "gold", "description": "fast", "os-volume-type-access:is_public": False, "extra_specs": {"tier": "1"}}
    made = src.call("POST", "cinder", "/types", {"volume_type": gold})["volume_type"]["id"]
    src.call("POST", "cinder", f"/types/{made}/action", {"addProjectAccess": {"project": demo["src"]}})
    src.call("PUT", "cinder", f"/os-quota-sets/{demo['src']}", {"quota_set": {"volumes": 7, "gigabytes": 70}})

    def there() -> list[Any]:
        types = [one for one in dst.call("GET", "cinder", "/types?is_public=None")["volume_types"] if one["name"] == "gold"]
        access = [one["project_id"] for entry in types for one in dst.call(
            "GET", "cinder", f"/types/{entry['id']}/os-volume-type-access")["volume_type_access"]]
        quota = dst.call("GET", "cinder", f"/os-quota-sets/{demo['dst']}")["quota_set"]
        return [[(one["description"], one["is_public"], one["extra_specs"]) for one in types], access, quota["volumes"], quota["gigabytes"]]

    try:
        before, files = there(), [operator.folder / "types", operator.folder / "quotas"]
        for folder, words in zip(files, (("volume-types", "--name", "gold", "--project", "demo"), ("quotas", "--project", "demo")), strict=True):
            done = operator.run("export", *words, "--folder", str(folder))
            assert done.returncode == 0, done.stderr
        command_words = ("import", *map(str, files), "--project", "demo", "--update")
        report = operator.report(*command_words)
        assert there() == [[("fast", False, {"tier": "1"})], [demo["dst"]], 7, 70]
        assert {row["result"] for row in operator.report(*command_words)["resources"]} == {"equal"}
        done = operator.run("rollback", report["run"])
        assert done.returncode == 0 and there() == before, done.stderr
    finally:
        for api in (src, dst):
            api.call("DELETE", "cinder", f"/os-quota-sets/{demo[api.cloud.name]}")
            for one in api.call("GET", "cinder", "/types?is_public=None")["volume_types"]:
                if one["name"] == "gold":
                    api.call("DELETE", "cinder", f"/types/{one['id']}")


@pytest.mark.long
def test_a_missing_type_is_refused_with_those_that_there_are(operator: Operator, laden: str, empty: Api) -> None:
    done = operator.run("-s", laden, *operator.to("dst-cmp1"), "-n")
    assert done.returncode == 3 and "there is no volume type 'nfs'" in done.stderr and "--volume-type nfs=TYPE; there are:" in done.stderr


@pytest.mark.long
def test_volumes_of_a_running_instance_arrive_warm(operator: Operator, storage: Clouds, laden: str, empty: Api) -> None:
    src = storage.api("src")
    src.act(laden, "os-start", until="ACTIVE")
    report = operator.report(*words(operator, laden), "--warm", "-a", "dst")
    assert len(report["copy"]["passes"]) > 1 and report["downtime_seconds"] < 60
    shown = wait_for_console(empty, report["destination"]["id"], "GUEST wrote=")
    assert " broken=0 " in shown


@pytest.mark.long
def test_a_seed_with_volumes_is_cut_over_to_unless_one_came_or_went(operator: Operator, storage: Clouds, laden: str, empty: Api) -> None:
    src = storage.api("src")
    src.act(laden, "os-start", until="ACTIVE")
    wait_for_console(src, laden, "GUEST wrote=")
    report = operator.report(*words(operator, laden), "--seed")
    run = str(report["run"])
    assert report["result"] == "seeded" and len(empty.volumes()) == 3
    last = disks(storage, "src-cmp1", laden)["vdd"].findtext("serial", "")
    src.detach(laden, last)
    done = operator.run("resume", run)
    assert done.returncode == 3 and f"volume-{last} was detached from the source after the seed" in done.stderr, done.stderr
    src.attach(laden, last)
    more = src.create_volume("more", volume_type="rbd")
    src.attach(laden, more)
    done = operator.run("resume", run)
    assert done.returncode == 3 and f"volume-{more} was attached to the source after the seed" in done.stderr, done.stderr
    src.detach(laden, more)
    src.delete_volume(more)
    assert operator.report("resume", run, "--seed")["result"] == "seeded" and src.server(laden)["status"] == "ACTIVE"
    id = operator.report("resume", run)["destination"]["id"]
    assert same(storage, "src-cmp1", laden, "dst-cmp1", id) == dict.fromkeys(("vda", "vdb", "vdc", "vdd"), True)


@pytest.mark.long
def test_five_volumes_of_one_size_arrive_each_as_its_own(
        operator: Operator, storage: Clouds, source_of: Callable[..., str], empty: Api) -> None:
    id = source_of("rbd", "nfs", "rbd", "nfs", "rbd", again=2)  # one of them was attached again
    arrived = operator.report(*words(operator, id))["destination"]["id"]
    assert same(storage, "src-cmp1", id, "dst-cmp1", arrived) == dict.fromkeys(("vda", "vdb", "vdc", "vdd", "vde", "vdf"), True)
    assert len(empty.volumes()) == 5


@pytest.mark.long
@pytest.mark.parametrize(("answer", "code", "count"), [(LOST, 0, 3), (LATE, 1, 0), ("500", 4, 0)])  # 4: it may still be made
def test_a_cinder_that_lies_about_a_volume_makes_no_second_one_and_none_is_forgotten(
        operator: Operator, storage: Clouds, laden: str, empty: Api, answer: str, code: int, count: int) -> None:
    with middle() as between:
        between.spoil = lambda name, before: answer if name == "dst POST volumes" and before == 1 else ""
        done = operator.run(*words(operator, laden), env=between.environment)
    assert between.spoiled == ["dst POST volumes"] and done.returncode == code, done.stderr
    assert (f"./migrena.py rollback {operator.last_run} deletes it" in done.stderr) is (code == 4)
    assert len(empty.volumes()) == count and (code == 0 or has_been_put_back(storage.api("src"), laden, "SHUTOFF"))


@pytest.mark.long
@pytest.mark.parametrize("firmware", ["bios", "uefi"])
def test_one_that_boots_from_a_volume_arrives_with_what_its_image_says(
        operator: Operator, storage: Clouds, empty: Api, firmware: str) -> None:
    src, dst = storage.api("src"), empty
    with ExitStack() as stack:
        if firmware == "uefi":  # under which the guest does not boot
            stack.enter_context(own_image(src, dst, "guest-uefi", guest_image(), hw_firmware_type="uefi"))
        boots_from_a_volume(operator, storage, dst, "guest-uefi" if firmware == "uefi" else "guest")


def boots_from_a_volume(operator: Operator, storage: Clouds, dst: Api, name: str) -> None:
    """An instance whose root disk is a volume made of this image arrives."""
    src, does_boot = storage.api("src"), name == "guest"
    image = src.need("glance", "images", name)
    root = {"boot_index": 0, "uuid": image, "source_type": "image", "destination_type": "volume", "volume_size": 1, "delete_on_termination": True}
    id = src.create("from-volume", "", block_device_mapping_v2=[root], availability_zone="nova:src-cmp1")
    try:
        if does_boot:
            wait_for_console(src, id, "GUEST wrote=")
        src.act(id, "os-stop", until="SHUTOFF")
        report = operator.report(*words(operator, id, image=""))
        arrived = report["destination"]["id"]
        assert same(storage, "src-cmp1", id, "dst-cmp1", arrived) == {"vda": True}
        (volume,) = dst.volumes()
        (before,) = (src.volume(one["id"]) for one in src.server(id)["os-extended-volumes:volumes_attached"])
        facts = [{key: value for key, value in one["volume_image_metadata"].items() if key != "image_id"} for one in (before, volume)]
        assert facts[0] == facts[1] and volume["bootable"] == "true" and ("hw_firmware_type" in facts[1]) is not does_boot
        assert dst.server(arrived)["os-extended-volumes:volumes_attached"][0]["delete_on_termination"] is True
        dst.act(arrived, "os-start", until="ACTIVE")
        assert not does_boot or "GUEST boots=2 " in wait_for_console(dst, arrived, "GUEST wrote=")
    finally:
        src.delete(id)


@pytest.mark.long
@pytest.mark.parametrize("kinds", ["qcow2 rbd", "rbd raw", "rbd rbd"])
def test_nova_s_own_disks_arrive_from_files_and_ceph_on_files_and_ceph(
        operator: Operator, storage: Clouds, empty: Api, kinds: str, tmp_path: Path) -> None:
    one, other = kinds.split()
    src, dst, place, to = storage.api("src"), empty, "src-cmp2", "dst-cmp2"
    storage.set_images_type(place, one)
    storage.set_images_type(to, other)
    try:
        mapping = [{"source_type": "image", "uuid": src.need("glance", "images", "guest"), "destination_type": "local", "boot_index": 0,
                    "delete_on_termination": True}, {**BLANK, "volume_size": 1}, {**BLANK, "volume_size": 2}]
        id = src.create("local", flavor="several", availability_zone=f"nova:{place}", block_device_mapping_v2=mapping, config_drive=True)
        wait_for_console(src, id, "GUEST wrote=")
        src.act(id, "os-stop", until="SHUTOFF")
        fill(storage, place, id, tmp_path, "vdb", "vdc")
        report = operator.report(*words(operator, id, to, flavor="several"))
        arrived = report["destination"]["id"]
        found = same(storage, place, id, to, arrived)
        assert {name for name, is_equal in found.items() if is_equal} >= {"vda", "vdb", "vdc"}
        assert left_on(storage.host(place)) == left_on(storage.host(to)) == []
        dst.act(arrived, "os-start", until="ACTIVE")
        assert "GUEST boots=2 " in wait_for_console(dst, arrived, "GUEST wrote=")
    finally:
        src.delete(id)
        storage.set_images_type(place, "raw")
        storage.set_images_type(to, "raw")


@pytest.mark.long
def test_a_clone_of_an_image_on_ceph_arrives_on_a_clone(operator: Operator, storage: Clouds, empty: Api, tmp_path: Path) -> None:
    src, dst, flat = storage.api("src"), empty, tmp_path / "guest.raw"
    Clouds(STORAGE.with_storage("src", "glance").with_storage("dst", "glance")).up()
    command("qemu-img", "convert", "-O", "raw", guest_image(), flat)
    for place in ("src-cmp2", "dst-cmp2"):
        storage.set_images_type(place, "rbd")
    try:
        with own_image(src, dst, "guest-raw", flat, "raw"), an_instance(src, "guest-raw", "src-cmp2") as id:
            wait_for_console(src, id, "GUEST wrote=")
            src.act(id, "os-stop", until="SHUTOFF")
            arrived = operator.report("-s", id, *operator.to("dst-cmp2", "guest-raw"))["destination"]["id"]
            for cloud, one in ((src.cloud, id), (dst.cloud, arrived)):
                assert "parent: images/" in command("rbd", "-c", Cluster(cloud).folder / "ceph.conf", "info", f"vms/{one}_disk")
            assert same(storage, "src-cmp2", id, "dst-cmp2", arrived) == {"vda": True}
            dst.act(arrived, "os-start", until="ACTIVE")
            assert "GUEST boots=2 " in wait_for_console(dst, arrived, "GUEST wrote=")
    finally:
        for place in ("src-cmp2", "dst-cmp2"):
            storage.set_images_type(place, "raw")
        Clouds(STORAGE).up()


@pytest.mark.long
def test_a_volume_on_ceph_arrives_in_a_file(operator: Operator, storage: Clouds, empty: Api, tmp_path: Path) -> None:
    home, away = storage.api("src"), empty  # the way back, from the one cloud to the other
    volume = away.create_volume("data", volume_type="standard")
    id = away.create("away", availability_zone="nova:dst-cmp1")
    arrived = ""
    try:
        away.attach(id, volume)
        wait_for_console(away, id, "GUEST wrote=")
        away.act(id, "os-stop", until="SHUTOFF")
        fill(storage, "dst-cmp1", id, tmp_path, "vdb")
        extra = {"nics": [{"net-id": home.need("neutron", "networks", "net1")}], "availability_zone": "nova:src-cmp1"}
        report = operator.report("-s", id, "-d", "home", "-f", "tiny", "-i", "guest", "-e", str(extra), "--volume-type", "standard=nfs",
                                 extra="SRC_CREDS, DST_CREDS = DST_CREDS, SRC_CREDS")
        arrived = report["destination"]["id"]
        assert same(storage, "dst-cmp1", id, "src-cmp1", arrived) == {"vda": True, "vdb": True}
        home.act(arrived, "os-start", until="ACTIVE")
        assert "GUEST boots=2 " in wait_for_console(home, arrived, "GUEST wrote=")
    finally:
        made = home.server(arrived)["os-extended-volumes:volumes_attached"] if arrived else []
        for api, one in ((home, arrived), (away, id)):
            if one:
                api.delete(one)
        for entry in made:
            home.delete_volume(entry["id"])


# Disables (0) or enables (1) what exports volumes by iSCSI: sessions drop, and are set up again.
TARGETS = 'for one in /sys/kernel/config/target/iscsi/*/tpgt_1/enable; do echo "$1" > "$one"; done'


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_lvm_and_iscsi_whose_session_drops_arrive_on_ceph(operator: Operator, storage: Clouds, machine: Host, empty: Api) -> None:
    lab, src, dst = Clouds(WITH_MACHINE), storage.api("src"), empty
    lab.set_images_type(MACHINE, "lvm")
    storage.set_images_type("dst-cmp1", "rbd")
    volume = src.create_volume("data", volume_type="lvm")
    id = src.create("on-lvm", availability_zone=f"nova:{MACHINE}")
    try:
        src.attach(id, volume)
        src.act(id, "os-stop", until="SHUTOFF")
        places = {name: disk.find("source").get("dev", "") for name, disk in disks(lab, MACHINE, id).items()}  # type: ignore[union-attr]
        machine.run("sh", "-ec", "head -c 20M /dev/urandom | dd of=$1 bs=1M seek=100 oflag=direct iflag=fullblock", "sh", places["vdb"])
        process = operator.halted(f"chunk on volume-{volume}", "-s", id, *operator.to("dst-cmp1"), "--volume-type", "lvm=standard", "--json")
        machine.run("sh", "-ec", TARGETS, "sh", "0")
        timer = threading.Timer(15, machine.run, ["sh", "-ec", TARGETS, "sh", "1"])
        timer.start()
        done = operator.go_on(process)
        timer.join()
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        arrived = disks(lab, "dst-cmp1", report["destination"]["id"])
        for name, place in places.items():
            image = arrived[name].find("source").get("name", "")  # type: ignore[union-attr]
            there = command("sh", "-c", 'rbd -c "$1" export "$2" - | sha256sum', "sh", Cluster(dst.cloud).folder / "ceph.conf", image)
            assert there.split()[0] == machine.run("sha256sum", place).stdout.split()[0], name
        assert report["copy"]["bytes"] < 600 * MiB and left_on(machine) == left_on(storage.host("dst-cmp1")) == []
        dst.act(report["destination"]["id"], "os-start", until="ACTIVE")
        wait_for_console(dst, report["destination"]["id"], "GUEST boots=")
    finally:
        storage.set_images_type("dst-cmp1", "qcow2")  # before anything that may fail
        src.delete(id)  # its volume is detached then
        wait_until("the volume", lambda: src.volume(volume)["status"] in ("available", "error"), 300)
        src.delete_volume(volume)
