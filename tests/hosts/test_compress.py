"""A slow wire carries the disk deflated: fewer bytes cross it, and all that holds for a copy holds for this one."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from bench import wire
from hosts.conftest import MakeCopy
from hosts.operators import Operator, is_complete
from hosts.rig import Instance, MiB, processes
from hosts.test_copy import a_raw_disk, an_overlay, arrives
from lab.hosts import Lab
from migrena import DiskJob, Ends, Export, Node, exported

TEXT = 'seq 1 9999999 | head -c "$2" | dd of="$1" bs=1M conv=notrunc status=none'  # numbers: a third of them is left by zlib


@pytest.fixture
def text(lab: Lab) -> tuple[Instance, Instance]:
    """A raw disk with 24 MiB of text, and a fresh one."""
    source, fresh = (a_raw_disk()(lab[name]) for name in ("src", "dst"))
    lab["src"].run("sh", "-c", TEXT, "sh", source.path, str(24 * MiB))
    return source, fresh


@pytest.mark.parametrize("tls", [True, False])
def test_what_can_be_deflated_crosses_the_wire_deflated(text: tuple[Instance, Instance], make_copy: MakeCopy, tls: bool) -> None:
    copy = make_copy(compress="on", tls=tls)
    before = text[1].host.counters()[0]
    moved = arrives(copy, *text)
    assert text[0].sha256() == text[1].sha256() and moved.digest
    assert copy.sent <= text[1].host.counters()[0] - before < 12 * MiB < moved.held
    assert (copy.report.copy["transport"], copy.report.copy["compressed"]) == ("qemu", True)


def test_control_without_it_all_of_it_crosses_the_wire(text: tuple[Instance, Instance], make_copy: MakeCopy) -> None:
    copy = make_copy(compress="off")
    arrives(copy, *text)
    assert copy.sent > 24 * MiB


def test_what_cannot_be_deflated_crosses_the_wire_as_it_is(overlays: tuple[Instance, Instance], make_copy: MakeCopy) -> None:
    copy = make_copy(compress="on")
    moved = arrives(copy, *overlays)
    assert 9 * MiB < copy.sent < moved.held * 11 // 10


@pytest.mark.parametrize(("seed", "size"), [("other", 64 * MiB), ("debian", 64 * MiB + 512)])
def test_the_guest_s_view_and_odd_sizes_arrive_too(lab: Lab, make_copy: MakeCopy, seed: str, size: int) -> None:
    source, fresh = an_overlay(size)(lab["src"]), an_overlay(size, seed)(lab["dst"])
    source.write("guest", (0, MiB), (size - 512, 512)).lengthen(77)
    arrives(make_copy(compress="on"), source, fresh)


@pytest.mark.parametrize("mark", ["serve", "fetch", "disk.sock"])
def test_one_of_its_programs_that_dies_costs_an_attempt_and_no_more(
        text: tuple[Instance, Instance], make_copy: MakeCopy, mark: str) -> None:
    killed: list[str] = []

    def kill(done: int) -> None:
        for host in () if killed else (text[0].host, text[1].host):
            for pid, words in processes(host).items():
                if words[0] != "sh" and any(word.endswith(mark) for word in words) and not any("flock" in word for word in words):
                    killed.append(" ".join(words))
                    host.run("kill", "-9", str(pid))

    copy = make_copy(compress="on", retries=3)
    copy.progress = kill
    arrives(copy, *text)
    assert killed and text[0].sha256() == text[1].sha256()


# A client that has no certificate, or that speaks in clear: ADDRESS PORT tls|clear. Prints how many bytes of the disk it was given.
STRANGER = """
import socket, ssl, sys
address, port, how = sys.argv[1:]
try:
    link = socket.create_connection((address, int(port)), 5)
    if how == "tls":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        link = context.wrap_socket(link)
    print(len(link.recv(1024)))
except OSError:
    print(0)
"""


@pytest.fixture(params=[True, False], ids=["tls", "clear"])
def served(request: pytest.FixtureRequest, text: tuple[Instance, Instance], make_copy: MakeCopy) -> Iterator[tuple[Ends, DiskJob, Export]]:
    """A disk that is served deflated."""
    with make_copy(compress="on", tls=request.param).prepared(*text) as (ends, job), exported(ends, job, Node.of_file(text[0].path)) as (export, _):
        yield ends, job, export


@pytest.mark.parametrize("how", ["tls", "clear"])
def test_nobody_but_the_destination_is_given_a_byte(lab: Lab, served: tuple[Ends, DiskJob, Export], how: str) -> None:
    _, job, export = served
    for name in ("third", "dst") if job.settings.tls else ("third",):
        assert lab[name].run("python3", "-c", STRANGER, export.address, str(export.port), how).stdout == "0\n"


def test_control_in_clear_the_destination_is_spoken_to(lab: Lab, served: tuple[Ends, DiskJob, Export]) -> None:
    _, job, export = served
    if not job.settings.tls:
        assert lab["dst"].run("python3", "-c", STRANGER, export.address, str(export.port), "clear").stdout != "0\n"


@pytest.fixture
def narrow(lab: Lab) -> Iterator[None]:
    """A wire of 20 Mbit/s."""
    wire.shape(lab, 20_000_000)
    yield
    wire.shape(lab, 0)


@pytest.mark.usefixtures("narrow")
def test_a_slow_wire_is_noticed_and_what_crosses_it_deflated(operator: Operator) -> None:
    operator.source.host.run("sh", "-c", TEXT + '; qemu-io -f qcow2 -c "write -q -s $1 40M 8M" "$3"; rm "$1"', "sh", "/root/text",
                             str(8 * MiB), operator.source.path)
    done = operator.copy("--json", "--compress", "auto")
    assert done.returncode == 0, done.stderr
    copy = json.loads(done.stdout)["copy"]
    assert (copy["transport"], copy["compressed"]) == ("qemu", True) and copy["sent"] < copy["bytes"]
    assert "/s: compression is on." in done.stderr
    is_complete(operator, operator.state()[0][0])
