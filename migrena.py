#!/usr/bin/env python3
"""migrena: moves an instance, with its disks, from one OpenStack cloud to another.

    ./migrena.py -s SRC_UUID -d DST_NAME -f FLAVOR -i IMAGE [-e EXTRA] [-a [all|src|dst]]

The data goes from hypervisor to hypervisor; this machine only controls it, over SSH and the clouds' APIs:

    source hypervisor                                   destination hypervisor
    disk (overlay) --read only--> nbd-server  ==TLS==>  nbd-client --> /dev/nbdN --> qemu-img --> new file
                                  or qemu-nbd ==TLS============================> qemu-img --> new file
    digest of every MiB  <------------ must be equal ------------>  digest of every MiB
                                                        rebase onto this cloud's own base, check, swap in

The source is opened read-only, always. A copy takes its place only when the digests of both ends are equal. A failed
run deletes the destination that it made and puts the source back as it was found.

Sections; each uses only those above it:

     1 Errors      exceptions, with messages for the operator
     2 Settings    one row per option: flag, variable, name in config.py, help
     3 Plans       facts and decisions; no input, no output
     4 Screen      what the operator sees
     5 Journal     what was done, locks, and how to undo
     6 Threads     work in several threads, and signals meanwhile
     7 Programs    what runs on hypervisors, sent as the source that it is here
     8 Host        one hypervisor over SSH
     9 Cloud       one OpenStack cloud: Nova, Glance and Cinder
    10 Disks       images, exports, attachments, ranges, digests
    11 Gate        whether an act may be done now
    12 Image       carries images from one Glance to another
    13 Resources   what surrounds instances, in the form of OS Migrate's files
    14 Export      writes such files
    15 Import      makes what they have and a cloud lacks
    16 Copy        survey, refuse, execute
    17 Status      shows the runs, from their journals
    18 Resume      continues a run that was cut off
    19 Rollback    undoes a run, with or without its journal
    20 Spread      live-migrates instances to the hosts that a map names
    21 Main        command line, signals, exit codes
"""

from __future__ import annotations

import argparse
import ast
import base64
import copy
import difflib
import enum
import errno
import fcntl
import fnmatch
import hashlib
import importlib.util
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import mmap
import os
import re
import runpy
import secrets
import select
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
import uuid
import zlib
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import Field, asdict, astuple, dataclass, field, fields, replace
from datetime import datetime, timedelta, timezone
from functools import cache, cached_property, partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final, NoReturn, TextIO, TypeVar
from xml.etree import ElementTree

if TYPE_CHECKING:  # `--help` must not wait for these; each is imported where it is first needed
    import asyncio
    import ssl

    import paramiko

if sys.version_info < (3, 10):  # noqa: UP036  # above anything that Python 3.8 and 3.9 lack
    print(f"error: migrena needs Python 3.10 or later; {sys.executable} is {sys.version.split()[0]}\n"
          "  try: python3.11 migrena.py, or any later version that is installed", file=sys.stderr)
    sys.exit(2)

VERSION: Final = "1.0.0"
MiB: Final = 1024**2
GiB: Final = 1024**3
SIDES: Final = {"src": "source", "dst": "destination"}  # as messages call their clouds
ROOT: Final = "root"  # the root disk's key; the names of an instance's disks in journal, report and status
S = TypeVar("S")
T = TypeVar("T")
Facts = Mapping[str, Any]  # what an API or a journal tells
Rows = list[dict[str, Any]]  # what an API lists


# ---- 1. Errors -------------------------------------------------------


@dataclass(frozen=True)
class Reason:
    """One problem, and what the operator can do about it."""

    problem: str
    way_out: str = ""


class MigrenaError(Exception):
    """A run cannot continue: what happened and where, and what to do next."""

    exit_code = 1

    def __init__(self, problem: str, way_out: str = "") -> None:
        super().__init__(problem)
        self.reasons: tuple[Reason, ...] = (Reason(problem, way_out),)

    @classmethod
    def of(cls, reasons: Sequence[Reason]) -> MigrenaError:
        error = cls(reasons[0].problem)
        error.reasons = tuple(reasons)
        return error


class UsageError(MigrenaError):
    """The command line, a variable or config.py is wrong; nothing was touched."""

    exit_code = 2


class Refused(MigrenaError):
    """The run was refused before anything was touched."""

    exit_code = 3


class HostError(MigrenaError):
    """A hypervisor cannot be reached, or the connection to it broke."""


class FinalError(HostError):
    """A failure that a retry would not get past."""


class Kept(MigrenaError):
    """An act was refused in the present situation: both copies are kept."""

    exit_code = 4


class StateError(MigrenaError):
    """The journal cannot be written, so the run stops: every act must be in it."""


class CommandError(HostError):
    """A command on a hypervisor failed."""

    def __init__(self, host: str, words: Sequence[str], status: int, said: str) -> None:
        self.said = said.strip()
        how = "was ended" if status < 0 else f"ended with status {status}"
        super().__init__(f"{host}: {quoted(words)} {how}: {self.said or 'no output'}")


class CloudError(MigrenaError):
    """A cloud's API answered with an error; `code` is the HTTP status, 0 where there was none."""

    def __init__(self, problem: str, way_out: str = "", code: int = 0) -> None:
        super().__init__(problem, way_out)
        self.code = code

    @property
    def is_temporary(self) -> bool:
        """Whether the same request may succeed a little later."""
        return self.code in (0, 429) or self.code >= 500

    @property
    def is_refusal(self) -> bool:
        """Whether the request was surely not carried out."""
        return self.code == 429 or not self.is_temporary


@contextmanager
def collecting(problems: list[Reason]) -> Iterator[None]:
    """A scope that an error ends: its reasons join the list. A UsageError is raised on."""
    try:
        yield
    except UsageError:
        raise
    except MigrenaError as error:
        problems += error.reasons


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP; unwinds the same scopes as any failure."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


def shorten(text: str, limit: int = 300) -> str:
    """The text on one line; the middle is cut out if it is longer than `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit // 2]} … {line[-limit // 2 :]}"


def quoted(words: Sequence[str], limit: int = 300) -> str:
    """A command as messages show it."""
    return f"`{shorten(shlex.join(words), limit)}`"


# ---- 2. Settings -----------------------------------------------------


def parse_size(value: object) -> int:
    """Bytes from `50M`, `1.5GiB` or a plain number; the units are powers of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?(?:/s)?\s*", str(value), re.IGNORECASE)
    if not match:
        raise ValueError("is not a size; write it as 500K, 50M or 1G")
    return int(float(match[1]) * 1024 ** ("", "K", "M", "G", "T").index(match[2].upper()))


def one_of(*allowed: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        if value not in allowed:
            raise ValueError(f"is not one of {', '.join(allowed)}{did_you_mean(str(value), allowed)}")
        return str(value)

    return read


def matching(form: str, complaint: str, made: Callable[[str], T]) -> Callable[[object], T]:
    def read(value: object) -> T:
        if not re.fullmatch(form, str(value)):
            raise ValueError(complaint)
        return made(str(value))

    return read


UUID_FORM: Final = r"[0-9a-fA-F]{8}-?([0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}"
parse_count: Final = matching(r"\d{1,9}", "is not a whole number", int)
parse_positive: Final = matching(r"0*[1-9]\d{0,8}", "is not a whole number above 0", int)
parse_nbd_device: Final = matching(r"(/dev/nbd\d+)?", "is not a /dev/nbdN", str)
parse_instance_id: Final = matching(
    f"({UUID_FORM})?", "is not an instance id; see: openstack server list --all-projects",
    lambda id: str(uuid.UUID(id)) if id else "")
parse_disk_path: Final = matching(
    r"/[^%\0-\x1f\x7f]*%s[^%\0-\x1f\x7f]*",
    "must be an absolute path with one %s in it, for the instance's id, as in /var/lib/nova/instances/%s/disk", str)


def parse_text(value: object) -> str:
    """Plain text without control characters."""
    if not isinstance(value, (str, Path)):
        raise ValueError("is not text")
    if re.search(r"[\0-\x1f\x7f]", str(value)):
        raise ValueError("has control characters in it")
    return str(value)


def parse_new_name(value: object) -> str:
    """A name that Nova and Glance accept."""
    if len(name := parse_text(value)) > 255:
        raise ValueError(f"has {len(name)} characters; the limit is 255")
    if name.strip() != name:
        raise ValueError("begins or ends with a space")
    return name


def parse_yes_no(value: object) -> bool:
    word, yes = str(value).lower(), ("1", "true", "yes", "on")
    if word not in (*yes, "0", "false", "no", "off"):
        raise ValueError("is neither yes nor no")
    return word in yes


def parse_seconds(value: object) -> int:
    """A whole number of seconds, at least one: `30`, `30s`, `5m` or `2h`."""
    match = re.fullmatch(r"([1-9]\d{0,8})([smh]?)", str(value).strip())
    if not match:
        raise ValueError("is not a time; write it as 30, 30s, 5m or 2h")
    return int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def parse_limit(value: object) -> int:
    """Seconds, or 0 for no limit."""
    return 0 if str(value) == "0" else parse_seconds(value)


def parse_moment(value: object) -> str:
    """A time in ISO 8601 with its zone, from `2026-12-05 01:00`, or with `+01:00`, `Z` or a zone's name after it.

    Without a zone it is local; `now` is no time at all.
    """
    from zoneinfo import ZoneInfo

    match = re.fullmatch(r"\s*(.*?)\s*([+-]\d\d:?\d\d|Z|(?<= )[A-Za-z][\w/+-]*)?\s*", parse_text(value))
    if not match or match[1] in ("", "now"):
        return ""
    try:
        found = datetime.fromisoformat(match[1])
        if zone := match[2]:
            is_offset = zone[0] in "+-"
            found = (datetime.strptime(f"{found:%Y-%m-%d %H:%M:%S}{zone}", "%Y-%m-%d %H:%M:%S%z") if is_offset else
                found.replace(tzinfo=timezone.utc if zone == "Z" else ZoneInfo(zone)))
        return found.astimezone().isoformat(timespec="seconds")
    except (ValueError, OSError, OverflowError, KeyError) as error:  # KeyError: no such zone
        raise ValueError("is not a time; write it as \"2026-12-05 01:00\", which is local, or with +01:00 or "
            "Europe/Berlin after it") from error


def parse_rate(value: object) -> str:
    """Bytes per second, 0 for no limit, as in `50M`, or by the hour, as in `08:00-18:00=20M,50M`; numbers for units."""
    if str(value) in ("", "0"):
        return ""
    parts, clock = [part.strip() for part in str(value).split(",")], r"(?:[01]?\d|2[0-3]):[0-5]\d|24:00"
    found = [re.fullmatch(rf"({clock})\s*-\s*({clock})\s*=(.+)", part) for part in parts]
    if found.count(None) > 1 or None in found[:-1]:
        raise ValueError("is not a rate; write it as 50M, or as 08:00-18:00=20M,50M, with that of other hours last")
    rows = [f"{match[1]}-{match[2]}={parse_size(match[3])}" if match else str(parse_size(part))
        for part, match in zip(parts, found, strict=True)]
    return "" if rows == ["0"] else ",".join(rows)


def parse_answers(value: object) -> tuple[str, ...]:
    """How an instance shows that it works: `console:REGEX`, `tcp:PORT` or `command:WORDS`, or several of these."""
    found = tuple(value) if isinstance(value, (list, tuple)) else (parse_text(value),) if value else ()
    if found == ("none",):
        return ()
    for one in found:
        kind, _, what = parse_text(one).partition(":")
        if kind not in ("console", "tcp", "command") or not what:
            raise ValueError(f"{one!r} is not console:REGEX, tcp:PORT or command:WORDS")
        reads: Mapping[str, Callable[[str], object]] = {
            "console": re.compile, "tcp": lambda port: parse_ports(parse_positive(port)),
            "command": lambda words: shlex.split(words)[0]}
        try:
            reads[kind](what)
        except (re.error, ValueError, IndexError) as error:
            raise ValueError(f"{one!r}: {what!r} {error}") from error
    return found


def parse_ports(value: object) -> range:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(value).strip())
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 0 < first <= last < 65536:
        raise ValueError("is not a TCP port or a range of ports such as 2666-2697")
    return range(first, last + 1)


def parse_port(value: object) -> int:
    """One TCP port; 0 if none is given."""
    return 0 if str(value) in ("", "0") else parse_ports(value)[0]


def parse_literal(value: object) -> dict[str, Any]:
    """A dictionary, or its text as a Python literal or JSON; nothing is evaluated."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value.strip() or "{}")
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            with suppress(ValueError):
                value = json.loads(str(value))
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError("is not a dictionary such as {'key_name': 'mine'}")
    return value


def parse_pairs(value: object) -> dict[str, str]:
    """The destination's names by the source's, from `SRC=DST,SRC=DST`, several of these, or a dictionary."""
    words: list[object] = value if isinstance(value, list) else [value]
    if all(re.fullmatch(r"[^=,{]+=[^=,]+(,[^=,]+=[^=,]+)*", str(word)) for word in words):
        return dict(pair.split("=") for word in words for pair in str(word).split(","))
    with suppress(ValueError):
        found = parse_literal(words[0] if len(words) == 1 else value)
        if all(isinstance(name, str) for name in found.values()):
            return found
    raise ValueError("is not SRC=DST")


def empty(kind: Callable[[], T], **more: Any) -> T:
    """A dataclass's field that is empty unless it is given."""
    made: T = field(default_factory=kind, **more)
    return made


@dataclass(frozen=True)
class HostEntry:
    """An entry of HOSTS: how a hypervisor is reached; empty fields come from Settings or ~/.ssh/config."""

    address: str = ""
    port: int = 0
    user: str = ""
    key: str = ""
    nbd_address: str = ""  # for the other hypervisor; empty: the address that SSH used
    prefix: tuple[str, ...] = ()  # words before virsh, qemu-img and qemu-nbd, where these are in a container
    paths: Mapping[str, str] = empty(dict)  # of folders in that container: where they lie outside


def parse_ip_address(value: object) -> str:
    """An IP address or nothing; nbd-server and the certificates need addresses."""
    return str(ipaddress.ip_address(parse_text(value))) if value else ""


def parse_paths(value: object) -> dict[str, str]:
    """Folders in a container, each with where it lies outside."""
    found = value if isinstance(value, dict) else {}
    if not found or not all(isinstance(path, str) and re.fullmatch(r"(/[\w.+-]+)+", path, re.ASCII)
            for pair in found.items() for path in pair):
        raise ValueError("paths is not a dictionary like {'/var/lib/nova': '/srv/nova'}")
    return found


def parse_hosts(value: object) -> dict[str, HostEntry]:
    """HOSTS: an address or a dictionary for each of Nova's host names; "*" holds where a host says nothing else."""
    readers: dict[str, Callable[[object], Any]] = {
        "address": parse_text, "port": parse_port, "user": parse_text, "key": parse_text,
        "nbd_address": parse_ip_address, "paths": parse_paths,
        "prefix": lambda value: tuple(shlex.split(parse_text(value)))}
    rows = {name: given if isinstance(given, dict) else {"address": given}
        for name, given in parse_literal(value).items()}
    entries = {}
    for name, row in rows.items():
        for key in row.keys() - readers.keys():
            raise ValueError(f"has an unknown entry {key!r} for {name}{did_you_mean(str(key), readers)}")
        read = dict[str, Any]()
        for key, entry in {**rows.get("*", {}), **row}.items():
            try:
                read[key] = readers[key](entry)
            except ValueError as error:
                raise ValueError(f"has for {name} as {key} {entry!r}, which {error}") from error
        entries[name] = HostEntry(**read)
    return entries


def parse_start(value: object) -> str:
    """What `-a` names: all, src, dst, or both."""
    chosen = {word.strip() for word in str(value).split(",")} - {""}
    if chosen - {"all", "src", "dst"}:
        raise ValueError("is not one of all, src, dst")
    return "all" if "all" in chosen or len(chosen) == 2 else "".join(chosen)


def parse_names(value: object) -> tuple[str, ...]:
    """Several names: a list, or text with commas."""
    found = tuple(map(parse_text, value.split(",") if isinstance(value, str) else value)) if isinstance(
        value, (str, list, tuple)) else ()
    if not all(found) or not found:
        raise ValueError("is not a list of names")
    return found


COPY_RESUME: Final = "copy resume"  # subcommands that take a flag
SEND: Final = f"{COPY_RESUME} image"
TWO_CLOUDS: Final = f"{SEND} rollback"
LIVE_MIGRATE: Final = "live-migrate"
FILES: Final = "export import"
ALL: Final = f"{TWO_CLOUDS} {LIVE_MIGRATE} {FILES} status"
MAP_FORM: Final = '{"compute001": ["web-0"], "compute003": ["db-0", "db-1"]}'


def option(default: T, usage: str = "", meaning: str = "", *, read: Callable[[Any], T] | None = None,
        config: bool = True, of: str = "copy", **more: Any) -> T:
    """One row of Settings; `usage`: flags and metavar; `read`: parser (default: text, yes/no); `more`: for argparse."""
    is_switch, words = isinstance(default, bool), usage.split()
    flags = [word for word in words if word.startswith("-")]
    if is_switch:
        more["action"] = "store_false" if default else "store_true"
    elif words != flags:
        more["metavar"] = words[-1]
    metadata = {"flags": flags, "read": read or (parse_yes_no if is_switch else parse_text), "config": config,
        "of": of.split(), "more": {"help": meaning, **more}}
    row: T = field(default_factory=lambda: default, metadata=metadata)
    return row


per_call: Final = partial(option, config=False)  # not allowed in config.py


@dataclass(frozen=True)
class Settings:
    """All settings; each row gives the flags, MIGRENA_NAME, NAME in config.py, parser and help."""

    run: str = per_call("")
    run_of: str = per_call("", "--run-of SRC_UUID",
        "the run whose mark this source instance has; works without its journal", read=parse_instance_id, of="rollback")
    keep_destination: bool = per_call(False, "--keep-destination",
        "stop the new instance instead of deleting it", of="rollback")
    yes: bool = per_call(False, "--yes -y --y",
        "do not ask; copy a source again that was migrated before; lose what an instance has written since",
        of=f"{COPY_RESUME} rollback {LIVE_MIGRATE} export")
    host_map: str = per_call("", "--host-map --host_map FILE",
        f"JSON: {MAP_FORM}; instances by name or id", of=LIVE_MIGRATE)
    cloud: str = per_call("", "--cloud src|dst|NAME", "src or dst of config.py, or a name in clouds.yaml (default: "
        "OS_* variables; of export src, of import dst)", of=f"{LIVE_MIGRATE} {FILES}")
    types: tuple[str, ...] = per_call((), read=lambda value: parse_names(value) if value else ())
    files: tuple[str, ...] = per_call((), read=lambda value: (value,) if isinstance(value, str) else tuple(value))
    project: str = per_call("", "--project NAME", "the project, name or id, whose resources are exported, or which "
        "gets them (default: that of the credentials)", of=FILES)
    all_projects: bool = per_call(False, "--all-projects", "of all projects, with whose they are", of="export")
    needed_for: str = per_call("", "--for SRC_UUID", "just what this instance needs",
        read=parse_instance_id, of="export")
    only_names: str = per_call("", "--name GLOB", "only what is called like this, such as \"web-*\"", of="export")
    folder: str = option("resources", "--folder DIR", "where the files are written (default: resources)", of="export")
    update: bool = per_call(False, "--update", "change what exists and differs from the files", of="import")
    provider: bool = per_call(False, "--provider",
        "also the networks' provider attributes, such as their VLANs", of="import")
    passwords: str = per_call("", "--passwords FILE",
        "new users get the passwords in these lines NAME: PASSWORD; others are disabled", of="import")
    new_passwords: str = per_call("", "--new-passwords FILE",
        "new users get new passwords, which this new file then has", of="import")
    parallel: int = option(8, "--parallel N", "requests at a time (default: 8)", read=parse_positive, of="import")
    with_network: bool = per_call(False, "--with-network",
        "first make the networks, routers and security groups that the source needs and the destination lacks")
    with_all: bool = per_call(False, "--with-all",
        "the same with its project, flavor, image, key pair and server group")
    timeout: int = per_call(600, "--timeout TIME",
        "limit for each instance (default: 600)", read=parse_seconds, of=LIVE_MIGRATE)
    keep_waiting: bool = per_call(False, "--keep-waiting", "after the timeout, keep waiting", of=LIVE_MIGRATE)
    abort: bool = per_call(False, "--abort", "after the timeout, abort the migration", of=LIVE_MIGRATE)
    watch: bool = per_call(False, "--watch", "draw the table anew every two seconds", of="status")
    keep_going: bool = per_call(False, "--keep-going", "after a failure, continue with the next one",
        of=f"{LIVE_MIGRATE} import")
    src_uid: str = per_call("", "-s --src-uid --src-uuid UUID", "the source instance's id", read=parse_instance_id)
    dst_name: str = per_call("", "-d --dst-name NAME",
        "name of the new instance (default: the source's)", read=parse_new_name)
    flavor: str = per_call("", "-f --flavor", "its flavor, name or id (default: one like the source's)")
    image: str = per_call("", "-i --image-id", "its image, name or id (default: one with the same content)")
    extra_args: dict[str, Any] = per_call({}, "-e --extra-args EXTRA",
        "more arguments for Nova's create, as a Python literal or JSON: "
        "\"{'nics': [{'net-id': 'ID'}], 'security_groups': ['default']}\"", read=parse_literal)
    images: tuple[str, ...] = per_call((), "-i --image-id IMAGE",
        "an image of the source, name or id; may be repeated", read=parse_names, of="image", action="append")
    tag: str = per_call("", "--tag", "all images of the source with this tag", of="image")
    new_name: str = per_call("", "--name NAME",
        "its name in the destination (default: the same)", read=parse_new_name, of="image")
    disk_format: str = per_call("", "--disk-format raw|qcow2|vmdk",
        "convert it on this machine", read=one_of("", "raw", "qcow2", "vmdk"), of="image")
    work_folder: str = option("", "--work-folder PATH",
        "where to convert; needs space for both (default: the system's temporary folder)", of="image")
    copy_image: bool = option(False, "--copy-image",
        "without -i: carry the source's image first if the destination lacks it")
    start_after: str = per_call("", "-a --start-after all|src|dst",
        "what to start afterwards; -a alone: all; without -a: nothing", read=parse_start, nargs="?", const="all")
    ignore_properties: bool = per_call(False, "--ignore-properties",
        "go on even if the guest may not boot with the image's properties")
    root_only: bool = per_call(False, "--root-only", "go on without further volumes and ephemeral disks")
    disks: tuple[str, ...] = per_call((), "--disks NAME,…",
        "move only these besides the root disk, by the plan's names or as the guest's devices, such as eph0,vdc",
        read=lambda value: parse_names(value) if value or value == "" else ())
    lanes: int = option(2, "--lanes N",
        "disks copied in parallel (default: 2, with --limit-rate 1); 1 also spares the source's host",
        read=parse_positive, of=COPY_RESUME)
    volume_type: dict[str, str] = option({}, "--volume-type SRC=DST",
        "the destination's type for volumes of a type of the source (default: the same name); may be repeated",
        read=parse_pairs, action="append")
    network: dict[str, str] = option({}, "--network SRC=DST",
        "the destination's network, name or id, for one of the source's (default: the same name); may be repeated",
        read=parse_pairs, of="copy import", action="append")
    new_addresses: bool = option(False, "--new-addresses", "let Neutron choose the ports' addresses")
    new_macs: bool = option(False, "--new-macs", "let Neutron choose the ports' MAC addresses")
    floating_ip: str = option("none", "--floating-ip none|new|keep",
        "for floating IPs of the source: none, a new one, or the same address (default: none)",
        read=one_of("none", "new", "keep"))
    dst_project: str = option("", "--dst-project NAME|same",
        "the project of the new instance, name or id, or the one with the name of the source's "
        "(default: that of the credentials)", of="copy rollback")
    transport: str = option("auto", "--transport auto|nbd|qemu",
        "nbd: nbd-server and nbd-client; qemu: qemu-nbd and qemu-img", read=one_of("auto", "nbd", "qemu"))
    tls: bool = option(True, "--no-tls", "send the disk unencrypted; only the destination's address may connect")
    verify: bool = option(True, "--no-verify", "do not compare the digests of both ends (not with --warm)")
    compress: str = option("auto", "--compress auto|on|off",
        "compress on the network; auto: only if it is slow, not with --limit-rate or transport nbd",
        read=one_of("auto", "on", "off"), of=COPY_RESUME)
    limit_rate: str = option("", "--limit-rate RATE", "bytes per second at most, such as 50M, or by the hour, "
        "such as 08:00-18:00=20M,50M", read=parse_rate, of=SEND)
    warm: bool = option(False, "--warm", "copy while the source runs; stop it only for what has changed since")
    warm_passes: int = option(0, "--warm-passes N",
        "passes while it runs, with the first (default: while each is much smaller)", read=parse_count, of=COPY_RESUME)
    max_downtime: int = option(0, "--max-downtime TIME",
        "stop the source only if its downtime will not exceed this, such as 30s", read=parse_limit, of=COPY_RESUME)
    warm_timeout: int = option(3600, "--warm-timeout TIME", "give up if --max-downtime is not met by then; "
        "the source runs on (default: 1h)", read=parse_seconds, of=COPY_RESUME)
    bitmap: bool = option(False, "--bitmap",
        "with --warm: record changes in a dirty bitmap in the source's qcow2 file, so that the rest is not read again",
        of=COPY_RESUME)
    seed: bool = per_call(False, "--seed", "copy while the source runs, and leave it running: `resume RUN --seed` "
        "sends what has changed since, `resume RUN` cuts over", of=COPY_RESUME)
    cutover_at: str = per_call("", "--cutover-at TIME",
        "copy while the source runs, and stop it at this local time, such as \"2026-12-05 01:00\"",
        read=parse_moment, of=COPY_RESUME)
    every: int = option(600, "--every TIME", "until --cutover-at, send what has changed this often (default: 10m)",
        read=parse_seconds, of=COPY_RESUME)
    late: int = option(600, "--late TIME",
        "after --cutover-at, the source is stopped this much later at most (default: 10m)",
        read=parse_seconds, of=COPY_RESUME)
    answers: tuple[str, ...] = per_call((), "--await console:REGEX|tcp:PORT|command:WORDS",
        "done once the new instance answers; else it is stopped, and the source started again; may be repeated",
        read=parse_answers, of=COPY_RESUME, action="append")
    await_timeout: int = option(300, "--await-timeout TIME", "time for --await after the start (default: 5m)",
        read=parse_seconds, of=COPY_RESUME)
    retries: int = option(5, "--retries N",
        "retries of a copy that broke off or stalled (default: 5)", read=parse_count, of=COPY_RESUME)
    stall_timeout: int = option(120, "--stall-timeout SECONDS",
        "time without a byte after which a copy has stalled (default: 120)", read=parse_seconds, of=COPY_RESUME)
    max_per_host: int = option(2, "--max-per-host N", "copies of this machine's runs per hypervisor; "
        "further ones wait (default: 2)", read=parse_positive, of=COPY_RESUME)
    src_cloud: str = option("", "--src-cloud NAME", "the source's name in clouds.yaml", of=f"{TWO_CLOUDS} {FILES}")
    dst_cloud: str = option("", "--dst-cloud NAME", "the destination's name in clouds.yaml", of=f"{TWO_CLOUDS} {FILES}")
    dry_run: bool = per_call(False, "-n --dry-run",
        "show what would be done; change nothing", of=f"{TWO_CLOUDS} {LIVE_MIGRATE} import")
    log_file: str = option("", "--log-file PATH",
        "also append every line to this file, with its time, even with -q", of=ALL)
    verbose: bool = option(False, "-v --verbose", "show every remote command", of=ALL)
    quiet: bool = option(False, "-q --quiet", "print nothing, not even the new id, unless something is wrong", of=ALL)
    json: bool = option(False, "--json", "print a report as JSON on standard output", of=ALL)
    debug: bool = option(False, "--debug", "show tracebacks and the libraries' logs", of=ALL)
    # These have no flag; config.py explains them.
    src_creds: dict[str, Any] = option({}, read=parse_literal)
    dst_creds: dict[str, Any] = option({}, read=parse_literal)
    dst_glance_endpoint: str = option("")
    disk_path: str = option("/var/lib/nova/instances/%s/disk", read=parse_disk_path)
    nbd_device: str = option("", read=parse_nbd_device)
    nbd_server_port: range = option(range(2666, 2698), read=parse_ports)
    hosts: dict[str, HostEntry] = option({}, read=parse_hosts)
    ssh_user: str = option("")
    ssh_port: int = option(0, read=parse_port)
    ssh_key: str = option("")
    ssh_config: str = option("~/.ssh/config")
    known_hosts: str = option("")
    sudo: str = option("auto", read=one_of("auto", "yes", "no"))
    state_folder: str = option("")
    space_reserve: int = option(64 * MiB, read=parse_size)
    chunk: int = option(GiB, read=parse_size)
    per_side: dict[str, Any] = per_call({})  # settings for one cloud, by names such as src_hosts

    def host(self, name: str) -> HostEntry:
        return self.hosts.get(name) or self.hosts.get("*", HostEntry())

    @property
    def chosen(self) -> tuple[str, ...]:
        """The names of the only disks to be moved; none: all."""
        return (ROOT, *self.disks) if self.disks or self.root_only else ()

    def of(self, side: str) -> Settings:
        """The settings for the hypervisors of src or dst."""
        return replace(self, **{name[4:]: value for name, value in self.per_side.items() if name.startswith(side)})

    def rate_at(self, moment: datetime) -> int:
        """Bytes per second that --limit-rate allows at a local time; 0: no limit."""
        minute = moment.hour * 60 + moment.minute
        for row in filter(None, self.limit_rate.split(",")):
            span, _, rate = row.rpartition("=")
            begin, end = [int(hour) * 60 + int(past) for hour, past in re.findall(r"(\d+):(\d+)", span)] or (0, 0)
            if begin <= minute < end or (begin >= end and not end <= minute < begin):
                return int(rate)
        return 0

    @property
    def rate(self) -> int:
        return self.rate_at(datetime.now())

    @property
    def least_rate(self) -> int:
        """The lowest limit at any hour; 0: none."""
        rates = [int(row.rpartition("=")[2]) for row in self.limit_rate.split(",") if row]
        return min(filter(None, rates), default=0)

    @property
    def rates_ahead(self) -> str:
        """The limits of the next week, as Pace reads them."""
        now = datetime.now().astimezone()
        clocks = {(int(hour) % 24, int(past)) for hour, past in re.findall(r"(\d+):(\d+)", self.limit_rate)}
        days = [(now + timedelta(days=day)).replace(second=0, microsecond=0, tzinfo=None) for day in range(8)]
        changes = sorted(day.replace(hour=hour, minute=past).astimezone() for day in days for hour, past in clocks)
        return ",".join([str(self.rate), *(f"{(at - now).total_seconds():.0f}:{self.rate_at(at)}"
            for at in changes if at > now)])


PER_SIDE: Final = (  # also SRC_HOSTS etc.
    "hosts", "disk_path", "ssh_user", "ssh_port", "ssh_key", "ssh_config", "known_hosts", "sudo")

# Settings of a run that resume takes from its journal; never credentials, nor -e, which may hold secrets.
FOR_RESUME: Final = ("src_uid", "dst_name", "start_after", "transport", "tls", "verify", "compress", "limit_rate",
    "chunk", "root_only", "disks", "lanes", "warm", "warm_passes", "max_downtime", "warm_timeout",
    "bitmap", "cutover_at", "every", "late", "answers", "await_timeout", "src_cloud", "dst_cloud",
    "dst_project", "floating_ip", "retries", "stall_timeout", "max_per_host")


def did_you_mean(word: str, known: Iterable[str], alike: float = 0.6) -> str:
    """`; did you mean X?` if a known word is similar, else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=alike)
    return f"; did you mean {near[0]}?" if near else ""


def config_names() -> list[str]:
    return [row.name.upper() for row in fields(Settings) if row.metadata["config"]]


def sided_names() -> list[str]:
    return [f"{side}_{name}" for side in SIDES for name in PER_SIDE]


def read_config(path: Path) -> dict[str, object]:
    """The values that a config.py sets. Raises UsageError."""
    known = [*config_names(), *map(str.upper, sided_names())]
    try:
        found = runpy.run_path(str(path))
    except SyntaxError as error:
        raise UsageError(f"{path}, line {error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:  # an error in the operator's file is not a bug of migrena
        raise UsageError(f"{path}: {type(error).__name__}: {error}") from error
    values = {name: value for name, value in found.items() if name.isupper() and not name.startswith("_")}
    for name in values.keys() - {*known}:
        raise UsageError(f"{path}: unknown setting {name}{did_you_mean(name, known)}", f"known: {', '.join(known)}")
    return {name.lower(): value for name, value in values.items()}


def merge_settings(flags: Mapping[str, object], environment: Mapping[str, str],
        config: Mapping[str, object]) -> Settings:
    """Settings: built-in default < config.py < MIGRENA_NAME < flag. Raises UsageError."""
    def given(row: Field[Any], name: str) -> dict[str, Any]:
        variable = f"MIGRENA_{name.upper()}"
        for place, key, origin in ((flags, name, (name.upper(), *row.metadata["flags"])[-1]),
                (environment, variable, variable),
                (config, name, f"{name.upper()} in {config.get('path', 'config.py')}")):
            if key in place:
                try:
                    return {name: row.metadata["read"](place[key])}
                except (ValueError, TypeError) as error:
                    shown = "" if "creds" in name else f" {shorten(repr(place[key]), 80)}"
                    raise UsageError(f"{origin}:{shown} {error}") from error
        return {}

    values, per_side = dict[str, Any](), dict[str, Any]()
    for row in fields(Settings):
        values |= given(row, row.name)
        for side in ("src", "dst") if row.name in PER_SIDE else ():
            per_side |= given(row, f"{side}_{row.name}")
    settings = Settings(**{**values, "per_side": per_side})
    if settings.seed or settings.cutover_at:
        settings = replace(settings, warm=True)
    if settings.chunk < MiB or settings.chunk % MiB:
        raise UsageError(f"CHUNK: {settings.chunk} is not a multiple of 1 MiB")
    for flag, is_given in (("--compress on", settings.compress == "on"), ("--warm", settings.warm)):
        if is_given and settings.transport == "nbd":
            raise UsageError(f"{flag} needs the transport qemu", "leave out --transport nbd")
    return settings


@dataclass(frozen=True)
class Call:
    """One call of migrena: the subcommand and the sources of its settings, in order of precedence."""

    subcommand: str
    flags: Mapping[str, object]
    environment: Mapping[str, str]
    config: Mapping[str, object]

    def settings(self, kept: Mapping[str, object] | None = None) -> Settings:
        """The settings; those `kept` in a journal are overridden by flags alone. Raises UsageError."""
        return merge_settings({**(kept or {}), **self.flags}, self.environment, self.config)


# Keys of a credentials dictionary that are for the session or the clients, not for the auth plugin.
SESSION_KEYS: Final = (
    "region_name", "interface", "endpoint_type", "verify", "insecure", "cacert", "cert", "key", "timeout", "auth_type")


def credentials(cloud: str, settings: Settings, environment: Mapping[str, str]) -> dict[str, Any]:
    """For src or dst: clouds.yaml by --SIDE-cloud, else SIDE_OS_* variables, else config.py. Otherwise: a cloud of
    clouds.yaml, or OS_* variables if none is named. Raises UsageError."""
    is_side = cloud in SIDES
    prefix = f"{cloud.upper()}_OS_" if is_side else "OS_"
    name = getattr(settings, f"{cloud}_cloud") if is_side else cloud or environment.get("OS_CLOUD", "")
    found = cloud_from_yaml(name, environment) if name else {
        key.removeprefix(prefix).lower(): value for key, value in environment.items() if key.startswith(prefix)}
    if is_side and not name and "auth_url" not in found:
        found = getattr(settings, f"{cloud}_creds")
    if found.get("auth_url"):
        creds = as_v3(found)
        return in_project(creds, settings.dst_project) if cloud == "dst" and settings.dst_project else creds
    if is_side:
        raise UsageError(f"the credentials of the {SIDES[cloud]} cloud have no auth_url" if found else
            f"no credentials for the {SIDES[cloud]} cloud",
            f"fill in {cloud.upper()}_CREDS in config.py, or give --{cloud}-cloud, or set {prefix}AUTH_URL etc.")
    raise UsageError(f"cloud {name!r} has no auth_url" if name else "no cloud is named",
        "give --cloud src, dst or a name in clouds.yaml, or set OS_AUTH_URL etc.")


def as_v3(found: Facts) -> dict[str, Any]:
    """Credentials for Keystone v3, without entries for other clients."""
    renamed = {"tenant_name": "project_name", "tenant_id": "project_id", "api_key": "password"}
    creds = {renamed.get(key, key): value for key, value in found.items()
        if value not in (None, "") and not re.fullmatch(r"\w+_api_version|cloud|client_config_file", str(key))}
    creds["auth_url"] = re.sub(r"/v2\.0/?$", "", str(creds["auth_url"]))
    kind = str(creds.get("auth_type", "password")).replace("v2", "v3")
    if kind in ("password", "v3password"):
        creds["auth_type"] = kind
        if "user_id" not in creds and not {"user_domain_id", "user_domain_name"} & creds.keys():
            creds["user_domain_id"] = "default"
        if "project_name" in creds and not {"project_domain_id", "project_domain_name"} & creds.keys():
            creds["project_domain_id"] = "default"
    return creds


def in_project(creds: Facts, project: str) -> dict[str, Any]:
    """The same credentials for another project, name or id; raises UsageError if they are bound to theirs."""
    if "project_name" not in creds and "project_id" not in creds:
        raise UsageError("--dst-project: these credentials are bound to one project",
            "give those of a user and password, with a role in that project")
    key = "project_id" if re.fullmatch(r"[0-9a-f]{32}", project) else "project_name"
    rest = {name: value for name, value in creds.items() if name not in ("project_id", "project_name")}
    if not {"project_domain_id", "project_domain_name"} & rest.keys():
        rest |= {name.replace("user", "project"): rest[name] for name in ("user_domain_id", "user_domain_name")
            if name in rest} or {"project_domain_id": "default"}
    return {**rest, key: project}


def cloud_from_yaml(name: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """One cloud of clouds.yaml and the secure.yaml beside it, as one dictionary. Raises UsageError."""
    import yaml

    named = environment.get("OS_CLIENT_CONFIG_FILE")
    folders = Path.cwd(), Path.home() / ".config/openstack", Path("/etc/openstack")
    places = [Path(named)] if named else [folder / "clouds.yaml" for folder in folders]
    if not (path := next((place for place in places if place.is_file()), None)):
        raise UsageError("no clouds.yaml was found", f"looked at: {', '.join(map(str, places))}")
    secure = path.with_name("secure.yaml")
    try:
        known, hidden = (yaml.safe_load(place.read_text())["clouds"] if place.is_file() else {}
            for place in (path, secure))
        if name not in known:
            raise UsageError(f"{path} has no cloud {name!r}{did_you_mean(name, known)}", f"it has: {', '.join(known)}")
        entry = {**known[name], **hidden.get(name, {})}
        return {**{key: entry[key] for key in SESSION_KEYS if key in entry}, **known[name].get("auth", {}),
            **entry.get("auth", {})}
    except (yaml.YAMLError, OSError, TypeError, ValueError, KeyError, AttributeError) as error:  # may hold a password
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path} or secure.yaml beside it cannot be read: {type(error).__name__}{line}") from None


def session_options(own: Mapping[Any, Any], label: str) -> tuple[bool | str, float]:
    """Whether a cloud's certificate is verified, or by which file, and seconds to wait; variables have them as text."""
    try:
        is_verified = parse_yes_no(own.get("verify", True)) and not parse_yes_no(own.get("insecure", False))
        return own.get("cacert") or is_verified, float(own.get("timeout", 60))
    except ValueError as error:
        raise UsageError(f"credentials of the {label} cloud: verify, insecure or timeout {error}",
            "write yes or no, or seconds") from error


# ---- 3. Plans --------------------------------------------------------


@dataclass(frozen=True)
class Flavor:
    """A flavor's sizes: ram in MiB, disk and ephemeral in GiB, swap in MiB; empty or None if Nova does not show it."""

    name: str
    vcpus: int
    ram: int
    disk: int
    ephemeral: int
    swap: int
    id: str = ""
    extra_specs: Mapping[str, str] | None = field(default=None, compare=False)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Flavors with equal sizes are the same machine."""
        return (self.vcpus, self.ram, self.disk, self.ephemeral, self.swap)

    def differs(self, source: Flavor) -> Iterator[tuple[str, bool]]:
        """Each difference from the source's flavor, except disks, and whether it is less than there."""
        for unit, name in (("vCPUs", "vcpus"), ("MiB of RAM", "ram"), ("MiB of swap", "swap")) if source.vcpus else ():
            here, there = getattr(source, name), getattr(self, name)
            if here != there:
                yield f"{there} {unit} for {here}", there < here
        one, other = source.extra_specs, self.extra_specs
        if one is not None and other is not None:
            for key in sorted(dict(one.items() ^ other.items())):
                yield f"{key} {other.get(key, 'unset')} for {one.get(key, 'unset')}", False


# Properties that may prevent a guest from booting, with Nova's defaults.
BOOT_KEYS: Final = {
    "architecture": "x86_64", "hw_architecture": "x86_64", "hw_disk_bus": "virtio", "hw_firmware_type": "bios",
    "os_secure_boot": "disabled", "hw_machine_type": "", "hw_scsi_model": "", "kernel_id": ""}


@dataclass(frozen=True)
class Image:
    """A Glance image; `os_hash` is its os_hash_value; this and `checksum` may be empty."""

    id: str
    name: str
    status: str
    os_hash: str
    checksum: str
    facts: Facts = empty(dict, repr=False, compare=False)  # all properties

    @classmethod
    def of(cls, told: Facts) -> Image:
        return cls(told["id"], told.get("name") or "", told.get("status") or "",
            told.get("os_hash_value") or "", told.get("checksum") or "", told)

    @property
    def form(self) -> tuple[object, object]:
        """How Nova interprets the stored bytes: disk format and container format."""
        return self.facts.get("disk_format"), self.facts.get("container_format")

    @property
    def disk_size(self) -> int:
        """Bytes of the disk that Nova makes from it if the flavor has no disk size; 0 if unknown."""
        is_raw = self.facts.get("disk_format") in ("raw", "iso")
        return int(self.facts.get("virtual_size") or (self.facts.get("size") if is_raw else 0) or 0)

    @property
    def is_hidden(self) -> bool:
        """Whether Glance lists it only on request."""
        return bool(self.facts.get("os_hidden"))

    def equals(self, other: Image) -> bool:
        """Whether both have the same formats and content, by the strongest digest that both have."""
        hashes, algos = (self.os_hash, other.os_hash), {image.facts.get("os_hash_algo") for image in (self, other)}
        one, another = hashes if all(hashes) and len(algos) == 1 else (self.checksum, other.checksum)
        return self.form == other.form and one == another != ""

    def differs(self, source: Image) -> Iterator[tuple[str, bool]]:
        """Each difference from the source's properties, and whether it may prevent a guest from booting."""
        for key in sorted(self.facts.keys() | source.facts.keys()):
            here, there = (image.facts.get(key) or BOOT_KEYS.get(key) or "unset" for image in (self, source))
            if key == "kernel_id" and "unset" not in (here, there):
                continue  # ids differ from Glance to Glance
            if here != there and (key in BOOT_KEYS or re.match("(hw|os)_(?!hash_|hidden)", key)):
                yield f"{key} {here} for {there}", key in BOOT_KEYS


@dataclass(frozen=True)
class Server:
    """An instance as Nova shows it; `host` is for admins only."""

    id: str
    name: str
    status: str
    task: str
    power: int
    host: str
    hypervisor: str
    locked: bool
    lock_reason: str
    metadata: Mapping[str, str]
    image: str
    flavor: Flavor
    volumes: tuple[str, ...]
    config_drive: bool
    fixed_addresses: frozenset[str]
    fault: str
    key: str = ""  # the name of its key pair, which belongs to a user and may be gone
    deleted_with: frozenset[str] = frozenset()  # the volumes that are deleted with it
    facts: Facts = empty(dict, repr=False, compare=False)  # all that Nova tells

    @property
    def is_running(self) -> bool:
        return self.status == "ACTIVE" and not self.task and self.power == 1

    @property
    def is_stopped(self) -> bool:
        """Stopped, with no task: the status alone is still SHUTOFF while a start opens the disk."""
        return self.status == "SHUTOFF" and not self.task and self.power == 4

    @property
    def is_pictured(self) -> bool:
        """Stopped, while a snapshot is made of it."""
        return self.task.startswith("image_") and replace(self, task="").is_stopped


@dataclass(frozen=True)
class Volume:
    """A volume as Cinder shows it; `size` in GiB."""

    id: str
    name: str
    status: str
    size: int
    type: str
    facts: Facts = field(repr=False, compare=False)  # all that Cinder tells

    @classmethod
    def of(cls, told: Facts) -> Volume:
        return cls(told["id"], told.get("name") or "", told["status"], int(told["size"]),
            told.get("volume_type") or "", told)

    @property
    def label(self) -> str:
        return f"volume {self.name or 'without a name'} {self.id}"

    @property
    def is_bootable(self) -> bool:
        return str(self.facts.get("bootable")).lower() == "true"

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.facts.get("metadata") or {}

    @property
    def servers(self) -> list[str]:
        return [one["server_id"] for one in self.facts.get("attachments") or ()]

    @property
    def image_facts(self) -> dict[str, str]:
        """The properties of the image that it was made from, which Nova goes by; ids differ from Glance to Glance."""
        told = self.facts.get("volume_image_metadata") or {}
        return {key: value for key, value in told.items() if key != "image_id"}


@dataclass(frozen=True)
class FloatingIp:
    """A floating IP of the source, with the address of the port that it leads to."""

    address: str
    network: Facts
    fixed: str
    description: str


@dataclass(frozen=True)
class Port:
    """A port of the source as Neutron shows it, with the names of what it refers to by ids."""

    network: Facts
    addresses: tuple[tuple[str, str], ...]  # each with its subnet's CIDR
    groups: tuple[str, ...]
    floating: tuple[FloatingIp, ...]
    facts: Facts = field(repr=False)  # all that Neutron tells

    @property
    def id(self) -> str:
        return str(self.facts["id"])

    @property
    def mac(self) -> str:
        return str(self.facts["mac_address"]).lower()

    @property
    def label(self) -> str:
        return f"port {self.facts.get('name') or self.mac} on network {self.network['name']}"


@dataclass(frozen=True)
class PortPlan:
    """A port to be made: what Neutron is asked for, and what is set later. Journals have it."""

    source: str  # the id of the port that it is made for
    network: str  # its name
    request: Facts
    later: Facts  # facts that are set when the run ends; until then the description is the run's mark
    tags: Sequence[str] = ()
    floating: Sequence[Facts] = ()  # requests for floating IPs, and each one's later description


@dataclass(frozen=True)
class Networks:
    """What the destination's Neutron has for the ports of the source."""

    networks: Sequence[Facts] = ()
    subnets: Mapping[str, Sequence[Facts]] = empty(dict)  # by the network's id
    groups: Sequence[Facts] = ()  # security groups of the project
    # Ports by network and by the MAC or address that they have.
    taken: Mapping[tuple[str, str], Facts] = empty(dict)
    room: int = -1  # ports that the quota allows still; -1: no limit, or not known
    floating: Collection[str] = ()  # floating IPs in use


NO_NETWORKS: Final = Networks()


@dataclass(frozen=True)
class Attribute:
    """An attribute of the instance, here and there, for the plan; `fate`: kept, new or left behind."""

    name: str
    here: str
    there: str
    fate: str


@dataclass(frozen=True)
class KeyPair:
    """A key pair of a user as Nova shows it."""

    name: str
    fingerprint: str
    public_key: str
    type: str


@dataclass(frozen=True)
class Wanted:
    """What a run makes before the instance, for one of its attributes: a server group or a key pair."""

    kind: str
    facts: Facts


@dataclass(frozen=True)
class Action:
    """An entry of os-instance-actions."""

    request: str
    name: str
    at: str
    has_failed: bool
    seconds: float = 0.0  # it took; 0 where Nova does not say (before microversion 2.58)


def seconds_between(began: Any, ended: Any) -> float:
    """Seconds between two times in ISO 8601; 0 where one is missing or is not a time."""
    try:
        return (datetime.fromisoformat(ended) - datetime.fromisoformat(began)).total_seconds()
    except (TypeError, ValueError):
        return 0.0


# Actions that do not start a guest; any other may have started it, perhaps with another disk or on another host.
HARMLESS: Final = frozenset({
    "create", "stop", "lock", "unlock", "createImage", "createBackup", "delete", "attach_volume", "detach_volume",
    "attach_interface", "detach_interface"})


def newer(actions: Sequence[Action], than: str) -> list[Action]:
    """The actions after this request, newest first; all if it is empty or unknown."""
    return list(itertools.takewhile(lambda action: not than or action.request != than, actions))


Named = TypeVar("Named", Flavor, Image, Server)


def pick(name: str, among: Sequence[Named], kind: str, place: str, way: str) -> Named:
    """The one with this id, else this name, hidden ones last; raises Refused unless it is one."""
    found = [one for one in among if one.id == name] or [one for one in among if one.name == name]
    found = [one for one in found if not getattr(one, "is_hidden", False)] or found
    if len(found) > 1:
        raise Refused(f"{place}{len(found)} {kind}s are named {name!r}: {', '.join(one.id for one in found)}",
            f"give the id{way}")
    if not found:
        raise not_found(f"{place}there is no {kind} {name!r}", name, among, way)
    return found[0]


def not_found(problem: str, name: str, known: Sequence[Named], way: str) -> Refused:
    names = [one.name for one in known if one.name]
    near = ", ".join(difflib.get_close_matches(name, names, n=5, cutoff=0.3) or names[:5]) or "none"
    return Refused(problem, f"name one{way}; nearest: {near}")


@dataclass(frozen=True)
class Node:
    """One of qemu's block nodes: what stores it, option by option (block-core.json), and the format of that."""

    storage: Mapping[str, str]
    format: str = "raw"

    @classmethod
    def of_file(cls, path: str, format: str = "raw", **more: str) -> Node:
        return cls({"driver": "file", "filename": path, **more}, format)

    @property
    def place(self) -> str:
        """What the program of `blocks` opens: a file or device, else the storage in JSON."""
        return self.storage.get("filename") or json.dumps(dict(self.storage))

    @property
    def options(self) -> dict[str, str]:
        return {"driver": self.format, **{f"file.{key}": value for key, value in self.storage.items()}}

    def part(self, offset: int, length: int) -> str:
        """These bytes of it, for --image-opts."""
        whole = self.storage if self.format == "raw" else self.options
        return image_opts({"driver": "raw", "offset": str(offset), "size": str(length),
            **{f"file.{key}": value for key, value in whole.items()}})

    @property
    def has_locks(self) -> bool:
        """Whether qemu locks it: others than files and devices of the host it does not."""
        return self.storage["driver"] in ("file", "host_device")

    @property
    def locked(self) -> str:
        """Its storage for --image-opts, opened only while nobody writes to it, and not to be written to while open.

        A raw node takes no such lock itself, but blkdebug does: see `unshare-child-perms` in qemu's block-core.json.
        """
        return image_opts({"driver": "blkdebug", **{f"image.{key}": value for key, value in self.storage.items()},
            "unshare-child-perms.0": "write", "unshare-child-perms.1": "resize"})

    @property
    def unlocked(self) -> str:
        """It for --image-opts, opened even while a guest writes to it: what is read may be inconsistent."""
        return image_opts({**self.options, **({"file.locking": "off"} if self.has_locks else {})})


def image_opts(options: Mapping[str, str]) -> str:
    """A node as a word for --image-opts; commas in values are doubled."""
    return ",".join(f"{key}={value.replace(',', ',,')}" for key, value in options.items())


@dataclass(frozen=True)
class DiskImage:
    """A file of a disk's chain, or a disk that is no file, in bytes: `size` to the guest, `length` of the file."""

    path: str  # of what is no file a name to be shown
    format: str
    size: int
    length: int
    allocated: int
    backing: str = ""
    backing_format: str = ""
    flaws: tuple[str, ...] = ()
    leaks: int = 0  # clusters that are allocated but not referenced
    lost_bitmaps: tuple[str, ...] = ()  # marked "in-use": by a qemu that has the file open, or by one that was killed
    storage: Mapping[str, str] = empty(dict)  # a Node's, of a device or an image on Ceph
    identity: tuple[str, ...] = ()  # of a device: what proves, on its host, that it is the right one

    @property
    def node(self) -> Node:
        return Node(self.storage, self.format) if self.storage else Node.of_file(self.path, self.format)

    @property
    def is_file(self) -> bool:
        """Whether it is one, whose holes can be trusted: all of anything else is read."""
        return not self.storage


@dataclass(frozen=True)
class Disk:
    """An instance's disk: its chain from the overlay down, and what is known of the instance's other disks."""

    chain: tuple[DiskImage, ...]
    guest_bytes: int = 0  # size of a copy of the guest's view, by qemu-img measure
    beside: tuple[str, ...] = ()  # names of further disks in the instance's folder
    has_nvram: bool = False
    has_tpm: bool = False
    macs: tuple[str, ...] = ()  # of the instance's interfaces, in their order
    direct_io: bool = True  # whether O_DIRECT works on it
    volume: str = ""  # the id of the volume that it is
    bus: str = ""  # its bus in the guest

    @property
    def top(self) -> DiskImage:
        """The file that the guest writes to."""
        return self.chain[0]

    @property
    def file_name(self) -> str:
        """What Nova calls it: disk, disk.local…"""
        return re.sub(f"^{UUID_FORM}_", "", self.top.path.rpartition("/")[2])

    @property
    def base(self) -> DiskImage | None:
        """The backing file, or None unless there is exactly one."""
        return self.chain[1] if len(self.chain) == 2 else None


LEAST_CHUNK: Final = 64 * MiB  # least bytes of data in a chunk, except the last
Extent = tuple[int, int]  # offset and length, in bytes
Show = Callable[[int], None]  # called with the number of what is done so far


@dataclass(frozen=True)
class Chunk:
    """A range of the disk that is copied at once: offset and length, bytes of data in it, and their extents."""

    offset: int
    length: int
    held: int
    extents: tuple[Extent, ...] = field(default=(), compare=False, repr=False)

    @property
    def is_scattered(self) -> bool:
        """Whether its extents are so small that looking each one up costs more than reading it."""
        return self.held <= len(self.extents) * MiB // 16 and len(self.extents) > 64


def chunks(length: int, extents: Iterable[Extent], limit: int, least: int = LEAST_CHUNK, hole: int = 0) -> list[Chunk]:
    """`length` bytes as chunks of at most `limit` bytes of data that end at whole MiB; `extents`: the disk's, in order.

    Each has at most a quarter of the data that remains, or `least`, so that little is left to verify after the last.
    The first has half as much: of two copied in parallel one can then always be verified. A hole belongs to the next
    chunk, the last hole to the last chunk; holes of `hole` bytes or more, if given, are chunks of their own.
    """
    made, inside, extents = list[Chunk](), list[Extent](), list(extents)
    begin = at = gathered = 0
    rest = total = sum(count for _, count in extents)

    def cut(end: int) -> None:
        nonlocal begin, at, gathered, rest
        if end > begin:
            made.append(Chunk(begin, end - begin, gathered, tuple(inside)))
        begin, at, gathered, rest = end, end, 0, rest - gathered
        inside.clear()

    for start, count in extents:
        if hole and start // MiB * MiB - at >= hole:
            cut(at)
            cut(start // MiB * MiB)
        place, end = start, start + count
        while place < end:
            most = min(limit, max(least, rest // 4 // MiB * MiB))
            most = max(most // 2 // MiB * MiB, MiB) if rest == total else most
            if most - gathered < MiB and place >= at:
                cut(at)
                continue
            stop = min(end, max((place + most - gathered) // MiB * MiB, (place // MiB + 1) * MiB))
            inside.append((place, stop - place))
            place, gathered = stop, gathered + stop - place
            at = min(length, -(-stop // MiB) * MiB)
    if hole and length - at >= hole:
        cut(at)
    cut(length)
    return made


def bitmap_of(run: str) -> str:
    return f"migrena-{run}"


def files_beside(path: str, run: str) -> tuple[str, str]:
    """A run's files beside the destination's disk: the copy, and Nova's, kept until the run succeeds."""
    return f"{path}.migrena-{run}", f"{path}.migrena-{run}-fresh"


@dataclass(frozen=True)
class Moved:
    """A copied disk: bytes of data, and the digest of both ends (empty: not verified)."""

    held: int
    digest: str
    seconds: float
    looking: float = 0.0  # seconds to find what to send
    sending: float = 0.0
    is_rest: bool = False  # `held` counts only what changed since a warm copy's last pass
    unread: int = 0  # bytes unchanged since both digests were taken, by the dirty bitmap


def over_quota(limits: Mapping[str, int], flavor: Flavor | None, volumes: Collection[Volume] = ()) -> list[str]:
    """Which quotas one more instance or volumes would exceed; limits by Nova's and Cinder's names, -1: none."""
    rows = (("Instances", "Instances", "instances", 1), ("Cores", "Cores", "cores", flavor.vcpus),
            ("RAMSize", "RAM", "MiB of RAM", flavor.ram)) if flavor else (
        ("Volumes", "Volumes", "volumes", len(volumes)),
        ("VolumeGigabytes", "Gigabytes", "GiB of volumes", sum(volume.size for volume in volumes)))
    told = [(limits.get(f"maxTotal{most}", -1), limits.get(f"total{used}Used", 0), what, need)
        for most, used, what, need in rows]
    return [f"{used} of {most} {what} are used, {need} more are needed"
        for most, used, what, need in told if 0 <= most < used + need]


def refuse_quota(exceeded: Iterable[str]) -> list[Reason]:
    return [Reason(f"destination cloud: the quota is exceeded: {what}",
        "delete unused resources, or have the quota raised") for what in exceeded]


def pick_view(source: Disk, fresh: Disk, bases_equal: bool, *, in_place: bool = False) -> tuple[bool, str]:
    """Whether the file itself is copied (else the guest's view), and why."""
    source_format, fresh_format = source.top.format, fresh.top.format
    rules = (  # the first that holds
        (not source.top.is_file, False, "the source's disk is no file"),
        (in_place, False, "it is written to where it lies"),
        (source_format == fresh_format == "raw", True, "both disks are raw"),
        (not source_format == fresh_format == "qcow2", False,
         f"the source is {source_format}, the destination {fresh_format}"),
        (len(source.chain) == len(fresh.chain) == 1, True, "both disks are qcow2 without a base"),
        (len(source.chain) > 2 or len(fresh.chain) > 2, False, "a chain has more than one base"),
        (not source.base or not fresh.base, False, "only one of the disks has a base"),
        (not bases_equal, False, "the bases are not proven equal"),
        (True, True, "both bases have the same content"),
    )
    return next((whole_file, why) for holds, whole_file, why in rules if holds)


def pick_transport(settings: Settings, lacking: Sequence[str], top: DiskImage, whole_file: bool) -> tuple[str, str]:
    """nbd or qemu, and why; `lacking` names what nbd needs and the hosts lack."""
    rules = (  # the first that holds
        (settings.transport != "auto", settings.transport, "as asked for"),
        (settings.warm, "qemu", "--warm reads the disk of a running source through qemu-nbd"),
        (settings.compress == "on", "qemu", "--compress on needs qemu-nbd"),
        (lacking, "qemu", f"missing for nbd: {', '.join(lacking)}"),
        (not whole_file, "qemu", "the guest's view is read through qemu-nbd"),
        (top.length % 512, "qemu", f"the file's {top.length:,} bytes are not a multiple of 512"),
        (top.allocated < top.length * 9 // 10, "qemu", "the file is sparse, and holes are not sent"),
        (True, "nbd", "nbd-server and nbd-client are available"),
    )
    return next((transport, why) for holds, transport, why in rules if holds)


@dataclass(frozen=True)
class ComputeHost:
    """A compute host: what is free and what each instance has allocated, by Placement's resource classes."""

    name: str
    is_enabled: bool
    is_up: bool
    free: Mapping[str, int] = empty(dict)  # this and the next: empty if Placement does not say
    taken: Mapping[str, Mapping[str, int]] = empty(dict)


@dataclass(frozen=True)
class Move:
    """An instance, its target host, and its resources by Placement's classes."""

    server: Server
    to: str
    needs: Mapping[str, int] = empty(dict)

    @property
    def is_due(self) -> bool:
        return self.server.host != self.to


def too_little(move: Move, free: Mapping[str, int]) -> list[str]:
    """The resources of which a host has too little for an instance; unknown ones are taken to suffice."""
    return [name for name, need in move.needs.items() if free.get(name, need) < need]


def in_order(moves: Sequence[Move], hosts: Iterable[ComputeHost]) -> list[Move]:
    """The moves, so ordered that room is freed before it is needed; raises Refused for a cycle of full hosts."""
    free, waiting, ordered = {host.name: dict(host.free) for host in hosts}, list(moves), list[Move]()
    while waiting:
        if not (move := next((move for move in waiting if not too_little(move, free[move.to])), None)):
            told = ", ".join(
                f"{move.server.name} to {move.to} (too little {', '.join(too_little(move, free[move.to]))})"
                for move in waiting)
            raise Refused(f"none of these moves has room to begin: {told}", "leave one out, or make room on a host")
        waiting.remove(move)
        ordered.append(move)
        for host, sign in ((move.to, -1), (move.server.host, 1)):
            free[host] = {name: left + sign * move.needs.get(name, 0) for name, left in free.get(host, {}).items()}
    return ordered


def human(count: float) -> str:
    """Bytes as text: `1.8 GiB`."""
    power = min(max(int(count), 1).bit_length() - 1, 49) // 10
    return f"{count / 1024**power:.1f} {' KMGT'[power]}iB" if power else f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as text: `1:02:03`, or `4.2 s` below a minute."""
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


# ---- 4. Screen -------------------------------------------------------


def stamp() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S ")


def printable(line: str) -> str:
    return "".join(sign if sign.isprintable() else " " if sign == "\n" else sign.encode("unicode_escape").decode()
        for sign in line)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


@dataclass
class Share:
    """What a progress bar has of one disk, in bytes."""

    label: str
    total: int
    done: int = 0
    has_ended: bool = False


class Screen:
    """Output on standard error: bold titles and bars on a terminal, lines with their time elsewhere."""

    quiet = verbose = False
    log: TextIO | None = None  # gets every line, whatever the screen shows

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.is_terminal = self.stream.isatty()
        self.warnings: list[str] = []
        self.seconds: dict[str, float] = {}  # by step
        self.commands: dict[str, int] = {}  # number by host
        self._lock = threading.Lock()
        self._wipe = ""  # erases a status
        self._bar: Any = None
        self._shares, self._bar_lock = list[Share](), threading.Lock()

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """A scope for one step: prints its title and measures its seconds."""
        self.say(title, is_title=True)
        with self.timed(title.rstrip(".")):
            yield

    @contextmanager
    def timed(self, what: str, told: dict[str, Any] | None = None) -> Iterator[None]:
        """A scope whose seconds are recorded for the report, or in `told`."""
        began = time.monotonic()
        try:
            yield
        finally:
            (self.seconds if told is None else told)[what] = round(time.monotonic() - began, 2)

    def note(self, line: str) -> None:
        self.say(f"  {line}")

    def warn(self, line: str) -> None:
        """Shown even when quiet, and kept for the report."""
        self.warnings.append(line)
        self.say(f"  warning: {line}", always=True)

    def trace(self, line: str) -> None:
        """A remote command, shown with -v."""
        if self.verbose:
            self.say(f"    {shorten(line, 400)}")

    def say(self, line: str, *, always: bool = False, is_title: bool = False) -> None:
        """Prints one line; when quiet, only if `always`."""
        line = printable(line)
        self.record(line)
        if self.quiet and not always:
            return
        with self._lock:
            shown = f"\033[1m{line}\033[0m" if is_title and self.is_terminal else line
            with suppress(OSError):  # a closed terminal must not prevent undoing
                print(f"{self._wipe}{'' if self.is_terminal else stamp()}{shown}", file=self.stream, flush=True)
                self._wipe = ""

    def record(self, line: str) -> None:
        """Writes one line to the log file only; if that fails, the run goes on without the log."""
        with self._lock:
            try:
                if self.log:
                    print(f"{stamp()}{line}", file=self.log, flush=True)
            except OSError as error:
                self.log = None
                with suppress(OSError):
                    print(f"warning: the log file cannot be written any more: {error}", file=self.stream, flush=True)

    def status(self, line: str) -> None:
        """A line that the next one overwrites; on a terminal only."""
        if self.is_terminal and not self.quiet:
            with self._lock, suppress(OSError):
                print(f"{self._wipe}  {printable(line)}", end="", file=self.stream, flush=True)
                self._wipe = "\r\033[K"

    @contextmanager
    def counting(self, total: int, what: str) -> Iterator[Show]:
        """A progress bar on a terminal."""
        from tqdm import tqdm

        with tqdm(total=total, desc=f"  {what}", file=self.stream, dynamic_ncols=True, leave=False,
                disable=not self.is_terminal or self.quiet) as bar:
            def show(done: int) -> None:
                bar.update(done - bar.n)

            yield show

    @contextmanager
    def progress(self, total: int, label: str = "") -> Iterator[Show]:
        """A progress bar in bytes, or a line now and then. What is done in parallel has one bar, of the sums."""
        from tqdm import tqdm

        has_bar, mine = self.is_terminal and not self.quiet, Share(label.removesuffix(": "), total)
        tell = LogProgress(lambda line: (self.record if has_bar else self.note)(label + line), total)

        def show_sums() -> None:
            bar, parts = self._bar, self._shares
            bar.total = sum(one.total for one in parts)
            names = ", ".join(one.label for one in parts if not one.has_ended)
            bar.set_description_str(f"  {names}: " if names else "  ", refresh=False)
            bar.update(sum(one.done for one in parts) - bar.n)

        def show(done: int) -> None:
            with self._bar_lock:
                mine.done = done
                show_sums()
            tell(done)

        with self._bar_lock:
            if all(one.has_ended for one in self._shares):
                self._shares, self._bar = [], tqdm(
                    unit="B", unit_scale=True, unit_divisor=1024, file=self.stream, dynamic_ncols=True,
                    disable=not has_bar, bar_format=
                    "{desc}{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{rate_fmt}, {remaining} left]")
            again = [one for one in self._shares if one.has_ended and one.label == mine.label]  # a retry
            self._shares = [*(one for one in self._shares if one not in again), mine]
            show_sums()
        try:
            yield show
        finally:
            with self._bar_lock:
                mine.has_ended = True
                if all(one.has_ended for one in self._shares):
                    self._bar.close()


class LogProgress:
    """Progress for a log: a line at each 10 %, two seconds to a minute apart."""

    def __init__(self, say: Callable[[str], None], total: int) -> None:
        self.say, self.total = say, max(total, 1)
        self.began = self.said = time.monotonic()
        self.tenth = 0

    def __call__(self, done: int) -> None:
        now, tenth = time.monotonic(), done * 10 // self.total
        if now - self.said < (60 if tenth == self.tenth else 2):
            return
        self.tenth, self.said = tenth, now
        rate = done / max(now - self.began, 0.001)
        left = duration((self.total - done) / rate) if rate else "?"
        self.say(f"{done * 100 // self.total}% {human(done)} of {human(self.total)}, {human(rate)}/s, {left} left")


# ---- 5. Journal ------------------------------------------------------


PRIVATE: Final = partial(os.open, mode=0o600)  # opens files that only this user can read
ELSEWHERE: Final = "name another folder in STATE_FOLDER"


def state_folder(settings: Settings, environment: Mapping[str, str], *, to_write: bool = True) -> Path:
    """The folder of journals and locks, made for this user alone if it is missing. Raises UsageError."""
    folder = Path(
        settings.state_folder or Path(environment.get("XDG_STATE_HOME") or "~/.local/state", "migrena")).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if to_write and not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("it is not writable")
    except OSError as error:
        raise UsageError(f"the state folder {folder} cannot be used: {error}", ELSEWHERE) from error
    return folder


def new_run() -> str:
    """The id of a new run; ids sort by time."""
    return f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def parse_journal(path: Path) -> tuple[Rows, int]:
    """A journal's lines, without an incomplete last one, and their length in bytes. Raises UsageError."""
    entries, whole = [], 0
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", ELSEWHERE) from error
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or not isinstance(entry.get("event"), str) or not line.endswith(b"\n"):
                raise ValueError("no event")
        except ValueError:
            if number == len(lines):
                break
            raise UsageError(f"{path}, line {number}: this is not a journal's line, and others follow it",
                "to undo its run without it, move the file away, then: "
                "./migrena.py rollback --run-of SRC_UUID") from None
        entries.append(entry)
        whole += len(line)
    return entries, whole


class Journal:
    """A run's file of JSON lines: the intent and result of each act, synced to disk before the run goes on."""

    def __init__(self, folder: Path, run: str) -> None:
        self.path = folder / f"{run}.jsonl"
        try:
            self._file = open(self.path, "ab", buffering=0, opener=PRIVATE)
            self.entries, whole = parse_journal(self.path)
            os.truncate(self.path, whole)  # a line appended to an incomplete one would be unreadable
        except OSError as error:
            raise UsageError(f"the journal {self.path} cannot be written: {error}", ELSEWHERE) from error
        self.is_broken, self._writing = False, threading.Lock()

    def write(self, event: str, **facts: object) -> None:
        """Writes one line and syncs it. Raises StateError, but only once: undoing then goes on without it."""
        with self._writing:  # disks are copied in parallel
            entry = {"at": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), "event": event, **facts}
            self.entries.append(entry)
            if self.is_broken:
                return
            line = json.dumps(entry).encode() + b"\n"
            try:
                if self._file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._file.fileno())
            except OSError as error:
                self.is_broken = True
                raise StateError(f"the journal {self.path} can no longer be written: {error}",
                    "free space there, then run it again") from error

    @contextmanager
    def act(self, act: str, **facts: object) -> Iterator[dict[str, object]]:
        """A scope around an act: writes its intent, then `done` with the yielded dictionary, or `failed`."""
        self.write("intent", act=act, **facts)
        result: dict[str, object] = {}
        about = {key: facts[key] for key in {"disk", "of"} & facts.keys()}  # every line names what it is about
        try:
            yield result
        except BaseException as error:
            with suppress(StateError):  # the first error is reported
                self.write("failed", act=act, **about, **result, error=str(error))
            raise
        self.write("done", act=act, **about, **result)

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """A scope for a process's first lines; raises UsageError if they cannot be written."""
        is_new = not self.path.stat().st_size
        try:
            yield
        except StateError as error:
            self.close()
            if is_new:
                self.path.unlink(missing_ok=True)
            raise UsageError(str(error), f"free space there, or {ELSEWHERE}") from error

    @contextmanager
    def ending(self, undo: Undo, done: str = "done", failed: str = "failed") -> Iterator[None]:
        """A scope around the undo scope: writes the run's result and what is left. A failure leaves a seed as it is."""
        result, error = done, ""
        try:
            yield
        except BaseException as failure:
            is_bug = not isinstance(failure, (MigrenaError, Interrupted))
            if failed == "failed" and any(entry["event"] == "seeded" for entry in self.entries):
                failed = "seeded"
            result, error = "left" if is_bug else failed, str(failure)
            raise
        finally:
            with suppress(StateError):
                self.write("ended", result="left" if undo.left else result, error=error, left=undo.left)
            if self.is_broken:
                undo.screen.warn(f"the journal {self.path} lacks the run's end: `status` will show it as killed")
            self.close()

    def close(self) -> None:
        self._file.close()


@contextmanager
def flocked(path: Path, owner: str = "") -> Iterator[bool]:
    """Whether the file could be locked, with `owner` in it, until the scope or the process ends; then it is removed."""
    def free() -> None:
        with suppress(OSError):  # it is unlocked even if it cannot be removed
            path.unlink()

    with ExitStack() as stack:
        is_ours = False
        try:
            while not is_ours:  # the holder may just have removed it
                file = stack.enter_context(open(path, "ab", buffering=0, opener=PRIVATE))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with suppress(FileNotFoundError):
                    is_ours = os.path.samestat(os.stat(path), os.fstat(file.fileno()))
            stack.callback(free)
            file.truncate(0)
            file.write(owner.encode())
        except BlockingIOError:
            pass
        except OSError as error:
            raise UsageError(f"{path} cannot be created: {error}", ELSEWHERE) from error
        yield is_ours


@contextmanager
def only_run_of(folder: Path, source: str, run: str) -> Iterator[None]:
    """Holds the lock on a source; raises Refused while another run on this machine holds it."""
    if not source:  # killed before its first line was complete, or the file was emptied
        raise Refused(f"the journal of run {run} does not name a source: nothing was begun, or somebody emptied it",
            "./migrena.py rollback --run-of SRC_UUID uses the marks in Nova; if there are none, delete the journal")
    for _ in range(6):  # status takes a lock for a moment to test it
        with flocked(folder / f"source-{source}.lock", f"{os.getpid()} {run}\n") as is_ours:
            if is_ours:
                yield
                return
        time.sleep(0.1)
    pid, other = lock_holder(folder, source)
    raise Refused(f"another run is moving {source} (process {pid or 'unknown'}, run {other or 'unknown'})",
        "wait until it ends; see: ./migrena.py status")


def lock_holder(folder: Path, source: str) -> tuple[int, str]:
    """The process and the run that hold the lock on a source, or (0, "")."""
    with suppress(OSError, ValueError), open(folder / f"source-{source}.lock", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            pid, _, run = lock.read().strip().partition(" ")
            return int(pid or 0), run
    return 0, ""


@contextmanager
def slots(folder: Path, hosts: Iterable[str], most: int, screen: Screen) -> Iterator[None]:
    """Waits for one of the `most` slots for copies on each of these hosts, and holds it."""
    with ExitStack() as stack:
        for host in sorted(set(hosts)):  # always in the same order, to prevent deadlocks
            paths = [folder / f"slot-{urllib.parse.quote(host, safe='')}-{number}.lock" for number in range(most)]
            has_told = False
            while not any(_try_lock(path, stack) for path in paths):
                if not has_told:
                    screen.note(f"Waiting: {host} already has {most} copies (--max-per-host).")
                has_told = True
                screen.status(f"Waiting for a slot on {host}")
                time.sleep(0.5)
        yield


def _try_lock(path: Path, stack: ExitStack) -> bool:
    """Whether this file could be locked; if so, the stack holds the lock."""
    with ExitStack() as trial:
        if is_ours := trial.enter_context(flocked(path)):
            stack.enter_context(trial.pop_all())
    return is_ours


@dataclass(frozen=True)
class Step:
    """One act of a run; `result` is done, failed, or empty if unknown."""

    name: str
    began: str
    ended: str = ""
    result: str = ""
    facts: Facts = empty(dict)

    @property
    def of(self) -> str:
        """What a thing was made for; journals of earlier versions have a volume's disk."""
        return str(self.facts.get("of", self.facts.get("disk")))

    @property
    def made(self) -> str:
        """The id of the thing that was made, empty if not known; the same."""
        return str(self.facts.get("id", self.facts.get("volume", "")))


@dataclass(frozen=True)
class DiskRecord:
    """One disk of a run by the run's journal, sizes in bytes."""

    job: Facts = empty(dict)  # files, and stat_of() the source's
    arrived: tuple[tuple[int, int], ...] = ()  # chunks sent: offset, length
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class RunRecord:
    """A run by its journal, sizes in bytes; empty where that says nothing."""

    run: str
    state: str  # running, killed, seeded, done, failed (and rolled back), left, rolled back
    began: str
    facts: Facts  # the first line: source, destination, settings
    acts: tuple[Step, ...] = ()
    disks: Mapping[str, DiskRecord] = empty(dict)  # by key
    rate: float = 0.0
    retries: int = 0
    error: str = ""
    left: tuple[str, ...] = ()
    is_undoing: bool = False  # a rollback was begun and must be completed
    keeps_destination: bool = False  # whether that one was to keep the destination
    before_seed: int = 0  # the number of acts before the last seed
    seed: Facts = empty(dict)  # the last one: when, the disks' sizes there, downtime
    last_pass: Facts = empty(dict)  # of a warm copy, and when it ended
    seeds: bool = False  # whether its last process was to make or update a seed

    @property
    def is_lost(self) -> bool:
        """Whether there is no journal, or only that of a rollback without one."""
        return not self.run or "attached" in self.facts

    @property
    def source(self) -> str:
        return str(self.facts.get("source", ""))

    @property
    def recent(self) -> tuple[Step, ...]:
        """The acts since the last seed: what was done to the source before is undone."""
        return self.acts[self.before_seed :]

    @property
    def done(self) -> int:
        return sum(disk.done for disk in self.disks.values())

    @property
    def sent(self) -> int:
        return sum(length for disk in self.disks.values() for _, length in disk.arrived)

    @property
    def total(self) -> int:
        return sum(disk.total for disk in self.disks.values())

    @property
    def destination(self) -> str:
        """The new instance's id, empty if Nova's answer was lost."""
        return self._told(self.acts, "create destination", "server")

    def made(self, kind: str) -> dict[str, str]:
        """The ids of what it made of a kind, by what it made them for: ports for the source's, and so on."""
        return {act.of: act.made for act in self.acts if act.name == f"create {kind}" and act.made}

    def unanswered(self, kind: str) -> dict[str, Step]:
        """The requests for things of a kind whose outcome is not known, by what they were for."""
        known = self.made(kind)
        return {act.of: act for act in self.acts
            if act.name == f"create {kind}" and act.of not in known and not act.facts.get("refused")}

    @property
    def is_seed(self) -> bool:
        """Whether the destination has a seed, as it also does once it gave no answer and the source was to go on."""
        return bool(self.seed) or any(act.name == "await answer" and act.facts.get("missing") for act in self.recent)

    @property
    def copied(self) -> str:
        """When all disks were last copied."""
        known = [act.ended for act in self.recent if act.name == "copy" and act.result == "done"]
        known += [self.seed.get("copied", self.began), self.last_pass.get("at", self.began)]
        return max(known, key=datetime.fromisoformat)

    @property
    def cut_over(self) -> str:
        """The command that cuts over."""
        due = self.facts.get("settings", {}).get("cutover_at")
        is_past = due and datetime.fromisoformat(due) < datetime.now(timezone.utc)
        return f"./migrena.py resume {self.run}{' --cutover-at now' if is_past else ''}"

    @property
    def go_on(self) -> str:
        """The command that continues it; never a cut-over where none was begun."""
        return f"./migrena.py resume {self.run}{' --seed' if self.seeds and not self.stopped_at else ''}"

    @property
    def has_begun(self) -> bool:
        """Whether there is something to continue."""
        return any(act.name == "create destination" for act in self.acts)

    @property
    def was_running(self) -> bool:
        """Whether the source ran when it was stopped; before that, when the run began."""
        known = [act.facts["was_running"] for act in self.recent if "was_running" in act.facts]
        return bool(known[-1] if known else self.facts.get("was_running"))

    @property
    def step(self) -> str:
        return re.sub(r" [0-9a-f-]{36}", "", self.acts[-1].name) if self.acts else "survey"

    @property
    def seconds_left(self) -> float:
        """Of the copy, at the present rate."""
        return round((self.total - self.done) / self.rate, 1) if self.rate and self.state == "running" else 0.0

    @property
    def job(self) -> str:
        """What the run is if it is not the copy of an instance: image or import."""
        return str(self.facts.get("job", ""))

    @property
    def stopped_at(self) -> datetime | None:
        """When the source's first stop was requested, by this machine's clock."""
        return next((datetime.fromisoformat(act.began) for act in self.recent if act.name == "stop source"), None)

    @property
    def swapped(self) -> set[str]:
        return {key_of(act.facts) for act in self.recent if act.name == "swap in" and act.result == "done"}

    def has_done(self, act: str) -> bool:
        return any(known.name == act and known.result == "done" for known in self.recent)

    @property
    def source_request(self) -> str | None:
        """The id of the last request that stopped the source, None if there is none."""
        return self._told(self.recent, "stop source", "request") or None

    @property
    def destination_request(self) -> str:
        """The id of the last request that stopped the destination, or nothing."""
        return self._told(self.acts, "stop destination", "request")

    @staticmethod
    def _told(acts: Sequence[Step], act: str, fact: str) -> str:
        return next((str(known.facts[fact]) for known in reversed(acts)
            if known.name == act and fact in known.facts), "")


def read_run(folder: Path, run: str, *, is_ours: bool = False) -> RunRecord:
    """A run by its journal and lock; `is_ours`: the caller holds the lock. Raises UsageError."""
    path = folder / f"{run}.jsonl"
    try:
        record = record_of(run, parse_journal(path)[0])
    except (LookupError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: this is not a journal of migrena", "move the file away") from error
    is_running = not is_ours and lock_holder(folder, record.source)[1] == run
    return replace(record, state="running") if is_running else record


def record_of(run: str, entries: Sequence[dict[str, Any]]) -> RunRecord:
    """A run by these lines of its journal; a run without an end is `killed`."""
    facts = next((entry for entry in entries if entry["event"] == "run"), {})
    last = {entry["event"]: entry for entry in entries}
    recent = _lines_since(entries, "seeded") if "seeded" in last else entries
    keys = dict.fromkeys(key_of(entry) for entry in recent if entry["event"] in ("job", "chunk", "progress"))
    end = next((entry for entry in _lines_since(entries, "run", "resume", "rollback") if entry["event"] == "ended"), {})
    return RunRecord(
        run, str(end.get("result", "killed")), str(facts.get("at", "")), facts, _acts(entries),
        {key: _disk_record([entry for entry in recent if key_of(entry) == key]) for key in keys},
        before_seed=sum(entry["event"] == "intent" for entry in entries[: len(entries) - len(recent)]),
        seed=last.get("seeded", {}), last_pass=last.get("pass", {}), rate=_rate(entries),
        retries=sum(entry["event"] == "retry" for entry in entries),
        error=str(end.get("error", "")), left=tuple(end.get("left", ())), is_undoing="rollback" in last,
        keeps_destination=bool(last.get("rollback", {}).get("keep_destination")),
        seeds=bool(last.get("asked to resume", facts).get("seed")))


def key_of(entry: Facts) -> str:
    return str(entry.get("disk", ROOT))


def _disk_record(entries: Sequence[dict[str, Any]]) -> DiskRecord:
    last = {entry["event"]: entry for entry in entries}
    return DiskRecord(
        last.get("job", {}),
        tuple((entry["offset"], entry["length"]) for entry in entries if entry["event"] == "chunk"),
        next((entry["done"] for entry in reversed(entries) if "done" in entry), 0),
        last.get("progress", {}).get("total", 0))


def _lines_since(entries: Sequence[dict[str, Any]], *events: str) -> Sequence[dict[str, Any]]:
    """The lines from the last of these events on; all if there is none."""
    return entries[max((number for number, entry in enumerate(entries) if entry["event"] in events), default=0) :]


def _acts(entries: Iterable[Facts]) -> tuple[Step, ...]:
    """The acts in the order in which they began, each with its end if any."""
    acts: list[Step] = []
    latest: dict[str, int] = {}
    for entry in (one for one in entries if "act" in one):
        event, name = entry["event"], entry["act"]
        facts = {key: value for key, value in entry.items() if key not in ("at", "event", "act")}
        if event == "intent":
            latest[name] = len(acts)
            acts.append(Step(name, entry["at"], facts=facts))
        elif event in ("done", "failed") and name in latest:
            act = acts[latest[name]]
            acts[latest[name]] = Step(name, act.began, entry["at"], event, {**act.facts, **facts})
    return tuple(acts)


def _rate(entries: Sequence[dict[str, Any]]) -> float:
    """Bytes per second of the last attempt, by its first and last line of progress."""
    told, done = list[tuple[datetime, int]](), dict[str, int]()
    for entry in _lines_since(entries, "job", "retry", "resume", "pass"):
        if entry["event"] == "progress":
            done[key_of(entry)] = entry["done"]
            told.append((datetime.fromisoformat(entry["at"]), sum(done.values())))
    seconds = (told[-1][0] - told[0][0]).total_seconds() if told else 0.0
    return (told[-1][1] - told[0][1]) / seconds if seconds > 0 else 0.0


def known_runs(folder: Path) -> list[str]:
    """The ids of this machine's runs, newest first."""
    return sorted((path.stem for path in folder.glob("*.jsonl")), reverse=True)


def find_run(folder: Path, beginning: str) -> str:
    """The run whose id begins like this; raises Refused unless it is exactly one."""
    if not beginning:
        raise UsageError("RUN is empty", "see: ./migrena.py status")
    found = [run for run in known_runs(folder) if run.startswith(beginning)]
    if beginning not in found and len(found) != 1:
        raise Refused(f"{len(found) or 'no'} runs in {folder} begin with {beginning!r}",
            f"name one of {', '.join(found)}" if found else "see: ./migrena.py status")
    return beginning if beginning in found else found[0]


def way_on(folder: Path, run: str) -> str:
    """The commands that continue a run or undo it; "" without a journal of it here."""
    with suppress(UsageError, OSError):
        if run in known_runs(folder) and (record := read_run(folder, run)).source:
            undo = f"./migrena.py rollback {run}"
            if record.state in ("failed", "rolled back"):  # but its marks are there
                undo = f"./migrena.py rollback --run-of {record.source}"
            is_over = record.is_undoing or record.state in ("done", "failed", "rolled back")
            return undo if is_over or not record.has_begun else f"{record.go_on}, or {undo}"
    return ""


def still_to_write(folder: Path, run: str, host: str) -> int:
    """Bytes that earlier runs on this machine have still to write to a host (given with its cloud's URL)."""
    running = {lock_holder(folder, path.stem.removeprefix("source-"))[1] for path in folder.glob("source-*.lock")}
    asked = {}
    for other in {run, *running} - {""}:
        with suppress(UsageError, OSError):
            entries = parse_journal(folder / f"{other}.jsonl")[0]
            need = next((one for one in reversed(entries) if one["event"] == "space" and one["host"] == host), None)
            since = _lines_since(entries, "space")
            if need and not any(one["event"] == "done" and one["act"] == "copy" for one in since):
                done = Counter[str]()
                for one in entries:
                    done[key_of(one)] = max(done[key_of(one)], one.get("done", 0))
                asked[other] = need["at"], int(need["need"]) - sum(done[key] for key in need.get("disks", done))
    return sum(max(0, rest) for other, (at, rest) in asked.items()
        if other != run and (at, other) < (asked[run][0], run))


def lines_of_runs(folder: Path, event: str) -> Iterator[dict[str, Any]]:
    for run in known_runs(folder):
        with suppress(UsageError):
            yield from (one for one in reversed(parse_journal(folder / f"{run}.jsonl")[0]) if one["event"] == event)


def last_rate(folder: Path, clouds: Sequence[str]) -> float:
    """Bytes per second of the last run between these clouds, or 0.0."""
    rates = (entry.get("rate") for entry in lines_of_runs(folder, "finished") if entry.get("clouds") == list(clouds))
    return float(next(filter(None, rates), 0))


class Undo:
    """Undo steps, run newest first; one that fails is listed in `left`, and the others still run."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.left: list[str] = []
        self.ways: list[str] = []  # commands that help with them
        self.doing = ""  # the current step, shown on a second Ctrl-C
        self.has_begun = False  # from then on signals do not interrupt
        self._steps: list[tuple[str, Callable[[], None], Callable[[bool], bool]]] = []  # each with whether it is due

    def always(self, what: str, action: Callable[[], None]) -> None:
        """A step for every end of the run."""
        self._steps.append((what, action, lambda is_undone: True))

    def on_failure(self, what: str, action: Callable[[], None], unless: Callable[[], bool] = lambda: False) -> None:
        """A step for a failed run, but not if both copies are kept, nor if by then it is not wanted."""
        self._steps.append((what, action, lambda is_undone: is_undone and not unless()))

    def __enter__(self) -> Undo:
        self.has_begun, self._steps = False, []  # used once per image
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
            trace: TracebackType | None) -> None:
        self.has_begun, is_undone = True, bool(kind) and not isinstance(error, Kept)
        if isinstance(error, Kept):
            self.keep(error)
        if is_undone and self._steps:
            self.screen.say(
                f"Undo: {error}" if isinstance(error, Interrupted) else "The run failed; undo.", always=True)
        for what, action, is_due in reversed(self._steps):
            if is_due(is_undone):
                if kind:
                    self.screen.note(what)
                self.attempt(what, action)

    def keep(self, kept: Kept) -> None:
        for reason in kept.reasons:
            self.left += [reason.problem] if reason.problem not in self.left else []
            self.ways += [reason.way_out] if reason.way_out and reason.way_out not in self.ways else []

    def attempt(self, what: str, action: Callable[[], object]) -> None:
        self.doing = what
        try:
            try:
                action()
            except StateError as mishap:  # raised only once, perhaps before the step was done
                self.screen.warn(f"{mishap}; undoing goes on without it")
                action()
        except Kept as kept:
            self.keep(kept)
        except Exception as mishap:
            self.left.append(f"{what} did not succeed: {shorten(str(mishap))}")
        self.doing = ""


# ---- 6. Threads ------------------------------------------------------

class DeferredSignal(threading.local):
    """A signal that is deferred by defer_signals(), in the main thread."""

    depth = 0
    number = 0


DEFERRED: Final = DeferredSignal()


@contextmanager
def defer_signals() -> Iterator[None]:
    """Defers Interrupted to the end of the scope: else a lock inside paramiko or a pool could stay locked."""
    DEFERRED.depth += 1
    try:
        yield
    finally:
        DEFERRED.depth -= 1
        if DEFERRED.number and not DEFERRED.depth:
            number, DEFERRED.number = DEFERRED.number, 0
            raise Interrupted(number)


def result_of(future: Future[T], meanwhile: Callable[[], None] = lambda: None) -> T:
    """Another thread's result or exception; signals interrupt the wait."""
    while True:
        with defer_signals():
            if wait([future], 0.2).done:
                return future.result()
        meanwhile()


def in_parallel(one: Callable[[], T], other: Callable[[], S]) -> tuple[T, S]:
    """The results of two functions run in parallel; raises the first one's exception, else the other's."""
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(one), pool.submit(other)
        return result_of(first), result_of(second)


# ---- 7. Programs -----------------------------------------------------

# Functions and classes that are sent to hypervisors and run there, by a Python 3.6 or later without further packages.
# Annotations and docstrings are not sent.
PYTHON: Final = ("python3", "-ISc")  # isolated mode, without site packages, which start slowly
OWN_TEXT: Final = Path(__file__).read_text(encoding="utf-8")  # as it is now: the file may be replaced while a run lasts
PARSING: Final = threading.Lock()  # two at once: "SystemError: AST constructor recursion depth mismatch" [seen, 3.11]


class Bare(ast.NodeTransformer):
    """Code without annotations and docstrings."""

    def visit(self, node: ast.AST) -> Any:
        self.generic_visit(node)
        if isinstance(node, ast.AnnAssign):
            return ast.copy_location(ast.Assign([node.target], node.value), node) if node.value else None
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
        for name in {"returns", "annotation"} & set(node._fields):
            setattr(node, name, None)
        return node


@cache
def parts_of_programs() -> dict[str, Any]:
    """The definitions of this section, by name."""
    with PARSING:
        tree = ast.parse("#" + OWN_TEXT.partition(". Programs --")[2].partition("\n# ----")[0])
    return {ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else node.name: node
        for node in Bare().visit(tree).body}


@cache
def program(entry: Callable[..., None]) -> str:
    """The text for PYTHON that calls a function of this section with the words after it; has all that it uses."""
    parts = parts_of_programs()
    names, more = set[str](), {entry.__name__, "sys"}
    while more:
        names |= more
        code = [parts[name] for name in more if name in parts]
        more = {word.id for part in code for word in ast.walk(part) if isinstance(word, ast.Name)} - names
    imports = ", ".join(name for name in sorted(names) if inspect.ismodule(globals().get(name)))
    lines = (ast.unparse(node) for name, node in parts.items() if name in names)
    return "\n".join((f"import {imports}", f"MiB = {MiB}", *lines, f"{entry.__name__}(*sys.argv[1:])\n"))


def document_in(printed: str) -> Any:
    """The JSON document in the output of a command or of a wrapper around it; raises ValueError without one."""
    found: list[tuple[int, int, int, Any]] = []  # lines, length, number, document
    end = 0
    for begin in re.finditer(r"^[\[{]", printed, re.MULTILINE):
        if begin.start() >= end:
            try:
                document, end = json.JSONDecoder().raw_decode(printed, begin.start())
            except ValueError:
                continue
            found.append((printed.count("\n", begin.start(), end), end - begin.start(), len(found), document))
    if not found:
        raise ValueError(f"no JSON in its output: {printed[:300]}")
    return max(found)[3]


def pairs_of(printed: str) -> list[tuple[int, int]]:
    """The two numbers of each line; raises ValueError where it has more or fewer."""
    return [(int(one), int(other)) for one, other in map(str.split, printed.splitlines())]


def joined(spans: Iterable[Sequence[int]], gap: int = 0, most: int = sys.maxsize) -> list[list[int]]:
    """First byte and the one after the last of each: those no further apart than `gap` made one.

    More than `most` are joined over larger gaps, in which `patch` makes holes of zeros again.
    """
    made: list[list[int]] = []
    for start, stop in spans:
        if made and made[-1][1] + gap >= start:
            made[-1][1] = stop
        else:
            made.append([start, stop])
        if len(made) > most:
            gap = max(2 * gap, 1 << 12)
            made = joined(made, gap)
    return made


def blocks_of(extents: Iterable[Sequence[int]]) -> set[int]:
    return {block for start, count in extents for block in range(start // MiB, -(-(start + count) // MiB))}


def tls_of(who: str, folder: str) -> ssl.SSLContext:
    """TLS for a run's "server" or "client", which take only each other."""
    import ssl

    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if who == "server" else ssl.PROTOCOL_TLS_CLIENT)
    tls.load_cert_chain(f"{folder}/{who}-cert.pem", f"{folder}/{who}-key.pem")
    tls.load_verify_locations(f"{folder}/ca-cert.pem")
    tls.verify_mode = ssl.CERT_REQUIRED
    return tls


def map_of(node: Mapping[str, Any], *more: str) -> Any:
    """What qemu-img map tells of an image, part by part."""
    words = ["qemu-img", "map", "--output=json", *more, "json:" + json.dumps(node)]
    return document_in(subprocess.check_output(words, stdin=subprocess.DEVNULL, universal_newlines=True))


CELL: Final = 64 * 1024  # bytes, which a digest leaves out where all are zeros
NO_HOLES: Final = "all of it is read"  # in an export's node: what it tells of holes is not believed


class DiskFile:
    """A file from `begin` to `end`, with a descriptor for each thread: os.preadv came with Python 3.7.

    It is read past the page cache if possible: what is proven comes from the disk, and others keep their cache.
    """

    def __init__(self, path: str, begin: int, end: int) -> None:
        self.path, self.own, self.flags = path, threading.local(), os.O_RDONLY | os.O_DIRECT
        try:
            os.readv(self.descriptor(), [mmap.mmap(-1, CELL)])
        except OSError:  # no O_DIRECT on this file system
            self.own, self.flags = threading.local(), os.O_RDONLY
        self.limit(begin, end)

    def limit(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        if not self.flags & os.O_DIRECT and end > begin:
            os.posix_fadvise(self.descriptor(), begin, end - begin, os.POSIX_FADV_DONTNEED)

    def descriptor(self) -> int:
        if not hasattr(self.own, "descriptor"):
            self.own.descriptor = os.open(self.path, self.flags)
        return int(self.own.descriptor)

    def extents(self) -> Iterator[tuple[int, int]]:
        """Where data is: first byte and the one after the last."""
        mode, at = os.fstat(self.descriptor()).st_mode, self.begin
        if stat.S_ISBLK(mode):  # SEEK_DATA is no use on a device
            yield at, self.end
            return
        if not stat.S_ISREG(mode):
            raise OSError("it is neither a file nor a block device")
        while at < self.end:
            try:
                start = os.lseek(self.descriptor(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # means: no more data
                    return
                raise
            at = os.lseek(self.descriptor(), start, os.SEEK_HOLE)
            if start < self.end:
                yield start, min(at, self.end)

    def read(self, at: int, into: memoryview, count: int) -> None:
        """Fills the first `count` bytes of `into` with those at a place."""
        os.lseek(self.descriptor(), at, os.SEEK_SET)
        found = os.readv(self.descriptor(), [into])
        if found <= count - 512:
            raise OSError(f"it ends at byte {at + found}")
        into[found:count] = bytes(max(0, count - found))  # a disk that ends within a sector: qemu pads with zeros

    def stream(self, extents: Iterable[Extent], room: memoryview) -> Iterator[Extent]:
        """Gives each piece, in any order, when what it holds is in `room`."""
        for at, count in extents:
            self.read(at, room, count)
            yield at, count


class ExportClient:
    """An NBD export (doc/proto.md of the nbd project), by qemu's node, used as a DiskFile and as a NewFile.

    Each thread has its own connection. The folder has the certificates for TLS.
    """

    def __init__(self, node: Mapping[str, str], begin: int, end: int, folder: str) -> None:
        self.node, self.folder, self.own, self.asked = node, folder, threading.local(), 0
        self.limit(begin, end)

    def limit(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end

    def extents(self) -> Iterator[tuple[int, int]]:
        if NO_HOLES in self.node:
            yield self.begin, self.end
            return
        wanted = f"--start-offset={self.begin}", f"--max-length={self.end - self.begin}"
        for part in map_of({"driver": "raw", "file": self.node}, *wanted):
            if part["data"] and not part["zero"] and part["start"] < self.end:
                yield max(part["start"], self.begin), min(part["start"] + part["length"], self.end)

    def connect(self) -> None:
        path, host, port = (self.node.get(f"server.{key}", "") for key in ("path", "host", "port"))
        if path:
            link = socket.socket(socket.AF_UNIX)
            link.connect(path)
        else:
            link = socket.create_connection((host, int(port)), 60)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link.settimeout(None)
        self.own.link = link
        self.hear(18)
        link.sendall(struct.pack(">I", 3))
        if "tls-creds" in self.node:
            link.sendall(struct.pack(">8sII", b"IHAVEOPT", 5, 0))
            if struct.unpack(">12xII", self.hear(20)) != (1, 0):
                raise OSError("it takes no TLS")
            link = self.own.link = tls_of("client", self.folder).wrap_socket(link, server_hostname=host)
        name = self.node.get("export", "").encode()
        link.sendall(struct.pack(">8sII", b"IHAVEOPT", 1, len(name)) + name)
        self.hear(10)

    def hear(self, count: int) -> memoryview:
        return self.answer(memoryview(bytearray(count)))

    def answer(self, into: memoryview) -> memoryview:
        got = 0
        while got < len(into):
            count = self.own.link.recv_into(into[got:])
            if not count:
                raise OSError("it ended")
            got += count
        return into

    def ask(self, at: int, count: int, command: int = 0, content: bytes | memoryview = b"") -> None:
        if not hasattr(self.own, "link"):
            self.connect()
        self.own.link.sendall(struct.pack(">IHHQQI", 0x25609513, 0, command, at, at, count))
        self.own.link.sendall(content)

    def told(self) -> int:
        magic, error, at = struct.unpack(">IIQ", self.hear(16))
        if magic != 0x67446698 or error:
            raise OSError(f"it fails at byte {at}: error {error}")
        return int(at)

    def act(self, at: int, count: int, command: int = 0) -> None:
        self.ask(at, count, command)
        self.told()

    def read(self, at: int, into: memoryview, count: int) -> None:
        self.act(at, count)
        self.answer(into[:count])

    def stream(self, extents: Iterable[Extent], room: memoryview) -> Iterator[Extent]:
        """Asks for as many at a time as the wire may hold."""
        asked: dict[int, int] = {}
        rest = iter(extents)
        piece, most = next(rest, None), 16 * MiB
        while piece or asked:
            if piece and len(asked) < 256 and most > 0:
                self.ask(*piece)
                asked[piece[0]] = piece[1]
                most -= piece[1]
                piece = next(rest, None)
            else:
                at = self.told()
                count = asked.pop(at)
                most += count
                self.answer(room[:count])
                yield at, count

    def write(self, at: int, content: memoryview) -> None:
        self.put(at, len(content), 1, content)

    def hollow(self, at: int, count: int) -> None:
        self.put(at, count, 6)

    def put(self, at: int, count: int, command: int, content: bytes | memoryview = b"") -> None:
        """Asks for a change while earlier ones are on their way: qemu-nbd takes 16."""
        self.ask(at, count, command, content)
        self.asked += 1
        self.wait_for(self.asked - 15)

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            self.told()
            self.asked -= 1

    def sync(self) -> None:
        self.wait_for(self.asked)
        self.act(0, 0, 3)


class NewFile:
    def __init__(self, path: str) -> None:
        import ctypes

        self.descriptor, self.fallocate = os.open(path, os.O_RDWR), ctypes.CDLL(None).fallocate
        self.fallocate.argtypes = ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64
        self.unwritten = 0

    def write(self, at: int, content: bytes | memoryview) -> None:
        self.unwritten += len(content)
        while content:
            count = os.pwrite(self.descriptor, content, at)
            content, at = content[count:], at + count
        if self.unwritten > 16 * MiB:  # start writing it back now, not all at the end
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            self.unwritten = 0

    def hollow(self, at: int, count: int) -> None:
        """Makes a hole, or where the file system has none writes zeros."""
        if self.fallocate(self.descriptor, 3, at, count):  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
            self.write(at, bytes(count))

    def sync(self) -> None:
        os.fsync(self.descriptor)


AnyDisk = DiskFile | ExportClient


class Pace:
    """No more bytes a second than a rate; 0: no limit. As in `500,60:200,90:0` it changes after so many seconds."""

    def __init__(self, rates: str) -> None:
        self.began = self.since = time.monotonic()
        self.plan = [(float(at or 0), int(rate)) for at, _, rate in (
            word.rpartition(":") for word in (rates or "0").split(","))]
        self.rate, self.passed = self.plan[0][1], 0

    @property
    def least(self) -> int:
        """The lowest; 0: never a limit."""
        return min([rate for _, rate in self.plan if rate] or [0])

    def hold_back(self, count: int) -> None:
        """Waits until so many bytes more may have been read."""
        now = time.monotonic()
        rate = [rate for at, rate in self.plan if self.began + at <= now][-1]
        if rate != self.rate:
            self.since, self.rate, self.passed = now, rate, 0
        self.passed += count
        if rate:
            time.sleep(max(0, self.since + self.passed / rate - time.monotonic()))


def runs_of(room: memoryview, start: int, stop: int) -> list[list[int]]:
    """The runs of cells that are not all zeros."""
    zeros = bytes(CELL)
    cells = ((at, min(at + CELL, stop)) for at in range(start, stop, CELL))
    return joined((at, to) for at, to in cells if room[at] or bytes(room[at:to]) != zeros[:to - at])


def lines_told() -> Iterator[str]:
    """Gives each line of input, without dots: see LEASED_SERVICE. Its end, or a minute of silence, ends us."""
    import queue

    told: queue.Queue[str] = queue.Queue()

    def hear() -> None:
        said = b""
        while select.select([0], [], [], 60)[0]:
            part = os.read(0, 4096)
            if not part:
                break
            *lines, said = (said + part.replace(b".", b"")).split(b"\n")
            for line in lines:
                told.put(line.decode())
        os._exit(0)

    threading.Thread(target=hear, daemon=True).start()
    while True:
        yield told.get()


def tell_digests(disk: AnyDisk, touched: set[int] | None, pace: Pace, pool: Executor) -> None:
    """Prints the number and a sha256 of each block, or of each `touched` one, that is not all zeros.

    The sha256 is of runs of cells that are not all zeros, each after its place and length: holes need not be read.
    """
    filled: dict[int, list[tuple[int, int]]] = {}  # each with its ranges of cells that hold data
    for start, stop in joined((start // CELL * CELL, -(-stop // CELL) * CELL) for start, stop in disk.extents()):
        for block in range(start // MiB, -(-stop // MiB)):
            if touched is None or block in touched:
                filled.setdefault(block, []).append((max(start, block * MiB), min(stop, (block + 1) * MiB)))
    own = threading.local()

    def digest(block: int) -> tuple[int, str]:
        if not hasattr(own, "room"):
            own.room = memoryview(mmap.mmap(-1, MiB))  # page-aligned, for O_DIRECT
        base, room, runs, found = block * MiB, own.room, [], hashlib.sha256()
        for first, last in filled[block]:
            start, stop = first - base, min(last, disk.end) - base
            disk.read(first, room[start:last - base], stop - start)
            pace.hold_back(stop - start)
            runs += runs_of(room, start, stop)
        for start, stop in runs:
            found.update(struct.pack(">QQ", base + start, stop - start))
            found.update(room[start:stop])
        return block, found.hexdigest() if runs else ""

    order, slow = sorted(filled), pace.least
    turn = max(1, min(256, slow // MiB)) if slow else 256  # a sign of life a second, at any rate
    for at in range(0, len(order), turn):
        for block, found in pool.map(digest, order[at:at + turn]):
            if found:
                print(block, found)
        print(".", flush=True)  # shows progress, even for zeros


def bring(disk: AnyDisk, new: NewFile | ExportClient, wanted: Sequence[Sequence[int]], rates: str) -> None:
    """Makes `new` equal to a disk at these extents, to be kept by its medium; prints progress as qemu-img does."""
    extents = ((at, min(MiB, start + count - at)) for start, count in wanted for at in range(start, start + count, MiB))
    room, pace, total = memoryview(mmap.mmap(-1, MiB)), Pace(rates), sum(count for _, count in wanted)
    told, done = pace.began, 0
    for at, count in disk.stream(extents, room):
        last = 0
        for start, stop in [*runs_of(room, 0, count), [count, count]]:
            if start > last:
                new.hollow(at + last, start - last)
            if stop > start:
                new.write(at + start, room[start:stop])
            last = stop
        pace.hold_back(count)
        done += count
        if time.monotonic() - told > 0.2:
            told = time.monotonic()
            print(f"({100 * done / total:.2f}/100%)", flush=True)
    new.sync()


def unchanged_spans(disk: AnyDisk, path: str, cluster: int) -> Iterator[tuple[int, int]]:
    """Where a qcow2 file holds a guest's data of which none was written since a dirty bitmap began.

    `disk` is that bitmap's export, where what is dirty shows as no data.
    """
    at = 0  # of a cluster that was written to in part, the rest was moved with it:
    clean = [(-(-start // cluster) * cluster, stop // cluster * cluster) for start, stop in disk.extents()]
    clean = [span for span in clean if span[0] < span[1]]
    for part in map_of({"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": path}}):
        if part["data"] and "offset" in part:  # compressed data has no offset
            start, stop, shift = part["start"], part["start"] + part["length"], part["offset"] - part["start"]
            while at < len(clean) and clean[at][0] < stop:
                if clean[at][1] > start:
                    yield max(start, clean[at][0]) + shift, min(stop, clean[at][1]) + shift
                if clean[at][1] > stop:
                    break
                at += 1


def work_on_blocks(verb: str, where: str, *words: str) -> None:
    """The program of `blocks`: VERB WHERE OFFSET LENGTH RATES LIST FILE FOLDER.

    WHERE and FILE are files, or NBD exports as qemu's nodes in JSON, for which FOLDER has the certificates. LIST names
    a file with extents. RATES are as Pace takes them. `extents` prints the extents that hold data; `digest` the
    digests of blocks, with LIST of those that its extents touch; `answer` those of each OFFSET LENGTH that a line of
    standard input tells, and `=` after them; both by FILE threads. `patch` makes FILE equal to WHERE at those extents.
    `unchanged` prints the blocks of the qcow2 file FILE, with clusters of FOLDER bytes, that are full of data which is
    as it was when the dirty bitmap WHERE began.
    """
    from concurrent.futures import ThreadPoolExecutor

    offset, length, rates, listed, target, folder = (*words, "", "", "", "")[:6]
    begin, end, wanted = int(offset), int(offset) + int(length), None
    name = "the export" if where.startswith("{") else where
    try:
        disk = DiskFile(where, begin, end) if name == where else ExportClient(json.loads(where), begin, end, folder)
        if listed:
            with open(listed) as file:
                wanted = pairs_of(file.read())
        if verb == "extents":
            for start, stop in joined(disk.extents(), most=1 << 19):
                print(start, stop - start)
        elif verb == "patch":
            new = ExportClient(json.loads(target), begin, end, folder) if target.startswith("{") else NewFile(target)
            bring(disk, new, wanted or [], rates)
        elif verb == "unchanged":
            for start, stop in joined(sorted(unchanged_spans(disk, target, int(folder)))):
                print(*range(-(-start // MiB), stop // MiB))
        else:  # one pool: each thread opens the disk
            pool, pace = ThreadPoolExecutor(int(target or 0) or min(4, os.cpu_count() or 1)), Pace(rates)
            for line in lines_told() if verb == "answer" else ():
                at, count = map(int, line.split())
                disk.limit(at, at + count)
                pace.since, pace.passed = time.monotonic(), 0
                tell_digests(disk, None, pace, pool)
                print("=", flush=True)
            tell_digests(disk, None if wanted is None else blocks_of(wanted), pace, pool)
        sys.stdout.flush()
    except Exception as error:
        sys.exit(f"{name}: {error}")
    os._exit(0)  # without closing connections


def listen(address: str, port: str, client: str, *command: str) -> None:
    """Listens, and becomes the given command, which finds the listening socket as systemd would hand it over.

    Given a `client`, the kernel drops connections from other addresses: a socket filter, see bpf(4), socket(7).
    Connections inherit TCP_NODELAY: qemu-nbd sets it since 8.1 only; without it each fragment of a disk costs 10 ms.
    """
    import ctypes

    is_6 = ":" in address
    listener = socket.socket(socket.AF_INET6 if is_6 else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if client:
        code = filter_of(socket.inet_pton(listener.family, client), 8 if is_6 else 12)
        kept = ctypes.create_string_buffer(code)
        listener.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HP", len(code) // 8, ctypes.addressof(kept)))
    listener.bind((address, int(port)))
    listener.listen(16)
    os.dup2(listener.fileno(), 3)
    os.set_inheritable(3, True)
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
    os.execvp(command[0], command)


def filter_of(client: bytes, field: int) -> bytes:
    """The code of a socket filter that lets pass what has this address in the given field of its IP header."""
    words = struct.unpack(f">{len(client) // 4}I", client)
    tests = (struct.pack("HBBIHBBI", 0x20, 0, 0, 0xFFF00000 + field + 4 * n, 0x15, 0, 2 * (len(words) - n) - 1, word)
        for n, word in enumerate(words))
    return b"".join(tests) + struct.pack("HBBIHBBI", 6, 0, 0, 0xFFFFFFFF, 6, 0, 0, 0)


DEFLATED: Final = 1 << 31


async def deflated(said: asyncio.StreamReader) -> bytes:
    """What is said, as a frame: a length in 4 bytes, whose highest bit is set where zlib (RFC 1950) made it shorter."""
    piece = await said.read(MiB)
    short = await aside(zlib.compress, piece, 1)
    if len(short) < len(piece):
        return struct.pack(">I", len(short) | DEFLATED) + short
    return struct.pack(">I", len(piece)) + piece if piece else piece


async def inflated(said: asyncio.StreamReader) -> bytes:
    """What the next frame holds; raises EOFError at the end."""
    word, = struct.unpack(">I", await said.readexactly(4))
    piece = await said.readexactly(word & ~DEFLATED)
    return await aside(zlib.decompress, piece) if word & DEFLATED else piece


async def aside(act: Callable[..., bytes], *words: object) -> bytes:
    """What an act gives, in a thread: it takes long."""
    import asyncio

    return await asyncio.get_event_loop().run_in_executor(None, act, *words)


async def pass_on(said: asyncio.StreamReader, heard: asyncio.StreamWriter,
        form: Callable[[asyncio.StreamReader], Awaitable[bytes]]) -> None:
    """Hands on what is said, in another form, until one of both ends, and ends the other one."""
    try:
        piece = await form(said)
        while piece:
            heard.write(piece)
            await heard.drain()
            piece = await form(said)
    finally:
        heard.close()


def squeeze(role: str, pidfile: str, near: str, folder: str, address: str, port: str) -> None:
    """Carries NBD connections over a slow wire until it is ended: what the source says is deflated.

    `serve` hands those that come over the wire (fd 3, see `listen`) to the socket `near`, `fetch` takes them there.
    """
    import asyncio

    serves, loop = role == "serve", asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    tls = tls_of("server" if serves else "client", folder) if folder else None

    async def relay(said: asyncio.StreamReader, heard: asyncio.StreamWriter) -> None:
        try:
            if serves:
                there = await asyncio.open_unix_connection(near, limit=MiB)
            else:
                name = address if tls else None
                there = await asyncio.open_connection(address, int(port), limit=MiB, ssl=tls, server_hostname=name)
        except OSError:
            heard.close()
            raise
        asked = pass_on(said, there[1], lambda said: said.read(MiB))
        told = pass_on(there[0], heard, deflated if serves else inflated)
        await asyncio.gather(asked, told, return_exceptions=True)  # if one ends, so does the other

    if serves:
        loop.run_until_complete(asyncio.start_server(relay, sock=socket.socket(fileno=3), limit=MiB, ssl=tls))
    else:
        loop.run_until_complete(asyncio.start_unix_server(relay, near, limit=MiB))
    with open(pidfile, "w") as file:
        print(os.getpid(), file=file)
    loop.run_forever()


def contained(where: str, tool: str, *words: str) -> None:
    """Becomes a tool in a container: `where` has the words that enter it, and its folders, each with its path outside.

    Paths are those outside, in the words as in what is printed.
    """
    enter, paths = json.loads(where)

    def told(text: str, pairs: dict[str, str]) -> str:
        known = "|".join(re.escape(path) for path in sorted(pairs, key=len, reverse=True))
        whole = r"(?<![\w./-])(?:" + known + r")(?![\w.-])"
        return re.sub(whole, lambda found: pairs[found[0]], text) if pairs else text

    os.environ["PATH"] = os.environ["PATH"].partition(":")[2]  # else it would find us again
    inside = {outside: folder for folder, outside in paths.items()}
    command = [*enter, tool, *(told(word, inside) for word in words)]
    if tool != "virsh" and words[0] != "info":
        os.execvp(command[0], command)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for stream, said in enumerate(process.communicate(), 1):
        os.write(stream, told(said.decode("utf-8", "surrogateescape"), paths).encode("utf-8", "surrogateescape"))
    sys.exit(process.returncode)


# ---- 8. Host ---------------------------------------------------------

# A thread of a scope that may fail runs what is short (run, script), or holds a lease, which end_work() ends.
# A lease ties a process to our SSH channel, its standard input: we send a dot every few seconds, and when the dots end
# (end of the scope, kill -9 of migrena, a lost network) the process is killed by its pid; also when a command of `hold`
# fails. A lease that ends by itself prints a zero byte and waits until the dots end: a dot sent to a closed channel
# would make sshd close the whole connection ("packet referred to nonexistent channel").
HOLD: Final = """
hold() { while [ "$(timeout 60 head -c 1)" = . ]; do "$@" || return; done; }
trap 'status=$?; printf "\\000"; hold; exit "$status"' EXIT
"""
HEARTBEAT: Final = 5.0  # seconds between dots
START_TIMEOUT: Final = 30.0  # seconds for a host to start a command
CLEANUP_FAILED: Final = 9  # exit status of a lease whose cleanup failed

LEASED_COMMAND: Final = HOLD + """
exec 3<&0
setsid "$@" </dev/null 3<&- & child=$!
{ hold <&3; kill -- "-$child"; sleep 3; kill -s KILL -- "-$child"; } >/dev/null 2>&1 & watcher=$!
wait "$child"; status=$?
kill "$watcher" 2>/dev/null
exit "$status"
"""

# A program that reads the dots by itself, among lines that we tell it; it ends when they do.
LEASED_SERVICE: Final = HOLD + '"$@"'

# $1 is the pid file: once it exists, the daemon serves. nbd-server forks away, qemu-nbd stays our child.
LEASED_DAEMON: Final = HOLD + """
pidfile=$1; shift
rm -f -- "$pidfile"
"$@" </dev/null & child=$!
n=0
while [ ! -s "$pidfile" ]; do
  kill -0 "$child" 2>/dev/null || wait "$child" || exit
  n=$((n + 1))
  [ "$n" -lt 1300 ] || {
    kill -9 "$child" 2>/dev/null
    echo "did not serve within 60 s: the storage may be full or down" >&2
    exit 1
  }
  sleep "0.0$((n < 100 ? 1 : 5))"
done
read -r pid < "$pidfile"
trap '' PIPE  # even if nobody reads our output, we must clean up
echo ready
hold kill -0 "$pid" 2>/dev/null || { kill -s KILL -- "-$pid" 2>/dev/null; echo "ended by itself" >&2; exit 1; }
kill "$pid" 2>/dev/null
for n in $(seq 350); do
  kill -0 "$pid" 2>/dev/null || break
  [ "$n" != 180 ] || kill -9 "$pid" 2>/dev/null
  sleep 0.01
done
kill -s KILL -- "-$pid" 2>/dev/null  # nbd-server's group: before 3.27 a child loops forever \
when a TLS client disconnects
exit 0
"""

LEASED_FOLDER: Final = HOLD + """
umask 077
for place in /run /tmp; do folder=$(mktemp -d "$place/migrena-$1-XXXXXX" 2>/dev/null) && break; done
[ -n "$folder" ] || { echo "no private folder can be created in /run or /tmp" >&2; exit 1; }
exec 9>"$folder/lease"
flock -n 9
trap '' PIPE
echo "$folder"
hold
rm -rf -- "$folder"
"""

# $1 holds a container's files; the folder is where programs may be executed, which /run often is not.
LEASED_TOOLS: Final = HOLD + """
umask 077
exec 8<"$1"
for place in /tmp /var/tmp /root; do
  folder=$(mktemp -d "$place/migrena-tools-XXXXXX" 2>/dev/null) || continue
  printf "#!/bin/sh\n" > "$folder/virsh" && chmod 700 "$folder/virsh" && "$folder/virsh" && break
  rm -rf -- "$folder"; folder=
done 2>/dev/null
[ -n "$folder" ] || { echo "no program can be executed in /tmp, /var/tmp or /root" >&2; exit 1; }
trap '' PIPE
echo "$folder $$"
hold
rm -rf -- "$folder"
"""
TOOLS: Final = 'cd -- "$1" && cat > virsh && ln -s virsh qemu-img && ln -s virsh qemu-nbd'
# The mount namespace of a container, and nothing if it is the host's; $@ is the operator's prefix. What an exec of
# docker or podman runs is not our child, ended with us, and has not our sockets: so we enter the namespace instead.
CONTAINER: Final = """
files=$("$@" readlink /proc/self/ns/mnt) || exit
"$@" sh -c 'for tool in virsh qemu-img qemu-nbd; do
  command -v "$tool" >/dev/null || { echo "it has no $tool" >&2; exit 1; }
done' || exit
[ "$("$@" stat -c %d:%i /run)" = "$(stat -c %d:%i /run)" ] || {
  echo "it does not share the /run of its host" >&2; exit 1; }
[ "$files" != "$(readlink /proc/self/ns/mnt)" ] || exit 0
for pid in $(ls /proc | grep -x "[0-9]*" | sort -n); do
  [ "$(readlink "/proc/$pid/ns/mnt")" != "$files" ] || { echo "/proc/$pid/ns/mnt"; exit; }
done
echo "none of its processes is seen" >&2
exit 1
"""

READ_ALL_INPUT: Final = '"$@"; status=$?; cat >/dev/null; exit "$status"'  # a command whose input is read to its end
PRIVATE_FILES: Final = (
    'umask 077; cd -- "$1" || exit; shift; while [ $# -gt 0 ]; do head -c "$2" > "$1" || exit; shift 2; done')
LACKING: Final = """
has() { command -v "$1" >/dev/null; }
for tool; do has "$tool" || echo "$tool"; done
! has python3 || python3 -c 'import sys; sys.exit(sys.version_info < (3, 6))' || echo "python3 3.6"
option=driver=blkdebug,image.driver=null-co,image.size=512,unshare-child-perms.0=write  # see Node.locked
! has qemu-img || qemu-img convert -n -r 1M --image-opts --target-image-opts "$option" driver=null-co,size=512 \
    >/dev/null 2>&1 || echo "qemu 5.2"
"""

# What the login shell runs; $1 is the command, `escaped`. Output before BEGIN_MARK, on both streams, is a banner.
BEGIN_MARK: Final = b"--- migrena begins ---\n"
BEGIN_COMMAND: Final = 'm="--- migrena begins ---"; echo "$m"; echo "$m" >&2; eval "exec $(printf %b "$1")"'
FAR: Final = 0.02  # seconds to open a channel; on a host that takes longer the next command's is opened ahead
MAX_CONNECTIONS: Final = 16  # connections to one host; a copy runs fewer commands at a time

DIAL_LIMIT: Final = 15.0  # seconds for retries, less than one timeout
DROPPED: Final = (  # by paramiko, a jump host, the kernel
    "SSH protocol banner", "kex_exchange_identification", "Connection reset by peer")
RSA_SHA2: Final = ("rsa-sha2-512", "rsa-sha2-256")


def connect(name: str, settings: Settings, screen: Screen) -> Host:
    """A connected hypervisor, by Nova's name for it. Raises HostError."""
    logging.getLogger("paramiko").setLevel(logging.DEBUG if settings.debug else logging.CRITICAL)
    with ExitStack() as stack:
        host = Host(name, settings, screen)
        stack.callback(host.close)
        host.open()
        host.become_root(settings.sudo)
        host.enter_container()
        stack.pop_all()
    return host


def dial(target: Target) -> tuple[paramiko.SSHClient, ExitStack]:
    """An SSH connection, and what closes it. Retries if sshd drops it at once (MaxStartups)."""
    limit = time.monotonic() + DIAL_LIMIT
    while True:
        try:
            return dial_once(target)
        except HostError as error:
            if not any(words in str(error) for words in DROPPED) or time.monotonic() > limit:
                raise
        time.sleep(0.5 + secrets.randbelow(2000) / 1000)


def dial_once(target: Target) -> tuple[paramiko.SSHClient, ExitStack]:
    import paramiko

    name = target.name
    try:
        with ExitStack() as stack:
            return target.open(stack), stack.pop_all()
    except socket.gaierror as error:
        raise HostError(
            f"{name}: {target.host} does not resolve", f"add HOSTS = {{'{name}': 'ADDRESS'}} to config.py") from error
    except paramiko.BadHostKeyException as error:
        known = shlex.join(["-f", target.known_hosts[0], "-R", error.hostname])
        raise HostError(f"{name}: the host key of {target} has changed",
            f"find out why; if it is legitimate: ssh-keygen {known}") from error
    except (paramiko.SSHException, EOFError, OSError, subprocess.TimeoutExpired) as error:
        if isinstance(error, paramiko.AuthenticationException) or "No authentication methods" in str(error):
            raise HostError(f"{name}: {target} refuses the key of user {target.user}: {error}",
                "set user and key in HOSTS, SSH_USER and SSH_KEY, or load the key into the agent") from error
        raise HostError(f"{name}: no SSH connection to {target}: {error}", "check address and port in HOSTS") from error


@contextmanager
def proxied(command: str) -> Iterator[socket.socket]:
    """A socket to a command's standard input and output; raises HostError with its error output if it fails."""
    ours, theirs = socket.socketpair()
    words = shlex.split(command)  # in its own session: Ctrl-C must not end the connection, which undoing needs
    pipe = theirs.fileno()
    with tempfile.TemporaryFile() as said, subprocess.Popen(words, stdin=pipe, stdout=pipe,
            stderr=said, start_new_session=True) as process:
        theirs.close()
        try:
            yield ours
        except Exception as error:
            ours.close()
            if process.wait(10):
                said.seek(0)
                raise HostError(f"`{shorten(command)}`: {shorten(said.read().decode(errors='replace'))}",
                    "check the jump host with ssh") from error
            raise
        finally:
            ours.close()
            with suppress(ProcessLookupError):  # with its children, the hops before the last
                os.killpg(process.pid, signal.SIGTERM)


class Target:
    """The SSH parameters of a hypervisor: our settings, else ~/.ssh/config, else the defaults."""

    def __init__(self, name: str, settings: Settings) -> None:
        entry, path = settings.host(name), Path(settings.ssh_config).expanduser()
        alias, key = entry.address or name, entry.key or settings.ssh_key
        found = _ssh_lookup(path, alias)
        known = [*found.get("userknownhostsfile", "~/.ssh/known_hosts").split(), "/etc/ssh/ssh_known_hosts"]
        self.name, self.host, self.port = name, found.get("hostname", alias), entry.port or settings.ssh_port or int(
            found.get("port", 22))
        self.user = entry.user or settings.ssh_user or found.get("user", "root")
        self.keys: Any = [str(Path(key).expanduser())] if key else found.get("identityfile", [])
        self.use_agent = not key and found.get("identitiesonly", "no") != "yes"
        self.known_hosts = [str(Path(path).expanduser())
            for path in ([settings.known_hosts] if settings.known_hosts else known)]
        self.disabled: Any = None  # algorithms, as paramiko takes them
        self.proxy = found.get("proxycommand", "none")  # a command that replaces the TCP connection
        if (jumps := found.get("proxyjump", "none")) != "none":  # left to ssh itself
            _refuse_loop(path, alias)
            *before, last = jumps.split(",")
            self.proxy = shlex.join([
                "ssh", "-F", str(path), "-o", "BatchMode=yes", *(["-J", ",".join(before)] if before else []),
                "-W", f"[{self.host}]:{self.port}", f"ssh://{last.removeprefix('ssh://')}"])

    def __str__(self) -> str:
        return f"{self.host} port {self.port}"

    def open(self, stack: ExitStack) -> paramiko.SSHClient:
        """A connection, closed by the stack; raises paramiko's and sockets' exceptions."""
        import paramiko

        through: Any = stack.enter_context(proxied(self.proxy)) if self.proxy != "none" else None
        client = stack.enter_context(paramiko.SSHClient())
        for path in self.known_hosts:
            with suppress(FileNotFoundError):
                client.load_host_keys(path)
        client.set_missing_host_key_policy(self)  # type: ignore[arg-type]  # only the method below is needed
        try:
            client.connect(self.host, self.port, self.user, key_filename=self.keys or None, look_for_keys=not self.keys,
                timeout=20, banner_timeout=30, auth_timeout=30, allow_agent=self.use_agent, sock=through,
                disabled_algorithms=self.disabled)
        except (paramiko.SSHException, ValueError) as error:
            if self._takes_only_sha1(client, error):
                client.close()
                self.disabled = {"pubkeys": RSA_SHA2}
                return self.open(stack)
            raise
        transport = _transport(client)
        transport.set_keepalive(15)
        if isinstance(link := transport.sock, socket.socket) and link.family != socket.AF_UNIX:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else commands wait 40 ms for acknowledgement
        return client

    def _takes_only_sha1(self, client: paramiko.SSHClient, error: Exception) -> bool:
        """Whether an RSA key was refused by an sshd before OpenSSH 7.2, and paramiko can use it there.

        Raises HostError where it cannot, and AuthenticationException where a refusal was told as something else.
        """
        import paramiko

        transport: Any = client.get_transport()
        if not transport or not transport.auth_handler:
            return False
        used = getattr(transport, "_agreed_pubkey_algorithm", "")  # of the last RSA key
        if used in RSA_SHA2 and b"rsa-sha2" not in transport.server_extensions.get("server-sig-algs", b""):
            if "ssh-rsa" in paramiko.RSAKey.HASHES:  # before paramiko 5
                return True
            raise HostError(f"{self.name}: {self} refuses the RSA key of user {self.user}: its sshd knows no rsa-sha2, "
                f"and paramiko {paramiko.__version__} nothing older",
                "name an ed25519 key in HOSTS or SSH_KEY, or load it into the agent") from error
        if not isinstance(error, paramiko.AuthenticationException):  # of the file, read as that of another kind of key
            raise paramiko.AuthenticationException("Authentication failed.") from error
        return False

    def missing_host_key(self, client: object, hostname: str, key: paramiko.PKey) -> NoReturn:
        """Called by paramiko for an unknown host key: refuses it and names the command that accepts it."""
        raise HostError(f"{self}: the host key ({key.get_name()} {key.fingerprint}) is not known",
            "compare it on the host, then: "
            f"ssh-keyscan -p {self.port} {shlex.quote(self.host)} >> {shlex.quote(self.known_hosts[0])}")


def _ssh_lookup(path: Path, alias: str) -> dict[str, Any]:
    import paramiko

    if not path.is_file():
        return {}
    try:
        return dict(paramiko.SSHConfig.from_path(str(path)).lookup(alias))
    except (paramiko.ConfigParseError, ImportError, OSError) as error:
        raise UsageError(f"{path} cannot be read: {error}", "name another one in SSH_CONFIG") from error


def _refuse_loop(path: Path, alias: str) -> None:
    passed = [alias]  # else ssh would start itself endlessly
    while (jumps := _ssh_lookup(path, passed[-1]).get("proxyjump", "none")) != "none":
        first = jumps.split(",")[0].removeprefix("ssh://").rpartition("@")[2]
        passed.append(first if first.startswith("[") else first.partition(":")[0])
        if passed[-1] in passed[:-1]:
            raise UsageError(f"{path}: ProxyJump is circular: {' -> '.join(passed)}",
                "one of them must be reached without a jump host")


def _transport(client: paramiko.SSHClient) -> paramiko.Transport:
    transport = client.get_transport()
    if transport is None:
        raise EOFError("the SSH connection is closed")
    return transport


def escaped(command: str) -> bytes:
    """A command for printf's %b, without characters that csh or fish interpret within single quotes."""
    return re.sub(rb"[\0-\x1f\x7f'!\\]", lambda sign: b"\\0%03o" % ord(sign[0]),
        command.encode("utf-8", "surrogateescape"))


def open_channel(client: paramiko.SSHClient) -> paramiko.Channel | None:
    """A channel for one command; None if sshd allows no more on this connection (MaxSessions)."""
    import paramiko

    transport = _transport(client)
    try:
        return transport.open_session(timeout=START_TIMEOUT)
    except paramiko.SSHException as error:  # if two are refused at once, paramiko gives the reason to one only
        if isinstance(error, paramiko.ChannelException) or (str(error) == "Unable to open channel."
                and transport.is_active()):
            return None
        raise


Link = tuple["paramiko.SSHClient", list["paramiko.Channel"]]  # a connection, and what it carries


class Host:
    """One hypervisor: runs commands (argv in, text out) over as many SSH connections as its sshd requires."""

    def __init__(self, name: str, settings: Settings, screen: Screen) -> None:
        self.name, self._settings, self._screen, self._entry = name, settings, screen, settings.host(name)
        self.first_address = ""  # by which it is known, whatever address it gets later
        self.unconfirmed: list[str] = []  # leases whose end is unconfirmed; they end with their connection
        self.lacking: dict[Collection[str], list[str]] = {}  # tools looked for: those missing
        self.not_cleaned: list[str] = []  # what leases failed to clean up
        self._prefix: tuple[str, ...] = ()
        self._is_far = False
        self._tools: tuple[str, ...] = ()  # what finds the tools that are in a container
        self.keys: dict[str, tuple[str, str]] = {}  # for Ceph, by user: libvirt's secret, and the key
        self.with_keys: tuple[str, ...] = ()  # what finds them
        self.further: list[Host] = []  # the same one, over connections of their own
        self._lasting: set[Lease] = set()  # leases that end with the connections
        self._probe: tuple[str, ...] = ("true",)  # what succeeds as long as connection and container answer
        self._stack = ExitStack()
        self._leases: set[Lease] = set()
        self._closing, self._dialing = threading.Event(), threading.Lock()
        threading.Thread(target=self._beat, name=f"dots to {name}", daemon=True).start()

    def open(self) -> None:
        """Connects, and finds out the address for the other hypervisor; raises HostError."""
        self._links: list[Link] = []
        self._ahead = deque[tuple[Link, "paramiko.Channel"]]()  # channels that no command has yet
        prefix, self._prefix, self._tools, self._probe = self._prefix, (), (), ("true",)  # sudo removes the variable
        try:
            user, *seen = self.script('id -u; echo "$SSH_CONNECTION"').split()
        finally:
            self._prefix = prefix
        self._is_root = user == "0"
        self.nbd_address = self._entry.nbd_address or (
            seen[2] if len(seen) == 4 else str(_transport(self._links[0][0]).getpeername()[0]))
        self.first_address = self.first_address or self.nbd_address

    def disk_of(self, id: str) -> str:
        """Where an instance's disk should lie; DISK_PATH may be as a container has it."""
        path = self._settings.disk_path % id
        inside = max((folder for folder in self._entry.paths if path.startswith(f"{folder}/")), key=len, default="")
        return self._entry.paths.get(inside, "") + path.removeprefix(inside)

    def become_root(self, sudo: str) -> None:
        """Uses sudo if SUDO says so or if it is needed; raises HostError if it is denied."""
        if sudo == "no" or (sudo == "auto" and self._is_root):
            return
        try:
            self.run("sudo", "-n", "true")
        except CommandError as error:
            user = self.run("id", "-un").strip()
            raise HostError(f"{self.name}: user {user} has no passwordless sudo: {error.said}",
                f"add a line to sudoers there: {user} ALL=(root) NOPASSWD: ALL") from error
        self._prefix = ("sudo", "-n")

    def enter_container(self) -> None:
        """Has virsh, qemu-img and qemu-nbd found in the container to which prefix in HOSTS leads; raises HostError."""
        enter, paths = self._entry.prefix, self._entry.paths
        if not enter:
            return
        try:
            files = self.script(CONTAINER, *enter).strip()
            folder, lease = self.keep(LEASED_TOOLS, files or "/dev/null").split()
            if files:
                enter = ("nsenter", f"--mount=/proc/{lease}/fd/8", "--")
            tool = shlex.join((*PYTHON, program(contained), json.dumps([enter, paths])))
            self.script(TOOLS, folder, stdin=f'#!/bin/sh\nexec {tool} "${{0##*/}}" "$@"\n'.encode())
            tools = ("env", f"PATH={folder}:{self.run('printenv', 'PATH').strip()}")
            probe = (f"{folder}/qemu-img", "--version")
            self.run(*tools, *probe)
        except CommandError as error:
            way = shlex.join(self._entry.prefix)
            raise HostError(f"{self.name}: the container is not reached by {way!r}: {error.said}",
                "correct prefix in HOSTS") from error
        self._tools, self._probe = tools, probe

    def keep(self, script: str, *given: str) -> Answer:
        lease = self._stack.enter_context(self.lease(script, "mktemp", "-d", given=given))
        self._lasting.add(lease)
        return lease.line(15.0)

    def reconnect(self) -> None:
        """Reconnects if a connection or a container does not answer; old connections' leases end within a minute."""
        with suppress(HostError), self._translating(("true",)):
            # What is unconfirmed ends with its connection only.
            if not self.unconfirmed and bool(self._tools) == bool(self._entry.prefix):
                self._ahead.clear()
                self.run(*self._probe, seconds=10.0)
                for client, _ in self._links:
                    if channel := open_channel(client):
                        channel.close()
                return
        self._stack.close()
        self._leases.clear()
        self._lasting.clear()
        self.open()
        self.enter_container()
        keep_keys(self)
        self.unconfirmed.clear()

    def run(self, *words: str, stdin: bytes = b"", seconds: float = 60.0) -> Answer:
        """A short command's output; raises CommandError, and HostError after `seconds` without output."""
        fed = ("sh", "-c", READ_ALL_INPUT, "migrena") if stdin else ()
        remote = self._start(words, (*fed, "timeout", "-k", "5", str(seconds)), form="{}" if stdin else "{} </dev/null")
        if stdin:
            remote.feed(stdin)
        answer = remote.answer(seconds + 15)
        remote.drop()
        return answer

    def script(self, script: str, *values: str, stdin: bytes = b"") -> Answer:
        """The output of a constant script that gets the values as "$@"."""
        return self.run("sh", "-c", script, "migrena", *values, stdin=stdin)

    def succeeds(self, *words: str) -> bool:
        return does_succeed(lambda: self.run(*words))

    def work(self, *words: str, stall: float, on_output: Callable[[str], None] = lambda said: None,
            given: Sequence[str] = ()) -> Answer:
        """A long command's output (no zero bytes), also to `on_output`; leased, killed after `stall` s without any."""
        with self.lease(LEASED_COMMAND, *words, given=given) as lease:
            return lease.answer(stall, on_output)

    @contextmanager
    def lease(self, script: str, *words: str, given: Sequence[str] = ()) -> Iterator[Lease]:
        """A script that runs a command while the scope and our channel last; arguments: `given`, then the words."""
        with ExitStack() as stack:
            with defer_signals():
                lease = self._start(words, ("sh", "-c", script, "migrena", *given), is_held=True)
                stack.callback(self._leases.discard, lease)
                stack.callback(lease.close)
                self._leases.add(lease)
                lease.beat()
            lease.begin(30.0)
            yield lease

    @contextmanager
    def private_folder(self, run: str) -> Iterator[str]:
        """A folder that only root can read, removed when the scope or migrena ends."""
        with self.lease(LEASED_FOLDER, "mktemp", "-d", given=(run,)) as lease:
            yield lease.line(15.0)

    @contextmanager
    def daemon(self, pidfile: str, *words: str) -> Iterator[Lease]:
        """A daemon that writes its pid when it is ready, kept while the scope lasts; raises CommandError."""
        with self.lease(LEASED_DAEMON, *words, given=(pidfile,)) as lease:
            lease.line(180.0)
            yield lease

    def end_work(self, *, is_silent: bool = False) -> None:
        """Ends all leases, to free threads that wait for one; `is_silent`: without waiting for output."""
        for lease in self._leases - self._lasting:
            lease.release()
            if is_silent:
                lease.drop()

    def confirm_all_ended(self) -> None:
        """Raises HostError if something of ours may still be there."""
        hosts = (self, *self.further)
        if left := [line for host in hosts for line in (*host.not_cleaned, *host.unconfirmed)]:
            raise HostError("; ".join(left))

    def close(self) -> None:
        """Closes the connections, which ends all leases."""
        self._closing.set()
        self._stack.close()

    @defer_signals()
    def _start(self, words: Sequence[str], before: Sequence[str], form: str = "{}", *, is_held: bool = False) -> Lease:
        """Starts a command; messages do not show what is `before` its words."""
        import paramiko

        with self._translating(words):
            self._screen.trace(f"{self.name}$ {shlex.join(words)}")
            self._screen.commands[self.name] = self._screen.commands.get(self.name, 0) + 1
            began = time.monotonic()
            try:
                channel = self._session()
                channel.settimeout(75.0)  # for writing
                command = form.format(shlex.join(
                    (*self._prefix, *self._tools, *self.with_keys, *before, *words)))
                alarm = threading.Timer(START_TIMEOUT, channel.close)  # paramiko has no timeout of its own here
                alarm.daemon = True
                alarm.start()
                try:
                    channel.exec_command(b"exec sh -c '%s' migrena '%s'" % (BEGIN_COMMAND.encode(), escaped(command)))
                finally:
                    alarm.cancel()
            except (paramiko.SSHException, EOFError) as error:
                if time.monotonic() - began < START_TIMEOUT:
                    raise
                raise TimeoutError from error  # no answer
        return Lease(self, channel, words, is_held)

    def _session(self) -> paramiko.Channel:
        """A channel on the least used connection, or on a new one."""
        while self._ahead:
            with suppress(IndexError):  # another thread was quicker
                link, ready = self._ahead.popleft()
                if link in self._links and not ready.closed:
                    return self._carried(link, ready)
        while True:
            links, began = self._links, time.monotonic()
            for link in sorted(links, key=lambda link: sum(not channel.closed for channel in link[1])):
                if channel := open_channel(link[0]):
                    self._is_far = time.monotonic() - began > FAR
                    return self._carried(link, channel)
            with self._dialing:
                if links is not self._links:
                    continue  # another thread has opened one
                if len(links) < MAX_CONNECTIONS and not self._closing.is_set():
                    client, scope = dial(Target(self.name, self._settings))
                    with scope:
                        if channel := open_channel(client):
                            self._stack.enter_context(scope.pop_all())
                            self._links = [*links, (client, [channel])]
                            return channel
                raise HostError(f"{self.name}: sshd accepts no command on connection {len(links) + 1}",
                    "set MaxSessions in its sshd_config to 10, the default; the least is 1")

    def _carried(self, link: Link, channel: paramiko.Channel) -> paramiko.Channel:
        link[1][:] = [*(other for other in link[1] if not other.closed), channel]
        if self._is_far and len(self._ahead) < 2:
            threading.Thread(target=self._open_ahead, args=(link,), daemon=True).start()
        return channel

    def _open_ahead(self, link: Link) -> None:
        import paramiko

        with suppress(paramiko.SSHException, EOFError, OSError):  # the command that needs one will tell
            if channel := open_channel(link[0]):
                self._ahead.append((link, channel))

    @contextmanager
    def _translating(self, words: Sequence[str]) -> Iterator[None]:
        import paramiko

        try:
            yield
        except TimeoutError as error:
            raise HostError(f"{self.name}: {quoted(words)} made no progress and was given up") from error
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise HostError(f"{self.name}: the SSH connection broke at {quoted(words)}: {error}") from error

    def _beat(self) -> None:
        while not self._closing.wait(HEARTBEAT):
            for lease in list(self._leases):
                lease.beat()


def learn_key(host: Host, user: str, secret: str) -> None:
    """Has a host's commands find the key for Ceph of a user, which libvirt keeps as this secret; raises HostError."""
    known, kept = host.keys.get(user, ("", ""))
    if known == secret:
        return
    key = host.run("virsh", "-q", "--connect", "qemu:///system", "secret-get-value", secret).strip()
    if known and key != kept:
        raise HostError(f"{host.name}: user {user} of Ceph has two keys, by libvirt's secrets {known} and {secret}",
            "an instance with disks on two clusters cannot be moved whole: detach the volumes of one")
    host.keys[user] = secret, key
    if not known:
        keep_keys(host)


def share_keys(host: Host) -> None:
    """Has the keys for Ceph over a host's further connections too; one that is broken gets them when renewed."""
    for more in host.further:
        more.keys = host.keys
        with suppress(HostError):
            keep_keys(more)


def keep_keys(host: Host) -> None:
    """Writes the keys for Ceph into a folder that only root can read, removed with the host's connections."""
    if host.keys:
        folder = host.keep(LEASED_FOLDER, "keys")
        sections = (f"[client.{user}]\nkey = {key}\n" for user, (_, key) in host.keys.items())
        content = "".join(("[global]\nclient_mount_timeout = 5\n", *sections)).encode()
        host.script(PRIVATE_FILES, folder, "ceph.conf", str(len(content)), stdin=content)
        host.with_keys = ("env", f"CEPH_CONF={folder}/ceph.conf")


class Answer(str):
    """A remote command's output."""

    def __new__(cls, printed: str, host: str, words: Sequence[str]) -> Answer:
        answer = super().__new__(cls, printed)
        answer.asked = host, words
        return answer

    asked: tuple[str, Sequence[str]]

    def read(self, how: Callable[[str], T]) -> T:
        """The output parsed by `how`; raises HostError with the output if that fails."""
        try:
            return how(self)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            host, words = self.asked
            raise HostError(f"{host}: unexpected output of {quoted(words)}: {shorten(self) or 'nothing'}",
                "find out whether a wrapper or another version is installed there") from error


class Lease:
    """A process on a hypervisor; one held by Host.lease() ends with our channel to it."""

    def __init__(self, host: Host, channel: paramiko.Channel, words: Sequence[str], is_held: bool) -> None:
        self._host, self._channel, self._words, self._is_held = host, channel, words, is_held
        self._stderr = bytearray()
        self._banner, self._first_output = b"", b""  # of the login shell; output that came with BEGIN_MARK
        self._has_begun = self._has_ended = False
        self._send_lock = threading.Lock()
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()

    def _drain(self) -> None:
        with ignoring_lost_host():  # unread standard error would block standard output
            while True:
                try:
                    part = self._channel.recv_stderr(8192)
                except TimeoutError:  # set for the output
                    continue
                if not part:
                    return
                self._stderr += part
                del self._stderr[:-16384]

    @defer_signals()
    def beat(self) -> None:
        """Sends one more dot, which keeps it running."""
        with ignoring_lost_host(), self._send_lock:
            self._channel.send(b".")  # fails after shutdown_write()

    def begin(self, seconds: float) -> None:
        """Reads past the login shell's banner."""
        while not self._has_begun and (part := self._received(seconds)):
            self._banner, begun, self._first_output = (self._banner + part).partition(BEGIN_MARK)
            self._has_begun = bool(begun)

    def _received(self, seconds: float) -> bytes:
        """The next output, empty at the end; signals interrupt it. Raises HostError after `seconds` without output."""
        until = time.monotonic() + seconds
        with self._host._translating(self._words):
            while True:
                with defer_signals():
                    self._channel.settimeout(min(0.5, max(0.01, until - time.monotonic())))
                    try:
                        return self._channel.recv(65536)
                    except TimeoutError:
                        if time.monotonic() >= until:
                            raise

    def _read(self, seconds: float) -> bytes:
        if self._has_ended:
            return b""
        self.begin(seconds)
        part, self._first_output = self._first_output or self._received(seconds), b""
        if self._is_held:
            part, end, _ = part.partition(b"\0")
            self._has_ended = bool(end)
        return part

    def answer(self, seconds: float, on_output: Callable[[str], None] = lambda said: None) -> Answer:
        """All output, to `on_output` as it comes; raises CommandError, and HostError after `seconds` without any."""
        printed = bytearray()
        while part := self._read(seconds):
            printed += part
            on_output(part.decode(errors="replace"))
        if self._is_held:
            self.release()
        self.check()
        return Answer(printed.decode("utf-8", "surrogateescape"), self._host.name, self._words)

    def line(self, seconds: float, end: bytes = b"\n") -> Answer:
        """The line that says it is ready, or all up to `end`; raises CommandError if it ends without."""
        said = b""
        while not said.endswith(end):
            said += (part := self._read(seconds))
            if not part:
                self.release()
                self.check()
                raise CommandError(self._host.name, self._words, 0, "it ended without output")
        return Answer(said.decode("utf-8", "surrogateescape").removesuffix(end.decode()), self._host.name, self._words)

    @defer_signals()
    def feed(self, content: bytes, *, is_all: bool = True) -> None:
        with self._host._translating(self._words), self._send_lock:
            if self._channel.eof_sent:  # paramiko's sendall would not end
                raise EOFError("it was ended")
            self._channel.sendall(content)
            if is_all:
                self._channel.shutdown_write()

    def _error_output(self) -> str:
        banner = b"" if self._has_begun else self._banner
        return (banner + self._stderr.rpartition(BEGIN_MARK)[2]).decode(errors="replace").strip()

    def check(self, *, is_running: bool = False) -> None:
        """Raises CommandError if it failed, or ended though `is_running`; HostError on timeout or lost connection."""
        if is_running:
            if not self._channel.exit_status_ready() and not self._channel.recv_ready():
                return
            self.release()
        with self._host._translating(self._words), defer_signals():
            has_told, status = self._channel.status_event.wait(30.0), self._channel.exit_status
            if not has_told or (status in (124, 137) and not self._is_held):  # by timeout
                raise TimeoutError
        self._reader.join(5.0)
        if status < 0 and not self._channel.eof_received:  # even for a killed command sshd sends EOF
            with self._host._translating(self._words):
                raise EOFError(getattr(self._channel.transport, "saved_exception", None) or "the other side ended it")
        said = self._error_output()
        if not self._has_begun:
            raise HostError(f"{self._host.name}: the login shell did not run {quoted(self._words)}, "
                f"output: {shorten(said) or 'nothing'}", "name a user whose shell runs commands, in HOSTS or SSH_USER")
        if status != 0 or is_running:
            raise CommandError(self._host.name, self._words, status, said)

    @defer_signals()
    def release(self) -> None:
        """Ends the dots, so that it ends."""
        with ignoring_lost_host(), self._send_lock:
            self._channel.shutdown_write()

    @defer_signals()
    def drop(self) -> None:
        with ignoring_lost_host():
            self._channel.close()

    @defer_signals()
    def close(self) -> None:
        """Ends it; an unconfirmed end is kept in Host.unconfirmed."""
        self.release()
        host, channel = self._host, self._channel
        patience = 1.0 if host.unconfirmed else 15.0  # wait for a silent host only once
        if channel.status_event.wait(patience) and channel.exit_status == CLEANUP_FAILED:
            host.not_cleaned.append(f"{host.name}: {self._error_output()}")
        elif channel.exit_status == -1 and self in host._leases:  # else it ended with an abandoned connection
            host.unconfirmed.append(f"{host.name} did not confirm the end of {quoted(self._words, 120)}"
                " (it ends with the connection)")
        self.drop()


def does_succeed(act: Callable[[], object], failing: type[HostError] = CommandError) -> bool:
    with suppress(failing):
        act()
        return True
    return False


def ignoring_lost_host() -> suppress:
    import paramiko

    return suppress(paramiko.SSHException, EOFError, OSError)


# ---- 9. Cloud --------------------------------------------------------

# Keys in the metadata of instances.
MARK: Final = "migrena:run"  # source: the run that is moving it
MADE: Final = "migrena:made"  # destination: the run that makes it
DONE: Final = "migrena:done"  # destination: the run that completed it
ORIGIN: Final = "migrena:source"  # destination: the source's id
WAS: Final = "migrena:was"  # both: the source's status before the run
LOCKED_BY: Final = "migrena run "  # begins our locked_reason; the run's id follows
UNCHANGED_LIMIT: Final = 1800.0  # seconds to wait without a change in Nova; a large image takes long
KEYSTONE_TIMEOUT: Final = 30.0  # seconds
OUTAGE_LIMIT: Final = 120.0  # seconds of API errors before giving up
NOVA_KNOWN: Final = (2, 96)  # the newest microversion that is asked for
LOST_ANSWER: Final = 10.0  # seconds for what was requested to appear although the API answered with an error
CLAIM_PAUSE: Final = 1.0  # seconds in which another run that did not see our mark writes its own
OUTAGE_TOLD: Final = 7.0  # seconds of API errors before the operator is told
OWN_ARGUMENTS: Final = frozenset({"self", "name", "image", "flavor", "reservation_id", "min_count", "max_count",
    "block_device_mapping", "block_device_mapping_v2"})  # not for -e


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) < 256


def _is_nic(nic: object) -> bool:  # novaclient silently drops unknown keys
    return (isinstance(nic, dict) and nic.keys() <= {"net-id", "port-id", "tag", "v4-fixed-ip", "v6-fixed-ip"}
        and all(map(_is_text, nic.values()))
        and any(re.fullmatch(UUID_FORM, nic.get(key, "")) for key in ("net-id", "port-id")))


def _is_list(value: object, of: Callable[[object], bool] = _is_text) -> bool:
    return isinstance(value, (list, tuple)) and all(map(of, value))


# What Nova accepts as arguments of create, and a description: see its nova/api/openstack/compute/schemas/servers.py.
EXTRA_FORMS: Final[Mapping[tuple[str, ...], tuple[Callable[[Any], bool], str]]] = {
    ("nics",): (lambda value: value in ("auto", "none") or _is_list(value, _is_nic),
        "'auto', 'none' or a list as [{'net-id': 'ID'}]; also port-id, v4-fixed-ip, v6-fixed-ip and tag"),
    ("meta",): (lambda value: isinstance(value, dict) and _is_list([*value, *filter(None, value.values())]),
        "a dictionary of strings of up to 255 characters"),
    ("userdata",): (
        lambda value: isinstance(value, str) and len(value.encode()) < 49150, "a string of up to 49149 bytes"),
    ("security_groups", "tags"): (_is_list, "a list of names"),
    ("key_name", "availability_zone", "host", "hypervisor_hostname", "hostname"): (
        _is_text, "a string of up to 255 characters"),
    ("scheduler_hints", "files"): (lambda value: isinstance(value, dict), "a dictionary"),
}

SHOWN: Final = (  # no secrets
    "nics", "security_groups", "availability_zone", "key_name", "config_drive", "host", "hypervisor_hostname",
    "block_device_mapping_v2")


def check_extra(extra: Facts) -> None:
    """Raises UsageError if Nova's create does not accept what `-e` says, or if it would break the copy."""
    from novaclient.v2.servers import ServerManager

    known = set(inspect.signature(ServerManager.create).parameters) - OWN_ARGUMENTS
    for name, value in extra.items():
        if name in OWN_ARGUMENTS:
            raise UsageError(f"-e: {name} is not allowed: migrena makes one instance from one image")
        if name not in known:
            raise UsageError(f"-e: Nova's create has no argument {name!r}{did_you_mean(name, known)}",
                f"known: {', '.join(sorted(known))}")
        for names, (is_taken, form) in EXTRA_FORMS.items():
            if name in names and value is not None and not is_taken(value):
                raise UsageError(f"-e: {name} must be {form}")


@contextmanager
def ignoring(*codes: int) -> Iterator[None]:
    """A scope that ignores a CloudError with one of these HTTP statuses."""
    try:
        yield
    except CloudError as error:
        if error.code not in codes:
            raise


class ImageStore:
    """A cloud's Glance. Every method raises CloudError."""

    def __init__(self, cloud: Cloud, glance: Any) -> None:
        self._translating, self._images = cloud.translating, glance.images

    def all(self, *ids: str) -> list[Image]:
        """All images that Glance lists, also hidden ones, and those with these ids, which it may not list."""
        with self._translating("list images"):
            found = {raw["id"]: Image.of(dict(raw)) for only in ({}, {"os_hidden": "true"})
                for raw in self._images.list(filters=only)}
        further = (self.one(id) for id in ids if id not in found and re.fullmatch(UUID_FORM, id))
        return [*found.values(), *filter(None, further)]

    def one(self, id: str) -> Image | None:
        with ignoring(404), self._translating(f"show image {id}"):
            return Image.of(dict(self._images.get(id)))
        return None

    def download(self, id: str) -> Iterator[bytes]:
        """An image's content, 64 KiB at a time; the caller verifies it."""
        with self._translating(f"read image {id}"):
            yield from self._images.data(id, do_checksum=False) or ()

    def make(self, **facts: object) -> str:
        """The id of a new image without content."""
        with self._translating(f"create image {facts.get('name')}"):
            return str(self._images.create(**facts).id)

    def describe(self, id: str, facts: Facts, *left_out: str) -> list[str]:
        """Sets these properties of an image and removes others; returns the names of those that Glance refused."""
        with ignoring(*(400, 403, 409, 413) if facts else ()), self._translating(f"describe image {id}"):
            self._images.update(id, remove_props=list(left_out), **facts)
            return []
        if left_out:
            self.describe(id, {}, *left_out)
        elif len(facts) == 1:
            return list(facts)
        return [name for key, value in facts.items() for name in self.describe(id, {key: value})]

    def send(self, id: str, content: object, size: int) -> None:
        """Uploads an image's content, `size` bytes, from an object with `read`."""
        with self._translating(f"upload image {id}"):
            self._images.upload(id, content, image_size=size)

    def delete(self, id: str) -> None:
        with ignoring(404), self._translating(f"delete image {id}"):
            self._images.delete(id)


class VolumeStore:
    """A cloud's Cinder, through a keystoneauth adapter. Every method raises CloudError."""

    def __init__(self, cloud: Cloud, adapter: Any) -> None:
        self._cloud, self.adapter = cloud, adapter

    def _ask(self, act: str, path: str, **how: str) -> dict[str, Any]:
        return self._cloud.retrying(act, lambda: dict(self.adapter.get(path, **how).json()))

    def one(self, id: str) -> Volume | None:
        with ignoring(404):
            return Volume.of(self._ask(f"show volume {id}", f"/volumes/{id}")["volume"])
        return None

    def made_by(self, run: str) -> list[Volume]:
        found = [Volume.of(told) for key in (MADE, DONE) for told in self._ask("list volumes", "/volumes/detail?" +
            urllib.parse.urlencode({"metadata": str({key: run})}))["volumes"]]
        return [volume for volume in found if run in (volume.metadata.get(MADE), volume.metadata.get(DONE))]

    def connection(self, volume: Volume, server: str) -> tuple[str, ...]:
        """How a volume is connected to an instance's host: ends of its device's names in /dev/disk/by-path."""
        ids = [one["attachment_id"] for one in volume.facts.get("attachments") or () if one["server_id"] == server]
        if len(ids) != 1:
            raise self._cloud.error(f"{volume.label} is attached to {server} {len(ids)} times")
        told = self._ask(f"show attachment of volume {volume.id}", f"/attachments/{ids[0]}", microversion="3.27")
        info = told["attachment"].get("connection_info") or {}
        kind = info.get("driver_volume_type")
        luns = [int(-1 if lun is None else lun) for lun in info.get("target_luns") or [info.get("target_lun")]]
        flat = {"SAM2": 256, "SAM3-flat": 0}.get(str(info.get("addressing_mode")), 1 << 32)  # from which number on
        luns = [lun + 0x4000 if lun >= flat else lun for lun in luns]
        if kind == "iscsi":
            targets = info.get("target_iqns") or [info.get("target_iqn")]
        elif kind == "fibre_channel":
            wwns = info.get("target_wwns") or info.get("target_wwn") or []
            targets = [f"fc-0x{wwn.lower()}" for wwn in ([wwns] if isinstance(wwns, str) else wwns)]
        else:
            raise self._cloud.error(f"{volume.label} is connected by {kind or 'unknown means'}: its device cannot be "
                "proven to be that volume", "--root-only or --disks goes on without it")
        pairs = zip(targets, luns * len(targets) if len(luns) == 1 else luns, strict=False)
        return tuple(f"{target}-lun-" + (  # udev's way
            f"0x{lun & 0xffff:04x}{lun >> 16 & 0xffff:04x}{0:08}" if lun > 255 else str(lun)) for target, lun in pairs)

    def with_snapshots(self, ids: Collection[str]) -> set[str]:
        """Those of these volumes that have snapshots, whoever's they are."""
        return {one["volume_id"] for id in ids for one in self._ask(
            f"list snapshots of volume {id}", f"/snapshots?all_tenants=1&volume_id={id}")["snapshots"]} & {*ids}

    def types(self) -> list[str]:
        return [one["name"] for one in self._ask("list volume types", "/types?is_public=None")["volume_types"]]

    def zones(self) -> list[str]:
        told = self._ask("list availability zones of volumes", "/os-availability-zone")["availabilityZoneInfo"]
        return [one["zoneName"] for one in told if one["zoneState"]["available"]]

    def limits(self) -> dict[str, int]:
        return dict(self._ask("show limits of volumes", "/limits")["limits"]["absolute"])

    def make(self, **facts: object) -> str:
        with self._cloud.translating(f"create volume {facts.get('name')}"):
            return str(self.adapter.post("/volumes", json={"volume": facts}).json()["volume"]["id"])

    def wait(self, id: str) -> Volume:
        """The volume once it can be used; raises CloudError if it becomes something else, or not for half an hour."""
        limit = time.monotonic() + UNCHANGED_LIMIT
        for _ in self._cloud.polls():
            volume = self.one(id)
            if volume and volume.status == "available":
                return volume
            status = volume.status if volume else "gone"
            if status not in ("creating", "downloading") or time.monotonic() > limit:
                raise self._cloud.error(f"volume {id} is {status}", "see its messages: openstack volume message list")
        raise AssertionError("polls never end")

    def describe(self, id: str, image_facts: Mapping[str, str], *, is_bootable: bool) -> None:
        acts: dict[str, dict[str, object]] = {
            **({"os-set_image_metadata": {"metadata": dict(image_facts)}} if image_facts else {}),
            "os-set_bootable": {"bootable": is_bootable}}
        for name, facts in acts.items():
            self._cloud.retrying(f"{name} of volume {id}",
                partial(self.adapter.post, f"/volumes/{id}/action", json={name: facts}))

    def mark(self, id: str, marks: Mapping[str, str], *without: str) -> None:
        path = f"/volumes/{id}/metadata"
        if marks:
            self._cloud.retrying(f"mark volume {id}", lambda: self.adapter.post(path, json={"metadata": dict(marks)}))
        for key in without:
            with ignoring(404):
                self._cloud.retrying(f"unmark volume {id}", partial(self.adapter.delete, f"{path}/{key}"))

    def delete(self, id: str) -> None:
        """Deletes a volume and waits until it is gone; raises Kept if it is attached to an instance."""
        limit, refused = time.monotonic() + UNCHANGED_LIMIT, 0
        for _ in self._cloud.polls():
            if not (volume := self.one(id)):
                return
            if volume.status == "in-use" and volume.servers and self._cloud.find_server(volume.servers[0]):
                raise Kept(f"{volume.label} is attached to {volume.servers[0]}, and is kept",
                    f"once nobody needs it: openstack volume delete {id}")
            if volume.status.startswith("error_") or time.monotonic() > limit or refused == 10:
                raise self._cloud.error(f"volume {id} was not deleted: it is {volume.status}",
                    "find out what needs it, such as snapshots")
            if volume.status in ("available", "error"):
                refused += 1
                with ignoring(400, 404):  # 400: Nova reserves it, or its deletion has begun
                    self._cloud.retrying(f"delete volume {id}", partial(self.adapter.delete, f"/volumes/{id}"))


class NetworkStore:
    """A cloud's Neutron, through a keystoneauth adapter. Every method raises CloudError."""

    def __init__(self, cloud: Cloud, adapter: Any) -> None:
        self._cloud, self.adapter = cloud, adapter

    def all(self, what: str, *search: tuple[str, str]) -> Rows:
        """All of this kind, such as security-groups, that match; several values of a key are alternatives."""
        return self._cloud.pages(self.adapter, f"/{what}?{urllib.parse.urlencode(search)}", what.replace("-", "_"))

    def by_id(self, what: str, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Those with these ids; raises CloudError if one is not shown."""
        wanted = sorted({*ids})
        found = {one["id"]: one for one in (self.all(what, *(("id", id) for id in wanted)) if wanted else ())}
        if unseen := [id for id in wanted if id not in found]:
            raise self._cloud.error(f"Neutron does not show {', '.join(unseen)} among the {what}",
                "use an admin's credentials")
        return found

    def made_by(self, what: str, run: str, description: str = "") -> list[str]:
        """The ids of the project's ports or floating IPs whose description is this, or any mark of a run."""
        found, project = Rows(), self._cloud.identity["project"]
        with ignoring(404):  # no routers, no floating IPs
            found = [one for one in self.all(what, ("project_id", project)) if one.get("project_id") == project]
        return [one["id"] for one in found if (one.get("description") or "").startswith(f"{MADE}={run} ")
            and description in ("", one["description"])]

    def make(self, what: str, facts: Facts) -> str:
        one = what.removesuffix("s")
        with self._cloud.translating(f"create {one}"):
            return str(self.adapter.post(f"/{what}", json={one: dict(facts)}).json()[one]["id"])

    def change(self, what: str, id: str, facts: Facts) -> None:
        one = what.removesuffix("s")
        self._cloud.retrying(f"change {one} {id}", lambda: self.adapter.put(f"/{what}/{id}", json={one: dict(facts)}))

    def tag(self, port: str, tags: Sequence[str]) -> None:
        self._cloud.retrying(f"tag port {port}",
            lambda: self.adapter.put(f"/ports/{port}/tags", json={"tags": list(tags)}))

    def delete(self, what: str, id: str) -> None:
        """Deletes a port or a floating IP, unless it is gone; raises Kept if another instance uses it."""
        with ignoring(404):
            users = [one["device_id"] for one in self.all(what, ("id", id)) if one.get("device_id")]
            if users and self._cloud.find_server(users[0]):
                raise Kept(f"port {id} is used by {users[0]}, and is kept", f"openstack port delete {id}")
            self._cloud.retrying(f"delete {what} {id}", lambda: self.adapter.delete(f"/{what}/{id}"))

    def room(self, project: str) -> int:
        """How many more ports the project's quota allows; -1 if any number, or if Neutron does not say."""
        with ignoring(400, 403, 404):
            told = self._cloud.retrying("show quota of ports", lambda: dict(self.adapter.get(
                f"/quotas/{project}/details.json").json()))["quota"]["port"]
            return -1 if told["limit"] < 0 else max(0, told["limit"] - told["used"] - int(told.get("reserved", 0)))
        return -1


def ports_of(store: NetworkStore, id: str) -> Rows:
    """The ports that Nova uses for an instance: anybody may name any device."""
    return [one for one in store.all("ports", ("device_id", id)) if str(one.get("device_owner")).startswith("compute:")]


def told_in(error: Exception) -> str:
    """What a service's answer says of an error, where keystoneauth does not know its form."""
    answer: Any = getattr(error, "response", None)
    with suppress(ValueError, AttributeError, StopIteration):
        return str(next(row["message"] for row in answer.json().values() if isinstance(row, dict) and "message" in row))
    return ""


class Service:
    """Common parts of requests to a cloud: its label, errors as CloudError, retries."""

    label, url = "", ""
    calls = 0  # that got an answer
    tell: Callable[[str], None] = staticmethod(lambda line: None)  # called with a line about API errors
    _failing_since = 0.0  # when they began

    def _count(self, *_: object, **__: object) -> None:
        self.calls += 1

    def error(self, said: str, way_out: str = "", code: int = 400) -> CloudError:
        return CloudError(f"{self.label} cloud: {said}", way_out, code)

    @contextmanager
    def translating(self, act: str) -> Iterator[None]:
        """A scope that turns the OpenStack libraries' exceptions into CloudError."""
        import requests
        from glanceclient import exc as glance
        from keystoneauth1 import exceptions as auth
        from novaclient import exceptions as nova

        try:
            yield
        except (auth.ClientException, nova.ClientException, glance.ClientException, glance.BaseException,
                requests.RequestException) as error:
            said, code = shorten(told_in(error) or str(error)) or type(error).__name__, getattr(
                error, "http_status", None) or getattr(error, "code", None)
            if isinstance(error, auth.Unauthorized):
                raise self.error(f"{self.url} refuses the credentials: {said}",
                    "check user, password, project and domains", 401) from error
            if isinstance(error, auth.EndpointNotFound):
                raise self.error(said, "check region_name and interface in the credentials") from error
            if isinstance(error, requests.exceptions.InvalidJSONError):  # a proxy's page, perhaps
                code = 502
            if not isinstance(code, int):
                code = 0 if isinstance(error, (auth.ConnectionError, glance.CommunicationError)) else 400
            way_out = "check auth_url, and that this machine can reach it" if act == "sign in" else ""
            raise self.error(f"{act}: {said}", way_out, code) from error

    def retrying(self, act: str, do: Callable[[], T], *, waits: bool = True) -> T:
        """The result of a request that may be repeated; retried during an outage and, if it waits, a conflict."""
        conflict = told = 0.0
        for _ in self.polls():
            try:
                with self.translating(act):
                    answer = do()
                self._failing_since = 0.0
                return answer
            except CloudError as error:
                now = time.monotonic()
                self._failing_since = (self._failing_since or now) if error.is_temporary else 0.0  # others are answers
                if error.code == 409 and waits:
                    conflict = conflict or now
                elif not error.is_temporary:
                    raise
                since = conflict or self._failing_since
                if now - since > OUTAGE_LIMIT:
                    raise
                if now - max(since, told) > OUTAGE_TOLD:
                    told = now
                    self.tell(f"{error}; retrying for {duration(OUTAGE_LIMIT - now + since)}")
        raise AssertionError("polls never end")

    def pages(self, adapter: Any, path: str, key: str) -> Rows:
        found = Rows()
        while path:
            told = self.retrying(f"list {key}", lambda: dict(adapter.get(path).json()))  # noqa: B023
            found += told[key]
            following = (link["href"] for link in told.get(f"{key}_links", ()) if link["rel"] == "next")
            path = next(following, "") or (told.get("links") or {}).get("next") or ""
        return found

    @staticmethod
    def polls() -> Iterator[float]:
        """Endless iterations, at first 0.2 s and later 2 s apart."""
        pause = 0.2
        while True:
            yield pause
            time.sleep(pause)
            pause = min(pause * 1.3, 2.0)


class Compute(Service):
    """A cloud's instances and compute hosts, and live migration. Every method raises CloudError."""

    _nova: Any
    _nova_2_87: Any  # from 2.88 on, listing hypervisors asks each of them
    _placement: Callable[[str], Any]
    _version = 2, 96  # the newest microversion that both sides know
    user = ""  # the id of the credentials' user

    def server(self, id: str) -> Server:
        with self.translating(f"show server {id}"):
            return self.read(self._nova.servers.get(id).to_dict())

    def server_retrying(self, id: str) -> Server:
        return self.retrying(f"show server {id}", lambda: self.server(id))

    def servers(self, **search: object) -> list[Server]:
        return self.retrying("list servers", lambda: [
            self.read(raw.to_dict()) for raw in self._nova.servers.list(search_opts=search, limit=-1)])  # -1: all

    @cached_property
    def _flavors(self) -> dict[str, Flavor]:
        return {flavor.id: flavor for flavor in self.flavors()}

    def read(self, raw: Facts) -> Server:
        if "name" not in raw:  # since microversion 2.69 a cell that is away is no error
            raise self.error(f"Nova cannot reach the cell of server {raw.get('id')}", code=503)
        told = {key.rpartition(":")[2]: value for key, value in raw.items() if value}  # without OS-EXT-STS: etc.
        return Server(
            id=raw["id"], name=raw["name"], status=raw["status"], task=told.get("task_state", ""),
            power=int(told.get("power_state", 0)), host=told.get("host", ""),
            hypervisor=told.get("hypervisor_hostname", ""), locked="locked" in told,
            lock_reason=told.get("locked_reason", ""), metadata=told.get("metadata", {}),
            image=told.get("image", {}).get("id", ""), flavor=self._flavor_of(told.get("flavor", {})),
            volumes=tuple(volume["id"] for volume in told.get("volumes_attached", ())),
            deleted_with=frozenset(
                one["id"] for one in told.get("volumes_attached", ()) if one.get("delete_on_termination")),
            config_drive="config_drive" in told, fault=told.get("fault", {}).get("message", ""),
            key=told.get("key_name", ""), facts={key.rpartition(":")[2]: value for key, value in raw.items()},
            fixed_addresses=frozenset(entry["addr"] for entries in told.get("addresses", {}).values()
                for entry in entries if entry.get("OS-EXT-IPS:type", "fixed") == "fixed"),
        )

    def _flavor_of(self, raw: Facts) -> Flavor:
        if "vcpus" not in raw:  # before microversion 2.47 there is only the flavor's id, and the flavor may be deleted
            return self._flavors.get(str(raw.get("id", "")), Flavor("", 0, 0, 0, 0, 0))
        return Flavor(
            name=raw.get("original_name") or raw.get("name", ""), id=str(raw.get("id") or ""), vcpus=raw["vcpus"],
            ram=raw["ram"], disk=raw["disk"], ephemeral=raw.get("ephemeral", raw.get("OS-FLV-EXT-DATA:ephemeral")) or 0,
            swap=int(raw.get("swap") or 0), extra_specs=raw.get("extra_specs"))

    def flavors(self) -> list[Flavor]:
        with self.translating("list flavors"):
            return [self._flavor_of(flavor.to_dict()) for flavor in self._nova.flavors.list(is_public=None)]

    def hosts(self) -> list[ComputeHost]:
        """The compute hosts, with resources free and allocated if Placement shows them."""
        with self.translating("list compute services"):
            services = self._nova_2_87.services.list(binary="nova-compute")
            node_of = {node.service["host"]: node.hypervisor_hostname for node in self._nova_2_87.hypervisors.list()}
        known: dict[str, tuple[dict[str, int], dict[str, dict[str, int]]]] = {}
        with suppress(CloudError), self.translating("show free resources"):
            for provider in self._placement("/resource_providers")["resource_providers"]:
                path = f"/resource_providers/{provider['uuid']}"
                taken = {id: one["resources"]
                    for id, one in self._placement(f"{path}/allocations")["allocations"].items()}
                used = sum(map(Counter, taken.values()), Counter[str]())
                free = {name: int((entry["total"] - entry["reserved"]) * entry["allocation_ratio"]) - used[name]
                    for name, entry in self._placement(f"{path}/inventories")["inventories"].items()}
                known[provider["name"]] = free, taken
        return [ComputeHost(one.host, one.status == "enabled", one.state == "up",
            *known.get(node_of.get(one.host, ""), ())) for one in services]

    def move(self, id: str, host: str) -> None:
        """Requests a live migration to a host, with the local disks unless they are shared."""
        try:
            with self.translating(f"live-migrate server {id}"):
                self._nova_2_87.servers.live_migrate(id, host=host, block_migration="auto")
        except CloudError as error:
            if not error.is_temporary or not self.server_retrying(id).task:  # else only the answer was lost
                raise

    def progress(self, id: str) -> tuple[int, int] | None:
        """Bytes done and in total of the current migration; None if there is none."""
        records = self.retrying(f"show migrations of server {id}", lambda: self._nova_2_87.server_migrations.list(id))
        if not records:
            return None
        record = records[0].to_dict()
        done, total = (sum(int(record.get(f"{what}_{kind}_bytes") or 0) for what in ("memory", "disk"))
            for kind in ("processed", "total"))
        return min(done, total), total

    def last_migration(self, id: str, after: int = 0) -> tuple[int, str]:
        """Number and status of an instance's last live migration with a number above `after`, or (0, "")."""
        found = self.retrying(f"list migrations of server {id}",
            lambda: self._nova_2_87.migrations.list(instance_uuid=id, migration_type="live-migration"))
        return max(((int(one.id), str(one.status)) for one in found if int(one.id) > after), default=(0, ""))

    def abort(self, id: str, migration: int) -> None:
        with self.translating(f"abort migration {migration} of server {id}"):
            self._nova_2_87.server_migrations.live_migration_abort(id, migration)

    # What an instance refers to: of the user or the project of these credentials, unless told otherwise.

    def key_pair(self, name: str, user: str = "") -> KeyPair | None:
        if user and self._version < (2, 10):
            return None
        with ignoring(403, 404):
            told = self.retrying(f"show key pair {name}", lambda: self._nova.keypairs.get(
                name, **({"user_id": user} if user else {}))).to_dict()
            return KeyPair(told["name"], told["fingerprint"], told["public_key"], told.get("type", "ssh"))
        return None

    def make_key_pair(self, facts: Facts) -> str:
        """Uploads a public key; returns the key pair's name, which is its id."""
        with self.translating(f"create key pair {facts['name']}"):
            more = {"key_type": facts["type"]} if self._version >= (2, 2) else {}
            return str(self._nova.keypairs.create(facts["name"], facts["public_key"], **more).id)

    def delete_key_pair(self, name: str, facts: Facts) -> None:
        """Deletes a key pair of this user; raises Kept if it is another one than the run made."""
        pair, is_mine = self.key_pair(name), facts.get("user") == self.user
        if not pair and is_mine:
            return
        if not (pair and is_mine and pair.fingerprint == facts.get("fingerprint")):
            raise Kept(f"key pair {name} is kept: user {facts.get('user')} made it in the run, and user {self.user} "
                "sees none or another", f"as that user: openstack keypair delete {shlex.quote(name)}")
        with ignoring(404):
            self.retrying(f"delete key pair {name}", lambda: self._nova.keypairs.delete(name))

    def server_groups(self) -> dict[str, dict[str, Any]]:
        found = self.retrying("list server groups", self._nova.server_groups.list)
        return {one.id: self._server_group(one) for one in found}

    def server_group(self, id: str) -> dict[str, Any] | None:
        with ignoring(404):
            return self._server_group(self.retrying(
                f"show server group {id}", lambda: self._nova.server_groups.get(id)))
        return None

    @staticmethod
    def _server_group(one: Any) -> dict[str, Any]:
        policies = getattr(one, "policies", ())  # before microversion 2.64
        return {"name": one.name, "policy": getattr(one, "policy", "") or next(iter(policies), ""),
            "rules": dict(getattr(one, "rules", None) or {}), "members": list(one.members)}

    def make_server_group(self, facts: Facts) -> str:
        with self.translating(f"create server group {facts['name']}"):
            words = (facts["policy"], facts["rules"] or None) if self._version >= (2, 64) else ([facts["policy"]],)
            return str(self._nova.server_groups.create(facts["name"], *words).id)

    def delete_server_group(self, id: str) -> None:
        """Deletes a server group; raises Kept if somebody else's instances are in it."""
        if (group := self.server_group(id)) and group["members"]:
            raise Kept(f"server group {group['name']} {id} has {len(group['members'])} instances, and is kept",
                f"openstack server group delete {id}")
        with ignoring(404):
            self.retrying(f"delete server group {id}", lambda: self._nova.server_groups.delete(id))

    def zones(self) -> list[str]:
        found = self.retrying("list availability zones", lambda: self._nova.availability_zones.list(detailed=False))
        return [one.zoneName for one in found if one.zoneState["available"]]

    def takes(self, argument: str) -> bool:
        return self._version >= {"description": (2, 19), "nics": (2, 37), "tags": (2, 52), "hostname": (2, 90)}.get(
            argument, (2, 1))

    def console(self, id: str) -> str:
        with ignoring(404, 409), self.translating(f"show console of server {id}"):
            return str(self._nova.servers.get_console_output(id))
        return ""

    def attach(self, id: str, port: str) -> None:
        def ask() -> None:
            if port not in {one.port_id for one in self._nova.servers.interface_list(id)}:
                self._nova.servers.interface_attach(id, port, None, None)

        self.retrying(f"attach port {port} to server {id}", ask)


class Cloud(Compute):
    """One OpenStack cloud. Every method raises CloudError."""

    def __init__(self, label: str, creds: Facts, glance_endpoint: str = "") -> None:
        self.label, self.url = label, str(creds["auth_url"])
        with self.translating("sign in"):
            self._open(dict(creds), glance_endpoint)

    def _open(self, creds: dict[str, Any], glance_endpoint: str) -> None:
        from glanceclient import Client as GlanceClient
        from keystoneauth1 import adapter, exceptions, loading, session
        from novaclient import api_versions
        from novaclient import client as nova_client

        own = {key: creds.pop(key) for key in SESSION_KEYS if key in creds}
        loader: Any = loading.get_plugin_loader(own.get("auth_type", "password"))
        known = {one.dest for one in loader.get_options()}
        for key in creds.keys() - known:
            raise UsageError(f"credentials of the {self.label} cloud: unknown entry {key!r}{did_you_mean(key, known)}",
                f"known: {', '.join(sorted(known))}")
        verify, patience = session_options(own, self.label)
        cert = (own["cert"], own["key"]) if "cert" in own and "key" in own else own.get("cert")
        auth = loader.load_from_options(**creds)
        opened = session.Session(auth=auth, verify=verify, cert=cert, timeout=patience, app_name="migrena")
        opened.session.hooks["response"].append(self._count)
        opened.get(self.url, authenticated=False, raise_exc=False, timeout=min(KEYSTONE_TIMEOUT, patience))
        auth.get_access(opened)  # detects a wrong password now
        region, interface = own.get("region_name"), str(own.get(
            "interface", own.get("endpoint_type", "public"))).removesuffix("URL")
        where: Any = {"region_name": region, "interface": interface}
        nova: Any = partial(nova_client.Client, session=opened, region_name=region, endpoint_type=interface)
        newest = api_versions.discover_version(nova("2.1"), api_versions.APIVersion("2.latest"))
        self._nova, self._version = nova(newest), (newest.ver_major, newest.ver_minor)
        self._nova_2_87 = nova(min(newest, api_versions.APIVersion("2.87")))
        self._placement = lambda path: opened.get(path, endpoint_filter={"service_type": "placement", **where}).json()
        self.store = ImageStore(self, GlanceClient("2", session=opened, endpoint=glance_endpoint or None, **where))
        self.has_volumes = False
        with suppress(exceptions.EndpointNotFound):  # a cloud without Cinder
            self.has_volumes = bool(opened.get_endpoint(service_type="block-storage", **where))
        api: Any = partial(adapter.Adapter, opened, **where)
        self.volumes = VolumeStore(self, api(service_type="block-storage"))
        self.networks = NetworkStore(self, api(service_type="network", version="2.0"))
        self._services = {
            "identity": api(service_type="identity", version="3"),
            "network": self.networks.adapter, "block-storage": self.volumes.adapter,
            "compute": api(service_type="compute",
                default_microversion="{}.{}".format(*min(self._version, NOVA_KNOWN)))}
        self.user = str(opened.get_user_id() or "")
        self.roles = list(auth.get_access(opened).role_ids or ())
        self.identity = {"nova": str(opened.get_endpoint(service_type="compute", **where)), "region": region or "",
            "project": str(opened.get_project_id() or "")}

    def project_name(self, id: str) -> str:
        return str(self.ask(f"show project {id}", "identity", "GET", f"/projects/{id}")["project"]["name"])

    def ask(self, act: str, service: str, method: str, path: str,
            body: Facts | None = None) -> dict[str, Any]:
        """An answer of a service's API; repeated during an outage, but for what makes something."""
        asking = partial(self._services[service].request, path, method, **({"json": body} if body is not None else {}))
        if method == "POST":
            with self.translating(act):
                answer = asking()
        else:
            answer = self.retrying(act, asking, waits=False)
        return dict(answer.json()) if answer.content else {}

    def listed(self, service: str, path: str, key: str) -> Rows:
        return self.pages(self._services[service], path, key)

    def find_server(self, id: str, *, is_patient: bool = True) -> Server | None:
        """An instance as it is, None if there is none; raises CloudError if these credentials may just not see it."""
        with ignoring(404):
            return self.server_retrying(id) if is_patient else self.server(id)
        if self.sees_hosts():
            return None
        raise self.error(f"server {id} does not exist, or these credentials may not see it", code=403)

    def actions(self, id: str) -> list[Action]:
        """An instance's actions, newest first."""
        found = self.retrying(f"show actions of server {id}", lambda: self._nova.instance_action.list(id))
        return [Action(one.request_id, one.action, str(one.start_time), getattr(one, "message", None) == "Error",
            seconds_between(one.start_time, getattr(one, "updated_at", None))) for one in found]

    def _request(self, id: str, answer: object) -> str:
        """The request id of an answer; if that was lost, the instance's last one."""
        known = [action.request for action in self.actions(id)]
        return next((request for request in (*getattr(answer, "request_ids", ()), *known) if request in known), "")

    def servers_named(self, name: str) -> list[Server]:
        return [server for server in self.servers(name=f"^{re.escape(name)}$") if server.name == name]

    def made_by(self, run: str, origin: str, *, all_tenants: bool = False) -> list[Server]:
        """Instances that a run made, by its marks, or without a run all made from `origin`; never `origin` itself."""
        return [server for server in self.servers(all_tenants=all_tenants)
            if server.id != origin and (runs := {MADE, DONE} & server.metadata.keys()) and (
            run in {server.metadata[key] for key in runs} if run else server.metadata.get(ORIGIN) == origin)]

    def sees_hosts(self) -> bool:
        """Whether these are admin credentials, which show an instance's host."""
        with ignoring(401, 403), self.translating("list hypervisors"):
            self._nova.hypervisors.list(detailed=False)
            return True
        return False

    def limits(self) -> dict[str, int]:
        with self.translating("show limits"):
            return {limit.name: limit.value for limit in self._nova.limits.get().absolute}

    def create(self, name: str, image: str, flavor: str, extra: Facts, marks: Mapping[str, str]) -> str:
        """Requests a new instance with these marks in its metadata; returns its id. Without an image: from a volume."""
        with self.translating(f"create server {name}"):
            return str(self._nova.servers.create(name, image, flavor, **self._arguments(extra, marks)).id)

    def refuses(self, extra: Facts) -> str:
        """Why Nova cannot be asked for such an instance: its version, or a key pair; empty where it can."""
        trial = copy.copy(self._nova.servers)
        trial._create = lambda *body, **more: None  # does everything but send
        try:
            default = {"nics": "none"} if self.takes("nics") else {}
            trial.create("", "", "", **self._arguments({**default, **extra}, {}))
        except (AttributeError, TypeError, ValueError) as error:
            return shorten(str(error))
        if key := extra.get("key_name"):
            with ignoring(404), self.translating(f"show key pair {key}"):
                self._nova.keypairs.get(key)
                return ""
            return f"the user of these credentials has no key pair {key!r}"
        return ""

    def _arguments(self, extra: Facts, marks: Mapping[str, str]) -> dict[str, Any]:
        given = {name: value for name, value in extra.items() if value is not None}
        return {**given, "meta": {**given.get("meta", {}), **marks}}

    def delete(self, id: str) -> None:
        """Deletes an instance and waits until it is gone; raises CloudError after five failures or half an hour."""
        refused, asked, limit = 0, 0.0, time.monotonic() + UNCHANGED_LIMIT
        for _ in self.polls():
            server = self.find_server(id)
            if not server or server.status == "DELETED":
                return
            is_deleting = server.task == "deleting"
            if time.monotonic() > limit or (refused == 5 and not is_deleting):
                raise self.error(f"server {id} was not deleted: {server.fault or 'Nova gives no reason'}")
            if not is_deleting or time.monotonic() > asked + 30:  # Nova ignores more until the host counts as down
                is_kept = server.status == "SOFT_DELETED"  # its disk still exists
                ask = self._nova.servers.force_delete if is_kept else self._nova.servers.delete
                with ignoring(404):
                    self.retrying(f"delete server {id}", partial(ask, id))
                refused, asked = refused + (not is_deleting), time.monotonic()

    def stop(self, id: str, changed: Callable[[Server], None]) -> str:
        """Stops an instance; returns the request id, or nothing if it was stopped already."""
        def ask() -> object:
            server = self.server(id)
            return server.is_stopped or server.is_pictured or self._nova.servers.stop(id)

        answer = self.retrying(f"stop server {id}", ask)
        self.wait(id, lambda server: server.is_stopped, changed)
        return "" if answer is True else self._request(id, answer)

    def start(self, id: str, changed: Callable[[Server], None]) -> Server:
        """Starts an instance; raises CloudError with the reason from os-instance-actions."""
        def is_started(server: Server) -> bool:
            if server.is_stopped and (why := self.why_failed(id, "start")):
                raise self.error(f"server {id} did not start: {why}")
            return server.is_running

        self.retrying(f"start server {id}", lambda: self.server(id).is_running or self._nova.servers.start(id))
        return self.wait(id, is_started, changed)

    def why_failed(self, id: str, action: str) -> str:
        """Why the last such action failed; empty if it did not, or not yet."""
        last = next((known.request for known in self.actions(id) if known.name == action), "")
        shown = last and self.retrying(f"show actions of server {id}", lambda: self._nova.instance_action.get(id, last))
        for event in getattr(shown, "events", None) or ():
            if event.get("result") == "Error":
                return str(event.get("details") or event.get("traceback") or "Nova gives no details")
        return ""

    def lock(self, id: str, reason: str) -> str:
        """Locks an instance against its users (not admins); returns the request id."""
        reasons = {"reason": reason} if self._version >= (2, 73) else {}
        return self._request(id, self.retrying(f"lock server {id}", lambda: self._nova.servers.lock(id, **reasons)))

    def unlock(self, id: str) -> None:
        self.retrying(f"unlock server {id}", lambda: self._nova.servers.unlock(id))

    def mark(self, id: str, marks: Mapping[str, str]) -> None:
        self.retrying(f"mark server {id}", lambda: self._nova.servers.set_meta(id, dict(marks)))

    def unmark(self, id: str, run: str, *keys: str) -> None:
        """Removes a run's marks with these keys from an instance, or none if another run's mark is there."""
        def take() -> None:
            there = self.server(id).metadata
            if all(there.get(key, run) == run for key in keys if key != WAS) and (
                    found := [key for key in keys if key in there]):
                self._nova.servers.delete_meta(id, found)

        self.retrying(f"unmark server {id}", take)

    def wait(self, id: str, ready: Callable[[Server], bool], changed: Callable[[Server], None]) -> Server:
        """The instance once `ready`; raises CloudError if it goes to ERROR or does not change for half an hour."""
        last, since = "", time.monotonic()
        for _ in self.polls():
            server = self.server_retrying(id)
            if ready(server):
                return server
            changed(server)
            if server.status == "ERROR":
                raise self.error(f"server {id} went to ERROR: {server.fault or 'Nova gives no reason'}")
            if last != (last := f"{server.status} {server.task}"):
                since = time.monotonic()
            if time.monotonic() - since > UNCHANGED_LIMIT:
                raise self.error(f"server {id} has been {last} for {duration(UNCHANGED_LIMIT)}")
        raise AssertionError("polls never end")


@contextmanager
def refusing() -> Iterator[None]:
    """A scope that changes nothing: a CloudError is a refusal."""
    try:
        yield
    except CloudError as error:
        raise Refused.of(error.reasons) from error


def both_clouds(settings: Settings, environment: Mapping[str, str]) -> tuple[Cloud, Cloud]:
    """Source and destination; raises Refused with all reasons if one cannot be reached."""
    creds = [credentials(side, settings, environment) for side in SIDES]
    with ThreadPoolExecutor(2) as pool:
        opening = [pool.submit(Cloud, "source", creds[0]),
            pool.submit(Cloud, "destination", creds[1], settings.dst_glance_endpoint)]
    if reasons := [reason for one in opening if isinstance(error := one.exception(), MigrenaError)
            for reason in error.reasons]:
        raise Refused.of(reasons)
    return opening[0].result(), opening[1].result()


# ---- 10. Disks -------------------------------------------------------

# Each tool with its packages: Debian's, and those of RPM distributions.
PACKAGES: Final = {
    "qemu-img": ("qemu-utils", "qemu-img"), "qemu-nbd": ("qemu-utils", "qemu-img"), "nbd-server": ("nbd-server", "nbd"),
    "nbd-client": ("nbd-client", "nbd"), "modprobe": ("kmod", "kmod"), "python3": ("python3", "python3"),
    "timeout": ("coreutils", "coreutils"), "ss": ("iproute2", "iproute"), "ip": ("iproute2", "iproute"),
    "flock": ("util-linux", "util-linux"), "virsh": ("libvirt-clients", "libvirt-client")}
# On both hosts, for any transport.
NEEDED: Final = ("qemu-img", "qemu-nbd", "virsh", "python3", "timeout", "flock", "ss", "ip")

# $1 device or empty, $2 a file for nbd-client's output, then its words. Prints the device and keeps it attached.
LEASED_DEVICE: Final = HOLD + """
device=$1; said=$2; shift 2
state=/sys/block/${device#/dev/}
[ -e /sys/block/nbd0 ] || modprobe nbd || exit
if [ -n "$device" ]; then
  [ -b "$device" ] || { echo "$device does not exist" >&2; exit 1; }
  [ "$(cat "$state/size")" = 0 ] && [ ! -e "$state/pid" ] || { echo "$device is in use" >&2; exit 1; }
fi
connect() { timeout 60 "$@" ${device:+"$device"} </dev/null >"$said" 2>&1; }
connect "$@" || connect "$@" || { cat "$said" >&2; echo "nbd-client did not connect" >&2; exit 1; }
[ -n "$device" ] || device=$(sed -n 's,.*Connected \\(/dev/nbd[0-9]*\\).*,\\1,p' "$said")
[ -b "$device" ] || { cat "$said" >&2; echo "nbd-client connected, but its device does not exist" >&2; exit 1; }
state=/sys/block/${device#/dev/}
trap '' PIPE
echo "$device $(cat "$state/size")"
hold
nbd-client -d "$device" >/dev/null 2>&1
n=0
while [ "$(cat "$state/size")" != 0 ] && [ "$n" -lt 100 ]; do n=$((n + 1)); sleep 0.05; done
[ "$n" -lt 100 ] || { echo "$device stays attached" >&2; exit 9; }
"""

# For all disks of the instance with root disk $1: the copies of run $2 that took their places lie beside them again.
SWAP_OUT: Final = """
set -e
for kept in "${1%/*}"/disk*.migrena-"$2"-fresh; do
  [ -e "$kept" ] || continue
  new="${kept%-fresh}"; at="${new%.migrena-"$2"}"
  [ ! "$kept" -ef "$at" ] || rm -- "$kept"
  [ -e "$new" ] || mv -T -- "$at" "$new"
  [ ! -e "$kept" ] || mv -fT -- "$kept" "$at"
done
sync "${1%/*}"
"""
# $1 the disk, $2 the new file, $3 where to keep the old one. At every moment a disk is at $1.
SWAP_IN: Final = """
set -e
chown --reference="$1" -- "$2"
chmod --reference="$1" -- "$2"
if command -v selinuxenabled >/dev/null && selinuxenabled; then chcon --reference="$1" -- "$2"; fi
sync "$2"
[ -e "$3" ] || ln -- "$1" "$3"
mv -fT -- "$2" "$1"
sync "$(dirname "$1")"
"""


# Succeeds if nobody writes to $1: tests the lock that our own writers share, and qemu's by opening $2, if given.
NO_WRITER: Final = """
umask 077
flock -n -- "$1" true || { echo "an earlier attempt still writes to $1" >&2; exit 1; }
[ -z "$2" ] || exec qemu-img info --image-opts "$2"
"""

# What changes whenever $1 is written to: of a file size, times and inode, of a device what was written on this host.
STAND: Final = """
[ -e "$1" ] || exit 0
[ -b "$1" ] || exec stat -c "%s %.Y %.Z %i" -- "$1"
device=$(printf "%d:%d" $(stat -L -c "0x%t 0x%T" -- "$1")) && size=$(cat "/sys/dev/block/$device/size") || exit
set -- $(cat "/sys/dev/block/$device/stat")
echo "$size $7 - $device"
"""
# What has image $1 of Ceph open, where there is an `rbd` to ask.
WATCHERS: Final = """
command -v rbd >/dev/null || exit 0
image=$1; shift
rbd status --format json "$@" -- "$image"
"""
# What a block device $1 is: the name of a logical volume, and for it or each path to it how that is connected.
IDENTITY: Final = """
device=$(readlink -f -- "$1")
[ -b "$device" ] || { echo "there is no device $1" >&2; exit 1; }
node=/sys/dev/block/$(printf "%d:%d" $(stat -c "0x%t 0x%T" -- "$device"))
[ ! -e "$node/dm/name" ] || echo "dm:$(cat "$node/dm/name")"
set -- "$node"/slaves/*
[ -e "$1" ] || set -- "$(readlink -f -- "$node")"
for leaf; do
  names=
  for link in /dev/disk/by-path/*; do
    [ "$(readlink -f -- "$link")" != "/dev/${leaf##*/}" ] || names="$names ${link##*/}"
  done
  echo "path:${names:-unknown ${leaf##*/}}"
done
"""
WATCH_LIMIT: Final = 120.0  # seconds: a lost connection's export lives on for 75, one that was killed is seen for 30

VIRSH: Final = """
virsh() { LC_ALL=C command virsh -q --connect qemu:///system "$@"; }
"""

# What libvirt knows of the instance $1 whose disk should be $2, parts separated by zero bytes: the domain's XML (the
# live one if it runs); its state; names of checkpoints and snapshots; each disk's target, whether it is that file or
# one beside it, and its block job (printed on standard error); then Nova's disk.info, and whether the file exists.
DOMAIN: Final = VIRSH + """
part() { printf "\\000"; "$@" 2>/dev/null </dev/null; }
virsh dumpxml "$1" || exit
part virsh domstate --reason "$1"
part virsh checkpoint-list --name "$1"
part virsh snapshot-list --name "$1"
part
virsh domblklist "$1" | while read -r target file; do
  if [ "$file" -ef "$2" ]; then is=same; elif [ "$file" -ef "${2%/*}/${file##*/}" ]; then is=beside; else is=other; fi
  printf "%s %s " "$target" "$is"
  virsh blockjob "$1" "$target" --info 2>&1 </dev/null | tr "\\r\\n" "  "
  echo
done
part cat -- "$2.info"
part test -f "$2" && echo there
exit 0
"""
DOMAIN_STATE: Final = VIRSH + 'virsh domstate --reason "$1"'

# qemu-img check of the qcow2 file $1, also if it finds errors; it reads only the tables, 2.5 s for 1 TiB.
CHECK: Final = 'qemu-img check --output=json -f qcow2 -- "$1" || case $? in 2|3) ;; *) exit 1; esac'

TARGET: Final = VIRSH + """
target_of() { virsh domblklist "$1" | while read -r name file; do [ "$file" != "$2" ] || echo "$name"; done; }
"""

# $1 the instance, $2 its disk, $3 the bitmap. Nova cannot undefine a domain with a checkpoint: only the bitmap is kept.
ADD_BITMAP: Final = TARGET + """
target=$(target_of "$1" "$2")
[ -n "$target" ] || { echo "libvirt has no disk $2 of $1" >&2; exit 1; }
virsh checkpoint-create-as "$1" "$3" --diskspec "$target,checkpoint=bitmap,bitmap=$3" >&2 || exit
virsh checkpoint-delete "$1" "$3" --metadata >&2
"""

# $1 the instance, $2 its disk, $3 the bitmap, if any. In a running instance libvirt removes it, once the checkpoint is
# defined again; one that broke when qemu was killed can be removed only once the instance is stopped.
DROP_BITMAP: Final = TARGET + """
domain=$1; disk=$2; bitmap=$3
drop_from_file() {
  [ ! -e "$disk" ] || info=$(qemu-img info -U --output=json -f qcow2 "$disk") || return
  case "$info" in *"\\"$bitmap\\""*) qemu-img bitmap --remove -f qcow2 "$disk" "$bitmap";; esac
}
drop() {
  case "$(virsh domstate "$domain" 2>/dev/null)" in ''|'shut off')
    drop_from_file
    return
  esac
  if ! virsh checkpoint-info "$domain" "$bitmap" >/dev/null 2>&1; then
    said=$(printf '<domaincheckpoint><name>%s</name><creationTime>%s</creationTime><disks>\
<disk name="%s" checkpoint="bitmap" bitmap="%s"/>%s' \\
      "$bitmap" "$(date +%s)" "$(target_of "$domain" "$disk")" "$bitmap" '</disks></domaincheckpoint>' |
      virsh checkpoint-create "$domain" /dev/stdin --redefine --redefine-validate 2>&1) || {
      echo "$said"
      case "$said" in *'missing or broken bitmap'*) drop_from_file; return; esac
      return 1
    }
  fi
  virsh checkpoint-delete "$domain" "$bitmap" >/dev/null && return
  virsh checkpoint-delete "$domain" "$bitmap" --metadata
  return 1
}
n=0
until said=$(drop 2>&1); do  # it may be starting or stopping
  n=$((n + 1))
  [ "$n" -lt 15 ] || { echo "$said" >&2; exit 1; }
  sleep 1
done
"""

CONNECT_IT: Final = "start and stop the instance once, so that Nova connects its disks"

# Puts what is told in the place of $1, a file of the same length.
PUT_NVRAM: Final = """
set -e
umask 077
[ -f "$1" ] || { echo "there is no $1" >&2; exit 1; }
trap 'rm -f -- "$1.migrena"' EXIT
base64 -d > "$1.migrena"
[ "$(stat -c %s -- "$1")" = "$(stat -c %s -- "$1.migrena")" ] || { echo "$1 has another length" >&2; exit 1; }
chown --reference="$1" -- "$1.migrena"
chmod --reference="$1" -- "$1.migrena"
sync "$1.migrena"
mv -fT -- "$1.migrena" "$1"
"""
SAMPLE: Final = 8 * MiB  # for the rehearsal
SLOW_WIRE: Final = 16 * MiB  # bytes per second; below this zlib, at 30 to 50 MiB/s on one core, is not the bottleneck


def tools_lacking(host: Host, tools: Collection[str] = tuple(PACKAGES)) -> list[str]:
    if tools not in host.lacking:
        host.lacking[tools] = host.script(LACKING, *tools).splitlines()
    return host.lacking[tools]


BROKEN: Final = "errors that qemu-img check finds"

Layer = tuple[str, str]  # a file or other storage of a disk's chain, and its format
ENDED: Final = {"crashed": "the source's qemu was killed or crashed",
    "destroyed": "the guest did not shut down in time and was powered off hard"}


@dataclass(frozen=True)
class Drive:
    """One disk of a domain, and the file that it should be."""

    path: str  # of that file, by DISK_PATH
    xml: ElementTree.Element  # of the disk that is this file or has it as a base; for the root disk, else the first
    chain: tuple[Layer, ...]  # from the top down; complete if the domain runs
    job: str  # its active block job
    info: str  # the file's format by disk.info, if known
    is_there: bool  # whether the file exists
    storage: Mapping[str, str] = empty(dict)  # a Node's, if it is no file

    @property
    def format(self) -> str:
        """The file's format as the guest's qemu opens it."""
        return dict(self.chain).get(self.path, "")

    @property
    def target(self) -> str:
        return target_of(self.xml)

    @property
    def bus(self) -> str:
        target = self.xml.find("target")
        return "" if target is None else target.get("bus", "")

    @property
    def volume(self) -> str:
        return volume_of(self.xml)


@dataclass(frozen=True)
class Domain:
    """What libvirt says about an instance and the files that should be its disks; it overrides other sources."""

    id: str
    xml: ElementTree.Element
    drives: Mapping[str, Drive]  # by key: the root disk, the ephemeral ones, then volumes by the guest's order
    state: str  # such as "shut off (destroyed)"
    metadata: Mapping[str, Sequence[str]]  # names by "checkpoint" and "snapshot"

    @property
    def is_off(self) -> bool:
        return self.state.startswith(("shut off", "crashed"))

    @property
    def ended(self) -> str:
        """A remark on how its qemu ended, or nothing."""
        return next((words for reason, words in ENDED.items() if reason in self.state), "")


def target_of(disk: ElementTree.Element) -> str:
    found = disk.find("target")
    return "" if found is None else found.get("dev", "")


def chain_in(disk: ElementTree.Element) -> tuple[Layer, ...]:
    chain, layer, format = list[Layer](), disk, disk.find("driver")
    while (source := layer.find("source")) is not None:
        lies = source.get("file") or source.get("dev") or source.get("name") or ""
        chain.append((lies, "raw" if format is None else format.get("type", "raw")))
        if (below := layer.find("backingStore")) is None:
            break
        layer, format = below, below.find("format")
    return tuple(chain)


def domain_of(host: Host, id: str, path: str) -> Domain:
    """What libvirt says about an instance whose root disk should be at this path; the host then has keys for Ceph."""
    try:
        domain = host.script(DOMAIN, id, path).read(partial(domain_in, id, path))
        for secret in {(auth.get("username", ""), one.get("uuid", "")) for drive in domain.drives.values()
                for auth in drive.xml.iter("auth") for one in auth.iter("secret")}:
            learn_key(host, *secret)
        return domain
    except CommandError as error:
        raise HostError(f"{host.name}: libvirt gives no information on {id}: {error.said}",
            "see there: virsh list --all; an instance that is not listed must be started once") from error


def domain_in(id: str, path: str, printed: str) -> Domain:
    """A Domain from the output of DOMAIN; raises ValueError if it is something else."""
    xml, state, checkpoints, snapshots, disks, info, there = printed.split("\0")
    try:
        tree = ElementTree.fromstring(xml[xml.index("<domain"):])
    except ElementTree.ParseError as error:
        raise ValueError("no XML") from error
    lines = {line.split(maxsplit=1)[0]: line for line in disks.splitlines()}
    found = [disk for disk in tree.findall("devices/disk") if device_of(disk) == "disk" or (
        volume_of(disk) and disk.find("source") is not None)]
    same = [disk for disk in found if " same " in lines.get(target_of(disk), "")]
    on_it = [disk for disk in found if any(file == path for file, _ in chain_in(disk))]
    root = next(iter((*same, *on_it, *found)), tree)
    drives = {ROOT: drive_in(root, path, lines, info, is_there=bool(there.strip()), is_it=root in same)}
    folder, own = path.rpartition("/")[0], {name_of(id, disk): disk for disk in found if storage_of(disk)}
    volumes = sorted(filter(volume_of, found), key=lambda disk: (len(target_of(disk)), target_of(disk)))
    first = min(found, key=lambda disk: disk.find("boot[@order='1']") is None, default=tree)  # keeps their order
    if not (same or on_it) and (lies := own.get("disk", first if first in volumes else None)) is not None:
        drives = {ROOT: stored(lies, lines)}
    beside = {chain_in(disk)[0][0].rpartition("/")[2]: disk for disk in found
        if " beside " in lines.get(target_of(disk), "")} | own
    for number, name in enumerate(ephemeral_among(beside)):
        drives[f"eph{number}"] = stored(own[name], lines) if name in own else drive_in(
            beside[name], f"{folder}/{name}", lines, info, is_there=True, is_it=True)
    drives |= {f"volume-{volume_of(disk)}": stored(disk, lines) for disk in volumes if disk is not drives[ROOT].xml}
    names = {kind: [name for name in told.split("\n") if name and not name.startswith("migrena-")]  # not ours
        for kind, told in (("checkpoint", checkpoints), ("snapshot", snapshots))}
    return Domain(id, tree, drives, state.strip(), names)


def drive_in(disk: ElementTree.Element, path: str, lines: Mapping[str, str], info: str, *, is_there: bool,
        is_it: bool) -> Drive:
    """A Drive from the domain's disk; `is_it`: it is the file at this path, perhaps by another name."""
    chain, known = chain_in(disk), None
    with suppress(ValueError, AttributeError):
        end = "/" + "/".join(path.split("/")[-2:])  # the same in a container and outside
        known = next((told for file, told in json.loads(info).items() if file.endswith(end)), None)
    chain = ((path, chain[0][1]), *chain[1:]) if is_it else chain
    return Drive(path, disk, chain, job_of(disk, lines), str(known or ""), is_there)


def device_of(disk: ElementTree.Element) -> str:
    return disk.get("device", "disk")


def job_of(disk: ElementTree.Element, lines: Mapping[str, str]) -> str:
    job, mirror = re.search(r"([A-Z][A-Za-z ]*): *\[", lines.get(target_of(disk), "")), disk.find("mirror")
    return job[1] if job else "" if mirror is None else f"block {mirror.get('job')}"


def storage_of(disk: ElementTree.Element) -> dict[str, str]:
    """qemu's options for a domain's disk that is a device or an image on Ceph; none for a file and what is not known.

    The key for Ceph is not among them, but in a file on the host: see learn_key().
    """
    source, auth = disk.find("source"), disk.find(".//auth")
    if source is None:
        return {}
    if disk.get("type") == "block":
        return {"driver": "host_device", "filename": source.get("dev", "")}
    if source.get("protocol") != "rbd":
        return {}
    pool, _, image = source.get("name", "").partition("/")
    hosts = [(one.get("name", "").strip("[]"), one.get("port", "6789")) for one in source.findall("host")]
    user = {} if auth is None else {"user": auth.get("username", "")}
    return {"driver": "rbd", "pool": pool, "image": image, **user,
            **{f"server.{number}.{key}": value for number, pair in enumerate(hosts)
            for key, value in zip(("host", "port"), pair, strict=True)}}


def stored(disk: ElementTree.Element, lines: Mapping[str, str]) -> Drive:
    """A Drive from a domain's disk that is a volume or no file."""
    storage, (top, *below) = storage_of(disk), chain_in(disk)
    path = f"rbd:{top[0]}" if storage.get("driver") == "rbd" else top[0]
    return Drive(path, disk, ((path, top[1]), *below), job_of(disk, lines), "", is_there=True, storage=storage)


def volume_of(disk: ElementTree.Element) -> str:
    """The id of the volume that a domain's disk is, or nothing: by its serial, from Nova 29 on also by its alias."""
    alias = disk.find("alias")
    told = disk.findtext("serial") or ("" if alias is None else alias.get("name", "").removeprefix("ua-"))
    return told if re.fullmatch(UUID_FORM, told) else ""


def name_of(id: str, disk: ElementTree.Element) -> str:
    """What Nova calls a disk of an instance on LVM or Ceph, as it would call its file: disk, disk.local, disk.swap…"""
    before, is_own, name = chain_in(disk)[0][0].rpartition("/")[2].partition(f"{id}_")
    return name if is_own and not before else ""


def ephemeral_among(names: Iterable[str]) -> list[str]:
    """The names of ephemeral disks' files, in Nova's order: disk.local, disk.eph0, disk.eph1…"""
    form = r"disk\.(?:local|eph(\d+))"
    found = {int(number[1] or -1): name for name in names if (number := re.fullmatch(form, name))}
    return [found[number] for number in sorted(found)]


def refuse_domain(host: Host, domain: Domain, keys: Collection[str] = ()) -> list[Reason]:
    """Why libvirt's information forbids copying the files as the instance's disks: those with these keys, or all."""
    reasons = list[Reason]()
    for key, drive in ((key, drive) for key, drive in domain.drives.items() if not keys or key in keys):
        path, format = drive.path, drive.format
        if (device := device_of(drive.xml)) != "disk":
            reasons.append(Reason(f"{host.name}: volume {drive.volume} is attached as a {device}, which is not carried",
                "attach it as a disk" if key == ROOT else "--root-only or --disks goes on without it"))
        elif other := misplaced(host, domain, drive):
            reasons.append(other)
        elif drive.info not in ("", format):
            reasons.append(Reason(f"{host.name}: the format of {path} is {format} by libvirt, {drive.info} by "
                f"{domain.drives[ROOT].path}.info", "if the guest works, correct that file"))
        if drive.job:
            is_backup, id = drive.job == "Backup", domain.id
            end = f"domjobabort {id}" if is_backup else f"blockjob {id} {drive.target} --abort"
            reasons.append(Reason(f"{host.name}: a block job is active on the disk: {drive.job}",
                f"wait until it ends, or: virsh {end}"))
    return reasons + refuse_metadata(host, domain)


def refuse_metadata(host: Host, domain: Domain) -> list[Reason]:
    """Checkpoints and snapshots: Nova redefines the domain at each start, which fails while it has any."""
    return [Reason(f"{host.name}: libvirt has a {kind} of the instance, {', '.join(names)}: "
            "once stopped, Nova cannot start it",
            "; ".join(f"virsh {kind}-delete {domain.id} {shlex.quote(name)} --metadata" for name in names))
            for kind, names in domain.metadata.items() if names]


def misplaced(host: Host, domain: Domain, drive: Drive) -> Reason | None:
    """What one of the instance's disks is, if not the expected file."""
    path, way = drive.path, "make a snapshot of the instance and carry the image"
    if not drive.chain:
        return Reason(f"{host.name}: by libvirt the instance has no disk", "see there: virsh domblklist")
    top, format = drive.chain[0]
    if drive.xml.get("type") in ("network", "block") and not (drive.storage and top == path):
        return Reason(f"{host.name}: the disk is {top}, which migrena does not know: neither Nova's nor a volume", way)
    if top == path:
        lost = Reason(f"{host.name}: {path} is the disk by libvirt, but does not exist", "find out what happened to it")
        return None if drive.is_there else lost
    files = [file for file, _ in drive.chain]
    with suppress(CommandError):  # libvirt may not list the bases of a stopped one
        files += [image.path for image in disk_chain(host, top, format, shared=True)]
    if path not in files:
        return Reason(f"{host.name}: the disk is {top}, not {path}",
            "set DISK_PATH in config.py to that, with %s for the id")
    merge = f"virsh blockcommit {domain.id} {drive.target} --base {shlex.quote(path)} --active --pivot"
    if domain.is_off:  # without -b it would commit into the base that instances share
        merge = (f"qemu-img commit -f {format} -b {shlex.quote(path)} {shlex.quote(top)}; "
            f"then start and stop it, so that Nova uses {path} again")
    return Reason(f"{host.name}: the guest writes to {top}, an external snapshot; {path} is the state before it", merge)


def disk_chain(host: Host, path: str, format: str, *, shared: bool) -> tuple[DiskImage, ...]:
    """A disk and its bases, by qemu-img info; raises CommandError if a guest uses it, unless `shared`."""
    force = ("-U",) if shared else ()
    try:
        answer = host.run("qemu-img", "info", "--output=json", "--backing-chain", *force, "-f", format, path)
    except CommandError as error:
        lost = re.search(r"open '([^']+)': No such file", error.said)
        if not lost or lost[1] == path:
            raise
        raise HostError(f"{host.name}: {path} has the backing file {lost[1]}, which does not exist",
            "restore that file first: Nova would put its own image there") from error
    images = answer.read(lambda said: [_disk_image(node) for node in document_in(said) or [{}]])
    lengths = host.run("stat", "-L", "-c", "%s", "--", *(image.path for image in images)).read(
        lambda said: [int(length) for _, length in zip(images, said.split(), strict=True)])
    return tuple(replace(image, length=length) for image, length in zip(images, lengths, strict=True))


def _disk_image(node: Facts) -> DiskImage:
    details = node.get("format-specific", {}).get("data", {})
    flaws = {"internal snapshots": node.get("snapshots"), "encryption": node.get("encrypted") or details.get("encrypt"),
        "an external data file": details.get("data-file"), "the corrupt flag": details.get("corrupt")}
    return DiskImage(
        path=node["filename"], format=node["format"], size=int(node["virtual-size"]), length=0,
        allocated=int(node["actual-size"]), backing=node.get("full-backing-filename", node.get("backing-filename", "")),
        backing_format=node.get("backing-filename-format", ""),
        flaws=tuple(flaw for flaw, found in flaws.items() if found),
        lost_bitmaps=tuple(one["name"] for one in details.get("bitmaps", ()) if "in-use" in one["flags"]))


def chosen_drives(host: str, drives: Mapping[str, Drive], only: Sequence[str]) -> dict[str, Drive]:
    """Those that --disks names, by key, as the guest's device or as a volume; raises HostError."""
    known = {name for key, drive in drives.items() for name in (key, drive.target, drive.volume)}
    if unknown := set(only) - known:
        raise HostError(f"{host}: the instance has no disk {', '.join(sorted(unknown))}",
            f"name it in --disks as one of {', '.join(drives)}, or as the guest's device")
    chosen = {key: drive for key, drive in drives.items() if {key, drive.target, drive.volume} & {*only}}
    ephemeral = {key for key in chosen if key.startswith("eph")}
    if before := {f"eph{number}" for number in range(len(ephemeral))} - ephemeral:
        raise HostError(f"{host}: Nova makes ephemeral disks in their order, and {', '.join(sorted(before))} is not "
            "among the chosen", f"name it in --disks too, or leave out {', '.join(sorted(ephemeral))}")
    return chosen


def survey_disks(host: Host, instance: str, path: str, *, shared: bool, only: Sequence[str] = ()) -> dict[str, Disk]:
    """An instance's disks by key, of which the root disk should be at this path.

    Raises HostError for missing disks.
    """
    domain = domain_of(host, instance, path)
    names = host.script('ls -A -- "${1%/*}" 2>/dev/null; true', path).split("\n")  # no folder: there is a reason below
    own = {name_of(instance, drive.xml) for drive in domain.drives.values() if drive.storage}
    beside = tuple(sorted(name for name in own.union(names) if re.fullmatch(r"disk\.(local|eph\d+|config|swap)", name)))
    if only:
        domain = replace(domain, drives=chosen_drives(host.name, domain.drives, only))
    reasons = refuse_domain(host, domain)
    lost = set(ephemeral_among(beside)) - own - {drive.path.rpartition("/")[2] for drive in domain.drives.values()}
    if lost and not only:
        reasons.append(Reason(
            f"{host.name}: by libvirt the guest does not write to {', '.join(sorted(lost))} beside {path}",
            "find out whether there is an external snapshot (virsh domblklist); --root-only goes on without it"))
    if shared and domain.is_off:
        reasons.append(Reason(f"{host.name}: the instance runs by Nova, but is {domain.state} by libvirt",
            f"openstack server reboot --hard {instance}, or openstack server stop {instance}"))
    if reasons:
        raise HostError.of(reasons)
    macs = tuple(one.get("address", "").lower() for one in domain.xml.iterfind("devices/interface/mac"))
    return {key: replace(
        survey_drive(host, drive, shared=shared), beside=beside, has_nvram=domain.xml.find("os/nvram") is not None,
        has_tpm=domain.xml.find("devices/tpm") is not None, macs=macs,
        volume=drive.volume, bus=drive.bus)
        for key, drive in domain.drives.items()}


def survey_drive(host: Host, drive: Drive, *, shared: bool) -> Disk:
    if drive.storage:
        return survey_stored(host, drive, shared=shared)
    path = drive.path
    if not shared:
        host.run("qemu-img", "info", "--image-opts", Node.of_file(path).locked)
    chain = disk_chain(host, path, drive.format, shared=shared)
    require_chain(host, drive, chain)
    top = chain[0] if shared else checked(host, chain[0])
    if drive.xml.find(".//encryption") is not None and not top.flaws:  # a raw file does not show it
        top = replace(top, flaws=("encryption",))
    chain, guest_bytes = (top, *chain[1:]), 0
    if not any(image.flaws for image in chain):  # else it may not even open
        guest_bytes = size_of_copy(host, "-U", "-f", top.format, path)
    return Disk(chain, guest_bytes, direct_io=host.succeeds(
        "dd", f"if={path}", "of=/dev/null", "iflag=direct", "bs=4096", "count=1"))


def size_of_copy(host: Host, *image: str) -> int:
    """Bytes of a qcow2 copy of what the guest sees."""
    measured = host.run("qemu-img", "measure", "--output=json", "-O", "qcow2", *image, seconds=600)
    return measured.read(lambda said: int(document_in(said)["required"]))


def survey_stored(host: Host, drive: Drive, *, shared: bool) -> Disk:
    """Facts about one disk that is a device or an image on Ceph."""
    image = stored_image(host, drive)
    if not shared and image.node.has_locks:
        host.run("qemu-img", "info", "--image-opts", image.node.locked)
    taken = size_of_copy(host, "--image-opts", image.node.unlocked)
    return Disk((replace(image, allocated=taken),), taken, direct_io=image.node.has_locks)


def stored_image(host: Host, drive: Drive) -> DiskImage:
    """A disk that is a device or an image on Ceph, as it is now."""
    try:
        info = host.run("qemu-img", "info", "--output=json", "--image-opts", Node(drive.storage).unlocked)
    except CommandError as error:
        if "Unknown driver 'rbd'" not in error.said:
            raise
        raise HostError(f"{host.name}: qemu-img there knows no disks on Ceph",
            "install its driver (Debian: qemu-block-extra, RPM: qemu-kvm-block-rbd)") from error
    size = info.read(lambda said: int(document_in(said)["virtual-size"]))
    flaws = ("encryption",) if drive.xml.find(".//encryption") is not None else ()
    own = logical_volume(drive.path) if drive.storage["driver"] == "host_device" and not drive.volume else ()
    return DiskImage(drive.path, drive.format, size, size, 0, flaws=flaws, storage=drive.storage, identity=own)


def require_chain(host: Host, drive: Drive, chain: Sequence[DiskImage]) -> None:
    """Raises HostError if the file names other bases than the running qemu has open."""
    if any(not len(below) for below in drive.xml.iter("backingStore")):  # a complete chain
        has, names = [[(os.path.normpath(file), format) for file, format in below]
            for below in (drive.chain[1:], [(image.path, image.format) for image in chain[1:]])]
        if has != names:
            raise HostError(
                f"{host.name}: {drive.path} has the bases {has} in the guest's qemu, but {names} in the file",
                "find out what changed them (qemu-img rebase, virsh blockpull)")


def checked(host: Host, image: DiskImage) -> DiskImage:
    """A file that nobody writes to, with the errors that qemu-img check finds."""
    if image.format != "qcow2" or image.flaws:
        return image
    found = host.work("sh", "-c", CHECK, "migrena", image.path, stall=3600).read(document_in)
    flaws = (BROKEN,) if found.get("corruptions") or found.get("check-errors") else ()
    return replace(image, flaws=flaws, leaks=found.get("leaks", 0))


def free_space(host: Host, path: str) -> int:
    free, block = host.run("stat", "-f", "-c", "%a %S", "--", path).read(lambda said: pairs_of(said)[0])
    return free * block


def same_content(one: tuple[Host, DiskImage], other: tuple[Host, DiskImage], stall: float) -> bool:
    (here, image), (there, known) = one, other
    return (image.length, image.format) == (known.length, known.format) and same_digests(
        (here, image.path), (there, known.path), image.length, stall)


def same_digests(one: tuple[Host, str], other: tuple[Host, str], length: int, stall: float) -> bool:
    here, there = in_parallel(*(partial(digests, host, path, 0, length, stall) for host, path in (one, other)))
    return here == there


def blocks(verb: str, where: str, offset: int, length: int, *more: int | str) -> tuple[str, ...]:
    return (*PYTHON, program(work_on_blocks), verb, where, str(offset), str(length), *map(str, more))


def digests(host: Host, where: str, offset: int, length: int, stall: float, *more: int | str,
        before: Sequence[str] = ()) -> dict[int, str]:
    """The digests of the blocks that are not all zeros, by number; `where`: a file, or a node in JSON."""
    return host.work(*before, *blocks("digest", where, offset, length, *more), stall=stall).read(_digests_in)


def _digests_in(printed: str) -> dict[int, str]:
    lines = printed.replace(".\n", "")
    if not re.fullmatch(r"(?:\d+ [0-9a-f]{64}\n)*", lines):
        raise ValueError("a line is not a block and its digest")
    return {int(block): found for block, found in map(str.split, lines.splitlines())}


def lines_of(found: Mapping[int, str]) -> bytes:
    return "".join(f"{block} {digest}\n" for block, digest in sorted(found.items())).encode()


@contextmanager
def served_here(host: Host, folder: str, name: str, *words: str,
        before: Sequence[str] = ()) -> Iterator[tuple[Lease, Node]]:
    """A qemu-nbd on a socket in our private folder, and its node; raises CommandError if it does not start."""
    socket_file, pidfile = f"{folder}/{name}.sock", f"{folder}/{name}.pid"
    with host.daemon(pidfile, *before, "qemu-nbd", "-t", "-k", socket_file, f"--pid-file={pidfile}", *words) as lease:
        yield lease, Node({"driver": "nbd", "server.type": "unix", "server.path": socket_file})


def held(host: Host, node: Node, folder: str) -> AbstractContextManager[tuple[Lease, Node]]:
    """Holds qemu's lock on a disk with a qemu-nbd: nobody writes to it; raises CommandError if somebody does."""
    return served_here(host, folder, "hold", "-r", "--image-opts", node.locked)


def watchers_of(host: Host, node: Node) -> str:
    """The addresses of those that have an image on Ceph open; empty where there is no `rbd` to ask.

    Our own exports are among them while they last: qemu opens it to write to it, even where it only reads.
    """
    told = node.storage
    hosts = [f"{f'[{value}]' if ':' in value else value}:{told[key.replace('host', 'port')]}"
        for key, value in told.items() if key.endswith(".host")]
    user = ("--id", told["user"]) if "user" in told else ()
    said = host.script(WATCHERS, f"{told['pool']}/{told['image']}", *user, *(("-m", ",".join(hosts)) if hosts else ()))
    users = said.read(lambda said: [str(one["address"]) for one in document_in(said)["watchers"]]) if said else []
    return " ".join(users)


def require_identity(host: Host, image: DiskImage) -> None:
    """Raises FinalError unless a device is proven to be what it should be: its path may be another device's by now."""
    if image.node.storage["driver"] != "host_device":
        return
    try:
        found = host.script(IDENTITY, image.path).splitlines()
    except CommandError as error:
        raise FinalError(f"{host.name}: {image.path} cannot be used: {error.said}", CONNECT_IT) from error
    kind = "dm:" if any(name.startswith("dm:") for name in image.identity) else "path:"
    # Of one device; other names than these, as distributions add them, prove nothing.
    seen = [re.findall(r"\S+-(?:iscsi|fc)-\S+", names) or [names] for names in found if names.startswith(kind)]
    if not seen or not all(name.endswith(image.identity) for names in seen for name in names):
        raise FinalError(f"{host.name}: {image.path} is not proven to be the instance's disk: it is "
                f"{', '.join(found)}, and should be {' or '.join(image.identity) or 'known'}", CONNECT_IT)


def logical_volume(path: str) -> tuple[str, ...]:
    """The identity of a logical volume /dev/GROUP/NAME: device mapper's name for it."""
    group, _, name = path.removeprefix("/dev/").partition("/")
    return ("dm:{}-{}".format(*(word.replace("-", "--") for word in (group, name))),) if name else ()


def require_unwatched(host: Host, image: DiskImage) -> None:
    """Raises FinalError if somebody has an image on Ceph open, for longer than one that was killed is remembered."""
    limit = time.monotonic() + WATCH_LIMIT
    while not image.node.has_locks and (users := watchers_of(host, image.node)):
        if time.monotonic() > limit:
            raise FinalError(f"{host.name}: {image.path} is in use by {users}", "find out who has it open")
        time.sleep(2.0)


class DiskLocks(ExitStack):
    """qemu's locks on both disks of a copy, each held by a qemu-nbd until released: no guest can start on them.

    Images on Ceph have none: a second writer gets in, so that only those who have one open are looked for.
    """

    def __init__(self, run: str) -> None:
        super().__init__()
        self._run, self._changing = run, threading.RLock()
        self._held: dict[tuple[str, ...], tuple[ExitStack, Lease, Callable[[], object]]] = {}

    @staticmethod
    def _place(host: Host, image: DiskImage) -> tuple[str, ...]:
        return host.name, host.first_address, image.path  # two clouds may have hosts of one name

    def hold(self, host: Host, image: DiskImage) -> tuple[Lease, ...]:
        """Locks a disk, or again after a lost connection. Raises FinalError if it is in use, or another's."""
        place, node = self._place(host, image), image.node
        require_identity(host, image)
        if not node.has_locks:
            require_unwatched(host, image)
            return ()
        if (known := self._held.get(place)) and self._holds(known):
            return (known[1],)
        self.release(host, image)
        with ExitStack() as stack:
            folder = stack.enter_context(host.private_folder(self._run))
            try:
                lease, _ = stack.enter_context(held(host, node, folder))
            except CommandError as error:
                raise FinalError(f"{host.name}: {image.path} is in use: {error.said}",
                    "find out who has it open (virsh list, lsof)") from error
            alive = 'readlink "/proc/$(cat "$1")/exe"'  # kill -0 would also find a zombie
            with self._changing:
                self._held[place] = self.enter_context(stack.pop_all()), lease, partial(
                    host.script, alive, f"{folder}/hold.pid")
        return (lease,)

    @staticmethod
    def _holds(known: tuple[ExitStack, Lease, Callable[[], object]]) -> bool:
        _, lease, see_it = known
        return does_succeed(partial(lease.check, is_running=True), HostError) and does_succeed(see_it, HostError)

    def check(self, *disks: tuple[Host, DiskImage]) -> None:
        """Raises HostError where a lock is lost, on these disks or on all; they are asked for at the same time."""
        with self._changing:
            all_held, wanted = dict(self._held), {self._place(*disk) for disk in disks}
        with ThreadPoolExecutor() as pool:
            asked = {place: pool.submit(self._holds, known) for place, known in all_held.items()
                if not wanted or place in wanted}
        for place in (place for place, holds in asked.items() if not holds.result()):
            raise HostError(f"{place[0]}: the qemu-nbd that locked {place[-1]} ended", "run it again")

    def release(self, host: Host, image: DiskImage) -> None:
        with self._changing:
            known = self._held.pop(self._place(host, image), None)
        if known:
            known[0].close()


@dataclass(frozen=True)
class Export:
    """An NBD export: address, port and name."""

    address: str
    port: int
    name: str


@dataclass(frozen=True)
class Ends:
    """Both hosts of a copy, their private folders, and the destination's address as the source sees it."""

    source: Host
    destination: Host
    source_folder: str
    destination_folder: str
    client_address: str
    device: str  # the destination's interface towards the source, empty where it is unknown
    locks: DiskLocks

    def folder(self, host: Host) -> str:
        return self.source_folder if host is self.source else self.destination_folder


def route(host: Host, to: str) -> dict[str, str]:
    """A host's route to an address, by `ip route get`: "dev", "prefsrc"; empty if unknown."""
    with suppress(CommandError, ValueError, LookupError):
        return dict(document_in(host.run("ip", "-json", "route", "get", to))[0])
    return {}


def received(ends: Ends) -> int:
    """Bytes received by the destination's interface towards the source, of all connections; 0 if unknown."""
    with suppress(HostError, ValueError):
        return int(ends.destination.run(
            "cat", f"/sys/class/net/{ends.device}/statistics/rx_bytes")) if ends.device else 0
    return 0


def certificates(server: str) -> dict[str, dict[str, bytes]]:
    """PEM files for `server` and `client`, for this run alone: a CA and a certificate each."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    purposes = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}
    keys = {who: ec.generate_private_key(ec.SECP256R1()) for who in ("CA", *purposes)}
    names = {who: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"migrena {who}")]) for who in keys}

    def certificate(who: str) -> bytes:
        now = datetime.now(timezone.utc)
        builder = (x509.CertificateBuilder().subject_name(names[who]).issuer_name(names["CA"])
            .public_key(keys[who].public_key()).serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=who == "CA", path_length=None), critical=True))
        if who != "CA":
            builder = builder.add_extension(x509.ExtendedKeyUsage([purposes[who]]), critical=False)
            builder = builder.add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(server))]), critical=False)
        return builder.sign(keys["CA"], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    ca = certificate("CA")
    private = {who: key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        for who, key in keys.items()}
    return {who: {"ca-cert.pem": ca, f"{who}-cert.pem": certificate(who),
        f"{who}-key.pem": private[who]} for who in purposes}


@dataclass(frozen=True)
class BesideFile:
    """A Landing: the copy is a new file beside the disk that Nova made, and takes its place by rename."""

    run: str
    fresh: DiskImage  # the disk that Nova made
    format: str  # the new file's while it is written: that of the copied file or of what the guest sees
    direct_io: bool = True  # whether O_DIRECT works there

    @property
    def new(self) -> str:
        """The file the copy is written to; its writers lock it."""
        return files_beside(self.fresh.path, self.run)[0]

    lock = new

    @property
    def kept(self) -> str:
        return files_beside(self.fresh.path, self.run)[1]

    @property
    def image(self) -> DiskImage:
        return replace(self.fresh, path=self.new, format=self.format)

    @property
    def written(self) -> Node:
        """The new file for its writers: a raw one may have several, which share a lock of flock(1) instead."""
        return Node.of_file(self.new, locking="off") if self.format == "raw" else self.image.node


@dataclass(frozen=True)
class InPlace:
    """A Landing: the copy is written to the disk that was made for it, a volume or what is no file."""

    run: str
    fresh: DiskImage
    lock: str  # a file in the instance's folder, for its writers
    is_blank: bool  # whether it holds only zeros, and nothing was written to it yet
    direct_io = True

    @property
    def format(self) -> str:
        return self.fresh.format

    @property
    def new(self) -> str:
        return self.fresh.path

    @property
    def kept(self) -> str:
        """What is removed at the end."""
        return self.lock

    @property
    def image(self) -> DiskImage:
        return self.fresh

    @property
    def written(self) -> Node:
        """The disk for its writers, while the run itself has qemu's lock on it."""
        node = self.fresh.node
        return Node({**node.storage, "locking": "off"}, node.format) if node.has_locks else node


Landing = BesideFile | InPlace  # how a copy takes its place


@dataclass(frozen=True)
class DiskJob:
    """All that is needed to move one disk between two hypervisors."""

    key: str
    settings: Settings
    source: DiskImage
    landing: Landing
    transport: AnyTransport
    whole_file: bool  # True: copy the file itself, the bases are equal; False: copy what the guest sees
    source_direct: bool
    is_live: bool = False  # whether a guest may be writing to the source
    stand: str = ""  # stat_of() the stopped source's file: any change of the file changes it

    @property
    def run(self) -> str:
        return self.landing.run

    @property
    def fresh(self) -> DiskImage:
        return self.landing.fresh

    @property
    def new(self) -> str:
        return self.landing.new

    @property
    def takes_space(self) -> bool:
        """Whether the copy needs free space: not on a device, nor in a file that has all of its own."""
        fresh = self.fresh
        return fresh.is_file and not (isinstance(self.landing, InPlace) and fresh.allocated >= fresh.size)

    @property
    def length(self) -> int:
        """Bytes to copy: the file's length, or the disk's size as the guest sees it."""
        return self.source.length if self.whole_file else self.source.size

    @property
    def exported(self) -> Node:
        """What is served: the file itself, or what the guest sees."""
        return Node.of_file(self.source.path) if self.whole_file else self.source.node

    @property
    def max_parallel(self) -> int:
        """Chunks copied in parallel: one if a format's tables or Ceph allow one writer, or a rate is one command's."""
        is_open = self.landing.format == "raw" and self.landing.image.node.has_locks
        return 2 if is_open and not self.settings.limit_rate else 1

    @property
    def chunk(self) -> int:
        """Most bytes of a chunk: parallel ones share those of CHUNK, or what the rate limit allows in a minute.

        A limit by the hour allows five seconds, as no chunk's rate changes.
        """
        most = self.settings.least_rate * (5 if ":" in self.settings.limit_rate else 60) or self.settings.chunk
        return max(min(most, self.settings.chunk) // self.max_parallel // MiB * MiB, MiB)

    @property
    def may_be_compressed(self) -> bool:
        """Whether the network's speed decides on compression; a rate limit is for uncompressed bytes."""
        asked = self.settings
        return (asked.compress == "auto" and not self.transport.compress and asked.transport != "nbd"
            and not asked.limit_rate)


class Transport:
    """How an export of the source reaches the destination."""

    name = ""  # in options, journal and report
    compress = False
    has_holes = True  # at the destination: where not, zeros would be sent

    def is_taken(self, host: Host, port: int) -> bool:
        """Whether somebody listens at a port; False where the server itself will tell."""
        return False

    def reaches(self, length: int) -> int:
        """Bytes that the destination sees of an export of `length` bytes: qemu adds zeros up to a sector."""
        return _whole_sectors(length)


@dataclass(frozen=True)
class QemuTransport(Transport):
    """qemu-nbd at the source, qemu-img's own client at the destination; compressed by `squeeze` on both hosts."""

    name = "qemu"
    compress: bool = False

    def serve(self, ends: Ends, job: DiskJob, place: Export, image: Node, stack: ExitStack) -> tuple[str, ...]:
        """The command that serves an image at the source."""
        folder, tls = ends.source_folder, job.settings.tls
        pidfile = f"{folder}/{place.port}.pid"
        listening = (*PYTHON, program(listen), place.address, str(place.port), "" if tls else ends.client_address)
        cache = ("--cache=none", "--aio=native") if job.source_direct else ("--cache=writeback",)
        words = ("-r", "-e", "8", "-x", place.name, *cache, *disk_options(image, is_live=job.is_live))
        if self.compress:
            _, node = stack.enter_context(served_here(ends.source, folder, "disk", *words, before=low_priority(job)))
            words = "serve", pidfile, node.storage["server.path"], folder if tls else "", "", ""
            return (*listening, *PYTHON, program(squeeze), *words)
        own = (*tls_options(job, folder, "server"), *(("--tls-creds", "t") if tls else ()))
        return (*low_priority(job), *listening, "qemu-nbd", "-t", f"--pid-file={pidfile}", *own, *words)

    @contextmanager
    def reach(self, ends: Ends, job: DiskJob, export: Export, length: int) -> Iterator[Node]:
        """A scope with the export of `length` bytes as a node at the destination."""
        host, folder, tls = ends.destination, ends.destination_folder, job.settings.tls
        if self.compress:
            pidfile, socket_file = f"{folder}/wire.pid", f"{folder}/wire.sock"
            words = "fetch", pidfile, socket_file, folder if tls else "", export.address, str(export.port)
            with host.daemon(pidfile, *PYTHON, program(squeeze), *words):
                yield Node({"driver": "nbd", "server.type": "unix", "server.path": socket_file, "export": export.name})
            return
        yield Node({"driver": "nbd", "server.type": "inet", "server.host": export.address,
            "server.port": str(export.port), "export": export.name} | ({"tls-creds": "t"} if tls else {}))


class NbdTransport(Transport):
    """nbd-server at the source, or qemu-nbd for what the guest sees; nbd-client and a device at the destination."""

    name = "nbd"
    has_holes = False

    @staticmethod
    def lacking(source: Host, destination: Host) -> list[str]:
        """What it needs and the hosts lack."""
        needed = (source, "nbd-server"), (destination, "nbd-client"), (destination, "modprobe")
        lacking = [f"{tool} on {host.name}" for host, tool in needed if tool in tools_lacking(host)]
        if not lacking and not destination.succeeds("sh", "-c", "[ -e /sys/block/nbd0 ] || modprobe -n -q nbd"):
            return [f"the module nbd on {destination.name}"]
        return lacking

    def is_taken(self, host: Host, port: int) -> bool:
        return bool(host.run("ss", "-Hltn", f"sport = :{port}").strip())  # nbd-server does not tell

    def reaches(self, length: int) -> int:
        return length // 512 * 512

    def serve(self, ends: Ends, job: DiskJob, place: Export, image: Node, stack: ExitStack) -> tuple[str, ...]:
        if image.format != "raw" or "filename" not in image.storage:
            return QemuTransport().serve(ends, job, place, image, stack)
        folder = ends.source_folder  # gets its configuration, see nbd-server(5)
        lines = ["[generic]", f"listenaddr = {place.address}", f"port = {place.port}", "allowlist = false"]
        if job.settings.tls:
            lines += ["force_tls = true", f"certfile = {folder}/server-cert.pem", f"keyfile = {folder}/server-key.pem",
                    f"cacertfile = {folder}/ca-cert.pem"]
        lines += [f"[{place.name}]", f"exportname = {image.place}", "readonly = true", f"authfile = {folder}/clients"]
        put_files(ends.source, folder, {"clients": f"{ends.client_address}\n".encode(),
            f"{place.port}.conf": "\n".join((*lines, "")).encode()})
        return ("nbd-server", "-C", f"{folder}/{place.port}.conf", "-p", f"{folder}/{place.port}.pid")

    @contextmanager
    def reach(self, ends: Ends, job: DiskJob, export: Export, length: int) -> Iterator[Node]:
        host, folder = ends.destination, ends.destination_folder
        tls = ("-certfile", f"{folder}/client-cert.pem", "-keyfile", f"{folder}/client-key.pem",
               "-cacertfile", f"{folder}/ca-cert.pem", "-tlshostname", export.address) if job.settings.tls else ()
        words = ("nbd-client", "-N", export.name, "-R", "-timeout", "30", *tls, export.address, str(export.port))
        with host.lease(LEASED_DEVICE, *words, given=(job.settings.nbd_device, f"{folder}/attached")) as lease:
            device, size = lease.line(150.0).read(lambda said: (said.split()[0], int(said.split()[1]) * 512))
            if size != self.reaches(length):  # an unconnected device has size 0, and reads succeed
                raise HostError(f"{host.name}: {device} shows {size:,} bytes of the export's {length:,}")
            yield Node({"driver": "host_device", "filename": device, "cache.direct": "on"})
        # detached at the scope's end


AnyTransport = QemuTransport | NbdTransport


@contextmanager
def exported(ends: Ends, job: DiskJob, image: Node) -> Iterator[tuple[Export, Lease]]:
    """An image of the source, served read-only to the destination alone on a free port, and its server."""
    host, name = ends.source, f"migrena-{secrets.token_hex(8)}"
    for number in job.settings.nbd_server_port:
        if job.transport.is_taken(host, number):
            continue
        place = Export(host.nbd_address, number, name)
        with ExitStack() as stack:
            try:
                words = job.transport.serve(ends, job, place, image, stack)
                lease = stack.enter_context(host.daemon(f"{ends.source_folder}/{number}.pid", *words))
            except CommandError as error:
                if "in use" not in error.said:
                    raise
                continue
            yield place, lease
            return
    raise HostError(f"{host.name}: port {job.settings.nbd_server_port[-1]} is taken",
        "set NBD_SERVER_PORT to a free one, or a range such as 2666-2697")


def low_priority(job: DiskJob) -> tuple[str, ...]:
    """Words before a command on the source's host while it runs, or with --lanes 1: low priority for CPU and disk."""
    return ("nice", "-n", "15", "ionice", "-c", "2", "-n", "7") if job.is_live or job.settings.lanes == 1 else ()


def care_for(job: DiskJob, ends: Ends, host: Host) -> tuple[str, str, Sequence[str]]:
    """The rates, the number of threads (empty: as many as help), and the words before a proof's reading on a host."""
    if host is not ends.source:
        return "", "", ()
    return job.settings.rates_ahead if job.is_live else "", "1" if job.settings.lanes == 1 else "", low_priority(job)


def disk_options(image: Node, *, is_live: bool) -> tuple[str, ...]:
    """qemu-nbd's arguments for a disk; one that a guest has open is read without locks."""
    is_file = image.storage["driver"] == "file" and not is_live
    return ("-f", image.format, image.place) if is_file else ("--image-opts", image.unlocked)


# Those that take the least of a processor's time first: AES-256 takes half as much again as AES-128.
CIPHERS: Final = "NORMAL:-CIPHER-ALL:+AES-128-GCM:+AES-256-GCM:+CHACHA20-POLY1305:%SERVER_PRECEDENCE"


def tls_options(job: DiskJob, folder: str, endpoint: str) -> tuple[str, ...]:
    """qemu's arguments for the run's certificates, with the id t; none without TLS."""
    words = "--object", f"tls-creds-x509,id=t,dir={folder},endpoint={endpoint},verify-peer=yes,priority={CIPHERS}"
    return words if job.settings.tls else ()


def rehearse(ends: Ends, job: DiskJob) -> float:
    """Sends random bytes as it will the disk, while the source runs, to test ports, certificates, tools and device.

    Returns bytes per second, without the command's start.
    """
    sample, arrived = f"{ends.source_folder}/sample", f"{ends.destination_folder}/sample"
    ends.source.script('umask 077; head -c "$2" /dev/urandom > "$1"', sample, str(SAMPLE))
    trial, options = replace(job, source_direct=False), tls_options(job, ends.destination_folder, "client")
    try:
        with exported(ends, trial, Node.of_file(sample)) as (export, _), job.transport.reach(
                ends, trial, export, SAMPLE) as node:
            def fetch(length: int) -> float:
                began = time.monotonic()
                images = ("--image-opts", "-O", "raw", node.part(0, length), arrived)
                ends.destination.work("timeout", "60", "qemu-img", "convert", *options, *images, stall=90)
                return time.monotonic() - began

            rate = SAMPLE / fetch(SAMPLE)
            if rate < SLOW_WIRE and job.may_be_compressed:  # or a busy host: measure without the command's start
                start = fetch(SAMPLE // 1024)
                rate = SAMPLE / max(fetch(SAMPLE) - start, 0.01)
    except CommandError as error:
        raise HostError(
            f"{ends.destination.name} cannot read from {ends.source.name} at {ends.source.nbd_address}: {error}",
            "open the port between the hosts (NBD_SERVER_PORT), and set nbd_address in HOSTS if the "
            "traffic uses another network") from error
    sides = (ends.source, sample), (ends.destination, arrived)
    if not same_digests(*sides, SAMPLE, 90):
        raise HostError(
            f"data from {ends.source.name} arrives altered at {ends.destination.name}: the rehearsal's digests differ")
    for host, path in sides:
        host.run("rm", "-f", "--", path)
    return rate


def _whole_sectors(length: int) -> int:
    """The length rounded up to 512, as qemu does."""
    return -(-length // 512) * 512


Progress = Callable[[int], AbstractContextManager[Show]]  # total -> scope of a function of bytes done


@dataclass(frozen=True)
class Callbacks:
    """Functions called during a copy."""

    progress: Progress
    arrived: Callable[[Chunk, int], None] = lambda chunk, done: None  # with each chunk, and the bytes done so far
    check: Callable[[], object] = lambda: None  # called between chunks; may raise


def stand_of(host: Host, node: Node) -> str:
    """What tells any change of a disk; empty if it is gone. Of an image on Ceph only the size does."""
    if "filename" in node.storage:
        return host.script(STAND, node.storage["filename"]).strip()
    try:
        info = host.run("qemu-img", "info", "--output=json", "--image-opts", node.unlocked)
    except CommandError as error:
        if "No such file or directory" in error.said:
            return ""
        raise
    return info.read(lambda said: str(document_in(said)["virtual-size"]))


def require_unchanged(source: Host, job: DiskJob) -> None:
    """Raises FinalError if the source's disk has changed since the source was stopped."""
    stand = stand_of(source, job.source.node)
    if not stand:
        raise FinalError(f"{source.name}: {job.source.path} was deleted while it was being copied",
            "find out by whom; the copy is incomplete")
    if stand != job.stand:
        raise FinalError(f"{source.name}: {job.source.path} was changed while it was being copied",
            "find out who has started the source, or written to or replaced its disk, and run migrena again")


@dataclass(frozen=True)
class Reading:
    """The source's disk as it is read: by `blocks` on its host, as qemu's node at the destination; and its leases."""

    readable: str
    node: Node
    leases: tuple[Lease, ...]

    def check(self) -> None:
        for lease in self.leases:
            lease.check(is_running=True)


@contextmanager
def reading(ends: Ends, job: DiskJob) -> Iterator[Reading]:
    """The source's disk, served to the destination, and locked if the source is stopped.

    Raises FinalError if somebody has it open, or has changed it by the scope's end.
    """
    with ExitStack() as stack:
        if not job.is_live:
            require_unchanged(ends.source, job)
        require_identity(ends.source, job.source)
        holds = () if job.is_live else ends.locks.hold(ends.source, job.source)
        export, server = stack.enter_context(exported(ends, job, job.exported))
        readable = stack.enter_context(seen_by_guest(ends, ends.source, job.source, job))
        node = stack.enter_context(job.transport.reach(ends, job, export, job.length))
        yield Reading(readable, node, (*holds, server))
        if not job.is_live:
            require_unchanged(ends.source, job)
            ends.locks.check((ends.source, job.source), (ends.destination, job.fresh))
        server.release()


@dataclass(frozen=True)
class Known:
    """The result of a warm copy's pass: the digests of both ends, and stand_of() the new disk after that."""

    here: Mapping[int, str]
    there: Mapping[int, str]
    stand: str = ""
    unchanged: frozenset[int] = frozenset()  # blocks not written to since, by the dirty bitmap


NOTHING_KNOWN: Final = Known({}, {})


def move_disk(ends: Ends, job: DiskJob, callbacks: Callbacks, known: Known = NOTHING_KNOWN) -> tuple[Moved, Known]:
    """Makes the new file equal to the source's disk, verified; returns both digests for a running source's next pass.

    If it exists already, only blocks whose digests differ are sent. `known` counts only if it has not changed since.
    Raises HostError if a host, a command or the verification fails.
    """
    began, destination = time.monotonic(), ends.destination
    is_same = bool(known.stand) and stand_of(destination, job.landing.image.node) == known.stand
    is_there = is_begun(destination, job)
    is_rest = is_there and job.settings.warm
    known = known if is_there and is_same else NOTHING_KNOWN
    with reading(ends, job) as disk:
        here, there = compared(ends, job, disk, known) if is_there else ({}, {})
        rest = as_extents(differing(here, there), max(job.length, job.transport.reaches(job.length)))
        extents = rest if is_rest or (is_there and not job.source.is_file) else find_extents(
            ends.source, disk.readable, job)
        looked = time.monotonic()
        sender = ChunkSender(ends, job, disk, callbacks, there, is_new=not is_there)
        digest = sender.send(rest if is_there else extents)
        amount = sum(count for _, count in extents) if is_there else sender.held
        if is_there and digest and not job.is_live:
            require_equal(Chunk(0, job.length, 0), here, there)
            digest = hashlib.sha256(lines_of(here)).hexdigest()
    moved = Moved(amount, digest, time.monotonic() - began, looked - began,
        time.monotonic() - looked, is_rest, len(known.unchanged) * MiB)
    stand = stand_of(destination, job.landing.image.node) if job.is_live else ""
    return moved, Known(here, there, stand) if job.is_live else NOTHING_KNOWN


def compared(ends: Ends, job: DiskJob, disk: Reading, known: Known) -> tuple[dict[int, str], dict[int, str]]:
    """The digests of the source's disk and the new file; those of unchanged blocks and the last pass are used again."""
    asked = as_extents(set(range(-(-job.length // MiB))) - known.unchanged, job.length)
    with threads_for(1, ends.destination) as pool:
        again = [] if job.is_live and known.stand else asked
        with defer_signals():
            proving = pool.submit(digests_again, ends, ends.destination, job, known.there, again)
        return digests_again(ends, ends.source, job, known.here, asked, disk.readable), result_of(proving)


def is_begun(destination: Host, job: DiskJob) -> bool:
    """Whether there is a new file to continue; else makes one. Raises CommandError while an earlier attempt writes."""
    if isinstance(job.landing, InPlace):
        destination.script(NO_WRITER, job.landing.lock, "")
        return not job.landing.is_blank
    if destination.succeeds("test", "-f", job.new):
        destination.script(NO_WRITER, job.new, Node.of_file(job.new).locked)
        with suppress(HostError):
            if job.landing.format == "raw":
                destination.run("truncate", "-s", str(_whole_sectors(job.length)), "--", job.new)
                return True
            destination.work("qemu-img", "check", "-q", "-r", "all", "-f", job.landing.format, job.new, stall=3600)
            check_qcow2(destination, job)
            return True
    create: tuple[str, ...] = ("qemu-img", "create", "-q", "-f", job.landing.format, job.new, str(job.source.size))
    if job.landing.format == "raw":
        create = ("truncate", "-s", str(_whole_sectors(job.length)), job.new)
    destination.script('umask 077; rm -f -- "$1"; shift; "$@"', job.new, *create)
    return False


@contextmanager
def seen_by_guest(ends: Ends, host: Host, image: DiskImage, job: DiskJob, *, is_written: bool = False) -> Iterator[str]:
    """What `blocks` reads or writes: the file or device itself, or an export that shows what the guest sees."""
    if image.is_file and (job.whole_file or image.format == "raw"):
        yield image.path
        return
    if image.storage.get("driver") == "host_device" and not is_written:
        yield image.storage["filename"]
        return
    opened = job.landing.written if is_written else image.node
    words = disk_options(opened, is_live=is_written or (job.is_live and host is ends.source))
    words = (*(("--discard=unmap",) if is_written else ("-r", "-e", "8")), *words)
    if not image.is_file:
        words = ("--cache=none", *words)
    name = f"{job.key}-{secrets.token_hex(4)}"  # disks are copied in parallel
    with served_here(host, ends.folder(host), name, *words) as (_, node):
        yield json.dumps({**node.storage, **({} if image.is_file else {NO_HOLES: "yes"})})


def copy_chunk(ends: Ends, job: DiskJob, node: Node, chunk: Chunk, show: Show) -> None:
    """Copies a chunk from the export to the same offset of the new file; raises HostError if it stalls."""
    length = min(_whole_sectors(chunk.length), job.transport.reaches(job.length) - chunk.offset)
    if length <= 0:
        return
    options = tls_options(job, ends.destination_folder, "client")
    limit = job.settings.rate
    rate = ("-r", str(limit)) if limit else ()
    # A request of 2 MiB counts as done when it begins: at most a second's worth.
    requests = max(1, min(16, limit // (2 * MiB))) if limit else 16
    is_direct = job.landing.direct_io and not job.length % 4096  # what ends within a large sector cannot be
    cache = ("-T", "none", "-t", "none") if is_direct else ()
    write_new(ends, job, chunk, show, "qemu-img", "convert", "-p", "-n", "-m", str(requests), "-W", *cache, *rate,
            *options, "--image-opts", "--target-image-opts", node.part(chunk.offset, length),
            job.landing.written.part(chunk.offset, length))


def write_new(ends: Ends, job: DiskJob, chunk: Chunk, show: Show, *words: str) -> None:
    """Runs a command that writes a chunk, and shows its progress."""
    def on_output(said: str) -> None:
        if shares := re.findall(r"\((\d+\.\d+)/100%\)", said):
            show(int(chunk.held * float(shares[-1]) / 100))

    ends.destination.work(*words, stall=job.settings.stall_timeout, on_output=on_output,
            given=("flock", "-s", job.landing.lock))


def find_extents(source: Host, readable: str, job: DiskJob) -> list[Extent]:
    """Where data is, in a file; of anything else only reading it shows that."""
    if not job.source.is_file:
        return [(0, job.length)]
    return source.work(*low_priority(job), *blocks("extents", readable, 0, job.length), stall=600).read(pairs_of)


def patch_chunk(ends: Ends, job: DiskJob, node: Node, chunk: Chunk, show: Show) -> None:
    """Makes the new file equal to the export at the chunk's extents; raises HostError as `copy_chunk` does."""
    folder = ends.destination_folder
    with seen_by_guest(ends, ends.destination, job.landing.image, job, is_written=True) as target:
        listed = put_list(ends.destination, folder, chunk.extents)
        write_new(ends, job, chunk, show, *blocks(
            "patch", node.place, 0, job.length, job.settings.rates_ahead, listed, target, folder))


def put_list(host: Host, folder: str, extents: Sequence[Extent]) -> str:
    name = f"{threading.get_ident()}.extents"  # the thread's next list takes its place
    put_files(host, folder, {name: "".join(f"{start} {count}\n" for start, count in extents).encode()})
    return f"{folder}/{name}"


def put_files(host: Host, folder: str, files: Mapping[str, bytes]) -> None:
    sizes = (word for name, content in files.items() for word in (name, str(len(content))))
    host.script(PRIVATE_FILES, folder, *sizes, stdin=b"".join(files.values()))


def copy_tail(ends: Ends, job: DiskJob) -> None:
    """Sets the exact length of a new file that ends within a sector, and copies the bytes that a block device lacks."""
    tail = job.length % 512
    if job.landing.format != "raw" or not tail or isinstance(job.landing, InPlace):
        return
    if job.transport.reaches(job.length) < job.length:
        text_of_tail = ends.source.script('tail -c "$1" -- "$2" | base64', str(tail), job.source.path)
        ends.destination.script('base64 -d | dd of="$1" bs=1 seek="$2" conv=notrunc status=none', job.new,
            str(job.length - tail), stdin=text_of_tail.encode())
    ends.destination.run("truncate", "-s", str(job.length), "--", job.new)


Digests = Future[dict[int, str]]


@dataclass
class Digester:
    """Digests of a disk, part by part, by one process on its host while the scope of `stack` lasts."""

    host: Host
    where: str  # as `digests` takes it
    stall: float
    rates: str
    threads: str
    before: Sequence[str]
    stack: ExitStack
    lease: Lease | None = None
    failure: HostError | None = None

    def of(self, chunk: Chunk) -> dict[int, str]:
        """The digests of a chunk's blocks that are not all zeros. Raises HostError."""
        if self.failure:
            raise self.failure
        if not self.lease:
            words = *self.before, *blocks("answer", self.where, 0, 0, self.rates, "", self.threads)
            self.lease = self.stack.enter_context(self.host.lease(LEASED_SERVICE, *words))
        try:
            self.lease.feed(f"{chunk.offset} {chunk.length}\n".encode(), is_all=False)
            return self.lease.line(self.stall, b"=\n").read(_digests_in)
        except HostError as error:
            self.failure = error
            raise


@contextmanager
def threads_for(count: int, *hosts: Host) -> Iterator[ThreadPoolExecutor]:
    """Threads for commands on hosts. If the scope fails, all leases there are ended."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    except BaseException:
        with defer_signals():
            ending = threading.Thread(target=pool.shutdown, kwargs={"cancel_futures": True})
            ending.start()
            for turn in itertools.takewhile(lambda _: ending.is_alive(), itertools.count()):
                for host in hosts:
                    host.end_work(is_silent=turn >= 30)
                ending.join(0.5)
        raise
    finally:
        pool.shutdown()


class ChunkSender:
    """Copies chunks in parallel; the source digests a new file's chunks meanwhile, the destination afterwards."""

    def __init__(self, ends: Ends, job: DiskJob, disk: Reading, callbacks: Callbacks,
            there: dict[int, str], *, is_new: bool) -> None:
        self._ends, self._job, self._disk, self._callbacks, self._there, self._is_new = (
            ends, job, disk, callbacks, there, is_new)
        self._is_proven = job.settings.verify or job.settings.warm  # of a running source only digests count
        self._pace = Pace(job.settings.rates_ahead)  # a chunk may be too small for qemu-img's own limit
        self.held = 0  # bytes of data found
        self._done: dict[Chunk, int] = {}  # bytes arrived of each
        self._unproven = deque[tuple[Chunk, Digests | None, Digests | None]]()  # digests of source and new, to compare
        self._whole = hashlib.sha256()
        self._digesters, self._leases = dict[str, Digester](), ExitStack()  # by what they read

    def send(self, extents: Sequence[Extent]) -> str:
        """Copies and compares these extents; returns the digest of both ends of a new file, if verified."""
        job, (source, destination) = self._job, (self._ends.source, self._ends.destination)
        for block in blocks_of(extents):
            self._there.pop(block, None)
        least = max(LEAST_CHUNK, job.settings.least_rate * 5 // MiB * MiB)  # no data flows between limited chunks
        hole = 0 if job.transport.has_holes else LEAST_CHUNK
        split = [chunk for chunk in chunks(job.length, extents, job.chunk, least, hole) if chunk.held or self._is_new]
        on_way = deque[tuple[Chunk, Digests | None, Future[None]]]()
        is_read = self._is_new and not (job.is_live and job.source.is_file)
        with self._leases, threads_for(1, source) as reader, threads_for(1, destination) as prover, \
                threads_for(job.max_parallel, source, destination) as senders, self._opened() as self._place, \
                self._callbacks.progress(sum(chunk.held for chunk in split)) as show:
            for chunk in split:
                if len(on_way) == job.max_parallel + (not job.source.is_file):  # one more is read meanwhile
                    self._arrive(*on_way.popleft(), prover, show)
                with defer_signals():
                    here = reader.submit(self._digests, source, self._disk.readable, chunk) if is_read else None
                    on_way.append((chunk, here, senders.submit(self._copy, chunk, here)))
            while on_way:
                self._arrive(*on_way.popleft(), prover, show)
            copy_tail(self._ends, job)
            if not self._is_proven:
                return ""
            with seen_by_guest(
                    self._ends, destination, job.landing.image, job) if self._unproven else nullcontext("") as place:
                for chunk, known, found in self._unproven:
                    with defer_signals():
                        there = found or prover.submit(self._digests, destination, place, chunk)
                    self._compare(chunk, known, there)
        return self._whole.hexdigest()

    def _opened(self) -> AbstractContextManager[str]:
        """A scope with what is read of the new disk while more is written: a raw one."""
        ends, job = self._ends, self._job
        return nullcontext(job.new) if job.landing.image.is_file else seen_by_guest(
            ends, ends.destination, job.landing.image, job)

    def _copy(self, chunk: Chunk, here: Digests | None) -> None:
        """Copies a chunk's data; of what is no file, only the blocks that are not all zeros by their digests."""
        self._done[chunk] = 0
        part, job = chunk, self._job
        if here and not job.source.is_file:
            known = result_of(here)
            found = as_extents(known, chunk.offset + chunk.length)
            part = replace(chunk, extents=tuple(found), held=sum(count for _, count in found))
        is_scattered = (part.is_scattered and job.landing.format == "raw") or part.held < chunk.held * 3 // 4
        copy = patch_chunk if is_scattered or not self._is_new else copy_chunk
        if part.held:
            copy(self._ends, job, self._disk.node, part, partial(self._done.__setitem__, chunk))
            self._pace.hold_back(part.held)
        self._done[chunk] = chunk.held
        self.held += part.held

    def _arrive(self, chunk: Chunk, here: Digests | None, future: Future[None],
            prover: ThreadPoolExecutor, show: Show) -> None:
        """Waits until a chunk has arrived, and compares earlier ones whose digests are ready. Raises HostError."""
        result_of(future, lambda: show(sum(self._done.values())))
        show(done := sum(self._done.values()))
        if chunk.held:
            self._callbacks.arrived(chunk, done)
            self._callbacks.check()
        # Not for a file whose exact length is set later, nor for an image that is being written.
        is_whole = chunk.offset + chunk.length < self._job.length or self._job.length % 512 == 0
        with defer_signals():
            can_be_read = self._job.landing.format == "raw" and is_whole
            there = prover.submit(self._digests, self._ends.destination, self._place, chunk) if can_be_read else None
            self._unproven.append((chunk, here if self._is_proven and not self._job.is_live else None, there))
        while self._unproven and (found := self._unproven[0][2]) and found.done() and (
                not self._unproven[0][1] or self._unproven[0][1].done()):
            first, known, _ = self._unproven.popleft()
            self._compare(first, known, found)
        if not self._job.is_live:
            require_unchanged(self._ends.source, self._job)
        self._disk.check()

    def _compare(self, chunk: Chunk, here: Digests | None, there: Digests) -> None:
        found = result_of(there)
        if here:
            known = result_of(here)
            require_equal(chunk, known, found)
            self._whole.update(lines_of(known))
        else:
            self._there.update(found)

    def _digests(self, host: Host, place: str, chunk: Chunk) -> dict[int, str]:
        if not self._is_proven and (host is self._ends.destination or self._job.source.is_file):
            return {}
        if self._is_new:
            key = f"{host is self._ends.source} {place}"  # hosts may have one name
            if key not in self._digesters:
                self._digesters[key] = Digester(host, place, self._job.settings.stall_timeout,
                    *care_for(self._job, self._ends, host), self._leases)
            return self._digesters[key].of(chunk)
        return digests_again(self._ends, host, self._job, {}, chunk.extents, place)


def require_equal(chunk: Chunk, one: Mapping[int, str], other: Mapping[int, str]) -> None:
    if one != other:
        changed = differing(one, other)
        raise FinalError(
            f"the copy differs from the source: {len(changed)} blocks of 1 MiB differ between byte {chunk.offset:,} "
            f"and {chunk.offset + chunk.length:,}, the first one at {changed[0] * MiB:,}",
            "the copy was not put in place; run it again, and check disks and network of both hosts")


def differing(one: Mapping[int, str], other: Mapping[int, str]) -> list[int]:
    return sorted({block for block, _ in one.items() ^ other.items()})


@dataclass(frozen=True)
class Pass:
    """One pass of a warm copy: bytes that had changed, seconds to find them, to send them, and in all."""

    changed: int
    looking: float
    sending: float
    seconds: float


def unchanged_since(source: Host, folder: str, job: DiskJob, known: Known) -> frozenset[int]:
    """The blocks of the stopped source's file unchanged since its dirty bitmap began, with equal digests at both ends.

    Raises CommandError if the file has no such bitmap, or if a killed qemu left it incomplete.
    """
    bitmap = bitmap_of(job.run)
    with served_here(source, folder, "bitmap", "-r", "-B", bitmap, "-f", "qcow2", job.source.path) as (_, node):
        dirty = json.dumps({**node.storage, "x-dirty-bitmap": f"qemu:dirty-bitmap:{bitmap}"})
        info = source.run("qemu-img", "info", "--output=json", "-f", "qcow2", job.source.path)
        cluster = info.read(lambda said: int(document_in(said)["cluster-size"]))
        lines = source.work(*blocks("unchanged", dirty, 0, job.source.size, 0, "", job.source.path, cluster), stall=600)
    found = lines.read(lambda said: [int(word) for word in said.split()])
    return frozenset(block for block in found if block in known.here and known.here[block] == known.there.get(block))


def digests_again(ends: Ends, host: Host, job: DiskJob, before: Mapping[int, str], extents: Sequence[Extent],
        where: str = "") -> dict[int, str]:
    """The digests of the new file, or of `where`: new ones for blocks these extents touch, else those of `before`."""
    touched = blocks_of(extents)
    found = {block: digest for block, digest in before.items() if block not in touched and block * MiB < job.length}
    if not extents:
        return found
    rates, threads, priority = care_for(job, ends, host)
    listed, stall = put_list(host, ends.folder(host), extents), job.settings.stall_timeout
    with nullcontext(where) if where else seen_by_guest(ends, host, job.landing.image, job) as place:
        return found | digests(host, place, 0, job.length, stall, rates, listed, threads, before=priority)


def as_extents(changed: Collection[int], length: int) -> list[Extent]:
    """The extents that blocks are, of a disk of `length` bytes."""
    spans = joined((block * MiB, min((block + 1) * MiB, length)) for block in sorted(changed))
    return [(start, stop - start) for start, stop in spans if start < stop]


def settle_disk(host: Host, job: DiskJob) -> tuple[str, ...]:
    """Rebases the new file onto the destination's base, checks it, grows it to the fresh disk's size and swaps it in.

    Returns the names of removed dirty bitmaps: a file cannot be resized with those that a killed qemu had in use.
    """
    if isinstance(job.landing, InPlace):
        return ()
    if job.whole_file and job.fresh.backing:
        host.run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", job.fresh.backing_format,
            "-b", job.fresh.backing, job.new)
    lost = check_qcow2(host, job).lost_bitmaps if job.fresh.format == "qcow2" else ()
    for name in lost:
        host.run("qemu-img", "bitmap", "--remove", "-f", "qcow2", "--", job.new, name)
    if job.fresh.size > job.source.size:
        host.run("qemu-img", "resize", "-q", "-f", job.fresh.format, job.new, str(job.fresh.size))
    host.script(SWAP_IN, job.fresh.path, job.new, job.landing.kept)
    return lost


def check_qcow2(host: Host, job: DiskJob) -> DiskImage:
    """The new file; raises HostError unless it is without errors, on the right base and of the source's size."""
    top, *below = disk_chain(host, job.new, "qcow2", shared=False)
    for flaw in checked(host, top).flaws:
        raise HostError(f"{host.name}: {job.new} has {flaw}")
    wanted = job.fresh.backing if job.whole_file else ""
    if top.size != job.source.size or top.backing != wanted or len(below) != bool(wanted):
        raise HostError(f"{host.name}: {job.new} has {top.size:,} bytes on base {top.backing or 'none'}; "
            f"{job.source.size:,} on {wanted or 'none'} were expected")
    return top


# ---- 11. Gate --------------------------------------------------------


class Stage(enum.IntEnum):
    """How far a run has come. Without its journal it counts as SWAPPED: the destination may have the copy."""

    NOTHING = 0
    MADE = 1  # Nova was asked for the destination
    COPYING = 2
    PROVEN = 3
    SWAPPED = 4  # this and the next: or about to be
    STARTED = 5
    DONE = 6


class Act(enum.Enum):
    """An act that cannot be taken back."""

    STOP_SOURCE = "stop the source"
    WRITE = "write to the destination's disk"
    SWAP = "put the copy in its place"
    START_DESTINATION = "start the destination"
    GIVE_BACK = "give the source back"  # unlocked, and started if it ran
    UNMARK = "take the mark off the source"
    STOP_DESTINATION = "stop the destination"
    DELETE = "delete the destination"
    DELETE_VOLUMES = "delete the volumes made for the destination"
    CLEAN = "remove the copy beside the destination's disk"
    GO_ON = "resume the run"


@dataclass(frozen=True)
class Seen:
    """One instance as its cloud and its host show it now; `id` is empty if none was made."""

    id: str = ""
    server: Server | None = None  # None: it does not exist, or could not be looked up
    unseen: str = ""  # why it could not be looked up
    starts: tuple[Action, ...] = ()  # actions since the run's stop that may have started it
    relocks: tuple[Action, ...] = ()  # lock and unlock actions since then
    disk: str = ""  # what is wrong with it, if anything is known
    since: str | None = None  # the request since which it should not have run, if known

    @property
    def is_gone(self) -> bool:
        return not self.server and not self.unseen

    @property
    def is_idle(self) -> bool:
        """Whether it has been stopped ever since the run stopped it; a snapshot may be made of it."""
        return bool(self.server and (self.server.is_stopped or self.server.is_pictured) and not self.starts)

    @property
    def other_disk(self) -> str:
        """The action that may have given it another disk since then, if any."""
        return next((action.name for action in self.starts if action.name in ("rebuild", "evacuate")), "")

    def is_locked_by(self, run: str) -> bool:
        """Whether it has the run's lock. Before microversion 2.73 locks have no reason: then the mark decides."""
        seen = self.server
        if not seen or not seen.locked or self.relocks:
            return False
        return run in ((lock_of(seen),) if seen.lock_reason else (seen.metadata.get(MARK), seen.metadata.get(MADE)))

    def describe(self, run: str) -> str:
        if not (server := self.server):
            return f"not seen ({self.unseen})" if self.unseen else "gone" if self.id else "none"
        lock = f"locked by run {run}" if self.is_locked_by(run) else f"locked ({server.lock_reason or 'no reason'})"
        words = (
            f"{server.status} {server.task}".rstrip(), lock if server.locked else "not locked",
            *(f"{start.name} at {start.at}" for start in self.starts[-1:]),
            f"its disk {self.disk}" if self.disk else "")
        return ", ".join(filter(None, words))


@dataclass(frozen=True)
class Situation:
    """The facts that judge() decides by: the run's stage, and both sides as they are now."""

    run: str
    stage: Stage
    source: Seen
    destination: Seen
    is_in_place: bool = False  # whether the copy is known to be swapped in
    was_running: bool = False  # whether the source ran when the run began
    others: tuple[Server, ...] = ()  # other instances made from the source
    is_seed: bool = False  # the destination holds a seed, of no worth of its own
    alive: str = ""  # where the run is active on another machine
    go_on: str = ""  # the command that continues it, if not `resume` alone

    @property
    def has_copy(self) -> bool:
        return self.is_in_place or self.stage >= Stage.SWAPPED

    def __str__(self) -> str:
        return (f"run {self.run}, {self.stage.name.lower()}; source {self.source.id}: {self.source.describe(self.run)}"
            f"; destination {self.destination.id}: {self.destination.describe(self.run)}".replace(
                "destination : none", "no destination"))


@dataclass(frozen=True)
class Asked:
    """What the operator wants."""

    yes: bool = False  # --yes: data that an instance has written may be lost
    both: bool = False  # both instances shall run
    starts: bool = False  # the source shall be started
    is_live: bool = False  # the source runs during the copy
    is_held: bool = False  # qemu's locks are on both disks: an API outage is tolerable


def lock_of(server: Server) -> str:
    """The run that locked an instance, or nothing."""
    is_ours = server.locked and server.lock_reason.startswith(LOCKED_BY)
    return server.lock_reason[len(LOCKED_BY) :].partition(":")[0] if is_ours else ""


REMOVING: Final = (Act.STOP_DESTINATION, Act.DELETE)
WRITING: Final = (Act.WRITE, Act.SWAP)


def rule_ours(act: Act, now: Situation, asked: Asked) -> Iterator[str]:
    """Only what this run made is changed, and the source only while this run has it."""
    if act not in (Act.GIVE_BACK, Act.UNMARK, Act.STOP_SOURCE) and now.destination.id == now.source.id:
        yield "the destination is the source itself"
    made = now.destination.server
    if act in (*REMOVING, *WRITING,
            Act.START_DESTINATION) and made and made.locked and not now.destination.is_locked_by(now.run):
        yield f"the destination is locked by somebody else: {made.lock_reason or 'no reason is given'}"
    if not (source := now.source.server) or act not in (Act.GIVE_BACK, Act.STOP_SOURCE, Act.GO_ON):
        return
    mark, is_ours = source.metadata.get(MARK), now.source.is_locked_by(now.run)
    if mark not in (None, now.run):
        yield f"run {mark} is moving the source now"
    elif act is Act.GO_ON and now.is_in_place:  # a completed run has given the source back
        return
    elif source.locked and not is_ours and (act is not Act.GIVE_BACK or now.was_running or asked.starts):
        yield f"the source is locked by somebody else: {source.lock_reason or 'no reason is given'}"
    elif not mark and not is_ours and (act is not Act.GIVE_BACK or (
            now.was_running and not source.is_running and (now.stage < Stage.DONE or now.others))):
        yield f"the source carries no mark of run {now.run}" + "".join(
            f", and {one.name} {one.id} was made from it" for one in now.others)


def rule_one_machine(act: Act, now: Situation, asked: Asked) -> Iterator[str]:
    """Of two machines with the same data, one starts only if the other is stopped, unchanged and locked by the run."""
    source, other = now.source, now.destination
    if act is Act.START_DESTINATION and not source.is_gone and not source.unseen:
        if not source.is_idle:
            yield "the source runs, or has run since it was stopped"
        elif source.disk:
            yield f"the source's disk {source.disk}"
        elif not source.is_locked_by(now.run):
            yield "this run's lock on the source was removed, so somebody may be about to start it"
    may_have_run = asked.yes and other.server and other.server.is_stopped  # and what it wrote may be lost
    if act is Act.GIVE_BACK and now.has_copy and other.server and not (asked.both or other.is_idle or may_have_run):
        yield "the destination has the same data, and runs or has run"
    if act is Act.GIVE_BACK and not asked.yes and (now.was_running or now.source.is_locked_by(now.run)):
        yield from (f"{one.name} {one.id} was made from it, and is {one.status}"
            for one in now.others if not one.is_stopped)


def rule_own_data(act: Act, now: Situation, asked: Asked) -> Iterator[str]:
    """An instance that may have written data of its own is neither overwritten nor deleted without --yes."""
    if act is Act.DELETE_VOLUMES and now.stage >= Stage.STARTED and not asked.yes:
        yield "the destination was started, and the volumes may have newer data"
    if asked.yes or act not in (*REMOVING, *WRITING, Act.GO_ON) or not (made := now.destination.server):
        return
    if now.is_seed and made.is_stopped and act is not Act.DELETE:  # what it changed is found, and sent again
        return
    if act in REMOVING and now.stage is Stage.DONE:
        fate = "stopped" if act is Act.STOP_DESTINATION else "deleted"
        yield (f"run {now.run} was successful: {made.name} {made.id} ({made.status}) would be {fate}, "
               "and it may have newer data")
    elif (now.destination.starts or (now.has_copy and not made.is_stopped)) and not (
            act is Act.GO_ON and now.is_in_place):
        yield f"the destination {made.id} ({made.status}) runs or has run since it was made, and it may have newer data"


def rule_one_copy(act: Act, now: Situation, asked: Asked) -> Iterator[str]:
    """A destination with the proven copy is deleted only while the source and its disk are seen to exist."""
    source, is_there = now.source, now.destination.server or act is Act.DELETE_VOLUMES
    if act not in (Act.DELETE, Act.CLEAN, Act.DELETE_VOLUMES) or not is_there or not (
            now.stage >= Stage.PROVEN or now.is_seed):
        return
    if source.is_gone:
        yield "the source is gone: this is its only copy"
    elif source.disk.startswith(DISK_UNSEEN):
        yield f"the source's disk {source.disk}: this may be its only copy"
    elif not asked.yes and (lost := source.other_disk or (source.disk if source.is_idle else "")):
        yield f"the source may have lost the copied data ({lost}): this may be its only copy"


def rule_nobody_inside(act: Act, now: Situation, asked: Asked) -> Iterator[str]:
    """Disks are written and swapped only with the destination stopped and locked by the run, the source unchanged."""
    source, other = now.source, now.destination
    if act in (*WRITING, Act.START_DESTINATION, Act.GO_ON) and other.is_gone:
        yield ("the destination is gone" if other.id else
               f"the instance that run {now.run} was about to make does not exist")
    if act in (Act.START_DESTINATION, Act.GO_ON) and other.other_disk:
        yield f"the destination has got another disk ({other.other_disk})"
    if act in WRITING and other.server and not (other.is_idle and other.is_locked_by(now.run)):
        yield "the destination is not stopped and locked by this run"
    if act in (*WRITING, Act.GO_ON) and other.disk and not now.is_in_place:
        yield f"the disk of {other.id} {other.disk}"
    if act in WRITING and not asked.is_live and source.server and not source.is_idle:
        yield (f"the source is {source.server.status} {source.server.task}".rstrip()
               + " during the copy: somebody started it")
    if act in (*WRITING, Act.STOP_SOURCE, Act.GO_ON) and source.is_gone:
        yield "the source is gone"
    if act is Act.STOP_SOURCE and source.starts and now.has_copy:
        yield f"the source was started after run {now.run} had stopped it: the copy is outdated"
    if act in (Act.SWAP, Act.GO_ON) and source.server and not now.is_in_place and (source.disk or source.starts):
        yield (f"the source's disk {source.disk}" if source.disk.startswith(DISK_UNSEEN) and not source.starts else
               f"the source was started or its disk changed after run {now.run}: the copy is outdated")


def rule_seen(act: Act, now: Situation, asked: Asked) -> Iterator[str]:
    """Both sides that an act depends on must have been looked up."""
    source, made = (now.source,), (now.destination,)
    needed = {Act.STOP_SOURCE: source, Act.UNMARK: source, Act.STOP_DESTINATION: made,
        Act.GIVE_BACK: source + made if now.has_copy else source}
    if now.stage < Stage.PROVEN and not now.is_seed:
        needed |= {Act.DELETE: made, Act.CLEAN: made, Act.DELETE_VOLUMES: made}
    if not (act in WRITING and asked.is_held):
        yield from (f"{seen.id} could not be looked up: {seen.unseen}"
            for seen in needed.get(act, source + made) if seen.unseen)


def rule_alive(act: Act, now: Situation, asked: Asked) -> Iterator[str]:
    """Nothing is done to a run that is active on another machine."""
    if now.alive:
        yield f"run {now.run} is active on another machine: {now.alive}"


RULES: Final = (rule_alive, rule_seen, rule_ours, rule_one_machine, rule_own_data, rule_one_copy, rule_nobody_inside)


def judge(act: Act, now: Situation, asked: Asked) -> list[Reason]:
    """Why an act must not be done now, each reason with the next commands; none: it may be done."""
    return [Reason(problem, next_commands(act, now)) for rule in RULES for problem in rule(act, now, asked)]


def allow(act: Act, now: Situation, asked: Asked, error: type[MigrenaError] = Kept) -> None:
    """Raises the error, with what was seen, if an act must not be done."""
    if reasons := judge(act, now, asked):
        raise error(
            f"refused to {act.value}: {'; '.join(why.problem for why in reasons)}. Seen: {now}", reasons[0].way_out)


def next_commands(act: Act, now: Situation) -> str:
    """The commands to use after an act was refused."""
    run, source, made, ways = now.run, now.source, now.destination, list[str]()
    go_on = now.go_on or f"./migrena.py resume {run}"
    if now.alive:
        return f"wait until it ends; on that machine: ./migrena.py status {run}"
    least = Stage.PROVEN if act in (Act.START_DESTINATION, Act.SWAP) else Stage.SWAPPED
    if (act is not Act.GO_ON and now.stage >= least and made.server and source.server
            and source.is_idle and source.server.metadata.get(MARK) == run):
        ways.append(f"./migrena.py resume {run} completes the move")
    if act is Act.WRITE and now.is_seed:
        ways.append(f"{go_on} repairs it, once it is stopped")
    if act is Act.DELETE and now.is_seed and made.server and source.is_gone:
        ways.append(f"openstack server delete {made.id}, if nobody wants it")
    if act in (*REMOVING, Act.GO_ON) and made.server and not (source.is_gone or source.unseen):
        way = f"./migrena.py rollback {run}" if act in REMOVING else go_on
        ways.append(f"{way} --yes, if data written by {made.id} may be lost")
    if act is Act.DELETE_VOLUMES:
        ways.append(f"./migrena.py rollback {run} --yes, if what is on them may be lost")
    if made.server and made.server.locked and not made.is_locked_by(run):
        ways.append(f"openstack server unlock {made.id}, if whoever locked it agrees")
    if act is Act.GIVE_BACK and source.server:
        ways.append(f"if the source shall run: openstack server unlock {source.id}; openstack server start {source.id}")
    if act not in REMOVING:
        ways.append(f"./migrena.py rollback {run} undoes the run")
    return "; ".join(ways) or f"see both instances, then ./migrena.py rollback {run}"


DISK_UNSEEN: Final = ("is gone", "cannot be read")


def disk_now(host: Host, nodes: Mapping[str, Node], record: RunRecord) -> str:
    """What is wrong with one of a source's disks, compared with when it was copied, or nothing."""
    def look(key: str, node: Node) -> str:
        try:
            stand = str(record.disks.get(key, DiskRecord()).job.get("stand", ""))
            try:
                now = stand_of(host, node)
            except HostError:  # a connection may have broken
                now = stand_of(host, node)
            users = watchers_of(host, node) if now and stand and not node.has_locks else ""
        except HostError as error:
            return f"cannot be read: {shorten(str(error))}"
        wrong = "is gone" if not now else "was changed" if stand and not same_file(now, stand) else ""
        wrong = wrong or (f"is in use by {users}" if users else "")
        return f"{wrong} ({key})" if wrong and key != ROOT else wrong

    with ThreadPoolExecutor(8) as pool:  # one after the other they might take longer than a look may
        looking = [pool.submit(look, key, node) for key, node in nodes.items()]
        found = [result_of(one) for one in looking]
    return next(filter(None, found), "")


def same_file(now: str, stand: str) -> bool:
    """Whether a disk is the same by two results of stand_of(); a file's ctime is ignored: a failed start changes it."""
    one, other = now.split(), stand.split()
    return one[:2] + one[3:] == other[:2] + other[3:]


def see(cloud: Cloud, id: str, since: str | None, *, is_patient: bool = True) -> Seen:
    """One instance as it is now, with its actions since a request, or all its actions if that is empty."""
    if not id:
        return Seen()
    try:
        server = cloud.find_server(id, is_patient=is_patient)
        done = newer(cloud.actions(id), since) if server and since is not None else []
    except CloudError as error:
        return Seen(id, unseen=str(error), since=since)
    starts = tuple(action for action in done
        if action.name not in HARMLESS and not (action.has_failed and server and server.is_stopped))
    return Seen(id, server, "", starts,
        tuple(action for action in done if since and action.name in ("lock", "unlock")), since=since)


def situation(record: RunRecord, source: Seen, destination: Seen, is_in_place: bool = False) -> Situation:
    was_running, stage = bool(record.was_running and record.stopped_at), stage_of(record)
    is_seed = record.is_seed and stage < Stage.PROVEN
    return Situation(record.run, stage, source, destination, is_in_place, was_running, is_seed=is_seed,
            go_on=record.go_on)


def stage_of(record: RunRecord) -> Stage:
    """A run's stage by its journal; acts count once begun if they may have been done."""
    begun, done = {act.name for act in record.recent}, {act.name for act in record.recent if act.result == "done"}
    signs = {
        Stage.MADE: "create destination" in begun, Stage.COPYING: bool(record.seed or {"copy", "warm copy"} & begun),
        Stage.PROVEN: "copy" in done, Stage.SWAPPED: "swap in" in begun, Stage.STARTED: "start destination" in begun,
        Stage.DONE: "mark destination done" in done}
    return max((stage for stage, is_so in signs.items() if is_so), default=Stage.NOTHING)


def require_same_clouds(record: RunRecord, clouds: Sequence[Cloud]) -> None:
    """Raises Refused if a run was about other clouds, regions or projects."""
    reasons = []
    for cloud, was in zip(clouds, record.facts.get("where") or [
            {"url": url} for url in record.facts.get("clouds", ())], strict=False):
        now = {"url": cloud.url, **cloud.identity}
        if other := [f"{key} {now.get(key)}, not {value}" for key, value in was.items() if now.get(key) != value]:
            reasons.append(Reason(
                f"run {record.run} used another {cloud.label} cloud: these credentials are for {', '.join(other)}",
                "give the run's, in config.py, with --src-cloud, --dst-cloud and --dst-project or as variables"))
    if reasons:
        raise Refused.of(reasons)


# ---- 12. Image -------------------------------------------------------

CAME_FROM: Final = ("source_uuid", "source_cloud")  # properties of a carried image: the source's id, its cloud
CARRIED_BY: Final = "migrena_run"  # property of an incomplete image: the run that carries it
NOT_CARRIED: Final = frozenset({  # not carried as properties
    "id", "status", "checksum", "os_hash_algo", "os_hash_value", "size", "virtual_size", "created_at", "updated_at",
    "owner", "self", "file", "schema", "direct_url", "locations", "stores", "name", "container_format", "disk_format",
    "min_disk", "min_ram", "tags", "visibility", "protected", *CAME_FROM, CARRIED_BY})
QEMU_FORMATS: Final = {"raw": "raw", "iso": "raw", "qcow2": "qcow2", "vmdk": "vmdk", "vdi": "vdi",
    "vhd": "vpc", "vhdx": "vhdx", "ploop": "parallels"}
NOT_PORTABLE: Final = {
    "img_signature": "is signed, and the signature is invalid there",
    "os_encrypt_key_id": "is encrypted: its key is not copied",
    "cinder_encryption_key_id": "is encrypted: its key is not copied",
    "kernel_id": "refers to a kernel image by its id"}


@dataclass(frozen=True)
class ImagePlan:
    """An image to carry: the source's, its new name and format, and the id of an equal one in the destination."""

    source: Image
    name: str
    disk_format: str
    there: str = ""

    @property
    def is_converted(self) -> bool:
        return self.disk_format != str(self.source.facts["disk_format"])

    @property
    def size(self) -> int:
        """Bytes to read."""
        return int(self.source.facts.get("size") or 0)


class Stream:
    """A readable stream that counts and digests its bytes, shows progress and keeps to `rates`, which Pace reads."""

    def __init__(self, parts: Iterator[bytes], wanted: Image, rates: str = "",
            show: Show = lambda done: None) -> None:
        self._parts, self._pace, self._show, self.done = parts, Pace(rates), show, 0
        known = {"md5", "sha512", str(wanted.facts.get("os_hash_algo"))} & hashlib.algorithms_available
        self._digests = {name: hashlib.new(name, usedforsecurity=False) for name in known}

    def read(self, size: int = -1) -> bytes:
        """The next part, of any length; empty at the end."""
        part = next(self._parts, b"")
        for digest in self._digests.values():
            digest.update(part)
        self.done += len(part)
        self._show(self.done)
        self._pace.hold_back(len(part))
        return part

    def prove(self, image: Image, side: str) -> str:
        """The digest of these bytes; raises FinalError if Glance has another one for the image, or none."""
        for name, value in ((image.facts.get("os_hash_algo"), image.os_hash), ("md5", image.checksum)):
            if name in self._digests and value:
                if self._digests[name].hexdigest() != value:
                    raise FinalError(f"{side} cloud: the {name} of image {image.id} differs from that of the bytes "
                        "read", "run it again")
                return value
        raise FinalError(
            f"{side} cloud: Glance has no usable digest of image {image.id}", "use Glance 17 (2018) or later")


def wanted_images(settings: Settings, here: Sequence[Image]) -> tuple[list[Image], list[Reason]]:
    """The source's images with the given ids, names or tag, and reasons why some are not found."""
    if settings.tag:
        found = [one for one in here if settings.tag in one.facts.get("tags", ()) and not one.is_hidden]
        return found, [] if found else [Reason(
            f"source cloud: no image has the tag {settings.tag!r}", "see: openstack image list --tag TAG")]
    chosen, reasons = dict[Image, None](), list[Reason]()
    for name in settings.images:
        with collecting(reasons):
            chosen[pick(name, here, "image", "source cloud: ", " with -i")] = None
    return list(chosen), reasons


def plan_image(settings: Settings, wanted: Image, there: Sequence[Image],
        known: Collection[tuple[str, str]] = ()) -> ImagePlan:
    """The plan for one image, given the destination's images; `known`: digests of images and of their conversions."""
    plan = ImagePlan(wanted, settings.new_name or wanted.name or wanted.id,
        settings.disk_format or str(wanted.facts.get("disk_format")))
    same = [other for other in there if other.status == "active" and not other.facts.get(CARRIED_BY) and
            ((wanted.os_hash or wanted.checksum, other.os_hash or other.checksum) in known and
            other.form == (plan.disk_format, wanted.form[1]) if plan.is_converted else other.equals(wanted))]
    best = min(same, key=lambda other: (other.is_hidden, other.name != plan.name), default=None)
    return replace(plan, there=best.id) if best else plan


def refuse_reading(plan: ImagePlan, source: Cloud) -> Iterator[Reason]:
    """Glance's error if these credentials may not read an image that must be carried."""
    try:
        if not plan.there and plan.source.status == "active":
            next(source.store.download(plan.source.id), b"")
    except CloudError as error:
        yield Reason(f"image {plan.source.name!r} cannot be read: {error}", "use credentials that may download it")


def carrying(half: Image, wanted: Image) -> str:
    """The run that is carrying `wanted` to the incomplete image `half`; empty if this is not such an image."""
    return str(half.facts.get(CARRIED_BY, "")) if half.facts.get(CAME_FROM[0]) == wanted.id else ""


def refuse_image(settings: Settings, plan: ImagePlan, there: Sequence[Image]) -> Iterator[Reason]:
    wanted, name = plan.source, plan.source.name
    if wanted.status != "active":
        yield Reason(f"image {name!r} is {wanted.status}, not active", "wait until it is, or choose another one")
    for key, why in NOT_PORTABLE.items():
        if wanted.facts.get(key):
            yield Reason(f"image {name!r} {why} ({key})", "make an image without it first")
    if plan.there:
        return
    if plan.is_converted:
        yield from refuse_conversion(settings, plan)
    for other in there:
        if run := carrying(other, wanted):
            yield Reason(f"run {run} is carrying it, or was interrupted",
                f"if it has ended: ./migrena.py rollback {run}, or openstack image delete {other.id}")
        elif other.name == plan.name and not other.is_hidden:
            doubt = ", or no journal here proves that it was converted from this one" if plan.is_converted else ""
            yield Reason(f"destination cloud: image {plan.name!r} has other content or another format "
                f"({other.id}){doubt}", "choose another one with --name")


def refuse_conversion(settings: Settings, plan: ImagePlan) -> Iterator[Reason]:
    """Why an image cannot be converted on this machine, which needs space for both formats."""
    told, folder, library = plan.source.facts, work_folder(settings), importlib.util.find_spec("oslo_utils.imageutils")
    container, given, need = told.get("container_format"), told.get("disk_format"), plan.size + max(
        plan.size, int(told.get("virtual_size") or 0))
    try:
        free = shutil.disk_usage(folder).free
        lack = f"{human(free)} are free in {folder}, {human(need)} are needed" if free < need else ""
    except OSError as error:
        lack = f"{folder} cannot be used: {error.strerror}"
    rules = (
        (container != "bare", f"its container format is {container}", "leave out --disk-format"),
        (given not in QEMU_FORMATS, f"qemu-img does not read {given}", "leave out --disk-format"),
        (not shutil.which("qemu-img"), "this machine has no qemu-img", f"install {' or '.join(PACKAGES['qemu-img'])}"),
        (not (library and library.submodule_search_locations), "oslo.utils 7.3 is needed",
         "pip install -r requirements.txt"),
        (lack, lack, "name another folder with --work-folder"))
    yield from (Reason(f"image {plan.source.name!r} cannot be converted: {why}", way_out)
        for holds, why, way_out in rules if holds)


def work_folder(settings: Settings) -> str:
    return settings.work_folder or tempfile.gettempdir()


def locally(*words: str) -> str:
    """The output of a local command; raises MigrenaError if it fails."""
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MigrenaError(f"{quoted(words)} ended with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


@contextmanager
def converted(stream: Stream, plan: ImagePlan, folder: str) -> Iterator[Path]:
    """The converted image, a file that is removed with the scope; raises FinalError for an unsafe image."""
    with tempfile.TemporaryDirectory(prefix="migrena-", dir=folder) as place:
        given, new, format = Path(place) / "given", Path(place) / "made", QEMU_FORMATS[plan.source.facts["disk_format"]]
        with given.open("wb") as file:
            shutil.copyfileobj(stream, file)
        refuse_unsafe(given, format)
        more = ("-o", "subformat=streamOptimized") if plan.disk_format == "vmdk" else ()
        locally("qemu-img", "convert", "-f", format, "-O", plan.disk_format, *more, str(given), str(new))
        given.unlink()
        yield new


def refuse_unsafe(path: Path, format: str) -> None:
    """Raises FinalError for an image that refers to other files: a base, a data file, extents. See CVE-2024-32498."""
    from oslo_utils.imageutils import format_inspector as formats

    logging.getLogger("oslo_utils").addHandler(logging.NullHandler())
    try:  # qemu's drivers for VHD and Parallels open no other file
        found = formats.ALL_FORMATS.get(format, formats.RawFileInspector).from_file(str(path))
        found.safety_check()
        if format == "vmdk" and not found.virtual_size:  # then qemu reads a descriptor's extents, the library does not
            raise formats.SafetyViolation("no capacity")
        if "backing-filename" in document_in(locally("qemu-img", "info", "--output=json", "-f", format, str(path))):
            raise formats.SafetyViolation("a backing file")
    except (formats.ImageFormatError, formats.SafetyCheckFailed, formats.SafetyViolation) as error:
        raise FinalError(f"the image is unsafe to convert, it may refer to files of this machine: {error}",
            "do not trust it") from error


def carry(settings: Settings, journal: Journal, undo: Undo, clouds: tuple[Cloud, Cloud], plan: ImagePlan) -> str:
    """Carries an image, verified by both Glances' digests; returns the new id. A failure deletes the new image."""
    (source, destination), began, run, screen = clouds, time.monotonic(), journal.path.stem, undo.screen
    store, wanted, told = destination.store, plan.source, plan.source.facts
    undo.on_failure(f"delete image {plan.name}", lambda: delete_carried(destination, run))
    with journal.act("create image", name=plan.name) as result:
        result["image"] = id = store.make(
            name=plan.name, disk_format=plan.disk_format, container_format=told["container_format"],
            min_disk=told.get("min_disk") or 0, min_ram=told.get("min_ram") or 0, tags=list(told.get("tags") or ()),
            visibility="private", **{CARRIED_BY: run, CAME_FROM[0]: wanted.id, CAME_FROM[1]: source.url})
    if others := [mark for other in store.all() if (mark := carrying(other, wanted)) not in ("", run)]:
        raise Refused(f"run {others[0]} has begun to carry image {wanted.name!r} at the same time",
            "wait for its end, then run it again")
    if plan.is_converted:
        screen.note(f"Converting it to {plan.disk_format} in {work_folder(settings)}.")
    refused = store.describe(id, {key: one for key, one in told.items() if key not in NOT_CARRIED and one is not None})
    with journal.act("copy image", image=id, size=plan.size), screen.progress(plan.size) as show:
        stream = sent = Stream(source.store.download(wanted.id), wanted, settings.rates_ahead, show)
        if plan.is_converted:
            with converted(stream, plan, work_folder(settings)) as made, made.open("rb") as file:
                sent = Stream(iter(lambda: file.read(MiB), b""), wanted)
                store.send(id, sent, made.stat().st_size)
        else:
            store.send(id, stream, plan.size)
        proven = stream.prove(wanted, "source")
    digest = sent.prove(store.one(id) or Image.of({"id": id}), "destination")
    journal.write("proven image", source=proven, digest=digest)
    refused += store.describe(id, {key: told.get(key) for key in ("visibility", "protected")}, CARRIED_BY)
    arrived = f", as {plan.disk_format} {human(sent.done)}" if plan.is_converted else ""
    screen.note(f"Done. {human(stream.done)} in {duration(time.monotonic() - began)}{arrived}; "
        f"both Glances agree, digest {digest[:16]}…")
    if refused:
        screen.warn(f"the destination's Glance does not accept {', '.join(refused)}")
    return id


def delete_carried(cloud: Cloud, run: str) -> None:
    for one in cloud.store.all():
        if one.facts.get(CARRIED_BY) == run:
            cloud.store.delete(one.id)


def carry_images(call: Call, settings: Settings, undo: Undo, report: Report) -> int:
    """The subcommand `image`: carries images from the source's Glance to the destination's, one after the other."""
    if bool(settings.images) == bool(settings.tag):
        raise UsageError(
            "give either images or a tag", "./migrena.py image -i IMAGE [-i IMAGE], or ./migrena.py image --tag TAG")
    if settings.new_name and len(settings.images) != 1:
        raise UsageError("--name is for a single image", "leave it out")
    folder, screen, settings = state_folder(settings, call.environment), undo.screen, replace(settings, dst_project="")
    with screen.timed("Survey"), refusing():
        source, destination = both_clouds(settings, call.environment)
        here, there = in_parallel(lambda: source.store.all(*settings.images), destination.store.all)
    chosen, reasons = wanted_images(settings, here)
    known = {(entry["source"], entry["digest"])
        for entry in lines_of_runs(folder, "proven image")} if settings.disk_format else ()
    plans = [plan_image(settings, wanted, there, known) for wanted in chosen]
    reasons += [Reason(f"several of these images have the name {name!r}", "carry them one by one, with --name")
        for name, count in Counter(plan.name for plan in plans).items() if count > 1]
    reasons += [why for plan in plans for why in (*refuse_image(settings, plan, there), *refuse_reading(plan, source))]
    if reasons:
        raise Refused.of(reasons)
    report.images = [{"source": plan.source.id, "name": plan.name, "destination": plan.there, "bytes": plan.size,
        "result": "already there" if plan.there else "to be carried"} for plan in plans]
    try:
        for plan, row in zip(plans, () if settings.dry_run else report.images, strict=False):
            if not plan.there:
                row["result"] = "not carried"
                with screen.timed("seconds", row):
                    row["destination"] = carry_alone(settings, folder, undo, (source, destination), plan)
                row["result"] = "carried"
            if not (settings.json or settings.quiet):
                print(row["destination"])
    finally:
        told = [(str(row["result"]), human(plan.size), plan.name, str(row["destination"]))
            for plan, row in zip(plans, report.images, strict=True)]
        for line in aligned([("RESULT", "SIZE", "NAME", "IMAGE"), *told]):
            screen.say(line, always=settings.dry_run)
    report.result = "planned" if settings.dry_run else "done"
    return 0


def carry_alone(settings: Settings, folder: Path, undo: Undo, clouds: tuple[Cloud, Cloud], plan: ImagePlan) -> str:
    """Carries an image in a run of its own, with lock and journal; returns the new id."""
    run, wanted = new_run(), plan.source
    with only_run_of(folder, wanted.id, run):
        journal = Journal(folder, run)
        with journal.beginning():
            journal.write(
                "run", job="image", pid=os.getpid(), source=wanted.id, source_name=wanted.name, name=plan.name,
                clouds=[cloud.url for cloud in clouds],
                settings={key: getattr(settings, key) for key in ("src_cloud", "dst_cloud")})
        with journal.ending(undo), undo, undo.screen.step(f"Carry image {wanted.name} ({human(plan.size)})."):
            return carry(settings, journal, undo, clouds, plan)


# ---- 13. Resources ---------------------------------------------------

AUTH: Final = "%auth%"  # in OS Migrate's files: the project, domain or user of the credentials in use
FORMAT_VERSION: Final = "1.0.5"  # of OS Migrate, whose files these are
ASSIGNMENT: Final = "{project_id}/users/{user_id}/roles/{role_id}"  # a role of a user in a project, as its path
DEFAULT_GROUP: Final = "default"  # the security group that every project has
PROTOCOLS: Final = {"1": "icmp", "6": "tcp", "17": "udp", "58": "ipv6-icmp", "icmpv6": "ipv6-icmp"}
INTERFACE_OWNERS: Final = (
    "network:router_interface", "network:ha_router_replicated_interface", "network:router_interface_distributed")
PROVIDER: Final = ("provider_network_type", "provider_physical_network", "provider_segmentation_id", "segments")
SIZES: Final = ("name", "vcpus", "ram", "disk", "swap", "OS-FLV-EXT-DATA:ephemeral")  # what makes a flavor
BULK: Final = 100  # resources in one request to Neutron
MOST_SHOWN: Final = 20  # resources of a type that a plan names


@dataclass(frozen=True)
class ResourceType:
    """A type of resource: where the API lists it, and what OS Migrate's files have of it.

    `params` and `info` are names of the files, each with the API's where that differs; `refs` are names of the files
    with the API's field and the type that it refers to; `key` tells those of one project from each other.
    """

    label: str
    service: str
    path: str
    one: str  # what the API calls one; that and an s is the key of a list
    type: str = ""  # empty: only referred to
    params: str = "name"
    info: str = "id"
    refs: str = ""
    key: str = "name"
    changeable: str = ""  # names that can be changed later
    query: str = ""
    is_owned: bool = True  # by a project
    parent: str = ""  # the reference to what it is a part of, whose project is its own

    @property
    def many(self) -> str:
        return f"{self.one[:-1]}ies" if self.one.endswith("y") else f"{self.one}s"

    @property
    def file(self) -> str:
        return f"{self.label.replace(' ', '_').replace('key_pair', 'keypair')}s.yml".replace(
            "role_assignment", "user_project_role_assignment")

    @property
    def columns(self) -> dict[str, str]:
        return pairs_in(self.params)

    def api(self, name: str) -> str:
        return self.references.get(name, (self.columns.get(name, name), ""))[0]

    @property
    def references(self) -> dict[str, tuple[str, str]]:
        return {name: (api.partition(":")[0], api.partition(":")[2].replace("-", " "))
                for name, api in pairs_in(self.refs).items()}


def pairs_in(text: str) -> dict[str, str]:
    return {word.partition("=")[0]: word.partition("=")[2] or word for word in text.split()}


TIMES: Final = "created_at id project_id revision_number updated_at"
IMAGE_COLUMNS: Final = (
    "architecture container_format disk_format has_auto_disk_config=auto_disk_config hash_algo=os_hash_algo "
    "hash_value=os_hash_value hw_cpu_cores hw_cpu_policy hw_cpu_sockets hw_cpu_thread_policy hw_cpu_threads "
    "hw_disk_bus hw_machine_type hw_qemu_guest_agent hw_rng_model hw_scsi_model hw_serial_port_count hw_video_model "
    "hw_video_ram hw_vif_model hw_watchdog_action hypervisor_type instance_type_rxtx_factor is_hidden=os_hidden "
    "is_hw_boot_menu_enabled=hw_boot_menu is_hw_vif_multiqueue_enabled=hw_vif_multiqueue_enabled "
    "is_protected=protected kernel_ref ramdisk_ref min_disk min_ram name needs_config_drive=img_config_drive "
    "needs_secure_boot=os_secure_boot os_admin_user os_command_line os_distro os_require_quiesce os_shutdown_timeout "
    "os_type os_version visibility vm_mode vmware_adaptertype vmware_ostype")
RESOURCE_TYPES: Final = {one.label: one for one in (  # in the order in which they are created
    ResourceType("domain", "identity", "/domains", "domain", is_owned=False),
    ResourceType("role", "identity", "/roles", "role", is_owned=False),
    ResourceType("qos policy", "network", "/qos/policies", "policy"),
    ResourceType("segment", "network", "/segments", "segment", is_owned=False),
    ResourceType("subnet pool", "network", "/subnetpools", "subnetpool"),
    ResourceType("network flavor", "network", "/flavors", "flavor", is_owned=False),
    ResourceType("project", "identity", "/projects", "project", "openstack.identity.Project",
        "description is_domain is_enabled=enabled name", "domain_id id parent_id",
        "domain_ref=domain_id:domain parent_ref=parent_id:project", "name domain_ref",
        "description is_enabled", is_owned=False),
    ResourceType("user", "identity", "/users", "user", "openstack.user.User",
        "description email is_enabled=enabled name", "default_project_id domain_id id",
        "default_project_ref=default_project_id:project domain_ref=domain_id:domain", "name domain_ref",
        "description email is_enabled default_project_ref", is_owned=False),
    ResourceType("role assignment", "identity", "/role_assignments", "role_assignment",
        "openstack.identity.UserProjectRoleAssignment", "", "project_id role_id user_id",
        "project_ref=project_id:project role_ref=role_id:role user_ref=user_id:user",
        "project_ref role_ref user_ref", is_owned=False),
    ResourceType("quota", "compute", "/os-quota-sets", "quota_set", "migrena.Quota", "service limits", "project_id",
        "project_ref=project_id:project", "service project_ref", "limits", is_owned=False),
    ResourceType("volume type", "block-storage", "/types", "volume_type", "migrena.VolumeType",
        "description extra_specs is_public=os-volume-type-access:is_public name", "id",
        "access_refs=access:project", "name",
        "description extra_specs access_refs", "?is_public=None", is_owned=False),
    ResourceType("flavor", "compute", "/flavors", "flavor", "openstack.compute.Flavor",
        "description disk ephemeral=OS-FLV-EXT-DATA:ephemeral extra_specs "
        "is_public=os-flavor-access:is_public name ram rxtx_factor swap vcpus",
        "id is_disabled=OS-FLV-DISABLED:disabled", "access_refs=access:project", "name",
        "description extra_specs access_refs", "/detail?is_public=None", is_owned=False),
    ResourceType("key pair", "compute", "/os-keypairs", "keypair", "openstack.compute.Keypair",
        "name public_key type", "created_at fingerprint id is_deleted user_id",
        "user_ref=user_id:user", "name user_ref", is_owned=False),
    ResourceType("image", "image", "/v2/images", "image", "openstack.image.Image", IMAGE_COLUMNS,
        "checksum created_at direct_url file id owner_id=owner schema size status updated_at virtual_size",
        key="name hash_value", changeable="visibility is_protected min_disk min_ram"),
    ResourceType("server group", "compute", "/os-server-groups", "server_group", "migrena.ServerGroup",
        "name policy rules", "id project_id", query="?all_projects=True"),
    ResourceType("security group", "network", "/security-groups", "security_group",
        "openstack.network.SecurityGroup", "description is_stateful=stateful name", TIMES,
        changeable="description is_stateful"),
    ResourceType("security group rule", "network", "/security-group-rules", "security_group_rule",
        "openstack.network.SecurityGroupRule",
        "description direction ether_type=ethertype port_range_max port_range_min protocol remote_ip_prefix",
        f"remote_group_id security_group_id {TIMES}",
        "security_group_ref=security_group_id:security-group remote_group_ref=remote_group_id:security-group",
        "direction ether_type port_range_max port_range_min protocol remote_ip_prefix "
        "security_group_ref remote_group_ref", parent="security_group_ref"),
    ResourceType("network", "network", "/networks", "network", "openstack.network.Network",
        "availability_zone_hints description dns_domain is_admin_state_up=admin_state_up is_default "
        "is_port_security_enabled=port_security_enabled is_router_external=router:external is_shared=shared "
        "is_vlan_transparent=vlan_transparent mtu name provider_network_type=provider:network_type "
        "provider_physical_network=provider:physical_network "
        "provider_segmentation_id=provider:segmentation_id segments tags",
        f"availability_zones qos_policy_id status subnet_ids=subnets {TIMES}",
        "qos_policy_ref=qos_policy_id:qos-policy", "name",
        "description dns_domain is_admin_state_up is_port_security_enabled is_shared mtu tags qos_policy_ref"),
    ResourceType("subnet", "network", "/subnets", "subnet", "openstack.subnet.Subnet",
        "allocation_pools cidr description dns_nameservers gateway_ip host_routes ip_version "
        "ipv6_address_mode ipv6_ra_mode is_dhcp_enabled=enable_dhcp name service_types tags "
        "use_default_subnet_pool=use_default_subnetpool",
        f"network_id prefix_length segment_id subnet_pool_id=subnetpool_id {TIMES}",
        "network_ref=network_id:network segment_ref=segment_id:segment "
        "subnet_pool_ref=subnetpool_id:subnet-pool", "cidr network_ref",
        "allocation_pools description dns_nameservers gateway_ip host_routes is_dhcp_enabled name "
        "service_types tags", parent="network_ref"),
    ResourceType("router", "network", "/routers", "router", "openstack.network.Router",
        "availability_zone_hints description is_admin_state_up=admin_state_up is_distributed=distributed "
        "is_ha=ha name tags routes",
        f"availability_zones external_gateway_info flavor_id status {TIMES}",
        "external_gateway_refinfo=external_gateway_info:network flavor_ref=flavor_id:network-flavor", "name",
        "description is_admin_state_up tags routes external_gateway_refinfo"),
    ResourceType("router interface", "network", "/ports", "port", "openstack.network.RouterInterface", "device_owner",
        "id project_id", "device_ref=device_id:router fixed_ips_refs=fixed_ips:subnet "
        "network_ref=network_id:network", "device_ref network_ref fixed_ips_refs",
        query="?" + "&".join(f"device_owner={one}" for one in INTERFACE_OWNERS), parent="device_ref"))}
IN_FILES: Final = {label: kind for label, kind in RESOURCE_TYPES.items() if kind.type}
WORKLOAD: Final = "openstack.compute.Server"  # an instance, which the copy itself moves
LABELS: Final = {kind.type: label for label, kind in IN_FILES.items()}


class Unseen(CloudError):
    """Something that a resource refers to is not shown to these credentials."""


class Catalog:
    """What a cloud has as far as these credentials see it, from the view of one project; each list is read once."""

    def __init__(self, cloud: Cloud, project: str = "") -> None:
        self.cloud, self.project = cloud, project or cloud.identity["project"]
        self.hidden: dict[str, str] = {}  # types that are not shown, and why
        self.is_whole = False  # whether quotas and key pairs of all projects and users are read; each is a request
        self.names: Collection[str] = ()  # or of those with these names
        self._lists: dict[str, Rows] = {}
        self._by_id: dict[str, dict[str, dict[str, Any]]] = {}

    def read(self, labels: Iterable[str]) -> None:
        """Reads these lists at the same time."""
        wanted = [label for label in labels if label not in self._lists]
        if {"role assignment", "quota", "key pair"} & {*wanted}:  # these are read for each project or user
            self.read([label for label in ("project", "user") if label not in (*wanted, *self._lists)])
        first = [label for label in wanted if label not in ("quota", "key pair")]
        for part in (first, [label for label in wanted if label not in first]):
            with ThreadPoolExecutor(8) as pool:
                for label, found in zip(part, pool.map(self._list, part), strict=True):
                    self._lists[label] = found

    def all(self, label: str) -> Rows:
        self.read([label])
        return self._lists[label]

    def one(self, label: str, id: object) -> dict[str, Any] | None:
        if len(self._by_id.get(label, ())) < len(self.all(label)):
            self._by_id[label] = {str(raw.get("id")): raw for raw in self.all(label)}
        return self._by_id.get(label, {}).get(str(id))

    def _list(self, label: str) -> Rows:
        kind, cloud = RESOURCE_TYPES[label], self.cloud
        readers: Mapping[str, Callable[[], Rows]] = {
            "image": lambda: [dict(one.facts) for one in cloud.store.all()],
            "project": self._projects, "role assignment": self._assignments, "quota": self._quotas,
            "key pair": self._key_pairs}
        if kind.service == "block-storage" and not cloud.has_volumes:
            return []
        try:
            found = readers.get(label, lambda: cloud.listed(kind.service, kind.path + kind.query, kind.many))()
        except CloudError as error:
            if error.code not in (400, 403, 404):
                raise
            self.hidden[label] = str(error)
            return []
        for raw in found if label in ("flavor", "volume type") else ():
            self._complete(label, raw)
        for raw in found if label == "server group" else ():  # before microversion 2.64
            raw.setdefault("policy", next(iter(raw.get("policies") or ()), None))
        return found

    def _projects(self) -> Rows:
        with ignoring(403):
            return self.cloud.listed("identity", "/projects", "projects")
        return self.cloud.listed("identity", "/auth/projects", "projects")

    def _assignments(self) -> Rows:
        """Roles of users in projects; those of groups and in domains have no place in the files."""
        told = self.cloud.listed("identity", "/role_assignments", "role_assignments")
        return [{"id": "", "project_id": one["scope"]["project"]["id"], "role_id": one["role"]["id"],
                "user_id": one["user"]["id"]} for one in told if "user" in one and (
                "project" in one.get("scope", {}) and "OS-INHERIT:inherited_to" not in one["scope"])]

    def _quotas(self) -> Rows:
        found = Rows()
        services = [("compute", "/os-quota-sets/", "quota_set"), ("network", "/quotas/", "quota")]
        services += [("block-storage", "/os-quota-sets/", "quota_set")] if self.cloud.has_volumes else []
        projects = [one for one in self.all("project")
                if self.is_whole or one["name"] in self.names or one["id"] == self.project]
        for project, (service, path, one) in itertools.product(projects, services):
            try:
                limits = self.cloud.ask(f"show quotas of {project['name']}", service, "GET", path + project["id"])[one]
            except CloudError as error:
                if error.code not in (403, 404):
                    raise
                self.hidden[f"{service} quota"] = str(error)
                continue
            found.append({"id": "", "project_id": project["id"], "service": service, "limits": {
                name: value for name, value in limits.items() if isinstance(value, int)}})
        return found

    def _key_pairs(self) -> Rows:
        mine, found = self.users_in(self.project), Rows()
        users = [user["id"] for user in self.all("user")
                if self.is_whole or user["name"] in self.names or user["id"] in mine]
        for user in dict.fromkeys((self.cloud.user, *users)):
            query = "" if user == self.cloud.user else f"?user_id={user}"
            found += [{"type": "ssh", **one["keypair"], "id": one["keypair"]["name"], "user_id": user}
                    for one in self.cloud.listed("compute", f"/os-keypairs{query}", "keypairs")]
        return found

    def users_in(self, project: str) -> set[str]:
        return {one["user_id"] for one in self.all("role assignment") if one["project_id"] == project}

    def _complete(self, label: str, raw: dict[str, Any]) -> None:
        """Adds the projects that have access to a flavor or a volume type, and what old releases list apart."""
        kind, is_flavor, raw["access"] = RESOURCE_TYPES[label], label == "flavor", list[str]()
        path, word = f"{kind.path}/{raw['id']}", "flavor" if is_flavor else "volume_type"
        if is_flavor:
            raw["swap"] = raw.get("swap") or 0
            if "extra_specs" not in raw:  # before microversion 2.61
                raw["extra_specs"] = self.cloud.ask(
                    f"show flavor {raw['name']}", kind.service, "GET", f"{path}/os-extra_specs")["extra_specs"]
        else:
            with ignoring(403, 404):
                raw["encryption"] = self.cloud.ask(f"show encryption of {label} {raw['name']}", kind.service, "GET",
                        f"{path}/encryption").get("provider")
        if not raw.get("os-flavor-access:is_public" if is_flavor else "is_public", True):
            access = f"{path}/os-{word.replace('_', '-')}-access"
            raw["access"] = [self.cloud.identity["project"]]  # or it would not be shown
            with ignoring(403, 404):
                told = self.cloud.ask(f"show access to {label} {raw['name']}", kind.service, "GET", access)
                raw["access"] = sorted(
                    one.get("tenant_id") or one.get("project_id") for one in told[f"{word}_access"])

    def owner(self, raw: Facts, label: str = "") -> str:
        """The id of a resource's project; that of a part is the whole's, whoever added it."""
        if label and (parent := RESOURCE_TYPES[label].parent):
            api, of = RESOURCE_TYPES[label].references[parent]
            raw = self.one(of, raw.get(api)) or raw
        return str(raw.get("project_id") or raw.get("tenant_id") or raw.get("owner") or "")

    def ref(self, label: str, id: object) -> dict[str, Any] | None:
        """What the files have for a reference to a resource with this id. Raises Unseen."""
        if id in (None, ""):
            return None
        if label == "user" and id == self.cloud.user:
            return {"domain_name": AUTH, "name": AUTH, "project_name": None}
        raw = self.one(label, id) or (self.one("domain", id) if label == "project" else None)
        if not raw:
            raise Unseen(f"{self.cloud.label} cloud: {label} {id} is not shown to these credentials")
        domain = self.one("domain", raw.get("domain_id")) if label in ("project", "user") else None
        whose = {"domain_name": domain["name"] if domain else None, "project_name": None}
        if RESOURCE_TYPES[label].is_owned:
            whose = self.owner_ref(self.owner(raw))
        return {**whose, "name": raw["name"]}

    def _project_ref(self, id: object) -> dict[str, Any] | None:
        """A reference to a project, which may become another one there if it is the exported one."""
        return {"domain_name": AUTH, "name": AUTH, "project_name": None} if id == self.project else self.ref(
            "project", id)

    def owner_ref(self, project: str) -> dict[str, Any]:
        """What the files have for a project: the names of its domain and of itself, which may be unknown."""
        if project == self.project:
            return {"domain_name": AUTH, "project_name": AUTH}
        raw = self.one("project", project) or {}
        return {"domain_name": (self.one("domain", raw.get("domain_id")) or {}).get("name"),
                "project_name": raw.get("name")}

    def described(self, label: str, raw: Facts) -> dict[str, Any]:
        """A resource as the files have it. Raises Unseen if it refers to something that is not shown."""
        kind, refs = RESOURCE_TYPES[label], dict[str, Any]()
        for name, (api, of) in kind.references.items():
            value = raw.get(api)
            if name == "fixed_ips_refs":
                refs[name] = [{"ip_address": one["ip_address"], "subnet_ref": self.ref(of, one["subnet_id"])}
                        for one in value or ()]
            elif name == "external_gateway_refinfo":
                refs[name] = {"network_ref": self.ref(of, value["network_id"]), **{
                    key: value[key] for key in ("enable_snat",) if key in value}} if value else None
            elif name == "access_refs":
                refs[name] = [self._project_ref(id) for id in value or () if self.one(of, id)]
            else:
                refs[name] = self._project_ref(value) if label == "quota" else self.ref(of, value)
        for key, what in (("remote_address_group_id", "it refers to an address group"), ("encryption", "it encrypts")):
            if raw.get(key):
                raise Unseen(f"{what}, which the files have no place for")
        params = {name: in_stable_order(raw.get(api)) for name, api in kind.columns.items()}
        if label == "subnet":
            params["dns_nameservers"] = raw.get("dns_nameservers")  # the first is asked first
        if label == "image":
            params["properties"] = {key: value for key, value in sorted(raw.items()) if key not in (
                *kind.columns.values(), *NOT_CARRIED, "os_hidden")}
        owner, ours = self.owner(raw, label), dict[str, Any]()
        if kind.is_owned and owner != self.project:
            if (whose := self.owner_ref(owner))["project_name"]:
                ours = {"project_ref": whose}
            elif self.is_whole and label != "image":  # it would become the importer's
                raise Unseen(f"its project {owner} is not shown, or deleted" if owner else "it is no project's")
        return {"_info": {name: raw.get(api) for name, api in pairs_in(kind.info).items()},
                "_migration_params": ours, "params": {**params, **refs}, "type": kind.type}


def in_stable_order(value: Any) -> Any:
    if isinstance(value, list):
        return sorted(value, key=lambda one: [str(one.get(key)) for key in ("start", "destination", "end")]
                if isinstance(one, dict) else [str(one)])
    return value


def shown_key(data: Facts) -> str:
    """What a resource is called in messages, and sorted by in files: its name, or what else tells it from others."""
    params = data["params"]
    names = [str(ref["name"]) for name, ref in sorted(params.items(), reverse=True)
            if name.endswith("_ref") and isinstance(ref, dict)]
    words = [str(params[name]) for name in ("service", "direction", "ether_type", "protocol", "port_range_min",
            "port_range_max", "remote_ip_prefix", "cidr") if params.get(name) not in (None, "")]
    return str(params.get("name") or "") or " ".join([*names, *words]) or data["type"]


# ---- 14. Export ------------------------------------------------------


def in_project_of(catalog: Catalog, label: str, raw: Facts) -> bool:
    """Whether a resource is the project's, or made for it."""
    users = catalog.users_in(catalog.project) if label in ("user", "key pair") else set[str]()
    own = catalog.cloud.user
    whose: Mapping[str, Callable[[], bool]] = {
        "project": lambda: raw["id"] == catalog.project,
        "user": lambda: raw["id"] in users and raw["id"] != own,
        "key pair": lambda: raw["user_id"] in {own, *users},
        "flavor": lambda: raw.get("os-flavor-access:is_public", True) or catalog.project in raw["access"],
        "volume type": lambda: raw.get("is_public", True) or catalog.project in raw["access"]}
    return whose.get(label, lambda: catalog.owner(raw, label) == catalog.project)()


def needed_by(catalog: Catalog, server: Server, lost: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What an instance needs: its networks, groups and those that these refer to, routers to the outside, the rest."""
    catalog.read(label for label in IN_FILES if label not in (
        "user", "role assignment", "quota", "volume type", "key pair"))
    cloud, facts = catalog.cloud, server.facts
    ports = ports_of(cloud.networks, server.id)
    networks, groups = {one["network_id"] for one in ports}, {id for one in ports for id in one["security_groups"]}
    rules = catalog.all("security group rule")
    while more := {one["remote_group_id"] for one in rules if one["security_group_id"] in groups} - {None, *groups}:
        groups |= more
    interfaces = [one for one in catalog.all("router interface") if one["network_id"] in networks]
    routers = [reachable(catalog, one, networks, lost) for one in catalog.all("router")
            if one.get("external_gateway_info") and one["id"] in {port["device_id"] for port in interfaces}]
    yield from (("project", one) for one in catalog.all("project") if one["id"] == facts.get("tenant_id"))
    own = server.flavor  # which may be deleted since
    wanted = {"id": "", "name": own.name, "vcpus": own.vcpus, "ram": own.ram, "disk": own.disk, "swap": own.swap,
        "OS-FLV-EXT-DATA:ephemeral": own.ephemeral, "os-flavor-access:is_public": False, "rxtx_factor": 1.0,
        "extra_specs": dict(own.extra_specs or {}), "access": [str(facts["tenant_id"])]}
    same = [one for one in catalog.all("flavor") if all(one.get(key) == wanted[key] for key in SIZES)]
    flavor = (same or [wanted])[0]
    yield "flavor", {**flavor, "access": wanted["access"] if flavor["access"] else []}  # others need no access
    if server.key and (pair := cloud.key_pair(server.key, str(facts.get("user_id") or ""))):
        yield "key pair", {**asdict(pair), "id": pair.name, "user_id": cloud.user}
    yield from (("image", one) for one in catalog.all("image") if one["id"] == server.image)
    yield from (("server group", one) for one in catalog.all("server group") if server.id in one["members"])
    for label, field_name, ids in (("network", "id", networks), ("subnet", "network_id", networks),
            ("security group", "id", groups), ("security group rule", "security_group_id", groups)):
        yield from ((label, one) for one in catalog.all(label) if one[field_name] in ids)
    yield from (("router", one) for one in routers)
    ids = {one["id"] for one in routers}
    yield from (("router interface", port) for port in interfaces if port["device_id"] in ids)


def reachable(catalog: Catalog, router: dict[str, Any], networks: Collection[str], lost: list[str]) -> dict[str, Any]:
    """A router with those of its static routes that it can have with these networks alone; the others join `lost`."""
    sides = {*networks, router["external_gateway_info"]["network_id"]}
    cidrs = [ipaddress.ip_network(one["cidr"]) for one in catalog.all("subnet") if one["network_id"] in sides]
    routes = [one for one in router.get("routes") or () if any(ipaddress.ip_address(one["nexthop"]) in cidr
            for cidr in cidrs)]
    lost += [f"router {router['name']}: its route to {one['destination']} by {one['nexthop']}, on another network"
            for one in router.get("routes") or () if one not in routes]
    return {**router, "routes": routes}


def described_all(catalog: Catalog, chosen_ones: Iterable[tuple[str, dict[str, Any]]],
        lost: list[str]) -> Rows:
    """These resources as the files have them, in order; what cannot be described joins `lost`, with the reason."""
    found = Rows()
    for label, raw in chosen_ones:
        try:
            found.append(catalog.described(label, raw))
        except Unseen as error:
            lost.append(f"{label} {raw.get('name') or raw.get('id')}: {error}")
        lost += [f"volume type {raw['name']}: its QoS specs"] if raw.get("qos_specs_id") else []
    return sorted(found, key=lambda one: (one["type"], shown_key(one), json.dumps(one["params"], sort_keys=True)))


def write_files(folder: Path, resources: Sequence[Facts], *, may_replace: bool,
        has_rules: bool = False) -> dict[str, int]:
    """Writes a file for each type; returns how many resources each has. Raises Refused rather than replace one."""
    import yaml

    rules = RESOURCE_TYPES["security group rule"]
    by_type = itertools.groupby(resources, key=lambda one: one["type"])
    files = {IN_FILES[LABELS[type]].file: [*ones] for type, ones in by_type}
    files |= {rules.file: files.get(rules.file, [])} if has_rules else {}  # that there are none is said, too
    if there := [] if may_replace else [name for name in files if (folder / name).exists()]:
        raise Refused(f"{folder} has {', '.join(there)} already", "name another --folder, or --yes replaces them")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, ones in files.items():
            draft = folder / f".{name}.{os.getpid()}"
            draft.write_text(yaml.safe_dump({"os_migrate_version": FORMAT_VERSION, "resources": ones},
                    allow_unicode=True), encoding="utf-8")
            draft.replace(folder / name)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error}", "name another --folder") from error
    return {name: len(ones) for name, ones in files.items()}


def parse_types(value: object) -> tuple[str, ...]:
    """Types of resources, by the names of their files or in plain words."""
    known = {re.sub(r"\W", "_", word): label for label, kind in IN_FILES.items()
            for word in (label, f"{label}s", kind.file.removesuffix(".yml"), kind.type)}
    words = [re.sub(r"\W", "_", word) for word in parse_names(value or ())] if value else []
    for word in words:
        if word not in known:
            raise ValueError(f"{word!r} is not a type{did_you_mean(word, known)}; there are: "
                    f"{', '.join(kind.file.removesuffix('.yml') for kind in IN_FILES.values())}")
    return tuple(known[word] for word in words)


def export_resources(call: Call, settings: Settings, undo: Undo, report: Report) -> int:
    """The subcommand `export`: writes what surrounds instances into files."""
    if sum(map(bool, (settings.project, settings.all_projects, settings.needed_for))) > 1 or (
            settings.needed_for and settings.types):
        raise UsageError("--project, --all-projects and --for exclude each other, and --for chooses the types",
                "give one of them")
    screen, lost = undo.screen, list[str]()
    try:
        types = parse_types(settings.types)
    except ValueError as error:
        raise UsageError(str(error), "see ./migrena.py export --help") from error
    with screen.timed("Survey"), refusing():
        cloud, creds = cloud_of_files(call, settings, "src")
        catalog = Catalog(cloud)
        if settings.project:
            catalog.project = project_called(catalog, settings.project)
        if catalog.project != cloud.identity["project"] and not cloud.sees_hosts():  # who is no admin must be in it
            cloud = Cloud(cloud.label, in_project(creds, catalog.project))
            catalog = Catalog(cloud)
        catalog.is_whole = settings.all_projects
        if settings.needed_for:
            found = [*needed_by(catalog, cloud.server(settings.needed_for), lost)]
        else:
            labels = [label for label in IN_FILES if label in (types or IN_FILES)]
            catalog.read(labels)
            found = [(label, raw) for label in labels for raw in catalog.all(label)
                    if settings.all_projects or in_project_of(catalog, label, raw)]
        resources = [one for one in described_all(catalog, found, lost) if not settings.only_names or any(
            fnmatch.fnmatchcase(name, settings.only_names) for name in names_of(one))]
    for line in lost:
        screen.warn(f"left out: {line}")
    for label, why in catalog.hidden.items():
        if label in (types or IN_FILES) or label.endswith(" quota"):
            screen.warn(f"{label}s are not shown to these credentials: {why}")
    counts = write_files(Path(settings.folder), resources, may_replace=settings.yes, has_rules=(
        not settings.only_names and "security group rule" in (types or IN_FILES)))
    for name, count in counts.items():
        screen.say(f"{count:6} in {Path(settings.folder) / name}")
    report.resources = [{"type": one["type"], "name": shown_key(one), "result": "exported"} for one in resources]
    report.result, report.api_calls = "done", {cloud.label: cloud.calls}
    return 0


def cloud_of_files(call: Call, settings: Settings, default: str) -> tuple[Cloud, dict[str, Any]]:
    """The cloud that is exported from or imported into, in the project of its credentials, and these."""
    side = settings.cloud or default
    creds = credentials(side, replace(settings, dst_project=""), call.environment)
    return Cloud(SIDES.get(side, side), creds), creds


def names_of(data: Facts) -> list[str]:
    """The names that --name is matched with: the resource's own, or those of what it is a part of."""
    params = data["params"]
    refs = (params.get(name) or {} for name in ("security_group_ref", "device_ref", "user_ref", "project_ref"))
    return [str(params["name"])] if params.get("name") else [str(one["name"]) for one in refs if one]


def project_called(catalog: Catalog, name: str) -> str:
    """The id of the project with this name or id. Raises Refused."""
    found = [one for one in catalog.all("project") if name in (one["name"], one["id"])]
    if len(found) != 1:
        raise Refused(f"{catalog.cloud.label} cloud: {len(found) or 'no'} projects are called {name!r}",
                "give its id; see: openstack project list")
    return str(found[0]["id"])


# ---- 15. Import ------------------------------------------------------

NOT_COMPARED: Final = ("is_default", "is_domain", "use_default_subnet_pool", "segments", "hash_algo", "device_owner",
        "availability_zone_hints", "disk_format", "container_format", "properties")
NOT_SENT: Final = (*NOT_COMPARED[:6], "tags", "routes", "extra_specs", "hash_value")
OFF_BY_DEFAULT: Final = ("is_shared", "is_router_external", "is_ha", "is_distributed", "is_vlan_transparent")
UNKNOWN: Final = re.compile(
    r"Unrecognized attribute\(s\) '(?P<names>[^']+)'|Attribute '(?P<more>[^']+)' not allowed|"
    r"Requested MTU is too big, maximum is (?P<mtu>\d+)|"
    r"Additional properties are not allowed \('(?P<added>[^']+)'|AvailabilityZone (?P<zone>\S+) could not be found")


@dataclass(eq=False)
class Resource:
    """A resource of the files, and what becomes of it in the destination."""

    label: str
    data: Facts
    place: str  # the file, and the number in it
    owner: str | Resource = ""  # a project's id, or a project that is to be made
    refs: dict[str, Any] = empty(dict)  # ids, or what is to be made
    id: str = ""
    result: str = "to be created"
    differences: list[tuple[str, Any, Any]] = empty(list)  # name, there, in the file
    omitted: list[str] = empty(list)
    password: str = field(default="", repr=False)

    @property
    def kind(self) -> ResourceType:
        return RESOURCE_TYPES[self.label]

    @property
    def params(self) -> Facts:
        found: Facts = self.data["params"]
        return found

    @property
    def name(self) -> str:
        return str(self.params.get("name") or "")

    def __str__(self) -> str:
        return f"{self.label} {shown_key(self.data)}"


def read_files(names: Sequence[str], problems: list[Reason], skipped: list[str]) -> list[Resource]:
    """The resources in these files and folders; of instances only the names, in `skipped`. Raises UsageError."""
    import yaml

    found = list[Resource]()
    paths = [path for name in names for path in (
        sorted(Path(name).glob("*.yml")) if Path(name).is_dir() else [Path(name)])]
    if not paths:
        raise UsageError(f"there are no files *.yml in {', '.join(names)}", "./migrena.py export writes some")
    for path in paths:
        try:
            document = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UsageError(f"{path} cannot be read: {shorten(str(error))}") from error
        listed = document.get("resources") if isinstance(document, dict) else None
        if not isinstance(listed, list):
            raise UsageError(f"{path} is not a file of resources", "see what ./migrena.py export writes")
        for number, one in enumerate(plain(listed), 1):
            place, label = f"{path}, number {number}", LABELS.get(one.get("type", "") if isinstance(one, dict) else "")
            if isinstance(one, dict) and one.get("type") == WORKLOAD:
                skipped.append(str((isinstance(one.get("params"), dict) and one["params"].get("name")) or place))
            elif not (label and isinstance(one.get("params"), dict)):
                problems.append(Reason(f"{place}: its type is unknown, or it has no params",
                        f"take it out; known: {', '.join(LABELS)}"))
            elif wrong := misformed(IN_FILES[label], one["params"]):
                problems.append(Reason(f"{place}: {wrong}", "see what ./migrena.py export writes"))
            else:
                found.append(Resource(label, one, place))
    return found


def has_rules_in(names: Sequence[str]) -> bool:
    """Whether these files and folders say which rules groups have, even if none."""
    rules = RESOURCE_TYPES["security group rule"].file
    return any(Path(name).name == rules or (Path(name) / rules).exists() for name in names)


def plain(value: Any) -> Any:
    """What YAML has read, with dates as the text that they were."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def misformed(kind: ResourceType, params: dict[str, Any]) -> str:
    """What is wrong with the form of a resource's params, if anything."""
    if params.get("name") is not None:
        params["name"] = str(params["name"])
    needed = {"subnet": ("cidr",), "quota": ("service", "limits"), "server group": ("policy",),
            "key pair": ("public_key",), "flavor": ("ram", "vcpus", "disk")}.get(kind.label, ())
    if lacking := [name for name in needed if params.get(name) in (None, "", {})]:
        return f"{', '.join(lacking)} is missing"
    for name in kind.references:
        value = params.get(name)
        if name in ("fixed_ips_refs", "access_refs"):
            rows = value or []
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                return f"{name} is not a list of dictionaries"
            if name == "fixed_ips_refs" and not (rows and all(row.get("ip_address") for row in rows)):
                return f"{name} has no ip_address"
            continue
        if name == "external_gateway_refinfo" and isinstance(value, dict):
            value = value.get("network_ref") or {}
        if value is not None and not (isinstance(value, dict) and value.get("name")):
            return f"{name} is not a reference with a name"
        if value is None and name in kind.key.split() and name != "remote_group_ref":
            return f"{name} is missing"
    return "limits is not a dictionary" if not isinstance(params.get("limits", {}), dict) else ""


def normal(value: Any) -> Any:
    """A value such that equal ones compare equal: null, '' and empty lists are the same, and order means nothing."""
    if isinstance(value, Mapping):
        return tuple(sorted((str(key), normal(one)) for key, one in value.items() if normal(one) is not None)) or None
    if isinstance(value, (list, tuple)):
        return tuple(sorted(map(normal, value), key=repr)) or None
    if isinstance(value, str):
        return value.strip() or None
    return value


def scalar(api: str, value: Any) -> Any:
    """What tells a value from others: of addresses the addresses, and as Neutron compares rules."""
    if api == "fixed_ips":
        return tuple(sorted(one["ip_address"] for one in value or ()))
    if api == "remote_ip_prefix":
        with suppress(ValueError):
            value = str(ipaddress.ip_network(value, strict=False))
        return None if value in ("0.0.0.0/0", "::/0") else value
    return PROTOCOLS.get(str(value), value) if api == "protocol" else value


def key_of_raw(catalog: Catalog, label: str, raw: Facts) -> tuple[Any, ...]:
    """What tells a resource in a cloud from others of its type."""
    kind = RESOURCE_TYPES[label]
    apis = [kind.api(name) for name in kind.key.split()]
    owner = catalog.owner(raw) if kind.is_owned and not kind.parent else ""
    more = [raw[name] for name in ("remote_address_group_id",) if raw.get(name)]  # the files have no place for it
    return (owner, *(normal(scalar(api, raw.get(api))) for api in apis), *more)


def key_of_wanted(one: Resource) -> tuple[Any, ...]:
    """The same of a resource of the files; what is to be made stands for its id."""
    kind, values = one.kind, list[Any]()
    for name in kind.key.split():
        value = one.refs[name] if name in one.refs else one.params.get(name)
        values.append((value.id or value) if isinstance(value, Resource) else normal(scalar(kind.api(name), value)))
    owner = one.owner if kind.is_owned and not kind.parent else ""
    return (owner.id or owner if isinstance(owner, Resource) else owner, *values)


class Resolver:
    """Finds what the files refer to, in the destination or among what is to be made."""

    def __init__(self, catalog: Catalog, settings: Settings, wanted: Sequence[Resource]) -> None:
        self.catalog, self._networks, self.pending = catalog, settings.network, dict[tuple[str, str], list[Resource]]()
        for one in wanted:
            self.pending.setdefault((one.label, one.name), []).append(one)
        self._indexes: dict[str, dict[Any, Rows]] = {}
        self._target: str | Resource = catalog.project
        projects = [one.name for one in wanted if one.label == "project"]
        self.moved = projects[0] if settings.project and len(projects) == 1 and settings.project != projects[0] else ""
        if settings.project:
            named = self.pending.get(("project", settings.project), [])
            self._target = named[0] if len(named) == 1 else project_called(catalog, settings.project)

    @property
    def target(self) -> str | Resource:
        """What %auth% stands for."""
        return self._target.id or self._target if isinstance(self._target, Resource) else self._target

    def owner(self, one: Resource) -> str | Resource:
        """The project that a resource belongs to; that of a part is the whole's. Raises Refused."""
        if one.kind.parent and one.refs:
            whole, of = one.refs[one.kind.parent], one.kind.references[one.kind.parent][1]
            if isinstance(whole, Resource):
                return whole.owner
            return self.catalog.owner(self.catalog.one(of, whole) or {}) or self.target
        ours = (one.data.get("_migration_params") or {}).get("project_ref")
        return self.project(ours, one) if ours and one.kind.is_owned else self.target

    def project(self, ref: Facts, one: Resource) -> str | Resource:
        if ref.get("project_name") == AUTH:
            return self.target
        return self.find("project", {"name": ref.get("project_name"), "domain_name": ref.get("domain_name")}, one)

    def find(self, label: str, ref: Facts | None, one: Resource, *,
            is_parent: bool = False) -> str | Resource:
        """The id, or the resource to be made, that a reference means. Raises Refused if it means none, or several."""
        if not ref:
            return ""
        name, domain = str(ref.get("name")), ref.get("domain_name")
        if name == AUTH and label == "user":
            return self.catalog.cloud.user
        if label == "project" and name in (AUTH, self.moved):
            return self.target
        name = self._networks.get(name, name) if label == "network" else name
        there = [raw for raw in self.catalog.all(label) if name in (raw.get("name"), raw["id"])]
        pending = self.pending.get((label, name), [])
        if is_parent and domain is None and (top := [raw for raw in self.catalog.all("domain") if raw["name"] == name]):
            return str(top[0]["id"])
        if label in ("project", "user") and domain not in (None, AUTH):
            ids = {raw["id"] for raw in self.catalog.all("domain") if raw["name"] == domain}
            there = [raw for raw in there if raw.get("domain_id") in ids]
            pending = [other for other in pending if (other.params.get("domain_ref") or {}).get("name") == domain]
        if RESOURCE_TYPES[label].is_owned and ref.get("project_name"):
            there, pending = self._of_project(ref, one, there, pending)
        if label == "project" and there:  # the same as the files have
            pending = []
        found: dict[str, str | Resource] = {str(raw["id"]): str(raw["id"]) for raw in there}
        found |= {other.id or other.place: other.id or other for other in pending}
        if len(found) != 1:
            way = "--network SRC=DST names another one" if label == "network" else (
                "export it too, or create it" if label in IN_FILES else "create it, or leave it out of the file")
            near = did_you_mean(name, {str(raw.get("name")) for raw in self.catalog.all(label)} - {name})
            raise Refused(f"{one} ({one.place}): {len(found) or 'no'} {label}s are called {name!r}{near}",
                    "give it a name of its own" if found else way)
        return next(iter(found.values()))

    def _of_project(self, ref: Facts, one: Resource, there: Rows,
            pending: list[Resource]) -> tuple[Rows, list[Resource]]:
        """Those of the project that a reference names; if it has none, those that are shared with all."""
        try:
            project = self.project(ref, one)
        except Refused:  # these credentials may not see other projects
            project = ""
        mine = [raw for raw in there if self.catalog.owner(raw) == project]
        waiting = [other for other in pending if (other.owner or self.owner(other)) == project]
        shared = [raw for raw in there if raw.get("shared") or raw.get("router:external")]
        return (mine, waiting) if mine or waiting else (shared, [])

    def existing(self, one: Resource) -> dict[str, Any] | None:
        """The destination's resource that this one is, if it has it. Raises Refused if it has several."""
        owner, *values = key_of_wanted(one)
        found = self._index(one.label).get((owner, *values), [])
        if not found and one.params.get("is_shared"):
            found = [raw for (_, *known), rows in self._index(one.label).items() if known == values
                    for raw in rows if raw.get("shared")]
        if len(found) > 1:
            raise Refused(f"{one} ({one.place}): the destination has {len(found)} of them: "
                    f"{', '.join(str(raw['id']) for raw in found)}", "rename or delete all but one")
        return found[0] if found else None

    def _index(self, label: str) -> dict[Any, Rows]:
        if label not in self._indexes:
            index = self._indexes[label] = dict[Any, Rows]()
            for raw in self.catalog.all(label):
                index.setdefault(key_of_raw(self.catalog, label, raw), []).append(raw)
        return self._indexes[label]


def resolved_refs(resolver: Resolver, one: Resource) -> dict[str, Any]:
    """What a resource refers to, as ids or as what is to be made. Raises Refused."""
    refs = dict[str, Any]()
    for name, (_, of) in one.kind.references.items():
        value = one.params.get(name)
        if name == "fixed_ips_refs":
            network = resolver.find("network", one.params.get("network_ref"), one)
            refs[name] = [{"ip_address": ip["ip_address"], "subnet_id": subnet_of(resolver, network, ip, one)}
                    for ip in value or ()]
        elif name == "external_gateway_refinfo":
            refs[name] = {"network_id": resolver.find(of, value.get("network_ref"), one), **{
                key: value[key] for key in ("enable_snat",) if value.get(key) is not None}} if value else None
        elif name == "access_refs":
            refs[name] = [resolver.find(of, ref, one) for ref in value or ()]
        else:
            refs[name] = resolver.find(of, value, one, is_parent=name == "parent_ref")
    return refs


def subnet_of(resolver: Resolver, network: str | Resource, ip: Facts, one: Resource) -> str | Resource:
    """The subnet of a network that an address is of: subnets often have no name. Raises Refused."""
    address = ipaddress.ip_address(ip["ip_address"])
    there = [str(raw["id"]) for raw in resolver.catalog.all("subnet")
            if raw["network_id"] == network and address in ipaddress.ip_network(raw["cidr"])]
    pending = [other for others in resolver.pending.values() for other in others if other.label == "subnet"
            and other.refs.get("network_ref") == network and address in ipaddress.ip_network(other.params["cidr"])]
    found: list[str | Resource] = [*there, *pending]
    if not found:
        raise Refused(f"{one} ({one.place}): no subnet of its network has the address {address}", "export it too")
    return found[0]


def plan_import(resolver: Resolver, settings: Settings, wanted: Sequence[Resource], *,
        has_rules: bool = False) -> list[Reason]:
    """Finds what of the files the destination has already; returns all reasons why the rest cannot be made."""
    reasons, seen, cloud = list[Reason](), dict[Any, Resource](), resolver.catalog.cloud
    for label in IN_FILES:
        for one in (other for other in wanted if other.label == label):
            with collecting(reasons):
                if "name" in one.kind.key.split() and not one.name:
                    raise Refused(f"{one} ({one.place}) has no name", "give it one, in the source or in the file")
                if "block-storage" in (one.kind.service, one.params.get("service")) and not cloud.has_volumes:
                    one.result = "omitted, since this cloud has no Cinder"
                    continue
                if label == "project" and one.name == resolver.moved:
                    one.result = f"omitted, since all goes to {settings.project}"
                    continue
                hidden = resolver.catalog.hidden
                if why := hidden.get(label) or hidden.get(f"{one.params.get('service')} {label}"):
                    raise Refused(f"{one} ({one.place}): what is there is not shown: {why}",
                            "use an admin's credentials")
                one.refs = resolved_refs(resolver, one)
                one.owner = resolver.owner(one)
                if (first := seen.setdefault((label, key_of_wanted(one)), one)) is not one:
                    raise Refused(f"{one} is there twice: {first.place}, and {one.place}", "take one of them out")
                if raw := resolver.existing(one):
                    one.id, one.differences = str(raw["id"]), [*differences_of(one, raw, settings)]
                    one.result = "differs" if one.differences else "equal"
    if has_rules:
        tell_surplus(resolver.catalog, wanted)
    return [*reasons, *refuse_shares(cloud, wanted)]


def tell_surplus(catalog: Catalog, wanted: Sequence[Resource]) -> None:
    """Adds what rules the groups there have that the files do not have: they let more through."""
    known = {one.id for one in wanted if one.label == "security group rule"}
    for group in (one for one in wanted if one.label == "security group" and one.id):
        more = [raw for raw in catalog.all("security group rule")
                if raw["security_group_id"] == group.id and raw["id"] not in known]
        if more:
            group.differences.append(("rules", [{key: raw.get(key) for key in (
                "id", "direction", "ethertype", "protocol", "port_range_min", "port_range_max", "remote_ip_prefix",
                "remote_group_id", "remote_address_group_id", "description")} for raw in more], []))
            group.result = "differs"


def refuse_shares(cloud: Cloud, wanted: Sequence[Resource]) -> Iterator[Reason]:
    """Reasons to refuse by the quotas of projects: a failure in the middle of an import would undo it."""
    needs = Counter((one.owner, one.label) for one in wanted
            if one.kind.service == "network" and one.owner and isinstance(one.owner, str) and not one.id)
    for project in sorted({str(owner) for owner, _ in needs}):
        with ignoring(400, 403, 404):
            told = cloud.ask("show quotas", "network", "GET", f"/quotas/{project}/details.json")["quota"]
            for label in ("network", "subnet", "router", "security group", "security group rule"):
                row = told.get(label.replace(" ", "_"), {"limit": -1})
                if 0 <= row["limit"] < row.get("used", 0) + (need := needs[(project, label)]):
                    yield from refuse_quota([
                        f"{row['used']} of {row['limit']} {label}s are used, {need} more are needed"])


def differences_of(one: Resource, raw: Facts, settings: Settings) -> Iterator[tuple[str, Any, Any]]:
    """What of a resource differs from the file: name, value there, value in the file; null there says nothing."""
    known = {*one.kind.key.split(), *NOT_COMPARED, *(() if settings.provider else PROVIDER)}
    for name in one.kind.columns:
        value, there = one.params.get(name), value_in(one.kind, raw, name)
        if name in known or name not in one.params or (value is None and name != "gateway_ip"):
            continue
        if one.kind.service in ("compute", "network") and one.kind.api(name) not in raw:
            one.omitted += [name] if normal(value) is not None else []
            continue
        if name == "limits":
            known_here = {key for key in value or () if key in (there or {})}
            one.omitted = sorted({*(value or ())} - known_here)
            there, value = ({key: of[key] for key in known_here} for of in (there or {}, value or {}))
        if not agrees(name, there, value):
            yield name, there, value
    for name in one.kind.references:
        there = value_in(one.kind, raw, name)
        if name not in known and name in one.params and not agrees(name, there, one.refs[name]):
            yield name, there, one.params[name]


def value_in(kind: ResourceType, raw: Facts, name: str) -> Any:
    """What the API has for a name in params: of a reference the id, of a gateway what the files have of it."""
    api = kind.api(name)
    found = raw.get(api)
    if found and api == "external_gateway_info":
        return {key: found[key] for key in ("network_id", "enable_snat") if key in found}
    return found


def agrees(name: str, there: Any, value: Any) -> bool:
    """Whether a value there is another one; of a gateway, as far as this one says."""
    if name == "external_gateway_refinfo" and there and value:
        there = {key: there.get(key, one) for key, one in value.items()}
    return bool(normal(there) == normal(value))


def ids_of(value: Any) -> Any:
    """References with the ids of what is there, or was made by now; none is null. Raises MigrenaError as `id_of`."""
    if isinstance(value, list):
        return [ids_of(one) for one in value]
    if isinstance(value, dict):  # that routers translate addresses is so without being asked for, and an admin's
        return {key: ids_of(one) for key, one in value.items() if (key, one) != ("enable_snat", True)}
    return id_of(value) or None if isinstance(value, (str, Resource)) else value


def body_of(one: Resource, settings: Settings, own_project: str) -> dict[str, Any]:
    body, params, kind = dict[str, Any](), one.params, one.kind
    for name, api in kind.columns.items():
        value = params.get(name)
        is_said = normal(value) is not None or (name == "gateway_ip" and name in params)
        if is_said and name not in NOT_SENT and (settings.provider or name not in PROVIDER) and not (
                value is False and name in OFF_BY_DEFAULT):
            body[api] = value
    for name, (api, _) in kind.references.items():
        if (value := one.refs.get(name)) and name not in ("access_refs", "device_ref"):
            body[api] = ids_of(value)
    if kind.service == "network" and (owner := id_of(one.owner)) != own_project:
        body["project_id"] = owner
    if body.get("stateful"):  # as it is without being asked for
        del body["stateful"]
    if one.label == "user":
        body |= {"password": one.password} if one.password else {"enabled": False}
    return body


def id_of(value: str | Resource) -> str:
    """The id of what is there, or was made by now; raises MigrenaError if it was not."""
    if isinstance(value, Resource) and not value.id:
        raise MigrenaError(f"{value} was not made, which is needed")
    return value.id if isinstance(value, Resource) else value


class Scopes:
    """The destination with its user's rights in several projects."""

    def __init__(self, catalog: Catalog, creds: Facts) -> None:
        self.catalog, self._creds, self._clouds = catalog, creds, {catalog.cloud.identity["project"]: catalog.cloud}
        self._opening = threading.Lock()

    def in_project(self, id: str) -> Cloud:
        """The cloud from within a project, for what has no other way to belong to it."""
        with self._opening:
            if id not in self._clouds:
                self._clouds[id] = Cloud(self.catalog.cloud.label, in_project(self._creds, id))
            return self._clouds[id]


@dataclass
class Import:
    """An import under way."""

    settings: Settings
    screen: Screen
    journal: Journal
    undo: Undo
    scopes: Scopes
    wanted: Sequence[Resource]
    images: Mapping[Resource, ImagePlan]
    source: Cloud | None  # where images come from
    has_rules: bool  # whether the files say which rules groups have

    @property
    def cloud(self) -> Cloud:
        return self.scopes.catalog.cloud


def due_of(wanted: Sequence[Resource], label: str) -> list[Resource]:
    return [one for one in wanted if one.label == label and one.result == "to be created"]


def at_once(parallel: int, acts: Sequence[Callable[[], object]], done: Show) -> list[Reason]:
    """Does these, so many at a time; returns why some failed. A signal ends them, once each has its answer."""
    pool, problems = ThreadPoolExecutor(parallel), list[Reason]()
    try:
        with defer_signals():
            asked = [pool.submit(act) for act in acts]
        for number, future in enumerate(asked, 1):
            with collecting(problems):
                result_of(future)
            done(number)
        return problems
    finally:
        with defer_signals():
            pool.shutdown(cancel_futures=True)


def make_all(run: Import) -> None:
    """Makes what the destination lacks, type by type; raises the first error, or with --keep-going goes on."""
    for label in IN_FILES:
        if not (due := due_of(run.wanted, label)):
            continue
        problems = list[Reason]()
        for one in due if label != "project" else ():  # what it needs may not have been made
            with collecting(problems):
                body_of(one, run.settings, "")
                continue
            one.result = "not made"
        parts = [*batches(label, due_of(run.wanted, label))]
        with run.screen.step(f"Create {len(due)} {label}{'s' if len(due) > 1 else ''}."), run.screen.counting(
                len(parts), label) as show:
            problems += at_once(1 if label in ("image", "project") else run.settings.parallel, [
                partial(make_part, run, label, number, part) for number, part in enumerate(parts, 1)], show)
        tell_problems(run, problems)
    for one in run.wanted:  # routers have their interfaces now
        if one.label == "router" and one.result == "created" and one.params.get("routes"):
            change_resource(run.cloud, one.label, one.id, {"routes": one.params["routes"]}, {"routes": None})


def tell_problems(run: Import, problems: Sequence[Reason]) -> None:
    """Raises MigrenaError with what went wrong, or with --keep-going lists it."""
    if problems and not run.settings.keep_going:
        raise MigrenaError.of(problems)
    run.undo.left += [reason.problem for reason in problems]


def batches(label: str, due: Sequence[Resource]) -> Iterator[Sequence[Resource]]:
    """What is made with one request each: of what Neutron makes in bulk as many as it takes, rules of one group."""
    size = BULK if label in ("network", "subnet", "security group", "security group rule") else 1

    def of(one: Resource) -> str:
        return id_of(one.refs["security_group_ref"]) if label == "security group rule" else ""

    def depth(one: Resource) -> int:  # a project's parent is made before it
        return 1 + depth(above) if isinstance(above := one.refs.get("parent_ref"), Resource) else 0

    for _, group in itertools.groupby(sorted(due, key=lambda one: (depth(one), of(one))), key=of):
        together = [*group]
        yield from (together[at : at + size] for at in range(0, len(together), size))


def make_part(run: Import, label: str, number: int, ones: Sequence[Resource]) -> None:
    """Makes some resources of one type with one request, and completes them."""
    ones = [one for one in ones if one.result == "to be created"]  # a new group has rules already
    if not ones:
        return
    bodies = [body_of(one, run.settings, run.cloud.identity["project"]) for one in ones]
    told = [{key: value for key, value in body.items() if key != "password"} for body in bodies]
    keys = [[id_of(part) if isinstance(part, Resource) else part for part in key_of_wanted(one)] for one in ones]
    try:
        with run.journal.act(f"create {label} {number}", kind=label, requests=told, keys=keys) as result:
            try:
                made = MAKERS.get(label, make_by_post)(run, ones, bodies)
            except CloudError as error:
                result["refused"] = error.is_refusal
                raise
            result["ids"] = [str(raw["id"]) for raw in made]
    except MigrenaError as error:
        for one in ones:
            one.result = "not made"
        names = ", ".join(map(str, ones[:3])) + (f" and {len(ones) - 3} more" if ones[3:] else "")
        raise MigrenaError(f"{names}: not made: {error}", error.reasons[0].way_out) from error
    problems = list[Reason]()
    for one, raw in zip(ones, made, strict=True):
        one.id, one.result = str(raw["id"]), "created"
        with collecting(problems):
            complete(run, one, raw)
    if problems:
        raise MigrenaError.of(problems)


def make_by_post(run: Import, ones: Sequence[Resource], bodies: Rows) -> Rows:
    """Makes resources as most APIs do; attributes that this release does not know are omitted, and told."""
    kind = ones[0].kind
    for _ in range(20):
        try:
            what = {kind.many: bodies} if len(bodies) > 1 else {kind.one: bodies[0]}
            told = run.cloud.ask(f"create {kind.label} {ones[0].name}".strip(), kind.service, "POST", kind.path, what)
            return list(told[kind.many]) if len(bodies) > 1 else [told[kind.one]]
        except CloudError as error:
            if error.code not in (400, 403, 404) or not (omitted := unknown_in(kind, bodies, str(error))):
                raise
            for number, key in omitted:
                del bodies[number][key]
                ones[number].omitted.append(key)
    raise AssertionError("each answer names another attribute")


def unknown_in(kind: ResourceType, bodies: Sequence[Facts], said: str) -> list[tuple[int, str]]:
    """Which attributes of which of these the API will not have, by its error message."""
    if not (match := UNKNOWN.search(said)):
        return []
    words = {*re.split(r"\W+", (match["names"] or match["more"] or match["added"] or "").lower())} - {""}
    able = {api for name, api in kind.columns.items() if name not in kind.key.split()}

    def is_meant(key: str, value: Any) -> bool:
        if key == "mtu" and match["mtu"]:
            return int(value) > int(match["mtu"])
        if key == "availability_zone_hints" and match["zone"]:
            return match["zone"] in value
        return bool({key, key.partition(":")[2]} & words)

    return [(number, key) for number, body in enumerate(bodies) for key in body
            if key in able and is_meant(key, body[key])]


def complete(run: Import, one: Resource, raw: Facts) -> None:
    """Sets what a new resource does not take when it is made."""
    cloud = run.cloud
    later = {name: one.params[name] for name in ("tags", "extra_specs") if one.params.get(name)}
    later |= {"access_refs": [*map(id_of, ids)]} if (ids := one.refs.get("access_refs")) else {}
    change_resource(cloud, one.label, one.id, later, dict.fromkeys(later))
    if one.label == "project":
        own = [one["role_id"] for one in run.scopes.catalog.all("role assignment") if one["user_id"] == cloud.user
               and one["project_id"] == cloud.identity["project"]]
        for role in own or cloud.roles:  # by a group perhaps
            path = f"/projects/{one.id}/users/{cloud.user}/roles/{role}"
            cloud.ask(f"get a role in {one}", "identity", "PUT", path)
        run.screen.note(f"The user of the credentials has its roles in {one} too.")
    if one.label == "security group":
        settle_first_rules(run, one, raw.get("security_group_rules") or ())


def settle_first_rules(run: Import, group: Resource, rules: Iterable[Facts]) -> None:
    """Of the rules that every new group has, keeps those of the files; the others are removed if files have rules."""
    mine = {key_of_wanted(one): one for one in run.wanted
            if one.label == "security group rule" and one.refs.get("security_group_ref") is group}
    removed = 0
    for raw in rules:
        if one := mine.get(key_of_raw(run.scopes.catalog, "security group rule", raw)):
            one.id, one.result = str(raw["id"]), "created"
        elif run.has_rules:
            removed += 1
            run.cloud.ask("delete a first rule", "network", "DELETE", f"/security-group-rules/{raw['id']}")
    if removed:
        run.screen.note(f"{group}: {removed} rules that new groups have are removed; the files do not have them.")


Maker = Callable[["Import", Sequence[Resource], Rows], Rows]


def make_interface(run: Import, ones: Sequence[Resource], bodies: Rows) -> Rows:
    """A port with the router's addresses, which the router then gets; a subnet's gateway is asked for by the subnet."""
    one, router = ones[0], id_of(ones[0].refs["device_ref"])
    ips = [(ip["ip_address"], ip["subnet_id"]) for ip in one.refs["fixed_ips_refs"]]
    subnets = [subnet.params if isinstance(subnet, Resource) else run.scopes.catalog.one("subnet", subnet) or {}
            for _, subnet in ips]
    is_gate = len(ips) == 1 and ips[0][0] == subnets[0].get("gateway_ip")
    port = "" if is_gate else str(make_by_post(run, ones, bodies)[0]["id"])
    try:
        told = run.cloud.ask(f"add {one}", "network", "PUT", f"/routers/{router}/add_router_interface", {
            "subnet_id": id_of(ips[0][1])} if is_gate else {"port_id": port})
        return [{"id": told["port_id"]}]
    except CloudError:
        there = run.cloud.networks.all("ports", ("device_id", router))
        if found := [raw for raw in there if {ip["ip_address"] for ip in raw["fixed_ips"]} == {ip for ip, _ in ips}]:
            return found  # the answer to the first attempt was lost
        if port:
            with suppress(CloudError):
                run.cloud.ask("delete a port", "network", "DELETE", f"/ports/{port}")
        raise


def make_key(run: Import, ones: Sequence[Resource], bodies: Rows) -> Rows:
    """A key pair, for another user if these are an admin's credentials; its name is its id."""
    if bodies[0].get("user_id") == run.cloud.user:
        del bodies[0]["user_id"]
    return [{**raw, "id": raw["name"]} for raw in make_by_post(run, ones, bodies)]


def make_assignment(run: Import, ones: Sequence[Resource], bodies: Rows) -> Rows:
    path = ASSIGNMENT.format(**bodies[0])
    run.cloud.ask(f"assign {ones[0]}", "identity", "PUT", f"/projects/{path}")
    return [{"id": path}]


def make_quota(run: Import, ones: Sequence[Resource], bodies: Rows) -> Rows:
    """The limits of a new project that differ from the cloud's own."""
    one, project = ones[0], str(bodies[0]["project_id"])
    set_limits(run, project, one)
    return [{"id": project}]


def set_limits(run: Import, project: str, one: Resource) -> None:
    """Sets a project's quotas in one service; what that does not know is omitted, and told."""
    service, told = str(one.params["service"]), "quota" if one.params["service"] == "network" else "quota_set"
    path = f"{'/quotas' if service == 'network' else '/os-quota-sets'}/{project}"
    there = run.cloud.ask(f"show {one}", service, "GET", path)[told]
    one.omitted = [key for key in one.params["limits"] if key not in there]
    if wanted := {key: value for key, value in one.params["limits"].items() if there.get(key, value) != value}:
        with run.journal.act(f"set limits of {service} {project}", service=service, path=path, one=told, new=wanted,
                was={key: there[key] for key in wanted}):
            run.cloud.ask(f"set {one}", service, "PUT", path, {told: wanted})


def make_group(run: Import, ones: Sequence[Resource], bodies: Rows) -> Rows:
    """A server group, which only the project's own credentials can make."""
    params = ones[0].params
    facts = {"name": params["name"], "policy": params["policy"], "rules": params.get("rules") or {}}
    return [{"id": run.scopes.in_project(id_of(ones[0].owner)).make_server_group(facts)}]


def make_image(run: Import, ones: Sequence[Resource], bodies: Rows) -> Rows:
    cloud = run.scopes.in_project(id_of(ones[0].owner))
    assert run.source
    try:
        return [{"id": carry(run.settings, run.journal, run.undo, (run.source, cloud), run.images[ones[0]])}]
    except MigrenaError:
        delete_carried(cloud, run.journal.path.stem)  # with --keep-going nothing else would
        raise


def make_security_groups(run: Import, ones: Sequence[Resource], bodies: Rows) -> Rows:
    first = [one for one in ones if one.name == DEFAULT_GROUP]
    there = {one: next(raw for raw in run.scopes.in_project(id_of(one.owner)).networks.all("security-groups")
            if raw["name"] == DEFAULT_GROUP and raw["project_id"] == id_of(one.owner)) for one in first}
    rest = [(one, body) for one, body in zip(ones, bodies, strict=True) if one not in there]
    made = make_by_post(run, [one for one, _ in rest], [body for _, body in rest]) if rest else []
    found = there | dict(zip((one for one, _ in rest), made, strict=True))
    return [found[one] for one in ones]


MAKERS: Final[Mapping[str, Maker]] = {
    "router interface": make_interface, "key pair": make_key, "role assignment": make_assignment, "quota": make_quota,
    "server group": make_group, "image": make_image, "security group": make_security_groups}


def change_all(run: Import) -> None:
    """With --update: changes what exists and differs, as far as it can be changed."""
    problems = list[Reason]()
    for one in run.wanted if run.settings.update else ():
        able = {name: value for name, _, value in one.differences if name in (*one.kind.changeable.split(), "rules")}
        if one.result != "differs" or not able:
            continue
        was = {name: there for name, there, _ in one.differences if name in able}
        with collecting(problems):
            if one.label == "quota":
                set_limits(run, id_of(one.refs["project_ref"]), one)
            else:
                refs = {name: ids_of(value) for name, value in one.refs.items() if name in able}
                new = {**able, **refs}
                if "access_refs" in new:  # others keep theirs: the file may know of one project alone
                    new["access_refs"] = sorted({*(was["access_refs"] or ()), *new["access_refs"]})
                with run.journal.act(f"change {one.label} {one.id}", what=one.label, new=new, was=was):
                    change_resource(run.cloud, one.label, one.id, new, was)
            one.result, one.differences = "changed", [row for row in one.differences if row[0] not in able]
    tell_problems(run, problems)


def change_resource(cloud: Cloud, label: str, id: str, new: Facts, was: Facts) -> None:
    kind, what = RESOURCE_TYPES[label], f"change {label} {id}"
    path, body = f"{kind.path}/{id}", dict[str, Any]()
    for name, value in new.items():
        if name == "tags":
            cloud.ask(what, "network", "PUT", f"{path}/tags", {"tags": value or []})
        elif name == "extra_specs":
            specs = f"{path}/{'os-extra_specs' if label == 'flavor' else 'extra_specs'}"
            for key in {*(was[name] or {})} - {*(value or {})}:
                cloud.ask(what, kind.service, "DELETE", f"{specs}/{key}")
            if value:
                cloud.ask(what, kind.service, "POST", specs, {"extra_specs": value})
        elif name == "access_refs":
            now, then = {*(value or ())}, {*(was[name] or ())}
            about, word = ("tenant", "Tenant") if label == "flavor" else ("project", "Project")
            for project in now ^ then:
                act = f"{'add' if project in now else 'remove'}{word}Access"
                with ignoring(*([409] if project in now else [])):  # it has access already
                    cloud.ask(what, kind.service, "POST", f"{path}/action", {act: {about: project}})
        elif name == "rules":  # that the files do not have, or that they had
            for rule in was[name] or ():
                with ignoring(404):
                    cloud.ask(what, "network", "DELETE", f"/security-group-rules/{rule['id']}")
            for rule in value or ():
                with ignoring(409):
                    cloud.ask(what, "network", "POST", "/security-group-rules", {"security_group_rule": {
                        "security_group_id": id, **{key: one for key, one in rule.items()
                            if key != "id" and one not in (None, "")}}})
        elif name == "external_gateway_refinfo":
            body["external_gateway_info"] = ids_of(value)
        else:
            body[kind.api(name)] = value
    if label == "image":
        if refused := cloud.store.describe(id, body):
            raise cloud.error(f"{what}: Glance does not accept {', '.join(refused)}")
    elif body:
        cloud.ask(what, kind.service, "PATCH" if kind.service == "identity" else "PUT", path, {kind.one: body})


def refuse_projects(scopes: Scopes, wanted: Sequence[Resource]) -> Iterator[Reason]:
    """Reasons to refuse where something can only be made with a role in its project."""
    for one in (*due_of(wanted, "server group"), *due_of(wanted, "image")):
        if isinstance(one.owner, str):
            with collecting(problems := list[Reason]()):
                scopes.in_project(one.owner)
            yield from (Reason(f"{one} ({one.place}): {why.problem}", "give the user of the credentials a role there")
                    for why in problems)


def plan_images(call: Call, settings: Settings, cloud: Cloud, wanted: Sequence[Resource],
        reasons: list[Reason]) -> tuple[Cloud | None, dict[Resource, ImagePlan]]:
    """The source and what is to be carried from it; adds reasons why images cannot be."""
    due, plans = due_of(wanted, "image"), dict[Resource, ImagePlan]()
    if not due:
        return None, plans
    source = Cloud("source", credentials("src", settings, call.environment))
    here, there = in_parallel(source.store.all, cloud.store.all)
    for one in due:
        id, digest = (one.data.get("_info") or {}).get("id"), one.params.get("hash_value")
        found = [image for image in here if image.id == id or (digest and image.os_hash == digest)]
        if not found:
            reasons.append(Reason(
                f"{one} ({one.place}): the source has no such image", "take it out, or see --src-cloud"))
            continue
        best = next((image for image in found if image.id == id), found[0])
        plan = replace(plan_image(settings, best, there), name=one.name)
        if plan.there:
            one.id, one.result = plan.there, "equal"
            continue
        plans[one] = replace(plan, source=edited(best, one))
        reasons += [*refuse_image(settings, plans[one], there), *refuse_reading(plans[one], source)]
    return source, plans


def edited(image: Image, one: Resource) -> Image:
    """An image with the properties that the file has for it, which an operator may have edited."""
    said = {api: one.params[name] for name, api in one.kind.columns.items()
            if name in one.params and name not in ("hash_algo", "hash_value", "disk_format", "container_format")}
    properties = one.params.get("properties")
    kept = {key: value for key, value in image.facts.items()
            if properties is None or key in NOT_CARRIED or key in one.kind.columns.values()}
    return Image.of({**kept, **(properties or {}), **said})


def read_passwords(settings: Settings, wanted: Sequence[Resource]) -> None:
    """Gives users the passwords that --passwords has, or --new-passwords, which is written first."""
    import yaml

    users = due_of(wanted, "user")
    if settings.passwords:
        try:
            told = yaml.safe_load(Path(settings.passwords).read_text(encoding="utf-8"))
            known = {str(name): str(word) for name, word in told.items()}
        except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:  # it holds passwords
            raise UsageError(f"{settings.passwords} cannot be read: {type(error).__name__}",
                    "write lines such as NAME: PASSWORD") from None
        for one in users:
            one.password = known.get(one.name, "")
    if settings.new_passwords and users:
        for one in users:
            one.password = one.password or secrets.token_urlsafe(18)
        try:
            with open(settings.new_passwords, "x", encoding="utf-8", opener=PRIVATE) as file:
                yaml.safe_dump({one.name: one.password for one in users}, file)
        except OSError as error:
            raise UsageError(f"{settings.new_passwords} cannot be written: {error}", "name a new file") from error


def rows_of(wanted: Sequence[Resource]) -> Rows:
    return [{"type": one.kind.type, "name": shown_key(one.data), "id": one.id, "result": one.result,
            "omitted": one.omitted, "differences": [
            {"name": name, "there": there, "file": value} for name, there, value in one.differences]}
            for one in wanted]


def tell_import(screen: Screen, wanted: Sequence[Resource], *, always: bool = False) -> None:
    """Shows what is, or was, to be done: counts of equal ones, what differs field by field, what was omitted."""
    say = partial(screen.say, always=always)
    for label in (known for known in IN_FILES if any(one.label == known for one in wanted)):
        counts = Counter(one.result for one in wanted if one.label == label)
        say(f"  {label}s: {', '.join(f'{count} {result}' for result, count in counts.items())}")
        new = [shown_key(one.data) for one in due_of(wanted, label)]
        for line in (*new[:MOST_SHOWN], *([f"and {len(new) - MOST_SHOWN} more"] if new[MOST_SHOWN:] else ())):
            say(f"    + {line}")
    for one in wanted:
        for name, there, value in one.differences:
            if name == "rules":
                for rule in there:
                    words = " ".join(str(word) for key, word in rule.items() if key != "id" and word not in (None, ""))
                    say(f"  {one}: has a rule that the files do not have: {words}")
                continue
            able = name in one.kind.changeable.split()
            say(f"  {one}: {name} is {shorten(json.dumps(there), 80)}, the file has "
                f"{shorten(json.dumps(value), 80)}" + ("" if able else " (cannot be changed)"))
        if one.omitted:
            screen.warn(f"{one}: omitted, since this cloud does not know it: {', '.join(one.omitted)}")


def import_resources(call: Call, settings: Settings, undo: Undo, report: Report, scopes: Scopes,
        wanted: Sequence[Resource], problems: list[Reason], *, has_rules: bool) -> str:
    """Makes what the destination lacks of these, as a run of its own; returns that, or nothing if nothing was made.

    Raises Refused with all reasons before anything is made. A failure removes what was made.
    """
    folder, screen, id, catalog = state_folder(settings, call.environment), undo.screen, new_run(), scopes.catalog
    with ExitStack() as stack:
        if not settings.dry_run:  # before the survey, so that its results stay valid
            await_turn(stack, folder, catalog.cloud, id, screen)
        with screen.timed("Survey"), refusing():
            read_lists(settings, catalog, wanted)
            problems += plan_import(Resolver(catalog, settings, wanted), settings, wanted, has_rules=has_rules)
            source, images = plan_images(call, settings, catalog.cloud, wanted, problems)
            problems += refuse_projects(scopes, wanted)
        if problems:
            raise Refused.of(problems)
        report.resources = rows_of(wanted)
        if settings.dry_run or not any(
                one.result == "to be created" or (settings.update and one.result == "differs") for one in wanted):
            report.result = "planned" if settings.dry_run else "done"
            tell_import(screen, wanted, always=settings.dry_run)
            return ""
        read_passwords(settings, wanted)
        run = Import(settings, screen, begin_import(folder, id, settings, catalog.cloud, wanted), undo, scopes, wanted,
                images, source, has_rules)
        report.run = id
        with run.journal.ending(undo), undo:
            undo.on_failure("keep what was imported" if settings.keep_going else "delete what was imported",
                    lambda: undo_failed(run, id))
            try:
                make_all(run)
                change_all(run)
            finally:
                report.resources = rows_of(wanted)
        report.result = "left" if undo.left else "done"
        tell_import(screen, wanted)
        return id


def read_lists(settings: Settings, catalog: Catalog, wanted: Sequence[Resource]) -> None:
    labels = {of for one in wanted for of in (one.label, *(of for _, of in one.kind.references.values()))}
    catalog.names = {settings.project, *(str((one.params.get(name) or {}).get("name")) for one in wanted
            for name in ("project_ref", "user_ref"))}
    catalog.read([label for label in RESOURCE_TYPES if label in labels | {"project", "domain"}])


def undo_failed(run: Import, id: str) -> None:
    """Deletes what a failed import has made, or with --keep-going says that it is there."""
    if run.settings.keep_going:
        raise Kept("what was imported by then is kept", f"./migrena.py rollback {id} removes it")
    delete_imported(run.cloud, record_of(id, run.journal.entries), run.journal, run.screen, LOST_ANSWER)


def await_turn(stack: ExitStack, folder: Path, cloud: Cloud, id: str, screen: Screen) -> None:
    """Waits until no other import of this machine is under way in a project, and holds others up then."""
    has_told = False
    while True:
        try:
            stack.enter_context(only_run_of(folder, f"import-{cloud.identity['project']}", id))
            return
        except Refused:
            if not has_told:
                screen.note("Waiting: another import into this project is under way.")
            has_told = True
            time.sleep(CLAIM_PAUSE)


def begin_import(folder: Path, id: str, settings: Settings, cloud: Cloud, wanted: Sequence[Resource]) -> Journal:
    """A new journal with its first line: what rollback needs, without secrets."""
    journal = Journal(folder, id)
    files = sorted({one.place.rpartition(", number ")[0] for one in wanted})
    with journal.beginning():
        journal.write("run", job="import", pid=os.getpid(), source=f"import-{cloud.identity['project']}",
                source_name=f"{len(wanted)} resources", name=shorten(", ".join(files), 60), clouds=[cloud.url],
                where=[cloud.identity], settings={"cloud": settings.cloud, "dst_cloud": settings.dst_cloud})
    return journal


def import_files(call: Call, settings: Settings, undo: Undo, report: Report) -> int:
    """The subcommand `import`: makes in the destination what the files have and it lacks."""
    problems, skipped = list[Reason](), list[str]()
    wanted = read_files(settings.files, problems, skipped)
    if skipped:
        undo.screen.warn(f"instances are not imported, ./migrena.py -s copies them: {', '.join(skipped)}")
    with refusing():
        cloud, creds = cloud_of_files(call, settings, "dst")
    cloud.tell = undo.screen.note
    try:
        id = import_resources(call, settings, undo, report, Scopes(Catalog(cloud), creds), wanted, problems,
                has_rules=has_rules_in(settings.files) or any(
                one.label == "security group rule" for one in wanted))
    finally:
        report.api_calls = {cloud.label: cloud.calls}
    if id:
        undo.screen.say(f"./migrena.py rollback {id} removes what it made.")
        if not (settings.json or settings.quiet):
            print(id)
    return 0


def delete_imported(cloud: Cloud, record: RunRecord, journal: Journal, screen: Screen, patience: float) -> None:
    """Deletes what an import has made, the last first, and takes back what it changed. Raises Kept for what is in use.

    Where an answer was lost, what is as the request said is the import's: it was only made because there was none.
    """
    problems, catalog = list[Reason](), Catalog(cloud)
    take_changes_back(catalog, record, problems)
    others = {id for entry in lines_of_runs(journal.path.parent, "done") for id in entry.get("ids", ())}
    made = [(act, id) for act in reversed(record.acts) if act.facts.get("kind")
            for id in act.facts.get("ids") or lost_ids(catalog, act, patience, others)]
    made = [(act, id) for act, id in made if not record.has_done(f"delete {act.facts['kind']} {id}")]
    ours = {id for _, id in made}
    whole = {id for act, _ in made for id, request in zip(act.facts.get("ids", ()), act.facts["requests"], strict=False)
            if request.get("security_group_id") in ours}  # rules go with their groups
    made = [(act, id) for act, id in made if id not in whole]
    for label, group in itertools.groupby(made, key=lambda one: str(one[0].facts["kind"])):
        rows = [*group]
        with screen.counting(len(rows), f"delete {label}") as show:
            problems += at_once(1 if label == "project" else 8, [
                partial(delete_resource, cloud, act, id, ours, journal) for act, id in rows], show)
    delete_carried(cloud, record.run)
    if problems:
        raise Kept.of(list(dict.fromkeys(problems)))


def lost_ids(catalog: Catalog, act: Step, patience: float, others: Collection[str]) -> list[str]:
    """The ids of what a request without an answer has made; it is waited for. What another run made is not."""
    label, limit = str(act.facts["kind"]), time.monotonic() + patience
    if act.facts.get("refused") or act.result == "done" or label in ("image", "quota"):
        return []
    if label == "role assignment":
        return [ASSIGNMENT.format(**request) for request in act.facts["requests"]]
    keys = {json.dumps(key) for key in act.facts.get("keys", ())}
    began = datetime.fromisoformat(act.began) - timedelta(minutes=5)  # clocks differ
    while True:
        now = Catalog(catalog.cloud)
        now.is_whole = True
        found = [str(raw["id"]) for raw in now.all(label) if json.dumps(key_of_raw(now, label, raw)) in keys
                and str(raw["id"]) not in others and (not raw.get("created_at") or datetime.fromisoformat(
                str(raw["created_at"]).replace("Z", "+00:00")) > began)]
        if found or time.monotonic() > limit:
            return found
        time.sleep(CLAIM_PAUSE)


def delete_resource(cloud: Cloud, act: Step, id: str, ours: Collection[str], journal: Journal) -> None:
    """Deletes one resource, unless it is gone; raises Kept if somebody uses it."""
    label = str(act.facts["kind"])
    kind = RESOURCE_TYPES[label]
    if users := users_of(cloud, act, id, ours):
        raise Kept(f"{label} {id} is kept: {users}", f"openstack {label} delete {id}, once nobody needs it")
    path, what = f"{kind.path}/{id}", f"delete {label} {id}"
    if label == "role assignment":
        path = f"/projects/{id}"
    if label == "key pair":
        user = str(act.facts["requests"][0].get("user_id") or "")
        path = f"{kind.path}/{urllib.parse.quote(id)}{f'?user_id={user}' if user else ''}"
    try:
        with journal.act(what, id=id), ignoring(404):
            if label == "router interface":
                router = cloud.ask(what, "network", "GET", path)["port"]["device_id"]
                remove = partial(cloud.ask, what, "network", "PUT", f"/routers/{router}/remove_router_interface",
                        {"port_id": id})
                try:
                    remove()
                except CloudError as error:
                    if router not in ours or "required by one or more routes" not in str(error):
                        raise
                    cloud.ask(what, "network", "PUT", f"/routers/{router}", {"router": {"routes": []}})
                    remove()
            elif label == "image":
                cloud.store.delete(id)
            elif label != "quota":  # it goes with its project
                groups = f"/security-groups?project_id={id}"  # its default group would be left without an owner
                for group in cloud.listed("network", groups, "security_groups") if label == "project" else ():
                    if group["name"] == DEFAULT_GROUP and group.get("project_id") == id:
                        cloud.ask(what, "network", "DELETE", f"/security-groups/{group['id']}")
                cloud.ask(what, kind.service, "DELETE", path)
    except CloudError as error:
        if error.code not in (400, 403, 409):
            raise
        raise Kept(f"{label} {id} is kept: {error}", f"openstack {label} delete {id}, once nobody needs it") from error


def users_of(cloud: Cloud, act: Step, id: str, ours: Collection[str]) -> str:
    """Who uses a resource that the API would delete all the same; nothing if nobody does. Raises CloudError."""
    label = str(act.facts["kind"])
    wholes = {
        "flavor": [("compute", f"/servers?all_tenants=1&flavor={id}", "servers")],
        "image": [("compute", f"/servers?all_tenants=1&image={id}", "servers")],
        "network": [("network", f"/subnets?network_id={id}", "subnets")],
        "security group": [("network", f"/security-group-rules?remote_group_id={id}", "security_group_rules")],
        "project": [("image", "", "images"),
            *(("network", f"/{kind}?project_id={id}", kind) for kind in ("routers", "floatingips")),
            ("network", f"/security-groups?project_id={id}", "security_groups"),
            ("compute", "/os-server-groups?all_projects=True", "server_groups"),
            ("compute", f"/servers?all_tenants=1&project_id={id}", "servers"),
            ("network", f"/ports?project_id={id}", "ports"),
            ("network", f"/networks?project_id={id}", "networks"),
            *((("block-storage", f"/{kind}?all_tenants=1&project_id={id}", kind)
            for kind in ("volumes", "snapshots")) if cloud.has_volumes else ())]}
    for service, path, key in wholes.get(label, ()):
        with ignoring(404):
            found = [one.facts for one in cloud.store.all() if one.facts.get("owner") == id] if (
                service == "image") else cloud.listed(service, path, key)
            found = [one for one in found if (one["id"] not in ours if label != "project" else  # what is left is in use
                one.get("project_id", id) == id and (key, one.get("name")) != ("security_groups", DEFAULT_GROUP))]
            if key == "security_group_rules":  # its own go with it
                found = [one for one in found if one["security_group_id"] not in ours]
            if found:
                return f"it has {len(found)} {key} ({found[0].get('name') or found[0]['id']})"
    if label in ("user", "project"):
        which = "user.id" if label == "user" else "scope.project.id"
        told = cloud.listed("identity", f"/role_assignments?{which}={id}", "role_assignments")
        more = [one for one in told if ASSIGNMENT.format(
            project_id=one.get("scope", {}).get("project", {}).get("id"), user_id=one.get("user", {}).get("id"),
            role_id=one["role"]["id"]) not in ours and one.get("user", {}).get("id") != cloud.user]
        if more:
            return f"somebody gave it {len(more)} more roles"
    if label == "key pair":
        user = str(act.facts["requests"][0].get("user_id") or "")
        pair, mine = cloud.key_pair(id, user), str(act.facts["requests"][0]["public_key"]).strip()
        if pair and pair.public_key.strip() != mine:
            return "it is another one by now"
    if label == "server group" and (group := cloud.server_group(id)) and group["members"]:
        return f"it has {len(group['members'])} instances"
    return ""


def take_changes_back(catalog: Catalog, record: RunRecord, problems: list[Reason]) -> None:
    """Gives resources that an import has changed the values that they had, unless somebody has changed them since."""
    cloud = catalog.cloud
    for act in reversed(record.acts):
        facts = act.facts
        with collecting(problems):
            if act.name.startswith("set limits ") and "was" in facts:
                with ignoring(404):  # with its project
                    there = cloud.ask(act.name, facts["service"], "GET", facts["path"])[facts["one"]]
                    back = {key: value for key, value in facts["was"].items() if there.get(key) == facts["new"][key]}
                    if back:
                        cloud.ask(act.name, facts["service"], "PUT", facts["path"], {facts["one"]: back})
            elif act.name.startswith("change ") and "was" in facts:
                label, id, new = str(facts["what"]), act.name.rpartition(" ")[2], facts["new"]
                raw, kind = catalog.one(label, id) or {}, RESOURCE_TYPES[label]
                now = {name: normal(value_in(kind, raw, name)) for name in new}
                mine = {name for name, value in new.items() if name == "rules" or agrees(
                    name, value_in(kind, raw, name), value)}
                change_resource(cloud, label, id, {name: facts["was"][name] for name in mine}, new)
                if other := [name for name in new if name not in mine and now[name] != normal(facts["was"][name])]:
                    raise Kept(f"{label} {id}: {', '.join(sorted(other))} was changed since, and is kept")


# ---- 16. Copy --------------------------------------------------------

SURROUNDING: Final = (  # what --with-network brings
    "security group", "security group rule", "network", "subnet", "router", "router interface")
STOP_DESTINATION: Final = "Stop destination instance"  # a step; also measures how long Nova takes to stop
POWER_BUTTON: Final = 10.0  # seconds after which Nova presses it again (shutdown_retry_interval)
PATIENCE: Final = 60.0  # seconds that Nova does so (shutdown_timeout), unless told otherwise
START_TAKES: Final = 3.0  # seconds, where Nova has not started the source before
SETTING_UP: Final = 2.0  # seconds of downtime besides Nova and the copy
LONGEST_PAUSE: Final = 60.0  # seconds between passes that gain nothing
LOOK_LIMIT: Final = 20.0  # seconds after which a look at both sides is out of date
LOOKS: Final = 3  # attempts to look at both sides in less than that
LATE_ANSWER: Final = 60.0  # as LOST_ANSWER, for an instance that must be deleted

NO_IMAGE: Final = Image("", "none, it boots from a volume", "active", "", "")
STATE_WAYS: Final = {  # arguments of `openstack server`
    "PAUSED": "unpause", "SUSPENDED": "resume", "SHELVED": "unshelve", "SHELVED_OFFLOADED": "unshelve",
    "RESCUE": "unrescue", "VERIFY_RESIZE": "resize confirm", "ERROR": "set --state active",
}
NO_HOSTS: Final = "these credentials do not show on which host"
DISK_FULL: Final = ("No space left on device", "Read-only file system", "Disk quota exceeded")  # a retry is no use
FLAW_WAYS: Final = {
    "internal snapshots":
        "they would be lost: delete them with qemu-img snapshot -d, or copy a snapshot of the instance",
    "encryption": "its key is not in the disk: carry it as an image with its secret",
    "an external data file": "convert the disk to a plain qcow2 first",
    "the corrupt flag": "repair it with qemu-img check -r all after taking a backup",
    BROKEN: "some data is lost already; repair it with qemu-img check -r all after taking a backup",
}


@dataclass
class SourceFacts:
    """What was found of the source; `problems`: why something is missing."""

    cloud: Cloud | None = None
    server: Server | None = None
    host: Host | None = None
    disks: Mapping[str, Disk] = empty(dict)  # by key; empty if they cannot be read
    volumes: Mapping[str, Volume] = empty(dict)  # those among them, by key
    with_snapshots: Collection[str] = ()  # the ids of those that have some
    ports: Sequence[Port] = ()  # in the order of its interfaces; none if -e names networks
    key: KeyPair | None = None
    server_group: Facts | None = None
    image: Image | None = None
    lacking: Sequence[str] = ()
    problems: list[Reason] = empty(list)

    @property
    def whole(self) -> tuple[Cloud, Server, Host, Mapping[str, Disk]]:
        """What a copy needs; raises Refused if something is missing."""
        if not (self.cloud and self.server and self.host and self.disks):
            raise Refused("the source's disk cannot be read", "check the state of the source instance")
        return self.cloud, self.server, self.host, self.disks


@dataclass
class DestinationFacts:
    """What was found of the destination; `problems`: why there is no cloud."""

    cloud: Cloud | None
    same_name: Sequence[Server] = ()
    flavors: Sequence[Flavor] = ()
    images: Sequence[Image] = ()
    sees_hosts: bool = True
    limits: Mapping[str, int] = empty(dict)
    refused: str = ""  # why -e is not accepted
    volume_types: Collection[str] = ()  # this and the next two: only if the source has volumes
    volume_zones: Collection[str] = ()
    volume_limits: Mapping[str, int] = empty(dict)
    made: Sequence[Server] = ()  # from the source, by earlier runs
    networks: Networks = NO_NETWORKS  # only if the source has ports
    zones: Collection[str] = ()
    key: KeyPair | None = None  # of the credentials' user, with the name of the source's
    server_groups: Mapping[str, Facts] = empty(dict)  # by id
    problems: Sequence[Reason] = ()


def survey_source(settings: Settings, creds: Facts, screen: Screen, stack: ExitStack) -> SourceFacts:
    """Surveys the source instance, its host and its disk; the stack closes connections."""
    found, server = SourceFacts(), None
    with collecting(found.problems):
        found.cloud = cloud = Cloud("source", creds)
        with ignoring(404):
            server = cloud.server(settings.src_uid)
        if not server:
            raise Refused(
                f"source cloud: there is no server {settings.src_uid}", "see: openstack server list --all-projects")
        if settings.run and server.task == "powering-off":  # the resumed run's own stop
            server = cloud.wait(server.id, lambda now: not now.task, lambda now: None)
        found.server = server
        with suppress(*[CloudError] if settings.image else []):  # only for the comparison
            found.image = cloud.store.one(server.image) if server.image else None
        if server.host:
            settings = settings.of("src")
            found.host = host = stack.enter_context(host_of(server, settings, screen))
            found.lacking = tools_lacking(host)
            found.disks = survey_source_disks(host, server, found.lacking, only=settings.chosen)
            survey_volumes(found, cloud, server)
            if not settings.run:  # else before the stop, or when it is read
                for disk in found.disks.values():
                    require_identity(host, disk.top)
                if "nics" not in settings.extra_args and found.disks:
                    found.ports = survey_ports(cloud, server, next(disk.macs for disk in found.disks.values()))
                if server.key and "key_name" not in settings.extra_args:
                    found.key = cloud.key_pair(server.key, str(server.facts.get("user_id") or ""))
                if groups := server.facts.get("server_groups"):
                    found.server_group = cloud.server_group(groups[0])
    return found


def survey_ports(cloud: Cloud, server: Server, macs: Sequence[str]) -> list[Port]:
    """An instance's ports, in the order of these MAC addresses."""
    store = cloud.networks
    told = ports_of(store, server.id)
    by_mac = {one["mac_address"].lower(): one for one in told}
    unknown = [f"port {one['id']} has no interface" for mac, one in by_mac.items()
        if mac not in macs and one.get("binding:vnic_type") != "direct-physical"]
    unknown += [f"interface {mac} has no port" for mac in macs if mac not in by_mac]
    if unknown or len({*macs}) < len(macs):
        raise Refused("Neutron and libvirt do not agree on the source's interfaces: "
            f"{', '.join(unknown) or 'two have one MAC address, and their order is not known'}",
            f"openstack server reboot --hard {server.id}, or -e \"{{'nics': 'none'}}\" goes on without ports")
    if not told:
        return []
    floating = Rows()
    with ignoring(404):  # a cloud without routers
        floating = store.all("floatingips", *(("port_id", one["id"]) for one in told))
    networks = store.by_id("networks", [one["network_id"] for one in told] + [
        ip["floating_network_id"] for ip in floating])
    subnets = store.by_id("subnets", (ip["subnet_id"] for one in told for ip in one["fixed_ips"]))
    groups = store.by_id("security-groups", (id for one in told for id in one.get("security_groups", ())))
    ports = [Port(
        networks[one["network_id"]],
        tuple((ip["ip_address"], subnets[ip["subnet_id"]]["cidr"]) for ip in one["fixed_ips"]),
        tuple(groups[id]["name"] for id in one.get("security_groups", ())),
        tuple(FloatingIp(ip["floating_ip_address"], networks[ip["floating_network_id"]], ip["fixed_ip_address"],
            ip.get("description") or "") for ip in floating if ip["port_id"] == one["id"]), one)
        for one in told]
    return sorted(ports, key=lambda port: macs.index(port.mac) if port.mac in macs else len(macs))


def identified(cloud: Cloud, server: str, disk: Disk, volume: Volume) -> Disk:
    """A disk with what proves that it is this volume; raises HostError if it is smaller."""
    top = disk.top
    if top.size < volume.size * GiB:
        raise HostError(f"{cloud.label} cloud: {volume.label} has {volume.size} GiB, but {top.path} {human(top.size)}",
                CONNECT_IT)
    if top.node.storage["driver"] != "host_device":
        return disk
    return replace(disk, chain=(replace(top, identity=cloud.volumes.connection(volume, server)),))


def survey_volumes(found: SourceFacts, cloud: Cloud, server: Server) -> None:
    """Adds the volumes among an instance's disks; raises Refused unless Nova, Cinder and libvirt agree on them."""
    ids = {key: disk.volume for key, disk in found.disks.items() if disk.volume}
    if unknown := set(ids.values()) - set(server.volumes):
        raise Refused(f"by libvirt volume {', '.join(sorted(unknown))} is attached, but not by Nova",
            f"openstack server reboot --hard {server.id}")
    volumes = {key: cloud.volumes.one(id) for key, id in ids.items()}
    if lost := [ids[key] for key, volume in volumes.items() if not volume]:
        raise Refused(f"source cloud: Cinder does not show volume {', '.join(lost)}", "use an admin's credentials")
    known = {key: volume for key, volume in volumes.items() if volume}
    found.disks = {key: identified(cloud, server.id, disk, known[key]) if disk.volume else disk
        for key, disk in found.disks.items()}
    found.volumes = {key: replace(volume, size=-(-found.disks[key].top.size // GiB))  # some backends round up
        for key, volume in known.items()}
    found.with_snapshots = cloud.volumes.with_snapshots(ids.values()) if ids else ()


def host_name(server: Server, settings: Settings) -> str:
    """An instance's host by the one of its names that is in HOSTS."""
    return server.host if server.host in settings.hosts else server.hypervisor


def host_of(server: Server, settings: Settings, screen: Screen) -> closing[Host]:
    return closing(connect(host_name(server, settings), settings, screen))


def survey_source_disks(host: Host, server: Server, missing: Sequence[str], *, only: Sequence[str]) -> dict[str, Disk]:
    """The source's disks, none if other reasons prevent reading them; those of a stopped one must not be in use."""
    if {"qemu-img", "virsh"} & set(missing) or server.status not in ("ACTIVE", "SHUTOFF"):
        return {}
    path = host.disk_of(server.id)
    try:
        return survey_disks(host, server.id, path, shared=server.status == "ACTIVE", only=only)
    except CommandError as error:
        if not re.search("Failed to get .*lock", error.said):
            raise
        raise HostError(f"{host.name}: a disk is in use although the instance is {server.status}: {error.said}",
            "find out who has it open (virsh list, lsof) and end that first") from error


def network_wanted(settings: Settings, port: Port) -> str:
    name = str(port.network["name"])
    return settings.network.get(port.network["id"], settings.network.get(name, name))


def networks_for(settings: Settings, port: Port, networks: Sequence[Facts]) -> list[Facts]:
    """The destination's networks that a port may be meant for: by id, else by name."""
    wanted = network_wanted(settings, port)
    return [one for one in networks if one["id"] == wanted] or [
        one for one in networks if wanted and one["name"] == wanted]


def survey_networks(settings: Settings, source: SourceFacts, destination: DestinationFacts) -> None:
    """Adds what the destination has for the source's ports."""
    if not (cloud := destination.cloud) or not source.ports:
        return
    store, project = cloud.networks, cloud.identity["project"]
    networks = [one for one in store.all("networks") if (  # an admin is also shown those of other projects
        one.get("project_id") == project or one.get("shared") or one.get("router:external")
        or one["id"] in settings.network.values())]
    subnets, floating = dict[str, Sequence[Facts]](), set[str]()
    taken = dict[tuple[str, str], Facts]()
    for port in source.ports:
        for id in {one["id"] for one in networks_for(settings, port, networks)}:
            subnets[id] = subnets.get(id) or store.all("subnets", ("network_id", id))
            used = [(port.mac, "mac_address", port.mac)] if not settings.new_macs else []
            used += [(ip, "fixed_ips", f"ip_address={ip}") for ip, _ in port.addresses if not settings.new_addresses]
            for what, key, value in used:
                users = store.all("ports", ("network_id", id), (key, value))
                taken |= {(id, what): users[0]} if users else {}
    if settings.floating_ip == "keep":
        floating = {
            ip.address for port in source.ports for ip in port.floating for one in networks
            if one.get("router:external") and one["name"] == ip.network["name"]
            and store.all("ports", ("network_id", one["id"]), ("fixed_ips", f"ip_address={ip.address}"))}
        subnets |= {one["id"]: store.all("subnets", ("network_id", one["id"]))
            for one in networks if one.get("router:external")}
    destination.networks = Networks(networks, subnets, store.all("security-groups", ("project_id", project)), taken,
        store.room(project), floating)


def survey_destination(settings: Settings, creds: Facts) -> DestinationFacts:
    try:
        cloud = Cloud("destination", creds, settings.dst_glance_endpoint)
        is_admin = cloud.sees_hosts()
        return DestinationFacts(
            cloud, cloud.servers_named(settings.dst_name), cloud.flavors(), cloud.store.all(settings.image),
            is_admin, cloud.limits(), cloud.refuses(settings.extra_args),
            made=cloud.made_by("", settings.src_uid, all_tenants=is_admin))
    except CloudError as error:
        if not settings.dst_project or error.code != 401:
            return DestinationFacts(None, problems=error.reasons)
        user, project = (shlex.quote(str(name)) for name in (
            creds.get("username") or creds.get("user_id"), settings.dst_project))
        return DestinationFacts(None, problems=[Reason(
            f"destination cloud: {user} cannot sign in to project {project}: it is not there, the user has no role in "
            "it, or the password is wrong", f"openstack role add --project {project} --user {user} admin")])


def pick_flavor(wanted: str, flavors: Sequence[Flavor], source: Server | None) -> Flavor:
    """The given flavor, else the one with the source's name, else with its sizes; raises Refused."""
    if wanted:
        return pick(wanted, flavors, "flavor", "destination cloud: ", " with -f")
    if not source:
        raise Refused("no flavor can be chosen while the source is unknown", "name one with -f")
    name, sizes = source.flavor.name, source.flavor.vcpus and source.flavor.sizes
    found = [one for one in flavors if one.name == name] or [one for one in flavors if one.sizes == sizes]
    if len(found) == 1:
        return found[0]
    what = f"flavor like the source's {name!r}" if name else "flavor to be matched with the source's, which is gone"
    if not found:
        raise not_found(f"destination cloud: there is no {what}", name, flavors, " with -f")
    raise Refused(f"destination cloud: more than one {what}: {', '.join(f'{one.name} ({one.id})' for one in found)}",
        "give its id with -f")


def pick_image(wanted: str, images: Sequence[Image], source: Image | None) -> Image:
    """The given image, else one with the same digest as the source's; raises Refused."""
    if wanted:
        image = pick(wanted, images, "image", "destination cloud: ", " with -i")
        if image.status != "active":
            raise Refused(
                f"destination cloud: image {image.name!r} is {image.status}, not active", "name another one with -i")
        return image
    if not source:
        raise Refused("the source's image is gone, so none can be matched", "name one with -i")
    name = source.name
    same = [image for image in images if image.status == "active" and image.equals(source)]
    if not same:
        raise not_found(
            f"destination cloud: there is no image with the content of the source's {name!r}", name, images, " with -i")
    return min(same, key=lambda image: (image.is_hidden, image.name != name))


def refuse(settings: Settings, source: SourceFacts, destination: DestinationFacts,
        go_on: Callable[[str], str] = "".format) -> list[Reason]:
    """All reasons to refuse; `go_on`: the commands that continue a run or undo it, "" without a journal here."""
    reasons = [*source.problems, *destination.problems]
    if source.server:
        reasons += refuse_server(source.server, go_on)
    if source.host:
        reasons += refuse_tools(source.host.name, source.lacking, settings, "nbd-server")
    for disk in source.disks.values():
        reasons += (reason for reason in refuse_disk(disk) if reason not in reasons)
    if source.server and source.disks:
        reasons += refuse_volumes(settings, source, source.server, destination)
    if destination.cloud:
        reasons += refuse_destination(settings, source, destination, go_on)
        if destination.networks is not NO_NETWORKS:
            reasons += refuse_networks(settings, source, destination.networks)
        if source.key and destination.key and source.key.fingerprint != destination.key.fingerprint:
            reasons.append(Reason(f"destination cloud: the credentials' user has another key pair {source.key.name!r}",
                "-e \"{'key_name': NAME}\" names another one, or {'key_name': None} none"))
    return reasons


def reasons_from(*rules: tuple[object, str, str]) -> list[Reason]:
    return [Reason(problem, way_out) for holds, problem, way_out in rules if holds]


def next_commands_for(source: str, way: str) -> str:
    return f"if it has ended: {way}" if way else (
        f"its journal is not on this machine; if it has ended: ./migrena.py rollback --run-of {source}")


def refuse_server(server: Server, go_on: Callable[[str], str] = "".format) -> list[Reason]:
    id, status, reason = server.id, server.status, server.lock_reason
    run = server.metadata.get(MARK) or lock_of(server)
    ways = next_commands_for(id, go_on(run))
    was_moved = run and MARK not in server.metadata and " takes its place" in reason
    return reasons_from(
        (status not in ("ACTIVE", "SHUTOFF"), f"the source is {status}; it must be ACTIVE or SHUTOFF",
         f"openstack server {STATE_WAYS[status]} {id}" if status in STATE_WAYS else "bring it to one of these states"),
        (server.task, f"the source has a task: {server.task}", "wait until it ends"),
        (server.locked and lock_of(server) != (run or None), f"the source is locked{reason and f': {reason}'}",
         f"openstack server unlock {id}"),
        (was_moved, f"the source was or is being moved: {reason}",
         f"{ways}; openstack server unlock {id} allows another move"),
        (run and not was_moved, f"run {run} is moving the source, or was interrupted", ways),
        (not server.host, f"source cloud: {NO_HOSTS} the instance is", "use an admin's credentials"))


def refuse_volumes(settings: Settings, source: SourceFacts, server: Server,
        destination: DestinationFacts) -> list[Reason]:
    reasons, seen = list[Reason](), {disk.volume for disk in source.disks.values()}
    if lost := [] if settings.chosen else [id for id in server.volumes if id not in seen]:
        reasons.append(Reason(f"by Nova volume {', '.join(lost)} is attached, but libvirt shows no such disk",
            f"detach it, openstack server reboot --hard {server.id}, or --root-only"))
    if settings.image and ROOT in source.volumes:
        reasons.append(Reason("the source boots from a volume: the new instance has no image", "leave -i out"))
    for volume in source.volumes.values():
        facts, wanted = volume.facts, type_of(settings, volume)
        reasons += reasons_from(
            (facts.get("multiattach"), f"{volume.label} may be attached to several instances",
             f"cinder retype {volume.id} to a type without multiattach, or --root-only goes on without it"),
            (facts.get("encrypted"), f"{volume.label} is encrypted", f"openstack volume set --retype-policy on-demand "
             f"--type TYPE {volume.id} with a type without encryption, or --root-only goes on without it"),
            (volume.status != "in-use" or volume.servers != [server.id],
             f"{volume.label} is {volume.status}, attached to {', '.join(volume.servers) or 'nothing'}",
             "find out what is done with it"),
            (destination.volume_types and wanted and wanted not in destination.volume_types,
             f"destination cloud: there is no volume type {wanted!r}, for {volume.label}",
             f"--volume-type {volume.type}=TYPE; there are: {', '.join(destination.volume_types)}"))
    return reasons + refuse_quota(over_quota(destination.volume_limits, None, source.volumes.values()))


def type_of(settings: Settings, volume: Volume) -> str:
    return settings.volume_type.get(volume.type, volume.type)


def refuse_networks(settings: Settings, source: SourceFacts, there: Networks) -> list[Reason]:
    reasons, of_project = list[Reason](), f" --project {settings.dst_project}" if settings.dst_project else ""
    for port in source.ports:
        kind, way = port.facts.get("binding:vnic_type") or "normal", "-e \"{'nics': 'none'}\" goes on without ports"
        reasons += reasons_from(
            (kind != "normal", f"{port.label} is of the kind {kind}, which belongs to its host's hardware", way),
            (port.facts.get("trunk_details"), f"{port.label} is the parent of a trunk, which is not carried", way))
        found = networks_for(settings, port, there.networks)
        if len(found) == 1:
            reasons += [*refuse_addresses(settings, port, found[0], there), *refuse_floating(settings, port, there)]
        else:
            name, wanted = port.network["name"], network_wanted(settings, port)
            known = ", ".join(sorted({str(one["name"]) for one in there.networks if not one.get("router:external")}))
            reasons += [Reason(f"destination cloud: {len(found)} networks are named {wanted!r}: "
                    f"{', '.join(one['id'] for one in found)}", f"--network {name}=ID") if found else
                    Reason(f"destination cloud: there is no network {wanted!r}, for {port.label}",
                    f"create it, or --network {name}=NAME; there are: {known or 'none'}")]
    for name in dict.fromkeys(groups_wanted(settings, source.ports)):
        if len(ids := groups_named(name, there)) != 1:
            reasons.append(Reason(
                f"destination cloud: {len(ids) or 'no'} security groups of the project are named {name!r}",
                "delete or rename all but one" if ids else f"openstack security group create{of_project} "
                f"{shlex.quote(name)}, with its rules, or others in -e: \"{{'security_groups': ['default']}}\""))
    if 0 <= there.room < len(source.ports):
        reasons += refuse_quota([f"{there.room} more ports are allowed, {len(source.ports)} are needed"])
    used = Counter((one["id"], what, way) for port in source.ports
            for one in networks_for(settings, port, there.networks) for what, way, is_new in (
            (f"MAC {port.mac}", "--new-macs", settings.new_macs),
            *((f"address {ip}", "--new-addresses", settings.new_addresses) for ip, _ in port.addresses))
            if not is_new)
    reasons += [Reason(f"destination cloud: two ports with {what} would be on one network", way)
        for (_, what, way), count in used.items() if count > 1]
    return list(dict.fromkeys(reasons))


def refuse_addresses(settings: Settings, port: Port, network: Facts, there: Networks) -> Iterator[Reason]:
    place, name = "destination cloud: ", network["name"]
    if not settings.new_macs and (user := there.taken.get((network["id"], port.mac))):
        yield Reason(f"{place}MAC {port.mac} is used on network {name} by {described(user)}", "--new-macs")
    for ip, cidr in () if settings.new_addresses else port.addresses:
        subnet = next((one for one in there.subnets.get(network["id"], ()) if one["cidr"] == cidr), None)
        if not subnet:
            yield Reason(f"{place}network {name} has no subnet {cidr}, for {ip} of {port.label}",
                f"openstack subnet create --network {network['id']} --subnet-range {cidr} NAME, "
                "or --new-addresses")
        elif subnet.get("gateway_ip") == ip:
            yield Reason(f"{place}{ip} is the gateway of subnet {subnet['name'] or subnet['id']}", "--new-addresses")
        elif user := there.taken.get((network["id"], ip)):
            yield Reason(f"{place}{ip} is used on network {name} by {described(user)}", "--new-addresses")
    if settings.start_after == "all" and share_wire(port.network, network) and not (
            settings.new_macs and (settings.new_addresses or not port.addresses)):
        yield Reason(f"{port.label} and its copy would run on one wire ({network.get('provider:network_type')}) with "
            "the same addresses", "-a dst starts one of both, or --new-addresses --new-macs")


def described(port: Facts) -> str:
    user = f"{port.get('device_owner') or 'somebody'} {port['device_id']}" if port.get("device_id") else ""
    return f"port {port['id']}" + (f" of {user}" if user else f", which is idle (openstack port delete {port['id']})")


def share_wire(one: Facts, other: Facts) -> bool:
    """Whether two clouds' networks may be one: of the provider's, with the same tag. Overlays end with their cloud."""
    kind = one.get("provider:network_type", "flat")  # only admins are told
    return kind in ("flat", "vlan") and all(
        one.get(f"provider:{key}") == other.get(f"provider:{key}") for key in ("network_type", "segmentation_id"))


def refuse_floating(settings: Settings, port: Port, there: Networks) -> Iterator[Reason]:
    for floating in () if settings.floating_ip == "none" else port.floating:
        ip, name = floating.address, floating.network["name"]
        outside, way = outside_named(name, there), "create it, or --floating-ip none"
        if len(outside) != 1:
            yield Reason(f"destination cloud: {len(outside) or 'no'} external networks are named {name!r}, "
                f"for floating IP {ip}", way)
        elif settings.floating_ip == "keep":
            ranges = [ipaddress.ip_network(one["cidr"]) for one in there.subnets.get(outside[0]["id"], ())]
            if share_wire(floating.network, outside[0]) and not settings.yes:
                yield Reason(f"the routers of both clouds would answer for floating IP {ip}, if network {name} of both "
                    "is one wire", "--yes if it is not; else --floating-ip none, and when all is done "
                    "delete it in the source and create it in the destination")
            elif ip in there.floating:
                yield Reason(f"destination cloud: floating IP {ip} exists already",
                    "openstack floating ip delete, if nobody needs it, or --floating-ip new")
            elif not any(ipaddress.ip_address(ip) in one for one in ranges):
                yield Reason(f"destination cloud: network {name} has no subnet with floating IP {ip}",
                    "--floating-ip new, or none")


def outside_named(name: str, there: Networks) -> list[Facts]:
    return [one for one in there.networks if one["name"] == name and one.get("router:external")]


def groups_wanted(settings: Settings, ports: Iterable[Port]) -> list[str]:
    secured = [port for port in ports if port.facts.get("port_security_enabled", True)]
    return [name for port in secured for name in settings.extra_args.get("security_groups", port.groups) or ()]


def groups_named(name: str, there: Networks) -> list[str]:
    return [one["id"] for one in there.groups if name in (one["id"], one["name"])]


def plan_port(settings: Settings, port: Port, there: Networks, run: str) -> PortPlan:
    """What the destination's Neutron is asked for, for a port without reasons to refuse."""
    facts, (network,) = port.facts, networks_for(settings, port, there.networks)
    subnets, mark = {one["cidr"]: one for one in there.subnets[network["id"]]}, f"{MADE}={run} {port.id}"
    request = {"network_id": network["id"], "name": facts.get("name") or "", "description": mark,
            "admin_state_up": facts.get("admin_state_up", True), "security_groups": [
            id for name in groups_wanted(settings, [port]) for id in groups_named(name, there)]}
    if not settings.new_macs:
        request["mac_address"] = facts["mac_address"]
    if not (settings.new_addresses and port.addresses):
        request["fixed_ips"] = [{"subnet_id": subnets[cidr]["id"]} | (
            {} if {"slaac", "dhcpv6-stateless"} & {  # addresses follow from the MAC address
                subnets[cidr].get("ipv6_address_mode"), subnets[cidr].get("ipv6_ra_mode")} else {"ip_address": ip})
            for ip, cidr in port.addresses]
    if "port_security_enabled" in network:
        request["port_security_enabled"] = facts.get("port_security_enabled", True)
    if pairs := facts.get("allowed_address_pairs"):
        request["allowed_address_pairs"] = [{key: value for key, value in pair.items() if not (
            settings.new_macs and key == "mac_address" and value.lower() == port.mac)} for pair in pairs]
    if options := facts.get("extra_dhcp_opts"):
        request["extra_dhcp_opts"] = options
    later = {"description": facts.get("description") or ""}
    if facts.get("dns_name"):  # Nova accepts no other than the instance's hostname when it attaches the port
        later["dns_name"] = facts["dns_name"]
    fixed = {ip for ip, _ in port.addresses if "." in ip and not settings.new_addresses}
    floating = [{"later": ip.description, "request": {
        "floating_network_id": outside_named(ip.network["name"], there)[0]["id"], "description": f"{mark} {ip.address}",
        **({"floating_ip_address": ip.address} if settings.floating_ip == "keep" else {}),
        **({"fixed_ip_address": ip.fixed} if len(fixed) > 1 else {})}}
        for ip in port.floating if settings.floating_ip != "none"]
    return PortPlan(port.id, network["name"], request, later, tuple(facts.get("tags") or ()), floating)


def automatic_address(cidr: str, mac: str) -> str:
    """The address in a subnet that follows from a MAC address (EUI-64)."""
    first, *rest = (int(part, 16) for part in mac.split(":"))
    host = bytes([first ^ 2, *rest[:2], 0xFF, 0xFE, *rest[2:]])
    return str(ipaddress.ip_network(cidr)[int.from_bytes(host, "big")])


@dataclass
class Carried:
    """How the source's attributes are carried: arguments for Nova's create, what is made first, and the plan's rows."""

    extra: dict[str, Any] = empty(dict)
    wanted: list[Wanted] = empty(list)
    rows: list[Attribute] = empty(list)

    def add(self, name: str, here: str, there: str = "", *, is_new: bool = False) -> None:
        """A row; without `there` the attribute is left behind."""
        self.rows.append(Attribute(name, here, there, "new" if is_new else "kept" if there else "left behind"))


def carry_attributes(settings: Settings, source: SourceFacts, destination: DestinationFacts, server: Server) -> Carried:
    """How the source's attributes are carried, as far as -e does not name others."""
    carried, facts, text = Carried(), server.facts, server.facts.get("user_data")
    hostname = str(facts.get("hostname") or "")
    if hostname == hostname_for(settings.dst_name):  # Nova makes it of the name
        hostname = ""
    meta = {key: value for key, value in server.metadata.items() if not key.startswith("migrena:")}
    own: dict[str, tuple[Any, str]] = {  # values, and what is shown of them: no secrets
        "description": (facts.get("description"), str(facts.get("description"))),
        "meta": (meta, ", ".join(meta)), "tags": (facts.get("tags"), ", ".join(facts.get("tags") or ())),
        "hostname": (hostname, hostname),
        "userdata": (base64.b64decode(text) if text else None, f"{len(text or '') * 3 // 4} bytes"),
        "availability_zone": (facts.get("availability_zone"), str(facts.get("availability_zone")))}
    for name, (value, shown) in own.items():
        is_there = destination.cloud and destination.cloud.takes(name) and (
            name != "availability_zone" or value in destination.zones) and (
            name != "hostname" or re.fullmatch("[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9]", hostname))
        if name in settings.extra_args:
            carried.add(name, shown if value else "", "as -e says", is_new=True)
        elif value:
            if is_there and (name != "availability_zone" or len(destination.zones) > 1):  # else it need not be named
                carried.extra[name] = value
            carried.add(name, shown, shown if is_there else "")
    if facts and "user_data" not in facts:
        carried.add("userdata", "(not shown by Nova)")
    carry_key(settings, source, destination, carried)
    carry_group(settings, source, destination, carried)
    return carried


def hostname_for(name: str) -> str:
    """What Nova makes of a name (see sanitize_hostname there)."""
    kept = name.encode("latin-1", "ignore").decode("latin-1")[:63]
    return re.sub(r"[^\w.-]+", "", re.sub("[ _.]", "-", kept)).lower().strip(".-")


def carry_key(settings: Settings, source: SourceFacts, destination: DestinationFacts, carried: Carried) -> None:
    """Adds the key pair, which is made for the user of the destination's credentials if it is missing."""
    if not (name := source.server.key if source.server else ""):
        return
    if "key_name" in settings.extra_args:
        carried.add("key_name", name, "as -e says", is_new=True)
        return
    if source.key:
        carried.extra["key_name"] = name
        carried.wanted += [] if destination.key else [Wanted("key pair", asdict(source.key))]
    carried.add("key_name", name, name if source.key else "", is_new=bool(source.key and not destination.key))


def carry_group(settings: Settings, source: SourceFacts, destination: DestinationFacts, carried: Carried) -> None:
    """Adds the server group: that of the same name and policy, or a new one."""
    hints = settings.extra_args.get("scheduler_hints") or {}
    if not (group := source.server_group):
        return
    if "group" in hints:
        carried.add("server_group", str(group["name"]), "as -e says", is_new=True)
        return
    wanted = {key: group[key] for key in ("name", "policy", "rules")}
    same = [id for id, one in destination.server_groups.items() if {**one, **wanted} == one]
    carried.extra |= {"scheduler_hints": {**hints, "group": same[0]}} if same else {}
    carried.wanted += [] if same else [Wanted("server group", wanted)]
    what = f"{group['name']} ({group['policy']})"
    carried.add("server_group", what, what, is_new=not same)


def refuse_tools(host: str, lacking: Sequence[str], settings: Settings, nbd_tool: str) -> list[Reason]:
    needed = (*NEEDED, nbd_tool) if settings.transport == "nbd" else NEEDED
    old = [Reason(f"{host}: {tool} or later is needed", "upgrade it") for tool in lacking if " " in tool]
    return old + [Reason(f"{host}: {tool} is missing", "install {} (Debian: {}, RPM: {})".format(tool, *PACKAGES[tool]))
        for tool in needed if tool in lacking]


def refuse_disk(disk: Disk) -> list[Reason]:
    top = disk.top
    return [Reason(f"{image.path} has {flaw}", FLAW_WAYS[flaw])
            for image in disk.chain for flaw in image.flaws] + reasons_from(
        (disk.has_tpm, "the source has a TPM, whose secrets are not copied",
         "move what it protects first, then remove hw:tpm_version"),
        (top.format not in ("qcow2", "raw"), f"{top.path} is {top.format}; only qcow2 and raw can be copied", ""),
        (top.storage and top.format != "raw", f"{top.path} is {top.format}; only files may be that", ""))


def refuse_destination(settings: Settings, source: SourceFacts, destination: DestinationFacts,
        go_on: Callable[[str], str] = "".format) -> list[Reason]:
    reasons = list[Reason]()
    for one in destination.same_name:
        run, taken = one.metadata.get(MADE), f"destination cloud: the name {settings.dst_name!r} is taken by {one.id}"
        reasons.append(Reason(f"{taken}, made by run {run}",
                next_commands_for(one.metadata.get(ORIGIN, settings.src_uid), go_on(run)))
                if run else Reason(taken, "choose another one with -d"))
    reasons += [Reason(f"destination cloud: {one.name} {one.id} ({one.status}) was made from this source by run "
            f"{one.metadata.get(DONE) or one.metadata.get(MADE)}",
            "undo that run or delete the instance; --yes makes another one anyway")
            for one in destination.made if not settings.yes and one not in destination.same_name]
    reasons += reasons_from(
        (destination.refused, f"destination cloud: -e: {destination.refused}", "leave it out"),
        ("nics" not in settings.extra_args and destination.cloud and not destination.cloud.takes("nics"),
         "destination cloud: Nova is older than 2.37, and makes no instance without networks", "name some: nics in -e"),
        (not destination.sees_hosts, f"destination cloud: {NO_HOSTS} an instance is", "use an admin's credentials"))
    flavor = image = None
    with collecting(reasons):
        flavor = pick_flavor(settings.flavor, destination.flavors, source.server)
    with collecting(reasons):
        if source.cloud and (carried := image_to_carry(settings, source, destination)):
            image = carried.source
            reasons += (*refuse_image(settings, carried, destination.images), *refuse_reading(carried, source.cloud))
        elif settings.image or (source.server and source.server.image):
            image = pick_image(settings.image, destination.images, source.image)
    if image and source.image and not settings.ignore_properties:
        reasons += [Reason(f"image {image.name!r} has {what} of the source's: the guest may not boot",
            "name another one with -i, or --ignore-properties")
            for what, is_fatal in image.differs(source.image) if is_fatal]
    if flavor:
        reasons += refuse_flavor(settings, flavor, image, source)
        reasons += refuse_quota(over_quota(destination.limits, flavor))
    return reasons


def refuse_flavor(settings: Settings, flavor: Flavor, image: Image | None, source: SourceFacts) -> Iterator[Reason]:
    server, size = source.server, source.disks[ROOT].top.size if source.disks and ROOT not in source.volumes else 0
    for what, is_less in flavor.differs(server.flavor) if server and not settings.flavor else ():
        if is_less:
            yield Reason(
                f"flavor {flavor.name} of the destination is smaller than the source's: {what}", "name one with -f")
    if server and flavor.ephemeral < server.flavor.ephemeral and not settings.chosen:
        yield Reason(f"flavor {flavor.name} has {flavor.ephemeral} GiB for ephemeral disks, the source's has "
            f"{server.flavor.ephemeral} GiB", "name a larger one with -f, or --root-only goes on without them")
    if 0 < flavor.disk * GiB < size:
        yield Reason(f"flavor {flavor.name} has a disk of {flavor.disk} GiB, the source's has {human(size)}",
            "name a larger one with -f")
    if not flavor.disk and server and image and image.disk_size < size and (image.disk_size or server.flavor.disk):
        yield Reason(f"flavor {flavor.name} has no disk size, and image {image.name!r} has {human(image.disk_size)} "
            f"or no known size; the source's disk has {human(size)}", "name a larger flavor with -f")


def image_to_carry(settings: Settings, source: SourceFacts, destination: DestinationFacts) -> ImagePlan | None:
    """With --copy-image, the source's image if the destination lacks it."""
    if not settings.copy_image or settings.image or not source.image:
        return None
    plan = plan_image(settings, source.image, destination.images)
    return None if plan.there else plan


def already_there(settings: Settings, destination: DestinationFacts) -> Server | None:
    return next((one for one in destination.same_name
        if one.metadata.get(ORIGIN) == settings.src_uid and DONE in one.metadata), None)


@dataclass(frozen=True)
class Plan:
    """What will be done."""

    run: str
    server: Server
    disks: Mapping[str, Disk]
    flavor: Flavor
    image: Image  # without an id if there is none yet, or none at all: the root disk is a volume
    left_behind: tuple[str, ...]
    was_running: bool = False
    carried: ImagePlan | None = None  # the image, if it must be carried first
    extra: Facts = empty(dict)  # arguments for Nova's create
    wanted: Sequence[Wanted] = ()  # what is made for them first
    ports: Sequence[PortPlan] = ()
    attributes: Sequence[Attribute] = ()
    volumes: Mapping[str, Volume] = empty(dict)  # the source's, by key
    requests: Mapping[str, Facts] = empty(dict)  # what Cinder is asked for instead of them
    with_snapshots: Collection[str] = ()  # the ids of those that have some

    @property
    def root(self) -> Disk:
        return self.disks[ROOT]

    @property
    def may_copy_file(self) -> bool:
        """Whether the root disk's file itself may be copied, not what the guest sees of it."""
        return self.root.top.is_file and ROOT not in self.requests

    def marks(self, key: str) -> dict[str, str]:
        """An instance's metadata during the run; `key`: MARK or MADE."""
        return {key: self.run, WAS: "ACTIVE" if self.was_running else "SHUTOFF"}


def make_plan(settings: Settings, source: SourceFacts, destination: DestinationFacts, run: str) -> Plan:
    _, server, _, disks = source.whole
    moved = {disk.volume for disk in disks.values()} | {disk.file_name for disk in disks.values()}
    left = () if not settings.chosen else (
        *(f"volume {id}" for id in server.volumes if id not in moved),
        *(f"ephemeral disk {name}" for name in ephemeral_among(disks[ROOT].beside) if name not in moved))
    carried_image, flavor = image_to_carry(settings, source, destination), pick_flavor(
        settings.flavor, destination.flavors, server)
    image = NO_IMAGE if ROOT in source.volumes else replace(
        carried_image.source, id="") if carried_image else pick_image(
            settings.image, destination.images, source.image)
    carried = carry_attributes(settings, source, destination, server)
    extra = {"nics": "none", **made_with(server, disks), **settings.extra_args, **carried.extra}
    ports = [plan_port(settings, port, destination.networks, run) for port in source.ports]
    left += tuple(f"{one.name} {one.here}" for one in carried.rows if one.fate == "left behind")
    left += tuple(f"floating IP {ip.address} of {port.label}" for port in source.ports for ip in port.floating
        if settings.floating_ip == "none")
    left += tuple(f"the {what} of {port.label}" for port in source.ports for what, key in (
        ("QoS policy", "qos_policy_id"), ("DNS domain", "dns_domain")) if port.facts.get(key))
    left += tuple(f"the disabled port security of {port.label}" for port, made in zip(source.ports, ports, strict=True)
        if port.facts.get("port_security_enabled") is False and "port_security_enabled" not in made.request)
    requests = {key: request_for(settings, volume, run, destination) for key, volume in source.volumes.items()}
    return Plan(run, server, disks, flavor, image, left, server.status == "ACTIVE", carried_image, extra,
        carried.wanted, ports, carried.rows, source.volumes, requests, source.with_snapshots)


def request_for(settings: Settings, volume: Volume, run: str, destination: DestinationFacts) -> Facts:
    """What Cinder is asked for, to have a volume like this one in the destination."""
    zone = volume.facts.get("availability_zone")
    marks = {MADE: run, ORIGIN: volume.id}
    facts = {"name": volume.name, "description": volume.facts.get("description"),
        "volume_type": type_of(settings, volume),
        "availability_zone": zone if zone in destination.volume_zones else ""}
    return {"size": volume.size, **{key: value for key, value in facts.items() if value}, "metadata": marks | {
        key: value for key, value in volume.metadata.items()  # two are Cinder's own
        if not key.startswith("migrena:") and key not in ("readonly", "attached_mode")}}


def made_with(server: Server, disks: Mapping[str, Disk], volumes: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Arguments for Nova's create that make disks like these, with volumes by key; none for those of the flavor."""
    sizes = [-(-disk.top.size // GiB) for key, disk in disks.items() if key != ROOT and not disk.volume]
    blank = [{"source_type": "blank", "destination_type": "local", "boot_index": -1, "delete_on_termination": True,
        "volume_size": size} for size in sizes]
    attached = [{"source_type": "volume", "destination_type": "volume", "uuid": id,
            "boot_index": 0 if key == ROOT else -1, "disk_bus": disks[key].bus,
            "delete_on_termination": disks[key].volume in server.deleted_with}
            for key, id in (volumes or {}).items()]
    mapping = [*(blank if len(blank) > 1 else ()), *attached]
    return ({"config_drive": True} if server.config_drive else {}) | (
        {"block_device_mapping_v2": sorted(mapping, key=lambda one: one["boot_index"] != 0)} if mapping else {})


@dataclass
class Report:
    """The report of --json: sizes in bytes, durations in seconds."""

    run: str = ""
    result: str = "failed"
    source: dict[str, Any] = empty(dict)
    destination: dict[str, Any] = empty(dict)
    copy: dict[str, Any] = empty(dict)
    started: list[str] = empty(list)
    downtime_seconds: float | None = None
    answer_seconds: float | None = None  # from the destination's start, with --await
    seconds: dict[str, float] = empty(dict)
    api_calls: dict[str, int] = empty(dict)  # by cloud
    ssh_commands: dict[str, int] = empty(dict)  # by host
    images: list[dict[str, object]] = empty(list)  # of `image`: the result for each
    resources: Rows = empty(list)  # of `export` and `import`: the same
    moves: list[dict[str, object]] = empty(list)  # of `live-migrate`: the same
    ports: Rows = empty(list)  # of a plan, in the order of the instance's interfaces
    attributes: list[dict[str, str]] = empty(list)  # of a plan
    warnings: list[str] = empty(list)
    left_behind: list[str] = empty(list)  # parts of the instance that are not copied: volumes etc.
    not_undone: list[str] = empty(list)
    error: list[dict[str, str]] = empty(list)


def reported(cloud: Cloud, server: Server) -> dict[str, object]:
    return {"cloud": cloud.url, "id": server.id, "name": server.name, "host": server.hypervisor,
        "flavor": server.flavor}


@dataclass
class Earlier:
    """An interrupted run: its journal, and what was found of its destination."""

    record: RunRecord
    seen: Seen = Seen()
    in_place: Collection[str] = ()  # the keys of the disks whose copy is swapped in
    cloud: Cloud | None = None
    problems: list[Reason] = empty(list)

    @property
    def is_in_place(self) -> bool:
        return set(self.in_place) >= (self.record.disks.keys() or {ROOT})


@dataclass(frozen=True)
class Run:
    """A run in execution: what its steps share."""

    settings: Settings
    screen: Screen
    journal: Journal
    undo: Undo
    report: Report
    plan: Plan
    source: Cloud
    destination: Cloud
    source_host: Host
    earlier: Earlier | None = None
    looking: threading.Lock = field(default_factory=threading.Lock)  # the clouds' clients are for one thread

    @property
    def record(self) -> RunRecord:
        return record_of(self.plan.run, self.journal.entries)

    @property
    def made(self) -> str:
        """The new instance's id, empty until Nova's answer."""
        return self.record.destination or (self.earlier.seen.id if self.earlier else "")

    @property
    def is_in_place(self) -> bool:
        """Whether an earlier process has swapped the copy in."""
        return bool(self.earlier and self.earlier.is_in_place)

    @property
    def keeps_destination(self) -> bool:
        """Whether a failure leaves the destination as it is: it has a seed, or has run with the copy."""
        return self.record.is_seed or any(act.name == "await answer" for act in self.record.recent)

    def label(self, key: str) -> str:
        """What a line about a disk begins with; nothing if it is the only one."""
        return f"{key}: " if len(self.plan.disks) > 1 else ""

    def changed(self, server: Server) -> None:
        self.screen.status(f"Current status: {server.status} {server.task}")


def situation_now(run: Run, made: str = "", *, with_disk: bool = False, is_patient: bool = True) -> Situation:
    """Both sides of a run as they are now, on request with the source's disk."""
    for _ in range(LOOKS):
        began, record = time.monotonic(), run.record
        source = see(run.source, run.plan.server.id, record.source_request, is_patient=is_patient)
        if with_disk and source.server:
            nodes = {key: disk.top.node for key, disk in run.plan.disks.items()}
            source = replace(source, disk=disk_now(run.source_host, nodes, record))
        destination = see(run.destination, made or run.made, record.destination_request, is_patient=is_patient)
        if (took := time.monotonic() - began) <= LOOK_LIMIT or source.unseen or destination.unseen:
            break
    else:  # the first result is out of date
        source = Seen(source.id, unseen=f"looking at both clouds and hosts took {duration(took)}, {LOOKS} times")
    return situation(record, source, destination, run.is_in_place)


def gate(run: Run, act: Act, *, is_live: bool = False, is_held: bool = False) -> Situation:
    """Looks at both sides now; if an act must not be done, raises FinalError, or Kept once the copy is proven."""
    after = run.settings.start_after
    with run.looking:
        now = situation_now(run, with_disk=act in (Act.SWAP, Act.START_DESTINATION), is_patient=not is_held)
    asked = Asked(run.settings.yes, after == "all", after in ("all", "src"), is_live, is_held)
    allow(act, now, asked, Kept if now.stage >= Stage.PROVEN else FinalError)
    return now


def asked_in_undo(run: Run) -> Asked:
    """What the operator allows while a failed run is undone; --yes excludes a destination that the run has started."""
    return Asked(run.settings.yes and stage_of(run.record) < Stage.STARTED, run.settings.start_after == "all")


@contextmanager
def keeping_proven(run: Run) -> Iterator[None]:
    """A scope that turns an API outage into Kept once the copy is proven."""
    try:
        yield
    except CloudError as error:
        if not error.is_temporary or stage_of(run.record) < Stage.PROVEN:
            raise
        raise Kept(f"{error}; the copy is complete and proven, and both instances are kept as they are",
            f"./migrena.py resume {run.plan.run} completes the move, "
            f"./migrena.py rollback {run.plan.run} undoes it") from error


def execute_or_undo(run: Run) -> int:
    """Executes the run, undoes it if it fails; returns the exit code."""
    run.source.tell = run.destination.tell = run.screen.note
    try:
        ending = run.journal.ending(run.undo, "seeded" if run.settings.seed else "done")
        with ending, ExitStack() as stack, run.undo, keeping_proven(run):
            stack.enter_context(run.source_host.private_folder(run.plan.run))  # shows other machines that it is active
            id = execute(run, stack)
    except (UsageError, Refused) as error:  # too late to count as a refusal
        if isinstance(error, Refused) and not run.earlier:
            raise
        raise MigrenaError.of(error.reasons) from error
    finally:
        run.report.api_calls = {cloud.label: cloud.calls for cloud in (run.source, run.destination)}
    run.report.result = "left" if run.undo.left else "seeded" if run.settings.seed else "done"
    if not (run.settings.json or run.settings.quiet):
        print(id)
    return 0


def execute(run: Run, stack: ExitStack) -> str:
    """Executes the plan, but for steps that an earlier process of the run has done; returns the new instance's id."""
    began, plan, cloud = time.monotonic(), run.plan, run.destination
    claim_source(run)
    new = ensure_destination(run)
    host = connect_destination(run, new, stack)
    with DiskLocks(plan.run) as locks:
        if not run.is_in_place:
            began = copy_and_swap(run, host, new, locks)
            if run.settings.seed:
                return new.id
        elif ((source := situation_now(run).source).is_idle and not source.is_locked_by(plan.run)
                and run.settings.start_after in ("all", "dst")):
            stop_source(run, new)  # somebody unlocked it: lock it again before the destination is started
        is_over = new.is_running and run.record.has_done("mark destination done")  # the source may run again, too
        arrived = new if is_over else start_named(run, "dst", new.id)
        if run.record.was_running:
            stopped = run.record.stopped_at if run.earlier else None
            elapsed = (datetime.now(timezone.utc) - stopped).total_seconds() if stopped else time.monotonic() - began
            run.report.downtime_seconds = round(elapsed, 2)
    if arrived and run.settings.answers and not is_over:
        with suppress(Kept):  # tried again later
            lead_floating_ips(run)
        await_answer(run, arrived)
    with run.journal.act("mark destination done", server=new.id):
        cloud.mark(new.id, {DONE: plan.run, ORIGIN: plan.server.id})  # somebody may have removed them
        cloud.unmark(new.id, plan.run, MADE)
    run.undo.attempt(f"unlock destination {new.id}", lambda: release_destination(run, new.id))
    for id in run.record.made("volume").values():
        run.undo.attempt(f"mark volume {id} done", partial(cloud.volumes.mark, id, {DONE: plan.run}, MADE))
    run.undo.attempt("lead the floating IPs to the new ports", partial(lead_floating_ips, run))
    run.undo.attempt("take the marks off the ports", partial(finish_ports, cloud, run.record))
    run.undo.attempt(f"give source {plan.server.id} back", lambda: release_source(run, arrived))
    kept = [str(disk.job["kept"]) for disk in run.record.disks.values() if disk.job]
    run.undo.attempt(f"remove {host.name}:{' '.join(kept)}", partial(host.run, "rm", "-f", "--", *kept))
    return new.id


def has_answered(cloud: Cloud, server: Server, how: str) -> bool:
    """Whether an instance that was started answers; libvirt begins its console anew at a start."""
    kind, _, what = how.partition(":")
    if kind == "console":
        with suppress(CloudError):  # asked again soon
            return bool(re.search(what, cloud.console(server.id)))
        return False
    addresses = [str(one["addr"]) for known in server.facts.get("addresses", {}).values() for one in known]
    if kind == "tcp":
        for address in addresses:
            with suppress(OSError), socket.create_connection((address, int(what)), timeout=3):
                return True
        return False
    about = {"INSTANCE_ID": server.id, "INSTANCE_NAME": server.name, "INSTANCE_ADDRESSES": " ".join(addresses)}
    try:
        done = subprocess.run(shlex.split(what), env=os.environ | about, stdin=subprocess.DEVNULL, timeout=30,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    except (subprocess.TimeoutExpired, OSError):
        return False
    return not done.returncode


def await_answer(run: Run, server: Server) -> None:
    """Waits until the destination answers in every way asked for; else stops it, gives the source back, raises Kept."""
    settings, began, open_ways = run.settings, time.monotonic(), list(run.settings.answers)
    with run.screen.step("Wait for the answer of the destination instance."):
        with run.journal.act("await answer", server=server.id, ways=open_ways) as result:
            for _ in run.destination.polls():
                server = run.destination.server_retrying(server.id)
                run.changed(server)
                open_ways = [how for how in open_ways if not has_answered(run.destination, server, how)]
                waited = time.monotonic() - began
                if not open_ways or waited > settings.await_timeout or not (server.is_running or server.task):
                    break
            result["missing"] = open_ways
        if not open_ways:
            run.report.answer_seconds = round(waited, 2)
            run.screen.note(f"It answers, {duration(waited)} after its start.")
            return
        run.screen.note(f"No answer: {', '.join(open_ways)}. The instance is {server.status} after {duration(waited)}.")
    take_back(run, server.id, f"no answer within {duration(waited)} ({', '.join(open_ways)}), and was {server.status}")


def stop_destination(run: Run, id: str) -> None:
    """Locks the destination and stops it; the journal then knows since which request."""
    with run.journal.act("stop destination", server=id) as result:
        locked = run.destination.lock(id, f"{LOCKED_BY}{run.plan.run}")
        result["request"] = run.destination.stop(id, run.changed) or locked


def take_back(run: Run, id: str, why: str) -> NoReturn:
    """Stops a destination without an answer and gives the source back, if both may be done; always raises Kept."""
    problems, source, began = list[Reason](), run.plan.server.id, run.record.stopped_at
    told = Reason(f"the destination {id} gave {why}", f"{run.record.cut_over} sends what has changed, and tries again; "
        f"./migrena.py rollback {run.plan.run} deletes it")
    try:
        now = situation_now(run)
        if now.source.is_gone:
            raise Kept(f"the source {source} is gone: the destination is left as it is")
        allow(Act.GIVE_BACK, replace(now, destination=Seen()), Asked(run.settings.yes))  # it is stopped by then
        with run.screen.step("Stop destination instance."):
            allow(Act.STOP_DESTINATION, now, Asked(yes=True))
            stop_destination(run, id)
            with collecting(problems):
                lead_floating_ips(run, back=True)
        with run.screen.step("Start source instance." if run.record.was_running else "Unlock source instance."):
            give_back(run.source, now := gate(run, Act.GIVE_BACK), run.journal, run.changed)
            keep_as_seed(run, now)
            down = (datetime.now(timezone.utc) - began).total_seconds() if began else 0.0
            status = run.source.server_retrying(source).status
            run.report.downtime_seconds = round(down, 2) if began and run.record.was_running else None
            run.report.started = ["source"] if run.record.was_running else []
    except MigrenaError as error:
        seen = Reason(f"seen {(now := situation_now(run))}", next_commands(Act.GIVE_BACK, now))
        raise Kept.of([told, *error.reasons, seen, *problems]) from error
    raise Kept.of([replace(told, problem=f"{told.problem}: it is stopped and kept"),
        Reason(f"the source {source} is {status} again, {duration(down)} after its stop"), *problems])


def release_destination(run: Run, id: str) -> None:
    """After a success: removes the run's lock from the destination, but no one else's."""
    if (seen := situation_now(run).destination).unseen:
        raise CloudError(seen.unseen)
    if seen.is_locked_by(run.plan.run):
        run.destination.unlock(id)


def release_source(run: Run, arrived: Server | None) -> None:
    """After a success: takes the run's mark off the source, gives it back, unless only the destination was started."""
    id = run.plan.server.id
    if run.settings.start_after != "dst":
        give_back(run.source, replace(gate(run, Act.GIVE_BACK), was_running=False), run.journal, run.changed)
        other = start_named(run, "src", id)
        if arrived and other and (shared := arrived.fixed_addresses & other.fixed_addresses):
            run.screen.warn(f"source and destination both run with address {', '.join(sorted(shared))}")
    else:
        run.screen.note(
            f"The source stays stopped and locked; ./migrena.py rollback {run.plan.run} --yes takes it back.")
    run.source.unmark(id, run.plan.run, MARK, WAS)


@dataclass
class DiskCopy:
    """The copy of one disk: the ends that it uses, its job, and what its last pass has found."""

    both: BothEnds
    job: DiskJob
    known: Known = NOTHING_KNOWN

    def begun(self, **facts: Any) -> DiskJob:
        """The job, with these facts, for an attempt; a disk that is written to in place is not blank after it."""
        job = replace(self.job, **facts)
        if isinstance(job.landing, InPlace):
            self.job = replace(self.job, landing=replace(job.landing, is_blank=False))
        return job


def copy_and_swap(run: Run, host: Host, new: Server, locks: DiskLocks) -> float:
    """Copies the disks and swaps them in; returns when the source was asked to stop, by the monotonic clock."""
    with ExitStack() as slot:
        take_slot(run, host, slot)
        with ExitStack() as stack:
            keys = [key for key in run.plan.disks if not run.earlier or key not in run.earlier.in_place]
            both = {key: stack.enter_context(BothEnds(run, ends, locks)) for key, ends in zip(
                keys, connections(run, host, len(keys), locks), strict=True)}
            copies = [DiskCopy(both[job.key], job) for job in prepare(run, both, new)]
            share_keys(run.source_host)
            share_keys(host)
            for copy in copies:
                with_retries(copy.both, partial(lock_fresh, copy.job), "stays as it is")
            if run.settings.warm and run.plan.server.is_running:
                warm_copy(run, copies, slot)
            if run.settings.seed:
                return 0.0
            require_safe_stop(run)
            began = stop_source(run, new)
            for copy in copies:
                copy.known = read_bitmap(run, copy.job, copy.known)
                copy.job = recheck_source(run, copy.job)
            transfer(run, copies)
        for copy in copies:  # the connections of one may have broken while others were copied
            with_retries(copy.both, partial(look_again, copy.job, is_alone=len(copies) == 1), "stays stopped")
        if run.plan.root.has_nvram:
            copy_nvram(run, host, new.id)
        swap_in(run, host, [copy.job for copy in copies], locks)
    return began


def take_slot(run: Run, host: Host, slot: ExitStack) -> None:
    """Waits for a slot for the copy on both hosts, which the scope then holds until it is closed."""
    names = run.source_host.name, host.name
    slot.enter_context(slots(run.journal.path.parent, names, run.settings.max_per_host, run.screen))


def look_again(job: DiskJob, ends: Ends, *, is_alone: bool) -> None:
    """Sees that nobody has the source's disk open; locks both disks where another's retry may have ended the locks."""
    require_unwatched(ends.source, job.source)
    if not is_alone:
        ends.locks.hold(ends.source, job.source)
        lock_fresh(job, ends)


def copy_nvram(run: Run, host: Host, made: str) -> None:
    """Copies UEFI's variables, such as boot entries; warns where that is not possible."""
    sides, path = ((run.source_host, run.plan.server.id), (host, made)), ""
    gate(run, Act.SWAP)
    try:
        there, path = (domain_of(one, id, one.disk_of(id)).xml.findtext("os/nvram", "") for one, id in sides)
        content = run.source_host.run("base64", "--", there)
        with run.journal.act("copy nvram", path=path):
            host.script(PUT_NVRAM, path, stdin=content.encode())
    except CommandError as error:
        run.screen.warn(f"the UEFI NVRAM is not copied, Nova has made a new one: {error.said}")


def connections(run: Run, host: Host, count: int, locks: DiskLocks) -> Iterator[tuple[Host, Host]]:
    """Both hosts for each disk; those copied in parallel have connections of their own, as long as the locks last."""
    for number in range(count):
        ends = run.source_host, host
        if number and run.settings.lanes > 1 and not run.settings.limit_rate:
            ends = once_more(run, run.source_host, "src", locks), once_more(run, host, "dst", locks)
        yield ends


def once_more(run: Run, host: Host, side: str, locks: DiskLocks) -> Host:
    more = locks.enter_context(closing(connect(host.name, run.settings.of(side), run.screen)))
    host.further.append(more)
    return more


def for_each(run: Run, copies: Sequence[DiskCopy], act: Callable[[DiskCopy], T]) -> list[T]:
    """The results of an act on each disk, as many at a time as --lanes allows; the first failure ends the others."""
    by_nbd = [copy for copy in copies if copy.job.transport.name == NbdTransport.name]  # one device, and ports untold
    lanes = 1 if run.settings.limit_rate or len(by_nbd) > 1 else min(run.settings.lanes, len(copies))
    if lanes == 1:
        return [act(copy) for copy in copies]
    hosts = {host for copy in copies for host in copy.both.hosts}
    with threads_for(lanes, *hosts) as pool:
        try:
            with defer_signals():
                acting = [pool.submit(act, copy) for copy in copies]
            while not all(one.done() for one in acting) and not any(
                    one.done() and one.exception() for one in acting):
                time.sleep(0.1)
            if failed := next((error for one in acting if one.done() and (error := one.exception())), None):
                raise failed
        except BaseException:
            for copy in copies:
                copy.both.is_ending = True
            raise
        return [one.result() for one in acting]


def lock_fresh(job: DiskJob, ends: Ends) -> None:
    ends.locks.hold(ends.destination, job.fresh)


def swap_in(run: Run, host: Host, jobs: Sequence[DiskJob], locks: DiskLocks) -> None:
    rebases = any(job.whole_file and job.fresh.backing for job in jobs)
    with run.screen.step(f"{'Rebase backing file, check' if rebases else 'Check'} and swap in the disk."):
        for number, job in enumerate(jobs):
            if not number or not isinstance(job.landing, InPlace):
                locks.check()
                gate(run, Act.SWAP)
            with run.journal.act("swap in", disk=job.key, new=job.new):
                lost = settle_disk(host, job)
            locks.release(host, job.fresh)
            for name in lost:
                run.screen.warn(f"the new disk lacks the dirty bitmap {name}, which a killed qemu had in use: "
                    "the next backup will be a full one")


def warm_copy(run: Run, copies: Sequence[DiskCopy], slot: ExitStack) -> None:
    """Copies the disks in passes while the source runs, until little is left to send after its stop.

    With --cutover-at the passes go on until then. Raises FinalError if --max-downtime or the time cannot be met, and
    HostError as `with_retries` does; the source runs on.
    """
    settings, screen, files = run.settings, run.screen, [copy.job.new for copy in copies]
    is_seed = bool(settings.seed or settings.cutover_at)
    with screen.step("Copy the disk while the source runs."), run.journal.act("warm copy", new=files) as result:
        for copy in copies:
            screen.note(f"{run.source_host.name}:{copy.job.source.path} -> {copy.both.destination.name}:{copy.job.new}")
        has_bitmap = {copy.job.key: settings.bitmap and not settings.seed and begin_bitmap(run, copy.job)
            for copy in copies}
        lengths = {copy.job.key: copy.job.length for copy in copies}
        reread = sum(length for key, length in lengths.items() if not has_bitmap[key]) / sum(lengths.values())
        warm = WarmCopy(run, copies, nova_takes(
            run.source.actions(run.plan.server.id), screen.seconds.get(STOP_DESTINATION, 5.0)), reread)
        try:
            warm.until_little_is_left(replace(settings, max_downtime=0) if is_seed else settings)
            if is_seed:
                tell_seeded(run, datetime.now(timezone.utc).isoformat())
            if settings.cutover_at:
                warm.until_window(slot)
                warm.in_window()
        finally:
            result["passes"], run.report.copy["passes"] = len(warm.passes), [asdict(one) for one in warm.passes]
    if settings.seed:
        screen.note(f"Seeded; the source runs on. ./migrena.py resume {run.plan.run} --seed sends what has changed by "
            f"then, resume {run.plan.run} cuts over, rollback {run.plan.run} removes it.")
    for copy in copies:
        copy.known = copy.known if has_bitmap[copy.job.key] else NOTHING_KNOWN


class WarmCopy:
    """The passes of a warm copy; `nova`: seconds that Nova takes to stop the source and start the destination.

    `reread`: the share of the disks of which no dirty bitmap tells what has changed.
    """

    def __init__(self, run: Run, copies: Sequence[DiskCopy], nova: float, reread: float = 1.0) -> None:
        self._run, self._copies, self._nova, self.passes = run, copies, nova, list[Pass]()
        self._reread = reread
        self._least, self._gap, self._pause = math.inf, 0.0, 0.0

    def until_little_is_left(self, settings: Settings, since: float = 0.0) -> None:
        """Makes passes as long as they gain something; `since`: seconds that count towards the limit already."""
        began = time.monotonic() - since
        while not self.passes or wants_another_pass(settings, self.passes, self._nova, time.monotonic() - began):
            if self._pause:
                self._run.screen.note(f"Wait {duration(self._pause)}: the last pass gained nothing.")
                time.sleep(self._pause)
                self._waited(self._pause)
            self.make_pass()

    def make_pass(self) -> None:
        run, passes, since = self._run, self.passes, time.monotonic()
        one = sum_of(for_each(run, self._copies, partial(one_pass, run)), time.monotonic() - since)
        passes.append(replace(one, looking=one.looking * self._reread))
        expected = downtime(passes, self._nova) if len(passes) > 1 else math.inf  # if the source were stopped now
        was_paused, self._pause = self._pause > 0, 0.0
        if len(passes) > 2 and not was_paused:  # a pass after a pause brings more, and tells nothing
            self._pause = self._gap = next_gap(self._gap, expected < self._least)
        self._least = min(self._least, expected)
        more = (f", found in {duration(one.looking)}; stopped now, it would be down for about "
            f"{duration(expected)}" if len(passes) > 1 else "")
        is_first = len(passes) == 1 and not run.record.seed
        run.screen.note(f"Pass {len(passes)}: {human(one.changed)} "
            f"{'sent' if is_first else 'had changed, sent'} in {duration(one.sending)}{more}")
        run.journal.write("pass", number=len(passes), **asdict(one), **({} if math.isinf(expected) else {
            "downtime": round(expected, 1)}))

    def until_window(self, slot: ExitStack) -> None:
        """Makes a pass every so often until the time of the cut-over, without a slot meanwhile."""
        run, due = self._run, datetime.fromisoformat(self._run.settings.cutover_at)
        run.screen.note(f"Cut-over at {due:%Y-%m-%d %H:%M %z}; until then a pass every {duration(run.settings.every)}.")
        has_failed = False
        while (left := due.timestamp() - time.time()) > 0:
            early = 0.0 if has_failed else 1.5 * self.passes[-1].seconds
            rest = min(float(run.settings.every), max(0.0, left - early))
            slot.close()
            until = time.time() + rest  # by the wall clock: this machine may sleep
            while (ahead := until - time.time()) > 0:
                run.screen.status(f"Cut-over at {due:%Y-%m-%d %H:%M}, in {duration(due.timestamp() - time.time())}")
                time.sleep(min(ahead, 1.0))
            take_slot(run, self._copies[0].both.destination, slot)
            self._waited(rest)
            try:
                self.make_pass()
                has_failed = False
            except (CloudError, HostError) as error:  # such as a source that is being rebooted
                if due.timestamp() < time.time():
                    raise
                has_failed = True
                for copy in self._copies:  # a failure of one had ended the others
                    copy.both.is_ending = False
                run.screen.warn(f"{error}; there is time for another pass")
            if rest == 0.0 and not has_failed:  # the last pass before the time
                time.sleep(max(0.0, due.timestamp() - time.time()))

    def in_window(self) -> None:
        """Makes passes until little is left, or --max-downtime is met; raises FinalError once it is too late."""
        settings, due = self._run.settings, datetime.fromisoformat(self._run.settings.cutover_at)
        past = self._require_in_time(due)
        try:
            self.until_little_is_left(replace(settings, warm_timeout=settings.late, warm_passes=0), past)
        except FinalError as error:
            raise FinalError(f"the cut-over was due at {due:%H:%M}, but --max-downtime does not hold: {error}",
                error.reasons[0].way_out) from error
        self._require_in_time(due)

    def _require_in_time(self, due: datetime) -> float:
        """Seconds since the time of the cut-over; raises FinalError if it is too late."""
        settings, past = self._run.settings, time.time() - due.timestamp()
        if past > settings.late:
            raise FinalError(
                f"the cut-over was due at {due:%Y-%m-%d %H:%M %z}, {duration(past)} ago: this machine slept, or a pass "
                f"or the wait for a slot took too long; --late allows {duration(settings.late)}",
                f"./migrena.py resume {self._run.plan.run} --cutover-at TIME, or --cutover-at now")
        return past

    def _waited(self, seconds: float) -> None:
        self.passes[-1] = replace(self.passes[-1], seconds=self.passes[-1].seconds + seconds)


def begin_bitmap(run: Run, job: DiskJob) -> bool:
    """Adds a dirty bitmap to the source's file; returns False, with a warning, if that is not possible."""
    host, path, bitmap = run.source_host, job.source.path, bitmap_of(job.run)
    why = "" if job.whole_file else "what the guest sees is copied, not the file"
    if job.source.format == "raw" or why:
        run.screen.warn(f"{run.label(job.key)}no dirty bitmap: {why or 'a raw disk has none'}")
        return False
    drop_bitmap_on_failure(run, path)
    try:
        with run.journal.act("add bitmap", disk=job.key, path=path, bitmap=bitmap):
            drop_bitmap(host, run.plan.server.id, path, job.run)  # from an earlier process
            host.script(ADD_BITMAP, run.plan.server.id, path, bitmap)
    except CommandError as error:
        run.screen.warn(f"no dirty bitmap: {error}")
        return False
    run.screen.note(f"{host.name}:{path} has the dirty bitmap {bitmap} until the source has stopped.")
    return True


def drop_bitmap_on_failure(run: Run, path: str) -> None:
    """Registers the removal of a disk's dirty bitmap if the run fails; otherwise read_bitmap() removes it."""
    host = run.source_host
    run.undo.on_failure(f"remove the dirty bitmap from {host.name}:{path}",
        lambda: drop_bitmap(host, run.plan.server.id, path, run.plan.run))


def drop_bitmap(host: Host, source: str, path: str, run: str) -> None:
    """Removes a run's dirty bitmap, if any, from a source's file, whether the source runs or not."""
    host.script(DROP_BITMAP, source, path, bitmap_of(run))


def read_bitmap(run: Run, job: DiskJob, known: Known) -> Known:
    """Adds the blocks unchanged by the stopped source's dirty bitmap, if any, to what is known; removes the bitmap."""
    if not run.settings.bitmap or job.source.format == "raw":  # only a qcow2 file is ever opened as one
        return known
    host = run.source_host
    if known.here:
        try:
            with host.private_folder(job.run) as folder:
                known = replace(known, unchanged=unchanged_since(host, folder, job, known))
        except CommandError as error:
            run.screen.warn(f"the dirty bitmap is unusable, so both disks are read completely: {error}")
    with run.journal.act("drop bitmap", disk=job.key, path=job.source.path):
        drop_bitmap(host, run.plan.server.id, job.source.path, job.run)
    return known


def one_pass(run: Run, copy: DiskCopy) -> Pass:
    """One pass over a disk of the running source, of its file's present length; the copy then knows what it found."""
    job = replace(copy.job, is_live=True)
    words = (job.source.path,) if job.source.is_file else ()

    def attempt(ends: Ends) -> tuple[Moved, Known]:
        require_it_runs(run, gate(run, Act.WRITE, is_live=True).source.server)
        lock_fresh(job, ends)
        length, state = ends.source.script(
            f'[ $# = 1 ] && echo 0 || stat -c %s -- "$2"; {DOMAIN_STATE}', run.plan.server.id, *words).split("\n", 1)
        require_running(run, state.strip())
        now = copy.begun(is_live=True, source=replace(job.source, length=int(length) or job.source.length))
        check = at_intervals(10.0, partial(require_room, copy))
        return move_disk(
            ends, now, Callbacks(partial(journaled_progress, run, job.key), copy.both.count, check), copy.known)

    moved, copy.known = with_retries(copy.both, attempt, "runs on")
    return Pass(moved.held, moved.looking, moved.sending, moved.seconds)


def sum_of(passes: Sequence[Pass], seconds: float) -> Pass:
    """A pass over several disks that took so long in all, some of it in parallel."""
    changed, looking, sending, took = (sum(values) for values in zip(*map(astuple, passes), strict=True))
    share = min(1.0, seconds / max(took, 0.001))
    return Pass(int(changed), looking * share, sending * share, seconds)


def again_command(run: Run) -> str:
    """What to do after a failure that leaves the source as it is."""
    again = f"./migrena.py resume {run.plan.run}{' --seed' if run.settings.seed else ''}"
    return again if run.record.seed else "run it again"


def require_it_runs(run: Run, server: Server | None) -> None:
    """Raises CloudError if the source has moved to another host or does not run."""
    was = run.plan.server
    if not server or (server.host, server.hypervisor) != (was.host, was.hypervisor):
        place = f" to {server.hypervisor}" if server else ""
        raise CloudError(f"the source has moved{place} during the copy", again_command(run), 400)
    if server.status != "ACTIVE" or server.power != 1:
        why = "somebody stopped it"
        with suppress(HostError):
            why = ENDED["crashed"] if "crashed" in run.source_host.script(DOMAIN_STATE, server.id) else why
        raise CloudError(f"the source is {server.status} during the copy: {why}",
            f"find out who; {again_command(run)}, without --warm if it stays stopped", 400)


def nova_takes(actions: Sequence[Action], stop: float) -> float:
    """Seconds that Nova will need to stop the source and to start the destination: as long as it took the last time.

    Where it never stopped the source, what the destination's `stop` took tells, which may have missed the button.
    """
    took = {action.name: action.seconds for action in reversed(actions)
        if 0 < action.seconds <= PATIENCE and not action.has_failed}
    fresh = stop if stop >= PATIENCE else max(START_TAKES, stop % POWER_BUTTON)
    return took.get("stop", fresh) + took.get("start", START_TAKES)


def next_gap(gap: float, has_gained: bool) -> float:
    """Seconds to wait, longer each time that a pass has gained nothing."""
    return 0.0 if has_gained else min(max(1.0, 2 * gap), LONGEST_PAUSE)


def downtime(passes: Sequence[Pass], nova: float) -> float:
    """Seconds of downtime if the source were stopped now: Nova's stop and start, finding and sending what changed."""
    return nova + SETTING_UP + passes[-1].looking + left_after(passes) / rate_of(passes)


def left_after(passes: Sequence[Pass]) -> float:
    return passes[-1].changed / passes[-2].seconds * passes[-1].seconds


def rate_of(passes: Sequence[Pass]) -> float:
    """Bytes per second of the pass that sent the most."""
    most = max(passes, key=lambda one: one.changed)
    return max(most.changed, 1) / max(most.sending, 0.01)


def wants_another_pass(settings: Settings, passes: Sequence[Pass], nova: float, elapsed: float) -> bool:
    """Whether to do another pass. Raises FinalError if --max-downtime cannot be met."""
    is_last = 0 < settings.warm_passes <= len(passes)
    if settings.max_downtime:
        if len(passes) == 1:
            return True  # the second one shows what changes
        if (expected := downtime(passes, nova)) <= settings.max_downtime:
            return False
        if is_last or elapsed > settings.warm_timeout or nova + SETTING_UP > settings.max_downtime:
            raise FinalError(f"after {len(passes)} passes in {duration(elapsed)} the source would still be down for "
                f"about {duration(expected)}", f"allow more than --max-downtime {settings.max_downtime}, "
                "or try again when the guest writes less")
        return True
    return not is_last and (len(passes) == 1 or (left_after(passes) < passes[-1].changed / 2
        and left_after(passes) > rate_of(passes) / 2))


def claim_source(run: Run) -> None:
    """Marks the source in Nova, to exclude runs on other machines. Raises Refused if one was quicker.

    From here on, a failure also undoes what an earlier process of this run did, if that is allowed.
    """
    id, plan = run.plan.server.id, run.plan
    run.undo.always(f"check that nothing of ours is left on {run.source_host.name}", run.source_host.confirm_all_ended)
    run.undo.on_failure(f"take the mark off source {id}", lambda: take_mark_off(run.source, situation_now(run)),
        lambda: run.keeps_destination)
    if run.earlier:
        delete_things_on_failure(run)
        delete_on_failure(run)
        undo_stop(run)
        for disk in run.plan.disks.values():
            if run.settings.bitmap and disk.top.format != "raw":
                drop_bitmap_on_failure(run, disk.top.path)
        run.journal.write("resume", pid=os.getpid())
    with run.journal.act("mark source", server=id):
        require_mark(run, None)
        run.source.mark(id, plan.marks(MARK))
        time.sleep(CLAIM_PAUSE)
        require_mark(run, plan.run)


def take_mark_off(cloud: Cloud, now: Situation) -> None:
    """Removes a run's mark from its source if that is in its old state; else raises Kept: the mark is still needed."""
    source, way = now.source, f"./migrena.py rollback {now.run}"
    if source.unseen:
        raise Kept(f"source {source.id} may still have the mark of run {now.run}: {source.unseen}", way)
    if source.server and now.was_running and not source.server.is_running:
        raise Kept(f"source {source.id} is {source.server.status}, and still has the mark of run {now.run}",
            f"{way}, once it may run")
    if source.server:
        cloud.unmark(source.id, now.run, MARK, WAS)


def require_mark(run: Run, mark: str | None) -> None:
    """Raises Refused unless the source has this mark or ours."""
    there = run.source.server_retrying(run.plan.server.id).metadata.get(MARK)
    if there not in (mark, run.plan.run):
        raise Refused(f"another run ({there or 'one that has ended'}) has taken the source "
            f"{run.plan.server.id} at the same time", "wait until it ends, and see what it made")


def ensure_destination(run: Run) -> Server:
    """The new instance: ACTIVE, or stopped if an earlier process made it. A carried image is kept in any case."""
    made = run.earlier and run.earlier.seen.id
    if run.plan.carried:
        with run.screen.step("Carry the source's image, which the destination lacks."):
            id = carry(run.settings, run.journal, run.undo, (run.source, run.destination), run.plan.carried)
        run = replace(run, plan=replace(run.plan, image=replace(run.plan.image, id=id)))
    with run.screen.step(f"{'Go on with the' if made else 'Create new'} instance in the target environment."):
        if made:
            with run.journal.act("adopt destination", server=made):
                new = run.destination.wait(made, lambda server: server.is_running or server.is_stopped, run.changed)
        else:
            new = create_destination(run)
        run.screen.note(f"Done. Current status: {new.status}, ID: {new.id}")
    run.report.destination |= reported(run.destination, new)
    return new


def create_destination(run: Run) -> Server:
    """Makes an instance and waits until it is ACTIVE. A failure deletes it, even if Nova's answer was lost."""
    plan, settings = run.plan, run.settings
    for line in (f"Name: {settings.dst_name}", f"Flavor: {plan.flavor.name}, ID: {plan.flavor.id}",
            f"Image: {plan.image.name}, ID: {plan.image.id}",
            *(f"{key}: {value if key in SHOWN else '(not shown)'}" for key, value in plan.extra.items())):
        run.screen.note(line)
    delete_things_on_failure(run)
    for wanted in plan.wanted:
        run.screen.note(f"New {wanted.kind}: {wanted.facts['name']}")
        try:
            ask_for(run, wanted.kind, wanted.facts["name"], wanted.facts)
        except CloudError as error:  # another run was quicker: what it made is not ours
            if error.code != 409 or not [*KINDS[wanted.kind].made_by(run.destination, plan.run, wanted.facts)]:
                raise
    create_volumes(run)
    delete_on_failure(run)
    with run.journal.act("create destination", name=settings.dst_name) as result:
        result["server"] = id = ask_for_destination(run)
    return run.destination.wait(id, lambda server: server.is_running, run.changed)


def create_volumes(run: Run) -> None:
    """Makes volumes for the source's, and waits until they can be used. A failure deletes them."""
    for key, facts in run.plan.requests.items():
        kind = f", type {facts['volume_type']}" if "volume_type" in facts else ""
        run.screen.note(f"New volume of {facts['size']} GiB{kind}, for {run.plan.volumes[key].label}")
        ask_for(run, "volume", key, facts)
    for key, id in run.record.made("volume").items():
        store, volume = run.destination.volumes, run.plan.volumes[key]
        made = store.wait(id)
        if what := next((what for what in ("encrypted", "multiattach") if made.facts.get(what)), ""):
            raise CloudError(f"destination cloud: volumes of type {made.type} are {what}",
                f"--volume-type {volume.type}=TYPE names another one")
        store.describe(id, volume.image_facts, is_bootable=volume.is_bootable)


@dataclass(frozen=True)
class Kind:
    """A kind of what a run makes besides the instance."""

    command: str  # of OpenStack's client
    make: Callable[[Cloud, Facts], str]  # requests one; returns its id
    made_by: Callable[[Cloud, str, Facts], Iterable[str]]  # the ids of a run's; of one request, if given
    delete: Callable[[Cloud, str, Facts], None]


def in_neutron(what: str, command: str) -> Kind:
    """A kind of what Neutron has: the description is the run's mark."""
    return Kind(
        command, lambda cloud, facts: cloud.networks.make(what, facts),
        lambda cloud, run, facts: cloud.networks.made_by(what, run, facts.get("description", "")),
        lambda cloud, id, facts: cloud.networks.delete(what, id))


KINDS: Final[Mapping[str, Kind]] = {  # in the order in which they are deleted
    "floating IP": in_neutron("floatingips", "floating ip"), "port": in_neutron("ports", "port"),
    "volume": Kind(
        "volume", lambda cloud, facts: cloud.volumes.make(**facts),
        lambda cloud, run, facts: [volume.id for volume in cloud.volumes.made_by(run) if not facts
        or volume.metadata.get(ORIGIN) == facts["metadata"][ORIGIN]],
        lambda cloud, id, facts: cloud.volumes.delete(id)),
    "server group": Kind(  # these two have no place for a mark; they are made only if there is none of the name
        "server group", lambda cloud, facts: cloud.make_server_group(facts),
        lambda cloud, run, facts: [id for id, one in (cloud.server_groups() if facts else {}).items()
        if all(one[key] == facts[key] for key in ("name", "policy", "rules"))],
        lambda cloud, id, facts: cloud.delete_server_group(id)),
    "key pair": Kind(
        "keypair", lambda cloud, facts: cloud.make_key_pair(facts),
        lambda cloud, run, facts: [pair.name] if facts and (pair := cloud.key_pair(facts["name"])) and (
        pair.fingerprint == facts["fingerprint"]) else [],
        lambda cloud, id, facts: cloud.delete_key_pair(id, facts)),
}
TOLD: Final = ("name", "policy", "rules", "fingerprint", "description", "metadata")  # of a request, for the journal


def until_taken(ask: Callable[[], T]) -> T:
    """The answer to a request that makes something, asked again while the API has too much to do (429)."""
    limit = time.monotonic() + OUTAGE_LIMIT
    while time.monotonic() < limit:
        with ignoring(429):
            return ask()
        time.sleep(CLAIM_PAUSE)
    return ask()


def ask_for(run: Run, kind: str, of: str, facts: Facts) -> str:
    """Requests something once; returns its id even if the answer is lost. A failure deletes it."""
    cloud, limit, acts = run.destination, time.monotonic() + LOST_ANSWER, KINDS[kind]
    known, was_asked = {*run.record.made(kind).values()}, of in run.record.unanswered(kind)  # by a killed process
    told = {key: facts[key] for key in TOLD if key in facts} | {"user": cloud.user}
    with run.journal.act(f"create {kind}", of=of, facts=told) as result:
        found = {*acts.made_by(cloud, run.plan.run, facts)} - known if was_asked else set[str]()
        try:
            if not found:
                with defer_signals():
                    found = {until_taken(lambda: acts.make(cloud, facts))}
        except CloudError as error:
            result["refused"] = error.is_refusal
            if error.is_refusal:
                raise
            while not (found := {*acts.made_by(cloud, run.plan.run, facts)} - known):
                if time.monotonic() > limit:
                    raise
                time.sleep(CLAIM_PAUSE)
        result["id"] = found.pop()
    return str(result["id"])


def delete_things_on_failure(run: Run) -> None:
    def delete() -> None:
        now = situation_now(run, with_disk=stage_of(run.record) >= Stage.PROVEN)
        if run.record.made("volume"):
            allow(Act.DELETE_VOLUMES, now, asked_in_undo(run))
        delete_things(run.destination, run.record, now, run.journal, LATE_ANSWER)

    if run.plan.requests or run.plan.wanted or run.plan.ports or has_things(run.record):
        run.undo.on_failure("delete what was made for it", delete, lambda: run.keeps_destination)


def has_things(record: RunRecord) -> bool:
    return any(act.name == f"create {kind}" for act in record.acts for kind in KINDS)


def delete_things(cloud: Cloud, record: RunRecord, now: Situation, journal: Journal, patience: float,
        attached: Collection[str] = ()) -> None:
    """Deletes what a run made besides the instance; raises Kept for what is in use, or may still be made.

    They are known by the journal; where that or an answer is lost, by the run's marks, volumes then only if they were
    `attached`: one restored from a backup has the mark too. While the run's instance is there, all are kept.
    """
    problems, limit = list[Reason](), time.monotonic() + patience
    for kind, acts in KINDS.items():
        told = {act.made: act.facts.get("facts", {}) for act in record.acts
            if act.name == f"create {kind}" and act.made}
        with collecting(problems):
            for act in record.unanswered(kind).values():
                facts = act.facts.get("facts", {})
                while not (found := {*acts.made_by(cloud, now.run, facts)} - told.keys()) and time.monotonic() < limit:
                    time.sleep(CLAIM_PAUSE)
                told |= dict.fromkeys(found, facts)
                if patience and not found:
                    problems.append(Reason(
                        f"the request for a {kind} was not answered, and it may still be made",
                        f"openstack {acts.command} list; ./migrena.py rollback {now.run} deletes it"))
            if record.is_lost and (kind != "volume" or cloud.has_volumes):
                marked = {*acts.made_by(cloud, now.run, {})} - told.keys()
                if loose := sorted(marked - {*attached}) if kind == "volume" else []:
                    problems.append(Reason(f"volumes {', '.join(loose)} have the run's mark, but were not attached to "
                        "its instance: without its journal they may be copies of its volumes",
                        f"openstack volume delete, or openstack volume unset --property {MADE} --property {DONE}"))
                told |= {id: {} for id in marked - {*loose}}
        if told and not now.destination.is_gone:
            problems.append(Reason(f"{kind}s {', '.join(sorted(told))} are kept with instance {now.destination.id}"))
            continue
        for id, facts in sorted(told.items()):
            with collecting(problems), journal.act(f"delete {kind}", id=id):
                acts.delete(cloud, id, facts)
    if problems:
        raise Kept.of(problems)


def give_ports(run: Run, id: str) -> None:
    """Makes the ports of the new instance, which is stopped, and attaches them in their order."""
    store, made, plan = run.destination.networks, run.record.made("port"), run.plan
    for port in plan.ports:
        new = made.get(port.source) or ask_for(run, "port", port.source, port.request)
        if port.tags:
            store.tag(new, port.tags)
        with run.journal.act("attach port", server=id, port=new):
            run.destination.attach(id, new)
        told = store.by_id("ports", [new])[new]
        addresses = ", ".join(one["ip_address"] for one in told["fixed_ips"]) or "no address"
        run.screen.note(f"Port on network {port.network}, {told['mac_address']}: {addresses}")
        for number, floating in enumerate(port.floating):
            of, request = f"{port.source} {number}", dict(floating["request"])
            if of in run.record.made("floating IP"):
                continue
            if "floating_ip_address" in request:  # it leads nowhere until the source is down
                request.pop("fixed_ip_address", "")
            else:
                request["port_id"] = new
            ask_for(run, "floating IP", of, request)


def lead_floating_ips(run: Run, *, back: bool = False) -> None:
    """Has the floating IPs that keep their address lead to the new ports, or nowhere; raises Kept for failures."""
    problems, ids = list[Reason](), run.record.made("floating IP")
    for port in run.plan.ports:
        for number, floating in enumerate(port.floating):
            request = floating["request"]
            fixed = {key: value for key, value in request.items() if key == "fixed_ip_address"}
            if "floating_ip_address" in request:
                with collecting(problems):
                    run.destination.networks.change("floatingips", ids[f"{port.source} {number}"], {
                        "port_id": None} if back else {"port_id": run.record.made("port")[port.source], **fixed})
    if problems:
        raise Kept.of(problems)


def finish_ports(cloud: Cloud, record: RunRecord) -> None:
    """Takes a run's marks off what it made in Neutron; raises Kept for those that Neutron refuses."""
    rows, problems = {row["source"]: row for row in record.facts.get("ports", ())}, list[Reason]()
    for source, id in record.made("port").items():
        with collecting(problems):
            known = cloud.networks.by_id("ports", [id])[id]  # not all clouds have DNS
            later = {key: value for key, value in rows[source]["later"].items() if key in known}
            cloud.networks.change("ports", id, later)
    for of, id in record.made("floating IP").items():
        source, _, number = of.partition(" ")
        with collecting(problems):
            cloud.networks.change("floatingips", id, {"description": rows[source]["floating"][int(number)]["later"]})
    if problems:
        raise Kept.of(problems)


def ask_for_destination(run: Run) -> str:
    """Requests the new instance once; returns its id even if the answer is lost."""
    plan, settings, limit = run.plan, run.settings, time.monotonic() + LOST_ANSWER
    volumes, extra = run.record.made("volume"), dict(plan.extra)
    for group in run.record.made("server group").values():
        extra["scheduler_hints"] = {**(extra.get("scheduler_hints") or {}), "group": group}
    if volumes:
        extra["block_device_mapping_v2"] = made_with(plan.server, plan.disks, volumes)["block_device_mapping_v2"]
    try:
        with defer_signals():  # an instance without a known id is hard to undo
            run.journal.write("asked")
            try:
                return until_taken(lambda: run.destination.create(settings.dst_name, plan.image.id, plan.flavor.id,
                    extra, plan.marks(MADE) | {ORIGIN: plan.server.id}))
            except CloudError as error:
                if error.code not in (0, 502, 504):  # else a proxy may still forward the request
                    run.journal.write("refused")
                raise
    except CloudError as error:
        if error.is_refusal or not (made := await_made(run, limit)):
            raise
        return made[0]


def await_made(run: Run, limit: float) -> list[str]:
    """The ids of what a run made, by its marks; waits for the first one until `limit`."""
    while not (made := run.destination.made_by(run.plan.run, run.plan.server.id)) and time.monotonic() <= limit:
        time.sleep(CLAIM_PAUSE)
    return [server.id for server in made]


def made_late(run: Run) -> list[str]:
    """The ids of what a run made although Nova's answer was lost; raises Kept if it may still be made."""
    told = {entry["event"] for entry in run.journal.entries}
    is_open = "asked" in told and "refused" not in told and not run.journal.is_broken
    made = await_made(run, time.monotonic() + LATE_ANSWER if is_open else float("-inf"))
    if is_open and not made:
        raise Kept(f"Nova did not answer the request for {run.settings.dst_name}, and may still make it",
            f"openstack server list --name {shlex.quote(run.settings.dst_name)}; "
            f"./migrena.py rollback {run.plan.run} deletes it")
    return made


def delete_on_failure(run: Run) -> None:
    """Registers the deletion of the destination if the run fails: by id, or by marks if Nova's answer was lost."""
    def delete() -> None:
        is_proven = stage_of(run.record) >= Stage.PROVEN  # until then the source's host need not be reachable
        for id in [run.made] if run.made else made_late(run):
            now = situation_now(run, id, with_disk=is_proven)
            if not now.destination.is_gone:
                allow(Act.DELETE, now, asked_in_undo(run))
                with run.journal.act("delete destination", server=id):
                    run.destination.delete(id)

    run.undo.on_failure(f"delete destination {run.settings.dst_name}", delete, lambda: run.keeps_destination)


def connect_destination(run: Run, new: Server, stack: ExitStack) -> Host:
    """Connects to the hypervisor that Nova chose; raises HostError if it lacks tools."""
    if not new.host:
        raise CloudError(f"destination cloud: {NO_HOSTS} the instance is", "use an admin's credentials")
    host = stack.enter_context(host_of(new, run.settings.of("dst"), run.screen))
    stack.enter_context(host.private_folder(run.plan.run))
    run.undo.always(f"check that nothing of ours is left on {host.name}", host.confirm_all_ended)
    if reasons := refuse_tools(host.name, tools_lacking(host), run.settings, "nbd-client"):
        raise HostError.of(reasons)
    return host


class BothEnds(ExitStack):
    """Both hosts of a copy with a private folder each, and certificates in them where TLS is wanted."""

    def __init__(self, run: Run, hosts: tuple[Host, Host], locks: DiskLocks) -> None:
        super().__init__()
        self.run, self.hosts, self.locks = run, hosts, locks
        self.destination, self.is_ending = hosts[1], False  # whether a failure is final, because another disk's was
        self.arrived = set[int]()  # where chunks' data begins
        self._ends: Ends | None = None

    def ends(self) -> Ends:
        """The same as long as nothing fails: what is set up while the source runs need not be set up after its stop."""
        self._ends = self._ends or self._open()
        return self._ends

    def count(self, chunk: Chunk, done: int) -> None:
        self.arrived.add(chunk.extents[0][0])

    def renew(self) -> None:
        self.close()
        self._ends = None
        for host in self.hosts:
            host.reconnect()

    def _open(self) -> Ends:
        source, destination = self.hosts
        one, other = (self.enter_context(host.private_folder(self.run.plan.run)) for host in (source, destination))
        for who, files in certificates(source.nbd_address).items() if self.run.settings.tls else ():
            host, folder = (source, one) if who == "server" else (destination, other)
            put_files(host, folder, files)
        way = route(destination, source.nbd_address)
        return Ends(source, destination, one, other,
            way.get("prefsrc", destination.nbd_address), way.get("dev", ""), self.locks)


def put_aside(run: Run, host: Host, new: Server) -> Server:
    """Makes the copies that an earlier cut-over swapped in a seed again; returns the instance, stopped."""
    now = gate(run, Act.STOP_DESTINATION)
    if now.source.is_locked_by(run.plan.run):  # somebody started it during a cut-over
        run.source.unlock(run.plan.server.id)
    if (seen := now.destination).starts:
        run.screen.warn(f"destination {new.id} was started after the seed ({seen.starts[0].name} at "
            f"{seen.starts[0].at}): what it has changed is found and sent again")
    stop_destination(run, new.id)
    with run.journal.act("swap out", server=new.id):
        host.script(SWAP_OUT, host.disk_of(new.id), run.plan.run)
    return run.destination.server_retrying(new.id)


def prepare(run: Run, both: Mapping[str, BothEnds], new: Server) -> list[DiskJob]:
    """Stops the destination, plans the transfer and rehearses it, while the source still runs."""
    screen, cloud, ends = run.screen, run.destination, next(iter(both.values())).ends()
    with screen.step(f"{STOP_DESTINATION}."):
        path = ends.destination.disk_of(new.id)
        if run.record.seed and not run.record.stopped_at:
            new = put_aside(run, ends.destination, new)
        fresh = survey_disks(
            ends.destination, new.id, path, shared=not new.is_stopped)
        volumes = run.record.made("volume")
        fresh = {next((key for key, id in volumes.items() if id == disk.volume), key): disk
            for key, disk in fresh.items()}
        for key, id in volumes.items():
            if key in fresh and (volume := cloud.volumes.one(id)):
                fresh[key] = identified(cloud, new.id, fresh[key], volume)
        if lacking := [key for key in both if key not in fresh or fresh[key].volume != volumes.get(key, "")]:
            raise HostError(f"{ends.destination.name}: the new instance has no disk {', '.join(lacking)}",
                "name a flavor with -f that has ephemeral disks as the source's")
        gate(run, Act.STOP_DESTINATION)
        stop_destination(run, new.id)
        give_ports(run, new.id)
        screen.note("Done. Current status: SHUTOFF")
    with screen.step("Compare bases, space and the way between the hypervisors."):
        jobs = [plan_job(run, ends, key, fresh[key]) for key in both]
        refuse_jobs(run, ends, jobs)
        rate = rehearse(ends, jobs[0])
        if len(jobs) > 1:  # side by side, each at its own port
            for_each(run, [DiskCopy(both[job.key], job) for job in jobs],
                lambda copy: rehearse(copy.both.ends(), copy.job))
        screen.note(
            f"Done. {human(SAMPLE)} went from {ends.source.nbd_address} to {ends.client_address} and were verified.")
        if rate < SLOW_WIRE and jobs[0].may_be_compressed:
            jobs = [replace(job, transport=QemuTransport(compress=True)) for job in jobs]
            screen.note(f"The network carries {human(rate)}/s: compression is on.")
            run.report.copy |= {"transport": QemuTransport.name, "compressed": True}
            rehearse(ends, jobs[0])
    return jobs


def plan_job(run: Run, ends: Ends, key: str, fresh: Disk) -> DiskJob:
    """Decides what is copied of a disk and how, from both sides; shows and reports it."""
    settings, disk, host = run.settings, run.plan.disks[key], ends.destination
    lacking = NbdTransport.lacking(ends.source, host)
    equal = bool(key == ROOT and disk.base and fresh.base and disk.top.backing_format  # others are made by mkfs
        and same_content((ends.source, disk.base), (host, fresh.base), settings.stall_timeout))
    in_place = bool(fresh.volume or fresh.top.storage)
    whole_file, why_view = pick_view(disk, fresh, equal, in_place=in_place)
    name, why_transport = pick_transport(settings, lacking, disk.top, whole_file)
    transport: AnyTransport = NbdTransport() if name == NbdTransport.name else QemuTransport(settings.compress == "on")
    if name == NbdTransport.name and lacking:
        raise HostError(f"--transport nbd is impossible, missing: {', '.join(lacking)}",
            "use --transport qemu, or install what is missing")
    run.screen.note(f"{run.label(key)}Copy {'the file' if whole_file else 'what the guest sees'}: {why_view}.")
    run.screen.note(f"{run.label(key)}Transport {name}{', compressed,' if transport.compress else ''}"
        f"{' with TLS' if settings.tls else ' in clear'}: {why_transport}.")
    told = {"view": "file" if whole_file else "guest", "why_view": why_view}
    how = {"transport": name, "why_transport": why_transport, "tls": settings.tls, "compressed": transport.compress}
    run.report.copy = {**told, **how, **run.report.copy}  # the first disk's
    run.report.copy.setdefault("disks", {})[key] = {**told, "source": disk.top.path, "destination": fresh.top.path}
    landing: Landing = BesideFile(
        run.plan.run, fresh.top, "raw" if whole_file else fresh.top.format, fresh.direct_io)
    if in_place:
        lock = files_beside(f"{host.disk_of(run.made)}.{key}", run.plan.run)[0]
        landing = InPlace(run.plan.run, fresh.top, lock, is_blank=False)
        require_identity(host, fresh.top)
    job = DiskJob(key, settings, disk.top, landing, transport, whole_file, disk.direct_io)
    if not whole_file and fresh.top.size > disk.top.size and "start destination" in {
            act.name for act in run.record.acts}:
        run.screen.warn(f"{run.label(key)}the disk is {human(fresh.top.size - disk.top.size)} longer "
            "than the source's: what it wrote there stays")
    return replace(job, landing=replace(landing, is_blank=not run.record.seed and is_blank(ends, job))) if isinstance(
        landing, InPlace) else job


def is_blank(ends: Ends, job: DiskJob) -> bool:
    """Whether the disk made for a copy holds only zeros; raises HostError if it holds something behind the copy."""
    host, fresh = ends.destination, job.fresh
    if fresh.size < job.source.size:
        return False  # refused later
    with seen_by_guest(ends, host, fresh, job) as place:
        found = digests(host, place, 0, fresh.size, job.settings.stall_timeout)
    if behind := [block for block in found if block * MiB >= job.source.size]:
        raise HostError(f"{host.name}: {fresh.path} holds data at byte {behind[0] * MiB:,}, behind the source's end",
            "name another image or flavor, with a disk no larger than the source's")
    return not found


def refuse_jobs(run: Run, ends: Ends, jobs: Sequence[DiskJob]) -> None:
    """Raises HostError for the first disk that does not fit.

    Files of volumes lie in the folders of their shares; they are sparse, so what a device holds is not foreseen.
    """
    places = {job.key: job.fresh.path.rpartition("/")[0] if isinstance(job.landing, InPlace) else "" for job in jobs}
    needs = {job.key: 0 if places[job.key] and not job.source.is_file else space_needed(
        job.source, run.plan.disks[job.key], job.whole_file or job.source.format == "raw", 0) for job in jobs}
    host, own = f"{run.destination.url} {ends.destination.name}", [key for key, place in places.items() if not place]
    run.journal.write("space", host=host, need=sum(needs[key] for key in own), disks=own)
    others = {"": still_to_write(run.journal.path.parent, run.plan.run, host)}
    for job in jobs:
        place = places[job.key]
        others[place] = (taken := others.get(place, 0)) + refuse_job(ends, job, needs[job.key], taken)


def refuse_job(ends: Ends, job: DiskJob, need: int, others: int = 0) -> int:
    """Bytes still to write; raises HostError if the copy does not fit its disk, or its host besides `others`."""
    host, fresh = ends.destination, job.fresh
    if fresh.format not in ("qcow2", "raw"):
        raise HostError(f"{host.name}: {fresh.path} is {fresh.format}; only qcow2 and raw can be written")
    if fresh.size < job.source.size:
        raise HostError(f"the new instance's disk of {human(fresh.size)} is smaller than the source's "
            f"{human(job.source.size)}", "name a larger flavor with -f")
    for flaw in fresh.flaws:
        raise HostError(f"{host.name}: {fresh.path} has {flaw}", FLAW_WAYS[flaw])
    if not job.takes_space:
        return 0
    there = host.script('[ ! -f "$1" ] || stat -c %b -- "$1"', job.new)  # a resumed run has some already
    rest = max(0, need - there.read(lambda said: int(said or 0)) * 512)
    free, wanted = free_space(host, fresh.path), rest + job.settings.space_reserve
    if free - others < wanted:
        taken = f", of which other disks and runs still need {human(others)}" if others else ""
        raise HostError(f"{host.name}: {human(free)} are free beside {fresh.path}{taken}, {human(wanted)} are needed",
            "free space there, or choose another " + ("volume type with --volume-type" if isinstance(
            job.landing, InPlace) else "host with availability_zone in -e"))
    return rest


def space_needed(top: DiskImage, disk: Disk, whole_file: bool, reserve: int) -> int:
    """Bytes needed for the new file, 2 % more because a running source grows, and `reserve`."""
    return (top.allocated if whole_file else disk.guest_bytes) * 102 // 100 + reserve


def stop_source(run: Run, new: Server) -> float:
    """Locks the source against its users and stops it; returns when it was asked to stop, by the monotonic clock."""
    cloud, plan, id = run.source, run.plan, run.plan.server.id
    place = f"{shorten(new.name, 60)} {new.id} takes its place; back with: migrena.py rollback {plan.run}"
    with run.screen.step("Stop source instance."):
        now, record = gate(run, Act.STOP_SOURCE), run.record
        was_running = record.was_running if record.stopped_at else not (
            now.source.server and now.source.server.is_stopped)  # since the survey somebody may have changed that
        if was_running != plan.was_running:
            cloud.mark(id, replace(plan, was_running=was_running).marks(MARK))
        with run.journal.act("stop source", server=id, was_running=was_running) as result:
            if not run.earlier:
                undo_stop(run)
            locked = cloud.lock(id, f"{LOCKED_BY}{plan.run}: {place}")
            asked = time.monotonic()
            result["request"] = cloud.stop(id, run.changed) or locked
        if now.has_copy and (starts := see(cloud, id, record.source_request).starts):  # after the look
            raise Kept(f"the source was started ({starts[0].name} at {starts[0].at}) after it had been stopped: "
                    "the copy is outdated", f"./migrena.py rollback {plan.run} undoes the run")
        run.screen.note("Done. Current status: SHUTOFF")
    return asked


def undo_stop(run: Run) -> None:
    """Registers that a failed run unlocks the source, and starts it if it ran before."""
    id = run.plan.server.id

    def undo() -> None:
        now = situation_now(run)
        allow(Act.GIVE_BACK, now, asked_in_undo(run))
        give_back(run.source, now, run.journal, run.changed)
        if run.keeps_destination:
            keep_as_seed(run, now)

    run.undo.on_failure(f"start source {id} again" if run.record.was_running else f"unlock source {id}", undo,
        lambda: run.keeps_destination and not run.record.stopped_at)


def keep_as_seed(run: Run, now: Situation) -> None:
    """Tells the journal that the destination has a seed of a source that was given back; raises Kept if it has more."""
    if not now.source.server or not now.destination.is_idle:
        raise Kept(f"no seed any more: {now}", next_commands(Act.GIVE_BACK, now))
    tell_seeded(run, run.record.copied)


def tell_seeded(run: Run, copied: str) -> None:
    """Tells the journal that the destination has a seed: all disks as they were copied at some time."""
    run.journal.write("seeded", copied=copied, disks={key: disk.top.size for key, disk in run.plan.disks.items()})


def give_back(cloud: Cloud, now: Situation, journal: Journal, changed: Callable[[Server], None]) -> None:
    """Unlocks the source if the lock is the run's, and starts it if it ran before."""
    if not (server := now.source.server):
        return
    if now.source.is_locked_by(now.run):
        with journal.act("unlock source", server=server.id):
            cloud.unlock(server.id)
    if now.was_running and not server.is_running:
        with journal.act("start source", server=server.id):
            cloud.wait(server.id, lambda seen: not seen.task, changed)  # it may just be being stopped
            cloud.start(server.id, changed)


def changed_since(record: RunRecord, cloud: Cloud, server: Server) -> list[str]:
    """What of a source's flavor and ports is no more as it was at the survey or the seed."""
    changes, when = list[str](), "seed" if record.seed else "survey"
    now = [server.flavor.vcpus, server.flavor.ram]
    if (was := record.facts.get("source_flavor", now)) != now:
        changes.append("the source had {} vCPUs and {} MiB of RAM at the {}, and has {} and {} now: "
                "it was resized".format(*was, when, *now))
    if not record.facts.get("has_nics", not record.facts.get("ports")):
        were = {row["source"] for row in record.facts["ports"]}
        changes += come_and_gone("port ", were, {one["id"] for one in ports_of(cloud.networks, server.id)}, when)
    return changes


def come_and_gone(kind: str, were: Collection[str], now: Collection[str], when: str) -> list[str]:
    """What a source got or lost after its survey or seed."""
    return [f"{kind}{one} was {'attached to' if one in now else 'detached from'} the source after the {when}"
        for one in sorted({*were} ^ {*now})]


def chain_now(run: Run, drive: Drive, planned: Sequence[DiskImage], *, shared: bool) -> tuple[DiskImage, ...]:
    """A disk and its bases as they are now; raises FinalError if their files or sizes are not as planned."""
    host = run.source_host
    chain = (stored_image(host, drive),) if drive.storage else disk_chain(
        host, drive.path, drive.format, shared=shared)
    were, are = ([(image.path, image.format, image.size) for image in images] for images in (planned, chain))
    if were != are:
        one, other = ("; ".join(f"{path}, {format}, {human(size)}" for path, format, size in images)
            for images in (were, are))
        raise FinalError(f"{host.name}: {drive.path} was replaced or resized since the survey: {one} became {other}",
            again_command(run))
    return chain


def require_safe_stop(run: Run) -> None:
    """Raises HostError if stopping the source could lose something, or it is not as it was at the survey."""
    plan, host, server = run.plan, run.source_host, run.source.server_retrying(run.plan.server.id)
    if not run.record.stopped_at and (changes := changed_since(run.record, run.source, server)):
        raise FinalError("; ".join(changes), f"undo that, or {again_command(run)}")
    if not server.is_running:  # a resumed run may find it stopping
        return
    domain = domain_of(host, plan.server.id, host.disk_of(plan.server.id))
    require_no_more_volumes(run, domain)
    if reasons := refuse_domain(host, domain, plan.disks):
        raise HostError.of(reasons)
    require_running(run, domain.state)
    for key, disk in plan.disks.items():
        if key not in domain.drives:
            raise HostError(f"{host.name}: by libvirt {disk.top.path} is no disk of the source any more")
        require_identity(host, disk.top)
        require_chain(host, domain.drives[key], disk.chain)
        chain_now(run, domain.drives[key], disk.chain, shared=True)


def require_no_more_volumes(run: Run, domain: Domain) -> None:
    """Raises HostError if a volume was attached since the survey, which would stay behind."""
    known = {disk.volume for disk in run.plan.disks.values()}
    more = [drive.volume for drive in domain.drives.values() if drive.volume and drive.volume not in known]
    if more and not run.settings.chosen:
        raise HostError(f"{run.source_host.name}: volume {', '.join(more)} was attached to the source since the survey",
            again_command(run))


def require_running(run: Run, state: str) -> None:
    """Raises FinalError if, by libvirt, the source's qemu has ended; Nova may notice ten minutes later."""
    if state.startswith(("shut off", "crashed")):
        raise FinalError(f"{run.source_host.name}: by libvirt, the source's qemu ended during the copy: {state}",
            f"find out why (/var/log/libvirt/qemu there); {again_command(run)}")


def recheck_source(run: Run, job: DiskJob) -> DiskJob:
    """The job with the stopped source's disk as it is now; raises HostError if it was replaced or has errors."""
    host, path, warn = run.source_host, job.source.path, run.screen.warn
    domain = domain_of(host, run.plan.server.id, host.disk_of(run.plan.server.id))
    if not (drive := domain.drives.get(job.key)):
        raise HostError(f"{host.name}: by libvirt {path} is no disk of the source any more")
    if other := misplaced(host, domain, drive):
        raise HostError.of([other])
    planned = run.plan.disks[job.key].chain
    top = replace(checked(host, chain_now(run, drive, planned, shared=False)[0]), identity=planned[0].identity)
    for flaw in top.flaws:
        raise HostError(f"{path} has {flaw}", FLAW_WAYS[flaw])
    if top.leaks:
        warn(f"{host.name}: {path} has {top.leaks:,} leaked clusters, which waste space and are copied too")
    require_unwatched(host, top)
    job = replace(job, source=top, stand=stand_of(host, top.node))
    if not top.node.has_locks and not host.succeeds("sh", "-c", "command -v rbd"):
        warn(f"{host.name} has no `rbd`: whether somebody else has {path} open cannot be seen")
    if job.key != ROOT:
        return job
    require_no_more_volumes(run, domain)
    for reason in refuse_metadata(host, domain):
        warn(f"{reason.problem}; {reason.way_out}")
    if run.plan.was_running and domain.ended:
        warn(f"{domain.ended}: its file systems are as after a power failure")
    return job


def transfer(run: Run, copies: Sequence[DiskCopy]) -> None:
    """Copies and verifies; raises as `with_retries`."""
    jobs = [copy.job for copy in copies]
    with run.screen.step("Migrate disk to destination instance."), run.journal.act(
            "copy", new=[job.new for job in jobs], length=sum(job.length for job in jobs)) as result:
        began, before = time.monotonic(), received(copies[0].both.ends())
        moved = for_each(run, copies, partial(transfer_disk, run))
        sent = max(0, received(copies[0].both.ends()) - before)
        result |= {"held": sum(one.held for one in moved),
            "digests": {job.key: one.digest for job, one in zip(jobs, moved, strict=True)}}
        report_moved(run, jobs, moved, sent, time.monotonic() - began)


def transfer_disk(run: Run, copy: DiskCopy) -> Moved:
    job, host = copy.job, copy.both.destination
    in_place = isinstance(job.landing, InPlace)
    inode = "" if in_place else host.run("stat", "-c", "%i", "--", job.fresh.path).strip()
    run.journal.write(
        "job", disk=job.key, path=job.source.path, fresh=job.fresh.path, new=job.new, kept=job.landing.kept,
        host=host.name, stand=job.stand, inode=inode, whole_file=job.whole_file, in_place=in_place,
        **({"storage": dict(job.source.storage)} if job.source.storage else {}))

    def check() -> None:
        gate(run, Act.WRITE, is_held=True)
        require_room(copy)

    def count(chunk: Chunk, done: int) -> None:
        copy.both.count(chunk, done)
        run.journal.write("chunk", disk=job.key, offset=chunk.offset, length=chunk.length, done=done)

    callbacks = Callbacks(partial(journaled_progress, run, job.key), count, at_intervals(10.0, check))

    def attempt(ends: Ends) -> Moved:
        gate(run, Act.WRITE)
        lock_fresh(job, ends)
        return move_disk(ends, copy.begun(), callbacks, copy.known)[0]

    run.screen.note(f"{run.label(job.key)}{run.source_host.name}:{job.source.path}")
    run.screen.note(f"-> {host.name}:{job.fresh.path}")
    moved = with_retries(copy.both, attempt, "stays stopped")
    rate = moved.held / max(moved.seconds, 0.001)
    note = f"both ends have digest {moved.digest[:16]}…" if moved.digest else "not verified (--no-verify)"
    note += f", {human(moved.unread)} of it from before the stop, unchanged by the dirty bitmap" if moved.unread else ""
    what = f"{human(moved.held)} that had changed, in" if moved.is_rest else f"{human(moved.held)} in"
    run.screen.note(f"Done. {what} {duration(moved.seconds)}{'' if moved.is_rest else f', {human(rate)}/s'}; {note}")
    return moved


def require_room(copy: DiskCopy) -> None:
    """Raises FinalError if the copy leaves less than SPACE_RESERVE on the destination's file system."""
    job, host = copy.job, copy.both.destination
    if job.takes_space and (free := free_space(host, job.fresh.path)) < job.settings.space_reserve:
        raise FinalError(f"{host.name}: only {human(free)} are left beside {job.fresh.path}: a full disk pauses its "
            "guests", "free space there, and run it again; the limit is SPACE_RESERVE")


def report_moved(run: Run, jobs: Sequence[DiskJob], moved: Sequence[Moved], sent: int, seconds: float) -> None:
    count = sum(one.held for one in moved)
    rate = count / max(seconds, 0.001)
    for job, one in zip(jobs, moved, strict=True):
        run.report.copy["disks"][job.key] |= {
            "bytes": one.held, "length": job.length, "digest": one.digest, "seconds": round(one.seconds, 2)}
    run.report.copy |= {
        "verified": all(one.digest for one in moved), "digest": moved[0].digest,
        "proven_by_bitmap": sum(one.unread for one in moved), "bytes": count, "length": sum(job.length for job in jobs),
        "sent": sent, "sent_per_held": round(sent / max(count, 1), 4),
        "seconds": round(seconds, 2), "rate": round(rate)}
    run.journal.write("finished", clouds=[run.source.url, run.destination.url],
        rate=round(rate) if count > MiB and not moved[0].is_rest else 0)


def at_intervals(seconds: float, act: Callable[[], object]) -> Callable[[], None]:
    """Calls `act` at most once in so many seconds."""
    last = time.monotonic()

    def do() -> None:
        nonlocal last
        if time.monotonic() - last > seconds:
            act()
            last = time.monotonic()

    return do


def with_retries(both: BothEnds, act: Callable[[Ends], T], meanwhile: str) -> T:
    """The result of a function on both ends, with retries.

    Raises a HostError that a retry cannot help with, or that of the last attempt; a further chunk renews them.
    """
    run, failed, arrived = both.run, 0, 0
    both.arrived.clear()
    while True:
        try:
            if failed:
                both.renew()
            return act(both.ends())
        except HostError as error:
            failed, arrived = failed + 1 if len(both.arrived) == arrived else 1, len(both.arrived)
            if both.is_ending or failed > run.settings.retries or isinstance(error, FinalError) or any(
                    words in str(error) for words in DISK_FULL):
                raise
            pause = min(2 ** failed, 60)
            run.journal.write("retry", attempt=failed, error=str(error), pause=pause)
            run.screen.warn(f"{error}; attempt {failed + 1} of {run.settings.retries + 1} follows in {pause} s, "
                f"the source {meanwhile}")
            for _ in range(pause):
                time.sleep(1.0)
                if both.is_ending:
                    raise


@contextmanager
def journaled_progress(run: Run, key: str, total: int) -> Iterator[Show]:
    """Progress on the screen, and every five seconds in the journal, for `status`."""
    told = 0.0
    with run.screen.progress(total, run.label(key)) as show:
        def both(done: int) -> None:
            nonlocal told
            show(done)
            if time.monotonic() - told > 5 or done == total:
                told = time.monotonic()
                run.journal.write("progress", disk=key, done=done, total=total)

        yield both


def start_named(run: Run, side: str, id: str) -> Server | None:
    """Starts the instance of `src` or `dst` if -a says so, else returns None."""
    if run.settings.start_after not in ("all", side):
        return None
    name, cloud = SIDES[side], run.destination if side == "dst" else run.source
    with run.screen.step(f"Start {name} instance."):
        if side == "dst":
            gate(run, Act.START_DESTINATION)
        with run.journal.act(f"start {name}", server=id):
            started = cloud.start(id, run.changed)
        run.screen.note(f"Done. Current status: {started.status}")
    run.report.started.append(name)
    return started


def disk_lines(plan: Plan) -> Iterator[str]:
    """A line for each disk and base: what and where it is, and how it is copied."""
    for key, disk in plan.disks.items():
        top, how = disk.top, "what the guest sees"
        if key == ROOT and plan.may_copy_file:
            how = f"the file is copied, or {how}"
        there = "in the file" if top.is_file else "allocated"
        if key in plan.requests:
            volume, asked = plan.volumes[key], plan.requests[key]
            how += (f", into a new volume of {asked['size']} GiB"
                   f"{', type ' + asked['volume_type'] if 'volume_type' in asked else ''}; {volume.label}")
        yield (f"  {key:10} {top.path}: {top.format}, {human(top.size)} to the guest, "
               f"{human(top.allocated)} {there}; {how}")
        yield from (f"  base       {base.path}: {base.format}, {human(base.length)}" for base in disk.chain[1:])


def estimate_lines(settings: Settings, plan: Plan, known: float, report: Report) -> Iterator[str]:
    """How much is moved and how long that takes; puts the same into the report."""
    disk, top = plan.root, plan.root.top
    rest = sum(one.guest_bytes for key, one in plan.disks.items() if key != ROOT)
    is_file = plan.may_copy_file
    views = ({"file": top.allocated + rest} if is_file else {}) | (
        {} if is_file and (top.format == "raw" or not disk.base) else {"guest": disk.guest_bytes + rest})
    rates = {f"{human(settings.rate)}/s, the limit": float(settings.rate)} if settings.rate else {
        f"{human(known)}/s, as in the last run": known} if known else {"1 Gbit/s": 1.25e8, "10 Gbit/s": 1.25e9}
    is_down = plan.was_running and not settings.warm
    kind, end = ("downtime", ", plus the time to stop and start") if is_down else ("duration", "")
    for which, amount in views.items():
        space = space_needed(top, disk, which == "file", settings.space_reserve + rest * 102 // 100)
        yield (f"to move      {human(amount)}: "
               f"{'the file' if which == 'file' else 'what the guest sees' + ', if the bases differ' * is_file}")
        yield f"  space      {human(space)} at the destination"
        for name, rate in rates.items():
            report.copy["estimates"].append({"view": which, "bytes": amount, "space": space, "rate": rate,
                "why_rate": name, "seconds": round(amount / rate, 1)})
            yield f"  {kind}   about {duration(amount / rate)} at {name}{end}"


def port_lines(settings: Settings, plan: Plan, source: SourceFacts, report: Report) -> Iterator[str]:
    """The tables of ports and attributes; puts the same into the report."""
    report.ports = [{
        "name": port.facts.get("name") or "", "network": port.network["name"], "new_network": made.network,
        "network_id": made.request["network_id"], "mac": port.mac, "new_mac": "mac_address" not in made.request,
        "addresses": [ip for ip, _ in port.addresses],
        "new_addresses": "fixed_ips" not in made.request or any("ip_address" not in one and (
            "mac_address" not in made.request or automatic_address(cidr, port.mac) != ip)
            for one, (ip, cidr) in zip(made.request["fixed_ips"], port.addresses, strict=True)),
        "groups": groups_wanted(settings, [port]), "floating_ips": [ip.address for ip in port.floating],
        "new_floating_ips": len(made.floating)}
        for port, made in zip(source.ports, plan.ports, strict=True)]
    report.attributes = [asdict(one) for one in plan.attributes]
    rows = [(row["network"] + (f" -> {made.network}" if made.network != row["network"] else ""),
            "new" if row["new_mac"] else f"{row['mac']} kept",
            "new" if row["new_addresses"] else f"{', '.join(row['addresses'])} kept" if row["addresses"] else "none",
            ", ".join(row["groups"]) or "none", ", ".join(row["floating_ips"]) + (
            "" if not row["floating_ips"] else f" {settings.floating_ip}" if made.floating else " left behind"))
            for made, row in zip(plan.ports, report.ports, strict=True)]
    if "nics" in settings.extra_args:
        yield f"ports        none of the source's: -e has nics, {settings.extra_args['nics']}"
    elif rows:
        yield "ports"
        yield from (f"  {line}" for line in aligned(
            [("NETWORK", "MAC", "ADDRESSES", "GROUPS", "FLOATING IP"), *map(tuple, rows)]))
    else:
        yield "ports        the source has none"
    if plan.attributes:
        yield "attributes"
        yield from (f"  {line}" for line in aligned([("NAME", "HERE", "THERE", ""), *(
            (one.name, one.here, one.there, one.fate) for one in plan.attributes)]))


def plan_lines(settings: Settings, plan: Plan, source: SourceFacts, known: float, report: Report) -> Iterator[str]:
    """The plan's lines for the dry run; puts the same into the report."""
    server, top = plan.server, plan.root.top
    report.source |= {"status": server.status, "disks": {key: one.chain for key, one in plan.disks.items()}}
    yield f"source       {server.name} {server.id}, {server.status}, on {server.hypervisor}"
    yield from disk_lines(plan)
    yield (f"destination  {settings.dst_name}, flavor {plan.flavor.name}, image {plan.image.name} "
           f"({plan.image.id or ('carried first' if plan.carried else 'no id')}), on the host that Nova chooses")
    differs = [what for what, _ in plan.image.differs(source.image)] if source.image else None
    report.destination |= {"name": settings.dst_name, "flavor": plan.flavor, "image": {
        "id": plan.image.id, "name": plan.image.name, "bytes": plan.carried.size if plan.carried else 0,
        "differs": differs}}
    yield from ["  image      was not compared: the source's is gone, or could not be read"] if differs is None else (
        f"  image      has {what} of the source's" for what in differs)
    yield from (f"  flavor     has {what} of the source's" for what, _ in plan.flavor.differs(server.flavor))
    transport, why = pick_transport(
        settings, ["nbd-server"] if "nbd-server" in source.lacking else [], top, plan.may_copy_file)
    yield (f"transport    {transport}{' with TLS' if settings.tls else ' in clear'}: {why} "
           "(if the destination's host has the tools)")
    if plan.carried:
        yield f"to move      {human(plan.carried.size)}: the image, before anything is stopped"
    report.copy = {"transport": transport, "why_transport": why, "estimates": [], "disks": {
        key: {"source": disk.top.path, "bytes": disk.guest_bytes, "length": disk.top.size, "volume": disk.volume,
            "volume_type": plan.requests.get(key, {}).get("volume_type", "")} for key, disk in plan.disks.items()},
            **{key: getattr(settings, key) for key in (
            "tls", "warm", "seed", "cutover_at", "bitmap", "start_after")}}
    yield from estimate_lines(settings, plan, known, report)
    if settings.warm and plan.was_running:
        yield "downtime     to find and send what changes meanwhile, and to stop and start"
        yield from [f"bitmap       {top.path} has a dirty bitmap meanwhile"] if settings.bitmap else ()
    yield from port_lines(settings, plan, source, report)
    yield ("guest        cloud-init treats the new instance id as a first boot: new SSH host keys, perhaps passwords "
           "(see README)")
    if settings.cutover_at:
        yield f"cut-over     at {datetime.fromisoformat(settings.cutover_at):%Y-%m-%d %H:%M %z}"
    start = f"start {settings.start_after}" if settings.start_after else "nothing is started"
    yield f"afterwards   {'the source runs on until `resume` cuts over' if settings.seed else start}"


def check_times(call: Call, settings: Settings) -> None:
    """Raises UsageError for options of the cut-over that do not fit together."""
    asked = call.flags.get("cutover_at")
    unknown = [how for how in settings.answers if how.startswith("command:") and not settings.seed
        and not shutil.which(shlex.split(how.partition(":")[2])[0])]
    for is_wrong, problem, way_out in (
            (settings.seed and settings.cutover_at and asked,
            "--seed ends before the cut-over, --cutover-at waits for it", "give one of them"),
            (asked is not None and not str(asked).strip(), "--cutover-at: no time is given", "give one, or now"),
            (asked and not (settings.cutover_at or settings.run), "--cutover-at now is for `resume`", "leave it out"),
            ({"every", "late"} & set(call.flags) and not settings.cutover_at, "--every and --late need --cutover-at",
            "give --cutover-at too"),
            (settings.answers and settings.start_after not in ("all", "dst"),
            "--await needs a destination that is started", "give -a dst or -a all too"),
            ("await_timeout" in call.flags and not settings.answers, "--await-timeout needs --await",
            "give --await too"),
            (unknown, f"--await {', '.join(unknown)}: there is no such command", "name one with its path")):
        if is_wrong:
            raise UsageError(problem, way_out)


def refuse_times(settings: Settings, server: Server | None) -> list[Reason]:
    due = datetime.fromisoformat(settings.cutover_at) if settings.cutover_at else None
    is_stopped = bool(server and not server.is_running and (settings.seed or due))
    return reasons_from(
        (is_stopped, f"the source is {f'{server.status} {server.task}'.rstrip() if server else ''}, and does not run: "
         "there is nothing to copy while it runs",
         "start it, or leave out --seed and --cutover-at (resume: --cutover-at now)"),
        (due and due.timestamp() < time.time(), f"the time of the cut-over, {due:%Y-%m-%d %H:%M %z}, has passed"
         if due else "", "--cutover-at with a later time, or now"))


def in_same_project(settings: Settings, cloud: Cloud, server: Server) -> Settings:
    """The settings with the name of the source's project for --dst-project same."""
    if settings.dst_project != "same":
        return settings
    with refusing():
        return replace(settings, dst_project=cloud.project_name(str(server.facts.get("tenant_id"))))


def survey_both(call: Call, settings: Settings, screen: Screen,
        stack: ExitStack) -> tuple[Settings, SourceFacts, DestinationFacts]:
    """Surveys both clouds, at once if the settings say all; else name and project are the source's."""
    creds = {side: credentials(side, settings, call.environment) for side in SIDES}
    if settings.dst_name and settings.dst_project != "same":
        return settings, *in_parallel(lambda: survey_source(settings, creds["src"], screen, stack),
            lambda: survey_destination(settings, creds["dst"]))
    source = survey_source(settings, creds["src"], screen, stack)
    if not (source.cloud and source.server):
        raise Refused.of(source.problems)
    settings = in_same_project(replace(settings, dst_name=settings.dst_name or source.server.name),
        source.cloud, source.server)
    return settings, source, survey_destination(settings, credentials("dst", settings, call.environment))


def bring_surroundings(call: Call, settings: Settings, undo: Undo, report: Report) -> str:
    """Makes what the source needs and the destination lacks; returns the import's run, if there was one."""
    lost = list[str]()
    with undo.screen.timed("Survey"), refusing():
        source = Cloud("source", credentials("src", settings, call.environment))
        there, creds = cloud_of_files(call, settings, "dst")
        server = source.server(settings.src_uid)
        catalog = Catalog(source, str(server.facts["tenant_id"]))
        project = source.project_name(catalog.project) if settings.dst_project == "same" else settings.dst_project
        labels = [label for label in IN_FILES if (label in SURROUNDING if settings.with_network else (
            label != "project" or settings.dst_project == "same"))]
        found = described_all(catalog, (one for one in needed_by(catalog, server, lost) if one[0] in labels), lost)
    for line in lost:
        undo.screen.warn(f"left out: {line}")
    wanted = [Resource(LABELS[one["type"]], one, f"source, number {number}") for number, one in enumerate(found, 1)]
    run = import_resources(call, replace(settings, project=project, cloud="dst"), undo, report,
        Scopes(Catalog(there), creds), wanted, [], has_rules=True)
    undo.has_begun = False  # the copy can be interrupted again
    return run


def copy_instance(call: Call, settings: Settings, undo: Undo, report: Report) -> int:
    """migrena without a subcommand: makes what the source needs, if that is asked for, and moves it."""
    check_extra(settings.extra_args)
    if not settings.warm and {"max_downtime", "warm_passes", "warm_timeout", "bitmap"} & set(call.flags):
        raise UsageError("--max-downtime, --warm-passes, --warm-timeout and --bitmap need --warm", "give --warm too")
    check_times(call, settings)
    brought = bring_surroundings(call, settings, undo, report) if settings.with_network or settings.with_all else ""
    if settings.dry_run and any(row["result"] == "to be created" for row in report.resources):
        undo.screen.say("The plan of the copy can be made once these are there.", always=True)
        return 0
    try:
        return survey_and_copy(call, settings, undo, report)
    except Refused as error:
        if not brought:
            raise
        raise Kept.of([*error.reasons, Reason(f"what run {brought} made for it stays",
            f"./migrena.py rollback {brought} removes it")]) from error


def survey_and_copy(call: Call, settings: Settings, undo: Undo, report: Report) -> int:
    """Survey, refuse, then print or execute the plan."""
    extra = {key: value for key, value in settings.extra_args.items() if key != "nics" or value is not None}
    folder, screen, run = state_folder(settings, call.environment), undo.screen, new_run()
    settings = replace(settings, extra_args=extra)
    with ExitStack() as stack:
        if not settings.dry_run:  # before the survey, so that its results stay valid
            stack.enter_context(only_run_of(folder, settings.src_uid, run))
        with screen.timed("Survey"):
            settings, source, destination = survey_both(call, settings, screen, stack)
        if there := already_there(settings, destination):
            return report_already_moved(settings, there, screen, report)
        with collecting(missing := list[Reason]()):
            if source.volumes and destination.cloud:
                store = destination.cloud.volumes
                destination.volume_types, destination.volume_zones = store.types(), store.zones()
                destination.volume_limits = store.limits()
            survey_networks(settings, source, destination)
            if (other := destination.cloud) and (server := source.server):
                destination.zones = other.zones() if server.facts.get("availability_zone") else ()
                destination.key = other.key_pair(source.key.name) if source.key else None
                destination.server_groups = other.server_groups() if source.server_group else {}
        destination.problems = [*destination.problems, *missing]
        reasons = [*refuse(settings, source, destination, partial(way_on, folder)),
                *refuse_times(settings, source.server)]
        if reasons or not destination.cloud:
            raise Refused.of(reasons)
        plan, (cloud, _, host, _) = make_plan(settings, source, destination, run), source.whole
        clouds = cloud, destination.cloud
        report.run, report.left_behind, report.source = run, list(plan.left_behind), reported(cloud, plan.server)
        report.destination["cloud"] = destination.cloud.url
        warn_left_behind(screen, plan)
        if settings.dry_run:
            report.result, report.api_calls = "planned", {cloud.label: cloud.calls for cloud in clouds}
            for line in plan_lines(settings, plan, source, last_rate(folder, [cloud.url for cloud in clouds]), report):
                screen.say(line, always=True)
            return 0
        return execute_or_undo(Run(
            settings, screen, begin_journal(folder, settings, plan, clouds), undo, report, plan, *clouds, host))


def begin_journal(folder: Path, settings: Settings, plan: Plan, clouds: Sequence[Cloud]) -> Journal:
    """A new journal with its first line: what resume and rollback need, without secrets. Raises UsageError."""
    journal = Journal(folder, plan.run)
    with journal.beginning():
        journal.write("run", pid=os.getpid(), seed=settings.seed, source=plan.server.id, source_name=plan.server.name,
                source_host=plan.server.hypervisor, name=settings.dst_name,
                clouds=[cloud.url for cloud in clouds], where=[cloud.identity for cloud in clouds],
                was_running=plan.was_running, flavor=plan.flavor.id, image=plan.image.id,
                source_flavor=[plan.server.flavor.vcpus, plan.server.flavor.ram],
                ports=[asdict(port) for port in plan.ports], has_nics="nics" in settings.extra_args,
                disks={key: disk.top.size for key, disk in plan.disks.items()},
                settings={**{name: getattr(settings, name) for name in FOR_RESUME},
                **{f"{side}_disk_path": settings.of(side).disk_path for side in SIDES}})
    return journal


def report_already_moved(settings: Settings, there: Server, screen: Screen, report: Report) -> int:
    screen.say(f"already migrated: {settings.src_uid} is {there.name} {there.id}, by run {there.metadata[DONE]}")
    report.run, report.result = there.metadata[DONE], "already"
    report.destination = {"id": there.id, "name": there.name, "host": there.hypervisor}
    if not (settings.json or settings.quiet):
        print(there.id)
    return 0


def warn_left_behind(screen: Screen, plan: Plan) -> None:
    for id in plan.with_snapshots:
        screen.note(f"The snapshots of volume {id} stay behind.")
    for key, volume in plan.volumes.items():
        if (zone := volume.facts.get("availability_zone")) and "availability_zone" not in plan.requests.get(key, {}):
            screen.note(f"The destination has no zone {zone} for volumes: {volume.label} gets the default one.")
    for what in plan.left_behind:
        screen.warn(f"{what} stays behind")
    if plan.server.flavor.swap or "disk.swap" in plan.root.beside:
        screen.note("The swap disk is not copied: Nova makes a new one.")
    if plan.root.has_nvram:
        screen.note("The source uses UEFI: its NVRAM (boot entries) is copied, for a Nova that keeps it at a start.")


# ---- 17. Status ------------------------------------------------------


def show_status(call: Call, settings: Settings, undo: Undo, report: Report) -> int:
    """The subcommand `status`: shows all runs, or one, from the journals."""
    folder = state_folder(settings, call.environment, to_write=False)
    if settings.watch and not settings.json:
        return watch(settings, folder)
    records = records_in(folder, settings.run, undo.screen.warn)
    if settings.json:
        told = [as_json(record) for record in records]
        print(json.dumps(told[0] if settings.run else told, indent=2))
    elif records:
        for line in detail_lines(records[0]) if settings.run else table_lines(records):
            print(printable(line))
    else:
        undo.screen.say(f"No runs in {folder}.")
    return 0


def records_in(folder: Path, run: str, warn: Callable[[str], object]) -> list[RunRecord]:
    """The runs by their journals, or one; warns about those that cannot be read, raises UsageError for that one."""
    records = []
    for one in [find_run(folder, run)] if run else known_runs(folder):
        try:
            records.append(read_run(folder, one))
        except UsageError as error:
            if run:
                raise
            warn(str(error))
    return records


def watch(settings: Settings, folder: Path) -> int:
    """Draws the table anew every two seconds, as much as the terminal has room for, until a signal."""
    if not sys.stdout.isatty():
        raise UsageError("--watch needs a terminal", "leave it out, or give --json")
    try:
        while True:
            records, room = records_in(folder, settings.run, str), shutil.get_terminal_size()
            lines = [*(detail_lines(records[0]) if settings.run else table_lines(records))] if records else ["No runs."]
            counts = Counter(record.state for record in records)
            head = f"{time.strftime('%H:%M:%S')}  {', '.join(f'{count} {state}' for state, count in counts.items())}"
            shown = lines if len(lines) < room.lines - 1 else [
                *lines[: room.lines - 3], f"… {len(lines) - room.lines + 3} more lines"]
            drawn = "".join(f"{printable(line)[: room.columns]}\033[K\n" for line in (head, *shown))
            print(f"\033[H{drawn}\033[J", end="", flush=True)
            time.sleep(2)
    except Interrupted as error:
        if error.number != signal.SIGINT:
            raise
    return 0


def as_json(record: RunRecord) -> dict[str, Any]:
    """A run as JSON, with the report's names."""
    facts, told, clouds = record.facts, asdict(record), [*record.facts.get("clouds", ()), "", ""]
    del told["before_seed"], told["last_pass"], told["seeds"]
    told["copy"] = {key: told.pop(key) for key in ("rate", "retries")}
    told["copy"] |= {"done": record.done, "bytes": record.total, "seconds_left": record.seconds_left}
    told["seed"] = {"copied": record.copied, "disks": record.seed["disks"], **{
        key: record.last_pass.get(key) for key in ("changed", "downtime")}} if record.seed else {}
    told["source"] = {"cloud": clouds[0], "id": record.source, "name": facts.get("source_name", ""),
        "host": facts.get("source_host", "")}
    told["destination"] = {"cloud": clouds[1], "id": record.destination, "name": facts.get("name", ""),
        "host": next((disk.job["host"] for disk in record.disks.values() if disk.job), "")}
    told["error"] = [{"problem": record.error, "way_out": ""}] if record.error else []
    return told | {"result": told.pop("state"), "not_undone": told.pop("left"),
        "was_running": record.was_running, "step": record.step}


def table_lines(records: Sequence[RunRecord]) -> Iterator[str]:
    """An aligned line for each run, followed by what is left behind."""
    rows = [("RUN", "STATE", "STEP", "BYTES", "%", "RATE", "LEFT", "SOURCE -> DESTINATION"), *(
        (record.run, record.state, "-" if record.state == "done" else record.step,
         human(record.done) if record.total else "-", str(record.done * 100 // record.total) if record.total else "-",
         f"{human(record.rate)}/s" if record.rate else "-",
         duration(record.seconds_left) if record.seconds_left else "-",
         f"{record.facts.get('source_name') or record.source or '?'} -> {record.facts.get('name') or '?'}")
        for record in records)]
    head, *lines = aligned(rows)
    yield head
    for line, record in zip(lines, records, strict=True):
        yield line
        yield from (f"    {told}" for told in seed_lines(record))
        yield from (f"    {told}" for told in what_to_do(record))


def seed_lines(record: RunRecord) -> Iterator[str]:
    """The age of a run's seed, what had changed in the last pass, and the expected downtime."""
    if record.seed and record.state not in ("done", "rolled back"):
        age = (datetime.now(timezone.utc) - datetime.fromisoformat(record.copied)).total_seconds()
        passed, down = record.last_pass, record.last_pass.get("downtime")
        would = f"; stopped now, it would be down for about {duration(down)}" if down else ""
        changed = human(passed.get("changed", 0))
        yield f"seed         {duration(max(0.0, age))} old" + (
            f"; in the last pass {changed} had changed{would}" if passed else "")


def what_to_do(record: RunRecord) -> Iterator[str]:
    """What a failed run has left behind, and the next commands."""
    yield from (f"left behind: {line}" for line in record.left)
    if record.state == "killed":
        yield "it may have left " + {"image": "an incomplete image", "import": "what it has made by then"}.get(
            record.job, "the new instance, and the mark and the lock on the source")
    has_seed = record.state == "seeded" or (
        record.seed and record.state in ("killed", "left") and not record.stopped_at)
    if has_seed:
        yield (f"update: ./migrena.py resume {record.run} --seed    cut over: {record.cut_over}    "
               f"remove: ./migrena.py rollback {record.run}")
    if record.state in ("killed", "left"):
        for kind in KINDS:
            if there := [*record.made(kind).values(), *(f"one for {of}" for of in record.unanswered(kind))]:
                yield f"made, and perhaps still there: {kind} {', '.join(there)}"
        can_go_on = not (record.is_undoing or has_seed) and record.has_begun
        yield (f"{f'continue: {record.go_on}    ' if can_go_on else ''}"
               f"undo: ./migrena.py rollback {record.run}")


def detail_lines(record: RunRecord) -> Iterator[str]:
    """One run with its acts and their seconds."""
    told = as_json(record)
    yield f"run          {record.run}, {record.state}"
    for side in ("source", "destination"):
        name, id, host, cloud = (told[side][key] or "(unknown)" for key in ("name", "id", "host", "cloud"))
        yield f"{side:11}  {name} {id} on {host}, {cloud}"
    yield f"began        {record.began}, the source was {'running' if record.was_running else 'stopped'}"
    if record.total:
        yield (f"copy         {human(record.done)} of {human(record.total)}, {record.done * 100 // record.total}%, "
               f"{human(record.rate)}/s{f', {duration(record.seconds_left)} left' if record.seconds_left else ''}; "
               f"{sum(len(disk.arrived) for disk in record.disks.values())} chunks, {record.retries} retries")
    yield from seed_lines(record)
    for act in record.acts:
        took = seconds_between(act.began, act.ended)
        seconds_taken = f"in {duration(took)}" if took >= 0 else "(the clock was set back)"
        result = {"done": f"done {seconds_taken}", "failed": f"failed: {act.facts.get('error', '')}"}.get(
            act.result, "under way" if record.state == "running" else "interrupted")
        yield f"  {act.began[:19].replace('T', ' ')}  {act.name}: {result}"
    if record.error:
        yield f"error        {record.error}"
    yield from what_to_do(record)


# ---- 18. Resume ------------------------------------------------------


def survey_made(settings: Settings, creds: Facts, record: RunRecord, screen: Screen) -> Earlier:
    """Surveys what the run had made, by its id or its mark, and the files beside its disk."""
    found = Earlier(record)
    with collecting(found.problems):
        found.cloud = cloud = Cloud("destination", creds, settings.dst_glance_endpoint)
        id = record.destination or next((server.id for server in cloud.made_by(record.run, record.source)), "")
        found.seen = seen = see(cloud, id, record.destination_request)
        if seen.server and seen.server.host:
            settings = settings.of("dst")
            with host_of(seen.server, settings, screen) as host:
                for key, disk in record.disks.items() or [(ROOT, DiskRecord())]:
                    path = str(disk.job.get("fresh") or host.disk_of(id))
                    if disk.job.get("in_place"):
                        found.in_place = {*found.in_place, *({key} & {*record.swapped})}
                        continue
                    new, kept = files_beside(path, record.run)
                    was_swapped = host.succeeds("test", "-e", kept) and not host.succeeds("test", "-e", new)
                    inode = host.script('[ ! -e "$1" ] || stat -c %i -- "$1"', path).strip()  # not yet made by Nova
                    if was_swapped or key in record.swapped:
                        found.in_place = {*found.in_place, key}
                    elif disk.job.get("inode", inode) != inode:
                        found.seen = replace(seen, disk="is not the one that Nova made: somebody replaced it")
    return found


def situation_of(source: SourceFacts, earlier: Earlier) -> Situation:
    record, seen = earlier.record, Seen(earlier.record.source, source.server)
    # Without a copy everything is repeated.
    stands = {key: disk.job["stand"] for key, disk in record.disks.items() if disk.job.get("stand")}
    if source.cloud and source.server and (record.is_seed or (stands and not earlier.is_in_place)):
        seen = see(source.cloud, record.source, record.source_request)
    if source.server and stands and not earlier.is_in_place:
        now = {key: stand_of(source.host, disk.top.node) for key, disk in source.disks.items()} if source.host else {}
        if any(now.get(key) != was for key, was in stands.items()) or not (seen.server and seen.server.is_stopped):
            seen = replace(seen, disk="was changed, or is in use")
    return situation(record, seen, earlier.seen, earlier.is_in_place)


def refuse_state(record: RunRecord) -> None:
    run, told = record.run, {"done": "was successful",
        "failed": "has failed and was rolled back", "rolled back": "was rolled back"}
    if record.is_undoing and record.state in ("killed", "left"):
        raise Refused(f"run {run} was being rolled back", f"./migrena.py rollback {run}")
    if record.state in told:
        raise Refused(f"run {run} {told[record.state]}: there is nothing to resume",
            "" if record.state == "done" else "give the command again")
    if record.job == "image":
        raise Refused(f"run {run} carried an image, which cannot be resumed",
            f"./migrena.py rollback {run}, then the command again")
    if record.job == "import":
        raise Refused(f"run {run} was an import", "give its command again: it makes what is missing")


def is_seed_again(record: RunRecord, now: Situation) -> bool:
    """Whether the source runs, or has run since a cut-over stopped it: then the destination has only a seed of it."""
    has_own_data = now.stage >= Stage.DONE or (now.stage >= Stage.SWAPPED and not now.destination.is_idle)
    has_run = bool(now.source.starts) or not (now.source.server and now.source.server.is_stopped)
    return record.is_seed and (not record.stopped_at or (has_run and not has_own_data))


def refuse_changed(
        settings: Settings, source: SourceFacts, record: RunRecord, *, is_stopped: bool = False) -> list[Reason]:
    """Reasons to refuse in what the source got or lost since its survey or seed, and in one not stopped yet."""
    server, reasons, when = source.server, list[Reason](), "seed" if record.seed else "survey"
    known = record.seed.get("disks") or record.facts.get("disks", {})
    there = {key: disk.top.size for key, disk in source.disks.items()}
    changes = come_and_gone("", known, there, when) if known and there else []
    changes += [f"{key} had {human(known[key])} at the {when}, and has {human(size)} now: the source was resized"
        for key, size in there.items() if known.get(key, size) != size]
    if source.cloud and server and source.host and not is_stopped:
        known_lock = replace(server, metadata={}, locked=server.locked and lock_of(server) != record.run)
        reasons += refuse_server(known_lock) + refuse_volumes(settings, source, server, DestinationFacts(None))
        reasons += [reason for disk in source.disks.values() for reason in refuse_disk(disk)]
        reasons += refuse_tools(source.host.name, source.lacking, settings, "nbd-server")
        with collecting(reasons):
            changes += changed_since(record, source.cloud, server)
    way = f"undo that, or ./migrena.py rollback {record.run} and a new {when if record.seed else 'run'}"
    return [*(Reason(change, way) for change in changes), *reasons, *(
        [] if is_stopped else refuse_times(settings, server))]


def as_seed(settings: Settings, earlier: Earlier, now: Situation) -> tuple[Settings, Earlier, Situation]:
    """The same for a destination that has only a seed: what was done to the source before is undone."""
    source = replace(now.source, starts=(), relocks=(), disk="")
    return (replace(settings, warm=settings.warm or settings.transport != NbdTransport.name),
        replace(earlier, in_place=()),
        replace(now, stage=Stage.COPYING, is_seed=True, is_in_place=False, source=source))


def tell_judged(screen: Screen, report: Report, now: Situation, judged: Mapping[Act, Sequence[Reason]]) -> int:
    """Shows the Situation, and why acts must not be done; returns the exit code."""
    say = partial(screen.say, always=True)
    say(f"seen  {now}")
    for act, reasons in judged.items():
        say(f"{act.value}: {'must not be done' if reasons else 'may be done'}")
        for reason in reasons:
            say(f"  {reason.problem}")
            say(f"    try: {reason.way_out}")
    is_refused = any(judged.values())
    report.run, report.result = now.run, "refused" if is_refused else "planned"
    report.error = [asdict(reason) for reasons in judged.values() for reason in reasons]
    return 3 if is_refused else 0


def resume(call: Call, settings: Settings, undo: Undo, report: Report) -> int:
    """The subcommand `resume`: continues an interrupted run, or updates a seed or cuts over to it."""
    folder, screen = state_folder(settings, call.environment), undo.screen
    run = find_run(folder, settings.run)
    refuse_state(record := read_run(folder, run))
    with ExitStack() as stack:
        stack.enter_context(only_run_of(folder, record.source, run))
        record = read_run(folder, run, is_ours=True)  # again, now that the lock is ours
        refuse_state(record)
        settings = call.settings(record.facts.get("settings"))
        check_times(call, settings)
        settings = replace(settings, cutover_at="" if settings.seed else settings.cutover_at)
        creds = {side: credentials(side, settings, call.environment) for side in SIDES}
        with screen.timed("Survey"):
            source, earlier = in_parallel(lambda: survey_source(settings, creds["src"], screen, stack),
                lambda: survey_made(settings, creds["dst"], record, screen))
        if source.cloud and earlier.cloud:
            require_same_clouds(record, (source.cloud, earlier.cloud))
        now, reasons = situation_of(source, earlier), [*source.problems, *earlier.problems]
        if is_again := is_seed_again(record, now):
            settings, earlier, now = as_seed(settings, earlier, now)
        is_stopped = not is_again and bool(record.stopped_at)
        reasons += [] if now.is_in_place else refuse_changed(settings, source, record, is_stopped=is_stopped)
        if is_stopped and settings.seed:
            reasons.append(Reason(f"run {run} has stopped the source for the cut-over",
                f"./migrena.py resume {run} completes it, ./migrena.py rollback {run} undoes it"))
        if source.server and not earlier.problems:
            reasons += judge(Act.GO_ON, now, Asked(settings.yes))
        if settings.dry_run:
            return tell_judged(screen, report, now, {Act.GO_ON: reasons})
        made = earlier.seen.server
        if reasons or not (earlier.cloud and made):
            raise Refused.of(list(dict.fromkeys(reasons)))
        (cloud, server, host, _), report.run = source.whole, run
        plan, report.source = plan_again(source, record, made, is_stopped=is_stopped), reported(cloud, server)
        stack.enter_context(host.private_folder(run))  # shows others that it is active again
        journal = Journal(folder, run)
        with journal.beginning():
            # claim_source() writes `resume`; from then on failures undo it
            journal.write("asked to resume", pid=os.getpid(), seed=settings.seed)
            again = Run(settings, screen, journal, undo, report, plan, cloud, earlier.cloud, host, earlier)
            if is_again and record.stopped_at:  # somebody started the source after the cut-over had begun
                tell_seeded(again, record.copied)
        screen.say(f"Resume run {run}; {'it has a seed' if record.seed else f'{human(record.sent)} were sent'}.")
        return execute_or_undo(again)


def plan_again(source: SourceFacts, record: RunRecord, made: Server, *, is_stopped: bool) -> Plan:
    """The plan of a run that is resumed; with a seed the source's state counts as it is now."""
    _, server, _, disks = source.whole
    return Plan(record.run, server, disks, made.flavor, Image(made.image, "", "active", "", ""), (),
            record.was_running if is_stopped else server.status == "ACTIVE",
            volumes=source.volumes, ports=[PortPlan(**row) for row in record.facts.get("ports", ())])


# ---- 19. Rollback ----------------------------------------------------

# Prints a run's private folders on a host; with $2 only those whose lease is alive.
LEFT_FOLDERS: Final = """
for folder in /run/migrena-"$1"-* /tmp/migrena-"$1"-*; do
  [ ! -e "$folder" ] || { [ -n "$2" ] && flock -n -- "$folder/lease" true; } || echo "$folder"
done
"""
# Removes a run's files beside all disks of the instance whose root disk is $1.
REMOVE_NEW: Final = 'rm -f -- "${1%/*}"/disk*.migrena-"$2" "${1%/*}"/disk*.migrena-"$2"-fresh'
LEASE_LIMIT: Final = 75.0  # seconds after which an interrupted run's leases have ended


@dataclass(frozen=True)
class UndoPlan:
    """A run to undo: its Situation, and its journal, empty if lost."""

    settings: Settings
    screen: Screen
    clouds: tuple[Cloud, Cloud]
    now: Situation
    record: RunRecord
    folder: str = ""  # ours on the source's host, while this run is undone

    @property
    def removal(self) -> Act:
        return Act.STOP_DESTINATION if self.settings.keep_destination else Act.DELETE

    def settings_of(self, server: Server) -> Settings:
        return self.settings.of("src" if server is self.now.source.server else "dst")

    def now_seen(self) -> Situation:
        one, other = self.now.source, self.now.destination
        source = replace(see(self.clouds[0], one.id, one.since), disk=one.disk)
        return replace(self.now, source=source, destination=see(self.clouds[1], other.id, other.since))

    def allow(self, act: Act) -> Situation:
        """Looks at both sides now; raises Kept if an act must not be done."""
        now = self.now_seen()
        allow(act, now, Asked(self.settings.yes))
        return now


def patience_of(record: RunRecord, act: str = "create ") -> float:
    """Seconds for which what an interrupted run asked for may still be made."""
    began = [datetime.fromisoformat(one.began) for one in record.acts if one.name.startswith(act) and not one.ended]
    ages = [(datetime.now(timezone.utc) - one).total_seconds() for one in began]
    return max([LATE_ANSWER - age for age in ages if 0 <= age < LATE_ANSWER], default=0.0)


def as_begun(settings: Settings, record: RunRecord) -> Settings:
    """These for a rollback that goes on with one that was to keep the destination."""
    return replace(settings, keep_destination=settings.keep_destination or record.keeps_destination)


def plan_undo(settings: Settings, screen: Screen, clouds: tuple[Cloud, Cloud],
        record: RunRecord, folder: Path) -> UndoPlan:
    """What a run has made, by its journal or by marks and locks; raises Refused if no run is found."""
    one, other = clouds
    require_same_clouds(record, clouds)
    source = see(one, record.source, record.source_request)
    if source.server and record.is_lost:  # a run locks its source before the stop
        source = see(one, source.id, next((
            action.request for action in one.actions(source.id) if action.name == "lock"), None))
    if source.unseen:
        raise Refused(f"the source could not be looked up: {source.unseen}", "solve that first; nothing was touched")
    marks, lock = (source.server.metadata, source.server.lock_reason) if source.server else ({}, "")
    while patience_of(record, "create destination") and not other.made_by(record.run, source.id):
        time.sleep(CLAIM_PAUSE)  # Nova was asked a moment ago, and may still make it
    made = {server.id: server for server in other.made_by("", source.id, all_tenants=record.is_lost)}
    runs = {server.metadata.get(MADE) or server.metadata[DONE] for server in made.values()}
    run = record.run or marks.get(MARK) or (lock_of(source.server) if source.server else "")
    if not run and len(runs) != 1:
        raise Refused(f"{len(runs) or 'no'} runs have marks on {source.id} or on an instance made from it",
            f"delete unwanted ones by hand: {', '.join(made)}" if runs else "there is nothing to undo")
    run = run or runs.pop()
    if not re.fullmatch(r"[0-9A-Za-z-]+", run):
        raise Refused(f"the mark {run!r} is not one of migrena's", "find out who wrote it")
    project = other.identity["project"]
    ours = [id for id, server in made.items() if run in (server.metadata.get(MADE), server.metadata.get(DONE))]
    if away := [made[id] for id in ours if made[id].facts.get("tenant_id", project) != project]:
        raise Refused(f"{away[0].name} {away[0].id} was made by run {run} in another project of the destination",
            f"--dst-project {away[0].facts['tenant_id']}")
    # No source: the journal was emptied.
    if not record.run and run in known_runs(folder) and (found := read_run(folder, run, is_ours=True)).source:
        return plan_undo(as_begun(settings, found), screen, clouds, found, folder)
    id = record.destination or next(iter(ours), "")
    told = re.search(r"([0-9a-f-]{36}) takes its place", lock)
    if told and told[1] not in made and (server := other.find_server(told[1])):  # somebody removed its marks
        made[server.id] = server
    now = situation(record, source, see(other, id, record.destination_request))
    was = marks.get(WAS) or (made[id].metadata.get(WAS) if id in made else "")
    was_running = was == "ACTIVE" or record.was_running if record.is_lost else now.was_running
    if now.destination.is_gone and source.server and MARK not in marks and not source.is_locked_by(run):
        was_running = False  # nothing is left to undo: do not change the source's state
    stage = Stage.DONE if any(DONE in made[id].metadata for id in ours) else (
        Stage.SWAPPED if record.is_lost else now.stage)
    others = tuple(server for server in made.values() if server.id not in (id, *ours))
    return with_hosts(UndoPlan(settings, screen, clouds,
        replace(now, run=run, stage=stage, was_running=was_running, others=others), record))


def with_hosts(plan: UndoPlan) -> UndoPlan:
    """Adds what the hypervisors show: the source's disk, and whether a run without a journal is active."""
    now, record, alive = plan.now, plan.record, ""
    source, made = now.source.server, now.destination.server
    if source and source.host and now.stage >= Stage.PROVEN:
        try:
            with host_of(source, plan.settings.of("src"), plan.screen) as host:
                alive = at_work(host, now.run) if record.is_lost else ""
                jobs = {key: disk.job for key, disk in record.disks.items() if "path" in disk.job}
                nodes = {ROOT: Node.of_file(host.disk_of(source.id))} | {
                    key: Node(job["storage"]) if "storage" in job else Node.of_file(job["path"])
                    for key, job in jobs.items()}
                with suppress(HostError):  # after a start that failed there is no domain
                    domain = domain_of(host, source.id, host.disk_of(source.id))  # the host then has the keys for Ceph
                    if ROOT not in jobs and domain.drives[ROOT].storage:
                        nodes[ROOT] = Node(domain.drives[ROOT].storage)
                disk = disk_now(host, nodes, record)
        except HostError as error:
            disk = f"cannot be read: {shorten(str(error))}"
        now = replace(now, source=replace(now.source, disk=disk))
    if made and made.host and record.is_lost and not alive:
        with host_of(made, plan.settings.of("dst"), plan.screen) as host:
            alive = at_work(host, now.run)
    return replace(plan, now=replace(now, alive=alive))


def at_work(host: Host, run: str) -> str:
    """A folder that a run still holds on a host after more than a minute, or nothing."""
    limit = time.monotonic() + LEASE_LIMIT
    while found := host.script(LEFT_FOLDERS, run, "alive").split():
        if time.monotonic() > limit:
            return f"{host.name}:{found[0]} is held"
        time.sleep(1)
    return ""


def rollback(call: Call, settings: Settings, undo: Undo, report: Report) -> int:
    """The subcommand `rollback`: undoes a run."""
    folder, screen = state_folder(settings, call.environment), undo.screen
    if bool(settings.run) == bool(settings.run_of):
        raise UsageError(
            "give either RUN or its source", "./migrena.py rollback RUN, or ./migrena.py rollback --run-of SRC_UUID")
    record = read_run(folder, find_run(folder, settings.run)) if settings.run else RunRecord(
        "", "", "", {"source": settings.run_of})
    with only_run_of(folder, record.source, record.run or "rollback"):
        if record.run:
            record = read_run(folder, record.run, is_ours=True)
            settings = as_begun(call.settings(record.facts.get("settings")), record)
        if record.state in ("failed", "rolled back"):
            screen.say(f"Run {record.run} was rolled back already, says its journal.")
            report.run, report.result = record.run, "rolled back"
            return 0
        if settings.dst_project == "same":  # without a journal
            with refusing():
                source = Cloud("source", credentials("src", settings, call.environment))
                settings = in_same_project(settings, source, source.server(record.source))
        if record.job == "import":
            return undo_import(call, settings, record, Journal(folder, record.run), undo, report)
        clouds = both_clouds(settings, call.environment)
        for cloud in clouds:
            cloud.tell = screen.note
        if record.job == "image":
            require_same_clouds(record, clouds)
            if record.state == "done":
                raise Refused(f"run {record.run} was successful: its image may be in use",
                    "openstack image delete, if that is wanted")
            report.run, what = record.run, f"delete image {record.facts.get('name')}"
            return run_steps([(what, lambda: delete_carried(clouds[1], record.run))], Journal(folder, record.run), undo,
                report)
        with refusing():
            plan = plan_undo(settings, screen, clouds, record, folder)
        now, asked = plan.now, Asked(settings.yes)
        removing = [] if now.destination.is_gone else judge(plan.removal, now, asked)
        giving_back = judge(Act.GIVE_BACK, replace(now, destination=Seen()), asked)  # by then gone or stopped
        if settings.dry_run:
            return tell_judged(screen, report, now, {plan.removal: removing, Act.GIVE_BACK: giving_back})
        if reasons := [*removing, *(giving_back if now.alive else [])]:
            raise Refused.of(list(dict.fromkeys(reasons)))
        with holding_folder(plan) as plan:
            return undo_run(plan, folder, undo, report)


@contextmanager
def holding_folder(plan: UndoPlan) -> Iterator[UndoPlan]:
    """Shows a rollback elsewhere, which has no journal, that this one is at work; not if the host cannot be reached."""
    source = plan.now.source.server
    with ExitStack() as stack:
        if source and source.host:
            with suppress(HostError):
                host = stack.enter_context(host_of(source, plan.settings.of("src"), plan.screen))
                plan = replace(plan, folder=stack.enter_context(host.private_folder(plan.now.run)))
        yield plan


def undo_run(plan: UndoPlan, folder: Path, undo: Undo, report: Report) -> int:
    """Undoes a run, which judge() allows."""
    now, source, made = plan.now, plan.now.source.server, plan.now.destination.server
    journal, report.run = Journal(folder, now.run), now.run
    with journal.beginning():
        if not plan.record.run:  # the journal was lost
            journal.write("run", source=now.source.id, was_running=now.was_running, name=made.name if made else "",
                where=[cloud.identity for cloud in plan.clouds], attached=list(made.volumes) if made else [])
        journal.write("asked to roll back", pid=os.getpid())
    if source and not made and MARK not in source.metadata and (source.is_running or not now.was_running):
        undo.screen.say(f"Neither cloud has anything of run {now.run} to undo; the source is {source.status}.")
    return run_steps(undo_steps(plan, journal), journal, undo, report, keep_destination=plan.settings.keep_destination)


def undo_import(call: Call, settings: Settings, record: RunRecord, journal: Journal, undo: Undo, report: Report) -> int:
    """Removes what an import has made, as far as nobody uses it, and takes back what it changed."""
    report.run = record.run
    with refusing():
        cloud, _ = cloud_of_files(call, settings, "dst")
    cloud.tell = undo.screen.note
    require_same_clouds(record, [cloud])
    if settings.dry_run:
        report.result = "planned"
        for act in reversed(record.acts):
            for id in act.facts.get("ids", ()):
                undo.screen.say(f"delete {act.facts['kind']} {id}, unless somebody uses it", always=True)
        return 0
    return run_steps([("delete what was imported", lambda: delete_imported(
        cloud, record, journal, undo.screen, 0.0))], journal, undo, report)


def run_steps(steps: Iterable[tuple[str, Callable[[], None]]], journal: Journal, undo: Undo,
        report: Report, **facts: object) -> int:
    """Executes named steps; those that fail or are interrupted are listed in `undo.left`."""
    todo = deque(steps)

    def next_step() -> None:
        with journal.act(todo[0][0]):
            todo[0][1]()

    with journal.ending(undo, "rolled back", "left"), undo:
        try:
            journal.write("rollback", pid=os.getpid(), **facts)
            while todo:
                what = todo[0][0]
                with undo.screen.step(f"{what[0].upper()}{what[1:]}."):
                    undo.attempt(what, next_step)
                todo.popleft()
        except Interrupted:
            undo.left += [f"{what}: {'not done' if number else 'interrupted'}" for number, (what, _) in enumerate(todo)]
            raise
    report.result = "left" if undo.left else "rolled back"
    return 0


def undo_steps(plan: UndoPlan, journal: Journal) -> Iterator[tuple[str, Callable[[], None]]]:
    """The named steps that undo a run. The source's mark is removed last: until then rollback can be repeated."""
    run, settings, clouds = plan.now.run, plan.settings, plan.clouds
    source, made = plan.now.source.server, plan.now.destination.server
    if any(act.name == "create image" for act in plan.record.acts):
        yield "see that no half image is left", partial(delete_carried, clouds[1], run)
    if made:
        yield f"{'stop' if settings.keep_destination else 'delete'} destination {made.id}", partial(
            remove_destination, plan)
    if (has_things(plan.record) or plan.record.is_lost) and not settings.keep_destination:
        yield "delete what was made for it", lambda: delete_things(
            clouds[1], plan.record, plan.allow(Act.DELETE_VOLUMES) if plan.record.made("volume")
            or plan.record.is_lost else plan.now_seen(), journal, patience_of(plan.record),
            plan.record.facts.get("attached") or (made.volumes if made else ()))
    for server in (made, source):
        if server and server.host:
            yield f"see that nothing is left on {host_name(server, plan.settings_of(server))}", partial(
                clean_host, plan, server)
    if made and settings.keep_destination:
        if plan.now.stage < Stage.PROVEN and any(disk.job.get("in_place") for disk in plan.record.disks.values()):
            plan.screen.warn(f"the disks of {made.id} hold a part of the copy: it is of no use")
        for id in plan.record.made("volume").values():
            yield f"take the marks off volume {id}", partial(clouds[1].volumes.mark, id, {}, MADE, DONE)
        if plan.record.made("port"):
            yield "take the marks off the ports", partial(finish_ports, clouds[1], plan.record)
        yield f"take the marks off destination {made.id}", partial(clouds[1].unmark, made.id, run, MADE, DONE, WAS)
    if source:
        yield f"give source {source.id} back", lambda: give_back(
            clouds[0], plan.allow(Act.GIVE_BACK), journal, lambda server: None)
        yield f"take the mark off source {source.id}", lambda: take_mark_off(clouds[0], plan.allow(Act.UNMARK))


def remove_destination(plan: UndoPlan) -> None:
    """Deletes the destination, or only stops it; raises Kept."""
    made, cloud = plan.allow(plan.removal).destination, plan.clouds[1]
    if plan.removal is Act.DELETE:
        attached = cloud.networks.all("ports", ("device_id", made.id)) if plan.record.is_lost else []
        cloud.delete(made.id)
        ids = [("id", port["id"]) for port in attached if not str(port.get("description")).startswith(f"{MADE}=")]
        if left := [port["id"] for port in (cloud.networks.all("ports", *ids) if ids else ())]:
            raise Kept(f"ports {', '.join(left)} of {made.id} are left: without its journal it is not known whether "
                "the run made them and their floating IPs, nor its key pair and server group",
                "openstack floating ip list --port ID; openstack port delete ID")
    elif made.server:
        cloud.wait(made.id, lambda server: not server.task, lambda server: None)
        cloud.stop(made.id, lambda server: None)
        if made.is_locked_by(plan.now.run):
            cloud.unlock(made.id)


def clean_host(plan: UndoPlan, server: Server) -> None:
    """Removes a run's folders from a host, files beside the destination's disk, bitmap in the source's. Raises Kept."""
    run, limit = plan.now.run, time.monotonic() + LEASE_LIMIT
    is_source = server.id == plan.now.source.id
    if plan.settings.keep_destination and not is_source:
        plan.allow(Act.CLEAN)
    with host_of(server, plan.settings_of(server), plan.screen) as host:
        path = host.disk_of(server.id)
        while left := [one for one in host.script(LEFT_FOLDERS, run).splitlines() if one != plan.folder]:
            if time.monotonic() > limit:
                break
            time.sleep(1)
        if left:
            host.run("rm", "-rf", "--", *left)
        if not is_source:
            host.script(REMOVE_NEW, path, run)
        if is_source and host.succeeds("grep", "-qsE", f'/{server.id}/disk" *: *"qcow2"', f"{path}.info"):
            drop_bitmap(host, server.id, path, run)


# ---- 20. Spread ------------------------------------------------------

FAILED_STATES: Final = ("error", "failed", "cancelled")  # Nova's statuses of a live migration without success
ROOM_LIMIT: Final = 60.0  # seconds for Nova to free an instance's resources on its old host


def reject_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError for duplicate keys."""
    if twice := {name for name, count in Counter(name for name, _ in pairs).items() if count > 1}:
        raise ValueError(f"names {', '.join(sorted(twice))} twice")
    return dict(pairs)


def read_map(path: str) -> dict[str, list[str]]:
    """The instances for each host. Raises UsageError."""
    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"), object_pairs_hook=reject_duplicates)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(names, list) and all(isinstance(name, str) for name in names)
            for names in found.values()):
        raise UsageError(f"{path} is not a map of hosts", f"write it as {MAP_FORM}")
    return found


def find_moves(wanted: Mapping[str, Sequence[str]], servers: Sequence[Server],
        hosts: Sequence[ComputeHost]) -> tuple[list[Move], list[Reason]]:
    moves, reasons, taken = list[Move](), list[Reason](), {id: one for host in hosts for id, one in host.taken.items()}
    for host, name in ((host, name) for host, names in wanted.items() for name in names):
        with collecting(reasons):
            server = pick(name, servers, "instance", "", " in the map")
            moves.append(Move(server, host, taken.get(server.id, {})))
    return moves, reasons


def refuse_moves(wanted: Mapping[str, Sequence[str]], moves: Sequence[Move],
        hosts: Sequence[ComputeHost]) -> Iterator[Reason]:
    known = {host.name: host for host in hosts}
    for name in wanted:
        if not (host := known.get(name)):
            yield Reason(f"there is no compute host {name!r}{did_you_mean(name, known)}",
                f"known: {', '.join(sorted(known)) or 'none'}")
        elif not (host.is_up and host.is_enabled) and any(move.is_due and move.to == name for move in moves):
            yield Reason(
                f"compute host {name} is {'disabled' if host.is_up else 'down'}", "see: openstack compute service list")
    for server in {move.server.id: move.server for move in moves}.values():
        places = [move.to for move in moves if move.server.id == server.id]
        if places == [server.host]:
            continue
        if len(places) > 1:
            yield Reason(
                f"instance {server.name} is in the map {len(places)} times: on {', '.join(places)}", "name it once")
        if server.status not in ("ACTIVE", "PAUSED") or server.task:
            yield Reason(f"instance {server.name} is {f'{server.status} {server.task}'.rstrip()}, "
                "and cannot be live-migrated", "start it, or wait for its task")
        if not server.host:
            yield Reason(f"{NO_HOSTS} {server.name} is", "use an admin's credentials")
        elif server.host in known and not known[server.host].is_up:
            yield Reason(f"{server.name} is on compute host {server.host}, which is down",
                "live migration needs it; see: openstack server evacuate")


def spread(call: Call, settings: Settings, undo: Undo, report: Report) -> int:
    """The subcommand `live-migrate`: moves instances within one cloud to the hosts of the map."""
    if not settings.host_map:
        raise UsageError("--host-map is missing", "./migrena.py live-migrate --host-map host_map.json")
    if settings.keep_waiting and settings.abort:
        raise UsageError("--keep-waiting and --abort exclude each other", "give one of them")
    screen, wanted = undo.screen, read_map(settings.host_map)
    creds = credentials(settings.cloud, replace(settings, dst_project=""), call.environment)
    with screen.timed("Survey"), refusing():
        cloud = Cloud("the", creds)
        servers, hosts = in_parallel(lambda: cloud.servers(all_tenants=True), cloud.hosts)
    moves, reasons = find_moves(wanted, servers, hosts)
    if reasons := [*reasons, *refuse_moves(wanted, moves, hosts)]:
        raise Refused.of(reasons)
    due = in_order([move for move in moves if move.is_due], hosts)
    rows = [(move.server.name, move.server.id, move.server.host, move.to if move.is_due else "stays") for move in moves]
    for line in aligned([("INSTANCE", "ID", "HOST", "TO"), *rows]):
        screen.say(line, always=settings.dry_run)
    report.moves = [{"id": move.server.id, "name": move.server.name, "from": move.server.host,
        "to": move.to, "result": "planned"} for move in due]
    if settings.dry_run or not due:
        report.result = "planned" if due else "done"
        screen.say(
            f"{len(due)} of {len(moves)} instances are to be moved." if due else "All instances are on their hosts.")
        return 0
    if not settings.yes and not sys.stdin.isatty():
        raise Refused("there is no terminal to confirm the moves at", "give -y")
    with undo:
        for move, row in zip(due, report.moves, strict=True):
            if not settings.yes:
                screen.say(f"Move {move.server.name} from {move.server.host} to {move.to}? [y/N]", always=True)
                if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                    row["result"] = "declined"
                    continue
            if any(done["result"] == "moved" and done["from"] == move.to for done in report.moves):
                await_room(cloud, move)
            move_one(cloud, move, settings, undo, row)
    if failed := [str(row["name"]) for row in report.moves if row["result"] == "failed"]:
        raise CloudError(f"{len(failed)} of {len(due)} instances were not moved: {', '.join(failed)}")
    report.result = "done"
    return 0


def await_room(cloud: Cloud, move: Move) -> None:
    """Waits until Placement shows room for an instance, at most ROOM_LIMIT: then Nova refuses it."""
    limit = time.monotonic() + ROOM_LIMIT
    for _ in cloud.polls():
        free = {host.name: host.free for host in cloud.retrying("show free resources", cloud.hosts)}
        if not too_little(move, free.get(move.to, {})) or time.monotonic() > limit:
            return


def move_one(cloud: Cloud, move: Move, settings: Settings, undo: Undo, row: dict[str, Any]) -> None:
    """Live-migrates one instance and records the result. Raises CloudError, with --keep-going only shows it."""
    screen, row["result"] = undo.screen, "failed"
    try:
        with screen.step(f"Live-migrate {move.server.name} from {move.server.host} to {move.to}."), screen.timed(
                "seconds", row):
            before, _ = cloud.last_migration(move.server.id)
            cloud.move(move.server.id, move.to)
            await_arrival(cloud, move, before, settings, undo)
        row["result"] = "moved"
        screen.note(f"Done, in {duration(row['seconds'])}.")
    except CloudError as error:
        row["error"] = str(error)
        if not settings.keep_going:
            raise
        screen.say(f"error: {error}", always=True)


def await_arrival(cloud: Cloud, move: Move, before: int, settings: Settings, undo: Undo) -> None:
    """Waits for a live migration with a number above `before`; raises CloudError if it fails."""
    server, screen, limit = move.server, undo.screen, time.monotonic() + settings.timeout
    number, state, total, show = 0, "", 0, None
    with ExitStack() as stack:
        try:
            for _ in cloud.polls():
                now = cloud.server_retrying(server.id)
                if (now.host, now.status, now.task) == (move.to, server.status, ""):
                    if show:
                        show(total)
                    return
                number, state = cloud.last_migration(server.id, before)
                if state in FAILED_STATES and not now.task:
                    asked = "aborted by --abort" if settings.abort and limit == float("inf") else ""
                    why = cloud.why_failed(
                        server.id, "live-migration") or asked or f"see nova-compute's log on {server.host} or {move.to}"
                    way_out = (f"check where it runs; then openstack server {STATE_WAYS['ERROR']} {server.id}"
                        if now.status == "ERROR" else "")
                    raise CloudError(
                        f"{server.name} is {now.status} on {now.host}: migration {number} is {state}: {why}", way_out)
                done, total = cloud.progress(server.id) or (total, total)
                show = show or (stack.enter_context(screen.progress(total)) if total else None)
                if show:
                    show(done)
                else:
                    screen.status(f"Current status: {now.status} {now.task}, migration {state or 'not begun'}")
                if time.monotonic() > limit:
                    limit = float("inf")
                    handle_timeout(cloud, move, number, state, settings, screen)
        except BaseException:
            if state not in FAILED_STATES:
                which = f"migration {number}" if number else "the migration"
                undo.left.append(f"{which} of {server.name} to {move.to} continues in Nova")
            raise


def handle_timeout(cloud: Cloud, move: Move, number: int, state: str, settings: Settings, screen: Screen) -> None:
    """After --timeout: aborts a migration, keeps waiting, or leaves it to Nova and raises CloudError."""
    told = f"{move.server.name} has not arrived within {duration(settings.timeout)}; "
    told += f"migration {number} is {state}" if number else "Nova has not begun the migration"
    if any(host.name == move.to and not host.is_up for host in cloud.retrying("list compute services", cloud.hosts)):
        told += f", and compute host {move.to} is down"
    if settings.abort:
        screen.warn(f"{told}: aborting")
        cloud.abort(move.server.id, number)
    elif settings.keep_waiting:
        screen.warn(f"{told}: still waiting")
    else:
        raise CloudError(told, f"see: openstack server migration list --server {move.server.id}; "
            "--keep-waiting keeps waiting, --abort aborts it")


# ---- 21. Main --------------------------------------------------------

RUNTIME: Final = (
    "paramiko", "novaclient", "glanceclient", "keystoneauth1", "cryptography", "requests", "tqdm", "yaml", "oslo_utils")
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_CODES: Final = """exit codes:
  0  done                            3  refused, nothing was touched
  1  failed, what it did is undone   4  something is left behind, or kept on purpose (see its list), or a bug
  2  usage or config.py is wrong     128+n  ended by signal n, what it did is undone (else 4)"""


@dataclass(frozen=True)
class Subcommand:
    """A subcommand: its function, its arguments, and its --help, whose first line the main --help shows too."""

    do: Callable[[Call, Settings, Undo, Report], int]
    words: str
    help: str


SUBCOMMANDS: Final = {
    "copy": Subcommand(copy_instance, "-s SRC_UUID [-d DST_NAME] [-f FLAVOR] [-i IMAGE]",
        "Moves an instance, with its disk, from one OpenStack cloud to another, from hypervisor to hypervisor.\n"
        "The source is opened read-only and never deleted; the copy is verified."),
    "status": Subcommand(show_status, "[RUN]",
        "Shows the runs on this machine, newest first, or one with its acts.\nContacts no cloud, no host."),
    "resume": Subcommand(resume, "RUN",
        "Continues a run that was killed or has left something behind, or that has a seed.\nOnly blocks whose digests "
        "differ are sent again. Refuses if the source has run or changed since its stop."),
    "rollback": Subcommand(rollback, "RUN | --run-of SRC_UUID",
        "Undoes a run that was interrupted, or that succeeded but is not wanted.\n"
        "Deletes the new instance, unlocks the source, and starts it if it ran before.\n"
        "Does not ask; if a step fails, goes on and lists it."),
    "image": Subcommand(carry_images, "-i IMAGE [-i IMAGE] | --tag TAG",
        "Carries images (also snapshots) from the source's Glance to the destination's, with their properties.\n"
        "Verifies the content by digests; an image that exists already is a success."),
    "export": Subcommand(export_resources, "[TYPE…]",
        "Writes what surrounds instances into files of OS Migrate's form: networks, groups, flavors, projects…\n"
        "Without a TYPE all that an instance may need; --for SRC_UUID: just what this instance needs."),
    "import": Subcommand(import_files, "FILE|DIR…",
        "Makes in the destination what such files have and it lacks, in the order of their dependencies.\n"
        "What exists is left alone, and told where it differs. `rollback RUN` removes what an import made."),
    "live-migrate": Subcommand(spread, "--host-map FILE",
        "Live-migrates instances within one cloud, one after the other, to the hosts of a map."),
}


def with_options(made: argparse.ArgumentParser, subcommand: str) -> argparse.ArgumentParser:
    made.add_argument("-c", "--config", metavar="FILE", default=argparse.SUPPRESS,
        help="settings (default: config.py beside migrena.py)")
    for row in fields(Settings):
        if row.metadata["flags"] and subcommand in row.metadata["of"]:
            made.add_argument(*row.metadata["flags"], dest=row.name, default=argparse.SUPPRESS, **row.metadata["more"])
    return made


class Parser(argparse.ArgumentParser):
    """A parser that raises UsageError, with what may be meant."""

    def error(self, message: str) -> NoReturn:
        about, _, words = message.partition("unrecognized arguments: ")
        word = re.split("[ =]", words)[0]
        near = "" if about or word in SUBCOMMANDS else did_you_mean(word, [*self._option_string_actions, *SUBCOMMANDS])
        raise UsageError(f"{message}{near}", f"see: {self.prog} --help")


def parser(subcommand: str = "copy") -> argparse.ArgumentParser:
    words, told = SUBCOMMANDS[subcommand].words, SUBCOMMANDS[subcommand].help
    usage = f"migrena.py {'' if subcommand == 'copy' else f'{subcommand} '}{words} [options]"
    if subcommand == "copy":
        others = {name: other for name, other in SUBCOMMANDS.items() if name != subcommand}
        usage += f"\n       migrena.py {'|'.join(others)} --help"
        told = "\n".join([f"{told}\n", *aligned([
            (f"  {name} {it.words}", it.help.partition("\n")[0]) for name, it in others.items()])])
    made = Parser(prog=f"./migrena.py {subcommand}".removesuffix(" copy"), usage=usage, description=told,
        epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    made.add_argument("--version", action="version", version=f"migrena {VERSION}")
    if "RUN" in words:
        made.add_argument("run", metavar="RUN", nargs=None if words == "RUN" else "?", default=argparse.SUPPRESS,
            help="the run's id, or the beginning of it")
    for word, name, many in (("TYPE…", "types", "*"), ("FILE|DIR…", "files", "+")):
        if word in words:
            made.add_argument(name, metavar=word.rstrip("…"), nargs=many, default=argparse.SUPPRESS,
                help="such as networks" if name == "types" else "what `export` or OS Migrate wrote")
    return with_options(made, subcommand)


def split_subcommand(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The subcommand and the other words: it comes first, or after options that it takes."""
    for place, word in enumerate(arguments):
        if word in SUBCOMMANDS.keys() - {"copy"}:
            taken = with_options(argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False), word)
            with suppress(argparse.ArgumentError):  # the word is an option's value
                if not taken.parse_known_args(arguments[:place])[1]:
                    return word, [*arguments[:place], *arguments[place + 1 :]]
    return "copy", arguments


def read_call(arguments: Sequence[str], environment: Mapping[str, str], screen: Screen) -> Call:
    """The parsed command line and config.py; raises UsageError."""
    subcommand, rest = split_subcommand(arguments)
    flags = vars(parser(subcommand).parse_args(rest))
    named = flags.pop("config", environment.get("MIGRENA_CONFIG"))
    path = Path(named).expanduser() if named else Path(__file__).resolve().with_name("config.py")
    if named and not path.is_file():
        raise UsageError(f"there is no file {path}", "give another one with -c FILE")
    known = [f"MIGRENA_{name.upper()}" for name in (*(row.name for row in fields(Settings)), *sided_names(), "config")]
    for name in environment.keys() - {*known}:
        if name.startswith("MIGRENA_") and (near := did_you_mean(name, known, 0.9)):
            screen.warn(f"unknown variable {name}{near}")
    call = Call(subcommand, flags, environment, {**read_config(path), "path": path} if path.is_file() else {})
    settings = call.settings()
    has_secret = re.search("password|secret|api_key", " ".join((*settings.src_creds, *settings.dst_creds)))
    if has_secret and {"src_creds", "dst_creds"} & call.config.keys() and path.stat().st_mode & (
            stat.S_IRGRP | stat.S_IROTH):
        screen.warn(f"{path} contains a password and others can read it: chmod 600 {shlex.quote(str(path))}")
    if subcommand == "copy" and not settings.src_uid:
        raise UsageError("-s is missing", f"./migrena.py {SUBCOMMANDS['copy'].words}; see --help")
    return call


def require_packages() -> None:
    """Raises UsageError if a package is missing, before a run begins."""
    if missing := [name for name in RUNTIME if importlib.util.find_spec(name) is None]:
        raise UsageError(f"{sys.executable} lacks the Python packages {', '.join(missing)}",
            "pip install -r requirements.txt, and run migrena with that Python")


def without_bodies(record: logging.LogRecord) -> bool:
    """Removes the bodies of requests and answers from a library's log: user_data and adminPass are secrets."""
    record.msg, record.args = re.sub(r" -d '.*", " -d (not shown)", record.getMessage(), flags=re.DOTALL), ()
    return not record.msg.startswith("RESP BODY")


def open_log(path: str) -> TextIO | None:
    if not path:
        return None
    try:
        return open(Path(path).expanduser(), "a", encoding="utf-8", opener=PRIVATE)
    except OSError as error:
        raise UsageError(
            f"the log file {path} cannot be written: {error}", "name another one with --log-file") from error


def main(arguments: Sequence[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: the locale may not show every name
    screen, report, settings = Screen(), Report(), Settings()
    undo = Undo(screen)
    try:
        with signals(undo):
            call = read_call(arguments, os.environ, screen)
            settings = call.settings()
            screen.quiet, screen.verbose, screen.log = settings.quiet, settings.verbose, open_log(settings.log_file)
            if settings.debug:
                handler = logging.StreamHandler()
                handler.addFilter(without_bodies)
                logging.basicConfig(level=logging.DEBUG, format="%(asctime)s %(name)s %(message)s", handlers=[handler])
            if call.subcommand == "status":
                return show_status(call, settings, undo, report)
            require_packages()
            code = SUBCOMMANDS[call.subcommand].do(call, settings, undo, report)
    except MigrenaError as error:
        if isinstance(error, Kept):
            undo.keep(error)
        code = show_failure(() if isinstance(error, Kept) else error.reasons, error.exit_code, screen, report)
        if settings.debug:
            traceback.print_exc()
    except Interrupted as error:
        code = show_failure([Reason(str(error))], 128 + error.number, screen, report)
    except Exception as error:
        code = show_bug(error, undo, report)
    for each in SIGNALS:  # only output remains, which must not be interrupted
        signal.signal(each, signal.SIG_IGN)
    code = 4 if undo.left else code
    if code == 4:
        report.result, report.not_undone = "left", undo.left
        told = [f"./migrena.py rollback {report.run}; "
            f"./migrena.py status {report.run} shows what was done"] if report.run else []
        for line in (*(f"left behind: {line}" for line in undo.left), *(f"  try: {way}" for way in undo.ways or told)):
            screen.say(line, always=True)
    if settings.json or "--json" in arguments:
        report.warnings, report.seconds, report.ssh_commands = screen.warnings, screen.seconds, screen.commands
        print(json.dumps(asdict(report), indent=2))
    return code


def show_failure(reasons: Sequence[Reason], code: int, screen: Screen, report: Report) -> int:
    report.result = {2: "usage", 3: "refused"}.get(code, "failed")
    report.error = [asdict(reason) for reason in reasons]
    for reason in reasons:
        screen.say(f"{'refused' if code == 3 else 'error'}: {reason.problem}", always=True)
        if reason.way_out:
            screen.say(f"  try: {reason.way_out}", always=True)
    return code


def show_bug(error: Exception, undo: Undo, report: Report) -> int:
    """Shows an unexpected exception, and what is left; returns the exit code."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    for line in lines:
        undo.screen.say(line, always=True)
    code = 4 if undo.left or undo.has_begun else 3
    known = "" if undo.left else "; nothing is known to be left behind" if code == 4 else "; nothing was touched"
    way_out = "report it with these lines; --debug shows more"
    return show_failure([Reason(f"this is a bug in migrena: {lines[-1]}{known}", way_out)], code, undo.screen, report)


@contextmanager
def signals(undo: Undo) -> Iterator[None]:
    """A scope in which the first of SIGNALS raises Interrupted; further ones only print."""
    has_come = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal has_come
        if has_come or undo.has_begun:
            with suppress(OSError):
                os.write(2, f"\nstill undoing{': ' + printable(undo.doing) if undo.doing else ' what was begun'}"
                    "; please wait\n".encode())
            return
        has_come = True
        if not DEFERRED.depth:
            raise Interrupted(number)
        DEFERRED.number = number

    heeded = [each for each in SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]  # nohup(1)
    before = {each: signal.signal(each, on_signal) for each in heeded}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
