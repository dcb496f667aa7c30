"""Any of vLLM's causal language models with adapters: ``SafesideLlamaForCausalLM`` and so on, made when asked for.

``forward`` gives the base's final states, moved by the aligner at each token's strength, with the scores behind them;
``compute_logits`` runs the base's own head, once, and writes the scores into logits that no text uses.  In a pooling
engine there is no head: ``forward`` gives the scores alone, and vLLM's pooler takes what was asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm import ModelRegistry
from vllm import __version__ as vllm_version
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.interfaces import supports_eagle3

from safeside.base.fingerprint import take_fingerprint
from safeside.base.model import checkpoint_folder
from safeside.errors import MismatchError, UnsupportedError
from safeside.mixing import moved, weighted
from safeside.vllm_plugin import PREFIX, slots
from safeside.vllm_plugin.kept import EXTENSION, kept_of
from safeside.vllm_plugin.plan import PROCESSOR, EngineConfig, check_version, read_engine_config
from safeside.vllm_plugin.pooling import guard_pooler
from safeside.vllm_plugin.runner_v1 import batch_rows, table_of
from safeside.vllm_plugin.runner_v2 import SafesideModelState
from safeside.vllm_plugin.side import SideNetworks

_SURE = 300.0
"""The stop's logit above a state that was no number, where others are about 0: the stop is drawn at any temperature."""


class SafesideModel(nn.Module):
    """What stands in front of a base's class."""

    places: Tensor
    """The slots, as one tensor."""
    is_loaded = False
    """Whether the adapters have their weights: some ways of loading a base pass ``load_weights`` by."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_version(vllm_version)
        config = read_engine_config(vllm_config.additional_config)
        _refuse(vllm_config, config)
        if get_tensor_model_parallel_rank() == 0:
            _check_base(vllm_config, config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        text = vllm_config.model_config.hf_text_config
        with set_model_tag("safeside"):
            self.side = SideNetworks(
                vllm_config=vllm_config, prefix="safeside", config=config, n_layers=text.num_hidden_layers
            )
        self.state_width = int(text.hidden_size)
        self.aligns, self.tells_strength = config.aligner is not None, config.tells_strength
        self.requests = table_of(vllm_config, torch.empty(0).device)
        self.pooler = guard_pooler(config.pools) if config.pools else None
        self.kept = kept_of(vllm_config)
        self.register_buffer("places", torch.tensor(config.slots, dtype=torch.long), persistent=False)
        self.stop_id = _stop_id(text.eos_token_id)
        if above := [layer for layer in self.side.layers if layer]:
            self.set_aux_hidden_state_layers(tuple(above))  # type: ignore[operator]

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: Tensor | None = None,
        safeside_rows: Tensor | None = None,
    ) -> Tensor:
        """Final states (T, D), and behind them the scores; ``safeside_rows`` (T) is each token's row of the table.

        In a pooling engine the scores alone (T, K).
        """
        if not self.is_loaded:
            raise UnsupportedError(
                "The adapters have no weights: this --load-format (such as dummy or sharded_state) does not load them. "
                "Start with --load-format auto."
            )
        taps = [self._embedded(input_ids, inputs_embeds)] if self.side.layers[0] == 0 else []
        output = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        final, above = output if isinstance(output, tuple) else (output, [])
        scores: Tensor
        scores, delta = self.side(positions, torch.stack([*taps, *above]))
        if self.pooler is not None:
            return scores
        if self.aligns:
            rows = batch_rows(self.requests, positions) if safeside_rows is None else safeside_rows
            strength = self.requests.strengths(rows, positions, scores)
            final = moved(final, [weighted(delta, strength)], [strength])
            scores = torch.cat([scores, strength[:, None]], -1) if self.tells_strength else scores
        return slots.pack(final, scores) if len(self.places) else final

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """What the first block reads, but for its scale: taps are normed.  The base may overwrite its own tensor."""
        if inputs_embeds is not None:
            return inputs_embeds.clone()
        embedded: Tensor = self.embed_input_ids(input_ids)  # type: ignore[operator]
        return embedded

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The base's logits, with the scores in the slots; of a state that is no number the stop is drawn."""
        states, values = hidden_states, hidden_states[:, :0]
        if len(self.places):
            states, values = slots.unpack(hidden_states, self.state_width)
            self.kept.keep(values)
        broken = ~states.isfinite().all(-1) if self.aligns else None
        if broken is not None:
            states = states.masked_fill(broken[:, None], 0.0)  # the head makes it logits of 0, or its bias
        logits: Tensor | None = super().compute_logits(states)  # type: ignore[misc]
        if logits is None:
            return None
        if broken is not None:
            logits[:, self.stop_id].masked_fill_(broken, _SURE)
        return slots.write(logits, values, self.places) if len(self.places) else logits

    def compute_logits_local(self, hidden_states: Tensor) -> Tensor:
        """Never: it would see the scores as if they were states."""
        raise UnsupportedError("Sampling from a shard of the vocabulary is refused: adapters need whole logits.")

    def load_weights(self, weights: Any) -> set[str]:
        """The base's weights by its own loader, then every adapter's from its folder."""
        loaded: set[str] = super().load_weights(weights)  # type: ignore[misc]
        of_adapters = {f"side.{name}" for name in self.side.load_adapters()}
        self.is_loaded = True
        return loaded | of_adapters

    @classmethod
    def get_model_state_cls(cls) -> type[SafesideModelState]:
        """Where runner V2 keeps the requests."""
        return SafesideModelState


