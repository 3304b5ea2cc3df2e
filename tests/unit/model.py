"""A model of two clouds (or of one that is both sides), since no real ones could be led through ten thousand schedules a minute.

migrena's own code runs on it, from `main` down to novaclient and to the programs on the hosts: those are stand-ins. Time is simulated. Whatever
migrena asks of a cloud or a host is a *point*, with a label (`source.stop`) and a number; at each, somebody else may act (see people.py).
A disk holds a lineage (whose data it is) and a version (which grows while a machine that has it open runs).
What must never happen is noted in `World.broken`, each with the number of the invariant:

1 never two machines that run with the same lineage, unless a person asked for it
2 a whole copy of the newest data of the source exists, unless a person has destroyed it
3 nothing is deleted, overwritten, stopped or unlocked that the run did not make or lock
4 what is told of what is left is so
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any, ClassVar, NoReturn

from novaclient import exceptions

import migrena

ALPHA, BETA = "http://alpha", "http://beta"
HOST_OF = {ALPHA: "cmp-a", BETA: "cmp-b"}
SOURCE = "11111111-2222-3333-4444-555555555555"
FOLDER = "/var/lib/nova/instances/"
EPOCH = datetime(2026, 1, 1, tzinfo=timezone.utc)
RACE = 1.0  # seconds between a look and its act, in which what somebody else does is not seen by anybody
MOMENT = 0.05  # seconds that an API takes for an answer
LEASE = 60.0  # seconds that what a dead process had on the hosts lives on
FLAVOR = {"original_name": "small", "vcpus": 1, "ram": 512, "disk": 10, "ephemeral": 0, "swap": 0}
IMAGE = {"id": "image-1", "name": "debian", "status": "active", "os_hash_value": "hash-1", "checksum": "sum-1"}


class Killed(BaseException):
    """kill -9: from here on nothing that this process does has any effect."""


@dataclass(eq=False)
class File:
    """A disk on a hypervisor."""

    lineage: str
    version: int
    whole: bool = True
    inode: int = 0
    stamp: int = 0  # of the last change
    hold: Process | None = None  # who has qemu's lock on it

    def same(self, other: File) -> bool:
        """Whether it is another's copy, all of it."""
        return (self.lineage, self.version, self.whole) == (other.lineage, other.version, True)


@dataclass(eq=False)
class Machine:
    """An instance as Nova has it."""

    id: str
    name: str
    cloud: str
    host: str
    metadata: dict[str, str]
    status: str = "BUILD"
    task: str | None = "spawning"
    power: int = 0
    locked: bool = False
    reason: str | None = None
    locked_by: str = ""  # admin or tenant
    his_lock: bool = False  # whether a person has locked it, for a reason of his own
    open: File | None = None  # what its qemu has open
    actions: list[SimpleNamespace] = field(default_factory=list)  # the newest first
    maker: Process | None = None
    run: str = ""  # that made it
    moved: bool = False  # to another host by a person: who looks for a run there, finds none
    wiped: bool = False  # whether a person has wiped its metadata: only a journal tells of it
    used: bool = False  # it may hold data of its own: it ran for somebody, after it was complete or because he started it

    @property
    def path(self) -> str:
        """Its disk."""
        return f"{FOLDER}{self.id}/disk"

    def row(self, admin: bool) -> dict[str, Any]:
        """As Nova's API shows it."""
        shown = {"id": self.id, "name": self.name, "status": self.status, "OS-EXT-STS:power_state": self.power, "locked": self.locked,
                 "OS-EXT-STS:task_state": self.task, "locked_reason": self.reason, "metadata": dict(self.metadata),
                 "image": {"id": "image-1"}, "flavor": FLAVOR}
        return {**shown, "OS-EXT-SRV-ATTR:host": self.host, "OS-EXT-SRV-ATTR:hypervisor_hostname": self.host} if admin else shown


