"""The other ways to move a disk, each with its best settings; the limits of wire and disk; and migrena in all its forms."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench import ours, proof
from bench.disks import BASE, Disk, MiB
from bench.stage import FOLDER, OPERATOR, Stage
from lab.hosts import Lab
from lab.processes import LabError

NEW: Final = f"{FOLDER}/new"  # where a way puts the disk
KEYS: Final = "/root/bench-ssh"  # in a host
PORT: Final = 10809
STORE_PORT: Final = 9292
STORE: Final = Path(__file__).with_name("store.py").read_text()
HASHED: Final = 'dd if="$1" iflag=direct bs=4M status=none | openssl dgst -sha256'
INTO: Final = 'new=$1; shift; exec "$@" > "$new"'


@dataclass(frozen=True)
class Outcome:
    """What a way has made: the path at the destination, and what it measured by itself."""

    new: str = NEW
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Way:
    """One way, and what it is compared by: `file` (all bytes of the file), `guest` (what the guest sees) or nothing."""

    title: str
    go: Callable[[Stage, Disk], Outcome]
    proof: str = ""
    needs_wire: bool = True
    lacks: Callable[[Lab], str] = lambda lab: ""  # why it cannot be measured here; empty where it can

    def is_equal(self, stage: Stage, disk: Disk, outcome: Outcome) -> bool | None:
        """Whether the copy is its source; None where there is no copy."""
        if not self.proof:
            return None
        return proof.same_file(stage, disk, outcome.new) if self.proof == "file" else proof.same_guest(stage, disk, outcome.new, disk.format)


# ---- the limits ----


def iperf3(stage: Stage, disk: Disk) -> Outcome:
    """As many bytes as the disk holds, from memory to memory over one TCP connection: the wire's limit. A small disk's is that part of 32 MiB."""
    count = max(disk.allocated, 32 * MiB)
    with stage.serving("dst", 5201, "iperf3", "-s"):
        said = json.loads(stage.run("src", "iperf3", "-c", stage.addresses["dst"], "-n", str(count), "--json"))
    end = said["end"].get("sum_received", {})
    if not end.get("bytes"):
        raise LabError(f"iperf3 has not measured: {said.get('error')}")
    return Outcome("", {"seconds": end["seconds"] * disk.allocated / end["bytes"]})


def dd(stage: Stage, disk: Disk) -> Outcome:
    """The file from one host's disk to the other's without any wire, from which both can be seen: the disk's limit."""
    places = [f"{word}={stage.root(host)}{path}" for word, host, path in (("if", "src", disk.path), ("of", "dst", NEW))]
    stage.run(OPERATOR, "dd", *places, "bs=4M", "conv=sparse", "status=none")
    return Outcome()


# ---- by SSH ----


def lay_keys(lab: Lab) -> None:
    """Lets the destination's root log in at the source."""
    keep = 'umask 077; mkdir -p "$1"; cat > "$1/$2"'
    for name, path in (("key", lab.key), ("known_hosts", lab.known_hosts)):
        lab["dst"].run("sh", "-c", keep, "sh", KEYS, name, input=path.read_text())


def ssh_options() -> tuple[str, ...]:
    """With the cipher that is fastest where the processor knows AES."""
    return ("-q", "-F", "none", "-i", f"{KEYS}/key", "-o", f"UserKnownHostsFile={KEYS}/known_hosts", "-c", "aes128-gcm@openssh.com")


def ssh_cat(stage: Stage, disk: Disk) -> Outcome:
    """cat over SSH."""
    stage.run("dst", "sh", "-c", INTO, "sh", NEW, "ssh", *ssh_options(), f"root@{stage.addresses['src']}", f"cat {disk.path}")
    return Outcome()


def scp(stage: Stage, disk: Disk) -> Outcome:
    """scp from the source."""
    stage.run("dst", "scp", *ssh_options(), f"root@{stage.addresses['src']}:{disk.path}", NEW)
    return Outcome()


