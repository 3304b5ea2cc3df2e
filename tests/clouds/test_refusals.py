"""What only a real cloud can refuse: exit 3 with clear lines, and nothing touched."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clouds.conftest import Operator, has_been_put_back
from lab.api import Api
from lab.settings import ADDRESSES

WORDS = ("-d", "arrived", "-f", "tiny", "-i", "guest")
PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA" + "I" * 44 + " of-somebody"


@pytest.fixture(autouse=True)
def nothing_is_touched(src: Api, dst: Api, source: str) -> Iterator[None]:
    """Whatever is refused, the destination stays as empty as the test made it and the source as it was."""
    names = {server["name"] for server in dst.call("GET", "nova", "/servers")["servers"]}
    yield
    assert {server["name"] for server in dst.call("GET", "nova", "/servers")["servers"]} - names <= {"theirs"}
    assert has_been_put_back(src, source, "SHUTOFF")


def refused(done: subprocess.CompletedProcess[str], *told: str) -> None:
    """The run ended with 3 and told all this."""
    assert done.returncode == 3, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    for words in told:
        assert words in done.stderr


def test_a_source_that_nobody_knows(operator: Operator) -> None:
    refused(operator.run("-s", "00000000-0000-4000-8000-000000000000", *WORDS), "there is no server 00000000")


@pytest.mark.parametrize(("extra", "told"), [
    ("SRC_CREDS['password'] = 'wrong'", f"source cloud: http://{ADDRESSES['src']}:5000/v3 refuses the credentials"),
    ("DST_CREDS['region_name'] = 'nowhere'", "region"),
    ("SRC_CREDS['auth_url'] = 'http://127.0.0.1:9/v3'", "check auth_url"),
    ("DST_CREDS['username'] = DST_CREDS['project_name'] = 'demo'", "destination cloud: these credentials do not show on which host"),
    ("SRC_CREDS['username'] = SRC_CREDS['project_name'] = 'demo'", "there is no server"),
], ids=["password", "region", "keystone", "no admin of the destination", "no admin of the source"])
def test_credentials_that_do_not_do(operator: Operator, source: str, extra: str, told: str) -> None:
    refused(operator.run("-s", source, *WORDS, extra=extra), told)


def test_every_kind_of_credentials_opens_a_cloud(operator: Operator, src: Api, source: str, application: dict[str, str], clouds_yaml: Path) -> None:
    tenant = {"auth_url": f"{src.cloud.url('keystone')}/v2.0", "username": "admin", "password": "lab-only", "tenant_name": "admin"}
    for words, extra in (((), f"SRC_CREDS = {tenant}"), ((), f"SRC_CREDS = {application}"), (("--dst-cloud", "there"), "DST_CREDS = {}")):
        done = operator.run("-s", source, *WORDS, "-n", *words, extra=extra, env={"OS_CLIENT_CONFIG_FILE": str(clouds_yaml)})
        assert done.returncode == 0 and "to move" in done.stderr, done.stderr


def test_extra_arguments_that_this_nova_does_not_take(operator: Operator, source: str) -> None:
    refused(operator.run("-s", source, *WORDS, "-n", "-e", "{'files': {'/etc/motd': 'hello'}}"), "destination cloud: -e: ", "'files'", "2.56")
    done = operator.run("-s", source, *WORDS, "-n", "-e", "{'nics': 'none', 'hostname': 'web', 'tags': ['a'], 'key_name': None}")
    assert done.returncode == 0, done.stderr


def test_a_flavor_of_the_same_name_that_is_smaller_or_other(operator: Operator, src: Api, dst: Api) -> None:
    made = [(api, api.ensure("nova", "flavors", "shrunk", ram=ram, vcpus=1, disk=1)) for api, ram in ((src, 192), (dst, 128))]
    dst.call("POST", "nova", f"/flavors/{made[1][1]}/os-extra_specs", {"extra_specs": {"hw:watchdog_action": "none"}})
    id = src.create("shrunk", flavor="shrunk", availability_zone="nova:src-cmp1")
    words = ("-s", id, "-d", "arrived", "-i", "guest", "-n")
    try:
        refused(operator.run(*words), "flavor shrunk of the destination is smaller than the source's: 128 MiB of RAM for 192")
        done = operator.run(*words, "-f", "shrunk")
        assert done.returncode == 0, done.stderr
        assert "flavor     has 128 MiB of RAM for 192 of the source's" in done.stderr
        assert "flavor     has hw:watchdog_action none for unset of the source's" in done.stderr
    finally:
        src.delete(id)
        for api, flavor in made:
            api.call("DELETE", "nova", f"/flavors/{flavor}")


def test_hazard_30_a_flavor_and_a_key_pair_that_are_gone(operator: Operator, src: Api, dst: Api) -> None:
    flavor = src.ensure("nova", "flavors", "gone", ram=192, vcpus=1, disk=1)
    like = dst.ensure("nova", "flavors", "like-it", ram=192, vcpus=1, disk=1)
    pair = {"name": "of-somebody", "type": "ssh", "public_key": PUBLIC_KEY}
    src.call("POST", "nova", "/os-keypairs", {"keypair": pair})
    id = src.create("without", flavor="gone", availability_zone="nova:src-cmp1", key_name="of-somebody")
    words = ("-s", id, "-d", "arrived", "-i", "guest", "-n")
    try:
        src.call("DELETE", "nova", f"/flavors/{flavor}")
        src.call("DELETE", "nova", "/os-keypairs/of-somebody")
        done = operator.run(*words)
        assert done.returncode == 0, done.stderr
        assert ", flavor like-it, " in done.stderr and re.search("key_name +of-somebody +left behind", done.stderr), done.stderr
        refused(operator.run(*words, "-e", "{'key_name': 'of-somebody'}"), "cloud: -e: ", "no key pair 'of-somebody'")
    finally:
        src.delete(id)
        dst.call("DELETE", "nova", f"/flavors/{like}")


def test_all_reasons_of_both_clouds_come_at_once(operator: Operator, src: Api, source: str) -> None:
    src.act(source, "lock", {"locked_reason": "an audit"})
    refused(operator.run("-s", source, "-d", "arrived", "-f", "no-such-flavor", "-i", "no-such-image"), "the source is locked: an audit",
            "there is no flavor 'no-such-flavor'", "nearest: ", "there is no image 'no-such-image'")
    assert src.server(source)["locked"]
    src.act(source, "unlock")


@pytest.fixture(scope="module")
def changing(src: Api) -> Iterator[str]:
    """The id of a running instance that goes through many states."""
    id = src.create("changing", availability_zone="nova:src-cmp1")
    yield id
    src.delete(id)


def resize(src: Api, id: str) -> None:
    """A resize that waits for its confirmation; the other hypervisor takes no part, since it would want Nova's own SSH keys."""
    services = src.call("GET", "nova", "/os-services?binary=nova-compute")["services"]
    other = next(service["id"] for service in services if service["host"] == "src-cmp2")
    src.call("PUT", "nova", f"/os-services/{other}", {"status": "disabled"})
    try:
        src.act(id, "resize", {"flavorRef": src.need("nova", "flavors", "small")}, until="VERIFY_RESIZE")
    finally:
        src.call("PUT", "nova", f"/os-services/{other}", {"status": "enabled"})


