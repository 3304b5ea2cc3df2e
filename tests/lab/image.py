"""The virtual machines' kernel and root disk, made from Debian's kernel package and this machine's own files.

A root disk holds the files of a few installed packages and of all that they depend on: no download but the kernel,
no second installation, and the programs in the machine are the programs that were tested outside.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lab.packages import CEPH_CLIENT, HOSTS
from lab.processes import CLEAN_ENV, LabError, alone, command, home, say

SYSTEM: Final = ("base-files", "base-passwd", "bash", "busybox-static", "coreutils", "dash", "debianutils", "diffutils",
                 "e2fsprogs", "findutils", "grep", "gzip", "hostname", "libc-bin", "login", "mawk", "mount", "netbase",
                 "passwd", "sed", "tar")
CONTENTS: Final = {  # image: the packages it is made for
    "host": (*HOSTS, *SYSTEM),
    "compute": (*HOSTS, *SYSTEM, "nova-compute-qemu", "neutron-linuxbridge-agent", "libvirt-daemon-system",
                "libvirt-clients", "qemu-system-x86", "ebtables", "iptables", *CEPH_CLIENT,
                # for volumes of its own, as far as the lab has installed that
                "cinder-volume", "lvm2", "thin-provisioning-tools", "open-iscsi", "python3-rtslib-fb", "udev"),
}
LEFT_OUT: Final = re.compile(r"/usr/share/(doc|man|locale|info|lintian|bash-completion|i18n|perl)/|/usr/lib/systemd/"
                             r"|/usr/bin/qemu-system-(?!x86_64$)|/etc/ssh/ssh_host_|/usr/include/|\.a$")
DRIVERS: Final = ("virtio_net", "virtio_blk", "virtio_pci", "virtio_rng", "nbd", "loop", "dm_mod", "dm_snapshot", "tun",
                  "veth", "fuse", "sch_tbf", "dm_thin_pool", "sd_mod", "iscsi_tcp", "target_core_iblock", "iscsi_target_mod", "configfs")
FILTERS: Final = ("net/bridge", "net/netfilter", "net/ipv4/netfilter", "net/ipv6/netfilter")  # for security groups
PLACES: Final = ("proc", "sys", "dev", "run", "tmp", "root", "home", "mnt", "var/log", "var/tmp", "var/lib/nova",
                 "var/lib/libvirt", "var/cache/libvirt", "var/lib/neutron", "var/spool")
LZ4_MAGIC: Final = b"\x02!L\x18"
INIT: Final = Path(__file__).with_name("host_init.py")


@dataclass(frozen=True)
class Kernel:
    """Debian's cloud kernel, unpacked."""

    image: Path  # packed, as a boot loader takes it
    bare: Path  # the same unpacked, as qemu takes it too
    modules: Path  # a folder lib/modules/VERSION
    folder: Path

    @property
    def version(self) -> str:
        """As `uname -r` would print it."""
        return self.modules.name


@functools.cache
def kernel() -> Kernel:
    """Debian's current kernel for clouds, downloaded and unpacked when it is not there yet."""
    lines = command("apt-cache", "depends", "linux-image-cloud-amd64").splitlines()
    names = [line.split()[-1] for line in lines if "Depends: linux-image-" in line]
    if not names:
        raise LabError("apt knows no package linux-image-cloud-amd64; run `apt-get update`")
    folder = home() / "cache" / names[0]
    with alone("kernel"):
        if not folder.is_dir():
            _download(names[0], folder)
    images = next(folder.glob("boot/vmlinuz-*")), folder / "boot/vmlinux"
    return Kernel(*images, modules=next(folder.glob("lib/modules/*")), folder=folder)


