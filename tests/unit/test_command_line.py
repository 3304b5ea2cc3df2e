"""Wrong input gives one clear line and the way out on standard error, nothing on standard output, and touches nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import migrena as migrena_itself
from conftest import SCRIPT, Migrena
from migrena import KEYSTONE_TIMEOUT, Cloud, CloudError
from unit.makers import UUID

GIVEN = ("-s", UUID, "-d", "new")
CREDS = "{'auth_url': 'http://127.0.0.1:%d/v3', 'username': 'admin', 'password': 'hunter2', 'project_name': 'admin'}"


@pytest.fixture
def closed_ports() -> Iterator[tuple[int, int]]:
    """Two ports of the loopback that nobody listens on, nor will while the test runs."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        yield one.getsockname()[1], other.getsockname()[1]


@pytest.fixture
def config(closed_ports: tuple[int, int]) -> str:
    """A config.py whose clouds nobody answers for."""
    return f"SRC_CREDS = {CREDS % closed_ports[0]}\nDST_CREDS = {CREDS % closed_ports[1]}\n"


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The complaints, without what may follow them, the date in front cut off."""
    return [line[20:] for line in done.stderr.splitlines() if line[20:].startswith(("error: ", "refused: "))]


@pytest.mark.parametrize(("words", "complaint"), [
    ((), "-s is missing"),
    (("-d", "new"), "-s is missing"),
    (("-s", "", "-d", "new"), "-s is missing"),
    (("-s", UUID, "-d", "  "), "begins or ends with a space"),
    (("-s", "web", "-d", "new"), "--src-uuid: 'web' is not an instance id"),
    (("-s", UUID + "0", "-d", "new"), "is not an instance id"),
    (("-s", "--all", "-d", "new"), "-s"),
    ((*GIVEN, "-e", "[1, 2]"), "--extra-args: '[1, 2]' is not a dictionary"),
    ((*GIVEN, "-e", "{'nics': "), "is not a dictionary"),
    ((*GIVEN, "-e", "{'nic': 'none'}"), "-e: Nova's create has no argument 'nic'; did you mean nics?"),
    ((*GIVEN, "-e", "{'min_count': 2}"), "-e: min_count is not allowed"),
    ((*GIVEN, "-e", "{'name': 'x'}"), "-e: name is not allowed"),
    ((*GIVEN, "-e", "{'block_device_mapping_v2': []}"), "-e: block_device_mapping_v2 is not allowed"),
    ((*GIVEN, "-e", "{'meta': 'x'}"), "-e: meta must be a dictionary"),
    ((*GIVEN, "-e", "{'meta': {'a': 1}}"), "-e: meta must be a dictionary of strings"),
    ((*GIVEN, "-e", "{'nics': 'foo'}"), "-e: nics must be 'auto', 'none' or a list"),
    ((*GIVEN, "-e", f"{{'nics': [{{'net_id': '{UUID}'}}]}}"), "-e: nics must be"),
    ((*GIVEN, "-e", "{'nics': [{'net-id': 'net1'}]}"), "-e: nics must be"),
    ((*GIVEN, "-e", "{'nics': [{'v4-fixed-ip': '192.0.2.1'}]}"), "-e: nics must be"),
    ((*GIVEN, "-e", "{'security_groups': 'default'}"), "-e: security_groups must be a list of names"),
    ((*GIVEN, "-e", "{'key_name': 7}"), "-e: key_name must be a string"),
    ((*GIVEN, "-e", "{'hostname': '%s'}" % (256 * "h")), "-e: hostname must be a string of up to 255"),
    ((*GIVEN, "-e", "{'userdata': '%s'}" % (49150 * "x")), "-e: userdata must be a string of up to 49149 bytes"),
    ((*GIVEN, "-e", "{'scheduler_hints': ['x']}"), "-e: scheduler_hints must be a dictionary"),
    (("-s", UUID, "-d", 256 * "n"), "--dst-name: "),
    (("-s", UUID, "-d", 256 * "n"), "has 256 characters; the limit is 255"),
    (("-s", UUID, "-d", " new"), "begins or ends with a space"),
    ((*GIVEN, "-a", "both"), "--start-after: 'both' is not one of all, src, dst"),
    ((*GIVEN, "--limit-rate", "fast"), "--limit-rate: 'fast' is not a size"),
    ((*GIVEN, "--transport", "ndb"), "--transport: 'ndb' is not one of auto, nbd, qemu; did you mean nbd?"),
    ((*GIVEN, "-c", "/nowhere/config.py"), "there is no file /nowhere/config.py"),
    (("-s", UUID, "-d", "new\nname"), "control characters"),
])
def test_a_wrong_word_on_the_command_line_ends_with_2_and_one_clear_line(
        migrena: Migrena, config: str, words: tuple[str, ...], complaint: str) -> None:
    done = migrena(*words, config=config)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(told(done)) == 1 and complaint in told(done)[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("words", "complaint"), [
    (("--unheard-of",), "unrecognized arguments: --unheard-of"), (("stray",), "unrecognized arguments: stray"),
    (("--src", UUID), "unrecognized arguments: --src"), (("-n", "--limit-rate"), "--limit-rate: expected one argument"),
    (("--lmit-rate", "5M"), "--lmit-rate 5M; did you mean --limit-rate?"), (("rolback",), "rolback; did you mean rollback?"),
    (("copy",), "unrecognized arguments: copy"),
])
def test_a_word_that_argparse_does_not_know_ends_with_2(migrena: Migrena, config: str, words: tuple[str, ...], complaint: str) -> None:
    done = migrena(*GIVEN, *words, "--json", config=config)
    report = json.loads(done.stdout)
    assert (done.returncode, report["result"], len(told(done))) == (2, "usage", 1)
    assert complaint in told(done)[0] and complaint in report["error"][0]["problem"]
    assert report["error"][0]["way_out"] == "see: ./migrena.py --help"


@pytest.mark.parametrize(("content", "complaint"), [
    ("TRANSPROT = 'nbd'", "unknown setting TRANSPROT; did you mean TRANSPORT?"), ("CHUNK = '1K'", "CHUNK: 1024 is not a multiple of 1 MiB"),
    ("CHUNK = ", "line 1: invalid syntax"), ("HOSTS = ['cmp1']", "config.py: ['cmp1'] is not a dictionary"),
    ("DISK_PATH = '/var/lib/nova/disk'", "must be an absolute path with one %s in it"),
    ("SRC_CREDS = 'hunter2'", "config.py: is not a dictionary"),
])
def test_a_wrong_config_ends_with_2_and_one_clear_line(migrena: Migrena, content: str, complaint: str) -> None:
    done = migrena(*GIVEN, config=content)
    assert (done.returncode, done.stdout, len(told(done))) == (2, "", 1)
    assert complaint in done.stderr
    assert "hunter2" not in done.stderr


def test_no_credentials_end_with_2(migrena: Migrena) -> None:
    done = migrena(*GIVEN, config="")
    assert (done.returncode, done.stdout) == (2, "")
    assert told(done) == ["error: no credentials for the source cloud"]


def test_an_unknown_entry_of_the_credentials_ends_with_2_and_shows_no_password(migrena: Migrena, config: str) -> None:
    done = migrena(*GIVEN, config=config.replace("'username'", "'user_name'"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "unknown entry 'user_name'; did you mean username?" in done.stderr
    assert "hunter2" not in done.stderr


def test_an_unknown_kind_of_credentials_is_reported_in_one_line(migrena: Migrena, config: str) -> None:
    done = migrena(*GIVEN, config=config.replace("{'auth_url'", "{'auth_type': 'v3pasword', 'auth_url'"))
    assert (done.returncode in (2, 3), done.stdout) == (True, "")
    assert "v3pasword" in " ".join(told(done))
    assert "Traceback" not in done.stderr


def test_both_clouds_that_do_not_answer_are_reported_at_once(migrena: Migrena, config: str, closed_ports: tuple[int, int]) -> None:
    done = migrena(*GIVEN, config=config)
    assert (done.returncode, done.stdout) == (3, "")
    assert len(told(done)) == 2
    for side, number, line in zip(("source", "destination"), closed_ports, told(done), strict=True):
        assert f"{side} cloud: sign in: " in line and f":{number}" in line
    assert "check auth_url" in done.stderr
    assert "hunter2" not in done.stderr


def test_a_keystone_that_takes_the_connection_and_says_nothing_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    assert KEYSTONE_TIMEOUT == 30
    monkeypatch.setattr(migrena_itself, "KEYSTONE_TIMEOUT", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        began, url = time.monotonic(), f"http://127.0.0.1:{mute.getsockname()[1]}/v3"
        with pytest.raises(CloudError, match=r"source cloud: sign in: .*timed out"):
            Cloud("source", {"auth_url": url, "username": "admin", "password": "hunter2", "project_name": "admin", "auth_type": "password"})
        assert time.monotonic() - began < 10


def test_an_invalid_address_is_reported_as_a_refusal(migrena: Migrena, config: str) -> None:
    done = migrena(*GIVEN, config=config.replace("http://127.0.0.1", "htp:/nowhere"))
    assert (done.returncode, done.stdout) == (3, "")
    assert "Traceback" not in done.stderr


def test_what_answers_but_is_not_a_keystone_is_reported_as_a_refusal(migrena: Migrena, config: str, closed_ports: tuple[int, int]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        port = listener.getsockname()[1]
        settings = config.replace("'project_name'", "'timeout': 1, 'project_name'").replace(str(closed_ports[0]), str(port))
        done = migrena(*GIVEN, config=settings)
    assert (done.returncode, done.stdout, len(told(done))) == (3, "", 2)


def test_a_refusal_is_reported_as_json_too(migrena: Migrena, config: str) -> None:
    done = migrena(*GIVEN, "--json", config=config)
    report = json.loads(done.stdout)
    assert (done.returncode, report["result"], len(report["error"])) == (3, "refused", 2)
    assert all(set(reason) == {"problem", "way_out"} for reason in report["error"])


def test_a_wrong_word_is_reported_as_json_too(migrena: Migrena, config: str) -> None:
    done = migrena(*GIVEN, "--json", "-e", "{'nic': 1}", config=config)
    assert (done.returncode, json.loads(done.stdout)["result"]) == (2, "usage")


def test_quiet_still_tells_what_is_wrong(migrena: Migrena, config: str) -> None:
    assert len(told(migrena(*GIVEN, "-q", config=config))) == 2


def test_a_refused_run_leaves_no_journal_and_no_lock(migrena: Migrena, config: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert migrena(*GIVEN, config=f"{config}STATE_FOLDER = {str(state)!r}\n").returncode == 3
    assert list(state.iterdir()) == []


def test_a_state_folder_that_cannot_be_is_reported(migrena: Migrena, config: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = migrena(*GIVEN, config=f"{config}STATE_FOLDER = {str(tmp_path / 'file/state')!r}\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert "STATE_FOLDER" in done.stderr


def test_debug_shows_the_traceback_and_nothing_else_does(migrena: Migrena, config: str) -> None:
    assert "Traceback" in migrena(*GIVEN, "--debug", config=config).stderr
    assert "Traceback" not in migrena(*GIVEN, config=config).stderr


def test_debug_shows_no_password(migrena: Migrena, config: str) -> None:
    assert "hunter2" not in migrena(*GIVEN, "--debug", config=config).stderr


def test_version_and_help_end_with_0(migrena: Migrena) -> None:
    assert migrena("--version").stdout.startswith("migrena ")
    shown = migrena("--help").stdout
    assert all(word in shown for word in ("--src-uid", "--no-tls", "exit codes:", "is undone", "-a"))


THIRD_PARTY = """
import runpy, sys
sys.argv = ["migrena.py", "--help"]
before = set(sys.modules)
try:
    %s
