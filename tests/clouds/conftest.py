"""Two real OpenStack clouds, brought up once, and migrena run on them as an operator runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import SCRIPT
from lab.clouds import Clouds, Options, purge
from lab.hosts import Host

DISKS = "/var/lib/nova/instances"


@dataclass(frozen=True)
class Operator:
    """Runs migrena against the lab's clouds; `extra` is appended to the config.py that the lab writes."""

    clouds: Clouds
    folder: Path

    def words(self, *words: str, extra: str = "") -> list[str]:
        """The whole command."""
        config = self.folder / "config.py"
        config.touch(mode=0o600)
        config.write_text(f"{self.clouds.config.read_text()}\nSTATE_FOLDER = {str(self.folder / 'state')!r}\n{extra}\n")
        return [sys.executable, str(SCRIPT), "-c", str(config), *words]

    def run(self, *words: str, extra: str = "") -> subprocess.CompletedProcess[str]:
        """One run to its end."""
        return subprocess.run(self.words(*words, extra=extra), check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=280)

    def report(self, *words: str, extra: str = "") -> dict[str, Any]:
        """The JSON report of a run that must succeed."""
        done = self.run(*words, "--json", extra=extra)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def signalled_at_a_third(self, number: signal.Signals, *words: str) -> subprocess.CompletedProcess[str]:
        """A run that gets a signal when a third of the disk is there."""
        process = subprocess.Popen(self.words(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
        assert process.stderr
        said = ""
        for line in process.stderr:
            said += line
            if any(f" {share}% " in line for share in range(25, 90)):
                process.send_signal(number)
                break
        out, rest = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, said + rest)


@pytest.fixture(scope="session")
def clouds() -> Iterator[Clouds]:
    """Both clouds; they are stopped afterwards unless they were up before."""
    if os.geteuid():
        pytest.skip("not root: no clouds can be brought up")
    found = Clouds(Options.kept() or Options("ns", 1, {}))
    was_up = bool(found.state())
    if not was_up:
        purge()
        found = Clouds(Options("ns", 1, {}))
    found.up()
    yield found
    if not was_up:
        found.down()


@pytest.fixture
def operator(clouds: Clouds, tmp_path: Path) -> Operator:
    """Somebody who runs migrena."""
    return Operator(clouds, tmp_path)


@pytest.fixture(scope="session")
def source(clouds: Clouds) -> Iterator[str]:
    """The id of an instance in the source cloud that has run, has 96 MiB of random data on its disk, and is stopped."""
    api = clouds.api("src")
    if api.find("nova", "servers", "source"):
        api.delete(api.need("nova", "servers", "source"))
    id = api.create("source")
    wait_for_console(clouds, "src", id, "GUEST wrote=")
    api.act(id, "os-stop", until="SHUTOFF")
    host = clouds.host("src-cmp1")
    write = f"qemu-io -f qcow2 -c 'write -s /var/tmp/random 256M 96M' {disk(id)}"
    host.run("sh", "-c", f"head -c 96M /dev/urandom > /var/tmp/random; {write}; rm /var/tmp/random")
    yield id
    api.delete(id)


@pytest.fixture(autouse=True)
def tidy_destination(clouds: Clouds) -> Iterator[None]:
    """No instance of an earlier test is in the destination, nor of the demo."""
    empty_destination(clouds)
    yield
    empty_destination(clouds)


@pytest.fixture
def network(clouds: Clouds) -> str:
    """What `-e` says for the destination's network."""
    return f"{{'nics': [{{'net-id': '{clouds.api('dst').need('neutron', 'networks', 'net1')}'}}]}}"


def empty_destination(clouds: Clouds) -> None:
    """Deletes every instance in the destination."""
    api = clouds.api("dst")
    for server in api.call("GET", "nova", "/servers")["servers"]:
        api.delete(server["id"])


def disk(id: str) -> str:
    """The path of an instance's disk on its hypervisor."""
    return f"{DISKS}/{id}/disk"


def seen_by_guest(host: Host, id: str) -> str:
    """The sha256 of what a guest sees on its disk; independent of how migrena reads it."""
    format = json.loads(host.run("cat", f"{disk(id)}.info").stdout)[disk(id)]
    script = f"qemu-img convert -f {format} -O raw {disk(id)} /var/tmp/flat && sha256sum < /var/tmp/flat; rm -f /var/tmp/flat"
    return host.run("sh", "-c", script).stdout.split()[0]


def wait_for_console(clouds: Clouds, cloud: str, id: str, line: str, seconds: float = 240) -> str:
    """A server's console once it shows this line."""
    limit = time.monotonic() + seconds
    while line not in (shown := clouds.api(cloud).console(id)):
        assert time.monotonic() < limit, f"no {line!r} on the console:\n{shown[-2000:]}"
        time.sleep(1)
    return shown


def left_on(host: Host) -> list[str]:
    """Whatever of migrena is on a hypervisor: processes, files, listening ports."""
    processes = [line for line in (" ".join(argv) for _, argv in host.processes()) if re.search(r"nbd|qemu-img|migrena-\d{8}T", line)]
    files = host.run("sh", "-c", f"ls -d /run/migrena* /tmp/migrena* {DISKS}/*/*migrena* 2>/dev/null", check=False).stdout.split()
    return processes + files
