"""The wire between the hosts: each host's cable is as fast as asked for, in both directions, as a switch port would be."""

from __future__ import annotations

from typing import Final

from lab.hosts import Lab
from lab.processes import command

WIRES: Final = {"unshaped": 0, "10gbit": 10_000_000_000, "1gbit": 1_000_000_000, "100mbit": 100_000_000}  # bits per second


def words(device: str, rate: int) -> tuple[str, ...]:
    """The words that shape what leaves a device; see tc-tbf(8): the bucket holds 5 ms, the queue 20 ms."""
    if not rate:
        return ("tc", "qdisc", "del", "dev", device, "root")
    return ("tc", "qdisc", "replace", "dev", device, "root", "tbf", "rate", f"{rate}bit", "burst", str(max(rate // 8 // 200, 65536)),
            "latency", "20ms")


def shape(lab: Lab, rate: int) -> None:
    """Makes every host's cable this fast; 0 takes the limit away. The limit goes with the host's interface when the lab goes down."""
    for host in lab:
        link = lab.spec.link(host.name)
        if rate or " tbf " in command("tc", "qdisc", "show", "dev", link):
            host.run(*words("eth0", rate))
            command(*words(link, rate))
