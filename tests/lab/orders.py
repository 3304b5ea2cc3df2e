"""What a hypervisor is told to be: names, users, files and services, as host_init.py reads them."""

from __future__ import annotations

import hashlib
import ipaddress
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from lab.processes import command

USERS: Final = {"operator": 2001, "nosudo": 2002, "nova": 64060, "libvirt-qemu": 64055}  # Debian's numbers
SSHD_CONFIG: Final = """\
# Written by the lab. Port 2222 is there for those who want to see a port map work.
Port 22
Port 2222
HostKey /etc/ssh/ssh_host_ed25519_key
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
PrintMotd no
Subsystem sftp /usr/lib/openssh/sftp-server
"""


@dataclass(frozen=True)
class File:
    """A file to be written in the host."""

    path: str
    text: str
    mode: int = 0o644
    owner: str = "root"


@dataclass(frozen=True)
class Service:
    """A program that process 1 keeps running in the host."""

    name: str
    argv: Sequence[str]
    user: str = ""  # empty: root
    env: Mapping[str, str] = field(default_factory=dict)
    after: str = ""  # started once this path exists
    folders: Sequence[str] = ()  # made before, owned by the user


@dataclass(frozen=True)
class Role:
    """What a host is besides a machine with sshd: files, services, and commands to run at its start."""

    files: Sequence[File] = ()
    services: Sequence[Service] = ()
    setup: Sequence[Sequence[str]] = ()
    binds: Mapping[str, str] = field(default_factory=dict)  # folders of this machine that a host of kind `ns` sees: place there, folder


@dataclass(frozen=True)
class Spec:
    """A group of hosts on a network of their own."""

    folder: Path
    kinds: Mapping[str, str]  # of each host, by its name: "ns" or "vm"
    network: str
    disk: str = "8G"  # of the file system at /var/lib/nova
    memory: int = 384  # MiB, of a virtual machine
    image: str = "host"  # which root disk a virtual machine boots
    keep: bool = False  # data and processes outlive the command that made them

    @property
    def names(self) -> tuple[str, ...]:
        """The hosts' names, in the order of their addresses."""
        return tuple(self.kinds)

    @property
    def tag(self) -> str:
        """Names the network in interfaces and records: `mg81-7` for 10.81.7.0/24."""
        octets = str(ipaddress.ip_network(self.network)[0]).split(".")
        return f"mg{octets[1]}-{octets[2]}"

    @property
    def operator(self) -> str:
        """The operator's own address on that network, the first one."""
        return str(ipaddress.ip_network(self.network)[1])

    def address(self, name: str) -> str:
        """The address of a host: .11 for the first, .12 for the second."""
        return str(ipaddress.ip_network(self.network)[11 + self.names.index(name)])

    def fqdn(self, name: str) -> str:
        """The host's full name, which libvirt and so Nova's hypervisor_hostname report."""
        return f"{name}.lab.example"

    def link(self, name: str) -> str:
        """The operator's end of the host's network cable."""
        return f"{self.tag}h{self.address(name).rpartition('.')[2]}"

    def mac(self, name: str) -> str:
        """The host's hardware address: always the same, so that peers find it again after a restart."""
        octets = (int(octet) for octet in self.address(name).split("."))
        return "02:4d:" + ":".join(f"{octet:02x}" for octet in octets)

    @property
    def key(self) -> Path:
        """The private key that root, operator and nosudo accept on every host."""
        return self.folder / "id"

    @property
    def known_hosts(self) -> Path:
        """The hosts' public keys, as OpenSSH and paramiko read them."""
        return self.folder / "known_hosts"


def make_keys(spec: Spec) -> None:
    """Make the operator's key, each host's key and known_hosts, as far as they are missing."""
    for path in (spec.key, *(spec.folder / f"hostkey-{name}" for name in spec.names)):
        if not path.exists():
            command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", path)
    lines = []
    for name in spec.names:
        public = (spec.folder / f"hostkey-{name}.pub").read_text().rsplit(" ", 1)[0]
        address = spec.address(name)
        lines.append(f"{name},{spec.fqdn(name)},{address},[{address}]:2222 {public}\n")
    spec.known_hosts.write_text("".join(lines))


def _identity(spec: Spec, name: str) -> list[File]:
    """The files that make a host itself: names, keys, sshd's and sudo's settings."""
    public = spec.key.with_suffix(".pub").read_text()
    hosts = "".join(f"{spec.address(peer)} {spec.fqdn(peer)} {peer}\n" for peer in spec.names)
    hostkey = spec.folder / f"hostkey-{name}"
    logins = [File(f"{place}/.ssh/authorized_keys", public, 0o600, user)
              for user, place in (("root", "/root"), ("operator", "/home/operator"), ("nosudo", "/home/nosudo"))]
    return [
        *logins,
        File("/etc/hostname", name + "\n"),
        File("/etc/hosts", "127.0.0.1 localhost\n" + hosts),
        File("/etc/machine-id", hashlib.md5(hostkey.read_bytes()).hexdigest() + "\n"),
        File("/etc/ssh/sshd_config", SSHD_CONFIG),
        File("/etc/ssh/ssh_host_ed25519_key", hostkey.read_text(), 0o600),
        File("/etc/sudoers.d/lab", "operator ALL=(ALL) NOPASSWD: ALL\n", 0o440),
    ]


def write_orders(spec: Spec, name: str, disk: Path, role: Role) -> Path:
    """Write a host's orders into its folder and say where."""
    sshd = Service("sshd", ("/usr/sbin/sshd", "-D", "-e"))
    orders = {
        "name": name,
        "address": f"{spec.address(name)}/{ipaddress.ip_network(spec.network).prefixlen}",
        "folder": str(spec.folder / name),
        "disk": str(disk),
        "users": USERS,
        "files": [asdict(file) for file in (*_identity(spec, name), *role.files)],
        "services": [asdict(service) for service in (sshd, *role.services)],
        "setup": role.setup,
        "binds": role.binds,
    }
    path = spec.folder / name / "orders.json"
    path.write_text(json.dumps(orders, indent=1))
    path.chmod(0o600)  # the host's private key is in it
    return path
