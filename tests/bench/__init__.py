"""The benchmark: migrena against every other way to move an instance's disk from one host to another.

    tests/bench/run --quick            some minutes: every way and every disk once, on small disks
    tests/bench/run --scale 1          the sizes of the question; days on the slowest wire, unless --wires and --disks choose
    tests/bench/run show [FILE]        the table (Markdown) on standard output and the picture FILE.svg, from a run's JSON lines

Two hosts, and a third one that plays Glance, are network namespaces of this machine (tests/lab). They share its kernel: dropping its
caches drops those of all hosts, and CPU that the kernel spends on behalf of nobody (writeback, a part of the network) is nobody's.
The module nbd knows no namespaces, and so migrena's transport nbd is left out here, which the run says. The ways take turns: round by
round, each round in an order of its own that the printed seed decides. Every copy is compared with its source, outside of the time.

    disks.py   what is moved                    stage.py   programs in hosts, and what they cost: CPU, bytes on the wire
    wire.py    the wire between the hosts       ways.py    the other ways, and the limits of wire and disk
    ours.py    migrena, as an operator runs it  clouds.py  the stand-in for the clouds, with disks of any size
    store.py   a Glance of ours                 proof.py   whether a copy is its source
    rounds.py  the runs and their JSON lines    show.py    medians, table and picture
"""
