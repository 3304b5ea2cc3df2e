"""Refusals for which something has to be in the destination."""

from __future__ import annotations

from clouds.conftest import Operator
from clouds.test_refusals import refused
from lab.clouds import Clouds


def test_a_name_that_is_taken_in_the_destination(operator: Operator, clouds: Clouds, source: str) -> None:
    there = clouds.api("dst").create("arrived", network="none")
    refused(operator.run("-s", source, "-d", "arrived", "-f", "tiny", "-i", "guest"), f"the name 'arrived' is taken by {there}")


def test_a_quota_that_one_more_instance_would_exceed(operator: Operator, clouds: Clouds, source: str) -> None:
    api = clouds.api("dst")
    project = api.need("keystone", "projects", "admin")
    api.call("PUT", "nova", f"/os-quota-sets/{project}", {"quota_set": {"instances": 0}})
    try:
        refused(operator.run("-s", source, "-d", "arrived", "-f", "tiny", "-i", "guest"), "the quota is exceeded: 0 of 0 instances")
    finally:
        api.call("DELETE", "nova", f"/os-quota-sets/{project}")


def test_an_instance_that_no_host_takes_is_deleted_and_the_source_was_never_stopped(operator: Operator, clouds: Clouds, source: str) -> None:
    api = clouds.api("src")
    api.act(source, "os-start", until="ACTIVE")
    extra = "{'nics': 'none', 'availability_zone': 'nova:no-such-host'}"
    done = operator.run("-s", source, "-d", "arrived", "-f", "tiny", "-i", "guest", "-e", extra)
    assert done.returncode == 1 and ("no-such-host" in done.stderr or "No valid host" in done.stderr), done.stderr
    assert "Stop source instance" not in done.stderr
    assert api.server(source)["status"] == "ACTIVE" and not clouds.api("dst").find("nova", "servers", "arrived")
    api.act(source, "os-stop", until="SHUTOFF")
