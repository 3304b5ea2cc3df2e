"""The main job on two real clouds."""

from __future__ import annotations

import signal
import time

import pytest

from clouds.conftest import Operator, disk, left_on, seen_by_guest, wait_for_console
from lab.clouds import Clouds


@pytest.mark.parametrize("words", [(), ("--no-tls",), ("--transport", "qemu")], ids=["auto", "no-tls", "qemu"])
def test_an_instance_arrives_whole_and_its_source_is_not_changed_by_a_byte(
        operator: Operator, clouds: Clouds, source: str, network: str, words: tuple[str, ...]) -> None:
    one, other = clouds.host("src-cmp1"), clouds.host("dst-cmp1")
    before = one.run("sha256sum", disk(source)).stdout
    report = operator.report("-s", source, "-d", "arrived", "-f", "tiny", "-i", "guest", "-e", network, *words)
    assert report["copy"]["view"] == "file" and report["copy"]["verified"] and report["copy"]["tls"] is ("--no-tls" not in words)
    assert one.run("sha256sum", disk(source)).stdout == before
    assert seen_by_guest(one, source) == seen_by_guest(other, report["destination"]["id"])
    assert left_on(one) == left_on(other) == []
    server = clouds.api("src").server(source)
    assert (server["status"], server["locked"], server["metadata"]) == ("SHUTOFF", False, {})


def test_the_destination_boots_and_the_guest_s_records_go_on(operator: Operator, clouds: Clouds, source: str, network: str) -> None:
    report = operator.report("-s", source, "-d", "arrived", "-f", "tiny", "-i", "guest", "-e", network, "-a", "dst")
    shown = wait_for_console(clouds, "dst", report["destination"]["id"], "GUEST boots=")
    assert "GUEST boots=2 " in shown and "broken=0" in shown and report["started"] == ["destination"]


def test_a_destination_whose_image_has_other_content_gets_what_the_guest_sees(
        operator: Operator, clouds: Clouds, source: str, network: str) -> None:
    report = operator.report("-s", source, "-d", "arrived", "-f", "tiny", "-i", "guest-other", "-e", network)
    assert (report["copy"]["view"], report["copy"]["why_view"]) == ("guest", "the bases are not proven equal")
    id = report["destination"]["id"]
    assert seen_by_guest(clouds.host("src-cmp1"), source) == seen_by_guest(clouds.host("dst-cmp1"), id)


def test_flavor_and_image_that_are_not_named_are_matched_and_the_disk_can_become_raw(
        operator: Operator, clouds: Clouds, source: str, network: str) -> None:
    clouds.set_images_type("dst-cmp1", "raw")
    try:
        report = operator.report("-s", source, "-d", "arrived", "-e", network)
        id = report["destination"]["id"]
        assert clouds.api("dst").server(id)["flavor"]["original_name"] == "tiny"
        assert seen_by_guest(clouds.host("src-cmp1"), source) == seen_by_guest(clouds.host("dst-cmp1"), id)
    finally:
        clouds.set_images_type("dst-cmp1", "qcow2")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_runs_on_either_host_after_a_signal_at_a_third_of_the_copy(
        operator: Operator, clouds: Clouds, source: str, network: str, number: signal.Signals) -> None:
    api = clouds.api("src")
    api.act(source, "os-start", until="ACTIVE")
    words = ("-s", source, "-d", "arrived", "-f", "tiny", "-i", "guest", "-e", network, "--limit-rate", "10M")
    done = operator.signalled_at_a_third(number, *words)
    hosts = [clouds.host("src-cmp1"), clouds.host("dst-cmp1")]
    if number == signal.SIGINT:
        assert done.returncode == 130, done.stderr
        assert [left_on(host) for host in hosts] == [[], []]
        server = api.server(source)
        assert (server["status"], server["locked"], server["metadata"]) == ("ACTIVE", False, {})
        assert not clouds.api("dst").find("nova", "servers", "arrived")
        api.act(source, "os-stop", until="SHUTOFF")
        return
    limit = time.monotonic() + 5
    while any("nbd" in entry or "/run" in entry for host in hosts for entry in left_on(host)):
        assert time.monotonic() < limit, [left_on(host) for host in hosts]
    again = operator.run(*words)
    assert again.returncode == 3 and "server unlock" in again.stderr and "unset --property" in again.stderr and "is taken" in again.stderr
    api.act(source, "unlock")
    api.call("DELETE", "nova", f"/servers/{source}/metadata/migrena:run")
