"""The export is for the destination alone, read-only, on its own address; its keys are private and gone afterwards."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from hosts.rig import Copy, Instance, MiB, processes, running, settings_for, wait_for, wait_until_clean
from lab.hosts import Host as LabHost
from lab.hosts import Lab
from migrena import DiskJob, Ends, Export, HostError, NbdTransport, Node, QemuTransport, Screen, certificates, connect, exported, rehearse

READ = "/root/read.raw"
OTHER = "/root/other"


@dataclass(frozen=True)
class Served:
    """A raw disk of the source that is being exported."""

    instance: Instance
    ends: Ends
    job: DiskJob
    export: Export

    def node(self, host: LabHost, creds: str, name: str = "") -> tuple[str, ...]:
        """The words by which qemu-img opens the export with the certificates in a folder; without a folder in clear."""
        image = f"driver=nbd,server.type=inet,server.host={self.export.address},server.port={self.export.port},export={name or self.export.name}"
        if not creds:
            return ("--image-opts", image)
        return ("--object", f"tls-creds-x509,id=t,dir={creds},endpoint=client,verify-peer=yes", "--image-opts", f"{image},tls-creds=t")

    def read(self, host: LabHost, creds: str = "", name: str = "") -> subprocess.CompletedProcess[str]:
        """Reads the whole of it on a host, as anyone could try."""
        host.run("rm", "-f", READ)
        return host.run("timeout", "8", "qemu-img", "convert", "-O", "raw", *self.node(host, creds, name), READ, check=False)

    def has_it(self, host: LabHost) -> bool:
        """Whether a host has got hold of any byte of the disk."""
        size = host.run("sh", "-c", f"tr -d '\\0' < {READ} | wc -c", check=False).stdout.strip()
        return size not in ("", "0")


BOTH = [("qemu", True), ("qemu", False), ("nbd", True), ("nbd", False)]
NAMES = ["qemu-tls", "qemu-clear", "nbd-tls", "nbd-clear"]


@pytest.fixture(scope="module")
def both(namespaces: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    """A copy from src to dst for all tests of this file; what they do to it changes nothing."""
    settings = settings_for(namespaces)
    with contextlib.closing(connect("src", settings, Screen())) as source, contextlib.closing(connect("dst", settings, Screen())) as destination:
        yield Copy(source, destination, settings, tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="module")
def instance(namespaces: Lab) -> Instance:
    """A raw disk with no block of it empty."""
    return Instance.make(namespaces["src"]).raw(4 * MiB).write("secret", (0, 4 * MiB))


@pytest.fixture(scope="module")
def prepared(namespaces: Lab, both: Copy, instance: Instance, request: pytest.FixtureRequest) -> Iterator[tuple[Ends, DiskJob]]:
    """Both ends and a job for each transport, with and without TLS; nothing is served yet."""
    transport, tls = request.param
    fresh = Instance.make(namespaces["dst"]).raw(4 * MiB)
    with replace(both, settings=replace(both.settings, tls=tls)).prepared(instance, fresh) as (ends, job):
        yield ends, replace(job, transport=NbdTransport() if transport == "nbd" else QemuTransport())
    for host in namespaces:
        wait_until_clean(host)


@pytest.fixture(scope="module")
def served(namespaces: Lab, instance: Instance, prepared: tuple[Ends, DiskJob]) -> Iterator[Served]:
    """The disk, exported."""
    ends, job = prepared
    with exported(ends, job, Node.of_file(instance.path)) as (export, _):
        yield Served(instance, ends, job, export)
    for host in namespaces:
        host.run("rm", "-rf", READ, OTHER)


every_way = pytest.mark.parametrize("prepared", BOTH, indirect=True, ids=NAMES, scope="module")
with_tls = pytest.mark.parametrize("prepared", BOTH[::2], indirect=True, ids=NAMES[::2], scope="module")
in_clear = pytest.mark.parametrize("prepared", BOTH[1::2], indirect=True, ids=NAMES[1::2], scope="module")


@every_way
def test_control_the_destination_reads_the_export(namespaces: Lab, served: Served) -> None:
    done = served.read(namespaces["dst"], served.ends.destination_folder if served.job.settings.tls else "")
    assert done.returncode == 0, done.stderr
    assert namespaces["dst"].run("sha256sum", READ).stdout.split()[0] == served.instance.sha256()


@with_tls
@pytest.mark.parametrize("host", ["dst", "third"])
def test_hazard_anyone_reads_the_export_in_clear(namespaces: Lab, served: Served, host: str) -> None:
    assert served.read(namespaces[host]).returncode
    assert not served.has_it(namespaces[host])


def hand_out(namespaces: Lab, served: Served, files: dict[str, bytes]) -> None:
    """Puts certificates into a folder of the destination, whose address is let in."""
    namespaces["dst"].run("rm", "-rf", OTHER)
    namespaces["dst"].run("mkdir", OTHER)
    for name, content in files.items():
        namespaces["dst"].run("tee", f"{OTHER}/{name}", input=content.decode())


def ours(namespaces: Lab, served: Served) -> dict[str, bytes]:
    """The destination's own certificates."""
    names = ("ca-cert.pem", "client-cert.pem", "client-key.pem")
    return {name: namespaces["dst"].run("cat", f"{served.ends.destination_folder}/{name}").stdout.encode() for name in names}


