"""What was measured, as a table in Markdown and as a picture in SVG; from a run's JSON lines alone."""

from __future__ import annotations

import json
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

from bench.wire import WIRES
from lab.processes import LabError, home, say

Record = Mapping[str, Any]
MiB: Final = 1024**2
GiB: Final = 1024**3
LEGEND: Final = ("Seconds are medians, until the way says that it is done; of migrena they are its copy's, with the proof, where it was asked for. "
                 "`synced after` is what the destination's disk then still had to write (migrena and nbdcopy have synced by themselves). "
                 "CPU is that of the hosts' processes; bytes are those of the busiest cable in both directions; "
                 "`equal` counts the copies that were compared with their source.")
LEAST: Final = MiB  # bytes below which a ratio to what the disk holds says nothing
COLUMNS: Final = ("way", "seconds", "× iperf3", "× dd", "CPU of both hosts, s/GiB", "CPU of the operator, %", "MiB on the wire", "× held",
                  "allocated × held", "synced after, s", "memory, MiB", "equal")
NAME_WIDTH, BAR_WIDTH, LINE, PANEL = 190, 210, 15, 500  # of the picture, in pixels


@dataclass(frozen=True)
class Row:
    """What one way made of one disk over one wire: medians over the rounds, and the extremes of its time."""

    way: str
    seconds: float = 0.0
    fastest: float = 0.0
    slowest: float = 0.0
    cpu: float = 0.0  # seconds of both hosts together
    operator: float = 0.0  # of one core, by migrena during the copy
    sent: float = 0.0  # bytes on the busiest cable, both directions
    held: int = 0  # bytes that the source's file takes
    allocated: float = 0.0  # bytes that the copy takes
    synced: float = 0.0
    memory: float = 0.0  # bytes
    count: int = 0
    equal: int | None = None  # how many of the copies were their source; None where nothing is copied
    failed: str = ""


def read(path: Path) -> list[Record]:
    """The records of a run; a last line that was cut off is left out."""
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def told(found: Callable[[], Path], table: Callable[[Sequence[Record]], str], picture: Callable[[Sequence[Record]], str]) -> int:
    """The exit code of a benchmark that measures or finds a file of JSON lines: prints its table, and draws its picture beside it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all scopes are closed
    try:
        home().mkdir(parents=True, exist_ok=True)
        path = found()
        records = read(path)
        drawn = path.with_suffix(".svg")
        drawn.write_text(picture(records))
        print(table(records))
        say(f"the picture is {drawn}")
    except (LabError, KeyboardInterrupt) as error:
        print(f"bench: {error or 'interrupted'}", file=sys.stderr)
        return 1
    return 0


def median(records: Sequence[Record], key: str) -> float:
    """Of those records that have it; 0 where none has."""
    return float(statistics.median([record[key] for record in records if key in record] or [0]))


def on_the_wire(record: Record) -> int:
    """Bytes that crossed the busiest cable in both directions: the source's, or Glance's with its four transfers."""
    return max(int(record["received"][name]) + int(record["sent"][name]) for name in record["sent"])


def row(way: str, records: Sequence[Record]) -> Row:
    """What came of one way's runs."""
    good = [record for record in records if "failed" not in record]
    if not good:
        return Row(way, failed=str(records[0]["failed"]))
    cpu = [{"both": record["cpu"]["src"] + record["cpu"]["dst"], "wire": on_the_wire(record),
            "operator": record["cpu"]["operator"] / (record.get("act_seconds") or record["seconds"] or 1)} for record in good]
    times, judged = [record["seconds"] for record in good], [record["equal"] for record in good if record.get("equal") is not None]
    return Row(way, statistics.median(times), min(times), max(times), median(cpu, "both"), median(cpu, "operator"), median(cpu, "wire"),
               good[0]["held"], median(good, "allocated"), median(good, "synced"), median(good, "memory"), len(good),
               sum(judged) if judged else None)


def grouped(records: Sequence[Record]) -> Iterator[tuple[str, str, list[Row]]]:
    """Each wire and disk in the order of the run's own names, with its ways from the fastest to the slowest; failures last."""
    runs = [record for record in records if record["kind"] == "run"]
    for wire in dict.fromkeys(sorted((record["wire"] for record in runs), key=list(WIRES).index)):
        for disk in sorted({record["disk"] for record in runs if record["wire"] == wire}):
            found: dict[str, list[Record]] = {}
            for record in runs:
                if (record["wire"], record["disk"]) == (wire, disk):
                    found.setdefault(record["way"], []).append(record)
            yield wire, disk, sorted((row(way, some) for way, some in found.items()), key=lambda row: (bool(row.failed), row.seconds))


def digits(seconds: float) -> str:
    """Seconds with hundredths, or with thousandths below one."""
    return f"{seconds:.{3 if seconds < 1 else 2}f}"


def ratio(one: float, other: float, least: float = 0.0) -> str:
    """How many times the other; empty where the other is too small to say."""
    return f"{one / other:.2f}" if other > least else ""


def cells(row: Row, wire: float, disk: float) -> list[str]:
    """One line of the table, without its first column; `wire` and `disk` are the limits' seconds."""
    if row.equal is None:  # a limit: it may have sent another number of bytes
        return [digits(row.seconds), ratio(row.seconds, wire), ratio(row.seconds, disk), *[""] * (len(COLUMNS) - 4)]
    per_gib = f"{row.cpu / row.held * GiB:.2f}" if row.held > LEAST else ""
    percent = f"{row.operator * 100:.1f}" if row.memory else ""
    return [digits(row.seconds), ratio(row.seconds, wire), ratio(row.seconds, disk), per_gib, percent, f"{row.sent / MiB:.1f}",
            ratio(row.sent, row.held, LEAST), ratio(row.allocated, row.held, LEAST), f"{row.synced:.2f}",
            f"{row.memory / MiB:.0f}" if row.memory else "", f"{row.equal} of {row.count}"]