def rsync(stage: Stage, disk: Disk) -> Outcome:
    """rsync --sparse from the source; there is nothing yet that it could compare with."""
    shell = shlex.join(("ssh", *ssh_options()))
    stage.run("dst", "rsync", "--sparse", "--whole-file", "-e", shell, f"root@{stage.addresses['src']}:{disk.path}", NEW)
    return Outcome()


# ---- by NBD ----


@contextmanager
def by_qemu_nbd(stage: Stage, disk: Disk) -> Iterator[str]:
    """The file itself, byte for byte, served by qemu-nbd in clear; yields its address."""
    address = stage.addresses["src"]
    with stage.serving("src", PORT, "qemu-nbd", "-r", "-t", "-e", "16", "-f", "raw", "-b", address, "-p", str(PORT), "-x", "bench", disk.path):
        yield f"nbd://{address}:{PORT}/bench"


def convert(stage: Stage, disk: Disk) -> Outcome:
    """qemu-nbd and one qemu-img convert."""
    with by_qemu_nbd(stage, disk) as url:
        stage.run("dst", "truncate", "-s", str(disk.length), NEW)
        stage.run("dst", "qemu-img", "convert", "-n", "--target-is-zero", "-m", "16", "-W", "-f", "raw", "-O", "raw", url, NEW)
    return Outcome()


def convert_proven(stage: Stage, disk: Disk) -> Outcome:
    """The same, then a sync, and sha256 of both files side by side, read past the page cache: a proof at the price of its hash."""
    convert(stage, disk)
    stage.run("dst", "sync", "-f", NEW)
    with ThreadPoolExecutor(2) as pool:
        here, there = pool.map(lambda place: stage.run(place[0], "sh", "-c", HASHED, "sh", place[1]), (("src", disk.path), ("dst", NEW)))
    if here != there:
        raise LabError("the digests of both files differ")
    return Outcome()


def nbdcopy(*more: str) -> Callable[[Stage, Disk], Outcome]:
    """qemu-nbd and libnbd's copier over several connections."""

    def go(stage: Stage, disk: Disk) -> Outcome:
        with by_qemu_nbd(stage, disk) as url:
            stage.run("dst", "nbdcopy", "--connections=4", "--requests=64", *more, url, NEW)
        stage.run("dst", "truncate", "-s", str(disk.length), NEW)  # qemu-nbd has rounded it up to 512
        return Outcome()

    return go


def original(stage: Stage, disk: Disk) -> Outcome:
    """What migrena once did: nbd-server, every byte in order, then a safe rebase.

    There it was dd from /dev/nbdN; where the kernel has no module nbd it is qemu-img dd, with as large blocks and as strictly in order.
    A block device shows whole sectors only, and a tail of less than 512 bytes is lost, then as now.
    """
    address = stage.addresses["src"]
    lines = ("[generic]", f"listenaddr = {address}", f"port = {PORT}", "[bench]", f"exportname = {disk.path}", "readonly = true", "")
    stage.lab["src"].run("sh", "-c", 'mkdir -p "$1"; cat > "$1/nbd.conf"', "sh", FOLDER, input="\n".join(lines))
    with stage.serving("src", PORT, "nbd-server", "-C", f"{FOLDER}/nbd.conf", "-p", f"{FOLDER}/nbd.pid"):
        device = f"driver=raw,size={disk.length // 512 * 512},file.driver=nbd,file.host={address},file.port={PORT},file.export=bench"
        stage.run("dst", "qemu-img", "dd", "--image-opts", "-O", "raw", "bs=1M", f"if={device}", f"of={NEW}")
    if disk.format == "qcow2":
        stage.run("dst", "qemu-img", "rebase", "-f", "qcow2", "-F", "raw", "-b", BASE, NEW)
    return Outcome()


# ---- by the clouds' APIs ----


