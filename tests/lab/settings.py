"""The configuration files of the clouds' services, written as tables.

What is set here differs from Debian's defaults for one of three reasons: two clouds share a machine, the machine is
small (one worker each), or something has to be named (addresses, passwords, databases).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lab.orders import File, Role, Service, Spec
from lab.processes import home

PASSWORD: Final = "lab-only"  # every account's; the clouds are reachable from this machine alone
FIXED_KEY: Final = "5a" * 32  # of all encrypted volumes
NUMBER: Final = int(os.environ.get("LAB_PAIR", "0"))  # of the two clouds, where a machine has several pairs of them
CLOUDS_NAME: Final = f"clouds{NUMBER or ''}"  # of their folder and lock
NETWORK: Final = f"10.80.{NUMBER}.0/24"
ADDRESSES: Final = {"src": f"10.80.{NUMBER}.1", "dst": f"10.80.{NUMBER}.2"}  # of the clouds' APIs
KINDS: Final = {"cmp": "ns", "vm": "vm"}  # a hypervisor's name tells what it is made of
COMPUTES: Final = {f"{cloud}-{made}{number}": kind for made, kind in KINDS.items() for number in (1, 2) for cloud in ADDRESSES}  # from .11 on
WIRES: Final = {"physnet1": "tenant0", "app": "tenant1", "dual": "tenant2"}  # of Neutron's flat networks: a hypervisor's interface
TENANT: Final = "10.90.1.0/24"  # of net1 in both clouds
PORTS: Final = {"keystone": 5000, "glance": 9292, "placement": 8778, "nova": 8774, "neutron": 9696, "cinder": 8776}
DATABASES: Final = ("keystone", "glance", "placement", "nova_api", "nova", "nova_cell0", "neutron")
BUS: Final = (ADDRESSES["src"], 5672)
DATABASE: Final = (ADDRESSES["src"], 13306)  # for virtual machines that have volumes; all others use its socket
EPMD_PORT: Final = 4388 + NUMBER
DIST_PORT: Final = 25688 + NUMBER

Ini = Mapping[str, Mapping[str, object]]


@dataclass(frozen=True)
class Cloud:
    """One of the two clouds: where it lives and what it is made of."""

    name: str

    @property
    def folder(self) -> Path:
        """All that belongs to this cloud's controller."""
        return home() / CLOUDS_NAME / self.name

    @property
    def etc(self) -> Path:
        """Its configuration files."""
        return self.folder / "etc"

    @property
    def ceph(self) -> Path:
        """All that belongs to its Ceph cluster."""
        return self.folder / "ceph"

    @property
    def ceph_conf(self) -> Path:
        """What the controller's services need to know of the cluster."""
        return self.ceph / "client.conf"

    @property
    def address(self) -> str:
        """Where its APIs listen."""
        return ADDRESSES[self.name]

    @property
    def computes(self) -> tuple[str, ...]:
        """The names of its hypervisors, whether they run or not."""
        return tuple(name for name in COMPUTES if name.startswith(self.name))

    def url(self, service: str) -> str:
        """The address of one of its APIs."""
        return f"http://{self.address}:{PORTS[service]}"

    def database(self, name: str, here: bool = True) -> str:
        """What SQLAlchemy needs to reach one of its databases, from this machine or from a virtual one."""
        place, way = ("localhost", f"unix_socket={socket()}&") if here else (f"{DATABASE[0]}:{DATABASE[1]}", "")
        return f"mysql+pymysql://lab:{PASSWORD}@{place}/{name}_{self.name}?{way}charset=utf8"

    @property
    def bus(self) -> str:
        """What oslo.messaging needs to reach its virtual host on RabbitMQ."""
        return f"rabbit://lab:{PASSWORD}@{BUS[0]}:{BUS[1]}/{self.name}"


CLOUDS: Final = (Cloud("src"), Cloud("dst"))


@dataclass(frozen=True)
class Storage:
    """Where one cloud keeps what is not on its hypervisors' own disks."""

    ceph: bool = False  # it has a Ceph cluster
    images: str = "fs"  # where Glance puts new images: fs (files) or rbd (Ceph)
    volumes: tuple[str, ...] = ()  # Cinder's backends, the default one first; none: the cloud has no Cinder

    @property
    def on_controller(self) -> tuple[str, ...]:
        """The backends that the controller's cinder-volume serves; `lvm` is on the virtual machines."""
        return tuple(name for name in self.volumes if name != "lvm")


