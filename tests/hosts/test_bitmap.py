"""A dirty bitmap spares a stopped disk from being read again: what it calls unchanged is, whatever the guest did, and it never stays."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import shutil
from collections.abc import Iterator

import pytest

from hosts.conftest import MakeCopy
from hosts.operators import Operator, is_complete
from hosts.rig import Instance, MiB, base, same_guest
from lab.hosts import Lab
from migrena import (
    Callbacks,
    CommandError,
    DiskJob,
    Ends,
    Host,
    Known,
    bitmap_of,
    digests,
    disk_chain,
    drop_bitmap,
    move_disk,
    settle_disk,
    stand_of,
    unchanged_since,
)

CELL = 65536
LARGE = 48 * MiB
SILENT = Callbacks(lambda total: contextlib.nullcontext(lambda done: None))


def digests_of(host: Host, path: str) -> dict[int, str]:
    """A file's digests."""
    return digests(host, path, 0, int(host.run("stat", "-c", "%s", path)), 60)


def with_bitmap(instance: Instance, bitmap: str) -> None:
    """From now on the file notes what is written; libvirt would have qemu do so while a guest runs."""
    instance.host.run("qemu-img", "bitmap", "--add", instance.path, bitmap)


def bitmaps_in(instance: Instance) -> list[str]:
    """The names of those in the file."""
    info = json.loads(instance.host.run("qemu-img", "info", "-U", "--output=json", instance.path).stdout)
    return [bitmap["name"] for bitmap in info["format-specific"]["data"].get("bitmaps", [])]


@pytest.fixture
def pair(lab: Lab) -> tuple[Instance, Instance]:
    """An overlay with 30 MiB of a guest's data in one piece, and a fresh one."""
    source, fresh = (Instance.make(lab[name]).overlay(base(lab[name], "debian", LARGE), LARGE) for name in ("src", "dst"))
    return source.write("guest", (4 * MiB, 30 * MiB)), fresh


@pytest.fixture
def prepared(pair: tuple[Instance, Instance], make_copy: MakeCopy) -> Iterator[tuple[Ends, DiskJob, Known]]:
    """Both ends, the job, and what is known of both files: the new one is the source's as it was when its bitmap began, but for one byte."""
    source, fresh = pair
    with make_copy(warm=True).prepared(source, fresh) as (ends, job):
        with_bitmap(source, bitmap_of(job.run))
        here = digests_of(ends.source, source.path)
        shutil.copy(f"{source.host.root}{source.path}", f"{fresh.host.root}{job.new}")
        ends.destination.script('printf "?" | dd of="$1" bs=1 seek=$((9 << 20)) conv=notrunc status=none', job.new)
        yield ends, job, Known(here, digests_of(ends.destination, job.new), stand_of(ends.destination, job.landing.image.node))


def looked_at_again(ends: Ends, job: DiskJob) -> DiskJob:
    """The job for the file as it is by now."""
    top = disk_chain(ends.source, job.source.path, "qcow2", shared=False)[0]
    return dataclasses.replace(job, source=top, stand=stand_of(ends.source, job.source.node))


