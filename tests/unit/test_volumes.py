"""Cinder's answers, also late, lost and false ones. The adapter is a stand-in: a real Cinder does not lose answers when asked to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from keystoneauth1 import exceptions

import migrena
from migrena import (
    DONE,
    MADE,
    ORIGIN,
    ROOT,
    CloudError,
    DiskImage,
    FinalError,
    HostError,
    Kept,
    RunRecord,
    Seen,
    Service,
    Situation,
    SourceFacts,
    Stage,
    Step,
    Volume,
    VolumeStore,
    ask_for,
    delete_things,
    identified,
    logical_volume,
    require_identity,
    survey_volumes,
)
from unit.makers import UUID, GiB, a_disk, a_server, a_volume, an_overlay

Answer = dict[str, Any] | Exception


class Cinder:
    """Volumes by id; what `before` and `after` tell of a request comes before it is done, or in place of its answer."""

    def __init__(self) -> None:
        self.volumes: dict[str, dict[str, Any]] = {}
        self.before: list[Exception] = []
        self.after: list[Exception] = []
        self.asked: list[str] = []
        self.becomes: Callable[[dict[str, Any]], None] = lambda volume: None

    def answer(self, told: dict[str, Any]) -> SimpleNamespace:
        if self.after:
            raise self.after.pop(0)
        return SimpleNamespace(json=lambda: told)

    def begin(self, what: str) -> None:
        self.asked.append(what)
        if self.before:
            raise self.before.pop(0)

    def get(self, path: str, **how: str) -> SimpleNamespace:
        self.begin(f"GET {path}")
        if path.startswith("/volumes/detail"):
            return self.answer({"volumes": list(self.volumes.values())})
        if (volume := self.volumes.get(path.rpartition("/")[2])) is None:
            raise exceptions.NotFound("no such volume")
        self.becomes(volume)
        return self.answer({"volume": dict(volume)})

    def post(self, path: str, json: Mapping[str, Any]) -> SimpleNamespace:
        self.begin(f"POST {path}")
        if path == "/volumes":
            id = f"new{len(self.volumes)}"
            self.volumes[id] = {"id": id, "status": "creating", **json["volume"]}
            return self.answer({"volume": {"id": id}})
        return self.answer({})

    def delete(self, path: str) -> SimpleNamespace:
        self.begin(f"DELETE {path}")
        del self.volumes[path.rpartition("/")[2]]
        return self.answer({})


@pytest.fixture
def cinder() -> Cinder:
    """A Cinder that knows no volume."""
    return Cinder()


@pytest.fixture
def cloud(cinder: Cinder, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cloud with it, in which no time passes."""
    clock = iter(range(10**6))
    monkeypatch.setattr(migrena, "time", SimpleNamespace(sleep=lambda seconds: None, monotonic=lambda: float(next(clock))))
    made: Any = Service()
    made.label, made.servers, made.user = "destination", {}, "u"
    made.find_server = made.servers.get
    made.volumes, made.has_volumes = VolumeStore(made, cinder), True
    made.networks = SimpleNamespace(made_by=lambda *_: [])
    return made


def a_run(cloud: Any) -> Any:
    """A run that makes a volume for v1."""
    journal = SimpleNamespace(act=lambda *_, **__: nullcontext({}))
    return SimpleNamespace(destination=cloud, plan=SimpleNamespace(run="run-1"), journal=journal, record=record())


FACTS = {"size": 2, "metadata": {MADE: "run-1", ORIGIN: "v1"}}
LOST = exceptions.GatewayTimeout("the proxy gave up")


def test_a_volume_is_asked_for_once(cloud: Any, cinder: Cinder) -> None:
    assert ask_for(a_run(cloud), "volume", "volume-v1", FACTS) == "new0"
    assert cinder.asked == ["POST /volumes"]


