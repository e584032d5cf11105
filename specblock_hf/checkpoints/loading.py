# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Loading without surprises: every weight of a checkpoint must be asked for, every weight asked for must be there, and
what was downloaded must be what was uploaded.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from safetensors import SafetensorError

from .files import DrafterFiles
from .hub import HubModel


def refuse_misfits(name: object, kind: str, missing: Iterable, unexpected: Iterable, misshapen: Iterable) -> None:
    """
    Args:
        name (`str` or `os.PathLike`): The checkpoint.
        kind (`str`): The class that it should fill.
        missing, unexpected, misshapen (iterable of `str` or of tuples that start with one): Names of tensors.

    Raises:
        ValueError: If any is given; the message names all.
    """
    problems = [
        f"{what} {', '.join(sorted(names))}"
        for what, names in (
            ("missing", [str(key) for key in missing]),
            ("unexpected", [str(key) for key in unexpected]),
            ("misshapen", [str(key) for key in misshapen]),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{name} is not a complete {kind} checkpoint: {'; '.join(problems)}. Download it again, or convert it "
            "with `specblock convert` if it has another layout."
        )


class StrictPreTrainedModel(HubModel):
    """A [`~transformers.PreTrainedModel`] that refuses a checkpoint which does not fit it tensor by tensor."""

    _supports_sdpa = True  # also of networks without attention, which any implementation of it suits

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """
        As [`~transformers.PreTrainedModel.from_pretrained`], but strict.

        Raises:
            ValueError: A tensor is missing, unexpected, misshapen or not a number, which the message names; or a file
                is damaged.
            OSError: A file cannot be had, or is not what the Hub says it is.
        """
        name = pretrained_model_name_or_path
        if name is not None:
            # Puts the files into the cache that the loader below reads, and compares their hashes.
            DrafterFiles.of(name, kwargs).weights()
        try:
            model, info = super().from_pretrained(
                name, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(f"The weights of {name} are damaged ({error}); download them again.") from error
        name = name or model.config.name_or_path
        refuse_misfits(name, cls.__name__, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
        broken = [
            key for key, value in model.state_dict().items() if not value.is_meta and bool(torch.isnan(value).any())
        ]
        if broken:
            raise ValueError(
                f"{name} holds values that are not numbers in {', '.join(broken)}, or they were never loaded; "
                "download it again."
            )
        return (model, info) if output_loading_info else model

    def _initialize_missing_keys(self, *args, **kwargs) -> None:
        # The loader marks what it has filled; whatever it has not must not pass for a trained weight.
        unfilled = [weight for weight in self.parameters() if "_is_hf_initialized" not in vars(weight)]
        super()._initialize_missing_keys(*args, **kwargs)
        with torch.no_grad():
            for weight in unfilled:
                weight.fill_(torch.nan)
