"""The report of --json: it holds all that the plan says, typed; README lists its keys; status --json calls the same things the same."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import REPOSITORY, Migrena
from migrena import ROOT, Report, as_json, duration, human, make_plan, plan_lines, read_run
from unit import test_runs
from unit.makers import GiB, a_disk, a_volume, an_image, an_overlay, some_settings
from unit.model import World
from unit.people import Events, People, Schedule, Step, play
from unit.test_refusals import a_destination, a_source

FIELDS = {row.name for row in dataclasses.fields(Report)}
JOURNALS_OWN = {"began", "was_running", "step", "facts", "acts", "seed", "disks", "is_undoing", "keeps_destination"}


@pytest.fixture
def with_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command on the model has --json."""
    asked = People.asked

    def with_more(people: People, *words: Any) -> tuple[str, dict[str, object]]:
        job, flags = asked(people, *words)
        return job, {**flags, "json": True}

    monkeypatch.setattr(People, "asked", with_more)


def reports(folder: Path, capsys: pytest.CaptureFixture[str], *steps: str) -> tuple[World, list[dict[str, Any]]]:
    """The world after these commands, and the report of each."""
    world = play(Schedule(tuple((step, {}) for step in steps)), folder)
    assert world.broken == []
    out, decoder, found = capsys.readouterr().out.strip(), json.JSONDecoder(), []
    while out:
        report, end = decoder.raw_decode(out)
        found.append(report)
        out = out[end:].strip()
    return world, found


def leaves(told: object) -> Iterator[object]:
    """All that is in a report but the names of its keys."""
    if isinstance(told, (dict, list)):
        for part in told.values() if isinstance(told, dict) else told:
            yield from leaves(part)
    else:
        yield told


def not_in(report: object, lines: list[str]) -> list[str]:
    """The amounts, times, ids, paths and hosts of these lines that a report does not hold."""
    held = {form for leaf in leaves(report) for form in ([human(leaf), duration(leaf)] if isinstance(leaf, (int, float)) else [str(leaf)])}
    text = "\n".join(lines)
    words = re.findall(r"(?<=about )(?:\d+\.\d s|[\d:]+)|\d+(?:\.\d)? (?:[KMGT]i)?B\b", text)
    words += re.findall(r"(?<=\s)/[\w/.-]+|[0-9a-f]{8}-[0-9a-f-]{27}|cmp-\w+|qcow2|raw|ACTIVE|SHUTOFF|nbd\b|qemu\b", text)
    return [word for word in words if word not in held and not any(word in each for each in held)]


@pytest.mark.usefixtures("with_json")
@pytest.mark.parametrize("words", ["copy -n", "copy -n -a dst", "copy -n --warm", "copy -n --warm -a all"])
def test_all_that_the_printed_plan_says_is_in_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str) -> None:
    world, (report,) = reports(tmp_path / "state", capsys, words)
    said = world.runs[0].said
    lines = said[next(number for number, line in enumerate(said) if line.startswith("source  ")) :]
    assert report["result"] == "planned" and len(lines) > 6 and not_in(report, lines) == []
    assert report["copy"]["start_after"] == world.runs[0].after and report["copy"]["warm"] is ("--warm" in words)


@pytest.mark.usefixtures("with_json")
@pytest.mark.parametrize("part", ["source", "copy"])
def test_control_what_a_report_lacks_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str) -> None:
    world, (report,) = reports(tmp_path / "state", capsys, "copy -n")
    assert not_in({**report, part: {}}, world.runs[0].said)


@pytest.mark.usefixtures("with_json")
def test_a_plan_is_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, (report,) = reports(tmp_path / "state", capsys, "copy -n -a dst")
    source, destination, copy = report["source"], report["destination"], report["copy"]
    assert source.keys() == {"cloud", "id", "name", "host", "status", "flavor", "disks"}
    assert destination.keys() == {"cloud", "name", "flavor", "image"} and destination["name"] == "new"
    assert source["flavor"].keys() == destination["flavor"].keys() >= {"id", "name", "vcpus", "ram", "disk", "swap", "extra_specs"}
    assert destination["image"].keys() == {"id", "name", "bytes", "differs"} and destination["image"]["bytes"] == 0
    for file in source["disks"]["root"]:
        assert isinstance(file["path"], str) and all(type(file[key]) is int for key in ("size", "length", "allocated"))
    assert copy["transport"] in ("nbd", "qemu") and copy["tls"] is True and copy["start_after"] == "dst" and copy["bitmap"] is False
    assert report["api_calls"].keys() == {"source", "destination"}
    for row in copy["estimates"]:
        assert row["view"] in ("file", "guest") and type(row["bytes"]) is type(row["space"]) is int
        assert row["rate"] > 0 and row["seconds"] == round(row["bytes"] / row["rate"], 1)


