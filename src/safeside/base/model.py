"""``Base``: a frozen language model or encoder with its tokenizer, and ``load_base``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.utils import logging

from safeside.base.answers import AttachedAdapters, Follower, Release, cut, told_stop
from safeside.base.families import Family, decoder_of, find_family, locate
from safeside.base.fingerprint import Fingerprint, check_tokenizer, take_fingerprint, weight_files
from safeside.base.head import logits_of
from safeside.base.loading import checked_device, checked_dtype, explained_loading, model_type_of
from safeside.base.packaged import PACKAGED, packaged_folder
from safeside.chat import Encoded, encode_begun, encode_chat, pad_batch
from safeside.content import refuse_empty
from safeside.errors import BlockedError, InputError, UnsupportedError
from safeside.types import Completion, FinishReason, Message

BUILTIN_NAME = "builtin"
# What chat sets itself, or could not hand on: one answer a row, its own cache (verdicts live on it), nothing but text.
_NOT_FOR_CHAT = {
    "num_beams", "num_return_sequences", "past_key_values", "use_cache", "cache_implementation", "inputs", "input_ids",
    "inputs_embeds", "attention_mask", "position_ids", "pad_token_id", "max_length", "return_dict_in_generate",
    "output_scores", "output_logits", "output_attentions", "output_hidden_states", "custom_generate",
    "trust_remote_code", "negative_prompt_ids", "negative_prompt_attention_mask", "stop_strings", "stopping_criteria",
}  # fmt: skip
_GREEDY: dict[str, object] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@dataclass
class Base:
    """A frozen model with its tokenizer.  Made by ``load_base``; adapters are attached to it."""

    model: PreTrainedModel
    """The transformers model, in evaluation mode and without gradients."""
    tokenizer: PreTrainedTokenizerBase
    """The checkpoint's tokenizer, with its chat template."""
    family: Family
    """Where blocks and final norm sit."""
    name: str
    """What the base was loaded by."""
    folder: Path
    """The checkpoint's files."""
    revision: str | None = None
    """Revision on the model hub, where one was given."""
    attachment: AttachedAdapters | None = field(default=None, repr=False)
    """What is attached now, if anything is."""

    def __post_init__(self) -> None:
        self.model.eval()  # type: ignore[no-untyped-call]
        self.model.requires_grad_(False)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Hashes of the checkpoint's files (see ``safeside.base.fingerprint``)."""
        return take_fingerprint(self.folder)

    @property
    def decoder(self) -> nn.Module:
        """The module whose output goes into the language-model head."""
        return decoder_of(self.model, self.family)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, in order."""
        blocks = locate(self.decoder, self.family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def is_encoder(self) -> bool:
        """Whether the base reads both ways and has no language-model head: guards only."""
        return self.family.is_encoder

    @property
    def n_layers(self) -> int:
        """Transformer blocks, L."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Width of the hidden states between blocks, D."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def max_tokens(self) -> int:
        """Context length in tokens: prompt and answer together."""
        return int(self.model.config.get_text_config().max_position_embeddings) - self.family.spare_positions

    @property
    def device(self) -> torch.device:
        """Where the weights are; adapters are loaded there."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; adapters are loaded in it."""
        return self.model.dtype

    def encode(self, messages: Sequence[Message], *, answer: bool = True, begun: bool = False) -> Encoded:
        """Token ids of a conversation; with ``answer`` they end where the assistant's answer begins.

        With ``begun`` a last message of the assistant is the beginning of an answer, and they end with it.
        """
        if begun and messages[-1:] and messages[-1].role == "assistant":
            return encode_begun(self.tokenizer, messages)
        return encode_chat(self.tokenizer, messages, add_generation_prompt=answer, is_encoder=self.is_encoder)

    def head_logits(self, final: Tensor) -> Tensor:
        """Logits (B, T, V) of final normed states (B, T, D) by the base's own head, its scaling and soft-cap included.

        The model's own code runs with ``final`` in place of what its decoder gives, so no architecture's head is
        written twice, and no block runs.  For training: not while another thread runs this base.
        """
        return logits_of(self.model, self.decoder, final)

    @torch.no_grad()
    def chat(
        self,
        messages: Sequence[Message],
        *,
        strength: object = None,
        stop: object = None,
        max_new_tokens: int = 128,
        **generate: object,
    ) -> Completion:
        """One answer.  ``strength`` overrides the attachment's for this request (see ``attach``).

        ``stop`` is a StopRule for the only guard attached, rules by guard's name, or True for those that the guards'
        artifacts keep: an answer that meets one ends there, and its text holds only the tokens before the risky ones.

        Greedy unless ``do_sample=True``; ``generate`` holds further options of transformers' ``generate``.  A prompt
        that leaves no room for ``max_new_tokens`` is an InputError: nothing is cut; so is one that holds no text where
        guards are attached, which would judge the template alone.  Beams, several samples, stop strings, a cache of the
        caller's own or none at all, and what generate would return beside the text are an UnsupportedError;
        ``eos_token_id`` replaces the base's stop tokens.
        """
        options = {"strength": strength, "stop": stop, "max_new_tokens": max_new_tokens, **generate}
        return self.chat_batch([messages], **options)[0]  # type: ignore[arg-type]

    @torch.no_grad()
    def chat_batch(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        strength: object = None,
        stop: object = None,
        max_new_tokens: int = 128,
        release: Release | None = None,
        begun: bool = False,
        **generate: object,
    ) -> list[Completion]:
        """Answers to several conversations in one batch, in order; ``strength`` may hold one value a row.

        With ``begun`` a conversation that ends with an assistant's message is an answer to go on with; the completion's
        text is what was added, and a latched gate reads the prompt with the beginning of the answer.

        ``release`` is called with a row and the next ids of its answer while it is written, never with an id that a
        guard can still take back; what it raises ends the answers.  Prompts that an intercepting guard blocks have no
        answer; the others go on.
        """
        self._check_chat(strength, stop, generate)
        if not conversations:
            return []
        encoded = [self._encoded_for_chat(messages, begun) for messages in conversations]
        self._check_room(encoded, max_new_tokens)
        ends = [len(item.ids) for item in encoded]
        attached = self.attachment
        scope = attached.request(strength=strength, prompt_end=ends, stop=stop) if attached else nullcontext()
        try:
            with scope:
                is_followed = release is not None or stop is not None or bool(attached and attached.intercept)
                options = {"max_new_tokens": max_new_tokens, **generate}
                return self._answer(encoded, options, release, is_followed)
        except BlockedError as blocked:
            pairs = zip(blocked.verdicts, ends, strict=True)
            return [Completion("", (verdict,), {}, end, 0, "blocked") for verdict, end in pairs]

    def _encoded_for_chat(self, messages: Sequence[Message], begun: bool) -> Encoded:
        if self.attachment and self.attachment.guards:
            refuse_empty(messages)
        return self.encode(messages, begun=begun)

    def _check_chat(self, strength: object, stop: object, generate: Mapping[str, object]) -> None:
        if self.is_encoder:
            raise UnsupportedError(f"{self.name} is an encoder and cannot answer; expected a causal language model.")
        if strength is not None and self.attachment is None:
            raise InputError("A strength was given but nothing is attached. Call attach(base, aligners=[...]) first.")
        if stop is not None and self.attachment is None:
            raise InputError("A stop rule was given but nothing is attached. Call attach(base, guards=[...]) first.")
        foreign = sorted(_NOT_FOR_CHAT & set(generate))
        if foreign:
            raise UnsupportedError(
                f"chat gives one answer a row, keeps its own cache and ends answers at stop tokens; got "
                f"{', '.join(foreign)}. Leave it out, or call base.model.generate itself."
            )

    def _answer(
        self, encoded: Sequence[Encoded], generate: Mapping[str, object], release: Release | None, is_followed: bool
    ) -> list[Completion]:
        """Generate under the request in force, score the last token, and read off what guards say."""
        ids, keep = pad_batch([item.ids for item in encoded], self.pad_id, side="left")
        ids, keep, cache = ids.to(self.device), keep.to(self.device), DynamicCache()
        options = generate if generate.get("do_sample") else {**_GREEDY, **generate}
        follower = Follower(self.attachment, cache, ids.shape[1], self.stop_ids(generate.get("eos_token_id")), release)
        output = self.model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=keep,
            past_key_values=cache,
            pad_token_id=self.pad_id,
            stopping_criteria=StoppingCriteriaList([follower] if is_followed else []),
            **options,
        )
        if self.attachment:
            self._score_last_token(output, keep, cache)
        ends = [len(item.ids) for item in encoded]
        return self._completions(output[:, ids.shape[1] :].tolist(), ends, cache, follower)

    def _score_last_token(self, output: Tensor, keep: Tensor, cache: DynamicCache) -> None:
        """``generate`` never feeds the last token it made; guards see it through one more step."""
        mask = torch.ones(output.shape, dtype=torch.bool, device=output.device)
        mask[:, : keep.shape[1]] = keep
        self.decoder(
            input_ids=output[:, -1:],
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        )

    def _completions(
        self, answers: list[list[int]], ends: list[int], cache: DynamicCache, follower: Follower
    ) -> list[Completion]:
        own = [cut(answer, follower.stop_ids) for answer in answers]
        lengths = [len(kept) + ended for kept, ended in own]
        attached = self.attachment
        standings = attached.standings(cache, lengths) if attached else [None] * len(ends)
        texts, reasons = [], []
        for row, ((kept, ended), standing) in enumerate(zip(own, standings, strict=True)):
            reason: FinishReason = "stop" if ended else "length"
            if standing is not None and (standing.is_blocked or standing.stop is not None):
                reason = "blocked" if standing.is_blocked else "guard"
                lengths[row] = standing.stop.token + 1 if standing.stop is not None else 0
                kept = kept[: standing.n_clear]
            texts.append(kept)
            reasons.append(reason)
        follower.finish(texts)
        verdicts = attached.verdicts(cache, lengths) if attached else [()] * len(ends)
        traces = attached.traces(cache) if attached else [()] * len(ends)
        traces = [tuple(trace.first(len(kept)) for trace in row) for row, kept in zip(traces, texts, strict=True)]
        return [
            Completion(
                text=str(self.tokenizer.decode(kept, skip_special_tokens=True)).strip(),
                verdicts=told_stop(verdicts[row], standing.stop if standing is not None else None),
                strength={trace.aligner: trace.strengths for trace in traces[row]},
                n_prompt_tokens=ends[row],
                n_new_tokens=len(kept),
                finish_reason=reasons[row],
                stop=standing.stop if standing is not None else None,
                traces=traces[row],
            )
            for row, (kept, standing) in enumerate(zip(texts, standings, strict=True))
        ]

    def _check_room(self, encoded: Sequence[Encoded], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1; got {max_new_tokens}.")
        longest = max(len(item.ids) for item in encoded)
        if longest + max_new_tokens > self.max_tokens:
            raise InputError(
                f"The prompt has {longest} tokens and the answer may take {max_new_tokens}, but {self.name} holds "
                f"{self.max_tokens}. Shorten the conversation or lower max_new_tokens; nothing is cut silently."
            )

    @property
    def pad_id(self) -> int:
        """The token that fills a batch; masks keep it out of every sum."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else next(iter(self.stop_ids()), 0))

    def stop_ids(self, given: object = None) -> set[int]:
        """The tokens that end an answer: those ``given``, as ``generate`` takes them, else the base's own."""
        if given is not None:
            return set(torch.as_tensor(given).flatten().tolist())
        configured = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = configured if isinstance(configured, list) else [configured, self.tokenizer.eos_token_id]
        return {int(token) for token in ids if token is not None}


@contextlib.contextmanager
def _explained_download(name: str) -> Iterator[None]:
    try:
        yield
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        raise InputError(
            f"Cannot load a base from {name!r}: no such folder, and the model hub gave: {error}. "
            "Expected 'builtin', 'minilm', a folder with a saved model, or a hub name such as 'Qwen/Qwen3-0.6B'."
        ) from error


def checkpoint_folder(name: str, revision: str | None) -> Path:
    """The local folder of a checkpoint: a packaged one, the user's own, or a downloaded snapshot."""
    if name == BUILTIN_NAME:
        return Path(str(files("safeside.builtin") / "base"))
    if name in PACKAGED:
        return packaged_folder(name)
    if Path(name).is_dir():
        return Path(name)
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    with _explained_download(name):
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def load_base(
    name_or_path: str | Path,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
) -> Base:
    """Load a base from ``"builtin"``, a folder or a hub name, frozen and in evaluation mode.

    ``"minilm"`` is the encoder all-MiniLM-L6-v2, which the extra of that name installs.  ``dtype`` is float32 on CPU
    and the checkpoint's own elsewhere unless given (a torch dtype or its name).  No remote code is ever run.  What
    cannot be found or read, a device that is not there and an unknown dtype are an InputError; an unknown architecture
    is an UnsupportedError that names ``register_family``.
    """
    name = str(name_or_path)
    folder = checkpoint_folder(name, revision)
    family = find_family(model_type_of(folder, name))
    device = checked_device(device)
    dtype = checked_dtype(("float32" if device.type == "cpu" else "auto") if dtype is None else dtype)
    loader = AutoModel if family.is_encoder else AutoModelForCausalLM
    with explained_loading(name), quiet_files():
        weight_files(folder)
        check_tokenizer(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = loader.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    torch.nn.Module.to(model, device)
    return Base(model, tokenizer, family, name, folder, revision)


@contextlib.contextmanager
def quiet_files() -> Iterator[None]:
    """Reading or writing a small model needs no progress bar; a large one keeps it elsewhere."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