@dataclass(eq=False)
class Process:
    """One migrena."""

    words: str
    events: dict[int | str, str]
    folder: str  # of its journals and locks
    run: str = ""
    alive: bool = True
    until: float = 0.0  # what a dead one has on the hosts lives so long
    trail: list[str] = field(default_factory=list)  # the labels of its points
    counts: Counter[str] = field(default_factory=Counter)
    loses: bool = False  # the next answer to something that changes a server
    refused: bool = False  # the next of these is refused: a network that is not there, a quota, a policy
    wire_breaks: bool = False
    people: int = 0  # acts of others meanwhile
    changes: list[str] = field(default_factory=list)  # what it has changed in the clouds
    after: str = ""  # what the run is to start
    said: list[str] = field(default_factory=list)
    code: int | None = None

    @property
    def yes(self) -> bool:
        """Whether a person said --yes."""
        return "--yes" in self.words

    @property
    def wants_two(self) -> bool:
        """Whether a person asked for both to run, or for another copy beside the first."""
        return self.after in ("all", "src") or (self.yes and self.words.startswith("copy"))


class World:
    """Everything there is: clouds, hosts, files, processes and the clock."""

    def __init__(self, one_cloud: bool = False, was: str = "ACTIVE") -> None:
        self.now, self.number, self.is_admin, self.last_touch = 100.0, 0, True, -100.0
        self.away_until = {ALPHA: 0.0, BETA: 0.0}
        self.clouds: dict[str, dict[str, Machine]] = {ALPHA: {}, BETA: {}}
        self.sides = [ALPHA, ALPHA if one_cloud else BETA]  # as the config names them
        self.files: dict[tuple[str, str], File] = {}
        self.folders: dict[tuple[str, str], Process] = {}
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.newest: dict[str, int] = {}
        self.broken: list[str] = []
        self.stack: list[Process] = []  # the migrenas that live, the one at work last
        self.journals: list[migrena.Journal] = []
        self.runs: list[Process] = []  # the commands that have ended
        self.top: list[Process] = []  # those of them that are steps of the schedule
        self.act: Callable[[str], None] = lambda what: None  # of somebody else: people.py
        self.source = self.add(ALPHA, "web", "cmp-a", SOURCE, {}, "guest")
        self.is_person = False  # whether it is a person who acts just now
        self.given_up = False  # whether a run has moved the source, and nobody has unlocked it since: no user of it can start it
        self.found: dict[str, str] = {}  # the status in which a run has found the source, by the run; empty where people have acted since
        self.settle(10)
        if was != "ACTIVE":
            self.stop(self.source)
            self.settle(1)
        self.source.used = True

    # time and files

    def settle(self, seconds: float) -> None:
        """Time passes; guests write, and what Nova is about is done."""
        self.now += seconds
        if self.later:
            due = [what for when, what in self.later if when <= self.now]
            self.later = [entry for entry in self.later if entry[0] > self.now]
            for what in due:
                what()
        for machines in self.clouds.values() if seconds > MOMENT else ():
            for machine in machines.values():
                if machine.open:
                    self.write(machine.open)

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        """Nova does it so much later."""
        self.later.append((self.now + seconds, what))

    def write(self, file: File) -> None:
        """A guest writes."""
        file.version = file.stamp = int(self.now * 1000)
        if file.whole and file.lineage in self.newest:
            self.newest[file.lineage] = file.version

    def machines(self) -> list[Machine]:
        """Of both clouds."""
        return [*self.clouds[ALPHA].values(), *self.clouds[BETA].values()]

    def next(self) -> int:
        """A number that nothing else has."""
        self.number += 1
        return self.number

    def breaks(self, what: str, *, excused: bool = True) -> None:
        """An invariant is broken, unless what somebody else has just done could be seen by nobody."""
        if not excused or self.now - self.last_touch > RACE:
            self.broken.append(what)

    def lives(self, process: Process | None) -> bool:
        """Whether a process, or what it has on the hosts, lives."""
        return process is not None and ((process.alive and process in self.stack) or self.now < process.until)

    def drop(self, host: str, prefix: str) -> None:
        """Files go; what is lost with them must be whole elsewhere, or a person has destroyed it."""
        for key in [key for key in self.files if key[0] == host and key[1].startswith(prefix)]:
            self.lose(self.files.pop(key))

    def lose(self, file: File) -> None:
        """What this file held is no more in it."""
        if file.lineage not in self.newest or not file.whole:
            return
        best = max((other.version for other in self.files.values() if other.whole and other.lineage == file.lineage), default=0)
        if best < self.newest[file.lineage]:
            process = self.stack[-1] if self.stack and not self.is_person else None
            if process and not (process.yes and (best or self.has_source)):
                self.breaks(f"2 {process.words}: the newest data of {file.lineage} is lost, "
                            f"{'an older copy is left' if best else 'no copy is left'}")
            self.newest[file.lineage] = best

    @property
    def has_source(self) -> bool:
        """Whether the source is still there, with whatever data."""
        return self.source.id in self.clouds[self.source.cloud]

    # what Nova does

    def add(self, cloud: str, name: str, host: str, id: str, metadata: Mapping[str, str], lineage: str) -> Machine:
        """A machine that is being built."""
        machine = self.clouds[cloud][id] = Machine(id, name, cloud, host, dict(metadata))
        file = self.files[host, machine.path] = File(lineage, 1, inode=self.next())
        if lineage == "guest":
            self.newest[lineage] = 1
        self.note(machine, "create")
        machine.open = file

        def built() -> None:
            if machine.task == "spawning":
                machine.status, machine.task, machine.power = "ACTIVE", None, 1

        self.after(0.5, built)
        return machine

    def note(self, machine: Machine, action: str, error: str = "") -> SimpleNamespace:
        """An instance action; what novaclient answers to what has brought it about."""
        request = f"req-{self.next()}"
        at = (EPOCH + timedelta(seconds=self.now)).replace(tzinfo=None).isoformat()
        events = [{"event": f"compute_{action}", "result": "Error" if error else "Success", "details": error, "finish_time": at, "start_time": at}]
        machine.actions.insert(0, SimpleNamespace(action=action, request_id=request, message="Error" if error else None,
                                                  start_time=at, updated_at=at, events=events))
        return SimpleNamespace(request_ids=[request])

    def require(self, machine: Machine, *states: str) -> None:
        """409 where the machine is in none of these states, or a task is under way."""
        if machine.task or (states and machine.status not in states):
            raise exceptions.Conflict(409, f"Cannot do this while it is in {machine.status} {machine.task}")

    def start(self, machine: Machine) -> SimpleNamespace:
        """Opens the disk at once; ACTIVE a little later. Where qemu's lock is held, it fails, and only the actions tell."""
        self.require(machine, "SHUTOFF")
        file, machine.task = self.files.get((machine.host, machine.path)), "powering-on"
        error = "No such file" if not file else 'Failed to get "write" lock' if self.lives(file.hold) else ""
        answer = self.note(machine, "start", error)
        machine.open = None if error else file
        if machine.open:
            self.write(machine.open)

        def settled() -> None:
            if machine.task == "powering-on":
                machine.task = None
                machine.status, machine.power = ("ACTIVE", 1) if machine.open else ("SHUTOFF", 4)

        self.after(0.3, settled)
        return answer

    def stop(self, machine: Machine) -> SimpleNamespace:
        """SHUTOFF a little later."""
        self.require(machine, "ACTIVE", "ERROR")
        machine.task = "powering-off"
        answer = self.note(machine, "stop")

        def settled() -> None:
            if machine.task == "powering-off":
                machine.task, machine.status, machine.power, machine.open = None, "SHUTOFF", 4, None

        self.after(0.3, settled)
        return answer

    def delete(self, machine: Machine) -> None:
        """Gone, with its folder."""
        machine.open = None
        self.clouds[machine.cloud].pop(machine.id, None)
        self.drop(machine.host, f"{FOLDER}{machine.id}/")

    def twins(self, machine: Machine) -> list[Machine]:
        """The other machines that run with the data that this one has."""
        file = machine.open or self.files.get((machine.host, machine.path))
        return [other for other in self.machines() if other is not machine and other.open and file and other.open.lineage == file.lineage
                and file.lineage in self.newest]

    # what migrena asks for

    @property
    def process(self) -> Process:
        """The migrena at work."""
        return self.stack[-1]

    def point(self, label: str, seconds: float = MOMENT) -> None:
        """migrena asks for something: others act first."""
        process = self.process
        if not process.alive:
            raise Killed
        self.settle(min(seconds, MOMENT))
        number = len(process.trail)
        process.trail.append(label)
        process.counts[label] += 1
        for key in (number, f"{label}#{process.counts[label]}"):
            if key in process.events:
                for what in process.events.pop(key).split(" + "):
                    self.act(what)
                if not process.alive:
                    raise Killed
        if seconds > MOMENT:
            self.settle(seconds - MOMENT)

    def changes(self, what: str, machine: Machine) -> None:
        """migrena changes something; a machine that is neither the source nor made by a run is nobody's to change."""
        self.process.changes.append(f"{what} {machine.name}")
        if machine is not self.source and not machine.run:
            self.breaks(f"3 {self.process.words}: {what} of {machine.name}, which no run has made", excused=False)

    def sees_to_start(self, machine: Machine) -> None:
        """migrena is about to start a machine."""
        has_journal = not self.process.words.startswith(("copy", "elsewhere")) and "--run-of" not in self.process.words
        twins = [twin for twin in self.twins(machine) if has_journal or not twin.wiped]
        if twins and not self.process.wants_two:
            self.breaks(f"1 {self.process.words}: {machine.name} is started while {', '.join(twin.name for twin in twins)} runs with its data")

    def sees_to_delete(self, machine: Machine) -> None:
        """migrena is about to delete a machine."""
        words = self.process.words
        if not machine.run:
            self.breaks(f"3 {words}: {machine.name} is deleted, which no run has made", excused=False)
        elif "--run-of" not in words and self.process.run and machine.run != self.process.run:
            self.breaks(f"3 {words}: {machine.name} is deleted, which another run has made", excused=False)
        elif machine.maker is not self.process and self.lives(machine.maker) and not self.source.moved:
            self.breaks(f"3 {words}: {machine.name} is deleted, which a run that lives is making")
        elif machine.used and not self.process.yes:
            self.breaks(f"3 {words}: {machine.name} is deleted, which was in use")

    def sees_to_unlock(self, machine: Machine) -> None:
        """migrena is about to take a lock off."""
        if machine.his_lock and machine.locked and not (machine.run and self.process.yes):
            self.breaks(f"3 {self.process.words}: the lock that a person has set on {machine.name} is taken off")


