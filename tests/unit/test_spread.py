"""The map of hosts, what forbids to follow it, and the order of the moves; the moves themselves are tried on real clouds."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from migrena import (
    Cloud,
    CloudError,
    ComputeHost,
    Move,
    Reason,
    Refused,
    Screen,
    Server,
    Undo,
    UsageError,
    await_room,
    find_moves,
    in_order,
    move_one,
    read_map,
    refuse_moves,
)
from unit.makers import a_flavor, a_server, some_settings

HOSTS = [ComputeHost("cmp1", True, True), ComputeHost("cmp2", True, True), ComputeHost("off", False, True), ComputeHost("gone", True, False)]


def on(host: str, name: str, **different: Any) -> Server:
    """An instance on a host."""
    return a_server(id=f"id-{name}", name=name, host=host, hypervisor=host, **different)


WEB, OTHER, STOPPED = on("cmp1", "web"), on("cmp2", "other"), on("cmp1", "stopped", status="SHUTOFF")
SERVERS = [WEB, OTHER, STOPPED, on("gone", "lost"), on("cmp1", "twin"), a_server(id="id-second", name="twin", hypervisor="cmp2")]


@pytest.mark.parametrize(("content", "words"), [
    ('{"cmp1": ["a",]}', "line 1 column 15"), ('{\n"cmp1" ["a"]}', "line 2 column 8"),
    ("[]", "not a map of hosts"), ('{"cmp1": "a"}', "not a map of hosts"),
    ('{"cmp1": [1]}', "not a map of hosts"), ('{"cmp1": ["a"], "cmp1": []}', "names cmp1 twice"), ("", "line 1 column 1"), (None, "No such file")])
def test_a_file_that_is_not_a_map_is_refused_with_its_place(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "map.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=words):
        read_map(str(path))


def forbidden(wanted: dict[str, list[str]], servers: list[Server]) -> list[Reason]:
    """All that forbids to follow a map."""
    moves, reasons = find_moves(wanted, servers, HOSTS)
    return [*reasons, *refuse_moves(wanted, moves, HOSTS)]


@pytest.mark.parametrize(("wanted", "words"), [
    ({"cmp3": ["web"]}, ["no compute host 'cmp3'; did you mean cmp", "known: cmp1, cmp2, gone, off"]),
    ({"off": ["web"]}, ["off is disabled"]), ({"gone": ["web"]}, ["gone is down"]),
    ({"cmp2": ["nobody"]}, ["no instance 'nobody'"]), ({"cmp2": ["twin"]}, ["2 instances are named 'twin'", "id-second"]),
    ({"cmp2": ["web", "id-web"]}, ["web is in the map 2 times"]), ({"cmp2": ["web"], "cmp1": ["web"]}, ["2 times: on cmp2, cmp1"]),
    ({"cmp2": ["lost"]}, ["lost is on compute host gone, which is down"]), ({"cmp2": ["wbe"]}, ["no instance 'wbe'", "nearest: web"]),
    ({"cmp2": ["stopped"]}, ["stopped is SHUTOFF, and cannot"]), ({"cmp3": ["nobody"], "off": ["web"]}, ["cmp3", "nobody", "disabled"])])
def test_all_that_forbids_a_move_is_reported_at_once(wanted: dict[str, list[str]], words: list[str]) -> None:
    told = " ".join(f"{reason.problem} {reason.way_out}" for reason in forbidden(wanted, SERVERS))
    for word in words:
        assert word in told


def test_what_is_where_it_shall_be_may_be_stopped_and_its_host_disabled() -> None:
    settled = [on("off", "still", status="SHUTOFF")]
    assert find_moves({"off": ["still"]}, settled, HOSTS)[0] == [Move(settled[0], "off")] and forbidden({"off": ["still"]}, settled) == []


def large(host: str, name: str, to: str, ram: int = 4) -> Move:
    """The move of an instance that takes so much memory."""
    return Move(on(host, name), to, {"VCPU": 1, "MEMORY_MB": ram})


def full(name: str, ram: int) -> ComputeHost:
    """A host with so much memory left."""
    return ComputeHost(name, True, True, {"VCPU": 100, "MEMORY_MB": ram, "DISK_GB": 100})


def test_moves_keep_their_order_but_wait_for_room() -> None:
    one, other, third = (large("a", "one", "b"), large("b", "other", "c"), large("c", "third", "a", 1))
    assert in_order([one, other, third], [full("a", 0), full("b", 4), full("c", 4)]) == [one, other, third]
    assert in_order([one, other, third], [full("a", 1), full("b", 0), full("c", 3)]) == [third, other, one]
    assert in_order([one, other], HOSTS[:0] or [ComputeHost(name, True, True) for name in "abc"]) == [one, other]  # Nova decides


def test_a_ring_of_full_hosts_is_refused_with_its_names() -> None:
    with pytest.raises(Refused, match=r"one to b \(too little MEMORY_MB\), other to a \(too little MEMORY_MB\)"):
        in_order([large("a", "one", "b"), large("b", "other", "a")], [full("a", 3), full("b", 3)])


def test_an_instance_takes_what_placement_has_given_it_whatever_its_flavor_says() -> None:
    """One that boots from a volume takes no disk, and one with cores of its own takes PCPU."""
    taken = {"PCPU": 2, "MEMORY_MB": 512}
    (move,), _ = find_moves({"b": ["x"]}, [on("a", "x", flavor=a_flavor(disk=100))], [ComputeHost("a", True, True, {}, {"id-x": taken})])
    assert move.needs == taken and in_order([move], [ComputeHost("b", True, True, {"VCPU": 0, "MEMORY_MB": 512, "DISK_GB": 0})]) == [move]


class Late:
    """A stand-in for a Nova that takes a while to give back the room of what has left: the lab's are too quick to be seen at it."""

    polls = staticmethod(Cloud.polls)

    def __init__(self, *left: int) -> None:
        self.left = list(left)

    def retrying(self, act: str, do: Callable[[], Any]) -> Any:
        return do()

    def hosts(self) -> list[ComputeHost]:
        return [full("b", self.left.pop(0))]


