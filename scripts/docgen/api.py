"""docs/reference/api.md and modules.md: public names, and names that are imported from their modules."""

from __future__ import annotations

import ast

from docgen.markdown import attribute_table, code, fence, page, prose, table
from docgen.source import (
    attributes,
    classes,
    exported,
    find,
    methods,
    module_doc,
    properties,
    require_doc,
    signature,
)

# Names outside ``safeside.__all__`` that the pages use; a test keeps pages from using others.
FURTHER = {
    "safeside.adapters.adapter": ("Trunk", "SideOutput"),
    "safeside.adapters.blocks": ("TapProjection", "SideBlock", "Rotary"),
    "safeside.adapters.config": (
        "BaseReference",
        "Calibration",
        "ModeCalibration",
        "Promise",
        "ProbabilityMap",
        "rows_needed",
    ),
    "safeside.artifact": ("read_config", "push_adapter", "pull_adapter"),
    "safeside.base.taps": ("Tape", "SideCache"),
    "safeside.chat": ("Encoded", "encode_chat"),
    "safeside.errors": (),
    "safeside.evals.attacks": ("attacked", "by_carrier", "by_text"),
    "safeside.evals.baselines": ("fit_keywords", "fit_probe"),
    "safeside.evals.guards": ("evaluate_guard", "GuardReport"),
    "safeside.evals.classifier": ("fit_classifier", "agreement", "Agreement"),
    "safeside.evals.endpoint": ("Endpoint", "ChatClient"),
    "safeside.evals.judges": ("Exchange", "Judgement", "JudgeOptions", "by_refusal", "refusal_phrases"),
    "safeside.evals.likelihood": ("likelihoods", "utility", "Likelihood"),
    "safeside.evals.prompted": ("prompted_scores", "choose_question", "PromptedScores"),
    "safeside.evals.records": ("Record", "RecordLog", "Setting", "read_records", "rejudge"),
    "safeside.evals.rubrics": ("strongreject_judge", "mt_bench_judge"),
    "safeside.evals.methods": (
        "Method",
        "PlainBase",
        "Aligned",
        "aligned",
        "Oracle",
        "WithLora",
        "WithSystemPrompt",
        "GuardedRefusal",
    ),
    "safeside.evals.safe_decoding": ("SafeDecoding", "Mix"),
    "safeside.evals.runs": ("judging", "results_of", "run_aligner_suite", "run_suite"),
    "safeside.evals.suites": ("Suite", "Prompt", "draw", "goals_of"),
    "safeside.genes.apply": ("apply_genes", "AppliedGenes", "ContextPolicy"),
    "safeside.genes.artifact": ("load_gene", "save_gene"),
    "safeside.genes.extract": ("extract_gene", "Pair"),
    "safeside.genes.fit": ("fit_gene",),
    "safeside.genes.gene": ("Gene", "gene_facts"),
    "safeside.genes.merge": ("merge_genes", "unmerge_genes", "model_hash"),
    "safeside.genes.recipe": ("GeneRecipe", "SelectSection", "FitSection", "read_gene_recipe"),
    "safeside.genes.select": ("select_layers", "layer_shifts", "Shift"),
    "safeside.evals.suffix": ("find_suffix", "SuffixSearch", "Suffix"),
    "safeside.guards.calibrate": ("fit_calibration", "threshold_with_bound", "fit_mode"),
    "safeside.guards.lines": ("Scorer", "BaseScorer", "judge_rows"),
    "safeside.guards.probability": ("fit_map", "expected_calibration_error"),
    "safeside.guards.recalibrate": ("Traffic", "Recalibration", "recalibrate"),
    "safeside.guards.score": ("judge", "score_conversations", "Scores"),
    "safeside.guards.stream": ("fit_stop_rule", "score_answers", "evaluate_stops", "AnswerStream", "StreamOptions"),
    "safeside.guards.windows": ("windows",),
    "safeside.mixing": ("Policy", "Fixed", "Step", "Ramp"),
    "safeside.registry": ("Registry", "load_plugins"),
    "safeside.request": ("PassRecord",),
    "safeside.stopping": ("StopRule",),
    "safeside.scale.bulk": ("score_command", "BulkOptions"),
    "safeside.guards.setup": ("Setup",),
    "safeside.scale.engines": ("ScoringEngine",),
    "safeside.tasks.categories": ("find_category", "Category"),
    "safeside.tasks.overlap": ("drop_overlap", "Overlap"),
    "safeside.tasks.learnt": ("load_learnt",),
    "safeside.tasks.rows": ("load_examples", "messages_of", "BadRow"),
    "safeside.tasks.sources": ("Fields", "Part", "Source"),
    "safeside.tasks.task": ("Task", "TaskRows", "load_task", "register_task"),
    "safeside.train.importance": ("measure_importance", "Importance", "Sample"),
    "safeside.train.loop": ("Outcome", "Progress"),
    "safeside.train.lora": ("create_lora", "LoraGuard"),
    "safeside.lora": ("add_lora", "load_lora", "save_lora", "Lora", "LoraShape"),
    "safeside.train.pruning": ("start_from_base", "create_pruned_standalone"),
    "safeside.train.recipe": ("read_recipe",),
    "safeside.train.run": ("run_recipe", "Run"),
    "safeside.types": ("Example", "Result"),
    "safeside.vllm_plugin.plan": ("plan_engine", "Plan", "EngineConfig", "AdapterEntry", "spare_ids"),
}
# Registries by the module that holds them; ``documented`` adds them to their modules' names.
REGISTRIES = {
    "TRUNKS": "safeside.adapters.adapter",
    "FAMILIES": "safeside.base.families",
    "SUITES": "safeside.evals.suites",
    "ATTACKS": "safeside.evals.attacks",
    "JUDGES": "safeside.evals.judges",
    "TASKS": "safeside.tasks.task",
    "ENGINES": "safeside.scale.engines",
}
# Classes whose fields have a page of their own.
ELSEWHERE = {
    "AdapterConfig": "adapter-config.md",
    "BaseReference": "adapter-config.md",
    "Calibration": "adapter-config.md",
    "ModeCalibration": "adapter-config.md",
    "Promise": "adapter-config.md",
    "ProbabilityMap": "adapter-config.md",
    "GeneRecipe": "gene.md",
    "SelectSection": "gene.md",
    "FitSection": "gene.md",
    "SafesideError": "errors.md",
}


