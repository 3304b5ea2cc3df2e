"""Cinder in a cloud: its API, scheduler and volume service, volume types and quotas.

Its backends:
- rbd  the cloud's Ceph
- nfs  files. The kernel of this machine has no NFS; a mount.nfs of the lab's shows the exported folder of this machine by a bind
       mount, and Cinder and Nova do all that they do with real NFS
- lvm  thin LVM on each virtual machine of the cloud, exported by iSCSI (LIO); the kernel of this machine has none of that
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from lab.api import Api
from lab.orders import File, Role, Service, Spec
from lab.roster import Roster
from lab.settings import GO, Cloud, Storage, cinder, ini

BACKENDS: Final = ("rbd", "nfs", "lvm")
EXPORT: Final = "/srv/volumes"  # where a hypervisor finds the folder that is exported
TYPES: Final[Mapping[str, tuple[str, ...]]] = {"src": ("standard", "bulk"), "dst": ("standard", "fast")}  # all of the first backend
QUOTAS: Final = {"volumes": 1000, "gigabytes": 10000, "snapshots": 1000}
MOUNT: Final = """\
#!/bin/sh
# The lab's mount.nfs SERVER:PATH PLACE [-o OPTIONS]: shows a folder of this machine there.
[ $# -ge 2 ] || {{ echo "usage: mount.nfs SERVER:PATH PLACE" >&2; exit 1; }}
exec mount --bind {} "$2"
"""
MOUNT_NFS: Final = File("/usr/sbin/mount.nfs", MOUNT.format(EXPORT), 0o755)  # of a hypervisor
MODULES: Final = ("loop", "dm_thin_pool", "sd_mod", "iscsi_tcp", "iscsi_target_mod", "target_core_iblock")
# Volume groups on files of the host's own disk, for Cinder and for Nova, and what LIO needs; then the program.
GROUPS: Final = """\
udevadm trigger --subsystem-match=block
udevadm settle
for group in volumes instances; do
    file=/var/lib/nova/$group.img
    [ -e $file ] || truncate -s 12G $file
    device=$(losetup -n -O NAME -j $file)
    [ -n "$device" ] || device=$(losetup -f --show $file)
    vgs $group || vgcreate $group "$device"
    vgchange -ay $group
done
mountpoint -q /sys/kernel/config || mount -t configfs configfs /sys/kernel/config
mkdir -p /etc/rtslib-fb-target /var/lib/cinder/lock
exec "$@"
"""
# /usr/sbin with the lab's mount.nfs in it, for one program alone.
WITH_MOUNT: Final = 'mount -t overlay overlay -o "lowerdir=$1:/usr/sbin" /usr/sbin && shift && exec "$@"'


def exported(cloud: Cloud) -> Path:
    """The folder that the backend `nfs` keeps volumes in."""
    return cloud.folder / "volumes"


def write_nfs(cloud: Cloud) -> None:
    """Make the exported folder, and what Cinder mounts it by."""
    exported(cloud).mkdir(parents=True, exist_ok=True)
    exported(cloud).chmod(0o777)
    (cloud.etc / "cinder").mkdir(parents=True, exist_ok=True)
    (cloud.etc / "cinder" / "shares").write_text(f"{cloud.address}:{EXPORT}\n")
    program = cloud.folder / "sbin" / "mount.nfs"
    program.parent.mkdir(exist_ok=True)
    program.write_text(MOUNT.format(exported(cloud)))
    program.chmod(0o755)


def lvm_role(cloud: Cloud, spec: Spec, host: str, made: Role) -> Role:
    """The same virtual machine with LVM, and with Cinder's volume service that exports volumes there."""
    text = ini(cinder(cloud, spec.address(host), host, ("lvm",)))
    files = (File("/etc/cinder/cinder.conf", text, 0o600), File("/etc/iscsi/initiatorname.iscsi", f"InitiatorName=iqn.2026-01.example.lab:{host}\n"))
    argv = ["sh", "-ec", GROUPS, "sh", "/usr/bin/cinder-volume", "--config-file", "/etc/cinder/cinder.conf"]
    services = (
        Service("udevd", ["bash", "-c", "exec -a systemd-udevd /usr/bin/udevadm"]),
        Service("iscsid", ["/sbin/iscsid", "-f"]),
        Service("cinder-volume", argv, "", {"HOME": "/root"}, GO),
    )
    return replace(made, files=(*made.files, *files), services=(*services, *made.services), setup=(*made.setup, ["modprobe", "-a", *MODULES]))


def start_cinder(roster: Roster, cloud: Cloud, storage: Storage) -> None:
    """Start Cinder's scheduler and volume service; its API is started as those of other services are."""
    words = ("--config-file", cloud.etc / "cinder/cinder.conf")
    roster.start(f"{cloud.name}-cinder-scheduler", ["cinder-scheduler", *words])
    if not storage.on_controller:
        return
    volume: list[str | Path] = ["cinder-volume", *words]
    if "nfs" in storage.volumes:
        volume = ["unshare", "--mount", "sh", "-c", WITH_MOUNT, "sh", cloud.folder / "sbin", *volume]
    roster.start(f"{cloud.name}-cinder-volume", volume)


def api_words(cloud: Cloud) -> list[str]:
    """What uWSGI has to pass on to Cinder's API."""
    return ["--pyargv", f"--config-file {cloud.etc}/cinder/cinder.conf"]


def has_reported(roster: Roster, api: Api, storage: Storage, machines: Sequence[str]) -> bool:
    """Whether all of Cinder's services have reported. Raises LabError with the end of a log if one has ended."""
    name = api.cloud.name
    for part in ("scheduler", *(["volume"] if storage.on_controller else [])):
        roster.require(f"{name}-cinder-{part}")
    up = {entry["host"] for entry in api.call("GET", "cinder", "/os-services")["services"] if entry["state"] == "up"}
    own = [f"{machine}@lvm" for machine in machines if "lvm" in storage.volumes]
    return {f"{name}-ctl", *(f"{name}-ctl@{backend}" for backend in storage.on_controller), *own} <= up


def types_and_quotas(api: Api, storage: Storage) -> None:
    """Volume types, as far as they are missing, and quotas that no test meets."""
    known = {entry["name"] for entry in api.call("GET", "cinder", "/types")["volume_types"]}
    wanted = dict.fromkeys(TYPES[api.cloud.name], storage.volumes[0]) | {name: name for name in storage.volumes}
    for name, backend in wanted.items():
        if name not in known:
            specs = {"volume_backend_name": backend}
            api.call("POST", "cinder", "/types", {"volume_type": {"name": name, "extra_specs": specs}})
    api.call("PUT", "cinder", "/os-quota-class-sets/default", {"quota_class_set": QUOTAS})
