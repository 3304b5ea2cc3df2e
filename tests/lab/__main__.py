"""`python3 tests/lab`: two OpenStack clouds on this machine, to try migrena on."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # so that `lab` is a package, however we were started

from lab.clouds import IMAGES_TYPES, Clouds, Options, credentials, purge
from lab.processes import LabError, say
from lab.settings import ADDRESSES, COMPUTES, Cloud
from lab.volumes import BACKENDS

STORAGE = {"ceph": ("glance", "nova", "rbd")}  # short for several


def up(words: argparse.Namespace) -> None:
    """Start whatever does not run."""
    if os.geteuid():
        raise LabError("namespaces, bridges and Debian packages need root")
    kept = Options.kept()
    chosen = [name for name, kind in COMPUTES.items() if kind == (words.kind or "ns") and int(name[-1]) <= (words.computes or 1)]
    asked = bool(words.kind or words.computes)
    options = kept.with_hosts(*(chosen if asked else ())) if kept else Options(tuple(chosen))
    for cloud, what in words.storage:
        options = options.with_storage(cloud, *what)
    clouds = Clouds(options)
    clouds.up()
    if words.networks:
        clouds.networks(words.networks == "shared")
    network = clouds.api("dst").need("neutron", "networks", "net1")
    print(f"\nA server to move:  {_self()} server src victim\n"
          f"Then try:          ./migrena.py -c {clouds.config} -s $({_self()} id src victim) "
          f"-d arrived -f tiny -i guest -e \"{{'nics': [{{'net-id': '{network}'}}]}}\" -a\n"
          f"And look:          {_self()} console dst arrived\n"
          f"In the end:        {_self()} down   (or purge, to delete the data too)")


def _self() -> str:
    return f"python3 {os.path.relpath(Path(__file__).parent)}"


def _storage(word: str) -> tuple[str, list[str]]:
    """The cloud and the storage that `dst:glance,rbd` names."""
    cloud, _, names = word.partition(":")
    what = [part for name in names.split(",") for part in STORAGE.get(name, (name,))]
    if cloud not in ADDRESSES or not {*what} <= {"glance", "nova", *BACKENDS}:
        raise argparse.ArgumentTypeError(f"not a cloud and its storage: {word}")
    return cloud, what


def down(_: argparse.Namespace) -> None:
    """Stop what `up` has started; the data stays."""
    Clouds(Options.kept() or Options()).down()


def clear(words: argparse.Namespace) -> None:
    """Stop everything and delete the clouds' data."""
    purge(words.all)
    say("the clouds are gone")


def status(_: argparse.Namespace) -> None:
    """Say what runs."""
    state = Clouds(Options.kept() or Options()).state()
    for name, process in state:
        print(f"{name:20} pid {process.pid:<8} {'runs' if process.alive() else 'HAS ENDED'}")
    if not state:
        print("the clouds are not up")
    if any(not process.alive() for _, process in state):
        raise LabError("not all runs that was started; `up` starts the rest again, the logs are in "
                       f"{Clouds.running().folder}/log")


def env(words: argparse.Namespace) -> None:
    """Print shell variables for OpenStack's own clients: eval "$(... env src)"."""
    values = {**credentials(Cloud(words.cloud), words.user), "identity_api_version": "3", "region_name": "RegionOne"}
    for name, value in values.items():
        print(f"export OS_{name.upper()}={value}")


def server(words: argparse.Namespace) -> None:
    """Create a server, wait until it is ACTIVE, print its id."""
    api = Clouds.running().api(words.cloud, words.user)
    print(api.create(words.name, words.image, words.flavor, words.network))


def identity(words: argparse.Namespace) -> None:
    """Print a server's id."""
    print(Clouds.running().api(words.cloud).need("nova", "servers", words.name))


def console(words: argparse.Namespace) -> None:
    """Print what a server has written to its serial console."""
    api = Clouds.running().api(words.cloud)
    print(api.console(api.need("nova", "servers", words.name)), end="")


