"""A run into which something is thrown in the middle of its copy, and what must be so when it is over."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hosts.operators import Operator, ended
from hosts.rig import MiB, wait_for
from lab.processes import command
from migrena import MARK
from unit.makers import UUID

SLOW = 3 * MiB  # bytes per second


@dataclass
class Fault:
    """An operator whose run goes slowly enough for something to happen to it."""

    operator: Operator
    before: str  # digest of the source's disk
    begun: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def state(self) -> Path:
        """The state folder."""
        return self.operator.folder / "state"

    @property
    def journal(self) -> Path:
        """The journal of the only run there is."""
        (path,) = self.state.glob("*.jsonl")
        return path

    def chunks(self) -> int:
        """How many chunks have arrived by the journal; one that is being written does not count."""
        return sum(path.read_text().count('"event": "chunk"') for path in self.state.glob("*.jsonl"))

    def start(self, *words: str, **different: str) -> subprocess.Popen[str]:
        """A copy that has just begun, in an environment that may be different."""
        self.begun.append(self.operator.begin("-s", UUID, "-d", "new", *words, throw=(), **different))
        return self.begun[-1]

    def begin(self, *words: str, chunks: int = 2, **different: str) -> subprocess.Popen[str]:
        """A slow copy of which so many chunks have arrived."""
        process = self.start("--limit-rate", str(SLOW), *words, **different)
        self.reaches(process, chunks)
        return process

    def reaches(self, process: subprocess.Popen[str], chunks: int) -> None:
        """Returns when so many chunks have arrived."""

        def there() -> bool:
            assert process.poll() is None, process.communicate()
            return self.chunks() >= chunks

        wait_for(f"chunk {chunks}", there, 60)

    def end(self, process: subprocess.Popen[str], code: int, *words: str) -> str:
        """What a run says, which ends with this code; all these words are in it, and no traceback is."""
        said = ended(process, code)
        for word in words:
            assert word in said, said
        return said

    def call(self, code: int, *words: str, said: tuple[str, ...] = ()) -> str:
        """What a further command says, which ends with this code."""
        self.begun.append(self.operator.begin(*words))
        return self.end(self.begun[-1], code, *said)

    def is_undone(self) -> None:
        """The source is as it was found, and there is no destination."""
        self.operator.is_as_found()
        assert self.operator.made() == []

    def is_left(self) -> None:
        """The run is told by `status`, and the source still carries its mark."""
        ((run, state),) = self.operator.state()
        assert state in ("killed", "left")
        assert self.operator.clouds[0].rows()[UUID]["metadata"].get(MARK) in (run, None)

    def rolls_back(self) -> None:
        """What the run has left is undone by the command that it names."""
        ((run, _),) = self.operator.state()
        self.call(0, "rollback", run)
        assert self.operator.state() == [(run, "rolled back")]
        self.is_undone()

    def stop(self) -> None:
        """Ends what still runs."""
        for process in self.begun:
            if process.poll() is None:
                process.kill()
            process.communicate()


@contextlib.contextmanager
def small_folder(path: Path, size: str) -> Iterator[None]:
    """A folder of this machine that is a file system of its own, with room for so much."""
    path.mkdir(exist_ok=True)
    command("mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", path)
    try:
        yield
    finally:
        command("umount", "-l", path)


def fill(folder: Path) -> Path:
    """A file that takes all the room that is left in a folder."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return filler
