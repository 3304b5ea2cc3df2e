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
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from conftest import SCRIPT, Migrena
from migrena import (
    MARK,
    ROOT,
    Act,
    Action,
    Asked,
    Cloud,
    Pace,
    Seen,
    Settings,
    SourceFacts,
    Stage,
    detail_lines,
    has_answered,
    is_seed_again,
    judge,
    parse_answers,
    parse_moment,
    parse_rate,
    read_run,
    refuse_changed,
    situation,
    stage_of,
    table_lines,
)
from unit.makers import UUID, a_disk, a_server
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
    if now.stage is Stage.STARTED:  # its destination may have data of its own
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
    assert shown["seed"] == {"copied": "2026-11-20T21:00:00+00:00", "disks": {ROOT: GiB}, "changed": 3 * MiB, "downtime": 9.5}
    assert shown["result"] == "seeded"
