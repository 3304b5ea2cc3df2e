"""The runs: which way moves which disk over which wire, in what order, and the JSON lines that come of it."""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from bench import disks, ways, wire
from bench.disks import Disk
from bench.stage import FOLDER, GaveUp, Stage, cold
from conftest import REPOSITORY
from hosts.rig import INSTANCES
from lab.hosts import hosts
from lab.processes import CLEAN_ENV, PATH, LabError, say

PACKAGES: Final = ("iperf3", "libnbd-bin", "rsync", "curl", "coreutils", "openssl", "tar")
VERSIONS: Final = {"qemu": "qemu-img --version", "nbd-server": "nbd-server --version", "nbdcopy": "nbdcopy --version",
                   "iperf3": "iperf3 --version", "rsync": "rsync --version", "ssh": "ssh -V", "curl": "curl --version"}
NETWORK: Final = "10.82.7.0/24"


@dataclass(frozen=True)
class Case:
    """One measurement to be made."""

    wire: str
    disk: str
    way: str


@dataclass(frozen=True)
class Order:
    """What a run shall measure."""

    wires: Sequence[str]
    disks: Sequence[str]
    ways: Sequence[str]
    scale: float = 0.25
    rounds: int = 5
    seed: str = "migrena"
    patience: float = 600  # seconds for one measurement
    quick: bool = False  # all wires and all forms of migrena for the first disk alone

    def cases(self, number: int) -> list[Case]:
        """Those of one round, in its order; what needs no wire is measured on the first one alone."""
        found = [Case(wire, disk, way) for wire in self.wires for disk in self.disks for way in self.ways
                 if (wire == self.wires[0] or ways.WAYS[way].needs_wire)
                 and (not self.quick or disk == self.disks[0] or (wire == self.wires[0] and not way.endswith("unproven")))]
        random.Random(f"{self.seed} {number}").shuffle(found)
        return found


def facts() -> dict[str, Any]:
    """The program, the tools and the machine that were measured."""
    def said(*words: str) -> str:
        if not shutil.which(words[0], path=PATH):
            return "not installed"
        done = subprocess.run(words, check=False, capture_output=True, text=True, env=CLEAN_ENV, cwd=REPOSITORY)
        return (done.stdout + done.stderr).strip()

    cpus = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"commit": said("git", "rev-parse", "--short", "HEAD"), "changed": bool(said("git", "status", "--porcelain", "--untracked-files=no")),
            "versions": {name: said(*line.split()).partition("\n")[0] for name, line in VERSIONS.items()} | {"python": platform.python_version()},
            "kernel": platform.release(), "cpu": cpus[0] if cpus else platform.machine(), "cpus": os.cpu_count(), "memory": memory,
            "load": os.getloadavg()[0], "at": datetime.now(timezone.utc).isoformat(timespec="seconds")}


@contextmanager
def brought_up(folder: Path, order: Order) -> Iterator[Stage]:
    """Three hosts and what measures them, gone with the scope."""
    size = int(30 * disks.GiB * order.scale) + 4 * disks.GiB  # a file system is a sparse file: only what is written takes room
    with hosts(folder, dict.fromkeys(("src", "dst", "images"), "ns"), NETWORK, f"{size // disks.MiB}M") as lab:
        for old in folder.parent.glob("bench-*"):  # of runs that were killed outright: the network is ours, so none of them is alive
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
        stage = Stage(lab, folder, "images", order.patience)
        with stage.measured():
            yield stage


def measure(stage: Stage, case: Case, disk: Disk) -> dict[str, Any]:
    """One way moves one disk, from cold caches; gives the record. The wire is as it shall be already."""
    way = ways.WAYS[case.way]
    stage.lab["dst"].run("mkdir", "-p", FOLDER)
    cold()
    record: dict[str, Any] = {"wire": case.wire, "disk": case.disk, "way": case.way, "held": disk.allocated, "length": disk.length}
    try:
        before = stage.read()
        outcome = way.go(stage, disk)
        after = stage.read()
        whole = after.since(before)
        record |= {**whole, "whole": whole, **outcome.facts}
        stage.lab["dst"].run("sync", "-f", "/var/lib/nova")
        record["synced"] = round(stage.read().at - after.at, 4)  # until all that was written is on the disk
        if outcome.new:
            place = outcome.new.rpartition("/")[0]
            record["allocated"] = int(stage.lab["dst"].run("du", "-s", "--block-size=1", place).stdout.split()[0])
        record["equal"] = way.is_equal(stage, disk, outcome)
    except GaveUp as error:
        record["failed"] = str(error)
    except (LabError, OSError, subprocess.SubprocessError) as error:
        record["failed"] = f"{error}"[:600]
    finally:
        clear(stage, disk)
    return record


def clear(stage: Stage, disk: Disk) -> None:
    """Removes what a way has made, on every host; the source's disks stay."""
    for host in stage.lab:
        host.run("rm", "-rf", FOLDER)
    stage.lab["dst"].run("sh", "-c", f"rm -rf {INSTANCES}/*-*-*-*")
    (stage.work / "image").unlink(missing_ok=True)


def left_out(stage: Stage, order: Order) -> dict[str, str]:
    """The ways that cannot be measured here, and why."""
    return {name: why for name in order.ways if (why := ways.WAYS[name].lacks(stage.lab))}


def run(stage: Stage, order: Order, write: Callable[[dict[str, Any]], None]) -> None:
    """All rounds; every line is handed over as soon as it is known. What took too long once is not tried again."""
    without = left_out(stage, order)
    for name, why in without.items():
        say(f"LEFT OUT: {name}: {why}")
    write({"kind": "head", **facts(), "scale": order.scale, "rounds": order.rounds, "seed": order.seed, "left_out": without})
    ways.lay_keys(stage.lab)
    made: dict[str, Disk] = {}
    for name in order.disks:
        say(f"making the disk {name}: {disks.KINDS[name].title}, times {order.scale:g}")
        made[name] = disks.make(stage.lab, name, order.scale, order.seed)
    stands = {name: disk.stand() for name, disk in made.items()}
    hopeless: set[Case] = set()
    for number in range(1, order.rounds + 1):
        cases = [case for case in order.cases(number) if case.way not in without and case not in hopeless]
        for at, case in enumerate(cases, 1):
            wire.shape(stage.lab, wire.WIRES[case.wire])
            record = measure(stage, case, made[case.disk])
            write({"kind": "run", "round": number, **record})
            if "failed" in record:
                hopeless.add(case)
            told = record.get("failed") or f"{record['seconds']:8.2f} s{'' if record['equal'] in (True, None) else '  NOT EQUAL'}"
            say(f"round {number}, {at:3} of {len(cases)}: {case.wire:8} {case.disk:10} {case.way:28} {told}")
    if changed := [name for name, disk in made.items() if disk.stand() != stands[name]]:
        raise LabError(f"sources were changed by the benchmark: {', '.join(changed)}")


def writer(path: Path) -> Callable[[dict[str, Any]], None]:
    """Appends records to a file, one JSON line each."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(record: dict[str, Any]) -> None:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    return write
