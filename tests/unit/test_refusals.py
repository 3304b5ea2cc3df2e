"""All reasons to refuse are told at once, before anything is touched, each with its way out."""

from __future__ import annotations

import io
import re
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import migrena
from migrena import (
    DONE,
    FLAW_WAYS,
    MADE,
    MARK,
    NEEDED,
    ORIGIN,
    PACKAGES,
    ROOT,
    Cloud,
    CloudError,
    DestinationFacts,
    Disk,
    Image,
    Reason,
    Report,
    Screen,
    SourceFacts,
    Volume,
    already_there,
    made_with,
    make_plan,
    plan_lines,
    refuse,
    refuse_destination,
    refuse_disk,
    refuse_server,
    refuse_tools,
    refuse_volumes,
    request_for,
    survey_source,
)
from unit.makers import UUID, GiB, a_base, a_disk, a_flavor, a_server, a_volume, an_image, an_overlay, some_settings

STATES = ["BUILD", "DELETED", "ERROR", "HARD_REBOOT", "MIGRATING", "PASSWORD", "PAUSED", "REBOOT", "REBUILD", "RESCUE", "RESIZE", "REVERT_RESIZE",
          "SHELVED", "SHELVED_OFFLOADED", "SOFT_DELETED", "SUSPENDED", "UNKNOWN", "VERIFY_RESIZE"]
WITH_A_WAY = {"PAUSED": "unpause", "SUSPENDED": "resume", "SHELVED": "unshelve", "SHELVED_OFFLOADED": "unshelve", "RESCUE": "unrescue",
              "VERIFY_RESIZE": "resize confirm", "ERROR": "set --state active"}
NEVER_ASKED = object.__new__(Cloud)  # the facts are there already
UNKNOWN = DestinationFacts(None)


def a_source(**different: Any) -> SourceFacts:
    """A source that nothing speaks against."""
    host = SimpleNamespace(name="cmp1")
    return SourceFacts(**{"cloud": NEVER_ASKED, "server": a_server(), "host": host, "disks": {ROOT: a_disk()}, "image": an_image(), **different})


def a_destination(**different: Any) -> DestinationFacts:
    """A destination that nothing speaks against."""
    return DestinationFacts(**{"cloud": NEVER_ASKED, "flavors": (a_flavor(),), "images": (an_image(),), **different})


def only(reasons: list[Reason]) -> Reason:
    """The one reason there is."""
    assert len(reasons) == 1, reasons
    return reasons[0]


def about(what: str, reasons: list[Reason]) -> list[Reason]:
    """The reasons that name this."""
    return [reason for reason in reasons if what in reason.problem]


@pytest.mark.parametrize("different", [{}, {"status": "SHUTOFF", "power": 4}, {"metadata": {"owner": "me"}}])
def test_control_nothing_speaks_against_a_source_in_order(different: dict[str, Any]) -> None:
    assert refuse(some_settings(), a_source(server=a_server(**different)), a_destination()) == []


@pytest.mark.parametrize("status", STATES)
def test_a_source_in_any_other_state_is_refused_by_name(status: str) -> None:
    reason = only(list(refuse_server(a_server(status=status))))
    assert f"is {status};" in reason.problem
    assert WITH_A_WAY.get(status, "") in reason.way_out


@pytest.mark.parametrize("status", WITH_A_WAY)
def test_the_way_out_of_a_state_is_a_whole_command(status: str) -> None:
    reason = only(list(refuse_server(a_server(status=status))))
    assert "openstack server " in reason.way_out
    assert reason.way_out.endswith(f" {UUID}")


@pytest.mark.parametrize("task", ["powering-off", "image_snapshot", "resize_prep", "migrating", "deleting"])
def test_a_source_with_a_task_under_way_is_refused(task: str) -> None:
    assert task in only(list(refuse_server(a_server(task=task)))).problem


def test_a_locked_source_is_refused_with_the_lock_s_reason_and_the_command_that_unlocks() -> None:
    reason = only(list(refuse_server(a_server(locked=True, lock_reason="audit"))))
    assert "locked: audit" in reason.problem
    assert reason.way_out == f"openstack server unlock {UUID}"
    assert "locked" in only(list(refuse_server(a_server(locked=True)))).problem


