"""Networks for tests that move ports, addresses and security groups: `app`, `dual` and `public`, with a router and DHCP.

They are made only when somebody asks for them (`Clouds.networks`). Both clouds have the same subnets, so that an address can
go from one to the other; what they give out by themselves, also to their DHCP servers, is not the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from lab.api import Api, patiently
from lab.hosts import Host, unplug
from lab.namespaces import init_of
from lab.orders import Spec
from lab.processes import Process, command
from lab.settings import ADDRESSES, DHCP_LOG, GO_DHCP, WIRES, Cloud, dhcp_host

SUBNETS: Final[Mapping[str, Mapping[str, Mapping[str, object]]]] = {  # network: its subnets
    "app": {"app-4": {"ip_version": 4, "cidr": "10.90.11.0/24"}},
    "dual": {"dual-4": {"ip_version": 4, "cidr": "10.90.12.0/24"},
             "dual-6": {"ip_version": 6, "cidr": "fd00:90:12::/64", "gateway_ip": "fd00:90:12::1", "enable_dhcp": False}},
    "public": {"public-4": {"ip_version": 4, "cidr": "10.90.19.0/24", "enable_dhcp": False}},
}
POOLS: Final = {"src": (10, 99), "dst": (110, 199)}  # the addresses that a cloud gives out in app and dual, by their last octet
INSIDE: Final = ("app", "dual")  # where guests are: each is a wire of its own, and has DHCP
PATIENCE: Final = 240.0  # seconds for the DHCP agent to start, or to serve a new network
GROUPS: Final[Mapping[str, Sequence[Mapping[str, object]]]] = {  # security group: the rules for what comes in
    "web": [{"protocol": "tcp", "port_range_min": port, "port_range_max": port, "remote_ip_prefix": "0.0.0.0/0"} for port in (80, 443)],
    "internal": [{"ethertype": kind, "remote_group_id": "itself"} for kind in ("IPv4", "IPv6")],
}


def bring_up_networks(api: Api, hosts: Iterable[Host]) -> None:
    """Bring up one cloud's networks, with DHCP if the hypervisor that has the agent is among these."""
    servers = [host for host in hosts if host.name == dhcp_host(api.cloud)]
    for host in servers:
        _start_dhcp(api, host)
    for name, subnets in SUBNETS.items():
        visible = {"shared": True} if name in INSIDE else {"router:external": True}
        network = api.ensure("neutron", "networks", name, **visible, **{"provider:network_type": "flat", "provider:physical_network": name})
        for subnet, fields in subnets.items():
            api.ensure("neutron", "subnets", subnet, network_id=network, **fields, **_pool(api.cloud, fields))
        for host in servers if name in INSIDE else ():  # two at once, and the agent's privsep may hang ("cannot switch to a different thread")
            _await_dhcp(api, host, network)
    _make_router(api)


def _make_router(api: Api) -> None:
    """A router between the networks, if it is missing; no L3 agent runs: it and floating IPs are the API's, and carry no packet."""
    if not api.find("neutron", "routers", "router"):
        gateway = {"network_id": api.need("neutron", "networks", "public")}
        router = api.ensure("neutron", "routers", "router", external_gateway_info=gateway)
        for subnet in (subnet for name in INSIDE for subnet in SUBNETS[name]):
            api.call("PUT", "neutron", f"/routers/{router}/add_router_interface", {"subnet_id": api.need("neutron", "subnets", subnet)})


def _pool(cloud: Cloud, subnet: Mapping[str, object]) -> dict[str, object]:
    """The fields of a subnet that say which addresses this cloud gives out, where there is DHCP."""
    return {"allocation_pools": [pool(cloud, str(subnet["cidr"]))]} if subnet.get("enable_dhcp", True) else {}


def pool(cloud: Cloud, cidr: str) -> dict[str, str]:
    """The addresses that a cloud gives out in a subnet that both have."""
    start, end = (f"{cidr.rpartition('.')[0]}.{octet}" for octet in POOLS[cloud.name])
    return {"start": start, "end": end}


def ensure_group(api: Api, name: str) -> str:
    """The id of the security group `web` or `internal` in the project that `api` works in, made if there is none."""
    groups = api.call("GET", "neutron", f"/security-groups?name={name}&project_id={api.project_id}")["security_groups"]
    if groups:
        return str(groups[0]["id"])
    made = str(api.call("POST", "neutron", "/security-groups", {"security_group": {"name": name}})["security_group"]["id"])
    for fields in GROUPS[name]:
        rule = {"ethertype": "IPv4", "direction": "ingress", "security_group_id": made, **fields}
        if rule.get("remote_group_id"):
            rule["remote_group_id"] = made
        api.call("POST", "neutron", "/security-group-rules", {"security_group_rule": rule})
    return made


