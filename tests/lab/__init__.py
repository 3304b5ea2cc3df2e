"""migrena's lab: hypervisors and whole OpenStack clouds on one Debian machine, for tests and for trying things.

For those who use it:
- hosts       hypervisors alone: `with hosts(folder, {"src": "ns"}) as lab: lab["src"].run("hostname")`
- clouds      the two clouds "src" and "dst"; `python3 tests/lab` on the command line
- api         their REST interfaces, as far as the lab needs them
- guest       a small image that boots, counts its boots and writes records (guest_init.sh is its process 1)
- packages    what the lab installs

Underneath:
- processes   what the lab starts, and how it ends exactly that; roster: the same by name, kept in a file
- orders      what a hypervisor is told to be; host_init: its process 1, which does so
- namespaces  hypervisors as namespaces of this machine
- machines    hypervisors as virtual machines; image: their kernel and root disk
- settings    the configuration files of the clouds' services
- controllers the services of a cloud, and their accounts
- ceph        a Ceph cluster for a cloud; volumes: its Cinder
- stores      MariaDB, RabbitMQ, memcached and the databases
"""