def test_a_source_that_another_run_has_marked_is_refused() -> None:
    reason = only(list(refuse_server(a_server(metadata={MARK: "20260101T000000-abc"}))))
    assert "20260101T000000-abc" in reason.problem
    assert reason.way_out.endswith(f"./migrena.py rollback --run-of {UUID}")


@pytest.mark.parametrize("different", [{"metadata": {MARK: "r"}}, {"locked": True, "lock_reason": "migrena run r"},
                                       {"metadata": {MARK: "r"}, "locked": True, "lock_reason": "migrena run r"}])
def test_a_run_whose_journal_is_here_is_reported_once_with_resume_and_rollback(different: dict[str, Any]) -> None:
    reason = only(list(refuse_server(a_server(**different), "./migrena.py resume {0}, or ./migrena.py rollback {0}".format)))
    assert reason.way_out == "if it has ended: ./migrena.py resume r, or ./migrena.py rollback r"


def test_a_half_made_destination_is_refused_with_resume_and_rollback() -> None:
    half = a_server(id="x", metadata={MADE: "r", ORIGIN: UUID})
    reason = only(refuse_destination(some_settings(), a_source(), a_destination(same_name=(half,)), "./migrena.py rollback {}".format))
    assert "taken by x, made by run r" in reason.problem and reason.way_out == "if it has ended: ./migrena.py rollback r"
    assert "--run-of" in only(refuse_destination(some_settings(), a_source(), a_destination(same_name=(half,)))).way_out


@pytest.mark.parametrize(("metadata", "is_there"), [({ORIGIN: UUID, DONE: "r"}, True), ({ORIGIN: UUID, MADE: "r"}, False), ({DONE: "r"}, False),
                                                    ({ORIGIN: "another", DONE: "r"}, False), ({}, False)])
def test_an_instance_is_already_migrated_only_by_a_run_of_this_source_that_was_completed(metadata: dict[str, str], is_there: bool) -> None:
    assert (already_there(some_settings(), a_destination(same_name=(a_server(id="x", metadata=metadata),))) is not None) is is_there


def test_credentials_that_do_not_show_the_host_are_refused() -> None:
    assert "admin" in only(list(refuse_server(a_server(host="", hypervisor="")))).way_out


def with_volumes(*volumes: Volume, **different: Any) -> SourceFacts:
    """A source with these volumes attached."""
    server = a_server(volumes=tuple(volume.id for volume in volumes))
    keys = {f"volume-{volume.id}": volume for volume in volumes}
    return a_source(server=server, volumes=keys, disks={ROOT: a_disk(), **{
        key: a_disk(an_overlay(path=f"rbd:volumes/{key}", format="raw", size=volume.size * GiB, storage={"driver": "rbd"}),
                    volume=volume.id, bus="virtio") for key, volume in keys.items()}}, **different)


def refused(source: SourceFacts, *types: str, **settings: Any) -> list[Reason]:
    """The reasons in a source's volumes, of a destination with these types."""
    assert source.server
    there = a_destination(volume_types=types or ("fast",), volume_limits={"maxTotalVolumes": 10, "totalVolumesUsed": 9})
    return refuse_volumes(some_settings(**settings), source, source.server, there)


def test_a_volume_that_libvirt_does_not_show_is_refused_unless_root_only_is_given() -> None:
    source = a_source(server=a_server(volumes=("v1", "v2")))
    assert "v1, v2" in only(refused(source)).problem and "--root-only" in only(refused(source)).way_out
    assert refused(source, root_only=True) == []


@pytest.mark.parametrize(("told", "word", "way"), [
    ({"multiattach": True}, "attached to several instances", "retype"), ({"encrypted": True}, "encrypted", "without encryption"),
    ({"status": "detaching"}, "is detaching", "what is done"), ({"attachments": [{"server_id": "another"}]}, "attached to another", "what is done"),
    ({"volume_type": "slow"}, "no volume type 'slow'", "--volume-type slow=TYPE; there are: fast")])
