# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The model card of a drafter, and what made it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig

from .files import id_in_cache


TEMPLATES = Path(__file__).parents[1] / "templates"

TRAINING = "training.json"
"""What `specblock train` leaves beside a drafter, for its card."""

TRAINING_FACTS = ("data", "command", "training")
"""The fields of [`CardFacts`] that stand in it."""


@dataclass(frozen=True)
class CardFacts:
    """
    What a model card says that a drafter's configuration does not.

    Args:
        license (`str`, *optional*): Of the weights; the target's usually binds them.
        language (`tuple[str, ...]`, *optional*): Codes of the languages of the training data.
        datasets (`tuple[str, ...]`, *optional*): Hub ids or names of the training data.
        training (`dict`, *optional*): Hyperparameters by name, such as `specblock train` leaves in `arguments.json`.
        results (`dict`, *optional*):
            What was measured: `hardware`, `dtype`, `versions` (a dict) and `rows`, each with `suite`, `prompts`,
            `temperature`, `tau` and `speedup`.
        data (`str`, *optional*): The training data in words: whose answers to what, and how many.
        command (`str`, *optional*): The command that trained it, as [`recorded_command`] gives it.

    Raises:
        ValueError: `results` lacks one of these, so that a number would stand without its conditions.
    """

    license: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    training: Mapping[str, Any] | None = None
    results: Mapping[str, Any] | None = None
    data: str | None = None
    command: str | None = None

    def __post_init__(self) -> None:
        if self.results is None:
            return
        lacking = [key for key in ("hardware", "dtype", "versions", "rows") if not self.results.get(key)]
        for row in self.results.get("rows") or []:
            lacking += [key for key in ("suite", "prompts", "temperature", "tau", "speedup") if key not in row]
        if lacking:
            raise ValueError(
                f"The results lack {', '.join(dict.fromkeys(lacking))}, and a card shows no number without its "
                "conditions; measure again with a tool that records them."
            )


class Paper(NamedTuple):
    """What a card cites: the `paper` of a drafter's configuration class."""

    method: str
    key: str
    title: str
    arxiv: str
    year: int
    authors: str = ""


def hub_id(name: str | None) -> str | None:
    """A model's name on the Hub, also of its folder in the cache, and `None` for a folder of somebody's machine."""
    if name is None:
        return None
    if (stored := id_in_cache(name)) is not None:
        return stored
    if Path(name).exists() or re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is None:
        return None
    return name


def model_card(config: PreTrainedConfig, name: str, facts: CardFacts, parameters: int | None = None) -> ModelCard:
    """
    Args:
        config ([`~transformers.PreTrainedConfig`]): The drafter's, of a class with a `paper` ([`Paper`] or `None`).
        name (`str`): Hub id, for the title and the example.
        facts (`CardFacts`): What the configuration does not say.
        parameters (`int`, *optional*): How many weights the drafter has; without, the card says that there are none.

    Returns:
        [`~huggingface_hub.ModelCard`]: From the package's template. Its numbers come from `facts.results` alone.
    """
    base_model = hub_id(config.target_name_or_path)
    data = ModelCardData(
        library_name="specblock_hf",
        pipeline_tag="text-generation",
        base_model=base_model,
        base_model_relation="adapter" if base_model else None,
        tags=["speculative-decoding", config.model_type, "drafter"],
        license=facts.license,
        datasets=list(facts.datasets) or None,
        language=list(facts.language) or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "drafter_card.md"),
        name=name,
        base_model=base_model,
        config=config,
        facts=facts,
        parameters=parameters,
    )
