#!/usr/bin/env python3
"""Train a tiny chat base model on the files that prepare.py wrote and export it in Hugging Face format.

Plain LlamaForCausalLM, packed rows, bf16 autocast.  Muon trains the hidden matrices, AdamW the tied embedding
and the norms.  Learning rate: warm-up, constant, linear to zero.  The first phase reads the pretraining
mixture, the second the chat data with the loss on assistant tokens weighted up.  The schedule follows the
clock, so every run ends on time; a crash loses at most --save-minutes, and --resume goes on.
"""

import argparse
import csv
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from losses import bits_per_byte, validate, weighted_losses
from model import Shape, build, export
from processes import Processes
from rows import Batch, Rows, stack
from transformers import AutoTokenizer

LOG_COLUMNS = [
    "minutes",
    "step",
    "tokens",
    "phase",
    "lr_scale",
    "train_nats",
    "val_text_nats",
    "val_text_bits_per_byte",
    "val_chat_nats",
    "val_chat_assistant_nats",
    "tokens_per_second",
]


@dataclass
class Progress:
    """How far a run is; ``seconds`` counts training without its first step, which compiles."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=Path("work"), help="folder that prepare.py wrote")
    add("--out", type=Path, default=Path("model"))
    add("--minutes", type=float, default=64.0, help="training time, after compilation")
    add("--max-steps", type=int, default=0, help="stop early (benchmarks)")
    add("--save-minutes", type=float, default=5.0)
    add("--resume", action="store_true", help="go on from OUT/state.pt, if there is one")
    add("--seed", type=int, default=0)
    add("--no-compile", action="store_true")
    add_shape_options(parser)
    add_recipe_options(parser)
    return parser.parse_args(arguments)


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """The options of the network and its rows."""
    add = parser.add_argument_group("model").add_argument
    add(
        "--init",
        dest="initial",
        help="start from this exported model; layers that it lacks begin without effect",
    )
    add("--hidden", type=int, default=256)
    add("--layers", type=int, default=5)
    add("--ffn", dest="feed_forward", type=int, default=0, help="0: 2.75 x hidden")
    add("--head-dim", type=int, default=64)
    add("--kv-heads", type=int, default=2)
    add("--ctx", dest="context", type=int, default=512, help="tokens in a row")
    add(
        "--ctx1",
        dest="first_context",
        type=int,
        default=256,
        help="tokens in a row of the first phase (attention is slow on CPUs)",
    )


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """The options of the optimisation."""
    add = parser.add_argument_group("recipe").add_argument
    add("--batch", type=int, default=24, help="rows of --ctx tokens in a step, over all processes")
    add("--micro", type=int, default=4, help="rows of --ctx tokens in a forward pass")
    add("--muon-lr", type=float, default=0.02)
    add("--adam-lr", type=float, default=0.004)
    add("--weight-decay", type=float, default=0.05)
    add("--warmup", type=float, default=0.01, help="share of the time in which the rate rises")
    add("--decay-from", type=float, default=0.55, help="share of the time after which the rate falls to zero")
    add("--anneal-from", type=float, default=0.70, help="share of the time after which chat data is read")
    add("--replay", type=float, default=0.10, help="share of pretraining rows kept in the chat phase")
    add(
        "--user-weight",
        type=float,
        default=0.15,
        help="loss weight of tokens outside assistant turns in the chat phase",
    )
    add("--zloss", type=float, default=1e-5)


def rate_scale(options: argparse.Namespace, share: float) -> float:
    """The learning rate at ``share`` of the time, as a share of its peak."""
    if share < options.decay_from:
        return min(1.0, (share + 1e-4) / options.warmup)
    return max(0.0, (1 - share) / (1 - options.decay_from))


class Trainer:
    """One process of a run."""

    def __init__(self, options: argparse.Namespace, processes: Processes) -> None:
        """Build the model, load the state if the run resumes, and open the token files."""
        self.options = options
        self.processes = processes
        self.progress = Progress()
        self.average_loss = float("nan")
        self.tokens_per_second = 0.0
        torch.manual_seed(options.seed)
        self.tokenizer = AutoTokenizer.from_pretrained(options.data / "tokenizer")
        shape = Shape(
            hidden=options.hidden,
            layers=options.layers,
            feed_forward=options.feed_forward,
            head=options.head_dim,
            key_value_heads=options.kv_heads,
            context=options.context,
        )
        self.model = build(shape, self.tokenizer, options.initial).to(processes.device)
        self.losses = weighted_losses if options.no_compile else torch.compile(weighted_losses, dynamic=False)
        self.make_optimizers()
        self.state_path = options.out / "state.pt"
        if options.resume and self.state_path.exists():
            self.load_state()
        self.open_files()

    def make_optimizers(self) -> None:
        """Muon for the matrices of the layers, AdamW for the rest."""
        named = list(self.model.named_parameters())
        is_matrix = {name: parameter.ndim == 2 and "embed" not in name for name, parameter in named}
        matrices = [parameter for name, parameter in named if is_matrix[name]]
        others = [parameter for name, parameter in named if not is_matrix[name]]
        self.parameters = matrices + others
        self.peak_rates = [self.options.muon_lr, self.options.adam_lr]
        self.optimizers = [
            torch.optim.Muon(
                matrices,
                lr=self.options.muon_lr,
                momentum=0.95,
                nesterov=True,
                weight_decay=self.options.weight_decay,
            ),
            torch.optim.AdamW(others, lr=self.options.adam_lr, betas=(0.9, 0.95), eps=1e-9, weight_decay=0.0),
        ]

    def open_files(self) -> None:
        """Open the files of the first phase and of validation; a resumed run reads in a new order."""
        self.seed = self.options.seed + self.progress.step
        self.mixing = np.random.default_rng(self.seed + 2 + self.processes.rank)
        self.pretrain = self.rows("pretrain", self.options.first_context, self.seed + 1)
        self.anneal: Rows | None = None
        context = self.options.context
        self.validation = {name: Rows(self.options.data / name, context, 0) for name in ("val_text", "val_chat")}
        text = json.loads((self.options.data / "meta.json").read_text())["_val_text"]
        self.bytes_per_token = text["bytes"] / text["tokens"]

    def rows(self, name: str, context: int, seed: int) -> Rows:
        """This process's share of a token file."""
        return Rows(self.options.data / name, context, seed, self.processes.rank, self.processes.world)

    @property
    def minutes(self) -> float:
        """Training time so far."""
        return self.progress.seconds / 60

    @property
    def share(self) -> float:
        """How much of the time is over."""
        return self.progress.seconds / (self.options.minutes * 60)

    @property
    def is_finished(self) -> bool:
        """Whether the time is up or the last step is done."""
        limit = self.options.max_steps
        return self.share >= 1 or bool(limit and self.progress.step >= limit)

    @property
    def phase(self) -> int:
        """1 while the chat data is closed, then 2."""
        return 1 if self.anneal is None else 2

    @property
    def passes(self) -> int:
        """Forward passes of this process in a step."""
        return max(1, self.options.batch // (self.options.micro * self.processes.world))

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all processes in a step."""
        return self.passes * self.options.micro * self.processes.world * self.options.context

    def run(self) -> None:
        """Train until the time is up, with checkpoints on the way and at the end."""
        if self.processes.is_first:
            self.options.out.mkdir(parents=True, exist_ok=True)
            n_parameters = sum(parameter.numel() for parameter in self.parameters)
            print(
                f"{n_parameters / 1e6:.2f} M parameters, {self.processes.world} process(es), "
                f"{self.pretrain.count} pretraining rows",
                flush=True,
            )
            if not self.progress.step:
                self.log(LOG_COLUMNS)
                if self.options.initial:
                    self.checkpoint(0.0)
        saved_at, last_time = self.minutes, None
        while not self.is_finished:
            if self.share >= self.options.anneal_from and self.anneal is None:
                self.open_chat()
            scale = rate_scale(self.options, self.share)
            self.step(scale)
            last_time = self.tick(last_time)
            if self.processes.is_first:
                self.report(scale)
                if self.minutes - saved_at >= self.options.save_minutes and not self.is_finished:
                    self.checkpoint(scale)
                    saved_at = self.minutes
        if self.processes.is_first:
            self.checkpoint(0.0)
            print("done", flush=True)

    def open_chat(self) -> None:
        """Begin the second phase: chat rows, and longer rows of the pretraining mixture."""
        self.anneal = self.rows("anneal", self.options.context, self.seed + 3)
        self.pretrain = self.rows("pretrain", self.options.context, self.seed + 4)

    def next_batch(self) -> Batch:
        """Rows of one kind with the weights that the phase gives their tokens."""
        micro = self.options.micro
        if self.anneal is None:
            micro = micro * self.options.context // self.options.first_context
        if self.anneal is None or self.mixing.random() < self.options.replay:
            batch = stack([self.pretrain.next() for _ in range(micro)], self.processes.device)
            return batch._replace(weights=torch.ones_like(batch.weights))
        batch = stack([self.anneal.next() for _ in range(micro)], self.processes.device)
        return batch._replace(weights=torch.where(batch.weights > 0, 1.0, self.options.user_weight))

    def step(self, scale: float) -> None:
        """One optimiser step at ``scale`` of the peak learning rates."""
        total_loss = total_weight = 0.0
        for _ in range(self.passes):
            batch = self.next_batch()
            with torch.autocast(self.processes.device.type, torch.bfloat16):
                cross_entropy, z_loss = self.losses(self.model, batch)
            weight = float(batch.weights.sum())
            n_passes = self.passes * self.processes.world
            ((cross_entropy + self.options.zloss * z_loss) / (weight * n_passes)).backward()
            total_loss += float(cross_entropy.detach())
            total_weight += weight
        self.processes.add_gradients(self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, peak in zip(self.optimizers, self.peak_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        self.progress.step += 1
        self.progress.tokens += self.tokens_per_step
        loss = total_loss / total_weight
        known = self.average_loss
        self.average_loss = loss if math.isnan(known) else 0.95 * known + 0.05 * loss

    def tick(self, last_time: float | None) -> float:
        """Add the time since ``last_time``, as the first process measured it, and return the time."""
        now = time.time()
        if last_time is not None:
            self.progress.seconds += now - last_time
            speed = self.tokens_per_step / (now - last_time)
            known = self.tokens_per_second
            self.tokens_per_second = 0.9 * known + 0.1 * speed if known else speed
        self.progress.seconds = self.processes.from_first(self.progress.seconds)
        return now

    def report(self, scale: float) -> None:
        """Print one line for the first steps and for every twentieth."""
        progress = self.progress
        if progress.step <= 5 or progress.step % 20 == 0:
            print(
                f"{self.minutes:6.2f} min step {progress.step} tokens {progress.tokens / 1e6:.2f}M "
                f"phase {self.phase} lr x{scale:.3f} loss {self.average_loss:.4f} "
                f"{self.tokens_per_second:.0f} tok/s",
                flush=True,
            )

    def checkpoint(self, scale: float) -> None:
        """Validate, add a line to log.csv, export the model and save the state."""
        micro = self.options.micro
        text = validate(self.model, self.validation["val_text"], micro)
        chat = validate(self.model, self.validation["val_chat"], micro)
        line = [
            f"{self.minutes:.2f}",
            self.progress.step,
            self.progress.tokens,
            self.phase,
            f"{scale:.4f}",
            f"{self.average_loss:.4f}",
            f"{text.nats:.4f}",
            f"{bits_per_byte(text.nats, self.bytes_per_token):.4f}",
            f"{chat.nats:.4f}",
            f"{chat.assistant_nats:.4f}",
            f"{self.tokens_per_second:.0f}",
        ]
        print("EVAL", *line, flush=True)
        self.log(line)
        export(self.model, self.tokenizer, self.options.out)
        self.save_state()

    def log(self, line: Sequence[str | int]) -> None:
        """Add a line to log.csv."""
        with (self.options.out / "log.csv").open("a", newline="") as file:
            csv.writer(file).writerow(line)

    def save_state(self) -> None:
        """Write state.pt; a process killed in the middle leaves the one before."""
        state = {
            "model": self.model.state_dict(),
            "opts": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.progress.step,
            "seen": self.progress.tokens,
            "elapsed": self.progress.seconds,
        }
        unfinished = self.state_path.with_suffix(".part")
        torch.save(state, unfinished)
        os.replace(unfinished, self.state_path)

    def load_state(self) -> None:
        """Go back to what ``save_state`` wrote."""
        state = torch.load(self.state_path, map_location=self.processes.device)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["opts"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(state["step"], state["seen"], state["elapsed"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, as one process or as one of those that torchrun started."""
    processes = Processes()
    Trainer(parse(arguments), processes).run()
    processes.leave()


if __name__ == "__main__":
    main()