def test_a_volume_that_cannot_be_moved_is_refused_with_a_remedy(told: dict[str, Any], word: str, way: str) -> None:
    reason = only(refused(with_volumes(a_volume(**told))))
    assert word in reason.problem and way in reason.way_out


def test_a_volume_may_get_another_type_in_the_destination() -> None:
    volume = a_volume(volume_type="slow")
    assert refused(with_volumes(volume), volume_type={"slow": "fast"}) == []
    assert request_for(some_settings(volume_type={"slow": "fast"}), volume, "run-1", a_destination())["volume_type"] == "fast"


def test_the_quota_of_volumes_counts() -> None:
    assert "9 of 10 volumes are used, 2 more are needed" in only(refused(with_volumes(a_volume(), a_volume(id="v2")))).problem


def test_a_volume_is_asked_for_with_all_that_it_has_but_marks_and_zones_of_another_cloud() -> None:
    metadata = {"tier": "1", MARK: "r", DONE: "r0", "readonly": "False", "attached_mode": "rw"}
    volume = a_volume(description="of db", availability_zone="east", metadata=metadata)
    asked = request_for(some_settings(), volume, "run-1", a_destination(volume_zones=("nova",)))
    assert asked == {"size": 2, "name": "data", "description": "of db", "volume_type": "fast",
                     "metadata": {MADE: "run-1", ORIGIN: "v1", "tier": "1"}}
    assert request_for(some_settings(), volume, "run-1", a_destination(volume_zones=("east",)))["availability_zone"] == "east"


def test_volumes_are_given_to_nova_in_the_order_of_the_guest_and_the_root_first() -> None:
    source = with_volumes(a_volume(), a_volume(id="v2"))
    assert source.server
    server = replace(source.server, deleted_with=frozenset({"v2"}))
    asked = made_with(server, source.disks, {"volume-v1": "n1", "volume-v2": "n2"})["block_device_mapping_v2"]
    assert [(one["uuid"], one["boot_index"], one["delete_on_termination"]) for one in asked] == [("n1", -1, False), ("n2", -1, True)]
    disks = {**source.disks, ROOT: replace(source.disks["volume-v2"])}
    asked = made_with(server, disks, {"volume-v1": "n1", ROOT: "n2"})["block_device_mapping_v2"]
    assert [(one["uuid"], one["boot_index"]) for one in asked] == [("n2", 0), ("n1", -1)]


def test_one_that_boots_from_a_volume_needs_no_image_and_takes_none() -> None:
    volume = a_volume()
    source = replace(with_volumes(volume), volumes={ROOT: volume})
    assert "leave -i out" in only(refused(source, image="debian")).way_out
    source.server = replace(source.server or a_server(), image="")
    plan = make_plan(some_settings(), source, a_destination(), "run-1")
    assert plan.image.id == "" and plan.requests[ROOT]["size"] == 2


def test_ephemeral_disks_and_a_config_drive_are_made_in_the_destination() -> None:
    server = a_server(flavor=a_flavor(ephemeral=3), config_drive=True)
    disks = {ROOT: a_disk(), "eph0": a_disk(an_overlay(size=GiB)), "eph1": a_disk(an_overlay(size=2 * GiB))}
    plan = make_plan(some_settings(), a_source(server=server, disks=disks), a_destination(flavors=(server.flavor,)), "run-1")
    assert plan.extra["config_drive"] is True and plan.left_behind == ()
    assert [(each["source_type"], each["volume_size"]) for each in plan.extra["block_device_mapping_v2"]] == [("blank", 1), ("blank", 2)]
    disks.pop("eph1")  # the flavor has one made
    settings = some_settings(extra_args={"config_drive": False})
    plan = make_plan(settings, a_source(server=server, disks=disks), a_destination(flavors=(server.flavor,)), "run-1")
    assert plan.extra == {"nics": "none", "config_drive": False}


