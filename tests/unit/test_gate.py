"""The gate: what is so now on both sides decides whether an act may be done, whatever was so earlier."""

from __future__ import annotations

import io
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from migrena import (
    DONE,
    LOCKED_BY,
    LOOKS,
    MADE,
    MARK,
    WAS,
    Act,
    Action,
    Asked,
    Cloud,
    Kept,
    Plan,
    Refused,
    Run,
    RunRecord,
    Screen,
    Seen,
    Server,
    Situation,
    Stage,
    Step,
    allow,
    judge,
    lock_of,
    newer,
    require_same_clouds,
    same_file,
    situation_now,
    stage_of,
    stop_source,
)
from unit.makers import UUID, a_server

RUN = "20261120T210000-a1b2c3"
START = Action("req-2", "start", "2026-11-20T21:10:00", has_failed=False)
NO, YES = Asked(), Asked(yes=True)


def stopped(id: str, **different: Any) -> Server:
    """An instance that the run has stopped and locked."""
    mark = {MARK: RUN} if id == UUID else {MADE: RUN}
    return a_server(**{"id": id, "status": "SHUTOFF", "power": 4, "locked": True, "lock_reason": f"{LOCKED_BY}{RUN}", "metadata": mark, **different})


def running(id: str, **different: Any) -> Server:
    """The same, while somebody else has it run."""
    return stopped(id, status="ACTIVE", power=1, **different)


SOURCE, MADE_ONE = Seen(UUID, stopped(UUID)), Seen("new", stopped("new"))
PROVEN = Situation(RUN, Stage.PROVEN, SOURCE, MADE_ONE, was_running=True)
SWAPPED = replace(PROVEN, stage=Stage.SWAPPED)


def told(act: Act, now: Situation, asked: Asked = NO) -> str:
    """All that the gate has against an act."""
    return "; ".join(reason.problem for reason in judge(act, now, asked))


@pytest.mark.parametrize("act", [Act.WRITE, Act.SWAP, Act.START_DESTINATION, Act.GIVE_BACK, Act.DELETE, Act.STOP_DESTINATION, Act.GO_ON, Act.CLEAN])
def test_control_everything_may_be_done_where_all_is_as_the_run_left_it(act: Act) -> None:
    assert judge(act, PROVEN, Asked()) == []


def test_the_source_is_never_deleted_or_written_to_whatever_cloud_it_turns_up_in() -> None:
    itself = replace(PROVEN, destination=Seen(UUID, stopped(UUID)))
    for act in (Act.DELETE, Act.STOP_DESTINATION, Act.WRITE, Act.SWAP, Act.START_DESTINATION):
        assert "is the source itself" in told(act, itself, YES)


@pytest.mark.parametrize(("source", "said"), [
    (Seen(UUID, running(UUID, locked=False)), "the source runs"),
    (replace(SOURCE, starts=(START,)), "has run since it was stopped"),
    (replace(SOURCE, disk="was changed"), "the source's disk was changed"),
    (Seen(UUID, stopped(UUID, locked=False)), "this run's lock on the source was removed"),
    (Seen(UUID, stopped(UUID, lock_reason="an audit")), "this run's lock on the source was removed"),
    (Seen(UUID, unseen="no answer"), "could not be looked up: no answer"),
])
def test_the_destination_is_started_only_while_the_source_is_stopped_unchanged_and_locked_by_the_run(source: Seen, said: str) -> None:
    assert said in told(Act.START_DESTINATION, replace(SWAPPED, source=source), YES)


def test_a_destination_whose_source_is_gone_may_be_started_since_there_is_no_other_machine() -> None:
    assert judge(Act.START_DESTINATION, replace(SWAPPED, source=Seen(UUID)), Asked()) == []


def test_a_source_is_not_started_beside_a_destination_that_has_its_data_and_runs_or_has_run() -> None:
    for made in (Seen("new", running("new")), replace(MADE_ONE, starts=(START,))):
        assert "has the same data" in told(Act.GIVE_BACK, replace(SWAPPED, destination=made))
        is_stopped = made.server and made.server.is_stopped  # --yes gives up what it wrote, and not that it runs
        assert (told(Act.GIVE_BACK, replace(SWAPPED, destination=made), YES) == "") is is_stopped
        assert told(Act.GIVE_BACK, replace(PROVEN, stage=Stage.COPYING, destination=made)) == ""  # what it has is the image's
    assert "could not be looked up" in told(Act.GIVE_BACK, replace(SWAPPED, destination=Seen("new", unseen="no answer")))
    assert told(Act.GIVE_BACK, replace(PROVEN, destination=Seen("new", unseen="no answer"))) == ""


