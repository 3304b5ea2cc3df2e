"""SSH as people have it: another user with sudo, port, key, agent, ~/.ssh/config with ProxyJump; and known_hosts is checked."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paramiko
import pytest

import migrena
from hosts.conftest import Reach
from hosts.rig import running, wait_for
from lab.hosts import Lab
from migrena import Host, HostEntry, HostError, Reason, UsageError


def refusal(caught: pytest.ExceptionInfo[HostError]) -> Reason:
    """The one reason."""
    (reason,) = caught.value.reasons
    return reason


def who(host: Host) -> str:
    """Where its commands run, and as whom."""
    return host.run("sh", "-c", "echo $(id -un)@$(hostname)").strip()


def key(path: Path, phrase: str = "", kind: str = "ed25519") -> Path:
    """A new private key."""
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", phrase, "-C", "test", "-f", str(path)], check=True)
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without keys, and no agent."""
    folder = tmp_path / "home"
    (folder / ".ssh").mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return folder


def test_control_a_host_is_reached_by_nova_s_name_for_it(src: Host) -> None:
    assert who(src) == "root@src"


def test_a_name_that_does_not_resolve_is_reported_with_the_line_for_config(reach: Reach) -> None:
    with pytest.raises(HostError, match=r"cmp9: cmp9 does not resolve") as caught:
        reach("cmp9", hosts={})
    assert refusal(caught).way_out == "add HOSTS = {'cmp9': 'ADDRESS'} to config.py"


def test_a_port_that_nobody_listens_on_is_reported(lab: Lab, reach: Reach) -> None:
    with pytest.raises(HostError, match=f"src: no SSH connection to {lab['src'].address} port 1: ") as caught:
        reach("src", hosts={"src": HostEntry(lab["src"].address, port=1)})
    assert "HOSTS" in refusal(caught).way_out


def test_a_port_where_something_else_listens_is_reported(lab: Lab, reach: Reach) -> None:
    with running(lab["src"], "python3", "-m", "http.server", "8080"):
        wait_for("the web server", lambda: ":8080" in lab["src"].run("ss", "-Hltn").stdout)
        with pytest.raises(HostError, match="no SSH connection"):
            reach("src", hosts={"src": HostEntry(lab["src"].address, port=8080)})


