"""Names from the clouds that are made to do harm go through a whole run, status, resume and rollback, and do none."""

from __future__ import annotations

import json
import re

import pytest

from hosts.faults import Fault
from hosts.operators import is_complete
from migrena import LOCKED_BY, MARK
from unit.makers import UUID

HARM = "touch /tmp/migrena-harm"
NAMES = {
    "shell": f"-rf $({HARM}) `{HARM}` ; {HARM} | {HARM} & \"'\\ %s %n {{0}} ../../etc/passwd *",
    "terminal": "web\x1b]0;owned\x07\x1b[2J\x1b[1;1H\r\n\x00\x9b31m\u202etxt.exe\u2028line",
    "unicode": ("名前 ünïcödé 🐍 " * 20).encode()[:255].decode(errors="ignore"),
}
FORBIDDEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]")  # anything but a newline that a terminal obeys


def is_tame(text: str, lines: int | None = None) -> None:
    """Nothing that a terminal would obey, and no more lines than there should be."""
    assert not FORBIDDEN.search(text), repr(FORBIDDEN.search(text))
    assert lines is None or len(text.splitlines()) == lines, text


def no_harm(fault: Fault) -> None:
    """None of the names was ever taken for a command."""
    for host in fault.operator.lab:
        assert host.run("find", "/tmp", "/root", "-name", "migrena-harm").stdout == ""


def dress(fault: Fault, name: str) -> None:
    """The source and its flavor have this name, and so has what Nova says of its last failure."""
    clouds = fault.operator.clouds
    flavor = {**clouds[0].rows()[UUID]["flavor"], "original_name": name}
    clouds[0].put(UUID, name=name, flavor=flavor, fault={"message": name})


@pytest.mark.parametrize("kind", NAMES)
def test_a_whole_run_of_an_instance_with_an_awkward_name_does_no_harm(fault: Fault, kind: str) -> None:
    name = NAMES[kind]
    wanted = re.sub("[\x00-\x1f\x7f]", " ", name)  # what is given on a command line has no control characters
    dress(fault, name)
    log = fault.operator.folder / "log"
    said = fault.call(0, "-s", UUID, f"--dst-name={wanted}", "-v", "-f", "flavor-1", "--log-file", str(log))
    run = fault.journal.stem
    is_tame(said)
    is_tame(log.read_text())
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in log.read_text().splitlines())
    is_complete(fault.operator, run)
    assert fault.operator.made()[0]["name"] == wanted
    table, detail = fault.operator.run("status"), fault.operator.run("status", run)
    is_tame(table.stdout, lines=2)
    is_tame(detail.stdout)
    assert json.loads(fault.operator.run("status", run, "--json").stdout)["source"]["name"] == name
    again = fault.operator.run("-s", UUID, f"--dst-name={wanted}")
    assert again.returncode == 0 and "already migrated" in again.stderr
    is_tame(again.stderr, lines=1)
    fault.call(0, "rollback", run, "--yes")
    assert fault.operator.made() == []
    no_harm(fault)


def test_control_what_a_terminal_would_obey_is_noticed() -> None:
    for sign in ("\x1b[2J", "\r", "\x9b", "\u202e"):
        with pytest.raises(AssertionError):
            is_tame(f"web{sign}")
    with pytest.raises(AssertionError):
        is_tame("one\ntwo", lines=1)


def test_a_killed_run_of_an_awkward_name_is_resumed_and_refused_in_one_line_each(fault: Fault) -> None:
    name = NAMES["terminal"] + NAMES["shell"]
    dress(fault, name)
    run = fault.operator.killed()
    is_tame(fault.operator.run("status").stdout, lines=4)
    is_tame(fault.call(0, "resume", run))
    is_complete(fault.operator, run)
    no_harm(fault)


@pytest.mark.parametrize("what", ["lock", "mark", "state"])
def test_what_others_wrote_into_nova_is_reported_in_one_line(fault: Fault, what: str) -> None:
    name = NAMES["terminal"] + NAMES["shell"]
    if what == "lock":
        fault.operator.clouds[0].put(UUID, locked=True, locked_reason=f"{LOCKED_BY}{name}")
    elif what == "mark":
        fault.operator.clouds[0].put(UUID, metadata={MARK: name})
    else:
        fault.operator.clouds[0].put(UUID, status=name, **{"OS-EXT-STS:task_state": name})
    before = fault.operator.clouds[0].rows()
    said = fault.call(3, "-s", UUID, "-d", "new")
    is_tame(said)
    assert all(" refused: " in line or "   try: " in line for line in said.splitlines()), said
    if what == "mark":
        is_tame(fault.call(3, "rollback", "--run-of", UUID, said=("is not one of migrena's",)))
    assert fault.operator.clouds[0].rows() == before and fault.operator.made() == []
    no_harm(fault)


def test_a_name_that_the_locale_cannot_show_is_written_out(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    dress(fault, NAMES["unicode"])
    fault.call(3, "-s", UUID, "-d", "名前", "-f", "名前", said=("\\u540d\\u524d",))
    run = fault.operator.killed()
    table = fault.operator.run("status")
    assert table.returncode == 0 and "\\u540d\\u524d" in table.stdout, table.stderr
    fault.call(0, "rollback", run)


def test_a_new_name_is_not_found_in_another_one_that_it_matches_as_a_pattern(fault: Fault) -> None:
    fault.call(0, "-s", UUID, "-d", ".*")
    fault.operator.clouds[1].put(fault.operator.made()[0]["id"], name="web-1")
    fault.call(0, "-s", UUID, "-d", "web.1", "--yes")
    assert sorted(row["name"] for row in fault.operator.made()) == ["web-1", "web.1"]
