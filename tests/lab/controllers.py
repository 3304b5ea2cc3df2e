"""The controller of a cloud: Keystone, Glance, Placement, Nova, Neutron and, where it has volumes, Cinder, with their accounts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from lab.api import Api
from lab.processes import logged
from lab.roster import Roster
from lab.settings import PASSWORD, PORTS, Cloud, Storage
from lab.volumes import api_words, start_cinder

SERVICES: Final = {"glance": ("image", ""), "placement": ("placement", ""), "nova": ("compute", "/v2.1"),
                   "neutron": ("network", "")}
VOLUME_SERVICE: Final = ("volumev3", "/v3/$(project_id)s")


def start_controller(roster: Roster, api: Api, storage: Storage) -> None:
    """Start one cloud's services, make its accounts meanwhile, and return when all its APIs answer."""
    cloud, etc, name = api.cloud, api.cloud.etc, api.cloud.name
    _wsgi(roster, cloud, "keystone", "keystone-wsgi-public", {
        "OS_KEYSTONE_CONFIG_DIR": etc / "keystone", "OS_KEYSTONE_CONFIG_FILES": etc / "keystone/keystone.conf"})
    _wsgi(roster, cloud, "placement", "placement-api", {"OS_PLACEMENT_CONFIG_DIR": etc / "placement"})
    _make_accounts(roster, api)
    if storage.volumes and not api.find("keystone", "services", "cinder"):
        _register(api, api.need("keystone", "projects", "service"), "cinder")
    roster.start(f"{name}-glance", ["glance-api", "--config-file", etc / "glance/glance-api.conf"],
                      place=(cloud.address, PORTS["glance"]))
    for part, place in (("api", (cloud.address, PORTS["nova"])), ("conductor", None), ("scheduler", None)):
        roster.start(f"{name}-nova-{part}", [f"nova-{part}", "--config-file", etc / "nova/nova.conf"],
                          place=place)
    # Not under uWSGI as Debian would have it: there its threads stop to talk with RabbitMQ after a minute of quiet.
    roster.start(f"{name}-neutron", [
        "neutron-server", "--config-file", etc / "neutron/neutron.conf",
        "--config-file", etc / "neutron/ml2_conf.ini",
    ], place=(cloud.address, PORTS["neutron"]))
    if storage.volumes:
        _wsgi(roster, cloud, "cinder", "cinder-wsgi", {}, *api_words(cloud))
        start_cinder(roster, cloud, storage)
    for service in ("placement", "glance", "neutron", *(["cinder"] if storage.volumes else [])):
        roster.await_listening(f"{name}-{service}", (cloud.address, PORTS[service]))
    roster.await_listening(f"{name}-nova-api", (cloud.address, PORTS["nova"]))


def _wsgi(roster: Roster, cloud: Cloud, service: str, script: str, env: Mapping[str, str | Path], *words: str) -> None:
    """Start a service that Debian runs under uWSGI."""
    place = (cloud.address, PORTS[service])
    roster.start(f"{cloud.name}-{service}", [
        "uwsgi_python3", "--plugin", "python3", "--http-socket", f"{place[0]}:{place[1]}", "--master",
        "--wsgi-file", f"/usr/bin/{script}", "--lazy-apps", "--need-app", "--die-on-term", "--no-orphans",
        "--processes", "1", "--threads", "8", "--enable-threads", "--buffer-size", "65535",
        "--add-header", "Connection: close", *words,
    ], {key: str(value) for key, value in env.items()}, place)


def _make_accounts(roster: Roster, api: Api) -> None:
    """Users, projects, roles and the catalogue, once."""
    cloud = api.cloud
    marker = cloud.folder / "accounts.done"
    roster.await_listening(f"{cloud.name}-keystone", (cloud.address, PORTS["keystone"]))
    if marker.exists():
        return
    url = f"{cloud.url('keystone')}/v3"
    logged(["keystone-manage", "--config-file", cloud.etc / "keystone/keystone.conf", "bootstrap",
            "--bootstrap-password", PASSWORD, "--bootstrap-region-id", "RegionOne",
            *(word for kind in ("public", "internal", "admin") for word in (f"--bootstrap-{kind}-url", url))],
           roster.log(f"{cloud.name}-bootstrap"))
    service = api.ensure("keystone", "projects", "service", domain_id="default")
    api.ensure("keystone", "roles", "service")
    for name in SERVICES:
        _register(api, service, name)
    demo = api.ensure("keystone", "projects", "demo", domain_id="default")
    _grant(api, demo, "demo", "member")
    _grant(api, demo, "admin", "admin")
    marker.touch()


def _grant(api: Api, project: str, user: str, *roles: str) -> None:
    """Give a user roles in a project; the user is made when there is none of that name."""
    identity = api.ensure("keystone", "users", user, password=PASSWORD, domain_id="default")
    for role in roles:
        number = api.need("keystone", "roles", role)
        api.call("PUT", "keystone", f"/projects/{project}/users/{identity}/roles/{number}")


def _register(api: Api, project: str, name: str) -> None:
    """Give a service its user and its places in the catalogue."""
    kind, path = SERVICES.get(name, VOLUME_SERVICE)
    _grant(api, project, name, "admin", "service")
    entry = api.ensure("keystone", "services", name, type=kind)
    for interface in ("public", "internal", "admin"):
        api.call("POST", "keystone", "/endpoints", {"endpoint": {
            "service_id": entry, "interface": interface, "region_id": "RegionOne", "url": api.cloud.url(name) + path}})
