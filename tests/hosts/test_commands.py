"""Commands are words in and text out; what hangs is given up and gone; a lease ends with its holder, however that ends."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paramiko
import pytest
from paramiko.common import cMSG_CHANNEL_DATA, cMSG_CHANNEL_EOF

import migrena
from conftest import REPOSITORY
from hosts.conftest import Reach
from hosts.rig import processes, wait_for, wait_until_clean
from lab.hosts import Lab
from migrena import LEASED_COMMAND, LEASED_DAEMON, CommandError, Host, HostError, Settings

MANY = 5_000_000
BOTH = f"head -c {MANY} /dev/zero | tr '\\0' o; head -c {MANY} /dev/zero | tr '\\0' e >&2; head -c {MANY} /dev/zero | tr '\\0' O"
AWKWARD = ["", "a b", "  two  spaces ", "it's", 'say "hi"', "$(touch /root/oops)", "`touch /root/oops`", "$HOME ${PATH}",
           "-rf", "--", "--help", "a\nb\n",
           "tab\there", "back\\slash\\n", "semi;colon & | > < *", "naïve „Größe“ 大 🚀", "!history", "%s %d", "#hash", "~root", "a,b,,c", "-"]


def test_five_megabytes_on_both_streams_block_nothing(src: Host) -> None:
    printed = src.run("sh", "-c", BOTH)
    assert (len(printed), set(printed)) == (2 * MANY, {"o", "O"})


def test_five_megabytes_on_both_streams_block_no_long_command_either(src: Host) -> None:
    assert len(src.work("sh", "-c", BOTH, stall=30)) == 2 * MANY


def test_hazard_a_warning_on_standard_error_counts_as_failure_and_an_exit_status_as_success(src: Host) -> None:
    for way in (src.run, lambda *words: src.work(*words, stall=30)):
        assert way("sh", "-c", "echo warning: this is fine >&2; echo done") == "done\n"
        with pytest.raises(CommandError, match="ended with status 3: no output"):
            way("sh", "-c", "echo done; exit 3")


def test_what_a_long_command_says_after_a_silence_is_reported_too(src: Host) -> None:
    with pytest.raises(CommandError, match="status 1: careful") as caught:
        src.work("sh", "-c", "echo careful >&2; sleep 3; echo the reason >&2; exit 1", stall=30)
    assert caught.value.said == "careful\nthe reason"


def test_five_megabytes_after_a_silence_block_nothing(src: Host) -> None:
    assert len(src.work("sh", "-c", f"echo careful >&2; sleep 3; {BOTH}", stall=30)) == 2 * MANY


@pytest.mark.parametrize("late", [paramiko.Transport.open_session, paramiko.Channel.exec_command])
def test_a_host_that_takes_up_no_command_is_given_up_and_said_to_be_silent(
        src: Host, lab: Lab, monkeypatch: pytest.MonkeyPatch, late: Callable[..., Any]) -> None:
    """sshd stops between the operator's words: where a channel is asked for, and where it is told the command."""
    connections = [str(pid) for pid, words in lab["src"].processes() if words[0].startswith("sshd: ")]

    def stopped(*words: Any, **more: Any) -> Any:
        lab["src"].run("kill", "-STOP", *connections)
        return late(*words, **more)

    monkeypatch.setattr(migrena, "START_TIMEOUT", 2.0)
    monkeypatch.setattr(paramiko.Transport if late.__name__ == "open_session" else paramiko.Channel, late.__name__, stopped)
    try:
        with pytest.raises(HostError, match="`true` made no progress and was given up"):
            src.run("true")
    finally:
        lab["src"].run("kill", "-CONT", *connections)
    monkeypatch.undo()
    assert src.run("echo", "back") == "back\n"


@pytest.mark.parametrize("status", [1, 2, 7, 127, 255])
def test_a_failure_names_host_command_status_and_what_was_said(src: Host, status: int) -> None:
    for way in (src.run, lambda *words: src.work(*words, stall=30)):
        with pytest.raises(CommandError) as caught:
            way("sh", "-c", f"echo printed; echo went wrong >&2; exit {status}")
        assert str(caught.value).startswith("src: `sh -c ") and str(caught.value).endswith(f"ended with status {status}: went wrong")
        assert caught.value.said == "went wrong"


