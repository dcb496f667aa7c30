"""A base without weights: for what needs its tokenizer and its dimensions, and reads no state."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from safeside.base.families import Family, find_family
from safeside.base.fingerprint import check_tokenizer, weight_files
from safeside.base.loading import explained_loading, model_type_of
from safeside.base.model import Base, checkpoint_folder


def load_base_shell(name_or_path: str | Path, revision: str | None = None) -> Base:
    """The base that ``load_base`` gives, with its model on the meta device: texts are encoded and cut as for the base.

    Errors are those of ``load_base``.
    """
    name = str(name_or_path)
    folder = checkpoint_folder(name, revision)
    family = find_family(model_type_of(folder, name))
    with explained_loading(name):
        weight_files(folder)
        check_tokenizer(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = meta_model(AutoConfig.from_pretrained(folder, trust_remote_code=False), family)
    return Base(model, tokenizer, family, name, folder, revision)


def meta_model(config: PreTrainedConfig, family: Family) -> PreTrainedModel:
    """The model of ``config`` without weights."""
    with torch.device("meta"):
        return (AutoModel if family.is_encoder else AutoModelForCausalLM).from_config(config)  # type: ignore[no-any-return, no-untyped-call]