def by_api(stage: Stage, disk: Disk) -> Outcome:
    """Snapshot, upload, download and upload again by the operator, download, and a new overlay on it: what Nova does, without its waits.

    Both Glances are one HTTP server of ours on a third host, since all goes one after the other.
    """
    url = f"http://{stage.addresses[stage.images]}:{STORE_PORT}"
    snapshot, passing = f"{FOLDER}/snapshot", stage.work / "image"
    quiet = ("curl", "-sS", "-f", "-o")
    stage.run("src", "mkdir", "-p", FOLDER)
    with stage.serving(stage.images, STORE_PORT, "python3", "-c", STORE, "0.0.0.0", str(STORE_PORT), FOLDER):
        stage.run("src", "qemu-img", "convert", "-f", disk.format, "-O", "qcow2", disk.path, snapshot)
        stage.run("src", *quiet, "/dev/null", "-T", snapshot, f"{url}/one")
        stage.run(OPERATOR, *quiet, passing, f"{url}/one")
        stage.run(OPERATOR, *quiet, "/dev/null", "-T", passing, f"{url}/other")
        stage.run("dst", *quiet, f"{NEW}.part", f"{url}/other")
    raw = NEW if disk.format == "raw" else f"{NEW}.base"
    stage.run("dst", "qemu-img", "convert", "-f", "qcow2", "-O", "raw", f"{NEW}.part", raw)
    stage.run("dst", "rm", f"{NEW}.part")
    if disk.format == "qcow2":
        stage.run("dst", "qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", raw, NEW, str(disk.size))
    return Outcome()


# ---- migrena ----


def lacks_module(lab: Lab) -> str:
    """Why the transport nbd cannot be measured: namespaces have none of the kernel's devices. Virtual machines with the module would do."""
    has_device = lab["dst"].run("test", "-b", "/dev/nbd0", check=False).returncode == 0
    return "" if has_device else "the destination has no /dev/nbd0 (namespaces never have; it takes virtual machines with the module nbd)"


def moved(*words: str) -> Callable[[Stage, Disk], Outcome]:
    """migrena with these words."""
    return lambda stage, disk: Outcome(*ours.move(stage, disk, *words))


CLEAR: Final = ("--transport", "qemu", "--compress", "off", "--no-tls")


def forms_of_migrena() -> Iterator[tuple[str, Way]]:
    """As it is without any option; by each transport, with TLS and in clear, with the proof and without, never deflated; and held back."""
    yield "migrena", Way("migrena, all by itself", moved(), "guest")
    for transport in ("qemu", "nbd"):
        for tls in ("tls", "clear"):
            for verify in ("proven", "unproven"):
                words = ("--transport", transport, "--compress", "off", *(("--no-tls",) if tls == "clear" else ()),
                         *(("--no-verify",) if verify == "unproven" else ()))
                title = f"migrena, {transport}, {tls}, {verify}"
                yield (title.replace(", ", "-"), Way(title, moved(*words), "guest", lacks=lacks_module if transport == "nbd" else lambda lab: ""))
    yield "migrena-50M", Way("migrena, --limit-rate 50M", moved("--limit-rate", "50M"), "guest")


WAYS: Final = {
    "iperf3": Way("iperf3 (the wire's limit)", iperf3),
    "dd": Way("dd (the disk's limit)", dd, "file", needs_wire=False),
    **dict(forms_of_migrena()),
    "original": Way("the original migrena's way", original, "guest"),
    "convert": Way("qemu-img convert", convert, "file"),
    "convert-proven": Way("qemu-img convert, then sha256 of both", convert_proven, "file"),
    "nbdcopy": Way("nbdcopy", nbdcopy("--destination-is-zero"), "file"),
    "nbdcopy-allocated": Way("nbdcopy --allocated", nbdcopy("--allocated"), "file"),
    "scp": Way("scp", scp, "file"),
    "rsync": Way("rsync --sparse", rsync, "file"),
    "ssh-cat": Way("ssh with cat", ssh_cat, "file"),
    "api": Way("the clouds' APIs (model)", by_api, "guest"),
}
