"""A bug, which is an exception that nobody has foreseen, is told as one, with what is left; a call that has begun never ends as "rolled back"."""

from __future__ import annotations

import contextlib
import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

import migrena
from migrena import NOTHING_KNOWN, Cloud, HostError, Run, read_bitmap, read_run
from unit.makers import a_server, an_overlay, some_settings
from unit.model import HostStandIn, Modelled, World
from unit.people import Schedule, play

BUG = "this is a bug in migrena: KeyError: 'no such key'"
REPORT = "--debug"


def buggy(*words: Any, **more: Any) -> NoReturn:
    """A function with a bug."""
    raise KeyError("no such key")


def played(tmp_path: Path, *steps: str) -> World:
    """The world after these commands, none of which has told a lie."""
    world = play(Schedule(tuple((step, {}) for step in steps)), tmp_path / "state")
    assert [line for line in world.broken if BUG not in line and not line.startswith("   ")] == []
    return world


def test_a_bug_after_the_run_has_begun_ends_with_4_and_says_so_though_all_was_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrena, "require_safe_stop", buggy)
    world = played(tmp_path, "copy")
    process = world.runs[0]
    said = "\n".join(process.said)
    assert process.code == 4 and f"error: {BUG}; nothing is known to be left behind" in said, said
    assert REPORT in said and "Traceback" in said and f"rollback {process.run}; ./migrena.py status {process.run}" in said
    assert len(list(world.machines())) == 1 and world.source.status == "ACTIVE" and not world.source.locked
    record = read_run(tmp_path / "state/here", process.run)
    assert record.state == "left" and record.left == ()


def test_what_could_not_be_undone_after_a_bug_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise HostError("no way")

    def delete_on_failure(run: Run) -> None:
        run.undo.on_failure("delete destination new", fails)

    monkeypatch.setattr(migrena, "delete_on_failure", delete_on_failure)
    monkeypatch.setattr(migrena, "require_safe_stop", buggy)
    process = played(tmp_path, "copy").runs[0]
    said = "\n".join(process.said)
    assert process.code == 4 and f"error: {BUG}\n" in said and "left behind: delete destination new did not succeed: no way" in said
    assert "nothing is known" not in said and read_run(tmp_path / "state/here", process.run).left


@pytest.mark.parametrize("yes", ["", " --yes"])
def test_a_host_that_is_lost_at_the_very_last_command_does_not_cost_the_destination_that_runs(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, yes: str) -> None:
    run = HostStandIn.run

    def lost(host: HostStandIn, *words: str, **more: Any) -> migrena.Answer:
        if words[0] == "rm" and words[-1].endswith("-fresh"):
            raise HostError("the SSH connection broke")
        return run(host, *words, **more)

    monkeypatch.setattr(HostStandIn, "run", lost)
    world = played(tmp_path, f"copy -a dst{yes}")
    process = world.runs[0]
    said = "\n".join(process.said)
    assert process.code == 4 and "the SSH connection broke" in said and "undo" not in said, said
    assert [machine.status for machine in world.machines()] == ["SHUTOFF", "ACTIVE"]


@pytest.mark.parametrize("yes", ["", " --yes"])
def test_a_destination_that_the_run_has_started_is_not_deleted_whatever_fails_then(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, yes: str) -> None:
    def refuses(*words: Any, **more: Any) -> NoReturn:
        raise migrena.CloudError("mark server: forbidden by a policy", code=403)

    mark = Modelled.mark
    monkeypatch.setattr(Modelled, "mark", lambda cloud, id, marks: refuses() if migrena.DONE in marks else mark(cloud, id, marks))
    world = played(tmp_path, f"copy -a dst{yes}")
    assert world.runs[0].code == 4
    assert [machine.status for machine in world.machines()] == ["SHUTOFF", "ACTIVE"]