def written(seed: int) -> list[str]:
    """Orders to qemu-io: writes, zeros and discards, anywhere."""
    chance = random.Random(seed)
    orders = []
    for number in range(chance.randrange(1, 12)):
        at, count = chance.randrange(0, LARGE // 4096 - 32) * 4096, chance.choice([4096, CELL, 3 * CELL - 512, 2 * MiB])
        verb = chance.choice([f"write -q -P {number + 1}", "write -q -z -u", "discard -q", "write -q -z"])
        orders += ["-c", f"{verb} {at} {min(count, LARGE - at)}"]
    return orders


@pytest.mark.parametrize("seed", range(8))
def test_what_a_bitmap_calls_unchanged_is_and_the_rest_arrives(
        prepared: tuple[Ends, DiskJob, Known], pair: tuple[Instance, Instance], lab: Lab, seed: int) -> None:
    ends, job, known = prepared
    source, _ = pair
    orders = written(seed)
    lab["src"].run("qemu-io", "-f", "qcow2", *orders, source.path)
    unchanged = unchanged_since(ends.source, ends.source_folder, job, known)
    drop_bitmap(ends.source, "nobody", source.path, job.run)
    now = digests_of(ends.source, source.path)
    assert all(now.get(block) == known.here.get(block) for block in unchanged), orders
    assert 9 not in unchanged  # the byte that is wrong at the destination
    known, job = dataclasses.replace(known, unchanged=unchanged), looked_at_again(ends, job)
    moved, _ = move_disk(ends, job, SILENT, known)
    assert moved.unread == len(unchanged) * MiB and moved.is_rest
    assert lab["dst"].run("sha256sum", job.new).stdout.split()[0] == source.sha256()
    assert bitmaps_in(source) == []


@pytest.mark.parametrize("cluster", ["64k", "1M", "2M"])
def test_what_was_moved_to_a_new_place_with_a_small_write_is_not_called_unchanged(
        lab: Lab, make_copy: MakeCopy, cluster: str) -> None:
    """qemu copies the rest of a base's cluster to where the first write to it goes."""
    source, fresh = (Instance.make(lab[name]).overlay(base(lab[name], "debian", LARGE), LARGE) for name in ("src", "dst"))
    below = source.node()["backing-filename"]
    source.host.run("sh", "-c", 'rm "$1"; qemu-img create -q -f qcow2 -o cluster_size="$2" -F raw -b "$3" "$1"', "sh", source.path, cluster, below)
    source.write("guest", (32 * MiB, 6 * MiB))
    with make_copy(warm=True).prepared(source, fresh) as (ends, job):
        with_bitmap(source, bitmap_of(job.run))
        shutil.copy(f"{source.host.root}{source.path}", f"{fresh.host.root}{job.new}")
        known = Known(digests_of(ends.source, source.path), digests_of(ends.destination, job.new), stand_of(ends.destination, job.landing.image.node))
        source.host.run("qemu-io", "-f", "qcow2", "-c", "write -q -P 7 64k 4k", "-c", "write -q -P 8 26M 512", source.path)
        unchanged = unchanged_since(ends.source, ends.source_folder, job, known)
        now = digests_of(ends.source, source.path)
        assert unchanged and all(now.get(block) == known.here.get(block) for block in unchanged)
        drop_bitmap(ends.source, "nobody", source.path, job.run)
        moved, _ = move_disk(ends, looked_at_again(ends, job), SILENT, dataclasses.replace(known, unchanged=unchanged))
        assert moved.digest and lab["dst"].run("sha256sum", job.new).stdout.split()[0] == source.sha256()


def test_what_is_known_of_a_file_does_not_hold_for_another_one_in_its_place(
        prepared: tuple[Ends, DiskJob, Known], pair: tuple[Instance, Instance], lab: Lab) -> None:
    ends, job, known = prepared
    unchanged = unchanged_since(ends.source, ends.source_folder, job, known)
    drop_bitmap(ends.source, "nobody", pair[0].path, job.run)
    lab["dst"].run("sh", "-c", 'rm "$1"; truncate -s "$2" "$1"', "sh", job.new, str(job.length))  # as an attempt that failed leaves it
    moved, _ = move_disk(ends, looked_at_again(ends, job), SILENT, dataclasses.replace(known, unchanged=unchanged))
    assert moved.unread == 0 and lab["dst"].run("sha256sum", job.new).stdout.split()[0] == pair[0].sha256()


def test_most_of_a_disk_is_not_read_again_where_little_was_written(
        prepared: tuple[Ends, DiskJob, Known], pair: tuple[Instance, Instance]) -> None:
    ends, job, known = prepared
    pair[0].host.run("qemu-io", "-f", "qcow2", "-c", f"write -q -P 7 {12 * MiB} 64k", "-c", f"write -q -P 8 {45 * MiB} 64k", pair[0].path)
    unchanged = unchanged_since(ends.source, ends.source_folder, job, known)
    assert 26 <= len(unchanged) <= 28  # of 30: the byte, the block that was written to, and the two at the ends


def test_a_file_that_grows_within_its_last_block_arrives_whole(
        prepared: tuple[Ends, DiskJob, Known], pair: tuple[Instance, Instance], lab: Lab) -> None:
    """As libvirt does it: the bitmap is in the file only when the guest has ended, and new clusters follow at once upon the old ones."""
    ends, job, known = prepared
    source, _ = pair
    drop_bitmap(ends.source, "nobody", source.path, job.run)
    with_bitmap(source, bitmap_of(job.run))
    for number in range(20):
        lab["src"].run("qemu-io", "-f", "qcow2", "-c", f"write -q -P {number + 1} {40 * MiB + number * CELL} 64k", source.path)
        unchanged = unchanged_since(ends.source, ends.source_folder, job, known)
        now = digests_of(ends.source, source.path)
        assert unchanged and all(now.get(block) == known.here.get(block) for block in unchanged)


def test_compressed_clusters_count_as_changed(prepared: tuple[Ends, DiskJob, Known], pair: tuple[Instance, Instance]) -> None:
    ends, job, known = prepared
    pair[0].host.run("qemu-io", "-f", "qcow2", "-c", f"write -q -c -P 9 {40 * MiB} {MiB}", pair[0].path)
    unchanged = unchanged_since(ends.source, ends.source_folder, job, known)
    now = digests_of(ends.source, pair[0].path)
    assert unchanged and all(now.get(block) == known.here.get(block) for block in unchanged)


def test_a_bitmap_that_is_not_there_tells_nothing(prepared: tuple[Ends, DiskJob, Known], pair: tuple[Instance, Instance]) -> None:
    ends, job, known = prepared
    drop_bitmap(ends.source, "nobody", pair[0].path, job.run)
    drop_bitmap(ends.source, "nobody", pair[0].path, job.run)  # there is nothing left to be taken out
    with pytest.raises(CommandError, match=bitmap_of(job.run)):
        unchanged_since(ends.source, ends.source_folder, job, known)


def test_a_bitmap_of_a_guest_that_was_killed_tells_nothing_and_is_taken_out(
        prepared: tuple[Ends, DiskJob, Known], pair: tuple[Instance, Instance]) -> None:
    ends, job, known = prepared
    host, path = pair[0].host, pair[0].path
    guest = 'qemu-io -f qcow2 -c "write -q -P 3 8M 1M" -c "write -q -P 4 40M 64k" -c "sleep 100000" "$1" & pid=$!; sleep 2; kill -9 $pid'
    host.run("sh", "-c", guest, "sh", path)
    with pytest.raises(CommandError, match=bitmap_of(job.run)):
        unchanged_since(ends.source, ends.source_folder, job, known)
    drop_bitmap(ends.source, "nobody", path, job.run)
    assert bitmaps_in(pair[0]) == []
    host.run("qemu-img", "check", "-q", path)


def test_a_file_that_cannot_be_read_is_not_taken_for_one_without_a_bitmap_and_one_that_is_gone_is(
        prepared: tuple[Ends, DiskJob, Known], pair: tuple[Instance, Instance]) -> None:
    ends, job, _ = prepared
    host, path = pair[0].host, pair[0].path
    host.run("sh", "-c", 'printf "?" | dd of="$1" conv=notrunc status=none', "sh", path)
    with pytest.raises(CommandError, match="not in qcow2 format"):
        drop_bitmap(ends.source, "nobody", path, job.run)
    host.run("rm", path)
    drop_bitmap(ends.source, "nobody", path, job.run)


def test_where_libvirt_does_not_help_both_disks_are_read_whole(operator: Operator) -> None:
    ended = operator.copy("--warm", "--bitmap", "--json")
    assert ended.returncode == 0 and "no dirty bitmap: " in ended.stderr, ended.stderr
    report = json.loads(ended.stdout)
    assert report["copy"]["proven_by_bitmap"] == 0 and report["copy"]["verified"]
    is_complete(operator, report["run"])


def test_a_bitmap_without_a_warm_copy_is_refused(operator: Operator) -> None:
    ended = operator.copy("--bitmap")
    assert ended.returncode == 2 and "give --warm too" in ended.stderr


def test_a_bitmap_that_a_killed_guest_had_in_use_is_not_in_the_new_file_and_that_can_grow(lab: Lab, make_copy: MakeCopy) -> None:
    source, fresh = (Instance.make(lab[name]).overlay(base(lab[name], "debian"), size) for name, size in (("src", 64 * MiB), ("dst", 96 * MiB)))
    for name in ("-their bitmap", "whole"):
        source.host.run("qemu-img", "bitmap", "--add", "-f", "qcow2", "--", source.path, name)
    guest = 'qemu-io -f qcow2 -c "write -q -P 3 8M 1M" -c "sleep 100000" "$1" & pid=$!; sleep 2; kill -9 $pid'
    source.host.run("sh", "-c", guest, "sh", source.path)
    source.host.run("qemu-img", "bitmap", "--remove", "-f", "qcow2", source.path, "whole")
    with_bitmap(source, "whole")
    before = source.sha256()
    copy = make_copy()
    moved = copy.arrive(source, fresh)
    assert moved.digest and copy.job and settle_disk(copy.destination, copy.job) == ("-their bitmap",)
    assert bitmaps_in(fresh) == ["whole"] and fresh.node()["virtual-size"] == 96 * MiB and same_guest(source, fresh)
    assert source.sha256() == before
