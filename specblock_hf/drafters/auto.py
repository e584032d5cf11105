# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Loading a drafter of any kind and layout by its name."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..checkpoints.configuration_checks import refusing_misfits
from ..checkpoints.files import LOCATION_OPTIONS, DrafterFiles
from .common.registry import drafter_kind
from .find import find_drafters
from .layouts import layout_of


logger = logging.get_logger(__name__)


class AutoDrafter:
    """
    Picks the drafter class and the layout from `config.json`; use [`~AutoDrafter.from_pretrained`].

    Example:

    ```python
    >>> from specblock_hf import AutoDrafter

    >>> drafter = AutoDrafter.from_pretrained("weijiezz/SpecBlock-Qwen3-8B", target=target, dtype=target.dtype)
    >>> output = target.generate(**inputs, assistant_model=drafter)
    ```
    """

    def __init__(self):
        raise TypeError(
            "AutoDrafter has no instances; call AutoDrafter.from_pretrained(name) or AutoDrafter.find(target)."
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike,
        *,
        target: PreTrainedModel | PreTrainedConfig | None = None,
        **kwargs,
    ) -> Any:
        """
        Load a drafter of any registered kind: SpecBlock in our layout or the authors' own, EAGLE-3 in ours,
        SafeAILab's, SGLang's, DeepSpec's or that of `speculators`, DFlash, DFlash 2, JetSpec and DSpark as published,
        Medusa, ParallelSpec and Falcon in ours. No code of a repository is ever run.

        Args:
            name (`str` or `os.PathLike`): Folder or Hub id.
            target ([`~transformers.PreTrainedModel`] or [`~transformers.PreTrainedConfig`], *optional*):
                The model that it will draft for. A model is checked, and the drafter put where it begins, unless
                `device_map` says otherwise. Other layouts do not record the target's
                depth and special tokens; they are filled in from it, which a drafter needs for `pipeline()`, for
                training and to be saved complete, but not for `generate()`.
            **kwargs:
                As in [`~transformers.PreTrainedModel.from_pretrained`]: `revision`, `subfolder`, `cache_dir`, `token`,
                `local_files_only`, `dtype`, `device_map`, ...; and fields of the drafter's configuration that shall
                not be those of its file.

        Raises:
            ValueError: It is not a drafter, not complete, or not one for `target`; the message names what is wrong.
            OSError: A file cannot be had, or is not what the Hub says it is.
        """
        files = DrafterFiles.of(name, kwargs)
        layout = layout_of(files.config, name)
        if layout is None:
            drafter = drafter_kind(files.config["model_type"]).from_pretrained(name, **kwargs)
        else:
            known, found = target.config if isinstance(target, PreTrainedModel) else target, files.tensors()
            with refusing_misfits(files.name):
                config = layout.read_config(files.config, files.name, found, known)
                tensors = layout.read_tensors(config, files, found)
            options = {key: value for key, value in kwargs.items() if key not in LOCATION_OPTIONS}
            fields = {key: options.pop(key) for key in config.documented() & options.keys()}
            if fields:
                config = type(config).from_dict(config.to_dict() | fields, name_or_path=os.fspath(name))
            drafter = drafter_kind(config.model_type).from_tensors(files.name, config, tensors, **options)
        if isinstance(target, PreTrainedModel):
            drafter.check_target(target)
            if "device_map" not in kwargs and target.device.type != "meta":
                drafter.to(target.device)
        return drafter

    @classmethod
    def find(
        cls,
        target: str | os.PathLike | PreTrainedModel | PreTrainedConfig,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ) -> Any:
        """
        Find the right drafter for a target on the Hub, or in a list in the package, and load it. What fits is judged
        by `config.json`, and offline by whether its weights are there; see [`find_drafters`] for all that was found.
        No code of a repository is ever run.

        Args:
            target ([`~transformers.PreTrainedModel`], [`~transformers.PreTrainedConfig`], `str` or `os.PathLike`):
                The target, or the folder or Hub id of one.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
                The target's. Warns where its prompts are not of the kind that the drafter was trained behind.
            **kwargs:
                As in `from_pretrained`, but for `revision`, which is the target's where it is named.

        Raises:
            ValueError: No drafter fits; the message names the nearest ones and why they do not.
            OSError: The target's configuration, or the drafter that fits, cannot be had.

        Example:

        ```python
        >>> drafter = AutoDrafter.find(target, dtype=target.dtype)
        >>> output = target.generate(**inputs, assistant_model=drafter)
        ```
        """
        asked = {name: kwargs[name] for name in ("token", "cache_dir", "local_files_only") if name in kwargs}
        best = find_drafters(target, revision=kwargs.pop("revision", None), **asked).best()
        advice = None if tokenizer is None else best.prompt_style.advice(tokenizer)
        if advice is not None:
            logger.warning(advice)
        known = target if isinstance(target, PreTrainedModel | PreTrainedConfig) else None
        return cls.from_pretrained(best.name, target=known, revision=best.revision, **kwargs)