except SystemExit:
    pass
paths = [getattr(sys.modules[name], "__file__", None) or "" for name in set(sys.modules) - before]
print("foreign:", *sorted({path.split("-packages/")[1].split("/")[0] for path in paths if "-packages/" in path}))
"""


def foreign_modules(code: str) -> str:
    """Which packages that are not Python's own a piece of code loads."""
    done = subprocess.run([sys.executable, "-c", THIRD_PARTY % code], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[-1].removeprefix("foreign:").strip()


def test_help_does_not_wait_for_any_library() -> None:
    assert foreign_modules(f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')") == ""


def test_control_a_library_that_is_loaded_is_noticed() -> None:
    assert "tqdm" in foreign_modules("import tqdm")


def test_missing_packages_are_named_before_anything_is_done(tmp_path: Path) -> None:
    """Cron often finds another Python than the operator's."""
    words = [sys.executable, "-I", "-S", str(SCRIPT), "-s", UUID, "-d", "new"]
    done = subprocess.run(words, check=False, capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, cwd=tmp_path)
    assert done.returncode == 2 and "lacks the Python packages paramiko, novaclient" in done.stderr, done.stderr
    assert "pip install -r requirements.txt" in done.stderr and "Traceback" not in done.stderr


def test_a_variable_that_may_be_misspelt_is_warned_of(migrena: Migrena, config: str) -> None:
    done = migrena("status", config=config, env={"MIGRENA_LIMIT_RATES": "50M", "MIGRENA_OTHER": "1"})
    assert done.returncode == 0 and "MIGRENA_OTHER" not in done.stderr
    assert "unknown variable MIGRENA_LIMIT_RATES; did you mean MIGRENA_LIMIT_RATE?" in done.stderr