def delete(words: argparse.Namespace) -> None:
    """Delete a server and its ports, and wait until it is gone."""
    api = Clouds.running().api(words.cloud)
    server = api.need("nova", "servers", words.name)
    ports = api.call("GET", "neutron", f"/ports?device_id={server}")["ports"]
    api.delete(server)
    for port in ports:  # Nova deletes only those that it has made
        if api.call("GET", "neutron", f"/ports?id={port['id']}")["ports"]:
            api.call("DELETE", "neutron", f"/ports/{port['id']}")


def volume(words: argparse.Namespace) -> None:
    """Create a volume, print its id; one that is attached to a server is deleted with that server."""
    api = Clouds.running().api(words.cloud, words.user)
    made = api.create_volume(words.name, words.size)
    if words.server:
        api.attach(api.need("nova", "servers", words.server), made, delete_on_termination=True)
    print(made)


def image(words: argparse.Namespace) -> None:
    """Upload a public image, print its id."""
    print(Clouds.running().api(words.cloud).upload(words.name, words.file, words.format))


def images_type(words: argparse.Namespace) -> None:
    """Choose what new disks on a hypervisor are, and restart its nova-compute."""
    Clouds.running().set_images_type(words.host, words.type)


def enter(words: argparse.Namespace) -> None:
    """Run a command as root on a hypervisor."""
    done = Clouds.running().host(words.host).run(*words.argv, check=False)
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    raise SystemExit(done.returncode)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="tests/lab", description=__doc__)
    jobs = top.add_subparsers(required=True, metavar="JOB")

    def job(name: str, function: object, *arguments: str) -> argparse.ArgumentParser:
        made = jobs.add_parser(name, help=str(function.__doc__).rstrip("."), description=function.__doc__)
        made.set_defaults(job=function)
        for argument in arguments:
            made.add_argument(argument, choices={"cloud": ("src", "dst"), "host": tuple(COMPUTES)}.get(argument))
        return made

    start = job("up", up)
    start.add_argument("--kind", choices=("ns", "vm"), help="namespaces (quick) or virtual machines; what is there already stays")
    start.add_argument("--computes", type=int, choices=(1, 2), help="hypervisors in each cloud")
    start.add_argument("--storage", type=_storage, action="append", default=[], metavar="CLOUD:WHAT,…",
                       help="images (glance) and instances' disks (nova) on a Ceph of this cloud's, and Cinder with volumes "
                            "there (rbd) or in files (nfs); ceph is short for glance,nova,rbd")
    start.add_argument("--networks", choices=("apart", "shared"),
                       help="also the networks app, dual and public, with DHCP: on wires of each cloud's own, or on the same in both")
    job("down", down)
    job("purge", clear).add_argument("--all", action="store_true", help="also what makes the next start quick")
    job("status", status)
    job("env", env, "cloud").add_argument("--user", choices=("admin", "demo"), default="admin")
    create = job("server", server, "cloud", "name")
    for option, value in (("--image", "guest"), ("--flavor", "tiny"), ("--network", "net1"), ("--user", "admin")):
        create.add_argument(option, default=value)
    store = job("volume", volume, "cloud", "name")
    store.add_argument("--size", type=int, default=1, help="GiB (default: 1)")
    store.add_argument("--server", help="name or id")
    store.add_argument("--user", default="admin")
    job("id", identity, "cloud", "name")
    job("console", console, "cloud", "name")
    job("delete", delete, "cloud", "name")
    upload = job("image", image, "cloud", "name")
    upload.add_argument("file", type=Path)
    upload.add_argument("--format", default="qcow2", help="of the file (default: qcow2)")
    job("images-type", images_type, "host").add_argument("type", choices=IMAGES_TYPES)
    job("enter", enter, "host").add_argument("argv", nargs=argparse.REMAINDER, metavar="COMMAND")
    return top


def main(argv: Sequence[str]) -> int:
    """Do one job; 1 if it failed."""
    words = parser().parse_args(argv)
    try:
        words.job(words)
    except LabError as error:
        say(f"FAILED: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; `status` says what runs, `down` ends it")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
