# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Targets with recurrent layers, whose state says nothing of the tokens before its last one. A forward goes on from a
state over several tokens, but leaves the state after the last of them only. So the states of a call lie at a committed
token and never go back: a round reads what was committed behind them *again*, then its drafts, and keeps the new
states if it keeps all that it has read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from ..compat import layer_types
from ..devices import on_device
from ..trees.tree import DraftTree
from ..trees.verification import Walk


RECURRENT_LAYERS = {"conv", "hybrid", "linear_attention"}

# Model types whose forward over several tokens goes on from a state, as tests/target/test_recurrent.py finds.
_GO_ON = {
    "bamba",
    "falcon_h1",
    "granitemoehybrid",
    "kimi_linear",
    "lfm2",
    "lfm2_moe",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
    "zamba2",
}
_FROM_ZERO = "begins every forward over several tokens with an empty state"
_ELSEWHERE = "keeps its state outside of transformers' cache layers"
_REASONS = {
    "falcon_mamba": _FROM_ZERO,
    "jamba": _FROM_ZERO,
    "mamba": _FROM_ZERO,
    "minimax": _ELSEWHERE,
    "recurrent_gemma": _ELSEWHERE,
    "rwkv": _ELSEWHERE,
    "xlstm": _ELSEWHERE,
}


def is_recurrent(target: PreTrainedModel) -> bool:
    """Whether some layers of a target keep a state, or a window of a convolution."""
    return target._is_stateful or not RECURRENT_LAYERS.isdisjoint(layer_types(target))


def check_recurrent(target: PreTrainedModel) -> None:
    """
    Refuse targets whose drafts could not be verified from their states.

    Raises:
        ValueError: In one sentence: what, why and what to do.
    """
    kind = target.config.get_text_config(decoder=True).model_type
    if is_recurrent(target) and kind not in _GO_ON:
        why = _REASONS.get(kind, "is not known to go on from it over several tokens")
        raise ValueError(
            f"{type(target).__name__} keeps a recurrent state and {why}, so that drafts cannot be verified in one "
            "forward; drop assistant_model."
        )


@dataclass
class LayerStates:
    """All that a recurrent layer remembers."""

    conv_states: dict[int, torch.Tensor | None]
    recurrent_states: dict[int, torch.Tensor | None]
    is_conv_states_initialized: dict[int, bool]
    is_recurrent_states_initialized: dict[int, bool]
    has_previous_state: dict[int, bool]