def test_a_source_that_ran_after_its_stop_is_not_stopped_again_as_if_nothing_had_been() -> None:
    assert "was started after run" in told(Act.STOP_SOURCE, replace(SWAPPED, source=Seen(UUID, running(UUID), starts=(START,))), YES)
    assert told(Act.STOP_SOURCE, replace(SWAPPED, source=Seen(UUID, stopped(UUID)))) == ""
    again = Seen(UUID, running(UUID), starts=(START,))  # nothing is in place: all is copied, and proven, after this stop
    assert told(Act.STOP_SOURCE, replace(PROVEN, stage=Stage.COPYING, source=again)) == ""


def test_a_snapshot_of_the_stopped_source_is_no_start_of_it() -> None:
    pictured = replace(SWAPPED, source=Seen(UUID, stopped(UUID, task="image_uploading")))
    for act in (Act.WRITE, Act.SWAP, Act.START_DESTINATION):
        assert told(act, pictured) == ""
        assert told(act, replace(SWAPPED, source=Seen(UUID, stopped(UUID, task="powering-on")))) != ""


def test_a_disk_that_cannot_be_read_is_not_said_to_have_changed() -> None:
    unread = replace(PROVEN, source=replace(SOURCE, disk="cannot be read: timed out"))
    assert told(Act.SWAP, unread) == "the source's disk cannot be read: timed out"
    assert "its disk changed" in told(Act.SWAP, replace(PROVEN, source=replace(SOURCE, disk="was changed")))


@pytest.mark.parametrize(("planned", "now", "earlier", "was_running"), [
    (False, running(UUID), (), True), (True, stopped(UUID), (), False), (True, stopped(UUID), (Step("stop source", "2026-11-20T21:00:00"),), True)])
def test_a_source_ran_if_it_did_when_it_was_stopped(
        monkeypatch: pytest.MonkeyPatch, planned: bool, now: Server, earlier: tuple[Step, ...], was_running: bool) -> None:
    asked: list[Any] = []
    cloud = SimpleNamespace(lock=lambda *of: "req-1", stop=lambda *of: "req-2", mark=lambda id, marks: asked.append(marks))
    plan = Plan(RUN, a_server(), {}, a_server().flavor, cast(Any, None), (), planned)
    journal = SimpleNamespace(act=lambda name, **facts: nullcontext(asked.append(facts["was_running"]) or {}))  # type: ignore[func-returns-value]
    run = SimpleNamespace(source=cloud, plan=plan, journal=journal, screen=Screen(io.StringIO()), earlier=True, changed=None,
                          record=RunRecord(RUN, "running", "", {"was_running": planned}, earlier))
    monkeypatch.setattr("migrena.gate", lambda *of: replace(PROVEN, source=Seen(UUID, now)))
    stop_source(cast(Any, run), a_server())
    assert asked[-1] is was_running and asked[:-1] == ([{MARK: RUN, WAS: "ACTIVE" if was_running else "SHUTOFF"}] if was_running != planned else [])


def test_a_start_between_the_look_and_the_lock_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = Step("stop source", "2026-11-20T21:00:00", "", "done", {"request": "req-1", "was_running": True})
    cloud = SimpleNamespace(lock=lambda *of: "req-3", stop=lambda *of: "", find_server=lambda id, **how: stopped(UUID),
                            actions=lambda id: [replace(START, name="lock", request="req-3"), START, replace(START, name="stop", request="req-1")])
    run = SimpleNamespace(source=cloud, plan=Plan(RUN, a_server(), {}, a_server().flavor, cast(Any, None), (), True), earlier=True, changed=None,
                          journal=SimpleNamespace(act=lambda *of, **facts: nullcontext({})), screen=Screen(io.StringIO()),
                          record=RunRecord(RUN, "running", "", {}, (stop,)))
    monkeypatch.setattr("migrena.gate", lambda *of: SWAPPED)
    with pytest.raises(Kept, match="was started"):
        stop_source(cast(Any, run), a_server())


