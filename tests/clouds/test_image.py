"""Images go from one real Glance to another, with all that is told of them; and no half of one is left, whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clouds.conftest import DESTINATION, MiB, Operator, ended, last_record, wait_for_console
from clouds.middle import PASS, middle
from lab.api import Api, patiently
from lab.clouds import Clouds
from lab.guest import guest_image
from lab.processes import listens

TOLD = {"hw_disk_bus": "virtio", "os_distro": "debian", "trait:HW_CPU_X86_AVX2": "required", "description": "of the year before"}
SMALL = 19292  # the port of a second Glance


def images(api: Api) -> dict[str, dict[str, Any]]:
    """All images of a cloud, by their ids."""
    return {raw["id"]: raw for which in ("", "&os_hidden=true") for raw in api.call("GET", "glance", f"/images?limit=1000{which}")["images"]}


def delete_others(api: Api, kept: set[str]) -> None:
    """Deletes all images but these."""
    for id, raw in images(api).items():
        if id not in kept:
            if raw["protected"]:
                change(api, id, "protected", False)
            api.call("DELETE", "glance", f"/images/{id}")


def change(api: Api, id: str, key: str, value: object) -> None:
    """Sets one thing that is told of an image."""
    api.call("PATCH", "glance", f"/images/{id}", [{"op": "replace", "path": f"/{key}", "value": value}],
             {"Content-Type": "application/openstack-images-v2.1-json-patch"})


@pytest.fixture(autouse=True)
def only_the_labs(src: Api, dst: Api) -> Iterator[None]:
    """Both clouds have the images of the lab alone, before and after a test."""
    kept = {api.cloud.name: set(images(api)) for api in (src, dst)}
    yield
    for api in (src, dst):
        delete_others(api, kept[api.cloud.name])


@pytest.fixture
def content(tmp_path: Path) -> Path:
    """40 MiB that no image has."""
    path = tmp_path / "content"
    path.write_bytes(os.urandom(40 * MiB))
    return path


@pytest.fixture
def template(src: Api, content: Path) -> str:
    """The id of an image of the source with that content, of which much is told."""
    id = src.upload("template", content, "raw", min_disk=1, min_ram=64, tags=["web", "gold"], **TOLD)  # type: ignore[arg-type]
    change(src, id, "protected", True)
    return id


def arrived(api: Api, name: str = "template") -> dict[str, Any]:
    """The one image of this name."""
    (raw,) = (raw for raw in images(api).values() if raw["name"] == name)
    return raw


def test_an_image_arrives_with_all_its_properties(operator: Operator, src: Api, dst: Api, template: str) -> None:
    done = operator.run("image", "-i", "template")
    assert done.returncode == 0, done.stderr
    here, there = images(src)[template], arrived(dst)
    assert done.stdout.strip() == there["id"] and "both Glances agree" in done.stderr
    own = {"id", "created_at", "updated_at", "owner", "self", "file", "schema", "stores", "direct_url", "locations", "tags"}
    one, other = ({key: value for key, value in raw.items() if key not in own} for raw in (here, there))
    assert other == {**one, "source_uuid": template, "source_cloud": f"{src.cloud.url('keystone')}/v3"}
    assert sorted(there["tags"]) == ["gold", "web"] and there["protected"] and there["os_hash_value"] == here["os_hash_value"]
    (state,) = json.loads(operator.run("status", "--json").stdout)
    assert (state["result"], state["source"]["id"]) == ("done", template)


def test_content_that_is_there_already_is_success_without_a_transfer(operator: Operator, dst: Api, template: str) -> None:
    first = operator.run("image", "-i", template).stdout
    report = operator.report("image", "-i", template)
    assert report["images"][0]["result"] == "already there" and report["images"][0]["destination"] == first.strip()
    assert len([raw for raw in images(dst).values() if raw["name"] == "template"]) == 1


@pytest.mark.parametrize("kind", [{"os_hidden": True}, {"visibility": "community"}])
def test_an_image_that_glance_lists_only_on_demand_is_carried_once_and_stays_what_it_was(
        operator: Operator, src: Api, dst: Api, template: str, kind: dict[str, object]) -> None:
    for key, value in kind.items():
        change(src, template, key, value)
    done = operator.run("image", "-i", template)
    assert done.returncode == 0, done.stderr
    id = done.stdout.strip()
    assert kind.items() <= dst.call("GET", "glance", f"/images/{id}").items()
    again = operator.report("image", "-i", template)
    assert (again["images"][0]["result"], again["images"][0]["destination"]) == ("already there", id)
    if "os_hidden" in kind:
        assert operator.report("image", "-i", "template")["images"][0]["destination"] == id


def test_the_same_bytes_under_another_format_are_carried_as_what_they_are(operator: Operator, dst: Api, template: str, content: Path) -> None:
    other = dst.upload("the same bytes", content, "iso")
    done = operator.run("image", "-i", "template")
    assert done.returncode == 0 and done.stdout.strip() != other, done.stderr
    assert arrived(dst)["disk_format"] == "raw"


def test_a_name_that_other_content_has_is_refused_and_may_be_another(operator: Operator, dst: Api, template: str) -> None:
    taken = dst.upload("template", operator.clouds.config)
    refused = operator.run("image", "-i", "template")
    assert refused.returncode == 3 and taken in refused.stderr and "--name" in refused.stderr
    assert operator.run("image", "-i", "template", "--name", "renamed").returncode == 0
    assert arrived(dst, "renamed")["source_uuid"] == template


def test_several_images_go_by_their_tag_and_are_reported_in_the_end(operator: Operator, src: Api, dst: Api, template: str, content: Path) -> None:
    content.write_bytes(content.read_bytes()[: MiB])
    src.upload("another", content, "raw", tags=["web"])  # type: ignore[arg-type]
    done = operator.run("image", "--tag", "web", "-n")
    assert done.returncode == 0 and done.stderr.count("to be carried") == 2 and "template" not in [raw["name"] for raw in images(dst).values()]
    done = operator.run("image", "--tag", "web")
    assert done.returncode == 0 and len(done.stdout.split()) == 2
    assert len(re.findall(r"carried +(40|1)\.0 MiB +(template|another)", done.stderr)) == 2
    assert arrived(dst, "another")["size"] == MiB and arrived(dst)["size"] == 40 * MiB


@pytest.mark.parametrize("format", ["raw", "vmdk"])
def test_an_image_is_converted_and_still_the_same_to_a_guest(operator: Operator, src: Api, dst: Api, tmp_path: Path, format: str) -> None:
    src.upload("own", guest_image())
    work = tmp_path / "work"
    work.mkdir()
    done = operator.run("image", "-i", "own", "--disk-format", format, "--work-folder", str(work))
    assert done.returncode == 0 and list(work.iterdir()) == [], done.stderr
    there = arrived(dst, "own")
    assert there["disk_format"] == format
    got = tmp_path / "got"
    got.write_bytes(dst.download(there["id"]))
    assert subprocess.run(["qemu-img", "compare", "-f", "qcow2", "-F", format, guest_image(), got], check=False).returncode == 0
    again = operator.run("image", "-i", "own", "--disk-format", format)
    assert again.returncode == 0 and "already there" in again.stderr
    elsewhere = operator.run("image", "-i", "own", "--disk-format", format, extra=f"STATE_FOLDER = {str(tmp_path / 'elsewhere')!r}")
    assert elsewhere.returncode == 3 and "no journal here proves" in elsewhere.stderr


def test_an_image_that_names_files_of_this_machine_is_not_converted(operator: Operator, src: Api, dst: Api, tmp_path: Path) -> None:
    before = set(images(dst))
    (tmp_path / "secret").write_bytes(bytes(MiB))
    made = {"based": ["-f", "qcow2", "-b", f"{tmp_path}/secret", "-F", "raw"], "apart": ["-f", "qcow2", "-o", f"data_file={tmp_path}/data"],
            "flat": ["-f", "vmdk", "-o", "subformat=monolithicFlat"], "child": ["-f", "vmdk", "-b", f"{tmp_path}/flat", "-F", "vmdk"]}
    for name, words in made.items():
        subprocess.run(["qemu-img", "create", "-q", *words, tmp_path / name, "1M"], check=True)
        src.upload(name, tmp_path / name, words[1])
        done = operator.run("image", "-i", name, "--disk-format", "raw")
        assert done.returncode == 1 and "is unsafe to convert" in done.stderr and set(images(dst)) == before, done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_transfer_leaves_no_half_image(operator: Operator, dst: Api, template: str, number: signal.Signals) -> None:
    before = set(images(dst))
    process = operator.at_a_third("image", "-i", "template", rate="5M")
    process.send_signal(number)
    done = ended(process)
    assert done.returncode == 128 + number and set(images(dst)) == before, done.stderr
    assert operator.run("image", "-i", "template").returncode == 0


def test_a_transfer_that_is_killed_is_reported_and_can_be_taken_back(operator: Operator, dst: Api, template: str) -> None:
    before = set(images(dst))
    process = operator.at_a_third("image", "-i", "template", rate="5M")
    process.kill()
    process.communicate()
    run = operator.last_run
    refused = operator.run("image", "-i", "template")
    assert refused.returncode == 3 and f"./migrena.py rollback {run}" in refused.stderr, refused.stderr
    told = operator.run("status", run).stdout
    assert "an incomplete image" in told and f"rollback {run}" in told and "resume" not in told
    assert operator.run("resume", run).returncode == 3
    assert operator.run("rollback", run).returncode == 0 and set(images(dst)) == before
    assert operator.run("image", "-i", "template").returncode == 0
    refused = operator.run("rollback", operator.last_run)
    assert refused.returncode == 3 and "may be in use" in refused.stderr


def test_of_two_machines_that_carry_one_image_at_once_the_later_gives_way(operator: Operator, dst: Api, template: str) -> None:
    """Its survey has to miss what the other one began, as it would where both survey at the same moment."""
    dst.call("POST", "glance", "/images", {"name": "half", "disk_format": "raw", "container_format": "bare", "source_uuid": template,
                                           "migrena_run": "20261120T210000-a1b2c3"})
    before = set(images(dst))
    late = operator.with_build(("        if run := carrying(other, wanted):\n", "        if run := '':\n"))
    done = late.run("image", "-i", "template")
    assert done.returncode == 3 and "run 20261120T210000-a1b2c3 has begun to carry image 'template'" in done.stderr, done.stderr
    assert set(images(dst)) == before


@pytest.fixture
def small(dst: Api, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A second API of the destination's Glance, at SMALL, where a user has 20 MiB left, and an image five properties."""
    held = sum(raw["size"] or 0 for raw in images(dst).values())
    more, place = tmp_path / "small.conf", (dst.cloud.address, SMALL)
    more.write_text(f"[DEFAULT]\nbind_port = {SMALL}\nuser_storage_quota = {held + 20 * MiB}\nimage_property_quota = 5\n")
    with (tmp_path / "glance.log").open("wb") as log, subprocess.Popen(
            ["glance-api", "--config-file", dst.cloud.etc / "glance/glance-api.conf", "--config-file", more], stdout=log, stderr=log) as process:
        patiently("the second Glance", lambda: listens(*place), 120)
        yield process
        process.kill()


