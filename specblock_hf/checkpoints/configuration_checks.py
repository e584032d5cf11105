# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a drafter's `config.json` may say. It may be anybody's: only documented fields are read, so that none can make
transformers fetch or run code, and each lies within bounds that every real drafter keeps, so that nothing large is
built for one that cannot be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from transformers import PreTrainedConfig


_WHOLE: dict[str, tuple[int | None, int]] = {
    **dict.fromkeys(("vocab_size", "draft_vocab_size", "root_width", "max_starts"), (1, 2**24)),
    **dict.fromkeys(("hidden_size", "target_hidden_size", "rank_hidden_size"), (1, 2**17)),
    **dict.fromkeys(("selector_rank", "markov_rank", "conv_group_size"), (0, 2**17)),
    **dict.fromkeys(("num_hidden_layers", "num_lstm_layers"), (1, 64)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_rank_classes"), (1, 1024)),
    **dict.fromkeys(("head_dim", "target_num_layers"), (1, 4096)),
    **dict.fromkeys(("max_position_embeddings", "sliding_window"), (1, 2**40)),
    "intermediate_size": (1, 2**20),
    "block_size": (None, 1024),
    "num_blocks": (1, 256),
    "tree_budget": (0, 2**16),
    "beam_width": (1, 2**16),
    "tree_width": (None, 2**16),
    "rank_top_k": (None, 2**24),
    "selector_top_k": (0, 2**24),
    "conv_kernel_size": (0, 1024),
    "max_window_layers": (0, 4096),
    "mask_token_id": (0, 2**24),
}
"""Least and most of whole numbers; `None` where the class itself says what the least is, and why."""
_NUMBERS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("rms_norm_eps", "attention_dropout", "confidence_threshold"), (0, 1)),
    **dict.fromkeys(("input_embedding_scale", "output_multiplier"), (-1e6, 1e6)),
    "final_logit_softcapping": (1e-3, 1e6),
    "initializer_range": (0, 100),
}
_LISTS: dict[str, tuple[type, float, float]] = {
    "feature_layers": (int, -1, 4096),
    "branching": (int, 0, 2**24),
    "rank_weights": (float, 0, 1),
}
_LONGEST = 1024
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_TEXTS = ("target_name_or_path", "chat_template", "expansion", "hidden_act")
_ALSO_READ = {"architectures", "dtype", "torch_dtype", "rope_theta", "rope_scaling", "transformers_version"}
_NOT_READ = {"use_cache", "pretraining_tp", "tie_word_embeddings"}


class CheckedConfig:
    """Named by configurations of drafters before the one of transformers that they extend."""

    attends = True
    """Whether the network has attention heads, whose geometry matters."""

    def __post_init__(self, **kwargs):
        self._check_bounds()
        super().__post_init__(**kwargs)
        self._check_layers_read()
        self._check_acceptance()
        if self.attends:
            self._check_attention()

    @classmethod
    def documented(cls) -> set[str]:
        """Names of the fields that are read of a file."""
        inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
        return {field.name for field in dataclasses.fields(cast(Any, cls))} - inherited - _NOT_READ

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs):
        """
        As [`~transformers.PreTrainedConfig.from_dict`], of documented fields alone: whatever else a file says is
        ignored.

        Raises:
            ValueError: It does not describe a drafter that can be built.
        """
        documented = cls.documented()
        read = {name: value for name, value in config_dict.items() if name in documented | _ALSO_READ}
        # What the caller names goes first and is checked as well.
        read |= {name: kwargs.pop(name) for name in documented & kwargs.keys()}
        for name in ("dtype", "torch_dtype"):
            if str(read.get(name) or "float32").removeprefix("torch.") not in _DTYPES:
                raise ValueError(f"{name} is {_shown(read[name])}; give one of {', '.join(_DTYPES)}.")
        with refusing_misfits(kwargs.get("name_or_path") or f"this {cls.__name__}"):
            return cast(Any, super()).from_dict(read, **kwargs)

    def _check_bounds(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        for name, (least, most) in _WHOLE.items():
            if name in given and not _is_number(given[name], int, -most if least is None else least, most):
                limits = f"of at most {most}" if least is None else f"from {least} to {most}"
                raise ValueError(f"{name} is {_shown(given[name])}; give a whole number {limits}.")
        for name, (low, high) in _NUMBERS.items():
            if name in given and not _is_number(given[name], float, low, high):
                raise ValueError(f"{name} is {_shown(given[name])}; give a number from {low:g} to {high:g}.")
        for name, (kind, low, high) in _LISTS.items():
            if name in given and not _is_list(given[name], kind, low, high):
                raise ValueError(
                    f"{name} is {_shown(given[name])}; give a list of 1 to {_LONGEST} "
                    f"{'whole ' if kind is int else ''}numbers from {low:g} to {high:g}."
                )
        for name in _TEXTS:
            if name in given and not isinstance(given[name], str):
                raise ValueError(f"{name} is {_shown(given[name])}; give a text, or leave it out.")

    def _check_layers_read(self: Any) -> None:
        layers, depth = self.feature_layers, self.target_num_layers
        # -1 stands for all or for none of them.
        if (min(layers) < 0 < 1 + max(layers)) or (depth is not None and max(layers) > depth):
            raise ValueError(
                f"feature_layers is {_shown(layers)}; name hidden states of the target from 0 to "
                f"{'its number of layers' if depth is None else depth}, or give -1 for all of them."
            )

    def _check_acceptance(self: Any) -> None:
        for row in self.acceptance or ():
            whole = _is_list(row, float, float("-inf"), float("inf"), nan=True) and _is_list(row[:3], int, 0, 2**16)
            if not whole or len(row) not in (4, 5) or row[1] < 1:
                raise ValueError(
                    f"acceptance has the row {_shown(row)}; give nodes, forwards, starts and one or two accepted "
                    "lengths, or leave the table out."
                )

    def _check_attention(self: Any) -> None:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups or self.head_dim % 2 or not self.head_dim:
            raise ValueError(
                f"There are {heads} heads, {groups} key heads and a head_dim of {self.head_dim}; give as many heads "
                "for every key head, of an even width."
            )
        theta = (self.rope_parameters or {}).get("rope_theta")
        if not _is_number(theta, float, 1, 1e12):
            raise ValueError(f"rope_theta is {_shown(theta)}; give a number from 1 to 1e12 for all layers alike.")


@contextmanager
def refusing_misfits(name: object) -> Iterator[None]:
    """
    Around what builds something that a file describes: whatever libraries make of values which they do not expect
    becomes a `ValueError` of one sentence. Our own, which end as sentences do, go through.

    Args:
        name (`str` or `os.PathLike`): The checkpoint.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # every library fails in its own way
        what = " ".join(str(error).split())
        if isinstance(error, ValueError) and what.endswith("."):
            raise
        raise ValueError(
            f"config.json of {name} does not describe a drafter that can be built ({type(error).__name__}: {what}); "
            "take it from the original repository."
        ) from error


def _is_number(value: Any, kind: type, low: float, high: float, nan: bool = False) -> bool:
    kinds = (int,) if kind is int else (int, float)
    is_kind = isinstance(value, kinds) and not isinstance(value, bool)
    return is_kind and (low <= value <= high or (nan and value != value))


def _is_list(values: Any, kind: type, low: float, high: float, nan: bool = False) -> bool:
    return (
        isinstance(values, list | tuple)
        and 1 <= len(values) <= _LONGEST
        and all(_is_number(value, kind, low, high, nan) for value in values)
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
