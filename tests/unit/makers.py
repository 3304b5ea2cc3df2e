"""Facts as a survey would have found them, all in order; a test says only what is different."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TextIO

from migrena import Disk, DiskImage, Flavor, Image, Screen, Server, Settings, Volume

GiB = 1024**3
UUID = "11111111-2222-3333-4444-555555555555"
TOP = f"/var/lib/nova/instances/{UUID}/disk"


def a_flavor(**different: Any) -> Flavor:
    """The flavor `small` with 1 vcpu, 512 MiB and 10 GiB."""
    return replace(Flavor("small", vcpus=1, ram=512, disk=10, ephemeral=0, swap=0, id="flavor-1"), **different)


def an_image(**different: Any) -> Image:
    """The active image `debian`."""
    return replace(Image("image-1", "debian", "active", "hash-1", "sum-1"), **different)


def a_server(**different: Any) -> Server:
    """A running instance that nothing speaks against."""
    server = Server(id=UUID, name="web", status="ACTIVE", task="", power=1, host="cmp1", hypervisor="cmp1.example", locked=False,
                    lock_reason="", metadata={}, image="image-1", flavor=a_flavor(), volumes=(), config_drive=False,
                    fixed_addresses=frozenset({"10.0.0.5"}), fault="")
    return replace(server, **different)


def a_volume(**told: Any) -> Volume:
    """The volume `data` of 2 GiB, attached to that instance, as Cinder tells it."""
    return Volume.of({"id": "v1", "name": "data", "status": "in-use", "size": 2, "volume_type": "fast", "bootable": "false",
                      "attachments": [{"server_id": UUID}], **told})


def an_overlay(**different: Any) -> DiskImage:
    """A qcow2 of 10 GiB, one GiB of it in the file, on a raw base."""
    image = DiskImage(TOP, "qcow2", size=10 * GiB, length=GiB, allocated=GiB, backing="/var/lib/nova/instances/_base/abc", backing_format="raw")
    return replace(image, **different)


def a_base(**different: Any) -> DiskImage:
    """The raw base below the overlay."""
    return replace(DiskImage("/var/lib/nova/instances/_base/abc", "raw", size=2 * GiB, length=2 * GiB, allocated=GiB), **different)


def a_disk(*chain: DiskImage, **different: Any) -> Disk:
    """An overlay on its base, with nothing beside it."""
    return replace(Disk(chain or (an_overlay(), a_base()), guest_bytes=3 * GiB), **different)


def a_screen(stream: TextIO, **how: bool) -> Screen:
    """A screen that is quiet, or verbose."""
    screen = Screen(stream)
    vars(screen).update(how)
    return screen


def some_settings(**different: Any) -> Settings:
    """What an operator asked for: a source and a name."""
    return replace(Settings(src_uid=UUID, dst_name="new"), **different)
