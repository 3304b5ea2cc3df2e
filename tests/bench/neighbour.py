"""What a guest beside the source feels of a copy: how much slower it counts, and reads from the same disk, meanwhile.

    tests/bench/run neighbour [--scale 0.5] [--rounds 3]

The neighbour is two processes on the source's host, one that only counts and one that reads 4 KiB at random places past the page cache.
All hosts share this machine's cores, so the destination's and the operator's work slows it too: with two cores it is the worst case.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bench import disks, rounds
from bench.disks import Disk
from bench.stage import FOLDER, Stage, cold
from bench.ways import CLEAR, WAYS, moved
from lab.packages import HOSTS, install
from lab.processes import LabError, home, say

FILE: Final = "/var/lib/nova/neighbour"
PROGRAM: Final = """
import mmap, os, random, sys, time
room, spent = mmap.mmap(-1, 4096), []
disk = os.open(sys.argv[2], os.O_RDONLY | os.O_DIRECT)
size, began, count = os.fstat(disk).st_size // 4096, time.monotonic(), 0
print("ready", flush=True)
while not os.path.exists(sys.argv[2] + ".end"):
    if sys.argv[1] == "count":
        for _ in range(100000):
            count += 1
    else:
        at = time.monotonic()
        os.lseek(disk, random.randrange(size) * 4096, os.SEEK_SET)
        os.readv(disk, [room])
        spent.append(time.monotonic() - at)
        time.sleep(0.002)
print(count / (time.monotonic() - began) if sys.argv[1] == "count" else 1000 * sum(spent) / len(spent), time.process_time(), flush=True)
"""
WORDS: Final = {"alone": None, "migrena": moved(*CLEAR), "migrena --lanes 1": moved(*CLEAR, "--lanes", "1"), "convert": WAYS["convert"].go}


def felt(stage: Stage, disk: Disk, way: str) -> tuple[float, float, float]:
    """Counts a second, milliseconds for a read, and how many cores the source's host used apart from these two."""
    stage.lab["dst"].run("mkdir", "-p", FOLDER)
    cold()
    with stage.started("src", "python3", "-c", PROGRAM, "count", FILE) as one, stage.started("src", "python3", "-c", PROGRAM, "read", FILE) as other:
        for process in (one, other):
            assert process.stdout
            process.stdout.readline()
        before = stage.read()
        go = WORDS[way]
        if go:
            go(stage, disk)
        else:
            time.sleep(5)
        after = stage.read()
        stage.lab["src"].run("touch", f"{FILE}.end")
        (counts, own), (delay, more) = (map(float, process.communicate(timeout=20)[0].split()) for process in (one, other))
    stage.lab["src"].run("rm", f"{FILE}.end")
    rounds.clear(stage, disk)
    return counts, delay, (after.cpu["src"] - before.cpu["src"] - own - more) / (after.at - before.at)


def main(argv: Sequence[str]) -> int:
    """Measures all ways in turns, and prints a table."""
    parser = argparse.ArgumentParser(prog="tests/bench/run neighbour", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(argv)
    install((*HOSTS, *rounds.PACKAGES))
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=home()))
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WORDS}
    try:
        with rounds.brought_up(folder, rounds.Order(["unshaped"], ["random"], ["convert"], given.scale)) as stage:
            disk = disks.make(stage.lab, "random", given.scale, "neighbour")
            stage.lab["src"].run("sh", "-c", 'head -c 256M /dev/urandom > "$1"; sync "$1"', "sh", FILE)
            for number in range(given.rounds):
                for way in list(WORDS)[:: 1 if number % 2 else -1]:
                    found[way].append(felt(stage, disk, way))
                    say(f"{way:20} {found[way][-1][0] / 1e6:6.1f} million a second, {found[way][-1][1]:6.2f} ms a read, "
                        f"{found[way][-1][2]:.2f} cores of the source's host")
    except (LabError, subprocess.SubprocessError) as error:
        say(f"FAILED: {error}")
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    counts, delay, _ = (statistics.median(row[column] for row in found["alone"]) for column in range(3))
    for way, rows in found.items():
        told = [statistics.median(row[column] for row in rows) for column in range(3)]
        print(f"{way:20} counts x {told[0] / counts:.2f}, a read takes x {told[1] / delay:.2f}, {told[2]:.2f} cores of the source's host")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
