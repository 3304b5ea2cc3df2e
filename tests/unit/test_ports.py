"""The ports and attributes of the source: what is asked for in the destination, what is refused, and what stays behind."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from keystoneauth1 import exceptions

import migrena
from migrena import (
    MADE,
    DestinationFacts,
    FloatingIp,
    Kept,
    KeyPair,
    Networks,
    NetworkStore,
    Port,
    RunRecord,
    Seen,
    Service,
    Settings,
    Situation,
    SourceFacts,
    Stage,
    Step,
    ask_for,
    carry_attributes,
    delete_things,
    hostname_for,
    plan_port,
    refuse_networks,
    share_wire,
)
from unit.makers import a_server, some_settings

MAC = "fa:16:3e:aa:bb:cc"
APP = {"id": "n1", "name": "app", "provider:network_type": "vxlan", "port_security_enabled": True}
OUTSIDE = {"id": "ext", "name": "public", "router:external": True}


def an_ip(address: str = "203.0.113.7", **network: Any) -> FloatingIp:
    """A floating IP of the source."""
    return FloatingIp(address, {"id": "there", "name": "public", "provider:network_type": "vxlan", **network}, "10.0.0.5", "of the web")


def a_port(*addresses: tuple[str, str], groups: tuple[str, ...] = ("default",), floating: tuple[FloatingIp, ...] = (), **facts: Any) -> Port:
    """A port on the network app."""
    return Port({**APP, "id": "there"}, addresses or (("10.0.0.5", "10.0.0.0/24"),), groups, floating,
                {"id": "p1", "name": "", "mac_address": MAC.upper(), "port_security_enabled": True, **facts})


def a_kind(vnic: str) -> Port:
    """A port of another kind."""
    port = a_port()
    return replace(port, facts={**port.facts, "binding:vnic_type": vnic})


def there(**different: Any) -> Networks:
    """A destination that has all that such a port needs."""
    found = Networks([APP, OUTSIDE], {
        "n1": [{"id": "s4", "name": "four", "cidr": "10.0.0.0/24", "gateway_ip": "10.0.0.1"},
               {"id": "s6", "name": "", "cidr": "fd00::/64", "gateway_ip": None, "ipv6_address_mode": "slaac"}],
        "ext": [{"id": "se", "cidr": "203.0.113.0/24"}]}, [{"id": "g1", "name": "default"}, {"id": "g2", "name": "web"}])
    return replace(found, **different)


def asked(port: Port, found: Networks | None = None, **settings: Any) -> dict[str, Any]:
    """What Neutron is asked for."""
    return dict(plan_port(some_settings(**settings), port, found or there(), "run-1").request)


def test_a_port_is_asked_for_with_the_source_s_mac_addresses_and_groups() -> None:
    port = a_port(("10.0.0.5", "10.0.0.0/24"), ("fd00::f816:3eff:feaa:bbcc", "fd00::/64"), groups=("web", "default"), name="a port", tags=["blue"],
                  description="of db", dns_name="db", allowed_address_pairs=[{"ip_address": "10.0.0.9", "mac_address": MAC}],
                  extra_dhcp_opts=[{"opt_name": "mtu", "opt_value": "1400", "ip_version": 4}])
    plan = plan_port(some_settings(), port, there(), "run-1")
    assert plan.request == {
        "network_id": "n1", "name": "a port", "description": f"{MADE}=run-1 p1", "admin_state_up": True, "security_groups": ["g2", "g1"],
        "mac_address": MAC.upper(), "fixed_ips": [{"subnet_id": "s4", "ip_address": "10.0.0.5"}, {"subnet_id": "s6"}], "port_security_enabled": True,
        "allowed_address_pairs": [{"ip_address": "10.0.0.9", "mac_address": MAC}],
        "extra_dhcp_opts": [{"opt_name": "mtu", "opt_value": "1400", "ip_version": 4}]}
    assert plan.later == {"description": "of db", "dns_name": "db"} and plan.tags == ("blue",) and plan.floating == []


def test_new_addresses_and_new_macs_are_neutron_s() -> None:
    port = a_port(allowed_address_pairs=[{"ip_address": "10.0.0.9", "mac_address": MAC}, {"ip_address": "10.0.0.8", "mac_address": "other"}])
    request = asked(port, new_addresses=True, new_macs=True)
    assert not {"fixed_ips", "mac_address"} & request.keys()
    assert request["allowed_address_pairs"] == [{"ip_address": "10.0.0.9"}, {"ip_address": "10.0.0.8", "mac_address": "other"}]


def test_a_port_without_address_groups_or_security_has_none_there() -> None:
    bare = replace(a_port(groups=(), port_security_enabled=False), addresses=())
    for is_new in (False, True):
        request = asked(bare, new_addresses=is_new)
        assert (request["fixed_ips"], request["security_groups"], request["port_security_enabled"]) == ([], [], False)
    assert "port_security_enabled" not in asked(a_port(), there(networks=[{"id": "n1", "name": "app"}]))


def test_extra_arguments_replace_the_groups() -> None:
    assert asked(a_port(groups=("gone",)), extra_args={"security_groups": ["web"]})["security_groups"] == ["g2"]


@pytest.mark.parametrize(("wish", "request_for_it"), [
    ("none", []), ("new", [{"floating_network_id": "ext", "description": f"{MADE}=run-1 p1 203.0.113.7"}]),
    ("keep", [{"floating_network_id": "ext", "description": f"{MADE}=run-1 p1 203.0.113.7", "floating_ip_address": "203.0.113.7"}])])
def test_floating_ips_are_made_as_asked(wish: str, request_for_it: list[dict[str, str]]) -> None:
    port = a_port(floating=(an_ip(),))
    plan = plan_port(some_settings(floating_ip=wish), port, there(), "run-1")
    assert [one["request"] for one in plan.floating] == request_for_it
    assert {one["later"] for one in plan.floating} <= {"of the web"}
    two = a_port(("10.0.0.5", "10.0.0.0/24"), ("10.0.0.6", "10.0.0.0/24"), floating=(an_ip(),))
    for one in plan_port(some_settings(floating_ip=wish), two, there(), "run-1").floating:
        assert one["request"]["fixed_ip_address"] == "10.0.0.5"


def refused(*ports: Port, found: Networks | None = None, **settings: Any) -> list[tuple[str, str]]:
    """All reasons, each with its remedy."""
    reasons = refuse_networks(some_settings(**settings), SourceFacts(ports=ports), found or there())
    return [(reason.problem, reason.way_out) for reason in reasons]


def test_nothing_speaks_against_a_port_for_which_all_is_there() -> None:
    other = a_port(("10.0.0.6", "10.0.0.0/24"), mac_address="fa:16:3e:aa:bb:cd")
    assert refused(a_port(), other) == []


IDLE = {"id": "p7", "device_id": ""}
BUSY = {"id": "p8", "device_id": "agent", "device_owner": "network:dhcp"}
USED = {("n1", MAC): IDLE, ("n1", "10.0.0.5"): BUSY}
NET2 = {"id": "n2", "name": "app"}


@pytest.mark.parametrize(("port", "found", "settings", "problem", "remedy"), [
    (a_port(), {"networks": [OUTSIDE]}, {}, "there is no network 'app'", "--network app=NAME; there are: none"),
    (a_port(), {"networks": [APP, NET2]}, {}, "2 networks are named 'app': n1, n2", "--network app=ID"),
    (a_port(), {}, {"network": {"app": "lan"}}, "there is no network 'lan'", "--network app=NAME; there are: app"),
    (a_port(("10.9.9.5", "10.9.9.0/24")), {}, {}, "no subnet 10.9.9.0/24, for 10.9.9.5", "--new-addresses"),
    (a_port(("10.0.0.1", "10.0.0.0/24")), {}, {}, "10.0.0.1 is the gateway of subnet four", "--new-addresses"),
    (a_port(), {"taken": {("n1", MAC): IDLE}}, {}, f"MAC {MAC} is used on network app by port p7, which is idle", "--new-macs"),
    (a_port(), {"taken": {("n1", "10.0.0.5"): BUSY}}, {}, "used on network app by port p8 of network:dhcp agent", "--new-addresses"),
    (a_port(groups=("db",)), {}, {}, "no security groups of the project are named 'db'", "openstack security group create db"),
    (a_port(groups=("web",)), {"groups": [{"id": "a", "name": "web"}, {"id": "b", "name": "web"}]}, {}, "2 security groups", "delete or rename"),
    (a_kind("direct"), {}, {}, "of the kind direct", "'nics': 'none'"),
    (a_port(trunk_details={"trunk_id": "t"}), {}, {}, "the parent of a trunk", "'nics': 'none'"),
    (a_port(), {"room": 0}, {}, "0 more ports are allowed, 1 are needed", "have the quota raised"),
    (a_port(floating=(an_ip(name="wan"),)), {}, {"floating_ip": "new"}, "no external networks are named 'wan'", "--floating-ip none"),
    (a_port(floating=(an_ip("198.51.100.7"),)), {}, {"floating_ip": "keep"}, "no subnet with floating IP", "--floating-ip new"),
    (a_port(floating=(an_ip(),)), {"floating": {"203.0.113.7"}}, {"floating_ip": "keep"}, "exists already", "--floating-ip new")])
def test_what_cannot_be_carried_is_refused_with_a_remedy(
        port: Port, found: dict[str, Any], settings: dict[str, Any], problem: str, remedy: str) -> None:
    ((told, way),) = refused(port, found=there(**found), **settings)
    assert problem in told and remedy in way


def test_all_reasons_come_at_once_and_each_once() -> None:
    ports = a_port(groups=("db",)), a_port(("10.9.9.5", "10.9.9.0/24"), groups=("db",)), a_kind("direct")
    assert len(refused(*ports, found=there(taken=USED, room=1))) == 8


def test_a_network_of_another_name_or_id_may_be_named() -> None:
    for key in ("app", "there"):
        assert refused(a_port(), found=there(networks=[{**APP, "name": "lan"}]), network={key: "lan"}) == []


FLAT = {"provider:network_type": "flat", "provider:segmentation_id": None}
VLAN = {"provider:network_type": "vlan", "provider:segmentation_id": 5}


@pytest.mark.parametrize(("one", "other", "do_share"), [
    (FLAT, FLAT, True), (VLAN, VLAN, True), (VLAN, {**VLAN, "provider:segmentation_id": 6}, False), (FLAT, VLAN, False), (APP, APP, False)])
def test_provider_networks_with_the_same_tag_may_be_one_wire(one: Mapping[str, Any], other: Mapping[str, Any], do_share: bool) -> None:
    assert share_wire(one, other) is do_share
    port = replace(a_port(), network={**APP, **one})
    found = there(networks=[{**APP, **other}])
    assert bool(refused(port, found=found, start_after="all")) is do_share
    assert refused(port, found=found, start_after="dst") == refused(port, found=found, start_after="all", new_addresses=True, new_macs=True) == []


# ---- attributes ----


def carried(server: dict[str, Any], extra: dict[str, Any] | None = None, destination: dict[str, Any] | None = None, **source: Any) -> Any:
    """How an instance's attributes are carried to a cloud with every microversion up to 2.90."""
    cloud: Any = SimpleNamespace(takes=lambda name: name != "tags")
    settings = some_settings(extra_args=extra or {})
    one = a_server(**{"facts": {"user_data": None}, **server})
    return carry_attributes(settings, SourceFacts(server=one, **source), DestinationFacts(cloud, **(destination or {})), one)


