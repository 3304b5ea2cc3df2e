"""Disks that change, vanish or fill up under a copy, and bytes that change on the way: none of it gets into the place of a disk."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator

import pytest

from hosts.conftest import MakeCopy
from hosts.faults import Fault
from hosts.operators import is_complete
from hosts.rig import INSTANCES, Instance, MiB, base, running, same_guest, wait_for
from lab.hosts import Host, Lab
from migrena import FinalError, read_run
from unit.makers import UUID

PROXY_PORT = 7777
# Stands between the hypervisors: what is redirected to it goes on to where it was going. Its words are the port, and how many
# bytes from the source it lets pass before it changes one, which is none of NBD's own; without the second it changes none.
PROXY = """
import socket, sys, threading
left = [int(word) for word in sys.argv[2:]]

def carry(one, other, is_answer):
    while piece := one.recv(1 << 18):
        if is_answer and left:
            left[0] -= len(piece)
            if left[0] < 0 and len(piece) > 8192 and not any(magic in piece for magic in (b"\\x67\\x44\\x66\\x98", b"\\x66\\x8e\\x33\\xef")):
                left.clear()
                piece = piece[:4000] + bytes([piece[4000] ^ 1]) + piece[4001:]
        other.sendall(piece)
    other.shutdown(socket.SHUT_WR)

def serve(client):
    there = socket.socket()
    there.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 1)
    where = client.getsockopt(socket.SOL_IP, 80, 16)  # SO_ORIGINAL_DST
    there.connect((socket.inet_ntoa(where[4:8]), int.from_bytes(where[2:4], "big")))
    threading.Thread(target=carry, args=(client, there, False), daemon=True).start()
    carry(there, client, True)

listener = socket.create_server(("", int(sys.argv[1])))
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""


def cut_short(path: str) -> str:
    """The file loses its end."""
    return f"truncate -s -1M {path}"


def changed(path: str) -> str:
    """One byte that was copied long ago becomes another one."""
    return f"printf x | dd of={path} bs=1 seek=1500000 conv=notrunc status=none"


def replaced(path: str) -> str:
    """Another file takes its place, of the same content, owner and times."""
    return f"cp -a {path} {path}.other && mv {path}.other {path}"


@pytest.mark.parametrize("throw", [cut_short, changed, replaced])
def test_a_source_whose_file_does_not_stay_as_it_was_ends_the_run_at_once(fault: Fault, throw: Callable[[str], str]) -> None:
    process, source = fault.begin(), fault.operator.source
    source.host.run("sh", "-c", throw(source.path))
    fault.before = source.sha256()
    fault.end(process, 1, f"src: {source.path} was changed while it was being copied", "find out who has started the source")
    assert fault.chunks() < 6  # of 7: nobody waits for the end of a long copy to tell
    fault.is_undone()


def test_a_source_whose_file_is_deleted_ends_the_run_at_once_and_is_left_to_the_operator(fault: Fault) -> None:
    source = fault.operator.source
    source.host.run("ln", source.path, "/var/lib/nova/rescued")
    process = fault.begin()
    source.host.run("rm", source.path)
    fault.end(process, 4, f"src: {source.path} was deleted while it was being copied", f"left behind: start source {UUID} again did not succeed")
    assert fault.chunks() < 6 and fault.operator.made() == []
    source.host.run("ln", "/var/lib/nova/rescued", source.path)
    fault.rolls_back()


@pytest.mark.parametrize("status", ["ACTIVE", "SHUTOFF"])
def test_a_source_that_somebody_starts_ends_the_run_at_once_and_goes_on_running(fault: Fault, status: str) -> None:
    if status == "SHUTOFF":
        fault.operator.clouds[0].stop(UUID)
    process = fault.begin()
    fault.operator.clouds[0].start(UUID)
    said = fault.end(process, 1)
    assert "was changed while it was being copied" in said or "somebody started it" in said
    assert fault.chunks() < 6
    fault.is_undone()


@contextlib.contextmanager
def own_file_system(host: Host, size: str) -> Iterator[None]:
    """The instances of a host lie on a file system of their own."""
    host.run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", INSTANCES)
    try:
        base(host, "debian", path=f"{INSTANCES}/_base/debian")
        yield
    finally:
        host.run("umount", "-l", INSTANCES)


def test_a_destination_that_fills_up_fails_the_run_without_another_attempt(lab: Lab, fault: Fault) -> None:
    with own_file_system(lab["dst"], "250m"):
        process = fault.begin()
        lab["dst"].run("sh", "-c", f"head -c 1G /dev/zero > {INSTANCES}/filler", check=False)
        fault.end(process, 1, "No space left on device")
        fault.is_undone()
        assert read_run(fault.state, fault.journal.stem).retries == 0
        assert lab["dst"].run("ls", INSTANCES).stdout.split() == ["_base", "filler"]


