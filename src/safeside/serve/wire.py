"""What clients may send: OpenAI's requests with a ``safety`` object.  Unknown fields are refused, not ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from safeside.errors import InputError
from safeside.moderation import Part, Record, Text, given_fields, text_of
from safeside.serve.rules import Name, PolicyMode
from safeside.types import MAX_STRENGTH, Message, Role

StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Tokens = Annotated[int, Field(ge=1, le=1 << 20)]
Zero = Annotated[float, Field(ge=0, le=0)]
_SEED = 2**63


_STRICT = ConfigDict(extra="forbid", frozen=True)


def _one_text(value: Any) -> Any:
    """A prompt of one text as it is; another list is refused by what is wrong with it."""
    if isinstance(value, list) and len(value) != 1:
        raise ValueError(f"expected one prompt; got a list of {len(value)}. Send a request for each, as text")
    if isinstance(value, list) and not isinstance(value[0], str):
        raise ValueError("expected a prompt of text; token ids are not taken")
    return value


class SafetyAsked(Record):
    """What a request wants of its policy: it may only be stricter, unless its key may loosen."""

    policy: Name | None = None
    """A named policy that holds as well."""
    strength: Annotated[float, Field(ge=0, le=MAX_STRENGTH, allow_inf_nan=False)] | None = None
    """The least strength; with a key that may loosen, the exact one."""
    mode: PolicyMode | None = None
    """``enforce`` lets every rule act; ``shadow`` none, and needs a key that may loosen."""
    tokens: bool = False
    """Whether risk and strength of every token are told."""


class ModerationMode(Record):
    """One side of OpenAI's inline moderation."""

    mode: Literal["score", "block"]
    """``block`` lets every rule of the policy act; ``score`` adds nothing to it."""


class ModerationSides(Record):
    """OpenAI's inline moderation of prompt and answer."""

    input: ModerationMode | None = None
    output: ModerationMode | None = None


class ModerationAsked(Record):
    """OpenAI's inline moderation: results come back in an object of the same name."""

    model: str | None = None
    """A guard that the policy asks; all of them unless given, or by the name of the served model."""
    policy: ModerationSides = ModerationSides()

    @property
    def enforces(self) -> bool:
        """Whether either side asks to block."""
        return "block" in {side.mode for side in (self.policy.input, self.policy.output) if side is not None}


class ChatMessage(Record):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=256)]
    name: str | None = None
    """Accepted for clients that send it; the template has no place for it."""
    refusal: None = None
    """Null in the answers of this server, which clients send back as the next request's history."""

    def message(self) -> Message:
        """The turn as a Message; a picture is an UnsupportedError."""
        role: Role = "system" if self.role == "developer" else self.role
        return Message(role, text_of(self.content))


class StreamOptions(Record):
    """What a stream tells besides the answer."""

    include_usage: bool = False


class Asked(BaseModel):
    """What both kinds of completions take.  A field that is null is as if it were left out."""

    model_config = _STRICT
    _without_nulls = model_validator(mode="before")(given_fields)

    model: str
    """A name of ``/v1/models``."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    max_tokens: Tokens | None = None
    seed: Annotated[int, Field(ge=-_SEED, lt=_SEED)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    n: Literal[1] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    user: str | None = None
    """Accepted and not used."""
    safety: SafetyAsked = SafetyAsked()
    moderation: ModerationAsked | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for streams; set stream to true, or leave them out")
        return self

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of the answer, where a number was given."""
        return self.max_tokens

    @property
    def n_logprobs(self) -> int | None:
        """Likeliest tokens to tell beside each; None for no logarithms."""
        return None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wanted(self) -> SafetyAsked:
        """The safety asked for, OpenAI's inline moderation taken into it."""
        enforces = self.moderation is not None and self.moderation.enforces and self.safety.mode is None
        return self.safety.model_copy(update={"mode": "enforce"}) if enforces else self.safety


class ChatRequest(Asked):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def conversation(self) -> list[Message]:
        """The turns to answer.

        One that ends with the assistant's is an InputError: guards judge a prompt where its answer begins, and an
        answer that the client has begun would hide the prompt behind words of its own.  So would a system message
        behind others.
        """
        if self.messages[-1].role == "assistant":
            raise InputError(
                "The conversation ends with an assistant's message, and answers are not begun by clients: expected a "
                "message to answer. End with a user's, or ask /v1/policies/dry-run to judge an answer that is there."
            )
        if self.messages[-1].role != "user" and len(self.messages) > 1:
            raise InputError(
                f"The conversation ends with a {self.messages[-1].role} message behind others, which stands between "
                "them and the place where guards judge: expected a message to answer. End with a user's."
            )
        return [turn.message() for turn in self.messages]

    @property
    def most_tokens(self) -> int | None:
        """OpenAI's newer name counts before the older one."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def n_logprobs(self) -> int | None:
        """As in ``Asked``; a number without the switch is an InputError."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InputError("top_logprobs was given without logprobs. Set logprobs to true, or leave it out.")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Asked):
    """``POST /v1/completions``."""

    prompt: Annotated[Text | Annotated[list[Text], Field(min_length=1, max_length=1)], BeforeValidator(_one_text)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None

    @property
    def n_logprobs(self) -> int | None:
        """As in ``Asked``."""
        return self.logprobs

    @property
    def text(self) -> str:
        """The one prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


class DryRunRequest(Record):
    """``POST /v1/policies/dry-run``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    """A prompt, or a prompt with its answer."""
    safety: SafetyAsked = SafetyAsked()


class LoadRequest(Record):
    """``POST /v1/adapters/load``; vLLM's names of the fields are taken too."""

    name: Annotated[Name, Field(validation_alias=AliasChoices("name", "lora_name"))]
    path: Annotated[str, Field(min_length=1, max_length=4096, validation_alias=AliasChoices("path", "lora_path"))]
    load_inplace: bool = False
    """Whether an adapter of this name is exchanged."""


class UnloadRequest(Record):
    """``POST /v1/adapters/unload``; vLLM's names of the fields are taken too."""

    name: Annotated[Name, Field(validation_alias=AliasChoices("name", "lora_name"))]
    lora_int_id: int | None = None
    """Accepted and not used, as by vLLM."""
