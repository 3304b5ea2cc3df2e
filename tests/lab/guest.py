"""A small image that boots: Debian's cloud kernel, busybox, and a disk that shows what became of it.

Partition 1 is FAT with syslinux, kernel and initrd; partition 2 is ext4 with the guest's records (see guest_init.sh).
Every tool writes straight into the image file, so that neither a loop device nor a mount is needed.
"""

from __future__ import annotations

import functools
import hashlib
import random
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Final

from lab.image import Kernel, kernel, module_files
from lab.processes import CLEAN_ENV, LabError, alone, command, home, say

PACKAGES: Final = ("syslinux", "syslinux-common", "mtools", "dosfstools", "e2fsprogs", "cpio", "busybox-static",
                   "qemu-utils", "kmod", "lz4")
INIT: Final = Path(__file__).with_name("guest_init.sh")
MODULES: Final = ("virtio_pci", "virtio_blk", "virtio_net", "evdev", "button")
MIB: Final = 1024**2
BOOT: Final = (1, 30)  # where the partitions begin and how long they are, in MiB
DATA: Final = (31, 96)
SIZE: Final = 128  # MiB
BASE: Final = 8 * MIB  # bytes of incompressible content, the same in every build
SYSLINUX: Final = """\
DEFAULT lab
PROMPT 0
TIMEOUT 0
LABEL lab
  KERNEL /vmlinuz
  APPEND initrd=/initrd console=ttyS0 quiet panic=1 tsc=unstable mitigations=off no_timer_check \
nokaslr init_on_alloc=0 apparmor=0 audit=0 cryptomgr.notests
"""


@functools.cache
def guest_image() -> Path:
    """The guest's image, qcow2, built when it is not there yet or its parts have changed."""
    linux = kernel()
    recipe = INIT.read_text() + Path(__file__).read_text() + linux.version
    folder = home() / "cache"
    image = folder / f"guest-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.qcow2"
    with alone("guest"):
        if not image.exists():
            say("building the guest's image")
            work = folder / "guest.new"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            _build(work, linux)
            command("qemu-img", "convert", "-O", "qcow2", work / "disk", work / "qcow2")
            (work / "qcow2").rename(image)
            shutil.rmtree(work)
    return image


def _build(work: Path, linux: Kernel) -> None:
    """Make the raw image work/disk."""
    disk = work / "disk"
    with disk.open("wb") as file:
        file.truncate(SIZE * MIB)
        file.write(_boot_sector())
    command("mkfs.fat", "-F", "16", "--offset", str(BOOT[0] * MIB // 512), disk, str(BOOT[1] * 1024))
    partition = f"{disk}@@{BOOT[0]}M"
    (work / "syslinux.cfg").write_text(SYSLINUX)
    (work / "initrd").write_bytes(_initrd(work, linux))
    shutil.copy(linux.image, work / "vmlinuz")
    for name in ("vmlinuz", "initrd", "syslinux.cfg"):
        command("mcopy", "-i", partition, work / name, f"::/{name}")
    command("syslinux", "--install", "--offset", str(BOOT[0] * MIB), disk)
    tree = work / "data"
    tree.mkdir()
    (tree / "base.bin").write_bytes(random.Random(7).randbytes(BASE))
    command("mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-E", f"offset={DATA[0] * MIB}", "-d", tree, disk,
            f"{DATA[1]}M")


def _boot_sector() -> bytes:
    """A master boot record: syslinux's code, two partitions (the first one active), and the signature."""
    code = Path("/usr/lib/syslinux/mbr/mbr.bin").read_bytes()[:440].ljust(446, b"\0")
    far = b"\xff" * 3  # addresses by cylinder, head and sector are not used
    table = b"".join(struct.pack("<B3sB3sII", active, far, kind, far, start * MIB // 512, size * MIB // 512)
                     for active, kind, (start, size) in ((0x80, 0x0E, BOOT), (0, 0x83, DATA)))
    return code + table.ljust(64, b"\0") + b"\x55\xaa"


def _initrd(work: Path, linux: Kernel) -> bytes:
    """The guest's memory file system: busybox, a few drivers and guest_init.sh; unpacked, for it boots faster so."""
    tree = work / "initrd.tree"
    for name in ("bin", "dev", "proc", "sys", "mnt", "modules", "etc"):
        (tree / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin/busybox")
    shutil.copy(INIT, tree / "init")
    (tree / "init").chmod(0o755)
    drivers = module_files(linux, MODULES)
    for path in drivers:
        shutil.copy(path, tree / "modules" / path.name)
    (tree / "modules/order").write_text("\n".join(path.name for path in drivers) + "\n")
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    packed = subprocess.run(["cpio", "-o", "-H", "newc", "--quiet", "-D", tree], input=names.encode(),
                            capture_output=True, env=CLEAN_ENV, check=False)
    if packed.returncode:
        raise LabError(f"cpio failed: {packed.stderr.decode()}")
    return packed.stdout