def test_a_quota_is_shown_as_glance_says_it(operator: Operator, dst: Api, template: str, small: object) -> None:
    before = set(images(dst))
    done = operator.run("image", "-i", "template", extra=f"DST_GLANCE_ENDPOINT = 'http://{dst.cloud.address}:{SMALL}'")
    assert done.returncode == 1 and "Image exceeds the storage quota" in done.stderr and set(images(dst)) == before, done.stderr


def test_what_glance_does_not_accept_is_listed_and_the_rest_kept(operator: Operator, src: Api, dst: Api, small: object) -> None:
    src.upload("modest", operator.clouds.config, "raw", **TOLD)
    done = operator.run("image", "-i", "modest", extra=f"DST_GLANCE_ENDPOINT = 'http://{dst.cloud.address}:{SMALL}'")
    there = arrived(dst, "modest")
    missing = [key for key in TOLD if key not in there]
    told, = re.findall(r"warning: the destination's Glance does not accept (.*)", done.stderr)
    assert done.returncode == 0 and len(missing) == 2 and sorted(told.split(", ")) == sorted(missing), done.stderr
    assert "source_uuid" in there and "migrena_run" not in there


def test_a_glance_that_dies_leaves_half_an_image_which_is_said_and_can_be_taken_back(
        operator: Operator, dst: Api, template: str, small: subprocess.Popen[bytes]) -> None:
    before = set(images(dst))
    process = operator.at_a_third("image", "-i", "template", rate="5M", extra=f"DST_GLANCE_ENDPOINT = 'http://{dst.cloud.address}:{SMALL}'")
    small.kill()
    done = ended(process)
    assert done.returncode == 4 and "left behind: delete image template did not succeed" in done.stderr, done.stderr
    assert operator.run("rollback", operator.last_run).returncode == 0 and set(images(dst)) == before


