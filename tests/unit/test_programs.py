"""What is sent to hypervisors to be run there: whole, old enough, and telling an error as an error."""

from __future__ import annotations

import ast
import asyncio
import builtins
import errno
import gc
import hashlib
import json
import os
import random
import socket
import struct
import subprocess
import symtable
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import migrena
from conftest import SCRIPT
from migrena import (
    DEFLATED,
    PYTHON,
    DiskFile,
    ExportClient,
    MiB,
    NewFile,
    Pace,
    bring,
    contained,
    deflated,
    filter_of,
    inflated,
    joined,
    listen,
    parts_of_programs,
    program,
    runs_of,
    squeeze,
    tell_digests,
    work_on_blocks,
)
from unit.test_house_rules import scopes


def sent(text: str) -> list[str]:
    """The functions that are sent as programs."""
    calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    return sorted({ast.unparse(call.args[0]) for call in calls if ast.unparse(call.func) == "program"})


NAMES = sent(SCRIPT.read_text(encoding="utf-8"))
each_program = pytest.mark.parametrize("text", [program(getattr(migrena, name)) for name in NAMES], ids=NAMES)


def test_the_programs_that_are_sent_are_found() -> None:
    assert [entry.__name__ for entry in (contained, listen, squeeze, work_on_blocks)] == NAMES


