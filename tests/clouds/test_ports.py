"""The same machine at the other end: ports, addresses, security groups, key pair, server group, attributes and project arrive, or nothing is left."""

from __future__ import annotations

import base64
import json
import re
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from clouds.conftest import Operator, as_before, left_on, wait_for_console
from lab.api import Api
from lab.clouds import Clouds, credentials
from lab.networks import GROUPS, create_floating_ip, create_port, ensure_group, ensure_key, reached
from lab.packages import install
from lab.processes import CLEAN_ENV, command, wait_until

pytestmark = pytest.mark.timeout(900)
KILL = signal.SIGKILL.value
ATTRIBUTES = ("name", "description", "tags", "metadata", "key_name", "OS-EXT-SRV-ATTR:hostname", "OS-EXT-SRV-ATTR:user_data", "config_drive")
PORT = ("name", "mac_address", "description", "admin_state_up", "port_security_enabled", "allowed_address_pairs", "tags", "dns_name")
OWN = {"tier": "1", "owner": "ops"}  # the instance's own metadata
MADE = {"key pair": ("nova", "/os-keypairs", "keypairs"), "server group": ("nova", "/os-server-groups?all_projects=1", "server_groups"),
        "port": ("neutron", "/ports?device_owner=compute:nova", "ports"), "idle port": ("neutron", "/ports?device_owner=", "ports"),
        "floating IP": ("neutron", "/floatingips", "floatingips"), "server": ("nova", "/servers?all_tenants=1", "servers")}


@pytest.fixture(scope="module")
def networks(clouds: Clouds) -> Clouds:
    """The clouds with their further networks, and in the destination the groups that the source has."""
    clouds.networks()
    for cloud in ("src", "dst"):
        for name in GROUPS:
            ensure_group(clouds.api(cloud, "demo"), name)
    return clouds


def port_facts(clouds: Clouds, cloud: str, id: str) -> list[dict[str, Any]]:
    """An instance's ports in the order of its domain's interfaces, with names in place of the ids of their cloud."""
    api = clouds.api(cloud)
    domain = clouds.host(api.server(id)["OS-EXT-SRV-ATTR:host"]).run("virsh", "dumpxml", "--inactive", id).stdout
    macs = [mac.lower() for mac in re.findall(r"<mac address='(\S+)'/>", domain)]
    listed = api.call("GET", "neutron", f"/ports?device_id={id}")["ports"]
    assert sorted(macs) == sorted(port["mac_address"].lower() for port in listed)
    found = []
    for port in sorted(listed, key=lambda port: macs.index(port["mac_address"].lower())):
        groups = [api.call("GET", "neutron", f"/security-groups/{group}")["security_group"]["name"] for group in port["security_groups"]]
        found.append({**{key: port[key] for key in PORT}, "addresses": sorted(ip["ip_address"] for ip in port["fixed_ips"]),
                      "groups": sorted(groups), "network": api.call("GET", "neutron", f"/networks/{port['network_id']}")["network"]["name"],
                      "options": [{key: one[key] for key in ("opt_name", "opt_value")} for one in port["extra_dhcp_opts"]]})
    return found


def counted(api: Api) -> dict[str, int]:
    """How many of each kind a cloud has."""
    return {kind: len(api.call("GET", service, path)[key]) for kind, (service, path, key) in MADE.items()}


