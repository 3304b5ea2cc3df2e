"""Who acts on the model's clouds: persons, tools, other operators, and migrena, whose own `main` is run there command by command.

A schedule is a list of steps. A step is what a person does (`tenant starts source`) or a command (`copy -a dst`) with what others do at its
points, by their number or by their label: `{"copy#1": "crash"}` is when a `copy` is asked for the first time in it.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from novaclient import exceptions

import migrena
from unit.model import EPOCH, FOLDER, LEASE, SOURCE, Disks, File, Killed, Machine, Modelled, Process, World

Events = dict[int | str, str]
Step = tuple[str, Events]

TENANT = ("starts", "stops", "deletes", "rebuilds", "resizes", "pauses", "unpauses", "snapshots", "wipes", "locks", "unlocks")
PERSONS = tuple(f"{who} {verb} {what}" for who in ("tenant", "admin") for verb in TENANT for what in ("source", "destination"))
OUTAGES = ("outage of 30 s", "outage of 1000 s", "outage of 1000 s at the source", "outage of 1000 s at the destination")
FATES = ("Ctrl-C", "crash", "the answer is lost", "Nova refuses it", "the wire breaks")
SETTINGS = ("the clouds are swapped", "the credentials are a tenant's", "the credentials are an admin's")
OTHERS = ("elsewhere rollback --run-of", "elsewhere rollback --run-of --yes", "elsewhere copy --name other")
WORDS = ("copy", "resume", "rollback", "elsewhere")
FIRST = ("copy", "copy -a dst", "copy -a dst", "copy -a all", "copy -a src", "copy --warm -a dst")
CUT_OFF = ("resume", "resume", "resume --yes", "rollback", "rollback --yes", "rollback --run-of")  # what is done about a run that was
COMMANDS = (*CUT_OFF, "resume -n", "rollback -n", "rollback --keep-destination", "rollback --keep-destination --yes", "rollback --run-of --yes",
            "rollback first", "copy", "copy -a dst", "copy --name other", "copy --name other -a dst", "copy --name other -a dst --yes",
            "the journals are lost", *OTHERS)


@dataclass(frozen=True)
class Schedule:
    """What is done, and what others do meanwhile."""

    steps: tuple[Step, ...]
    one_cloud: bool = False
    was: str = "ACTIVE"

    def __str__(self) -> str:
        return f"Schedule(({', '.join(map(str, self.steps))},), one_cloud={self.one_cloud}, was={self.was!r})"


class People:
    """Those who act while migrena does."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.runs = world.runs

    def act(self, what: str) -> None:
        """Somebody acts; what he may not do is not done."""
        world = self.world
        if what.split()[0] in WORDS:
            self.command(what, {})
            if world.stack:  # it was another one, at work meanwhile
                world.last_touch = world.now
                world.found.clear()
                for process in world.stack:
                    process.people += 1
            return
        if what == "the journals are lost":
            for path in (self.folder / "here").glob("*.jsonl"):
                path.unlink()
        elif what == "the journals are emptied":
            for path in (self.folder / "here").glob("*.jsonl"):
                path.write_bytes(b"")
        elif what in SETTINGS:
            if what == SETTINGS[0]:
                world.sides.reverse()
            else:
                world.is_admin = what == SETTINGS[2]
        elif what in (*FATES, *OUTAGES):
            self.fate(what)
        else:
            self.person(*what.split())

    def fate(self, what: str) -> None:
        """What befalls the migrena at work."""
        world = self.world
        if not world.stack:
            return
        process = world.process
        if what == "crash":
            process.alive, process.until = False, world.now + LEASE
        elif what == "Ctrl-C":
            signal.raise_signal(signal.SIGINT)
        elif what.startswith("outage"):
            where = {"source": world.sides[:1], "destination": world.sides[1:]}.get(what.split()[-1], world.sides)
            world.away_until |= {url: world.now + float(what.split()[2]) for url in where}
        elif what == "the answer is lost":
            process.loses = True
        elif what == "Nova refuses it":
            process.refused = True
        else:
            process.wire_breaks = True

    def person(self, who: str, verb: str, what: str) -> None:
        """Somebody does something to an instance, as far as Nova lets him."""
        world, machine = self.world, self.named(what)
        if not machine or (machine.locked and who == "tenant" and verb not in ("locks", "unlocks", "wipes")):
            return
        before = world.is_person
        world.is_person = True
        try:
            getattr(self, verb)(machine, who)
        except exceptions.ClientException:
            return
        finally:
            world.is_person = before
        world.last_touch = world.now
        world.found.clear()
        for process in world.stack:
            process.people += 1

    def named(self, what: str) -> Machine | None:
        """The instance that is meant: the destination is the newest that a run has made."""
        if what == "source":
            return self.world.source if self.world.has_source else None
        made = [machine for machine in self.world.machines() if machine.run]
        return max(made, key=lambda machine: machine.id, default=None)

    def starts(self, machine: Machine, who: str) -> None:
        self.world.require(machine, "SHUTOFF")
        if who == "tenant" and machine is self.world.source and self.world.given_up and self.world.twins(machine):
            self.world.broken.append("1 a tenant can start the source, which a run has moved and started elsewhere")
        self.world.start(machine)
        machine.used = machine.used or machine.open is not None

    def stops(self, machine: Machine, who: str) -> None:
        self.world.stop(machine)

    def deletes(self, machine: Machine, who: str) -> None:
        self.world.delete(machine)

    def rebuilds(self, machine: Machine, who: str) -> None:
        """A new disk from an image."""
        world = self.world
        world.require(machine, "ACTIVE", "SHUTOFF", "ERROR")
        world.note(machine, "rebuild")
        was_open, machine.open = machine.open, None
        world.drop(machine.host, machine.path)
        file = world.files[machine.host, machine.path] = File(f"rebuilt {world.next()}", 1, inode=world.next())
        if machine is world.source:
            world.newest[file.lineage] = 1
        machine.open, machine.locked = file if was_open else None, False  # the reason stays: see issue 23

    def resizes(self, machine: Machine, who: str) -> None:
        """It is elsewhere afterwards, with its disk; VERIFY_RESIZE until it is confirmed."""
        world = self.world
        world.require(machine, "ACTIVE", "SHUTOFF")
        world.note(machine, "resize")
        old = world.files.get((machine.host, machine.path))
        if not old:
            return
        new = File(old.lineage, old.version, old.whole, world.next(), old.stamp)
        old_host, machine.host = machine.host, f"{machine.host[:5]}x"
        world.files[machine.host, machine.path] = new
        if old_host != machine.host:
            world.drop(old_host, f"{FOLDER}{machine.id}/")
        machine.status, machine.moved = "VERIFY_RESIZE", True
        machine.open = new if machine.open else None

    def pauses(self, machine: Machine, who: str) -> None:
        self.world.require(machine, "ACTIVE")
        self.world.note(machine, "pause")
        machine.status, machine.power = "PAUSED", 3

    def unpauses(self, machine: Machine, who: str) -> None:
        self.world.require(machine, "PAUSED")
        self.world.note(machine, "unpause")
        machine.status, machine.power = "ACTIVE", 1

    def snapshots(self, machine: Machine, who: str) -> None:
        world = self.world
        world.require(machine, "ACTIVE", "SHUTOFF", "PAUSED")
        world.note(machine, "createImage")
        machine.task = "image_uploading"

        def uploaded() -> None:
            if machine.task == "image_uploading":
                machine.task = None

        world.after(20, uploaded)

    def wipes(self, machine: Machine, who: str) -> None:
        machine.metadata.clear()
        machine.wiped = True

    def locks(self, machine: Machine, who: str) -> None:
        machine.locked, machine.reason, machine.locked_by, machine.his_lock = True, "maintenance", who, True
        self.world.note(machine, "lock")

    def unlocks(self, machine: Machine, who: str) -> None:
        if machine.locked_by == "admin" and who == "tenant":
            return
        machine.locked, machine.reason, machine.locked_by, machine.his_lock = False, None, "", False
        if machine is self.world.source:
            self.world.given_up = False
        self.world.note(machine, "unlock")

    # migrena

    def command(self, words: str, events: Events) -> Process | None:
        """Runs migrena's main; None where there is no run to name."""
        world = self.world
        where = "elsewhere" if words.startswith("elsewhere") else "here"
        folder = self.folder / where
        folder.mkdir(exist_ok=True)
        process = Process(words, dict(events), str(folder))
        job, flags = self.asked(words, process, folder)
        if not job:
            return None
        urls = [{"auth_url": url} for url in world.sides]
        config: dict[str, object] = {"src_creds": urls[0], "dst_creds": urls[1], "state_folder": str(folder)}
        call = migrena.Call(job, {**flags, "quiet": True}, {}, config)
        handlers = {each: signal.getsignal(each) for each in migrena.SIGNALS}
        world.stack.append(process)
        if not self.runs or job == "copy":
            world.given_up = False
        try:
            CALLS.append(call)
            process.code = migrena.main([])
        except Killed:
            process.alive, process.until = False, world.now + LEASE
        except Exception as error:
            world.broken.append(f"4 {words} ends with a traceback: {error!r}")
        else:
            world.broken += [f"4 {words} ends with a bug: {line}" for line in process.said if "this is a bug in migrena" in line]
        finally:
            CALLS.pop()
            world.stack.pop()
            for journal in world.journals if not world.stack else ():
                journal.close()  # a dead process does not
            for each, handler in handlers.items():
                signal.signal(each, handler)
        self.runs.append(process)
        return process

    def asked(self, words: str, process: Process, folder: Path) -> tuple[str, dict[str, object]]:
        """The job and its flags."""
        rest = words.replace("elsewhere ", "").split()
        switches = {"--yes": "yes", "--warm": "warm", "-n": "dry_run", "--keep-destination": "keep_destination"}
        job, flags = rest[0], {name: True for flag, name in switches.items() if flag in rest}
        if job == "copy":
            name = rest[rest.index("--name") + 1] if "--name" in rest else "new"
            after = rest[rest.index("-a") + 1] if "-a" in rest else ""
            more: dict[str, object] = {"src_uid": SOURCE, "dst_name": name, "start_after": after}
            process.after = after
            return job, {**flags, **more}
        if "--run-of" in rest:
            return job, {**flags, "run_of": SOURCE}
        known = migrena.known_runs(folder)
        if not known:
            return "", {}
        process.run = known[-1] if "first" in rest else known[0]
        if first := next((earlier for earlier in self.runs if earlier.run == process.run), None):
            process.after = first.after
        return job, {**flags, "run": process.run}


