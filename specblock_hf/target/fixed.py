# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The target's side of rounds whose shapes never change: scoring, walking and committing as functions of buffers. Nothing
in them depends on a number of the host that changes, so that they can be captured and replayed.

Every row of the batch has as many committed columns as its own length says. A tree's columns are written behind them,
and those of the accepted path moved next to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from transformers import DynamicCache, PreTrainedModel

from ..compat import CACHE
from ..devices import on_device, upload, without_cudnn_attention
from ..drafting.pairs import Pairs, Scored
from ..trees.tree import DraftTree
from ..trees.verification import Stop, Walk
from .cache_layer import RowMemory
from .inputs import without_training_flags
from .masks import TreeMasks, layer_windows
from .model import TargetModel
from .recurrent import is_recurrent
from .support import rope_limits
from .twin import twin_of


class FixedStep(Protocol):
    """
    A function of buffers.

    Attributes:
        captured (`bool`): Its last use was a replay.
        settled (`bool`): Its last use cost what later ones will.
    """

    captured: bool
    settled: bool

    def __call__(self) -> Any: ...


MakeStep = Callable[[Callable[[], Any]], FixedStep]
"""Turns a function without arguments into a step that may be captured; see [`Step`]."""


@dataclass
class Judged:
    """
    What a forward says of a tree of fixed size.

    Args:
        logits (`torch.Tensor` of shape `[B, N, V]`): At every node.
        features (`tuple` of `torch.Tensor` of shape `[B, N, d]`): What the drafter reads.
        seen (`torch.BoolTensor` of shape `[B, N, N]`): The tree's ancestors.
    """

    logits: torch.Tensor
    features: tuple[torch.Tensor, ...]
    seen: torch.Tensor