def undefined(text: str) -> set[str]:
    """The names that a program uses and nobody defines."""
    whole = symtable.symtable(text, "program", "exec")
    defined = {symbol.get_name() for symbol in whole.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    used = {symbol.get_name() for scope in (whole, *scopes(whole)) for symbol in scope.get_symbols()
            if symbol.is_referenced() and (scope is whole or symbol.is_global())}
    return used - defined - set(dir(builtins))


def imported(text: str) -> set[str]:
    """The modules that a program imports, wherever."""
    nodes = list(ast.walk(ast.parse(text)))
    names = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    return {name.partition(".")[0] for name in names}


@each_program
def test_a_program_has_all_that_it_uses_and_the_standard_library_alone(text: str) -> None:
    assert undefined(text) == set()
    assert imported(text) <= sys.stdlib_module_names
    assert text.isascii()  # whatever the locale of the host


@pytest.mark.parametrize(("there", "missing"), [
    ("def tls_of(", "tls_of"), ("def joined(", "joined"), ("import errno, ", "errno"), ("MiB = ", "MiB"),
    ("class NewFile:", "NewFile")])
def test_control_a_name_that_is_not_sent_is_noticed(there: str, missing: str) -> None:
    text = program(work_on_blocks)
    assert text.count(there) == 1
    assert undefined(text.replace(there, there.replace(missing, "another"))) == {missing}


def test_control_a_name_at_the_top_and_a_foreign_module_are_noticed() -> None:
    assert undefined("x = 1\ny\ndef f(a):\n    return [a + b + len(x) for b in z]\n") == {"y", "z"}
    assert imported("import os\ndef f():\n    from paramiko.client import SSHClient\n") == {"os", "paramiko"}


@each_program
def test_a_program_is_sent_without_annotations_and_docstrings(text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        assert not isinstance(node, ast.AnnAssign) and not (isinstance(node, ast.arg) and node.annotation)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
            assert ast.get_docstring(node) is None and getattr(node, "returns", None) is None


def test_a_file_that_is_replaced_while_a_run_lasts_changes_no_program(tmp_path: Path) -> None:
    script = tmp_path / "migrena.py"
    script.write_bytes(SCRIPT.read_bytes())
    code = "import migrena, sys; open(migrena.__file__, 'w').close(); print(migrena.program(migrena.listen), end='')"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == program(listen)


def too_new(text: str, folder: Path) -> str:
    """What in a program a Python 3.6 does not have, as hypervisors with RHEL 8 do; empty where there is nothing."""
    path = folder / "program.py"
    path.write_text(text)
    vermin = str(Path(sys.executable).with_name("vermin"))
    words = [vermin, "--target=3.6-", "--violations", "--no-tips", "-vv", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@each_program
def test_the_oldest_python_of_a_hypervisor_has_all_that_a_program_uses(text: str, tmp_path: Path) -> None:
    ast.parse(text, feature_version=(3, 6))
    assert too_new(text, tmp_path) == ""


@each_program
def test_control_what_came_later_is_noticed(text: str, tmp_path: Path) -> None:
    assert "os.preadv" in too_new(text + "\nos.preadv(0, [], 0)\n", tmp_path)


def run(verb: str, where: Path | str, length: int, *more: Path | str) -> subprocess.CompletedProcess[str]:
    """The program as a hypervisor runs it."""
    words = [sys.executable, *PYTHON[1:], program(work_on_blocks), verb, str(where), "0", str(length), *map(str, more)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.fixture
def holed(tmp_path: Path) -> Path:
    """A file of 5 MiB with three extents of data, a hole after each."""
    path = tmp_path / "disk"
    with path.open("wb") as file:
        for place in (0, 2, 4):
            file.seek(place * MiB)
            file.write(b"x" * 65536)
        file.truncate(5 * MiB)
    return path


PLACES = [(place * MiB, place * MiB + 65536) for place in (0, 2, 4)]


def test_extents_are_reported_with_their_places(holed: Path) -> None:
    assert run("extents", holed, 5 * MiB).stdout == f"0 65536\n{2 * MiB} 65536\n{4 * MiB} 65536\n"


@pytest.mark.parametrize(("begin", "end", "found"), [
    (0, 5 * MiB, PLACES), (MiB, 4 * MiB, PLACES[1:2]), (3 * MiB, 4 * MiB, []),
    (4096, 2 * MiB + 4096, [(4096, 65536), (2 * MiB, 2 * MiB + 4096)])])
def test_a_part_of_a_disk_holds_what_lies_in_it(
        holed: Path, begin: int, end: int, found: list[tuple[int, int]]) -> None:
    assert list(DiskFile(str(holed), begin, end).extents()) == found


def fail_at_the_third_look(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The third look for data fails, as on a disk that dies."""
    real, looks = os.lseek, list[int]()

    def lseek(fd: int, at: int, how: int) -> int:
        looks.append(how)
        if how == os.SEEK_DATA and looks.count(how) == 3:
            raise OSError(number, os.strerror(number))
        return real(fd, at, how)

    monkeypatch.setattr(os, "lseek", lseek)


def test_a_disk_that_fails_to_tell_where_its_data_is_does_not_end_there(
        holed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at_the_third_look(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        list(DiskFile(str(holed), 0, 5 * MiB).extents())


@pytest.mark.parametrize("verb", ["extents", "digest"])
def test_such_a_disk_ends_the_program_with_the_reason(
        holed: Path, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at_the_third_look(monkeypatch, errno.EIO)
    with pytest.raises(SystemExit, match=f"^{holed}: .*Input/output error"):
        work_on_blocks(verb, str(holed), "0", str(5 * MiB))


def test_control_that_there_is_no_more_data_is_no_error(holed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at_the_third_look(monkeypatch, errno.ENXIO)
    assert list(DiskFile(str(holed), 0, 5 * MiB).extents()) == PLACES[:2]


@pytest.mark.parametrize("verb", ["extents", "digest"])
def test_a_device_is_not_read_as_a_file_in_which_it_would_look_empty(verb: str) -> None:
    done = run(verb, "/dev/null", MiB)
    assert done.returncode == 1 and done.stderr == "/dev/null: it is neither a file nor a block device\n" and not done.stdout


def test_what_is_not_there_is_reported_in_one_line() -> None:
    done = run("extents", "/nowhere/disk", MiB)
    assert done.returncode == 1
    assert done.stderr == "/nowhere/disk: [Errno 2] No such file or directory: '/nowhere/disk'\n"


def test_a_file_that_ends_too_early_is_reported_with_the_place(holed: Path) -> None:
    with pytest.raises(OSError, match=f"it ends at byte {5 * MiB}"):
        DiskFile(str(holed), 0, 6 * MiB).read(5 * MiB - 4096, memoryview(bytearray(8192)), 8192)


def test_a_digest_is_of_each_run_after_its_place(holed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = hashlib.sha256(struct.pack(">QQ", 2 * MiB, 65536) + b"x" * 65536).hexdigest()
    pool = ThreadPoolExecutor(2)
    tell_digests(DiskFile(str(holed), MiB, 4 * MiB), None, Pace(""), pool)
    assert capsys.readouterr().out == f"2 {found}\n.\n"
    tell_digests(DiskFile(str(holed), 0, 5 * MiB), {1, 2}, Pace(""), pool)
    assert capsys.readouterr().out == f"2 {found}\n.\n"


def test_parts_are_digested_as_they_are_asked_for_until_nobody_is_there_any_more(holed: Path) -> None:
    found = hashlib.sha256(struct.pack(">QQ", 2 * MiB, 65536) + b"x" * 65536).hexdigest()
    words = [sys.executable, *PYTHON[1:], program(work_on_blocks), "answer", str(holed), "0", "0"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=0) as process:
        assert process.stdin and process.stdout
        for asked, wanted in ((f"..{MiB} {3 * MiB}", f"2 {found}"), (f"{MiB} .{MiB}", ""), (f"{2 * MiB} {MiB}.", f"2 {found}")):
            os.write(process.stdin.fileno(), f"{asked}\n".encode())
            lines = [*iter(process.stdout.readline, "=\n")]
            assert "".join(line for line in lines if line != ".\n").strip() == wanted
        files = len(os.listdir(f"/proc/{process.pid}/fd"))
        for _ in range(20):
            os.write(process.stdin.fileno(), f"{2 * MiB} {MiB}\n".encode())
            assert len([*iter(process.stdout.readline, "=\n")]) == 2
        assert len(os.listdir(f"/proc/{process.pid}/fd")) <= files + 4  # each thread opens the disk, and only once
        os.write(process.stdin.fileno(), f"{5 * MiB} {MiB}\n".encode())  # beyond its end: no data, as of any hole
        assert [*iter(process.stdout.readline, "=\n")] in ([], [".\n"])
        process.stdin.close()
        assert process.wait(10) == 0


def test_runs_are_of_cells_that_are_not_all_zeros() -> None:
    room = bytearray(MiB)
    room[65536 * 3 - 1] = room[65536 * 3] = room[MiB - 1] = 1
    assert runs_of(memoryview(room), 0, MiB) == [[2 * 65536, 4 * 65536], [15 * 65536, MiB]]
    assert runs_of(memoryview(room), 0, 100000) == []


def test_what_is_brought_is_equal_and_zeros_become_holes(holed: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.write_bytes(b"y" * 5 * MiB)
    with holed.open("r+b") as file:
        file.seek(2 * MiB)
        file.write(bytes(131072))
    bring(DiskFile(str(holed), 0, 5 * MiB), NewFile(str(new)), [(0, 3 * MiB)], "")
    assert new.read_bytes() == holed.read_bytes()[:3 * MiB] + b"y" * 2 * MiB
    assert list(DiskFile(str(new), 0, 3 * MiB).extents()) == [(0, 65536)]


def test_spans_side_by_side_are_one() -> None:
    assert joined([(0, 5), (5, 7), (8, 9)]) == [[0, 7], [8, 9]]
    assert joined([(0, 5), (5, 7), (8, 9)], gap=1) == [[0, 9]]
    assert joined([]) == []


def test_millions_of_extents_are_reported_as_fewer_over_small_holes() -> None:
    """A stand-in for SEEK_DATA on such a file: with a limit a thousand times lower."""
    places = [(place * 16384, place * 16384 + 4096) for place in range(600)]
    extents = joined(places, most=512)
    assert len(extents) < 513 and extents[0][0] == 0 and extents[-1][1] == places[-1][1]
    assert all(any(start <= at and to <= stop for start, stop in extents) for at, to in places)


def test_a_pace_holds_back_and_without_a_rate_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = list[float]()
    monkeypatch.setattr("migrena.time.sleep", slept.append)
    pace = Pace(str(MiB))
    pace.hold_back(2 * MiB)
    assert 1.5 < slept.pop() <= 2
    Pace("").hold_back(1 << 60)
    assert not slept


@pytest.mark.parametrize(("answer", "told"), [
    (struct.pack(">IIQ", 0x67446698, 5, 7), "it fails at byte 7: error 5"),
    (struct.pack(">IIQ", 1, 0, 7), "it fails at byte 7: error 0"), (b"short", "it ended")])
def test_an_export_that_fails_or_ends_is_reported(answer: bytes, told: str) -> None:
    export = ExportClient({}, 0, MiB, "")
    export.own.link, there = socket.socketpair()
    with export.own.link, there:
        there.sendall(answer)
        there.shutdown(socket.SHUT_WR)
        with pytest.raises(OSError, match=told):
            export.read(7, memoryview(bytearray(512)), 512)


@pytest.mark.parametrize(("piece", "is_shorter"), [
    (b"text " * 1000, True), (random.Random(1).randbytes(5000), False)], ids=["text", "noise"])
def test_a_frame_holds_what_was_said_and_is_hardly_longer(piece: bytes, is_shorter: bool) -> None:
    async def there_and_back() -> tuple[bytes, bytes, bytes]:
        said, heard = asyncio.StreamReader(), asyncio.StreamReader()
        said.feed_data(piece)
        said.feed_eof()
        frame = await deflated(said)
        heard.feed_data(frame)
        return frame, await inflated(heard), await deflated(said)

    frame, found, end = asyncio.run(there_and_back())
    assert (found, end) == (piece, b"")
    word = struct.unpack(">I", frame[:4])[0]
    assert bool(word & DEFLATED) == is_shorter and word & ~DEFLATED == len(frame) - 4 <= len(piece)
    assert not is_shorter or zlib.decompress(frame[4:]) == piece


@pytest.mark.parametrize(("address", "field", "tests"), [("192.0.2.1", 12, 1), ("2001:db8::1", 8, 4)])
def test_a_socket_filter_drops_at_the_first_word_that_differs(address: str, field: int, tests: int) -> None:
    packed = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
    steps = list(struct.iter_unpack("HBBI", filter_of(packed, field)))
    assert len(steps) == 2 * tests + 2 and [step[3] for step in steps[-2:]] == [0xFFFFFFFF, 0]
    for at in range(1, 2 * tests, 2):
        assert at + 1 + steps[at][2] == len(steps) - 1  # the last one, which drops


class Knot:
    """Garbage that runs code when it is collected, in the midst of whatever: another thread goes on meanwhile, as with paramiko's."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        for _ in range(50):
            pass


def test_programs_are_made_in_several_threads_at_once() -> None:
    """Python 3.11 fails with "AST constructor recursion depth mismatch" where two threads parse at different depths."""
    def made(depth: int) -> str:
        if depth:
            return made(depth - 1)
        for _ in range(30):
            Knot()
        parts_of_programs.cache_clear()
        return program.__wrapped__(work_on_blocks)

    often, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(100)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert len(set(pool.map(made, [number % 5 * 7 for number in range(160)]))) == 1
    finally:
        sys.setswitchinterval(often)
        gc.set_threshold(*threshold)


@pytest.mark.parametrize(("paths", "outside", "inside"), [
    ({"/var/lib/nova": "/srv/nova", "/var/lib/nova/mnt": "/mnt/nfs"}, "/mnt/nfs/x", "/var/lib/nova/mnt/x"),
    ({"/var/lib/nova": "/data/nova", "/data": "/mnt/data"}, "/data/nova/x", "/var/lib/nova/x"),
    ({"/var/lib/nova": "/srv/nova"}, "/srv/nova2/x", "/srv/nova2/x"),
    ({}, "/srv/nova/x", "/srv/nova/x")])
def test_the_folders_of_a_container_are_told_apart(tmp_path: Path, paths: dict[str, str], outside: str, inside: str) -> None:
    tool = tmp_path / "virsh"
    tool.write_text(f'#!/bin/sh\necho "<file=\'$1\'/>"; echo "error: $1" >&2; printf "%s" "$1" > {tmp_path}/said\n')
    tool.chmod(0o755)
    done = subprocess.run([*PYTHON, program(contained), json.dumps([["env"], paths]), "virsh", outside],
                          env={"PATH": f"/ours:{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=True)
    assert (tmp_path / "said").read_text() == inside
    assert (done.stdout, done.stderr) == (f"<file='{outside}'/>\n", f"error: {outside}\n")
