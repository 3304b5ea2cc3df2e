"""OpenStack's REST interfaces as far as the lab needs them, with nothing but the standard library."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lab.processes import LabError
from lab.settings import PASSWORD, Cloud

VERSIONS: Final = {"nova": "compute 2.93", "cinder": "volume 3.70"}  # those in Zed
ROOTS: Final = {"keystone": "/v3", "nova": "/v2.1", "glance": "/v2", "neutron": "/v2.0", "placement": "", "cinder": "/v3"}
POLL: Final = 0.5  # seconds between two questions to a service


class ApiError(LabError):
    """A service refused a request; `status` is HTTP's."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass
class Api:
    """One account on one cloud."""

    cloud: Cloud
    user: str = "admin"
    project: str = "admin"
    _token: str = field(default="", repr=False)
    _project_id: str = field(default="", repr=False)

    def _login(self) -> None:
        domain = {"name": "Default"}
        user = {"name": self.user, "password": PASSWORD, "domain": domain}
        scope = {"project": {"name": self.project, "domain": domain}}
        body = {"auth": {"identity": {"methods": ["password"], "password": {"user": user}}, "scope": scope}}
        answer, headers = self._send("POST", f"{self.cloud.url('keystone')}/v3/auth/tokens", body, {})
        self._project_id, self._token = json.loads(answer)["token"]["project"]["id"], headers["x-subject-token"]

    @property
    def project_id(self) -> str:
        """The id of the project that this account works in."""
        if not self._token:
            self._login()
        return self._project_id

    def call(self, method: str, service: str, path: str, body: object = None,
             headers: Mapping[str, str] | None = None) -> Any:
        """What the service answers to this request, decoded from JSON; None if it answers nothing.

        Raises ApiError when it refuses. A body of bytes or a Path is sent as it is.
        """
        text = self._ask(method, service, path, body, headers or {})
        return json.loads(text) if text.strip() else None

    def _ask(self, method: str, service: str, path: str, body: object, headers: Mapping[str, str]) -> bytes:
        """What the service answers to somebody who has logged in."""
        if not self._token:
            self._login()
        sent = {"X-Auth-Token": self._token, "OpenStack-API-Version": VERSIONS.get(service, VERSIONS["nova"]), **headers}
        return self._send(method, self.cloud.url(service) + ROOTS[service] + path, body, sent)[0]

    def _send(self, method: str, url: str, body: object, headers: Mapping[str, str]) -> tuple[bytes, dict[str, str]]:
        sent = {"Content-Type": "application/json", "Accept": "application/json", **headers}
        content = None if body is None else body.read_bytes() if isinstance(body, Path) else json.dumps(body).encode()
        request = urllib.request.Request(url, content, sent, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by a proxy: the clouds are here
        try:
            with opener.open(request, timeout=120) as answer:
                return answer.read(), {key.lower(): value for key, value in answer.headers.items()}
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")[:500]
            raise ApiError(error.code, f"{self.cloud.name}: {method} {url} answered {error.code}: {reason}") from error
        except OSError as error:
            raise LabError(f"{self.cloud.name}: {method} {url}: {error}") from error

    # ---- finding and making ----

    def find(self, service: str, kind: str, name: str) -> dict[str, Any] | None:
        """The project, user, network, image … of this name or id; None if there is none."""
        query = "?all_tenants=1" if kind == "servers" and self.user == "admin" else ""
        path = "/flavors/detail" if kind == "flavors" else f"/{kind}{query}"
        for entry in self.call("GET", service, path)[kind]:
            if name in (entry.get("name"), entry["id"]):
                return dict(entry)
        return None

    def need(self, service: str, kind: str, name: str) -> str:
        """The id of what has this name. Raises LabError if there is nothing of that name."""
        found = self.find(service, kind, name)
        if not found:
            raise LabError(f"{self.cloud.name}: nothing named {name} among the {kind}")
        return str(found["id"])

    def ensure(self, service: str, kind: str, name: str, **fields: object) -> str:
        """The id of what has this name, made with these fields if there is none."""
        found = self.find(service, kind, name)
        if found:
            return str(found["id"])
        made = self.call("POST", service, f"/{kind}", {kind[:-1]: {"name": name, **fields}})
        return str(made[kind[:-1]]["id"])

    def upload(self, name: str, path: Path, disk_format: str = "qcow2", **properties: str) -> str:
        """The id of a new public image with the content of this file."""
        made = self.call("POST", "glance", "/images", {"name": name, "disk_format": disk_format, "visibility": "public",
                                                       "container_format": "bare", **properties})
        self.call("PUT", "glance", f"/images/{made['id']}/file", path, {"Content-Type": "application/octet-stream"})
        return str(made["id"])

    def download(self, identity: str) -> bytes:
        """What an image holds."""
        return self._ask("GET", "glance", f"/images/{identity}/file", None, {"Accept": "*/*"})

    # ---- servers ----

    def server(self, name_or_id: str) -> dict[str, Any]:
        """All that Nova tells of a server. Raises LabError if there is none."""
        identity = self.need("nova", "servers", name_or_id)
        return dict(self.call("GET", "nova", f"/servers/{identity}")["server"])

    def create(self, name: str, image: str = "guest", flavor: str = "tiny", network: str = "net1",
               **more: object) -> str:
        """The id of a new server that is ACTIVE. `network` may be "none"; `more` goes into Nova's request.

        Without an image it boots from what `block_device_mapping_v2` in `more` says.
        """
        networks = "none" if network == "none" else [{"uuid": self.need("neutron", "networks", network)}]
        body = {"name": name, "networks": networks, "flavorRef": self.need("nova", "flavors", flavor), **more}
        if image:
            body["imageRef"] = self.need("glance", "images", image)
        identity = str(self.call("POST", "nova", "/servers", {"server": body})["server"]["id"])
        self.await_status(identity, "ACTIVE")
        return identity

    def act(self, identity: str, action: str, argument: object = None, until: str = "") -> Any:
        """Send a server action such as os-stop, and wait for the status `until` if one is given."""
        answer = self.call("POST", "nova", f"/servers/{identity}/action", {action: argument})
        if until:
            self.await_status(identity, until)
        return answer

    def await_status(self, identity: str, status: str, seconds: float = 300) -> None:
        """Return when the server has this status and nothing is under way; raises LabError at ERROR or too late."""
        def reached() -> bool:
            server = self.call("GET", "nova", f"/servers/{identity}")["server"]
            if server["status"] == "ERROR" and status != "ERROR":
                raise LabError(f"{self.cloud.name}: server {identity} is in ERROR: {server.get('fault')}")
            return server["status"] == status and server["OS-EXT-STS:task_state"] is None

        patiently(f"{self.cloud.name}: server {identity} to become {status}", reached, seconds)

    def console(self, identity: str) -> str:
        """What the server has written to its serial console."""
        return str(self.act(identity, "os-getConsoleOutput", {})["output"])

    def delete(self, identity: str) -> None:
        """Delete a server and wait until it is gone."""
        self.call("DELETE", "nova", f"/servers/{identity}")
        patiently(f"{self.cloud.name}: server {identity} to be deleted", lambda: self._is_gone("nova", f"/servers/{identity}"), 120)

    def _is_gone(self, service: str, path: str) -> bool:
        """Whether the service knows nothing there."""
        try:
            self.call("GET", service, path)
        except ApiError as error:
            return error.status == 404
        return False


    # ---- volumes ----

    def volume(self, identity: str) -> dict[str, Any]:
        """All that Cinder tells of a volume."""
        return dict(self.call("GET", "cinder", f"/volumes/{identity}")["volume"])

    def volumes(self) -> list[dict[str, Any]]:
        """All volumes of the project."""
        return [dict(entry) for entry in self.call("GET", "cinder", "/volumes/detail")["volumes"]]

    def create_volume(self, name: str, size: int = 1, **more: object) -> str:
        """The id of a new volume of so many GiB that is available; `more` (volume_type, imageRef, metadata …) goes into Cinder's request."""
        identity = str(self.call("POST", "cinder", "/volumes", {"volume": {"name": name, "size": size, **more}})["volume"]["id"])
        self.await_volume(identity, "available")
        return identity

    def await_volume(self, identity: str, status: str, seconds: float = 180) -> None:
        """Return when the volume has this status; raises LabError if it has an error instead, or too late."""
        def reached() -> bool:
            now = self.volume(identity)["status"]
            if now.startswith("error") and not status.startswith("error"):
                raise LabError(f"{self.cloud.name}: volume {identity} has the status {now}")
            return bool(now == status)

        patiently(f"{self.cloud.name}: volume {identity} to become {status}", reached, seconds)

    def attach(self, server: str, volume: str, **more: object) -> str:
        """Attach a volume to a server and return its device's name, when the volume is in use."""
        asked = {"volumeAttachment": {"volumeId": volume, **more}}
        made = self.call("POST", "nova", f"/servers/{server}/os-volume_attachments", asked)["volumeAttachment"]
        self.await_volume(volume, "in-use")
        return str(made["device"])

    def detach(self, server: str, volume: str) -> None:
        """Detach a volume from a server and wait until it is available."""
        self.call("DELETE", "nova", f"/servers/{server}/os-volume_attachments/{volume}")
        self.await_volume(volume, "available")

    def delete_volume(self, identity: str) -> None:
        """Delete a volume and wait until it is gone."""
        self.call("DELETE", "cinder", f"/volumes/{identity}")
        patiently(f"{self.cloud.name}: volume {identity} to be deleted", lambda: self._is_gone("cinder", f"/volumes/{identity}"), 180)


def patiently(what: str, reached: Callable[[], bool], seconds: float) -> None:
    """Return when `reached` says so; raises LabError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > deadline:
            raise LabError(f"waited {seconds:.0f} s for {what}")
        time.sleep(POLL)
