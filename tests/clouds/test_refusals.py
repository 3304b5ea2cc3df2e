"""What only a real cloud can refuse: exit 3 with clear lines, and nothing touched."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from clouds.conftest import Operator
from lab.clouds import Clouds


@pytest.fixture(autouse=True)
def nothing_is_touched(clouds: Clouds, source: str) -> Iterator[None]:
    """Whatever is refused, the destination stays empty and the source as it was."""
    yield
    assert clouds.api("dst").call("GET", "nova", "/servers")["servers"] == []
    server = clouds.api("src").server(source)
    assert (server["status"], server["metadata"]) == ("SHUTOFF", {})


def refused(done: subprocess.CompletedProcess[str], *told: str) -> None:
    """The run ended with 3 and told all this."""
    assert done.returncode == 3, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    for words in told:
        assert words in done.stderr


def test_a_source_that_nobody_knows(operator: Operator) -> None:
    refused(operator.run("-s", "00000000-0000-4000-8000-000000000000", "-d", "arrived", "-f", "tiny", "-i", "guest"), "there is no server 00000000")


@pytest.mark.parametrize(("extra", "told"), [
    ("SRC_CREDS['password'] = 'wrong'", "source cloud: http://10.80.0.1:5000/v3 refuses the credentials"),
    ("DST_CREDS['region_name'] = 'nowhere'", "region"),
    ("SRC_CREDS['auth_url'] = 'http://127.0.0.1:9/v3'", "check auth_url"),
    ("DST_CREDS['username'] = DST_CREDS['project_name'] = 'demo'", "destination cloud: these credentials are not told on which host"),
], ids=["password", "region", "keystone", "no admin"])
def test_credentials_that_do_not_do(operator: Operator, source: str, extra: str, told: str) -> None:
    refused(operator.run("-s", source, "-d", "arrived", "-f", "tiny", "-i", "guest", extra=extra), told)


def test_all_reasons_of_both_clouds_come_at_once(operator: Operator, clouds: Clouds, source: str) -> None:
    clouds.api("src").act(source, "lock")
    try:
        refused(operator.run("-s", source, "-d", "arrived", "-f", "no-such-flavor", "-i", "no-such-image"), "the source is locked",
                "there is no flavor 'no-such-flavor'", "nearest: ", "there is no image 'no-such-image'")
    finally:
        clouds.api("src").act(source, "unlock")


@pytest.mark.parametrize(("action", "status", "back"), [("pause", "PAUSED", "unpause"), ("suspend", "SUSPENDED", "resume")])
def test_a_source_that_is_neither_running_nor_stopped(
        operator: Operator, clouds: Clouds, source: str, action: str, status: str, back: str) -> None:
    api = clouds.api("src")
    api.act(source, "os-start", until="ACTIVE")
    api.act(source, action, until=status)
    try:
        refused(operator.run("-s", source, "-d", "arrived", "-f", "tiny", "-i", "guest"), f"the source is {status}", f"openstack server {back}")
    finally:
        api.act(source, back, until="ACTIVE")
        api.act(source, "os-stop", until="SHUTOFF")


def test_a_dry_run_tells_the_plan_and_changes_nothing(operator: Operator, source: str) -> None:
    done = operator.run("-s", source, "-d", "arrived", "-f", "tiny", "-i", "guest", "-n")
    assert done.returncode == 0 and done.stdout == ""
    assert all(words in done.stderr for words in ("to move", "space", "transport", "at 1 Gbit/s", "nothing is started"))