@pytest.fixture(scope="module")
def made(networks: Clouds) -> Iterator[str]:
    """The id of an instance of user demo with all that one can have: it has run once, and is stopped."""
    demo, admin = networks.api("src", "demo"), networks.api("src", "admin", "demo")
    ensure_key(demo, "lab", networks.spec.key.with_suffix(".pub"))
    groups = [ensure_group(demo, name) for name in GROUPS]
    ports = [create_port(admin, "dual", name="with space", security_groups=groups, description="of the front", mac_address="fa:16:3e:AA:bb:21",
                         allowed_address_pairs=[{"ip_address": "10.90.12.240"}], extra_dhcp_opts=[{"opt_name": "bootfile-name", "opt_value": "x"}]),
             create_port(admin, "app", security_groups=[], port_security_enabled=False, mac_address="fa:16:3e:11:bb:22"),
             create_port(admin, "app", security_groups=groups[:1], mac_address="fa:16:3e:22:bb:23")]
    admin.call("PUT", "neutron", f"/ports/{ports[0]['id']}/tags", {"tags": ["blue", "red"]})
    group = {"server_group": {"name": "spread", "policy": "soft-anti-affinity"}}
    spread = demo.call("POST", "nova", "/os-server-groups", group)["server_group"]["id"]
    asked = {"name": "whole", "networks": [{"port": port["id"]} for port in ports], "flavorRef": demo.need("nova", "flavors", "tiny"),
             "imageRef": demo.need("glance", "images", "guest"), "key_name": "lab", "description": "has all", "tags": ["gold", "old"],
             "metadata": OWN, "user_data": base64.b64encode(b"#!/bin/sh\n\xff").decode(), "hostname": "front",
             "config_drive": True}
    hints = {"OS-SCH-HNT:scheduler_hints": {"group": spread}}
    id = str(demo.call("POST", "nova", "/servers", {"server": asked, **hints})["server"]["id"])
    demo.await_status(id, "ACTIVE")
    floating = create_floating_ip(demo, ports[2]["id"])["id"]
    wait_for_console(demo, id, "GUEST wrote=")
    demo.act(id, "os-stop", until="SHUTOFF")
    yield id
    demo.delete(id)
    demo.call("DELETE", "neutron", f"/floatingips/{floating}")
    for port in ports:
        admin.call("DELETE", "neutron", f"/ports/{port['id']}")
    demo.call("DELETE", "nova", f"/os-server-groups/{spread}")


@pytest.fixture
def whole(networks: Clouds, made: str) -> Iterator[str]:
    """That instance, stopped, while the destination has nothing; afterwards both are so again."""
    src, dst = networks.api("src"), networks.api("dst")

    def clear() -> None:
        as_before(src, dst, made, *OWN)
        for kind in ("floating IP", "port", "idle port", "server group", "key pair"):
            service, path, key = MADE[kind]
            for entry in dst.call("GET", service, path)[key]:
                name = entry["keypair"]["name"] if kind == "key pair" else entry["id"]
                dst.call("DELETE", service, f"{path.partition('?')[0]}/{name}")

    clear()
    yield made
    clear()


def port_of(clouds: Clouds, id: str) -> str:
    """The id of the port with the floating IP."""
    ports = clouds.api("src").call("GET", "neutron", f"/ports?device_id={id}")["ports"]
    return next(str(entry["id"]) for entry in ports if entry["mac_address"] == "fa:16:3e:22:bb:23")


def is_as_found(clouds: Clouds, id: str) -> None:
    """The destination has nothing, the source is as it was, and nothing of ours lies on a hypervisor."""
    src, dst = clouds.api("src"), clouds.api("dst")
    assert counted(dst) == dict.fromkeys(MADE, 0)
    server = src.server(id)
    assert (server["status"], server["locked"], server["metadata"]) == ("SHUTOFF", False, OWN)
    assert all(left_on(clouds.host(name)) == [] for name in clouds.options.hosts)


def shown_by_client(clouds: Clouds, cloud: str, *words: str) -> Any:
    """What OpenStack's own client shows an admin."""
    env = {f"OS_{key.upper()}": value for key, value in {**credentials(clouds.api(cloud).cloud, "admin"), "identity_api_version": "3"}.items()}
    done = subprocess.run(["openstack", *words, "-f", "json"], check=True, capture_output=True, text=True, env={**CLEAN_ENV, **env})
    return json.loads(done.stdout)