def ceph_secret(cloud: Cloud, user: str) -> str:
    """The id under which libvirt keeps the key of one of the cluster's users."""
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, f"client.{user} {cloud.folder}"))


def socket() -> Path:
    """MariaDB's socket."""
    return home() / CLOUDS_NAME / "mariadb" / "socket"


def ini(sections: Ini) -> str:
    """The text of an oslo.config file."""
    return "\n".join(f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items())
                     for name, keys in sections.items())


def _login(cloud: Cloud, service: str) -> dict[str, object]:
    """How a service logs in to Keystone."""
    return {
        "auth_type": "password", "auth_url": f"{cloud.url('keystone')}/v3", "region_name": "RegionOne",
        "username": service, "password": PASSWORD, "project_name": "service",
        "user_domain_name": "Default", "project_domain_name": "Default",
    }


def _guard(cloud: Cloud, service: str) -> dict[str, object]:
    """How a service checks the tokens that it is shown."""
    return {**_login(cloud, service), "www_authenticate_uri": cloud.url("keystone"),
            "memcached_servers": f"{cloud.address}:11211", "memcache_security_strategy": "None"}


def _database(cloud: Cloud, name: str) -> dict[str, object]:
    return {"connection": cloud.database(name), "max_pool_size": 5}


def _paths(cloud: Cloud, service: str) -> dict[str, dict[str, object]]:
    """Where locks and policies are; the configuration files are not in /etc, so these must be told."""
    return {"oslo_concurrency": {"lock_path": cloud.folder / "lock"},
            "oslo_policy": {"policy_dirs": f"/etc/{service}/policy.d"}}


def _keystone(cloud: Cloud) -> Ini:
    return {
        "DEFAULT": {"use_stderr": True},
        "database": _database(cloud, "keystone"),
        "token": {"expiration": 86400},
        **{kind: {"key_repository": cloud.folder / "fernet"} for kind in ("fernet_tokens", "fernet_receipts")},
        "credential": {"key_repository": cloud.folder / "credential"},
        # One memcached for each cloud: on a common one, two Keystones answer with each other's ids.
        "cache": {"enabled": True, "backend": "dogpile.cache.memcached", "memcache_servers": f"{cloud.address}:11211"},
        **_paths(cloud, "keystone"),
    }


def _glance(cloud: Cloud, storage: Storage) -> Ini:
    return {
        "DEFAULT": {"bind_host": cloud.address, "workers": 0, "use_stderr": True,
                    **({"enabled_backends": "rbd:rbd, fs:file", "show_image_direct_url": True} if storage.images == "rbd" else
                       {"enabled_backends": "", "node_staging_uri": f"file://{cloud.folder}/staging"})},
        "database": _database(cloud, "glance"),
        "keystone_authtoken": _guard(cloud, "glance"),
        "paste_deploy": {"flavor": "keystone", "config_file": "/etc/glance/glance-api-paste.ini"},
        **(_stores(cloud) if storage.images == "rbd" else {
            "glance_store": {"stores": "file", "default_store": "file", "filesystem_store_datadir": cloud.folder / "images"}}),
        **_paths(cloud, "glance"),
    }


def _stores(cloud: Cloud) -> Ini:
    """Glance's stores where there are several."""
    return {
        "glance_store": {"default_backend": "rbd"},
        "rbd": {"rbd_store_pool": "images", "rbd_store_user": "glance", "rbd_store_ceph_conf": cloud.ceph_conf},
        "fs": {"filesystem_store_datadir": cloud.folder / "images"},
        "os_glance_staging_store": {"filesystem_store_datadir": cloud.folder / "staging"},
        "os_glance_tasks_store": {"filesystem_store_datadir": cloud.folder / "tasks"},
    }


def _placement(cloud: Cloud) -> Ini:
    return {
        "DEFAULT": {"use_stderr": True},
        "api": {"auth_strategy": "keystone"},
        "placement_database": _database(cloud, "placement"),
        "keystone_authtoken": _guard(cloud, "placement"),
        **_paths(cloud, "placement"),
    }


