"""Two real OpenStack clouds, brought up once, and migrena run on them as an operator runs it.

Each cloud has two hypervisors: new disks are qcow2 on the first and raw on the second. Whoever makes an instance says where.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from conftest import REPOSITORY, SCRIPT
from lab.api import Api
from lab.clouds import Clouds, Options, credentials, purge
from lab.guest import guest_image
from lab.halting import HALT, Throw
from lab.hosts import Host
from lab.processes import wait_until
from lab.settings import NUMBER

DISKS = "/var/lib/nova/instances"
SOURCE, DESTINATION = "src-cmp1", "dst-cmp1"  # the hypervisors of most tests
MiB = 1024**2
HYPERVISORS = Options(("src-cmp1", "dst-cmp1", "src-cmp2", "dst-cmp2"), {"src-cmp2": "raw", "dst-cmp2": "raw"})

STORAGE = HYPERVISORS.with_storage("src", "nfs", "rbd").with_storage("dst", "rbd")  # volumes in files, and on Ceph
MACHINE = "src-vm1"  # a virtual machine, for what this machine's kernel has not: LVM and iSCSI
WITH_MACHINE = STORAGE.with_storage("src", "lvm").with_hosts(MACHINE)


@dataclass(frozen=True)
class Operator:
    """Somebody who runs migrena against the lab's clouds, with a config.py and a state folder of their own."""

    clouds: Clouds
    folder: Path
    script: Path = SCRIPT
    patience: float = 280.0  # seconds after which a run is taken to hang; less than the test's own limit, so that it undoes what it did
    begun: list[subprocess.Popen[str]] = field(default_factory=list)

    def words(self, *words: str, extra: str = "", throw: Sequence[Throw] = ()) -> list[str]:
        """The whole command; `extra` is appended to the config.py that the lab writes; it halts or ends itself at lines of its journal."""
        config = self.folder / "config.py"
        config.touch(mode=0o600)
        own = f"STATE_FOLDER = {str(self.folder / 'state')!r}\nCOMPRESS = 'off'"  # on a busy machine every wire may seem slow
        config.write_text(f"{self.clouds.config.read_text()}\n{own}\n{extra}\n")
        start = [str(REPOSITORY / "tests/lab/halting.py"), str(self.halt(len(self.begun))), json.dumps(throw)] if throw else []
        return [sys.executable, *start, str(self.script), *words, "-c", str(config)]

    def to(self, place: str, image: str = "guest", name: str = "arrived", flavor: str = "tiny") -> list[str]:
        """The words that make an instance on this hypervisor of the destination; flavor and image are left out where they are empty."""
        network = self.clouds.api("dst").need("neutron", "networks", "net1")
        extra = {"nics": [{"net-id": network}], "availability_zone": f"nova:{place}"}
        named = (("-d", name), ("-f", flavor), ("-i", image), ("-e", str(extra)))
        return [word for flag, value in named if value for word in (flag, value)]

    def begin(self, *words: str, extra: str = "", env: dict[str, str] | None = None, throw: Sequence[Throw] = ()) -> subprocess.Popen[str]:
        """A run under way."""
        self.begun.append(subprocess.Popen(
            self.words(*words, extra=extra, throw=throw), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            stdin=subprocess.DEVNULL, env={**os.environ, **(env or {})}, cwd=self.folder))
        return self.begun[-1]

    def run(self, *words: str, extra: str = "", env: dict[str, str] | None = None,
            throw: Sequence[Throw] = ()) -> subprocess.CompletedProcess[str]:
        """One run to its end."""
        return ended(self.begin(*words, extra=extra, env=env, throw=throw), self.patience)

    def halted(self, line: str | int, *words: str, extra: str = "", env: dict[str, str] | None = None,
               throw: Sequence[Throw] = ()) -> subprocess.Popen[str]:
        """A run that halts since this line of its journal is on the disk."""
        process = self.begin(*words, extra=extra, env=env, throw=[(line, HALT), *throw])
        if not self.has_halted(process):
            raise AssertionError(f"it never came to {line!r}: {process.returncode}\n{''.join(map(str, process.communicate()))}")
        return process

    def halt(self, number: int) -> Path:
        """The file that is there while the command of this number halts."""
        return self.folder / f"halt-{number}"

    def has_halted(self, process: subprocess.Popen[str]) -> bool:
        """Whether a run halts, as soon as it does; it may end instead."""
        there = self.halt(self.begun.index(process))
        wait_until("a run that halts or ends", lambda: there.exists() or process.poll() is not None, self.patience)
        return process.poll() is None

    def go_on(self, process: subprocess.Popen[str], *signals: int) -> subprocess.CompletedProcess[str]:
        """What a run that halts prints until its end; it is sent these signals first."""
        for number in signals:
            process.send_signal(number)
        self.halt(self.begun.index(process)).unlink(missing_ok=True)
        return ended(process)

    def report(self, *words: str, extra: str = "", env: dict[str, str] | None = None) -> dict[str, Any]:
        """The JSON report of a run that must succeed."""
        done = self.run(*words, "--json", extra=extra, env=env)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def at_a_third(self, *words: str, rate: str = "10M", extra: str = "", env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """A run, slow enough to watch, that has just said that a third of what it sends is there."""
        process = self.begin(*words, "--limit-rate", rate, extra=extra, env=env)
        assert process.stderr
        said = ""
        for line in process.stderr:
            said += line
            if any(f" {share}% " in line for share in range(25, 90)):
                return process
        raise AssertionError(said)

    def with_build(self, *changes: tuple[str, str]) -> Operator:
        """The same with a migrena.py that has these changes in it; each place must be there, and once."""
        text = SCRIPT.read_text()
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        script = self.folder / "migrena.py"
        script.write_text(text)
        return replace(self, script=script)

    @property
    def last_run(self) -> str:
        """The id of the latest run that has a journal."""
        return max(path.stem for path in (self.folder / "state").glob("*.jsonl"))


def ended(process: subprocess.Popen[str], patience: float = Operator.patience) -> subprocess.CompletedProcess[str]:
    """What a run printed, once it has ended."""
    try:
        out, said = process.communicate(timeout=patience)
    except BaseException:
        process.send_signal(signal.SIGINT)  # so that it undoes what it did before the next test begins
        process.communicate(timeout=60)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, said)


