"""migrena's lab: hypervisors and whole OpenStack clouds on one Debian machine, for tests and for trying things.

- processes  what the lab starts, and how it ends exactly that
- packages   what the lab installs
- hosts      hypervisors (namespaces or virtual machines): `with hosts(folder) as lab: lab["src"].run("hostname")`
- host_init  process 1 of such a hypervisor
- image      the virtual machines' kernel and root disk
- guest      a small image that boots, counts its boots and writes records
- settings   the configuration files of the clouds' services
- clouds     the two clouds "src" and "dst", up and down
- api        OpenStack's REST interfaces, as far as the lab needs them
"""