def _nova_common(cloud: Cloud) -> dict[str, dict[str, object]]:
    """What Nova's controller and its hypervisors share."""
    return {
        "api": {"auth_strategy": "keystone"},
        "keystone_authtoken": _guard(cloud, "nova"),
        "service_user": {"send_service_user_token": True, **_login(cloud, "nova")},
        "placement": _login(cloud, "placement"),
        "neutron": {**_login(cloud, "neutron"), "service_metadata_proxy": True,
                    "metadata_proxy_shared_secret": PASSWORD},
        "glance": {"region_name": "RegionOne"},
        "cinder": {**_login(cloud, "nova"), "os_region_name": "RegionOne"},
        "key_manager": {"backend": "nova.keymgr.conf_key_mgr.ConfKeyManager", "fixed_key": FIXED_KEY},
        "vnc": {"enabled": False},
        "spice": {"enabled": False},
        "oslo_messaging_notifications": {"driver": "noop"},
    }


def _nova(cloud: Cloud) -> Ini:
    return {
        "DEFAULT": {"use_stderr": True, "my_ip": cloud.address, "host": f"{cloud.name}-ctl", "transport_url": cloud.bus,
                    "state_path": cloud.folder / "nova", "enabled_apis": "osapi_compute", "shutdown_timeout": 5,
                    "osapi_compute_listen": cloud.address, "osapi_compute_workers": 1, "allow_resize_to_same_host": True,
                    "max_local_block_devices": 5},  # the default of 3 has no room for swap beside two ephemeral disks
        "wsgi": {"api_paste_config": "/etc/nova/api-paste.ini"},
        "database": _database(cloud, "nova"),
        "api_database": _database(cloud, "nova_api"),
        "conductor": {"workers": 1},
        "scheduler": {"workers": 1, "discover_hosts_in_cells_interval": 5},
        "filter_scheduler": {"track_instance_changes": False,
                             "enabled_filters": "ComputeFilter,ComputeCapabilitiesFilter,ImagePropertiesFilter"},
        **_nova_common(cloud),
        **_paths(cloud, "nova"),
    }


def nova_compute(cloud: Cloud, spec: Spec, host: str, images_type: str) -> str:
    """The hypervisor's own nova.conf; `images_type` is qcow2, raw, flat, rbd or lvm."""
    where = {
        "rbd": {"images_rbd_pool": "vms", "images_rbd_ceph_conf": "/etc/ceph/ceph.conf", "rbd_user": "nova",
                "rbd_secret_uuid": ceph_secret(cloud, "nova")},
        "lvm": {"images_volume_group": "instances"},
    }
    return ini({
        "DEFAULT": {"my_ip": spec.address(host), "host": host, "transport_url": cloud.bus,
                    "state_path": "/var/lib/nova", "log_file": "/var/log/nova/nova-compute.log",
                    "compute_driver": "libvirt.LibvirtDriver",
                    "resume_guests_state_on_host_boot": True, "reserved_host_memory_mb": 256, "report_interval": 5,
                    "shutdown_timeout": 10, "vif_plugging_timeout": 300, "allow_resize_to_same_host": True},
        "libvirt": {"virt_type": "qemu", "cpu_mode": "none", "images_type": images_type, "inject_partition": -2,
                    "live_migration_inbound_addr": spec.address(host), **where.get(images_type, {})},
        # When a guest has been moved, libvirt's event and the migration itself both have Neutron activate the port on the new host. Where
        # they do so at once Neutron answers one of them with 500, and Nova puts an instance that runs into ERROR.
        "workarounds": {"handle_virt_lifecycle_events": False},
        "oslo_concurrency": {"lock_path": "/var/lib/nova/lock"},
        "oslo_policy": {"policy_dirs": "/etc/nova/policy.d"},
        **_nova_common(cloud),
    })