@pytest.fixture(scope="session")
def clouds() -> Iterator[Clouds]:
    """Both clouds, new and empty; those that run already with these hypervisors are used and stay, any others are taken away."""
    if os.geteuid():
        pytest.skip("not root: no clouds can be brought up")
    found = Clouds(HYPERVISORS)
    state = found.state() if Options.kept() == HYPERVISORS else []
    was_up = bool(state) and all(process.alive() for _, process in state)
    if not was_up:
        purge()
        found = Clouds(HYPERVISORS)  # no longer one that knows the processes that have ended
    found.up()
    stop_soon(found.api("dst"))
    yield found
    if not was_up:
        (purge if NUMBER else found.down)()


@pytest.fixture(scope="session")
def storage(clouds: Clouds) -> Iterator[Clouds]:
    """The same clouds, with Cinder in both; what that takes is started when the first test needs it, and runs on."""
    more = Clouds(STORAGE)
    more.up()
    yield more
    HYPERVISORS.keep()


@pytest.fixture(scope="session")
def machine(storage: Clouds) -> Iterator[Host]:
    """A virtual machine with LVM, whose volumes go by iSCSI to whoever uses them."""
    more = Clouds(WITH_MACHINE)
    more.up()
    yield more.host(MACHINE)
    more.host(MACHINE).kill()
    STORAGE.keep()


@pytest.fixture(scope="session")
def src(clouds: Clouds) -> Api:
    """The source cloud, as its admin sees it."""
    return clouds.api("src")


