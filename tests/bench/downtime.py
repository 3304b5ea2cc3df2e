"""How long an instance is down, and what its guest feels: cold, warm, and warm with a dirty bitmap, on the lab's real clouds over 1 Gbit/s.

The guest rewrites a part of its disk all the time, and writes its records as ever; each copy's guest must go on with the next one. Write
latencies are those that qemu itself counts (virsh domblkstat), before the copy and while the source runs on under it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from bench import rounds, wire
from bench.show import median, told
from clouds.conftest import DESTINATION, SOURCE, Operator, as_before, boots, disk, ended, last_record, stop_soon, wait_for_console, write_random
from clouds.test_volumes import disks as drives
from clouds.test_volumes import opened
from lab.api import Api
from lab.clouds import Clouds, Options, purge
from lab.hosts import Host
from lab.processes import LabError, command, home, say

WAYS: Final[Mapping[str, Sequence[str]]] = {"cold": (), "warm": ("--warm",), "warm, 30M": ("--warm", "--limit-rate", "30M"),
                                            "warm, bitmap": ("--warm", "--bitmap"), "seed": ("--seed",)}
MiB: Final = 1024**2
FIRST: Final = 1024 * MiB  # where the random data begins; the guest's own part lies before it
MARKER: Final = 130 * MiB  # where the guest looks for its orders, see guest_init.sh
WATCHED: Final = 15.0  # seconds for which the writes are watched before each copy
RECORDS: Final = Path(__file__).with_name("downtime.jsonl")


def order(host: Host, id: str, rewritten: int) -> None:
    """Tells a stopped guest to rewrite so many MiB of its disk, again and again."""
    script = 'printf "rewrite %d" "$1" > /root/order; truncate -s 512 /root/order; qemu-io -f qcow2 -c "write -q -s /root/order $2 512" "$3"'
    host.run("sh", "-ec", script, "sh", str(rewritten), str(MARKER), disk(id))


def counted(host: Host, id: str) -> dict[str, int]:
    """What qemu has counted of a guest's disk: requests, and the nanoseconds they took in all."""
    lines = host.run("virsh", "-q", "domblkstat", id, "vda").stdout.splitlines()
    return {words[1]: int(words[2]) for words in map(str.split, lines) if len(words) == 3}


def latency(before: Mapping[str, int], after: Mapping[str, int]) -> float:
    """Milliseconds that a write took between two looks, with its share of the flushes; 0 where there was none."""
    writes = after["wr_req"] - before["wr_req"]
    return sum(after[key] - before[key] for key in ("wr_total_times", "flush_total_times")) / writes / 1e6 if writes else 0.0


def add_volumes(clouds: Clouds, id: str, count: int, folder: Path) -> list[str]:
    """Attaches volumes of 1 GiB to the stopped source, of which half has data; gives their ids."""
    api, made = clouds.api("src"), [clouds.api("src").create_volume(f"data {number}") for number in range(count)]
    for volume in made:
        api.attach(id, volume)
    for name, drive in list(drives(clouds, SOURCE, id).items())[1:]:
        say(f"volume {name}: 512 MiB of random data")
        command("sh", "-c", 'head -c 512M /dev/urandom > "$1"', "sh", folder / "noise")
        command("qemu-io", "-c", f"write -q -s {folder / 'noise'} {256 * MiB} {512 * MiB}", "--image-opts", opened(clouds, SOURCE, drive))
    return made


