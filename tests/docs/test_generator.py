"""The generator of the documents: what it writes, and that a stale page fails the check."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest

import safeside

CODE = '''
class Shape:
    """A shape."""

    width: int
    """In pixels."""
    _hidden: int
    names: list[str] = field(default_factory=list)
    """Of its corners."""
    size: float = Field(0.5, gt=0)
    """Of its sides."""

    @property
    def area(self) -> float:
        """In square pixels."""

    def scale(self, factor: float, *, around: tuple[int, int] = (0, 0), **options: object) -> None:
        """Make it larger."""
'''


@pytest.fixture
def source() -> ModuleType:
    return importlib.import_module("docgen.source")


@pytest.fixture
def shape() -> ast.ClassDef:
    node = ast.parse(CODE).body[0]
    assert isinstance(node, ast.ClassDef)
    return node


@pytest.fixture
def small_site(docs_script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script on a repository of three pages, one of them wholly generated."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("a\n\n<!-- generated:fact -->\nold\n<!-- /generated:fact -->\n\nb\n")
    (tmp_path / "CONTRIBUTING.md").write_text("nothing generated\n")
    monkeypatch.setattr(docs_script, "ROOT", tmp_path)
    monkeypatch.setattr(docs_script, "PAGES", {"docs/whole.md": lambda: "whole\n"})
    monkeypatch.setattr(docs_script, "PARTS", {"fact": lambda: "new"})
    return docs_script


def test_check_fails_on_stale_pages_and_passes_after_write(
    small_site: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert small_site.main(["--check"]) == 1
    assert set(capsys.readouterr().out.split()) >= {"README.md", "docs/whole.md", "stale:"}
    assert small_site.main(["--write"]) == 0
    assert (tmp_path / "docs" / "whole.md").read_text() == "whole\n"
    assert "\nnew\n" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "README.md").read_text().startswith("a\n")
    assert small_site.main(["--check"]) == 0
    (tmp_path / "docs" / "whole.md").write_text("edited by hand\n")
    assert small_site.main(["--check"]) == 1


def test_public_names_are_those_of_the_package(source: ModuleType) -> None:
    assert list(source.exported()) == sorted(safeside.__all__)


def test_attributes_take_their_docstrings_and_defaults(source: ModuleType, shape: ast.ClassDef) -> None:
    found = [(item.name, item.type, item.default, item.doc) for item in source.attributes(shape)]
    assert found == [
        ("width", "int", "", "In pixels."),
        ("names", "list[str]", "list()", "Of its corners."),
        ("size", "float", "0.5", "Of its sides."),
    ]


def test_methods_and_properties_are_told_apart(source: ModuleType, shape: ast.ClassDef) -> None:
    (area,), (scale,) = source.properties(shape), source.methods(shape)
    assert (area.name, area.type, area.doc) == ("area", "float", "In square pixels.")
    assert scale.signature == ("scale(factor: float, *, around: tuple[int, int] = (0, 0), **options: object) -> None")


def test_a_long_signature_takes_a_line_for_each_parameter(source: ModuleType) -> None:
    node = ast.parse(f"def f(first: {'a' * 60}, second: {'b' * 60}): pass").body[0]
    assert source.signature(node).splitlines()[1:] == [f"    first: {'a' * 60},", f"    second: {'b' * 60},", ")"]


def test_a_name_without_docstring_stops_the_generator(source: ModuleType) -> None:
    with pytest.raises(LookupError, match=r"C\.x has no docstring under it"):
        source.attributes(ast.parse("class C:\n    x: int").body[0])
    with pytest.raises(LookupError, match=r"C\.f has no docstring"):
        source.methods(ast.parse("class C:\n    def f(self): ...").body[0])


def test_docstrings_become_markdown() -> None:
    markdown = importlib.import_module("docgen.markdown")
    assert markdown.prose("``a_b`` and a_b,\n  wrapped.\n\nNext <tag>.") == "`a_b` and a\\_b, wrapped.\n\nNext \\<tag>."
    assert markdown.table(["a"], [["x | y"]]) == "| a |\n| --- |\n| x \\| y |"


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("kind", "text"),
        ("role", '`"guard"` or `"align"`'),
        ("layers", "list of whole numbers"),
        ("size", "number, above 0"),
        ("head_dim", "`32` or `64` or `128`"),
    ],
)
def test_types_in_plain_words(field: str, text: str) -> None:
    models = importlib.import_module("docgen.models")
    info = models.Recipe.model_fields["adapter"].annotation.model_fields[field]
    assert models.type_text(info.annotation, info.metadata) == text