@pytest.mark.parametrize("error", [LOST, exceptions.ConnectFailure("reset"), exceptions.InternalServerError("oops")])
def test_a_lost_answer_leads_neither_to_two_volumes_nor_to_a_forgotten_one(cloud: Any, cinder: Cinder, error: Exception) -> None:
    cinder.after = [error]
    assert ask_for(a_run(cloud), "volume", "volume-v1", FACTS) == "new0"
    assert list(cinder.volumes) == ["new0"] and cinder.asked.count("POST /volumes") == 1


def test_a_request_that_was_not_done_is_an_error_and_leaves_none(cloud: Any, cinder: Cinder) -> None:
    cinder.before = [LOST]
    with pytest.raises(CloudError, match="gave up"):
        ask_for(a_run(cloud), "volume", "volume-v1", FACTS)
    assert cinder.volumes == {} and cinder.asked.count("POST /volumes") == 1


def test_a_refusal_is_an_error_at_once(cloud: Any, cinder: Cinder) -> None:
    cinder.before = [exceptions.RequestEntityTooLarge("quota")]
    with pytest.raises(CloudError, match="quota"):
        ask_for(a_run(cloud), "volume", "volume-v1", FACTS)
    assert len(cinder.asked) == 1


def test_one_that_takes_its_time_is_waited_for_and_one_that_fails_is_told(cloud: Any, cinder: Cinder) -> None:
    turns = iter(["creating"] * 30 + ["downloading", "available"])
    cinder.volumes["x"] = {"id": "x", "status": "creating", "size": 1}
    cinder.becomes = lambda volume: volume.update(status=next(turns))
    cinder.before = [exceptions.InternalServerError("oops")]
    assert cloud.volumes.wait("x").status == "available"
    cinder.becomes = lambda volume: volume.update(status="error")
    with pytest.raises(CloudError, match="volume x is error") as caught:
        cloud.volumes.wait("x")
    assert "openstack volume message list" in caught.value.reasons[0].way_out


def record(*ids: str, **last: object) -> RunRecord:
    """A run whose journal knows of these volumes, and tells this of one more."""
    acts = [Step("create volume", "", "", "done", {"of": f"volume-{id}", "id": id}) for id in ids]
    return RunRecord("run-1", "failed", "", {}, (*acts, *([Step("create volume", "", facts=last)] if last else [])))


def now(made: object = None) -> Situation:
    """What is seen of a run that has made volumes, and perhaps this instance."""
    server: Any = made
    return Situation("run-1", Stage.MADE, Seen("source"), Seen("made" if made else "", server))


@pytest.fixture
def journal() -> Any:
    """Takes all that is written."""
    return SimpleNamespace(act=lambda *_, **__: nullcontext({}))


def test_all_volumes_of_a_run_are_deleted_also_those_that_only_their_mark_tells_and_no_others(cloud: Any, cinder: Cinder, journal: Any) -> None:
    def volumes() -> None:
        for id, marks in (("a", {MADE: "run-1"}), ("b", {DONE: "run-1"}), ("c", {MADE: "run-2"}), ("d", {}), ("e", {ORIGIN: "v1"})):
            cinder.volumes[id] = {"id": id, "status": "available", "size": 1, "metadata": marks}

    volumes()
    delete_things(cloud, record("d", "gone", of="volume-x"), now(), journal, 0.0)  # an answer was lost
    assert set(cinder.volumes) == {"c", "e"}
    volumes()
    delete_things(cloud, RunRecord("", "", "", {}), now(), journal, 0.0, ("a", "b", "c"))  # the journal is lost
    assert set(cinder.volumes) == {"c", "d", "e"}