def test_a_connection_that_sshd_drops_because_too_many_come_at_once_is_tried_again(
        lab: Lab, reach: Reach, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dials, once, place = [], migrena.dial_once, (lab["src"].address, 2223)
    (tmp_path / "known").write_text(lab.known_hosts.read_text().replace("]:2222 ", "]:2223 "))
    other = {"hosts": {"src": HostEntry(*place)}, "known_hosts": str(tmp_path / "known")}

    def dial_once(target: Any) -> Any:
        dials.append(target)
        if len(dials) == 3:
            stranger.close()
        return once(target)

    monkeypatch.setattr(migrena, "dial_once", dial_once)
    with running(lab["src"], "/usr/sbin/sshd", "-D", "-p", "2223", "-o", "MaxStartups=1", "-o", "PidFile=none"):
        wait_for("the other sshd", lambda: ":2223" in lab["src"].run("ss", "-Hltn").stdout)
        with socket.create_connection(place, 10) as stranger:
            assert who(reach("src", **other)) == "root@src"
        assert len(dials) >= 3
        monkeypatch.setattr(migrena, "DIAL_LIMIT", 0)
        with socket.create_connection(place, 10) as stranger, pytest.raises(HostError, match=r"SSH protocol banner|Connection reset"):
            reach("src", **other)  # the control


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_a_key_that_the_host_does_not_know_is_refused(reach: Reach, tmp_path: Path, home: Path, kind: str) -> None:
    with pytest.raises(HostError, match=r"src: .* refuses the key of user root: Authentication failed\.$") as caught:
        reach("src", ssh_key=str(key(tmp_path / "stranger", kind=kind)))
    assert "SSH_USER" in refusal(caught).way_out and "agent" in refusal(caught).way_out


def test_a_key_file_that_is_missing_is_reported(reach: Reach, tmp_path: Path, home: Path) -> None:
    with pytest.raises(HostError, match="nowhere"):
        reach("src", ssh_key=str(tmp_path / "nowhere"))


def test_a_key_file_that_is_not_a_key_is_reported(reach: Reach, tmp_path: Path, home: Path) -> None:
    (tmp_path / "note").write_text("this is no key\n")
    with pytest.raises(HostError, match="src: "):
        reach("src", ssh_key=str(tmp_path / "note"))


@pytest.fixture
def old(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Settings with an RSA key, which lead to an sshd as before OpenSSH 7.2: without rsa-sha2 and server-sig-algs."""
    rsa, known, keys = key(tmp_path / "rsa", kind="rsa"), tmp_path / "known", "/var/lib/nova/old-keys"
    known.write_text(lab.known_hosts.read_text().replace("]:2222 ", "]:2223 "))
    public = "".join(one.with_suffix(".pub").read_text() for one in (rsa, lab.key))
    lab["src"].run("sh", "-c", f"cat > {keys}", input=public)
    told = property(lambda _: {}, lambda *_: None)  # today's sshd tells server-sig-algs, whatever it takes
    monkeypatch.setattr(paramiko.Transport, "server_extensions", told, raising=False)
    options = (
        f"AuthorizedKeysFile={keys}", "StrictModes=no", "PidFile=none", "PubkeyAcceptedAlgorithms=ssh-rsa,ssh-ed25519",
    )
    with running(lab["src"], "/usr/sbin/sshd", "-D", "-p", "2223", *(f"-o{option}" for option in options)):
        wait_for("the old sshd", lambda: ":2223" in lab["src"].run("ss", "-Hltn").stdout)
        there = HostEntry(lab["src"].address, port=2223)
        yield {"hosts": {"src": there}, "known_hosts": str(known), "ssh_key": str(rsa)}


def test_hazard_25_an_rsa_key_at_an_sshd_without_rsa_sha2_works_or_is_reported_to_be_that(
        lab: Lab, reach: Reach, home: Path, old: dict[str, Any]) -> None:
    assert who(reach("src", **{**old, "ssh_key": str(lab.key)})) == "root@src"  # the way out
    if "ssh-rsa" in paramiko.RSAKey.HASHES:  # until paramiko 5
        assert who(reach("src", **old)) == "root@src"
        return
    with pytest.raises(HostError, match=r"2223 refuses the RSA key of user root: its sshd knows no rsa-sha2") as caught:
        reach("src", **old)
    assert refusal(caught).way_out.startswith("name an ed25519 key ")


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa"])
def test_hazard_25_another_key_that_such_an_sshd_does_not_know_is_not_told_to_be_that(
        reach: Reach, home: Path, tmp_path: Path, old: dict[str, Any], kind: str) -> None:
    with pytest.raises(HostError, match=r"refuses the key of user root: Authentication failed\.$"):
        reach("src", **{**old, "ssh_key": str(key(tmp_path / "stranger", kind=kind))})


def test_hazard_25_an_rsa_key_is_tried_once_where_rsa_sha2_is_known(
        lab: Lab, reach: Reach, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dials, opened = list[str](), migrena.Target.open

    def counted(self: migrena.Target, stack: contextlib.ExitStack) -> paramiko.SSHClient:
        dials.append(str(self))
        return opened(self, stack)

    monkeypatch.setattr(migrena.Target, "open", counted)
    with pytest.raises(HostError, match=r"refuses the key of user root: Authentication failed\.$"):
        reach("src", ssh_key=str(key(tmp_path / "stranger", kind="rsa")))
    assert len(dials) == 1


@pytest.mark.parametrize("port", [22, 2222])
def test_hazard_an_unknown_host_key_is_accepted_in_place_of_told_with_the_command(lab: Lab, reach: Reach, tmp_path: Path, port: int) -> None:
    known, there = tmp_path / "known hosts", {"src": HostEntry(lab["src"].address, port=port)}
    with pytest.raises(HostError, match=r"the host key .* is not known") as caught:
        reach("src", known_hosts=str(known), hosts=there)
    assert not known.exists()
    fingerprint = subprocess.run(["ssh-keygen", "-lf", lab["src"].spec.folder / "hostkey-src.pub"], check=True, capture_output=True, text=True).stdout
    assert fingerprint.split()[1] in refusal(caught).problem
    told = refusal(caught).way_out.partition("then: ")[2]
    assert told.startswith("ssh-keyscan ")
    subprocess.run(["sh", "-c", told], check=True, capture_output=True)
    assert who(reach("src", known_hosts=str(known), hosts=there)) == "root@src"


def test_a_host_key_that_has_changed_is_refused_and_the_command_that_is_named_forgets_the_old_one(
        lab: Lab, reach: Reach, tmp_path: Path) -> None:
    stranger, known = key(tmp_path / "stranger").with_suffix(".pub").read_text(), tmp_path / "known hosts"
    known.write_text(f"{lab['src'].address} {stranger}")
    with pytest.raises(HostError, match="has changed") as caught:
        reach("src", known_hosts=str(known))
    told = refusal(caught).way_out.partition(": ")[2]
    subprocess.run(["sh", "-c", told], check=True, capture_output=True)
    assert lab["src"].address not in known.read_text()


def test_hosts_gives_address_port_and_user(lab: Lab, reach: Reach) -> None:
    host = reach("cmp-a1.example", hosts={"cmp-a1.example": HostEntry(lab["third"].address, 2222, "operator", str(lab.key))}, ssh_key="")
    assert who(host) == "root@third"
    assert host.run("sh", "-c", 'echo "$SUDO_USER"').strip() == "operator"


def test_a_user_with_sudo_becomes_root_and_is_left_alone_where_that_is_not_wanted(reach: Reach) -> None:
    assert who(reach("src", ssh_user="operator")) == "root@src"
    assert who(reach("src", ssh_user="operator", sudo="no")) == "operator@src"
    assert who(reach("src", ssh_user="root", sudo="yes")) == "root@src"


def test_a_user_without_sudo_is_refused_with_the_line_for_sudoers(lab: Lab, reach: Reach) -> None:
    with pytest.raises(HostError, match="src: user nosudo has no passwordless sudo") as caught:
        reach("src", ssh_user="nosudo")
    line = refusal(caught).way_out.partition(": ")[2]
    assert line == "nosudo ALL=(root) NOPASSWD: ALL"
    lab["src"].run("sh", "-c", "umask 337; cat > /etc/sudoers.d/test", input=f"{line}\n")
    try:
        assert who(reach("src", ssh_user="nosudo")) == "root@src"
    finally:
        lab["src"].run("rm", "/etc/sudoers.d/test")


def test_where_the_other_hypervisor_reaches_a_host(lab: Lab, reach: Reach) -> None:
    assert reach("src").nbd_address == lab["src"].address
    assert reach("src", ssh_user="operator").nbd_address == lab["src"].address
    assert reach("src", hosts={"src": HostEntry(lab["src"].address, nbd_address="198.51.100.7")}).nbd_address == "198.51.100.7"


def ssh_config(home: Path, text: str) -> str:
    """The path of an OpenSSH client configuration."""
    path = home / ".ssh/config"
    path.write_text(text)
    return str(path)


def test_ssh_config_is_honoured(lab: Lab, reach: Reach, home: Path) -> None:
    path = ssh_config(home, f"""
Host cmp-*
  HostName {lab['third'].address}
  Port 2222
  User operator
  IdentityFile {lab.key}
  UserKnownHostsFile {lab.known_hosts}
""")
    host = reach("cmp-a1", hosts={}, ssh_key="", known_hosts="", ssh_config=path)
    assert who(host) == "root@third"
    assert host.run("sh", "-c", 'echo "$SUDO_USER"').strip() == "operator"
    assert host.run("printenv", "SUDO_COMMAND").strip().endswith("printenv SUDO_COMMAND")


def test_what_hosts_and_settings_say_wins_over_ssh_config(lab: Lab, reach: Reach, home: Path) -> None:
    path = ssh_config(home, "Host *\n  User nobody\n  Port 1\n  IdentityFile /nowhere\n")
    there = {"cmp-a1": HostEntry(lab["src"].address, port=22, user="root", key=str(lab.key))}
    assert who(reach("cmp-a1", hosts=there, ssh_key="", ssh_config=path)) == "root@src"
    assert who(reach("cmp-a1", hosts={"cmp-a1": HostEntry(lab["src"].address)}, ssh_user="root", ssh_port=2222, ssh_config=path)) == "root@src"


@pytest.mark.parametrize("text", ["Host\n", "Port 22 = 3\nMatch nonsense\n"])
def test_an_ssh_config_that_cannot_be_read_is_reported(reach: Reach, home: Path, text: str) -> None:
    path = ssh_config(home, text)
    with pytest.raises((UsageError, HostError), match=re.escape(path)):
        reach("src", ssh_config=path)


@pytest.fixture
def behind(lab: Lab) -> Iterator[str]:
    """An address of src that this machine has no way to, while third has."""
    address = f"10.99.{lab['src'].address.split('.')[2]}.1"
    lab["src"].run("ip", "addr", "add", f"{address}/32", "dev", "lo")
    lab["third"].run("ip", "route", "add", address, "via", lab["src"].address)
    subprocess.run(["ip", "route", "replace", "unreachable", f"{address}/32"], check=True)
    yield address
    subprocess.run(["ip", "route", "del", "unreachable", f"{address}/32"], check=True)
    lab["third"].run("ip", "route", "del", address)
    lab["src"].run("ip", "addr", "del", f"{address}/32", "dev", "lo")


@pytest.fixture
def known_behind(lab: Lab, behind: str, tmp_path: Path) -> str:
    """A known_hosts that has the host key of src under the address behind, too."""
    public = (lab["src"].spec.folder / "hostkey-src.pub").read_text()
    path = tmp_path / "known"
    path.write_text(lab.known_hosts.read_text() + f"{behind} {public}")
    return str(path)


@pytest.mark.parametrize("jump", ["gate", "operator@{third}:2222", "{dst},gate"])
def test_a_host_is_reached_through_a_jump_host(lab: Lab, reach: Reach, home: Path, behind: str, known_behind: str, jump: str) -> None:
    path = ssh_config(home, f"""
Host gate
  HostName {lab['third'].address}
  User nosudo
Host cmp-a1
  HostName {behind}
  ProxyJump {jump.format(third=lab['third'].address, dst=lab['dst'].address)}
Host *
  User root
  IdentityFile {lab.key}
  UserKnownHostsFile {known_behind}
""")
    host = reach("cmp-a1", hosts={}, ssh_key="", known_hosts=known_behind, ssh_config=path)
    assert who(host) == "root@src"
    assert host.run("printenv", "SSH_CONNECTION").split()[::2][0] == lab["third"].address
    assert host.nbd_address == behind
    with host.private_folder("test") as folder:
        assert host.succeeds("test", "-d", folder)


@pytest.mark.parametrize("text", ["Host a\n  ProxyJump root@b:22\nHost b\n  ProxyJump ssh://a\n", "Host *\n  ProxyJump a\n"], ids=["two", "one"])
def test_jump_hosts_that_go_in_a_circle_are_refused_before_ssh_starts_itself_for_ever(reach: Reach, home: Path, text: str) -> None:
    with pytest.raises(UsageError, match="ProxyJump is circular: "):
        reach("a", hosts={}, ssh_config=ssh_config(home, text))


def test_control_without_the_jump_there_is_no_way(reach: Reach, behind: str, known_behind: str) -> None:
    with pytest.raises(HostError, match="no SSH connection"):
        reach("cmp-a1", hosts={"cmp-a1": HostEntry(behind)}, known_hosts=known_behind)


def test_a_host_is_reached_through_a_proxy_command(lab: Lab, reach: Reach, home: Path, behind: str, known_behind: str) -> None:
    gate = ["ssh", "-F", "none", "-i", str(lab.key), "-o", f"UserKnownHostsFile={lab.known_hosts}", "-W", "%h:%p", f"root@{lab['third'].address}"]
    path = ssh_config(home, f"Host cmp-a1\n  HostName {behind}\n  ProxyCommand {shlex.join(gate)}\n")
    assert who(reach("cmp-a1", hosts={}, known_hosts=known_behind, ssh_config=path)) == "root@src"


@pytest.mark.parametrize(("jump", "known", "told"), [("root", "/dev/null", "[Hh]ost key"), ("nobody", "", "[Pp]ermission denied")])
def test_a_jump_host_that_does_not_let_us_through_is_reported_with_its_words(
        lab: Lab, reach: Reach, home: Path, behind: str, known_behind: str, jump: str, known: str, told: str) -> None:
    path = ssh_config(home, f"""
Host cmp-a1
  HostName {behind}
  ProxyJump {jump}@{lab['third'].address}
Host *
  IdentityFile {lab.key}
  UserKnownHostsFile {known or known_behind}
""")
    before = children()
    with pytest.raises(HostError, match=told):
        reach("cmp-a1", hosts={}, known_hosts=known_behind, ssh_config=path)
    assert children() == before


def children() -> list[str]:
    """The programs that this process has started and not yet waited for."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") or f"zombie {pid}" for pid in pids]