@pytest.mark.parametrize(("server", "said"), [
    (stopped(UUID, lock_reason="an audit"), "locked by somebody else: an audit"),
    (stopped(UUID, metadata={MARK: "other"}), "run other is moving the source now"),
    (stopped(UUID, metadata={}, locked=False), "carries no mark"),
    (stopped(UUID, metadata={}), ""),  # its lock is the run's
    (stopped(UUID, locked=False), ""),  # its mark is
])
def test_a_source_is_given_back_only_by_the_run_that_has_it(server: Server, said: str) -> None:
    now = replace(PROVEN, source=Seen(UUID, server))
    assert said in told(Act.GIVE_BACK, now) and bool(said) == bool(told(Act.GIVE_BACK, now))


def test_an_old_run_does_not_start_a_source_of_which_another_run_has_made_an_instance() -> None:
    bare, other = Seen(UUID, stopped(UUID, metadata={}, locked=False)), a_server(id="x", name="web-2", metadata={DONE: "other"})
    assert "web-2 x was made from it" in told(Act.GIVE_BACK, replace(PROVEN, stage=Stage.DONE, source=bare, others=(other,), destination=Seen()))
    assert told(Act.GIVE_BACK, replace(PROVEN, stage=Stage.DONE, source=bare, destination=Seen())) == ""  # the last run that had it


@pytest.mark.parametrize("made", [Seen("new", running("new", locked=False)), replace(MADE_ONE, starts=(START,))])
def test_a_machine_that_may_have_data_of_its_own_is_neither_overwritten_nor_deleted_unless_a_person_says_so(made: Seen) -> None:
    for act in (Act.DELETE, Act.STOP_DESTINATION, Act.SWAP):
        assert "may have newer data" in told(act, replace(SWAPPED, destination=made))
    assert told(Act.DELETE, replace(SWAPPED, destination=made), YES) == ""
    assert "not stopped and locked" in told(Act.SWAP, replace(SWAPPED, destination=made), YES)


def test_what_a_successful_run_made_is_deleted_only_with_yes_and_told_by_its_name() -> None:
    done = replace(PROVEN, stage=Stage.DONE, destination=Seen("new", running("new", name="web-1", locked=False)))
    assert "web-1 new (ACTIVE) would be deleted, and it may have newer data" in told(Act.DELETE, done)
    assert "would be stopped" in told(Act.STOP_DESTINATION, done)
    assert told(Act.DELETE, done, YES) == ""


@pytest.mark.parametrize(("source", "said"), [
    (Seen(UUID), "this is its only copy"), (replace(SOURCE, disk="is gone"), "may be its only copy"),
    (replace(SOURCE, disk="cannot be read: no connection"), "may be its only copy"), (Seen(UUID, unseen="no answer"), "could not be looked up"),
])
def test_a_proven_copy_is_deleted_only_while_the_source_is_seen_with_its_disk_even_with_yes(source: Seen, said: str) -> None:
    for act in (Act.DELETE, Act.CLEAN):
        assert said in told(act, replace(PROVEN, source=source), YES)
        assert told(act, replace(PROVEN, stage=Stage.COPYING, source=source)) == ""


def test_a_source_that_was_rebuilt_since_keeps_the_copy_unless_a_person_says_otherwise() -> None:
    rebuilt = replace(PROVEN, source=replace(SOURCE, starts=(replace(START, name="rebuild"),)))
    assert "may have lost the copied data (rebuild)" in told(Act.DELETE, rebuilt)
    assert told(Act.DELETE, rebuilt, YES) == ""


GONE = Seen("new")


@pytest.mark.parametrize(("now", "asked", "said"), [
    (replace(PROVEN, stage=Stage.COPYING, destination=GONE), NO, ""), (replace(PROVEN, destination=GONE), NO, ""),
    (replace(PROVEN, destination=GONE, source=Seen(UUID)), YES, "the source is gone: this is its only copy"),
    (replace(PROVEN, destination=GONE, source=replace(SOURCE, disk="is gone (volume-v1)")), YES, "may be its only copy"),
    (replace(PROVEN, destination=GONE, source=Seen(UUID, unseen="503")), NO, "could not be looked up"),
    (replace(PROVEN, stage=Stage.DONE, destination=GONE), NO, "the volumes may have newer data"),
    (replace(PROVEN, stage=Stage.STARTED, destination=GONE), NO, "the volumes may have newer data"),
    (replace(PROVEN, stage=Stage.DONE, destination=GONE), YES, "")])