def _download(package: str, folder: Path) -> None:
    """Unpack Debian's kernel package into a folder."""
    say(f"downloading {package}")
    draft = folder.with_name("kernel.new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    command("env", "-C", draft, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package, seconds=600)
    archive = next(draft.glob("*.deb"))
    command("dpkg-deb", "-x", archive, draft)
    archive.unlink()
    _unpack_kernel(next(draft.glob("boot/vmlinuz-*")))
    draft.rename(folder)


def _unpack_kernel(image: Path) -> None:
    """Put the bare kernel beside its compressed image: unpacking it under emulation takes seconds at each boot."""
    packed = image.read_bytes()
    start = packed.find(LZ4_MAGIC)
    bare = subprocess.run(["lz4", "-dc"], input=packed[start:], capture_output=True, check=False, env=CLEAN_ENV).stdout
    if start < 0 or not bare.startswith(b"\x7fELF"):
        raise LabError(f"{image} is not the LZ4-compressed kernel that the lab expects")
    image.with_name("vmlinux").write_bytes(bare)


def _installed() -> dict[str, list[str]]:
    """Every installed package (and what it provides): the packages it depends on, alternatives included."""
    fields = "${Package}\t${Provides}\t${Pre-Depends},${Depends}\t${Version}\n"
    depends: dict[str, list[str]] = {}
    for line in command("dpkg-query", "-W", "-f", fields).splitlines():
        name, provides, needs, _ = line.split("\t")
        wanted = [word.split("(")[0].split(":")[0].strip() for word in re.split(r"[,|]", needs)]
        depends[name] = [word for word in wanted if word]
        for virtual in provides.split(","):
            depends.setdefault(virtual.split("(")[0].strip(), []).append(name)
    return depends


def _closure(packages: Iterable[str]) -> list[str]:
    """The packages and all that they depend on, as far as it is installed here."""
    depends, found, waiting = _installed(), set[str](), list(packages)
    while waiting:
        name = waiting.pop()
        if name not in found and name in depends:
            found.add(name)
            waiting.extend(depends[name])
    return sorted(found)


def _files(packages: Sequence[str]) -> list[str]:
    """The paths to copy: the packages' files, compiled Python beside them, /etc, and links into /etc/alternatives."""
    known = command("dpkg-query", "-W", "-f", "${Package}\n").split()
    listed = set(command("dpkg-query", "-L", *(name for name in packages if name in known)).splitlines())
    paths = {f"{os.path.realpath(os.path.dirname(path))}/{os.path.basename(path)}" for path in listed if path != "/."}
    paths |= {str(path) for folder in paths if "/python3" in folder for path in Path(folder).glob("__pycache__/*")}
    paths |= {str(path) for path in Path("/etc").rglob("*")}
    paths |= {str(link) for folder in ("/usr/bin", "/usr/sbin") for link in Path(folder).iterdir()
              if link.is_symlink() and os.readlink(link).startswith("/etc/alternatives/")}
    return sorted(path for path in paths if not LEFT_OUT.search(path) and _copyable(path))


def _copyable(path: str) -> bool:
    """True for files and links; folders come along with what is in them."""
    return os.path.islink(path) or os.path.isfile(path)


def _tree(tree: Path, packages: Sequence[str], linux: Kernel) -> None:
    """Lay out a root file system in `tree`."""
    for name in ("usr/bin", "usr/sbin", "usr/lib", "usr/lib64", *PLACES):
        (tree / name).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (tree / name).symlink_to(f"usr/{name}")
    (tree / "var/run").symlink_to("/run")
    (tree / "var/lock").symlink_to("/run/lock")
    (tree / "var/tmp").chmod(0o1777)
    listing = tree.with_suffix(".files")
    listing.write_text("\n".join(_files(packages)))
    archive = tree.with_suffix(".tar")
    command("tar", "-C", "/", "--no-recursion", "-T", listing, "-cf", archive, seconds=600)
    command("tar", "-C", tree, "--keep-directory-symlink", "-xpf", archive, seconds=600)
    archive.unlink()
    for name in ("console", "null"):
        os.mknod(tree / "dev" / name, 0o020600, os.makedev(*{"console": (5, 1), "null": (1, 3)}[name]))
    shutil.copy(INIT, tree / "usr/sbin/lab-init")
    (tree / "etc/fstab").write_text("")
    _modules(tree, linux)


def module_files(linux: Kernel, names: Iterable[str]) -> list[Path]:
    """The files of these kernel modules and of those that they need, in an order in which they can be loaded."""
    command("depmod", "-b", linux.folder, linux.version)
    chains: dict[str, list[str]] = {}
    for line in (linux.modules / "modules.dep").read_text().splitlines():
        path, _, needs = line.partition(":")
        chains[Path(path).name.removesuffix(".ko").replace("-", "_")] = [*reversed(needs.split()), path]
    ordered = dict.fromkeys(path for name in names for path in chains[name])
    return [linux.modules / path for path in ordered]


def _modules(tree: Path, linux: Kernel) -> None:
    """Put the kernel modules that the lab needs into the tree."""
    filters = (path for folder in FILTERS for path in (linux.modules / "kernel" / folder).rglob("*.ko"))
    for path in module_files(linux, (*DRIVERS, *(path.stem.replace("-", "_") for path in filters))):
        place = tree / "usr" / path.relative_to(linux.folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    for path in linux.modules.glob("modules.*"):
        shutil.copy(path, tree / "usr/lib/modules" / linux.version / path.name)
    command("depmod", "-b", tree, linux.version)


@functools.cache
def root_disk(image: str) -> Path:
    """The root disk of this name (a raw ext4 file system), built if packages or the lab have changed since."""
    packages, linux = _closure(CONTENTS[image]), kernel()
    versions = command("dpkg-query", "-W", "-f", "${Package} ${Version}\n")
    recipe = [INIT.read_text(), Path(__file__).read_text(), versions, linux.version]
    key = hashlib.sha256("".join(recipe).encode()).hexdigest()[:12]
    disk = home() / "cache" / f"{image}-{key}.ext4"
    with alone("image"):
        if not disk.exists():
            say(f"building the virtual machines' root disk from {len(packages)} packages")
            _build(disk, packages, linux)
            for old in disk.parent.glob(f"{image}-*"):
                if old.stem != disk.stem:
                    old.unlink()
            say(f"the root disk is ready: {disk}")
    return disk


def _build(disk: Path, packages: Sequence[str], linux: Kernel) -> None:
    """Make the root disk, through a folder that is deleted afterwards."""
    tree = disk.with_suffix(".tree")
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    try:
        _tree(tree, packages, linux)
        size = int(command("du", "-sm", tree).split()[0]) * 5 // 4 + 512
        draft = disk.with_suffix(".new")
        draft.unlink(missing_ok=True)
        command("mke2fs", "-q", "-t", "ext4", "-m", "0", "-O", "^has_journal", "-d", tree, draft, f"{size}M",
                seconds=600)
        draft.rename(disk)
    finally:
        shutil.rmtree(tree, ignore_errors=True)