def test_a_command_that_was_killed_is_a_failure(src: Host) -> None:
    for way in (src.run, lambda *words: src.work(*words, stall=30)):
        with pytest.raises(CommandError):
            way("sh", "-c", "kill -9 $$")


def test_a_command_that_does_not_exist_is_a_failure(src: Host) -> None:
    with pytest.raises(CommandError, match="no-such-command"):
        src.run("no-such-command")
    assert not src.succeeds("no-such-command")
    assert src.succeeds("true") and not src.succeeds("false")


def test_a_failure_that_says_very_much_keeps_its_end(src: Host) -> None:
    with pytest.raises(CommandError, match="the end") as caught:
        src.run("sh", "-c", f"head -c {MANY} /dev/zero | tr '\\0' e >&2; echo the end >&2; exit 1")
    assert len(caught.value.said) < 20000 and len(str(caught.value)) < 20000


@pytest.mark.parametrize("user", ["root", "operator"])
def test_every_word_arrives_as_it_is(lab: Lab, reach: Reach, user: str) -> None:
    host = reach("src", ssh_user=user)
    script = 'for word; do printf "%s\\0" "$word"; done'
    assert host.script(script, *AWKWARD).split("\0")[:-1] == AWKWARD
    assert host.run("printf", r"%s\0", *AWKWARD).split("\0")[:-1] == AWKWARD
    assert host.work("printf", r"%s\1", *AWKWARD, stall=30).split("\1")[:-1] == AWKWARD
    assert lab["src"].run("test", "-e", "/root/oops", check=False).returncode == 1


def test_bytes_that_are_no_text_go_through_and_back(src: Host) -> None:
    name = src.run("printf", r"/tmp/\377\376 name")
    src.run("touch", name)
    assert src.run("find", "/tmp", "-name", "* name").rstrip("\n") == name
    src.run("rm", name)


@pytest.mark.parametrize("count", [0, 1, 5_000_000])
def test_standard_input_arrives_whole(src: Host, count: int) -> None:
    content = os.urandom(count)
    src.run("sh", "-c", "cat > /tmp/arrived", stdin=content)
    assert src.run("stat", "-c", "%s", "/tmp/arrived").strip() == str(count)
    assert src.run("sh", "-c", "cat /tmp/arrived; rm /tmp/arrived").encode("utf-8", "surrogateescape") == content


def test_a_command_that_does_not_read_its_input_does_not_hang(src: Host) -> None:
    with contextlib.suppress(HostError):  # either is right, as long as it ends
        src.run("sh", "-c", "exec <&-; exit 0", stdin=os.urandom(MANY), seconds=20)
    assert src.run("echo", "still there") == "still there\n"


def sleepers(lab: Lab, mark: str) -> list[list[str]]:
    """What runs on the source with this mark among its words."""
    return [words for words in processes(lab["src"]).values() if mark in " ".join(words)]


@pytest.mark.parametrize("words", [("sleep", "314"), ("sh", "-c", "trap '' TERM; sleep 314; sleep 314"), ("sh", "-c", "sleep 314 | cat"),
                                   ("timeout", "300", "sleep", "314")])
def test_a_long_command_that_stalls_is_given_up_and_gone_from_the_host_with_all_its_children(lab: Lab, src: Host, words: tuple[str, ...]) -> None:
    with pytest.raises(HostError, match="made no progress and was given up"):
        src.work(*words, stall=1)
    wait_for("the end of the stalled command", lambda: not sleepers(lab, "314"), 10)


def test_a_long_command_that_says_something_now_and_then_is_not_given_up(src: Host) -> None:
    heard: list[str] = []
    printed = src.work("sh", "-c", "for n in 1 2 3 4; do echo $n; sleep 0.8; done", stall=2.5, on_output=heard.append)
    assert (printed, "".join(heard), len(heard) > 1) == ("1\n2\n3\n4\n", "1\n2\n3\n4\n", True)


def test_a_short_command_that_hangs_is_given_up(lab: Lab, src: Host) -> None:
    with pytest.raises(HostError, match="made no progress and was given up"):
        src.run("sleep", "27.18", seconds=1)
    assert src.run("echo", "still there") == "still there\n"