def test_a_flavor_with_less_for_ephemeral_disks_is_refused_unless_root_only_is_given() -> None:
    source, flavor = a_source(server=a_server(flavor=a_flavor(ephemeral=2))), a_flavor(name="less", ephemeral=1)
    destination = a_destination(flavors=(flavor,))
    reason = only(list(refuse_destination(some_settings(flavor="less"), source, destination)))
    assert "1 GiB for ephemeral disks, the source's has 2 GiB" in reason.problem and "--root-only" in reason.way_out
    assert refuse_destination(some_settings(flavor="less", root_only=True), source, destination) == []


def test_swap_stops_nothing() -> None:
    server = a_server(flavor=a_flavor(swap=512))
    source = a_source(server=server, disks={ROOT: a_disk(beside=("disk.swap",))})
    assert refuse(some_settings(), source, a_destination(flavors=(server.flavor,))) == []


def test_with_root_only_the_plan_lists_what_stays_behind() -> None:
    server = a_server(volumes=("v1", "v2"), config_drive=True, flavor=a_flavor(ephemeral=1))
    source = a_source(server=server, disks={ROOT: a_disk(beside=("disk.config", "disk.eph0", "disk.local", "disk.swap"))})
    plan = make_plan(some_settings(root_only=True), source, a_destination(flavors=(server.flavor,)), "run-1")
    assert plan.left_behind == ("volume v1", "volume v2", "ephemeral disk disk.local", "ephemeral disk disk.eph0")


def an_image_with(**properties: Any) -> Image:
    """The image `debian` as Glance tells it, with these properties."""
    return an_image(facts={"id": "image-1", "os_hash_algo": "sha512", "os_hidden": False, "kernel_id": None, "tags": [], **properties})


@pytest.mark.parametrize(("here", "there", "words"), [
    ({"hw_disk_bus": "scsi"}, {}, "hw_disk_bus virtio for scsi"), ({}, {"hw_disk_bus": "ide"}, "hw_disk_bus ide for virtio"),
    ({"hw_firmware_type": "uefi"}, {}, "hw_firmware_type bios for uefi"), ({"hw_machine_type": "q35"}, {}, "hw_machine_type unset for q35"),
    ({"hw_machine_type": "pc"}, {"hw_machine_type": "q35"}, "hw_machine_type q35 for pc"),
    ({"hw_disk_bus": "scsi", "hw_scsi_model": "virtio-scsi"}, {"hw_disk_bus": "scsi"}, "hw_scsi_model unset for virtio-scsi"),
    ({}, {"os_secure_boot": "required"}, "os_secure_boot required for disabled"),
    ({"architecture": "aarch64"}, {}, "architecture x86_64 for aarch64"), ({}, {"kernel_id": "k"}, "kernel_id k for unset")])
@pytest.mark.parametrize("named", ["", "debian"])
def test_an_image_with_which_the_guest_may_not_boot_is_refused(here: dict[str, str], there: dict[str, str], words: str, named: str) -> None:
    source, destination = a_source(image=an_image_with(**here)), a_destination(images=(an_image_with(**there),))
    reason = only(refuse(some_settings(image=named), source, destination))
    assert f"image 'debian' has {words} of the source's" in reason.problem and "--ignore-properties" in reason.way_out
    settings = some_settings(image=named, ignore_properties=True)
    assert refuse(settings, source, destination) == []
    assert f"  image      has {words} of the source's" in plan_lines(settings, make_plan(settings, source, destination, "run"), source, 0, Report())


@pytest.mark.parametrize(("here", "there", "words"), [
    ({"hw_vif_model": "e1000"}, {}, "hw_vif_model unset for e1000"), ({}, {"os_type": "windows"}, "os_type windows for unset"),
    ({"hw_disk_bus": "virtio", "hw_firmware_type": "bios", "description": "x"}, {"architecture": "x86_64", "min_disk": 1}, ""),
    ({"os_hash_algo": "sha256"}, {"os_hidden": True}, ""), ({"kernel_id": "here"}, {"kernel_id": "there"}, "")])
