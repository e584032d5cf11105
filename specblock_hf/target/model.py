# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The adapter around a stock transformers model: with the other `target*.py` the only place that knows transformers'
caches and masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import PreTrainedModel

from ..compat import CACHE
from ..devices import on_device, without_cudnn_attention
from ..drafting.pairs import Pairs, Scored, TokenTable
from ..trees.tree import DraftTree
from .cache import TargetCache
from .features import FeatureTaps
from .inputs import TargetInputs
from .masks import TreeMasks, layer_windows, likeliest_chain
from .prompt import PromptPairs
from .support import check_length, rope_limits
from .token_outputs import TokenOutputs


if TYPE_CHECKING:
    from ..trees.verification import Walk


# What plain decoding hands back of every token, if `output_...` asks for it.
_TOKEN_OUTPUTS = ("hidden_states", "attentions")


class TreeScorer(Protocol):
    """Scores trees of a few sizes in memory of its own, faster than the model itself."""

    def size_for(self, nodes: int) -> int | None:
        """The size that so many nodes are padded to; `None` if none is large enough."""

    def __call__(
        self, ids: torch.LongTensor, positions: torch.LongTensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """
        Logits `[B, N, V]` and a feature `[B, N, d]` for each layer that the drafter reads, of ids `[B, N]` at
        positions `[B, N]` with a mask `[B, 1, N, columns]`.
        """


class TargetModel:
    """
    A target during one `generate()` call. Between rounds its cache holds every committed token but the last, which is
    the root of the next tree. Use it as a context manager: leaving it takes the hooks off the target.

    Args:
        target ([`~transformers.PreTrainedModel`]): A decoder-only model; not changed.
        feature_layers (sequence of `int`): What the drafter reads; see [`FeatureTaps`].
        input_ids (`torch.LongTensor` of shape `[B, P]`): The prompts; empty if they come as `inputs_embeds`.
        model_kwargs (`dict`): What `generate()` prepared for the target.
        mask_length (`int`, *optional*): Length of an attention mask of ones that `generate()` dropped.
        chunk_size (`int`, *optional*): Most prompt tokens of one forward.
        returns_cache (`bool`, *optional*, defaults to `True`):
            Somebody goes on with the cache, so that a row that has stopped stays in it. Otherwise it is retired and
            costs nothing any more.
        compiled ([`TreeScorer`], *optional*):
            Scores the trees that fit it; the call's cache is its own, and rows stay when they have stopped, because
            they are part of its shapes.

    Attributes:
        calls (`int`): Forwards so far.
        compiled_calls (`int`): How many of them were compiled.

    Raises:
        ValueError: An unsupported cache or input, padding on the right, or nothing left to prefill.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        feature_layers: Sequence[int],
        input_ids: torch.LongTensor,
        model_kwargs: dict[str, Any],
        mask_length: int | None = None,
        chunk_size: int | None = None,
        returns_cache: bool = True,
        compiled: TreeScorer | None = None,
    ):
        self.target = target
        self._compiled = compiled
        self.table = TokenTable.of(target)
        self._rows = list(range(input_ids.shape[0]))
        self._index: torch.LongTensor | None = None  # `_rows` on the device, once some have been retired
        self._returns_cache = returns_cache
        self._inputs = inputs = TargetInputs(target, input_ids, model_kwargs, mask_length, returns_cache)
        self.cache, mask, width = inputs.cache, inputs.mask, inputs.cached + inputs.new
        self._chunk_size = inputs.new if inputs.has_pictures or chunk_size is None else chunk_size
        visible = None if mask is None or bool((mask != 0).all()) else (mask != 0).to(self.device)
        self._committed = TargetCache(self.cache, input_ids.shape[0], width, visible)
        self._next_position = inputs.last_positions(self.device) + 1
        self._limits = rope_limits(target)
        self._ahead = int(self._next_position.max()) - width if self._limits else 0
        self._rereading = inputs.rereading(visible is None, self.device) if self._limits else None
        self._scored = 1
        self._last = torch.zeros(input_ids.shape[0], 1, dtype=torch.long, device=self.device)
        self.base = torch.full((input_ids.shape[0],), width, device=self.device) if visible is None else visible.sum(1)
        self.calls = self.compiled_calls = 0
        self._masks = TreeMasks(target)
        wanted = [name for name in _TOKEN_OUTPUTS if returns_cache and model_kwargs.get(f"output_{name}")]
        self._outputs = TokenOutputs(wanted, len(self._rows), layer_windows(target) if wanted else [])
        self._taps = FeatureTaps(target.get_decoder(), feature_layers)

    @property
    def device(self) -> torch.device:
        return self.table.device

    def version(self) -> int:
        """Grows with every change of the weights in place, as optimisers make them."""
        # What was made in inference mode counts nothing.
        return sum(weight._version for weight in self.target.parameters() if not weight.is_inference())

    def __enter__(self) -> TargetModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        self._taps.remove()
        self._committed.end(self._returns_cache, broken_off=kind is not None)

    @property
    def chains_only(self) -> bool:
        """Whether the target's attention takes no mask that could show it a draft tree."""
        return self._masks.chains_only

    def first_position(self) -> int:
        """Position of the first token that [`~TargetModel.prefill`] reads; above 0 for a continued cache."""
        cached, visible = self._inputs.cached, self._committed.visible
        return cached if visible is None else int(visible[:, :cached].sum(1).min())

    def room(self) -> int | None:
        """Nodes that the cache has room for, the root counted; `None` if it grows."""
        return self._committed.room()

    def depth(self) -> int | None:
        """Most levels that the next tree may have below its root; `None` for as many as one likes."""
        width = self._committed.width
        depths = [limit.depth(width + self._ahead) for limit in self._limits]
        if self._rereading is not None:
            depths.append(self._rereading.depth(width))
        return min((depth for depth in depths if depth is not None), default=None)

    def check_length(self, remaining: int) -> None:
        """
        Refuse a call in which rotary positions change where rounds of drafts cannot follow; see [`check_length`].

        Args:
            remaining (`int`): Most tokens that a row may emit.
        """
        if self._limits:
            check_length(self.target, self._inputs.last_positions(self.device), remaining)
        again, width = self._rereading, self._committed.width
        if again is not None and width <= again.length < width + remaining - 1 and self._outputs.flags:
            raise ValueError(
                f"{type(self.target).__name__} reads a text again from its beginning when it is over {again.length} "
                "tokens, of which output_hidden_states and output_attentions are not handed back; leave them out."
            )

    def pauses(self) -> bool:
        """Whether the next tree can only be a root although later ones can be more."""
        return self.depth() == 0 and any(limit.changes_once for limit in self._limits)

    def prefill(self) -> Iterator[tuple[Scored, Pairs]]:
        """
        Read the prompt chunk by chunk. The token that follows the prompt is not known yet: it is -1 in the last
        chunk's pairs, which [`~TargetModel.close_prompt`] completes. After the last chunk the prompt's last token
        counts as a scored root.
        """
        committed = self._committed
        committed.begin_prompt()
        inputs = self._inputs
        prompt = PromptPairs(self.table, inputs.ids, inputs.embeds, inputs.new, committed.visible, committed.width)
        for start in range(0, inputs.new, self._chunk_size):
            end = min(start + self._chunk_size, inputs.new)
            scored = self._forward(**inputs.of_prompt(start, end))
            committed.read_prompt(inputs.cached + end)
            if end == inputs.new:
                committed.begin_rounds()
                self.base = self.base - 1
                self._next_position = self._next_position - 1
            yield replace(scored, logits=scored.logits[:, -1:]), prompt.pairs(scored.features, start, end)

    def close_prompt(self, pairs: Pairs, walk: Walk) -> Pairs:
        """The last chunk's pairs, completed by the first emitted token."""
        rows = torch.arange(pairs.tokens.shape[0], device=self.device)
        first = walk.tokens[:, 0].to(self.device)
        pairs.tokens[rows, pairs.lengths - 1] = first
        if pairs.given_embeds is not None:
            pairs.given_embeds[rows, pairs.lengths - 1] = self.table.embed(first)
        return pairs

    def scorable(self, tree: DraftTree) -> DraftTree:
        """
        What of a tree the target's attention can score, all of it or its likeliest path where it takes no mask, on
        the target's device, wherever the drafter is.
        """
        return (likeliest_chain(tree) if self.chains_only else tree).to(self.device)

    def token_outputs(self) -> dict[str, Any]:
        """`hidden_states` and `attentions` of the emitted tokens, if the call asks for them."""
        return self._outputs.output()

    def score(self, tree: DraftTree) -> Scored:
        """
        One forward over all nodes of a tree. Whatever the drafter wrote there, the root is the last committed token.

        Args:
            tree ([`DraftTree`]): N nodes wide.

        Returns:
            [`Scored`]: Logits `[R, N, V]` and features `[B, N, d]`.
        """
        if self._index is not None:
            tree = replace(tree, tokens=tree.tokens[self._index], parents=tree.parents[self._index])
        if self._rereads():
            return self._read_again()
        size = self._compiled and self._compiled.size_for(tree.tokens.shape[1])
        if size:
            return self._score_compiled(tree, size)
        depths = tree.depths().to(self.device)
        self._scored = depths.shape[1]
        return self._forward(
            input_ids=self._node_ids(tree),
            position_ids=self._next_position + depths,
            attention_mask=self._masks.mask(tree, depths, self._committed),
            use_cache=True,
            **{CACHE: self.cache},
            **self._inputs.of_tree(depths.shape[1], self._rows) | self._outputs.flags,
        )

    def _rereads(self) -> bool:
        """Whether plain decoding would read the whole text again at the next root."""
        return self._rereading is not None and self._committed.width == self._rereading.length

    def _read_again(self) -> Scored:
        """Read the whole text, of which the last token counts as the scored root."""
        self._scored = 1
        self._committed.empty()
        scored = self._forward(**self._rereading.inputs())
        return replace(
            scored, logits=scored.logits[:, -1:], features=tuple(feature[:, -1:] for feature in scored.features)
        )

    def _node_ids(self, tree: DraftTree) -> torch.LongTensor:
        return torch.cat((self._last, tree.tokens[:, 1:].to(self.device)), dim=1)

    def _score_compiled(self, tree: DraftTree, size: int) -> Scored:
        """`score`, with padding behind the nodes; nobody sees what is scored there."""
        count, tree = tree.tokens.shape[1], tree.pad(size)
        depths = tree.depths().to(self.device)
        self._scored = size
        self.calls += 1
        self.compiled_calls += 1
        mask = self._masks.mask(tree, depths, self._committed, always=True)
        with without_cudnn_attention:
            logits, features = self._compiled(self._node_ids(tree), self._next_position + depths, mask)
        return Scored(logits[:, :count], tuple(feature[:, :count] for feature in features), self._rows)

    def commit(self, walk: Walk) -> None:
        """
        Keep the walked nodes' rows of the cache and drop the others.

        Args:
            walk ([`Walk`]): What the last scored tree, or the prompt, emitted.
        """
        nodes, kept = walk.nodes[self._rows], walk.to(self.device)
        self.base = self.base + kept.lengths
        tokens, lengths = kept.tokens, kept.lengths
        if self._index is not None:
            tokens, lengths = tokens[self._index], lengths[self._index]
        if self._rereading is not None:
            self._rereading.emitted.append(tokens[:, : int(walk.lengths.max())])
        last = tokens.gather(1, (lengths - 1).clamp_min(0).unsqueeze(1))
        grown = lengths.unsqueeze(1)
        self._last = torch.where(grown > 0, last, self._last)
        self._next_position = self._next_position + grown
        if len(self._rows) > 1 and not self._returns_cache and self._compiled is None:
            nodes = self._retire(nodes, walk.stopped.tolist())
        self._outputs.keep(nodes, self._committed)
        self._committed.commit(nodes, self._scored)

    def _retire(self, nodes: torch.LongTensor, stopped: list[bool]) -> torch.LongTensor:
        """Drop the rows that have just stopped, if others go on; the kept nodes of those."""
        left = [place for place, row in enumerate(self._rows) if not stopped[row]]
        if len(left) in (0, len(self._rows)):
            return nodes
        self._rows = [self._rows[place] for place in left]
        self._index = on_device(self._rows, self.device)
        index = on_device(left, self.device)
        self._last = self._last[index]
        self._next_position = self._next_position[..., index, :]
        self._committed.keep_rows(left)
        return nodes[left]

    def finish(self) -> None:
        """Leave the cache as plain decoding would, for whoever goes on with it."""
        behind = self._committed.behind()
        if self._returns_cache and behind:
            # Plain decoding has read the last token of a row if another row has a longer text.
            self.score(DraftTree.root(self._last.squeeze(1)))
            self._committed.commit(torch.tensor(behind).unsqueeze(1).long() - 1, 1)
            self._committed.align_left()
        self._committed.secure(self._committed.width)

    def _forward(self, **inputs: Any) -> Scored:
        self.calls += 1
        with self._taps.armed(), without_cudnn_attention:
            outputs = self.target(**inputs, return_dict=True)
        features = self._taps.take()
        self._outputs.observe(outputs)
        if self._index is not None:
            batch = self.base.shape[0]
            features = tuple(_spread(feature, self._index.to(feature.device), batch) for feature in features)
        return Scored(outputs.logits, features, self._rows)


def _spread(values: torch.Tensor, rows: torch.LongTensor, batch: int) -> torch.Tensor:
    """Some rows of a batch as a whole batch; the others mean nothing, but are numbers."""
    return values.new_zeros(batch, *values.shape[1:]).index_copy_(0, rows, values)
