"""The tidy test: the tree keeps the rules that no linter knows."""

import ast
import collections
import re
import subprocess
from pathlib import Path

import pytest

from tools.error_table import PACKAGES, error_rows, render
from tools.main import VERBS

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("rafs", "backend", "builder", "fuse", "tools")
LINES_MAX = 400
FUNCTION_LINES_MAX = 60
BANNED_FILE_NAMES = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py"}
# Exit codes by package; 2 is wrong usage, 1 a fault of ours.
EXIT_CODES = {
    "rafs": {*range(10, 30)},
    "backend": {*range(30, 50), *range(110, 130), *range(150, 200)},
    "builder": {*range(50, 70)},
    "fuse": {*range(70, 90), *range(200, 220)},
    "tools": {*range(90, 110), *range(220, 240)},
}


def product_files() -> list[Path]:
    return sorted(path for package in PRODUCT for path in (ROOT / package).rglob("*.py"))


def all_files() -> list[Path]:
    tests = (ROOT / "tests").rglob("*.py")
    return product_files() + sorted(tests)


def text_files() -> list[Path]:
    """What git has or would take, whatever lies about in the working copy."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git clone")
    paths = [ROOT / name for name in done.stdout.decode().split("\0") if name]
    return [path for path in paths if path.suffix in {".py", ".md", ".toml", ".yml", ""} and path.is_file()]


def test_files_are_about_one_idea() -> None:
    long = {
        str(path.relative_to(ROOT)): lines for path in product_files() if (lines := _lines(path)) > LINES_MAX
    }
    assert not long, f"longer than {LINES_MAX} lines: {long}"


def test_functions_do_one_thing() -> None:
    long = []
    for path in product_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES_MAX:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines")
    assert not long, "\n".join(long)


def test_files_are_named_after_their_idea() -> None:
    assert [str(path) for path in all_files() if path.name in BANNED_FILE_NAMES] == []


def test_every_module_and_public_name_has_a_docstring() -> None:
    bare = []
    for path in product_files():
        tree = ast.parse(path.read_text())
        if ast.get_docstring(tree) is None:
            bare.append(str(path.relative_to(ROOT)))
        bare += [
            f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and ast.get_docstring(node) is None
        ]
    assert not bare, "no docstring: " + ", ".join(bare)


def test_no_module_is_imported_relatively_to_the_tests() -> None:
    offenders = [
        str(path.relative_to(ROOT))
        for path in product_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "tests"
    ]
    assert offenders == []


def test_trio_run_is_called_in_tools_alone() -> None:
    offenders = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in PRODUCT[:-1]
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"trio.run", "asyncio.run"}
    ]
    assert offenders == []


def test_no_path_of_one_machine_in_the_tree() -> None:
    # Put together here so that this file does not find itself.
    forbidden = ["/" + "work/", "/" + "root/", "files.python" + "hosted.org", "pypi" + ".org"]
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in text_files()
        for word in forbidden
        if word in path.read_text(errors="replace")
    ]
    assert found == []


def test_no_lock_file() -> None:
    assert [name for name in ("uv.lock", "poetry.lock", "Pipfile.lock") if (ROOT / name).exists()] == []


def test_the_readme_is_short_and_knows_every_verb() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 120
    assert [verb for verb in VERBS if f"| `{verb} " not in readme and f"| `{verb}`" not in readme] == []
    assert [line for line in ("make demo", "make test") if f"\n{line} " not in readme] == []


def test_every_target_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text())) - {"a"}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named <= targets


def test_packages_of_the_error_table_are_those_of_the_product() -> None:
    assert set(PACKAGES) == set(PRODUCT)


def test_each_error_has_an_exit_code_of_its_own_in_the_range_of_its_package() -> None:
    rows = error_rows()
    names = collections.defaultdict(list)
    for row in rows:
        names[row.exit_code].append(f"{row.module}.{row.name}")
    assert {code: owners for code, owners in names.items() if len(owners) > 1} == {}
    misplaced = [row for row in rows if row.exit_code not in {2, *EXIT_CODES[row.module.partition(".")[0]]}]
    assert misplaced == []


def test_the_table_of_exit_codes_is_up_to_date() -> None:
    assert (ROOT / "docs" / "errors.md").read_text() == render(), "run `make docs`"


def _lines(path: Path) -> int:
    return path.read_text().count("\n")
