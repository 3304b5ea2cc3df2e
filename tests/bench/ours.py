"""migrena itself, the real program in a process of its own, between the hosts of the stage; the stand-in plays the clouds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from bench.clouds import SizedServers
from bench.disks import Disk
from bench.stage import OPERATOR, GaveUp, Reading, Stage
from conftest import REPOSITORY
from hosts.rig import INSTANCES
from lab.processes import LabError

LOOK: Final = 0.02  # seconds between two looks at the journal and at the process


def move(stage: Stage, disk: Disk, *words: str) -> tuple[str, dict[str, Any]]:
    """The new disk, and what the report tells: the copy's own seconds, of which the record's time is taken, and those of the whole.

    CPU and bytes are those between the journal's lines of the copy; the peak of memory is that of the whole.
    """
    folder = stage.work / "operator"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    hosts = {host.name: host.address for host in stage.lab}
    (folder / "config.py").write_text(
        f"SRC_CREDS = {{'auth_url': 'http://alpha'}}\nDST_CREDS = {{'auth_url': 'http://beta'}}\nHOSTS = {hosts}\nSSH_CONFIG = '/dev/null'\n"
        f"SSH_KEY = {str(stage.lab.key)!r}\nKNOWN_HOSTS = {str(stage.lab.known_hosts)!r}\nSTATE_FOLDER = {str(folder / 'state')!r}\n")
    (folder / "config.py").chmod(0o600)
    SizedServers(stage.lab, folder / "src", "src").add(disk.id, "web")
    env = {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "MIGRENA_CONFIG": str(folder / "config.py")}
    clouds = (sys.executable, "-m", "bench.clouds", stage.lab.spec.tag, folder, disk.format, str(disk.size), disk.base_there)
    with stage.started(OPERATOR, *clouds, "-s", disk.id, "-d", "new", "--json", *words, env=env) as process:
        seen = watch(stage, process, folder / "state")
        out, said = process.communicate()
    if process.returncode:
        raise LabError(f"migrena ended with {process.returncode}: {said}")
    report = json.loads(out)
    began, ended = seen.pop("readings")
    facts = {**ended.since(began), **seen, "act_seconds": round(ended.at - began.at, 4), "seconds": report["copy"]["seconds"],
             "steps": report["seconds"], "downtime": report["downtime_seconds"]}
    return f"{INSTANCES}/{report['destination']['id']}/disk", facts


def watch(stage: Stage, process: subprocess.Popen[str], state: Path) -> dict[str, Any]:
    """Looks on until migrena ends: what was spent when the copy began and ended, and the peak of its memory."""
    readings: list[Reading] = []
    peak, deadline = 0, time.monotonic() + stage.patience
    marks = ('"event": "intent", "act": "copy"', '"event": "done", "act": "copy"')
    while process.poll() is None:
        if time.monotonic() > deadline:
            process.terminate()  # it puts everything back
            process.communicate()
            raise GaveUp(f"gave up after {stage.patience:.0f} s")
        journal = next(state.glob("*.jsonl"), None)
        text = journal.read_text() if journal and len(readings) < 2 else ""
        while len(readings) < 2 and marks[len(readings)] in text:
            readings.append(stage.read())
        peak = max(peak, memory(process.pid))
        time.sleep(LOOK)
    while len(readings) < 2:  # it ended, or failed, before we saw it
        readings.append(stage.read())
    return {"readings": readings, "memory": peak}


def memory(pid: int) -> int:
    """The most bytes of memory that a process has had so far; see VmHWM in proc(5)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
