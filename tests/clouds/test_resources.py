"""What surrounds instances, between two real clouds: exported, edited, imported, and undone; what OS Migrate wrote is read too."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from clouds.conftest import Operator
from clouds.middle import LOST, PASS, Middle, middle
from lab.api import Api
from lab.clouds import Clouds
from lab.settings import PASSWORD

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAICp6Eder46FZPVU8EjA55F3+Meyu6gfrT7ADcHQ+usw4 clerk"
PROJECT = "shop"


def in_shop(api: Api, user: str = "admin") -> Api:
    """The same cloud, from within the project."""
    return Api(api.cloud, user, PROJECT)


def make_shop(api: Api) -> None:
    """A project with all that one may have: networks of both families, a router, groups that refer to each other, and the rest."""
    domain = {"domain_id": "default"}
    project = api.ensure("keystone", "projects", PROJECT, description="sells things", **domain)
    clerk = api.ensure("keystone", "users", "clerk", password=PASSWORD, email="clerk@shop.test", default_project_id=project, **domain)
    roles = {one["name"]: one["id"] for one in api.call("GET", "keystone", "/roles")["roles"]}
    for user, role in ((clerk, "member"), (user_id(api, "admin"), "admin")):
        api.call("PUT", "keystone", f"/projects/{project}/users/{user}/roles/{roles[role]}")
    flavor = api.ensure("nova", "flavors", "shop.small", vcpus=1, ram=128, disk=1, **{"os-flavor-access:is_public": False})
    api.call("POST", "nova", f"/flavors/{flavor}/os-extra_specs", {"extra_specs": {"hw:cpu_policy": "shared"}})
    api.call("POST", "nova", f"/flavors/{flavor}/action", {"addTenantAccess": {"tenant": project}})
    api.call("PUT", "nova", f"/os-quota-sets/{project}", {"quota_set": {"cores": 33, "ram": 12345}})
    api.call("PUT", "neutron", f"/quotas/{project}", {"quota": {"port": 77, "security_group_rule": 555}})
    in_shop(api, "clerk").call("POST", "nova", "/os-keypairs", {"keypair": {"name": "clerk-key", "public_key": KEY, "type": "ssh"}})
    shop = in_shop(api)
    shop.call("POST", "nova", "/os-server-groups", {"server_group": {
        "name": "apart", "policy": "anti-affinity", "rules": {"max_server_per_host": 2}}})
    make_networks(shop)
    make_groups(shop)


def make_networks(shop: Api) -> None:
    """Two networks with tags, routes and both families, and a router to the outside."""
    def made(what: str, **facts: Any) -> str:
        return str(shop.call("POST", "neutron", f"/{what}s", {what: facts})[what]["id"])

    front, back = (made("network", name=name, description=f"the {name}") for name in ("front", "back"))
    shop.call("PUT", "neutron", f"/networks/{back}/tags", {"tags": ["inner", "a tag"]})
    one = made("subnet", name="front-4", network_id=front, ip_version=4, cidr="10.71.1.0/24", dns_nameservers=["10.71.1.2", "10.71.1.1"],
               allocation_pools=[{"start": "10.71.1.50", "end": "10.71.1.99"}, {"start": "10.71.1.10", "end": "10.71.1.20"}])
    six = made("subnet", name="", network_id=front, ip_version=6, cidr="fd71:1::/64", ipv6_ra_mode="slaac", ipv6_address_mode="slaac")
    two = made("subnet", name="back-4", network_id=back, ip_version=4, cidr="10.71.2.0/24", gateway_ip=None,
               host_routes=[{"destination": "10.98.0.0/16", "nexthop": "10.71.2.7"}])
    gate = made("router", name="gate", external_gateway_info={"network_id": shop.need("neutron", "networks", "public")})
    for subnet in (one, six):
        shop.call("PUT", "neutron", f"/routers/{gate}/add_router_interface", {"subnet_id": subnet})
    port = made("port", network_id=back, fixed_ips=[{"subnet_id": two, "ip_address": "10.71.2.200"}])
    shop.call("PUT", "neutron", f"/routers/{gate}/add_router_interface", {"port_id": port})
    shop.call("PUT", "neutron", f"/routers/{gate}", {"router": {"routes": [{"destination": "10.99.0.0/16", "nexthop": "10.71.2.9"}]}})


def make_groups(shop: Api) -> None:
    """Three groups that refer to each other in a circle; one lets nothing out."""
    groups = {name: shop.call("POST", "neutron", "/security-groups", {"security_group": {"name": name, "description": f"for {name}"}})[
        "security_group"] for name in ("web", "db", "ops")}
    for name, other, port in (("web", "ops", 443), ("db", "web", 5432), ("ops", "db", 22)):
        shop.call("POST", "neutron", "/security-group-rules", {"security_group_rule": {
            "security_group_id": groups[name]["id"], "remote_group_id": groups[other]["id"], "direction": "ingress", "protocol": "tcp",
            "port_range_min": port, "port_range_max": port, "description": f"{other} to {name}"}})
    for rule in groups["ops"]["security_group_rules"]:
        shop.call("DELETE", "neutron", f"/security-group-rules/{rule['id']}")


def user_id(api: Api, name: str) -> str:
    return str(api.call("GET", "keystone", f"/users?name={name}")["users"][0]["id"])


def forget_shop(api: Api) -> None:
    """Deletes the project with all that it has."""
    found = api.call("GET", "keystone", f"/projects?name={PROJECT}")["projects"]
    for project in (one["id"] for one in found):
        for port in api.call("GET", "neutron", f"/ports?project_id={project}")["ports"]:
            if port["device_owner"] == "network:router_interface":
                api.call("PUT", "neutron", f"/routers/{port['device_id']}", {"router": {"routes": []}})
                api.call("PUT", "neutron", f"/routers/{port['device_id']}/remove_router_interface", {"port_id": port["id"]})
        for kind in ("routers", "networks", "security-groups"):
            for one in api.call("GET", "neutron", f"/{kind}?project_id={project}")[kind.replace("-", "_")]:
                api.call("DELETE", "neutron", f"/{kind}/{one['id']}")
        for one in api.call("GET", "nova", "/os-server-groups?all_projects=True")["server_groups"]:
            if one["project_id"] == project:
                api.call("DELETE", "nova", f"/os-server-groups/{one['id']}")
        api.call("DELETE", "keystone", f"/projects/{project}")
    for one in api.call("GET", "keystone", "/users?name=clerk")["users"]:
        for pair in api.call("GET", "nova", f"/os-keypairs?user_id={one['id']}")["keypairs"]:
            api.call("DELETE", "nova", f"/os-keypairs/{pair['keypair']['name']}?user_id={one['id']}")
        api.call("DELETE", "keystone", f"/users/{one['id']}")
    for one in api.call("GET", "nova", "/flavors?is_public=None")["flavors"]:
        if one["name"].startswith("shop."):
            api.call("DELETE", "nova", f"/flavors/{one['id']}")


@pytest.fixture(scope="module")
def shop(clouds: Clouds, src: Api, dst: Api) -> Iterator[Api]:
    """The source cloud from within the project; in the end neither cloud has anything of it."""
    clouds.networks(False)
    for api in (src, dst):
        forget_shop(api)
    make_shop(src)
    yield in_shop(src)
    for api in (src, dst):
        forget_shop(api)


@pytest.fixture
def emptied(shop: Api, dst: Api) -> Iterator[Api]:
    """The destination, without the project."""
    yield dst
    forget_shop(dst)


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The resources of each file, without what is not for editing."""
    return {path.name: [{**one, "_info": {}} for one in yaml.safe_load(path.read_text())["resources"]] for path in folder.glob("*.yml")}


