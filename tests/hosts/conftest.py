"""Real hosts with real sshd, and migrena's own connections to them; after each test nothing of it may be left there."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import REPOSITORY
from hosts.faults import Fault
from hosts.operators import Operator, an_operator
from hosts.rig import Copy, Instance, base, changed, remains, settings_for, sweep, wait_until_clean
from lab.hosts import Lab, hosts
from lab.processes import LabError
from migrena import Host, Screen, Settings, connect

Reach = Callable[..., Host]
MakeCopy = Callable[..., Copy]
MiB = 1024**2


def networks(first: int) -> range:
    """Third octets of the networks that this worker of pytest-xdist may try."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return range(first + worker * 4, first + worker * 4 + 4)


def begin(folder: Path, kinds: Mapping[str, str], numbers: range, disk: str) -> Iterator[Lab]:
    """A lab on the first network that nobody on this machine uses just now."""
    if os.geteuid() != 0:
        pytest.skip("hosts need root")
    for number in numbers:
        try:
            scope = hosts(folder, kinds, f"10.81.{number}.0/24", disk)
            lab = scope.__enter__()
        except LabError as error:
            if not re.search("in use|there is an interface", str(error)) or number == numbers[-1]:
                raise
            continue
        try:
            yield lab
        finally:
            scope.__exit__(None, None, None)
        return


@pytest.fixture(scope="session")
def namespaces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Three hosts that are namespaces: quick, but without a kernel of their own."""
    yield from begin(tmp_path_factory.mktemp("lab"), dict.fromkeys(("src", "dst", "third"), "ns"), networks(100), "4G")


@pytest.fixture(scope="session")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two hosts of which the destination is a virtual machine: slow, but with a kernel of its own and its nbd module."""
    yield from begin(tmp_path_factory.mktemp("machines"), {"src": "ns", "dst": "vm"}, networks(160), "1G")


def kept_clean(lab: Lab) -> Iterator[Lab]:
    """The lab, with nothing of ours on any host before and after a test."""
    for host in lab:
        assert remains(host) == []
    yield lab
    unclean = []
    for name in lab.hosts:
        if not lab[name].alive():
            lab.start(name)
        try:
            wait_until_clean(lab[name])
        except AssertionError as found:
            unclean.append(str(found))
            sweep(lab[name])
        lab[name].run("sh", "-c", "rm -rf /var/lib/nova/instances/* /var/lib/nova/[!il]*")
    assert not unclean, "\n".join(unclean)


@pytest.fixture
def lab(namespaces: Lab) -> Iterator[Lab]:
    """The hosts of most tests."""
    yield from kept_clean(namespaces)


@pytest.fixture
def settings(lab: Lab) -> Settings:
    """What an operator of this lab has in config.py."""
    return settings_for(lab)


@pytest.fixture
def reach(lab: Lab, settings: Settings) -> Iterator[Reach]:
    """Connects as migrena does; the settings may be different."""
    opened: list[Host] = []

    def to(name: str, **different: Any) -> Host:
        host = connect(name, replace(settings, **different), Screen(stream=io.StringIO()))
        opened.append(host)
        return host

    yield to
    for host in opened:
        host.close()


@pytest.fixture
def src(reach: Reach) -> Host:
    """migrena's connection to the source."""
    return reach("src")


@pytest.fixture
def dst(reach: Reach) -> Host:
    """migrena's connection to the destination."""
    return reach("dst")


@pytest.fixture
def make_copy(src: Host, dst: Host, settings: Settings, tmp_path: Path) -> MakeCopy:
    """A copy from src to dst; the settings may be different."""
    return lambda **different: Copy(src, dst, changed(settings, **different), tmp_path)


@pytest.fixture
def overlays(lab: Lab) -> tuple[Instance, Instance]:
    """An overlay into which a guest wrote 9 MiB, and a fresh one on a base of the same content under another name."""
    source = Instance.make(lab["src"]).overlay(base(lab["src"], "debian"), 64 * MiB)
    source.write("guest", (MiB, 3 * MiB + 512), (20 * MiB, 5 * MiB), (63 * MiB, MiB))
    return source, Instance.make(lab["dst"]).overlay(base(lab["dst"], "debian"), 64 * MiB)


@pytest.fixture
def driver(lab: Lab, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a copy in a process of its own, which says on standard output how many bytes are done."""
    begun: list[subprocess.Popen[str]] = []

    def start(source: Instance, fresh: Instance, name: str = "", **settings: Any) -> subprocess.Popen[str]:
        orders = {"name": name, "lab": lab.spec.tag, "settings": settings, "state": str(tmp_path), "source": source.path, "fresh": fresh.path}
        env = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
        process = subprocess.Popen([sys.executable, "-m", "hosts.rig", json.dumps(orders)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, env=env)
        begun.append(process)
        return process

    yield start
    for process in begun:
        process.kill()
        process.communicate()


@pytest.fixture
def operator(lab: Lab, tmp_path: Path) -> Operator:
    """Somebody with two clouds, whose one instance runs in the first."""
    return an_operator(lab, tmp_path)


@pytest.fixture
def fault(operator: Operator) -> Iterator[Fault]:
    """Their run, to have something thrown into; whatever that is, the source's disk keeps its content."""
    run = Fault(operator, operator.source.sha256())
    yield run
    run.stop()
    assert operator.source.sha256() == run.before