def test_without_a_journal_a_volume_with_the_mark_that_was_not_attached_is_kept_and_told(cloud: Any, cinder: Cinder, journal: Any) -> None:
    cinder.volumes = {id: {"id": id, "status": "available", "size": 1, "metadata": {DONE: "run-1"}} for id in ("a", "restored")}
    again = RunRecord("run-1", "left", "", {"attached": ["a"]})  # what the first rollback has written
    for record_known in (RunRecord("", "", "", {}), again):
        cinder.volumes["a"] = {"id": "a", "status": "available", "size": 1, "metadata": {DONE: "run-1"}}
        with pytest.raises(Kept, match="volumes restored have the run's mark, but were not attached to its instance"):
            delete_things(cloud, record_known, now(), journal, 0.0, ("a",))
        assert set(cinder.volumes) == {"restored"}


def test_a_volume_whose_backend_rounds_up_is_taken_and_one_that_is_too_small_is_not(cloud: Any, cinder: Cinder) -> None:
    disk = a_disk(an_overlay(path="rbd:volumes/v1", format="raw", storage={"driver": "rbd"}, size=2 * GiB + 1024**2), volume="v1")
    assert identified(cloud, UUID, disk, a_volume()) == disk
    cinder.volumes["v1"] = dict(a_volume().facts)
    cloud.volumes.with_snapshots = lambda ids: set()
    found = SourceFacts(disks={"volume-v1": disk, ROOT: a_disk()})
    survey_volumes(found, cloud, a_server(volumes=("v1",)))
    assert found.volumes["volume-v1"].size == 3  # what is asked for, and counted against the quota
    small = replace(disk, chain=(replace(disk.top, size=2 * GiB - 512),))
    with pytest.raises(HostError, match="volume data v1 has 2 GiB, but rbd:volumes/v1"):  # also after the run has begun: no refusal
        identified(cloud, UUID, small, a_volume())


def test_snapshots_of_all_projects_are_looked_for_volume_by_volume(cloud: Any) -> None:
    asked: list[str] = []

    def get(path: str) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(json=lambda: {"snapshots": [{"volume_id": "b"}, {"volume_id": "x"}] if path.endswith("=b") else []})

    adapter: Any = SimpleNamespace(get=get)
    assert VolumeStore(cloud, adapter).with_snapshots(["a", "b"]) == {"b"}
    assert all("all_tenants=1" in path for path in asked)


@pytest.mark.parametrize("last", [{}, {"of": "volume-x", "refused": True}])
def test_one_that_merely_carries_the_mark_is_kept_where_all_ids_are_known(cloud: Any, cinder: Cinder, journal: Any, last: dict[str, object]) -> None:
    cinder.volumes = {id: {"id": id, "status": "available", "size": 1, "metadata": {DONE: "run-1"}} for id in ("a", "restored from its backup")}
    delete_things(cloud, record("a", **last), now(), journal, 60.0)
    assert set(cinder.volumes) == {"restored from its backup"}


def test_one_that_cinder_makes_late_is_deleted_and_one_that_it_may_still_make_is_told(cloud: Any, cinder: Cinder, journal: Any) -> None:
    cinder.volumes["a"] = {"id": "a", "status": "available", "size": 1, "metadata": {}}
    with pytest.raises(Kept, match="may still be made"):
        delete_things(cloud, record("a", of="volume-x"), now(), journal, 60.0)
    assert cinder.volumes == {}
    cinder.before = [exceptions.InternalServerError("oops")] * 3
    cinder.volumes["late"] = {"id": "late", "status": "available", "size": 1, "metadata": {MADE: "run-1"}}
    delete_things(cloud, record(of="volume-x"), now(), journal, 60.0)
    assert cinder.volumes == {}


def test_one_that_somebody_else_attached_is_kept_and_told(cloud: Any, cinder: Cinder, journal: Any) -> None:
    cloud.servers["theirs"] = object()
    cinder.volumes = {id: {"id": id, "status": status, "size": 1, "metadata": {MADE: "run-1"}, "attachments": [{"server_id": server}]}
                      for id, status, server in (("a", "in-use", "theirs"), ("b", "available", "gone"))}
    with pytest.raises(Kept, match="a is attached to theirs, and is kept"):
        delete_things(cloud, record("a", "b"), now(), journal, 60.0)
    assert set(cinder.volumes) == {"a"}