Change = Callable[[Api, str], object]
STATES: dict[str, tuple[Change, str, Change]] = {
    "PAUSED": (lambda src, id: src.act(id, "pause", until="PAUSED"), "unpause", lambda src, id: src.act(id, "unpause", until="ACTIVE")),
    "SUSPENDED": (lambda src, id: src.act(id, "suspend", until="SUSPENDED"), "resume", lambda src, id: src.act(id, "resume", until="ACTIVE")),
    "RESCUE": (lambda src, id: src.act(id, "rescue", until="RESCUE"), "unrescue", lambda src, id: src.act(id, "unrescue", until="ACTIVE")),
    "VERIFY_RESIZE": (resize, "resize confirm", lambda src, id: src.act(id, "confirmResize", until="ACTIVE")),
    "SHELVED_OFFLOADED": (lambda src, id: src.act(id, "shelve", until="SHELVED_OFFLOADED"), "unshelve", lambda src, id: None),
}


@pytest.mark.parametrize("status", STATES)
def test_hazard_a_source_that_is_neither_running_nor_stopped(operator: Operator, src: Api, changing: str, status: str) -> None:
    there, way, back = STATES[status]
    there(src, changing)
    try:
        refused(operator.run("-s", changing, *WORDS), f"the source is {status}", f"openstack server {way} {changing}")
        assert src.server(changing)["status"] == status
    finally:
        back(src, changing)