def outside(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The same without what a cloud has by itself: its types of volumes and public flavors, and the address of a router's gate."""
    found = read(folder)
    found.pop("volume_types.yml", None)
    found["flavors.yml"] = [one for one in found["flavors.yml"] if one["params"]["name"].startswith("shop.")]
    found["quotas.yml"] = [one for one in found["quotas.yml"] if one["params"]["service"] != "block-storage"]
    return found


def ids_there(api: Api) -> set[str]:
    """The ids of all that an import may make."""
    lists = {"keystone": ("projects", "users"), "neutron": ("networks", "subnets", "routers", "ports", "security-groups", "security-group-rules"),
             "nova": ("os-server-groups?all_projects=True", "flavors?is_public=None")}
    told = (next(iter(api.call("GET", service, f"/{path}").values())) for service, paths in lists.items() for path in paths)
    return {one["id"] for rows in told for one in rows if one.get("device_owner") != "network:dhcp"}


def export(operator: Operator, name: str, *words: str) -> Path:
    """The folder with what was exported."""
    folder = operator.folder / name
    done = operator.run("export", "--folder", str(folder), *words)
    assert done.returncode == 0, done.stderr
    return folder


def counts(report: dict[str, Any]) -> dict[str, int]:
    """How many resources had which result."""
    results = [row["result"] for row in report["resources"]]
    return {result: results.count(result) for result in results}


def test_a_whole_project_arrives_and_its_export_from_there_is_the_same(operator: Operator, shop: Api, emptied: Api) -> None:
    before, files = ids_there(emptied), export(operator, "here", "--project", PROJECT)
    words = ("import", str(files), "--project", PROJECT)
    done = operator.run(*words, "-n")
    assert done.returncode == 0 and re.search(r"networks: 2 to be created\n.*\+ back\n", done.stderr) and ids_there(emptied) == before
    report = operator.report(*words, "--new-passwords", str(operator.folder / "words"))
    assert counts(report)["created"] >= 30 and (operator.folder / "words").stat().st_mode & 0o777 == 0o600
    assert outside(export(operator, "there", "--project", PROJECT, "--cloud", "dst")) == outside(files)
    (password,) = yaml.safe_load((operator.folder / "words").read_text()).values()
    body = {"auth": {"identity": {"methods": ["password"], "password": {"user": {
        "name": "clerk", "password": password, "domain": {"id": "default"}}}}}}
    assert emptied.call("POST", "keystone", "/auth/tokens", body)["token"]["user"]["name"] == "clerk"
    again = operator.report(*words)
    assert {*counts(again)} == {"equal"} and again["run"] == ""
    there = ids_there(emptied)
    done = operator.run("rollback", report["run"], "-n")
    assert done.returncode == 0 and done.stderr.count("unless somebody uses it") >= 25 and ids_there(emptied) == there
    done = operator.run("rollback", report["run"])
    assert done.returncode == 0, done.stderr
    assert ids_there(emptied) == before


@pytest.mark.long
def test_rules_that_the_files_do_not_have_are_told_and_removed_if_asked_for(operator: Operator, shop: Api, emptied: Api) -> None:
    files = export(operator, "here", "security_groups", "security_group_rules", "projects", "--project", PROJECT)
    words = ("import", str(files), "--project", PROJECT)
    made = operator.report(*words)["run"]
    group = next(one["id"] for one in emptied.call("GET", "neutron", "/security-groups")["security_groups"] if one["name"] == "ops")
    emptied.call("POST", "neutron", "/security-group-rules", {"security_group_rule": {
        "security_group_id": group, "direction": "ingress", "protocol": "udp", "remote_ip_prefix": "10.0.0.0/8"}})

    def rules() -> set[tuple[str, str | None]]:
        told = emptied.call("GET", "neutron", f"/security-group-rules?security_group_id={group}")["security_group_rules"]
        return {(one["protocol"], one["remote_ip_prefix"]) for one in told}

    before, done = rules(), operator.run(*words)
    assert done.returncode == 0 and "ops: has a rule that the files do not have: ingress IPv4 udp 10.0.0.0/8" in done.stderr and rules() == before
    run = operator.report(*words, "--update")["run"]
    assert rules() == {("tcp", None)}
    assert operator.run("rollback", run).returncode == 0 and rules() == before == {("tcp", None), ("udp", "10.0.0.0/8")}
    assert operator.run("rollback", made).returncode == 0


def test_what_differs_is_shown_field_by_field_changed_if_asked_for_and_changed_back(operator: Operator, shop: Api, emptied: Api) -> None:
    files = export(operator, "here", "--project", PROJECT)
    made = operator.report("import", str(files), "--project", PROJECT)["run"]
    path = files / "networks.yml"
    path.write_text(path.read_text().replace("description: the front", "description: another front").replace("- inner", "- outer"))
    rules = files / "security_group_rules.yml"
    rules.write_text(rules.read_text().replace("description: web to db", "description: changed"))
    words = ("import", str(files), "--project", PROJECT)
    report = operator.report(*words)
    told = {(row["name"], one["name"]): (sorted(one["there"]) if one["name"] == "tags" else one["there"], one["file"])
            for row in report["resources"] for one in row["differences"]}
    assert told == {("front", "description"): ("the front", "another front"), ("back", "tags"): (["a tag", "inner"], ["a tag", "outer"]),
                    ("db web ingress IPv4 tcp 5432 5432", "description"): ("web to db", "changed"),
                    ("clerk", "is_enabled"): (False, True)}, told  # it has no password
    run = operator.report(*words, "--update")["run"]
    front = emptied.find("neutron", "networks", "front")
    assert front and front["description"] == "another front"
    assert sorted(emptied.find("neutron", "networks", "back")["tags"]) == ["a tag", "outer"]  # type: ignore[index]
    assert operator.run("rollback", run).returncode == 0
    assert emptied.find("neutron", "networks", "front")["description"] == "the front"  # type: ignore[index]
    assert operator.run("rollback", made).returncode == 0 and emptied.find("keystone", "projects", PROJECT) is None


@pytest.mark.long
def test_what_somebody_uses_stays_and_is_named(operator: Operator, shop: Api, emptied: Api) -> None:
    files = export(operator, "here", "networks", "subnets", "security_groups", "projects", "--project", PROJECT)
    run = operator.report("import", str(files), "--project", PROJECT)["run"]
    network = emptied.need("neutron", "networks", "front")
    port = emptied.call("POST", "neutron", "/ports", {"port": {"network_id": network}})["port"]["id"]
    try:
        done = operator.run("rollback", run)
        assert done.returncode == 4 and f"network {network} is kept" in done.stderr and "project" in done.stderr, done.stderr
        assert emptied.find("neutron", "networks", "front") and not emptied.find("neutron", "networks", "back")
    finally:
        emptied.call("DELETE", "neutron", f"/ports/{port}")
    assert operator.run("rollback", run).returncode == 0 and emptied.find("keystone", "projects", PROJECT) is None


def test_everything_wrong_with_the_files_is_told_before_anything_is_made(operator: Operator, shop: Api, emptied: Api) -> None:
    files, before = export(operator, "here", "--project", PROJECT), ids_there(emptied)
    one = yaml.safe_load((files / "networks.yml").read_text())
    for name in ("front", "", "extra"):
        one["resources"].append({**one["resources"][0], "params": {**one["resources"][0]["params"], "name": name}})
    one["resources"] += [{"type": "openstack.compute.Server", "params": {}}, "text"]
    (files / "networks.yml").write_text(yaml.safe_dump(one))
    gate = (files / "routers.yml").read_text()
    (files / "routers.yml").write_text(gate.replace("name: public", "name: publik"))
    done = operator.run("import", str(files), "--project", PROJECT)
    assert done.returncode == 3 and ids_there(emptied) == before
    for said in ("network front is there twice", "has no name", "its type is unknown", "no networks are called 'publik'; did you mean public?",
                 "2 networks are called 'front'", "--network SRC=DST names another one"):
        assert said in done.stderr, (said, done.stderr)
    done = operator.run("import", str(files / "routers.yml"), "--network", "publik=public", "-n")
    assert done.returncode == 0 and "routers: 1 to be created" in done.stderr, done.stderr
    for words, said in ((("import", "nowhere"), "cannot be read"), (("export", "netwoks"), "did you mean networks?"),
                        (("export", "--for", shop.project_id, "networks"), "--for chooses"), (("import",), "required: FILE"),
                        (("export", "--project", "nobody"), "no projects are called 'nobody'")):
        done = operator.run(*words)
        assert done.returncode in (2, 3) and said in done.stderr, done.stderr
    done = operator.run("export", "--folder", str(files), "--project", PROJECT)
    assert done.returncode == 3 and "--yes replaces them" in done.stderr


@pytest.mark.parametrize("line", ["intent of create network 1", pytest.param("intent of create security group 1", marks=pytest.mark.long)])
def test_an_import_that_is_killed_is_rolled_back_or_goes_on(operator: Operator, shop: Api, emptied: Api, line: str) -> None:
    before, files = ids_there(emptied), export(operator, "here", "--project", PROJECT)
    words = ("import", str(files), "--project", PROJECT)
    assert operator.run(*words, throw=[(line, signal.SIGKILL)]).returncode == -signal.SIGKILL
    run = operator.last_run
    assert "what it has made by then" in operator.run("status").stdout
    done = operator.run("resume", run)
    assert done.returncode == 3 and "give its command again" in done.stderr
    if "network" in line:
        assert operator.report(*words)["result"] == "done"
        rest = operator.last_run
        assert {*counts(operator.report(*words))} <= {"equal", "differs"}
        assert operator.run("rollback", rest).returncode in (0, 4)  # the second made most, and the first some of what is in use
    done = operator.run("rollback", run)
    assert done.returncode == 0, done.stderr
    assert ids_there(emptied) == before


def test_ctrl_c_removes_what_was_made(operator: Operator, shop: Api, emptied: Api) -> None:
    before, files = ids_there(emptied), export(operator, "here", "--project", PROJECT)
    done = operator.run("import", str(files), "--project", PROJECT, throw=[("done of create subnet 1", signal.SIGINT)])
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert ids_there(emptied) == before
    line = [("done of create subnet 1", signal.SIGINT)]
    done = operator.run("import", str(files), "--project", PROJECT, "--keep-going", throw=line)
    assert done.returncode == 4 and "what was imported by then is kept" in done.stderr and ids_there(emptied) > before, done.stderr
    assert operator.run("rollback", operator.last_run).returncode == 0 and ids_there(emptied) == before


@pytest.fixture
def sold(shop: Api, src: Api) -> Iterator[str]:
    """An instance of the project, on its own network."""
    clerk = in_shop(src, "clerk")
    flavor = next(one["id"] for one in src.call("GET", "nova", "/flavors?is_public=None")["flavors"] if one["name"] == "shop.small")
    id = clerk.call("POST", "nova", "/servers", {"server": {
        "name": "sold", "imageRef": src.need("glance", "images", "guest"), "flavorRef": flavor, "key_name": "clerk-key",
        "networks": [{"uuid": shop.need("neutron", "networks", "front")}], "security_groups": [{"name": "web"}]}})["server"]["id"]
    src.await_status(id, "ACTIVE")
    yield id
    with_state = src.server(id)
    if with_state["locked"]:
        src.act(id, "unlock")
    src.delete(id)


def has_moved_whole(api: Api, report: dict[str, Any]) -> None:
    """The new instance runs in its project, with its own network, group, key and flavor."""
    arrived = api.server(report["destination"]["id"])
    assert arrived["status"] == "ACTIVE" and arrived["tenant_id"] == api.need("keystone", "projects", PROJECT)
    assert arrived["flavor"]["original_name"] == "shop.small" and arrived["key_name"] == "clerk-key" and [*arrived["addresses"]] == ["front"]
    assert arrived["security_groups"] == [{"name": "web"}]


@pytest.mark.long
def test_an_instance_arrives_in_an_empty_cloud_by_three_commands(operator: Operator, emptied: Api, sold: str) -> None:
    files = export(operator, "needed", "--for", sold)
    assert {path.stem for path in files.iterdir()} == {
        "flavors", "images", "keypairs", "networks", "projects", "router_interfaces", "routers", "security_group_rules", "security_groups", "subnets"}
    assert {one["params"]["name"] for one in read(files)["security_groups.yml"]} == {"web", "ops", "db"}  # each refers to the next
    assert operator.run("import", str(files)).returncode == 0
    report = operator.report("-s", sold, "--dst-project", "same", "-a", "dst")
    try:
        has_moved_whole(emptied, report)
    finally:
        operator.run("rollback", report["run"], "--yes")


def test_an_instance_arrives_in_an_empty_cloud_by_one_command_and_what_surrounds_it_stays(operator: Operator, emptied: Api, sold: str) -> None:
    words = ("-s", sold, "--dst-project", "same", "-a", "dst", "--with-all")
    done = operator.run(*words, "-n")
    assert done.returncode == 0 and "networks: 1 to be created" in done.stderr and emptied.find("keystone", "projects", PROJECT) is None
    report = operator.report(*words)
    has_moved_whole(emptied, report)
    assert operator.run("rollback", report["run"], "--yes").returncode == 0
    assert emptied.find("neutron", "networks", "front") and emptied.find("keystone", "projects", PROJECT)
    done = operator.run(*words, "--flavor", "no-such")
    assert done.returncode == 3, done.stderr  # nothing was made this time


@pytest.mark.long
def test_networks_and_groups_alone_are_made_by_one_command_and_stay(operator: Operator, emptied: Api, sold: str) -> None:
    files = export(operator, "needed", "--for", sold)
    done = operator.run("import", *(str(files / f"{name}.yml") for name in ("projects", "flavors", "keypairs")))
    assert done.returncode == 0 and emptied.find("neutron", "networks", "front") is None, done.stderr
    words = ("-s", sold, "--dst-project", "same", "-a", "dst")
    refused = operator.run(*words)
    assert refused.returncode == 3 and "there is no network 'front'" in refused.stderr
    report = operator.report(*words, "--with-network")
    has_moved_whole(emptied, report)
    assert operator.run("rollback", report["run"], "--yes").returncode == 0 and emptied.find("neutron", "networks", "front")


@pytest.mark.long
def test_all_projects_are_exported_at_once_and_are_there_already(operator: Operator, shop: Api) -> None:
    files = export(operator, "all", "--all-projects")
    assert {one["params"]["name"] for one in read(files)["projects.yml"]} >= {PROJECT, "demo"}
    report = operator.report("import", str(files), "-n", "--cloud", "src")
    assert {*counts(report)} <= {"equal", "omitted, since this cloud has no Cinder"}, counts(report)


def test_who_is_no_admin_exports_what_is_theirs(operator: Operator, shop: Api) -> None:
    creds = {"auth_url": shop.cloud.url("keystone") + "/v3", "username": "clerk", "password": PASSWORD, "project_name": PROJECT}
    files = operator.folder / "own"
    done = operator.run("export", "--folder", str(files), extra=f"SRC_CREDS = {creds!r}")
    assert done.returncode == 0, done.stderr
    found = read(files)
    assert {one["params"]["name"] for one in found["networks.yml"]} == {"front", "back"} and len(found["security_group_rules.yml"]) == 11
    assert "users.yml" not in found and json.dumps(found["keypairs.yml"]).count("clerk-key") == 1


@pytest.fixture
def between() -> Iterator[Middle]:
    """What stands between migrena and both clouds."""
    with middle() as found:
        yield found


@pytest.mark.parametrize(("what", "answer"), [
    ("networks", LOST), *(pytest.param(*row, marks=pytest.mark.long) for row in (
        ("subnets", "500"), ("security-groups", LOST), ("projects", LOST), ("flavors", LOST), ("security-group-rules", "503")))])
def test_a_request_that_fails_or_whose_answer_is_lost_leaves_nothing(
        operator: Operator, shop: Api, emptied: Api, between: Middle, what: str, answer: str) -> None:
    before, files = ids_there(emptied), export(operator, "here", "--project", PROJECT)
    between.spoil = lambda name, earlier: answer if name == f"dst POST {what}" else PASS
    done = operator.run("import", str(files), "--project", PROJECT, env=between.environment)
    assert done.returncode == 1 and between.spoiled, done.stderr
    assert ids_there(emptied) == before


@pytest.mark.long
def test_what_a_cloud_does_not_know_is_omitted_and_told_and_what_goes_wrong_alone_is_named(
        operator: Operator, shop: Api, emptied: Api) -> None:
    files = export(operator, "here", "networks", "projects", "flavors", "--project", PROJECT)
    path = files / "networks.yml"
    path.write_text(path.read_text().replace("is_vlan_transparent: null", "is_vlan_transparent: true\n    of_the_future: 1"))
    report = operator.report("import", str(path), str(files / "projects.yml"), "--project", PROJECT)
    rows = [row for row in report["resources"] if row["type"] == "openstack.network.Network"]
    assert {(row["result"], *row["omitted"]) for row in rows} == {("created", "vlan_transparent")}
    assert any("omitted, since this cloud does not know it: vlan_transparent" in line for line in report["warnings"])
    assert operator.run("rollback", report["run"]).returncode == 0
    flavors = files / "flavors.yml"
    flavors.write_text(flavors.read_text().replace("vcpus: 1\n  type", "vcpus: 0\n  type"))
    words = ("import", str(flavors), str(files / "projects.yml"), "--project", PROJECT)
    done = operator.run(*words)
    assert done.returncode == 1 and "create flavor shop.small" in done.stderr and emptied.find("keystone", "projects", PROJECT) is None
    done = operator.run(*words, "--keep-going")
    assert done.returncode == 4 and "flavor shop.small: not made" in done.stderr and emptied.find("keystone", "projects", PROJECT)
    assert operator.run("rollback", operator.last_run).returncode == 0 and emptied.find("keystone", "projects", PROJECT) is None


# In the form that OS Migrate 1.0.5 writes: null for what is not set, the credentials' own as %auth%, others by name.
OF_OS_MIGRATE = """os_migrate_version: 1.0.5
resources:
- _info: {id: 0c5a, project_id: 77, revision_number: 3}
  _migration_params: {}
  params: {description: shop window, name: om-window}
  type: openstack.network.SecurityGroup
- _info: {id: 1d11, security_group_id: 0c5a}
  _migration_params: {}
  params:
    {description: null, direction: egress, ether_type: IPv4, port_range_max: null, port_range_min: null, protocol: null, remote_group_ref: null,
     remote_ip_prefix: null, security_group_ref: {domain_name: '%auth%', name: om-window, project_name: '%auth%'}}
  type: openstack.network.SecurityGroupRule
- _info: {id: 1d12, security_group_id: 0c5a}
  _migration_params: {}
  params:
    {description: '', direction: ingress, ether_type: IPv4, port_range_max: 80, port_range_min: 80, protocol: tcp, remote_ip_prefix: 0.0.0.0/0,
     remote_group_ref: {domain_name: '%auth%', name: om-window, project_name: '%auth%'},
     security_group_ref: {domain_name: '%auth%', name: om-window, project_name: '%auth%'}}
  type: openstack.network.SecurityGroupRule
- _info: {fingerprint: null, id: om-key, is_deleted: false, user_id: 9}
  _migration_params: {}
  params:
    name: om-key
    public_key: 'ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAICp6Eder46FZPVU8EjA55F3+Meyu6gfrT7ADcHQ+usw4
      om

      '
    type: ssh
    user_ref: {domain_name: '%auth%', name: '%auth%', project_name: null}
  type: openstack.compute.Keypair
"""


def test_what_os_migrate_wrote_is_imported_and_is_there_the_second_time(operator: Operator, dst: Api, shop: Api) -> None:
    path = operator.folder / "theirs.yml"
    path.write_text(OF_OS_MIGRATE.replace("remote_ip_prefix: 0.0.0.0/0,\n", "remote_ip_prefix: null,\n"))
    report = operator.report("import", str(path))
    try:
        assert counts(report) == {"created": 4}
        (group,) = (one for one in dst.call("GET", "neutron", "/security-groups")["security_groups"] if one["name"] == "om-window")
        assert [(rule["direction"], rule["ethertype"], rule["port_range_max"]) for rule in sorted(
            group["security_group_rules"], key=lambda rule: str(rule["direction"]))] == [("egress", "IPv4", None), ("ingress", "IPv4", 80)]
        assert counts(operator.report("import", str(path))) == {"equal": 4}
    finally:
        assert operator.run("rollback", report["run"]).returncode == 0