def test_while_the_instance_is_there_no_volume_of_it_is_deleted(cloud: Any, cinder: Cinder, journal: Any) -> None:
    cinder.volumes["a"] = {"id": "a", "status": "available", "size": 1, "metadata": {MADE: "run-1"}}  # somebody detached it
    with pytest.raises(Kept, match="volumes a are kept with instance made"):
        delete_things(cloud, record("a"), now(object()), journal, 60.0)
    assert set(cinder.volumes) == {"a"}


def test_one_that_nova_lets_go_of_late_is_deleted_then(cloud: Any, cinder: Cinder, journal: Any) -> None:
    turns = iter(["in-use", "detaching", "available", "available"])
    cinder.volumes["a"] = {"id": "a", "status": "in-use", "size": 1, "attachments": [{"server_id": "gone"}]}
    cinder.becomes = lambda volume: volume.update(status=next(turns))
    delete_things(cloud, record("a"), now(), journal, 60.0)
    assert cinder.volumes == {}


@pytest.mark.parametrize(("info", "ends"), [
    ({"driver_volume_type": "iscsi", "target_iqn": "iqn.x:volume-v1", "target_lun": 0}, ("iqn.x:volume-v1-lun-0",)),
    ({"driver_volume_type": "iscsi", "target_iqns": ["iqn.x:a", "iqn.x:b"], "target_luns": [1, 2]}, ("iqn.x:a-lun-1", "iqn.x:b-lun-2")),
    ({"driver_volume_type": "fibre_channel", "target_wwn": ["5001", "5002"], "target_lun": 3}, ("fc-0x5001-lun-3", "fc-0x5002-lun-3")),
    ({"driver_volume_type": "fibre_channel", "target_wwn": "50AB", "target_lun": 3}, ("fc-0x50ab-lun-3",)),
    ({"driver_volume_type": "fibre_channel", "target_wwn": "50ab", "target_lun": "256"}, ("fc-0x50ab-lun-0x0100000000000000",)),
    ({"driver_volume_type": "iscsi", "target_iqn": "iqn.x:a", "target_lun": 1, "addressing_mode": "SAM2"}, ("iqn.x:a-lun-1",)),
    ({"driver_volume_type": "iscsi", "target_iqn": "iqn.x:a", "target_lun": 256, "addressing_mode": "SAM2"}, ("iqn.x:a-lun-0x4100000000000000",)),
    ({"driver_volume_type": "iscsi", "target_iqn": "iqn.x:a", "target_lun": 1, "addressing_mode": "SAM3-flat"}, ("iqn.x:a-lun-0x4001000000000000",)),
    ({"driver_volume_type": "iscsi", "target_iqn": "iqn.x:a"}, ("iqn.x:a-lun--1",)),
    ({"driver_volume_type": "nvmeof"}, None), ({}, None)])
def test_how_a_volume_is_connected_is_what_proves_its_device(cloud: Any, info: dict[str, Any], ends: tuple[str, ...] | None) -> None:
    volume = a_volume(attachments=[{"server_id": UUID, "attachment_id": "att"}, {"server_id": "another", "attachment_id": "x"}])
    adapter: Any = SimpleNamespace(get=lambda path, microversion: SimpleNamespace(json=lambda: {"attachment": {"connection_info": info}}))
    store = VolumeStore(cloud, adapter)
    if ends is None:
        with pytest.raises(CloudError, match="cannot be proven to be that volume"):
            store.connection(volume, UUID)
    else:
        assert store.connection(volume, UUID) == ends
    with pytest.raises(CloudError, match="0 times"):
        store.connection(volume, "no such")