# ---- migrena, on the model

CALLS: list[migrena.Call] = []


class Inline:
    """A pool whose threads are this one, so that a schedule is always played in the same order."""

    def __init__(self, most: int = 0) -> None:
        """It needs no thread."""

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is under way."""

    def submit(self, what: Callable[[], Any], *words: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(what(*words))
        except (Killed, migrena.Interrupted):
            raise
        except BaseException as error:
            future.set_exception(error)
        return future


class Screen(migrena.Screen):
    """What is said is kept; nothing is shown."""

    world: World

    def say(self, line: str, *, always: bool = False, is_title: bool = False) -> None:
        self.world.process.said.append(line)

    def record(self, line: str) -> None:
        """There is no log."""

    @contextlib.contextmanager
    def progress(self, total: int, label: str = "") -> Iterator[Callable[[int], None]]:
        yield lambda done: None


class Journal(migrena.Journal):
    """The journal of a process that may be dead."""

    world: World

    def __init__(self, folder: Path, run: str) -> None:
        super().__init__(folder, run)
        self.world.journals.append(self)

    def write(self, event: str, **facts: object) -> None:
        if not self.world.process.alive:
            raise Killed
        super().write(event, **facts)


class Clock(datetime):
    """The model's time of day."""

    world: World

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Clock:
        at = EPOCH + timedelta(seconds=cls.world.now)
        return cls(at.year, at.month, at.day, at.hour, at.minute, at.second, at.microsecond, tz)