def cinder(cloud: Cloud, address: str, host: str, backends: Sequence[str]) -> Ini:
    """Cinder's configuration on the controller, or on a virtual machine that holds volumes itself."""
    here = address == cloud.address
    state = cloud.folder / "cinder" if here else Path("/var/lib/cinder")
    return {
        "DEFAULT": {"use_stderr": True, "my_ip": address, "host": host, "transport_url": cloud.bus, "state_path": state,
                    "api_paste_config": "/etc/cinder/api-paste.ini", "rootwrap_config": "/etc/cinder/rootwrap.conf",
                    "resource_query_filters_file": "/etc/cinder/resource_filters.json",
                    "default_volume_type": "standard", "enabled_backends": ",".join(backends),
                    "glance_api_servers": cloud.url("glance"), "allowed_direct_url_schemes": "rbd",
                    "image_conversion_dir": state / "conversion", "report_interval": 5},
        "database": {**_database(cloud, "cinder"), "connection": cloud.database("cinder", here)},
        "keystone_authtoken": {**_guard(cloud, "cinder"), "service_token_roles": "service", "service_token_roles_required": True},
        "service_user": {"send_service_user_token": True, **_login(cloud, "cinder")},
        "nova": {**_login(cloud, "cinder"), "interface": "internal"},
        "key_manager": {"backend": "cinder.keymgr.conf_key_mgr.ConfKeyManager", "fixed_key": FIXED_KEY},
        "oslo_concurrency": {"lock_path": state / "lock"},
        "oslo_policy": {"policy_dirs": "/etc/cinder/policy.d"},
        "oslo_messaging_notifications": {"driver": "noop"},
        **{name: {"volume_backend_name": name, **_backend(cloud, name, address, state)} for name in backends},
    }


def _backend(cloud: Cloud, name: str, address: str, state: Path) -> dict[str, object]:
    """One of Cinder's backends: rbd (Ceph), nfs (files) or lvm (by iSCSI)."""
    if name == "rbd":
        return {"volume_driver": "cinder.volume.drivers.rbd.RBDDriver", "rbd_pool": "volumes", "rbd_user": "cinder",
                "rbd_ceph_conf": cloud.ceph_conf, "rbd_secret_uuid": ceph_secret(cloud, "cinder")}
    if name == "nfs":
        return {"volume_driver": "cinder.volume.drivers.nfs.NfsDriver", "nfs_shares_config": cloud.etc / "cinder/shares",
                "nfs_mount_point_base": state / "mnt", "nfs_mount_attempts": 1,
                "nas_secure_file_operations": False, "nas_secure_file_permissions": False}
    return {"volume_driver": "cinder.volume.drivers.lvm.LVMVolumeDriver", "volume_group": "volumes", "lvm_type": "thin",
            "target_helper": "lioadm", "target_protocol": "iscsi", "target_ip_address": address}


def _neutron(cloud: Cloud) -> Ini:
    return {
        "DEFAULT": {"use_stderr": True, "transport_url": cloud.bus, "state_path": cloud.folder / "neutron",
                    "core_plugin": "ml2", "bind_host": cloud.address,
                    # Neither has an agent here: routers, floating IPs and trunks are objects of the API that carry no packet.
                    "service_plugins": "router,trunk",
                    "api_workers": 0, "rpc_workers": 0, "rpc_state_report_workers": 0,  # all in one process
                    "api_paste_config": "/usr/share/neutron-common/api-paste.ini", "api_extensions_path": ""},
        "experimental": {"linuxbridge": True},  # since Zed the mechanism must be asked for by this name
        "nova": _login(cloud, "nova"),
        "placement": _login(cloud, "placement"),
        "database": _database(cloud, "neutron"),
        "keystone_authtoken": _guard(cloud, "neutron"),
        **_paths(cloud, "neutron"),
    }


def _ml2() -> Ini:
    return {
        "ml2": {"type_drivers": "flat,local", "tenant_network_types": "local", "mechanism_drivers": "linuxbridge",
                "extension_drivers": "port_security,dns"},
        "ml2_type_flat": {"flat_networks": ",".join((*WIRES, "public"))},
    }


def _agent(cloud: Cloud, host: str) -> Ini:
    return {
        "DEFAULT": {"state_path": "/var/lib/neutron", "host": host, "transport_url": cloud.bus, "core_plugin": "ml2",
                    # A question asked before Neutron listens is lost: ask again soon, not after a minute.
                    "rpc_response_timeout": 20, "log_file": "/var/log/neutron/agent.log"},
        "experimental": {"linuxbridge": True},
        "agent": {"root_helper": "sudo /usr/bin/neutron-rootwrap /etc/neutron/rootwrap.conf",
                  "root_helper_daemon": "sudo /usr/bin/neutron-rootwrap-daemon /etc/neutron/rootwrap.conf",
                  "report_interval": 10},
        "oslo_concurrency": {"lock_path": "/var/lib/neutron/lock"},
    }


