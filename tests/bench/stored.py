"""Disks that are no files, by migrena's engine with its proof, and as people move them by hand, who prove nothing.

    tests/bench/run stored [--size 10] [--held 2] [--rounds 3]      GiB that a guest sees, GiB that it wrote

Ceph to Ceph against `rbd export | ssh | rbd import`, a block device to another against `dd | ssh | dd`, in turns. The hosts are network
namespaces of this machine, the Ceph (one OSD, one copy) is shared by both ends, the devices are loop devices. Only ratios mean anything.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.stage import cold
from bench.ways import lay_keys, ssh_options
from hosts.rig import Copy, Instance, settings_for
from hosts.test_stored import SECRET, Stored, a_ceph, let_go, on_ceph, on_device
from lab.ceph import Cluster
from lab.hosts import Lab, hosts
from lab.packages import CEPH, HOSTS, install
from lab.processes import LabError, command, home, say
from migrena import Screen, connect

GiB, MiB = 1024**3, 1024**2
NETWORK = "10.82.8.0/24"
BY_HAND: Mapping[str, str] = {
    "ceph": 'ssh="$1"; shift; $ssh "rbd $1 export --no-progress volumes/$2 -" | rbd $1 import --no-progress - "volumes/$3"',
    "device": 'ssh="$1"; shift; $ssh "dd if=$2 bs=4M status=none" | dd of="$3" bs=4M conv=fsync status=none iflag=fullblock',
}


@dataclass(frozen=True)
class Stage:
    """Where it is measured."""

    lab: Lab
    ceph: Cluster
    folder: Path
    size: int
    held: int

    def made(self, kind: str, name: str) -> Stored:
        """An instance with an empty disk of this kind on a host."""
        return on_ceph(self.ceph, self.lab[name], self.size) if kind == "ceph" else on_device(self.lab[name], self.folder, self.size)

    def gone(self, kind: str, instance: Instance) -> None:
        """Removes a disk."""
        if kind == "ceph":
            command("rbd", "-c", self.ceph.folder / "ceph.conf", "rm", "--no-progress", f"volumes/{instance.id}_disk")
            return
        (file,) = self.folder.glob(f"{instance.id}_disk.img")
        let_go(file)
        instance.host.run("rm", f"/dev/{instance.id}_disk")
        file.unlink()

    def taken(self, kind: str, instance: Instance) -> int:
        """The bytes that a disk takes on its backend."""
        if kind == "ceph":
            told = json.loads(command("rbd", "-c", self.ceph.folder / "ceph.conf", "du", "--format", "json", f"volumes/{instance.id}_disk"))
            return int(told["images"][0]["used_size"])
        return (self.folder / f"{instance.id}_disk.img").stat().st_blocks * 512

    def fill(self, source: Stored) -> None:
        """Random data in pieces of 4 MiB all over the disk."""
        step, noise = self.size * 4 * MiB // self.held // MiB * MiB, self.folder / "noise"
        for at in range(0, self.size - 4 * MiB, step):
            command("sh", "-c", 'head -c 4M /dev/urandom > "$1"', "sh", noise)
            command("qemu-io", "-c", f"write -q -s {noise} {at} 4M", "--image-opts", source.opts)


@contextlib.contextmanager
def brought_up(size: int, held: int) -> Iterator[Stage]:
    """Two hosts and a Ceph, gone with the scope."""
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=home()))
    (folder / "ceph").mkdir()
    try:
        with hosts(folder / "hosts", dict.fromkeys(("src", "dst"), "ns"), NETWORK, "4G") as lab, a_ceph(lab, folder / "ceph") as ceph:
            lay_keys(lab)
            yield Stage(lab, ceph, folder, size, held)
    finally:
        let_go(folder)
        shutil.rmtree(folder, ignore_errors=True)


def by_migrena(stage: Stage, kind: str, source: Stored, fresh: Stored) -> dict[str, float]:
    """The engine, from the survey to the proof."""
    settings = settings_for(stage.lab, chunk=256 * MiB)
    with contextlib.ExitStack() as stack:
        src, dst = (stack.enter_context(contextlib.closing(connect(name, settings, Screen(io.StringIO())))) for name in ("src", "dst"))
        stack.enter_context(unittest.mock.patch("migrena.require_identity", lambda host, image: None))  # loop devices are nobody's volumes
        began = time.monotonic()
        copy = Copy(src, dst, settings, stage.folder)
        moved = copy(source, fresh)
        command("sync")
        return {"seconds": time.monotonic() - began, "held": moved.held, "sent": copy.sent}


def by_hand(stage: Stage, kind: str, source: Stored, fresh: Stored) -> dict[str, float]:
    """What is on the wire in between is what ssh makes of it."""
    ssh = " ".join(("ssh", *ssh_options(), f"root@{stage.lab['src'].address}"))
    if kind == "ceph":
        command("rbd", "-c", stage.ceph.folder / "ceph.conf", "rm", "--no-progress", f"volumes/{fresh.id}_disk")
        words = f"-m {stage.ceph.cloud.address} --id cinder --keyfile /root/secrets/{SECRET}", f"{source.id}_disk", f"{fresh.id}_disk"
    else:
        words = "", f"/dev/{source.id}_disk", f"/dev/{fresh.id}_disk"
    before, began = stage.lab["dst"].counters()[0], time.monotonic()
    stage.lab["dst"].run("bash", "-o", "pipefail", "-ec", BY_HAND[kind], "sh", ssh, *words, seconds=3600)
    command("sync")
    return {"seconds": time.monotonic() - began, "sent": stage.lab["dst"].counters()[0] - before}


WAYS: Mapping[str, Callable[[Stage, str, Stored, Stored], dict[str, float]]] = {"migrena": by_migrena, "by hand": by_hand}


def measure(stage: Stage, kind: str, rounds: int) -> None:
    """Prints what each way took, and the ratio of their medians."""
    source, seconds = stage.made(kind, "src"), {way: list[float]() for way in WAYS}
    stage.fill(source)
    told = source.sha256()
    for number in range(rounds):
        for way in list(WAYS)[:: 1 if number % 2 else -1]:
            fresh = stage.made(kind, "dst")
            cold()
            facts = WAYS[way](stage, kind, source, fresh)
            seconds[way].append(facts.pop("seconds"))
            is_equal = fresh.sha256() == told
            more = ", ".join(f"{name} {count / MiB:.0f} MiB" for name, count in {**facts, "taken": stage.taken(kind, fresh)}.items())
            say(f"{kind:6} {way:8} {seconds[way][-1]:6.1f} s; {more}{'' if is_equal else '; NOT EQUAL'}")
            stage.gone(kind, fresh)
    stage.gone(kind, source)
    one, other = (statistics.median(seconds[way]) for way in WAYS)
    print(f"{kind} to {kind}, {stage.size / GiB:g} GiB with {stage.held / GiB:g} GiB of data: migrena, proven, takes {one / other:.2f} x by hand")


def main(argv: Sequence[str]) -> int:
    """Measures both."""
    parser = argparse.ArgumentParser(prog="tests/bench/run stored", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=10)
    parser.add_argument("--held", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(argv)
    try:
        install((*HOSTS, *CEPH))
        with brought_up(int(given.size * GiB), int(given.held * GiB)) as stage:
            for kind in BY_HAND:
                measure(stage, kind, given.rounds)
    except (LabError, subprocess.SubprocessError) as error:
        say(f"FAILED: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
