"""The task ``hate``: is a statement hateful, or offensive, towards people.

What counts differs between the sources, and so do their sizes: figures belong to one source each.
"""

from __future__ import annotations

from safeside.tasks.sources import Fields, Part, Source
from safeside.tasks.task import Task


def _toxigen(split: str) -> Part:
    return Part("toxigen/train.jsonl.gz", only={"derived_split": (split,)})


HATE = Task(
    name="hate",
    labels=("hate",),
    sources=(
        # The official test file is not to be had in the mirror: ``test`` is its SafeNLP proxy, which keeps statements
        # that annotators agreed on and is easier.  The second test set comes from where the training rows come from.
        Source("toxigen", _toxigen("train"), _toxigen("val"), Part("toxigen/test.jsonl.gz")),
        Source("toxigen_in_distribution", test=_toxigen("test")),
        Source(
            "implicit_hate",
            Part("implicit_hate/train.jsonl.gz"),
            Part("implicit_hate/val.jsonl.gz"),
            Part("implicit_hate/test.jsonl.gz"),
        ),
        # Hateful or offensive; five of six tweets are.
        Source(
            "davidson",
            Part("davidson/train.jsonl.gz"),
            Part("davidson/val.jsonl.gz"),
            Part("davidson/test.jsonl.gz"),
        ),
        Source("ethos", Part("ethos/train.jsonl.gz"), Part("ethos/val.jsonl.gz"), Part("ethos/test.jsonl.gz")),
        Source("stormfront", Part("stormfront_hate/train.jsonl.gz"), test=Part("stormfront_hate/test.jsonl.gz")),
    ),
)

_HUB = "hub:toxigen/toxigen-data:annotated@ea082a8973a287097b17973343576e0c8da8eb3b"

# The authors' rule: toxic when the two ratings of 1 to 5 add up to more than 5.5.  Not run against the network.
HUB_TOXIGEN = Task(
    name="hub_toxigen",
    labels=("hate",),
    sources=(
        Source(
            "toxigen",
            Part(f"{_HUB}#train"),
            test=Part(f"{_HUB}#test"),
            fields=Fields(texts={"text": "text"}, label=("toxicity_human", "toxicity_ai"), above=5.5),
        ),
    ),
)