def test_other_properties_of_a_guest_that_differ_are_listed_in_the_plan(here: dict[str, Any], there: dict[str, Any], words: str) -> None:
    source, destination = a_source(image=an_image_with(**here)), a_destination(images=(an_image_with(**there),))
    settings = some_settings(image="debian")
    assert refuse(settings, source, destination) == []
    lines = plan_lines(settings, make_plan(settings, source, destination, "run"), source, 0, Report())
    assert [line for line in lines if line.startswith("  image")] == ([f"  image      has {words} of the source's"] if words else [])


def test_where_the_source_s_image_is_gone_the_plan_says_that_nothing_is_compared() -> None:
    source, destination = a_source(image=None), a_destination(images=(an_image_with(hw_firmware_type="uefi"),))
    settings = some_settings(image="debian")
    assert refuse(settings, source, destination) == []
    lines = plan_lines(settings, make_plan(settings, source, destination, "run"), source, 0, Report())
    assert [line for line in lines if "was not compared: the source's is gone" in line]


@pytest.mark.parametrize("asked", [{}, {"image": "debian"}])
@pytest.mark.parametrize("is_down", [False, True])
def test_the_source_s_image_is_looked_at_also_where_another_one_is_named(
        monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], is_down: bool) -> None:
    """Stand-ins for a cloud and a host; where another one is named, a Glance that does not answer stops nothing."""
    def one(id: str) -> Image:
        if is_down:
            raise CloudError("the Glance is away", code=503)
        return an_image_with()

    monkeypatch.setattr(migrena, "Cloud", lambda label, creds: SimpleNamespace(server=lambda id: a_server(host=""), store=SimpleNamespace(one=one)))
    found = survey_source(some_settings(**asked), {}, Screen(io.StringIO()), ExitStack())
    assert (found.image is None) is is_down and bool(found.problems) is (is_down and not asked)


def test_an_image_that_is_carried_has_the_properties_of_the_source_s() -> None:
    source = a_source(image=an_image_with(hw_disk_bus="scsi", disk_format="qcow2"))
    settings, destination = some_settings(copy_image=True), a_destination(images=())
    plan = make_plan(settings, source, destination, "run")
    assert plan.image.id == "" and not [line for line in plan_lines(settings, plan, source, 0, Report()) if line.startswith("  image")]


@pytest.mark.parametrize("flaw", FLAW_WAYS)
@pytest.mark.parametrize("place", [0, 1])
def test_a_disk_with_a_flaw_anywhere_in_its_chain_is_refused(flaw: str, place: int) -> None:
    chain = [an_overlay(), a_base()]
    chain[place] = [an_overlay, a_base][place](flaws=(flaw,))
    reason = only(list(refuse_disk(Disk(tuple(chain)))))
    assert reason.problem == f"{chain[place].path} has {flaw}"
    assert reason.way_out


def test_the_flaws_are_those_that_the_issue_names() -> None:
    assert set(FLAW_WAYS) >= {"internal snapshots", "encryption", "an external data file"}


def test_a_tpm_is_refused() -> None:
    assert "TPM" in only(list(refuse_disk(a_disk(has_tpm=True)))).problem


@pytest.mark.parametrize("format", ["vmdk", "luks", "qed"])
def test_a_format_that_nova_does_not_make_is_refused(format: str) -> None:
    assert f"is {format}" in only(list(refuse_disk(a_disk(an_overlay(format=format))))).problem


@pytest.mark.parametrize("tool", NEEDED)
def test_a_missing_tool_is_named_with_its_packages(tool: str) -> None:
    reason = only(list(refuse_tools("cmp1", [tool], some_settings(), "nbd-server")))
    assert reason.problem == f"cmp1: {tool} is missing"
    assert all(package in reason.way_out for package in ("Debian: ", "RPM: ", *PACKAGES[tool]))


@pytest.mark.parametrize(("transport", "refused"), [("auto", False), ("qemu", False), ("nbd", True)])
@pytest.mark.parametrize("tool", ["nbd-server", "nbd-client"])
def test_the_tools_of_nbd_are_needed_only_where_nbd_is_asked_for(transport: str, refused: bool, tool: str) -> None:
    assert len(list(refuse_tools("cmp1", [tool], some_settings(transport=transport), tool))) == refused