def test_a_stop_that_was_not_done_is_not_in_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow = migrena.allow

    def forbid(act: migrena.Act, *more: Any) -> None:
        if act is migrena.Act.STOP_SOURCE:
            raise migrena.FinalError("somebody has stopped it")
        allow(act, *more)

    monkeypatch.setattr(migrena, "allow", forbid)
    world = played(tmp_path, "copy")
    assert world.runs[0].code == 1 and world.source.status == "ACTIVE"
    record = read_run(tmp_path / "state/here", world.runs[0].run)
    assert record.stopped_at is None and all(act.name != "stop source" for act in record.acts)


@pytest.mark.parametrize(("where", "steps"), [
    ("refuse", ["copy"]), ("make_plan", ["copy -a dst"]), ("plan_lines", ["copy -n"]), ("plan_undo", ["copy", "rollback --yes"])])
def test_a_bug_before_anything_was_touched_is_a_refusal_that_says_so(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, steps: list[str]) -> None:
    monkeypatch.setattr(migrena, where, buggy)
    process = played(tmp_path, *steps).runs[-1]
    assert process.code == 3 and process.changes == []
    said = "\n".join(process.said)
    assert f"refused: {BUG}; nothing was touched" in said and REPORT in said


class Nova:
    """A stand-in for a cloud with one instance; a bug is met while it is live-migrated."""

    label, polls = "the", staticmethod(Cloud.polls)

    def __init__(self, *words: Any) -> None:
        self.server = a_server(host="cmp1")

    def servers(self, **how: Any) -> list[migrena.Server]:
        return [self.server]

    def hosts(self) -> list[migrena.ComputeHost]:
        return [migrena.ComputeHost("cmp1", True, True), migrena.ComputeHost("cmp2", True, True)]

    def last_migration(self, id: str, after: int = 0) -> tuple[int, str]:
        return 0, ""

    def move(self, id: str, host: str) -> None:
        """Begun."""

    def server_retrying(self, id: str) -> NoReturn:
        buggy()


def spread(folder: Path) -> int:
    """The exit code of `live-migrate --json` with a map that moves the one instance."""
    config, hosts = folder / "config.py", folder / "map.json"
    config.write_text("SRC_CREDS = {'auth_url': 'http://127.0.0.1/v3'}\n")
    hosts.write_text(json.dumps({"cmp2": ["web"]}))
    with contextlib.ExitStack() as stack:
        for each in migrena.SIGNALS:
            stack.callback(signal.signal, each, signal.getsignal(each))
        return migrena.main(["live-migrate", "--cloud", "src", "-y", "--json", "-c", str(config), "--host-map", str(hosts)])


def test_a_migration_that_goes_on_after_a_bug_is_listed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(migrena, "Cloud", Nova)
    code = spread(tmp_path)
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert code == 4 and BUG in report["error"][0]["problem"] and report["result"] == "left", err
    assert report["not_undone"] == ["the migration of web to cmp2 continues in Nova"] and "left behind: the migration of web" in err


@pytest.mark.parametrize(("where", "code", "told"), [("in_order", 3, "nothing was touched"), ("move_one", 4, "nothing is known to be left behind")])
def test_a_bug_in_live_migrate_says_whether_it_had_begun(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str, code: int, told: str) -> None:
    monkeypatch.setattr(migrena, "Cloud", Nova)
    monkeypatch.setattr(migrena, where, buggy)
    assert spread(tmp_path) == code
    assert f"{BUG}; {told}" in json.loads(capsys.readouterr().out)["error"][0]["problem"]


def test_a_raw_disk_is_never_opened_as_a_qcow2_file_to_look_for_a_bitmap() -> None:
    run, job = SimpleNamespace(settings=some_settings(bitmap=True), source_host=None), SimpleNamespace(source=an_overlay(format="raw"))
    assert read_bitmap(run, job, NOTHING_KNOWN) is NOTHING_KNOWN  # type: ignore[arg-type]
    job.source = an_overlay()
    with pytest.raises(AttributeError):  # control: a host would be needed
        read_bitmap(run, job, NOTHING_KNOWN)  # type: ignore[arg-type]
