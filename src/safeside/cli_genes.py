"""The commands of ``safeside gene``: they parse, call one function and print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from safeside.cli_shared import Json, extra, print_json, print_rows, print_summary
from safeside.errors import InputError

app = typer.Typer(
    help="Genes: safety as low-rank updates that are extracted once and used in every model of a family.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

GeneFolder = Annotated[Path, typer.Argument(help="A gene's folder.")]
NewFolder = Annotated[Path, typer.Option("--output", help="A new folder for the result.")]
ModelName = Annotated[str, typer.Option("--base", help="The model: 'builtin', a folder or a hub name.")]
Selection = Literal["shift", "random", "all"]
Method = Annotated[Selection | None, typer.Option(help="How layers are chosen (default: the recipe's).")]


@app.command()
def extract(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe.")],
    output: NewFolder,
    data: Annotated[Path | None, typer.Option(help="Folder that the recipe's data paths start from.")] = None,
    aligned: Annotated[str | None, typer.Option(help="The aligned model, in place of the recipe's.")] = None,
    degraded: Annotated[str | None, typer.Option(help="Its degraded copy, in place of the recipe's.")] = None,
    as_json: Json = False,
) -> None:
    """Distil a gene from an aligned model and its degraded copy."""
    with extra("lora"):
        from safeside.genes.command import Models, extract_command
    summary = extract_command(recipe, data or recipe.parent, Models(aligned, degraded), output)
    print_summary(summary, str(recipe), as_json)


@app.command()
def select(
    gene: GeneFolder,
    base: ModelName,
    harmful: Annotated[Path, typer.Option(help="Harmful prompts, .jsonl or .jsonl.gz.")],
    benign: Annotated[Path, typer.Option(help="Harmless prompts.")],
    output: NewFolder,
    keep: Annotated[int | None, typer.Option(min=1, help="Layers to keep (default: the recipe's).")] = None,
    method: Method = None,
    as_json: Json = False,
) -> None:
    """Keep the layers that move harmful inputs most and harmless ones least."""
    with extra("lora"):
        from safeside.genes.command import select_command
    settings = {name: value for name, value in (("keep", keep), ("method", method)) if value is not None}
    print_summary(select_command(gene, base, (harmful, benign), settings, output), str(gene), as_json)


@app.command()
def fit(
    gene: GeneFolder,
    base: ModelName,
    refusals: Annotated[Path, typer.Option(help="Harmful prompts with the answers that are wanted, 16 to 64.")],
    task: Annotated[Path, typer.Option(help="Rows of the model's task; as many as refusals are read.")],
    output: NewFolder,
    shots: Annotated[int | None, typer.Option(min=1, help="Read only the first so many refusals.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of the optimiser (default: the recipe's).")] = None,
    refusal_tokens: Annotated[
        int | None, typer.Option(min=0, help="First tokens of a refusal that count; 0: all (default: the recipe's).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fit one scalar for each kept layer on a task model; everything else stays frozen."""
    with extra("lora"):
        from safeside.genes.command import fit_command
    asked = {"shots": shots, "steps": steps, "refusal_tokens": refusal_tokens}
    settings = {name: value for name, value in asked.items() if value is not None}
    print_summary(fit_command(gene, base, (refusals, task), settings, output), str(gene), as_json)


@app.command()
def port(
    gene: GeneFolder,
    source: Annotated[str, typer.Option("--from", help="A model of the gene's family that needs it.")],
    target: Annotated[str, typer.Option("--to", help="The model of another family.")],
    harmful: Annotated[Path, typer.Option(help="Harmful prompts; answers are not needed and not read.")],
    benign: Annotated[Path, typer.Option(help="Harmless prompts.")],
    output: NewFolder,
    rank: Annotated[int | None, typer.Option(min=1, help="Of each update (default: the recipe's).")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of the optimiser (default: the recipe's).")] = None,
    layer: Annotated[
        list[str] | None, typer.Option(help="Ending of a linear layer's name (repeatable; default: the recipe's).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Teach a model of another architecture what a gene makes its own model say."""
    with extra("lora"):
        from safeside.genes.command import port_command
    given = {"rank": rank, "steps": steps, "targets": layer}
    settings = {name: value for name, value in given.items() if value is not None}
    summary = port_command(gene, (source, target), (harmful, benign), settings, output)
    print_summary(summary, str(gene), as_json)


@app.command()
def apply(
    base: Annotated[str, typer.Argument(help="The model: 'builtin', a folder or a hub name.")],
    gene: Annotated[list[Path], typer.Option(help="A gene's folder (repeatable).")],
    weights: Annotated[
        str | None, typer.Option(help="One weight in 0..2 for each gene, comma-separated; 1 unless given.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="A TOML file: a table of weights for each context; 0 unless given.")
    ] = None,
    context: Annotated[str | None, typer.Option(help="The policy's context, in place of --weights.")] = None,
    output: Annotated[Path | None, typer.Option(help="A new folder for a copy with the genes merged.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this prompt with the genes live.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 96,
    as_json: Json = False,
) -> None:
    """Put genes into a model: merged into a copy, or live for one answer."""
    if (policy is None) != (context is None) or (policy is not None and weights is not None):
        raise InputError("--policy FILE and --context NAME go together, and in place of --weights.")
    with extra("lora"):
        from safeside.genes.command import Application, apply_command
    how = Application(output, prompt, weights, policy, context, max_new_tokens)
    print_summary(apply_command(base, gene, how), base, as_json)


@app.command()
def unapply(
    folder: Annotated[Path, typer.Argument(help="A copy that 'safeside gene apply' wrote.")],
    output: NewFolder,
    as_json: Json = False,
) -> None:
    """Write the model as it was before genes were merged into it, bit for bit."""
    with extra("lora"):
        from safeside.genes.command import unapply_command
    print_summary(unapply_command(folder, output), str(folder), as_json)


@app.command()
def inspect(
    gene: GeneFolder,
    base: Annotated[str | None, typer.Option("--base", help="Also check that the gene fits this model.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a gene is: layers, ranks, norms, coefficients, share of the weights touched."""
    with extra("lora"):
        from safeside.genes.command import inspect_command
    rows, facts = inspect_command(gene, base)
    if as_json:
        print_json({**facts, "layers": rows})
    else:
        print_rows(rows, f"{facts['name']}, extracted on {facts['family']}", False)
