# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
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
        max_seconds (`float`, *optional*, defaults to 0):
            Train for so many seconds, evaluations left out, instead of `epochs`: the rate and everything else that
            follows the share of the run that is done follows the clock. A resumed run has the rest of them.
        batch_tokens (`int`, *optional*, defaults to 4096): Tokens of a batch, padding included.
        learning_rate (`float`, *optional*, defaults to 5e-5):
            Peak rate (paper: 5e-5 over some 300k dialogues; a small target on little text wants about 1e-3).
        optimizer (`str`, *optional*, defaults to `"adamw"`):
            `"adamw"`, or `"muon"`: the matrices of the layers learn by Muon, heads and all else by AdamW. It learns
            faster, for two thirds of a second a step on a CPU core with a small target; needs torch 2.9.
        warmup_ratio (`float`, *optional*, defaults to 0.015): Share of steps with a rising rate; a cosine follows.
        max_grad_norm (`float`, *optional*, defaults to 0.5): Gradients are clipped to this norm.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.95)`): Of AdamW, which runs without weight
            decay.
        held_out (`float`, *optional*, defaults to 0.02): Share of prompts kept for evaluation.
        max_length (`int`, *optional*, defaults to 1024): Longest conversation in tokens.
        log_steps (`int`, *optional*, defaults to 20): Steps between lines of the log.
        save_steps (`int`, *optional*, defaults to 200): Steps between checkpoints; a killed run loses at most these.
        eval_steps (`int`, *optional*, defaults to 400): Steps between measurements of the simulated accepted length.
        eval_budgets (`list[int]`, *optional*, defaults to `[8, 16, 60]`): Tree budgets of that measurement.
        mixed_precision (`str`, *optional*, defaults to `"bf16"`):
            What to compute in: `"no"`, `"bf16"` or `"fp16"`; weights and optimiser stay in float32.
        gradient_accumulation (`int`, *optional*, defaults to 1): Batches of a step in each process.
        report_to (`list[str]`, *optional*): Trackers that accelerate knows, such as `tensorboard` or `wandb`.
        seed (`int`, *optional*, defaults to 0): Of the batches' order, the objective's draws and the initial weights.
    """

    output_dir: str
    epochs: float = 20.0
    max_seconds: float = 0.0
    batch_tokens: int = 4096
    learning_rate: float = 5e-5
    optimizer: str = "adamw"
    warmup_ratio: float = 0.015
    max_grad_norm: float = 0.5
    betas: tuple[float, float] = (0.9, 0.95)
    held_out: float = 0.02
    max_length: int = 1024
    log_steps: int = 20
    save_steps: int = 200
    eval_steps: int = 400
    eval_budgets: list[int] = field(default_factory=lambda: [8, 16, 60])
    mixed_precision: str = "bf16"
    gradient_accumulation: int = 1
    report_to: list[str] = field(default_factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f'mixed_precision is {self.mixed_precision!r}; compute in "no", "bf16" or "fp16".')
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f'optimizer is {self.optimizer!r}; known are "adamw" and "muon".')
        if self.optimizer == "muon" and self.mixed_precision == "fp16":
            raise ValueError(
                "Two optimisers would each take the scale of fp16 out of the gradients; train in bf16 or with AdamW."
            )
        for name in ("log_steps", "save_steps", "eval_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; for never give more steps than the run has.")
        if self.gradient_accumulation < 1:
            raise ValueError(
                f"gradient_accumulation is {self.gradient_accumulation}; a step takes at least one batch."
            )
