"""``AdapterConfig``: every dimension of a side network, as stored in ``safeside_config.json``."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from safeside.base.fingerprint import Fingerprint
from safeside.base.model import Base
from safeside.errors import ConfigError, InputError
from safeside.types import Combine, Mode, Preset

FORMAT = 1
_MOST = 1 << 20  # of any dimension: a damaged file must not ask for terabytes
Finite = Annotated[float, Field(allow_inf_nan=False)]
HeadDim = Literal[32, 64, 128]
LADDERS = ("lst", "lst_plus")  # kinds with a width that is a multiple of a head's
Score = Annotated[Finite, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, lt=1)]
PRESET_RATES: dict[Preset, float] = {"strict": 0.05, "balanced": 0.01, "permissive": 0.001}
CONFIDENCE = 0.95  # of every promise
_MOST_ROWS = 10**9  # harmless rows that a promise may ask for
_EDGE = 1e-7  # float32 has no score nearer to 1 but 1 itself


class BaseReference(BaseModel):
    """The base that an adapter was made for, and the geometry that it relies on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """What the base was loaded by: ``builtin``, a folder or a hub name."""
    revision: str | None = None
    """Revision on the model hub, where one was given."""
    model_type: str
    """Architecture, as config.json names it."""
    fingerprint: Fingerprint
    """Hashes of architecture, tokenizer, chat template and weights; compared when the adapter is loaded."""
    n_layers: int = Field(ge=1, le=_MOST)
    """Transformer blocks, L."""
    d_model: int = Field(ge=1, le=_MOST)
    """Width of the hidden states, D."""
    is_encoder: bool = False
    """Whether the base reads both ways and takes guards only."""