class Servers:
    """novaclient's servers, of one cloud as one side of one migrena sees it."""

    def __init__(self, world: World, side: str, url: str) -> None:
        self.world, self.side, self.url = world, side, url

    def reach(self, verb: str, id: str = "", *, admin: bool = False) -> Machine:
        """The machine that is asked for, through an API that may be away."""
        world = self.world
        world.point(f"{self.side}.{verb}")
        if world.now < world.away_until[self.url]:
            raise exceptions.ClientException(503, "Service Unavailable")
        if admin and not world.is_admin:
            raise exceptions.Forbidden(403, "Policy doesn't allow this to be performed")
        if not id:
            return world.source
        if id not in world.clouds[self.url]:
            raise exceptions.NotFound(404, "Instance could not be found")
        return world.clouds[self.url][id]

    @contextlib.contextmanager
    def changing(self, verb: str, id: str, is_held: bool = True) -> Iterator[Machine]:
        """The machine that is to be changed; the answer may be lost."""
        world = self.world
        machine = self.reach(verb, id)
        self.let()
        if is_held and machine.locked and not world.is_admin:
            raise exceptions.Conflict(409, "Instance is locked")
        world.changes(verb, machine)
        yield machine
        self.answer()

    def let(self) -> None:
        """400 where Nova takes offence."""
        if self.world.process.refused:
            self.world.process.refused = False
            raise exceptions.BadRequest(400, "Network 42 could not be found.")

    def answer(self) -> None:
        """What was done is done; its answer may be lost."""
        if self.world.process.loses:
            self.world.process.loses = False
            raise exceptions.ClientException(504, "Gateway Timeout")

    def shown(self, machine: Machine) -> Any:
        """A machine as novaclient gives it."""
        row = machine.row(self.world.is_admin)
        return SimpleNamespace(id=machine.id, name=machine.name, to_dict=lambda: row)

    def get(self, id: str) -> Any:
        return self.shown(self.reach("get", id))

    def list(self, search_opts: object = None, limit: int | None = None) -> list[Any]:
        self.reach("list")
        return [self.shown(machine) for machine in self.world.clouds[self.url].values()]

    def create(self, name: str, image: str, flavor: str, meta: Mapping[str, str], **extra: object) -> Any:
        if "_create" in vars(self):  # a trial, of which nothing is sent
            return None
        self.reach("create")
        self.let()
        world = self.world
        id = f"00000000-0000-0000-0000-{world.next():012}"
        machine = world.add(self.url, name, "cmp-b" if world.sides[0] == world.sides[1] else HOST_OF[self.url], id, meta, f"fresh {id}")
        machine.run, machine.maker = world.process.run, world.process
        world.changes("create", machine)
        self.answer()
        return self.shown(machine)

    def delete(self, id: str) -> None:
        with self.changing("delete", id) as machine:
            self.world.sees_to_delete(machine)
            self.world.delete(machine)

    force_delete = delete

    def stop(self, id: str) -> SimpleNamespace:
        with self.changing("stop", id) as machine:
            if machine.run and machine.used and not self.world.process.yes:
                self.world.breaks(f"3 {self.world.process.words}: {machine.name} is stopped, which was in use")
                machine.used = self.world.now - self.world.last_touch > RACE  # else nobody could see it
            return self.world.stop(machine)

    def start(self, id: str) -> SimpleNamespace:
        with self.changing("start", id) as machine:
            self.world.require(machine, "SHUTOFF")
            self.world.sees_to_start(machine)
            answer = self.world.start(machine)
            machine.used = machine.used or machine.open is not None
            return answer

    def lock(self, id: str, reason: str | None = None) -> SimpleNamespace:
        with self.changing("lock", id, is_held=False) as machine:
            machine.his_lock = machine.his_lock and self.world.now - self.world.last_touch > RACE  # else nobody could see it
            machine.locked, machine.reason, machine.locked_by = True, reason, "admin" if self.world.is_admin else "tenant"
            return self.world.note(machine, "lock")

    def unlock(self, id: str) -> SimpleNamespace:
        with self.changing("unlock", id, is_held=False) as machine:
            if machine.locked_by == "admin" and not self.world.is_admin:
                raise exceptions.Forbidden(403, "Policy doesn't allow os_compute_api:os-lock-server:unlock:unlock_override to be performed.")
            self.world.sees_to_unlock(machine)
            if machine.locked:
                machine.locked, machine.reason, machine.locked_by, machine.his_lock = False, None, "", False
            return self.world.note(machine, "unlock")

    def set_meta(self, id: str, meta: Mapping[str, str]) -> None:
        with self.changing("set_meta", id) as machine:
            machine.metadata.update(meta)

    def delete_meta(self, id: str, keys: Sequence[str]) -> None:
        with self.changing("delete_meta", id) as machine:
            for key in keys:
                machine.metadata.pop(key, None)


