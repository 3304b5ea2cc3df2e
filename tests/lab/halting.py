"""The real migrena, which halts or sends itself signals at lines of its journal: `python halting.py FILE THROW SCRIPT WORD…`.

THROW is JSON: pairs of a line, by its name (`done of swap in`) or by how many came before it, and a signal's number or HALT. Where it
halts, FILE appears, and it goes on when FILE is gone: a test does meanwhile what others do. What it holds on hosts it holds on to.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Throw = tuple["str | int", int]
HALT = 0


def line_of(event: str, facts: Mapping[str, Any]) -> str:
    """A line of the journal as tests name it: `intent of stop source`, `chunk`; `chunk on eph0` where it is not about the root disk."""
    act = re.sub(r" [0-9a-f-]{36}", "", str(facts.get("act", "")))
    about = facts.get("disk", facts.get("of", "root"))
    disk = f" on {about}" if about != "root" else ""
    return (f"{event} of {act}" if act else event) + disk


def halt(file: Path) -> None:
    """Returns when this file, which it makes, is gone."""
    file.touch()
    while file.exists():
        time.sleep(0.02)


def throw_at(journal: Any, throws: list[Throw], file: Path) -> None:
    """From now on this class of journals halts or sends this process signals, in their order, each when its line is on the disk."""
    write, seen = journal.write, list[str]()

    def writing(self: Any, event: str, **facts: Any) -> None:
        write(self, event, **facts)
        seen.append(line_of(event, facts))
        if throws and throws[0][0] in (seen[-1], len(seen) - 1):
            number = throws.pop(0)[1]
            halt(file) if number == HALT else os.kill(os.getpid(), number)

    journal.write = writing


if __name__ == "__main__":
    path = Path(sys.argv[3])
    spec = importlib.util.spec_from_file_location("migrena", path)
    assert spec and spec.loader
    migrena = sys.modules["migrena"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(migrena)
    throw_at(migrena.Journal, [(line, number) for line, number in json.loads(sys.argv[2])], Path(sys.argv[1]))
    sys.exit(migrena.main(sys.argv[4:]))
