"""Decisions are made of facts alone: chunks, the view that is copied, the transport, the quota."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrena import (
    Action,
    Answer,
    BesideFile,
    Chunk,
    Disk,
    DiskImage,
    DiskJob,
    FinalError,
    HostError,
    InPlace,
    Pass,
    QemuTransport,
    as_extents,
    chunks,
    duration,
    human,
    next_gap,
    nova_takes,
    over_quota,
    pick_transport,
    pick_view,
    refuse_jobs,
    seconds_between,
    space_needed,
    wants_another_pass,
)
from unit.makers import a_base, a_disk, a_flavor, an_overlay, some_settings

MiB = 1024**2


@st.composite
def disks(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]], int]:
    """A length, extents within it (ascending, apart from each other) and a limit; lengths and offsets are any number of bytes."""
    edges = sorted(draw(st.sets(st.one_of(st.integers(0, 40 * MiB), st.integers(0, 40).map(lambda n: n * MiB)), max_size=16)))
    extents = [(start, stop - start) for start, stop in zip(edges[::2], edges[1::2], strict=False)]
    length = draw(st.integers(max([1, *edges]), max([1, *edges]) + 9 * MiB))
    return length, extents, draw(st.integers(1, 20)) * MiB


@given(disks(), st.sampled_from((0, MiB, 5 * MiB)))
def test_chunks_cover_the_disk_exactly_and_in_order(disk: tuple[int, list[tuple[int, int]], int], hole: int) -> None:
    length, extents, limit = disk
    split = chunks(length, extents, limit, MiB, hole)
    assert split[0].offset == 0
    assert split[-1].offset + split[-1].length == length
    assert all(one.offset + one.length == other.offset and other.offset % MiB == 0 for one, other in pairwise(split))
    assert all(chunk.length > 0 for chunk in split)


@given(disks(), st.sampled_from((0, MiB, 5 * MiB)))
def test_no_chunk_holds_more_than_the_limit(disk: tuple[int, list[tuple[int, int]], int], hole: int) -> None:
    length, extents, limit = disk
    split = chunks(length, extents, limit, MiB, hole)
    assert all(chunk.held <= limit for chunk in split)
    assert [piece for chunk in split for piece in chunk.extents if chunk.held != sum(held for _, held in chunk.extents)] == []
    inside = [byte for chunk in split for offset, held in chunk.extents for byte in (offset, offset + held)]
    joined = [byte for at, byte in enumerate(inside) if byte not in inside[max(0, at - 1):at] + inside[at + 1:at + 2]]
    assert joined == [byte for offset, held in extents for byte in (offset, offset + held)]


def touches(chunk: Chunk, offset: int, held: int) -> bool:
    return chunk.offset < offset + held and offset < chunk.offset + chunk.length


@given(disks(), st.sampled_from((0, MiB, 5 * MiB)))
def test_every_byte_that_is_held_is_copied_and_a_hole_where_it_counts_is_not(disk: tuple[int, list[tuple[int, int]], int], hole: int) -> None:
    length, extents, limit = disk
    split = chunks(length, extents, limit, MiB, hole)
    for offset, held in extents:
        assert all(chunk.held for chunk in split if touches(chunk, offset, held))
    for chunk in split if hole else ():
        blocks = range(chunk.offset, chunk.offset + chunk.length, MiB)
        empty = [not any(touches(Chunk(block, MiB, 1), *extent) for extent in extents) for block in blocks]
        assert all(empty) or not any(all(empty[at : at + hole // MiB + 1]) for at in range(len(empty) - hole // MiB))


def test_control_a_disk_without_extents_is_one_hole() -> None:
    assert chunks(5 * MiB + 1, [], MiB) == [Chunk(0, 5 * MiB + 1, 0)]


def test_a_disk_that_is_full_is_copied_from_end_to_end() -> None:
    split = chunks(3 * MiB + 7, [(0, 3 * MiB + 7)], 2 * MiB)
    assert split == [Chunk(0, MiB, MiB), Chunk(MiB, 2 * MiB, 2 * MiB), Chunk(3 * MiB, 7, 7)]


def test_chunks_get_smaller_towards_the_end() -> None:
    sizes = [chunk.length // MiB for chunk in chunks(4096 * MiB, [(0, 4096 * MiB)], 512 * MiB)]
    assert sizes == [256, *[512] * 4, 448, 336, 252, 189, 141, 106, 80, 64, 64, 64, 48]


def test_chunks_go_by_what_they_hold_and_holes_cost_no_chunk_of_their_own() -> None:
    far_apart = [(at * 1024 * MiB, 2 * MiB) for at in range(20)]
    assert [(chunk.length // MiB, chunk.held // MiB) for chunk in chunks(20480 * MiB, far_apart, 512 * MiB)] == [(15362, 32), (5118, 8)]
    assert len(chunks(20480 * MiB, far_apart, 512 * MiB, hole=64 * MiB)) == 40


def test_a_chunk_of_many_small_extents_is_known_as_such() -> None:
    crumbs = [(at * 64 * 1024, 4096) for at in range(65536)]
    assert all(chunk.is_scattered for chunk in chunks(4096 * MiB, crumbs, 512 * MiB))
    assert not any(chunk.is_scattered for chunk in chunks(4096 * MiB, [(0, MiB), (2 * MiB, 4 * MiB), (7 * MiB, 4089 * MiB)], 512 * MiB))


def passes(*changed: int, seconds: float = 10.0, looking: float = 2.0) -> list[Pass]:
    """Passes that each found so many MiB changed, at 100 MiB/s."""
    return [Pass(found * MiB, looking, found / 100, seconds) for found in changed]


@pytest.mark.parametrize(("found", "different", "another"), [
    (passes(4000), {}, True),  # what changes is known by the second
    (passes(4000, 1000), {}, False),  # it would find as much again
    ([*passes(4000, seconds=50), *passes(1000)], {}, True),
    ([*passes(4000, seconds=50), *passes(200)], {}, False),  # less than half a second of the wire
    (passes(4000), {"warm_passes": 1}, False),
    ([*passes(4000, seconds=50), *passes(1000)], {"warm_passes": 2}, False),
    (passes(4000), {"max_downtime": 30}, True),
    (passes(4000, 1000), {"max_downtime": 30}, False),
    (passes(4000, 1000), {"max_downtime": 15}, True),
    (passes(4000, 1000), {"max_downtime": 15, "warm_passes": 3}, True),
])
def test_passes_go_on_while_that_is_of_use(found: list[Pass], different: dict[str, int], another: bool) -> None:
    assert wants_another_pass(some_settings(**different), found, 4.0, 60.0) is another


@pytest.mark.parametrize("different", [{"warm_timeout": 59}, {"warm_passes": 2}])
def test_a_downtime_that_is_not_in_reach_is_reported(different: dict[str, int]) -> None:
    with pytest.raises(FinalError, match=r"after 2 passes in 0:01:00 the source would still be down for about 18.0 s"):
        wants_another_pass(some_settings(max_downtime=15, **different), passes(4000, 1000), 4.0, 60.0)


@pytest.mark.parametrize(("took", "fresh", "expected"), [
    ({"stop": 4.0, "start": 2.0}, 60.0, 6.0),  # what the source itself took
    ({"start": 2.0}, 13.0, 5.0),  # the new one was booting and missed the power button once
    ({"stop": 10800.0, "start": -27.0}, 5.0, 100.0), ({}, 5.0, 8.0), ({}, 21.0, 6.0), ({}, 61.0, 64.0)])
def test_novas_part_of_the_downtime_is_what_it_took_the_last_time(took: dict[str, float], fresh: float, expected: float) -> None:
    actions = [Action(f"req-{name}", name, "", False, seconds) for name, seconds in took.items()]
    older = [Action("req-1", "stop", "", True, 99.0), *(Action("req-2", name, "", False, 50.0) for name in took)]
    assert nova_takes([*actions, *older], fresh) == expected


def test_passes_that_gain_nothing_are_spaced_out_further_each_time_up_to_a_minute() -> None:
    gaps = [0.0]
    for _ in range(8):
        gaps.append(next_gap(gaps[-1], has_gained=False))
    assert gaps == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert next_gap(60.0, has_gained=True) == 0.0


def test_a_downtime_that_nova_alone_takes_longer_than_is_told_at_once() -> None:
    with pytest.raises(FinalError, match="would still be down for about"):
        wants_another_pass(some_settings(max_downtime=15), passes(4000, 1000), 14.0, 60.0)


def test_the_time_of_an_action_is_unknown_where_nova_does_not_tell_it() -> None:
    assert seconds_between("2026-11-27T07:30:27.000000", "2026-11-27T07:30:31.500000") == 4.5
    assert seconds_between("2026-11-27T07:30:27.000000", None) == seconds_between("soon", "later") == 0.0


def test_blocks_side_by_side_are_brought_together() -> None:
    assert as_extents([7, 1, 2, 3, 9], 9 * MiB + 5) == [(MiB, 3 * MiB), (7 * MiB, MiB), (9 * MiB, 5)]
    assert as_extents([9], 9 * MiB) == as_extents([], MiB) == []


RAW = DiskImage("/d", "raw", size=MiB, length=MiB, allocated=MiB)
FLAT = an_overlay(backing="", backing_format="")
LVM = DiskImage("/d", "lvm", size=MiB, length=MiB, allocated=MiB)
DEEP = (an_overlay(), an_overlay(path="/middle"), a_base())


@pytest.mark.parametrize(("source", "fresh", "bases_equal", "whole_file", "why"), [
    (a_disk(), a_disk(), True, True, "both bases have the same content"),
    (a_disk(), a_disk(), False, False, "the bases are not proven equal"),
    (Disk((RAW,)), Disk((RAW,)), False, True, "both disks are raw"),
    (Disk((FLAT,)), Disk((FLAT,)), False, True, "both disks are qcow2 without a base"),
    (Disk((RAW,)), a_disk(), False, False, "the source is raw, the destination qcow2"),
    (a_disk(), Disk((RAW,)), False, False, "the source is qcow2, the destination raw"),
    (Disk((FLAT,)), a_disk(), True, False, "only one of the disks has a base"),
    (a_disk(), Disk((FLAT,)), True, False, "only one of the disks has a base"),
    (Disk(DEEP), a_disk(), True, False, "a chain has more than one base"),
    (a_disk(), Disk(DEEP), True, False, "a chain has more than one base"),
])
def test_the_file_is_copied_only_where_it_means_the_same_at_the_other_end(
        source: Disk, fresh: Disk, bases_equal: bool, whole_file: bool, why: str) -> None:
    assert pick_view(source, fresh, bases_equal) == (whole_file, why)


@pytest.mark.parametrize(("lacking", "top", "whole_file", "transport", "why"), [
    ([], an_overlay(), True, "nbd", "are available"),
    (["nbd-client on cmp2"], an_overlay(), True, "qemu", "missing for nbd: nbd-client on cmp2"),
    ([], an_overlay(), False, "qemu", "guest's view"),
    ([], an_overlay(length=196_640, allocated=196_640), True, "qemu", "196,640 bytes are not a multiple of 512"),
    ([], an_overlay(allocated=10 * MiB), True, "qemu", "sparse"),
])
def test_auto_takes_nbd_where_it_serves_and_says_why(lacking: list[str], top: DiskImage, whole_file: bool, transport: str, why: str) -> None:
    picked, reason = pick_transport(some_settings(), lacking, top, whole_file)
    assert picked == transport
    assert why in reason


@pytest.mark.parametrize("wanted", ["nbd", "qemu"])
def test_a_transport_that_was_asked_for_is_taken(wanted: str) -> None:
    settings = some_settings(transport=wanted)
    assert pick_transport(settings, ["nbd-client on cmp2"], an_overlay(length=7), False) == (wanted, "as asked for")


@pytest.mark.parametrize(("different", "why"), [({"warm": True}, "--warm reads"), ({"compress": "on"}, "--compress on needs")])
def test_what_needs_qemu_nbd_is_named_as_the_reason_and_not_a_wish_that_nobody_had(different: dict[str, Any], why: str) -> None:
    transport, told = pick_transport(some_settings(**different), [], an_overlay(), True)
    assert transport == "qemu" and told.startswith(why)


LIMITS = {"maxTotalInstances": 10, "totalInstancesUsed": 9, "maxTotalCores": 8, "totalCoresUsed": 4, "maxTotalRAMSize": 4096, "totalRAMUsed": 0}


@pytest.mark.parametrize(("different", "flavor", "exceeded"), [
    ({}, {}, []),
    ({"totalInstancesUsed": 10}, {}, ["10 of 10 instances are used, 1 more are needed"]),
    ({}, {"vcpus": 4}, []),
    ({}, {"vcpus": 5}, ["4 of 8 cores are used, 5 more are needed"]),
    ({}, {"ram": 4096}, []),
    ({}, {"ram": 4097}, ["0 of 4096 MiB of RAM are used, 4097 more are needed"]),
    ({"maxTotalInstances": -1, "maxTotalCores": -1, "maxTotalRAMSize": -1}, {"vcpus": 500, "ram": 10**9}, []),
    ({"maxTotalInstances": 0, "totalInstancesUsed": 0}, {"vcpus": 5, "ram": 4097}, ["instances", "cores", "MiB of RAM"]),
])
def test_a_quota_is_reported_before_it_is_exceeded(different: dict[str, int], flavor: dict[str, int], exceeded: list[str]) -> None:
    told = over_quota({**LIMITS, **different}, a_flavor(**flavor))
    assert len(told) == len(exceeded)
    assert all(part in line for part, line in zip(exceeded, told, strict=True))


def test_a_cloud_that_tells_no_quota_has_none() -> None:
    assert over_quota({}, a_flavor(vcpus=10**6)) == []


def test_the_space_is_that_of_what_is_copied_with_room_to_grow() -> None:
    disk = a_disk(guest_bytes=5 * MiB)
    assert 5 * MiB < space_needed(disk.top, disk, False, 64 * MiB) < 80 * MiB
    assert disk.top.allocated < space_needed(disk.top, disk, True, 64 * MiB) < disk.top.allocated * 11 // 10


@pytest.mark.parametrize(("free", "there", "shares", "first"), [
    (130, 0, 1, ""), (120, 0, 1, "vol1"), (120, 0, 2, ""), (60, 0, 1, "root"), (60, 51, 1, ""), (10, 51, 1, "root")])
def test_files_of_volumes_need_their_space_beside_each_other_and_not_beside_nova_s(
        free: int, there: int, shares: int, first: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("migrena.free_space", lambda host, path: free * MiB)
    monkeypatch.setattr("migrena.still_to_write", lambda folder, run, host: 0)
    disks = {name: a_disk(an_overlay(size=64 * MiB), guest_bytes=50 * MiB) for name in ("root", "vol0", "vol1")}
    ends: Any = SimpleNamespace(destination=SimpleNamespace(name="cmp-b1", script=lambda *_: Answer(f"{there * 2048}", "cmp-b1", ())))
    written: dict[str, Any] = {}
    journal = SimpleNamespace(write=lambda event, **facts: written.update(facts), path=tmp_path / "run.jsonl")
    run: Any = SimpleNamespace(plan=SimpleNamespace(disks=disks, run="run"), journal=journal, destination=SimpleNamespace(url="http://b"))

    def job(name: str) -> DiskJob:
        fresh = DiskImage(f"/mnt/{name[3:] if shares > 1 else ''}/{name}", "raw", 64 * MiB, 64 * MiB, 0)
        landing = BesideFile("run", fresh, "qcow2") if name == "root" else InPlace("run", fresh, "lock", is_blank=True)
        return DiskJob(name, some_settings(space_reserve=20 * MiB), disks[name].top, landing, QemuTransport(), False, True)

    with pytest.raises(HostError, match=f"are free beside /mnt/.*{first}") if first else nullcontext():
        refuse_jobs(run, ends, [job(name) for name in disks])
    assert written["need"] == 51 * MiB


@pytest.mark.parametrize(("count", "shown"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536 * MiB, "1.5 GiB"), (3 * 1024**4, "3.0 TiB"),
                                              (5000 * 1024**4, "5000.0 TiB")])
def test_bytes_are_shown_for_people(count: int, shown: str) -> None:
    assert human(count) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0.0 s"), (59.94, "59.9 s"), (60, "0:01:00"), (3723.4, "1:02:03")])
def test_seconds_are_shown_for_people(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