def test_attributes_are_carried_as_far_as_they_can_be() -> None:
    facts = {"description": "of db", "tags": ["blue", "old"], "hostname": "db", "user_data": base64.b64encode(b"\x1f\x8b#!").decode(),
             "availability_zone": "west"}
    found = carried({"facts": facts, "metadata": {"tier": "1", "migrena:was": "ACTIVE"}})
    assert found.extra == {"description": "of db", "meta": {"tier": "1"}, "hostname": "db", "userdata": b"\x1f\x8b#!"}
    assert {row.name: row.fate for row in found.rows} == {
        "description": "kept", "meta": "kept", "tags": "left behind", "hostname": "kept", "userdata": "kept", "availability_zone": "left behind"}
    assert "#!" not in str(found.rows) and "tier" in str(found.rows)
    assert carried({"facts": facts}, destination={"zones": ["west", "east"]}).extra["availability_zone"] == "west"
    assert "availability_zone" not in carried({"facts": facts}, destination={"zones": ["west"]}).extra  # there is no other


def test_extra_arguments_replace_attributes_key_by_key() -> None:
    found = carried({"facts": {"description": "of db", "user_data": None}, "key": "mine"}, {"description": "mine", "key_name": "other"})
    assert found.extra == {} and [(row.name, row.fate) for row in found.rows] == [("description", "new"), ("key_name", "new")]