def test_an_instance_of_a_user_arrives_with_all_that_it_has(operator: Operator, networks: Clouds, whole: str) -> None:
    src, dst = networks.api("src"), networks.api("dst")
    plan = operator.run("-s", whole, "--dst-project", "same", "--floating-ip", "new", "-n")
    told = r"dual +fa:16:3e:aa:bb:21 kept +10\.90\.12\.\d+, fd00:90:12::\S+ kept +\S+, \S+"
    assert plan.returncode == 0 and re.search(told, plan.stderr), plan.stderr
    with reached(networks.spec, "dst"):
        report = operator.report("-s", whole, "--dst-project", "same", "--floating-ip", "new", "-a", "dst", "--await", "tcp:80")
    assert report["answer_seconds"] > 0
    id = report["destination"]["id"]
    one, other = src.server(whole), dst.server(id)
    metadata = {key: value for key, value in other["metadata"].items() if not key.startswith("migrena:")}
    assert {key: one[key] for key in ATTRIBUTES} == {**{key: other[key] for key in ATTRIBUTES}, "metadata": metadata}
    assert port_facts(networks, "src", whole) == port_facts(networks, "dst", id) and len(port_facts(networks, "dst", id)) == 3
    assert other["tenant_id"] == networks.api("dst", "demo").project_id and report["left_behind"] == []
    groups = [api.call("GET", "nova", f"/os-server-groups/{server['server_groups'][0]}")["server_group"]
              for api, server in ((src, one), (dst, other))]
    assert [(group["name"], group["policy"]) for group in groups] == [("spread", "soft-anti-affinity")] * 2
    (floating,) = dst.call("GET", "neutron", "/floatingips")["floatingips"]
    ports = {port["id"]: port for port in dst.call("GET", "neutron", f"/ports?device_id={id}")["ports"]}
    assert ports[floating["port_id"]]["mac_address"] == "fa:16:3e:22:bb:23" and floating["description"] == ""
    shown = wait_for_console(dst, id, "GUEST wrote=")
    assert re.findall(r"GUEST net (eth\d) mac=(\S+)\s*$", shown, re.M) == [
        (f"eth{number}", port["mac_address"].lower()) for number, port in enumerate(port_facts(networks, "dst", id))]
    assert "GUEST boots=2 " in shown
    wait_for_console(dst, id, f"mac=fa:16:3e:22:bb:23 ip={ports[floating['port_id']]['fixed_ips'][0]['ip_address']}")
    assert "takes its place" in src.server(whole)["locked_reason"]


@pytest.mark.long
def test_openstack_s_own_client_shows_the_same_in_both_clouds(operator: Operator, networks: Clouds, whole: str) -> None:
    install(("python3-openstackclient",))
    id = operator.report("-s", whole, "--dst-project", "same", "--floating-ip", "new", "-a", "dst")["destination"]["id"]
    sides = (("src", whole), ("dst", id))
    servers = [shown_by_client(networks, cloud, "server", "show", one) for cloud, one in sides]
    told = [{**{key: server[key] for key in ("name", "key_name", "config_drive")}, "addresses": {
        name: {"floating" if one == found else one for one in addresses} for name, addresses in server["addresses"].items()}}
        for server, found in zip(servers, floating_ips(networks, sides), strict=True)]
    assert told[0] == told[1]
    ports = [sorted((port["MAC Address"], sorted(ip["ip_address"] for ip in port["Fixed IP Addresses"]))
                    for port in shown_by_client(networks, cloud, "port", "list", "--server", one)) for cloud, one in sides]
    assert ports[0] == ports[1] and len(ports[0]) == 3


def floating_ips(clouds: Clouds, sides: tuple[tuple[str, str], ...]) -> list[str]:
    """The one floating IP of each side, as the client lists it."""
    found = [shown_by_client(clouds, cloud, "floating", "ip", "list") for cloud, _ in sides]
    assert [len(rows) for rows in found] == [1, 1] and found[0][0]["Fixed IP Address"] == found[1][0]["Fixed IP Address"]
    return [str(rows[0]["Floating IP Address"]) for rows in found]


def test_all_that_is_missing_or_taken_in_the_destination_is_refused_at_once(operator: Operator, networks: Clouds, whole: str) -> None:
    admin = networks.api("dst", "admin", "demo")
    address = next(ip for ip in port_facts(networks, "src", whole)[1]["addresses"])
    taken = [create_port(admin, "app", mac_address="fa:16:3e:11:bb:22"),
             create_port(admin, "app", fixed_ips=[{"ip_address": address}])]
    done = operator.run("-s", whole, "--dst-project", "demo", "--network", "dual=nowhere", "-a", "all", "-e", "{'security_groups': ['lost']}")
    for told in ("there is no network 'nowhere'", "--network dual=NAME", f"MAC fa:16:3e:11:bb:22 is used on network app by port {taken[0]['id']}",
                 f"{address} is used on network app by port {taken[1]['id']}", "--new-addresses",
                 "no security groups of the project are named 'lost'", "openstack security group create --project demo lost",
                 "would run on one wire (flat)"):
        assert told in done.stderr, done.stderr
    assert done.returncode == 3 and counted(networks.api("dst"))["server"] == 0
    wrong = operator.run("-s", whole, "--dst-project", "nobody-s")
    assert wrong.returncode == 3 and "openstack role add --project nobody-s --user admin admin" in wrong.stderr


