"""The two clouds "src" and "dst": from nothing to servers that boot, and away again.

    lab = Clouds.running()
    server = lab.api("src", "demo").create("victim")
    lab.host("src-cmp1").run("virsh", "list")

Everything is kept in the folder `clouds` of the lab's own; what was started is written down there with pids and start
times. A second `up` starts only what does not run.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

from lab.api import Api, ApiError, patiently
from lab.ceph import Cluster
from lab.controllers import start_controller
from lab.guest import PACKAGES, guest_image
from lab.hosts import Host, Lab, claim
from lab.networks import bring_up_networks, lay_wires, pool, remove_wires
from lab.orders import Role, Spec
from lab.packages import CEPH, CEPH_CLIENT, CINDER, HOSTS, MACHINES, install
from lab.processes import (
    LabError,
    Process,
    alone,
    command,
    home,
    say,
)
from lab.roster import Roster
from lab.settings import (
    CLOUDS,
    CLOUDS_NAME,
    COMPUTES,
    GO,
    NETWORK,
    PASSWORD,
    TENANT,
    Cloud,
    Storage,
    compute_role,
    nova_compute,
    write_controller,
)
from lab.stores import CORE, STORES, VOLUMES, in_parallel, prepare_databases, start_stores
from lab.volumes import BACKENDS, EXPORT, MOUNT_NFS, exported, has_reported, lvm_role, types_and_quotas, write_nfs

CONTROLLERS: Final = (
    "keystone", "glance-api", "placement-api", "nova-api", "nova-conductor", "nova-scheduler", "neutron-common",
    "mariadb-server", "rabbitmq-server", "memcached", "python3-pymysql",
    "uwsgi-core", "uwsgi-plugin-python3")
HYPERVISORS: Final = ("nova-compute-qemu", "neutron-linuxbridge-agent", "neutron-dhcp-agent", "libvirt-daemon-system", "libvirt-clients",
                      "qemu-system-x86", "ovmf", "ebtables", "iptables", "genisoimage", *CEPH_CLIENT)
NEEDED: Final = (*HOSTS, *MACHINES, *PACKAGES, *CONTROLLERS, *HYPERVISORS)
FLAVORS: Final[Mapping[str, Mapping[str, int]]] = {
    "tiny": {"vcpus": 1, "ram": 128, "disk": 1},
    "small": {"vcpus": 1, "ram": 192, "disk": 2},
    "large": {"vcpus": 1, "ram": 256, "disk": 12},
    "several": {"vcpus": 1, "ram": 128, "disk": 1, "OS-FLV-EXT-DATA:ephemeral": 3, "swap": 16},
}
# What has to start again when a file of a controller changes; the others' files are always the same.
READERS: Final = {"glance/glance-api.conf": ("glance",), "cinder/cinder.conf": ("cinder", "cinder-scheduler", "cinder-volume")}
PATIENCE: Final = {"ns": 180.0, "vm": 900.0}  # seconds for a nova-compute to report
IMAGES_TYPES: Final = ("qcow2", "raw", "flat", "rbd", "lvm")


@dataclass(frozen=True)
class Options:
    """What the clouds are made of; kept with them."""

    hosts: tuple[str, ...] = ("src-cmp1", "dst-cmp1")  # the hypervisors that are to run
    images: Mapping[str, str] = field(default_factory=dict)  # hypervisor: images_type, where it is not qcow2
    glance: tuple[str, ...] = ()  # clouds whose Glance has its images on Ceph
    volumes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # cloud: backends of its Cinder; without them it has none

    def storage(self, cloud: Cloud) -> Storage:
        """Where this cloud keeps things; it has a Ceph cluster if anything is to be there."""
        volumes = self.volumes.get(cloud.name, ())
        on_ceph = "rbd" in (*volumes, *(self.images.get(host) for host in cloud.computes))
        images = "rbd" if cloud.name in self.glance else "fs"
        return Storage(on_ceph or images == "rbd", images, volumes)

    @property
    def needed(self) -> tuple[str, ...]:
        """Debian's packages for them."""
        storages = [self.storage(cloud) for cloud in CLOUDS]
        more = ((CEPH, any(storage.ceph for storage in storages)), (CINDER, any(storage.volumes for storage in storages)))
        return (*NEEDED, *(package for packages, wanted in more if wanted for package in packages))

    def with_storage(self, name: str, *what: str) -> Options:
        """The same with this storage in a cloud: `glance` and `nova` are then on Ceph, anything else is a backend of Cinder."""
        images = {host: "rbd" for host in Cloud(name).computes if "nova" in what}
        glance = tuple(cloud.name for cloud in CLOUDS if cloud.name in self.glance or (cloud.name == name and "glance" in what))
        backends = tuple(dict.fromkeys((*self.volumes.get(name, ()), *(word for word in what if word in BACKENDS))))
        return replace(self, images={**self.images, **images}, glance=glance,
                       volumes={**self.volumes, **({name: backends} if backends else {})})

    def with_hosts(self, *names: str) -> Options:
        """The same with these hypervisors too."""
        return replace(self, hosts=tuple(name for name in COMPUTES if name in (*self.hosts, *names)))

    @classmethod
    def kept(cls) -> Options | None:
        """Those of the clouds that were made here; None if there are none."""
        path = home() / CLOUDS_NAME / "options.json"
        if not path.exists():
            return None
        content = json.loads(path.read_text())
        volumes = {name: tuple(backends) for name, backends in content.get("volumes", {}).items()}
        return cls(tuple(content["hosts"]), content["images"], tuple(content.get("glance", ())), volumes)

    def keep(self) -> None:
        """Write them down."""
        path = home() / CLOUDS_NAME / "options.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)))


