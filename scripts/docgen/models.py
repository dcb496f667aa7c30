"""docs/reference/{recipe,adapter-config,gene,policy}.md: fields of files that people write, and adapters carry."""

from __future__ import annotations

import ast
import re
import types
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from docgen.facts import built_in_base
from docgen.markdown import code, fence, page, prose, table
from docgen.source import ROOT, attributes, find, module_doc, require_doc
from safeside import make_config
from safeside.adapters.config import (
    AdapterConfig,
    BaseReference,
    Calibration,
    ModeCalibration,
    ProbabilityMap,
    Promise,
)
from safeside.base.fingerprint import Fingerprint
from safeside.genes.gene import AttachmentPoint, GeneConfig, GeneFamily
from safeside.genes.recipe import GeneRecipe
from safeside.serve.policy import PolicyFile
from safeside.serve.rules import FlagRule, Policy, SteerRule
from safeside.train.recipe import Recipe

EXAMPLE = "recipes/builtin/harm.toml"
GENE_EXAMPLE = "recipes/genes/gene.toml"
POLICY_EXAMPLE = "policies/standard.yaml"
_PARTS: dict[str, type[BaseModel]] = {
    "base": BaseReference,
    "base.fingerprint": Fingerprint,
    "calibration": Calibration,
    "modes": ModeCalibration,
    "modes.*.promise": Promise,
    "modes.*.maps": ProbabilityMap,
}
_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "value"}
_FLAT_LIST = re.compile(r"\[\s+([^\[\]{}]*?)\s+\]")


def recipe_page() -> str:
    """Every field of a recipe, by section, with an example and the shapes of rows."""
    models = {name: _model_of(info.annotation) for name, info in Recipe.model_fields.items()}
    sections = {name: model for name, model in models.items() if model is not None}
    parts = [
        "A recipe is a TOML file, and a run: `safeside train recipe.toml`. It is checked before anything is computed; "
        "a field that is not listed here is an error.",
        f"This one makes `builtin:harm` (`{EXAMPLE}`):",
        fence((ROOT / EXAMPLE).read_text(encoding="utf-8"), "toml"),
        "## Top level",
        _fields(Recipe, leave_out=set(sections)),
    ]
    for name, model in sections.items():
        parts += [f"## `[{name}]`", prose(_doc(model)), _fields(model)]
    return page("Recipe", *parts, "## Rows", prose(module_doc("safeside.tasks.rows")))


def adapter_config_page() -> str:
    """Every field of safeside_config.json, with one made for the built-in base."""
    example = make_config(built_in_base(), kind="lst", role="guard", name="example", reduction=4)
    parts = [
        "Every adapter folder holds `safeside_config.json`. `save_adapter` writes it and `load_adapter` reads it; a "
        "field that is not listed here is an error. In Python it is `AdapterConfig`, made by `make_config` or "
        "`sized_config`.",
        "A guard that was not trained yet, for the built-in base:",
        fence(_FLAT_LIST.sub(_on_one_line, example.model_dump_json(indent=2)), "json"),
        "## Top level",
        prose(_doc(AdapterConfig)),
        _fields(AdapterConfig),
    ]
    for name, model in _PARTS.items():
        parts += [f"## `{name}`", prose(_doc(model)), _fields(model)]
    return page("Adapter configuration", *parts)


def gene_page() -> str:
    """Every field of gene.json and of a gene's recipe."""
    parts = [
        "Every gene's folder holds `gene.json` beside PEFT's two files. `save_gene` writes it, `load_gene` reads it.",
        "## `gene.json`",
        prose(_doc(GeneConfig)),
        _fields(GeneConfig),
    ]
    for name, model in {"modules[]": AttachmentPoint, "family": GeneFamily}.items():
        parts += [f"## `{name}`", prose(_doc(model)), _fields(model)]
    parts += [
        "## Recipe",
        "A TOML file, for `safeside gene extract`; it stays in `gene.json`. This one makes the benchmark's gene "
        f"(`{GENE_EXAMPLE}`):",
        fence((ROOT / GENE_EXAMPLE).read_text(encoding="utf-8"), "toml"),
    ]
    sections = {name: _model_of(info.annotation) for name, info in GeneRecipe.model_fields.items()}
    named = {name: model for name, model in sections.items() if model is not None}
    parts.append(_fields(GeneRecipe, leave_out=set(named)))
    for name, model in named.items():
        parts += [f"### `[{name}]`", prose(_doc(model)), _fields(model)]
    return page("Gene", *parts)


