"""Forty runs that are started at once from and to the same two hosts: all of them end well, and never more than two copy."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hosts.operators import an_operator
from hosts.rig import INSTANCES, Instance, MiB, remains, same_guest
from lab.hosts import Lab
from migrena import ORIGIN, known_runs, read_run

FORTY = 40


def places_taken(folder: Path) -> Iterator[tuple[str, int]]:
    """When a run begins to take part in the hosts' work, +1, and when it has its disk in place, -1."""
    for run in known_runs(folder):
        acts = {act.name: act for act in read_run(folder, run).acts}
        yield acts["stop destination"].began, 1
        yield acts["swap in"].ended, -1


def test_forty_runs_that_start_at_once_end_well_and_two_at_a_time_copy(lab: Lab, tmp_path: Path) -> None:
    first = an_operator(lab, tmp_path, str(uuid.uuid4()), [], TLS=False)
    with ThreadPoolExecutor(4) as pool:
        ids = [str(uuid.uuid4()) for _ in range(FORTY - 1)]
        operators = [first, *pool.map(lambda id: an_operator(lab, tmp_path, id, [(MiB, MiB // 4)], TLS=False), ids)]
    begun = [operator.begin("-s", operator.id, "-d", f"new-{operator.id}") for operator in operators]
    ended = [(process.communicate(timeout=280), process.returncode) for process in begun]
    assert [(said, code) for (_, said), code in ended if code] == []
    at_once, most = 0, 0
    for _, change in sorted(places_taken(tmp_path / "state")):
        at_once += change
        most = max(most, at_once)
    assert most == 2
    made = {row["metadata"][ORIGIN]: Instance(lab["dst"], f"{INSTANCES}/{row['id']}/disk", "qcow2") for row in first.made()}
    assert made.keys() == {operator.id for operator in operators}
    assert all(same_guest(operator.source, made[operator.id]) for operator in operators)
    assert {run["result"] for run in json.loads(first.run("status", "--json").stdout)} == {"done"}
    assert [line for host in lab for line in remains(host)] == []