@with_tls
def test_control_the_destination_s_certificates_open_the_export(namespaces: Lab, served: Served) -> None:
    hand_out(namespaces, served, ours(namespaces, served))
    assert served.read(namespaces["dst"], OTHER).returncode == 0


@with_tls
def test_hazard_the_export_asks_nobody_who_it_is(namespaces: Lab, served: Served) -> None:
    hand_out(namespaces, served, {"ca-cert.pem": ours(namespaces, served)["ca-cert.pem"]})
    assert served.read(namespaces["dst"], OTHER).returncode
    assert not served.has_it(namespaces["dst"])


@with_tls
def test_a_client_with_a_certificate_of_another_run_reads_nothing(namespaces: Lab, served: Served) -> None:
    strange = certificates(served.export.address)["client"]
    hand_out(namespaces, served, {**strange, "ca-cert.pem": ours(namespaces, served)["ca-cert.pem"]})
    assert served.read(namespaces["dst"], OTHER).returncode
    assert not served.has_it(namespaces["dst"])


@with_tls
def test_a_server_with_a_certificate_of_another_run_is_not_believed(namespaces: Lab, served: Served) -> None:
    strange = certificates(served.export.address)["client"]
    hand_out(namespaces, served, {**ours(namespaces, served), "ca-cert.pem": strange["ca-cert.pem"]})
    assert served.read(namespaces["dst"], OTHER).returncode
    assert not served.has_it(namespaces["dst"])


@in_clear
def test_without_tls_another_address_than_the_destination_s_reads_nothing(namespaces: Lab, served: Served) -> None:
    assert served.read(namespaces["third"]).returncode
    assert not served.has_it(namespaces["third"])


@every_way
def test_a_wrong_name_of_the_export_opens_nothing(namespaces: Lab, served: Served) -> None:
    creds = served.ends.destination_folder if served.job.settings.tls else ""
    for name in ("disk", "", served.export.name[:-1], served.export.name + "0"):
        if name:
            assert served.read(namespaces["dst"], creds, name).returncode
            assert not served.has_it(namespaces["dst"])


@every_way
def test_the_export_cannot_be_written_to(namespaces: Lab, served: Served) -> None:
    before = served.instance.sha256()
    *creds, _, image = served.node(namespaces["dst"], served.ends.destination_folder if served.job.settings.tls else "")
    done = namespaces["dst"].run("timeout", "8", "qemu-io", *creds, "--image-opts", "-c", "write -P 1 0 512", image, check=False)
    assert done.returncode or "denied" in done.stderr + done.stdout or "only" in done.stderr + done.stdout
    assert served.instance.sha256() == before


@every_way
def test_hazard_the_export_is_on_every_interface(namespaces: Lab, served: Served) -> None:
    listening = [line.split()[3] for line in namespaces["src"].run("ss", "-Hltn").stdout.splitlines()]
    assert [place for place in listening if place.endswith(f":{served.export.port}")] == [f"{namespaces['src'].address}:{served.export.port}"]


def test_keys_and_certificates_are_for_root_alone_and_gone_afterwards(namespaces: Lab, both: Copy, instance: Instance) -> None:
    with both.prepared(instance, Instance.make(namespaces["dst"]).raw(4 * MiB)) as (ends, job):
        folders = (("src", ends.source_folder, "server"), ("dst", ends.destination_folder, "client"))
        with exported(ends, job, Node.of_file(instance.path)):
            for name, folder, who in folders:
                found = namespaces[name].run("find", folder, "-name", "*.pem", "-printf", r"%m:%U %f\n").stdout.splitlines()
                assert sorted(found) == [f"600:0 {file}.pem" for file in ("ca-cert", f"{who}-cert", f"{who}-key")]
                assert namespaces[name].run("stat", "-c", "%a:%u", folder).stdout == "700:0\n"
    for name, folder, _ in folders:
        assert namespaces[name].run("test", "-e", folder, check=False).returncode == 1


def test_the_ca_s_key_is_nowhere() -> None:
    files = certificates("192.0.2.1")
    assert {name for side in files.values() for name in side} == {
        "ca-cert.pem", "server-cert.pem", "server-key.pem", "client-cert.pem", "client-key.pem"}
    assert files["server"]["ca-cert.pem"] == files["client"]["ca-cert.pem"]
    assert files["server"]["server-key.pem"] != files["client"]["client-key.pem"]


@contextlib.contextmanager
def listener(host: LabHost, *ports: int) -> Iterator[None]:
    """Somebody else's programs that listen on these ports."""
    with contextlib.ExitStack() as stack:
        for port in ports:
            stack.enter_context(running(host, "python3", "-m", "http.server", str(port)))
        wait_for("the listeners", lambda: all(f":{port} " in host.run("ss", "-Hltn").stdout for port in ports))
        yield


