"""What the lab installs: Debian packages, only those that are missing, with no service started by Debian."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from lab.processes import CLEAN_ENV, LabError, home, say, tail

HOSTS: Final = ("openssh-server", "openssh-client", "sudo", "python3", "iproute2", "util-linux", "e2fsprogs", "kmod",
                "qemu-utils", "nbd-server", "nbd-client", "procps", "iptables", "tcsh", "fish")
CEPH: Final = ("ceph-mon", "ceph-osd", "ceph-mgr")
CEPH_CLIENT: Final = ("ceph-common", "qemu-block-extra", "python3-rbd")  # what a hypervisor needs to use it
CINDER: Final = ("cinder-api", "cinder-scheduler", "cinder-volume", "lvm2", "thin-provisioning-tools", "open-iscsi", "python3-rtslib-fb")
MACHINES: Final = ("qemu-system-x86", "busybox-static", "lz4")
POLICY: Final = Path("/usr/sbin/policy-rc.d")  # Debian asks this file before it starts a service: 101 says no
SAYS_NO: Final = "#!/bin/sh\n# The lab is installing packages and wants no service started.\nexit 101\n"


def missing(packages: Sequence[str]) -> list[str]:
    """Those of the packages that are not installed on this machine."""
    done = subprocess.run(["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *packages],
                          check=False, capture_output=True, text=True, env=CLEAN_ENV)
    states = dict(line.split() for line in done.stdout.splitlines())
    return [name for name in packages if states.get(name) != "installed"]


@contextmanager
def _services_stay_off() -> Iterator[None]:
    """While this scope is open, maintainer scripts start nothing; a policy that was there before is kept."""
    if POLICY.exists():
        yield
        return
    POLICY.write_text(SAYS_NO)
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()


def _apt(log: Path, *words: str) -> None:
    """Run apt-get, waiting for another apt to end; raises LabError with the end of its log."""
    argv = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=600", *words]
    with log.open("a") as out:
        done = subprocess.run(argv, check=False, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                              env={**CLEAN_ENV, "DEBIAN_FRONTEND": "noninteractive"})
    if done.returncode:
        raise LabError(f"apt-get {words[0]} failed with status {done.returncode}; see {log}:{tail(log)}")


def install(packages: Sequence[str]) -> None:
    """Install what is missing of these Debian packages, and say so; does nothing when all are there.

    Raises LabError if this is not root's doing or apt-get fails.
    """
    wanted = missing(packages)
    if not wanted:
        return
    if os.geteuid() != 0:
        raise LabError(f"not installed: {' '.join(wanted)}; run as root, or install them yourself")
    log = home() / "log" / "apt.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    say(f"installing {len(wanted)} Debian packages and what they need: {' '.join(wanted)} (log: {log})")
    with _services_stay_off():
        _apt(log, "update")
        _apt(log, "install", "-y", "--no-install-recommends", "-o", "Dpkg::Options::=--force-confold", *wanted)
    say("packages are installed")
