"""What a policy would have done with rows that were seen before, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from safeside.adapters.adapter import Adapter
from safeside.base.model import Base, load_base
from safeside.errors import InputError, UnknownNameError
from safeside.guards.score import Scores, score_conversations, unscored
from safeside.moderation import finite
from safeside.registry import did_you_mean
from safeside.serve.effective import Decision, EffectivePolicy
from safeside.serve.keys import Caller
from safeside.serve.loading import AddGenes, load_adapters, no_genes
from safeside.serve.policy import PolicyBook
from safeside.serve.rules import SEVERITY, PolicyMode
from safeside.tasks.rows import BadRow, messages_of, open_rows, parse_rows
from safeside.types import Message, Verdict

_CHUNK = 64
Line = dict[str, object]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request's wishes: only a policy."""

    policy: str | None = None
    """A named policy, on top of those that hold anyway."""
    strength: float | None = None
    """None."""
    mode: PolicyMode | None = None
    """None."""


@dataclass(frozen=True, slots=True)
class Served:
    """By what and for whom the rows would have been answered."""

    base: str
    """'builtin', a folder or a hub name."""
    tenant: str = ""
    """Whose requests these would have been."""
    add_genes: AddGenes = no_genes
    """Makes the file's genes live in the base."""


def check_command(path: Path, base_name: str | None, add_genes: AddGenes = no_genes) -> list[Line]:
    """One row for each policy of a file that is valid; with a base its adapters are loaded and checked as well."""
    book = PolicyBook.load(path) if base_name is None else _bound(path, load_base(base_name), add_genes)[0]
    for tenant in ("", *book.tenants):
        book.resolve(Caller(tenant))
    held_by = {name: [tenant for tenant, names in book.tenants.items() if name in names] for name in book.policies}
    return [
        {
            "policy": name,
            "holds_for": "everybody" if name in book.names_for("") else ", ".join(held_by[name]) or "who asks for it",
            "rules": len(policy.prompt) + len(policy.answer),
            "mode": policy.mode,
            "description": policy.description,
            "version": book.version,
        }
        for name, policy in book.policies.items()
    ]


def simulate_command(path: Path, data: Path, asked: Asked, served: Served) -> Iterator[tuple[Line, bool]]:
    """For each row of ``data`` what would have been done and why, and whether it could be read and scored.

    A tenant that the file does not name is an UnknownNameError; the empty one has the deployment's policies alone.
    """
    tenant = served.tenant
    if tenant and tenant not in (known := PolicyBook.load(path).tenants):
        raise UnknownNameError(f"{did_you_mean('tenant', tenant, list(known))} Leave --tenant out for all others.")
    base = load_base(served.base)
    book, guards = _bound(path, base, served.add_genes)
    policy = book.resolve(Caller(tenant, "simulated" if tenant else ""), asked)  # a tenant's key hides others' policies
    own = [guards[name] for name in policy.guards]
    with open_rows(data) as handle:
        rows = parse_rows(handle)
        while chunk := list(islice(rows, _CHUNK)):
            yield from _judge_chunk(base, own, policy, [_read(row) for row in chunk])


def summary_of(lines: Sequence[Line]) -> Line:
    """How many rows met each action, and how many would have if every rule acted."""
    done, intended = (Counter(str(line[key]) for line in lines) for key in ("action", "intended"))
    summary: Line = {"rows": len(lines), **{name: done[name] for name in SEVERITY}}
    return summary | {f"intended_{name}": intended[name] for name in SEVERITY if intended[name] != done[name]}


@dataclass(frozen=True, slots=True)
class _Row:
    """A row's texts to judge: its prompt and, if it has one, its answer."""

    line: int
    texts: tuple[tuple[Message, ...], ...]
    problem: str | None = None


def _bound(path: Path, base: Base, add_genes: AddGenes) -> tuple[PolicyBook, dict[str, Adapter]]:
    """The book of a file with its genes and adapters loaded, and the guards among them."""
    book = PolicyBook.load(path)
    genes = add_genes(base, {name: Path(place) for name, place in book.genes.items()})
    guards, aligners = load_adapters(book, base)
    book.bind(guards, list(aligners), list(genes))
    return book, guards


def _read(row: tuple[int, dict[str, object]] | BadRow) -> _Row:
    if isinstance(row, BadRow):
        return _Row(row.line, (), row.problem)
    try:
        messages = messages_of(row[1])
    except InputError as error:
        return _Row(row[0], (), str(error))
    has_answer = messages[-1].role == "assistant"
    return _Row(row[0], (messages[:-1], messages) if has_answer and messages[:-1] else (messages,))


def _judge_chunk(
    base: Base, guards: Sequence[Adapter], policy: EffectivePolicy, rows: Sequence[_Row]
) -> Iterator[tuple[Line, bool]]:
    texts = [text for row in rows for text in row.texts]
    scored = iter(score_conversations(base, guards, texts) if texts and guards else [Scores({})] * len(texts))
    for row in rows:
        found = [next(scored) for _ in row.texts] or [unscored(guards, row.problem or "")]
        problem = next((scores.problem for scores in found if scores.problem), None)
        yield _line(row.line, guards, policy, found) | {"problem": problem}, problem is None


def _line(line: int, guards: Sequence[Adapter], policy: EffectivePolicy, found: Sequence[Scores]) -> Line:
    """What the policy does with one row: the more severe of its prompt and its answer."""
    decisions: list[tuple[Decision, str, tuple[Verdict, ...]]] = []
    for scores in found:
        verdicts = [
            verdict
            for guard in guards
            for verdict in policy.verdicts(guard.name, scores.by_guard[guard.name], scores.mode_for(guard))
        ]
        decide = policy.decide_answer if scores.place == "answer" else policy.decide_prompt
        decisions.append((decide(verdicts), scores.place, tuple(verdicts)))
    decision, stage, verdicts_of_it = max(decisions, key=lambda each: _severity(each[0]))
    return {
        "line": line,
        "action": decision.action,
        "intended": decision.intended,
        "stage": stage,
        "guard": decision.guard,
        "reason": decision.reason,
        "strength": max(each.strength for each, _, _ in decisions),
        "scores": {f"{each.task}/{each.label}": finite(each.score) for each in verdicts_of_it},
    }


def _severity(decision: Decision) -> tuple[int, int]:
    return SEVERITY[decision.action], SEVERITY[decision.intended]
