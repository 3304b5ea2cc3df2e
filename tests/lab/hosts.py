"""Hypervisors for tests: each with its own address, sshd and a real ext4 file system at /var/lib/nova.

    with hosts(folder, {"src": "ns", "dst": "vm"}, network="10.81.7.0/24") as lab:
        lab["src"].run("qemu-img", "info", "/var/lib/nova/x.qcow2")

Kind "ns" is namespaces over this machine's own files, kind "vm" virtual machines with their own kernel and its nbd
module. root and `operator` (passwordless sudo) and `nosudo` log in with the lab's key, at ports 22 and 2222. The
operator's machine is this one, at .1 of the network; the hosts are .11, .12 and so on. A lab ends with its scope;
one whose command was killed is cleared away when the next one starts.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from lab import machines, namespaces, packages
from lab.orders import File, Role, Spec, make_keys, write_orders
from lab.packages import install
from lab.processes import LabError, Process, alone, command, home, listens, wait_until


class CommandFailed(LabError):
    """A command in a host ended with a status other than 0."""

# In the place that comes before the real one's: these hosts have no libvirt, and a real virsh would find nobody to ask.
VIRSH: Final = File("/usr/local/bin/virsh", Path(__file__).with_name("virsh").read_text(), 0o755)


@dataclass(frozen=True)
class Host:
    """One running hypervisor."""

    name: str
    address: str
    spec: Spec
    process: Process  # ends, and the whole host has ended

    @property
    def key(self) -> Path:
        """The private key that its users accept."""
        return self.spec.key

    @property
    def known_hosts(self) -> Path:
        """The file that holds its public key."""
        return self.spec.known_hosts

    @property
    def folder(self) -> Path:
        """Where the operator's machine keeps this host's files and logs."""
        return self.spec.folder / self.name

    @property
    def is_namespace(self) -> bool:
        """Whether it shares this machine's kernel."""
        return self.spec.kinds[self.name] == "ns"

    @property
    def root(self) -> Path | None:
        """The host's / as this machine sees it; None for a virtual machine."""
        return Path(f"/proc/{namespaces.init_of(self.process)}/root") if self.is_namespace else None

    def run(self, *argv: str | Path, input: str | None = None, check: bool = True,
            seconds: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command as root in the host, not by the way the tested program takes.

        Bytes that are no UTF-8 come back as surrogates. Raises CommandFailed if it fails and `check` is set.
        """
        words = [str(word) for word in argv]
        prefixed = self._prefixed(words)
        done = subprocess.run(prefixed, check=False, input=input, capture_output=True, text=True,
                              errors="surrogateescape", stdin=subprocess.DEVNULL if input is None else None,
                              timeout=seconds)
        done.args = words
        if check and done.returncode:
            raise CommandFailed(f"{self.name}: `{' '.join(words)}` ended with status {done.returncode}: "
                                f"{done.stderr.strip() or done.stdout.strip()}")
        return done

    def _prefixed(self, argv: Sequence[str]) -> list[str]:
        if self.is_namespace:
            return namespaces.enter(self.process, argv)
        return machines.enter(self.spec, self.name, argv)

    def processes(self) -> list[tuple[int, list[str]]]:
        """Every process in the host (its pid there, its words), kernel threads left out."""
        if self.is_namespace:
            return namespaces.inmates(self.process)
        return machines.inmates(self.run("python3", "-IS", "-", input=machines.LISTER).stdout)

    def counters(self) -> tuple[int, int]:
        """Bytes that the host has received and sent."""
        statistics = Path("/sys/class/net") / self.spec.link(self.name) / "statistics"
        return int((statistics / "tx_bytes").read_text()), int((statistics / "rx_bytes").read_text())

    def alive(self) -> bool:
        """True while the host runs."""
        return self.process.alive()

    def kill(self) -> None:
        """Let the host vanish: its cable is pulled first, so that no peer hears a farewell."""
        with suppress(LabError):
            command("ip", "link", "set", self.spec.link(self.name), "down")
        self._stop(gently=False)

    def _stop(self, gently: bool) -> None:
        if self.is_namespace:
            namespaces.stop(self.process, gently)
        else:
            machines.stop(self.spec, self.name, self.process, gently)
        unplug(self.spec.link(self.name))  # a namespace would take it along, a little later


def unplug(interface: str) -> None:
    """Remove a network interface of the lab's, if it is there."""
    with suppress(LabError):
        command("ip", "link", "del", interface)


class Lab:
    """A group of hosts on one network; also what a later command finds again of one that outlived its own."""

    def __init__(self, spec: Spec, owner: Process | None, running: Mapping[str, Process]) -> None:
        self.spec = spec
        self.owner = owner  # None: the lab outlives every command
        self.hosts = {name: Host(name, spec.address(name), spec, process) for name, process in running.items()}

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts.values())

    @property
    def key(self) -> Path:
        """The private key for all hosts."""
        return self.spec.key

    @property
    def known_hosts(self) -> Path:
        """The public keys of all hosts."""
        return self.spec.known_hosts

    @property
    def operator(self) -> str:
        """This machine's address on the lab's network."""
        return self.spec.operator

    # ---- the record on disk ----

    @staticmethod
    def _path(tag: str) -> Path:
        return home() / "labs" / f"{tag}.json"

    def _record(self) -> None:
        """Write down what runs, so that a later command can end it."""
        path = self._path(self.spec.tag)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "spec": {**asdict(self.spec), "folder": str(self.spec.folder)},
            "owner": asdict(self.owner) if self.owner else None,
            "processes": {host.name: asdict(host.process) for host in self},
        }
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(content, indent=1))
        draft.replace(path)

    @classmethod
    def recorded(cls, tag: str) -> Lab | None:
        """The lab that was written down for this network, running or not."""
        try:
            content = json.loads(cls._path(tag).read_text())
        except FileNotFoundError:
            return None
        spec = Spec(**{**content["spec"], "folder": Path(content["spec"]["folder"])})
        owner = Process(**content["owner"]) if content["owner"] else None
        return cls(spec, owner, {name: Process(**process) for name, process in content["processes"].items()})

    @property
    def abandoned(self) -> bool:
        """True if the command that this lab belonged to has ended."""
        return self.owner is not None and not self.owner.alive()

    # ---- up and down ----

    def up(self, roles: Mapping[str, Role]) -> None:
        """Start those of these hosts that do not run, and return when each answers on its SSH port."""
        self.spec.folder.mkdir(parents=True, exist_ok=True)
        self._record()
        make_keys(self.spec)
        self._bridge()
        begun = [name for name in roles if name not in self.hosts or not self.hosts[name].alive()]
        for name in begun:
            self._launch(name, roles[name])
        for name in begun:
            self._await(self.hosts[name])

    def start(self, name: str) -> Host:
        """Start a host again that was killed, with the files it had; returns when it answers."""
        self._launch(name, None)
        self._await(self.hosts[name])
        return self.hosts[name]

    def _bridge(self) -> None:
        """One bridge for the network, with the operator's address on it."""
        if not Path("/sys/class/net", self.spec.tag).exists():
            prefix = self.spec.network.rpartition("/")[2]
            command("ip", "-batch", "-", stdin=f"link add {self.spec.tag} type bridge\n"
                                               f"addr add {self.operator}/{prefix} dev {self.spec.tag}\n"
                                               f"link set {self.spec.tag} up\n")

    def _launch(self, name: str, role: Role | None) -> None:
        """Start one host; without a role it gets the orders it had before."""
        folder = self.spec.folder / name
        folder.mkdir(exist_ok=True)
        disk = folder / "nova.ext4"
        if not disk.exists():
            command("truncate", "-s", self.spec.disk, disk)
            command("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1", disk)
        unplug(self.spec.link(name))  # a machine that died by itself has left its end
        orders = write_orders(self.spec, name, disk, role) if role else folder / "orders.json"
        begin = namespaces.start if self.spec.kinds[name] == "ns" else machines.start
        process = begin(self.spec, name, orders, folder / "host.log")
        self.hosts[name] = Host(name, self.spec.address(name), self.spec, process)
        self._record()

    def _await(self, host: Host) -> None:
        """Return when the host's sshd accepts connections."""
        log = host.folder / "host.log"

        def answers() -> bool:
            if not host.alive():
                raise LabError(f"host {host.name} died while it started; see {log}")
            return listens(host.address, 22)

        wait_until(f"host {host.name}: sshd at {host.address}", answers, 120, log)
        if not host.is_namespace:
            machines.connect(self.spec, host.name)

    def down(self) -> None:
        """End every host, remove the network and, unless it is to be kept, the hosts' data (logs stay)."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda host: host._stop(gently=self.spec.keep and host.alive()), self))
        unplug(self.spec.tag)
        if not self.spec.keep:
            for folder in (self.spec.folder / name for name in self.spec.names):
                for disk in (*folder.glob("*.ext4"), *folder.glob("*.qcow2")):
                    disk.unlink()
                for part in ("view", "upper", "work", "data"):
                    shutil.rmtree(folder / part, ignore_errors=True)
        self._path(self.spec.tag).unlink(missing_ok=True)


def clear_abandoned() -> None:
    """Take down every lab whose command has ended without doing so; once, also when several commands find it."""
    with alone("labs"):
        for path in (home() / "labs").glob("*.json"):
            lab = Lab.recorded(path.stem)
            if lab and lab.abandoned:
                lab.down()


def claim(spec: Spec, owner: Process | None) -> Lab:
    """A lab for this network, not yet up. Raises LabError if a running command has one there."""
    clear_abandoned()
    other = Lab.recorded(spec.tag)
    if other:
        held = f"by the command with pid {other.owner.pid}" if other.owner else "by a lab that is kept up"
        raise LabError(f"network {spec.network} is in use {held}, its folder is {other.spec.folder}")
    if Path("/sys/class/net", spec.tag).exists():
        raise LabError(f"there is an interface {spec.tag} that the lab did not write down; remove it first")
    return Lab(spec, owner, {})


@contextmanager
def hosts(folder: Path | str, kinds: Mapping[str, str], network: str = "10.81.7.0/24", disk: str = "8G") -> Iterator[Lab]:
    """Hosts, each of its kind, that are up when the scope opens and gone when it closes, whatever happens in between.

    `disk` is the size of each file system at /var/lib/nova. Raises LabError if a host does not come up.
    """
    install((*packages.HOSTS, *(packages.MACHINES if "vm" in kinds.values() else ())))
    lab = claim(Spec(Path(folder).resolve(), kinds, network, disk), Process.of(os.getpid()))
    try:
        lab.up({name: Role(files=[VIRSH]) for name in lab.spec.names})
        yield lab
    finally:
        lab.down()