def test_a_short_command_that_hangs_is_gone_when_it_is_given_up(lab: Lab, src: Host) -> None:
    with pytest.raises(HostError):
        src.run("sleep", "271.8", seconds=1)
    src.close()
    wait_for("the end of the hung command", lambda: not sleepers(lab, "271.8"), 10)


def test_a_lease_ends_with_its_scope(lab: Lab, src: Host) -> None:
    with src.lease(LEASED_COMMAND, "sleep", "1000") as lease:
        wait_for("the start", lambda: bool(sleepers(lab, "sleep 1000")))
        lease.check(is_running=True)
    assert ["sleep", "1000"] not in processes(lab["src"]).values()
    assert src.unconfirmed == []


HASTY = LEASED_COMMAND.replace("timeout 60", "timeout 2")  # gives a silent migrena 2 s instead of 60


def test_a_lease_is_held_by_the_dots(reach: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrena, "HEARTBEAT", 0.5)
    with reach("src").lease(HASTY, "sleep", "1000") as lease:
        time.sleep(5)
        lease.check(is_running=True)


def test_control_a_lease_ends_when_the_dots_do(lab: Lab, reach: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    assert HASTY != LEASED_COMMAND
    monkeypatch.setattr(migrena, "HEARTBEAT", 1000)
    with reach("src").lease(HASTY, "sleep", "1000"):
        wait_for("the start", lambda: ["sleep", "1000"] in processes(lab["src"]).values())
        wait_for("the end without dots", lambda: ["sleep", "1000"] not in processes(lab["src"]).values(), 20)


def test_all_leases_end_when_the_connection_is_closed(lab: Lab, src: Host) -> None:
    with src.lease(LEASED_COMMAND, "sleep", "1000"), src.private_folder("test") as folder:
        assert lab["src"].run("stat", "-c", "%a %u", folder).stdout == "700 0\n"
        src.close()
        wait_until_clean(lab["src"])
        assert lab["src"].run("test", "-e", folder, check=False).returncode == 1


def test_a_connection_that_takes_nothing_any_more_hides_no_error_when_a_lease_is_closed(lab: Lab, reach: Reach) -> None:
    before = dict(lab["src"].processes())
    host = reach("src")
    sshd = [pid for pid in dict(lab["src"].processes()) if pid not in before]
    transport = host._links[0][0].get_transport()
    assert sshd and transport
    try:
        with pytest.raises(HostError, match="the error that counts"), host.lease("read -r gone", "read"):
            host.unconfirmed.append("another one")  # so that the end of this one is not waited for long
            lab["src"].run("kill", "-STOP", *map(str, sshd))  # the host does not answer,
            transport.sock.shutdown(socket.SHUT_WR)  # and our side cannot send, but has not noticed that the connection is over
            raise HostError("the error that counts")
    finally:
        lab["src"].run("kill", "-CONT", *map(str, sshd))
    assert len(host.unconfirmed) == 2


@pytest.mark.parametrize("act", [
    lambda host: host.run("true"),
    lambda host: host.run("cat", stdin=b"word"),
    lambda host: host.run("true", stdin=b"nobody reads it"),
    lambda host: host.work("true", stall=30),
    lambda host: host.succeeds("false"),
    lambda host: host.daemon("/root/pid", "false").__enter__(),
], ids=["run", "fed", "not fed", "work", "failure", "daemon"])
def test_what_is_said_late_to_a_command_that_has_ended_does_not_end_the_connection(
        reach: Reach, monkeypatch: pytest.MonkeyPatch, act: Callable[[Host], object]) -> None:
    """sshd disconnects whoever speaks to a channel after its end: here our words take their time, as they do on a busy machine."""
    monkeypatch.setattr(migrena, "HEARTBEAT", 0.01)
    host = reach("src")
    transport = host._links[0][0].get_transport()
    assert transport
    send: Callable[[paramiko.Message], None] = transport._send_user_message  # type: ignore[attr-defined]

    def late(message: paramiko.Message) -> None:
        if message.asbytes()[:1] in (cMSG_CHANNEL_DATA, cMSG_CHANNEL_EOF):
            time.sleep(0.2)
        send(message)

    monkeypatch.setattr(transport, "_send_user_message", late)
    for _ in range(3):
        with contextlib.suppress(CommandError):
            act(host)
    assert transport.is_active() and host.run("echo", "here") == "here\n"


def test_a_connection_that_breaks_is_not_taken_for_a_command_that_failed(lab: Lab, reach: Reach) -> None:
    before = dict(lab["src"].processes())
    host = reach("src")
    sshd = [pid for pid in dict(lab["src"].processes()) if pid not in before]
    with pytest.raises(HostError, match="the SSH connection broke") as caught:
        host.succeeds("sh", "-c", f"kill {' '.join(map(str, sshd))}; sleep 10")
    assert not isinstance(caught.value, CommandError)


def test_a_daemon_that_ends_by_itself_is_noticed(lab: Lab, src: Host) -> None:
    script = 'echo $$ > "$1"; exec sleep 1000'
    with src.private_folder("test") as folder, src.lease(LEASED_DAEMON, "sh", "-c", script, "sh", f"{folder}/pid", given=(f"{folder}/pid",)) as lease:
        assert lease.line(20) == "ready"
        lab["src"].run("kill", "-9", lab["src"].run("cat", f"{folder}/pid").stdout.strip())
        with pytest.raises(CommandError):
            for _ in range(200):
                lease.check(is_running=True)
                time.sleep(0.1)


def test_a_daemon_that_does_not_start_says_why(src: Host) -> None:
    with src.private_folder("test") as folder, pytest.raises(CommandError, match="the port is cursed"), \
            src.lease(LEASED_DAEMON, "sh", "-c", "echo the port is cursed >&2; exit 3", given=(f"{folder}/pid",)) as lease:
        lease.line(20)


def test_a_daemon_that_hangs_before_it_serves_is_gone(lab: Lab, src: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was stopped hears of no gentler signal."""
    assert LEASED_DAEMON.count("-lt 1300 ") == 1
    monkeypatch.setattr(migrena, "LEASED_DAEMON", LEASED_DAEMON.replace("-lt 1300 ", "-lt 20 "))
    with pytest.raises(CommandError, match="did not serve"), src.daemon("/root/pid", "sh", "-c", "kill -STOP $$"):
        pass
    wait_for("its end", lambda: not processes(lab["src"]))


def test_a_stale_pid_file_is_not_taken_for_a_daemon(lab: Lab, src: Host) -> None:
    with src.private_folder("test") as folder:
        src.run("sh", "-c", f"echo 1 > {folder}/pid")
        with pytest.raises(CommandError), src.lease(LEASED_DAEMON, "false", given=(f"{folder}/pid",)) as lease:
            lease.line(20)


HOLDER = """
import io, sys, time
sys.path[:0] = sys.argv[1:3]
from hosts.rig import settings_for
from lab.hosts import Lab
import migrena
from migrena import LEASED_COMMAND, LEASED_DAEMON, Screen, connect
lab = Lab.recorded(sys.argv[3])
host = connect("src", settings_for(lab, ssh_user=sys.argv[4]), Screen(stream=io.StringIO()))
daemon = ("sh", "-c", 'echo $$ > "$1"; exec sleep 1002', "sh", "/run/test.pid")
with host.private_folder("test") as folder, host.lease(LEASED_COMMAND, "sleep", "1001"), \\
        host.lease(LEASED_DAEMON, *daemon, given=("/run/test.pid",)) as lease:
    lease.line(20)
    print("held", folder, flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("user", ["root", "operator"])
def test_every_lease_ends_when_its_holder_is_killed_outright(lab: Lab, settings: Settings, user: str) -> None:
    words = [sys.executable, "-c", HOLDER, str(REPOSITORY), str(Path(REPOSITORY, "tests")), lab.spec.tag, user]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        held, folder = holder.stdout.readline().split()
        assert held == "held"
        assert len(sleepers(lab, "sleep 100")) >= 2
        assert lab["src"].run("test", "-d", folder, check=False).returncode == 0
        holder.kill()
        wait_until_clean(lab["src"])
    lab["src"].run("rm", "-f", "/run/test.pid")