def measured(operator: Operator, hosts: Sequence[Host], apis: Sequence[Api], id: str, way: str) -> dict[str, Any]:
    """One copy of a running source, and the destination's guest after it."""
    src, dst = apis
    as_before(src, dst, id)
    for left in dst.volumes() if operator.clouds.options.volumes else ():
        dst.delete_volume(left["id"])
    src.act(id, "os-start", until="ACTIVE")
    wait_for_console(src, id, "GUEST wrote=")
    first = counted(hosts[0], id)
    time.sleep(WATCHED)
    before, during = counted(hosts[0], id), None
    words = ["-s", id, *operator.to(DESTINATION, flavor="large"), "-a", "dst", *WAYS[way]]
    if way == "seed":  # what is measured is the cut-over to it
        words = ["resume", str(operator.report(*words)["run"])]
    process = operator.begin(*words, "--json")
    assert process.stderr
    begun = before
    for line in process.stderr:
        if "Copy the disk while the source runs" in line:
            begun = counted(hosts[0], id)
        if "Stop source instance" in line:
            during = counted(hosts[0], id) if WAYS[way] else None
            break
    done = ended(process, operator.patience)
    if done.returncode:
        raise LabError(f"{way}: {done.stderr[-2000:]}")
    report = json.loads(done.stdout)
    shown = wait_for_console(dst, report["destination"]["id"], "GUEST boots=")
    seconds = report["seconds"]
    return {"downtime": report["downtime_seconds"], "nova": seconds["Stop source instance"] + seconds["Start destination instance"],
            "steps": seconds, "bytes": report["copy"]["bytes"], "by_bitmap": report["copy"]["proven_by_bitmap"],
            "passes": report["copy"].get("passes", []), "write_ms_before": round(latency(first, before), 3),
            **({"write_ms_during": round(latency(begun, during), 3)} if during else {}),
            "equal": f"boots={boots(hosts[0], id) + 1} last={last_record(hosts[0], id)} broken=0" in shown}


def measure(sizes: Sequence[float], ways: Sequence[str], number: int, rewritten: int, volumes: int, out: Path) -> None:
    """Measures all ways for all sizes (GiB), so many rounds of them, and writes a line for each."""
    purge()
    options = Options((SOURCE, DESTINATION))
    clouds = Clouds(options.with_storage("src", "nfs").with_storage("dst", "nfs") if volumes else options)
    clouds.up()
    write = rounds.writer(out)
    try:
        stop_soon(clouds.api("dst"))
        apis, hosts = (clouds.api("src"), clouds.api("dst")), (clouds.host(SOURCE), clouds.host(DESTINATION))
        rate = wire.WIRES["1gbit"]
        for host in hosts:
            host.run(*wire.words("eth0", rate))
            command(*wire.words(host.spec.link(host.name), rate))
        write({"kind": "head", **rounds.facts(), "rounds": number, "rewritten": rewritten * MiB})
        for size in sizes:
            id = apis[0].create("bench", flavor="large", availability_zone=f"nova:{SOURCE}")
            wait_for_console(apis[0], id, "GUEST wrote=")
            apis[0].act(id, "os-stop", until="SHUTOFF")
            write_random(hosts[0], id, *[(FIRST + part * 256 * MiB, 256 * MiB) for part in range(int(size * 4))])
            order(hosts[0], id, rewritten)
            with tempfile.TemporaryDirectory() as folder:
                own = add_volumes(clouds, id, volumes, Path(folder)) if volumes else []
            for round in range(1, number + 1):
                for way in ways:
                    with tempfile.TemporaryDirectory() as folder:
                        operator = Operator(clouds, Path(folder), patience=900)
                        found = measured(operator, hosts, apis, id, way)
                    write({"kind": "run", "round": round, "size": size, "volumes": volumes, "way": way, **found})
                    say(f"{size:g} GiB, {way}: down for {found['downtime']} s, {found['nova']:.1f} of them Nova's")
            as_before(*apis, id)
            apis[0].delete(id)
            for volume in own:
                apis[0].delete_volume(volume)
    finally:
        clouds.down()


