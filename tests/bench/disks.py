"""The disks that are moved, made on the source as Nova and a guest would have made them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from hosts.rig import INSTANCES, Instance, base
from lab.hosts import Lab

KiB: Final = 1024
MiB: Final = 1024**2
GiB: Final = 1024**3
BASE: Final = f"{INSTANCES}/_base/bench"

# Writes to places of a disk: PATH FORMAT CONTENT SEED, and OFFSET:LENGTH ... on standard input. CONTENT is random, half (every second
# place holds zeros, written as such) or usr (a tar of the real /usr).
FILL: Final = """
import os, random, shutil, subprocess, sys
path, format, content, seed = sys.argv[1:]
places = [tuple(map(int, word.split(":"))) for word in sys.stdin.read().split()]
source, pieces = random.Random(seed), "/var/lib/nova/pieces"
tar = subprocess.Popen(["tar", "-C", "/", "-cf", "-", "usr"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) if content == "usr" else None
def piece(number, length):
    if tar:
        return tar.stdout.read(length).ljust(length, b"\\xff")
    return bytes(length) if content == "half" and number % 2 else source.randbytes(length)
if format == "raw":
    fd = os.open(path, os.O_WRONLY)
    for number, (offset, length) in enumerate(places):
        os.pwrite(fd, piece(number, length), offset)
else:
    for first in range(0, len(places), 64):
        os.mkdir(pieces)
        orders = []
        for number, (offset, length) in enumerate(places[first : first + 64]):
            with open(f"{pieces}/{number}", "wb") as file:
                file.write(piece(number, length))
            orders += ["-c", f"write -q -s {pieces}/{number} {offset} {length}"]
        subprocess.run(["qemu-io", "-f", format, *orders, path], check=True)
        shutil.rmtree(pieces)
if tar:
    tar.kill()
"""


@dataclass(frozen=True)
class Kind:
    """What a disk is, at scale 1."""

    title: str
    format: str  # qcow2 (an overlay on a base) or raw
    size: int  # bytes that the guest sees
    content: str = "random"
    held: int = 0  # bytes that the guest wrote
    is_scaled: bool = True
    fragment: int = 0  # bytes of each data and of each hole after it, where all are of one size
    other_base: str = ""  # what the destination's base is made from, if it is not the source's: then what the guest sees is copied


KINDS: Final = {
    "random": Kind("overlay, 2 GiB of random data in scattered extents", "qcow2", 4 * GiB, held=2 * GiB),
    "guest": Kind("the same, on another base at the destination", "qcow2", 4 * GiB, held=2 * GiB, other_base="other"),
    "half-zeros": Kind("the same, half of it zeros that were written", "qcow2", 4 * GiB, "half", 2 * GiB),
    "sparse": Kind("raw, 20 GiB with 1 GiB of data", "raw", 20 * GiB, held=GiB),
    "usr": Kind("overlay, 2 GiB of a real /usr", "qcow2", 4 * GiB, "usr", 2 * GiB),
    "fragments": Kind("raw, 200,000 times 4 KiB of data and a hole of 4 KiB", "raw", 200_000 * 8 * KiB, held=200_000 * 4 * KiB, fragment=4 * KiB),
    "tiny": Kind("overlay, 1 MiB of random data", "qcow2", 64 * MiB, held=MiB, is_scaled=False),
    "empty": Kind("overlay without any data", "qcow2", 64 * MiB, is_scaled=False),
}


@dataclass(frozen=True)
class Disk:
    """One disk on the source."""

    name: str
    instance: Instance
    size: int  # bytes that the guest sees
    length: int  # bytes of the file
    allocated: int  # bytes that the file takes

    @property
    def path(self) -> str:
        """The file."""
        return self.instance.path

    @property
    def base_there(self) -> str:
        """The path of the destination's base."""
        return BASE + KINDS[self.name].other_base

    @property
    def format(self) -> str:
        """qcow2 or raw."""
        return self.instance.format

    @property
    def id(self) -> str:
        """The instance's id."""
        return self.path.split("/")[-2]

    def stand(self) -> str:
        """Size and times of the file, which nobody can write to and leave as they are."""
        return self.instance.host.run("stat", "-c", "%s %.9Y %.9Z", self.path).stdout


def scattered(held: int, size: int, seed: str) -> list[tuple[int, int]]:
    """Places (offset, length) for so many bytes all over a disk, in the order in which they are written: no neighbours follow each other.

    Lengths are from 64 KiB to 2 MiB, and all is aligned to 64 KiB, qcow2's cluster.
    """
    chance, lengths = random.Random(seed), []
    while held:
        lengths.append(min(held, chance.randrange(1, 33) * 64 * KiB))
        held -= lengths[-1]
    room = (size - sum(lengths)) // (64 * KiB)
    gaps = sorted(chance.randrange(room + 1) for _ in lengths)
    places, before = [], 0
    for gap, length in zip(gaps, lengths, strict=True):
        places.append((gap * 64 * KiB + before, length))
        before += -(-length // (64 * KiB)) * 64 * KiB
    chance.shuffle(places)
    return places


def places_of(kind: Kind, scale: float, seed: str) -> tuple[int, list[tuple[int, int]]]:
    """A disk's size, and the places that hold data."""
    factor = scale if kind.is_scaled else 1
    unit = kind.fragment * 2 or MiB
    size, held = (max(int(count * factor) // unit, 1) * unit for count in (kind.size, kind.held))
    if not kind.held:
        return size, []
    if kind.fragment:
        return size, [(at, kind.fragment) for at in range(0, size, 2 * kind.fragment)]
    if kind.content == "usr":
        return size, [(at, MiB) for at in range(0, held, MiB)]
    return size, scattered(held, max(size, held + MiB), seed)


def make(lab: Lab, name: str, scale: float, seed: str) -> Disk:
    """The disk of this name on the source, and its base on both hosts."""
    kind = KINDS[name]
    size, places = places_of(kind, scale, seed)
    source = Instance.make(lab["src"])
    if kind.format == "raw":
        source = source.raw(size)
    else:
        for host, content in ((lab["src"], "bench"), (lab["dst"], "bench"), *([(lab["dst"], kind.other_base)] if kind.other_base else [])):
            if host.run("test", "-f", path := BASE + content.removeprefix("bench"), check=False).returncode:
                base(host, content, path=path)
        source = source.overlay(BASE, size)
    fill(source, kind.content, seed, places)
    return Disk(name, source, size, source.length, source.allocated)


def fill(source: Instance, content: str, seed: str, places: Sequence[tuple[int, int]]) -> None:
    """A guest writes to these places."""
    words = " ".join(f"{offset}:{length}" for offset, length in places)
    source.host.run("python3", "-c", FILL, source.path, source.format, content, seed, input=words, seconds=3600)
    source.host.run("sync", source.path)
