"""What is sent to hypervisors to be run there: it tells an error as an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from migrena import BLOCKS, LISTEN, SQUEEZE, MiB

# The third look for data fails, as on a disk that dies.
DYING = """
import errno, os
real, looks = os.lseek, []
def lseek(fd, at, how):
    looks.append(how)
    if how == os.SEEK_DATA and looks.count(how) == 3:
        raise OSError({error}, os.strerror({error}))
    return real(fd, at, how)
os.lseek = lseek
"""


def run(verb: str, where: Path | str, length: int, before: str = "") -> subprocess.CompletedProcess[str]:
    """The program, after other lines that change what it finds."""
    return subprocess.run([sys.executable, "-c", before + BLOCKS, verb, str(where), "0", str(length)], capture_output=True, text=True, check=False)


@pytest.fixture
def holed(tmp_path: Path) -> Path:
    """A file of 5 MiB with three pieces of data, a hole after each."""
    path = tmp_path / "disk"
    with path.open("wb") as file:
        for place in (0, 2, 4):
            file.seek(place * MiB)
            file.write(b"x" * 65536)
        file.truncate(5 * MiB)
    return path


def test_pieces_are_told_with_their_places(holed: Path) -> None:
    assert run("pieces", holed, 5 * MiB).stdout == f"0 65536\n{2 * MiB} 65536\n{4 * MiB} 65536\n"


@pytest.mark.parametrize("verb", ["pieces", "digest"])
def test_a_disk_that_fails_to_tell_where_its_data_is_does_not_end_there(holed: Path, verb: str) -> None:
    done = run(verb, holed, 5 * MiB, DYING.format(error="errno.EIO"))
    assert done.returncode != 0 and "Input/output error" in done.stderr


def test_control_that_there_is_no_more_data_is_no_error(holed: Path) -> None:
    done = run("pieces", holed, 5 * MiB, DYING.format(error="errno.ENXIO"))
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize("verb", ["pieces", "digest"])
def test_a_device_is_not_read_as_a_file_in_which_it_would_look_empty(verb: str) -> None:
    done = run(verb, "/dev/null", MiB)
    assert done.returncode != 0 and "it is not a file" in done.stderr and not done.stdout


def too_new(program: str, folder: Path) -> str:
    """What in a program a Python 3.6 does not have, as hypervisors with RHEL 8 do; empty where there is nothing."""
    path = folder / "program.py"
    path.write_text(program)
    words = [str(Path(sys.executable).with_name("vermin")), "--target=3.6-", "--violations", "--no-tips", "-vv", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize("program", [BLOCKS, LISTEN, SQUEEZE], ids=["blocks", "listen", "squeeze"])
def test_the_oldest_python_of_a_hypervisor_has_all_that_a_program_uses(program: str, tmp_path: Path) -> None:
    assert too_new(program, tmp_path) == ""


def test_control_what_came_later_is_noticed(tmp_path: Path) -> None:
    assert "os.preadv" in too_new(BLOCKS + "\nos.preadv(0, [], 0)\n", tmp_path)


def test_millions_of_pieces_are_told_as_fewer_over_small_holes(tmp_path: Path) -> None:
    """A stand-in for SEEK_DATA on such a file: with limits a thousand times lower."""
    path = tmp_path / "disk"
    with path.open("wb") as file:
        for place in range(600):
            file.seek(place * 16384)
            file.write(b"x" * 4096)
    program = BLOCKS.replace("len(held) > 1 << 19", "len(held) > 1 << 9")
    assert program != BLOCKS
    length = path.stat().st_size
    done = subprocess.run([sys.executable, "-c", program, "pieces", str(path), "0", str(length)], capture_output=True, text=True, check=True)
    pieces = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(pieces) < 513 and pieces[0][0] == 0 and sum(pieces[-1]) == length
    assert all(any(at <= place * 16384 and place * 16384 + 4096 <= at + count for at, count in pieces) for place in range(600))
