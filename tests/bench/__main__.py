"""The command line of the benchmark; what it is for stands in bench/__init__.py."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import bench
from bench import disks, rounds, show, ways, wire
from lab.packages import HOSTS, install
from lab.processes import LabError, home, say


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Reads a list with commas in it, of known names; `migrena*` names all that begin so."""

    def read(text: str) -> list[str]:
        words = text.split(",")
        found = [name for name in known for word in words if name == word or (word.endswith("*") and name.startswith(word[:-1]))]
        if unknown := [word for word in words if not any(name == word or name.startswith(word.rstrip("*")) for name in found)]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: none of {', '.join(known)}")
        return found

    return read


def words() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="tests/bench/run", description=bench.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wires", type=some_of(list(wire.WIRES)), default=list(wire.WIRES), help=", ".join(wire.WIRES))
    parser.add_argument("--disks", type=some_of(list(disks.KINDS)), default=list(disks.KINDS), help=", ".join(disks.KINDS))
    parser.add_argument("--ways", type=some_of(list(ways.WAYS)), default=list(ways.WAYS), help=f"{', '.join(ways.WAYS)}; nbd* means all of a name")
    parser.add_argument("--scale", type=float, help="of the disks; 1 are the question's sizes, 0.25 is the default")
    parser.add_argument("--rounds", type=int, help="5 unless said")
    parser.add_argument("--seed", default=f"{time.time_ns() // 10**6:x}", help="decides the disks' content and the order of the runs")
    parser.add_argument("--patience", type=float, help="seconds after which one measurement is given up: 600, or 60 with --quick")
    parser.add_argument("--quick", action="store_true", help="scale 0.01, one round; all wires and forms of migrena for the first disk alone")
    parser.add_argument("--out", type=Path, help="the file of JSON lines; a new one in the lab's folder unless said")
    parser.add_argument("show", nargs="?", choices=["show"], help="print the table and draw the picture of FILE, measure nothing")
    parser.add_argument("file", nargs="?", type=Path, default=Path(__file__).with_name("results.jsonl"),
                        help="JSON lines of a run; the committed ones unless said")
    return parser.parse_args()


def measure(given: argparse.Namespace) -> Path:
    """Measures all that was asked for; gives the file of JSON lines."""
    if given.out and given.out.exists():
        raise LabError(f"{given.out} holds another run already")
    if os.geteuid():
        raise LabError("namespaces, wires and caches need root")
    install((*HOSTS, *rounds.PACKAGES))
    scale, number = given.scale or (0.01 if given.quick else 0.25), given.rounds or (1 if given.quick else 5)
    patience = given.patience or (60 if given.quick else 600)
    order = rounds.Order(given.wires, given.disks, given.ways, scale, number, given.seed, patience, given.quick)
    out: Path = given.out or home() / "bench" / f"{time.strftime('%Y%m%dT%H%M%S')}.jsonl"
    say(f"seed {order.seed}, scale {scale:g}, {number} rounds of {len(order.cases(1))} runs; the lines go to {out}")
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=home()))
    try:
        with rounds.brought_up(folder, order) as stage:
            rounds.run(stage, order, rounds.writer(out))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return out


def main() -> int:
    """Measures, then shows; or shows what was measured before."""
    given = words()
    return show.told(lambda: given.file if given.show else measure(given),
                     lambda records: f"{show.brief(records)}\n\n{show.table(records)}", show.picture)


if __name__ == "__main__":
    sys.exit(main())
