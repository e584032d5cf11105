# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The hook that lets `target.generate(assistant_model=drafter)` reach the decoding loop."""

from __future__ import annotations

from copy import copy
from functools import wraps
from inspect import signature, unwrap
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..drafting.attachment import attachment_of, is_refusal, refusing
from ..drafting.drafter import TreeDrafter
from .loop import generate_with_drafter
from .requests import check_request


def install() -> None:
    """
    Let `generate(assistant_model=drafter)` run [`TreeDrafter`]s, and plain `generate()` the one that is attached to
    its target, by wrapping methods of [`~transformers.GenerationMixin`]. Everything else passes through untouched.
    Importing the package does this; calling it again does nothing. A package that is imported afresh has drafters of a
    class of its own, for which it wraps what it finds; those made before keep what was wrapped for them.
    """
    for name, wrap in _WRAPPERS.items():
        method = getattr(GenerationMixin, name)
        if not _leads_to_ours(method):
            wrapper = wrap(method, TreeDrafter)
            wrapper._specblock_hook = (wrapper, TreeDrafter)
            setattr(_owner(name), name, wrapper)


def is_installed() -> bool:
    """Whether `generate()` runs [`TreeDrafter`]s, others' wrappers around ours included."""
    return all(_leads_to_ours(getattr(GenerationMixin, name)) for name in _WRAPPERS)


def uninstall() -> None:
    """
    Give [`~transformers.GenerationMixin`] its own methods back. Where someone has wrapped ours since, both stay:
    ours cannot be taken out from under theirs.
    """
    for name in _WRAPPERS:
        method = getattr(GenerationMixin, name)
        while _drafters_of(method) is not None:
            method = method.__wrapped__
        setattr(_owner(name), name, method)


def _owner(name: str) -> type:
    """The class that a method of `generate()` stands in: [`~transformers.GenerationMixin`] or one below it."""
    return next(owner for owner in GenerationMixin.__mro__ if name in vars(owner))


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
            with refusing(drafter):
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


def _wrap_generate(original: Any, drafters: type) -> Any:
    @wraps(original)
    def generate(self, *args, **kwargs):
        attachment = attachment_of(self)
        if attachment is None or not isinstance(attachment.drafter, drafters):
            return original(self, *args, **kwargs)
        given = signature(original).bind(self, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        del given["self"]
        if given.get("cache_implementation") == "paged":
            return original(self, **given)  # calls generate_batch()
        reason = _own_way(given)
        if reason is not None:
            attachment.count_left_alone(reason)
            return original(self, **given)
        if given.get("streamer") is not None:
            given["streamer"] = _PromptOnce(given["streamer"])
        try:
            output = original(self, **given | {"assistant_model": attachment.drafter})
        except ValueError as error:
            # Of a refused call nothing has been done but that its prompt was streamed.
            if not is_refusal(error, attachment.drafter):
                raise
            attachment.count_left_alone(str(error))
            return original(self, **given)
        attachment.count_served(attachment.drafter.last_statistics)
        return output

    return generate


def _own_way(given: dict[str, Any]) -> str | None:
    """Why a call decodes in a way of its own; `None` if it leaves that to `generate()`."""
    if given.get("assistant_model") is not None:
        return "it names an assistant of its own."
    config = given.get("generation_config")
    if config is not None and config.is_assistant:
        return "it drafts for another target, which rolls its cache back."
    if given.get("custom_generate") is not None:
        return "it brings a decoding method of its own."
    return None


def _wrap_generate_batch(original: Any, drafters: type) -> Any:
    @wraps(original)
    def generate_batch(self, *args, **kwargs):
        attachment = attachment_of(self)
        if attachment is not None and isinstance(attachment.drafter, drafters):
            attachment.count_left_alone("generate_batch() decodes continuously, where no drafter can take part.")
        return original(self, *args, **kwargs)

    return generate_batch


class _PromptOnce(BaseStreamer):
    """A streamer that hears of the prompt once, whether it is decoded with the drafter or, refused, without."""

    def __init__(self, streamer: BaseStreamer):
        self.streamer = streamer
        self.prompts = 0

    def put(self, value: torch.Tensor) -> None:
        if value.ndim < 2:
            return self.streamer.put(value)
        self.prompts += 1
        if self.prompts == 1:
            self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()


_WRAPPERS = {
    "generate": _wrap_generate,
    "generate_batch": _wrap_generate_batch,
    "_validate_generation_mode": _wrap_validate,
    "_assisted_decoding": _wrap_assisted_decoding,
}