def test_no_process_stays_here_when_a_connection_through_a_jump_host_is_closed(
        lab: Lab, reach: Reach, home: Path, behind: str, known_behind: str) -> None:
    path = ssh_config(home, f"""
Host cmp-a1
  HostName {behind}
  ProxyJump root@{lab['third'].address}
Host *
  IdentityFile {lab.key}
  UserKnownHostsFile {known_behind}
""")
    before = children()
    host = reach("cmp-a1", hosts={}, known_hosts=known_behind, ssh_config=path)
    assert len(children()) == len(before) + 1
    host.close()
    wait_for("the end of the proxy", lambda: children() == before, 10)


@pytest.fixture
def agent(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A real ssh-agent without keys, and the socket it listens on."""
    socket = home / "agent"
    with subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
        yield socket
        process.terminate()


def test_a_key_in_the_agent_opens_the_host(lab: Lab, reach: Reach, agent: Path) -> None:
    with pytest.raises(HostError) as caught:
        reach("src", ssh_key="")
    assert "agent" in refusal(caught).way_out
    subprocess.run(["ssh-add", "-q", str(lab.key)], check=True, env={**os.environ, "SSH_AUTH_SOCK": str(agent)})
    assert who(reach("src", ssh_key="")) == "root@src"


def test_an_encrypted_key_without_an_agent_is_reported(lab: Lab, reach: Reach, home: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.write_bytes(lab.key.read_bytes())
    locked.chmod(0o600)
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret phrase", "-f", str(locked)], check=True)
    with pytest.raises(HostError, match="src: ") as caught:
        reach("src", ssh_key=str(locked))
    assert "agent" in refusal(caught).way_out


def test_the_usual_key_file_is_found(lab: Lab, reach: Reach, home: Path) -> None:
    usual = home / ".ssh/id_ed25519"
    usual.write_bytes(lab.key.read_bytes())
    usual.chmod(0o600)
    assert who(reach("src", ssh_key="")) == "root@src"


def test_the_usual_known_hosts_is_found(lab: Lab, reach: Reach, home: Path) -> None:
    (home / ".ssh/known_hosts").write_bytes(lab.known_hosts.read_bytes())
    assert who(reach("src", known_hosts="")) == "root@src"


def test_hashed_known_hosts_are_understood(lab: Lab, reach: Reach, tmp_path: Path) -> None:
    known = tmp_path / "known"
    known.write_bytes(lab.known_hosts.read_bytes())
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(known)], check=True, capture_output=True)
    assert lab["src"].address not in known.read_text()
    assert who(reach("src", known_hosts=str(known))) == "root@src"