def test_volumes_whose_instance_is_gone_are_deleted_only_where_nothing_can_be_lost_with_them(now: Situation, asked: Asked, said: str) -> None:
    found = told(Act.DELETE_VOLUMES, now, asked)
    assert said in found and bool(found) is bool(said)


@pytest.mark.parametrize("act", [Act.WRITE, Act.SWAP])
@pytest.mark.parametrize(("made", "said"), [
    (Seen("new", running("new")), "not stopped and locked"), (Seen("new", stopped("new", locked=False)), "not stopped and locked"),
    (Seen("new", stopped("new", lock_reason="mine")), "locked by somebody else: mine"), (Seen("new"), "the destination is gone"),
])
def test_a_disk_is_written_only_while_nobody_can_be_inside(act: Act, made: Seen, said: str) -> None:
    assert said in told(act, replace(PROVEN, destination=made), YES)


def test_in_mid_copy_an_api_may_be_away_since_qemu_s_locks_hold() -> None:
    away = replace(PROVEN, source=Seen(UUID, unseen="no answer"), destination=Seen("new", unseen="no answer"))
    assert told(Act.WRITE, away, Asked(is_held=True)) == ""
    assert "could not be looked up" in told(Act.WRITE, away)
    assert "somebody started it" in told(Act.WRITE, replace(PROVEN, source=Seen(UUID, running(UUID))), Asked(is_held=True))


@pytest.mark.parametrize(("now", "said"), [
    (replace(PROVEN, source=replace(SOURCE, disk="was changed")), "was started or its disk changed"),
    (replace(PROVEN, source=Seen(UUID, stopped(UUID, metadata={}, locked=False))), "no mark"),
    (replace(PROVEN, source=Seen(UUID, stopped(UUID, metadata={MARK: "other"}))), "run other is moving"),
    (replace(PROVEN, destination=Seen()), "does not exist"),
    (replace(PROVEN, destination=replace(MADE_ONE, disk="is not the one that Nova made")), "is not the one that Nova made"),
    (replace(SWAPPED, destination=replace(MADE_ONE, disk="is not the one that Nova made"), is_in_place=True), ""),
    (replace(SWAPPED, destination=replace(MADE_ONE, starts=(replace(START, name="rebuild"),)), is_in_place=True), "another disk (rebuild)"),
    (replace(SWAPPED, source=Seen(UUID, stopped(UUID, metadata={}, locked=False)), is_in_place=True), ""),  # a complete one has given it back
])
def test_a_run_is_resumed_only_where_what_was_copied_is_still_so(now: Situation, said: str) -> None:
    assert said in told(Act.GO_ON, now) and bool(said) == bool(told(Act.GO_ON, now))
    assert all("rollback" in reason.way_out for reason in judge(Act.GO_ON, now, Asked()))


def test_a_run_that_is_at_work_on_another_machine_is_left_alone() -> None:
    alive = replace(PROVEN, alive="src:/run/migrena-x is held")
    for act in Act:
        assert "active on another machine: src:/run/migrena-x is held" in told(act, alive, YES)


def test_a_message_tells_why_and_both_states_and_the_ways_on() -> None:
    now = replace(SWAPPED, source=Seen(UUID, running(UUID, locked=False), starts=(START,)))
    with pytest.raises(Kept) as kept:
        allow(Act.START_DESTINATION, now, Asked())
    assert str(kept.value) == (
        f"refused to start the destination: the source runs, or has run since it was stopped. Seen: run {RUN}, swapped; source {UUID}: "
        f"ACTIVE, not locked, start at 2026-11-20T21:10:00; destination new: SHUTOFF, locked by run {RUN}")
    assert kept.value.reasons[0].way_out == f"./migrena.py rollback {RUN} undoes the run" and kept.value.exit_code == 4


def test_resume_is_named_before_rollback_where_it_completes_the_move() -> None:
    now = replace(SWAPPED, source=Seen(UUID, stopped(UUID, locked=False)))
    way, = {reason.way_out for reason in judge(Act.START_DESTINATION, now, Asked())}
    assert way == f"./migrena.py resume {RUN} completes the move; ./migrena.py rollback {RUN} undoes the run"


