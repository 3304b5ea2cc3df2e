"""Every layout arrives byte for byte, in the destination's own form, and the source's file is what it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest

from hosts.conftest import MakeCopy, Reach
from hosts.rig import INSTANCES, Copy, Instance, MiB, base, chain_of, same_guest
from lab.hosts import Host as LabHost
from lab.hosts import Lab
from migrena import ROOT, Host, HostError, Moved, survey_disks
from unit.makers import a_server

Make = Callable[[LabHost], Instance]


def arrives(copy: Copy, source: Instance, fresh: Instance) -> Moved:
    """Copies, and holds both ends to all that must be so afterwards, whatever the layout."""
    before, owner, node = source.sha256(), fresh.owner(), fresh.node()
    moved = copy(source, fresh)
    assert copy.job
    assert source.sha256() == before
    assert same_guest(source, fresh)
    assert fresh.owner() == owner == "64060:64060 644"
    assert (fresh.node()["format"], fresh.node()["virtual-size"]) == (node["format"], node["virtual-size"])
    below = node.get("full-backing-filename") if copy.job.whole_file else None
    assert fresh.node().get("full-backing-filename") == below
    assert fresh.host.run("stat", "-c", "%h", copy.job.landing.kept).stdout == "1\n"  # the fresh disk is kept until all has succeeded
    if fresh.format == "qcow2":
        fresh.host.run("qemu-img", "check", "-q", "-f", "qcow2", fresh.path)
    return moved


def an_overlay(size: int = 64 * MiB, seed: str = "debian", format: str = "raw") -> Make:
    """Makes an overlay on a base of its own."""
    return lambda host: Instance.make(host).overlay(base(host, seed, format=format), size, format)


def a_raw_disk(size: int = 64 * MiB) -> Make:
    """Makes a raw disk."""
    return lambda host: Instance.make(host).raw(size)


def a_flat_disk(size: int = 64 * MiB) -> Make:
    """Makes a qcow2 without a base."""
    return lambda host: Instance.make(host).overlay("", size)


def a_deep_disk(size: int = 64 * MiB) -> Make:
    """Makes an overlay on an overlay on a base."""

    def make(host: LabHost) -> Instance:
        middle = Instance.make(host).overlay(base(host, "debian"), size).write("middle", (8 * MiB, MiB))
        return Instance.make(host).overlay(middle.path, size, "qcow2")

    return make


LAYOUTS: dict[str, tuple[Make, Make, bool]] = {  # source, destination, whether the file itself is copied
    "an overlay to an overlay whose base is equal": (an_overlay(), an_overlay(), True),
    "an overlay to an overlay with equal qcow2 bases": (an_overlay(format="qcow2"), an_overlay(format="qcow2"), True),
    "an overlay to an overlay whose base differs": (an_overlay(), an_overlay(seed="other"), False),
    "an overlay to a larger disk": (an_overlay(), an_overlay(96 * MiB), True),
    "an overlay to a larger disk on another base": (an_overlay(), an_overlay(96 * MiB, seed="other"), False),
    "an overlay to raw": (an_overlay(), a_raw_disk(), False),
    "an overlay to larger raw": (an_overlay(), a_raw_disk(80 * MiB), False),
    "an overlay to a flat qcow2": (an_overlay(), a_flat_disk(), False),
    "a flat qcow2 to a flat qcow2": (a_flat_disk(), a_flat_disk(), True),
    "a flat qcow2 to an overlay": (a_flat_disk(), an_overlay(), False),
    "a chain of two bases to an overlay": (a_deep_disk(), an_overlay(), False),
    "raw to raw": (a_raw_disk(), a_raw_disk(), True),
    "raw to larger raw": (a_raw_disk(), a_raw_disk(96 * MiB), True),
    "raw to an overlay": (a_raw_disk(), an_overlay(), False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_arrives(lab: Lab, make_copy: MakeCopy, layout: str) -> None:
    make_source, make_fresh, whole_file = LAYOUTS[layout]
    source = make_source(lab["src"]).write("guest", (MiB, 2 * MiB + 512), (20 * MiB, 3 * MiB), (63 * MiB, MiB))
    copy = make_copy()
    moved = arrives(copy, source, make_fresh(lab["dst"]))
    assert copy.job and copy.job.whole_file is whole_file
    assert moved.digest


@pytest.mark.parametrize("different", [{"tls": False}, {"verify": False}, {"limit_rate": 4 * MiB}, {"chunk": MiB}, {"chunk": 1024 * MiB}], ids=str)
def test_an_overlay_arrives_whatever_the_settings(overlays: tuple[Instance, Instance], make_copy: MakeCopy, different: dict[str, int | bool]) -> None:
    moved = arrives(make_copy(**different), *overlays)
    assert bool(moved.digest) is different.get("verify", True)
    assert moved.seconds > moved.held / different.get("limit_rate", 10**12) / 2


def test_an_operator_with_sudo_can_do_all_that_root_can(overlays: tuple[Instance, Instance], reach: Reach, make_copy: MakeCopy) -> None:
    copy = make_copy()
    copy.source, copy.destination = reach("src", ssh_user="operator"), reach("dst", ssh_user="operator")
    arrives(copy, *overlays)


def test_a_fresh_overlay_of_196_640_bytes_arrives_whole(lab: Lab, make_copy: MakeCopy) -> None:
    source, fresh = (Instance.make(lab[name]).overlay(base(lab[name], "debian"), 2048 * MiB) for name in ("src", "dst"))
    assert source.length == 196_640
    arrives(make_copy(), source, fresh)
    assert fresh.length == 196_640


@pytest.mark.parametrize("count", [1, 511, 513, MiB - 1])
def test_a_file_of_any_length_arrives_whole(lab: Lab, make_copy: MakeCopy, count: int) -> None:
    source, fresh = (an_overlay()(lab[name]) for name in ("src", "dst"))
    source.write("guest", (MiB, MiB)).lengthen(count)
    assert source.length % 512
    arrives(make_copy(), source, fresh)
    assert fresh.length == source.length
    tail = ("tail", "-c", str(count))
    assert source.host.run(*tail, source.path).stdout == fresh.host.run(*tail, fresh.path).stdout


def test_a_raw_disk_of_an_odd_length_arrives_whole(lab: Lab, make_copy: MakeCopy) -> None:
    source, fresh = (a_raw_disk(8 * MiB)(lab[name]) for name in ("src", "dst"))
    source.lengthen(12_345)
    fresh.lengthen(12_345)
    arrives(make_copy(), source, fresh)
    assert fresh.sha256() == source.sha256()


@pytest.mark.parametrize("length", [1_000_003, 8 * MiB + 512 + 1, 9 * MiB - 1])
def test_a_raw_disk_that_ends_within_a_sector_arrives_in_an_overlay(lab: Lab, make_copy: MakeCopy, length: int) -> None:
    source = a_raw_disk(length - 77_777)(lab["src"]).write("guest", (MiB // 2, 4096)).lengthen(77_777)
    assert source.length == length
    arrives(make_copy(), source, an_overlay()(lab["dst"]))


def test_a_raw_disk_that_ends_within_a_sector_of_a_hole_arrives_in_an_overlay(lab: Lab, make_copy: MakeCopy) -> None:
    arrives(make_copy(), a_raw_disk(4 * MiB + 100)(lab["src"]).write("guest", (MiB, 4096)), an_overlay()(lab["dst"]))


def test_holes_stay_holes(lab: Lab, make_copy: MakeCopy) -> None:
    source, fresh = (a_raw_disk(200 * MiB)(lab[name]) for name in ("src", "dst"))
    source.write("guest", (0, MiB), (3 * MiB + 4096, 12_288), (100 * MiB + 512, MiB), (199 * MiB, MiB))
    copy = make_copy()
    before = lab["dst"].counters()[0]
    moved = arrives(copy, source, fresh)
    assert fresh.sha256() == source.sha256()
    assert fresh.allocated <= source.allocated + MiB
    assert moved.held < 16 * MiB
    assert 3 * MiB < copy.sent <= lab["dst"].counters()[0] - before < 16 * MiB


def test_zeros_that_a_guest_wrote_arrive_as_zeros_over_the_base(lab: Lab, make_copy: MakeCopy) -> None:
    for seed in ("debian", "other"):  # by the file, and by the guest's view
        source, fresh = an_overlay()(lab["src"]), an_overlay(seed=seed)(lab["dst"])
        lab["src"].run("qemu-io", "-f", "qcow2", "-c", "write -q -z 0 2M", "-c", "write -q -P 0 2M 1M", "-c", "discard -q 16M 1M", source.path)
        arrives(make_copy(), source, fresh)


@pytest.mark.parametrize("seed", ["debian", "other"])
def test_compressed_clusters_arrive(lab: Lab, make_copy: MakeCopy, seed: str) -> None:
    source, fresh = an_overlay()(lab["src"]), an_overlay(seed=seed)(lab["dst"])
    source.write("guest", (20 * MiB, MiB))
    lab["src"].run("qemu-io", "-f", "qcow2", "-c", "write -q -c -P 7 0 1M", source.path)
    arrives(make_copy(), source, fresh)


@pytest.mark.parametrize("seed", ["debian", "other"])
@pytest.mark.parametrize("folder", ["a, b,,c", "it's \"quoted\" $HOME;x=1 [1]#{}", "-Größe:y"])
def test_an_instance_folder_may_have_any_name(lab: Lab, make_copy: MakeCopy, folder: str, seed: str) -> None:
    place = f"/var/lib/nova/{folder}"
    source, fresh = (Instance.make(lab[name], f"{place}/%s/disk") for name in ("src", "dst"))
    source = source.overlay(base(lab["src"], "debian", path=f"{place}/_base/x y,z"), 64 * MiB).write("guest", (MiB, MiB))
    fresh = fresh.overlay(base(lab["dst"], seed, path=f"{place}/_base/x y,z"), 64 * MiB)
    copy = make_copy(disk_path=f"{place}/%s/disk")
    arrives(copy, source, fresh)
    assert copy.job and copy.job.whole_file is (seed == "debian")


def test_hazard_rebase_without_a_format_and_onto_another_base_than_nova_s(
        dst: Host, overlays: tuple[Instance, Instance], make_copy: MakeCopy) -> None:
    source, fresh = overlays
    below = fresh.node()["full-backing-filename"]
    arrives(make_copy(), source, fresh)
    assert chain_of(dst, fresh) == [(fresh.path, "qcow2"), (below, "raw")]
    assert fresh.node()["backing-filename-format"] == "raw"
    assert source.node()["full-backing-filename"] != below


def base_of(host: LabHost, image: str) -> str:
    """The path of an image's base, as Nova names it by the image's id alone; the id decides the content, too."""
    return base(host, image, path=f"{INSTANCES}/_base/{hashlib.sha1(image.encode()).hexdigest()}")


@pytest.mark.parametrize("unshelved", [True, False], ids=["unshelved", "a control that never was shelved"])
def test_hazard_21_an_unshelved_instance_stands_on_the_shelve_s_snapshot_and_not_on_the_image_that_nova_names(
        lab: Lab, dst: Host, make_copy: MakeCopy, unshelved: bool) -> None:
    named = [base_of(lab[name], a_server().image) for name in ("src", "dst")]  # on both hosts, and equal
    below = base_of(lab["src"], "the shelve's snapshot") if unshelved else named[0]
    source = Instance.make(lab["src"]).overlay(below, 64 * MiB)
    fresh = Instance.make(lab["dst"]).overlay(named[1], 64 * MiB)
    source.write("guest", (20 * MiB, MiB))
    copy = make_copy()
    arrives(copy, source, fresh)
    assert chain_of(dst, fresh) == [(fresh.path, "qcow2"), *([] if unshelved else [(named[1], "raw")])]
    assert (copy.report.copy["view"], copy.report.copy["why_view"]) == (
        ("guest", "the bases are not proven equal") if unshelved else ("file", "both bases have the same content"))


def test_hazard_nobody_checks_that_the_bases_are_equal_and_one_byte_differs(lab: Lab, make_copy: MakeCopy) -> None:
    source, fresh = an_overlay()(lab["src"]), an_overlay()(lab["dst"])
    source.write("guest", (20 * MiB, MiB))
    below = fresh.node()["full-backing-filename"]
    lab["dst"].run("dd", f"of={below}", "bs=1", "seek=33000000", "conv=notrunc", "status=none", input="x")
    copy = make_copy()
    arrives(copy, source, fresh)
    assert copy.job and not copy.job.whole_file
    assert copy.report.copy["why_view"] == "the bases are not proven equal"


def test_control_the_file_itself_on_a_base_that_differs_would_be_another_disk(lab: Lab) -> None:
    source = an_overlay()(lab["src"]).write("guest", (20 * MiB, MiB))
    other = an_overlay(seed="other")(lab["dst"]).write("guest", (20 * MiB, MiB))
    assert not same_guest(source, other)


def test_a_destination_disk_that_is_too_small_is_refused(lab: Lab, make_copy: MakeCopy) -> None:
    source, fresh = an_overlay()(lab["src"]), an_overlay(48 * MiB)(lab["dst"])
    with pytest.raises(HostError, match="is smaller than the source's"):
        make_copy()(source, fresh)


def test_too_little_space_at_the_destination_is_refused(lab: Lab, make_copy: MakeCopy) -> None:
    source = a_raw_disk(100 * MiB)(lab["src"]).write("guest", (0, 40 * MiB))
    lab["dst"].run("mkdir", "-p", INSTANCES)
    lab["dst"].run("mount", "-t", "tmpfs", "-o", "size=90m", "tmpfs", INSTANCES)
    try:
        fresh = a_raw_disk(100 * MiB)(lab["dst"])
        with pytest.raises(HostError, match=r"90\.0 MiB are free beside .*, 104\.8 MiB are needed"):
            make_copy()(source, fresh)
    finally:
        lab["dst"].run("umount", INSTANCES)


def test_the_instance_s_own_folder_holds_the_new_disk_and_the_old_one_alone(overlays: tuple[Instance, Instance], make_copy: MakeCopy) -> None:
    source, fresh = overlays
    copy = make_copy()
    old = fresh.sha256()
    arrives(copy, source, fresh)
    assert copy.job
    names = fresh.host.run("ls", "-A", fresh.path.rpartition("/")[0]).stdout.split()
    assert sorted(names) == sorted(["disk", "disk.info", copy.job.landing.kept.rpartition("/")[2]])
    assert fresh.host.run("sha256sum", copy.job.landing.kept).stdout.split()[0] == old


def test_what_the_survey_finds_is_what_there_is(lab: Lab, src: Host, overlays: tuple[Instance, Instance]) -> None:
    source, _ = overlays
    for name in ("disk.eph0", "disk.local", "disk.swap", "disk.config", "disk.info.old", "console.log"):
        lab["src"].run("touch", f"{source.path.rpartition('/')[0]}/{name}")
    with pytest.raises(HostError, match=r"does not write to disk\.eph0, disk\.local beside"):
        survey_disks(src, source.id, source.path, shared=False)
    disk = survey_disks(src, source.id, source.path, shared=False, only=(ROOT,))[ROOT]
    assert (disk.top.path, disk.top.format, disk.top.size, disk.top.length) == (source.path, "qcow2", 64 * MiB, source.length)
    assert disk.top.allocated == source.allocated
    assert disk.base and (disk.base.path, disk.base.format, disk.base.size) == (source.node()["full-backing-filename"], "raw", 32 * MiB)
    assert disk.beside == ("disk.config", "disk.eph0", "disk.local", "disk.swap")
    assert 13 * MiB < disk.guest_bytes < 24 * MiB  # 4 or more of the base, 9 of the guest, and qcow2's own
    assert not disk.top.flaws and not disk.has_nvram and not disk.has_tpm
