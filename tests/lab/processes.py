"""What the lab starts, and how it ends exactly that.

A process is remembered by its pid and its start time: a pid alone may name somebody else's process tomorrow.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CLEAN_ENV: Final = {"PATH": PATH, "HOME": "/root", "LC_ALL": "C.UTF-8"}
POLL: Final = 0.02  # seconds between two looks at a condition
BORN: Final = time.monotonic()


class LabError(Exception):
    """Something in the lab failed; the text says what, and where the log is."""


def home() -> Path:
    """The lab's own folder, where everything that outlives one command is kept."""
    return Path(os.environ.get("MIGRENA_LAB", "/var/tmp/migrena-lab"))


def say(text: str) -> None:
    """Tell the person at the terminal what the lab does, with the seconds since the command began."""
    print(f"{time.monotonic() - BORN:6.1f} s  {text}", file=sys.stderr, flush=True)


def tail(log: Path, lines: int = 12) -> str:
    """The last lines of a log, each indented, for an error message; empty if there is no log."""
    if not log.is_file():
        return ""
    text = log.read_text(errors="replace").splitlines()[-lines:]
    return "".join(f"\n    | {line}" for line in text)


def command(*argv: str | Path, stdin: str | None = None, seconds: float = 120) -> str:
    """Standard output of a command that must succeed.

    Raises LabError with the command and its standard error.
    """
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(words, check=False, input=stdin, capture_output=True, text=True, env=CLEAN_ENV,
                              stdin=subprocess.DEVNULL if stdin is None else None, timeout=seconds, errors="replace")
    except FileNotFoundError as error:
        raise LabError(f"{words[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"`{' '.join(words)}` did not end within {seconds:.0f} s") from error
    if done.returncode:
        raise LabError(f"`{' '.join(words)}` failed with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def wait_until(what: str, ready: Callable[[], bool], seconds: float, log: Path | None = None) -> None:
    """Return as soon as `ready` says so; raises LabError with the end of `log` when `seconds` have passed."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            where = f"; see {log}:{tail(log)}" if log else ""
            raise LabError(f"{what}: not within {seconds:.0f} s{where}")
        time.sleep(POLL)


def listens(address: str, port: int) -> bool:
    """True if something accepts TCP connections there."""
    with socket.socket() as probe:
        probe.settimeout(0.25)
        return probe.connect_ex((address, port)) == 0


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on (field 3 of proc(5)); empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


@dataclass(frozen=True)
class Process:
    """One process that the lab started."""

    pid: int
    started: int  # clock ticks after boot, field 22 of proc(5)

    @classmethod
    def of(cls, pid: int) -> Process:
        """The process that has this pid now; one that never lives if there is none."""
        fields = _stat(pid)
        return cls(pid, int(fields[19]) if fields else -1)

    def alive(self) -> bool:
        """True while exactly this process runs (a zombie does not)."""
        fields = _stat(self.pid)
        return bool(fields) and fields[0] != "Z" and int(fields[19]) == self.started

    def children(self) -> list[int]:
        """Pids of its direct children."""
        try:
            return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
        except OSError:
            return []

    def _session(self) -> list[Process]:
        """Those processes of the session it led that have outlived it (a program started by spawn() leads one)."""
        leader = _stat(self.pid)
        if leader and (leader[0], int(leader[19])) != ("Z", self.started):
            return []  # it still runs, or its pid is somebody else's by now
        members = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [Process.of(pid) for pid in members if _stat(pid)[3:4] == [str(self.pid)]]

    def send(self, number: signal.Signals) -> None:
        """Signal it, if it is still there."""
        if self.alive():
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def stop(self, seconds: float = 10, number: signal.Signals = signal.SIGTERM) -> None:
        """Signal it and wait for its end; after `seconds` it is killed outright, and so is what it leaves behind."""
        for signum, patience in ((number, seconds), (signal.SIGKILL, 10.0)):
            self.send(signum)
            deadline = time.monotonic() + patience
            while self.alive() and time.monotonic() < deadline:
                time.sleep(POLL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)  # if it was our own child, bury it
        for orphan in self._session():
            orphan.send(signal.SIGKILL)


def spawn(argv: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None) -> Process:
    """Start a program in a session of its own, its output appended to `log`; it outlives this command."""
    words = [str(word) for word in argv]
    program = shutil.which(words[0], path=PATH)
    if program is None:
        raise LabError(f"{words[0]} is not installed")
    log.parent.mkdir(parents=True, exist_ok=True)
    writing = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    pid = os.posix_spawn(program, words, {**CLEAN_ENV, **(env or {})}, setsid=True, file_actions=[
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), writing, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ])
    return Process.of(pid)


def logged(argv: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None, seconds: float = 300) -> None:
    """Run a command that must succeed, its output appended to `log`; raises LabError with the end of that."""
    words = [str(word) for word in argv]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        done = subprocess.run(words, check=False, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=seconds,
                              env={**CLEAN_ENV, **(env or {})})
    if done.returncode:
        raise LabError(f"`{' '.join(words)}` failed with status {done.returncode}; see {log}:{tail(log)}")


@contextmanager
def alone(name: str) -> Iterator[None]:
    """While this scope is open, no other command is in the scope of the same name."""
    path = home() / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another command to be done with the {name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