def ensure_key(api: Api, name: str, public: Path) -> None:
    """Upload a public key as a key pair of the user of `api`, unless that user has one of this name."""
    present = [entry["keypair"]["name"] for entry in api.call("GET", "nova", "/os-keypairs")["keypairs"]]
    if name not in present:
        api.call("POST", "nova", "/os-keypairs", {"keypair": {"name": name, "type": "ssh", "public_key": public.read_text().strip()}})


def create_port(api: Api, network: str, **fields: object) -> dict[str, Any]:
    """A new port on this network; `fields` (name, fixed_ips, security_groups, dns_name …) go into Neutron's request."""
    asked = {"network_id": api.need("neutron", "networks", network), **fields}
    return dict(api.call("POST", "neutron", "/ports", {"port": asked})["port"])


def create_floating_ip(api: Api, port: str, **fields: object) -> dict[str, Any]:
    """A new floating IP of `public` that leads to this port."""
    asked = {"floating_network_id": api.need("neutron", "networks", "public"), "port_id": port, **fields}
    return dict(api.call("POST", "neutron", "/floatingips", {"floatingip": asked})["floatingip"])


# ---- wires ----


def lay_wires(host: Host, shared: bool) -> None:
    """Connect a hypervisor of namespaces to the others of its cloud, by a bridge for each network; with `shared` to those of both clouds."""
    if not host.is_namespace:
        return
    for network in INSIDE:
        end = f"{host.spec.link(host.name)}-{network}"
        bridge = _bridge(host.spec, network, "" if shared else host.name.partition("-")[0])
        if not _is_there(end):
            _fetch_end(host.process, f"{WIRES[network]}-end", end)
        if not _is_there(bridge):
            command("ip", "-batch", "-", stdin=f"link add {bridge} type bridge\nlink set {bridge} up\n")
        command("ip", "link", "set", end, "master", bridge, "up")


@contextmanager
def reached(spec: Spec, cloud: str) -> Iterator[None]:
    """A scope in which this machine has an address of its own on a cloud's network `app`, and so reaches the guests there."""
    place = "10.90.11.250/24", "dev", _bridge(spec, "app", cloud)
    command("ip", "address", "add", *place)
    try:
        yield
    finally:
        command("ip", "address", "del", *place)


def remove_wires(spec: Spec) -> None:
    """Remove the bridges; what hung on them has gone with the hypervisors."""
    for network in INSIDE:
        for cloud in ("", *ADDRESSES):
            unplug(_bridge(spec, network, cloud))


def _fetch_end(host: Process, there: str, here: str) -> None:
    """Bring the loose end of a hypervisor's cable to this machine, under a new name."""
    command("nsenter", f"--net=/proc/{init_of(host)}/ns/net", "ip", "link", "set", there, "name", here, "netns", str(os.getpid()))


def _bridge(spec: Spec, network: str, cloud: str) -> str:
    """The name of a network's bridge, of one cloud or (without one) of both."""
    return f"{spec.tag}{cloud}-{network}"


def _is_there(interface: str) -> bool:
    return Path("/sys/class/net", interface).exists()


# ---- DHCP ----


def _start_dhcp(api: Api, host: Host) -> None:
    """Let the hypervisor's DHCP agent start; returns when Neutron knows it, and so gives it every network that is made from then on."""
    host.run("touch", GO_DHCP)
    patiently(f"the DHCP agent on {host.name} to start; its log is {DHCP_LOG} there", lambda: any(
        agent["alive"] for agent in api.call("GET", "neutron", f"/agents?host={host.name}&binary=neutron-dhcp-agent")["agents"]), PATIENCE)


def _await_dhcp(api: Api, host: Host, network: str) -> None:
    """Return when the hypervisor's DHCP agent serves a network."""
    path = f"/ports?device_owner=network:dhcp&status=ACTIVE&network_id={network}"

    def served() -> bool:
        running = [" ".join(argv) for _, argv in host.processes() if argv[0].endswith("dnsmasq")]
        return any(network in words for words in running) and bool(api.call("GET", "neutron", path)["ports"])

    patiently(f"the DHCP agent on {host.name} to serve network {network}; its log is {DHCP_LOG} there", served, PATIENCE)