@pytest.mark.parametrize("line", [pytest.param(line, marks=() if line == "done of attach port" else pytest.mark.long) for line in (
    "done of create key pair on lab", "done of create server group on spread", "done of create destination", "done of create port on PORT",
    "intent of attach port", "done of attach port", "done of create floating IP on PORT 0", "intent of copy", "intent of swap in")])
def test_a_run_that_was_killed_is_rolled_back_and_leaves_no_port_key_or_group(operator: Operator, networks: Clouds, whole: str, line: str) -> None:
    line = line.replace("PORT", port_of(networks, whole))
    killed = operator.run("-s", whole, "--dst-project", "same", "--floating-ip", "new", throw=[(line, KILL)])
    assert killed.returncode == -KILL, killed.stderr
    done = operator.run("rollback", operator.last_run)
    assert done.returncode == 0, done.stderr
    is_as_found(networks, whole)


@pytest.mark.long
@pytest.mark.parametrize("line", ["intent of create port on PORT", "done of attach port", "intent of attach port", "chunk", "done of swap in"])
def test_a_run_that_was_killed_is_resumed_with_its_ports(operator: Operator, networks: Clouds, whole: str, line: str) -> None:
    line, wish = line.replace("PORT", port_of(networks, whole)), ["new"] if "port" in line else ["keep", "--yes"]
    assert operator.run("-s", whole, "--dst-project", "same", "--floating-ip", *wish, throw=[(line, KILL)]).returncode == -KILL
    done = operator.run("resume", operator.last_run)
    assert done.returncode == 0, done.stderr
    assert port_facts(networks, "src", whole) == port_facts(networks, "dst", done.stdout.strip())
    left = counted(networks.api("dst"))
    assert (left["floating IP"], left["idle port"], left["port"]) == (1, 0, 3)
    one, other = (networks.api(cloud).call("GET", "neutron", "/floatingips")["floatingips"][0] for cloud in ("src", "dst"))
    assert (one["floating_ip_address"] == other["floating_ip_address"]) is (wish != ["new"])
    assert other["port_id"] and one["fixed_ip_address"] == other["fixed_ip_address"]


@pytest.mark.long
def test_a_seed_has_its_ports_and_one_that_its_source_got_since_is_refused_by_name(operator: Operator, networks: Clouds, whole: str) -> None:
    src, dst = networks.api("src"), networks.api("dst")
    src.act(whole, "os-start", until="ACTIVE")
    wait_for_console(src, whole, "GUEST wrote=")
    run = str(operator.report("-s", whole, "--dst-project", "same", "--floating-ip", "keep", "--yes", "-a", "dst", "--seed")["run"])
    assert operator.report("resume", run, "--seed")["result"] == "seeded"
    (floating,) = dst.call("GET", "neutron", "/floatingips")["floatingips"]
    assert counted(dst)["port"] == 3 and not floating["fixed_ip_address"]  # it leads nowhere until the source is down
    more = create_port(networks.api("src", "admin", "demo"), "dual")["id"]
    interfaces = f"/servers/{whole}/os-interface"
    src.call("POST", "nova", interfaces, {"interfaceAttachment": {"port_id": more}})
    done = operator.run("resume", run)
    assert done.returncode == 3 and f"port {more} was attached to the source after the seed" in done.stderr, done.stderr
    assert src.server(whole)["status"] == "ACTIVE"
    src.call("DELETE", "nova", f"{interfaces}/{more}")
    wait_until("the port to be detached", lambda: len(src.call("GET", "nova", interfaces)["interfaceAttachments"]) == 3, 120)
    networks.api("src", "admin", "demo").call("DELETE", "neutron", f"/ports/{more}")
    id = operator.report("resume", run)["destination"]["id"]
    assert port_facts(networks, "src", whole) == port_facts(networks, "dst", id)
    (floating,) = dst.call("GET", "neutron", "/floatingips")["floatingips"]
    port = dst.call("GET", "neutron", f"/ports/{floating['port_id']}")["port"]
    assert (port["device_id"], port["mac_address"]) == (id, "fa:16:3e:22:bb:23")