def _bridges() -> Ini:
    return {
        "linux_bridge": {"physical_interface_mappings": ",".join(f"{network}:{end}" for network, end in WIRES.items())},
        "vxlan": {"enable_vxlan": False},
        "securitygroup": {"enable_security_group": True, "firewall_driver": "iptables", "enable_ipset": False},
    }


def _dhcp() -> Ini:
    return {"DEFAULT": {"interface_driver": "linuxbridge", "log_file": DHCP_LOG}}


def write_controller(cloud: Cloud, storage: Storage) -> list[str]:
    """Write the configuration of the cloud's controller, 0600: passwords are in it. Returns the names of files that are not as they were."""
    files: dict[str, Ini] = {
        "keystone/keystone.conf": _keystone(cloud), "glance/glance-api.conf": _glance(cloud, storage),
        "placement/placement.conf": _placement(cloud), "nova/nova.conf": _nova(cloud),
        "neutron/neutron.conf": _neutron(cloud), "neutron/ml2_conf.ini": _ml2(),
        **({"cinder/cinder.conf": cinder(cloud, cloud.address, f"{cloud.name}-ctl", storage.on_controller)} if storage.volumes else {}),
    }
    changed = [name for name, sections in files.items() if write_private(cloud.etc / name, ini(sections))]
    for name in ("lock", "images", "staging", "tasks", "nova", "neutron", "cinder", "log"):
        (cloud.folder / name).mkdir(exist_ok=True)
    for name in ("fernet", "credential"):  # what `keystone-manage fernet_setup` and `credential_setup` would make
        folder = cloud.folder / name
        folder.mkdir(mode=0o700, exist_ok=True)
        for key in ("0", "1"):
            if not (folder / key).exists():
                (folder / key).touch(mode=0o600)
                (folder / key).write_bytes(base64.urlsafe_b64encode(os.urandom(32)))
    return changed


def write_private(path: Path, text: str) -> bool:
    """Write a file, 0600; False if it was there with this text."""
    if path.exists() and path.read_text() == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(text)
    return True