def test_a_move_to_a_host_that_another_has_left_waits_for_its_room() -> None:
    nova = Late(0, 3, 4, 9)
    await_room(cast(Cloud, nova), large("a", "one", "b"))
    assert nova.left == [9]


class Refusing:
    """A stand-in for a Nova that accepts no live migration."""

    label = "the"

    def last_migration(self, id: str, after: int = 0) -> tuple[int, str]:
        return 0, ""

    def move(self, id: str, host: str) -> None:
        raise CloudError("not that one")


def test_a_failure_is_reported_and_the_rest_goes_on_only_with_keep_going() -> None:
    said, row = io.StringIO(), dict[str, object]()
    cloud, undo = cast(Cloud, Refusing()), Undo(Screen(stream=said))
    move_one(cloud, Move(WEB, "cmp2"), some_settings(keep_going=True), undo, row)
    assert (row["result"], row["error"]) == ("failed", "not that one") and "error: not that one" in said.getvalue()
    with pytest.raises(CloudError, match="not that one"):
        move_one(cloud, Move(WEB, "cmp2"), some_settings(), undo, row)


class HalfDone(Refusing):
    """A stand-in for a Nova that has moved an instance and fails after that, as it does when Neutron does."""

    asked, polls = False, staticmethod(Cloud.polls)

    def last_migration(self, id: str, after: int = 0) -> tuple[int, str]:
        return (1, "error") if self.asked else (0, "")

    def move(self, id: str, host: str) -> None:
        self.asked = True

    def server_retrying(self, id: str) -> Server:
        return replace(WEB, host="cmp2", status="ERROR")

    def why_failed(self, id: str, action: str) -> str:
        return "the port was not bound"


def test_an_instance_in_error_on_the_new_host_is_a_failure_and_its_state_is_reported() -> None:
    words = "web is ERROR on cmp2: migration 1 is error: the port was not bound"
    with pytest.raises(CloudError, match=words) as failure:
        move_one(cast(Cloud, HalfDone()), Move(WEB, "cmp2"), some_settings(), Undo(Screen(stream=io.StringIO())), {})
    assert "set --state active" in failure.value.reasons[0].way_out


class Stuck(HalfDone):
    """A stand-in for a Nova whose migration, the second of its instance, neither ends nor lets itself be ended."""

    def last_migration(self, id: str, after: int = 0) -> tuple[int, str]:
        return (2, "running") if self.asked and self.has_begun else (0, "") if after else (1, "cancelled")

    def __init__(self, has_begun: bool) -> None:
        self.has_begun = has_begun

    def server_retrying(self, id: str) -> Server:
        return replace(WEB, status="MIGRATING", task="migrating")

    def retrying(self, act: str, do: Callable[[], Any]) -> Any:
        return do()

    def hosts(self) -> list[ComputeHost]:
        return HOSTS

    def progress(self, id: str) -> None:
        return None

    def abort(self, id: str, migration: int) -> None:
        raise CloudError("it cannot be ended")


@pytest.mark.parametrize(("has_begun", "called", "left"), [
    (True, "migration 2 is running", "migration 2 of web to cmp2 continues"),
    (False, "Nova has not begun the migration", "the migration of web to cmp2 continues")])
def test_a_migration_that_cannot_be_ended_is_left_to_nova_and_named(has_begun: bool, called: str, left: str) -> None:
    said = io.StringIO()
    undo = Undo(Screen(stream=said))
    with pytest.raises(CloudError, match="cannot be ended"):
        move_one(cast(Cloud, Stuck(has_begun)), Move(WEB, "cmp2"), some_settings(timeout=0, abort=True), undo, {})
    assert called in said.getvalue() and left in undo.left[0]
