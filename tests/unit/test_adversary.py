"""An adversary against migrena: random schedules of its own commands and of what others do meanwhile, on a model of two clouds or one.

A stand-in, since no real clouds could be led through so many; tests/clouds has the same on real ones. A schedule that has failed once stays
here under the name of what the operator saw.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import migrena
from unit import model
from unit.people import Events, Schedule, a_schedule, play, smallest

SWAPPED = "the clouds are swapped"
AFTER_SWAP: Events = {"destination.set_meta#1": "crash"}
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
        (3, Schedule((("copy", AFTER_SWAP), ("admin starts destination", {}), ("rollback", {})))),
    "6 rollback --run-of on another machine undid a living run":
        (3, Schedule((("copy", {"copy#1": "elsewhere rollback --run-of"}),))),
    "7 a source that was rebuilt during a run was refused for ever":
        (4, Schedule((("copy", {"copy#1": "admin rebuilds source"}), ("copy --name other", {})))),
    "11 rollback of an old run started the source that a later run had moved":
        (1, Schedule((("copy", {"copy#1": "outage of 1000 s"}), ("admin wipes destination", {}), ("admin unlocks source", {}),
                      ("admin wipes source", {}), ("copy --name other -a dst", {}), ("rollback first", {})))),
    "12 a lock that an admin had set during the run was taken off":
        (3, Schedule((("copy", {"copy#1": "admin locks source", "copy#2": "Ctrl-C"}),))),
    "13 the same source was moved again and a second clone ran":
        (1, Schedule((("copy -a dst", {}), ("copy --name other -a dst", {})))),
    "13 the same source was unlocked and moved again and a second clone ran":
        (1, Schedule((("copy -a dst", {}), ("admin unlocks source", {}), ("copy --name other -a dst", {})))),
    "14 Ctrl-C in rollback was told as rolled back":
        (4, Schedule((("copy", {"copy#1": "crash"}), ("rollback", {"source.unlock#1": "Ctrl-C"})))),
    "15 a proven copy was undone because the API stayed away":
        (4, Schedule((("copy", {"check#1": "outage of 1000 s"}), ("resume", {})))),
    "after -a dst a user of the source could start it again":
        (1, Schedule((("copy -a dst", {}), ("tenant starts source", {})))),
}
FOUND = {  # by the adversary
    "a lock that an admin had set on a stopped source was taken off at the end of a good run":
        (3, Schedule((("copy -a src", {"source.actions#6": "admin locks source"}),), was="SHUTOFF")),
    "a run that failed after an admin had stopped the source left its mark and did not tell":
        (4, Schedule((("copy", {"destination.get#1": "admin stops source", "cmp-a.folder#2": "Nova refuses it"}),))),
    "a run that failed after the source was resized left its mark and did not tell":
        (4, Schedule((("copy -a src", {"destination.actions#1": "tenant resizes source", "cmp-b.folder#1": "Ctrl-C"}),))),
    "rollback --run-of on another machine undid a run that was undoing itself":
        (3, Schedule((("copy -a src", {"cmp-b.confirm#1": "elsewhere rollback --run-of", "copy#1": "admin locks destination"}),), was="SHUTOFF")),
    "a lock that an admin had set on the destination was taken off":
        (3, Schedule((("copy", {"sleep#2": "admin locks destination"}),))),
    "a lock that an admin had set on the source during an outage of the destination's cloud was taken off":
        (3, Schedule((("copy -a all", {"destination.actions#3": "outage of 1000 s at the destination",
                                       "destination.actions#7": "admin locks source"}),))),
    "rollback --run-of unlocked a source whose destination runs, with its metadata wiped":
        (4, Schedule((("copy -a dst", {}), ("admin wipes destination", {}), ("rollback --run-of", {}), ("rollback --yes", {})))),
    "rollback deleted the only copy after the source was rebuilt":
        (2, Schedule((("copy -a all", {"source.actions#6": "admin rebuilds source"}), ("rollback", {})), was="SHUTOFF")),
    "the source was moved again after the metadata of the destination were wiped during the run":
        (1, Schedule((("copy -a all", {"cmp-a.hold#1": "tenant wipes destination"}), ("copy --name other -a dst", {})), was="SHUTOFF")),
    "a run that failed while the source's cloud did not answer left its mark and did not tell":
        (4, Schedule((("copy", {"destination.get#2": "outage of 1000 s at the source"}),), was="SHUTOFF")),
    "rollback --keep-destination removed the only copy after the source was deleted":
        (2, Schedule((("copy -a dst", {"source.get#11": "admin deletes source"}), ("rollback --keep-destination --yes", {})), was="SHUTOFF")),
    "resume called a destination complete that had been rebuilt":
        (4, Schedule((("copy --warm -a dst", {"source.get#16": "crash"}), ("admin rebuilds destination", {}), ("resume", {})))),
    "a good run left its lock on the destination whose cloud did not answer, and did not tell":
        (4, Schedule((("copy -a dst", {"destination.get#18": "outage of 1000 s at the destination"}),), was="SHUTOFF")),
    "rollback --run-of on another machine deleted the only copy after the source was rebuilt":
        (2, Schedule((("copy --warm -a dst", {"destination.get#15": "admin rebuilds source", "source.get#7": "the wire breaks"}),
                      ("elsewhere rollback --run-of", {})))),
    "rollback deleted the only copy after the source was deleted":
        (2, Schedule((("copy", AFTER_SWAP), ("admin deletes source", {}), ("rollback --yes", {})))),
    "rollback --run-of deleted the only copy after the source was deleted, since its journal was empty":
        (2, Schedule((("copy", AFTER_SWAP), ("admin deletes source", {}), ("the journals are emptied", {}), ("rollback --run-of --yes", {})))),
    "a run that failed deleted the only copy while the source's cloud did not answer":
        (2, Schedule((("copy", {"check#1": "admin deletes source + outage of 1000 s at the source + the wire breaks"}),))),
}
KNOWN = {**FAULTS, **FOUND}


@pytest.mark.parametrize("name", KNOWN)
def test_what_operators_have_seen_is_seen_no_more(tmp_path: Path, name: str) -> None:
    assert play(KNOWN[name][1], tmp_path / "state").broken == []


def test_a_run_whose_journal_was_emptied_is_undone_by_its_marks_and_the_source_runs_again(tmp_path: Path) -> None:
    world = play(Schedule((("copy", {"copy#1": "crash"}), ("the journals are emptied", {}), ("rollback --run-of", {}))), tmp_path / "state")
    assert world.source.status == "ACTIVE" and [machine.id for machine in world.machines()] == [model.SOURCE]


GROUPS, BATCHES, BATCH = 20, 10, 50  # ten thousand schedules


@pytest.mark.parametrize("group", range(GROUPS))
def test_no_schedule_breaks_an_invariant(tmp_path: Path, group: int) -> None:
    """hypothesis draws the seed of a batch of schedules, since it would take longer to draw each of them than to play it."""
    played = 0

    @settings(max_examples=BATCHES, derandomize=True, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32 - 1))
    def batch(seed: int) -> None:
        nonlocal played
        chance = random.Random(f"{group} {seed}")
        for _ in range(BATCH):
            schedule = a_schedule(chance)
            played += 1
            if play(schedule, tmp_path / "state").broken:
                small, broken = smallest(schedule, tmp_path / "state")
                lines = "\n    ".join(broken)
                pytest.fail(f"group {group}, seed {seed}:\n    {lines}\nto be kept in FOUND: {small}", pytrace=False)

    batch()
    assert played == BATCHES * BATCH


# ---- with a rule of the gate switched off, and what else stands in the way of the same fault, the adversary finds it again


def no_holds(patch: pytest.MonkeyPatch) -> None:
    """Nobody holds qemu's locks."""
    held = model.Disks.held

    def let_go(self: model.Disks, host: model.HostStandIn, node: migrena.Node, folder: str) -> Any:
        scope = held(self, host, node, folder)
        lease, _ = scope.__enter__()
        file = self.world.files[host.name, node.place]
        file.hold, lease.check = None, lambda *, is_running=False: None
        return contextlib.nullcontext((lease, None))

    patch.setattr(model.Disks, "held", let_go)


