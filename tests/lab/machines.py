"""Hosts of kind `vm`: virtual machines (qemu without KVM) with Debian's cloud kernel and its real nbd module.

The lab itself enters them through one SSH connection that it keeps open: setting one up costs half a second there.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from lab.image import kernel, root_disk
from lab.orders import Spec
from lab.processes import CLEAN_ENV, LabError, Process, command, home, spawn, wait_until

KERNEL_LINE: Final = ("console=ttyS0 root=/dev/nvme0n1 rootfstype=ext4 ro init=/usr/sbin/lab-init loglevel=4 panic=-1 "
                      "net.ifnames=0 mitigations=off tsc=unstable no_timer_check random.trust_cpu=on")
LISTER: Final = """
import json, os
seen = {}
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        argv = open(f"/proc/{pid}/cmdline", errors="replace").read().rstrip("\\0").split("\\0")
        parent = int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
    except OSError:
        continue
    seen[int(pid)] = (parent, argv)
mine = os.getpid()
while seen.get(mine, (1,))[0] != 1:  # our own way in: up to sshd's listener, which stays
    mine = seen.pop(mine)[0]
print(json.dumps([(pid, argv) for pid, (_, argv) in sorted(seen.items()) if argv[0]]))
"""


def start(spec: Spec, name: str, orders: Path, log: Path) -> Process:
    """Start the virtual machine; its console goes to the log."""
    folder, base = spec.folder / name, root_disk(spec.image)
    root = folder / f"root-{base.stem}.qcow2"
    if not root.exists():
        command("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, root)
    told = folder / "orders.disk"
    text = orders.read_text()
    told.write_text(text + "\0" * (-len(text.encode()) % 65536))
    told.chmod(0o600)
    command("ip", "-batch", "-", stdin=f"tuntap add {spec.link(name)} mode tap\n"
                                       f"link set {spec.link(name)} master {spec.tag} up\n")
    return spawn(_qemu(spec, name, root, told, log), log)


def _qemu(spec: Spec, name: str, root: Path, told: Path, log: Path) -> list[str]:
    """The words that start one machine: root disk on NVMe (no initrd needed), Nova's disk and the orders on virtio."""
    drive, large = "if=none,cache=unsafe", spec.memory > 1024
    return [
        "qemu-system-x86_64", "-name", f"lab-{name}", "-machine", "q35,smm=off,vmport=off,sata=off,smbus=off",
        "-accel", f"tcg,thread=multi,tb-size={512 if large else 128}", "-cpu", "max,-la57",
        "-smp", "2" if large else "1", "-m", str(spec.memory),
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-kernel", str(kernel().bare), "-append", KERNEL_LINE,
        "-drive", f"{drive},id=root,format=qcow2,file={root}", "-device", "nvme,drive=root,serial=root",
        "-drive", f"{drive},id=nova,format=raw,discard=unmap,file={spec.folder / name / 'nova.ext4'}",
        "-device", "virtio-blk-pci,drive=nova",
        "-drive", f"{drive},id=told,format=raw,readonly=on,file={told}", "-device", "virtio-blk-pci,drive=told",
        "-netdev", f"tap,id=net,ifname={spec.link(name)},script=no,downscript=no",
        "-device", f"virtio-net-pci,netdev=net,mac={spec.mac(name)}",
        "-object", "rng-random,id=random,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=random",
        "-chardev", f"file,id=console,append=on,path={log}", "-serial", "chardev:console",
    ]


def _ssh(spec: Spec, name: str) -> list[str]:
    """ssh through the connection that is kept open; its socket's path must be short."""
    return ["ssh", "-S", str(home() / "labs" / f"{spec.link(name)}.ssh"), "-o", "BatchMode=yes", "-o", "LogLevel=ERROR",
            "-o", "IdentitiesOnly=yes", "-i", str(spec.key), "-o", f"UserKnownHostsFile={spec.known_hosts}",
            "-o", "ServerAliveInterval=20", "-F", "none", f"root@{spec.address(name)}"]


def connect(spec: Spec, name: str) -> None:
    """Open the lab's own connection; it ends with the machine."""
    log = spec.folder / name / "ssh.log"
    _hang_up(spec, name)
    keeper = spawn([*_ssh(spec, name)[:3], "-M", "-N", *_ssh(spec, name)[3:]], log)

    def open_now() -> bool:
        if not keeper.alive():
            raise LabError(f"host {name}: no SSH connection; see {log}")
        return subprocess.run([*_ssh(spec, name)[:3], "-O", "check", name], capture_output=True, env=CLEAN_ENV,
                              check=False).returncode == 0

    try:
        wait_until(f"host {name}: SSH connection", open_now, 60, log)
    except BaseException:
        keeper.stop()
        raise


def _hang_up(spec: Spec, name: str) -> None:
    """Close the lab's own connection, if there is one."""
    with suppress(LabError):
        command(*_ssh(spec, name)[:3], "-O", "exit", name)
    Path(_ssh(spec, name)[2]).unlink(missing_ok=True)


def enter(spec: Spec, name: str, argv: Sequence[str]) -> list[str]:
    """The command that runs `argv` as root in the machine."""
    return [*_ssh(spec, name), "env", *(f"{key}={value}" for key, value in CLEAN_ENV.items()), shlex.join(argv)]


def inmates(listed: str) -> list[tuple[int, list[str]]]:
    """What LISTER printed: every process's pid and words."""
    return [(pid, argv) for pid, argv in json.loads(listed)]


def stop(spec: Spec, name: str, machine: Process, gently: bool) -> None:
    """End the machine: through its process 1 when done gently, else like a power cut."""
    if gently:
        with suppress(LabError):
            command(*enter(spec, name, ["kill", "-TERM", "1"]), seconds=20)
            wait_until("power off", lambda: not machine.alive(), 40)
    _hang_up(spec, name)
    machine.stop(seconds=2, number=signal.SIGKILL)
