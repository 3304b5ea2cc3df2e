# Settings of migrena. Python, loaded from beside migrena.py or by -c FILE; every name may be left out.
# A variable MIGRENA_<NAME> wins over this file, a flag wins over both. Keep passwords from others: chmod 600 config.py

# --- the clouds -------------------------------------------------------------------------------------------------------
# What keystoneauth takes: auth_url, username, password, project_name, user_domain_name, project_domain_name, or, with
# auth_type, the options of any of its plugins (v3applicationcredential, v3token, ...). region_name, interface, cacert,
# verify, cert, key and timeout go to the connection. Old credentials with tenant_name work. An admin is needed on both
# sides: only admins are told on which hypervisor an instance is. Instead of these: --src-cloud and --dst-cloud with
# clouds.yaml, or variables SRC_OS_AUTH_URL, DST_OS_AUTH_URL and so on.
SRC_CREDS = {}
DST_CREDS = {}
SRC_CLOUD = ""  # a name in clouds.yaml
DST_CLOUD = ""
DST_GLANCE_ENDPOINT = ""  # the destination's Glance, if the address in its catalog cannot be used

# --- the hypervisors --------------------------------------------------------------------------------------------------
# Nova's host names and how each is reached: an address, or a dictionary with address, port, user, key, and nbd_address
# (where the other hypervisor reaches this one, if the disks shall take another network). Hosts that are not named here
# are reached as ~/.ssh/config and the resolver say. The entry "*" is for all hosts. Where virsh, qemu-img and qemu-nbd are in a
# container (Kolla), prefix has the words that run a command in it, and paths where its folders lie outside:
#   HOSTS = {"*": {"prefix": "podman exec -i nova_libvirt", "paths": {"/var/lib/nova": "/var/lib/containers/storage/volumes/nova_compute/_data"}}}
#   HOSTS = {"cmp-a1": "192.0.2.11", "cmp-b1": {"address": "192.0.2.12", "user": "operator", "nbd_address": "198.51.100.12"}}
HOSTS = {}
SSH_USER = ""  # empty: what ~/.ssh/config says, else root
SSH_PORT = 0  # 0: what ~/.ssh/config says, else 22
SSH_KEY = ""  # empty: what ~/.ssh/config says, the agent, the usual files
SSH_CONFIG = "~/.ssh/config"
KNOWN_HOSTS = ""  # empty: what ~/.ssh/config says, else ~/.ssh/known_hosts; a host key that is not in it is refused
SUDO = "auto"  # yes, no, or auto: unless the user is root
DISK_PATH = "/var/lib/nova/instances/%s/disk"  # %s stands for the instance's id
# If the clouds differ, any of these can be set for one side alone, as SRC_HOSTS or DST_HOSTS; it overrides the common one.

# --- the copy ---------------------------------------------------------------------------------------------------------
TRANSPORT = "auto"  # nbd (nbd-server, nbd-client), qemu (qemu-nbd, qemu-img), or auto
TLS = True  # with certificates made for the run
VERIFY = True  # compare the digests of both ends before the copy takes its place
NBD_SERVER_PORT = "2666-2697"  # on the source's hypervisor: a port, or a range of which the first free one is taken
NBD_DEVICE = ""  # on the destination's hypervisor, as in /dev/nbd15; empty: the first that is free
COMPRESS = "auto"  # on, off, or auto: if the rehearsal finds the network slower than 16 MiB/s; not with the transport nbd
LIMIT_RATE = 0  # bytes per second at most, as in "50M", or by the hour, as in "08:00-18:00=20M,50M"; 0: no limit
CHUNK = "1G"  # copied at once, as two parallel chunks, each of which is then proven
WARM = False  # copy while the source runs, and stop it only for what has changed since
WARM_PASSES = 0  # passes while it runs; 0: while each is much smaller than the one before
MAX_DOWNTIME = 0  # such as "30s": a warm copy stops the source only if its downtime will not exceed this; 0: no limit
EVERY = "10m"  # how often a copy with --cutover-at sends what has changed, until then
LATE = "10m"  # how much later than --cutover-at the source is stopped at most
AWAIT_TIMEOUT = "5m"  # how long --await waits for the new instance's answer
WARM_TIMEOUT = "1h"  # after this it gives up if MAX_DOWNTIME is not met; the source runs on
BITMAP = False  # record changes in a dirty bitmap in the source's qcow2 file; it is removed once the source has stopped
COPY_IMAGE = False  # carry the source's image first if the destination lacks it
WORK_FOLDER = ""  # where images are converted (image --disk-format); empty: this machine's folder for temporary files
FOLDER = "resources"  # where `export` writes its files
PARALLEL = 8  # requests of `import` at a time
STALL_TIMEOUT = 120  # seconds without a byte after which a copy has stalled; there is no limit on the whole
SPACE_RESERVE = "64M"  # what has to stay free beside the copy, before it begins and while it goes on
RETRIES = 5  # retries of a copy that broke off or stalled, until anything more arrives; the source stays stopped
LANES = 2  # disks of an instance copied in parallel; with LIMIT_RATE one
VOLUME_TYPE = {}  # the destination's volume types by the source's, as in {"ssd": "fast"}; else the same name
NETWORK = {}  # the destination's networks by the source's, names or ids; else the same name
NEW_ADDRESSES = False  # let Neutron choose the addresses of the new instance's ports
NEW_MACS = False  # and their MAC addresses
FLOATING_IP = "none"  # for the source's floating IPs: "none", "new", or "keep" for the same address
DST_PROJECT = ""  # project of the new instance, name or id, or "same" for the one with the name of the source's
MAX_PER_HOST = 2  # copies at a time from or to one hypervisor, of all runs on this machine; later ones wait

# --- migrena itself ---------------------------------------------------------------------------------------------------
STATE_FOLDER = ""  # journals and locks; empty: ~/.local/state/migrena
LOG_FILE = ""  # every line is appended to it too, with its time, whatever the screen shows
VERBOSE = False
QUIET = False
JSON = False
DEBUG = False
