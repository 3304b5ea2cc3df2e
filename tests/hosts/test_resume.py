"""A copy that was cut off goes on from what is proven to be there, after kill -9 or by itself; what changed meanwhile is found."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hosts.conftest import MakeCopy
from hosts.rig import Copy, Instance, MiB, base, processes, same_guest, wait_until_clean
from hosts.test_failures import flip, ours, signal_ours
from lab.hosts import Host as LabHost
from lab.hosts import Lab
from migrena import FinalError, HostError, read_run

Driver = Callable[..., "subprocess.Popen[str]"]
CHUNK = 4 * MiB
SLOW = 3 * MiB  # bytes per second
Pair = tuple[Instance, Instance]


@pytest.fixture(params=["file", "guest's view"])
def pair(request: pytest.FixtureRequest, lab: Lab) -> Pair:
    """An overlay with 26 MiB of a guest's, and a fresh one on an equal base or on another."""
    source = Instance.make(lab["src"]).overlay(base(lab["src"], "debian"), 64 * MiB)
    source.write("guest", (MiB, 12 * MiB), (36 * MiB, 14 * MiB))
    return source, Instance.make(lab["dst"]).overlay(base(lab["dst"], "debian" if request.param == "file" else "other"), 64 * MiB)


def journal(state: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a run's journal."""
    return [json.loads(line) for line in (state / f"{name}.jsonl").read_text().splitlines()]


def chunks_sent(state: Path, name: str) -> list[tuple[int, int]]:
    """The chunks that a run has said to have sent, however often."""
    return [(entry["offset"], entry["length"]) for entry in journal(state, name) if entry["event"] == "chunk"]


def killed_at_a_third(driver: Driver, state: Path, pair: Pair) -> str:
    """The name of a run that was killed outright in the middle of a chunk, two others having arrived."""
    process = driver(*pair, name="cut", limit_rate=SLOW)
    assert process.stdout and process.stderr
    for line in process.stdout:
        if int(line) >= 2 * CHUNK + MiB:
            process.kill()
            process.wait(60)
            assert len(chunks_sent(state, "cut")) == 2
            for host in (pair[0].host, pair[1].host):
                wait_until_clean(host)
            return "cut"
    raise AssertionError(process.stderr.read())


def gone_on(copy: Copy, name: str) -> Copy:
    """The same copy, as the run of this name."""
    copy.name = name
    return copy


def received(host: LabHost) -> int:
    """Bytes that a host has received so far."""
    return host.counters()[0]


def test_a_copy_that_was_killed_goes_on_and_sends_at_most_one_chunk_again(
        driver: Driver, make_copy: MakeCopy, tmp_path: Path, pair: Pair) -> None:
    before, whole = pair[0].sha256(), received(pair[1].host)
    name = killed_at_a_third(driver, tmp_path, pair)
    at_first = received(pair[1].host) - whole
    copy = gone_on(make_copy(), name)
    moved = copy(*pair)
    in_all = received(pair[1].host) - whole
    sent = chunks_sent(tmp_path, name)
    assert moved.digest and same_guest(*pair) and pair[0].sha256() == before
    assert len(sent) == len(set(sent))  # what was whole is not sent again, and the one that was cut had not been whole
    assert in_all < moved.held + CHUNK + 5 * MiB, (at_first, in_all, moved.held)


def test_control_a_copy_that_begins_anew_sends_more(driver: Driver, make_copy: MakeCopy, tmp_path: Path, overlays: Pair) -> None:
    began = received(overlays[1].host)
    killed_at_a_third(driver, tmp_path, overlays)
    moved = gone_on(make_copy(), "anew")(*overlays)
    assert received(overlays[1].host) - began > moved.held + 2 * CHUNK


@pytest.mark.parametrize("offset", [MiB + 700, 5 * MiB])
def test_a_byte_that_was_altered_while_nobody_ran_is_found_and_sent_again(
        driver: Driver, make_copy: MakeCopy, tmp_path: Path, pair: Pair, offset: int) -> None:
    name = killed_at_a_third(driver, tmp_path, pair)
    copy = gone_on(make_copy(), name)
    with copy.prepared(*pair) as (_, job):
        flip(pair[1].host, job, offset)
    copy(*pair)
    assert same_guest(*pair)


def test_a_new_file_that_lost_its_content_but_not_its_length_is_not_believed(
        driver: Driver, make_copy: MakeCopy, tmp_path: Path, overlays: Pair) -> None:
    name = killed_at_a_third(driver, tmp_path, overlays)
    copy = gone_on(make_copy(), name)
    with copy.prepared(*overlays) as (_, job):
        overlays[1].host.run("fallocate", "-p", "-o", "0", "-l", str(64 * MiB), job.new)
    copy(*overlays)
    assert same_guest(*overlays)


def test_a_new_file_that_is_gone_is_made_anew(driver: Driver, make_copy: MakeCopy, tmp_path: Path, pair: Pair) -> None:
    name = killed_at_a_third(driver, tmp_path, pair)
    copy = gone_on(make_copy(), name)
    with copy.prepared(*pair) as (_, job):
        pair[1].host.run("rm", job.new)
    copy(*pair)
    assert same_guest(*pair)


def test_a_source_that_changed_while_nobody_ran_is_refused(driver: Driver, make_copy: MakeCopy, tmp_path: Path, overlays: Pair) -> None:
    name = killed_at_a_third(driver, tmp_path, overlays)
    overlays[0].host.run("touch", overlays[0].path)
    with pytest.raises(FinalError, match="was changed"):
        gone_on(make_copy(retries=3), name)(*overlays)


def lives_through(copy: Copy, pair: Pair, throw: Callable[[], object]) -> int:
    """Copies, throws after the second chunk, and gives the number of further attempts; the copy must be right."""
    before, thrown = pair[0].sha256(), threading.Event()

    def check() -> None:
        if len(chunks_sent(copy.state, copy.name)) == 2 and not thrown.is_set():
            thrown.set()
            throw()

    moved = copy.arrive(*pair, check)
    assert moved.digest and pair[0].sha256() == before
    sent = chunks_sent(copy.state, copy.name)
    assert len(sent) <= len(set(sent)) + 1
    return read_run(copy.state, copy.name).retries


def test_control_nothing_is_tried_again_where_nothing_breaks(make_copy: MakeCopy, pair: Pair) -> None:
    assert lives_through(make_copy(retries=3), pair, lambda: None) == 0


def test_a_copy_lives_through_an_exporter_that_dies(make_copy: MakeCopy, pair: Pair) -> None:
    assert lives_through(make_copy(retries=3), pair, lambda: signal_ours(pair[0].host, "-9", "qemu-nbd", "-x")) == 1


def test_a_copy_lives_through_an_exporter_that_freezes(make_copy: MakeCopy, overlays: Pair) -> None:
    copy = make_copy(retries=3, stall_timeout=5)
    assert lives_through(copy, overlays, lambda: signal_ours(overlays[0].host, "-STOP", "qemu-nbd", "-x")) == 1


def test_a_copy_lives_through_a_reader_that_dies(make_copy: MakeCopy, pair: Pair) -> None:
    copy = make_copy(retries=3, limit_rate=4 * MiB)
    killed: list[int] = []

    def kill(done: int) -> None:
        if done > CHUNK and not killed:
            killed.extend(ours(pair[1].host, "qemu-img", "convert"))
            for pid in killed:
                pair[1].host.run("kill", "-9", str(pid))

    copy.progress = kill
    assert lives_through(copy, pair, lambda: None) == 1


def end_connections(host: LabHost) -> None:
    """Ends the sshd of every connection there is just now; the one that listens stays."""
    for pid, words in host.processes():
        if words[0].startswith("sshd:") and "listener" not in words[0]:
            host.run("kill", "-9", str(pid), check=False)


@pytest.mark.parametrize("name", ["src", "dst"])
def test_a_copy_lives_through_the_loss_of_an_ssh_connection(lab: Lab, make_copy: MakeCopy, pair: Pair, name: str) -> None:
    copy = make_copy(retries=3)
    assert lives_through(copy, pair, lambda: end_connections(lab[name])) == 1
    assert copy.source.unconfirmed == copy.destination.unconfirmed == []
    for host in lab:
        assert not [words for words in processes(host).values() if "nbd" in words[0]]


def test_when_the_attempts_are_used_up_the_copy_fails_with_the_last_error(make_copy: MakeCopy, overlays: Pair) -> None:
    copy, host = make_copy(retries=1, limit_rate=8 * MiB, chunk=64 * MiB), overlays[0].host  # one chunk
    overlays[0].write("guest", (24 * MiB, 32 * MiB))  # more than qemu-img reads ahead: the exporter dies in mid-copy, however late

    def kill(_done: int) -> None:  # before anything has arrived
        for pid in ours(host, "qemu-nbd", "-x"):
            host.run("kill", "-9", str(pid))

    copy.progress = kill
    with pytest.raises(HostError):
        copy.arrive(*overlays)
    assert [entry["attempt"] for entry in journal(copy.state, copy.name) if entry["event"] == "retry"] == [1]


def test_attempts_count_anew_when_something_has_arrived_since(make_copy: MakeCopy, overlays: Pair) -> None:
    copy, host, times = make_copy(retries=1, limit_rate=8 * MiB), overlays[0].host, iter(range(2))

    def check() -> None:  # after each chunk
        for pid in ours(host, "qemu-nbd", "-x") if next(times, None) is not None else ():
            host.run("kill", "-9", str(pid))

    assert copy.arrive(*overlays, check).digest
    assert [entry["attempt"] for entry in journal(copy.state, copy.name) if entry["event"] == "retry"] == [1, 1]


def test_a_flipped_byte_is_not_tried_again(make_copy: MakeCopy, overlays: Pair) -> None:
    copy = make_copy(retries=3)

    def check() -> None:
        if copy.job and len(chunks_sent(copy.state, copy.name)) == 1:
            flip(overlays[1].host, copy.job, 700)

    with pytest.raises(FinalError, match="the copy differs from the source"):
        copy.arrive(*overlays, check)
    assert read_run(copy.state, copy.name).retries == 0