class Actions:
    """novaclient's instance actions."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers

    def list(self, id: str, **more: object) -> list[SimpleNamespace]:
        return list(self.servers.reach("actions", id).actions)

    def get(self, id: str, request: str) -> SimpleNamespace:
        return next(action for action in self.servers.reach("action", id).actions if action.request_id == request)


class Modelled(migrena.Cloud):
    """migrena's own Cloud, over the model's servers."""

    world: World

    def __init__(self, label: str, creds: Mapping[str, Any], glance_endpoint: str = "") -> None:
        self.label, self.url, self._version = label, str(creds["auth_url"]), (2, 96)
        servers = Servers(self.world, label, self.url)
        with self.translating("sign in"):
            servers.reach("sign in")
        some = SimpleNamespace
        self._nova = some(servers=servers, instance_action=Actions(servers),
                          flavors=some(list=lambda is_public: [some(to_dict=lambda: {**FLAVOR, "id": "flavor-1", "name": "small"})]),
                          hypervisors=some(list=lambda detailed: servers.reach("hypervisors", admin=True)),
                          limits=some(get=lambda: some(absolute=[])))
        self.store = migrena.ImageStore(self, some(images=some(list=lambda filters: [IMAGE], get=lambda id: IMAGE)))
        self.identity, self.has_volumes = {"nova": self.url, "region": "", "project": "p"}, False
        self.networks: Any = some(all=lambda *_: [], made_by=lambda *_: [])

    @staticmethod
    def polls() -> Iterator[float]:
        """Fewer turns than the real ones, for the same time."""
        pause = 0.2
        while True:
            yield pause
            Modelled.world.point("sleep", pause)
            pause = min(pause * 2, 30.0)


class HostStandIn:
    """A hypervisor: the few words that are asked of it outside of what moves a disk."""

    keys: ClassVar[dict[str, tuple[str, str]]] = {}  # for Ceph, of which the model has none
    further: ClassVar[list[migrena.Host]] = []  # it has one disk

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name, self.nbd_address = world, name, "10.0.0.1"
        self.first_address = self.nbd_address

    def disk_of(self, id: str) -> str:
        return f"/var/lib/nova/instances/{id}/disk"

    def file(self, path: str) -> File | None:
        return self.world.files.get((self.name, path))

    def run(self, *words: str, stdin: bytes = b"", seconds: float = 60.0) -> migrena.Answer:
        if words[0] == "rm":
            self.world.point(f"{self.name}.rm")
            for path in words[words.index("--") + 1 :]:
                self.remove(path)
        elif words[:3] == ("stat", "-c", "%i"):
            return self.said(self.inode(words[-1]))
        elif words[:4] == ("stat", "-c", "%s", "--"):
            return self.said("1")
        elif words[0] != "true":
            self.unknown(words)
        return self.said("")

    def said(self, printed: str) -> migrena.Answer:
        """What a command has printed."""
        return migrena.Answer(printed, self.name, ())

    def unknown(self, words: Sequence[str]) -> NoReturn:
        """The model must be told of every word."""
        self.world.broken.append(f"the model does not know {words}")
        raise NotImplementedError(words)

    def remove(self, path: str) -> None:
        owner = self.world.folders.pop((self.name, path), None)
        if owner and owner is not self.world.process and self.world.lives(owner):
            self.world.breaks(f"3 {self.world.process.words}: a private folder of a run that lives is removed", excused=False)
        self.world.drop(self.name, path)

    def inode(self, path: str) -> str:
        file = self.file(path)
        return str(file.inode) if file else ""

    def script(self, script: str, *values: str, stdin: bytes = b"") -> migrena.Answer:
        if script == migrena.LEFT_FOLDERS:
            self.world.point(f"{self.name}.folders")
            return self.said("".join(f"{path}\n" for (host, path), owner in self.world.folders.items()
                                     if host == self.name and self.world.lives(owner) and owner.run == values[0]))
        if script == migrena.REMOVE_NEW:
            self.world.point(f"{self.name}.rm")
            for path in migrena.files_beside(*values):
                self.remove(path)
            return self.said("")
        if "stat -c %i" in script:
            return self.said(self.inode(values[0]))
        if script == migrena.PRIVATE_FILES or "stat -c %b" in script or values[0].endswith("/hold.pid"):  # a lease tells whether it holds
            return self.said("")
        if migrena.DOMAIN_STATE in script:
            return self.said(f"{'1' + chr(10) if 'stat' in script else ''}{self.state(values[0])}")
        return self.unknown((script, *values))

    def state(self, id: str) -> str:
        """What libvirt says of an instance's domain."""
        machine = next((machine for machine in self.world.machines() if (machine.id, machine.host) == (id, self.name)), None)
        if not machine:
            raise migrena.CommandError(self.name, ("virsh",), 1, "Domain not found")
        return "paused (user)" if machine.open and machine.status == "PAUSED" else "running (booted)" if machine.open else "shut off (shutdown)"

    def succeeds(self, *words: str) -> bool:
        if words[0] == "test":
            return self.file(words[-1]) is not None
        return words[0] == "true"

    @contextlib.contextmanager
    def private_folder(self, run: str) -> Iterator[str]:
        self.world.point(f"{self.name}.folder")
        path, owner = f"/run/migrena-{run}-{self.world.next()}", self.world.process
        self.world.folders[self.name, path] = owner
        try:
            yield path
        finally:
            if owner.alive:
                self.world.folders.pop((self.name, path), None)

    def confirm_all_ended(self) -> None:
        self.world.point(f"{self.name}.confirm")

    def reconnect(self) -> None:
        self.world.point(f"{self.name}.reconnect")

    def close(self) -> None:
        """Nothing is open."""


