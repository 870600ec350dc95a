"""The house rules, held by the machine: imports, lengths, docstrings, and what no file says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "eevp_batch").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SCRIPTS = sorted([*(ROOT / "jobs").glob("*.py"), *(ROOT / "infra").glob("*.py")])
TEXT_SUFFIXES = {".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml", ""}
TEXT_FOLDERS = ("eevp_batch", "tests", "jobs", "infra", ".ci")

MAX_FUNCTION_LINES = 50  # without the docstring
MAX_FILE_LINES = {"eevp_batch": 350, "jobs": 350, "infra": 350, "tests": 450}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def where(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def text_files() -> list[Path]:
    found = [ROOT / "README.md", ROOT / "pyproject.toml"]
    for folder in TEXT_FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    return [path for path in found if path.suffix in TEXT_SUFFIXES]


def test_imports_go_one_way() -> None:
    # In a process of its own: it sets up logging, and thereby silences every logger that is there.
    code = "import sys; from importlinter import cli; sys.exit(cli.lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (
        f"a contract of pyproject.toml is broken\n{done.stdout}{done.stderr}"
    )


def test_help_needs_only_click() -> None:
    code = "import sys, eevp_batch.cli; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    heavy = {"numpy", "pyarrow", "pydantic", "ray", "rich", "torch", "transformers", "yaml"}
    assert "click" in loaded
    assert not heavy & set(loaded), "the command line imports heavy modules before a command runs"


WITHOUT_RAY = """
import sys
sys.modules["ray"] = None  # as where it is not installed: every import of it fails
import tests.bench.gpu
from eevp_batch.engine.load import load
from eevp_batch.spec import ExitSpec, SamplingSpec, VocabSpec
exits = ExitSpec(layers=[2], vocab=VocabSpec(top_k=32))
engine = load(sys.argv[1], exits, SamplingSpec(max_new_tokens=4), dtype="float32")
print(next(engine.generate(["Without Ray"])).generated_tokens)
"""


def test_the_engine_runs_where_ray_is_not_installed(tiny_llama: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_RAY, str(tiny_llama)]
    found = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert 1 <= int(found.stdout) <= 4


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS, *TESTS], ids=where)
def test_functions_and_files_stay_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    allowed = MAX_FILE_LINES[path.relative_to(ROOT).parts[0]]
    assert len(source.splitlines()) <= allowed, f"{where(path)} is longer than {allowed} lines"
    for function in functions(ast.parse(source)):
        first = function.body[0]
        is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        lines = function.end_lineno - function.lineno + 1
        lines -= first.end_lineno - first.lineno + 1 if is_docstring else 0
        assert lines < MAX_FUNCTION_LINES, (
            f"{where(path)}: {function.name} has {lines} lines; it does more than one thing"
        )


def public_without_docstring(node: ast.Module | ast.ClassDef) -> Iterator[str]:
    """Names of public classes, functions and methods in `node` that say nothing about themselves.

    A property is a noun that its class may describe; an override is described where it overrides.
    """
    for child in node.body:
        if not isinstance(child, (ast.ClassDef, *Function.__args__)) or child.name.startswith("_"):
            continue
        decorators = {ast.unparse(decorator).split(".")[-1] for decorator in child.decorator_list}
        if not ast.get_docstring(child) and not decorators & {"property", "override", "overload"}:
            yield child.name
        if isinstance(child, ast.ClassDef):
            yield from (f"{child.name}.{name}" for name in public_without_docstring(child))


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS], ids=where)
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{where(path)} does not say what it is"
    missing = list(public_without_docstring(tree))
    assert not missing, f"{where(path)}: no docstring: {', '.join(missing)}"


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS], ids=where)
def test_the_code_validates_without_assert_and_leaves_no_stub(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    asserts = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert not asserts, f"{where(path)}: assert vanishes under -O; lines {asserts}"
    stubs = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id == "NotImplementedError"
    ]
    assert not stubs, f"{where(path)}: something is left to be written; lines {stubs}"


NOTE = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
PLACE = re.compile(r"""(?<![\w.}"'-])/(home|opt|root|Users|work)/""")


def test_no_file_holds_a_note_to_self_or_a_path_of_one_machine() -> None:
    for path in text_files():
        if path == Path(__file__):
            continue  # it names what is forbidden
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found = NOTE.search(line) or PLACE.search(line)
            assert not found, f"{where(path)}:{number} says {found[0]!r}"


def test_documents_that_are_named_exist() -> None:
    for path in text_files():
        for name in re.findall(r"[\w./-]+\.md\b", path.read_text(encoding="utf-8")):
            is_url = name.startswith("//")
            assert is_url or (ROOT / name).exists() or (path.parent / name).exists(), (
                f"{where(path)} names {name}, which is not here"
            )
