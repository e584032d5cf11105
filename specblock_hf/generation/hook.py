# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The hook that lets `target.generate(assistant_model=drafter)` reach the decoding loop."""

from __future__ import annotations

from copy import copy
from functools import wraps
from inspect import unwrap
from typing import Any

from transformers import GenerationMixin, PreTrainedModel

from ..drafting.drafter import TreeDrafter
from .loop import generate_with_drafter
from .requests import check_request


def install() -> None:
    """
    Let `generate(assistant_model=drafter)` run [`TreeDrafter`]s, by wrapping two methods of
    [`~transformers.GenerationMixin`]. Everything else passes through untouched. Importing the package does this;
    calling it again does nothing. A package that is imported afresh has drafters of a class of its own, for which it
    wraps what it finds; those made before keep what was wrapped for them.
    """
    for name, wrap in (("_validate_generation_mode", _wrap_validate), ("_assisted_decoding", _wrap_assisted_decoding)):
        method = getattr(GenerationMixin, name)
        if not _leads_to_ours(method):
            wrapper = wrap(method, TreeDrafter)
            wrapper._specblock_hook = (wrapper, TreeDrafter)
            setattr(GenerationMixin, name, wrapper)


def is_installed() -> bool:
    """Whether `generate()` runs [`TreeDrafter`]s, others' wrappers around ours included."""
    methods = (GenerationMixin._validate_generation_mode, GenerationMixin._assisted_decoding)
    return all(map(_leads_to_ours, methods))


def uninstall() -> None:
    """
    Give [`~transformers.GenerationMixin`] its own methods back. Where someone has wrapped ours since, both stay:
    ours cannot be taken out from under theirs.
    """
    for name in ("_validate_generation_mode", "_assisted_decoding"):
        method = getattr(GenerationMixin, name)
        while _drafters_of(method) is not None:
            method = method.__wrapped__
        setattr(GenerationMixin, name, method)


def _drafters_of(method: Any) -> type | None:
    """The drafters that a method was wrapped for, by this package or by one that was imported before it."""
    hook, drafters = method.__dict__.get("_specblock_hook", (None, None))
    # Compared with itself, because `functools.wraps` copies the mark onto wrappers around ours.
    return drafters if hook is method else None


def _is_ours(method: Any) -> bool:
    return _drafters_of(method) is TreeDrafter


def _leads_to_ours(method: Any) -> bool:
    return _is_ours(unwrap(method, stop=_is_ours))


class _Verifiable:
    """
    A target to transformers' own check, which takes any that is stateful for one whose drafts cannot be verified;
    `check_request` knows which can.
    """

    _is_stateful = False

    def __init__(self, target: PreTrainedModel):
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def _wrap_validate(original: Any, drafters: type) -> Any:
    @wraps(original)
    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        drafter = generation_mode_kwargs.get("assistant_model")
        if isinstance(drafter, drafters):
            check_request(self, drafter, generation_mode, generation_config, generation_mode_kwargs)
            # Several sequences of a prompt are a batch like any other, which transformers' own assistants cannot take.
            generation_config = copy(generation_config)
            generation_config.num_return_sequences = 1
            self = _Verifiable(self) if self._is_stateful else self
        return original(self, generation_mode, generation_config, generation_mode_kwargs)

    return _validate_generation_mode


def _wrap_assisted_decoding(original: Any, drafters: type) -> Any:
    @wraps(original)
    def _assisted_decoding(self, input_ids, *args, assistant_model=None, **kwargs):
        if not isinstance(assistant_model, drafters):
            return original(self, input_ids, *args, assistant_model=assistant_model, **kwargs)
        for ignored in ("synced_gpus", "inputs_tensor", "assistant_tokenizer", "tokenizer"):
            kwargs.pop(ignored, None)
        return generate_with_drafter(self, assistant_model, input_ids, *args, **kwargs)

    return _assisted_decoding
