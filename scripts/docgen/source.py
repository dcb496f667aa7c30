"""What the source says of its own names, read without running it: signatures, docstrings, attributes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Attribute:
    """One attribute of a class: an annotated name or a property, and its docstring."""

    name: str
    type: str
    default: str
    doc: str


@dataclass(frozen=True, slots=True)
class Method:
    """One function or method: its call as written, and its docstring."""

    name: str
    signature: str
    doc: str


def path_of(module: str) -> Path:
    """The file of a module of the package."""
    path = SOURCE / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def tree_of(module: str) -> ast.Module:
    """The syntax tree of a module of the package."""
    return ast.parse(path_of(module).read_text(encoding="utf-8"))


def classes(module: str) -> list[ast.ClassDef]:
    """The classes of a module, in order."""
    return [node for node in tree_of(module).body if isinstance(node, ast.ClassDef)]


def find(module: str, name: str) -> ast.ClassDef | Function:
    """The class or function ``name`` of ``module``."""
    for node in tree_of(module).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            return node
    raise LookupError(f"{module} has no class or function {name}; correct the list in scripts/docgen.")


def module_doc(module: str) -> str:
    """The docstring of a module."""
    return require_doc(tree_of(module), module)


def require_doc(node: ast.Module | ast.ClassDef | Function, where: str) -> str:
    """The docstring of ``node``; a public name without one stops the generator."""
    doc = ast.get_docstring(node)
    if not doc:
        raise LookupError(f"{where} has no docstring. Write one: it is what the reference prints.")
    return doc


def exported() -> dict[str, str]:
    """Each public name of the package and the module that defines it, sorted by name."""
    found: dict[str, str] = {}
    names: list[str] = []
    for node in ast.walk(tree_of("safeside")):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.update({alias.asname or alias.name: node.module for alias in node.names})
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
    return {name: found[name] for name in sorted(names)}


def attributes(node: ast.ClassDef) -> list[Attribute]:
    """Annotated public names in the body of a class, in order, each with the string that follows it."""
    result = []
    for index, item in enumerate(node.body):
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        if item.target.id.startswith("_"):
            continue
        where = f"{node.name}.{item.target.id}"
        doc = _string_after(node.body, index)
        if doc is None:
            raise LookupError(f"{where} has no docstring under it. Write one: it is what the reference prints.")
        result.append(Attribute(item.target.id, ast.unparse(item.annotation), _default(item.value), doc))
    return result


def _string_after(body: list[ast.stmt], index: int) -> str | None:
    following = body[index + 1] if index + 1 < len(body) else None
    if not isinstance(following, ast.Expr) or not isinstance(following.value, ast.Constant):
        return None
    return " ".join(str(following.value.value).split())


def _default(value: ast.expr | None) -> str:
    """The default as written; a ``field(default...)`` says what it makes, pydantic's ``Field(x, ...)`` its x."""
    if not isinstance(value, ast.Call):
        return "" if value is None else ast.unparse(value)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in value.keywords}
    if ast.unparse(value.func) == "Field":
        return ast.unparse(value.args[0]) if value.args else ""
    if ast.unparse(value.func) == "field":
        return keywords.get("default", f"{keywords.get('default_factory', '')}()")
    return ast.unparse(value)


def properties(node: ast.ClassDef) -> list[Attribute]:
    """Public properties of a class, in order."""
    return [
        Attribute(item.name, ast.unparse(item.returns), "", require_doc(item, f"{node.name}.{item.name}"))
        for item in _public(node)
        if _is_property(item) and item.returns is not None
    ]


def methods(node: ast.ClassDef) -> list[Method]:
    """Public methods of a class, in order."""
    return [
        Method(f"{node.name}.{item.name}", signature(item), require_doc(item, f"{node.name}.{item.name}"))
        for item in _public(node)
        if not _is_property(item)
    ]


def _public(node: ast.ClassDef) -> Iterator[Function]:
    for item in node.body:
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and not item.name.startswith("_"):
            yield item


def _is_property(node: Function) -> bool:
    return any(ast.unparse(mark).split(".")[-1] in ("property", "cached_property") for mark in node.decorator_list)


def signature(node: Function) -> str:
    """The call of a function with types and defaults; on several lines when one would be too long.

    Types and defaults stand as in the source, so that no memory address or alias of a library gets in.
    """
    arguments = _parameters(node.args)
    mark = "@contextmanager\n" if any(ast.unparse(it).endswith("contextmanager") for it in node.decorator_list) else ""
    returns = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    line = f"{node.name}({', '.join(arguments)}){returns}"
    if len(line) <= 100:
        return mark + line
    return mark + "\n".join([f"{node.name}(", *(f"    {argument}," for argument in arguments), f"){returns}"])


def _parameters(found: ast.arguments) -> list[str]:
    """Parameters as written, without ``self`` and ``cls``."""
    positional = [*found.posonlyargs, *found.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(found.defaults)) + list(found.defaults)
    result = [
        _parameter(*pair) for pair in zip(positional, defaults, strict=True) if pair[0].arg not in ("self", "cls")
    ]
    if found.vararg is not None:
        result.append("*" + _parameter(found.vararg, None))
    elif found.kwonlyargs:
        result.append("*")
    result += [_parameter(*pair) for pair in zip(found.kwonlyargs, found.kw_defaults, strict=True)]
    return result + (["**" + _parameter(found.kwarg, None)] if found.kwarg is not None else [])


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    typed = argument.arg if argument.annotation is None else f"{argument.arg}: {ast.unparse(argument.annotation)}"
    return typed if default is None else f"{typed} = {ast.unparse(default)}"
