# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Reading the states of a target's layers while it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


def decoder_layers(decoder: nn.Module) -> Sequence[nn.Module]:
    """The decoder's layers, which GPT-2 and the families after it call `h`; none if it has another name for them."""
    for name in ("layers", "h"):
        if hasattr(decoder, name):
            return getattr(decoder, name)
    return ()


def tap(decoder: nn.Module, index: int, keep: Callable[[torch.Tensor], None]) -> torch.utils.hooks.RemovableHandle:
    """Hand a state of the decoder to `keep` in every forward; `index` is one of transformers' `hidden_states`."""
    layers = decoder_layers(decoder)

    def tell(state: torch.Tensor) -> None:
        # Gemma 3n's layers hand on several states of every token, of which one is active.
        keep(state if state.ndim == 3 else state[decoder.config.altup_active_idx])

    if index == 0:
        return layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: tell(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    if index == len(layers):
        return decoder.register_forward_hook(lambda _, args, output: tell(output[0]))
    return layers[index - 1].register_forward_hook(
        lambda _, args, output: tell(output[0] if isinstance(output, tuple) else output)
    )


class FeatureTaps:
    """
    Forward hooks that keep the target's states. A target may be called by others while a call is under way (another
    thread; a processor such as classifier-free guidance), so the hooks listen only while armed and only to the thread
    that armed them.

    Args:
        decoder (`nn.Module`): The target's decoder.
        layers (sequence of `int`):
            Indices into transformers' `hidden_states`: 0 is what enters the first layer, i what leaves layer i - 1,
            and the number of layers the state after the final norm.
    """

    def __init__(self, decoder: nn.Module, layers: Sequence[int]):
        self._layers = tuple(layers)
        self._states: dict[int, torch.Tensor] = {}
        self._thread: int | None = None
        self._handles = [self._hook(decoder, index) for index in sorted(set(layers))]

    def _hook(self, decoder: nn.Module, index: int) -> torch.utils.hooks.RemovableHandle:
        def keep(state: torch.Tensor) -> None:
            if self._thread == threading.get_ident():
                self._states[index] = state

        return tap(decoder, index, keep)

    @contextmanager
    def armed(self) -> Iterator[None]:
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None

    def take(self) -> tuple[torch.Tensor, ...]:
        """The states of the last armed forward, in the order of `layers`; they are not kept any longer."""
        states, self._states = self._states, {}
        if len(states) < len(self._handles):
            raise ValueError(
                "the target's layers ran without the hooks that read their states, as they do once torch.compile has "
                "seen them; pass the uncompiled model."
            )
        return tuple(states[index] for index in self._layers)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def columns_of(values: torch.Tensor, nodes: torch.LongTensor) -> torch.Tensor:
    """Columns `nodes` `[B, N]` of each row of `[B, W, d]`, as `[B, N, d]`; of those that are not there, any."""
    return values.take_along_dim(nodes.to(values.device).clamp_max(values.shape[1] - 1).unsqueeze(2), dim=1)


def spread(values: torch.Tensor, rows: torch.LongTensor, batch: int) -> torch.Tensor:
    """`[R, N, d]`, which are `rows` `[R]` of a batch, as all of it, `[batch, N, d]`; the others mean nothing."""
    return values.new_zeros(batch, *values.shape[1:]).index_copy_(0, rows, values)
