"""The benchmark's arithmetic: what is measured in which order, where data lies, and what table and picture are made of JSON lines."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bench import disks, downtime, show, ways, wire
from bench.rounds import Order
from conftest import REPOSITORY

MiB = 1024**2
RESULTS = REPOSITORY / "tests" / "bench" / "results.jsonl"


def a_record(way: str, seconds: float, **different: Any) -> dict[str, Any]:
    """One measurement: 1 GiB over 1 Gbit/s."""
    return {"kind": "run", "round": 1, "wire": "1gbit", "disk": "random", "way": way, "held": 1024 * MiB, "length": 1024 * MiB,
            "seconds": seconds, "cpu": {"operator": 0.2, "src": 0.5, "dst": 1.0, "images": 0.0}, "allocated": 512 * MiB, "synced": 0.5,
            "received": {"src": 24 * MiB, "dst": 1000 * MiB, "images": 0}, "sent": {"src": 1000 * MiB, "dst": 24 * MiB, "images": 0},
            "equal": True, **different}


HEAD = {"kind": "head", "commit": "abc", "changed": False, "scale": 0.5, "rounds": 3, "seed": "s", "at": "2026", "cpus": 2, "cpu": "A & B",
        "memory": 4 * 1024**3, "kernel": "6.1", "versions": {"qemu": "7.2"}, "left_out": {"migrena-nbd": "no module"}}
RECORDS = [HEAD, *(a_record("iperf3", seconds, equal=None) for seconds in (9, 10, 12)),
           *(a_record("migrena", seconds, memory=60 * MiB, act_seconds=20) for seconds in (11, 30, 10.5)),
           a_record("scp", 20, equal=False), a_record("api", 0, failed="gave up after 5 s | <late>")]


def lines_of(text: str) -> dict[str, list[str]]:
    """The table's lines, by their first cell."""
    rows = [[cell.strip() for cell in line[2:-1].split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in rows}


def test_the_table_tells_medians_and_how_far_they_are_from_the_wires_limit() -> None:
    lines = lines_of(show.table(RECORDS))
    assert lines["iperf3"][:2] == ["10.00", "1.00"]
    assert lines["migrena"] == ["11.00", "1.10", "", "1.50", "1.0", "1024.0", "1.00", "0.50", "0.50", "60", "3 of 3"]
    assert lines["scp"][-1] == "0 of 1"
    assert list(lines)[1:] == ["iperf3", "migrena", "scp", "api"] and "gave up after 5 s / <late>" in lines["api"][0]
    assert "migrena abc, scale 0.5, medians of 3, seed s" in show.table(RECORDS) and "Left out: migrena-nbd: no module." in show.table(RECORDS)


def test_what_readme_shows_is_the_time_until_the_copy_is_on_the_disk() -> None:
    unshaped = [a_record(way, seconds, wire="unshaped") for way, seconds in (("migrena", 6), ("scp", 4))]
    lines = lines_of(show.brief([*RECORDS, *unshaped, a_record("iperf3", 1, wire="unshaped", equal=None), a_record("dd", 9, disk="tiny")]))
    assert lines == {"way": ["unshaped, random, 1024 MiB", "1gbit, random, 1024 MiB"], "iperf3": ["1.00 s (×0.22)", "10.00 s (×1.00)"],
                     "scp": ["4.50 s (×1.00)", "20.50 s (×2.05)"], "migrena": ["6.50 s (×1.44)", "11.50 s (×1.15)"]}
    assert list(lines)[1:] == ["iperf3", "migrena", "scp"]


def test_readme_shows_the_committed_results_and_so_does_the_picture() -> None:
    records = show.read(RESULTS)
    assert show.brief(records) in (REPOSITORY / "README.md").read_text()
    downtimes = show.read(downtime.RECORDS)
    assert downtime.table(downtimes) in (REPOSITORY / "README.md").read_text()
    assert downtime.picture(downtimes) == downtime.RECORDS.with_suffix(".svg").read_text()
    assert show.picture(records) == RESULTS.with_suffix(".svg").read_text()
    assert all(record["equal"] for record in records if record["kind"] == "run" and record["way"] != "iperf3")


def test_what_takes_four_cables_by_way_of_glance_is_counted_four_times() -> None:
    record = a_record("api", 9, received={"src": 1, "dst": 50, "images": 100}, sent={"src": 50, "dst": 1, "images": 100})
    assert show.on_the_wire(record) == 200


def test_the_picture_is_sound_and_holds_every_way() -> None:
    picture = ElementTree.fromstring(show.picture(RECORDS))
    texts = [element.text for element in picture.iter() if element.tag.endswith("text")]
    assert {"1gbit, random", "iperf3", "migrena", "scp", "api", "11.00 s", "gave up after 5 s | <late>"} <= set(texts)
    widths = [float(element.get("width", "")) for element in picture.iter() if element.get("fill") == show.colour("migrena")]
    assert widths == [pytest.approx(11 / 30 * show.BAR_WIDTH, abs=0.1)]


def test_downtimes_are_medians_with_novas_part_and_what_the_guest_felt() -> None:
    runs = [{"kind": "run", "size": size, "way": way, "downtime": down, "nova": 4.0, "bytes": 3 * MiB, "write_ms_before": 1.2, "equal": down < 30,
             **({"write_ms_during": 2.5} if way == "warm" else {})}
            for size, way, down in ((1.0, "cold", 20.0), (1.0, "cold", 40.0), (1.0, "warm", 6.0), (2.0, "warm", 8.0), (4.0, "warm", 9.0))]
    rows = [[cell.strip() for cell in line[2:-1].split("|")] for line in downtime.table([HEAD, *runs]).splitlines()[2:]]
    assert rows == [["1", "cold", "30.0", "4.0", "3", "1.2", "", "1 of 2"], ["1", "warm", "6.0", "4.0", "3", "1.2", "2.5", "1 of 1"],
                    ["4", "warm", "9.0", "4.0", "3", "1.2", "2.5", "1 of 1"]]
    texts = [element.text for element in ElementTree.fromstring(downtime.picture([HEAD, *runs])).iter() if element.tag.endswith("text")]
    assert {"1 GiB", "2 GiB", "cold", "warm", "30.0 s", "9.0 s"} <= set(texts)


def test_a_run_that_was_interrupted_can_be_shown(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(record) for record in RECORDS)[:-5])
    assert show.read(tmp_path / "x.jsonl") == json.loads(json.dumps(RECORDS[:-1]))
    assert "migrena abc" in show.table([HEAD]) and "</svg>" in show.picture([HEAD])
    assert "| way |" in downtime.table([HEAD]) and "</svg>" in downtime.picture([HEAD])


