# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Trains a tiny drafter by an optimiser in one process and in two, in the folders `one` and `two` of a folder; a test
compares what is left behind. The two hold copies of the weights until they stop, and go on with a part of each weight,
as under FSDP, which accelerate itself only sets up on accelerators. `command` and `command-sharded` have two processes
run `specblock train` instead, in the folder `run`.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from conftest import tiny_target
from torch.distributed.fsdp import fully_shard
from training_for_tests import Told, example_of, tiny_drafter, write_answers

from specblock_hf import DraftingPlan, SpecBlockDrafter, cli
from specblock_hf.cli import train as train_command
from specblock_hf.drafting.pairs import TokenTable
from specblock_hf.evaluation.simulate import simulate_acceptance
from specblock_hf.training.arguments import DrafterTrainingArguments
from specblock_hf.training.processes import make_accelerator
from specblock_hf.training.target_views import view_target
from specblock_hf.training.trainer import DrafterTrainer


class ShardingAccelerator(Accelerator):
    """Shards on the CPU what accelerate would only shard on accelerators."""

    @property
    def distributed_type(self) -> DistributedType:
        return DistributedType.FSDP

    def prepare(self, module, *optimizers):
        names = {weight: name for name, weight in module.named_parameters()}
        held = [[names[weight] for weight in optimizer.param_groups[0]["params"]] for optimizer in optimizers]
        for layer in module.drafter.layers:
            fully_shard(layer)
        fully_shard(module)
        # Sharding has replaced the weights.
        weights = dict(module.named_parameters())
        for optimizer, own in zip(optimizers, held, strict=True):
            optimizer.param_groups[0]["params"] = [weights[name] for name in own]
        return module, *(self.prepare_optimizer(optimizer) for optimizer in optimizers)


def main(folder: Path, optimizer: str, accumulation: int, stop_at: int | None = None, sharded: bool = False) -> None:
    torch.set_num_threads(1)
    target = tiny_target("llama")
    drafter, table = tiny_drafter(), TokenTable.of(target)
    examples = [example_of(tokens, 3) for tokens in Told(24, 16).tokens.tolist()]
    views = view_target(target, examples, drafter.feature_layers, 5)

    def evaluate(trained) -> dict[str, float]:
        return {"tau": simulate_acceptance(trained, table, examples[:2], views[:2], DraftingPlan(8, 2)).tau}

    args = DrafterTrainingArguments(
        output_dir=str(folder),
        epochs=2,
        batch_tokens=32,
        learning_rate=1e-2,
        optimizer=optimizer,
        gradient_accumulation=accumulation,
        log_steps=1,
        save_steps=3,
        eval_steps=4,
        mixed_precision="no",
    )
    accelerator = ShardingAccelerator(cpu=True) if sharded else make_accelerator(args, cpu=True)
    trainer = DrafterTrainer(
        drafter, table, examples, lambda indices: [views[i] for i in indices], args, evaluate, accelerator=accelerator
    )
    assert trainer.total_steps == 12 and trainer.batches_a_step == 2
    steps = trainer.train_step

    def step(batches):
        if trainer.step == stop_at:
            raise StopIteration
        return steps(batches)

    trainer.train_step = step
    with suppress(StopIteration):
        trainer.train()
    accelerator.end_training()


def command(folder: Path, sharded: bool) -> None:
    torch.set_num_threads(1)
    SpecBlockDrafter.plans_that_pay = ((2, 1, 0),)
    if sharded:
        train_command.make_accelerator = lambda *_: ShardingAccelerator(cpu=True)
    options = ["--target", folder / "target", "--data", folder / "data", "--output", folder / "run", "--quiet"]
    options += ["--epochs", 2, "--batch-tokens", 60, "--held-out", 0.3, "--draft-vocab-size", 24, "--cpu"]
    options += ["--eval-steps", 2, "--eval-budgets", 4, "--log-steps", 1, "--mixed-precision", "no"]
    assert cli.main(["train", *map(str, options)]) == 0


def launch(count: int, run: Callable[..., None], *arguments) -> None:
    """Call `run` in so many processes that talk over gloo, forked from this one, which has imported everything."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ |= {name: str(value) for name, value in (places | {"MASTER_PORT": port}).items()}
            os.environ["MASTER_ADDR"] = "localhost"
            try:
                run(*arguments)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * count


if __name__ == "__main__":
    root, what = Path(sys.argv[1]), sys.argv[2]
    if what.startswith("command"):
        write_answers(root)
        launch(2, command, root, what == "command-sharded")
    else:
        launch(2, main, root / "two", what, 1, 8)
        launch(2, main, root / "two", what, 1, None, True)
        main(root / "one", what, 2)
