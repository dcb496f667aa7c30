"""What the sections of the alignment page read: a result file, and how methods and policies look."""

from __future__ import annotations

from dataclasses import dataclass

from part_sections import GREEN, SECOND
from safeside.evals.pictures import BLUE, GREY, RED
from tidy import Row

# One colour and stroke for each method; ours are solid, baselines dashed, single points of other ways black.
METHODS = {
    "lst": (BLUE, "-"),
    "lst_plus": ("#5b9bd5", "-"),
    "toplayers": (GREEN, "-"),
    "state_map": ("#7fb800", "-"),
    "lora_dpo": (RED, "--"),
    "lora_sft": (SECOND, "--"),
    "lora_top": ("#e6a5a0", "--"),
    "system_prompt": ("#1c2430", ":"),
    "safe_decoding": ("#7b5ea7", ":"),
    "guard_canned": (GREY, ":"),
}
KINDS = ("lst", "lst_plus", "toplayers", "state_map")
POLICIES = {
    "fixed": ("untargeted", GREY),
    "targeted_step": ("targeted, step", BLUE),
    "targeted_ramp": ("targeted, ramp", "#5b9bd5"),
    "oracle": ("targeted, oracle", GREEN),
}
RATES = {
    "harmful_rate": ("harmful rate", "strongreject"),
    "utility": ("utility", "helpful"),
    "over_refusal": ("over-refusal", "benign"),
}
GOAL_TEXTS = {
    "harm_reduction": "at least {:.2f}",
    "utility": "at least {:.2f}",
    "over_refusal_change": "at most {:.2f}",
    "utility_minus_lora_dpo": "at least {:.0f}, interval beside it",
}


@dataclass(frozen=True, slots=True)
class Page:
    """A result file of the alignment benchmark."""

    rows: list[Row]
    notes: dict[str, object]

    def of(self, **wanted: object) -> list[Row]:
        """The rows with these columns, without those of the headline."""
        return [
            row
            for row in self.rows
            if "headline" not in row and all(row.get(column) == value for column, value in wanted.items())
        ]

    def figure(self, metric: str, suite: str, **wanted: object) -> list[Row]:
        """The rows of a figure that stand for one setting, a row for each seed."""
        return self.of(metric=metric, suite=suite, **wanted)

    def strengths(self, method: str, policy: str) -> list[float]:
        """Those at which rate, utility and over-refusal were all measured."""
        found = [
            {float(str(row["strength"])) for row in self.figure(metric, suite, method=method, policy=policy)}
            for metric, (_, suite) in RATES.items()
        ]
        return sorted(set.intersection(*found))

    @property
    def chosen(self) -> dict[str, object]:
        """The headline's setting; empty where none was chosen."""
        choice = self.notes.get("choice")
        return choice if isinstance(choice, dict) else {}