def table(records: Sequence[Record]) -> str:
    """All of it in Markdown: one table for each wire and disk."""
    parts = list(head_lines(records))
    disks = {disk: row.seconds for _, disk, rows in grouped(records) for row in rows if row.way == "dd"}
    for wire, disk, rows in grouped(records):
        limit = next((row.seconds for row in rows if row.way == "iperf3"), 0.0)
        held = max(row.held for row in rows)
        parts += ["", f"### {wire}, {disk} ({held / MiB:.1f} MiB held)", "", f"| {' | '.join(COLUMNS)} |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
        for row in rows:
            told = [row.failed.replace("|", "/").partition("\n")[0][:80], *[""] * (len(COLUMNS) - 2)] if row.failed else cells(
                row, limit, disks.get(disk, 0.0))
            parts.append(f"| {row.way} | {' | '.join(told)} |")
    return "\n".join(parts)


LEFT_OUT: Final = ("dd", "nbdcopy", "rsync", "ssh-cat")  # README has their next of kin; the picture has all


def brief(records: Sequence[Record]) -> str:
    """What README shows of a run: each way's seconds until its copy is on the disk, and how many times those of the wire's limit, or of the
    fastest other way where the wire is no limit; of those disks and wires for which the limit was measured."""
    columns: dict[str, dict[str, str]] = {}
    order: list[str] = []
    for wire, disk, rows in grouped(records):
        if "iperf3" not in {row.way for row in rows}:
            continue
        times = dict(sorted(((row.way, row.seconds + row.synced * (row.equal is not None)) for row in rows if not row.failed),
                            key=lambda item: item[1]))
        others = [seconds for way, seconds in times.items() if way not in ("iperf3", "dd") and not way.startswith("migrena")]
        limit = min(others, default=0.0) if wire == "unshaped" else times.get("iperf3", 0.0)
        title = f"{wire}, {disk}, {max(row.held for row in rows) / MiB:.0f} MiB"
        columns[title] = {way: f"{digits(seconds)} s (×{ratio(seconds, limit)})" for way, seconds in times.items()}
        order = [way for way in [*times, *(way for way in order if way not in times)] if way not in LEFT_OUT]
    lines = [f"| way | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {way} | {' | '.join(found.get(way, '') for found in columns.values())} |" for way in order]
    return "\n".join(lines)


def head_lines(records: Sequence[Record]) -> Iterator[str]:
    """What was measured and where."""
    for head in records:
        if head["kind"] == "head":
            yield (f"migrena {head['commit']}{' with changes' if head['changed'] else ''}, scale {head['scale']:g}, medians of {head['rounds']}, "
                   f"seed {head['seed']}, {head['at']}; {head['cpus']} × {head['cpu']}, {head['memory'] / GiB:.0f} GiB, Linux {head['kernel']}.")
            yield "; ".join(f"{name}: {version}" for name, version in head["versions"].items())
            for name, why in head["left_out"].items():
                yield f"Left out: {name}: {why}."
    yield f"\n{LEGEND}"


def colour(way: str) -> str:
    """migrena, the limits, and all others."""
    return "#c2410c" if way.startswith("migrena") else "#94a3b8" if way in ("iperf3", "dd") else "#334155"


def panel(title: str, rows: Sequence[Row], left: int, top: int) -> Iterator[str]:
    """The bars of one wire and disk: medians, the extremes as a line, and the wire's limit as a dashed one."""
    yield f'<text x="{left}" y="{top + 12}" font-weight="bold">{escape(title)}</text>'
    longest = max((row.slowest for row in rows), default=0.0) or 1.0
    start = left + NAME_WIDTH

    def place(seconds: float) -> float:
        return round(start + BAR_WIDTH * seconds / longest, 1)

    for number, row in enumerate(rows):
        y = top + 20 + number * LINE
        yield f'<text x="{start - 6}" y="{y + 10}" text-anchor="end">{escape(row.way)}</text>'
        if row.failed:
            yield f'<text x="{start + 2}" y="{y + 10}" fill="#b91c1c">{escape(row.failed[:30])}</text>'
            continue
        yield f'<rect x="{start}" y="{y + 2}" width="{place(row.seconds) - start:.1f}" height="{LINE - 5}" fill="{colour(row.way)}"/>'
        if row.count > 1:
            yield f'<path d="M{place(row.fastest)} {y + LINE / 2}H{place(row.slowest)}" stroke="#eab308" stroke-width="2"/>'
        yield f'<text x="{place(row.slowest) + 4}" y="{y + 10}">{digits(row.seconds)} s</text>'
    for row in rows:
        if row.way == "iperf3" and not row.failed:
            yield (f'<path d="M{place(row.seconds)} {top + 18}V{top + 20 + len(rows) * LINE}" stroke="#0284c7" stroke-dasharray="3 3" '
                   'fill="none"/>')


def picture(records: Sequence[Record]) -> str:
    """All of it as SVG: a column for each wire, a panel for each disk."""
    left, height = 10, 0
    parts: list[str] = []
    groups = list(grouped(records))
    for wire in dict.fromkeys(wire for wire, _, _ in groups):
        top = 10
        for disk, rows in ((disk, rows) for other, disk, rows in groups if other == wire):
            parts += panel(f"{wire}, {disk}", rows, left, top)
            top += 40 + len(rows) * LINE
        left, height = left + PANEL, max(height, top)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{left}" height="{height}" viewBox="0 0 {left} {height}" '
            f'font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n")
