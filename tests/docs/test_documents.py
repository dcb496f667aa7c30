"""The documents are true: every block runs, every link leads somewhere, everything generated is fresh."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from docs.pages import DOCS, PAGES, ROOT, anchors, blocks, links, name_of
from safeside.adapters.adapter import TRUNKS
from safeside.base.families import FAMILIES
from safeside.cli import app
from safeside.evals.judges import JUDGES
from safeside.evals.suites import SUITES

REGISTRIES = (TRUNKS, FAMILIES, SUITES, JUDGES)
WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]
MACHINE_PATH = re.compile(r"(?<![\w./:])/(home|root|tmp|work|mnt|Users)/\w")
LANGUAGES = {"text", "console", "toml", "json", "output", "python", "yaml"}


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, so that a page writes nothing into the repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def clean_registries() -> Iterator[None]:
    """Whatever a page registers is forgotten after it."""
    before = [set(registry) for registry in REGISTRIES]
    yield
    for registry, names in zip(REGISTRIES, before, strict=True):
        for name in set(registry) - names:
            registry.unregister(name)


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_every_python_block_runs(page: Path, empty_folder: Path, clean_registries: None) -> None:
    """Blocks of a page share a namespace, in order; an ``output`` block holds what the one before it prints."""
    namespace: dict[str, object] = {"__name__": "page"}
    printed = ""
    for block in blocks(page):
        if block.language == "python":
            shifted = "\n" * (block.line - 1) + block.text  # so that a traceback tells the line of the page
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                exec(compile(shifted, str(page), "exec"), namespace)
            printed = stream.getvalue()
        elif block.language == "output":
            assert printed == block.text, f"{name_of(page)}, line {block.line}: the block before prints {printed!r}"


def test_the_pages_with_examples_are_found() -> None:
    found = {name_of(page) for page in WITH_PYTHON}
    assert {"README.md", "CONTRIBUTING.md", "docs/getting-started.md", "docs/concepts/guards.md"} <= found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_are_of_known_languages(page: Path) -> None:
    """A misspelt language would take a block out of the suite; a fence that does not end takes the rest of the page."""
    assert {block.language for block in blocks(page)} <= LANGUAGES
    assert page.read_text(encoding="utf-8").count("\n```") == 2 * len(blocks(page))


def test_what_is_generated_is_fresh() -> None:
    command = [sys.executable, "-W", "error", "scripts/docs.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link}: there is no such heading"


def test_every_page_is_reached_from_the_index() -> None:
    seen, waiting = set(), [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        if page in seen:
            continue
        seen.add(page)
        if page.suffix == ".md":
            waiting += [(page.parent / link.split("#")[0]).resolve() for link in links(page) if link[0] != "#"]
    assert {path for path in DOCS.rglob("*") if path.is_file()} <= seen


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_path_of_a_machine(page: Path) -> None:
    assert not MACHINE_PATH.search(page.read_text(encoding="utf-8"))


def console_commands() -> list[str]:
    """The safeside commands in all console blocks, without prompt, comment and whatever is piped into them."""
    lines = [
        line
        for page in PAGES
        for block in blocks(page)
        if block.language == "console"
        for line in block.text.splitlines()
    ]
    found = [re.search(r"(?:^\$ |\| )(safeside .*)", line) for line in lines]
    return sorted({match[1] for match in found if match})


@pytest.mark.parametrize("line", console_commands())
def test_commands_in_console_blocks_exist(line: str) -> None:
    """Their options parse; they are not run."""
    arguments = shlex.split(line, comments=True)[1:]
    group = get_command(app)
    if arguments[0] == "--help":
        return
    command = group.commands[arguments[0]]
    if isinstance(command, TyperGroup) and arguments[1:] != ["--help"]:
        arguments = arguments[1:]
        command = command.commands[arguments[0]]
    if "--help" not in arguments:
        command.make_context(arguments[0], arguments[1:]).close()


def test_make_targets_in_console_blocks_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    wanted = {target for text in texts for target in re.findall(r"(?:\$ |`)make ([\w-]+)", text)}
    assert {"demo", "test", "check"} <= wanted
    assert {target for target in wanted if not re.search(rf"^{target}:", makefile, re.MULTILINE)} == set()


def test_examples_use_documented_names_only(docgen_api: object) -> None:
    documented = docgen_api.documented()
    for page in WITH_PYTHON:
        for block in blocks(page):
            if block.language != "python":
                continue
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "safeside":
                    for alias in node.names:
                        assert (node.module, alias.name) in documented, f"{name_of(page)} imports {alias.name}"
