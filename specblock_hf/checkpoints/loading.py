# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Loading without surprises: every weight of a checkpoint must be asked for, every weight asked for must be there, and
what was downloaded must be what was uploaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import copy
from typing import Any, cast

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)

from .configuration_checks import refusing_misfits
from .files import LOCATION_OPTIONS, DrafterFiles
from .hub import HubModel


LARGEST_WEIGHT = 1e6
"""No trained weight comes near it, and half precision ends far below."""


def refuse_vocabulary(name: object, config: PreTrainedConfig, d2t: torch.Tensor, t2d: torch.Tensor) -> None:
    """
    Args:
        name (`str` or `os.PathLike`): The checkpoint.
        config ([`~transformers.PreTrainedConfig`]): Of the drafter.
        d2t (`torch.Tensor` of shape `[draft_vocab_size]`): Offsets from draft ids to target ids.
        t2d (`torch.Tensor` of shape `[vocab_size]`): Whether a target id is in the draft vocabulary.

    Raises:
        ValueError: They do not describe the same tokens of the target, each once.
    """
    ids = d2t.long() + torch.arange(len(d2t))
    valid = bool(((ids >= 0) & (ids < config.vocab_size)).all()) and len(ids.unique()) == len(ids)
    if not valid or not bool(t2d[ids].all()) or int(t2d.bool().sum()) != len(ids):
        raise ValueError(
            f"d2t and t2d of {name} do not describe one draft vocabulary: d2t must hold offsets, so that target id = "
            "draft id + d2t[draft id], and t2d mark exactly these target ids; download them again."
        )


def unsound(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors with values that no drafter can have: no numbers, infinite ones, or absurdly large ones."""
    numbers = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    # NaN is not at most anything; compared as Python's numbers, because half precision has no number that large.
    return [
        name
        for name, tensor in numbers.items()
        if not tensor.is_meta and not tensor.detach().abs().max().item() <= LARGEST_WEIGHT
    ]


class StrictPreTrainedModel(HubModel):
    """A [`~transformers.PreTrainedModel`] that refuses a checkpoint which does not fit it tensor by tensor."""

    _supports_sdpa = True  # also of networks without attention, which any implementation of it suits
    _supports_flash_attn = False  # what a row of a tree or block sees takes a mask, which FlashAttention cannot

    def get_input_embeddings(self) -> None:
        """None: embedded tokens are handed in, if any; an embedding of the drafter's own is not the model's input."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        **kwargs,
    ):
        """
        As [`~transformers.PreTrainedModel.from_pretrained`], but strict, from `model.safetensors` or several files of
        that kind, and without asking transformers for any file: only what is documented is read, and no code is run.

        Raises:
            ValueError: The configuration describes no drafter of this kind; or a tensor is missing, unexpected,
                misshapen or holds values that no drafter can have, which the message names; or a file is damaged.
            OSError: A file cannot be had, or is not what the Hub says it is.
        """
        name = pretrained_model_name_or_path
        if state_dict is not None:
            given = cast(PreTrainedConfig, config)
            return cls.from_tensors(name or given.name_or_path, given, state_dict, *args, **kwargs)
        files = DrafterFiles.of(name, kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key not in LOCATION_OPTIONS}
        if not isinstance(config, PreTrainedConfig):
            described = files if config is None else DrafterFiles(config, files.options)
            found = described.config.get("model_type")
            if found != cls.config_class.model_type:
                raise ValueError(
                    f"{name} is not a {cls.__name__} checkpoint (model_type {found!r}); load it with AutoDrafter, "
                    "which knows the kinds and layouts."
                )
            # What to load weights as is not what the configuration says of them.
            wanted: dict[str, Any] = {key: kwargs.pop(key) for key in ("dtype", "torch_dtype") if key in kwargs}
            config, kwargs = cls.config_class.from_dict(
                described.config, name_or_path=os.fspath(name), return_unused_kwargs=True, **kwargs
            )
            kwargs |= wanted
        # Before anything is read or built that is as large as the file or the configuration says.
        cls._refuse_misfits(name, config, files.shapes())
        return cls.from_tensors(name, config, files.tensors(), *args, **kwargs)

    @classmethod
    def from_tensors(
        cls, name: str | os.PathLike, config: PreTrainedConfig, tensors: Mapping[str, torch.Tensor], *args, **kwargs
    ) -> Any:
        """
        A drafter with these weights.

        Args:
            name (`str` or `os.PathLike`): The checkpoint, for messages.
            config ([`~transformers.PreTrainedConfig`]): The drafter's.
            tensors (`dict[str, torch.Tensor]`): All of its weights and buffers, by our names.
            **kwargs: As in `from_pretrained`, but for those that say where files are.

        Raises:
            ValueError: As `from_pretrained`.
        """
        kwargs.pop("ignore_mismatched_sizes", None)  # whatever does not match is refused below
        cls._refuse_misfits(name, config, {key: tuple(value.shape) for key, value in tensors.items()})
        if "d2t" in tensors:
            refuse_vocabulary(name, config, tensors["d2t"], tensors["t2d"])
            tensors = {**tensors, "d2t": tensors["d2t"].long(), "t2d": tensors["t2d"].bool()}
        loaded = super().from_pretrained(
            None, *args, config=config, state_dict=dict(tensors), ignore_mismatched_sizes=True, **kwargs
        )
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        broken = unsound(model.state_dict())
        if broken:
            raise ValueError(
                f"{name} holds values that are infinite, absurdly large or not numbers in {', '.join(broken)}, or "
                "they were never loaded; download it again."
            )
        # transformers has named it after the file that it was not given.
        model.config.name_or_path = model.name_or_path = os.fspath(name)
        return loaded

    @classmethod
    def _refuse_misfits(cls, name: object, config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
        with refusing_misfits(name), torch.device("meta"):
            wanted = {key: tuple(value.shape) for key, value in cls(copy(config)).state_dict().items()}
        wrong = {
            "missing": wanted.keys() - shapes.keys(),
            "unexpected": shapes.keys() - wanted.keys(),
            "misshapen": {key for key in wanted.keys() & shapes.keys() if shapes[key] != wanted[key]},
        }
        problems = [f"{what} {', '.join(sorted(names))}" for what, names in wrong.items() if names]
        if problems:
            raise ValueError(
                f"{name} is not a complete {cls.__name__} checkpoint: {'; '.join(problems)}. Download it again, or "
                "convert it with `specblock convert` if it has another layout."
            )

    def _initialize_missing_keys(self, *args, **kwargs) -> None:
        # The loader marks what it has filled; whatever it has not must not pass for a trained weight.
        unfilled = [weight for weight in self.parameters() if "_is_hf_initialized" not in vars(weight)]
        super()._initialize_missing_keys(*args, **kwargs)
        with torch.no_grad():
            for weight in unfilled:
                weight.fill_(torch.nan)


def auto_class(config: PreTrainedConfig) -> Any:
    """transformers' class that makes the target of a configuration: its text model alone, if there is one for that."""
    kind = type(config)
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM
