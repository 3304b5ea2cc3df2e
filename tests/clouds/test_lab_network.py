"""The lab's networks: guests with several ports, security groups and DHCP, floating IPs, and what users may do in project demo."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from clouds.conftest import wait_for_console
from lab.api import Api
from lab.clouds import Clouds
from lab.networks import GROUPS, POOLS, create_floating_ip, create_port, ensure_group, ensure_key
from lab.processes import command

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
LOW_MAC = {"src": "fa:16:3e:05:0a:01", "dst": "fa:16:3e:05:0a:02"}  # octets below 0x10, which Debian's own ebtables does not take back



@dataclass(frozen=True)
class Users:
    """Two users of project demo on one cloud."""

    demo: Api
    admin: Api  # may choose addresses on a network of others, and turn port security off

    def ports(self) -> list[dict[str, Any]]:
        """Ports on app and dual, with port security and two security groups each."""
        groups, low = [ensure_group(self.demo, name) for name in GROUPS], LOW_MAC[self.demo.cloud.name]
        return [create_port(self.admin, "app", name="first", security_groups=groups, dns_name="first", mac_address=low),
                create_port(self.admin, "dual", name="second", security_groups=groups, allowed_address_pairs=[{"ip_address": "10.90.12.200"}],
                            extra_dhcp_opts=[{"opt_name": "bootfile-name", "opt_value": "none"}])]

    def boot(self, ports: list[dict[str, Any]]) -> str:
        """The id of demo's guest on these ports, once it has printed what DHCP gave to each of them."""
        id = self.demo.create("guest", networks=[{"port": port["id"]} for port in ports])
        for port in ports:
            wait_for_console(self.demo, id, f"mac={port['mac_address']} ip={v4(port)}")
        return id


def v4(port: dict[str, Any]) -> str:
    """The IPv4 address of a port."""
    return next(str(fixed["ip_address"]) for fixed in port["fixed_ips"] if "." in fixed["ip_address"])


@pytest.fixture(scope="module")
def networks(clouds: Clouds) -> Clouds:
    """The clouds with their networks, which stay."""
    clouds.networks()
    return clouds


@pytest.fixture
def users(networks: Clouds) -> Iterator[dict[str, Users]]:
    """Those of both clouds; their instances, floating IPs and ports are deleted in the end."""
    found = {cloud: Users(networks.api(cloud, "demo"), networks.api(cloud, "admin", "demo")) for cloud in POOLS}
    yield found
    for api in (both.demo for both in found.values()):
        for server in api.call("GET", "nova", "/servers")["servers"]:
            api.delete(server["id"])
        for kind in ("floatingips", "ports"):
            for entry in api.call("GET", "neutron", f"/{kind}?project_id={api.project_id}")[kind]:
                api.call("DELETE", "neutron", f"/{kind}/{entry['id']}")


@pytest.mark.parametrize("cloud", POOLS)
def test_a_guest_prints_the_macs_of_its_ports_in_their_order_and_gets_their_addresses_by_dhcp(users: dict[str, Users], cloud: str) -> None:
    api, ports = users[cloud].demo, users[cloud].ports()
    shown = api.console(users[cloud].boot(ports))
    assert re.findall(r"GUEST net (eth\d) mac=(\S+)\s*$", shown, re.M) == [(f"eth{n}", port["mac_address"]) for n, port in enumerate(ports)]
    assert sorted(re.findall(r"GUEST net (eth\d) mac=\S+ ip=(\S+)", shown)) == [(f"eth{n}", v4(port)) for n, port in enumerate(ports)]
    assert ipaddress.ip_network("fd00:90:12::/64") in [ipaddress.ip_network(f"{fixed['ip_address']}/64", strict=False)
                                                       for fixed in ports[1]["fixed_ips"] if ":" in fixed["ip_address"]]
    for port in ports:
        now = api.call("GET", "neutron", f"/ports/{port['id']}")["port"]
        assert (now["status"], now["port_security_enabled"], len(now["security_groups"])) == ("ACTIVE", True, 2)


def test_a_port_with_port_security_that_is_changed_does_not_hold_up_the_agent(users: dict[str, Users]) -> None:
    ports = users["src"].ports()
    users["src"].boot(ports)
    for port in ports:  # so that the agent writes its rules anew
        pairs = [{"ip_address": "10.90.12.201"}]
        users["src"].admin.call("PUT", "neutron", f"/ports/{port['id']}", {"port": {"allowed_address_pairs": pairs}})
    users["src"].boot([create_port(users["src"].demo, "app", name="third")])


def test_a_floating_ip_leads_to_the_port_of_an_instance(users: dict[str, Users]) -> None:
    demo, port = users["src"].demo, create_port(users["src"].demo, "app")
    id = users["src"].boot([port])
    address = create_floating_ip(demo, port["id"])
    assert ipaddress.ip_address(address["floating_ip_address"]) in ipaddress.ip_network("10.90.19.0/24")
    assert (address["port_id"], address["fixed_ip_address"]) == (port["id"], v4(port))
    assert [entry["device_id"] for entry in demo.call("GET", "neutron", f"/ports?id={address['port_id']}")["ports"]] == [id]


@pytest.mark.parametrize("cloud", POOLS)
def test_admin_works_in_project_demo_and_demo_has_a_key_pair(networks: Clouds, users: dict[str, Users], cloud: str) -> None:
    demo, admin = users[cloud].demo, users[cloud].admin
    ensure_key(demo, "lab", networks.spec.key.with_suffix(".pub"))
    assert admin.project_id == demo.project_id
    assert [ensure_group(admin, name) for name in GROUPS] == [ensure_group(demo, name) for name in GROUPS]
    id = demo.create("guest", network="none", key_name="lab")
    assert [admin.server(id)[key] for key in ("key_name", "tenant_id")] == ["lab", demo.project_id]


@pytest.mark.parametrize("shared", [True, False])
def test_the_clouds_are_on_wires_of_their_own_or_on_the_same(networks: Clouds, users: dict[str, Users], shared: bool) -> None:
    networks.networks(shared=shared)
    here = create_port(users["src"].demo, "app")
    there = create_port(users["dst"].demo, "app")
    users["src"].boot([here])
    users["dst"].boot([there])
    known = command("bridge", "fdb", "show", "br", f"{networks.spec.tag}{'' if shared else 'src'}-app")
    assert [port["mac_address"] in known for port in (here, there)] == [True, shared]
