#!/usr/bin/python3 -IS
"""Process 1 of a lab hypervisor: makes the system, starts its services, reaps what dies, ends all on SIGTERM.

One file for both kinds. It gets its orders as JSON:
- kind `ns`: argv[1] names the file. We are process 1 of fresh network, mount, UTS, IPC and pid namespaces and
  build a private copy-on-write view of this machine's `/`.
- kind `vm`: no argument; the file is the raw disk /dev/vdb. The kernel has mounted the root disk.

A service is held down while /run/lab/NAME.down exists; otherwise it is started again whenever it ends.
"""

from __future__ import annotations

import json
import os
import pwd
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

TYPE_CHECKING = False  # typing itself would cost a virtual machine time at its boot
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Orders = dict[str, Any]  # as lab.orders writes them

ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"}
OWN = ("var/lib/libvirt", "var/lib/neutron", "var/log", "var/tmp", "root", "home")  # on a plain file system
NODES = {  # name: (major, minor), as in the kernel's list of devices
    "null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0),
    "fuse": (10, 229), "net/tun": (10, 200),
}
LINKS = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2", "ptmx": "pts/ptmx"}
AGAIN = 2.0  # seconds before a service that ended is started again
PATIENCE = 6.0  # seconds that services have for their end


def run(*argv: str, stdin: str | None = None) -> None:
    """Run a command that must succeed; its errors go to the host's own log."""
    subprocess.run(argv, input=stdin, text=True, check=True, env=ENV)


def wait_for(what: str, ready: Callable[[], bool], seconds: float = 20.0) -> None:
    """Return when `ready()` is true; die with a message when it takes too long."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            sys.exit(f"host_init: {what} did not appear within {seconds:.0f} s")
        time.sleep(0.01)


# ---- kind ns: a private view of this machine ----


def build_view(orders: Orders) -> None:
    """Mount a copy-on-write view of / with the host's own data in place, and make it our root."""
    folder, root = orders["folder"], orders["folder"] + "/view"
    for name in ("view", "upper", "work", "data"):
        os.makedirs(folder + "/" + name, exist_ok=True)
    layers = f"lowerdir=/,upperdir={folder}/upper,workdir={folder}/work,index=off,metacopy=off,xino=off"
    run("mount", "-t", "overlay", "-o", layers, "overlay", root)
    for name in OWN:
        give_own(root + "/" + name, folder + "/data/" + name)
    for place, shared in orders["binds"].items():
        os.makedirs(root + place, exist_ok=True)
        run("mount", "--bind", shared, root + place)
    os.makedirs(root + "/var/lib/nova", exist_ok=True)
    run("mount", "-o", "loop,noatime,discard", orders["disk"], root + "/var/lib/nova")
    run("mount", "-t", "proc", "proc", root + "/proc")
    run("mount", "-t", "sysfs", "sysfs", root + "/sys")
    run("mount", "-t", "tmpfs", "-o", "mode=755", "run", root + "/run")
    run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmp", root + "/tmp")
    make_devices(root + "/dev")
    os.chdir(root)
    os.mkdir("run/before")
    run("pivot_root", ".", "run/before")
    os.chdir("/")
    run("umount", "-l", "/run/before")
    os.rmdir("/run/before")


def give_own(place: str, data: str) -> None:
    """Put this host's own folder at `place`; packaged content of /var/lib comes along the first time."""
    if not os.path.isdir(data):
        os.makedirs(os.path.dirname(data), exist_ok=True)
        if "/var/lib/" in place and os.path.isdir(place):
            run("cp", "-a", place, data)
        else:
            os.mkdir(data)
            os.chmod(data, {"tmp": 0o1777, "root": 0o700}.get(os.path.basename(data), 0o755))
    os.makedirs(place, exist_ok=True)
    run("mount", "--bind", data, place)