def _stop_id(configured: int | list[int] | None) -> int:
    stops = configured if isinstance(configured, list) else [configured]
    return stops[0] or 0


def _check_base(vllm_config: VllmConfig, config: EngineConfig) -> None:
    model = vllm_config.model_config.model
    found = take_fingerprint(checkpoint_folder(model, vllm_config.model_config.revision))
    if found != config.base:
        raise MismatchError(
            f"The engine was planned for a base {config.base} but {model} is {found}. Plan it for this base: safeside "
            "serve --engine vllm prints the flags."
        )


def _refuse(vllm_config: VllmConfig, config: EngineConfig) -> None:
    """Raise an UnsupportedError for what adapters cannot follow."""
    pools = config.pools is not None
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    processors = [str(name) for name in model.logits_processors or ()]
    reasons = {
        "Speculative decoding: scores of tokens that are rejected would open gates": vllm_config.speculative_config,
        "A LoRA in the base: it shifts the states that adapters read": vllm_config.lora_config,
        "Pipeline parallelism: taps of several stages do not meet": parallel.pipeline_parallel_size > 1,
        "Context parallelism": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "Positions of several dimensions": model.uses_mrope,
        "Micro-batching": parallel.use_ubatching,
        "Batch-sharded sampling: adapters need whole logits": parallel.enable_batch_sharded_sampling,
        f"Runner {model.runner_type} of an engine that was planned to {'pool' if pools else 'generate'}": pools
        != (model.runner_type == "pooling"),
        f"Log-probabilities as {model.logprobs_mode}: scores are read from raw_logprobs": not pools
        and model.logprobs_mode != "raw_logprobs",
        "No logits processor to tell of requests (--logits-processors)": not pools
        and not any(PROCESSOR in name for name in processors),
        "No worker extension to read scores from (--worker-extension-cls)": config.slots
        and parallel.worker_extension_cls != EXTENSION,
    }
    if found := [reason for reason, is_asked in reasons.items() if is_asked]:
        raise UnsupportedError(f"Refused with adapters: {'; '.join(found)}. Start the engine with other options.")


def __getattr__(name: str) -> type[nn.Module]:
    """``Safeside`` + a base's class, made once; what vLLM looks up by its registered name."""
    architecture = name.removeprefix(PREFIX)
    if architecture in ("", name):
        raise AttributeError(name)
    base = ModelRegistry.models[architecture].load_model_cls()
    if not supports_eagle3(base):  # gives no states between its blocks: the Transformers back end does
        base = ModelRegistry.models["TransformersForCausalLM"].load_model_cls()
    made: type[nn.Module] = type(name, (SafesideModel, base), {"__module__": __name__})
    globals()[name] = made
    return made