def test_an_image_that_may_not_be_read_is_refused_as_glance_says_it(operator: Operator, dst: Api, template: str) -> None:
    """A real Glance says so by its policy; once that has changed it cannot be taken back without a restart."""
    before = set(images(dst))
    with middle() as between:
        between.spoil = lambda name, count: "403" if name == "src GET file" else PASS
        refused = operator.run("image", "-i", "template", env=between.environment)
    assert refused.returncode == 3 and "'template' cannot be read" in refused.stderr and set(images(dst)) == before, refused.stderr


def test_memory_stays_as_it_is_for_an_image_of_any_size(operator: Operator, src: Api, tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(320 * MiB)
    src.upload("large", large, "raw")
    process, peak = operator.begin("image", "-i", "large"), 0
    while process.poll() is None:
        with contextlib.suppress(OSError):
            peak = max([peak, *map(int, re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text()))])
        time.sleep(0.05)
    assert ended(process).returncode == 0 and 0 < peak < 120 * 1024  # KiB


def test_a_byte_that_is_wrong_is_found_and_the_image_deleted(operator: Operator, dst: Api, template: str) -> None:
    before = set(images(dst))
    flipping = operator.with_build(("        return part\n\n    def prove", "        return part[:-1] + b'?' if part else part\n\n    def prove"))
    done = flipping.run("image", "-i", "template")
    assert done.returncode == 1 and "differs from that of the bytes read" in done.stderr and set(images(dst)) == before, done.stderr