def host(*lines: str) -> Any:
    """A host whose device has these names."""
    return SimpleNamespace(name="cmp1", script=lambda script, path: migrena.Answer("\n".join(lines), "cmp1", ()))


def a_device(*identity: str) -> DiskImage:
    return DiskImage("/dev/sda", "raw", 1, 1, 1, storage={"driver": "host_device", "filename": "/dev/sda"}, identity=identity)


ISCSI = "path: ip-10.0.0.1:3260-iscsi-iqn.x:volume-v1-lun-1"
FC = "path: fc-0x10aa-0x50ab-lun-3 pci-0000:05:00.2-fc-0x50ab-lun-3"  # with the second name that some distributions add


@pytest.mark.parametrize(("names", "identity"), [
    ([ISCSI], ["iqn.x:volume-v1-lun-1"]), (["dm:mpatha", ISCSI, ISCSI.replace("10.0.0.1", "10.0.0.2")], ["iqn.x:volume-v1-lun-1"]),
    ([FC], ["fc-0x50ab-lun-3"]), (["dm:mpatha", FC, FC.replace("50ab", "50ac")], ["fc-0x50ab-lun-3", "fc-0x50ac-lun-3"]),
    (["dm:vg-x_disk", "path:unknown loop0"], ["dm:vg-x_disk"])])
def test_a_device_that_is_what_it_should_be_is_used(names: list[str], identity: list[str]) -> None:
    require_identity(host(*names), a_device(*identity))


@pytest.mark.parametrize(("names", "identity"), [
    ([ISCSI], ["iqn.x:volume-v2-lun-1"]), ([ISCSI], ["iqn.x:volume-v1-lun-0"]), ([ISCSI], ["iqn.x:volume-v1-lun-11"]), ([ISCSI], []), ([], ["x"]),
    (["path:unknown sda"], ["iqn.x:volume-v1-lun-1"]), (["dm:mpatha", ISCSI, "path:ip-x-iscsi-iqn.x:other-lun-1"], ["iqn.x:volume-v1-lun-1"]),
    ([f"{ISCSI} ip-x-iscsi-iqn.x:other-lun-1"], ["iqn.x:volume-v1-lun-1"]), (["path: fc-0x10aa-0x50ab-lun-3"], ["fc-0x50ab-lun-3"]),
    ([FC], ["fc-0x50ac-lun-3"]), (["dm:vg-other", ISCSI], ["dm:vg-x_disk"])])
def test_any_other_device_is_refused(names: list[str], identity: list[str]) -> None:
    with pytest.raises(FinalError, match="is not proven to be the instance's disk"):
        require_identity(host(*names), a_device(*identity))


def test_a_device_that_is_gone_is_told_with_the_way_out() -> None:
    def gone(script: str, path: str) -> None:
        raise migrena.CommandError("cmp1", ("sh",), 1, "there is no device /dev/sda")

    gone_host: Any = SimpleNamespace(name="cmp1", script=gone)
    with pytest.raises(FinalError, match="there is no device") as caught:
        require_identity(gone_host, a_device("x"))
    assert "start and stop the instance once" in caught.value.reasons[0].way_out


def test_what_is_no_device_needs_no_proof() -> None:
    require_identity(host(), DiskImage("/disk", "raw", 1, 1, 1))
    require_identity(host(), DiskImage("rbd:a/b", "raw", 1, 1, 1, storage={"driver": "rbd"}))


def test_device_mapper_s_name_of_a_logical_volume() -> None:
    assert logical_volume("/dev/my-vg/1-2_disk") == ("dm:my--vg-1--2_disk",) and logical_volume("/dev/sda") == ()


def test_what_a_volume_is_called_when_told() -> None:
    assert a_volume().label == "volume data v1" and a_volume(name=None).label == "volume without a name v1"
    assert Volume.of(a_volume(volume_image_metadata={"image_id": "i", "hw_firmware_type": "uefi"}).facts).image_facts == {"hw_firmware_type": "uefi"}
