"""An adversary against migrena: random schedules of its own commands and of what others do meanwhile, on a model of two clouds or one.

A stand-in, since no real clouds could be led through so many; tests/clouds has the same on real ones. A schedule that has failed once stays
here under the name of what the operator saw.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from unit.people import Schedule, play

SWAPPED = "the clouds are swapped"
FAULTS = {  # rows of the table in issue 23: the invariant that was broken, and how
    "1 Ctrl-C in a move within one cloud deleted the source":
        (3, Schedule((("copy", {"copy#1": "Ctrl-C"}),), one_cloud=True)),
    "1 an unknown network in a move within one cloud deleted the source":
        (3, Schedule((("copy", {"destination.create#1": "Nova refuses it"}),), one_cloud=True)),
    "2 rollback with the clouds swapped in the config deleted the source":
        (3, Schedule((("copy", {"copy#2": "crash"}), (SWAPPED, {}), ("rollback", {})))),
    "3 the source was started between the proof and the start of the destination":
        (1, Schedule((("copy -a dst", {"check#1": "admin starts source"}),))),
    "4 the destination was started during the copy and its disk was swapped under it":
        (3, Schedule((("copy -a dst", {"copy#1": "admin starts destination"}),))),
    "5 rollback deleted a complete destination that the operator had started":
        (3, Schedule((("copy", {"source.unlock#1": "crash"}), ("admin starts destination", {}), ("rollback", {})))),
    "6 rollback --run-of on another machine undid a living run":
        (3, Schedule((("copy", {"copy#1": "elsewhere rollback --run-of"}),))),
    "7 a source that was rebuilt during a run was refused for ever":
        (4, Schedule((("copy", {"copy#1": "admin rebuilds source"}), ("copy --name other", {})))),
    "11 rollback of an old run started the source that a later run had moved":
        (1, Schedule((("copy", {"copy#1": "outage of 1000 s"}), ("admin deletes destination", {}), ("admin unlocks source", {}),
                      ("admin wipes source", {}), ("copy --name other -a dst", {}), ("rollback first", {})))),
    "12 a lock that an admin had set during the run was taken off":
        (3, Schedule((("copy", {"copy#1": "admin locks source", "copy#2": "Ctrl-C"}),))),
    "13 the same source was moved again and a second clone ran":
        (1, Schedule((("copy -a dst", {}), ("copy --name other -a dst", {})))),
    "14 Ctrl-C in rollback was told as rolled back":
        (4, Schedule((("copy", {"copy#1": "crash"}), ("rollback", {"source.unlock#1": "Ctrl-C"})))),
    "after -a dst a user of the source could start it again":
        (1, Schedule((("copy -a dst", {}), ("tenant starts source", {})))),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_operators_have_seen_is_seen_no_more(tmp_path: Path, name: str) -> None:
    invariant, schedule = FAULTS[name]
    assert play(schedule, tmp_path / "state").broken == []
