"""Named programs that outlive the command that started them, written down in a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Lock

from lab.processes import LabError, Process, listens, spawn, tail, wait_until

Place = tuple[str, int]  # address and port


class Roster:
    """The programs of one folder: its `processes.json` says which, its `log` holds what they print."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = Lock()
        self.processes: dict[str, Process] = {}
        if self._path.exists():
            self.processes = {name: Process(**fields) for name, fields in json.loads(self._path.read_text()).items()}

    @property
    def _path(self) -> Path:
        return self.folder / "processes.json"

    def log(self, name: str) -> Path:
        """Where the program's output goes."""
        return self.folder / "log" / f"{name}.log"

    def runs(self, name: str) -> bool:
        """True if the program of this name was started and still runs."""
        return name in self.processes and self.processes[name].alive()

    def start(self, name: str, argv: Sequence[str | Path], env: Mapping[str, str] | None = None,
              place: Place | None = None) -> None:
        """Start a program under this name, unless it runs already.

        Raises LabError if somebody else has the address and port where it is to listen.
        """
        if self.runs(name):
            return
        if place and listens(*place):
            raise LabError(f"{name} cannot start: {place[0]}:{place[1]} is taken by a program the lab did not start")
        process = spawn(argv, self.log(name), env)
        with self._lock:
            self.processes[name] = process
            self._save()

    def await_listening(self, name: str, place: Place, seconds: float = 120) -> None:
        """Return when the program listens there.

        Raises LabError with the end of its log if it dies or takes too long.
        """
        def listening() -> bool:
            self.require(name)
            return listens(*place)

        wait_until(f"{name} to listen at {place[0]}:{place[1]}", listening, seconds, self.log(name))

    def require(self, name: str) -> None:
        """Raises LabError with the end of its log if the program has ended."""
        if not self.runs(name):
            raise LabError(f"{name} has ended; see {self.log(name)}:{tail(self.log(name))}")

    def stop(self, names: Iterable[str], seconds: float = 15) -> None:
        """End these programs, all at once; those that do not run are forgotten."""
        chosen = [name for name in names if name in self.processes]
        with ThreadPoolExecutor(max_workers=max(1, len(chosen))) as pool:
            list(pool.map(lambda name: self.processes[name].stop(seconds), chosen))
        with self._lock:
            for name in chosen:
                del self.processes[name]
            self._save()

    def _save(self) -> None:
        draft = self._path.with_suffix(".new")
        draft.write_text(json.dumps({name: asdict(process) for name, process in self.processes.items()}, indent=1))
        draft.replace(self._path)
