"""Random schedules on real clouds, from one seed: whatever others do to both instances at whatever moment of a run, what must hold holds.

    pytest clouds/test_adversary.py --random-schedules 50 --random-seed 1a2b3c4d

A schedule is a run that stands still at random lines of its journal while others act, ends by itself, by Ctrl-C or by kill -9, and is then
resumed or rolled back, in whatever way. After each step all is read from Nova, libvirt and the files. A disk's lineage is told by random
bytes that were planted in the source.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from clouds.conftest import HYPERVISORS, SOURCE, MiB, Operator, disk, format_of, left_on, same_to_both_guests, write_random
from lab.api import Api, ApiError
from lab.clouds import Clouds
from lab.halting import HALT
from lab.processes import wait_until

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
KILL, INT, TERM = signal.SIGKILL.value, signal.SIGINT.value, signal.SIGTERM.value
MOMENTS = 36  # lines that a journal has in the end, or a few more
PLANTED = (200, 16)  # where the source's random bytes begin and how many there are, in MiB: behind what the guest uses
SWAPPED = "SRC_CREDS, DST_CREDS = DST_CREDS, SRC_CREDS"
ONE_CLOUD = "DST_CREDS = SRC_CREDS"
CODES = {0, 1, 3, 4, -KILL, 128 + INT, 128 + TERM}
# What runs on a hypervisor, and what its qemus have open that was replaced.
LOOK = """virsh -q list --uuid --state-running
for pid in $(pidof qemu-system-x86_64); do readlink /proc/$pid/fd/* || true; done | grep '/disk (deleted)$' || true"""
READ = """qemu-img dd -U -f "$1" -O raw bs=1M skip=$2 count=$(($2 + $3)) if="$4" of=/tmp/planted >/dev/null 2>&1 || exit 0
sha256sum </tmp/planted; rm /tmp/planted"""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """As many schedules as were asked for."""
    if "number" in metafunc.fixturenames:
        metafunc.parametrize("number", range(metafunc.config.getoption("--random-schedules")))


@dataclass
class Stage:
    """What all schedules share: two clouds, a source that is made again when it was lost, and an instance that is nobody's business."""

    clouds: Clouds
    src: Api
    dst: Api
    image: str
    bystander: str
    source: str = ""
    planted: str = ""  # the digest of the random bytes

    def ready(self) -> str:
        """The id of the source, stopped and with its data on its disk."""
        if not self.source:
            self.source = self.src.create("victim", self.image, availability_zone=f"nova:{SOURCE}")
            self.src.act(self.source, "os-stop", until="SHUTOFF")
            before = self.digest(self.source, SOURCE)
            write_random(self.clouds.host(SOURCE), self.source, (PLANTED[0] * MiB, PLANTED[1] * MiB))
            self.planted = self.digest(self.source, SOURCE)
            assert before and self.planted and before != self.planted
        return self.source

    def api(self, row: Mapping[str, Any]) -> Api:
        """The cloud that an instance is in."""
        return self.src if row["cloud"] == "src" else self.dst

    def rows(self) -> dict[str, dict[str, Any]]:
        """What Nova tells of all instances of both clouds."""
        return {row["id"]: {**row, "cloud": api.cloud.name} for api in (self.src, self.dst)
                for row in api.call("GET", "nova", "/servers/detail?all_tenants=1")["servers"]}

    def digest(self, id: str, host: str) -> str:
        """Of the bytes that lie where the source's were planted; empty where there is no disk to be read."""
        there = self.clouds.host(host)
        if there.run("test", "-e", disk(id), check=False).returncode:
            return ""
        return there.run("sh", "-c", READ, "sh", format_of(there, id), *map(str, PLANTED), disk(id)).stdout

    def tidy(self, keep: frozenset[str], was_lost: bool) -> None:
        """Both clouds as they are before a schedule; a source that has lost its data is deleted, so that a new one is made."""
        for id, row in self.rows().items():
            if id not in keep or (id == self.source and was_lost):
                with contextlib.suppress(ApiError):
                    self.api(row).delete(id)
        for api in (self.src, self.dst):
            for image in api.call("GET", "glance", "/images?limit=500")["images"]:
                if image["name"].startswith("backup-"):
                    api.call("DELETE", "glance", f"/images/{image['id']}")
        if was_lost or self.source not in (rows := self.rows()):
            self.source = ""
            return
        if rows[self.source]["locked"]:
            self.src.act(self.source, "unlock")
        for mark in rows[self.source]["metadata"]:
            self.src.call("DELETE", "nova", f"/servers/{self.source}/metadata/{mark}")
        status = settled(self.src, self.source)
        if self.clouds.host(SOURCE).run("virsh", "dominfo", self.source, check=False).returncode and status == "SHUTOFF":
            self.src.act(self.source, "os-start", until="ACTIVE")  # as the refusal says: after a start that failed Nova leaves no domain
        if self.src.server(self.source)["status"] != "SHUTOFF":
            self.src.act(self.source, "os-stop", until="SHUTOFF")


@pytest.fixture(scope="module")
def stage(clouds: Clouds, src: Api, dst: Api, quick: str) -> Iterator[Stage]:
    """The stage, and nothing of it afterwards."""
    for api in (src, dst):  # what a session that was cut off has left
        for row in api.call("GET", "nova", "/servers/detail?all_tenants=1")["servers"]:
            if row["name"] in ("arrived", "victim", "bystander"):
                api.delete(row["id"])
    there = dst.create("bystander", network="none", availability_zone="nova:dst-cmp1", metadata={"migrena:source": "somebody's"})
    dst.act(there, "os-stop", until="SHUTOFF")
    found = Stage(clouds, src, dst, quick, there)
    yield found
    dst.delete(there)
    if found.source:
        src.delete(found.source)


def settled(api: Api, id: str) -> str:
    """The status of an instance, when nothing is under way with it; empty when it is gone."""
    seen = [""]

    def is_settled() -> bool:
        try:
            row = api.call("GET", "nova", f"/servers/{id}")["server"]
        except ApiError as error:
            seen[0] = ""
            return error.status == 404
        seen[0] = row["status"]
        return row["OS-EXT-STS:task_state"] is None

    wait_until(f"{id} to settle", is_settled, 90)
    return seen[0]


@dataclass(frozen=True)
class Look:
    """Everything as it is at one moment."""

    rows: Mapping[str, Mapping[str, Any]]  # of the source and of what was made in this schedule
    running: frozenset[str]  # whose qemu runs, whatever Nova says
    carry: frozenset[str]  # whose disk has the source's bytes
    deleted: tuple[str, ...]  # disks that a qemu works on although they were replaced


@dataclass
class Schedule:
    """One run, the acts of others, and the ways on."""

    stage: Stage
    operator: Operator
    dice: random.Random
    told: list[str] = field(default_factory=list)
    said: str = ""  # by the last command
    used: set[str] = field(default_factory=set)  # made instances that ran with somebody at them: not to be deleted without --yes
    spoiled: set[str] = field(default_factory=set)  # whose data others have destroyed, or that they have deleted
    touched: set[str] = field(default_factory=set)  # instances that others have started, stopped, locked or wiped
    are_two: bool = False  # others have two of one lineage running

    def __post_init__(self) -> None:
        dice, self.source = self.dice, self.stage.ready()
        self.keep = frozenset({self.source, *self.stage.rows()})
        self.place, self.extra = dice.choice([("dst-cmp1", ""), ("dst-cmp1", ""), ("dst-cmp2", ""), ("src-cmp2", ONE_CLOUD)])
        self.target = self.stage.src if self.extra else self.stage.dst
        self.after = dice.choice(["", "", "dst", "dst", "src"])
        self.found = dice.choice(["SHUTOFF", "ACTIVE"])
        if self.found == "ACTIVE":
            self.stage.src.act(self.source, "os-start", until="ACTIVE")
        network = self.target.need("neutron", "networks", "net1")
        extra = {"nics": [{"net-id": network}], "availability_zone": f"nova:{self.place}"}
        self.words = ["-s", self.source, "-d", "arrived", "-f", "tiny", "-i", "guest", "-e", str(extra),
                      *(("-a", self.after) if self.after else ())]

    @property
    def runs(self) -> list[str]:
        """The ids of the schedule's runs."""
        return [path.stem for path in self.operator.folder.glob("**/*.jsonl")]

    def journal_has(self, act: str) -> bool:
        """Whether a run has done this."""
        return any(f'"event": "done", "act": "{act}' in path.read_text() for path in self.operator.folder.glob("**/*.jsonl"))

    # ---- looking ----

    def look(self) -> Look:
        """Everything as it is now."""
        rows = {id: row for id, row in self.stage.rows().items() if id == self.source or id not in self.keep}
        running, deleted = set[str](), list[str]()
        for name in self.stage.clouds.options.hosts:
            for line in self.stage.clouds.host(name).run("sh", "-c", LOOK).stdout.splitlines():
                if "/" in line:
                    deleted.append(f"{name}:{line}")
                elif line in rows:
                    running.add(line)
        carry = {id for id, row in rows.items() if (host := row["OS-EXT-SRV-ATTR:host"]) and self.stage.digest(id, host) == self.stage.planted}
        return Look(rows, frozenset(running), frozenset(carry), tuple(deleted))

    def holds(self, now: Look, *, is_asked: bool = False, is_others: bool = False) -> None:
        """What must hold at every moment; `is_asked`: a person has given --yes; `is_others`: after what others did."""
        told = f"{'; '.join(self.told)}\n{self.said}"
        there = self.stage.rows()
        for id in self.keep - self.spoiled:
            assert id in there, f"{id} was deleted, which the run did not make: {told}"
        assert self.source in now.carry or self.source in self.spoiled, f"the source's data is gone: {told}"
        for id in self.used - self.spoiled:
            assert id in now.rows or is_asked, f"{id} had been used and was deleted: {told}"
        assert not now.deleted, f"a qemu works on a disk that was replaced: {now.deleted}: {told}"
        both = now.running & now.carry
        if is_others:
            self.are_two = len(both) > 1
        assert len(both) < 2 or self.are_two, f"two machines run with the same data: {both}: {told}"
        self.are_two = self.are_two and len(both) > 1
        self.used |= (now.carry if self.source in self.spoiled else both) - {self.source}  # the only whole copy, or one that runs

    # ---- what others do ----

    def others(self) -> None:
        """Somebody does something to one of the two instances, as an admin may; what Nova refuses does not happen."""
        made = [id for id in self.look().rows if id != self.source]
        name = self.dice.choice([*ACTS])
        id = self.source if "source" in name or not made else made[0]
        if "destination" in name and not made:
            return
        api = self.stage.src if id == self.source else self.target
        outcome = "done"
        try:
            ACTS[name](self, api, id)
        except ApiError as error:
            outcome = str(error.status)
        self.told.append(f"others: {name} ({outcome})")
        self.holds(self.look(), is_others=True)

    def start(self, api: Api, id: str) -> None:
        """Starts an instance, locked or not."""
        self.touched.add(id)
        api.act(id, "os-start")
        if settled(api, id) == "ACTIVE" and id != self.source and self.journal_has("stop destination"):
            self.used.add(id)

    def stop(self, api: Api, id: str) -> None:
        """Stops an instance."""
        self.touched.add(id)
        api.act(id, "os-stop")
        settled(api, id)

    def delete(self, api: Api, id: str) -> None:
        """Deletes the destination."""
        self.spoiled.add(id)
        api.delete(id)

    def rebuild(self, api: Api, id: str) -> None:
        """Has Nova make the instance's disk anew."""
        self.spoiled.add(id)
        self.touched.add(id)
        api.act(id, "rebuild", {"imageRef": api.need("glance", "images", "guest")})
        settled(api, id)

    def back_up(self, api: Api, id: str) -> None:
        """Takes a snapshot, which goes on while our run does; not of a raw disk, of which Nova uploads every zero."""
        if api.server(id)["OS-EXT-SRV-ATTR:host"] not in HYPERVISORS.images:
            api.act(id, "createImage", {"name": f"backup-{id}"})

    def lock(self, api: Api, id: str) -> None:
        """Locks an instance for a reason of its own."""
        self.touched.add(id)
        api.act(id, "lock", {"locked_reason": "an audit"})

    def unlock(self, api: Api, id: str) -> None:
        """Unlocks an instance."""
        self.touched.add(id)
        api.act(id, "unlock")

    def wipe(self, api: Api, id: str) -> None:
        """Takes all metadata off an instance."""
        self.touched.add(id)
        api.call("PUT", "nova", f"/servers/{id}/metadata", {"metadata": {}})

    def unlock_and_start(self, api: Api, id: str) -> None:
        """Does what an admin does who wants the machine up."""
        self.unlock(api, id)
        self.start(api, id)

    def roll_back(self, api: Api, id: str) -> None:
        """Another operator, who does not know of this run, wants it undone."""
        folder = self.operator.folder / "elsewhere"
        folder.mkdir(exist_ok=True)
        hasty = ("LEASE_LIMIT: Final = 75.0", "LEASE_LIMIT: Final = 5.0")  # a run that lives shows that it does all the time
        elsewhere = dataclasses.replace(self.operator, folder=folder).with_build(hasty)
        done = elsewhere.run("rollback", "--run-of", self.source, extra=self.extra)
        shutil.rmtree(folder / "state", ignore_errors=True)
        assert done.returncode == 3, f"undone although the run is alive: {self.told}\n{done.stderr}"

    # ---- what we do ----

    def throws(self, often: float) -> list[tuple[str | int, int]]:
        """At which lines a command stands still, and at which it is ended, if at any."""
        dice, lines = self.dice, sorted(self.dice.sample(range(1, MOMENTS), 3))
        halts: list[tuple[str | int, int]] = [(line, HALT) for line in lines[:2] if dice.random() < often]
        return halts + ([(lines[2], dice.choice([KILL, KILL, INT, TERM]))] if dice.random() < often else [])

    def go(self, *words: str, often: float = 0.0, extra: str = "") -> int:
        """The exit code of a command of ours, into which others meddle; what it told is compared with what is."""
        before, acts = self.look(), sum("others" in line for line in self.told)
        throw = self.throws(often)
        process = self.operator.begin(*words, extra=extra or self.extra, throw=throw)
        while self.operator.has_halted(process):
            self.holds(self.look())
            self.others()
            self.operator.halt(self.operator.begun.index(process)).unlink(missing_ok=True)
        out, self.said = process.communicate(timeout=60)
        code = process.returncode
        self.told.append(f"{' '.join(words if len(words) < 4 else words[-2:])}{' (swapped)' if extra else ''}, {throw}: {code}")
        assert code in CODES and "Traceback" not in self.said, f"{self.told}\n{out}\n{self.said}"
        now = self.look()
        self.holds(now, is_asked="--yes" in words)
        is_alone = acts == sum("others" in line for line in self.told)
        self.is_as_told(code, words[0], before, now, is_alone)
        return code

    def is_as_told(self, code: int, word: str, before: Look, now: Look, is_alone: bool) -> None:
        """What the exit code and the last lines say is so."""
        told = f"{'; '.join(self.told)}\n{self.said}"
        source, made = now.rows.get(self.source), [id for id in now.rows if id != self.source]
        is_held = source and (any(key.startswith("migrena:") for key in source["metadata"])
                              or (source["locked"] and re.match(r"migrena run \S+$", source["locked_reason"] or "")))
        if code == 3 and is_alone:
            assert {id: facts(row) for id, row in now.rows.items()} == {id: facts(row) for id, row in before.rows.items()}, told
        if code == 4:
            assert all(id in self.said for id in made) and (not is_held or self.source in self.said), f"left, and not told: {told}"
        if code in (1, 128 + INT, 128 + TERM) or (code == 0 and word == "rollback"):
            assert not set(made) - self.spoiled and not is_held, f"told as rolled back, and is not: {made} {source}: {told}"
            if source and self.source not in self.touched:
                assert source["status"] == self.found, f"told as rolled back, and the source is {source['status']}: {told}"
        if code == 0 and word != "rollback" and not set(made) & self.spoiled:
            self.is_complete(now, made, told)
        if code in (0, 1, 128 + INT, 128 + TERM):
            self.nothing_lies_about()

    def is_complete(self, now: Look, made: list[str], told: str) -> None:
        """A run that has succeeded has made one instance, which has what the source has."""
        (id,) = made
        assert id in now.carry and not is_under_way(now.rows[id]), told
        if not {id, self.source} & now.running and self.source not in self.spoiled:
            hosts = self.stage.clouds.host(SOURCE), self.stage.clouds.host(self.place)
            assert same_to_both_guests(hosts[0], self.source, hosts[1], id), f"the copy is not equal: {told}"
        if self.after == "dst" and id not in self.touched:
            assert id in now.running, told

    def nothing_lies_about(self) -> None:
        """No process and no file of the schedule's runs is on a hypervisor."""
        def left() -> list[str]:
            return [line for name in {SOURCE, self.place} for line in left_on(self.stage.clouds.host(name)) if any(run in line for run in self.runs)]

        limit = time.monotonic() + 10
        while there := left():
            assert time.monotonic() < limit, f"left on a hypervisor: {there}: {self.told}\n{self.said}"
            time.sleep(0.5)

    def way_on(self) -> int:
        """One of the ways that an operator may try."""
        run, dice = self.operator.last_run, self.dice
        way = dice.choice(["resume", "resume", "rollback", "rollback", "rollback --yes", "swapped", "without journal"])
        if way == "swapped":
            code = self.go(dice.choice(["rollback", "resume"]), run, extra=SWAPPED)
            assert code == 3 or self.extra, f"{self.told}\n{self.said}"
            return code
        if way == "without journal":
            state = self.operator.folder / "state"
            state.rename(self.operator.folder / "lost")
            code = self.go("rollback", "--run-of", self.source)
            shutil.rmtree(state, ignore_errors=True)
            (self.operator.folder / "lost").rename(state)
            return code
        return self.go(*way.split()[:1], run, *way.split()[1:], often=0.3)