@pytest.fixture(scope="session")
def dst(clouds: Clouds) -> Api:
    """The destination cloud, as its admin sees it."""
    return clouds.api("dst")


@pytest.fixture(scope="session")
def quick(src: Api) -> Iterator[str]:
    """An image of the source cloud whose guests are powered off after a second, as those of the destination's are."""
    id = src.upload("guest-quick", guest_image(), os_shutdown_timeout="1")
    yield id
    src.call("DELETE", "glance", f"/images/{id}")


@pytest.fixture
def operator(clouds: Clouds, tmp_path: Path) -> Iterator[Operator]:
    """Somebody who runs migrena; what a failed test leaves running or halted is ended."""
    somebody = Operator(clouds, tmp_path)
    yield somebody
    for process in somebody.begun:
        if process.poll() is None:
            somebody.go_on(process, signal.SIGINT)


@pytest.fixture
def application(src: Api) -> Iterator[dict[str, str]]:
    """An application credential of the source cloud's admin, as SRC_CREDS has it."""
    path = f"/users/{src.need('keystone', 'users', 'admin')}/application_credentials"
    made = src.call("POST", "keystone", path, {"application_credential": {"name": "migrena"}})["application_credential"]
    yield {"auth_url": f"{src.cloud.url('keystone')}/v3", "auth_type": "v3applicationcredential", "application_credential_id": made["id"],
           "application_credential_secret": made["secret"]}
    src.call("DELETE", "keystone", f"{path}/{made['id']}")


@pytest.fixture
def clouds_yaml(dst: Api, tmp_path: Path) -> Path:
    """A clouds.yaml that knows the destination as `there`."""
    path = tmp_path / "clouds.yaml"
    path.write_text(json.dumps({"clouds": {"there": {"auth": credentials(dst.cloud, "admin"), "region_name": "RegionOne"}}}))  # JSON is YAML
    return path


@pytest.fixture(scope="session")
def made(clouds: Clouds, src: Api) -> Iterator[str]:
    """The id of an instance that has run once and has 64 MiB of random data on its disk."""
    id = src.create("source", availability_zone="nova:src-cmp1")
    wait_for_console(src, id, "GUEST wrote=")
    src.act(id, "os-stop", until="SHUTOFF")
    write_random(clouds.host("src-cmp1"), id, (64 * MiB, 64 * MiB))
    yield id
    src.delete(id)


@pytest.fixture
def source(src: Api, dst: Api, made: str) -> Iterator[str]:
    """That instance, stopped, while the destination is empty; afterwards both are so again, whatever the test left."""
    as_before(src, dst, made)
    yield made
    as_before(src, dst, made)


@pytest.fixture
def running(src: Api, source: str) -> str:
    """The same instance, while it runs."""
    src.act(source, "os-start", until="ACTIVE")
    return source


def stop_soon(api: Api) -> None:
    """Has Nova wait for guests of these images for a second: one that is stopped while it boots would not hear of it for ten."""
    for name in ("guest", "guest-other"):
        image = api.find("glance", "images", name)
        if image and "os_shutdown_timeout" not in image:
            api.call("PATCH", "glance", f"/images/{image['id']}", [{"op": "add", "path": "/os_shutdown_timeout", "value": "1"}],
                     {"Content-Type": "application/openstack-images-v2.1-json-patch"})


def as_before(src: Api, dst: Api, source: str, *own: str) -> None:
    """Stops the source and takes lock and marks off it, but not its own metadata; deletes every instance in the destination."""
    server = src.server(source)
    if server["locked"]:
        src.act(source, "unlock")
    for mark in server["metadata"].keys() - own:
        src.call("DELETE", "nova", f"/servers/{source}/metadata/{mark}")
    if server["status"] != "SHUTOFF":
        src.act(source, "os-stop", until="SHUTOFF")
    for left in dst.call("GET", "nova", "/servers?all_tenants=1")["servers"]:
        dst.delete(left["id"])