def test_a_destination_that_turns_read_only_fails_the_run_without_another_attempt_and_can_be_undone(lab: Lab, fault: Fault) -> None:
    with own_file_system(lab["dst"], "250m"):
        process = fault.begin()
        turn = f"n=0; until mount -o remount,ro {INSTANCES} 2>/dev/null; do n=$((n + 1)); [ $n -lt 2000 ] || exit 1; sleep 0.01; done"
        lab["dst"].run("sh", "-c", turn)  # not while the file is open for writing
        fault.end(process, 4, "Read-only file system", "left behind: delete destination new did not succeed")
        assert read_run(fault.state, fault.journal.stem).retries == 0
        fault.is_left()
        lab["dst"].run("mount", "-o", "remount,rw", INSTANCES)
        fault.rolls_back()


@contextlib.contextmanager
def proxy(lab: Lab, *words: str) -> Iterator[Callable[[], int]]:
    """Somebody stands between the hypervisors; gives the number of connections that went through him."""
    host, match = lab["dst"], ("OUTPUT", "-p", "tcp", "-d", lab["src"].address, "--dport", "2666:2697", "-m", "mark", "!", "--mark", "1")
    turn = ("-j", "REDIRECT", "--to-ports", str(PROXY_PORT))

    def count() -> int:
        return int(host.run("iptables", "-w", "-t", "nat", "-L", "OUTPUT", "-vnx").stdout.splitlines()[2].split()[0])

    with running(host, "python3", "-c", PROXY, str(PROXY_PORT), *words):
        wait_for("the proxy", lambda: f":{PROXY_PORT} " in host.run("ss", "-Hltn").stdout)
        host.run("iptables", "-w", "-t", "nat", "-A", *match, *turn)
        try:
            yield count
        finally:
            host.run("iptables", "-w", "-t", "nat", "-D", *match, *turn)


def test_control_a_copy_through_a_proxy_that_changes_nothing_arrives(
        lab: Lab, make_copy: MakeCopy, overlays: tuple[Instance, Instance]) -> None:
    with proxy(lab) as passed:
        assert make_copy(tls=False)(*overlays).digest
        assert passed() >= 3
    assert same_guest(*overlays)


def test_a_byte_that_changes_on_the_way_is_caught_by_the_proof(lab: Lab, make_copy: MakeCopy, overlays: tuple[Instance, Instance]) -> None:
    fresh, copy = overlays[1].sha256(), make_copy(tls=False, retries=3)
    with proxy(lab, str(3 * MiB)), pytest.raises(FinalError, match="the copy differs from the source: 1 blocks of 1 MiB differ") as caught:
        copy(*overlays)
    assert "check disks and network of both hosts" in caught.value.reasons[0].way_out
    assert overlays[1].sha256() == fresh and read_run(copy.state, copy.name).retries == 0


def test_control_without_the_proof_it_goes_unnoticed(lab: Lab, make_copy: MakeCopy, overlays: tuple[Instance, Instance]) -> None:
    with proxy(lab, str(3 * MiB)):
        assert make_copy(tls=False, verify=False)(*overlays).digest == ""
    assert not same_guest(*overlays)


def test_with_tls_it_breaks_the_connection_and_the_chunk_is_sent_again(
        lab: Lab, make_copy: MakeCopy, overlays: tuple[Instance, Instance]) -> None:
    copy = make_copy(retries=3)
    with proxy(lab, str(3 * MiB)):
        assert copy(*overlays).digest
    assert same_guest(*overlays) and read_run(copy.state, copy.name).retries == 1


def test_somebody_else_s_nbd_server_on_our_port_is_left_alone_and_the_next_port_is_taken(lab: Lab, fault: Fault) -> None:
    host, theirs = lab["src"], "/var/lib/nova/theirs"
    host.run("sh", "-c", f"head -c 1M /dev/zero > {theirs}; printf '[generic]\\nport = 2666\\nallowlist = true\\n"
             f"[theirs]\\nexportname = {theirs}\\n' > {theirs}.conf")
    with running(host, "nbd-server", "-d", "-C", f"{theirs}.conf") as pid:
        wait_for("their server", lambda: ":2666 " in host.run("ss", "-Hltn").stdout)
        fault.call(0, "-s", UUID, "-d", "new")
        assert pid in dict(host.processes())
        assert "theirs" in host.run("nbd-client", "-l", "127.0.0.1", "-p", "2666", check=False).stdout
    is_complete(fault.operator, fault.journal.stem)


def test_of_two_runs_from_two_machines_at_once_one_goes_on_and_the_other_touches_nothing(fault: Fault) -> None:
    for number, name in enumerate(("one", "other")):
        state = str(fault.operator.folder / f"state{number}")
        fault.begun.append(fault.operator.begin("-s", UUID, "-d", name, "--json", MIGRENA_STATE_FOLDER=state, CLAIM_PAUSE="1.0"))
    ended = [(*process.communicate(timeout=200), process.returncode) for process in fault.begun]
    assert sorted(code for *_, code in ended) == [0, 3], ended
    winner = next(json.loads(out) for out, _, code in ended if code == 0)
    said = next(said for _, said, code in ended if code == 3)
    assert "has taken the source" in said or "is moving the source" in said, said
    (row,) = fault.operator.made()
    assert row["id"] == winner["destination"]["id"]
    assert (fault.operator.clouds[0].rows()[UUID]["metadata"], fault.operator.clouds[0].rows()[UUID]["locked"]) == ({}, False)