def test_hazard_a_second_run_makes_a_second_instance_of_the_same_name(operator: Operator, dst: Api, source: str) -> None:
    there = dst.create("theirs", network="none", availability_zone="nova:dst-cmp1")
    refused(operator.run("-s", source, "-d", "theirs", "-f", "tiny", "-i", "guest"), f"the name 'theirs' is taken by {there}")


def test_hazard_i_says_name_but_compares_ids(operator: Operator, dst: Api, source: str) -> None:
    id, *words = dst.need("glance", "images", "guest"), "-s", source, "-d", "arrived", "-f", dst.need("nova", "flavors", "tiny"), "-n"
    for image in ("guest", id):
        assert f"image guest ({id})" in operator.run(*words, "-i", image).stderr
    refused(operator.run(*words, "-i", id[:-1]), f"there is no image '{id[:-1]}'")
    twin = dst.upload("guest", operator.clouds.config)
    try:
        refused(operator.run(*words, "-i", "guest"), "2 images are named 'guest'", id, twin)
    finally:
        dst.call("DELETE", "glance", f"/images/{twin}")


def test_an_image_with_another_disk_bus_or_firmware_is_refused_and_other_differences_are_in_the_plan(
        operator: Operator, dst: Api, source: str) -> None:
    id = dst.upload("other-bus", operator.clouds.config, hw_disk_bus="ide", hw_firmware_type="uefi", hw_vif_model="e1000")
    words = ("-s", source, "-d", "arrived", "-f", "tiny", "-i", id, "-n")
    try:
        refused(operator.run(*words), "hw_disk_bus ide for virtio", "hw_firmware_type uefi for bios", "--ignore-properties")
        dst.call("PATCH", "glance", f"/images/{id}", [{"op": "remove", "path": f"/hw_{key}"} for key in ("disk_bus", "firmware_type")],
                 {"Content-Type": "application/openstack-images-v2.1-json-patch"})
        done = operator.run(*words)
        assert done.returncode == 0 and "image      has hw_vif_model e1000 for unset of the source's" in done.stderr, done.stderr
    finally:
        dst.call("DELETE", "glance", f"/images/{id}")


def test_a_quota_that_one_more_instance_would_exceed(operator: Operator, dst: Api, source: str) -> None:
    project = dst.need("keystone", "projects", "admin")
    dst.call("PUT", "nova", f"/os-quota-sets/{project}", {"quota_set": {"instances": 0}})
    try:
        refused(operator.run("-s", source, *WORDS), "the quota is exceeded: 0 of 0 instances")
    finally:
        dst.call("DELETE", "nova", f"/os-quota-sets/{project}")


def test_a_dry_run_tells_the_plan_and_changes_nothing(operator: Operator, source: str) -> None:
    done = operator.run("-s", source, *WORDS, "-n")
    assert done.returncode == 0 and done.stdout == ""
    assert all(words in done.stderr for words in ("to move", "space", "transport", "at 1 Gbit/s", "nothing is started"))