def test_an_image_that_is_carried_first_is_in_the_report_with_its_bytes_and_both_views_of_the_disk() -> None:
    report, image = Report(), an_image(facts={"size": 5, "disk_format": "qcow2"})
    plan = make_plan(some_settings(copy_image=True), a_source(image=image), a_destination(images=()), "r")
    lines = [*plan_lines(some_settings(limit_rate=str(GiB)), plan, a_source(), 0.0, report)]
    assert report.destination["image"] == {"id": "", "name": "debian", "bytes": 5, "differs": []}
    assert "to move      5 B: the image, before anything is stopped" in lines
    assert [(row["view"], row["bytes"], row["rate"], row["seconds"]) for row in report.copy["estimates"]] == [
        ("file", GiB, GiB, 1.0), ("guest", 3 * GiB, GiB, 3.0)]


@pytest.mark.parametrize("kind", ["ceph", "volume"])
def test_a_root_disk_that_is_no_file_or_becomes_none_is_told_and_planned_as_what_the_guest_sees(kind: str) -> None:
    disk = a_disk(an_overlay(path="rbd:vms/x_disk", format="raw", storage={"driver": "rbd"}), guest_bytes=3 * GiB) if kind == "ceph" else a_disk()
    source = a_source()
    source.disks = {ROOT: disk}
    if kind == "volume":
        source.volumes = {ROOT: a_volume()}
    plan, report = make_plan(some_settings(limit_rate=str(GiB)), source, a_destination(), "run-1"), Report()
    lines = [*plan_lines(some_settings(limit_rate=str(GiB)), plan, source, 0.0, report)]
    text = "\n".join(lines)
    assert "the file is copied" not in text and "transport    qemu" in text and ": the file" not in text and "if the bases differ" not in text
    assert [(one["view"], one["bytes"]) for one in report.copy["estimates"]] == [("guest", 3 * GiB)] and report.copy["transport"] == "qemu"


@pytest.mark.usefixtures("with_json")
def test_a_run_s_report_calls_things_as_its_plan_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, (planned, done) = reports(tmp_path / "state", capsys, "copy -n", "copy")
    assert planned.keys() == done.keys() == FIELDS
    assert done["source"].keys() <= planned["source"].keys() and done["destination"].keys() - {"id", "host"} <= planned["destination"].keys()
    for key in ("transport", "why_transport", "tls"):
        assert key in planned["copy"] and key in done["copy"]


@pytest.mark.usefixtures("with_json")
def test_a_run_s_report_names_the_flavors_of_both_instances(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, (planned, done) = reports(tmp_path / "state", capsys, "copy -n", "copy")
    assert planned["source"]["flavor"] == done["source"]["flavor"] and done["source"]["flavor"]["name"] == "small"
    assert done["destination"]["flavor"]["name"] == "small"


@pytest.mark.usefixtures("with_json")
@pytest.mark.parametrize("words", ["rollback -n", "resume -n"])
def test_why_an_act_must_not_be_done_is_in_the_report_too(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str) -> None:
    steps: tuple[Step, ...] = (("copy", {"copy#1": "crash"}), ("admin starts source", {}), ("admin starts destination", {}), (words, {}))
    world = play(Schedule(steps), tmp_path / "state")
    report, said = json.loads(capsys.readouterr().out), world.runs[-1].said
    told = [line for reason in report["error"] for line in (f"  {reason['problem']}", f"    try: {reason['way_out']}")]
    assert (report["result"], world.runs[-1].code) == ("refused", 3) and told == [line for line in said if line.startswith("  ")] != []


@pytest.mark.usefixtures("with_json")
def test_a_run_that_leaves_something_has_the_result_that_status_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events: Events = {"check#1": "outage of 1000 s"}
    world = play(Schedule((("copy", events),)), tmp_path / "state")
    report, record = json.loads(capsys.readouterr().out), read_run(tmp_path / "state/here", world.runs[0].run)
    assert (world.runs[0].code, report["result"], report["not_undone"]) == (4, as_json(record)["result"], list(record.left))


def keys_in(readme: str) -> dict[str, str]:
    """The keys of the report's table in README, with what is said of each."""
    table = readme.partition("\n## The report\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.+) \|$", table, re.MULTILINE)
    return {key: meaning for names, meaning in rows for key in re.findall(r"`(\w+)`", names)}


def test_readme_lists_every_key_of_the_report_and_of_status() -> None:
    assert keys_in((REPOSITORY / "README.md").read_text()).keys() == FIELDS | JOURNALS_OWN


def test_control_a_key_that_readme_lacks_is_noticed() -> None:
    text = (REPOSITORY / "README.md").read_text()
    assert keys_in(text.replace("`not_undone`", "")).keys() != FIELDS | JOURNALS_OWN


def test_status_calls_the_same_things_the_same(migrena: Migrena, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    test_runs.told(state, *test_runs.CREATED, *test_runs.COPYING)
    shown = json.loads(migrena("status", test_runs.RUN, "--json", config=f"STATE_FOLDER = {str(state)!r}\n").stdout)
    assert shown.keys() - FIELDS == JOURNALS_OWN and not {"state", "done", "total", "left"} & shown.keys()
    assert shown["result"] == "killed" and shown["source"]["name"] == "web" and shown["destination"]["id"] == "new"
    assert shown["destination"]["name"] == "web-1" and shown["error"] == [] and shown["not_undone"] == []
    assert {"bytes", "done", "rate", "retries"} <= shown["copy"].keys() and shown["copy"]["bytes"] == 4 * shown["copy"]["done"]