def test_a_reason_of_a_lock_counts_only_where_the_lock_is_on() -> None:
    """Nova keeps locked_reason through a rebuild."""
    assert lock_of(stopped(UUID)) == RUN and lock_of(stopped(UUID, locked=False)) == ""
    assert lock_of(stopped(UUID, lock_reason=f"{LOCKED_BY}{RUN}: web-1 new takes its place")) == RUN
    assert not replace(SOURCE, relocks=(replace(START, name="lock"),)).is_locked_by(RUN)
    assert Seen(UUID, stopped(UUID, lock_reason="")).is_locked_by(RUN)  # Nova before 2.73 tells none: the mark decides


def test_a_start_that_failed_has_changed_no_byte_of_the_disk() -> None:
    """libvirt gives the file to qemu and takes it back: only the time of that is another."""
    assert same_file("100 1.5 9.9 7", "100 1.5 2.5 7")
    assert not any(same_file(now, "100 1.5 2.5 7") for now in ("101 1.5 2.5 7", "100 1.6 2.5 7", "100 1.5 2.5 8"))


def test_what_came_after_a_request_is_what_is_above_it() -> None:
    actions = [replace(START, request=f"req-{number}") for number in (3, 2, 1)]
    assert newer(actions, "req-2") == actions[:1] and newer(actions, "") == newer(actions, "unknown") == actions


@pytest.mark.parametrize(("steps", "stage"), [
    ([], Stage.NOTHING), ([("create destination", "")], Stage.MADE), ([("copy", "failed")], Stage.COPYING), ([("copy", "done")], Stage.PROVEN),
    ([("copy", "done"), ("swap in", "")], Stage.SWAPPED), ([("start destination", "")], Stage.STARTED),
    ([("mark destination done", "")], Stage.NOTHING), ([("start destination", "done"), ("mark destination done", "done")], Stage.DONE),
])
def test_how_far_a_run_has_come_is_what_may_have_been_done(steps: list[tuple[str, str]], stage: Stage) -> None:
    assert stage_of(RunRecord(RUN, "killed", "", {}, tuple(Step(name, "", result=result) for name, result in steps))) is stage


def test_a_journal_is_not_followed_in_other_clouds_than_its_own() -> None:
    clouds = []
    for name in ("source", "destination"):
        clouds.append(object.__new__(Cloud))
        clouds[-1].label, clouds[-1].url = name, f"http://{name}"
        clouds[-1].identity = {"nova": f"http://{name}/nova", "region": "r", "project": "p"}
    record = RunRecord(RUN, "killed", "", {"where": [cloud.identity for cloud in clouds]})
    require_same_clouds(record, clouds)
    with pytest.raises(Refused) as refused:
        require_same_clouds(record, clouds[::-1])
    assert [f"nova http://{name}/nova" in reason.problem for name, reason in zip(("source", "destination"), refused.value.reasons, strict=True)]
    assert len(refused.value.reasons) == 2
    require_same_clouds(replace(record, facts={"clouds": ["http://source", "http://destination"]}), clouds)  # of an older migrena
    with pytest.raises(Refused, match="used another source cloud"):
        require_same_clouds(replace(record, facts={"clouds": ["http://destination", "http://destination"]}), clouds)


@pytest.mark.parametrize(("seconds", "looks"), [([9.0], 1), ([30.0, 9.0], 2), ([30.0] * 9, LOOKS)])
def test_a_look_that_took_long_is_taken_again_and_one_that_always_does_is_none(
        monkeypatch: pytest.MonkeyPatch, seconds: list[float], looks: int) -> None:
    clock, seen = [0.0], list[str]()

    def see(cloud: object, id: str, *_: object, **__: object) -> Seen:
        clock[0] += seconds[len(seen) // 2] / 2
        seen.append(id)
        return SOURCE if id == UUID else MADE_ONE

    monkeypatch.setattr("migrena.see", see)
    monkeypatch.setattr("migrena.time", SimpleNamespace(monotonic=lambda: clock[0]))
    run = SimpleNamespace(source=None, destination=None, made="new", is_in_place=False, record=RunRecord(RUN, "killed", "", {}),
                          plan=SimpleNamespace(server=SimpleNamespace(id=UUID)))
    now = situation_now(cast(Run, run))
    assert len(seen) == 2 * looks and bool(now.source.unseen) is (seconds[-1] > 20)
