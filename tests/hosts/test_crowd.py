"""Forty runs that are started at once from and to the same two hosts: all of them end well, and never more than two copy.

So do forty seeds, and the cut-over to all of them, by the commands that README has for GNU parallel.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import REPOSITORY
from hosts.operators import Operator, an_operator
from hosts.rig import INSTANCES, Instance, MiB, remains, same_guest
from lab.hosts import Lab
from lab.packages import install
from migrena import ORIGIN, known_runs, read_run

FORTY = 40


def places_taken(folder: Path) -> Iterator[tuple[str, int]]:
    """When a run begins to take part in the hosts' work, +1, and when it has its disk in place, -1."""
    for run in known_runs(folder):
        acts = {act.name: act for act in read_run(folder, run).acts}
        yield acts["stop destination"].began, 1
        yield acts["swap in"].ended, -1


def most_at_once(places: Iterator[tuple[str, int]]) -> int:
    """How many had a place at the same time."""
    at_once, most = 0, 0
    for _, change in sorted(places):
        at_once += change
        most = max(most, at_once)
    return most


def forty(lab: Lab, folder: Path) -> list[Operator]:
    """Forty instances, of which one has no data."""
    first = an_operator(lab, folder, str(uuid.uuid4()), [], TLS=False)
    with ThreadPoolExecutor(4) as pool:
        ids = [str(uuid.uuid4()) for _ in range(FORTY - 1)]
        return [first, *pool.map(lambda id: an_operator(lab, folder, id, [(MiB, MiB // 4)], TLS=False), ids)]


def have_arrived(lab: Lab, operators: list[Operator]) -> None:
    """All instances are in the destination as they are in the source, and nothing of ours is on a host."""
    made = {row["metadata"][ORIGIN]: Instance(lab["dst"], f"{INSTANCES}/{row['id']}/disk", "qcow2") for row in operators[0].made()}
    assert made.keys() == {operator.id for operator in operators}
    assert all(same_guest(operator.source, made[operator.id]) for operator in operators)
    assert {run["result"] for run in json.loads(operators[0].run("status", "--json").stdout)} == {"done"}
    assert [line for host in lab for line in remains(host)] == []


def test_forty_runs_that_start_at_once_end_well_and_two_at_a_time_copy(lab: Lab, tmp_path: Path) -> None:
    operators = forty(lab, tmp_path)
    begun = [operator.begin("-s", operator.id, "-d", f"new-{operator.id}") for operator in operators]
    ended = [(process.communicate(timeout=280), process.returncode) for process in begun]
    assert [(said, code) for (_, said), code in ended if code] == []
    assert most_at_once(places_taken(tmp_path / "state")) == 2
    have_arrived(lab, operators)


def slots_seen(folder: Path, process: subprocess.Popen[bytes]) -> int:
    """The most slots that were taken on one host at a time while a process ran."""
    most = 0
    while process.poll() is None:
        most = max(most, len(list(folder.glob("slot-src-*"))), len(list(folder.glob("slot-dst-*"))))
    return most


@pytest.mark.long
@pytest.mark.timeout(600)
def test_readme_s_playbook_makes_seeds_and_cuts_over_to_them(lab: Lab, tmp_path: Path) -> None:
    install(("ansible-core",))
    operators = [an_operator(lab, tmp_path, str(uuid.uuid4()), [(MiB, MiB)], TLS=False) for _ in range(3)]
    lines = (REPOSITORY / "README.md").read_text().partition("    # Ansible")[2].partition("\n\n")[0].splitlines()[1:]
    (tmp_path / "site.yml").write_text("\n".join(line[4:] for line in lines) + "\n")
    (tmp_path / "wave.json").write_text(json.dumps({"wave": [{"source": one.id, "name": f"new-{one.id}"} for one in operators]}))
    (tmp_path / "migrena.py").write_text(
        f"#!/bin/sh\nexport PYTHONPATH={REPOSITORY}:{REPOSITORY / 'tests'} MIGRENA_CONFIG={tmp_path}/config.py\n"
        f"""exec {sys.executable} -P -m hosts.standin {lab.spec.tag} {tmp_path} '[]' "$@"\n""")
    (tmp_path / "migrena.py").chmod(0o755)
    for words, result in ((["-e", "seed=--seed"], "seeded"), (["--tags", "cutover"], "done")):
        command = ["ansible-playbook", "-i", "localhost,", "-c", "local", "-e", f"@{tmp_path}/wave.json", *words, "site.yml"]
        env = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "ANSIBLE_ASYNC_DIR": str(tmp_path / "jobs"), "LC_ALL": "C.UTF-8"}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert {run["result"] for run in json.loads(operators[0].run("status", "--json").stdout)} == {result}
    have_arrived(lab, operators)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_forty_seeds_by_readme_s_commands_are_all_cut_over_to(lab: Lab, tmp_path: Path) -> None:
    install(("parallel", "jq"))
    operators, readme = forty(lab, tmp_path), (REPOSITORY / "README.md").read_text()
    (tmp_path / "wave.csv").write_text("".join(f"{operator.id},new-{operator.id}\n" for operator in operators))
    (tmp_path / "migrena.py").write_text(f"""#!/bin/sh\nexec {sys.executable} -P -m hosts.standin {lab.spec.tag} {tmp_path} '[]' "$@"\n""")
    (tmp_path / "migrena.py").chmod(0o755)
    env = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "MIGRENA_CONFIG": str(tmp_path / "config.py")}
    for command, result in ((r"parallel .* --seed ::::.*", "seeded"), (r"\./migrena\.py status --json \| jq .*", "done")):
        (line,) = re.findall(rf"^ +({command})$", readme, re.MULTILINE)
        with open(tmp_path / "said", "wb") as said:
            process = subprocess.Popen(["sh", "-c", line], cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
            assert slots_seen(tmp_path / "state", process) == 2
        assert process.returncode == 0, (tmp_path / "said").read_text()
        assert {run["result"] for run in json.loads(operators[0].run("status", "--json").stdout)} == {result}
    have_arrived(lab, operators)
