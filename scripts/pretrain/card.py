"""Write the built-in base's card from the files of its making: nothing in it is typed twice.

python scripts/pretrain/card.py --tokens work --log model/log.csv --samples samples.txt --model MODEL \\
    --route from-nothing
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

HEAD = """# The built-in base

An ordinary English chat model, **not trained for safety**, small enough to ship inside a Python package.  It is the
offline default for trying out and testing safety adapters: it has the shape of a chat model (turns, system role, stop
token, lists, steps) but hardly any knowledge.  Do not use it to answer real questions, and do not read research results
into it: at this size an adapter shows that the code works, not that a method does.

Licence of the weights: Apache-2.0, as the project; credit share-alike sources as in the table.
"""

FROM_NOTHING = """## Making

Made by `make builtin` (`scripts/builtin/make.py`): {layers} layers, trained from nothing in one run of {minutes}
minutes on {tokens} M tokens. Muon on the hidden matrices, AdamW on embedding and norms, bf16 autocast; warm-up,
constant, then linear to zero; the last part of the time read chat with the loss on answers weighted up. Validation:
0.5% of the documents of every source, chosen by hash.

What can be made again from the repository: everything, by the same command with the same text. The schedule follows
the clock, so another machine gives another model of the same kind, not the same bytes.

Losses are in nats per token; `bits/byte` is for the held-out text.
"""

GROWN = """## Making

The scripts are in `scripts/pretrain/` (README there: the commands). A first model of 5 layers, trained from nothing
on 20.3 M tokens of the same mixture (65 minutes on two CPU cores, 1.6072 bits per byte on the held-out text), was
grown to {layers} layers by inserting copies whose outputs start at zero, so that it computed the same function, and
trained on for {minutes} minutes ({tokens} M tokens more) on two CPU cores that other work shared: planned for 95
minutes, stopped at minute 86 and resumed with the schedule stretched to its end, because the other work had slowed it
down. Muon on the hidden matrices, AdamW on embedding and norms, bf16 autocast; warm-up, constant, then linear to
zero; the last part of the time read chat with the loss on answers weighted up. Validation: 0.5% of the documents of
every source, chosen by hash, the same text for both runs. The first line below is the grown model before training.

What can be made again from the repository: the token files, byte for byte from the same text (`prepare.py`); a model
of the same kind by the same two steps (the commands are in `scripts/pretrain/README.md`); the adapters on these
weights (`make builtin-adapters`). What cannot: these very weights, because the schedule follows the clock and the
first model is not in the repository. `make builtin` takes another route, one run from nothing, and writes its own card;
adapters and figures have to be made anew after it.

Losses are in nats per token; `bits/byte` is for the held-out text.
"""

LIMITS = """## Limits

* English only, 512 tokens, wrong or empty answers outside everyday templates, little knowledge, weak arithmetic.
* Not trained for safety, and too small to comply in substance: its answers to harmful requests are generic text.
* Books and web dialogues carry the prejudices of their sources.
* Far fewer tokens than such a model could use; a longer run (`make builtin`, best on a GPU) will give a better one.
"""

LIMITS_OF_THE_FIRST = """\
* The first model had read 12 chat documents whose questions are also in AlpacaEval or similar lists before the filter
  against evaluation questions was put in; none matched a harmful-prompt set.
"""


def data_table(meta: dict[str, dict[str, object]]) -> list[str]:
    """Sources with licences and sizes."""
    lines = ["## Data", "", "Megabytes of UTF-8 after cleaning: first phase, and second phase (chat).", ""]
    lines += ["| source | licence | documents | first phase MB | second phase MB |", "|---|---|---|---|---|"]
    for name, entry in meta.items():
        if not name.startswith("_"):
            first, second = (float(str(entry[key])) / 1e6 for key in ("pretrain_bytes", "anneal_bytes"))
            lines.append(f"| {name} | {entry['licence']} | {entry['docs']} | {first:.2f} | {second:.2f} |")
    return lines


def loss_table(rows: list[dict[str, str]]) -> list[str]:
    """One line for each checkpoint of the log."""
    lines = ["| minutes | M tokens | bits/byte | text | chat | chat, answers |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = (
            row["minutes"], f"{int(row['tokens']) / 1e6:.2f}", row["val_text_bits_per_byte"], row["val_text_nats"],
            row["val_chat_nats"], row["val_chat_assistant_nats"],
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Read the files of the run and write README.md beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help="folder that prepare.py wrote")
    parser.add_argument("--log", type=Path, required=True, help="log.csv of train.py")
    parser.add_argument("--samples", type=Path, required=True, help="what sample.py printed")
    parser.add_argument("--model", type=Path, required=True, help="folder of the packaged model")
    parser.add_argument("--route", choices=("from-nothing", "grown"), required=True, help="how it was made")
    options = parser.parse_args()
    with options.log.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    config = AutoConfig.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    last = rows[-1]
    facts = [
        "## Architecture", "", "| | |", "|---|---|", f"| class | `{type(model).__name__}` |",
        f"| parameters | {sum(parameter.numel() for parameter in model.parameters()):,}, tied embeddings |",
        f"| layers | {config.num_hidden_layers} |", f"| width | {config.hidden_size} |",
        f"| feed-forward | {config.intermediate_size} |",
        f"| attention | {config.num_attention_heads} heads, {config.num_key_value_heads} key-value heads, rotary, "
        f"context {config.max_position_embeddings} |",
        f"| tokenizer | byte-level BPE, {config.vocab_size} tokens |", "",
    ]  # fmt: skip
    making = (GROWN if options.route == "grown" else FROM_NOTHING).format(
        layers=config.num_hidden_layers, minutes=last["minutes"], tokens=f"{int(last['tokens']) / 1e6:.1f}"
    )
    limits = LIMITS + (LIMITS_OF_THE_FIRST if options.route == "grown" else "")
    samples = ["## Samples", "", "```text", options.samples.read_text(encoding="utf-8").strip(), "```", ""]
    meta = json.loads((options.tokens / "meta.json").read_text())
    parts = [HEAD, *facts, *data_table(meta), "", making, *loss_table(rows), "", limits, *samples]
    (options.model / "README.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