class Clouds:
    """The two clouds of this machine, running or to be started."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.folder = home() / CLOUDS_NAME
        self.roster = Roster(self.folder)
        self.spec = Spec(self.folder / "hosts", COMPUTES, NETWORK, disk="40G", memory=2048,
                         image="compute", keep=True)

    @classmethod
    def running(cls) -> Clouds:
        """The clouds that are up. Raises LabError if they are not."""
        options = Options.kept()
        if not options or not cls(options).roster.processes:
            raise LabError("the clouds are not up; run `python3 tests/lab up`")
        return cls(options)

    def api(self, cloud: str, user: str = "admin", project: str = "") -> Api:
        """REST access to a cloud as `admin` or `demo`, in the project of the same name unless another is named."""
        return Api(Cloud(cloud), user, project or user)

    @property
    def lab(self) -> Lab:
        """The hypervisors. Raises LabError if there are none."""
        lab = Lab.recorded(self.spec.tag)
        if not lab:
            raise LabError("the hypervisors do not run")
        return lab

    def host(self, name: str) -> Host:
        """The hypervisor of this name."""
        return self.lab[name]

    @property
    def config(self) -> Path:
        """The config.py for migrena that fits these clouds."""
        return self.folder / "config.py"

    # ---- up ----

    def up(self) -> None:
        """Bring up whatever does not run. Raises LabError with the cause and the log."""
        install(self.options.needed)
        with alone(CLOUDS_NAME):
            self.roster = Roster(self.folder)  # what others have started since counts too
            self.options.keep()
            for cloud in CLOUDS:
                self._write(cloud)
            self._start_hosts()
            say(f"{', '.join(self.options.hosts)} answer on SSH")
            in_parallel(lambda work: work(), (self._start_stores, *self._clusters()))
            in_parallel(self._start_controller, CLOUDS)
            say("the controllers' APIs answer")
            in_parallel(self._await_computes, CLOUDS)
            say("the hypervisors have reported")
            in_parallel(self._resources, CLOUDS)
            self._write_config()
            for host in self.options.hosts:
                self._settle_images_type(host)
            say("both clouds are up")

    def _write(self, cloud: Cloud) -> None:
        """Write the configuration of a cloud's services; those that run with another one are ended, and start again with the others."""
        changed = write_controller(cloud, self.options.storage(cloud))
        Cluster(cloud).write()
        write_nfs(cloud)
        self.roster.stop([f"{cloud.name}-{name}" for file, names in READERS.items() if file in changed for name in names])

    def _start_stores(self) -> None:
        """What both clouds stand on, with their databases."""
        start_stores(self.roster)
        say("MariaDB, RabbitMQ and memcached run")
        prepare_databases(self.roster, CORE, CLOUDS)
        prepare_databases(self.roster, VOLUMES, [cloud for cloud in CLOUDS if self.options.storage(cloud).volumes])
        say("the databases are ready")

    def _clusters(self) -> list[Callable[[], None]]:
        """What starts the Ceph clusters, one for each cloud that has one."""
        def start(cloud: Cloud) -> None:
            Cluster(cloud).start(self.roster)
            say(f"Ceph of {cloud.name} is up")

        return [functools.partial(start, cloud) for cloud in CLOUDS if self.options.storage(cloud).ceph]

    def _role(self, cloud: Cloud, host: str) -> Role:
        """What makes a host a hypervisor of this cloud, ready for storage that the cloud may get later."""
        made = compute_role(cloud, self.spec, host, self.options.images.get(host, "qcow2"))
        files = (*made.files, *Cluster(cloud).files_of_hypervisor())
        if COMPUTES[host] == "vm":
            made = replace(made, files=files)
            return lvm_role(cloud, self.spec, host, made) if "lvm" in self.options.storage(cloud).volumes else made
        # qemu has a mount namespace of its own, and sees what is mounted after its start only if mounts are shared.
        return replace(made, files=(*files, MOUNT_NFS), setup=(*made.setup, ["mount", "--make-rshared", "/"]),
                       binds={EXPORT: str(exported(cloud))})

    def _start_hosts(self) -> None:
        """The hypervisors' machines with libvirtd, and the controllers' addresses beside them."""
        before = Lab.recorded(self.spec.tag) or claim(self.spec, None)
        lab = Lab(self.spec, None, {host.name: host.process for host in before})
        lab.up({name: self._role(cloud, name) for cloud in CLOUDS for name in cloud.computes if name in self.options.hosts})
        present = command("ip", "-o", "addr", "show", "dev", self.spec.tag)
        for cloud in CLOUDS:
            if f" {cloud.address}/" not in present:
                command("ip", "addr", "add", f"{cloud.address}/24", "dev", self.spec.tag)

    def _start_controller(self, cloud: Cloud) -> None:
        """Start one cloud's services, and return when all its APIs answer."""
        start_controller(self.roster, self.api(cloud.name), self.options.storage(cloud))

    # ---- the hypervisors' services ----

    def _await_computes(self, cloud: Cloud) -> None:
        """Let the hypervisors' services start, and return when Nova and Neutron have heard of them all since then."""
        names = [name for name in cloud.computes if name in self.options.hosts]
        since = ""  # what they said before counts only if they have not been started anew
        for name in names:
            if self.host(name).run("test", "-e", GO, check=False).returncode:
                since = datetime.now(timezone.utc).isoformat(" ")
                self.host(name).run("touch", GO)
        api = self.api(cloud.name)
        patiently(f"nova-compute and the network agent on {', '.join(names)}; their logs are in /var/log there",
                  lambda: all(self._reported(api, name, since) for name in names), max(PATIENCE[COMPUTES[name]] for name in names))

    def _reported(self, api: Api, host: str, since: str) -> bool:
        """True if Nova and Neutron have heard of this hypervisor since then, and Nova knows its cell."""
        try:
            services = api.call("GET", "nova", f"/os-services?binary=nova-compute&host={host}")["services"]
            mapped = api.call("GET", "nova", "/os-hypervisors")["hypervisors"]
            agents = api.call("GET", "neutron", f"/agents?host={host}&binary=neutron-linuxbridge-agent")["agents"]
        except ApiError as error:
            if error.status < 500:
                raise
            return False  # a service that still wakes up
        heard = [(entry["updated_at"] or "").replace("T", " ") for entry in services if entry["state"] == "up"]
        heard_of = [entry["heartbeat_timestamp"] for entry in agents if entry["alive"]]
        known = self.spec.fqdn(host) in (entry["hypervisor_hostname"] for entry in mapped)
        return known and any(time >= since for time in heard) and any(time >= since for time in heard_of)

    def set_images_type(self, host: str, images_type: str) -> None:
        """Let new disks on this hypervisor be of another kind; returns when its nova-compute runs again."""
        if host not in self.options.hosts or images_type not in IMAGES_TYPES:
            raise LabError(f"one of {', '.join(self.options.hosts)} and one of {', '.join(IMAGES_TYPES)}, please")
        cloud = next(cloud for cloud in CLOUDS if host in cloud.computes)
        storage = self.options.storage(cloud)
        if (images_type == "rbd" and not storage.ceph) or (images_type == "lvm" and (COMPUTES[host], "lvm" in storage.volumes) != ("vm", True)):
            raise LabError(f"{host} has nothing to put {images_type} disks on; see `up --storage`")
        self.options = replace(self.options, images={**self.options.images, host: images_type})
        self.options.keep()
        text = nova_compute(cloud, self.spec, host, images_type)
        self.host(host).run("sh", "-c", "cat >/etc/nova/nova.conf", input=text)
        self.restart(host, "nova-compute")

    def _settle_images_type(self, host: str) -> None:
        """Let a hypervisor that ran before have the images_type that it should have now."""
        wanted = self.options.images.get(host, "qcow2")
        if f"images_type = {wanted}\n" not in self.host(host).run("cat", "/etc/nova/nova.conf").stdout:
            self.set_images_type(host, wanted)

    def restart(self, host: str, service: str) -> None:
        """Restart nova-compute (or another service) of a hypervisor; returns when Nova sees it alive again."""
        machine, cloud = self.host(host), next(cloud for cloud in CLOUDS if host in cloud.computes)
        api = self.api(cloud.name)

        def seen() -> dict[str, str]:
            return {entry["host"]: entry["updated_at"]
                    for entry in api.call("GET", "nova", "/os-services?binary=nova-compute")["services"]}

        pid = machine.run("cat", f"/run/lab/{service}.pid").stdout.strip()
        machine.run("kill", pid)
        patiently(f"{service} on {host} to end", lambda: pid not in machine.run("ls", "/proc").stdout.split(), 60)
        before = seen()[host]
        patiently(f"{service} on {host} to report", lambda: seen()[host] != before, PATIENCE[COMPUTES[host]])

    # ---- what users find ----

    def _resources(self, cloud: Cloud) -> None:
        """Flavors, a network and images, as far as they are missing."""
        api, storage = self.api(cloud.name), self.options.storage(cloud)
        if storage.volumes:
            machines = [name for name in cloud.computes if COMPUTES[name] == "vm" and name in self.options.hosts]
            patiently(f"{cloud.name}: Cinder's services to report", lambda: has_reported(self.roster, api, storage, machines),
                      PATIENCE["vm" if machines else "ns"])
            types_and_quotas(api, storage)
        for name, sizes in FLAVORS.items():
            api.ensure("nova", "flavors", name, **sizes)
        # Without port security: the agent would write dozens of rules for every guest. Debian's ebtables does not delete all of them when it
        # should, and the agent then tries for ever; networks that have port security (lab.networks) rely on tests/lab/ebtables, which does.
        network = api.ensure("neutron", "networks", "net1", shared=True, port_security_enabled=False, **{
            "provider:network_type": "flat", "provider:physical_network": "physnet1"})
        api.ensure("neutron", "subnets", "subnet1", network_id=network, ip_version=4, cidr=TENANT, enable_dhcp=False, gateway_ip=None,
                   allocation_pools=[pool(cloud, TENANT)])
        if not api.find("glance", "images", "guest"):
            api.upload("guest", guest_image())
        if cloud.name == "dst" and not api.find("glance", "images", "guest-other"):
            api.upload("guest-other", _other_content(guest_image()))

    def networks(self, shared: bool = False) -> None:
        """Bring up `app`, `dual`, `public` and a router in both clouds, with DHCP, as far as they are missing (see lab.networks).

        Each cloud's hypervisors that are namespaces are connected; with `shared` those of both clouds are on the same wires. A hypervisor
        that is started anew is off the wires, without its DHCP agent, until this is called again.
        """
        with alone(CLOUDS_NAME):
            for host in self.lab:
                lay_wires(host, shared)
            in_parallel(lambda cloud: bring_up_networks(self.api(cloud.name), self.lab), CLOUDS)
        say("the networks app, dual and public are up")

    def _write_config(self) -> None:
        """Write migrena's config.py for these clouds, 0600."""
        key, known = self.spec.key, self.spec.known_hosts
        hosts = {name: {"address": self.spec.address(name), "user": "root", "key": str(key)}
                 for name in self.options.hosts}
        values: dict[str, object] = {f"{cloud.name.upper()}_CREDS": credentials(cloud, "admin") for cloud in CLOUDS}
        values |= {"HOSTS": hosts, "KNOWN_HOSTS": str(known), "DISK_PATH": "/var/lib/nova/instances/%s/disk"}
        self.config.touch(mode=0o600)
        self.config.write_text("# Written by tests/lab for its two clouds.\n"
                               + "".join(f"{name} = {value!r}\n" for name, value in values.items()))

    # ---- down ----

    def down(self) -> None:
        """End all that was started, and nothing else; the clouds' data stays."""
        with alone(CLOUDS_NAME):
            self.roster = Roster(self.folder)
            lab = Lab.recorded(self.spec.tag)
            if not lab and not self.roster.processes:
                say("the clouds are not up")
                return
            if lab:
                say("ending the hypervisors")
                lab.down()
                remove_wires(self.spec)
            say("ending the controllers")
            below = [name for part in ("ceph-osd", "ceph-mon") for name in self.roster.processes if name.endswith(part)]
            self.roster.stop([name for name in self.roster.processes if name not in (*STORES, *below)], seconds=5)
            for name in (*below, *STORES):
                self.roster.stop([name], seconds=30)
            say("the clouds are down; their data is kept")

    def state(self) -> list[tuple[str, Process]]:
        """Every program and hypervisor that was started."""
        lab = Lab.recorded(self.spec.tag)
        return [*sorted(self.roster.processes.items()), *((host.name, host.process) for host in lab or ())]


def credentials(cloud: Cloud, user: str) -> dict[str, str]:
    """What logs a user in, in the words of keystoneauth."""
    return {"auth_url": f"{cloud.url('keystone')}/v3", "username": user, "password": PASSWORD, "project_name": user,
            "user_domain_name": "Default", "project_domain_name": "Default"}


def _other_content(image: Path) -> Path:
    """A guest that boots like the other but is not equal: some bytes behind its last partition differ."""
    other = image.with_name(image.name.replace("guest-", "other-"))
    if not other.exists():
        draft = other.with_suffix(".new")
        shutil.copy(image, draft)
        command("qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 127M 512k", draft)
        draft.rename(other)
    return other


def purge(everything: bool = False) -> None:
    """End the clouds and delete their data; with `everything` also what is kept to make the next start quick."""
    Clouds(Options.kept() or Options()).down()
    for name in (CLOUDS_NAME, *(["cache", "log"] if everything else [])):
        if (home() / name).exists():
            shutil.rmtree(home() / name)