class RecurrentStates:
    """
    The states of a cache's recurrent layers while drafts are read. Windows of convolutions can be cut anywhere once
    their past is recorded; recurrent states are written in place, so that a round writes to a second buffer.

    Args:
        cache ([`~transformers.Cache`]): Has no such layer for most targets, and then nothing here does anything.
    """

    def __init__(self, cache: Any):
        self._layers = [layer for layer in cache.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
        # By layer and state: what a round must not touch, and a buffer that nothing is in.
        self._held: dict[tuple[int, int], torch.Tensor] = {}
        self._spare: dict[tuple[int, int], torch.Tensor] = {}
        self._windows: dict[tuple[int, int], torch.Tensor | None] = {}

    def __bool__(self) -> bool:
        return bool(self._layers)

    @property
    def lag(self) -> bool:
        """Whether a forward over a draft must be kept as a whole or not at all."""
        return any(any(layer.is_recurrent_states_initialized.values()) for layer in self._layers)

    def record_past(self, on: bool) -> None:
        """Let convolutions keep all that passes through them until `commit`."""
        for layer in self._layers:
            layer.record_past = on

    def hold(self, read: int) -> None:
        """Before a forward over so many tokens, which may not stay."""
        for number, layer in enumerate(self._layers):
            for index, state in layer.recurrent_states.items():
                if state is not None:
                    key = (number, index)
                    spare = self._spare.pop(key, None)
                    layer.recurrent_states[index] = state.clone() if spare is None else spare.copy_(state)
                    self._held[key] = state
            if read == 1:
                # Kimi-Linear then writes to a window in place, recorded or not.
                self._windows |= {(number, index): window for index, window in layer.conv_states.items()}
                layer.conv_states.update(
                    {index: None if window is None else window.clone() for index, window in layer.conv_states.items()}
                )

    def commit(self, kept: Sequence[int], read: int) -> None:
        """
        Args:
            kept (sequence of `int`): How many of the columns read each row keeps: with recurrent states all or none.
            read (`int`): Columns of the last forward.
        """
        moved = [columns == read for columns in kept]
        for (number, index), old in self._held.items():
            states = self._layers[number].recurrent_states
            new = states[index]
            if all(moved):
                self._spare[number, index] = old
                continue
            if any(moved):
                rows = on_device(moved, old.device).view(-1, *[1] * (old.ndim - 1))
                old = torch.where(rows, new, old)
            states[index], self._spare[number, index] = old, new
        for number, layer in enumerate(self._layers):
            for index, window in layer.conv_states.items():
                if window is not None:
                    old = self._windows.get((number, index))
                    if old is not None and old.shape == window.shape:
                        window = torch.cat((old, window[..., -1:]), dim=-1)
                    layer.conv_states[index] = _last(window, layer.conv_kernel_size[index], kept, read)
        self._held, self._windows = {}, {}

    def keep_rows(self, rows: torch.LongTensor) -> None:
        """Go on with these rows of the batch; between a forward and its `commit`, too."""
        for layer in self._layers:
            for states in (layer.conv_states, layer.recurrent_states):
                states.update({index: _of_rows(state, rows) for index, state in states.items()})
        self._held = {key: _of_rows(state, rows) for key, state in self._held.items()}
        self._windows = {key: _of_rows(window, rows) for key, window in self._windows.items()}
        self._spare = {}

    def snapshot(self) -> list[LayerStates]:
        """What `restore` goes back to."""
        return [self._copied(layer) for layer in self._layers]

    def restore(self, snapshot: list[LayerStates]) -> None:
        self._held, self._windows = {}, {}
        for layer, states in zip(self._layers, snapshot, strict=True):
            vars(layer).update(vars(states))

    def forget(self) -> None:
        """As before the first token."""
        for layer in self._layers:
            empty: dict[int, None] = dict.fromkeys(layer.conv_states)
            no = dict.fromkeys(layer.conv_states, False)
            vars(layer).update(vars(LayerStates(dict(empty), dict(empty), dict(no), dict(no), dict(no))))

    def release(self) -> None:
        """Leave to others no more than they need."""
        for layer in self._layers:
            layer.conv_states.update(
                {index: state if state is None else state.clone() for index, state in layer.conv_states.items()}
            )

    def _copied(self, layer: Any) -> LayerStates:
        # Nothing that is there now is written to in a round; the prompt is read in place.
        def copied(states: dict[int, torch.Tensor | None]) -> dict[int, torch.Tensor | None]:
            return {
                index: state if state is None or layer.record_past else state.clone()
                for index, state in states.items()
            }

        return LayerStates(
            copied(layer.conv_states),
            copied(layer.recurrent_states),
            dict(layer.is_conv_states_initialized),
            dict(layer.is_recurrent_states_initialized),
            dict(layer.has_previous_state),
        )


def _last(window: torch.Tensor, size: int, kept: Sequence[int], read: int) -> torch.Tensor:
    """The `size` last columns of each row before those that it does not keep."""
    ends = [window.shape[-1] - read + columns for columns in kept]
    if min(ends) == max(ends):
        return window[..., ends[0] - size : ends[0]]
    columns = torch.tensor(ends, device="cpu").unsqueeze(1) - size + torch.arange(size, device="cpu")
    columns = columns.view(-1, *[1] * (window.ndim - 2), size)
    return window.take_along_dim(columns.to(window.device), dim=-1)


def _of_rows(state: torch.Tensor | None, rows: torch.LongTensor) -> torch.Tensor | None:
    return None if state is None else state.index_select(0, rows.to(state.device))


class Lag:
    """
    How far the recurrent states of each row are behind its committed tokens: what is read again in the next round.
    All rows of a batch read as many tokens, because what pads a row would change its states as well.

    A row whose states stay reads more and more again. Once it has read as much again as a draft may be long, which is
    what another forward costs, it reads that once more without drafts, and its states move up.

    Args:
        batch_size (`int`): Rows of the batch.
        budget (`int`): Most drafted tokens of a round.
    """

    def __init__(self, batch_size: int, budget: int):
        self._budget = budget
        self._rows = [_Row() for _ in range(batch_size)]

    def lengths(self) -> list[int]:
        """Tokens that each row reads again; none if it has stopped, and reads anything."""
        return [0 if row.stopped else len(row.tokens) for row in self._rows]

    @property
    def longest(self) -> int:
        return max(self.lengths())

    def rests(self) -> bool:
        """Whether no row can have a draft in the next round."""
        active = [len(row.tokens) for row in self._rows if not row.stopped]
        return bool(active) and min(active) == max(active) and self._is_due()

    def depths(self, nodes: int) -> list[int]:
        """How deep the chain of each row may be, of chains that are `nodes` long, the root counted."""
        width = self.width(nodes)
        return [min(nodes, width - length) - 1 for length in self.lengths()]

    def width(self, nodes: int) -> int:
        """How many tokens the next round reads."""
        return self.longest + (1 if self._is_due() else nodes)

    def _is_due(self) -> bool:
        lengths = self.lengths()
        longest = max(lengths)
        return self._rows[lengths.index(longest)].again + longest > self._budget

    def ids(self, nodes: torch.LongTensor) -> torch.LongTensor:
        """
        What a round reads.

        Args:
            nodes (`torch.LongTensor` of shape `[B, N]`): Root and draft of each row.

        Returns:
            `torch.LongTensor` of shape `[B, W]`: Tokens read again, then these, then anything.
        """
        lengths, longest = self.lengths(), self.longest
        if not longest:
            return nodes[:, : self.width(nodes.shape[1])]
        again = [
            [0] * (longest - length) + row.tokens[:length] for row, length in zip(self._rows, lengths, strict=True)
        ]
        whole = torch.cat((on_device(again, nodes.device), nodes), dim=1)
        first = longest - on_device(lengths, nodes.device).unsqueeze(1)
        columns = first + torch.arange(self.width(nodes.shape[1]), device=nodes.device)
        return whole.gather(1, columns.clamp_max(whole.shape[1] - 1))

    def commit(self, walk: Walk, rows: Sequence[int], read: int) -> torch.LongTensor:
        """
        Take in what a round emitted.

        Args:
            walk ([`Walk`]): Of the whole batch.
            rows (sequence of `int`): Those of it that these are.
            read (`int`): Columns of the round.

        Returns:
            `torch.LongTensor` of shape `[B, W]`: The columns that each row keeps, all or none; see [`kept_columns`].
        """
        tokens, counts, stopped = walk.tokens.tolist(), walk.lengths.tolist(), walk.stopped.tolist()
        kept = []
        for own, row, again in zip(self._rows, rows, self.lengths(), strict=True):
            emitted = tokens[row][: counts[row]]
            whole = bool(emitted) and again + len(emitted) == read
            kept.append(whole)
            if whole:
                own.tokens, own.again = [], 0
            elif emitted:
                own.tokens = [*own.tokens, own.root, *emitted[:-1]]
                own.again += again
            own.root = emitted[-1] if emitted else own.root
            own.stopped |= stopped[row]
        return kept_columns(kept, read)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch."""
        self._rows = [self._rows[row] for row in rows]

    def catch_up(self) -> Iterator[tuple[list[list[int]], list[int]]]:
        """
        What is left to read again, in forwards that each read as many tokens of every row: those, which are anything
        for a row that is not behind, and how far each row is behind.
        """
        while any(behind := [len(row.tokens) for row in self._rows]):
            width = min(length for length in behind if length)
            yield [row.tokens[:width] or [0] * width for row in self._rows], behind
            for row in self._rows:
                row.tokens, row.again = row.tokens[width:], 0


@dataclass
class _Row:
    tokens: list[int] = field(default_factory=list)  # to be read again
    root: int = 0
    again: int = 0  # tokens read again since the states have moved
    stopped: bool = False


def kept_columns(kept: Sequence[bool], read: int) -> torch.LongTensor:
    """The columns of rows that keep all or none `[B, read]`, -1 for none; `[B, 0]` if none keeps any."""
    columns = torch.arange(read if any(kept) else 0, device="cpu").expand(len(kept), -1)
    return torch.where(torch.tensor(kept, device="cpu").unsqueeze(1), columns, -1)


def cut(chain: DraftTree, lag: Lag, rows: Sequence[int]) -> DraftTree:
    """A chain of which every row of the batch keeps what the next round can read; `rows` are those that go on."""
    depths = dict(zip(rows, lag.depths(chain.tokens.shape[1]), strict=True))
    return chain.limit_depth([depths.get(row, 0) for row in range(len(chain.tokens))])
