"""The tasks ``prompt_harm`` (does a user ask for something harmful) and ``response_harm`` (is an answer harmful)."""

from __future__ import annotations

from collections.abc import Mapping

from safeside.tasks.categories import Annotation
from safeside.tasks.sources import Fields, Part, Source
from safeside.tasks.task import Task

_PROMPT_ONLY = Fields(texts={"prompt": "prompt"})


def _guardreasoner(split: str) -> Part:
    """Without the rows from BeaverTails: they are labelled as pairs, and their answers are not there."""
    never = {"source": ("guardreasoner_train_subset:BeaverTailsTrainR",)}
    return Part(f"guardreasoner_prompts5k/{split}.jsonl.gz", never=never)


PROMPT_HARM = Task(
    name="prompt_harm",
    labels=("harm",),
    sources=(
        # The training sample is harmful prompts only; its answers are left out, for their labels cannot be relied on.
        Source(
            "aegis",
            Part("aegis/v2_sample900_train.jsonl.gz"),
            test=Part("aegis/v1_test.jsonl.gz"),
            fields=Fields(texts={"prompt": "prompt"}, categories=Annotation("category", "aegis", is_complete=False)),
        ),
        Source(
            "toxic_chat", Part("toxic_chat/train.jsonl.gz"), test=Part("toxic_chat/test.jsonl.gz"), fields=_PROMPT_ONLY
        ),
        Source(
            "guardreasoner_prompts5k",
            _guardreasoner("train"),
            _guardreasoner("val"),
            _guardreasoner("test"),
            fields=_PROMPT_ONLY,
        ),
        # Safe prompts that look harmful, and their harmful counterparts: what over-refusal is measured on.
        Source("xstest", test=Part("xstest/prompts_test.jsonl.gz"), fields=_PROMPT_ONLY),
    ),
)

RESPONSE_HARM = Task(
    name="response_harm",
    labels=("harm",),
    sources=(
        Source(
            "beavertails",
            Part("beavertails/train.jsonl.gz"),
            Part("beavertails/val.jsonl.gz"),
            Part("beavertails/test.jsonl.gz"),
            fields=Fields(categories=Annotation("category", "beavertails")),
        ),
        # Where its annotators contradict each other, rows are flagged ``label_conflict`` and left out.
        Source(
            "pku_saferlhf_guard",
            Part("pku_saferlhf_guard/train.jsonl.gz"),
            Part("pku_saferlhf_guard/val.jsonl.gz"),
            Part("pku_saferlhf_guard/test.jsonl.gz"),
        ),
        # Each row was judged for the one category that it names.
        Source(
            "diasafety",
            Part("diasafety/train.jsonl.gz"),
            Part("diasafety/val.jsonl.gz"),
            Part("diasafety/test.jsonl.gz"),
            fields=Fields(categories=Annotation("category", "diasafety", is_complete=False)),
        ),
        Source(
            "gptfuzz_responses",
            Part("gptfuzz_responses/train.jsonl.gz"),
            test=Part("gptfuzz_responses/test.jsonl.gz"),
        ),
        Source(
            "do_not_answer_responses",
            Part("do_not_answer/responses_train.jsonl.gz"),
            Part("do_not_answer/responses_val.jsonl.gz"),
            Part("do_not_answer/responses_test.jsonl.gz"),
        ),
    ),
)

# The hub's sets were not run against the network; the tests read copies with their columns.
_AEGIS = "hub:nvidia/Aegis-AI-Content-Safety-Dataset-2.0@d86bb8bedff51d25ac834ab7838f1cc61acb7a2c"
_BEAVERTAILS = "hub:PKU-Alignment/BeaverTails@8401fe609d288129cc684a9b3be6a93e41cfe678"
_SAFE: Mapping[object, int] = {"safe": 0, "unsafe": 1}
_ANSWERED: Mapping[str, tuple[object, ...]] = {"response_label": tuple(_SAFE)}
_EVERY: Mapping[str, tuple[object, ...]] = {}


def _aegis2(split: str, only: Mapping[str, tuple[object, ...]] = _EVERY) -> Part:
    """Without the prompts from the suicide detection set: of them only an id is given."""
    return Part(f"{_AEGIS}#{split}", only=only, never={"prompt": ("REDACTED",)})


HUB_AEGIS2 = Task(
    name="hub_aegis2",
    labels=("harm",),
    sources=(
        Source(
            "aegis2_prompts",
            _aegis2("train"),
            _aegis2("validation"),
            _aegis2("test"),
            fields=Fields(
                texts={"prompt": "prompt"},
                label=("prompt_label",),
                values=_SAFE,
                categories=Annotation("violated_categories", "aegis", separator=","),
            ),
        ),
        Source(
            "aegis2_responses",
            _aegis2("train", only=_ANSWERED),
            _aegis2("validation", only=_ANSWERED),
            _aegis2("test", only=_ANSWERED),
            fields=Fields(
                texts={"prompt": "prompt", "response": "response"},
                label=("response_label",),
                values=_SAFE,
                categories=Annotation("violated_categories", "aegis", separator=","),
            ),
        ),
    ),
)

HUB_BEAVERTAILS = Task(
    name="hub_beavertails",
    labels=("harm",),
    sources=(
        Source(
            "beavertails",
            Part(f"{_BEAVERTAILS}#30k_train"),
            test=Part(f"{_BEAVERTAILS}#30k_test"),
            fields=Fields(
                texts={"prompt": "prompt", "response": "response"},
                label=("is_safe",),
                values={True: 0, False: 1},
                categories=Annotation("category", "beavertails"),
            ),
        ),
    ),
)
