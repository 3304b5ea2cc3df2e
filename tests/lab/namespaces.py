"""Hosts of kind `ns`: namespaces over a copy-on-write view of this machine. Quick; the kernel is the machine's."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lab.orders import Spec
from lab.processes import CLEAN_ENV, LabError, Process, command, spawn, wait_until

INIT: Final = Path(__file__).with_name("host_init.py")
ENTER: Final = ("nsenter", "--mount", "--uts", "--ipc", "--net", "--pid", "--root", "--wd")


def start(spec: Spec, name: str, orders: Path, log: Path) -> Process:
    """Start the namespaces and lay the network cable; the process given back holds all of the host."""
    holder = spawn(["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=KILL",
                    "--propagation", "private", "/usr/bin/python3", "-IS", INIT, orders], log)
    try:
        wait_until(f"host {name}: process 1", lambda: bool(holder.children()), 10, log)
        near, far = spec.link(name), f"peer name eth0 address {spec.mac(name)} netns {init_of(holder)}"
        command("ip", "-batch", "-", stdin=f"link add {near} type veth {far}\nlink set {near} master {spec.tag} up\n")
    except BaseException:  # nobody has written it down yet
        stop(holder, gently=False)
        raise
    return holder


def init_of(holder: Process) -> int:
    """The pid, as the machine sees it, of the host's process 1. Raises LabError if the host is dead."""
    children = holder.children()
    if not children:
        raise LabError("the host does not run")
    return children[0]


def enter(holder: Process, argv: Sequence[str]) -> list[str]:
    """The command that runs `argv` as root inside the host, without SSH."""
    env = [f"{name}={value}" for name, value in CLEAN_ENV.items()]
    return [*ENTER, "--target", str(init_of(holder)), "env", "-i", *env, *argv]


def inmates(holder: Process) -> list[tuple[int, list[str]]]:
    """Every process in the host: its pid there, and its words."""
    space = os.readlink(f"/proc/{init_of(holder)}/ns/pid")
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "ns" / "pid") == space:
                argv = (entry / "cmdline").read_text(errors="replace").rstrip("\0").split("\0")
                status = (entry / "status").read_text().splitlines()
                inside = next(line.split()[-1] for line in status if line.startswith("NSpid:"))
                found.append((int(inside), argv))
        except OSError:
            continue  # it ended while we looked
    return sorted(found)


def stop(holder: Process, gently: bool) -> None:
    """End the host: services first when done gently, else like a power cut."""
    if gently and (children := holder.children()):
        Process.of(children[0]).stop(seconds=12)
    holder.stop(seconds=2, number=signal.SIGKILL)
