"""What ``safeside gene`` does: read files, call one function of the package, say how it went."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from safeside.artifact import require_new
from safeside.base.model import Base, load_base
from safeside.content import is_seen
from safeside.errors import ConfigError, InputError, problems_of
from safeside.genes.apply import ContextPolicy, apply_genes
from safeside.genes.artifact import load_gene, save_gene
from safeside.genes.checks import check_fits, check_model
from safeside.genes.extract import Pair, extract_gene
from safeside.genes.fit import fit_gene
from safeside.genes.gene import Gene, gene_facts
from safeside.genes.merge import merge_genes, unmerge_genes
from safeside.genes.merged import read_merged
from safeside.genes.optimise import Report
from safeside.genes.port import port_gene
from safeside.genes.recipe import ExtractSection, FitSection, GeneData, SelectSection, read_gene_recipe
from safeside.genes.rows import Row, read_rows
from safeside.genes.select import select_layers
from safeside.terminal import progress_bar
from safeside.types import Message

Summary = dict[str, object]


@dataclass(frozen=True, slots=True)
class Models:
    """Models that take the place of the recipe's."""

    aligned: str | None = None
    degraded: str | None = None


@dataclass(frozen=True, slots=True)
class Application:
    """How genes are applied: into a new folder, or live to answer a prompt; at weights in a list, or a policy's."""

    output: Path | None = None
    prompt: str | None = None
    weights: str | None = None
    policy: Path | None = None
    context: str | None = None
    max_new_tokens: int = 96


def extract_command(path: Path, data_root: Path, models: Models, output: Path) -> Summary:
    """Extract the gene that a recipe describes and save it."""
    recipe = read_gene_recipe(path)
    require_new(output)
    kinds = [[data_root / name for name in names] for names in (recipe.data.harmful, recipe.data.benign)]
    harmful, benign = _read_kinds(kinds, "harmful and for harmless rows")
    pair = Pair(load_base(models.aligned or recipe.aligned), load_base(models.degraded or recipe.degraded))
    with _steps(f"extract {recipe.name}") as report:
        gene = extract_gene(pair, harmful, benign, recipe, report)
    return summary_of(gene, save_gene(gene, output))


def select_command(
    folder: Path, model: str, rows: tuple[Path, Path], settings: Mapping[str, object], output: Path
) -> Summary:
    """Keep some layers of a gene, chosen on prompts of both kinds (harmful, harmless), and save it anew."""
    gene = load_gene(folder)
    require_new(output)
    harmful, benign = _read_kinds([[path] for path in rows], "harmful and for harmless rows")
    found = SelectSection.model_validate({**gene.config.recipe.select.model_dump(), **settings})
    if found.method == "all" and "keep" in settings:
        raise InputError(f"Method 'all' keeps every layer; got keep = {found.keep}. Leave one of the two out.")
    kept = select_layers(load_base(model), gene, harmful, benign, found)
    return summary_of(kept, save_gene(kept, output))


def fit_command(
    folder: Path, model: str, rows: tuple[Path, Path], settings: Mapping[str, object], output: Path
) -> Summary:
    """Fit a gene's coefficients on a task model from two files (refusals, task rows) and save it anew.

    ``shots`` among the settings keeps the first so many refusals.
    """
    gene = load_gene(folder)
    require_new(output)
    shots = settings.get("shots")
    refusals, task_rows = _read_kinds([[path] for path in rows], "refusals and for task rows")
    if isinstance(shots, int) and shots > len(refusals):
        raise InputError(f"{rows[0]} has {len(refusals)} refusals; got shots = {shots}. Add rows, or use fewer shots.")
    refusals = refusals[:shots] if isinstance(shots, int) else refusals
    if not refusals or not task_rows:
        raise InputError("A fit needs at least one refusal and one task row; got none of one kind. Add rows.")
    given = {name: value for name, value in settings.items() if name != "shots"}
    found = FitSection.model_validate({**gene.config.recipe.fit.model_dump(), **given})
    base = load_base(model)
    with _steps(f"fit {gene.name}") as report:
        fitted = fit_gene(base, gene, refusals, task_rows, found, report=report)
    return summary_of(fitted, save_gene(fitted, output))


def port_command(
    folder: Path, models: tuple[str, str], rows: tuple[Path, Path], settings: Mapping[str, object], output: Path
) -> Summary:
    """Port a gene from one model to another with prompts of both kinds (harmful, harmless), and save it anew."""
    gene = load_gene(folder)
    require_new(output)
    harmful, benign = _read_kinds([[path] for path in rows], "harmful and for harmless rows")
    recipe = gene.config.recipe
    extract = ExtractSection.model_validate({**recipe.extract.model_dump(), **settings})
    source, target = map(load_base, models)
    with _steps(f"port {gene.name}") as report:
        data = GeneData(harmful=(str(rows[0]),), benign=(str(rows[1]),))
        changed = recipe.model_copy(update={"extract": extract, "data": data})
        ported = port_gene(gene, (source, target), harmful, benign, changed, report=report)
    return summary_of(ported, save_gene(ported, output))