def test_what_cannot_be_carried_is_refused_with_all_reasons(operator: Operator, src: Api, template: str) -> None:
    src.call("POST", "glance", "/images", {"name": "empty", "disk_format": "raw", "container_format": "bare"})
    src.call("POST", "glance", "/images", {"name": "signed", "disk_format": "raw", "container_format": "bare", "img_signature": "abc"})
    refused = operator.run("image", "-i", "empty", "-i", "signed", "-i", "temp")
    assert refused.returncode == 3
    for words in ("'empty' is queued", "'signed' is signed", "no image 'temp'", "nearest: template"):
        assert words in refused.stderr
    for wrong in ((), ("-i", "template", "--tag", "web"), ("-i", "a", "-i", "b", "--name", "c"), ("-i", "template", "--disk-format", "vdi")):
        assert operator.run("image", *wrong).returncode == 2


def test_an_instance_goes_to_a_cloud_that_never_had_its_image(operator: Operator, clouds: Clouds, src: Api, dst: Api, tmp_path: Path) -> None:
    own = tmp_path / "own.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", "-o", "cluster_size=128k", guest_image(), own], check=True)
    src.upload("own", own, os_shutdown_timeout="1")
    id = src.create("of-own", image="own", availability_zone="nova:src-cmp1")
    try:
        wait_for_console(src, id, "GUEST wrote=")
        refused = operator.run("-s", id, *operator.to(DESTINATION, image=""))
        assert refused.returncode == 3 and "-i" in refused.stderr
        planned = operator.run("-s", id, *operator.to(DESTINATION, image=""), "--copy-image", "-n")
        assert planned.returncode == 0 and ": the image, before anything is stopped" in planned.stderr, planned.stderr
        done = operator.run("-s", id, *operator.to(DESTINATION, image=""), "--copy-image", "-a", "dst")
        assert done.returncode == 0 and "both bases have the same content" in done.stderr, done.stderr
        last = last_record(clouds.host("src-cmp1"), id)
        assert f"last={last} broken=0" in wait_for_console(dst, done.stdout.strip(), "GUEST boots=")
        assert dst.server(done.stdout.strip())["image"]["id"] == arrived(dst, "own")["id"]
        dst.delete(done.stdout.strip())
    finally:
        src.delete(id)