def facts(row: Mapping[str, Any]) -> tuple[object, ...]:
    """What a command that was refused has not changed."""
    return row["status"], row["locked"], row["locked_reason"], row["metadata"]


def is_under_way(row: Mapping[str, Any]) -> bool:
    """Whether an instance carries a mark of a run that has not ended."""
    return "migrena:made" in row["metadata"]


Act = Callable[[Schedule, Api, str], None]
ACTS: dict[str, Act] = {
    "start source": Schedule.start, "unlock and start source": Schedule.unlock_and_start, "stop source": Schedule.stop,
    "rebuild source": Schedule.rebuild, "snapshot source": Schedule.back_up, "lock source": Schedule.lock,
    "unlock source": Schedule.unlock, "wipe source": Schedule.wipe, "start destination": Schedule.unlock_and_start,
    "stop destination": Schedule.stop, "delete destination": Schedule.delete, "rebuild destination": Schedule.rebuild,
    "snapshot destination": Schedule.back_up, "lock destination": Schedule.lock, "wipe destination": Schedule.wipe,
    "rollback --run-of source by another operator": Schedule.roll_back,
}


def test_whatever_others_do_nothing_is_lost_and_never_two_run(
        stage: Stage, operator: Operator, number: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch,
        record_property: Callable[[str, object], None]) -> None:
    monkeypatch.setenv("MIGRENA_CHUNK", "4M")
    seed = request.config.getoption("--random-seed")
    print(f"again: pytest clouds/test_adversary.py --random-schedules {number + 1} --random-seed {seed} -k '[{number}]'")
    began, schedule = time.monotonic(), Schedule(stage, operator, random.Random(f"{seed} {number}"))
    keep, codes = schedule.keep, list[int]()
    try:
        codes.append(schedule.go(*schedule.words, often=0.7))
        assert codes[0] != 3 or len(schedule.told) > 1, f"refused although nobody had done anything: {schedule.said}"
        while codes[-1] in (0, 4, -KILL) and len(codes) < 4 and (codes[-1] or (len(codes) == 1 and schedule.dice.random() < 0.3)):
            codes.append(schedule.way_on())
    finally:
        for process in operator.begun:
            if process.poll() is None:
                process.kill()
                process.communicate()
        stage.tidy(keep, stage.source in schedule.spoiled)
        print(f"{time.monotonic() - began:.0f} s: {'; '.join(schedule.told)}; planted {stage.planted}")
    record_property("random schedule", f"ended with {codes[-1]}")
