"""What comes from flags and variables is read as a literal or refused; nothing of it is ever evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import Migrena
from unit.makers import UUID

CODE = (
    "__import__('pathlib').Path('harm').touch()",
    "{'meta': __import__('pathlib').Path('harm').touch()}",
    "{**__import__('os').environ}",
    "[open('harm', 'w') for _ in (1,)]",
    "{'meta': {f\"{open('harm', 'w')}\": 'x'}}",
    "(lambda: open('harm', 'w'))()",
    "!!python/object/apply:os.system ['touch harm']",
)


@pytest.mark.parametrize("code", CODE)
def test_code_in_a_flag_or_a_variable_is_refused_and_not_run(migrena: Migrena, tmp_path: Path, code: str) -> None:
    calls = [migrena("-s", UUID, "-d", "new", "-e", code)]
    calls += [migrena("-s", UUID, "-d", "new", env={f"MIGRENA_{name}": code}) for name in ("EXTRA_ARGS", "HOSTS", "SRC_CREDS", "CHUNK")]
    for done in calls:
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name == "harm"] == []


def test_control_the_same_as_a_literal_is_read(migrena: Migrena) -> None:
    done = migrena("-s", UUID, "-d", "new", "-e", "{'meta': {'a': 'b'}}")
    assert "no credentials for the source cloud" in done.stderr
