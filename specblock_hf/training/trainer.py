# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Training a drafter, in one process or many: deterministic batches, a resumable loop, a log that can be plotted."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from ..checkpoints.saving import save_folder_whole, save_text_whole
from ..data.examples import Example
from ..devices import PhaseClock, without_cudnn_attention
from ..drafting.pairs import TokenTable
from .arguments import DrafterTrainingArguments
from .batches import batches_from, batches_of_epoch, collate, draft_ids_of
from .metrics import flat, merge_outputs, report_of
from .optimizers import make_optimizers
from .processes import ObjectiveModule, make_accelerator
from .settings import refuse_other_settings, settings_of
from .target_views import TargetView
from .termination import Terminated, Termination


MOST_UNSOUND = 10
"""Steps in a row whose gradients are not finite before a run ends; single ones are left out."""

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
"""Weights and moments of all processes together, on the CPU of the main one."""


@dataclass(eq=False)
class DrafterTrainer:
    """
    Trains a drafter on conversations that the target has written. A step takes the mean gradient of
    `num_processes * gradient_accumulation` batches, so a run with more processes and as much less accumulation is the
    same run.

    Args:
        drafter (`TreeDrafter`): Any drafter with a `loss`; trained in place.
        table (`TokenTable`): The target's embedding and head.
        examples (`Sequence[Example]`): Training conversations.
        views (`Callable`): Gives the target's views of a list of indices into `examples`.
        args ([`DrafterTrainingArguments`]): How to train.
        evaluate (`Callable`, *optional*): Called with the drafter; gives a dictionary of numbers for the log.
        objective (*optional*): An instance of the drafter's `objective_class`; its defaults if not given.
        accelerator ([`~accelerate.Accelerator`], *optional*): Made by [`make_accelerator`] if not given.
        progress (`bool`, *optional*, defaults to `True`): Show a bar on the standard error stream.
        choices (`dict[str, Any]`, *optional*):
            What else the run follows from, by the option that says it; other values cannot take its checkpoints up.
    """

    drafter: Any
    table: TokenTable
    examples: Sequence[Example]
    views: Callable[[list[int]], list[TargetView]]
    args: DrafterTrainingArguments
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    objective: Any = None
    accelerator: Accelerator | None = None
    progress: bool = True
    choices: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        args, drafter = self.args, self.drafter
        if not self.examples:
            raise ValueError("there is no conversation to train on; give more answers or hold fewer of them out.")
        self.accelerator = self.accelerator or make_accelerator(args, cpu=self.table.device.type == "cpu")
        self.folder = Path(args.output_dir)
        self.settings = settings_of(args, drafter, self.objective, self.examples) | self.choices
        self.batches_a_step = self.accelerator.num_processes * args.gradient_accumulation
        batches_an_epoch = len(batches_of_epoch(self.examples, args.batch_tokens, args.seed, 0))
        self.total_steps = max(1, round(batches_an_epoch * args.epochs / self.batches_a_step))
        prepared = self.accelerator.prepare(ObjectiveModule(drafter, self.objective), *make_optimizers(drafter, args))
        self.module, *self.optimizers = prepared
        self.clock = PhaseClock(self.accelerator.device)
        self.step = self.tokens_seen = self.unsound = 0
        self.seconds = 0.0
        self.draft_ids = draft_ids_of(drafter, self.table.vocab_size)

    @property
    def bare_optimizers(self) -> list[torch.optim.Optimizer]:
        """As torch reads and writes their state, without accelerate's wrappers."""
        return [wrapped.optimizer for wrapped in self.optimizers]

    def learning_rate(self, step: float) -> float:
        """Linear warm-up, then a cosine to zero."""
        warmup = max(1, round(self.args.warmup_ratio * self.total_steps))
        if step < warmup:
            return self.args.learning_rate * min(1.0, (step + 1) / warmup)
        progress = (step - warmup) / max(1, self.total_steps - warmup)
        return self.args.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    @property
    def place(self) -> float:
        """The step that the run is at; if its time is limited, the one that it would be at if all took as long."""
        if not self.args.max_seconds:
            return self.step
        return self.total_steps * min(1.0, self.seconds / self.args.max_seconds)

    def train(self) -> None:
        """
        Train to the end, from the newest checkpoint in the output folder if there is one; saves the drafter
        there.

        Raises:
            Terminated: This process, the only one, got SIGTERM or SIGINT; the step that it was in is finished and
                saved.
        """
        self.resume()
        args = self.args
        self.module.train()
        if self.evaluation_is_missing():
            self.log_evaluation()
        total = None if args.max_seconds else self.total_steps
        shown = self.accelerator.is_main_process and self.progress
        with (
            Termination(self.accelerator.num_processes == 1) as termination,
            tqdm(total=total, initial=self.step, desc="training", unit="step", disable=not shown) as bar,
        ):
            started, window = time.perf_counter(), []
            for batches in self.batches_from(self.step):
                began = time.perf_counter()
                window.append(self.train_step(batches))
                self.step += 1
                if args.max_seconds:
                    self.seconds += self._agreed(time.perf_counter() - began)
                bar.update()
                if self.step % args.log_steps == 0 or self.is_over:
                    self.log(window, time.perf_counter() - started, bar)
                    started, window = time.perf_counter(), []
                # Before the evaluation, which may take longer than whoever ends a process waits.
                if self.step % args.save_steps == 0 or self.evaluation_is_due or termination.asked:
                    self.save()
                if self.evaluate and self.evaluation_is_due and not termination.asked:
                    self.log_evaluation()
                    started = time.perf_counter()
                if termination.asked:
                    raise Terminated(self.step, termination.asked)
                if self.is_over:
                    break
        self.module.eval()
        self.save_drafter(self.folder / "final", self.state_dicts()[0])

    @property
    def is_over(self) -> bool:
        """Whether the last step has been taken."""
        return self.place >= self.total_steps

    @property
    def evaluation_is_due(self) -> bool:
        """Whether the drafter is measured after the step that was just taken."""
        return self.step % self.args.eval_steps == 0 or self.is_over

    def evaluation_is_missing(self) -> bool:
        """Whether the run was ended between saving a step and measuring it; several processes do not ask."""
        log = self.folder / "log.jsonl"
        if self.evaluate is None or self.step == 0 or not self.evaluation_is_due or self.accelerator.num_processes > 1:
            return False
        rows = map(json.loads, log.read_text().splitlines()) if log.exists() else ()
        return not any(row["step"] == self.step and "loss" not in row for row in rows)

    def log_evaluation(self) -> None:
        self.write({"step": self.step, "tokens": self.tokens_seen, **self.evaluation()})

    def batches_from(self, step: int) -> Iterator[list[list[int]]]:
        """
        The batches of every step from `step` on, those of all processes together; without end where the clock decides.
        """
        if self.is_over:
            return
        count = self.batches_a_step
        stream = batches_from(self.examples, self.args.batch_tokens, self.args.seed, step * count)
        for _ in itertools.count() if self.args.max_seconds else range(step, self.total_steps):
            yield [next(stream) for _ in range(count)]

    def _agreed(self, seconds: float) -> float:
        """What all processes take a step to have lasted, so that they end together."""
        if self.accelerator.num_processes == 1:
            return seconds
        return self.accelerator.reduce(torch.tensor(seconds, device=self.accelerator.device), "mean").item()

    def train_step(self, batches: list[list[int]]) -> dict[str, torch.Tensor]:
        """
        One optimiser step.

        Args:
            batches (`list[list[int]]`): Indices of the conversations of every batch, those of all processes together.

        Returns:
            `dict[str, torch.Tensor]`: What the drafter's loss returned for this process's batches, and `grad_norm`.
        """
        outputs = self.gradients(batches, self.place / self.total_steps)
        parameters = list(self.module.parameters())
        for parameter in parameters:
            # A part that has not joined yet has no gradient; the optimiser's state must not depend on that.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)
        if isinstance(norm, DTensor):  # of sharded weights
            norm = norm.full_tensor()
        if self.is_sound(norm):
            with self.drafter.lock:
                for optimizer in self.optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = self.learning_rate(self.place)
                    optimizer.step()
        self.module.zero_grad()
        self.clock.lap("update")
        self.tokens_seen += self.answer_tokens(batches)
        return outputs | {"grad_norm": norm.detach()}

    def is_sound(self, norm: torch.Tensor) -> bool:
        """
        Whether a step with a gradient of this norm can be taken. One that is not finite would make every weight so.

        Raises:
            ValueError: None of the last `MOST_UNSOUND` could be.
        """
        if self.args.mixed_precision == "fp16" or math.isfinite(norm):  # the scaler of fp16 looks at it itself
            self.unsound = 0
            return True
        self.unsound += 1
        if self.unsound >= MOST_UNSOUND:
            raise ValueError(
                f"the gradients of the last {MOST_UNSOUND} steps were not finite, the last of them step "
                f"{self.step + 1}; lower --learning-rate, or leave out the answers that the target itself has no "
                "finite states for, and begin in another --output with --init-from the newest checkpoint."
            )
        return False

    def sized_step(self, share: float) -> list[list[int]]:
        """The batches of a step, of the first epoch's with the most places (0) to those with the fewest (1)."""
        batches = batches_of_epoch(self.examples, self.args.batch_tokens, self.args.seed, 0)
        batches.sort(key=lambda batch: len(batch) * max(len(self.examples[i].input_ids) for i in batch), reverse=True)
        first = int(share * (len(batches) - 1))
        return [batches[(first + i) % len(batches)] for i in range(self.batches_a_step)]

    def answer_tokens(self, batches: list[list[int]]) -> int:
        """Tokens of the answers, which are the ones that the loss counts."""
        return sum(len(e.input_ids) - e.answer_start for batch in batches for e in (self.examples[i] for i in batch))

    @without_cudnn_attention
    def gradients(self, batches: list[list[int]], progress: float) -> dict[str, torch.Tensor]:
        """
        Leave the mean gradient of all processes' batches in the weights; returns this process's outputs.

        Args:
            batches (`list[list[int]]`): As in [`train_step`].
            progress (`float`): Share of the run that is done, as the objective is told.
        """
        accelerator, outputs = self.accelerator, []
        own = range(accelerator.process_index, len(batches), accelerator.num_processes)
        self.clock.start()
        for number in own:
            examples = [self.examples[i] for i in batches[number]]
            batch = collate(examples, self.views(batches[number]), self.table, self.draft_ids)
            self.clock.lap("target")
            generator = torch.Generator().manual_seed(self.seed_of(self.step * len(batches) + number))
            # Processes meet once a step, at the backward pass of the last of their batches.
            with accelerator.no_sync(self.module) if number != own[-1] else nullcontext():
                out = self.module(batch, progress, generator)
                self.clock.lap("forward")
                accelerator.backward(out["loss"] / len(own))
            self.clock.lap("backward")
            outputs.append({name: value.detach() for name, value in out.items()})
        return merge_outputs(outputs)

    def seed_of(self, batch: int) -> int:
        """Of the randomness of the run's batch of this number, whichever process takes it."""
        return (self.args.seed + 1) * 1_000_003 + batch

    def evaluation(self) -> dict[str, float]:
        """What `evaluate` says of the drafter as it is; the main process asks, the others wait."""
        drafter = self.whole_drafter()
        numbers = {}
        if self.accelerator.is_main_process:
            drafter.eval()
            with self.accelerator.autocast():
                numbers = self.evaluate(drafter)
            drafter.train()
        self.accelerator.wait_for_everyone()
        return numbers

    def whole_drafter(self) -> nn.Module:
        """The drafter, or a copy with all of its weights where processes hold shards of it."""
        if self.accelerator.distributed_type != DistributedType.FSDP:
            return self.drafter
        weights = get_model_state_dict(self.module, options=WHOLE)
        twin = type(self.drafter)(self.drafter.config)
        if self.accelerator.is_main_process:
            twin.load_state_dict(_of_drafter(weights))
        return twin.to(self.accelerator.device)

    def log(self, window: list[dict], seconds: float, bar: tqdm) -> None:
        """Write a line of means over some steps and all processes."""
        rate = self.optimizers[0].param_groups[0]["lr"]
        row: dict[str, Any] = {"step": self.step, "tokens": self.tokens_seen, "learning_rate": rate}
        row |= report_of(window, self.accelerator)
        row["seconds_per_step"] = round(seconds / len(window), 3)
        row["shares"] = self.clock.shares()
        bar.set_postfix(loss=row["loss"], chain=row["chain"])
        self.write(row)

    def write(self, row: dict) -> None:
        self.accelerator.log(flat(row), step=self.step)
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "log.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")

    def state_dicts(self) -> tuple[dict[str, torch.Tensor], dict]:
        """The drafter's weights and the optimiser's state, whole and on the CPU (empty where others write them)."""
        weights, optimizer = get_state_dict(self.module, self.bare_optimizers, options=WHOLE)
        return _of_drafter(weights), optimizer

    def save_drafter(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        if self.accelerator.is_main_process:
            self.drafter.save_pretrained(folder, state_dict=weights)

    def save(self) -> None:
        """A checkpoint, whole or not at all, so that a kill at any moment leaves one behind."""
        weights, optimizer = self.state_dicts()
        if self.accelerator.is_main_process:
            state = {"optimizer": optimizer, "step": self.step, "tokens_seen": self.tokens_seen}
            state |= {"batches_a_step": self.batches_a_step, "seconds": self.seconds, "settings": self.settings}
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
            final, aside = self.folder / f"checkpoint-{self.step}", self.folder / "checkpoint.partial"
            with save_folder_whole(final, partial=aside) as partial:
                self.save_drafter(partial, weights)
                torch.save(state, partial / "trainer.pt")
            for old in self.checkpoints()[:-2]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))

    def find(self) -> Path | None:
        """
        The newest checkpoint of the output folder, if there is one; the run stands where that was made, its weights
        where they were.

        Raises:
            ValueError: The checkpoint is of a run of other settings, see [`refuse_other_settings`].
        """
        found = self.checkpoints()
        if not found:
            return None
        state = torch.load(found[-1] / "trainer.pt", weights_only=True, mmap=True)
        refuse_other_settings(found[-1], state, self.settings, self.batches_a_step)
        self.step, self.tokens_seen = state["step"], state["tokens_seen"]
        self.seconds = state.get("seconds", 0.0)  # checkpoints of before runs had a limit of time
        return found[-1]

    def resume(self) -> None:
        """Take up the checkpoint of [`find`], if there is one, and cut the log back to it."""
        checkpoint = self.find()
        if checkpoint is not None:
            self.load(checkpoint)
        self.accelerator.wait_for_everyone()
        log = self.folder / "log.jsonl"
        if log.exists() and self.accelerator.is_main_process:
            # A kill may have cut the last line off; the steps behind the checkpoint are about to be taken again.
            lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
            save_text_whole(log, "".join(line for line in lines if json.loads(line)["step"] <= self.step))

    def load(self, checkpoint: Path) -> None:
        """Take over the weights and the optimiser's state."""
        state = torch.load(checkpoint / "trainer.pt", weights_only=True)
        weights = {f"drafter.{name}": value for name, value in load_file(checkpoint / "model.safetensors").items()}
        set_state_dict(
            self.module,
            self.bare_optimizers,
            model_state_dict=weights,
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )
        self.draft_ids = draft_ids_of(self.drafter, self.table.vocab_size)
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def _of_drafter(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An [`ObjectiveModule`]'s weights by the names that the drafter has for them."""
    return {name.removeprefix("drafter."): value for name, value in weights.items()}