def make_devices(dev: str) -> None:
    """A /dev with the few devices that a hypervisor's programs need: no disks of this machine among them."""
    run("mount", "-t", "tmpfs", "-o", "mode=755", "dev", dev)
    for name in ("net", "pts", "shm", "mqueue", "hugepages"):
        os.mkdir(dev + "/" + name)
    os.umask(0)
    for name, (major, minor) in NODES.items():
        os.mknod(dev + "/" + name, 0o020666, os.makedev(major, minor))
    os.umask(0o022)
    for name, target in LINKS.items():
        os.symlink(target, dev + "/" + name)
    run("mount", "-t", "devpts", "-o", "newinstance,ptmxmode=0666,mode=620,gid=5", "pts", dev + "/pts")
    run("mount", "-t", "tmpfs", "-o", "mode=1777", "shm", dev + "/shm")


# ---- kind vm: what a distribution's boot would do ----


def boot_machine() -> None:
    """Mount what the kernel leaves to us and load the drivers; nbd is left to whoever wants it."""
    run("mount", "-t", "devtmpfs", "dev", "/dev")
    run("mount", "-t", "proc", "proc", "/proc")
    run("mount", "-t", "sysfs", "sysfs", "/sys")
    for place, mode in (("/run", "755"), ("/tmp", "1777"), ("/dev/shm", "1777")):
        os.makedirs(place, exist_ok=True)
        run("mount", "-t", "tmpfs", "-o", "mode=" + mode, "tmpfs", place)
    for name in ("pts", "mqueue", "hugepages"):
        os.makedirs("/dev/" + name, exist_ok=True)
    run("mount", "-t", "devpts", "-o", "mode=620,gid=5", "pts", "/dev/pts")
    for name, target in LINKS.items():
        if not os.path.lexists("/dev/" + name):
            os.symlink(target, "/dev/" + name)
    run("mount", "-o", "remount,rw,noatime", "/")
    run("modprobe", "-a", "virtio_pci", "virtio_blk", "virtio_net", "virtio_rng")
    wait_for("/dev/vdb", lambda: os.path.exists("/dev/vda") and os.path.exists("/dev/vdb"))
    os.makedirs("/var/lib/nova", exist_ok=True)
    run("mount", "-o", "noatime,discard", "/dev/vda", "/var/lib/nova")


# ---- both kinds: what makes this host itself ----


def settle(orders: Orders) -> None:
    """Write the host's name, users, keys and files, and give it its address."""
    socket.sethostname(orders["name"])
    os.makedirs("/run/lab", exist_ok=True)
    for name in ("lock", "sshd"):
        os.makedirs("/run/" + name, exist_ok=True)
    os.chmod("/run/lock", 0o1777)
    for name, number in orders["users"].items():
        add_user(name, number)
    for entry in orders["files"]:
        write(entry)
    for service in orders["services"]:
        for folder in service["folders"]:
            own_folder(folder, service["user"] or "root")
    own_folder("/var/lib/nova/instances", "nova")
    for line in orders["setup"]:
        run(*line)


def own_folder(path: str, user: str) -> None:
    """A folder that belongs to this user."""
    os.makedirs(path, exist_ok=True)
    account = pwd.getpwnam(user)
    os.chown(path, account.pw_uid, account.pw_gid)


def add_user(name: str, number: int) -> None:
    """An account without a password (one that keys and sudo can still use); one that is there stays as it is."""
    with open("/etc/passwd") as file:
        if any(line.startswith(name + ":") for line in file):
            return
    home = "/home/" + name
    for path, line in (("/etc/passwd", f"{name}:x:{number}:{number}::{home}:/bin/bash\n"),
                       ("/etc/group", f"{name}:x:{number}:\n"), ("/etc/shadow", f"{name}:*:19000:0:99999:7:::\n")):
        with open(path, "a") as file:
            file.write(line)


def write(entry: dict[str, Any]) -> None:
    """Write one file of the orders: path, text, mode, owner."""
    path = entry["path"]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(path):
        os.unlink(path)
    account = pwd.getpwnam(entry["owner"])
    with open(path, "w") as file:
        os.fchmod(file.fileno(), entry["mode"])
        os.fchown(file.fileno(), account.pw_uid, account.pw_gid)
        file.write(entry["text"])
    folder = os.path.dirname(path)
    if os.path.basename(folder) == ".ssh":  # sshd insists on who owns what here
        for place in (folder, os.path.dirname(folder)):
            os.chmod(place, 0o700)
            os.chown(place, account.pw_uid, account.pw_gid)


