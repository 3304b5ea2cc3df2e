"""What digests a disk is told apart by the side that it is on: two clouds may have hosts, and devices, of one name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from migrena import Chunk, ChunkSender, Digester


def test_a_source_and_a_destination_of_one_name_are_each_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []

    def of(self: Digester, chunk: Chunk) -> dict[int, str]:
        read.append(self.host)
        return {}

    monkeypatch.setattr(Digester, "of", of)
    monkeypatch.setattr("migrena.care_for", lambda job, ends, host: ("", "", ()))
    sides = [SimpleNamespace(name="compute-1") for _ in range(2)]
    ends: Any = SimpleNamespace(source=sides[0], destination=sides[1])
    settings = SimpleNamespace(verify=True, warm=False, rates_ahead="", stall_timeout=1)
    job: Any = SimpleNamespace(settings=settings, source=SimpleNamespace(is_file=False))
    sender: Any = ChunkSender(ends, job, None, None, {}, is_new=True)  # type: ignore[arg-type]
    for side in sides:
        sender._digests(side, "/dev/sdb", Chunk(0, 1, 0))
    assert read[0] is sides[0] and read[1] is sides[1]
