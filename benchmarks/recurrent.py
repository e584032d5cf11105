# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
What reading again costs a target with recurrent layers: tokens and seconds of calls in which so many drafted tokens of
six are right in every round, on a random Qwen3.5 and on the CPU.

    python benchmarks/recurrent.py --layers 24 --hidden 256
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig
from transformers.utils import logging

from specblock_hf import DraftingPlan


sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from batches_for_tests import padded_batch  # noqa: E402
from conftest import SIZES  # noqa: E402
from hybrids_for_tests import DELTA, chain_oracles  # noqa: E402


DRAFTED = 6


def make_target(layers: int, hidden: int) -> torch.nn.Module:
    kinds = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    sizes = SIZES | DELTA | {"hidden_size": hidden, "intermediate_size": 3 * hidden, "initializer_range": 0.1}
    heads = {"head_dim": 32, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4}
    types = {"num_hidden_layers": layers, "layer_types": [kinds[layer % 4] for layer in range(layers)]}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Qwen3_5TextConfig(**sizes | heads | types)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--layers", type=int, default=24, help="of the target (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=256, help="its width (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=121, help="to write (default: %(default)s)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    target, batch = make_target(arguments.layers, arguments.hidden), padded_batch((16,))
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": arguments.tokens}
    read = 0

    def count(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal read
        read += kwargs["input_ids"].shape[1]

    target.register_forward_pre_hook(count, with_kwargs=True)
    begin = time.process_time()
    plain = target.generate(**batch, **options)
    seconds = time.process_time() - begin
    print("| `tree_budget` | right of 6 | tokens a forward | read a forward | plain seconds / ours | same text |")
    print("|---|---|---|---|---|---|")
    for budget in (8, 12, 60):
        for right in range(1, 5):
            drafter = chain_oracles(
                plain, batch["attention_mask"], [lambda number, right=right: right], length=DRAFTED
            )
            drafter.drafting_plan = DraftingPlan(budget, 1)
            read, begin = 0, time.process_time()
            same = torch.equal(target.generate(**batch, **options, assistant_model=drafter), plain)
            ours = time.process_time() - begin
            rounds = drafter.last_statistics.rounds
            figures = f"{(arguments.tokens - 1) / rounds:.2f} | {(read - 16) / rounds:.1f} | {seconds / ours:.2f}"
            print(f"| {budget} | {right} | {figures} | {same} |", flush=True)


if __name__ == "__main__":
    main()