def test_a_name_that_is_taken_is_refused_with_each_that_has_it() -> None:
    reasons = refuse_destination(some_settings(), a_source(), a_destination(same_name=(a_server(id="x"), a_server(id="y"))))
    assert [reason.problem for reason in reasons] == [f"destination cloud: the name 'new' is taken by {id}" for id in "xy"]


def test_destination_credentials_that_are_not_an_admin_s_are_refused() -> None:
    assert "admin" in only(refuse_destination(some_settings(), a_source(), a_destination(sees_hosts=False))).way_out


def test_a_flavor_with_a_smaller_disk_than_the_guest_sees_is_refused() -> None:
    reason = only(refuse_destination(some_settings(flavor="tiny"), a_source(), a_destination(flavors=(a_flavor(name="tiny", disk=9),))))
    assert "9 GiB" in reason.problem and "10.0 GiB" in reason.problem


def test_a_flavor_whose_disk_is_a_byte_too_small_is_refused_and_one_that_fits_is_not() -> None:
    for size, refused in ((10 * GiB, False), (10 * GiB + 1, True)):
        source = a_source(disks={ROOT: a_disk(an_overlay(size=size), a_base())})
        assert bool(refuse_destination(some_settings(), source, a_destination())) is refused


def test_a_flavor_whose_disk_is_as_large_as_the_image_is_not_refused_beforehand() -> None:
    flavor = a_flavor(disk=0)
    assert refuse_destination(some_settings(), a_source(server=a_server(flavor=flavor)), a_destination(flavors=(flavor,))) == []


@pytest.mark.parametrize(("told", "size"), [
    ({"virtual_size": 2 * GiB}, "2.0 GiB"), ({"disk_format": "raw", "size": 2 * GiB}, "2.0 GiB"), ({"disk_format": "qcow2", "size": 90 * GiB}, "0 B"),
])
def test_a_flavor_without_a_disk_size_is_refused_where_the_image_is_smaller_than_the_source_s_disk(told: dict[str, object], size: str) -> None:
    reasons = refuse_destination(some_settings(flavor="none", image="debian"), a_source(), a_destination(
        flavors=(a_flavor(name="none", disk=0),), images=(an_image(facts=told),)))
    assert f"flavor none has no disk size, and image 'debian' has {size}" in only(about("has no disk size", reasons)).problem


@pytest.mark.parametrize("size", [10 * GiB, 11 * GiB])
def test_a_flavor_without_a_disk_size_will_do_where_the_image_is_large_enough(size: int) -> None:
    facts = a_destination(flavors=(a_flavor(name="none", disk=0),), images=(an_image(facts={"virtual_size": size}),))
    assert refuse_destination(some_settings(flavor="none", image="debian"), a_source(), facts) == []


@pytest.mark.parametrize(("different", "words"), [({"ram": 256}, "256 MiB of RAM for 512"), ({"vcpus": 0}, "0 vCPUs for 1")])
def test_a_flavor_of_the_same_name_that_is_smaller_is_refused_unless_it_was_named(different: dict[str, int], words: str) -> None:
    facts = a_destination(flavors=(a_flavor(**different),))
    reason = only(refuse_destination(some_settings(), a_source(), facts))
    assert f"smaller than the source's: {words}" in reason.problem and "-f" in reason.way_out
    assert refuse_destination(some_settings(flavor="small"), a_source(), facts) == []


def test_a_flavor_that_is_another_is_reported_in_the_plan() -> None:
    source = a_source(server=a_server(flavor=a_flavor(extra_specs={"hw:cpu_policy": "dedicated", "a": "1"})))
    facts = a_destination(flavors=(a_flavor(ram=1024, extra_specs={"a": "1", "b": "2"}),))
    assert refuse_destination(some_settings(), source, facts) == []
    lines = "\n".join(plan_lines(some_settings(), make_plan(some_settings(), source, facts, "r"), source, 0.0, Report()))
    for what in ("1024 MiB of RAM for 512", "b 2 for unset", "hw:cpu_policy unset for dedicated"):
        assert f"flavor     has {what} of the source's" in lines
    same = a_destination(flavors=(a_flavor(extra_specs=None),))
    assert "of the source's" not in "\n".join(plan_lines(some_settings(), make_plan(some_settings(), source, same, "r"), source, 0.0, Report()))


