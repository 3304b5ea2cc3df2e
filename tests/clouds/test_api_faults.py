"""Real clouds whose API fails on the way: answers of 500, 401 and 409, answers that get lost, and a minute of silence."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from clouds.conftest import DESTINATION, SOURCE, Operator, disk, ended, has_been_put_back, has_moved, left_on, same_to_both_guests
from clouds.middle import LATE, LOST, PASS, SILENT, Middle, Spoil, middle
from lab.api import Api
from lab.clouds import Clouds

FIRST_ACT = "src POST metadata"  # the mark on the source: all before it is the survey, which only reads
CREATE = "dst POST servers"


@pytest.fixture
def between() -> Iterator[Middle]:
    """What stands between migrena and both clouds."""
    with middle() as found:
        yield found


def after_the_survey(between: Middle, spoil: Spoil) -> Spoil:
    """The same, for all that comes when the run has begun to act; requests are counted from there."""
    begun: list[int] = []

    def decide(name: str, _: int) -> str:
        if name == FIRST_ACT and not begun:
            begun.append(len(between.seen))
        return spoil(name, between.seen[begun[0]:].count(name)) if begun else PASS

    return decide


def is_complete(clouds: Clouds, src: Api, source: str, arrived: str) -> bool:
    """Whether a stopped source has arrived, and nothing is left anywhere."""
    assert same_to_both_guests(clouds.host(SOURCE), source, clouds.host(DESTINATION), arrived)
    return is_over(clouds, src, source, arrived)


def is_over(clouds: Clouds, src: Api, source: str, arrived: str) -> bool:
    """Whether the source is as a run leaves it, and nothing is left on the hosts."""
    is_left = has_been_put_back(src, source, "SHUTOFF") or has_moved(src, source, arrived)
    return is_left and left_on(clouds.host(SOURCE)) == left_on(clouds.host(DESTINATION)) == []


@pytest.mark.parametrize(("answer", "never"), [("500", (CREATE,)), ("409", (CREATE, "GET")), ("401", ("tokens",)), (LOST, ())])
def test_every_request_that_fails_once_is_made_again_and_nothing_is_made_twice(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, source: str, between: Middle, answer: str, never: tuple[str, ...]) -> None:
    """A request to create is not repeated after an error; when its answer is lost, the instance is found by its mark."""
    between.spoil = after_the_survey(between, lambda name, before: PASS if before or any(part in name for part in never) else answer)
    process = operator.halted("intent of start destination", "-s", source, *operator.to(DESTINATION), "-a", "dst", env=between.environment)
    assert same_to_both_guests(clouds.host(SOURCE), source, clouds.host(DESTINATION), dst.need("nova", "servers", "arrived"))  # it has not run yet
    done = operator.go_on(process)
    assert done.returncode == 0, done.stderr
    assert [server["name"] for server in dst.call("GET", "nova", "/servers?all_tenants=1")["servers"]] == ["arrived"]
    assert {"src POST metadata", "dst POST os-stop", "dst POST lock", "src POST lock", "dst POST os-start", "dst POST unlock"} <= {*between.spoiled}
    dst.act(done.stdout.strip(), "os-stop", until="SHUTOFF")
    assert is_over(clouds, src, source, done.stdout.strip())


def test_an_instance_that_nova_makes_after_its_answer_was_lost_is_deleted_all_the_same(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, source: str, between: Middle) -> None:
    between.spoil = after_the_survey(between, lambda name, before: LATE if name == CREATE and not before else PASS)
    done = operator.run("-s", source, *operator.to(DESTINATION), env=between.environment)
    assert done.returncode == 1 and "504" in done.stderr, done.stderr
    assert not dst.find("nova", "servers", "arrived") and has_been_put_back(src, source, "SHUTOFF")


@pytest.mark.long
def test_an_api_that_is_silent_for_a_minute_in_mid_run_delays_it(
        operator: Operator, clouds: Clouds, src: Api, source: str, between: Middle) -> None:
    since: list[float] = []

    def spoil(name: str, before: int) -> str:
        if name == "src POST os-stop" or since:
            since.append(time.monotonic())
        return SILENT if since and since[-1] - since[0] < 60 else PASS

    between.spoil = after_the_survey(between, spoil)
    src.act(source, "os-start", until="ACTIVE")
    process = operator.begin("-s", source, *operator.to(DESTINATION), env=between.environment)
    done = ended(process)
    assert done.returncode == 0 and between.spoiled, done.stderr
    assert is_complete(clouds, src, source, done.stdout.strip())


def test_a_warm_copy_lives_through_an_api_that_fails_while_the_source_runs_on(
        operator: Operator, clouds: Clouds, src: Api, running: str, between: Middle) -> None:
    """Before each pass Nova is asked whether the source still runs."""
    def spoil(name: str, before: int) -> str:
        is_due = name == "src GET server" and "dst POST os-stop" in between.seen and "src POST os-stop" not in between.seen
        return "500" if is_due and len(between.spoiled) < 3 else PASS

    between.spoil = spoil
    done = operator.run("-s", running, *operator.to(DESTINATION), "--warm", env=between.environment)
    assert done.returncode == 0 and between.spoiled == ["src GET server"] * 3, done.stderr
    assert is_complete(clouds, src, running, done.stdout.strip())


STEPS = ["src POST metadata", CREATE, "dst POST os-stop", "dst POST lock", "src POST lock", "dst POST os-start"]


@pytest.mark.parametrize("step", STEPS)
def test_a_request_that_fails_for_good_ends_the_run_and_all_but_a_proven_copy_is_undone(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, source: str, between: Middle, step: str) -> None:
    """Nova never answers anything but 500 to this request; after two minutes, here two seconds, the run is given up."""
    hasty = operator.with_build(("OUTAGE_LIMIT: Final = 120.0", "OUTAGE_LIMIT: Final = 2.0"))
    between.spoil = lambda name, before: "500" if name == step else PASS
    done = hasty.run("-s", source, *operator.to(DESTINATION), "-a", "dst", env=between.environment)
    assert "500" in done.stderr and "spoiled on the way" in done.stderr, done.stderr
    if step == "dst POST os-start":  # the copy is proven by then, and is not undone for that
        arrived = dst.need("nova", "servers", "arrived")
        assert done.returncode == 4 and arrived in done.stderr and src.server(source)["locked"], done.stderr
        assert same_to_both_guests(clouds.host(SOURCE), source, clouds.host(DESTINATION), arrived)
        assert operator.run("rollback", operator.last_run).returncode == 0
    else:
        assert done.returncode == 1, done.stderr
    assert not dst.find("nova", "servers", "arrived") and has_been_put_back(src, source, "SHUTOFF")


def test_a_run_whose_undoing_meets_a_failing_api_is_undone_all_the_same(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, running: str, between: Middle) -> None:
    begun: list[str] = []
    between.spoil = lambda name, before: "500" if begun and len(between.spoiled) < 6 else PASS
    process = operator.at_a_third("-s", running, *operator.to(DESTINATION), env=between.environment)
    begun.append("undo")
    process.send_signal(signal.SIGTERM)
    done = ended(process)
    assert done.returncode == 128 + signal.SIGTERM and len(between.spoiled) == 6, done.stderr
    assert has_been_put_back(src, running, "ACTIVE") and not dst.find("nova", "servers", "arrived")
    assert left_on(clouds.host(SOURCE)) == left_on(clouds.host(DESTINATION)) == []


def test_an_api_that_fails_during_the_survey_is_reported_and_nothing_is_touched(
        operator: Operator, clouds: Clouds, src: Api, source: str, between: Middle) -> None:
    before = clouds.host(SOURCE).run("sha256sum", disk(source)).stdout
    between.spoil = lambda name, before: "500" if name in ("src GET server", "dst GET limits") else PASS
    done = operator.run("-s", source, *operator.to(DESTINATION), env=between.environment)
    assert done.returncode == 3 and "source cloud: show server" in done.stderr and "destination cloud: show limits" in done.stderr, done.stderr
    assert not any("POST" in name and "tokens" not in name for name in between.seen)
    assert has_been_put_back(src, source, "SHUTOFF") and clouds.host(SOURCE).run("sha256sum", disk(source)).stdout == before
