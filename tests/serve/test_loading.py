"""What a policy file names: adapters, and genes that live in the served base."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from command_line import Ran
from genes_for_tests import logits_of, random_gene
from safeside import Base
from safeside.errors import AccessError, ConfigError, MismatchError, UnsupportedError
from safeside.genes.artifact import save_gene
from safeside.genes.command import add_genes
from safeside.serve.admin import AdapterDesk, bind
from safeside.serve.app import AppOptions, create_app
from safeside.serve.command import ServeOptions, make_service
from safeside.serve.loading import no_genes
from safeside.serve.service import Service
from safeside.serve.threaded import in_thread

POLICY = """
genes: {{safe: {folder}/genes/safe}}
allow_mismatch: weights
adapters: {{harm: {adapters}/harm}}
policies:
  house: {{genes: [safe], prompt: [{{action: annotate, guard: harm, threshold: 0.5}}]}}
deployment: house
"""


@pytest.fixture
def options(session_base: Base, adapters: Path, tmp_path: Path) -> ServeOptions:
    """A deployment with a gene in a folder that it may load from."""
    save_gene(random_gene(session_base), tmp_path / "genes" / "safe")
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY.format(folder=tmp_path, adapters=adapters))
    audit, roots = f"sqlite:///{tmp_path}/audit.db", (tmp_path / "genes",)
    return ServeOptions(str(session_base.folder), policy, audit=audit, adapter_roots=roots, add_genes=add_genes)


@pytest.fixture
def service(options: ServeOptions) -> Iterator[Service]:
    service = make_service(options)
    yield service
    service.close(0.0)


def test_a_gene_lives_in_the_served_base(service: Service, session_base: Base, options: ServeOptions) -> None:
    """Its fingerprint is listed and audited, and every verdict says that the weights are others."""
    fingerprint = service.genes["safe"]
    with in_thread(create_app(service, AppOptions(options.adapter_roots))) as url:
        body = {"model": service.model, "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 2}
        told = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["safety"]
        httpx.post(f"{url}/v1/moderations", json={"input": "the cat"}, timeout=60).raise_for_status()
    listed = {row["id"]: row for row in AdapterDesk(service).listed()}
    assert not torch.equal(logits_of(service.base), logits_of(session_base))
    assert "weights or chat template differ" in told["verdicts"][0]["reason"]
    assert (listed["safe"]["role"], listed["safe"]["fingerprint"]) == ("gene", fingerprint)
    audit = next(options.policy.parent.glob("audit.db"))
    with sqlite3.connect(audit) as database:
        kept = database.execute("SELECT stage, adapters FROM safeside_decisions").fetchall()
    assert {stage for stage, _ in kept} == {"prompt", "answer", "moderation"}
    expected = {"harm": service.fingerprints["harm"], "safe": fingerprint}
    assert [json.loads(adapters) for _, adapters in kept] == [expected] * 3


def test_genes_stay_as_they_are_while_the_server_runs(service: Service, options: ServeOptions) -> None:
    text = options.policy.read_text()
    options.policy.write_text(text + "tenants: {shop: house}\n")
    service.book.reload()
    for old, new in (("genes/safe}", "genes/other}"), ("allow_mismatch: weights", "")):
        options.policy.write_text(text.replace(old, new))
        with pytest.raises(ConfigError, match="Restart the server"):
            service.book.reload()
    bind(service, list(service.engine.adapters.values()))  # as after an adapter is loaded or unloaded
    assert service.book.tenants == {"shop": ("house",)}


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"adapter_roots": ()}, AccessError, "--adapter-root"),
        ({"add_genes": no_genes}, UnsupportedError, "without genes"),
        ({"base": "gpt2"}, MismatchError, "does not fit"),
        (("allow_mismatch: weights", ""), ConfigError, "Say allow_mismatch: weights"),
        (("genes: {safe:", "genes: {kind:"), ConfigError, "is called 'safe', not 'kind'"),
        (("genes: {safe:", "genes: {harm: x, safe:"), ConfigError, "harm is both an adapter and a gene"),
        (("genes: [safe]", "genes: [other]"), ConfigError, "needs gene 'other', which is not loaded; loaded are safe"),
    ],
)
def test_what_does_not_fit_is_told_at_the_start(
    options: ServeOptions,
    tiny_folder: Callable[[str], Path],
    change: dict[str, object] | tuple[str, str],
    error: type[Exception],
    problem: str,
) -> None:
    if isinstance(change, tuple):
        options.policy.write_text(options.policy.read_text().replace(*change))
        change = {}
    elif "base" in change:
        change = {"base": str(tiny_folder(str(change["base"])))}
    with pytest.raises(error, match=problem):
        make_service(replace(options, **change))  # type: ignore[arg-type]
    assert not (options.policy.parent / "audit.db").exists()


def test_the_commands_know_genes(options: ServeOptions, run: Callable[..., Ran]) -> None:
    assert run("policy", "check", options.policy, "--base", options.base).code == 0
    options.policy.write_text(options.policy.read_text().replace("genes/safe", "genes/none"))
    missing = run("policy", "check", options.policy, "--base", options.base)
    assert (missing.code, "expected a gene's folder" in missing.err) == (1, True)
