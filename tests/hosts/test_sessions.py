"""Hosts whose sshd lets few sessions into a connection (MaxSessions), as hardened ones do: a further connection carries the others."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import migrena
from hosts.conftest import Reach
from hosts.operators import an_operator, is_complete
from hosts.rig import Copy, Instance, running, same_guest, wait_for
from lab.hosts import Lab
from migrena import LEASED_COMMAND, Host, HostEntry, HostError, Settings, known_runs

PORT = 2223


@contextlib.contextmanager
def few_sessions(lab: Lab, folder: Path, most: int, *names: str) -> Iterator[dict[str, object]]:
    """A further sshd on these hosts, which lets so many sessions into a connection; gives the settings that lead to it."""
    known = folder / "known"
    known.write_text(lab.known_hosts.read_text().replace("]:2222 ", f"]:{PORT} "))
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(running(lab[name], "/usr/sbin/sshd", "-D", "-p", str(PORT), "-o", f"MaxSessions={most}", "-o", "PidFile=none"))
            wait_for("the other sshd", lambda name=name: f":{PORT}" in lab[name].run("ss", "-Hltn").stdout)  # type: ignore[misc]
        yield {"hosts": {name: HostEntry(lab[name].address, PORT) for name in names}, "known_hosts": str(known)}


def connections(lab: Lab, name: str) -> int:
    """How many SSH connections a host has at that port."""
    return len(lab[name].run("ss", "-Htn", "state", "established", f"sport = :{PORT}").stdout.splitlines())


@pytest.mark.parametrize("far", [migrena.FAR, 0.0], ids=["near", "far"])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_leases_and_commands_go_over_as_many_connections_as_they_need(lab: Lab, reach: Reach, tmp_path: Path, most: int, far: float,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrena, "FAR", far)
    with few_sessions(lab, tmp_path, most, "src") as there:
        host = reach("src", **there)
        with contextlib.ExitStack() as stack:
            folders = [stack.enter_context(host.private_folder("test")) for _ in range(4)]
            leases = [stack.enter_context(host.lease(LEASED_COMMAND, "sleep", "1000")) for _ in range(2)]
            assert all(host.succeeds("test", "-d", folder) for folder in folders)
            assert [host.run("echo", "a") for _ in range(20)] == ["a\n"] * 20
            for lease in leases:
                lease.check(is_running=True)
            assert 7 / most <= connections(lab, "src") <= 7 / most + 2
            host.reconnect()  # all of them answer, and are kept
            for lease in leases:
                lease.check(is_running=True)
            host.end_work()
        host.confirm_all_ended()
        assert len(host._links) == connections(lab, "src") <= 9
        host.close()
        wait_for("the end of all connections", lambda: connections(lab, "src") == 0, 10)


@pytest.mark.long  # it counts what a busy machine's sshd frees late
def test_threads_that_are_refused_at_once_open_no_more_connections_than_they_need(lab: Lab, reach: Reach, tmp_path: Path) -> None:
    with few_sessions(lab, tmp_path, 1, "src") as there:
        host, barrier = reach("src", **there), threading.Barrier(6)

        def at_once(_: int) -> str:
            barrier.wait()
            return host.run("sh", "-c", "sleep 1; echo done")

        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(at_once, range(6))) == ["done\n"] * 6
        assert 2 <= connections(lab, "src") <= 8  # on a busy machine some have ended before others begin
        for _ in range(30):
            host.run("true")
        assert connections(lab, "src") <= 8


def test_a_host_that_lets_in_none_is_reported_with_the_setting(lab: Lab, reach: Reach, tmp_path: Path) -> None:
    with few_sessions(lab, tmp_path, 0, "src") as there:
        with pytest.raises(HostError, match="src: sshd accepts no command on connection 1") as caught:
            reach("src", **there)
        assert "MaxSessions in its sshd_config" in caught.value.reasons[0].way_out
        wait_for("the end of all connections", lambda: connections(lab, "src") == 0, 10)


def test_there_is_an_end_to_further_connections(lab: Lab, reach: Reach, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrena, "MAX_CONNECTIONS", 2)
    with few_sessions(lab, tmp_path, 1, "src") as there:
        host = reach("src", **there)
        with host.private_folder("test"), host.private_folder("test"), pytest.raises(HostError, match="no command on connection 3"):
            host.run("true")
        assert connections(lab, "src") == 2


def test_a_connection_of_several_that_is_cut_is_noticed_and_all_are_opened_anew(lab: Lab, reach: Reach, tmp_path: Path) -> None:
    with few_sessions(lab, tmp_path, 1, "src") as there:
        host = reach("src", **there)
        with pytest.raises(HostError), host.private_folder("test") as folder:
            assert host.succeeds("test", "-d", folder)
            for client, carried in host._links:
                if not any(not channel.closed for channel in carried):
                    transport = client.get_transport()
                    assert transport
                    transport.close()
            host.run("true")
        host.reconnect()
        assert len(host._links) == 1 and host.run("echo", "back") == "back\n"
        wait_for("the end of the old ones", lambda: connections(lab, "src") == len(host._links) <= 2, 10)


def test_control_one_connection_carries_a_whole_copy_where_sshd_lets_it(src: Host, dst: Host, settings: Settings, tmp_path: Path,
                                                                       overlays: tuple[Instance, Instance]) -> None:
    Copy(src, dst, settings, tmp_path)(*overlays)
    assert len(src._links) == len(dst._links) == 1


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_whole_copy_arrives(lab: Lab, tmp_path: Path, most: int) -> None:
    with few_sessions(lab, tmp_path, most, "src", "dst") as there:
        rows = {name: {"address": lab[name].address, "port": PORT} for name in ("src", "dst")}
        operator = an_operator(lab, tmp_path, HOSTS=rows, KNOWN_HOSTS=there["known_hosts"], RETRIES=0)
        done = operator.run("-s", operator.id, "-d", "new")
        assert done.returncode == 0, done.stderr
        (run,) = known_runs(tmp_path / "state")
        is_complete(operator, run)
        (made,) = operator.made()
        assert same_guest(operator.source, Instance(lab["dst"], f"/var/lib/nova/instances/{made['id']}/disk", "qcow2"))
        assert "attempt" not in done.stderr


def test_a_distant_host_is_asked_little_and_has_the_next_command_s_channel_opened_ahead(lab: Lab, tmp_path: Path) -> None:
    config = tmp_path / "ssh_config"
    config.write_text(f"Host *\n  ProxyCommand {sys.executable} {Path(__file__).with_name('delay.py')} %h %p 0.05\n")
    operator = an_operator(lab, tmp_path, CHUNK="1G", SSH_CONFIG=str(config))
    done = operator.copy("--json")
    assert done.returncode == 0, done.stderr
    is_complete(operator, known_runs(operator.folder / "state")[0])
    assert max(json.loads(done.stdout)["ssh_commands"].values()) <= 40


def test_a_channel_that_was_opened_ahead_is_of_the_connections_that_there_are(lab: Lab, reach: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrena, "FAR", 0.0)
    host = reach("src")
    assert [host.run("echo", "a") for _ in range(5)] == ["a\n"] * 5
    wait_for("a channel ahead", lambda: bool(host._ahead))
    ready = [channel for _, channel in host._ahead]
    assert host.run("echo", "b") == "b\n" and ready[0] not in [channel for _, channel in host._ahead]
    host.unconfirmed.append("so that the connections are opened anew")
    host.reconnect()
    assert host.run("echo", "c") == "c\n" and not {id(channel) for channel in ready} & {id(channel) for _, channel in host._ahead}