class Calibration(BaseModel):
    """How a guard's raw logit becomes a score, and where it flags: ``score = sigmoid(scale * logit + bias)``.

    One entry for each label.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: tuple[Annotated[Finite, Field(gt=0)], ...]
    """Factor of the logit; positive, so that calibration never changes a ranking."""
    bias: tuple[Finite, ...]
    """Added after the factor."""
    threshold: tuple[Score, ...]
    """The label flags from this score on."""
    false_positive_rate: Rate | None = 0.05
    """Each label's threshold was set to flag at most this share of its harmless validation rows; None: a patch or
    a port carried it over, and it keeps no rate."""

    @model_validator(mode="after")
    def _check(self) -> Calibration:
        if not len(self.scale) == len(self.bias) == len(self.threshold):
            raise ValueError("scale, bias and threshold need one entry for each label")
        return self


class ProbabilityMap(BaseModel):
    """How a score of one label becomes a probability in one mode; it never falls as the score rises.

    ``platt``: ``sigmoid(slope * log(score / (1 - score)) + height)``.  ``isotonic``: linear between knots, level beyond
    them.  Decisions are made on scores, never on probabilities: the ties of an isotonic map change none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["platt", "isotonic"]
    """Logistic regression on the score's log-odds, or isotonic regression on the score."""
    slope: Finite = Field(1.0, gt=0)
    """Of ``platt``: factor of the log-odds."""
    height: Finite = 0.0
    """Of ``platt``: added after the factor."""
    knots: tuple[Score, ...] = ()
    """Of ``isotonic``: scores, rising."""
    levels: tuple[Score, ...] = ()
    """Of ``isotonic``: the probability at each knot, not falling."""
    error_before: Finite = Field(ge=0, le=1)
    """Expected calibration error on the rows of the fit before any of it: of a trained guard that of the sigmoid of its
    raw logits, elsewhere that of the scores."""
    error_after: Finite = Field(ge=0, le=1)
    """The same of the probabilities, each given to a row by a fit on other rows (five folds)."""
    n_harmless: int = Field(ge=1)
    """Harmless rows behind the fit."""
    n_harmful: int = Field(ge=1)
    """Harmful rows behind the fit.  Probabilities hold where harm is as frequent as among these rows."""

    @model_validator(mode="after")
    def _check(self) -> ProbabilityMap:
        if (self.method == "isotonic") != bool(self.knots) or len(self.knots) != len(self.levels):
            raise ValueError("an isotonic map has knots and a level for each, and no other has any")
        if list(self.knots) != sorted(set(self.knots)) or list(self.levels) != sorted(self.levels):
            raise ValueError("knots must rise, and levels must not fall")
        return self

    def probabilities(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """The probability in [0, 1] of each score in [0, 1], in its shape; NaN stays NaN."""
        if self.method == "isotonic":
            return np.where(np.isnan(scores), np.nan, np.interp(scores, self.knots, self.levels))
        return 0.5 + 0.5 * np.tanh((self.slope * log_odds(scores) + self.height) / 2)  # a sigmoid without overflow


def log_odds(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """``log(score / (1 - score))``, finite at 0 and 1 too."""
    inside = np.clip(np.asarray(scores, dtype=np.float64), _EDGE, 1 - _EDGE)
    odds: NDArray[np.float64] = np.log(inside) - np.log1p(-inside)
    return odds


class Promise(BaseModel):
    """Thresholds whose false-positive rate is promised, by label.

    With probability ``confidence`` over the draw of the calibration rows, at most ``false_positive_rate`` of the
    harmless texts that come as those rows came are flagged under that label.  Each label is promised by itself: under
    one or more of K labels up to K times as many can be flagged.  A stream's promise is of whole answers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: tuple[Score, ...]
    """The label flags from this score on."""
    false_positive_rate: Rate
    """The promised rate."""
    confidence: Rate = CONFIDENCE
    """How sure the promise is."""


class ModeCalibration(BaseModel):
    """What is known of a guard's scores in one reading mode."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_harmless: int = Field(ge=0)
    """Harmless rows behind the thresholds; of several labels the fewest.  ``calibrate`` counts each text once."""
    promise: Promise | None = None
    """Thresholds of this mode when no preset is chosen; without them the guard's own ``threshold`` holds."""
    held: tuple[Score, ...] = ()
    """Without a promise: thresholds that stand in for the guard's own, carried over by a patch or a port."""
    presets: dict[Preset, Promise] = {}
    """Thresholds by preset; one that ``n_harmless`` rows cannot promise is left out."""
    maps: tuple[ProbabilityMap, ...] = ()
    """From score to probability, one for each label; none where too few rows of both kinds were given."""
    n_consecutive: int | None = Field(None, ge=1, le=_MOST)
    """Of ``stream``, and of no other mode: so many tokens in a row from the threshold on stop an answer.

    Of several labels the highest score counts, so a stream's thresholds are the same for all.
    """

    def of_preset(self, preset: Preset | None) -> Promise | None:
        """The thresholds of a preset, or without one those of the mode; None where there are none."""
        return self.promise if preset is None else self.presets.get(preset)

    @property
    def promises(self) -> dict[str, Promise]:
        """Its promise as ``default``, where it has one, and those of its presets."""
        own = {} if self.promise is None else {"default": self.promise}
        return {**own, **{str(preset): promise for preset, promise in self.presets.items()}}

    @property
    def is_by_label(self) -> bool:
        """Whether each of several labels is promised by itself; a stream's thresholds are of all labels together."""
        return self.n_consecutive is None and max(self.n_labels, default=0) > 1

    @property
    def n_labels(self) -> set[int]:
        """How many labels its parts have: one number if they agree."""
        promised = {len(promise.threshold) for promise in self.promises.values()}
        return promised | {len(part) for part in (self.maps, self.held) if part}

    @property
    def summary(self) -> str:
        """Thresholds and errors in one line, for people."""
        by_label = " under each label" if self.is_by_label else ""
        promises = [
            f"{name} {', '.join(f'{value:.4f}' for value in promise.threshold)} (at most "
            f"{promise.false_positive_rate:.3g} of harmless texts flagged{by_label})"
            for name, promise in self.promises.items()
        ]
        held = [f"held {', '.join(f'{value:.4f}' for value in self.held)} (no promise)"] if self.held else []
        rule = [] if self.n_consecutive is None else [f"{self.n_consecutive} tokens in a row stop an answer"]
        errors = [
            f"ECE {fit.error_before:.3f} before, {fit.error_after:.3f} after ({fit.method}, on {fit.n_harmless:,} "
            f"harmless and {fit.n_harmful:,} harmful rows)"
            for fit in self.maps
        ]
        return "; ".join([*rule, *held, *(promises or ["no preset"]), f"{self.n_harmless:,} harmless rows", *errors])


class AdapterConfig(BaseModel):
    """Everything needed to rebuild a side network around its weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    """Version of this file; older ones load forever, a newer one is refused."""
    kind: str
    """Architecture of the side network: a registered adapter kind."""
    role: Literal["guard", "align"]
    """``guard`` gives scores, ``align`` gives a delta to the base's final state."""
    name: str = Field(min_length=1)
    """What verdicts, strengths and policies call the adapter; unique within an attachment."""
    layers: tuple[int, ...]
    """Tapped layers, rising: 0 is the embedding, l the output of block l, L the last block before the final norm."""
    width: int = Field(0, ge=0, le=_MOST)
    """Side width d; 0 for kinds without one (``rtb``) and for a linear probe (``plr``)."""
    feed_forward: int = Field(0, ge=0, le=_MOST)
    """Hidden width of an ``lst`` block's feed-forward; 0 means about 8/3 of ``width``."""
    head_dim: HeadDim = 32
    """Width of one attention head of ``lst``; it divides ``width``."""
    query_group: int = Field(1, ge=1, le=_MOST, strict=True, exclude_if=lambda size: size == 1)
    """Heads of queries that share one of keys and values: the ladder's part of the cache is so many times smaller.

    So many heads divide ``width``.  Files and hashes of adapters without groups are as before there were any.
    """
    tap_rank: int = Field(0, ge=0, le=_MOST)
    """Rank of the down-projections of tapped states; 0 means full rank."""
    gate: Literal["layer", "channel"] = "layer"
    """Whether ``lst`` learns one gate for each tapped layer, or one for each of its channels."""
    bottleneck: int = Field(32, ge=1, le=_MOST)
    """Hidden width of ``rtb``'s token-wise networks; rank of ``state_map``."""
    cross_attention: bool = False
    """Whether ``lst_plus`` lets each token choose among the tapped layers by attention."""
    depth: int = Field(0, ge=0, le=_MOST)
    """Blocks of the base that ``toplayers`` duplicates, from the top."""
    lora_rank: int = Field(0, ge=0, le=_MOST)
    """Rank of ``toplayers``' updates to the base's own weights; 0 gives it weights of its own."""
    blocks: dict[str, Any] = {}
    """The base's own configuration, for ``toplayers``: what its blocks are built from."""
    readout: Literal["last", "attention"] = "last"
    """A guard reads the newest token's side state, or an attention-weighted mean of all so far."""
    labels: tuple[str, ...] = ()
    """Names of a guard's K outputs, each a risk of its own; none for an aligner."""
    windows: Combine | tuple[Combine, ...] = "max"
    """Of a guard: whether the highest score of a long text's windows counts, or the lowest (grounding); one for each
    label where they differ.
    """
    base: BaseReference
    """The base that it reads."""
    calibration: Calibration | None = None
    """How logits become scores; none until a guard is calibrated (then sigmoid, and thresholds of 0.5)."""
    modes: dict[Mode, ModeCalibration] = {}
    """A guard's calibration by reading mode; a mode that is not there uses ``calibration``."""
    preset: Preset | None = None
    """Whose thresholds hold; without one each mode's own, or those of ``calibration``."""
    allow_mismatch: bool = False
    """Set on loading: the base has other weights or another chat template than the adapter was trained with."""

    @property
    def width_step(self) -> int:
        """What a ladder's width is a multiple of: one group of heads."""
        return self.head_dim * self.query_group

    @property
    def windows_by_label(self) -> tuple[Combine, ...]:
        """(K,) which score of a long text's windows counts for each label."""
        return self.windows if isinstance(self.windows, tuple) else (self.windows,) * len(self.labels)

    @model_validator(mode="after")
    def _check(self) -> AdapterConfig:
        if self.role == "guard" and not self.labels:
            raise ValueError("a guard needs at least one label; add labels = ['harm']")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels must differ; got {self.labels}")
        if self.role == "align" and self.labels:
            raise ValueError("an aligner has no labels; remove them")
        if len(self.windows_by_label) != len(self.labels):
            raise ValueError(f"windows has {len(self.windows_by_label)} entries for {len(self.labels)} labels")
        if self.role == "align" and self.base.is_encoder:
            raise ValueError("an encoder has no next-token distribution to align; use a causal language model")
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must be rising and not empty; got {self.layers}")
        if self.layers[0] < 0 or self.layers[-1] > self.base.n_layers:
            raise ValueError(f"layers must lie in 0..{self.base.n_layers}; got {self.layers}")
        if self.kind in LADDERS and (self.width == 0 or self.width % self.width_step):
            shared = "" if self.query_group == 1 else f" times query_group {self.query_group}"
            raise ValueError(f"width must be a multiple of head_dim {self.head_dim}{shared}; got {self.width}")
        self._check_top()
        if self.calibration is not None and len(self.calibration.scale) != len(self.labels):
            raise ValueError(f"calibration has {len(self.calibration.scale)} entries for {len(self.labels)} labels")
        for mode, found in self.modes.items():
            if wrong := found.n_labels - {len(self.labels)}:
                raise ValueError(f"modes.{mode} has {min(wrong)} entries for {len(self.labels)} labels")
            if mode != "stream" and found.n_consecutive is not None:
                raise ValueError(f"modes.{mode} has n_consecutive, which is for the mode stream alone")
        if self.preset is not None and not any(self.preset in found.presets for found in self.modes.values()):
            raise ValueError(f"preset {self.preset!r} is in none of the modes")
        return self

    def _check_top(self) -> None:
        """What kinds that read the base's last blocks ask for."""
        top = self.base.n_layers
        if self.kind in ("lst_plus", "state_map") and self.layers[-1] != top:
            raise ValueError(f"{self.kind} reads the base's last state: layers must end with {top}; got {self.layers}")
        if self.kind != "toplayers":
            return
        if not 1 <= self.depth <= top or self.layers != (top - self.depth,):
            raise ValueError(
                f"toplayers of depth {self.depth} needs a depth in 1..{top} and layers ({top} - depth,); got "
                f"{self.layers}"
            )
        if not self.blocks:
            raise ValueError("toplayers needs the base's own configuration in blocks; make it with make_config(base)")


def rows_needed(false_positive_rate: float, confidence: float = CONFIDENCE) -> int:
    """The fewest harmless rows that can promise a rate: 59 for 5%, 299 for 1%, 2,995 for 0.1% at 95% confidence.

    With fewer, a guard that flags none of them may still flag more than ``false_positive_rate`` of all others.  A rate
    that takes more than a billion is an InputError, and so is one outside (0, 1).
    """
    if not (0 < false_positive_rate < 1 and 0 < confidence < 1):
        raise InputError(f"A rate and a confidence lie between 0 and 1; got {false_positive_rate} and {confidence}.")
    needed = math.log1p(-confidence) / math.log1p(-false_positive_rate)
    if needed > _MOST_ROWS:
        raise InputError(
            f"A false-positive rate of {false_positive_rate} cannot be promised: with {confidence:.0%} confidence it "
            f"takes more than {_MOST_ROWS:,} harmless rows. Ask for a higher rate: 0.001, for example."
        )
    return math.ceil(needed)


def reference_of(base: Base) -> BaseReference:
    """The reference that ties an adapter to ``base``."""
    return BaseReference(
        name=base.name,
        revision=base.revision,
        model_type=base.model.config.model_type,
        fingerprint=base.fingerprint,
        n_layers=base.n_layers,
        d_model=base.d_model,
        is_encoder=base.is_encoder,
    )


def require_valid(values: dict[str, object]) -> AdapterConfig:
    """An AdapterConfig from plain values; whatever is wrong becomes one ConfigError."""
    try:
        return AdapterConfig.model_validate(values)
    except ValueError as error:
        raise ConfigError(f"Not a valid adapter configuration: {error}") from error
