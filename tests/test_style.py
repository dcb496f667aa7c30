"""The rules of CONTRIBUTING.md that a machine can check.  Each allow-list may only shrink."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "safeside"
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {str(path.relative_to(SOURCE)): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40
MAX_POSITIONAL = 5

# A module may import those of its own line and of the lines above, but beside itself no other of the sixth.
LAYERS = (
    ("types", "errors", "registry", "terminal"),
    ("base", "chat", "content"),
    ("adapters", "tasks"),
    ("mixing", "policies", "stopping", "waiting", "request", "verdicts", "gates", "traces", "checks", "attach"),
    ("artifact", "card", "provenance", "builtin", "lora", "staging"),
    ("guards", "moderation"),
    ("train", "evals", "genes", "serve", "scale", "vllm_plugin"),
    ("facts", "conversation", "demo"),
    ("cli_shared",),
    ("cli_genes", "cli_serve"),
    ("cli",),
)
SIBLINGS = LAYERS[6]
# Optional dependencies, and where they may be imported at all.
EXTRAS = {
    "sklearn": ("train", "evals", "guards"),
    "accelerate": ("train",),
    "matplotlib": ("evals",),
    "peft": ("genes", "lora"),
    "datasets": ("tasks", "evals"),
    "lm_eval": ("evals",),
    "trl": (),
    "vllm": ("vllm_plugin",),
    "ray": ("scale",),
    "fastapi": ("serve",),
    "uvicorn": ("serve",),
    "sqlalchemy": ("serve",),
    "prometheus_client": ("serve",),
    "yaml": ("serve", "evals"),
    "gradio": ("serve",),
}

MAY_PROBE = {"base/families.py"}  # hasattr, getattr: asking a foreign object what it can do
MAY_IMPORT_LATE = {"cli.py", "cli_genes.py", "cli_serve.py", "cli_shared.py", "__init__.py"}  # --help needs no torch
LONG_FUNCTIONS: set[str] = set()
MANY_ARGUMENTS = {"train/run.py:_sources"}


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of the package as ``file:name``."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}:{node.name}", node


def code_lines(path: Path, function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function that are neither blank, nor comment, nor its docstring."""
    lines = path.read_text(encoding="utf-8").splitlines()
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    skipped = range(docstring.lineno, (docstring.end_lineno or 0) + 1) if docstring else range(0)
    numbers = [number for number in range(function.lineno, (function.end_lineno or 0) + 1) if number not in skipped]
    return sum(bool(lines[number - 1].strip()) and not lines[number - 1].strip().startswith("#") for number in numbers)


def imports(tree: ast.AST) -> set[str]:
    """Full names of the modules that a file imports, however deep inside it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(node.module or "")
    return found


def part_of(module: str) -> str:
    """``safeside.base.taps`` and ``base/taps.py`` are both part ``base``."""
    return re.split(r"[./]", module.removeprefix("safeside.").removesuffix(".py"))[0]


def test_files_are_short() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def assert_only(found: set[str], allowed: set[str]) -> None:
    """``found`` is exactly ``allowed``: nothing new, and what was mended leaves the list."""
    assert found - allowed == set(), "new: change them"
    assert allowed - found == set(), "mended: take them off the allow-list"


def test_functions_are_short() -> None:
    lengths = {name: code_lines(SOURCE / name.partition(":")[0], node) for name, node in functions()}
    assert_only({name for name, length in lengths.items() if length > MAX_FUNCTION_LINES}, LONG_FUNCTIONS)


def test_arguments_are_few_or_named() -> None:
    """Commands are exempt: each argument of theirs is an option on the command line."""
    counts = {
        name: len({argument.arg for argument in (*node.args.posonlyargs, *node.args.args)} - {"self", "cls"})
        for name, node in functions()
        if not name.startswith(("cli.py", "cli_genes.py", "cli_serve.py"))
    }
    assert_only({name for name, count in counts.items() if count > MAX_POSITIONAL}, MANY_ARGUMENTS)


def test_foreign_objects_are_probed_in_one_place() -> None:
    found = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id in ("hasattr", "getattr", "setattr")
    }
    assert found <= MAY_PROBE


def test_imports_stand_at_the_top() -> None:
    found = set()
    for name, tree in TREES.items():
        top = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in top:
                found.add(name)
    assert found <= MAY_IMPORT_LATE


def test_layers_import_downwards() -> None:
    level = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    wrong = []
    for name, tree in TREES.items():
        part = part_of(name)
        if part == "__init__":
            continue
        assert part in level, f"{name} has no place in LAYERS"
        for module in imports(tree):
            if module.startswith("safeside"):
                other = part_of(module)
                sideways = {part, other} <= set(SIBLINGS) and part != other
                if sideways or level[other] > level[part]:
                    wrong.append(f"{name} imports {module}")
    assert wrong == []


def test_extras_are_imported_where_they_belong() -> None:
    wrong = [
        f"{name} imports {module}"
        for name, tree in TREES.items()
        for module in imports(tree)
        if part_of(name) not in EXTRAS.get(module.partition(".")[0], (part_of(name),))
    ]
    assert wrong == []


def test_public_functions_take_no_open_keywords() -> None:
    """Except where they are handed on to transformers' own ``generate``, or into a record that checks them."""
    open_ended = {name for name, node in functions() if node.args.kwarg is not None and not node.name.startswith("_")}
    assert open_ended <= {
        "base/model.py:chat",
        "base/model.py:chat_batch",
        "adapters/sizing.py:make_config",
        "adapters/sizing.py:sized_config",
        "provenance.py:provenance",
    }


def test_no_tracked_file_names_a_folder_of_this_machine() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    pattern = re.compile(rb"(?<![\w./])/(?:work|tmp|home|root)(?:/|\b)(?!-)")
    found = [
        name
        for name in names.split("\0")
        if name and (ROOT / name).is_file() and name != "tests/test_style.py"
        if b"\0" not in (content := (ROOT / name).read_bytes()) and pattern.search(content)
    ]
    assert found == []
