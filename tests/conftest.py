"""What all tests share: the real command in a process of its own, and no silent skip."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "migrena.py"
LONG = frozenset(line for line in Path(__file__).with_name("long.txt").read_text().splitlines() if not line.startswith("#"))
SECOND = ("test_adversary.py", "test_faults.py", "test_gate.py", "test_refusals.py", "test_resources.py", "test_seed.py", "test_spread.py",
          "test_warm.py")  # with several pairs of clouds, these are on another one
Migrena = Callable[..., "subprocess.CompletedProcess[str]"]
T = TypeVar("T")

PAIRS = os.environ.get("LAB_PAIRS") == "yes" and os.environ.get("PYTEST_XDIST_WORKER")
if PAIRS:  # the long command: each worker brings up clouds of its own, if it comes to a test on clouds
    os.environ["LAB_PAIR"] = PAIRS.removeprefix("gw")

# Who starts the tests in the background has these ignored, and all that the tests start would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


def short_are(kept: Collection[T], every: Iterable[T]) -> list[Any]:
    """Parameters of a test, all of which are marked `long` but for these: the short command has one of each kind."""
    return [one if one in kept else pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=pytest.mark.long) for one in every]


def pytest_addoption(parser: pytest.Parser) -> None:
    """What the random faults of hosts/test_random.py and the schedules of clouds/test_adversary.py are thrown by."""
    parser.addoption("--random-runs", type=int, default=3, help="how many runs faults are thrown into")
    parser.addoption("--random-schedules", type=int, default=50, help="how many schedules others meddle in")
    parser.addoption("--random-seed", default="", help="what decides about the faults (left out: another one each time, which is printed)")


def pytest_configure(config: pytest.Config) -> None:
    """One seed for all workers: they are started with the options of this process."""
    config.option.random_seed = config.option.random_seed or secrets.token_hex(4)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """With CI=true a test that was skipped is a test that failed."""
    report: pytest.TestReport = yield  # type: ignore[assignment]  # pluggy sends the hook's result in
    if report.skipped and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {call.excinfo.value if call.excinfo else ''}"
    return report  # type: ignore[return-value]


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shares something that takes long to bring up stays in one worker: each group of these, and the slowest groups first."""
    for item in items:
        name = item.nodeid.partition("@")[0]
        if {name, name.partition("[")[0]} & LONG:
            item.add_marker(pytest.mark.long)
        second = "other clouds" if item.path.name in SECOND and PAIRS else "clouds"
        group = {"clouds": second, "test_nbd_device.py": "machines", "test_export.py": "export"}
        for part in set(item.path.parts) & group.keys():
            item.add_marker(pytest.mark.xdist_group(group[part]))
    items.sort(key=lambda item: (item.get_closest_marker("xdist_group") is None, "unit" in item.path.parts))


def tell_random(terminal: pytest.TerminalReporter, name: str, option: str, module: str) -> None:
    """Says how the random runs of a module ended, and what they can be had again by."""
    ends = Counter(str(end) for report in terminal.stats.get("passed", []) for key, end in report.user_properties if key == name)
    if ends or any(module in report.nodeid for report in terminal.stats.get("failed", [])):
        terminal.section(f"{name}s: {option} {terminal.config.getoption(option)} --random-seed {terminal.config.option.random_seed}")
        terminal.line(", ".join(f"{count} {end}" for end, count in ends.most_common()) or "none has passed")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how the random runs ended, and loudly what was not tested."""
    for name, option, module in (("random run", "--random-runs", "test_random"), ("random schedule", "--random-schedules", "test_adversary")):
        tell_random(terminalreporter, name, option, module)
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.section(f"{len(skipped)} TESTS WERE SKIPPED, SO THIS WAS NOT TESTED", sep="!", red=True, bold=True)
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        terminalreporter.line(f"{report.nodeid}: {str(reason).removeprefix('Skipped: ')}", red=True)


@pytest.fixture
def migrena(tmp_path: Path) -> Migrena:
    """The real command as an operator calls it, with a home and a config.py (given as text) of its own."""

    def call(*words: str, config: str = "", env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "config.py"
        path.write_text(config)
        path.chmod(0o600)
        clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "MIGRENA_CONFIG": str(path), **(env or {})}
        return subprocess.run([sys.executable, str(SCRIPT), *words], check=False, capture_output=True, text=True, env=clean,
                              stdin=subprocess.DEVNULL, cwd=tmp_path, timeout=120)

    return call
