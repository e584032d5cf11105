# Copyright 2026 The specblock_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Training a drafter: deterministic batches, a resumable loop, a log that can be plotted."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm.auto import tqdm

from ..drafter import TokenTable
from .arguments import DrafterTrainingArguments
from .data import Example
from .features import TargetView
from .objective import TargetBatch


NEIGHBOURS = 256  # conversations of similar length among which batches are mixed anew in every epoch


def batches_of_epoch(examples: Sequence[Example], batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of one epoch's batches: neighbours in length, in an order that only `seed` and `epoch` decide."""
    rng = random.Random(f"{seed}-{epoch}")
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    for first in range(0, len(order), NEIGHBOURS):
        window = order[first : first + NEIGHBOURS]
        rng.shuffle(window)
        order[first : first + NEIGHBOURS] = window
    batches: list[list[int]] = []
    batch: list[int] = []
    longest = 0
    for index in order:
        longest = max(longest, len(examples[index].input_ids))
        if batch and longest * (len(batch) + 1) > batch_tokens:
            batches.append(batch)
            batch, longest = [], len(examples[index].input_ids)
        batch.append(index)
    batches.append(batch)
    rng.shuffle(batches)
    return batches


def draft_vocabulary(examples: Sequence[Example], size: int, vocab_size: int) -> tuple[torch.LongTensor, float]:
    """
    The most frequent tokens of the answers, and the share of the answers' tokens that they cover.

    Args:
        examples (`Sequence[Example]`): Training conversations.
        size (`int`): Tokens to choose; if fewer occur, the lowest other ids (bytes, punctuation) fill up.
        vocab_size (`int`): Of the target.
    """
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for example in examples:
        answer = torch.tensor(example.input_ids[example.answer_start :])
        counts.index_add_(0, answer, torch.ones_like(answer))
    ids = counts.sort(descending=True, stable=True).indices[:size]
    return ids.sort().values, (counts[ids].sum() / counts.sum()).item()


def collate(
    examples: Sequence[Example], views: Sequence[TargetView], table: TokenTable, draft_ids: torch.LongTensor
) -> TargetBatch:
    """
    Pad conversations and the target's view of them into one batch.

    Args:
        examples (`Sequence[Example]`): B conversations.
        views (`Sequence[TargetView]`): The target's view of each.
        table (`TokenTable`): The target's embedding.
        draft_ids (`torch.LongTensor` of shape `[vocab_size]`): Draft id of every target id, -1 outside the draft
            vocabulary.
    """
    lengths = torch.tensor([len(e.input_ids) for e in examples])
    shape = (len(examples), int(lengths.max()))
    top_k = views[0].top_ids.shape[1]
    tokens = torch.zeros(shape, dtype=torch.long)
    features = torch.zeros(*shape, views[0].features[0].numel(), dtype=views[0].features.dtype)
    top_ids = torch.full((*shape, top_k), -1, dtype=torch.long)
    top_probs = torch.zeros(*shape, top_k)
    scored = torch.zeros(shape, dtype=torch.bool)
    for row, (example, view) in enumerate(zip(examples, views, strict=True)):
        length = len(example.input_ids)
        answer = slice(example.answer_start, length)
        tokens[row, :length] = torch.tensor(example.input_ids)
        features[row, :length] = view.features.flatten(1)
        top_ids[row, answer] = draft_ids[view.top_ids.long().cpu()]
        top_probs[row, answer] = view.top_probs
        scored[row, answer] = True
    device = table.device
    with torch.no_grad():
        embeds = table.embed(tokens.to(device))
    return TargetBatch(
        tokens.to(device),
        embeds,
        features.to(device),
        lengths.to(device),
        top_ids.to(device),
        top_probs.to(device),
        scored.to(device),
        table,
    )


class DrafterTrainer:
    """
    Trains a drafter on conversations that the target has written.

    Args:
        drafter (`TreeDrafter`): Any drafter with a `loss`; trained in place.
        table (`TokenTable`): The target's embedding and head.
        examples (`Sequence[Example]`): Training conversations.
        views (`Callable`): Gives the target's views of a list of indices into `examples`.
        args ([`DrafterTrainingArguments`]): How to train.
        evaluate (`Callable`, *optional*): Called with the drafter; gives a dictionary of numbers for the log.
    """

    def __init__(
        self,
        drafter,
        table: TokenTable,
        examples: Sequence[Example],
        views: Callable[[list[int]], list[TargetView]],
        args: DrafterTrainingArguments,
        evaluate: Callable[[torch.nn.Module], dict[str, float]] | None = None,
    ):
        if not examples:
            raise ValueError("there is no conversation to train on; give more answers or hold fewer of them out.")
        self.drafter = drafter
        self.table = table
        self.examples = examples
        self.views = views
        self.args = args
        self.evaluate = evaluate
        self.folder = Path(args.output_dir)
        steps_an_epoch = len(batches_of_epoch(examples, args.batch_tokens, args.seed, 0))
        self.total_steps = max(1, round(steps_an_epoch * args.epochs))
        self.optimizer = torch.optim.AdamW(
            drafter.parameters_of("full"), lr=args.learning_rate, betas=args.betas, weight_decay=0.0, fused=True
        )
        self.step = 0
        self.tokens_seen = 0
        self.read_draft_vocabulary()

    def read_draft_vocabulary(self) -> None:
        """Keep the draft id of every target id on the CPU, where batches are made; -1 outside the draft vocabulary."""
        self.draft_ids = torch.full((self.table.vocab_size,), -1, dtype=torch.long)
        self.draft_ids[self.drafter.draft_to_target.cpu()] = torch.arange(self.drafter.config.draft_vocab_size)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero."""
        warmup = max(1, round(self.args.warmup_ratio * self.total_steps))
        if step < warmup:
            return self.args.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.total_steps - warmup)
        return self.args.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def train(self) -> None:
        """
        Train to the end, from the newest checkpoint in the output folder if there is one; saves the drafter
        there.
        """
        self.resume()
        self.drafter.train()
        with tqdm(total=self.total_steps, initial=self.step, desc="training", unit="step") as bar:
            started, window = time.perf_counter(), []
            for indices in self.batches_from(self.step):
                window.append(self.train_step(indices))
                self.step += 1
                bar.update()
                if self.step % self.args.log_steps == 0 or self.step == self.total_steps:
                    self.log(window, time.perf_counter() - started, bar)
                    started, window = time.perf_counter(), []
                if self.evaluate and (self.step % self.args.eval_steps == 0 or self.step == self.total_steps):
                    self.write({"step": self.step, "tokens": self.tokens_seen, **self.evaluation()})
                    started = time.perf_counter()
                if self.step % self.args.save_steps == 0 or self.step == self.total_steps:
                    self.save()
        self.drafter.eval()
        self.drafter.save_pretrained(self.folder / "final")

    def batches_from(self, step: int) -> Iterator[list[int]]:
        """The batches from `step` on; they follow from the step alone, so a resumed run sees the very same ones."""
        passed = 0
        for epoch in itertools.count():
            for batch in batches_of_epoch(self.examples, self.args.batch_tokens, self.args.seed, epoch):
                if passed == self.total_steps:
                    return
                if passed >= step:
                    yield batch
                passed += 1

    def train_step(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """One optimiser step on one batch; returns what the drafter's loss returned."""
        args = self.args
        examples = [self.examples[i] for i in indices]
        batch = collate(examples, self.views(indices), self.table, self.draft_ids)
        joined = self.step >= args.rank_start_ratio * self.total_steps
        rng = random.Random(f"{args.seed}-cuts-{self.step}")
        cuts = [rng.randint(1, self.drafter.config.block_size) for _ in range(args.num_blocks - 1)]
        with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=args.bf16):
            out = self.drafter.loss(
                batch,
                num_blocks=args.num_blocks if joined else 1,
                rank_weight=args.rank_weight if joined else 0.0,
                cuts=cuts,
                starts_share=args.starts_share,
                generator=torch.Generator().manual_seed(rng.getrandbits(32)),
            )
        out["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(self.drafter.parameters_of("full"), args.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        with self.drafter.lock:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.tokens_seen += int(batch.scored.sum())
        return {name: value.detach() for name, value in out.items()} | {"grad_norm": norm}

    def evaluation(self) -> dict[str, float]:
        self.drafter.eval()
        numbers = self.evaluate(self.drafter)
        self.drafter.train()
        return numbers

    def log(self, window: list[dict], seconds: float, bar: tqdm) -> None:
        row: dict[str, Any] = {
            "step": self.step,
            "tokens": self.tokens_seen,
            "learning_rate": self.learning_rate(self.step - 1),
        }
        for name in ("loss", "draft_loss", "rank_loss", "grad_norm"):
            row[name] = round(torch.stack([w[name] for w in window]).mean().item(), 4)
        blocks = max(len(w["counted"]) for w in window)
        full = [w for w in window if len(w["counted"]) == blocks]
        agreed, counted = (torch.stack([w[n] for w in full]).sum(0) for n in ("agreed", "counted"))
        row["agreement"] = [[round(v, 4) for v in block] for block in (agreed / counted.clamp_min(1)).tolist()]
        row["chain"] = round((agreed[0] / counted[0, 0]).sum().item(), 4)
        row["seconds_per_step"] = round(seconds / len(window), 3)
        bar.set_postfix(loss=row["loss"], chain=row["chain"])
        self.write(row)

    def write(self, row: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "log.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")

    def save(self) -> None:
        """A checkpoint, written aside and moved into place, so that a kill at any moment leaves a whole one behind."""
        final = self.folder / f"checkpoint-{self.step}"
        partial = self.folder / "checkpoint.partial"
        shutil.rmtree(partial, ignore_errors=True)
        self.drafter.save_pretrained(partial)
        state = {"optimizer": self.optimizer.state_dict(), "step": self.step, "tokens_seen": self.tokens_seen}
        torch.save(state, partial / "trainer.pt")
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        for old in self.checkpoints()[:-2]:
            shutil.rmtree(old)

    def checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))

    def resume(self) -> None:
        """Take up the newest checkpoint of the output folder, if there is one, and cut the log back to it."""
        found = self.checkpoints()
        if found:
            weights = load_file(found[-1] / "model.safetensors")
            self.drafter.load_state_dict(weights)
            self.read_draft_vocabulary()
            state = torch.load(found[-1] / "trainer.pt", weights_only=True)
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.tokens_seen = state["step"], state["tokens_seen"]
        log, partial = self.folder / "log.jsonl", self.folder / "log.partial"
        if log.exists():
            # A kill may have cut the last line off; the steps behind the checkpoint are about to be taken again.
            lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
            partial.write_text("".join(line for line in lines if json.loads(line)["step"] <= self.step))
            os.replace(partial, log)
