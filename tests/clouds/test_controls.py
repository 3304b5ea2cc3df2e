"""Controls of the tests themselves: builds of migrena with a fault in them are caught by its own proof, and without that by these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from clouds.conftest import DESTINATION, DISKS, SOURCE, Operator, has_been_put_back, same_to_both_guests
from lab.api import Api
from lab.clouds import Clouds

WRONG = f"{DISKS}/wrong-base"

# What is put in place of what in migrena.py. One block in the middle of the disk does not arrive:
UNCOPIED = ("            self._callbacks.arrived(chunk, done)\n",
            '            self._ends.destination.run("fallocate", "-p", "-o", str(40 * MiB), "-l", "4096", self._job.new)\n'
            "            self._callbacks.arrived(chunk, done)\n")
# the new file is rebased onto another base:
REBASED = ('"-b", job.fresh.backing, job.new)', f'"-b", "{WRONG}", job.new)')
# and nobody looks at the base afterwards:
UNCHECKED = ('check_qcow2(host, job).lost_bitmaps if job.fresh.format == "qcow2" else ()', "()")


@pytest.fixture
def wrong_base(clouds: Clouds, source: str) -> Iterator[None]:
    """A base at the destination that differs from the right one in a place that the source's overlay does not cover."""
    host = clouds.host(DESTINATION)
    write = f"qemu-io -f raw -c 'write -q -P 99 36M 1M' {WRONG}"
    host.run("sh", "-ec", f"truncate -s 128M {WRONG}; {write}")
    yield
    host.run("rm", WRONG)


@pytest.mark.parametrize(("changes", "told"), [
    ([UNCOPIED], "the copy differs from the source: 1 blocks of 1 MiB differ"),
    ([REBASED], f"bytes on base {WRONG}"),
], ids=["uncopied", "rebased"])
def test_control_a_build_with_a_fault_is_stopped_by_its_own_proof(
        operator: Operator, src: Api, dst: Api, source: str, wrong_base: None, changes: list[tuple[str, str]], told: str) -> None:
    done = operator.with_build(*changes).run("-s", source, *operator.to(DESTINATION))
    assert done.returncode == 1 and told in done.stderr, done.stderr
    assert has_been_put_back(src, source, "SHUTOFF") and not dst.find("nova", "servers", "arrived")


@pytest.mark.parametrize(("changes", "words"), [([UNCOPIED], ["--no-verify"]), ([REBASED, UNCHECKED], [])], ids=["uncopied", "rebased"])
def test_control_a_build_with_a_fault_and_without_proof_is_caught_by_these_tests(
        operator: Operator, clouds: Clouds, source: str, wrong_base: None, changes: list[tuple[str, str]], words: list[str]) -> None:
    report = operator.with_build(*changes).report("-s", source, *operator.to(DESTINATION), *words)
    assert not same_to_both_guests(clouds.host(SOURCE), source, clouds.host(DESTINATION), report["destination"]["id"])