@pytest.mark.long
def test_a_run_that_fails_leaves_none_of_them(operator: Operator, networks: Clouds, whole: str) -> None:
    done = operator.run("-s", whole, "--dst-project", "same", "--floating-ip", "new", "--retries", "0", extra="NBD_SERVER_PORT = 22")
    assert done.returncode == 1, done.stderr
    is_as_found(networks, whole)


@pytest.mark.long
def test_a_journal_that_is_lost_leaves_neither_instance_nor_ports(operator: Operator, networks: Clouds, whole: str) -> None:
    assert operator.run("-s", whole, "--dst-project", "same", throw=[("intent of copy", KILL)]).returncode == -KILL
    (operator.folder / "state" / f"{operator.last_run}.jsonl").unlink()
    elsewhere = operator.run("rollback", "--run-of", whole)
    assert elsewhere.returncode == 3 and "in another project" in elsewhere.stderr and "--dst-project" in elsewhere.stderr
    done = operator.run("rollback", "--run-of", whole, "--dst-project", "same")
    assert done.returncode == 0, done.stderr
    left = counted(networks.api("dst"))
    assert {kind for kind, count in left.items() if count} <= {"key pair", "server group"}  # which have no place for a mark


@pytest.mark.long
def test_on_one_wire_never_do_two_machines_have_one_address(operator: Operator, networks: Clouds, whole: str) -> None:
    src, dst, mac = networks.api("src"), networks.api("dst"), "fa:16:3e:22:bb:23"
    networks.networks(shared=True)
    src.act(whole, "os-start", until="ACTIVE")
    wait_for_console(src, whole, f"mac={mac} ip=")
    seen, has_ended = list[str](), threading.Event()

    def watch() -> None:
        while not has_ended.wait(0.05):
            place = re.search(rf"{mac} dev (\S+)", command("bridge", "fdb", "show", "br", f"{networks.spec.tag}-app"))
            if place and seen[-1:] != [place[1]]:
                seen.append(place[1])

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        refused = operator.run("-s", whole, "--dst-project", "same", "-a", "all", "-n")
        assert refused.returncode == 3 and "would run on one wire" in refused.stderr
        id = operator.report("-s", whole, "--dst-project", "same", "-a", "dst")["destination"]["id"]
        wait_for_console(dst, id, f"mac={mac} ip=")
    finally:
        has_ended.set()
        watching.join()
        networks.networks()
    hosts = [api.server(one)["OS-EXT-SRV-ATTR:host"] for api, one in ((src, whole), (dst, id))]
    assert seen == [f"{networks.spec.link(host)}-app" for host in hosts]  # first the one, then the other, and never back
    source = src.server(whole)
    assert (source["status"], source["locked"]) == ("SHUTOFF", True) and "takes its place" in source["locked_reason"]


@pytest.mark.long
def test_addresses_and_macs_may_be_new_and_a_network_another(operator: Operator, networks: Clouds, whole: str) -> None:
    report = operator.report("-s", whole, "-d", "renamed", "--dst-project", "same", "--new-addresses", "--new-macs", "--network", "app=dual",
                             "-e", "{'meta': {'tier': '2'}, 'key_name': None}")
    here, there = (port_facts(networks, cloud, id) for cloud, id in (("src", whole), ("dst", report["destination"]["id"])))
    assert [port["network"] for port in there] == ["dual"] * 3
    assert not {port["mac_address"] for port in here} & {port["mac_address"] for port in there}
    server: Mapping[str, Any] = networks.api("dst").server(report["destination"]["id"])
    assert (server["name"], server["key_name"], server["metadata"]["tier"]) == ("renamed", None, "2") and "owner" not in server["metadata"]
