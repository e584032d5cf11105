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
"""Arguments of `specblock train`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DrafterTrainingArguments:
    """
    How a drafter is trained. Defaults follow the paper (https://huggingface.co/papers/2605.07243, section 4.1) where
    it says
    something, and what measured better where it does not.

    Args:
        output_dir (`str`): Folder of checkpoints, the log and the final drafter.
        epochs (`float`, *optional*, defaults to 20): Passes over the conversations (paper: 20).
        batch_tokens (`int`, *optional*, defaults to 4096): Tokens of a step, padding included.
        learning_rate (`float`, *optional*, defaults to 5e-5):
            Peak rate (paper: 5e-5 over some 300k dialogues; a small target on little text wants about 1e-3).
        warmup_ratio (`float`, *optional*, defaults to 0.015): Share of steps with a rising rate; a cosine follows.
        max_grad_norm (`float`, *optional*, defaults to 0.5): Gradients are clipped to this norm.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.95)`): Of AdamW, which runs without weight
            decay.
        num_blocks (`int`, *optional*, defaults to 3): Blocks that are trained (paper: 3).
        starts_share (`float`, *optional*, defaults to 1.0): Share of a later block's possible starts that are trained.
        rank_weight (`float`, *optional*, defaults to 1.0): Weight of the rank head's loss.
        rank_start_ratio (`float`, *optional*, defaults to 0.1): Share of steps before the rank head and later blocks
            join.
        held_out (`float`, *optional*, defaults to 0.02): Share of prompts kept for evaluation.
        max_length (`int`, *optional*, defaults to 1024): Longest conversation in tokens.
        log_steps (`int`, *optional*, defaults to 20): Steps between lines of the log.
        save_steps (`int`, *optional*, defaults to 200): Steps between checkpoints; a killed run loses at most these.
        eval_steps (`int`, *optional*, defaults to 400): Steps between measurements of the simulated accepted length.
        eval_budgets (`list[int]`, *optional*, defaults to `[8, 16, 60]`): Tree budgets of that measurement.
        bf16 (`bool`, *optional*, defaults to `True`): Compute in bfloat16; weights and optimiser stay in float32.
        seed (`int`, *optional*, defaults to 0): Of the order of batches, the cuts and the initial weights.
    """

    output_dir: str
    epochs: float = 20.0
    batch_tokens: int = 4096
    learning_rate: float = 5e-5
    warmup_ratio: float = 0.015
    max_grad_norm: float = 0.5
    betas: tuple[float, float] = (0.9, 0.95)
    num_blocks: int = 3
    starts_share: float = 1.0
    rank_weight: float = 1.0
    rank_start_ratio: float = 0.1
    held_out: float = 0.02
    max_length: int = 1024
    log_steps: int = 20
    save_steps: int = 200
    eval_steps: int = 400
    eval_budgets: list[int] = field(default_factory=lambda: [8, 16, 60])
    bf16: bool = True
    seed: int = 0