def test_scattered_data_is_as_much_as_asked_for_lies_apart_and_is_written_in_no_order() -> None:
    places = disks.scattered(20 * MiB, 40 * MiB, "seed")
    assert sum(length for _, length in places) == 20 * MiB and places == disks.scattered(20 * MiB, 40 * MiB, "seed")
    assert places != sorted(places) and max(offset + length for offset, length in places) <= 40 * MiB
    assert all(offset + length <= after for (offset, length), (after, _) in pairwise(sorted(places)))


@pytest.mark.parametrize("name", disks.KINDS)
@pytest.mark.parametrize("scale", [0.001, 0.02, 1.0])
def test_a_disk_of_any_scale_has_room_for_its_data(name: str, scale: float) -> None:
    kind = disks.KINDS[name]
    size, places = disks.places_of(kind, scale, "seed")
    assert all(offset >= 0 and offset + length <= size for offset, length in places)
    if scale == 1:
        assert (size, sum(length for _, length in places)) == (kind.size, kind.held)


def test_every_round_has_all_cases_in_an_order_of_its_own() -> None:
    order = Order(list(wire.WIRES), ["random", "tiny"], ["iperf3", "dd", "scp"])
    first, second = order.cases(1), order.cases(2)
    assert first != second and set(first) == set(second) and first == order.cases(1)
    assert len(first) == 2 * 3 * len(wire.WIRES) - 2 * (len(wire.WIRES) - 1)  # dd needs no wire
    quick = Order(list(wire.WIRES), ["random", "tiny"], list(ways.WAYS), quick=True).cases(1)
    assert {case.way for case in quick} == set(ways.WAYS) and {case.wire for case in quick if case.disk == "tiny"} == {"unshaped"}


def test_a_wire_is_shaped_by_its_rate_and_unshaped_again() -> None:
    assert re.search(r"replace dev eth0 root tbf rate 1000000000bit burst 625000 latency", " ".join(wire.words("eth0", wire.WIRES["1gbit"])))
    assert " ".join(wire.words("eth0", wire.WIRES["unshaped"])) == "tc qdisc del dev eth0 root"