SHOWN: Final = (1.0, 4.0)  # GiB; the picture has all
NOT_SHOWN: Final = ("warm, 30M",)


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Medians of the rounds for the sizes that README shows, in Markdown."""
    runs = [record for record in records if record["kind"] == "run" and record["size"] in SHOWN]
    lines = ["| GiB | way | down for, s | of it Nova's | sent then, MiB | a write before, ms | a write meanwhile, ms | right |",
             "|---:|---|" + "---:|" * 6]
    for size, volumes in sorted({(record["size"], record.get("volumes", 0)) for record in runs}):
        for way in (known for known in WAYS if known not in NOT_SHOWN):
            some = [record for record in runs if (record["size"], record.get("volumes", 0), record["way"]) == (size, volumes, way)]
            if some:
                meanwhile = f"{median(some, 'write_ms_during'):.1f}" if "write_ms_during" in some[0] else ""
                lines.append(f"| {size:g}{f', {volumes} volumes' if volumes else ''} | {way} | {median(some, 'downtime'):.1f} "
                             f"| {median(some, 'nova'):.1f} | {median(some, 'bytes') / MiB:.0f} | {median(some, 'write_ms_before'):.1f} "
                             f"| {meanwhile} | {sum(record['equal'] for record in some)} of {len(some)} |")
    return "\n".join(lines)


def picture(records: Sequence[Mapping[str, Any]]) -> str:
    """Downtime against disk size: a group of bars for each size, one for each way, Nova's own part of it lighter."""
    runs = [record for record in records if record["kind"] == "run" and not record.get("volumes")]
    longest = max((record["downtime"] for record in runs), default=1.0)
    parts, y, width = [], 24, 420
    for size in sorted({record["size"] for record in runs}):
        parts.append(f'<text x="10" y="{y + 11}" font-weight="bold">{size:g} GiB</text>')
        for way in (way for way in WAYS if way != "warm, 30M"):
            some = [record for record in runs if (record["size"], record["way"]) == (size, way)]
            if not some:
                continue
            down, nova = median(some, "downtime"), median(some, "nova")
            reach, light = (round(width * seconds / longest, 1) for seconds in (down, nova))
            parts.append(f'<text x="142" y="{y + 11}" text-anchor="end">{escape(way)}</text>'
                         f'<rect x="150" y="{y + 2}" width="{reach}" height="11" fill="#c2410c"/>'
                         f'<rect x="150" y="{y + 2}" width="{light}" height="11" fill="#fdba74"/>'
                         f'<text x="{154 + reach}" y="{y + 11}">{down:.1f} s</text>')
            y += 16
        y += 8
    title = '<text x="10" y="14">Seconds from the stop to the destination\'s ACTIVE, 1 Gbit/s; the lighter part is Nova\'s own stop and start</text>'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{y}" viewBox="0 0 640 {y}" font-family="sans-serif" font-size="11">\n'
            f'<rect width="100%" height="100%" fill="white"/>\n{title}\n' + "\n".join(parts) + "\n</svg>\n")


def main() -> int:
    """Measures, then shows; or shows what was measured before."""
    parser = argparse.ArgumentParser(prog="tests/bench/run downtime", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=lambda text: [float(word) for word in text.split(",")], default=[0.5, 1.0, 2.0, 4.0],
                        help="of the data, in GiB (default: 0.5,1,2,4)")
    parser.add_argument("--ways", type=lambda text: text.split(";"), default=list(WAYS), help="; ".join(WAYS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rewritten", type=int, default=50, help="MiB that the guest rewrites all the time (default: 50)")
    parser.add_argument("--volumes", type=int, default=0, help="of 1 GiB, half of it data, that the instance has besides (default: 0)")
    parser.add_argument("--out", type=Path, help="the file of JSON lines; a new one in the lab's folder unless said")
    parser.add_argument("show", nargs="?", choices=["show"], help="print the table and draw the picture of FILE, measure nothing")
    parser.add_argument("file", nargs="?", type=Path, default=RECORDS, help="JSON lines of a run; the committed ones unless said")
    given = parser.parse_args()

    def measured_now() -> Path:
        path: Path = given.out or home() / "bench" / f"downtime-{time.strftime('%Y%m%dT%H%M%S')}.jsonl"
        measure(given.sizes, given.ways, given.rounds, given.rewritten, given.volumes, path)
        return path

    return told(lambda: given.file if given.show else measured_now(), table, picture)


if __name__ == "__main__":
    sys.exit(main())