def policy_page() -> str:
    """Every field of a file of policies, with an example."""
    models = {"A policy": Policy, "A rule that flags": FlagRule, "A rule that steers": SteerRule}
    parts = [
        "`safeside serve --policy FILE` reads a YAML file; `safeside policy check FILE` says what is wrong with it. "
        "What the parts do together: [policies](../concepts/policies.md).",
        f"This one uses the built-in adapters (`{POLICY_EXAMPLE}`):",
        fence((ROOT / POLICY_EXAMPLE).read_text(encoding="utf-8"), "yaml"),
        "## The file",
        "A file that is included holds `policies` alone.",
        _fields(PolicyFile),
    ]
    for title, model in models.items():
        parts += [f"## {title}", prose(_doc(model)), _fields(model)]
    return page("Policy file", *parts)


def _on_one_line(match: re.Match[str]) -> str:
    return f"[{' '.join(match[1].split())}]"


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, or holds unless it is left out."""
    return next((part for part in (annotation, *get_args(annotation)) if _is_model(part)), None)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _doc(model: Any) -> str:
    return require_doc(find(model.__module__, model.__name__), model.__name__)


def _fields(model: type[BaseModel], leave_out: AbstractSet[str] = frozenset()) -> str:
    """One row for each field: name, type with bounds, default and meaning."""
    docs = _docs_of(model)
    rows = [
        [code(name), type_text(info.annotation, info.metadata), _default(info), prose(docs[name])]
        for name, info in model.model_fields.items()
        if name not in leave_out
    ]
    return table(["field", "type", "default", "meaning"], rows)


def _docs_of(model: type[BaseModel]) -> dict[str, str]:
    """What is said of each field, where the model or one that it builds on declares it."""
    docs: dict[str, str] = {}
    for part in reversed([kind for kind in model.__mro__ if _is_model(kind) and kind is not BaseModel]):
        node = find(part.__module__, part.__name__)
        assert isinstance(node, ast.ClassDef)
        docs |= {item.name: item.doc for item in attributes(node)}
    return docs


def _default(info: FieldInfo) -> str:
    """``required``, nothing for None, else the value as TOML or JSON would write it."""
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if value is None:
        return ""
    if isinstance(value, bool):
        return code(str(value).lower())
    if isinstance(value, tuple):
        return code(str(list(value)))
    if value == {}:
        return ""
    return code(f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value))


def type_text(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in plain words, with its bounds."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        text = type_text(arguments[0], arguments[1:])
    elif origin in (Union, types.UnionType):
        text = " or ".join(dict.fromkeys(type_text(part) for part in arguments if part is not type(None)))
    elif origin is Literal:
        text = " or ".join(code(f'"{value}"' if isinstance(value, str) else str(value)) for value in arguments)
    elif origin is tuple:
        text = f"list of {_several(arguments[0])}"
    elif origin is dict:
        text = f"table of {_several(arguments[1])}"
    elif _is_model(annotation):
        text = "object"
    else:
        text = _NAMES[annotation]
    return ", ".join([text, *_bounds(metadata)])


def _several(annotation: Any) -> str:
    """Several of a type, and the bounds of each."""
    kind, *bounds = type_text(annotation).split(", ")
    plural = kind.replace("list of", "lists of", 1) if kind.startswith("list of") else f"{kind}s"
    return ", ".join([plural, *(f"each {bound}" for bound in bounds)])


def _bounds(metadata: Sequence[Any]) -> Iterator[str]:
    """Bounds in words, from what pydantic keeps of ``Field(ge=..., ...)``."""
    for part in metadata:
        match part:
            case Ge(ge=bound):
                yield f"at least {bound}"
            case Gt(gt=bound):
                yield f"above {bound}"
            case Le(le=bound):
                yield f"at most {bound}"
            case Lt(lt=bound):
                yield f"below {bound}"
            case MinLen(min_length=bound):
                yield "not empty" if bound == 1 else f"length at least {bound}"
            case FieldInfo(metadata=nested):
                yield from _bounds(nested)
