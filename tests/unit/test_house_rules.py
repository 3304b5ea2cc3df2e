"""The rules of this house, as far as a machine can see them; each has a control that shows it failing."""

from __future__ import annotations

import ast
import re
import subprocess
import symtable
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import LONG, REPOSITORY, SCRIPT

TEXT = SCRIPT.read_text(encoding="utf-8")
FUNCTION_LINES, CLASS_LINES, FILE_BYTES, COLUMNS = 45, 250, 630_000, 120
AT_THE_TOP = {"migrena.py", "config.py", "README.md", "requirements.txt", "LICENSE", "tests"}
# Put together here, so that this file is not where they are found.
FORBIDDEN = ("p" + "kill", "kill" + "all", "Auto" + "AddPolicy", "StrictHost" + "KeyChecking=no")


def sections_on_the_map(text: str) -> list[tuple[int, str]]:
    """The sections that the module's docstring lists."""
    docstring = ast.get_docstring(ast.parse(text)) or ""
    return [(int(number), name) for number, name in re.findall(r"^ +(\d+) ([A-Z]\w+)  +\S", docstring, re.MULTILINE)]


def banners(text: str) -> list[tuple[int, str]]:
    """The sections whose banners stand in the file, all of one width."""
    lines = [line for line in text.splitlines() if line.startswith("# ----")]
    found = [re.fullmatch(r"# ---- (\d+)\. (\w+) -+", line) for line in lines]
    assert all(found), "a banner is not like the others"
    assert len({len(line) for line in lines}) == 1, "a banner is wider than the others"
    return [(int(match[1]), match[2]) for match in found if match]


def test_the_map_of_sections_is_that_of_the_banners() -> None:
    assert sections_on_the_map(TEXT) == banners(TEXT)
    assert [number for number, _ in banners(TEXT)] == list(range(1, len(banners(TEXT)) + 1))
    assert [name for _, name in banners(TEXT)][::len(banners(TEXT)) - 1] == ["Errors", "Main"]


@pytest.mark.parametrize(("there", "instead"), [("# ---- 8. Host -----", "# ---- 8. Guest ----"), ("     8 Host ", "     8 Hosts ")])
def test_control_a_section_that_is_not_as_the_map_says_is_noticed(there: str, instead: str) -> None:
    assert there in TEXT
    changed = TEXT.replace(there, instead, 1)
    assert sections_on_the_map(changed) != banners(changed)


@pytest.mark.parametrize("banner", ["# ---- 8. Host --", "# ---- 8: Host -----"])
def test_control_a_banner_that_is_not_like_the_others_is_noticed(banner: str) -> None:
    with pytest.raises(AssertionError, match="a banner is"):
        banners(re.sub(r"# ---- 8\. Host -----", banner, TEXT, count=1))


def scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    """Every function and class, however deep."""
    for child in table.get_children():
        yield child
        yield from scopes(child)


def uses_of_later_sections(text: str) -> list[str]:
    """Names that a section uses although they are defined in a section below it."""
    starts = [number for number, line in enumerate(text.splitlines(), 1) if line.startswith("# ----")]

    def section(line: int) -> int:
        return sum(line >= start for start in starts)

    places = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            places[node.name] = section(node.lineno)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            places[node.target.id] = section(node.lineno)
    table = symtable.symtable(text, "migrena.py", "exec")
    return [f"{scope.get_name()} (line {scope.get_lineno()}) uses {symbol.get_name()}" for scope in scopes(table)
            for symbol in scope.get_symbols()
            if symbol.is_global() and symbol.is_referenced() and places.get(symbol.get_name(), 0) > section(scope.get_lineno())]


def test_a_section_uses_only_sections_above_it() -> None:
    assert uses_of_later_sections(TEXT) == []


def test_control_a_section_that_uses_one_below_it_is_noticed() -> None:
    changed = TEXT.replace('    line = " ".join(text.split())\n', '    line = str(certificates("x"))\n', 1)
    assert [line.partition(" (")[0] for line in uses_of_later_sections(changed)] == ["shorten"]


