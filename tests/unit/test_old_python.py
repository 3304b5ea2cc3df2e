"""An older Python is told which one is needed. It is a stand-in: this very Python, which says that it is an older one (no older one is at hand)."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from conftest import SCRIPT

PRETEND = "import runpy, sys; sys.version_info, sys.argv = {version}, sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.mark.parametrize("version", [(3, 8, 20), (3, 9, 19)])
def test_an_older_python_reads_the_file_and_is_reported_what_is_needed(version: tuple[int, int, int]) -> None:
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=version[:2])
    words = [sys.executable, "-c", PRETEND.format(version=version), str(SCRIPT), "status"]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: migrena needs Python 3.10 or later; ") and "Traceback" not in done.stderr


def test_nothing_but_imports_of_the_standard_library_stands_before_that() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    before = ast.parse(text[: text.index("if sys.version_info")]).body
    assert all(isinstance(node, (ast.Import, ast.ImportFrom, ast.Expr)) or ast.unparse(node).startswith("if TYPE_CHECKING") for node in before)
