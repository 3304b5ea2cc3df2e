"""The lab itself, where many commands use it at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lab.hosts import Lab, clear_abandoned
from lab.orders import Spec
from lab.processes import Process


def test_what_an_ended_command_left_is_taken_down_by_many_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers of one run begin together, each finds what an earlier run left, and none stumbles over what another has removed."""
    monkeypatch.setenv("MIGRENA_LAB", str(tmp_path / "lab"))
    disks = tmp_path / "abandoned" / "src"
    disks.mkdir(parents=True)
    for number in range(1000):
        (disks / f"{number}.ext4").touch()
    Lab(Spec(tmp_path / "abandoned", {"src": "ns"}, "10.81.98.0/24", "8G"), Process(1, -1), {})._record()
    with ThreadPoolExecutor(8) as commands:
        for ended in [commands.submit(clear_abandoned) for _ in range(8)]:
            ended.result()
    assert list(disks.iterdir()) == []
    assert list((tmp_path / "lab" / "labs").iterdir()) == []
