# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a call leaves behind for training: contiguous windows of its texts, and a buffer that bounds their bytes."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..drafting.pairs import Pairs, Scored, TokenTable
from ..drafting.target_batch import TargetBatch
from ..trees.tree import DraftTree
from ..trees.verification import Walk


@dataclass(frozen=True)
class Window:
    """
    P pairs in a row of one text, as the target saw them.

    Args:
        tokens (`torch.LongTensor` of shape `[P]`): x_{i+1}; -1 where a prompt came as embeddings.
        embeds (`torch.Tensor` of shape `[P, d]`): The target's embeddings of them.
        features (`torch.Tensor` of shape `[P, F * d]`): The target's states at x_i.
        top_ids (`torch.LongTensor` of shape `[P, k]`):
            The target's likeliest tokens in place of x_{i+1}; -1 in the prompt, which the target did not write.
        top_probs (`torch.Tensor` of shape `[P, k]`): Their probabilities at temperature 1.
    """

    tokens: torch.LongTensor
    embeds: torch.Tensor
    features: torch.Tensor
    top_ids: torch.LongTensor
    top_probs: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def scored(self) -> int:
        """How many of the tokens the target wrote."""
        return int((self.top_ids[:, 0] >= 0).sum())

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in self._parts())

    def last(self, pairs: int) -> Window:
        """Its last pairs, a copy where it has more: a slice would keep the others alive."""
        return self if len(self) <= pairs else Window(*(part[-pairs:].clone() for part in self._parts()))

    @classmethod
    def joined(cls, windows: Sequence[Window]) -> Window:
        """Windows that follow one another, as one."""
        return cls(*(torch.cat(parts) for parts in zip(*(window._parts() for window in windows), strict=True)))

    def _parts(self) -> tuple[torch.Tensor, ...]:
        return self.tokens, self.embeds, self.features, self.top_ids, self.top_probs