@contextlib.contextmanager
def on_the_model(world: World) -> Iterator[None]:
    """migrena's adapters and its work on disks are the model's."""
    Modelled.world = Screen.world = Journal.world = Clock.world = world
    disks = Disks(world)

    def new_run() -> str:
        run = f"20260101T000000-{world.next():06x}"
        world.process.run = run
        world.found[run] = world.source.status
        return run

    places: dict[str, Any] = {
        "Cloud": Modelled, "Screen": Screen, "Journal": Journal, "datetime": Clock, "ThreadPoolExecutor": Inline, "new_run": new_run,
        "time": SimpleNamespace(sleep=lambda seconds: world.point("sleep", seconds), monotonic=lambda: world.now, time=lambda: world.now),
        "read_call": lambda arguments, environment, screen: CALLS[-1], "require_packages": lambda: None, "check_extra": lambda extra: None,
        "connect": disks.connect, "disk_chain": disks.disk_chain, "survey_disks": disks.survey_disks, "stand_of": disks.stand_of,
        "held": disks.held, "rehearse": disks.rehearse, "move_disk": disks.move_disk, "settle_disk": disks.settle_disk,
        "domain_of": disks.domain_of, "refuse_domain": lambda host, domain, keys=(): [], "refuse_metadata": lambda host, domain: [],
        "misplaced": lambda host, domain, drive: None, "require_chain": lambda host, drive, chain: None, "checked": lambda host, image: image,
        "tools_lacking": lambda host: [], "same_content": lambda one, other, stall: True, "free_space": lambda host, path: 1 << 50,
        "route": lambda host, to: {"prefsrc": "10.0.0.2"}, "certificates": lambda server: {},
    }
    with contextlib.ExitStack() as stack:
        for name, what in places.items():
            stack.callback(setattr, migrena, name, getattr(migrena, name))
            setattr(migrena, name, what)
        stack.callback(setattr, os, "fsync", os.fsync)
        setattr(os, "fsync", lambda file: None)  # noqa: B010
        yield


