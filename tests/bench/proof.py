"""Whether a copy is its source, found out after the time was taken, by looking into both hosts at once."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from bench.disks import Disk
from bench.stage import Stage
from lab.processes import CLEAN_ENV, LabError


def same_file(stage: Stage, disk: Disk, new: str) -> bool:
    """Whether two files have the same length and the same bytes."""
    paths = [Path(f"{stage.root(host)}{path}") for host, path in (("src", disk.path), ("dst", new))]
    images = [f"driver=raw,file.driver=file,file.filename={path}" for path in paths]
    return paths[0].stat().st_size == paths[1].stat().st_size and _compare(*images)


def same_guest(stage: Stage, disk: Disk, new: str, format: str) -> bool:
    """Whether two guests would see the same; their bases are looked at too."""
    return _compare(*(_chain(stage, host, path, form) for host, path, form in (("src", disk.path, disk.format), ("dst", new, format))))


def _chain(stage: Stage, host: str, path: str, format: str) -> str:
    """A disk and its bases as image options, with the paths that this machine sees."""
    told = stage.lab[host].run("qemu-img", "info", "-U", "--backing-chain", "--output=json", "-f", format, path).stdout
    words = []
    for depth, node in enumerate(json.loads(told)):
        prefix = "backing." * depth
        words += [f"{prefix}driver={node['format']}", f"{prefix}file.driver=file", f"{prefix}file.filename={stage.root(host)}{node['filename']}"]
    return ",".join(words)


def _compare(one: str, other: str) -> bool:
    """Whether qemu-img finds two images equal."""
    done = subprocess.run(["qemu-img", "compare", "-q", "-U", "--image-opts", one, other], check=False, env=CLEAN_ENV, capture_output=True)
    if done.returncode > 1:
        raise LabError(f"qemu-img compare: {done.stderr.decode()}")
    return done.returncode == 0