class Disks:
    """What migrena does with disks, done to the model's files; each takes the place of migrena's function of its name."""

    def __init__(self, world: World) -> None:
        self.world = world

    def connect(self, name: str, settings: migrena.Settings, screen: migrena.Screen) -> HostStandIn:
        self.world.point(f"{name}.connect")
        return HostStandIn(self.world, name)

    def domain_of(self, host: HostStandIn, id: str, path: str) -> SimpleNamespace:
        drive = SimpleNamespace(path=path, format="qcow2", storage={}, volume="")
        return SimpleNamespace(drives={migrena.ROOT: drive}, state=host.state(id), ended="")

    def disk_chain(self, host: HostStandIn, path: str, format: str, *, shared: bool) -> tuple[migrena.DiskImage, ...]:
        file = self.world.files.get((host.name, path))
        if not file:
            raise migrena.HostError(f"{host.name}: no disk {path}")
        if not shared:
            self.require_free(host, path)
        return (migrena.DiskImage(path, "qcow2", size=10 * 1024**3, length=1024**3, allocated=1024**3, backing="/base", backing_format="raw"),
                migrena.DiskImage("/base", "raw", size=1024**3, length=1024**3, allocated=1024**3))

    def survey_disks(self, host: HostStandIn, instance: str, path: str, *, shared: bool, only: Sequence[str] = ()) -> dict[str, migrena.Disk]:
        self.world.point(f"{host.name}.survey disk")
        return {migrena.ROOT: migrena.Disk(self.disk_chain(host, path, "qcow2", shared=shared))}

    def stand_of(self, host: HostStandIn, node: migrena.Node) -> str:
        file = self.world.files.get((host.name, node.place))
        return f"1 {file.stamp} {file.stamp} {file.inode}" if file else ""

    def require_free(self, host: HostStandIn, path: str) -> File:
        """The file at a path that no guest and no other run has open; raises CommandError as qemu-img does."""
        file = self.world.files.get((host.name, path))
        if not file:
            raise migrena.CommandError(host.name, ("qemu-img",), 1, f"Could not open '{path}': No such file or directory")
        if any(machine.open is file for machine in self.world.machines()) or (file.hold is not self.world.process and self.world.lives(file.hold)):
            raise migrena.CommandError(host.name, ("qemu-img",), 1, 'Failed to get shared "write" lock')
        return file

    @contextlib.contextmanager
    def held(self, host: HostStandIn, node: migrena.Node, folder: str) -> Iterator[tuple[SimpleNamespace, None]]:
        """qemu's lock, by a process that has the file open and may lose it."""
        world = self.world
        world.point(f"{host.name}.hold")
        file, process = self.require_free(host, node.place), world.process
        file.hold = process

        def check(*, is_running: bool = False) -> None:
            if file.hold is not process:
                raise migrena.HostError(f"{host.name}: the lock on {node.place} was lost")

        try:
            yield SimpleNamespace(check=check, release=lambda: None), None
        finally:
            if process.alive and file.hold is process:
                file.hold = None

    def lose_holds(self) -> NoReturn:
        """The connections of the migrena at work break, and what they held is held no more."""
        process = self.world.process
        process.wire_breaks = False
        for file in self.world.files.values():
            if file.hold is process:
                file.hold = None
        raise migrena.HostError("connection lost")

    def rehearse(self, ends: migrena.Ends, job: migrena.DiskJob) -> float:
        self.world.point("rehearse", 1)
        return 1e9

    def warm_pass(self, ends: migrena.Ends, job: migrena.DiskJob) -> migrena.Moved:
        world = self.world
        world.point("pass", 50)
        file = world.files.get((ends.source.name, job.source.path))
        if world.process.wire_breaks or not file:
            self.lose_holds()
        world.files[ends.destination.name, job.new] = File(file.lineage, file.version, whole=False, inode=world.next())
        return migrena.Moved(1, "", 2.0, 1.0, 1.0)

    def move_disk(self, ends: migrena.Ends, job: migrena.DiskJob, callbacks: migrena.Callbacks,
                  known: migrena.Known) -> tuple[migrena.Moved, migrena.Known]:
        if job.is_live:
            return self.warm_pass(ends, job), known
        world, source, target = self.world, ends.source, (ends.destination.name, job.new)
        ends.locks.hold(source, job.source)
        migrena.require_unchanged(source, job)
        file = self.require_free(source, job.source.path)  # type: ignore[arg-type]
        new = world.files[target] = File(file.lineage, file.version, whole=False, inode=world.next())
        with callbacks.progress(2) as show:
            for turn in range(2):
                world.point("copy", 100)
                if world.process.wire_breaks:
                    self.lose_holds()
                show(turn + 1)
                callbacks.arrived(migrena.Chunk(turn, 1, 1, ((turn, 1),)), turn + 1)
                callbacks.check()
                migrena.require_unchanged(source, job)
        ends.locks.check()
        new.whole = new.version == file.version and world.files.get((source.name, job.source.path)) is file
        if target not in world.files:
            raise migrena.HostError(f"{ends.destination.name}: {job.new} is gone")
        return migrena.Moved(2, "digest", 2.0), known

    def settle_disk(self, host: HostStandIn, job: migrena.DiskJob) -> tuple[str, ...]:
        world = self.world
        world.point("check", 100)
        if world.process.wire_breaks:
            self.lose_holds()
        world.point("swap")
        new, old = world.files.get((host.name, job.new)), world.files.get((host.name, job.fresh.path))
        if not new or not old:
            raise migrena.HostError(f"{host.name}: {job.new} is gone")
        machine = next((machine for machine in world.machines() if machine.host == host.name and machine.path == job.fresh.path), None)
        if machine and machine.open:
            world.breaks(f"3 {world.process.words}: the disk of {machine.name} is swapped while it runs")
        elif machine and machine.used and not world.process.yes:
            world.breaks(f"3 {world.process.words}: the disk of {machine.name} is overwritten, which was in use")
        world.files[host.name, job.landing.kept], world.files[host.name, job.fresh.path] = old, new
        del world.files[host.name, job.new]
        return ()
