"""What a request to vLLM's server asks, read before the server reads it: ``safety``, and whether its ids are masked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from safeside.content import refuse_empty
from safeside.errors import InputError, problems_of
from safeside.types import Message
from safeside.vllm_plugin.kept import TAG
from safeside.vllm_plugin.plan import EngineConfig
from safeside.vllm_plugin.strengths import KEY, parse_strength

_FURTHER_TEXT = ("documents", "tools", "chat_template", "prompt_embeds")
"""What may bring text of its own into a prompt."""
_TOO_DEEP = "The body is nested deeper than JSON is read here. Send lists and objects within fewer others."


class AskedSafety(BaseModel):
    """What a request may ask for in ``safety``."""

    model_config = ConfigDict(extra="forbid")

    strength: float | dict[str, Any] | None = None
    tokens: bool = False


def prepared(body: bytes, config: EngineConfig) -> tuple[dict[str, Any], AskedSafety]:
    """The request without ``safety``, its strength among ``vllm_xargs``; what cannot be answered is an InputError."""
    try:
        values = json.loads(body)
    except ValueError as error:
        raise InputError(f"The body is not JSON: {error}.") from error
    except RecursionError as error:
        raise InputError(_TOO_DEEP) from error
    if not isinstance(values, dict):
        raise InputError("The body is not a JSON object.")
    try:
        safety = AskedSafety.model_validate(values.pop("safety", None) or {})
    except ValidationError as error:
        raise InputError(f"'safety' holds 'strength' and 'tokens': {problems_of(error)}") from error
    extra = values.get("vllm_xargs") or {}
    if not isinstance(extra, dict):
        raise InputError(f"'vllm_xargs' is an object; got a {type(extra).__name__}.")
    if TAG in extra:
        raise InputError(f"{TAG} is given by the server alone. Leave it out.")
    if safety.strength is not None:
        if config.aligner is None:
            raise InputError("A strength was given but the engine has no aligner. Leave it out.")
        parse_strength(safety.strength, config.thresholds)
        values["vllm_xargs"] = {**extra, KEY: json.dumps(safety.strength)}
    _check_readable(values, config)
    if config.slots:
        _check_text(values)
    return values, safety


def _check_text(values: Mapping[str, Any]) -> None:
    """Raise an InputError where all that the base would read is text and nothing of it is to be seen."""
    if any(values.get(name) for name in _FURTHER_TEXT):
        return
    if "messages" in values:
        conversations = [_texts_of(values["messages"])]
    else:
        prompts = values.get("prompt")
        conversations = [[prompt] for prompt in (prompts if isinstance(prompts, list) else [prompts])]
    for texts in conversations:
        said = [text for text in texts if isinstance(text, str)]
        if said and len(said) == len(texts):
            refuse_empty([Message("user", text) for text in said])


def _texts_of(messages: object) -> list[object]:
    """The text of each message, None where it holds anything else; of names, nulls and the role nothing is read."""
    listed = messages if isinstance(messages, list) else []
    return [_text_of(item) if isinstance(item, dict) else None for item in listed]


def _text_of(message: Mapping[str, Any]) -> str | None:
    further = {name for name, value in message.items() if value is not None} - {"role", "name", "content"}
    content = message.get("content") or ""
    if further or not isinstance(content, str | list):
        return None
    if isinstance(content, str):
        return content
    parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    return None if None in parts else "".join(map(str, parts))


def encoded(values: Mapping[str, Any]) -> bytes:
    """JSON; what was read but cannot be written, because it is nested too deeply, is an InputError."""
    try:
        return json.dumps(values).encode()
    except RecursionError as error:
        raise InputError(_TOO_DEEP) from error


def _check_readable(values: dict[str, Any], config: EngineConfig) -> None:
    """Raise an InputError for what would hide the scores."""
    many = values.get("top_logprobs") or values.get("logprob_token_ids") or values.get("prompt_logprobs")
    n_logprobs = values.get("logprobs")
    if config.slots and (many or (isinstance(n_logprobs, int) and n_logprobs > 1)):
        raise InputError(
            "Scores travel among the log-probabilities, so those of tokens that were not drawn cannot be asked for "
            "beside them. Ask for 'logprobs' of the drawn tokens alone."
        )
    if config.slots and (values.get("use_beam_search") or values.get("echo")):
        raise InputError("Beam search and echo give no scores. Leave them out.")
    if config.slots and values.get("include_reasoning") not in (None, True):
        raise InputError(
            "'include_reasoning' other than true hides log-probabilities where the server parses reasoning, and scores "
            "travel as such. Leave it out, and pass over the reasoning in the answer."
        )


def needs_tag(values: Mapping[str, Any], n_copies: int, *, is_adjusted: bool) -> bool:
    """Whether a grammar masks the ids that carry scores; an InputError where those of several answers would be mixed.

    Tools that the model is free to call may bring a grammar too (``strict``), and so may any chat that the server's
    parser adjusts (``is_adjusted``): these have a tag wherever it can be.
    """
    formats = {name: values.get(name) for name in ("response_format", "structured_outputs")}
    masks = [name for name, found in formats.items() if found is not None and not _is_plain(found)]
    choice = (values.get("tool_choice") or "auto") if values.get("tools") else "none"
    masks += ["tool_choice"] if choice not in ("auto", "none") else []
    prompt = values.get("prompt")
    several = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
    is_alone = values.get("n") in (None, 1) and not several and not values.get("prompt_embeds") and n_copies == 1
    if masks and not is_alone:
        raise InputError(
            f"{masks[0]!r} masks the ids that carry scores, so the engine keeps them by request, and can tell neither "
            "several answers of one request apart nor engines beside each other. Ask for n=1 and one prompt, of a "
            "server without data parallelism."
        )
    return bool(masks) or ((choice == "auto" or is_adjusted) and is_alone)


def _is_plain(asked_format: object) -> bool:
    """Whether a format is the one that is none."""
    return isinstance(asked_format, Mapping) and asked_format.get("type") == "text"