@every_way
def test_hazard_a_fixed_port_where_another_one_is_free(namespaces: Lab, prepared: tuple[Ends, DiskJob], instance: Instance) -> None:
    ends, job = prepared
    with listener(namespaces["src"], 2666, 2667), exported(ends, job, Node.of_file(instance.path)) as (export, _):
        assert export.port == 2668


@every_way
def test_no_free_port_is_reported_with_the_setting(namespaces: Lab, prepared: tuple[Ends, DiskJob], instance: Instance) -> None:
    ends, job = prepared
    with listener(namespaces["src"], 2666), pytest.raises(HostError, match="port 2666 is taken") as caught, \
            exported(ends, replace(job, settings=replace(job.settings, nbd_server_port=range(2666, 2667))), Node.of_file(instance.path)):
        pass
    assert "NBD_SERVER_PORT" in caught.value.reasons[0].way_out


@every_way
def test_hazard_other_people_s_exports_are_cut_off(namespaces: Lab, served: Served) -> None:
    with exported(served.ends, served.job, Node.of_file(served.instance.path)) as (second, _):
        assert second.port != served.export.port and second.name != served.export.name
    assert served.read(namespaces["dst"], served.ends.destination_folder if served.job.settings.tls else "").returncode == 0


@pytest.mark.parametrize("prepared", BOTH[:2], indirect=True, ids=NAMES[:2], scope="module")
def test_a_rehearsal_leaves_nothing_behind(namespaces: Lab, prepared: tuple[Ends, DiskJob]) -> None:
    ends, job = prepared
    before = [namespaces[name].run("ls", folder).stdout for name, folder in (("src", ends.source_folder), ("dst", ends.destination_folder))]
    rehearse(ends, job)
    after = [namespaces[name].run("ls", folder).stdout for name, folder in (("src", ends.source_folder), ("dst", ends.destination_folder))]
    assert [line for line in "".join(after).split() if line not in "".join(before).split() and not line.endswith((".pid", ".conf", "clients"))] == []


@pytest.mark.parametrize("prepared", BOTH[:1], indirect=True, ids=NAMES[:1], scope="module")
def test_a_port_that_is_filtered_between_the_hosts_fails_the_rehearsal_in_clear_words(namespaces: Lab, prepared: tuple[Ends, DiskJob]) -> None:
    ends, job = prepared
    namespaces["src"].run("ip", "route", "add", "blackhole", namespaces["dst"].address)  # answers to the destination are dropped
    try:
        with pytest.raises(HostError, match=f"dst cannot read from src at {namespaces['src'].address}") as caught:
            rehearse(ends, job)
    finally:
        namespaces["src"].run("ip", "route", "del", "blackhole", namespaces["dst"].address)
    assert "NBD_SERVER_PORT" in caught.value.reasons[0].way_out and "nbd_address" in caught.value.reasons[0].way_out
    rehearse(ends, job)


@pytest.mark.parametrize("prepared", BOTH[:1], indirect=True, ids=NAMES[:1], scope="module")
def test_a_server_under_another_address_is_not_believed(namespaces: Lab, prepared: tuple[Ends, DiskJob], instance: Instance) -> None:
    ends, job = prepared
    namespaces["src"].run("ip", "addr", "add", "10.99.99.2/32", "dev", "lo")
    namespaces["dst"].run("ip", "route", "add", "10.99.99.2", "via", namespaces["src"].address)
    before, ends.source.nbd_address = ends.source.nbd_address, "10.99.99.2"  # the certificate is for the one before
    try:
        with pytest.raises(HostError, match="cannot read from src"):
            rehearse(ends, job)
    finally:
        ends.source.nbd_address = before
        namespaces["dst"].run("ip", "route", "del", "10.99.99.2")
        namespaces["src"].run("ip", "addr", "del", "10.99.99.2/32", "dev", "lo")


CONNECTED = "import socket, sys, time; link = socket.create_connection((sys.argv[1], int(sys.argv[2])), 20); time.sleep(600)"


@pytest.mark.parametrize("prepared", BOTH[2:3], indirect=True, ids=NAMES[2:3], scope="module")
def test_hazard_20_no_child_of_an_nbd_server_outlives_the_lease_whoever_has_ended_its_parent(
        namespaces: Lab, prepared: tuple[Ends, DiskJob], instance: Instance) -> None:
    ends, job = prepared

    def servers() -> list[int]:
        return [pid for pid, words in processes(namespaces["src"]).items() if words[0] == "nbd-server"]

    with contextlib.ExitStack() as stack:
        with exported(ends, job, Node.of_file(instance.path)) as (export, _):
            stack.enter_context(running(namespaces["dst"], "python3", "-c", CONNECTED, export.address, str(export.port)))
            wait_for("a child of nbd-server", lambda: len(servers()) == 2)
            namespaces["src"].run("kill", "-9", str(min(servers())))
            assert len(servers()) == 1
        wait_for("the end of nbd-server's child", lambda: not servers(), 10)