@pytest.mark.parametrize(("name", "hostname"), [
    ("web", "web"), ("Web 1_a", "web-1-a"), ("web.example.org", "web-example-org"), ("\u2603 snow", "snow"), ("a" * 70, "a" * 63), ("-x-", "x")])
def test_a_hostname_that_nova_makes_of_the_name_need_not_be_carried(name: str, hostname: str) -> None:
    assert hostname_for(name) == hostname


def test_user_data_that_nova_hides_is_told() -> None:
    assert [(row.name, row.fate) for row in carried({"facts": {"description": None}}).rows] == [("userdata", "left behind")]


MINE = KeyPair("mine", "aa:bb", "ssh-ed25519 AAAA", "ssh")


def test_a_key_pair_is_made_where_there_is_none_of_its_name() -> None:
    found = carried({"key": "mine"}, key=MINE)
    assert found.extra == {"key_name": "mine"} and [(one.kind, one.facts["public_key"]) for one in found.wanted] == [("key pair", MINE.public_key)]
    assert carried({"key": "mine"}, destination={"key": MINE}, key=MINE).wanted == []


def test_a_server_group_is_made_where_there_is_none_of_its_name_and_policy() -> None:
    group = {"name": "db", "policy": "anti-affinity", "rules": {"max_server_per_host": 2}, "members": ["x"]}
    assert [(one.kind, one.facts) for one in carried({}, server_group=group).wanted] == [
        ("server group", {"name": "db", "policy": "anti-affinity", "rules": {"max_server_per_host": 2}})]
    some = {"other": {**group, "policy": "affinity"}, "third": {**group, "rules": {}}, "same": {**group, "members": []}}
    found = carried({}, {"scheduler_hints": {"a": "b"}}, {"server_groups": some}, server_group=group)
    assert found.wanted == [] and found.extra == {"scheduler_hints": {"a": "b", "group": "same"}}
    assert [row.fate for row in carried({}, {"scheduler_hints": {"group": "mine"}}, server_group=group).rows] == ["new"]