def apply_command(model: str, folders: Sequence[Path], how: Application) -> Summary:
    """Merge genes into a copy of a model, or answer one prompt with them live."""
    if (how.output is None) == (how.prompt is None):
        raise InputError("apply needs one of --output FOLDER (a merged copy) and --prompt TEXT (live).")
    if how.prompt is not None and not is_seen(how.prompt):
        raise InputError("--prompt is empty; expected text. Ask something.")
    genes = [load_gene(folder) for folder in folders]
    weights, base = asked_weights(genes, how), load_base(model)
    if how.output is not None:
        merged = merge_genes(base, genes, how.output, weights)
        return {"model": str(merged), "genes": read_merged(merged).genes}
    with apply_genes(base, genes, weights) as applied:
        answer = base.chat([Message("user", str(how.prompt))], max_new_tokens=how.max_new_tokens)
        return {"answer": answer.text, "genes": applied.weights}


def add_genes(base: Base, folders: Mapping[str, Path]) -> dict[str, str]:
    """Apply genes to ``base`` for as long as it is in memory; by name, the first 16 digits of each one's checksum.

    One whose own name is another is a ConfigError, one that does not fit the base a MismatchError.
    """
    genes = {name: load_gene(folder) for name, folder in folders.items()}
    for name, gene in genes.items():
        if gene.name != name:
            raise ConfigError(f"The gene at {folders[name]} is called {gene.name!r}, not {name!r}. Use its own name.")
    apply_genes(base, list(genes.values()))
    return {name: gene.config.checksum[:16] for name, gene in genes.items()}


def asked_weights(genes: Sequence[Gene], how: Application) -> dict[str, float] | None:
    """By gene, the weights that a command asks for: listed in the order of the genes, or those of a context."""
    if how.policy is not None:
        return read_policy(how.policy).weights_for(str(how.context), genes)
    if how.weights is None:
        return None
    try:
        found = [float(part) for part in how.weights.split(",")]
    except ValueError as error:
        raise InputError(f"Weights must be numbers like 1,0.5; got {how.weights!r}.") from error
    if len(found) != len(genes):
        raise InputError(f"--weights needs a number for each of {len(genes)} genes; got {len(found)}.")
    return {gene.name: weight for gene, weight in zip(genes, found, strict=True)}


def read_policy(path: Path) -> ContextPolicy:
    """The policy in a TOML file, a table of weights by gene for each context; anything else is a ConfigError."""
    try:
        contexts = tomllib.loads(path.read_text(encoding="utf-8"))
        return ContextPolicy(TypeAdapter(dict[str, dict[str, float]]).validate_python(contexts))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Expected a TOML file.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError) as error:
        what = problems_of(error) if isinstance(error, ValidationError) else str(error)
        raise ConfigError(f"{path} is not a policy: {what}. Expected [context] tables of GENE = WEIGHT.") from error


def unapply_command(folder: Path, output: Path) -> Summary:
    """Put back the originals of a merged copy."""
    genes = read_merged(folder).genes
    return {"model": str(unmerge_genes(folder, output)), "taken_out": sorted(genes)}


def inspect_command(folder: Path, model: str | None) -> tuple[list[dict[str, object]], Summary]:
    """The gene's layers, and what it is; with a model whether it fits (an error where it does not)."""
    gene = load_gene(folder)
    if model is not None:
        base = load_base(model)
        check_model(base)
        check_fits(gene, base)
    config = gene.config
    facts: Summary = {
        "name": config.name,
        "family": config.family.base,
        "architecture": config.family.architecture,
        "tokenizer": config.family.tokenizer,
        "conflicts": list(config.conflicts),
        "results": config.results,
    }
    return gene_facts(gene), facts


def summary_of(gene: Gene, folder: Path) -> Summary:
    """What a finished command says of the gene that it wrote."""
    config = gene.config
    return {
        "gene": str(folder),
        "layers": list(config.layers),
        "coefficients": [round(value, 4) for value in config.coefficients],
        "share_of_weights_touched": round(gene.n_weights_touched / config.family.n_weights, 6),
        **config.results,
    }


def _read_kinds(paths: Sequence[Sequence[Path]], what: str) -> tuple[list[Row], list[Row]]:
    """The rows of two kinds, which pull in opposite ways: a file that is given for both is an InputError."""
    first, second = paths
    shared = sorted({path.resolve() for path in first} & {path.resolve() for path in second})
    if shared:
        raise InputError(
            f"{shared[0]} is given both for {what}; expected a file of its own for each kind. Correct one of the two."
        )
    return read_rows(first), read_rows(second)


@contextmanager
def _steps(title: str) -> Iterator[Report]:
    """A bar for the steps of one optimisation."""
    with progress_bar(title, None, "steps") as advance:
        yield lambda step, n_steps: advance(1, n_steps)