def has_been_put_back(api: Api, id: str, status: str) -> bool:
    """Whether an instance has this status, no lock and no mark of ours."""
    server = api.server(id)
    return (server["status"], server["locked"], server["metadata"]) == (status, False, {})


def has_moved(api: Api, id: str, to: str) -> bool:
    """Whether a source stays stopped and locked because an instance of this id was started in its place, and carries no mark of ours."""
    server = api.server(id)
    return (server["status"], server["locked"], server["metadata"]) == ("SHUTOFF", True, {}) and to in server["locked_reason"]


def disk(id: str, name: str = "disk") -> str:
    """The path of an instance's disk on its hypervisor."""
    return f"{DISKS}/{id}/{name}"


def write_random(host: Host, id: str, *places: tuple[int, int], name: str = "disk") -> None:
    """A guest writes random bytes to these places (offset, length) of its disk."""
    script = "cat > /var/tmp/commands; head -c $1 /dev/urandom > /var/tmp/random; qemu-io -f $3 $2 < /var/tmp/commands; rm /var/tmp/random"
    commands = "".join(f"write -q -s /var/tmp/random {offset} {length}\n" for offset, length in places)
    longest = max(length for _, length in places)
    host.run("sh", "-ec", script, "sh", str(longest), disk(id, name), format_of(host, id, name), input=commands)


def node(host: Host, id: str, name: str = "disk") -> str:
    """An instance's disk as this machine's own qemu-img sees it, for --image-opts; its base is looked up on its own host."""
    found = json.loads(host.run("qemu-img", "info", "--output=json", disk(id, name), "-f", format_of(host, id, name)).stdout)
    opts = f"driver={found['format']},file.filename={host.root}{disk(id, name)}"
    if "full-backing-filename" in found:
        opts += f",backing.driver={found['backing-filename-format']},backing.file.filename={host.root}{found['full-backing-filename']}"
    return opts


def format_of(host: Host, id: str, name: str = "disk") -> str:
    """The format of a disk, as Nova wrote it down."""
    return str(json.loads(host.run("cat", f"{disk(id)}.info").stdout)[disk(id, name)])


def same_to_both_guests(one: Host, source: str, other: Host, arrived: str, name: str = "disk") -> bool:
    """Whether qemu-img, which has no part in migrena's own proof, finds both disks equal."""
    words = ["qemu-img", "compare", "--image-opts", node(one, source, name), node(other, arrived, name)]
    return subprocess.run(words, check=False, capture_output=True, text=True).returncode == 0


def wait_for_console(api: Api, id: str, line: str, seconds: float = 240, pause: float = 1) -> str:
    """A server's console once it shows this line; it is asked for each `pause` seconds, which costs its hypervisor something."""
    limit = time.monotonic() + seconds
    while line not in (shown := api.console(id)):
        assert time.monotonic() < limit, f"no {line!r} on the console:\n{shown[-2000:]}"
        time.sleep(pause)
    return shown


def last_record(host: Host, id: str) -> str:
    """The number of the last record that a guest wrote before it was stopped."""
    return host.run("cat", f"{DISKS}/{id}/console.log").stdout.rpartition("GUEST powers off after record ")[2].split()[0]


def boots(host: Host, id: str) -> int:
    """How often a guest has booted, by what it said when it last did."""
    return int(host.run("cat", f"{DISKS}/{id}/console.log").stdout.rpartition("GUEST boots=")[2].split()[0])


def left_on(host: Host) -> list[str]:
    """Whatever of migrena is on a hypervisor: processes and files."""
    lines = [" ".join(argv) for _, argv in host.processes()]
    processes = [line for line in lines if re.search(r"nbd|qemu-img|migrena-\d{8}T", line) and "--force-share" not in line]  # Nova looks so
    files = host.run("sh", "-c", f"ls -d /run/migrena* /tmp/migrena* {DISKS}/*/*migrena* 2>/dev/null", check=False).stdout.split()
    return processes + files
