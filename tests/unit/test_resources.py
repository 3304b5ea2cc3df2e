"""Files of resources: how they are written and read, what references mean, what is compared, and what is asked for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml

import migrena
from migrena import (
    IN_FILES,
    Catalog,
    Cloud,
    Image,
    Kept,
    MigrenaError,
    Reason,
    Refused,
    Resolver,
    Resource,
    RunRecord,
    Settings,
    Step,
    Unseen,
    UsageError,
    batches,
    body_of,
    described_all,
    has_rules_in,
    key_of_wanted,
    lost_ids,
    normal,
    parse_types,
    plan_images,
    plan_import,
    reachable,
    read_files,
    take_changes_back,
    unknown_in,
    users_of,
    write_files,
)

OWN, OTHER = "project-own", "project-other"
DOMAINS = [{"id": "default", "name": "Default"}, {"id": "d2", "name": "Second"}]
PROJECTS = [{"id": OWN, "name": "shop", "domain_id": "default"}, {"id": OTHER, "name": "infra", "domain_id": "default"},
            {"id": "p3", "name": "infra", "domain_id": "d2"}]
MINE = {"domain_name": "%auth%", "project_name": "%auth%"}


def a_network(name: str, id: str = "", project: str = OWN, **facts: Any) -> dict[str, Any]:
    """A network as Neutron tells it."""
    return {"id": id or f"id-{name}", "name": name, "project_id": project, "description": "", "mtu": 1450, "shared": False, "tags": [],
            "router:external": False, "admin_state_up": True, "port_security_enabled": True, "provider:segmentation_id": 7, **facts}


class Known(Catalog):
    """A stand-in for a cloud: what each list of its APIs has."""

    def __init__(self, **lists: Sequence[dict[str, Any]]) -> None:
        def ask(act: str, service: str, method: str, path: str, body: Any = None) -> dict[str, Any]:
            self.asked.append((method, path, body))
            return {"quota": {}}

        cloud = SimpleNamespace(identity={"project": OWN}, user="user-own", label="destination", ask=ask, has_volumes=True)
        super().__init__(cast(Cloud, cloud))
        self.asked: list[tuple[str, str, Any]] = []
        self._lists = {label: [] for label in migrena.RESOURCE_TYPES}
        self._lists |= {"domain": DOMAINS, "project": [*PROJECTS], **{name.replace("_", " "): [*rows] for name, rows in lists.items()}}


def wanted(label: str, params: Mapping[str, Any], number: int = 1, **more: Any) -> Resource:
    """A resource of a file."""
    data = {"type": IN_FILES[label].type, "params": dict(params), "_info": {}, "_migration_params": {}, **more}
    return Resource(label, data, f"file, number {number}")


def planned(catalog: Catalog, *ones: Resource, settings: Settings | None = None) -> list[str]:
    """The reasons against an import of these."""
    given = settings or Settings()
    return [reason.problem for reason in plan_import(Resolver(catalog, given, ones), given, ones)]


def to(name: str, **whose: Any) -> dict[str, Any]:
    """A reference."""
    return {"name": name, **(whose or MINE)}


def test_what_is_of_a_project_goes_to_another_one_with_its_roles_and_the_project_itself_is_not_made() -> None:
    catalog = Known(role=[{"id": "r", "name": "member"}], user=[{"id": "u", "name": "clerk", "domain_id": "default"}])
    domain = {"name": "Default", "domain_name": None}
    role = {"project_ref": to("bazaar", domain_name="Default"), "user_ref": to("clerk", domain_name="Default"), "role_ref": to("member")}
    project, one = wanted("project", {"name": "bazaar", "domain_ref": domain}), wanted("role assignment", role)
    assert planned(catalog, project, one, settings=Settings(project="shop")) == []
    assert (one.refs["project_ref"], one.result, project.result) == (OWN, "to be created", "omitted, since all goes to shop")
    project, one = wanted("project", {"name": "bazaar", "domain_ref": domain}), wanted("role assignment", role)
    assert planned(catalog, project, one, settings=Settings(project="bazaar")) == [] and one.refs["project_ref"] is project


@pytest.mark.parametrize(("one", "other", "same"), [
    (None, "", True), ("", [], True), ({}, None, True), (0, None, False), (False, None, False), ("key\n", "key", True),
    (["a", "b"], ["b", "a"], True),
    ({"a": 1, "b": None}, {"a": 1}, True), ([{"a": 1}, {"b": 2}], [{"b": 2}, {"a": 1}], True), ({"a": 1}, {"a": 2}, False), (1.0, 1, True)])
def test_null_and_nothing_are_the_same_and_order_means_nothing(one: Any, other: Any, same: bool) -> None:
    assert (normal(one) == normal(other)) is same


def test_types_are_named_as_their_files_or_in_plain_words() -> None:
    assert parse_types("networks,security-group-rules") == ("network", "security group rule")
    assert parse_types(["keypairs", "openstack.compute.Flavor", "router interface"]) == ("key pair", "flavor", "router interface")
    assert parse_types(["user_project_role_assignments"]) == ("role assignment",)
    with pytest.raises(ValueError, match="did you mean networks"):
        parse_types(["netwoks"])


def test_changing_one_resource_is_one_hunk_of_a_file_and_files_are_not_replaced(tmp_path: Path) -> None:
    catalog = Known(network=[a_network(name) for name in ("c", "a", "b")])
    def write(folder: Path, **settings: Any) -> str:
        write_files(folder, described_all(catalog, [("network", one) for one in catalog.all("network")], []), **settings)
        return (folder / "networks.yml").read_text()

    before = write(tmp_path / "one", may_replace=False)
    assert [one["params"]["name"] for one in yaml.safe_load(before)["resources"]] == ["a", "b", "c"]
    catalog.all("network")[2]["mtu"] = 9000
    catalog.all("network").reverse()
    after = write(tmp_path / "two", may_replace=False)
    assert sum(line.startswith("@@") for line in difflib.unified_diff(before.splitlines(), after.splitlines(), n=0)) == 1
    assert "id-b" not in yaml.safe_dump([one["params"] for one in yaml.safe_load(after)["resources"]])
    with pytest.raises(Refused, match=r"has networks\.yml already"):
        write(tmp_path / "one", may_replace=False)
    assert write(tmp_path / "one", may_replace=True) == after


def test_what_refers_to_something_that_is_not_shown_is_left_out_and_told() -> None:
    group = {"id": "g", "name": "web", "project_id": OWN}
    rules: list[dict[str, Any]] = [{"id": "1", "project_id": OWN, "security_group_id": "g", "remote_group_id": "hidden"},
             {"id": "2", "project_id": OWN, "security_group_id": "g", "remote_group_id": None, "remote_address_group_id": "a"},
             {"id": "3", "project_id": OWN, "security_group_id": "g", "remote_group_id": "g", "direction": "ingress"}]
    lost: list[str] = []
    found = described_all(Known(security_group=[group]), [("security group rule", rule) for rule in rules], lost)
    assert [one["_info"]["id"] for one in found] == ["3"] and found[0]["params"]["remote_group_ref"] == to("web")
    assert len(lost) == 2 and "hidden is not shown" in lost[0] and "address group" in lost[1]
    with pytest.raises(Unseen):
        Known().ref("network", "nowhere")


def test_a_reference_to_another_project_names_it_and_its_domain() -> None:
    catalog = Known(network=[a_network("wire", project=OTHER)])
    assert catalog.ref("network", "id-wire") == {"name": "wire", "project_name": "infra", "domain_name": "Default"}
    assert catalog.described("network", catalog.all("network")[0])["_migration_params"] == {
        "project_ref": {"project_name": "infra", "domain_name": "Default"}}
    assert catalog.ref("project", "default") == {"name": "Default", "project_name": None, "domain_name": None}  # a project's parent
    assert catalog.ref("user", "user-own") == {"name": "%auth%", "project_name": None, "domain_name": "%auth%"}


@pytest.mark.parametrize(("ref", "found"), [
    (to("app"), "id-app"), (to("wire", project_name="infra", domain_name="Default"), "id-wire"), (to("public"), "id-public"),
    (to("wire", project_name="unknown", domain_name="Default"), ""), (to("public", project_name="unknown", domain_name=None), "id-public"),
    (to("wire", project_name=None, domain_name=None), "id-wire"), (to("wire", project_name="infra", domain_name="Second"), ""),
    (to("twice"), "2 networks are called 'twice'"), (to("ap"), "no networks are called 'ap'; did you mean app?"), (to("theirs"), "id-app")])
def test_a_reference_means_what_has_that_name_in_that_project_or_is_shared(ref: dict[str, Any], found: str) -> None:
    catalog = Known(network=[a_network("app"), a_network("wire", project=OTHER), {**a_network("public", project=OTHER), "router:external": True},
                             a_network("twice", "1"), a_network("twice", "2")])
    subnet = wanted("subnet", {"name": "s", "cidr": "10.0.0.0/24", "network_ref": ref})
    said = planned(catalog, subnet, settings=Settings(network={"theirs": "app"}))
    if found.startswith("id-"):
        assert said == [] and subnet.refs["network_ref"] == found
    else:
        assert len(said) == 1 and (found or "no networks are called 'wire'") in said[0], said


def test_what_is_made_in_the_same_import_is_found_and_what_is_there_twice_or_has_no_name_is_refused() -> None:
    network, subnet = wanted("network", {"name": "new"}), wanted("subnet", {"cidr": "10.0.0.0/24", "network_ref": to("new")})
    assert planned(Known(), network, subnet) == [] and subnet.refs["network_ref"] is network and subnet.result == "to be created"
    said = planned(Known(), network, wanted("network", {"name": "new"}, 2), wanted("network", {"name": ""}, 3))
    assert ["is there twice: file, number 1, and file, number 2" in said[0], "has no name" in said[1]] == [True, True]
    shop = wanted("project", {"name": "market", "domain_ref": to("Default", project_name=None, domain_name=None)})
    inside = wanted("network", {"name": "new"})
    assert planned(Known(), shop, inside, settings=Settings(project="market")) == [] and inside.owner is shop


def test_what_differs_is_what_the_file_says_and_nothing_that_it_does_not() -> None:
    there = a_network("app", mtu=1450, description="old", tags=["b", "a"])
    one = wanted("network", {"name": "app", "mtu": None, "description": "new", "tags": ["a", "b"], "provider_segmentation_id": 9, "of_later": 1})
    assert planned(Known(network=[there]), one) == [] and one.id == "id-app" and one.differences == [("description", "old", "new")]
    assert planned(Known(network=[there]), one, settings=Settings(provider=True)) == []
    assert ("provider_segmentation_id", 7, 9) in one.differences
    gate = {"id": "s", "name": "s", "cidr": "10.0.0.0/24", "network_id": "id-app", "gateway_ip": "10.0.0.1", "project_id": OWN}
    subnet = wanted("subnet", {"name": "s", "cidr": "10.0.0.0/24", "network_ref": to("app"), "gateway_ip": None})
    assert planned(Known(network=[there], subnet=[gate]), subnet) == [] and subnet.differences == [("gateway_ip", "10.0.0.1", None)]


def test_a_request_has_what_the_file_says_and_no_more_than_is_asked_for() -> None:
    params = {"name": "app", "mtu": None, "is_shared": False, "is_admin_state_up": False, "tags": ["a"], "segments": None}
    one = wanted("network", {**params, "provider_network_type": "vlan"})
    planned(Known(), one)
    assert body_of(one, Settings(), OWN) == {"name": "app", "admin_state_up": False}
    assert body_of(one, Settings(provider=True), OTHER) == {
        "name": "app", "admin_state_up": False, "provider:network_type": "vlan", "project_id": OWN}
    router = wanted("router", {"name": "gate", "external_gateway_refinfo": {"network_ref": to("public"), "enable_snat": False}})
    planned(Known(network=[a_network("public")]), router)
    assert body_of(router, Settings(), OWN) == {"name": "gate", "external_gateway_info": {"network_id": "id-public", "enable_snat": False}}
    user = wanted("user", {"name": "clerk", "is_enabled": True, "domain_ref": to("Default", project_name=None, domain_name=None)})
    planned(Known(), user)
    assert body_of(user, Settings(), OWN) == {"name": "clerk", "enabled": False, "domain_id": "default"}
    user.password = "word"
    assert body_of(user, Settings(), OWN) == {"name": "clerk", "enabled": True, "domain_id": "default", "password": "word"}


def test_rules_go_in_requests_of_one_group_and_networks_in_requests_of_a_hundred() -> None:
    rules = [replace_refs(wanted("security group rule", {"port_range_min": number}, number), {"security_group_ref": f"g{number % 2}"})
             for number in range(250)]
    parts = [*batches("security group rule", rules)]
    assert [len(part) for part in parts] == [100, 25, 100, 25] and all(len({one.refs["security_group_ref"] for one in part}) == 1 for part in parts)
    assert [len(part) for part in batches("network", [wanted("network", {"name": str(number)}) for number in range(201)])] == [100, 100, 1]
    assert [len(part) for part in batches("router", [wanted("router", {"name": str(number)}) for number in range(3)])] == [1, 1, 1]


def replace_refs(one: Resource, refs: dict[str, Any]) -> Resource:
    one.refs = refs
    return one


def test_what_is_no_project_s_or_a_deleted_one_s_does_not_become_the_importer_s() -> None:
    lost: list[str] = []
    rows = [a_network("ha", project=""), a_network("orphan", project="gone"), a_network("app"), a_network("core", project=OTHER)]
    catalog = Known(network=rows)
    catalog.is_whole = True
    found = described_all(catalog, [("network", raw) for raw in rows], lost)
    assert [one["params"]["name"] for one in found] == ["app", "core"]
    assert "ha: it is no project's" in lost[0] and "project gone is not shown, or deleted" in lost[1]


def test_only_those_are_made_without_an_attribute_that_the_api_would_not_have_it_of() -> None:
    kind = IN_FILES["network"]
    bodies: list[dict[str, Any]] = [{"name": "a", "mtu": 1400, "availability_zone_hints": ["z1"]},
              {"name": "b", "mtu": 9000, "availability_zone_hints": ["z2"], "dns_domain": "x."}]
    assert unknown_in(kind, bodies, "Invalid input for operation: Requested MTU is too big, maximum is 1450.") == [(1, "mtu")]
    assert unknown_in(kind, bodies, "AvailabilityZone z2 could not be found.") == [(1, "availability_zone_hints")]
    assert unknown_in(kind, bodies, "Unrecognized attribute(s) 'dns_domain, mtu'") == [(0, "mtu"), (1, "mtu"), (1, "dns_domain")]
    assert unknown_in(kind, bodies, "Unrecognized attribute(s) 'name'") == unknown_in(kind, bodies, "Quota exceeded") == []


def test_whether_a_gateway_translates_addresses_is_compared_where_the_file_says_so() -> None:
    catalog = Known(network=[a_network("public")], router=[{
        "id": "r", "name": "gate", "project_id": OWN, "external_gateway_info": {"network_id": "id-public", "enable_snat": False}}])
    told = catalog.described("router", catalog.all("router")[0])["params"]["external_gateway_refinfo"]
    assert told["enable_snat"] is False

    def differences(**more: Any) -> list[Any]:
        one = wanted("router", {"name": "gate", "external_gateway_refinfo": {"network_ref": to("public"), **more}})
        assert planned(catalog, one) == []
        return one.differences

    assert differences() == differences(enable_snat=False) == []
    ((name, there, _),) = differences(enable_snat=True)
    assert name == "external_gateway_refinfo" and there == {"network_id": "id-public", "enable_snat": False}
    migrena.change_resource(catalog.cloud, "router", "r", {name: there}, {})
    migrena.change_resource(catalog.cloud, "router", "r", {name: {**there, "enable_snat": True}}, {})
    assert [body["router"]["external_gateway_info"] for _, _, body in catalog.asked[-2:]] == [there, {"network_id": "id-public"}]


def test_what_this_release_does_not_show_is_omitted_and_no_difference() -> None:
    old = a_network("app")
    del old["mtu"]
    one = wanted("network", {"name": "app", "mtu": 1450, "dns_domain": "", "qos_policy_ref": None})
    assert planned(Known(network=[old]), one) == [] and one.result == "equal" and one.omitted == ["mtu"]
    assert migrena.ids_of("") is None


@pytest.mark.parametrize(("one", "other", "same"), [
    ("10.0.0.5", "10.0.0.5/32", True), ("10.0.0.9/24", "10.0.0.0/24", True), ("fd00::1", "fd00::1/128", True), (None, "0.0.0.0/0", True),
    ("10.0.0.5", "10.0.0.6/32", False)])
def test_a_rule_for_an_address_is_one_for_its_network(one: str | None, other: str, same: bool) -> None:
    raw = {"id": "1", "security_group_id": "g", "direction": "ingress", "ethertype": "IPv4", "remote_ip_prefix": other}
    group = {"id": "g", "name": "web", "project_id": OWN}
    rule = wanted("security group rule", {
        "direction": "ingress", "ether_type": "IPv4", "remote_ip_prefix": one, "security_group_ref": to("web")})
    assert planned(Known(security_group=[group], security_group_rule=[raw]), rule) == [] and (rule.id == "1") is same
    planned(Known(security_group=[group], security_group_rule=[{**raw, "remote_address_group_id": "a"}]), rule := replace(rule, id=""))
    assert not rule.id  # what lets fewer addresses in is another one


def test_a_project_is_kept_for_whatever_is_left_in_it() -> None:
    step = Step("create project 1", "", "", "done", {"kind": "project", "ids": ["p"]})
    for key, facts in (("images", {}), ("snapshots", {}), ("security_groups", {"name": "web"}), ("server_groups", {"project_id": "p"}),
                       ("security_groups", {"name": "default"}), ("server_groups", {"project_id": "q"})):
        found = [{"id": "x", "owner": "p", **facts}]
        images = [SimpleNamespace(facts=one) for one in found if key == "images"]
        store = SimpleNamespace(all=lambda images=images: images)
        cloud = SimpleNamespace(has_volumes=True, user="me", store=store, listed=lambda service, path, many, key=key, found=found: (
            {"identity": 1, "network": 1, "compute": 1, "block-storage": 1}[service] and found if many == key else []))
        is_use = facts not in ({"name": "default"}, {"project_id": "q"})
        assert bool(users_of(cast(Cloud, cloud), step, "p", {"p", "x"})) is is_use, (key, facts)


def test_who_may_not_see_the_list_of_access_has_it_at_least() -> None:
    def ask(act: str, service: str, method: str, path: str, body: Any = None) -> dict[str, Any]:
        raise migrena.CloudError("Forbidden", code=403)

    catalog = Known()
    cast(Any, catalog.cloud).ask = ask
    raw = {"id": "f", "name": "small", "os-flavor-access:is_public": False, "extra_specs": {}}
    catalog._complete("flavor", raw)
    assert raw["access"] == [OWN]
    catalog.names = ["shop"]
    assert catalog._quotas() == [] and "network quota" in catalog.hidden
    one = wanted("quota", {"service": "network", "limits": {"router": 1}, "project_ref": to("%auth%")})
    (said,) = planned(catalog, one)
    assert "what is there is not shown" in said


@pytest.mark.parametrize(("text", "said"), [
    ("a: [", "cannot be read"), ("- 1", "is not a file of resources"), ("resources: {}", "is not a file of resources"), (None, "cannot be read")])
def test_what_is_no_file_of_resources_is_said_to_be_none(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "x.yml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=said):
        read_files([str(path)], [], [])
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="there are no files"):
        read_files([str(tmp_path / "none")], [], [])


def test_types_that_are_not_known_are_refused_each_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "x.yml").write_text(yaml.safe_dump({"resources": [
        {"type": "openstack.compute.Volume", "params": {}}, "text", {"type": "openstack.network.Network"},
        {"type": IN_FILES["network"].type, "params": {}}, {"type": "openstack.compute.Server", "params": {"name": "web"}},
        {"type": "openstack.compute.Server", "params": None}]}))
    problems: list[Reason] = []
    skipped: list[str] = []
    assert len(read_files([str(tmp_path)], problems, skipped)) == 1 and skipped == ["web", f"{tmp_path}/x.yml, number 6"]
    assert [problem.problem.partition(": its type")[0].rpartition(" ")[2] for problem in problems] == ["1", "2", "3"]


def test_a_router_keeps_the_routes_that_it_can_have() -> None:
    catalog = Known(subnet=[{"id": "1", "network_id": "n1", "cidr": "10.1.0.0/24"}, {"id": "2", "network_id": "n2", "cidr": "10.2.0.0/24"}])
    router = {"id": "r", "name": "gate", "external_gateway_info": {"network_id": "ext"}, "routes": [
        {"destination": "10.9.0.0/16", "nexthop": "10.1.0.9"}, {"destination": "10.8.0.0/16", "nexthop": "10.2.0.9"}]}
    lost: list[str] = []
    assert reachable(catalog, router, {"n1"}, lost)["routes"] == router["routes"][:1] and "10.8.0.0/16 by 10.2.0.9" in lost[0]  # type: ignore[index]


def test_what_an_import_changed_is_changed_back_but_not_what_somebody_changed_since() -> None:
    catalog = Known(network=[a_network("app", description="ours", mtu=9000)])
    act = Step("change network id-app", "", "", "done", {
        "what": "network", "new": {"description": "ours", "mtu": 1500}, "was": {"description": "old", "mtu": 1400}})
    problems: list[Reason] = []
    take_changes_back(catalog, replace(RunRecord("run", "done", "", {}), acts=(act,)), problems)
    assert catalog.asked == [("PUT", "/networks/id-app", {"network": {"description": "old"}})]
    assert "mtu was changed since" in problems[0].problem


@pytest.mark.parametrize(("label", "path"), [("flavor", "servers"), ("network", "subnets"), ("project", "networks")])
def test_what_somebody_else_uses_is_kept(label: str, path: str) -> None:
    deleted: list[str] = []
    store = SimpleNamespace(all=list)
    cloud = SimpleNamespace(has_volumes=False, ask=lambda act, *of: deleted.append(act), store=store, listed=lambda service, asked, key: [
        {"id": "somebody's", "name": "theirs"}] if path in asked else [])
    act = Step(f"create {label} 1", "", facts={"kind": label})
    journal = SimpleNamespace(act=lambda *of, **facts: nullcontext({}))
    with pytest.raises(Kept, match="theirs"):
        migrena.delete_resource(cast(Any, cloud), act, "one", {"one"}, cast(Any, journal))
    assert deleted == []
    if label == "project":  # what of the import is left in it by now is in use
        cloud.listed = lambda service, asked, key: []
    migrena.delete_resource(cast(Any, cloud), act, "one", {"one", "somebody's"}, cast(Any, journal))
    assert len(deleted) == 1


def lost(catalog: Catalog, kind: str, keys: list[list[Any]], others: Sequence[str] = (), **facts: Any) -> list[str]:
    """What is taken for made by a request whose answer was lost."""
    act = Step(f"create {kind} 1", "2026-11-28T12:00:00+00:00", facts={"kind": kind, "keys": keys, "requests": [{}], **facts})
    return lost_ids(catalog, act, 0.0, others)


def test_of_a_lost_answer_only_what_has_all_that_was_asked_for_is_taken_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = ({"created_at": f"2026-11-28T{hour}:00:01Z"} for hour in (12, 11))
    catalog = Known(network=[a_network("app", "ours", **new), a_network("app", "before", **old), a_network("app", "theirs", OTHER, **new)],
                    security_group_rule=[{"id": id, "security_group_id": group, "direction": "ingress", "ethertype": "IPv4", **new, "protocol": "tcp",
                                          "port_range_min": port} for id, group, port in (("r1", "g1", 22), ("r2", "g2", 22), ("r3", "g1", None))])
    monkeypatch.setattr(migrena, "Catalog", lambda cloud: catalog)
    assert lost(catalog, "network", [[OWN, "app"]]) == ["ours"] and lost(catalog, "network", [[OWN, "app"]], ["ours"]) == []
    rule = wanted("security group rule", {"direction": "ingress", "ether_type": "IPv4", "protocol": "6", "port_range_min": 22})
    rule.refs = {"security_group_ref": "g1", "remote_group_ref": ""}
    assert lost(catalog, "security group rule", [list(key_of_wanted(rule))]) == ["r1"]
    assert lost(catalog, "network", [[OWN, "app"]], refused=True) == []


def test_an_image_that_is_there_under_another_name_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"status": "active", "disk_format": "qcow2", "container_format": "bare", "os_hash_algo": "sha512", "os_hash_value": "d1", "size": 5}
    here, there = (Image.of({**facts, "id": id, "name": name}) for id, name in (("a", "gold"), ("b", "debian 12")))
    source = SimpleNamespace(store=SimpleNamespace(all=lambda: [here]))
    monkeypatch.setattr(migrena, "Cloud", lambda *of: source)
    monkeypatch.setattr(migrena, "credentials", lambda *of: {})
    monkeypatch.setattr(migrena, "refuse_reading", lambda *of: [])
    one = wanted("image", {"name": "gold", "hash_value": "d1", "visibility": "private", "os_type": None})
    call = cast(Any, SimpleNamespace(environment={}))
    cloud = cast(Any, SimpleNamespace(store=SimpleNamespace(all=lambda: [there])))
    assert plan_images(call, Settings(), cloud, [one], [])[1] == {} and (one.id, one.result) == ("b", "equal")
    other = wanted("image", {"name": "gold", "hash_value": "d1", "visibility": "private", "is_protected": True, "properties": {"team": "shop"}})
    cloud.store.all = list
    plan = plan_images(call, Settings(), cloud, [other], [])[1][other]
    told = plan.source.facts
    assert (told["visibility"], told["protected"], told["team"], told["os_hash_value"], plan.there) == ("private", True, "shop", "d1", "")


def test_what_a_group_has_and_the_files_have_not_is_told_where_the_files_have_rules() -> None:
    group = {"id": "g", "name": "web", "project_id": OWN, "description": "", "stateful": True}
    more = {"id": "open", "security_group_id": "g", "direction": "ingress", "ethertype": "IPv4", "protocol": None, "project_id": OWN}
    one = wanted("security group", {"name": "web", "description": "", "is_stateful": True})
    catalog, settings = Known(security_group=[group], security_group_rule=[more]), Settings()
    assert plan_import(Resolver(catalog, settings, [one]), settings, [one]) == [] and one.result == "equal"
    assert plan_import(Resolver(catalog, settings, [one]), settings, [one], has_rules=True) == []
    assert one.result == "differs" and one.differences[0][0] == "rules" and one.differences[0][1][0]["id"] == "open"


def test_that_groups_have_no_rules_is_in_the_files_too(tmp_path: Path) -> None:
    write_files(tmp_path, [], may_replace=False, has_rules=True)
    assert yaml.safe_load((tmp_path / "security_group_rules.yml").read_text())["resources"] == []
    assert has_rules_in([str(tmp_path)]) and has_rules_in([str(tmp_path / "security_group_rules.yml")]) and not has_rules_in(["networks.yml"])


def test_a_volume_type_that_encrypts_is_left_out_and_told() -> None:
    said: list[str] = []
    kept = described_all(Known(), [("volume type", {"id": "1", "name": "luks", "encryption": "luks", "access": []}),
                                   ("volume type", {"id": "2", "name": "plain", "encryption": None, "access": []})], said)
    assert [one["params"]["name"] for one in kept] == ["plain"] and "it encrypts" in said[0]


def test_a_project_is_one_of_its_domain_and_its_parent_is_made_before_it() -> None:
    second = to("Second", project_name=None, domain_name=None)
    infra = wanted("project", {"name": "shop", "domain_ref": second, "parent_ref": second})
    inside = wanted("network", {"name": "new"}, 2)
    assert planned(Known(), infra, inside, settings=Settings(project="shop")) == []
    assert infra.result == "to be created" and inside.owner is infra and infra.refs["parent_ref"] == "d2"
    child = wanted("project", {"name": "child", "domain_ref": second, "parent_ref": to("shop", project_name=None, domain_name="Second")}, 3)
    assert planned(Known(), child, infra) == [] and [*batches("project", [child, infra])] == [[infra], [child]]
    with pytest.raises(MigrenaError, match="project shop was not made"):
        body_of(child, Settings(), OWN)


def test_what_an_admin_added_to_a_tenant_s_network_is_the_tenant_s() -> None:
    added = {"id": "s", "name": "", "cidr": "10.0.0.0/24", "network_id": "id-app", "project_id": OTHER}
    catalog = Known(network=[a_network("app")], subnet=[added])
    assert migrena.in_project_of(catalog, "subnet", added) and catalog.described("subnet", added)["_migration_params"] == {}
    subnet = wanted("subnet", {"name": "", "cidr": "10.0.0.0/24", "network_ref": to("app")})
    assert planned(catalog, subnet) == [] and subnet.id == "s" and subnet.owner == OWN


@pytest.mark.parametrize(("label", "params", "said"), [
    ("subnet", {"network_ref": to("app")}, "cidr is missing"), ("subnet", {"cidr": "10.0.0.0/24", "network_ref": "app"}, "not a reference"),
    ("subnet", {"cidr": "10.0.0.0/24"}, "network_ref is missing"), ("quota", {"service": "compute", "project_ref": to("shop")}, "limits is missing"),
    ("quota", {"service": "compute", "limits": [1], "project_ref": to("shop")}, "limits is not"),
    ("subnet", {"cidr": "1/8", "network_ref": to("")}, "with a name"),
    ("router interface", {"device_ref": to("gate"), "network_ref": to("app"), "fixed_ips_refs": []}, "has no ip_address"),
    ("router", {"name": "gate", "external_gateway_refinfo": {}}, "not a reference"), ("flavor", {"name": "a"}, "ram, vcpus, disk is missing"),
    ("flavor", {"name": 5, "ram": 1, "vcpus": 1, "disk": 0, "access_refs": "shop"}, "not a list"), ("security group", {"name": 7}, "")])
def test_what_is_not_in_the_form_of_the_files_is_refused(tmp_path: Path, label: str, params: dict[str, Any], said: str) -> None:
    (tmp_path / "x.yml").write_text(yaml.safe_dump({"resources": [{"type": IN_FILES[label].type, "params": params}]}))
    problems: list[Reason] = []
    found = read_files([str(tmp_path)], problems, [])
    assert (said in problems[0].problem and not found) if said else (problems == [] and found[0].name == "7")


def test_a_date_in_a_file_is_text(tmp_path: Path) -> None:
    (tmp_path / "x.yml").write_text(f"resources: [{{type: {IN_FILES['network'].type}, params: {{name: app, description: 2026-11-28}}}}]")
    assert read_files([str(tmp_path)], [], [])[0].params["description"] == "2026-11-28"


def test_a_list_that_is_not_shown_is_not_taken_for_empty() -> None:
    catalog = Known()
    catalog.hidden["role assignment"] = "403"
    one = wanted("role assignment", {"project_ref": to("shop", project_name=None, domain_name="Default"),
                                     "role_ref": to("member"), "user_ref": to("%auth%")})
    (said,) = planned(catalog, one)
    assert "what is there is not shown: 403" in said


def test_a_child_of_a_project_that_is_there_and_in_the_files_is_no_riddle() -> None:
    default = to("Default", project_name=None, domain_name=None)
    child = wanted("project", {"name": "a", "domain_ref": default, "parent_ref": to("shop", project_name=None, domain_name="Default")})
    assert planned(Known(), child, wanted("project", {"name": "shop", "domain_ref": default}, 2)) == [] and child.refs["parent_ref"] == OWN


def test_rules_come_back_as_they_were_and_access_is_only_added() -> None:
    catalog = Known()
    rule = {"id": "1", "direction": "ingress", "protocol": "icmp", "port_range_min": 0, "port_range_max": 0, "remote_address_group_id": "a",
            "remote_ip_prefix": None, "description": ""}
    migrena.change_resource(catalog.cloud, "security group", "g", {"rules": [rule]}, {"rules": []})
    assert catalog.asked == [("POST", "/security-group-rules", {"security_group_rule": {
        "security_group_id": "g", "direction": "ingress", "protocol": "icmp", "port_range_min": 0, "port_range_max": 0,
        "remote_address_group_id": "a"}})]
    subnet = {"id": "s", "name": "s", "network_id": "id-app", "project_id": OWN, "dns_nameservers": ["8.8.8.8", "10.0.0.53"]}
    told = Known(network=[a_network("app")]).described("subnet", subnet)["params"]
    assert told["dns_nameservers"] == ["8.8.8.8", "10.0.0.53"]