def play(schedule: Schedule, folder: Path) -> World:
    """The world after a schedule, or after the step in which an invariant was broken."""
    world = World(schedule.one_cloud, schedule.was)
    people = People(world, folder)
    world.act = people.act
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with on_the_model(world):
        for what, events in schedule.steps:
            world.settle(max(5, *(until - world.now for until in world.away_until.values())))
            if what.split()[0] in WORDS:
                process = people.command(what, events)
                if process:
                    world.top.append(process)
                    see_what_is_told(world, process)
            else:
                people.act(what)
            if world.broken:
                break
            if any(world.lives(process) for process in people.runs):
                world.settle(LEASE)
    world.broken.extend(f"   {process.words}: {process.code}" for process in people.runs if world.broken)
    return world


# ---- schedules by chance

POINTS = 100  # of a copy


def a_schedule(chance: random.Random) -> Schedule:
    """One of all that may happen, most often a copy that something befalls, and what is done then."""
    def event() -> str:
        kind = chance.random()
        if kind < 0.55:
            return chance.choice(PERSONS)
        return chance.choice(FATES if kind < 0.8 else OUTAGES if kind < 0.85 else SETTINGS if kind < 0.9 else OTHERS)

    def events(most: int, points: int) -> Events:
        return {chance.randrange(points): event() for _ in range(chance.randint(0, most))}

    steps: list[Step] = [(chance.choice(FIRST), events(3, POINTS))]
    if chance.random() < 0.3:
        steps[0][1][chance.randrange(POINTS)] = "crash"
        steps += [(chance.choice((*PERSONS, *SETTINGS)), {})] if chance.random() < 0.5 else []
        steps.append((chance.choice(CUT_OFF), events(2, POINTS) if chance.random() < 0.5 else {}))
    while len(steps) < 5 and chance.random() < 0.45:
        if chance.random() < 0.6:
            steps.append((chance.choice(COMMANDS), events(2, 30) if chance.random() < 0.4 else {}))
        else:
            steps.append((chance.choice((*PERSONS, *SETTINGS)), {}))
    return Schedule(tuple(steps), chance.random() < 0.3, chance.choice(("ACTIVE", "ACTIVE", "SHUTOFF")))


def smaller(schedule: Schedule) -> Iterator[Schedule]:
    """The same with a step or an event less."""
    for number, (what, events) in enumerate(schedule.steps):
        yield replace(schedule, steps=schedule.steps[:number] + schedule.steps[number + 1 :])
        for point in events:
            less = what, {key: event for key, event in events.items() if key != point}
            yield replace(schedule, steps=(*schedule.steps[:number], less, *schedule.steps[number + 1 :]))
    if schedule.one_cloud:
        yield replace(schedule, one_cloud=False)


def smallest(schedule: Schedule, folder: Path) -> tuple[Schedule, list[str]]:
    """What is needed of a schedule that breaks an invariant to break the same one, its points by their labels; and what is broken."""
    world = play(schedule, folder)
    kind = world.broken[0][0]
    while found := next((less for less in smaller(schedule) if less.steps and (play(less, folder).broken or "-")[0][0] == kind), None):
        schedule = found
    world = play(schedule, folder)
    trails = iter([process.trail for process in world.top])
    steps = tuple((what, named_points(events, next(trails, []))) if what.split()[0] in WORDS else (what, events) for what, events in schedule.steps)
    named = replace(schedule, steps=steps)
    return (named if play(named, folder).broken else schedule), world.broken


def named_points(events: Events, trail: Sequence[str]) -> Events:
    """Points by their labels, which mean the same in a migrena that asks for more."""
    return {key if isinstance(key, str) or key >= len(trail) else f"{trail[key]}#{trail[: key + 1].count(trail[key])}": what
            for key, what in events.items()}


