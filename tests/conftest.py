"""What all tests share: the real command in a process of its own, and no silent skip."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "migrena.py"
Migrena = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """With CI=true a test that was skipped is a test that failed."""
    report: pytest.TestReport = yield  # type: ignore[assignment]  # pluggy sends the hook's result in
    if report.skipped and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {call.excinfo.value if call.excinfo else ''}"
    return report  # type: ignore[return-value]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shares something that takes long to bring up stays in one worker: each group of these, and the slowest groups first."""
    for item in items:
        group = {"clouds": "clouds", "test_nbd_device.py": "machines", "test_export.py": "export"}
        for part in set(item.path.parts) & group.keys():
            item.add_marker(pytest.mark.xdist_group(group[part]))
    items.sort(key=lambda item: (item.get_closest_marker("xdist_group") is None, "unit" in item.path.parts))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says loudly what was not tested."""
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