def too_long(text: str) -> list[str]:
    """Functions and classes that no screen holds."""
    sizes = [(node.name, (node.end_lineno or 0) - node.lineno + 1, CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES)
             for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    return [f"{name} has {size} lines, {most} is the limit" for name, size, most in sizes if size > most]


def python_files() -> list[Path]:
    """Every Python file of the project."""
    return [REPOSITORY / name for name in files() if name.endswith(".py")]


def files() -> list[str]:
    """Every file of the project: those that git has or would take, or all where there is no git."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=REPOSITORY, check=False, capture_output=True, text=True)
    if listed.returncode == 0:
        return [name for name in listed.stdout.splitlines() if (REPOSITORY / name).is_file()]
    paths = (path.relative_to(REPOSITORY) for path in REPOSITORY.rglob("*") if path.is_file())
    return [str(path) for path in paths if not {".git", ".venv", "__pycache__"} & set(path.parts)]


def test_every_function_fits_on_a_screen_and_every_class_on_a_few() -> None:
    assert {path.name: long for path in {*python_files(), SCRIPT} if (long := too_long(path.read_text(encoding="utf-8")))} == {}


def test_control_a_function_or_class_that_is_too_long_is_noticed() -> None:
    assert too_long("def f():\n" + "    pass\n" * FUNCTION_LINES) == ["f has 46 lines, 45 is the limit"]
    assert too_long("class C:\n" + "    pass\n" * CLASS_LINES) == ["C has 251 lines, 250 is the limit"]
    assert too_long("def f():\n" + "    pass\n" * (FUNCTION_LINES - 1)) == []


def test_the_file_is_one_that_can_be_read() -> None:
    assert len(TEXT.encode()) <= FILE_BYTES  # not lines, which could be joined


def too_wide(text: str) -> list[str]:
    """Lines that are wider than a terminal of the usual width; ruff has one limit for all files, that of the tests."""
    return [f"line {number} has {len(line)} columns, {COLUMNS} is the limit" for number, line in enumerate(text.splitlines(), 1)
            if len(line) > COLUMNS]


def test_no_line_of_the_file_is_too_wide() -> None:
    assert too_wide(TEXT) == []


def test_control_a_line_that_is_too_wide_is_noticed() -> None:
    assert too_wide("\n" + "é" * (COLUMNS + 1)) == ["line 2 has 121 columns, 120 is the limit"]
    assert too_wide("é" * COLUMNS) == []


def with_forbidden_words(texts: dict[str, str]) -> list[str]:
    """Where a word stands that no part of this project may use."""
    return [f"{name}: {word}" for name, text in texts.items() for word in FORBIDDEN if re.search(rf"\b{re.escape(word)}\b", text)]


def test_nothing_ends_processes_by_name_or_trusts_every_host() -> None:
    code = {name: (REPOSITORY / name).read_text(encoding="utf-8", errors="replace") for name in files() if not name.endswith(".md")}
    assert "tests/run" in code
    assert with_forbidden_words({**code, "migrena.py": TEXT}) == []


def test_control_every_forbidden_word_is_noticed() -> None:
    assert len(with_forbidden_words({"x": "\n".join(f"run({word})" for word in FORBIDDEN)})) == len(FORBIDDEN)
    assert with_forbidden_words({"x": "skillallowed, StrictHostKeyChecking=yes"}) == []


def strays(names: list[str]) -> set[str]:
    """What lies at the top and has no business there; hidden files are free."""
    return {name.partition("/")[0] for name in names} - AT_THE_TOP - {name for name in names if name.startswith(".")} - {".ci", ".git"}


def test_nothing_else_lies_at_the_top() -> None:
    assert strays(files()) == set()


def test_what_belongs_at_the_top_lies_there() -> None:
    assert {name for name in AT_THE_TOP if not (REPOSITORY / name).exists()} == set()


def test_control_a_stray_file_is_noticed() -> None:
    assert strays(["migrena.py", "tests/run", ".gitignore", ".ci/run", "notes.txt", "src/x.py"]) == {"notes.txt", "src"}


def test_the_commands_can_be_run() -> None:
    assert all((REPOSITORY / name).stat().st_mode & 0o111 == 0o111 for name in ("migrena.py", "tests/run", ".ci/run"))


def test_ci_calls_the_one_test_command() -> None:
    assert re.search(r"tests/run\b", (REPOSITORY / ".ci/run").read_text())

def hidden_functions(text: str) -> list[str]:
    """Local names that hide a function or a class of the file."""
    known = {node.name for node in ast.parse(text).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return [f"{scope.get_name()} (line {scope.get_lineno()}) hides {symbol.get_name()}"
            for scope in scopes(symtable.symtable(text, "migrena.py", "exec")) if scope.get_type() == "function"
            for symbol in scope.get_symbols() if symbol.is_local() and symbol.get_name() in known]


def test_no_local_name_hides_a_function() -> None:
    assert hidden_functions(TEXT) == []


def test_control_a_local_name_that_hides_a_function_is_noticed() -> None:
    changed = TEXT.replace('    line = " ".join(text.split())\n', '    human = line = " ".join(text.split())\n', 1)
    assert [line.partition(" (")[0] for line in hidden_functions(changed)] == ["shorten"]


def test_what_the_short_command_leaves_out_is_there() -> None:
    for file, _, test in (line.partition("::") for line in sorted(LONG)):
        assert f"def {test.partition('[')[0]}(" in (REPOSITORY / "tests" / file).read_text(encoding="utf-8"), test