def one_mark(patch: pytest.MonkeyPatch) -> None:
    """What is made carries the mark that the source carries, and whatever carries it is deleted."""
    patch.setattr(migrena, "MADE", migrena.MARK)
    known: Any = vars(migrena.RunRecord)["destination"]

    def destination(self: migrena.RunRecord) -> str:
        return "" if model.Modelled.world.process.words == "rollback" else str(known.fget(self))

    def made_by(self: migrena.Cloud, run: str, origin: str, *, all_tenants: bool = False) -> list[migrena.Server]:
        found = [self.read(raw.to_dict()) for raw in self._nova.servers.list(limit=-1)]
        all_marked = (server for server in found if server.metadata.keys() & {migrena.MARK, migrena.DONE})
        return [server for server in all_marked if not run or run in server.metadata.values()]

    def delete_on_failure(run: migrena.Run) -> None:
        def delete() -> None:
            for server in run.destination.made_by(run.plan.run, ""):
                run.destination.delete(server.id)

        run.undo.on_failure("delete it", delete)

    patch.setattr(migrena.RunRecord, "destination", property(destination))
    patch.setattr(migrena.Cloud, "made_by", made_by)
    patch.setattr(migrena, "delete_on_failure", delete_on_failure)


def any_cloud(patch: pytest.MonkeyPatch) -> None:
    """A journal is taken for one of these clouds."""
    patch.setattr(migrena, "require_same_clouds", lambda record, clouds: None)