def join_network(orders: Orders) -> None:
    """Bring up eth0 with the host's address."""
    wait_for("eth0", lambda: "eth0" in (name for _, name in socket.if_nameindex()))
    lines = f"link set lo up\naddr replace {orders['address']} dev eth0\nlink set eth0 up\n"
    run("ip", "-batch", "-", stdin=lines)


# ---- services ----


class Services:
    """The host's services: started when their turn has come, started again when they end."""

    def __init__(self, table: list[dict[str, Any]]) -> None:
        self.table = table
        self.running: dict[int, str] = {}  # pid: name
        self.not_before: dict[str, float] = {}  # name: time of its next start
        self.bell, hammer = os.pipe()  # a signal puts a byte into it
        os.set_blocking(self.bell, False)
        os.set_blocking(hammer, False)
        signal.set_wakeup_fd(hammer)
        self.told_to_end = False
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self.on_term)

    def on_term(self, *_: object) -> None:
        """Remember that we are to end."""
        self.told_to_end = True

    def sleep(self) -> None:
        """Wait for a signal, a fifth of a second at most, and bury who has died."""
        if select.select([self.bell], [], [], 0.2)[0]:
            os.read(self.bell, 4096)
        self.reap()

    def start_due(self) -> None:
        """Start each service that is not running, is not held down and whose precondition exists."""
        for service in self.table:
            name = service["name"]
            due = time.monotonic() >= self.not_before.get(name, 0.0)
            if name in self.running.values() or not due or os.path.exists(f"/run/lab/{name}.down"):
                continue
            if not service["after"] or os.path.exists(service["after"]):
                self.start(service)

    def start(self, service: dict[str, Any]) -> None:
        """Start one service, its output in /var/log/NAME.out and its pid in /run/lab/NAME.pid."""
        name, argv = service["name"], service["argv"]
        if service["user"]:
            argv = ["setpriv", "--reuid", service["user"], "--regid", service["user"], "--init-groups", *argv]
        with open(f"/var/log/{name}.out", "ab") as out:
            child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                     env={**ENV, **service["env"]}, start_new_session=True)
        child.returncode = 0  # reap() waits for it, this object never does
        self.running[child.pid] = name
        self.not_before[name] = time.monotonic() + AGAIN
        with open(f"/run/lab/{name}.pid", "w") as file:
            file.write(f"{child.pid}\n")

    def reap(self) -> None:
        """Bury every child that has ended, our own services and orphans alike."""
        while True:
            pid, status = 0, 0
            with suppress(ChildProcessError):
                pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            if pid in self.running:
                print(f"host_init: {self.running.pop(pid)} (pid {pid}) ended with status {status}", flush=True)

    def end(self) -> None:
        """Ask all services to end, newest first, and wait for them a little."""
        for pid in reversed(list(self.running)):
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while self.running and time.monotonic() < deadline:
            self.sleep()

    def wait_for_all(self) -> None:
        """Return when no child is left, orphans included."""
        with suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)


def main() -> None:
    """Make the host, then keep its services until told to end."""
    machine = len(sys.argv) < 2
    if machine:
        boot_machine()
    with open("/dev/vdb" if machine else sys.argv[1]) as file:
        orders = json.loads(file.read().rstrip("\0"))
    if not machine:
        build_view(orders)
    settle(orders)
    join_network(orders)
    services = Services(orders["services"])
    while not services.told_to_end:
        services.start_due()
        services.sleep()
    services.end()
    os.sync()
    if machine:
        os.kill(-1, signal.SIGKILL)  # whatever else runs in this virtual machine: guests, above all
        services.wait_for_all()
        run("mount", "-o", "remount,ro", "/var/lib/nova")
        run("/bin/busybox", "poweroff", "-f")
        signal.pause()


if __name__ == "__main__":
    main()