def documented() -> set[tuple[str, str]]:
    """Every (module, name) that the reference describes."""
    names = {("safeside", name) for name in exported()}
    names |= {(module, name) for name, module in exported().items()}
    names |= {(module, name) for module, found in FURTHER.items() for name in found}
    names |= {(module, name) for name, module in REGISTRIES.items()}
    names |= {("safeside.errors", node.name) for node in classes("safeside.errors")}
    return names | {("safeside.train.recipe", "Recipe")}


def api_page() -> str:
    """The names of ``safeside.__all__``, in order."""
    names = exported()
    index = table(
        ["name", "gives"],
        [[f"[`{name}`](#{name.lower()})", prose(_first_line(names[name], name))] for name in names],
    )
    legend = prose(module_doc("safeside.types"))
    intro = "`from safeside import ...` gives these names. More are imported [from their modules](modules.md)."
    return page("Python interface", intro, legend, index, *(_entry(module, name, 2) for name, module in names.items()))


def modules_page() -> str:
    """The names that are imported from their modules."""
    intro = "Names that a program imports from their modules. What is on neither page may change without notice."
    parts = []
    for module, names in FURTHER.items():
        if names:
            parts += [f"## `{module}`", prose(module_doc(module)), *(_entry(module, name, 3) for name in names)]
    return page("Names in modules", intro, *parts)


def _first_line(module: str, name: str) -> str:
    return " ".join(require_doc(find(module, name), name).split("\n\n")[0].split())


def _entry(module: str, name: str, level: int) -> str:
    """Heading, signature, docstring and members of one name."""
    node = find(module, name)
    heading, doc = f"{'#' * level} {name}", prose(require_doc(node, name))
    if not isinstance(node, ast.ClassDef):
        return "\n\n".join([heading, fence(signature(node)), doc])
    if name in ELSEWHERE:
        return "\n\n".join([heading, doc, f"See [its own page]({ELSEWHERE[name]})."])
    parts = [heading, doc]
    fields, found = attributes(node), properties(node)
    if fields:
        parts.append(attribute_table(fields, "field"))
    if found:
        parts.append(attribute_table(found, "property"))
    for method in methods(node):
        parts += [f"{'#' * (level + 1)} {method.name}", fence(method.signature), prose(method.doc)]
    return "\n\n".join(parts)


def registries_table(registered: dict[str, list[str]]) -> str:
    """What is registered where, by registry."""
    rows = [
        [code(name), code(REGISTRIES[name]), ", ".join(code(item) for item in items)]
        for name, items in registered.items()
    ]
    return table(["registry", "module", "built in"], rows)
