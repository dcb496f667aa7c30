"""The task ``grounding``: is a summary or answer unsupported by the document that it is about.

A claim that one part of a document supports is supported, so of a long document's windows, each with the whole claim,
the lowest score counts.  HaluEval's general part has no documents and does not belong here.
"""

from __future__ import annotations

from safeside.tasks.sources import Fields, Part, Source
from safeside.tasks.task import Task

GROUNDING = Task(
    name="grounding",
    labels=("unsupported",),
    windows="min",
    sources=(
        # Eight of ten domains.
        Source(
            "summedits",
            Part("summedits/train.jsonl.gz"),
            Part("summedits/val.jsonl.gz"),
            Part("summedits/test.jsonl.gz"),
        ),
        Source(
            "halueval_qa",
            Part("halueval/qa1k_train.jsonl.gz"),
            Part("halueval/qa1k_val.jsonl.gz"),
            Part("halueval/qa1k_test.jsonl.gz"),
        ),
        Source("qags_cnndm", test=Part("qags/cnndm_test.jsonl.gz")),
        Source("qags_xsum", test=Part("qags/xsum_test.jsonl.gz")),
        Source(
            "cliff",
            validation=Part("aggrefact_parts/cliff_val.jsonl.gz"),
            test=Part("aggrefact_parts/cliff_test.jsonl.gz"),
        ),
        Source(
            "goyal21",
            validation=Part("aggrefact_parts/goyal21_val.jsonl.gz"),
            test=Part("aggrefact_parts/goyal21_test.jsonl.gz"),
        ),
        # Whole web pages: almost every document is longer than a small base's context.
        Source("wice", validation=Part("wice/val.jsonl.gz"), test=Part("wice/test.jsonl.gz")),
    ),
)

_HUB = "hub:Salesforce/summedits@ce0c479aaf59259abb6b67e42248b2f49004b7d5#train"

# One split, in which 1 means consistent; a fifth of the documents is for the test.  Not run against the network.
HUB_SUMMEDITS = Task(
    name="hub_summedits",
    labels=("unsupported",),
    windows="min",
    sources=(
        Source(
            "summedits",
            Part(_HUB, share=(0.0, 0.8)),
            test=Part(_HUB, share=(0.8, 1.0)),
            fields=Fields(texts={"document": "doc", "summary": "summary"}, values={1: 0, 0: 1, "1": 0, "0": 1}),
        ),
    ),
)