class CallRecorder:
    """
    Writes the windows of one call down while it decodes, and adds up how far the drafter was from the target.

    Args:
        batch_size (`int`): Rows of the call.
        dtype (`torch.dtype`): What features and embeddings are kept in.
        window_tokens (`int`): Most pairs that are kept of a row, its last ones.
        top_k (`int`): Tokens that are kept of each of the target's distributions.
        max_bytes (`int`): Bound of all rows' windows together; rows beyond it are not written down, but the first is.
    """

    def __init__(self, batch_size: int, dtype: torch.dtype, window_tokens: int, top_k: int, max_bytes: int):
        self.dtype = dtype
        self.window_tokens = window_tokens
        self.top_k = top_k
        self.max_bytes = max_bytes
        self._rows: list[deque[Window]] = [deque() for _ in range(batch_size)]
        self._held = [0] * batch_size  # pairs of each row
        self._signal: torch.Tensor | None = None

    def add_prompt(self, pairs: Pairs) -> None:
        """A chunk of the prompts, which teaches nothing but is what the drafter attends to."""
        for row, length in enumerate(pairs.lengths.tolist()):
            if length and row < len(self._rows):
                kept = min(length, self.window_tokens)
                no_ids = torch.full((kept, self.top_k), -1, device=pairs.tokens.device)
                no_probs = torch.zeros_like(no_ids, dtype=torch.float32)
                self._append(row, self._window(pairs, row, length - kept, length, no_ids, no_probs))

    def close_prompt(self, scored: Scored) -> None:
        """The prompts' distributions, from which the last token of every row so far was chosen."""
        for place, row in enumerate(scored.rows):
            if row < len(self._rows) and self._rows[row]:
                last = self._rows[row][-1]
                ids, probs = self._distributions(scored.logits[place], last.tokens.device)
                top_ids, top_probs = last.top_ids.clone(), last.top_probs.clone()
                top_ids[-1:], top_probs[-1:] = ids, probs
                self._rows[row][-1] = replace(last, top_ids=top_ids, top_probs=top_probs)

    def add_round(self, tree: DraftTree, scored: Scored, walk: Walk, pairs: Pairs) -> None:
        """What a verified tree emitted, with the target's distributions at the kept nodes."""
        signal = rejection_signal(tree, walk)
        self._signal = signal if self._signal is None else self._signal + signal
        lengths = walk.lengths.tolist()
        for place, row in enumerate(scored.rows):
            if lengths[row] and row < len(self._rows):
                nodes = walk.nodes[row, : lengths[row]].to(scored.logits.device)
                distributions = self._distributions(scored.logits[place, nodes], pairs.tokens.device)
                self._append(row, self._window(pairs, row, 0, lengths[row], *distributions))

    def signal(self) -> float:
        """The sum of [`rejection_signal`] over all rows and rounds."""
        return 0.0 if self._signal is None else float(self._signal.sum())

    def windows(self) -> list[Window]:
        """
        The windows of the rows for which the target wrote anything that a drafter could have guessed; the recorder
        lets go of them.
        """
        windows = []
        for parts in filter(None, self._rows):
            window = Window.joined(list(parts)).last(self.window_tokens)
            parts.clear()
            if window.scored > 1:
                windows.append(window)
        return windows

    def _append(self, row: int, window: Window) -> None:
        parts = self._rows[row]
        parts.append(window)
        self._held[row] += len(window)
        while self._held[row] - len(parts[0]) >= self.window_tokens:
            self._held[row] -= len(parts.popleft())
        # A buffer of so many bytes would not keep windows of more rows. What a pair takes is known from the first on.
        del self._rows[max(1, self.max_bytes // (self.window_tokens * window.num_bytes // len(window))) :]

    def _window(self, pairs: Pairs, row: int, first: int, last: int, top_ids, top_probs) -> Window:
        own, device = pairs.each(lambda values: values[row, first:last]), pairs.tokens.device
        # Copies: a slice would keep the states of the whole tree alive. Layers may lie on several devices.
        return Window(
            own.tokens.clone(),
            own.embeds().to(device, self.dtype, copy=True),
            torch.cat([feature.to(device) for feature in own.features], dim=-1).to(self.dtype),
            top_ids,
            top_probs,
        )

    def _distributions(self, logits: torch.Tensor, device: torch.device) -> tuple[torch.LongTensor, torch.Tensor]:
        """The likeliest tokens `[n, k]` of logits `[n, V]` and their probabilities, on a device."""
        logits = logits.float()
        best = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1)
        return best.indices.to(device), (best.values - logits.logsumexp(-1, keepdim=True)).exp().to(device)


def rejection_signal(tree: DraftTree, walk: Walk) -> torch.Tensor:
    """
    How far the drafter was from the target where its draft was rejected: 1 - q, q being the drafter's probability of
    the token that the target chose instead (equation 8). A tree holds the probabilities of drafted tokens only; one
    that was not drafted can have no more than the least likely sibling nor more than what all siblings leave, and that
    bound stands for q.

    Args:
        tree ([`DraftTree`]): The verified draft.
        walk ([`Walk`]): What was kept of it.

    Returns:
        `torch.Tensor` of shape `[B]`: 0 for rows that were not rejected: finished before, stopped at a drafted token,
        or accepted down to a leaf, where nothing was drafted that could be rejected.
    """
    end = (walk.lengths - 1).clamp_min(0).unsqueeze(1)
    node, token = walk.nodes.gather(1, end), walk.tokens.gather(1, end)
    children = tree.parents == node.to(tree.parents.device)
    drafted = (children & (tree.tokens == token.to(tree.tokens.device))).any(1)
    rejected = children.any(1) & ~drafted & (walk.lengths > 0).to(children.device)
    probs = tree.log_probs.float().exp()
    least = probs.masked_fill(~children, torch.inf).amin(1)
    left = 1 - probs.masked_fill(~children, 0).sum(1)
    return torch.where(rejected, 1 - torch.minimum(least, left).clamp(0, 1), 0)


class WindowBuffer:
    """
    The newest windows, within a bound of bytes.

    Args:
        max_bytes (`int`): When they are exceeded the oldest windows go.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.fresh = 0
        self._windows: deque[Window] = deque()

    def __len__(self) -> int:
        return len(self._windows)

    @property
    def fresh_tokens(self) -> int:
        """Tokens of the target that no batch has been drawn from yet."""
        return sum(self._windows[-number].scored for number in range(1, self.fresh + 1))

    def add(self, window: Window) -> None:
        """Keep a window; one that is larger than the bound by itself is not kept."""
        if window.num_bytes > self.max_bytes:
            return
        self._windows.append(window)
        self.num_bytes += window.num_bytes
        self.fresh += 1
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self._windows.popleft().num_bytes
        self.fresh = min(self.fresh, len(self._windows))

    def newest(self, count: int) -> list[Window]:
        """The last windows that came in, at most so many."""
        return list(self._windows)[-count:]

    def clear(self) -> None:
        """Drop everything."""
        self._windows.clear()
        self.num_bytes = self.fresh = 0

    def draw(self, batches: int, batch_tokens: int, rng: random.Random) -> list[list[Window]]:
        """
        Windows for some training steps: the fresh ones are dealt out over all steps, and each step is filled up with
        older ones, drawn at random.

        Args:
            batches (`int`): Steps.
            batch_tokens (`int`): Most pairs of a step, unless its first window has more.
            rng (`random.Random`): Draws.
        """
        windows = list(self._windows)
        fresh = windows[len(windows) - self.fresh :]
        rng.shuffle(fresh)
        self.fresh = 0
        dealt = []
        for number in range(batches):
            batch = fresh[number::batches]
            batch += rng.sample(windows, len(windows))
            dealt.append(_fitting(batch, batch_tokens))
        return dealt


def _fitting(windows: list[Window], tokens: int) -> list[Window]:
    """The first windows, each once, that have so many pairs together."""
    chosen: list[Window] = []
    for window in windows:
        if chosen and sum(map(len, chosen)) + len(window) > tokens:
            break
        if not any(window is other for other in chosen):
            chosen.append(window)
    return chosen


def collate(
    windows: Sequence[Window], draft_ids: torch.LongTensor, dtype: torch.dtype, table: TokenTable | None = None
) -> TargetBatch:
    """
    Windows as a batch of the trainer's kind. The first token of a window is not known and no objective looks at it.

    Args:
        windows (sequence of [`Window`]): B of them.
        draft_ids (`torch.LongTensor` of shape `[vocab_size]`):
            Draft id of every target id, -1 outside the draft vocabulary. The batch is made on its device.
        dtype (`torch.dtype`): Of embeddings and features.
        table ([`TokenTable`], *optional*): The target's, for drafters that predict with its head.
    """
    device = draft_ids.device

    def laid_out(name: str, pairs_first: int, fill: float = 0) -> torch.Tensor:
        """What windows say of their pairs as `[B, T, ...]`, the first pair at this place."""
        parts = [vars(window)[name].to(device) for window in windows]
        ends = (0, 0) * (parts[0].ndim - 1) + (pairs_first, 1 - pairs_first)
        rows = [nn.functional.pad(part, ends, value=fill) for part in parts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)

    ids = laid_out("top_ids", 1, -1)
    return TargetBatch(
        tokens=laid_out("tokens", 1).clamp_min(0),
        embeds=laid_out("embeds", 1).to(dtype),
        features=laid_out("features", 0).to(dtype),
        lengths=torch.tensor([len(window) + 1 for window in windows], device=device),
        top_ids=torch.where(ids >= 0, draft_ids[ids.clamp_min(0)], -1),
        top_probs=laid_out("top_probs", 1),
        scored=ids[..., 0] >= 0,
        table=table,
    )