@pytest.mark.parametrize(("key", "extra", "is_told"), [("mine", {}, True), ("mine", {"key_name": "other"}, False), ("", {}, False)])
def test_hazard_30_a_key_pair_that_the_new_instance_does_not_have_is_reported_in_the_plan(
        key: str, extra: dict[str, object], is_told: bool) -> None:
    source, facts, settings = a_source(server=a_server(key=key)), a_destination(), some_settings(extra_args=extra)
    assert refuse_destination(settings, source, facts) == []
    plan = make_plan(settings, source, facts, "r")  # whoever owned it has deleted it
    lines = "\n".join(plan_lines(settings, plan, source, 0.0, Report()))
    assert (re.search("key_name  mine +left behind", lines) is not None) is is_told is ("key_name mine" in plan.left_behind)


def test_what_the_destination_does_not_take_of_extra_arguments_is_reported_with_all_else() -> None:
    assert refuse(some_settings(), a_source(), a_destination(refused="no x"))[0] == Reason("destination cloud: -e: no x", "leave it out")


def test_a_quota_that_would_be_exceeded_is_refused() -> None:
    limits = {"maxTotalInstances": 1, "totalInstancesUsed": 1}
    assert "quota" in only(refuse_destination(some_settings(), a_source(), a_destination(limits=limits))).problem


def test_a_missing_flavor_and_a_missing_image_are_reported_together() -> None:
    reasons = refuse_destination(some_settings(flavor="x", image="y"), a_source(), a_destination())
    assert ["'x'" in reasons[0].problem, "'y'" in reasons[1].problem] == [True, True]


def test_an_image_is_not_looked_for_where_the_source_has_none() -> None:
    source = a_source(server=a_server(image=""), image=None)
    assert about("image", refuse_destination(some_settings(), source, a_destination())) == []


def test_all_reasons_come_at_once() -> None:
    server = a_server(status="PAUSED", task="migrating", locked=True, metadata={MARK: "r"}, host="", volumes=("v1",), config_drive=True,
                      flavor=a_flavor(ephemeral=1))
    disk = a_disk(an_overlay(flaws=("internal snapshots",)), a_base(flaws=("encryption",)), has_tpm=True, beside=("disk.eph0",))
    source = a_source(server=server, disks={ROOT: disk}, problems=[Reason("source: trouble")])
    destination = a_destination(same_name=(a_server(id="x"),), sees_hosts=False, limits={"maxTotalCores": 0})
    reasons = refuse(some_settings(flavor="none such", image="none such"), source, destination)
    assert [next(word for word in words if word in reason.problem) for reason, words in zip(reasons, (
        ["trouble"], ["PAUSED"], ["task"], ["locked"], ["run r"], ["host"], ["internal snapshots"],
        ["encryption"], ["TPM"], ["v1"], ["taken"], ["destination cloud: these credentials"], ["flavor"], ["image"]), strict=True)]
    assert all(reason.way_out for reason in reasons[1:])


def test_what_could_not_be_found_out_is_reported_and_the_rest_is_still_looked_at() -> None:
    source = SourceFacts(NEVER_ASKED, problems=[Reason("source cloud: there is no server")])
    destination = a_destination(same_name=(a_server(id="x"),))
    reasons = refuse(some_settings(flavor="small", image="debian"), source, destination)
    assert ["no server" in reasons[0].problem, "taken" in reasons[1].problem] == [True, True]


def test_an_unreachable_destination_does_not_hide_what_is_wrong_with_the_source() -> None:
    destination = DestinationFacts(None, problems=[Reason("destination cloud: sign in: refused")])
    reasons = refuse(some_settings(), a_source(server=a_server(locked=True)), destination)
    assert ["sign in" in reasons[0].problem, "locked" in reasons[1].problem] == [True, True]
