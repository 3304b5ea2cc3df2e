"""What goes wrong in the middle: the source is put back as it was found, and nothing of ours runs on a hypervisor."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest

from clouds.conftest import DESTINATION, SOURCE, Operator, disk, ended, has_been_put_back, left_on, same_to_both_guests
from lab.api import Api, ApiError
from lab.clouds import Clouds
from lab.processes import wait_until


def test_hazard_ctrl_c_cleans_nothing(operator: Operator, clouds: Clouds, src: Api, dst: Api, running: str) -> None:
    process = operator.at_a_third("-s", running, *operator.to(DESTINATION))
    process.send_signal(signal.SIGINT)
    assert ended(process).returncode == 128 + signal.SIGINT
    assert left_on(clouds.host(SOURCE)) == left_on(clouds.host(DESTINATION)) == []
    assert has_been_put_back(src, running, "ACTIVE")
    assert not dst.find("nova", "servers", "arrived")


STEPS = {"Create new instance": signal.SIGTERM, "Stop destination": signal.SIGHUP, "Compare bases": signal.SIGTERM, "Stop source": signal.SIGTERM}


def at_step(operator: Operator, title: str, *words: str) -> subprocess.Popen[str]:
    """A run that has just begun with this step."""
    process = operator.begin(*words)
    assert process.stderr
    for line in process.stderr:
        if title in line:
            return process
    raise AssertionError(process.wait())


@pytest.mark.parametrize("title", STEPS)
def test_a_run_that_is_told_to_end_undoes_all_at_whatever_step(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, running: str, title: str) -> None:
    process = at_step(operator, title, "-s", running, *operator.to(DESTINATION))
    process.send_signal(STEPS[title])
    assert ended(process).returncode == 128 + STEPS[title]
    assert left_on(clouds.host(SOURCE)) == left_on(clouds.host(DESTINATION)) == []
    assert has_been_put_back(src, running, "ACTIVE")
    assert not dst.find("nova", "servers", "arrived")


@pytest.mark.parametrize(("title", "word"), [("Create new instance", "rollback"), ("Stop source", "rollback"), ("Stop source", "resume")])
def test_a_run_that_is_killed_in_the_middle_of_what_nova_does_is_undone_or_goes_on(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, running: str, title: str, word: str) -> None:
    process = at_step(operator, title, "-s", running, *operator.to(DESTINATION))
    process.kill()
    process.communicate()
    done = operator.run(word, operator.last_run)
    assert done.returncode == 0, done.stderr
    if word == "rollback":
        assert has_been_put_back(src, running, "ACTIVE") and not dst.find("nova", "servers", "arrived")
        return
    assert same_to_both_guests(clouds.host(SOURCE), running, clouds.host(DESTINATION), done.stdout.strip())
    assert has_been_put_back(src, running, "SHUTOFF")


def killed_at_a_third(operator: Operator, clouds: Clouds, *words: str) -> str:
    """The id of a run that was killed outright; nothing of it runs on a hypervisor soon after."""
    process = operator.at_a_third(*words)
    process.kill()
    process.communicate()
    hosts, limit = [clouds.host(SOURCE), clouds.host(DESTINATION)], time.monotonic() + 30
    while any("nbd" in entry or "/run" in entry for host in hosts for entry in left_on(host)):
        assert time.monotonic() < limit, [left_on(host) for host in hosts]
    return operator.last_run


def test_a_killed_run_is_shown_and_goes_on_with_resume(operator: Operator, clouds: Clouds, src: Api, source: str) -> None:
    words = ("-s", source, *operator.to(DESTINATION))
    run = killed_at_a_third(operator, clouds, *words)
    again = operator.run(*words)
    assert again.returncode == 3 and "the name 'arrived' is taken" in again.stderr
    assert f"resume {run}" in again.stderr and f"rollback {run}" in again.stderr
    assert f"{run}  killed  copy" in operator.run("status").stdout
    done = operator.run("resume", run)
    assert done.returncode == 0, done.stderr
    assert same_to_both_guests(clouds.host(SOURCE), source, clouds.host(DESTINATION), done.stdout.strip())
    assert has_been_put_back(src, source, "SHUTOFF") and left_on(clouds.host(SOURCE)) == left_on(clouds.host(DESTINATION)) == []
    once_more = operator.run(*words)
    assert (once_more.returncode, once_more.stdout) == (0, done.stdout) and "already migrated" in once_more.stderr


def test_a_killed_run_whose_journal_is_lost_is_rolled_back(operator: Operator, clouds: Clouds, src: Api, dst: Api, running: str) -> None:
    killed_at_a_third(operator, clouds, "-s", running, *operator.to(DESTINATION))
    (operator.folder / "state").rename(operator.folder / "lost")
    done = operator.run("rollback", "--run-of", running)
    assert done.returncode == 0, done.stderr
    assert has_been_put_back(src, running, "ACTIVE") and not dst.find("nova", "servers", "arrived")
    assert left_on(clouds.host(SOURCE)) == left_on(clouds.host(DESTINATION)) == []


def test_a_successful_run_that_is_not_wanted_is_rolled_back(operator: Operator, src: Api, dst: Api, running: str) -> None:
    report = operator.report("-s", running, *operator.to(DESTINATION))
    refused = operator.run("rollback", report["run"])
    assert refused.returncode == 3 and "--yes" in refused.stderr and dst.find("nova", "servers", "arrived")
    assert operator.run("rollback", report["run"], "--yes").returncode == 0
    assert has_been_put_back(src, running, "ACTIVE") and not dst.find("nova", "servers", "arrived")


def test_a_start_that_fails_is_reported_with_its_reason_from_nova(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, running: str) -> None:
    """Nova accepts a start with 202 and then says nothing more; only os-instance-actions knows why the instance does not run."""
    process = operator.at_a_third("-s", running, *operator.to(DESTINATION), "-a", "dst")
    info = f"{disk(dst.need('nova', 'servers', 'arrived'))}.info"
    clouds.host(DESTINATION).run("sh", "-c", 'chown root:root "$1"; chmod 600 "$1"', "sh", info)
    done = ended(process)
    assert done.returncode == 1, done.stderr
    assert "did not start: " in done.stderr and "disk info file: [Errno 13] Permission denied" in done.stderr
    assert has_been_put_back(src, running, "ACTIVE") and not dst.find("nova", "servers", "arrived")


def latest_action(api: Api, id: str) -> tuple[str, str | None]:
    """What Nova was last asked to do with an instance, and what it says of that: nothing, or Error."""
    latest = api.call("GET", "nova", f"/servers/{id}/os-instance-actions")["instanceActions"][0]
    return latest["action"], latest["message"]


def test_hazard_nothing_fences_the_source_and_an_admin_starts_it_in_mid_copy(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, source: str) -> None:
    """Nova's lock holds users alone; what holds admins is qemu's. The run is held, or it may let go of the disk before qemu asks for it."""
    one = clouds.host(SOURCE)
    before = one.run("sha256sum", disk(source)).stdout
    process = operator.at_a_third("-s", source, *operator.to(DESTINATION))
    process.send_signal(signal.SIGSTOP)
    src.act(source, "os-start")
    wait_until("qemu refuses to start the source", lambda: latest_action(src, source) == ("start", "Error"), 60)
    process.send_signal(signal.SIGCONT)
    done = ended(process)
    assert one.run("sha256sum", disk(source)).stdout == before
    assert done.returncode == 1 and has_been_put_back(src, source, "SHUTOFF") and not dst.find("nova", "servers", "arrived")
    assert "somebody started it" in done.stderr or "was changed while it was being copied" in done.stderr  # by its task, or by the file's owner
    src.act(source, "os-start", until="ACTIVE")  # after a start that fails Nova leaves no domain, and the next run asks libvirt for it


def test_hazard_nothing_fences_the_source_and_a_user_starts_it_in_mid_copy(operator: Operator, clouds: Clouds, src: Api, source: str) -> None:
    process = operator.at_a_third("-s", source, *operator.to(DESTINATION))
    member = clouds.api("src", "demo")
    member.project = "admin"
    role, user, project = src.need("keystone", "roles", "member"), src.need("keystone", "users", "demo"), src.need("keystone", "projects", "admin")
    src.call("PUT", "keystone", f"/projects/{project}/users/{user}/roles/{role}")
    try:
        with pytest.raises(ApiError) as refused:
            member.act(source, "os-start")
        assert refused.value.status == 409 and "locked" in str(refused.value)
    finally:
        src.call("DELETE", "keystone", f"/projects/{project}/users/{user}/roles/{role}")
    assert ended(process).returncode == 0


def test_an_instance_that_no_host_takes_is_deleted_and_the_source_was_never_stopped(operator: Operator, src: Api, dst: Api, running: str) -> None:
    done = operator.run("-s", running, *operator.to("no-such-host"))
    assert done.returncode == 1 and ("no-such-host" in done.stderr or "No valid host" in done.stderr), done.stderr
    assert "Stop source instance" not in done.stderr
    assert has_been_put_back(src, running, "ACTIVE") and not dst.find("nova", "servers", "arrived")


def test_an_instance_that_goes_to_error_is_reported_with_nova_s_reason_and_deleted(
        operator: Operator, src: Api, dst: Api, running: str) -> None:
    """Glance believes that it is qcow2, and Nova, on the hypervisor, does not."""
    made = dst.call("POST", "glance", "/images", {"name": "no qcow2", "disk_format": "qcow2", "container_format": "bare"})
    dst.call("PUT", "glance", f"/images/{made['id']}/file", "no qcow2 at all", {"Content-Type": "application/octet-stream"})
    try:
        done = operator.run("-s", running, *operator.to(DESTINATION, image="no qcow2"))
    finally:
        dst.call("DELETE", "glance", f"/images/{made['id']}")
    assert done.returncode == 1 and "went to ERROR" in done.stderr and "unacceptable" in done.stderr, done.stderr
    assert "Stop source instance" not in done.stderr
    assert has_been_put_back(src, running, "ACTIVE") and not dst.find("nova", "servers", "arrived")