def write_bus(folder: Path) -> dict[str, str]:
    """Write RabbitMQ's configuration and say what environment it needs: one account, one virtual host a cloud."""
    folder.mkdir(parents=True, exist_ok=True)
    salt = b"mgra"
    digest = base64.b64encode(salt + hashlib.sha256(salt + PASSWORD.encode()).digest()).decode()
    (folder / "definitions.json").write_text(json.dumps({
        "users": [{"name": "lab", "password_hash": digest, "tags": "",
                   "hashing_algorithm": "rabbit_password_hashing_sha256"}],
        "vhosts": [{"name": cloud.name} for cloud in CLOUDS],
        "permissions": [{"user": "lab", "vhost": cloud.name, "configure": ".*", "write": ".*", "read": ".*"}
                        for cloud in CLOUDS],
    }))
    (folder / "rabbitmq.conf").write_text(
        f"listeners.tcp.1 = {BUS[0]}:{BUS[1]}\nloopback_users = none\nload_definitions = {folder}/definitions.json\n"
        "vm_memory_high_watermark.absolute = 512MB\ndisk_free_limit.absolute = 100MB\n"
        "log.console = true\nlog.console.level = warning\nlog.file = false\n")
    (folder / "enabled_plugins").write_text("[].\n")
    return {
        "HOME": str(folder), "RABBITMQ_NODENAME": "migrena-lab@localhost", "ERL_EPMD_PORT": str(EPMD_PORT),
        "ERL_EPMD_ADDRESS": "127.0.0.1", "RABBITMQ_DIST_PORT": str(DIST_PORT), "RABBITMQ_CONF_ENV_FILE": "/dev/null",
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"), "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
        "RABBITMQ_LOG_BASE": str(folder / "log"), "RABBITMQ_PID_FILE": str(folder / "pid"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        # +sbwt none: an idle broker must not spin on one of two cores
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +sbwt none",
    }


LIBVIRTD: Final = """\
listen_tls = 0
listen_tcp = 1
auth_tcp = "none"
unix_sock_group = "libvirt"
unix_sock_rw_perms = "0770"
auth_unix_ro = "none"
auth_unix_rw = "none"
host_uuid = "{}"
"""
# Debian 12's ebtables cannot delete the rules by which Neutron's agent keeps a guest with port security to its MAC address.
EBTABLES: Final = File("/usr/local/sbin/ebtables", Path(__file__).with_name("ebtables").read_text(), 0o755)
GO: Final = "/run/lab/go"  # nova-compute and the agent wait for this: before the APIs answer they only burn time
GO_DHCP: Final = "/run/lab/go-dhcp"  # the DHCP agent waits for this
DHCP_LOG: Final = "/var/log/neutron/dhcp.log"


def compute_role(cloud: Cloud, spec: Spec, host: str, images_type: str) -> Role:
    """What makes a host a hypervisor of this cloud."""
    identity = uuid.uuid5(uuid.NAMESPACE_DNS, f"{host}.{spec.folder}")
    files = [
        File("/etc/nova/nova.conf", nova_compute(cloud, spec, host, images_type), 0o640, "nova"),
        File("/etc/nova/nova-compute.conf", ""),  # Debian's would overrule virt_type
        File("/etc/neutron/neutron.conf", ini(_agent(cloud, host)), 0o640, "neutron"),
        File("/etc/neutron/plugins/ml2/linuxbridge_agent.ini", ini(_bridges())),
        File("/etc/neutron/dhcp_agent.ini", ini(_dhcp())),
        EBTABLES,
        # Live migration goes from libvirtd to libvirtd; in here plain TCP without a password will do.
        File("/etc/libvirt/libvirtd.conf", LIBVIRTD.format(identity)),
        File("/etc/libvirt/qemu.conf", 'security_driver = "none"\ncgroup_controllers = [ ]\n'),
    ]
    setup = [
        *([["modprobe", "-a", "tun", "br_netfilter"]] if spec.kinds[host] == "vm" else []),  # udev would
        ["rm", "-f", "/etc/libvirt/qemu/networks/autostart/default.xml"],
        # libvirt asks every emulator it finds what it can do: leave it one
        ["find", "/usr/bin/", "-name", "qemu-system-*", "!", "-name", "qemu-system-x86_64", "-delete"],
        *(line for wire in WIRES.values() for line in (
            ["ip", "link", "add", wire, "type", "veth", "peer", "name", f"{wire}-end"],
            ["ip", "link", "set", wire, "up"],
            ["ip", "link", "set", f"{wire}-end", "up"])),
    ]
    return Role(files, [*_compute_services(), *([_dhcp_service()] if host == dhcp_host(cloud) else [])], setup)


def dhcp_host(cloud: Cloud) -> str:
    """The hypervisor of a cloud that has its DHCP agent; it is made of namespaces."""
    return next(name for name in cloud.computes if COMPUTES[name] == "ns")


def _dhcp_service() -> Service:
    """The DHCP agent, which starts when a test wants more networks than net1."""
    return Service("dhcp-agent", ["/usr/bin/neutron-dhcp-agent", "--config-file", "/etc/neutron/neutron.conf",
                                  "--config-file", "/etc/neutron/dhcp_agent.ini"],
                   "neutron", {"HOME": "/var/lib/neutron"}, GO_DHCP, ("/var/log/neutron", "/var/lib/neutron/lock"))


def _compute_services() -> list[Service]:
    """The programs of a hypervisor, in the order in which they start."""
    agent = ["/usr/bin/neutron-linuxbridge-agent", "--config-file", "/etc/neutron/neutron.conf",
             "--config-file", "/etc/neutron/plugins/ml2/linuxbridge_agent.ini"]
    return [
        Service("virtlogd", ["/usr/sbin/virtlogd"]),
        Service("libvirtd", ["/usr/sbin/libvirtd", "--listen"], after="/run/libvirt/virtlogd-sock"),
        Service("neutron-agent", agent, "neutron", {"HOME": "/var/lib/neutron"}, GO,
                ("/var/log/neutron", "/var/lib/neutron/lock")),
        Service("nova-compute", ["/usr/bin/nova-compute", "--config-file", "/etc/nova/nova.conf"], "nova",
                {"HOME": "/var/lib/nova"}, GO, ("/var/log/nova", "/var/lib/nova", "/var/lib/nova/lock")),
    ]