# ---- invariant 4

BOTH = "both instances are kept"

def see_what_is_told(world: World, process: Process) -> None:
    """Compares how a command says that it has ended with what there is."""
    def broken(what: str) -> None:
        world.broken.append(f"4 {process.words} ends with {process.code}: {what}")

    code, run, source, words = process.code, process.run, world.source, process.words.removeprefix("elsewhere ").split()
    if code is None:
        return
    if code not in (0, 1, 3, 4, 128 + signal.SIGINT):
        broken(f"no such end was expected: {process.said}")
    if any(owner is process for owner in world.folders.values()):
        broken("a private folder of it is left on a host")
    if code == 3 or "-n" in words:
        if any("meta" not in change for change in process.changes):
            broken(f"it was to touch nothing, yet it has changed something: {process.changes}")
        if words[0] != "copy":
            return
    made = [machine for machine in world.machines() if run and machine.run == run]
    ours = []
    if run and world.has_source and source.locked and (source.reason or "").startswith(f"migrena run {run}"):
        ours.append("lock")
    if run and world.has_source and source.metadata.get("migrena:run") == run:
        ours.append("mark")
    is_taken = "migrena:run" in source.metadata or (source.locked and "migrena run" in (source.reason or ""))
    if code == 3 and not is_taken and not process.people and re.search("is moving the source|was or is being moved", " ".join(process.said)):
        broken("refused for a run that has nothing to do with the source any more")
    if code > 128 and not process.changes:  # it has not even begun
        return
    if code in (1, 3, 128 + signal.SIGINT) or (code == 0 and words[0] == "rollback"):
        see_undone(world, process, made, ours, broken)
    if code == 4:
        see_left(world, process, made, ours, broken)
    if code == 0 and words[0] in ("copy", "resume"):
        see_success(world, process, made, broken)
        world.given_up = process.after == "dst" and not process.people
        world.found.clear()


def see_undone(world: World, process: Process, made: Sequence[Machine], ours: Sequence[str], broken: Callable[[str], None]) -> None:
    """What a command has said to be undone."""
    source = world.source
    if made and not is_kept(world, process):
        broken(f"{made[0].name} is left")
    if ours:
        broken(f"the source keeps our {' and '.join(ours)}")
    found = world.found.get(process.run, source.status)
    if world.has_source and found != source.status and not (process.words.startswith("rollback") and process.after in ("src", "all")):
        broken(f"the source is {source.status}, and was {found}")


def is_kept(world: World, process: Process) -> bool:
    """Whether a person has asked for the instance to be kept."""
    return any(known.run == process.run and "--keep-destination" in known.words for known in (*world.runs, process))


def see_left(world: World, process: Process, made: Sequence[Machine], ours: Sequence[str], broken: Callable[[str], None]) -> None:
    """What a command has said to be left."""
    told = " ".join(line for line in process.said if line.startswith("left behind: "))
    if any(machine.metadata.get("migrena:done") == process.run or machine.wiped for machine in made):
        return
    if process.after == "dst" and process.people and not made:
        return  # it was complete, and a person has deleted it
    for machine in made if not is_kept(world, process) else ():
        if not any(words in told for words in (machine.id, machine.name, BOTH)):
            broken(f"{machine.name} is left and not told: {told}")
    if ours and world.source.id not in told and BOTH not in told:
        broken(f"the source keeps our {' and '.join(ours)}, which is not told: {told}")


def see_success(world: World, process: Process, made: Sequence[Machine], broken: Callable[[str], None]) -> None:
    """What a copy has said to be complete."""
    source = world.source
    if not made or process.people:
        return
    file = world.files.get((made[0].host, made[0].path))
    if not file or not file.whole or file.lineage not in world.newest:
        broken(f"{made[0].name} does not have the source's data: {file}")
    if "migrena:run" in made[0].metadata or "migrena:made" in made[0].metadata or "migrena:run" in source.metadata:
        broken("a mark is left")
    if made[0].locked and (made[0].reason or "").startswith("migrena run"):
        broken(f"{made[0].name} is locked: {made[0].reason}")
    for machine, after in ((made[0], ("dst", "all")), (source, ("src", "all"))):
        is_asked = process.after in after
        if machine.status != "ACTIVE" if is_asked else f"start {machine.name}" in process.changes:
            broken(f"{machine.name} is {machine.status}")
