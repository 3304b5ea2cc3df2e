"""The benchmark from its first step to its last on a small disk; and that it notices copies that are none, and ways that never end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench import disks, rounds, show, stage, ways, wire
from bench.stage import FOLDER, Stage
from hosts.rig import INSTANCES, wait_for
from lab.hosts import Lab

MiB = 1024**2


@pytest.fixture
def bench(lab: Lab, tmp_path: Path) -> Iterator[Stage]:
    """The benchmark's stage on the hosts of the tests."""
    found = Stage(lab, tmp_path, "third")
    with found.measured():
        yield found


def test_two_ways_are_measured_proven_and_shown_and_nothing_is_left(bench: Stage, tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    order = rounds.Order(["unshaped"], ["tiny"], ["migrena-qemu-clear-proven", "migrena-nbd-tls-proven", "convert"], rounds=1)
    rounds.run(bench, order, rounds.writer(path))
    head, *runs = (json.loads(line) for line in path.read_text().splitlines())
    assert head["left_out"].keys() == {"migrena-nbd-tls-proven"} and head["seed"] == "migrena"
    found = {record["way"]: record for record in runs}
    assert found.keys() == {"migrena-qemu-clear-proven", "convert"}
    for record in runs:
        assert record["equal"] is True, record
        assert MiB < record["sent"]["src"] < 4 * MiB and MiB < record["received"]["dst"] < 4 * MiB and record["allocated"] > MiB
        assert record["seconds"] > 0 and record["cpu"]["dst"] > 0 and record["cpu"]["src"] > 0
    ours = found["migrena-qemu-clear-proven"]
    assert ours["memory"] > 10 * MiB and ours["whole"]["seconds"] > ours["seconds"] and ours["cpu"]["operator"] > 0
    assert "| convert |" in show.table(show.read(path)) and "convert" in show.picture(show.read(path))
    assert bench.lab["dst"].run("ls", INSTANCES).stdout.split() == ["_base"]
    for host in bench.lab:
        assert host.run("test", "-e", FOLDER, check=False).returncode == 1


def test_control_a_copy_that_is_not_its_source_and_a_way_that_never_ends_are_reported(
        bench: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def forges(stage: Stage, disk: disks.Disk) -> ways.Outcome:
        ways.convert(stage, disk)
        stage.run("dst", "qemu-io", "-f", "raw", "-c", "write -q -P 7 1M 512", ways.NEW)
        return ways.Outcome()

    def hangs(stage: Stage, disk: disks.Disk) -> ways.Outcome:
        replace(stage, patience=1.0).run("dst", "sh", "-c", "setsid sleep 987 & wait")
        return ways.Outcome()

    for name, way in {"forges": ways.Way("", forges, "file"), "hangs": ways.Way("", hangs)}.items():
        monkeypatch.setitem(ways.WAYS, name, way)
    disk = disks.make(bench.lab, "tiny", 1, "seed")
    assert rounds.measure(bench, rounds.Case("unshaped", "tiny", "forges"), disk)["equal"] is False
    assert rounds.measure(bench, rounds.Case("unshaped", "tiny", "hangs"), disk)["failed"] == "gave up after 1 s"
    assert not [words for _, words in bench.lab["dst"].processes() if "987" in words]


def test_the_wire_is_shaped_in_both_directions_and_free_again(bench: Stage) -> None:
    def shaped() -> list[bool]:
        found = [host.run("tc", "qdisc", "show", "dev", "eth0").stdout for host in bench.lab]
        found += [bench.run(stage.OPERATOR, "tc", "qdisc", "show", "dev", bench.lab.spec.link(host.name)) for host in bench.lab]
        return [" tbf " in text for text in found]

    wire.shape(bench.lab, wire.WIRES["100mbit"])
    assert shaped() == [True] * 6
    wire.shape(bench.lab, 0)
    assert shaped() == [False] * 6


def test_what_a_host_spends_is_counted_to_it_also_when_it_was_asked_for_by_ssh(bench: Stage) -> None:
    ways.lay_keys(bench.lab)
    before = bench.read()
    burn = "dd if=/dev/zero bs=1M count=400 status=none | sha256sum"
    bench.run("dst", "ssh", *ways.ssh_options(), f"root@{bench.addresses['src']}", burn)
    wait_for("its CPU seconds", lambda: bench.read().cpu["src"] - before.cpu["src"] > 0.1)
    assert bench.read().cpu["src"] - before.cpu["src"] > 2 * (bench.read().cpu["dst"] - before.cpu["dst"])