class TargetRounds:
    """
    Buffers of a target's rounds, which many calls use one after the other.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model; not changed.
        layers (sequence of `int`): What the drafter reads; see [`FeatureTaps`].
        batch_size (`int`): Rows of the batch.
        max_length (`int`): Most tokens of a row.
        sizes (sequence of `int`): Nodes of trees, the root counted, that trees are padded to.
        make_step (`Callable`): See `MakeStep`.
        wrap (`Callable`, *optional*): Makes something faster of the target's forward, which is a function of tensors.

    Raises:
        `ValueError`: In one sentence, why this target cannot have rounds of fixed shapes.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        layers: Sequence[int],
        batch_size: int,
        max_length: int,
        sizes: Sequence[int],
        make_step: MakeStep,
        wrap: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    ):
        check_fixed(target)
        self.target, self.layers, self.batch_size, self.max_length = target, tuple(layers), batch_size, max_length
        self.sizes, self.make_step = sorted(set(sizes)), make_step
        device = target.device
        cache, zero = DynamicCache(config=target.config), torch.zeros(1, 1, dtype=torch.long, device=device)
        with without_cudnn_attention:
            target(input_ids=zero, position_ids=zero, **{CACHE: cache}, **without_training_flags(target))
        # A row that the host stops may have committed a whole tree more, and still writes its padding.
        self.memory = RowMemory(cache.layers, batch_size, max_length + 2 * self.sizes[-1])
        self.masks = TreeMasks(target)
        twin = twin_of(target, self.layers)

        def forward(
            ids: torch.LongTensor, positions: torch.LongTensor, mask: torch.Tensor, cache: Any
        ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
            return twin(input_ids=ids, position_ids=positions, attention_mask=mask, **{CACHE: cache})

        self.forward = wrap(forward) if wrap else forward
        self.lengths, self.base = (torch.zeros(batch_size, dtype=torch.long, device=device) for _ in range(2))
        self.position, self.last = (torch.zeros(batch_size, 1, dtype=torch.long, device=device) for _ in range(2))
        self.active = torch.ones(batch_size, 1, dtype=torch.bool, device=device)
        self.visible = torch.ones(batch_size, self.memory.columns, dtype=torch.bool, device=device)
        self._sized: dict[int, SizedRound] = {}

    def sized(self, nodes: int) -> SizedRound:
        """The round of trees that are padded to the smallest size that these nodes fit."""
        size = next(size for size in self.sizes if size >= nodes)
        if size not in self._sized:
            with torch.inference_mode(False), torch.no_grad():
                self._sized[size] = SizedRound(self, size)
        return self._sized[size]


class SizedRound:
    """
    A round of trees of one size N: `score`, then `walk` and `commit`, or `load` and `commit` for what was decided on
    the host.

    Args:
        rounds ([`TargetRounds`]): What all sizes share.
        size (`int`): N.

    Attributes:
        tree ([`DraftTree`]): Tokens and parents that `score` reads.
    """

    def __init__(self, rounds: TargetRounds, size: int):
        self._rounds, self.size = rounds, size
        batch, device = rounds.batch_size, rounds.lengths.device
        root = torch.zeros(batch, dtype=torch.long, device=device)
        self.tree = replace(DraftTree.root(root).pad(size), height=size - 1)
        self._walk = torch.full((batch, 2 * size + 1), -1, device=device)
        self.nodes, self.emitted, lengths = self._walk.split([size, size, 1], dim=1)
        self.lengths = lengths.squeeze(1)
        self.score, self.walk, self.commit = map(rounds.make_step, (self._score, self._greedy, self._commit))
        self.judged: Judged | None = None

    def fill(self, tree: DraftTree) -> None:
        """Put a tree of at most N nodes into the buffers."""
        count = tree.tokens.shape[1]
        self.tree.tokens[:, :count] = tree.tokens
        self.tree.parents[:, :count] = tree.parents
        self.tree.parents[:, count:] = -2

    def load(self, walk: Walk) -> None:
        """Put what the host has decided into the buffers."""
        pad = (0, self.size - walk.nodes.shape[1])
        parts = [torch.nn.functional.pad(part, pad, value=-1) for part in (walk.nodes, walk.tokens)]
        self._walk.copy_(upload(torch.cat((*parts, walk.lengths.unsqueeze(1)), dim=1), self._walk.device))

    def read(self) -> tuple[list[list[int]], list[list[int]], list[int]]:
        """Nodes, tokens and lengths of the walk, padding included, on the host, which waits for them."""
        rows = self._walk.tolist()
        return [row[: self.size] for row in rows], [row[self.size : -1] for row in rows], [row[-1] for row in rows]

    @cached_property
    def _steps(self) -> torch.LongTensor:
        return torch.arange(self.size, device=self._walk.device)

    @without_cudnn_attention
    def _score(self) -> Judged:
        rounds, memory = self._rounds, self._rounds.memory
        seen = self.tree.ancestors()
        depths = seen.sum(2) - 1
        memory.places = rounds.lengths.unsqueeze(1) + self._steps
        columns = torch.arange(memory.columns, device=self._steps.device)
        prefix = rounds.visible & (columns < rounds.lengths.unsqueeze(1))
        shape = (-1, self.size, -1)
        mask = prefix.unsqueeze(1).expand(shape).scatter(2, memory.places.unsqueeze(1).expand(shape), seen)
        ids = torch.cat((rounds.last, self.tree.tokens[:, 1:]), dim=1)
        mask = rounds.masks.in_form(mask.unsqueeze(1))
        logits, features = rounds.forward(ids, rounds.position + depths, mask, memory.cache)
        return Judged(logits, features, seen)

    def _greedy(self) -> None:
        """Follow the target's likeliest tokens down the tree, as far as it has them."""
        choices, seen = self.judged.logits.argmax(-1), self.judged.seen
        parents = self.tree.parents
        right = (self.tree.tokens == choices.gather(1, parents.clamp_min(0))) & (parents >= 0) | (parents == -1)
        # What does not hang below the root was scored for nothing.
        on_path = (right.unsqueeze(1) | ~seen).all(2) & seen[:, :, 0]
        depths = seen.sum(2) - 1
        deepest = torch.where(on_path, depths, -1).argmax(1)
        path = seen.gather(1, deepest[:, None, None].expand(-1, 1, self.size)).squeeze(1) & self._rounds.active
        # What is not on the path is written to one column more, and dropped.
        place = torch.where(path, depths, self.size)
        nodes = torch.full_like(self._walk[:, : self.size + 1], -1)
        nodes = nodes.scatter(1, place, self._steps.expand_as(place))[:, : self.size]
        self.nodes.copy_(nodes)
        self.emitted.copy_(torch.where(nodes >= 0, choices.gather(1, nodes.clamp_min(0)), -1))
        self.lengths.copy_((nodes >= 0).sum(1))

    def _commit(self) -> tuple[tuple[torch.Tensor, ...], torch.LongTensor]:
        """Keep the walked nodes; their features `[B, N, d]` and positions `[B, N]`, which padding follows."""
        rounds = self._rounds
        nodes = torch.where(self.nodes >= 0, self.nodes, self._steps)  # padding stays where it is
        first = rounds.lengths.unsqueeze(1)
        rounds.memory.move(first + nodes, first + self._steps)
        picked = nodes.unsqueeze(2)
        features = tuple(part.gather(1, picked.expand(-1, -1, part.shape[2])) for part in self.judged.features)
        positions = rounds.base.unsqueeze(1) + self._steps
        grown = self.lengths.unsqueeze(1)
        last = self.emitted.gather(1, (grown - 1).clamp_min(0))
        rounds.last.copy_(torch.where(grown > 0, last, rounds.last))
        rounds.lengths.add_(self.lengths)
        rounds.base.add_(self.lengths)
        rounds.position.add_(grown)
        return features, positions


