"""Each setting has a reader; what it does not understand it refuses in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from migrena import (
    HostEntry,
    one_of,
    parse_disk_path,
    parse_hosts,
    parse_literal,
    parse_port,
    parse_ports,
    parse_size,
    parse_start,
    parse_text,
    parse_yes_no,
)
from unit.makers import some_settings

Reader = Callable[[object], object]


@pytest.mark.parametrize(("written", "count"), [
    ("0", 0), ("17", 17), (17, 17), ("1K", 1024), ("1k", 1024), ("50M", 50 * 1024**2), ("50MiB", 50 * 1024**2), ("50MB", 50 * 1024**2),
    ("50M/s", 50 * 1024**2), ("1.5G", 3 * 512 * 1024**2), ("2T", 2 * 1024**4), (" 3 G ", 3 * 1024**3), ("1B", 1),
])
def test_a_size_is_read_in_powers_of_1024(written: object, count: int) -> None:
    assert parse_size(written) == count


@pytest.mark.parametrize("written", ["", "M", "-1", "-5M", "1,5G", "5 0M", "5X", "0x10", "1e3", "ten", None, True, [1], "5M5", "5M\n6"])
def test_what_is_not_a_size_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match=r"is not a size; write it as 500K, 50M or 1G"):
        parse_size(written)


@pytest.mark.parametrize(("written", "first", "last"), [("2666", 2666, 2666), (2666, 2666, 2666), ("2666-2697", 2666, 2697), (" 1-65535 ", 1, 65535)])
def test_ports_are_one_port_or_a_range_with_both_ends(written: object, first: int, last: int) -> None:
    assert parse_ports(written) == range(first, last + 1)


@pytest.mark.parametrize("written", ["", "0", "65536", "2697-2666", "1-65536", "-5", "5-", "80,81", "http", "0-10", None, "2666 - 2697", "١٢"])
def test_what_are_not_ports_is_refused(written: object) -> None:
    if written == "١٢":  # digits of another script are digits to Python: an accident, and harmless
        assert parse_ports(written) == range(12, 13)
        return
    with pytest.raises(ValueError, match="is not a TCP port"):
        parse_ports(written)


def test_no_port_is_0_and_a_bad_one_is_refused() -> None:
    assert (parse_port(""), parse_port("0"), parse_port(0), parse_port("22")) == (0, 0, 0, 22)
    with pytest.raises(ValueError, match="is not a TCP port"):
        parse_port("70000")


@pytest.mark.parametrize("written", ["/var/lib/nova/instances/%s/disk", "/data, of mine/%s/disk", "/%s"])
def test_a_disk_path_has_one_place_for_the_id(written: str) -> None:
    assert parse_disk_path(written) == written
    assert parse_disk_path(Path(written)) == written


@pytest.mark.parametrize("written", [
    "/var/lib/nova/disk", "var/%s/disk", "/%s/%s", "/%s/%d", "/%s/100%", "/%d/disk", "", "/a\n/%s", None, 3, "%s/disk", "/%%s/disk",
])
def test_what_is_not_a_disk_path_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match="must be an absolute path"):
        parse_disk_path(written)


@pytest.mark.parametrize("written", ["a\nb", "a\tb", "a\0b", "\x1b[31mred", "a\x7f"])
def test_text_takes_no_control_characters(written: str) -> None:
    with pytest.raises(ValueError, match="control characters"):
        parse_text(written)


def test_text_takes_any_script() -> None:
    assert parse_text("naïve „Größe“ 大") == "naïve „Größe“ 大"


EXTRA = {"nics": [{"net-id": "abc"}], "security_groups": ["default"], "config_drive": True, "key_name": None}


@pytest.mark.parametrize("written", [EXTRA, repr(EXTRA), json.dumps(EXTRA), f"  {EXTRA!r}\n"])
def test_a_dictionary_is_read_from_python_and_from_json(written: object) -> None:
    assert parse_literal(written) == EXTRA


def test_an_empty_text_is_an_empty_dictionary() -> None:
    assert parse_literal("") == {}


@pytest.mark.parametrize("written", [
    "[1]", "None", "nics=none", "{'a': 1", "{'a'}", "{1: 2}", "dict(a=1)", "__import__('os').system('true')", "{'a': open('/etc/passwd')}",
    "(" * 5000, "{" * 100000, 5, None, [("a", 1)], "\0", "{'a': 1}; 2", "'{}'",
])
def test_what_is_not_a_dictionary_is_refused_and_never_evaluated(written: object) -> None:
    with pytest.raises(ValueError, match="is not a dictionary"):
        parse_literal(written)


def test_hosts_takes_an_address_or_a_row_for_each_host() -> None:
    row = {"address": "192.0.2.7", "port": "2222", "user": "operator", "key": "~/.ssh/cmp2", "nbd_address": "198.51.100.7"}
    assert parse_hosts({"cmp1": "192.0.2.6", "cmp2": row, "cmp3": {}}) == {
        "cmp1": HostEntry("192.0.2.6"), "cmp2": HostEntry("192.0.2.7", 2222, "operator", "~/.ssh/cmp2", "198.51.100.7"), "cmp3": HostEntry(),
    }


def test_what_is_reported_of_all_hosts_yields_to_what_is_reported_of_one() -> None:
    found = some_settings(hosts=parse_hosts({"*": {"prefix": "podman exec -i x", "paths": {"/a": "/b"}}, "cmp1": {"prefix": "nsenter"}}))
    assert (found.host("cmp1").prefix, found.host("cmp1").paths, found.host("cmp2").prefix) == (
        ("nsenter",), {"/a": "/b"}, ("podman", "exec", "-i", "x"))


@pytest.mark.parametrize(("written", "complaint"), [
    ({"cmp1": {"adress": "192.0.2.6"}}, "unknown entry 'adress' for cmp1; did you mean address?"),
    ({"cmp1": {"port": "ssh"}}, "is not a TCP port"),
    ({"cmp1": 5}, "is not text"),
    ({"cmp1": None}, "is not text"),
    ({"cmp1": ["192.0.2.6", 22]}, "is not text"),
    ({"cmp1": {"user": 5}}, "is not text"),
    ({"cmp1": {5: "x"}}, "unknown entry"),
    ({"*": {"paths": "/var/lib/nova"}}, "paths is not a dictionary"),
    ({"*": {"paths": {"/var/lib/nova": "nova"}}}, "paths is not a dictionary"),
    ({"*": {"paths": {"/var/lib/nova": "/srv/a,b"}}}, "paths is not a dictionary"),
    ({"*": {"prefix": "sh -c 'exec"}}, "No closing quotation"),
    (["cmp1"], "is not a dictionary"),
    ({5: "192.0.2.6"}, "is not a dictionary"),
    ({"cmp1": "192.0.2.6\n"}, "control characters"),
])
def test_what_is_not_a_map_of_hosts_is_refused(written: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint.replace("?", r"\?")):
        parse_hosts(written)


@pytest.mark.parametrize(("written", "meant"), [
    ("", ""), ("all", "all"), ("src", "src"), ("dst", "dst"), ("src,dst", "all"), ("dst, src", "all"), ("src,", "src"), ("all,dst", "all"),
])
def test_start_after_takes_the_known_words(written: str, meant: str) -> None:
    assert parse_start(written) == meant


@pytest.mark.parametrize("written", ["both", "source", "src dst", "ALL", "src;dst", None, True])
def test_start_after_refuses_other_words(written: object) -> None:
    with pytest.raises(ValueError, match="not one of all, src, dst"):
        parse_start(written)


@pytest.mark.parametrize(("written", "meant"), [("yes", True), ("TRUE", True), ("on", True), (1, True), (True, True),
                                               ("no", False), ("False", False), ("off", False), ("0", False), (False, False)])
def test_yes_and_no_are_read_in_all_their_spellings(written: object, meant: bool) -> None:
    assert parse_yes_no(written) is meant


@pytest.mark.parametrize("written", ["", "maybe", "2", None, []])
def test_what_is_neither_yes_nor_no_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match="neither yes nor no"):
        parse_yes_no(written)


def test_a_word_that_is_nearly_right_is_answered_with_the_right_one() -> None:
    reader: Reader = one_of("auto", "nbd", "qemu")
    assert reader("nbd") == "nbd"
    with pytest.raises(ValueError, match=r"is not one of auto, nbd, qemu; did you mean qemu\?"):
        reader("qmeu")
    with pytest.raises(ValueError, match=r"is not one of auto, nbd, qemu$"):
        reader("rsync")
