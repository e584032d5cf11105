# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run follows from, kept with its checkpoints, so that a run of other settings does not take them up."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..data.examples import Example
from ..drafters.common.registry import trainable_drafters
from .arguments import DrafterTrainingArguments


FREE = {
    *("output_dir", "max_seconds", "log_steps", "save_steps", "eval_steps", "eval_budgets", "report_to"),
    "gradient_accumulation",  # only its product with the number of processes matters
}
"""Arguments that may change on the way: how long a run may take, and when and where it saves, measures and reports."""

REMARKS = {"acceptance", "chat_template", "thinking", "target_name_or_path"}
"""Fields of a drafter's configuration that say something of it and change nothing."""

OWN_OPTIONS = {"draft_vocab_size": "--draft-vocab-size"}
"""Fields of a drafter's configuration that `--config` is not needed for."""


def settings_of(
    args: DrafterTrainingArguments, drafter: PreTrainedModel, objective: Any, examples: Sequence[Example]
) -> dict[str, Any]:
    """
    What the weights at the end follow from, by the options that say it, as JSON would hold it.

    Args:
        args ([`DrafterTrainingArguments`]): How the run trains.
        drafter ([`~transformers.PreTrainedModel`]): For its configuration.
        objective: An instance of the drafter's `objective_class`, or `None`.
        examples (`Sequence[Example]`): Training conversations.
    """
    config = drafter.config.to_dict()
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)} | REMARKS
    shape = [field.name for field in dataclasses.fields(drafter.config) if field.name not in common]
    taught = {} if objective is None else vars(objective)
    tokens = sum(len(example.input_ids) for example in examples)
    settings = {
        "--drafter": _name_of(drafter),
        **{OWN_OPTIONS.get(name, f"--config {name}"): config[name] for name in shape},
        **{f"--objective {name}": value for name, value in taught.items()},
        **{f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in FREE},
        "--data": f"{len(examples)} conversations of {tokens} tokens",
    }
    return json.loads(json.dumps(settings))


def _name_of(drafter: PreTrainedModel) -> str:
    """What `--drafter` calls its kind, in the form that names most of its fields."""
    config = drafter.config.to_dict()
    forms = [
        (len(fields), name)
        for name, (kind, fields) in trainable_drafters().items()
        if kind is type(drafter) and fields.items() <= config.items()
    ]
    return max(forms, default=(0, drafter.config.model_type))[1]


def refuse_other_settings(
    checkpoint: Path, state: Mapping[str, Any], settings: Mapping[str, Any], batches_a_step: int
) -> None:
    """
    Refuse a checkpoint that this run would not have made.

    Args:
        checkpoint (`Path`): Its folder.
        state (`Mapping[str, Any]`): What is kept there beside the weights.
        settings (`Mapping[str, Any]`): Of this run, from [`settings_of`].
        batches_a_step (`int`): Of this run, all processes together.

    Raises:
        ValueError: It was made with other settings; the first of them is named.
    """
    if state["batches_a_step"] != batches_a_step:
        raise ValueError(
            f"{checkpoint} was made with {state['batches_a_step']} batches a step and this run has {batches_a_step} "
            "(processes times --gradient-accumulation); make the product the same, or begin in another --output."
        )
    # Of checkpoints of before they kept their settings the optimiser is known, or there was no choice.
    made_with = state.get("settings", {"--optimizer": state.get("made_by", "adamw")})
    for name, value in settings.items():
        if made_with.get(name, value) != value:
            given = f"{name}{'=' if ' ' in name else ' '}{_typed(made_with[name])}"
            raise ValueError(
                f"{checkpoint} was made with {given} and this run has {_typed(value)}; give the old value, or begin "
                "in another --output."
            )


def _typed(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
