# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The layout of a checkpoint: ours, or one that a kind of drafter was registered with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .common.layout import Layout
from .common.registry import drafter_kind, published_layouts


OURS = "specblock_hf"
"""Name of the layout that `save_pretrained` writes."""


def layout_of(config: Mapping[str, Any], name: object) -> Layout | None:
    """
    Args:
        config (`dict`): What `config.json` says.
        name (`str` or `os.PathLike`): The checkpoint, for the message.

    Returns:
        `Layout` or `None`: `None` for our own.

    Raises:
        ValueError: It is not a drafter that can be read.
    """
    architectures, model_type = config.get("architectures") or [], config.get("model_type")
    texts = [*architectures, "" if model_type is None else model_type] if isinstance(architectures, list) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"config.json of {name} names no model (architectures {architectures!r}, model_type {model_type!r}); take "
            "it from the original repository."
        )
    if drafter_kind(model_type) is not None:
        return None
    # speculators calls its classes as other projects do, and says what they are in a field of its own.
    told = {**config, "architectures": []} if config.get("speculators_model_type") else config
    layouts = [layout for _, layout in published_layouts().values()]
    for layout in sorted(layouts, key=lambda layout: layout.is_known_by_little):
        if layout.matches(told):
            return layout
    raise ValueError(
        f"{name} is not a drafter in a known layout (architectures {architectures}, model_type {model_type!r}); "
        "drafters of this library can be loaded, SpecBlock ones of its paper's authors, EAGLE-3 ones as SafeAILab, "
        "SGLang, speculators or DeepSpec write them, and DFlash, JetSpec and DSpark as published."
    )


def write_checkpoint(drafter: Any, folder: str | Path, layout: str) -> None:
    """
    Save a drafter for whatever else reads a layout.

    Args:
        drafter ([`~transformers.PreTrainedModel`]): What to save.
        folder (`str` or `Path`): Where; made if it is not there.
        layout (`str`): Name of one that is published for the drafter's kind, or [`OURS`].

    Raises:
        ValueError: The layout is another drafter's or cannot say what this one does.
    """
    if layout == OURS:
        return drafter.save_pretrained(folder)
    drafter_class, found = published_layouts()[layout]
    if not isinstance(drafter, drafter_class):
        raise found.unwritable(drafter)
    found.write(drafter, folder)