def any_reason(patch: pytest.MonkeyPatch) -> None:
    """The reason of a lock counts where no lock is."""
    patch.setattr(migrena, "lock_of", lambda server: server.lock_reason[len(migrena.LOCKED_BY) :].partition(":")[0])


def any_lock(patch: pytest.MonkeyPatch) -> None:
    """Whatever lock there is counts as ours."""
    patch.setattr(migrena.Seen, "is_locked_by", lambda self, run: bool(self.server and self.server.locked))


def nothing_made(patch: pytest.MonkeyPatch) -> None:
    """The survey does not look for what was made of the source before."""
    made_by = migrena.Cloud.made_by
    patch.setattr(migrena.Cloud, "made_by", lambda self, run, origin, **search: made_by(self, run, origin) if run else [])


Guard = Callable[[pytest.MonkeyPatch], None]
CONTROLS: Mapping[str, tuple[tuple[str, ...], tuple[Guard, ...]]] = {  # by the beginning of the fault's name: rules, and other guards
    "1 Ctrl-C": (("rule_ours",), (one_mark,)),
    "1 an unknown": (("rule_ours",), (one_mark,)),
    "2 rollback": (("rule_ours",), (one_mark, any_cloud)),
    "3 the source": (("rule_one_machine",), (no_holds,)),
    "4 the destination": (("rule_nobody_inside", "rule_own_data"), (no_holds,)),
    "5 rollback": (("rule_own_data",), ()),
    "6 rollback": (("rule_alive",), ()),
    "7 a source": ((), (any_reason,)),
    "11 rollback": (("rule_ours", "rule_one_machine"), ()),
    "12 a lock": (("rule_ours",), (any_lock,)),
    "13 the same source was unlocked": ((), (nothing_made,)),
    "rollback deleted the only copy after the source was deleted": (("rule_one_copy",), ()),
    "a run that failed deleted the only copy while": (("rule_seen",), ()),
}


@pytest.mark.parametrize("beginning", CONTROLS)
def test_control_a_fault_is_found_again_with_its_rules_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beginning: str) -> None:
    rules, guards = CONTROLS[beginning]
    ((invariant, schedule),) = [fault for name, fault in KNOWN.items() if name.startswith(beginning)]
    off = [getattr(migrena, rule) for rule in rules]
    monkeypatch.setattr(migrena, "RULES", tuple(rule for rule in migrena.RULES if rule not in off))
    for guard in guards:
        guard(monkeypatch)
    assert any(line.startswith(f"{invariant} ") for line in play(schedule, tmp_path / "state").broken)


def test_control_every_rule_is_switched_off_in_some_control() -> None:
    assert {rule.__name__ for rule in migrena.RULES} == {rule for rules, _ in CONTROLS.values() for rule in rules}