class FixedTarget(TargetModel):
    """
    A [`TargetModel`] whose rounds, once the prompt has been read, run on [`TargetRounds`]. Rows stay when they have
    stopped, because they are part of the shapes.

    Args:
        rounds ([`TargetRounds`]): Lent to this call.
        keeps (`bool`): Somebody may hold on to what this returns, which is copied for that.
        *args, **kwargs: Of [`TargetModel`]; the cache is a `DynamicCache` that nobody else uses.
    """

    def __init__(self, rounds: TargetRounds, keeps: bool, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._rounds, self._keeps = rounds, keeps
        self._round: SizedRound | None = None
        self._settled = False
        self._active = [True] * rounds.batch_size
        self._walked: list[int] | None = None  # lengths as the device has walked
        self._kept: tuple[tuple[torch.Tensor, ...], torch.LongTensor] | None = None

    @property
    def fixed(self) -> bool:
        return True

    @property
    def columns(self) -> int:
        return self._round.size

    @property
    def settled(self) -> bool:
        return self._settled

    def room(self) -> int:
        return self._rounds.sizes[-1]

    def scorable(self, tree: DraftTree) -> DraftTree:
        return super().scorable(tree).first(self._rounds.sizes[-1])

    def score(self, tree: DraftTree) -> Scored:
        if self._round is None:
            self._begin()
        self._round, count = self._rounds.sized(tree.tokens.shape[1]), tree.tokens.shape[1]
        self._round.fill(tree)
        self._round.judged = self._round.score()
        self._settled = self._round.score.settled
        self._walked = None
        self.calls += 1
        self.compiled_calls += 1
        self.captured_calls += self._round.score.captured
        logits, features = self._round.judged.logits, self._round.judged.features
        return Scored(self._own(logits[:, :count]), tuple(self._own(part[:, :count]) for part in features), self._rows)

    def greedy_walk(self, active: Sequence[bool], stop: Stop) -> Walk:
        if self._active != active:
            self._active = list(active)
            self._rounds.active.copy_(on_device(self._active, self.device).unsqueeze(1))
        self._round.walk()
        self._settled &= self._round.walk.settled
        self._commit()
        nodes, tokens, self._walked = self._round.read()
        rows = []
        for row, length in enumerate(self._walked):
            kept, stopped = 0, False
            while kept < length and not stopped:
                stopped = stop(row, tokens[row][kept])
                kept += 1
            rows.append((nodes[row][:kept], tokens[row][:kept], stopped))
        return Walk.of_rows(rows)

    def settle(self, tree: DraftTree, scored: Scored, walk: Walk) -> Pairs:
        if self._walked is None:
            self._round.load(walk)
            self._commit()
        elif self._walked != walk.lengths.tolist():  # a row has ended before the end of its path
            self._round.lengths.copy_(upload(walk.lengths, self.device))
        features, positions = self._kept
        width = walk.tokens.shape[1]
        return Pairs(
            tokens=self._own(self._round.emitted[:, :width]),
            features=tuple(self._own(part[:, :width]) for part in features),
            positions=self._own(positions[:, :width]),
            lengths=self._own(self._round.lengths),
            table=self.table,
            read=walk.emitted(),
        )

    def _commit(self) -> None:
        self._kept = self._round.commit()
        self._settled &= self._round.commit.settled

    def _begin(self) -> None:
        """Go on from what the prompt has left."""
        rounds, committed = self._rounds, self._committed
        rounds.memory.load(committed.cache.layers)
        committed.cache.layers.clear()
        rounds.lengths.fill_(committed.width)
        rounds.visible.fill_(True)
        if committed.visible is not None:
            rounds.visible[:, : committed.width] = committed.visible
        rounds.active.fill_(True)
        rounds.base.copy_(self.base)
        rounds.position.copy_(self._next_position)
        rounds.last.copy_(self._last)

    def _retire(self, nodes: torch.LongTensor, stopped: list[bool]) -> torch.LongTensor:
        return nodes

    def _own(self, values: torch.Tensor) -> torch.Tensor:
        return values.clone() if self._keeps else values


def check_fixed(target: PreTrainedModel) -> None:
    """
    Refuse targets whose rounds cannot have fixed shapes.

    Raises:
        `ValueError`: In one sentence: what, why and what to do.
    """
    name = type(target).__name__
    if any(window is not None for window in layer_windows(target)):
        raise ValueError(
            f"{name} has layers that slide, whose keys have no fixed place that trees could be compiled for; use the "
            "drafter uncompiled."
        )
    if is_recurrent(target):
        raise ValueError(
            f"{name} has layers that keep a state, which no tree can be scored with; use the drafter uncompiled."
        )
    if TreeMasks(target).chains_only:
        raise ValueError(
            f"the attention of this {name} takes no mask of a tree, which its forward would be compiled for; call "
            'target.set_attn_implementation("sdpa") before.'
        )
    if rope_limits(target):
        raise ValueError(
            f"the rotary positions of {name} change at a length, which a compiled forward would not ask for; use the "
            "drafter uncompiled."
        )
