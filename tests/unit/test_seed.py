"""Seeds, times, rates by the hour and answers: what may be written for them, and what follows from a journal that has a seed."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import migrena
from conftest import SCRIPT, Migrena
from migrena import (
    MARK,
    ROOT,
    Act,
    Action,
    Asked,
    Cloud,
    CloudError,
    FinalError,
    HostError,
    Kept,
    Pace,
    Pass,
    RunRecord,
    Seen,
    Settings,
    SourceFacts,
    Stage,
    Step,
    Volume,
    WarmCopy,
    again_command,
    detail_lines,
    has_answered,
    is_seed_again,
    judge,
    next_commands,
    parse_answers,
    parse_moment,
    parse_rate,
    patience_of,
    read_run,
    refuse_changed,
    require_it_runs,
    require_safe_stop,
    situation,
    stage_of,
    table_lines,
    take_back,
    what_to_do,
)
from unit.makers import UUID, a_disk, a_flavor, a_server
from unit.test_gate import MADE_ONE, RUN, START, stopped
from unit.test_runs import CREATED, told

GiB, MiB = 1024**3, 1024**2
SEEDED = ({"event": "intent", "act": "stop destination"}, {"event": "done", "act": "stop destination", "request": "req-1"},
          {"event": "intent", "act": "warm copy"}, {"event": "pass", "number": 2, "changed": 3 * MiB, "downtime": 9.5},
          {"event": "done", "act": "warm copy"},
          {"event": "seeded", "disks": {ROOT: GiB}, "copied": "2026-11-20T21:00:00+00:00"})
CUT_OVER = ({"event": "intent", "act": "stop source", "was_running": False}, {"event": "done", "act": "stop source", "request": "req-2"},
            {"event": "job", "disk": ROOT, "stand": "1 2 3"}, {"event": "intent", "act": "copy"}, {"event": "done", "act": "copy"},
            {"event": "intent", "act": "swap in", "disk": ROOT}, {"event": "done", "act": "swap in", "disk": ROOT})
UNANSWERED = ({"event": "intent", "act": "await answer"}, {"event": "done", "act": "await answer", "missing": ["tcp:22"]})
RUNS = Seen(UUID, a_server(id=UUID, metadata={MARK: RUN}))


@pytest.mark.parametrize(("text", "meant"), [
    ("2026-12-05T01:00Z", "2026-12-05T01:00:00+00:00"), ("2026-12-05 01:00 +01:00", "2026-12-05T00:00:00+00:00"),
    ("2026-12-05 01:00:30+0100", "2026-12-05T00:00:30+00:00"), ("2026-12-05 01:00 UTC", "2026-12-05T01:00:00+00:00")])
def test_a_time_may_have_a_zone(text: str, meant: str) -> None:
    assert datetime.fromisoformat(parse_moment(text)) == datetime.fromisoformat(meant)
    assert parse_moment(parse_moment(text)) == parse_moment(text)  # as the journal keeps it


def test_a_time_without_a_zone_is_this_machine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "EST5")
    time.tzset()
    try:
        assert parse_moment("2026-12-05 01:00") == "2026-12-05T01:00:00-05:00"
    finally:
        monkeypatch.undo()
        time.tzset()
    assert parse_moment("now") == parse_moment("") == ""


@pytest.mark.parametrize("text", [
    "tomorrow", "01:00", "2026-13-05 01:00", "2026-12-05 25:00", "2026-12-05 01:00 Nowhere/At_All", "2026-12-05 01:00 ../x"])
def test_what_is_no_time_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ValueError, match="is not a time"):
        parse_moment(text)


@pytest.mark.parametrize(("text", "hours"), [
    ("50M", {0: 50, 12: 50}), ("08:00-18:00=20M,50M", {7: 50, 8: 20, 17: 20, 18: 50}), ("22:00-06:00=5M", {21: 0, 22: 5, 3: 5, 6: 0}),
    ("00:00-24:00=1M", {0: 1, 23: 1}), ("8:00-12:00=1M,10:00-14:00=2M", {9: 1, 11: 1, 13: 2, 15: 0}), ("12:00-13:00=0,9M", {12: 0, 13: 9})])
def test_a_rate_holds_at_its_hours(text: str, hours: dict[int, int]) -> None:
    settings = Settings(limit_rate=parse_rate(text))
    assert {hour: settings.rate_at(datetime(2026, 11, 28, hour)) // MiB for hour in hours} == hours
    assert settings.least_rate == min(rate for rate in hours.values() if rate) * MiB and parse_rate(settings.limit_rate) == settings.limit_rate


@pytest.mark.parametrize("text", ["fast", "8-18=20M", "08:00-18:00", "08:00-25:00=1M", "50M,08:00-18:00=20M", "1M,2M", "08:00-18:00=fast"])
def test_what_is_no_rate_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a (rate|size)"):
        parse_rate(text)


def test_the_rates_ahead_are_those_of_the_clock() -> None:
    later = datetime.now().astimezone() + timedelta(hours=1)
    settings = Settings(limit_rate=parse_rate(f"{later:%H:%M}-{later + timedelta(minutes=1):%H:%M}=3M,7M"))
    first, second, third = settings.rates_ahead.split(",")[:3]
    (at, slow), (then, fast) = (word.split(":") for word in (second, third))
    assert (first, slow, fast) == (str(7 * MiB), str(3 * MiB), str(7 * MiB))
    assert 3500 < int(at) <= 3600 and int(then) - int(at) == 60 and settings.rates_ahead.count(",") >= 14
    assert Settings().rates_ahead == "0" and Settings(limit_rate="5").rates_ahead == "5"


def test_a_pace_changes_at_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("migrena.time", SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda seconds: clock.append(clock.pop() + seconds)))
    pace = Pace("100,10:50,20:0")
    for _ in range(10):
        pace.hold_back(100)
    assert clock == [10.0] and pace.least == 50
    for _ in range(5):
        pace.hold_back(100)
    assert clock == [20.0]
    pace.hold_back(1 << 40)
    assert clock == [20.0]


@pytest.mark.parametrize("one", ["tcp:0", "tcp:ssh", "console:", "console:(", "ping:22", "tcp:22-25", "tcp:65536", "command: ", "command:'"])
def test_what_is_no_way_to_answer_is_said_to_be_none(one: str) -> None:
    with pytest.raises(ValueError, match=re.escape(one)):
        parse_answers([one])


def test_an_instance_answers_at_its_port_on_its_console_or_by_a_command(tmp_path: Path) -> None:
    server = a_server(id="new", name="web 1", facts={"addresses": {"net": [{"addr": "127.0.0.3"}, {"addr": "127.0.0.2"}]}})
    cloud = cast(Cloud, SimpleNamespace(console=lambda id: f"{id} says login:\n"))
    with closing(socket.create_server(("127.0.0.2", 0))) as listener:
        number = listener.getsockname()[1]
        assert has_answered(cloud, server, f"tcp:{number}")
    assert not has_answered(cloud, server, f"tcp:{number}")
    assert has_answered(cloud, server, "console:new says log.n") and not has_answered(cloud, server, "console:^login")
    script = f'[ "$INSTANCE_ID $INSTANCE_NAME $INSTANCE_ADDRESSES" = "new web 1 127.0.0.3 127.0.0.2" ] && touch {tmp_path}/seen'
    assert has_answered(cloud, server, f"command:sh -c '{script}'") and (tmp_path / "seen").exists()
    assert not has_answered(cloud, server, "command:false") and not has_answered(cloud, server, "command:nowhere-to-be-found")


def test_a_seed_undoes_what_the_journal_says_of_the_source_and_nothing_else(tmp_path: Path) -> None:
    told(tmp_path, *CREATED, *SEEDED)
    record = read_run(tmp_path, RUN)
    assert (stage_of(record), record.source_request, record.destination_request, record.destination) == (Stage.COPYING, None, "req-1", "new")
    told(tmp_path, *CREATED, *SEEDED, *CUT_OVER)
    record = read_run(tmp_path, RUN)
    assert (stage_of(record), record.source_request, record.swapped, record.was_running) == (Stage.SWAPPED, "req-2", {ROOT}, False)
    assert record.disks[ROOT].job["stand"] == "1 2 3"
    told(tmp_path, *CREATED, *SEEDED, *CUT_OVER, {"event": "seeded", "disks": {ROOT: GiB}, "copied": "2026-11-20T21:00:00+00:00"})
    record = read_run(tmp_path, RUN)
    assert (stage_of(record), record.source_request, record.swapped, record.was_running) == (Stage.COPYING, None, set(), True)
    assert record.disks == {} and record.destination == "new"


def test_what_a_seed_s_destination_has_is_of_no_worth_while_it_is_stopped(tmp_path: Path) -> None:
    told(tmp_path, *CREATED, *SEEDED)
    record = read_run(tmp_path, RUN)
    started = replace(MADE_ONE, starts=(START,))
    now = situation(record, RUNS, started)
    for act in (Act.GO_ON, Act.STOP_DESTINATION):
        assert judge(act, now, Asked()) == []
    assert "may have newer data" in str(judge(Act.DELETE, now, Asked())) and judge(Act.DELETE, now, Asked(yes=True)) == []
    up = replace(now, destination=replace(started, server=stopped("new", status="ACTIVE", power=1)))
    assert "may have newer data" in str(judge(Act.GO_ON, up, Asked())) and judge(Act.GO_ON, up, Asked(yes=True)) == []
    lost = replace(now, source=Seen(UUID))
    assert all("its only copy" in str(judge(act, lost, Asked(yes=True))) for act in (Act.DELETE, Act.DELETE_VOLUMES))
    rebuilt = replace(now, destination=replace(MADE_ONE, starts=(replace(START, name="rebuild"),)))
    assert "another disk" in str(judge(Act.GO_ON, rebuilt, Asked()))


@pytest.mark.parametrize(("entries", "starts", "is_again"), [
    (CREATED, (), False), ((*CREATED, *SEEDED), (), True), ((*CREATED, *SEEDED, *CUT_OVER), (), False),
    ((*CREATED, *SEEDED, *CUT_OVER), (START,), True),
    ((*CREATED, *CUT_OVER), (START,), False),
    ((*CREATED, *CUT_OVER, *UNANSWERED), (START,), True),
    ((*CREATED, *SEEDED, *CUT_OVER, {"event": "intent", "act": "start destination"}), (START,), True)])
def test_a_run_has_only_a_seed_where_its_source_has_run_since_and_its_destination_has_not(
        tmp_path: Path, entries: tuple[dict[str, Any], ...], starts: tuple[Action, ...], is_again: bool) -> None:
    told(tmp_path, *entries)
    record = read_run(tmp_path, RUN)
    now = situation(record, replace(RUNS, starts=starts) if starts else Seen(UUID, stopped(UUID)), MADE_ONE)
    assert is_seed_again(record, now) is is_again
    assert is_seed_again(record, replace(now, source=RUNS)) is record.is_seed  # killed before it was stopped
    if now.stage >= Stage.SWAPPED:  # its destination may have data of its own
        assert not is_seed_again(record, replace(now, destination=replace(MADE_ONE, starts=(START,))))
    assert not record.stopped_at or not is_seed_again(record, replace(now, stage=Stage.DONE))


@pytest.mark.parametrize(("keys", "sizes", "said"), [
    ((ROOT,), (GiB,), ""), ((ROOT, "volume-1"), (GiB, GiB), "volume-1 was attached to the source after the seed"),
    ((), (), ""), ((ROOT,), (2 * GiB,), "root had 1.0 GiB at the seed, and has 2.0 GiB now: the source was resized")])
def test_a_source_that_is_another_one_since_its_seed_is_refused_by_name(
        tmp_path: Path, keys: tuple[str, ...], sizes: tuple[int, ...], said: str) -> None:
    told(tmp_path, *CREATED, *SEEDED)
    disk = a_disk()
    disks = {key: replace(disk, chain=(replace(disk.top, size=size), *disk.chain[1:])) for key, size in zip(keys, sizes, strict=True)}
    source = SourceFacts(server=a_server(), disks=disks)
    assert [reason.problem for reason in refuse_changed(Settings(), source, read_run(tmp_path, RUN))] == ([said] if said else [])


def test_a_volume_that_a_stopped_source_lost_before_its_copy_began_is_refused_by_name_and_nothing_else_of_it_is(tmp_path: Path) -> None:
    told(tmp_path, *CREATED, *CUT_OVER[:3])
    record = read_run(tmp_path, RUN)
    record = replace(record, facts={**record.facts, "disks": {ROOT: a_disk().top.size, "volume-1": GiB}})
    source = SourceFacts(cast(Any, SimpleNamespace()), a_server(status="SHUTOFF", metadata={MARK: RUN}), cast(Any, SimpleNamespace(name="src-cmp1")),
                         {ROOT: a_disk()})
    (reason,) = refuse_changed(Settings(), source, record, is_stopped=True)
    assert reason.problem == "volume-1 was detached from the source after the survey" and f"rollback {RUN}" in reason.way_out


@pytest.mark.parametrize(("facts", "server", "volume", "said"), [
    ({}, {}, {}, ""), ({"source_flavor": [1, 512]}, {}, {}, ""),
    ({"source_flavor": [1, 512]}, {"flavor": a_flavor(vcpus=2, ram=2048)}, {},
     "the source had 1 vCPUs and 512 MiB of RAM at the seed, and has 2 and 2048 now: it was resized"),
    ({"has_nics": False, "ports": []}, {}, {}, "port one was attached to the source after the seed"), ({"has_nics": True, "ports": []}, {}, {}, ""),
    ({"ports": [{"source": "one"}, {"source": "two"}]}, {}, {}, "port two was detached from the source after the seed"),
    ({}, {"status": "VERIFY_RESIZE"}, {}, "the source is VERIFY_RESIZE"), ({}, {}, {"multiattach": True}, "may be attached to several instances"),
    ({}, {}, {"status": "retyping"}, "is retyping, attached to")])
def test_a_source_of_another_size_with_other_ports_or_volumes_is_refused_by_name(
        tmp_path: Path, facts: dict[str, Any], server: dict[str, Any], volume: dict[str, Any], said: str) -> None:
    told(tmp_path, *CREATED, *SEEDED)
    record = read_run(tmp_path, RUN)
    record = replace(record, seed={**record.seed, "disks": {}}, facts={**record.facts, **facts})
    networks = SimpleNamespace(all=lambda *of: [{"id": "one", "device_owner": "compute:nova"}, {"id": "other", "device_owner": ""}])
    one = Volume.of({"id": "volume-1", "name": "data", "status": "in-use", "size": 1, "volume_type": "fast",
                     "attachments": [{"server_id": UUID}], **volume})
    source = SourceFacts(cast(Any, SimpleNamespace(networks=networks)), a_server(**{"id": UUID, "flavor": a_flavor(vcpus=1, ram=512), **server}),
                         cast(Any, SimpleNamespace(name="src-cmp1")), {ROOT: a_disk()}, volumes={"volume-1": one})
    found = [reason.problem for reason in refuse_changed(Settings(), source, record)]
    assert (len(found) == 1 and said in found[0]) if said else found == [], found


def test_a_source_that_changed_since_the_survey_is_refused_by_name_before_it_is_stopped(tmp_path: Path) -> None:
    told(tmp_path, *CREATED)
    record = read_run(tmp_path, RUN)
    record = replace(record, facts={**record.facts, "disks": {ROOT: GiB}})
    source = SourceFacts(server=a_server(), disks={ROOT: replace(a_disk(), chain=(replace(a_disk().top, size=2 * GiB),))})
    (reason,) = refuse_changed(Settings(), source, record)
    assert reason.problem == "root had 1.0 GiB at the survey, and has 2.0 GiB now: the source was resized" and "a new run" in reason.way_out
    networks = SimpleNamespace(all=lambda *of: [{"id": "new", "device_owner": "compute:nova"}])
    cloud = cast(Any, SimpleNamespace(networks=networks, server_retrying=lambda id: a_server()))
    run = SimpleNamespace(source=cloud, source_host=None, plan=SimpleNamespace(server=a_server(), run=RUN), settings=Settings(),
                          record=replace(record, facts={"ports": [], "has_nics": False}))
    with pytest.raises(FinalError, match="port new was attached to the source after the survey"):
        require_safe_stop(cast(Any, run))


def test_what_continues_a_seed_that_was_killed_is_never_a_cut_over(tmp_path: Path) -> None:
    told(tmp_path, *CREATED, {"event": "asked to resume", "seed": True})
    record = read_run(tmp_path, RUN)
    assert f"continue: ./migrena.py resume {RUN} --seed " in "\n".join(what_to_do(record))
    now = situation(record, RUNS, replace(MADE_ONE, starts=(START,)))
    assert f"resume {RUN} --seed --yes" in next_commands(Act.GO_ON, now)
    told(tmp_path, *CREATED, *SEEDED, {"event": "asked to resume", "seed": True})
    lines = "\n".join(what_to_do(read_run(tmp_path, RUN)))
    assert f"update: ./migrena.py resume {RUN} --seed" in lines and "continue" not in lines
    told(tmp_path, *CREATED, *SEEDED, {"event": "asked to resume", "seed": False}, *CUT_OVER)
    assert f"continue: ./migrena.py resume {RUN}    " in "\n".join(what_to_do(read_run(tmp_path, RUN)))


def test_what_was_asked_for_a_moment_ago_may_still_be_made() -> None:
    began = datetime.now(timezone.utc)
    record = RunRecord(RUN, "killed", "", {}, (Step("create destination", began.isoformat()),))
    assert 50 < patience_of(record, "create destination") <= 60 and patience_of(record, "create port") == 0
    later = (began - timedelta(minutes=2)).isoformat()
    assert patience_of(replace(record, acts=(Step("create port", later), Step("create volume", began.isoformat(), began.isoformat())))) == 0


def test_a_seed_whose_source_is_gone_is_the_operator_s_to_delete(tmp_path: Path) -> None:
    told(tmp_path, *CREATED, *SEEDED)
    now = situation(read_run(tmp_path, RUN), Seen(UUID), MADE_ONE)
    assert "openstack server delete new, if" in next_commands(Act.DELETE, now)
    started = situation(read_run(tmp_path, RUN), RUNS, replace(MADE_ONE, starts=(START,)))
    assert f"resume {RUN} repairs it" in next_commands(Act.WRITE, started)


@pytest.mark.parametrize(("due", "command"), [
    ("", f"./migrena.py resume {RUN}"), ("2026-11-20T01:00:00+01:00", f"./migrena.py resume {RUN} --cutover-at now"),
    ("2096-11-20T01:00:00+01:00", f"./migrena.py resume {RUN}")])
def test_the_command_that_cuts_over_says_now_once_the_time_has_passed(tmp_path: Path, due: str, command: str) -> None:
    told(tmp_path, *CREATED, *SEEDED, {"event": "ended", "result": "seeded"})
    record = read_run(tmp_path, RUN)
    record = replace(record, facts={**record.facts, "settings": {"cutover_at": due}})
    assert record.cut_over == command and f"cut over: {command}  " in "\n".join(table_lines([record]))


def test_a_seed_is_as_old_as_the_last_pass(tmp_path: Path) -> None:
    told(tmp_path, *CREATED, *SEEDED, {"event": "pass", "number": 3, "changed": MiB, "at": "2026-11-21T01:00:00+00:00"})
    assert read_run(tmp_path, RUN).copied == "2026-11-21T01:00:00+00:00"
    told(tmp_path, *CREATED, *SEEDED)
    assert read_run(tmp_path, RUN).copied == max("2026-11-20T21:00:00+00:00", read_run(tmp_path, RUN).last_pass["at"])


def test_none_takes_back_the_ways_to_answer() -> None:
    assert parse_answers(["none"]) == parse_answers("none") == () and parse_answers(["tcp:22"]) == ("tcp:22",)


def a_run(tmp_path: Path, **different: Any) -> Any:
    """What the steps of a cut-over need of a run."""
    told(tmp_path, *CREATED, *SEEDED)
    said = different.get("said", [])
    screen = SimpleNamespace(note=said.append, warn=said.append, status=said.append, step=lambda *_: nullcontext())
    return SimpleNamespace(**{"plan": SimpleNamespace(run=RUN, was_running=True, server=a_server(id=UUID)), "record": read_run(tmp_path, RUN),
                              "settings": Settings(), "screen": screen, "source_host": SimpleNamespace(
                                  name="src-cmp1", script=lambda *words: "running"), **different})


@pytest.mark.parametrize(("seen", "said"), [
    ({"status": "SHUTOFF", "power": 4}, "the source is SHUTOFF during the copy: somebody stopped it"), ({"power": 4}, "is ACTIVE during the copy"),
    ({"hypervisor": "src-cmp2"}, "has moved to src-cmp2 during the copy")])
def test_a_pass_needs_a_source_that_runs_where_it_ran(tmp_path: Path, seen: dict[str, Any], said: str) -> None:
    for settings, again in ((Settings(), f"resume {RUN}"), (Settings(seed=True), f"resume {RUN} --seed")):
        run = a_run(tmp_path, settings=settings)
        require_it_runs(run, run.plan.server)
        with pytest.raises(CloudError, match=said) as failed:
            require_it_runs(run, replace(run.plan.server, **seen))
        assert failed.value.reasons[0].way_out.removesuffix(", without --warm if it stays stopped").endswith(again)
    run = a_run(tmp_path)
    run.record = replace(run.record, seed={})
    assert again_command(run) == "run it again"


def test_a_window_that_ends_while_passes_are_made_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    due = datetime.now().astimezone() - timedelta(seconds=30)
    warm = WarmCopy(a_run(tmp_path, settings=Settings(cutover_at=due.isoformat(), late=60)), (), 5.0)
    takes, clock = [10.0, 40.0], [time.time()]
    monkeypatch.setattr("migrena.time", SimpleNamespace(time=lambda: clock[0]))
    monkeypatch.setattr(warm, "until_little_is_left", lambda *_: clock.append(clock.pop() + takes.pop(0)))
    warm.in_window()
    with pytest.raises(FinalError, match=r"ago: this machine slept, or a pass"):
        warm.in_window()
    assert takes == []  # it was in time when the passes began


@pytest.mark.parametrize(("reread", "expected"), [(1.0, 17.0), (0.5, 15.0), (0.0, 13.0)])
def test_what_a_bitmap_tells_is_not_looked_for_after_the_stop(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reread: float, expected: float) -> None:
    monkeypatch.setattr(migrena, "for_each", lambda *_: [Pass(0, 4.0, 1.0, 5.0)])
    monkeypatch.setattr(migrena, "sum_of", lambda passes, seconds: passes[0])
    said: list[str] = []
    run = a_run(tmp_path, said=said)
    run.journal = SimpleNamespace(write=lambda *_, **__: None)
    warm = WarmCopy(run, (), 12.0, reread)
    for _ in range(2):
        warm.make_pass()
    assert migrena.downtime(warm.passes, 12.0) - migrena.SETTING_UP == pytest.approx(expected - 1.0)
    assert "found in 4.0 s" in said[-1]


def test_a_pass_that_fails_before_its_time_is_made_up_for_with_all_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    due, clock = datetime.now().astimezone() + timedelta(seconds=50), [time.time()]
    copies = [SimpleNamespace(both=SimpleNamespace(is_ending=False, destination=SimpleNamespace(name="dst-cmp1"))) for _ in range(2)]
    warm = WarmCopy(a_run(tmp_path, said=said, settings=Settings(cutover_at=due.isoformat(), every=20)), cast(Any, copies), 5.0)
    warm.passes.append(Pass(MiB, 1.0, 1.0, 2.0))
    made: list[float] = []

    def make_pass() -> None:
        made.append(clock[0])
        if len(made) in (1, 3):  # the last one of all, too
            for copy in copies:
                copy.both.is_ending = True
            raise HostError("src-cmp1: the connection was lost")
        assert not any(copy.both.is_ending for copy in copies)

    monkeypatch.setattr(warm, "make_pass", make_pass)
    monkeypatch.setattr("migrena.take_slot", lambda *_: None)
    monkeypatch.setattr("migrena.time", SimpleNamespace(time=lambda: clock[0], monotonic=lambda: clock[0],
                                                        sleep=lambda seconds: clock.append(clock.pop() + seconds)))
    warm.until_window(ExitStack())
    left = [round(due.timestamp() - at) for at in made]
    assert left[:2] == [30, 10] and len(left) >= 4 and 0 <= left[-1] < 10 and clock[0] >= due.timestamp()
    assert sum("there is time for another pass" in line for line in said) == 2


def test_a_source_that_cannot_be_given_back_is_named_with_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(tmp_path, *CREATED, *SEEDED, *CUT_OVER, {"event": "intent", "act": "start destination"})
    record = read_run(tmp_path, RUN)
    there = stopped("new", status="ACTIVE", power=1)
    now = situation(record, Seen(UUID, stopped(UUID, metadata={MARK: RUN})), replace(MADE_ONE, server=there, starts=(START,)))
    run = a_run(tmp_path, record=record)
    monkeypatch.setattr("migrena.situation_now", lambda *_: now)

    def fails(*_: object) -> None:
        raise CloudError("destination cloud: Nova cannot stop it")

    monkeypatch.setattr("migrena.stop_destination", fails)
    with pytest.raises(Kept) as failed:
        take_back(run, "new", "no answer within 5 s")
    said = [reason.problem for reason in failed.value.reasons]
    assert said[0] == "the destination new gave no answer within 5 s" and "cannot stop it" in said[1], said
    assert f"source {UUID}: SHUTOFF" in said[2] and "destination new: ACTIVE" in said[2], said
    assert f"openstack server start {UUID}" in failed.value.reasons[2].way_out


def test_status_tells_the_age_of_a_seed_and_the_commands_for_it(tmp_path: Path) -> None:
    told(tmp_path, *CREATED, *SEEDED, {"event": "ended", "result": "seeded"})
    shown = "\n".join(table_lines([read_run(tmp_path, RUN)]))
    assert re.search(r"seed +\S+ d old|seed +\S+ h old|seed .* old; in the last pass 3.0 MiB had changed; stopped now, .* about 9\.5 s", shown), shown
    assert f"update: ./migrena.py resume {RUN} --seed    cut over: ./migrena.py resume {RUN}    remove: ./migrena.py rollback {RUN}" in shown
    assert any(line.startswith("seed ") for line in detail_lines(read_run(tmp_path, RUN)))


def test_status_is_drawn_anew_on_a_terminal_until_ctrl_c_and_needs_one(migrena: Migrena, tmp_path: Path) -> None:
    told(tmp_path, *CREATED, *SEEDED, {"event": "ended", "result": "seeded"})
    config = tmp_path / "config.py"
    config.write_text(f"STATE_FOLDER = {str(tmp_path)!r}\n")
    done = migrena("status", "--watch", config=config.read_text())
    assert done.returncode == 2 and "--watch needs a terminal" in done.stderr
    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, SCRIPT, "status", "--watch", "-c", config], stdout=follower, stderr=follower, stdin=follower)
    shown = ""
    while shown.count("\033[H") < 2:
        shown += os.read(leader, 4096).decode()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0 and "1 seeded" in shown and RUN in shown


def test_status_as_json_tells_of_a_seed(migrena: Migrena, tmp_path: Path) -> None:
    told(tmp_path, *CREATED, *SEEDED, {"event": "ended", "result": "seeded"})
    shown = json.loads(migrena("status", RUN, "--json", config=f"STATE_FOLDER = {str(tmp_path)!r}\n").stdout)
    assert shown["seed"] == {"copied": read_run(tmp_path, RUN).copied, "disks": {ROOT: GiB}, "changed": 3 * MiB, "downtime": 9.5}
    assert shown["result"] == "seeded"