# ---- undo ----


class Neutron:
    """A stand-in for Neutron's ports, whose answers can be lost: what a real one cannot be made to do at will."""

    def __init__(self) -> None:
        self.ports: dict[str, dict[str, Any]] = {}
        self.lost: list[Exception] = []

    def get(self, path: str) -> SimpleNamespace:
        """It ignores all that is asked for but an id, as a Neutron may that does not know a filter."""
        kind, _, query = path[1:].partition("?")
        id = query.removeprefix("id=") if query.startswith("id=") else ""
        ports = list(self.ports.values()) if kind == "ports" else []
        return SimpleNamespace(json=lambda: {kind: [port for port in ports if id in ("", port["id"])]})

    def post(self, path: str, json: dict[str, Any]) -> SimpleNamespace:
        id = f"new{len(self.ports)}"
        self.ports[id] = {"id": id, "device_id": "", **json["port"]}
        if self.lost:
            raise self.lost.pop()
        return SimpleNamespace(json=lambda: {"port": {"id": id}})

    def delete(self, path: str) -> None:
        del self.ports[path.rpartition("/")[2]]


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cloud with it, in which no time passes."""
    clock = iter(range(10**6))
    monkeypatch.setattr(migrena, "time", SimpleNamespace(sleep=lambda seconds: None, monotonic=lambda: float(next(clock))))
    made: Any = Service()
    made.label, made.has_volumes, made.servers, made.neutron = "destination", False, {}, Neutron()
    made.identity, made.user = {"project": "p"}, "u"
    made.find_server = made.servers.get
    made.networks = NetworkStore(made, made.neutron)
    return made


def record(*acts: Step) -> RunRecord:
    """A run with these acts."""
    return RunRecord("run-1", "failed", "", {}, acts)


def quiet() -> Any:
    """A journal that takes all that is written."""
    return SimpleNamespace(act=lambda *_, **__: nullcontext({}))


REQUEST = {"description": f"{MADE}=run-1 p1", "mac_address": MAC, "project_id": "p"}
NOW = Situation("run-1", Stage.MADE, Seen("source"), Seen())


def test_a_lost_answer_leads_neither_to_two_ports_nor_to_a_forgotten_one(cloud: Any) -> None:
    cloud.neutron.ports["new9"] = {**REQUEST, "id": "new9", "device_id": "", "description": f"{MADE}=run-1 p0"}
    cloud.neutron.lost = [exceptions.GatewayTimeout("the proxy gave up")]
    known = record(Step("create port", "", "", "done", {"of": "p0", "id": "new9"}))
    run: Any = SimpleNamespace(destination=cloud, plan=SimpleNamespace(run="run-1"), record=known, journal=quiet())
    assert ask_for(run, "port", "p1", REQUEST) == "new1" and list(cloud.neutron.ports) == ["new9", "new1"]


def test_a_request_that_a_killed_process_made_is_not_made_again(cloud: Any) -> None:
    cloud.neutron.ports = {"late": {**REQUEST, "id": "late", "device_id": ""}, "other": {**REQUEST, "id": "other", "description": "x"}}
    run: Any = SimpleNamespace(destination=cloud, plan=SimpleNamespace(run="run-1"), journal=quiet(),
                               record=record(Step("create port", "", "", "", {"of": "p1"})))
    assert ask_for(run, "port", "p1", REQUEST) == "late" and len(cloud.neutron.ports) == 2


def test_ports_are_deleted_by_their_ids_or_by_the_mark_where_these_are_lost_and_no_others(cloud: Any) -> None:
    def ports() -> None:
        for id, mark in (("a", "run-1"), ("b", "run-1"), ("c", "run-2"), ("d", "run-11")):
            cloud.neutron.ports[id] = {"id": id, "device_id": "", "description": f"{MADE}={mark} p1", "project_id": "p"}

    ports()
    delete_things(cloud, record(Step("create port", "", "", "done", {"of": "p1", "id": "a"})), NOW, quiet(), 60.0)
    assert set(cloud.neutron.ports) == {"b", "c", "d"}
    ports()
    delete_things(cloud, record(Step("create port", "", "", "failed", {"of": "p1"})), NOW, quiet(), 60.0)
    assert set(cloud.neutron.ports) == {"c", "d"}
    ports()
    delete_things(cloud, RunRecord("", "", "", {}), NOW, quiet(), 0.0)
    assert set(cloud.neutron.ports) == {"c", "d"}


def test_a_port_that_somebody_else_s_instance_uses_is_kept_and_told(cloud: Any) -> None:
    cloud.servers["theirs"] = object()
    cloud.neutron.ports = {id: {"id": id, "device_id": user, "description": ""} for id, user in (("a", "theirs"), ("b", "gone"))}
    steps = [Step("create port", "", "", "done", {"of": id, "id": id}) for id in "ab"]
    with pytest.raises(Kept, match="port a is used by theirs, and is kept"):
        delete_things(cloud, record(*steps), NOW, quiet(), 60.0)
    assert set(cloud.neutron.ports) == {"a"}


# ---- credentials ----


@pytest.mark.parametrize(("project", "becomes"), [
    ("demo", {"project_name": "demo"}), ("0123456789abcdef0123456789abcdef", {"project_id": "0123456789abcdef0123456789abcdef"})])
def test_credentials_of_a_user_are_for_another_project(project: str, becomes: dict[str, str]) -> None:
    creds = {"auth_url": "http://x", "username": "u", "password": "p", "project_name": "admin", "user_domain_name": "Default"}
    found = migrena.credentials("dst", Settings(dst_creds=creds, src_creds=creds, dst_project=project), {})
    assert {key: value for key, value in found.items() if key.startswith("project_") and "domain" not in key} == becomes
    assert migrena.credentials("src", Settings(dst_creds=creds, src_creds=creds, dst_project=project), {})["project_name"] == "admin"


def test_credentials_that_are_bound_to_a_project_are_refused() -> None:
    bound = {"auth_url": "http://x", "auth_type": "v3applicationcredential", "application_credential_id": "i", "application_credential_secret": "s"}
    with pytest.raises(migrena.UsageError, match="bound to one project"):
        migrena.credentials("dst", Settings(dst_creds=bound, dst_project="demo"), {})
