# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The adapter around a stock transformers model: with the other `target*.py` the only place that knows transformers'
caches and masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ..compat import CACHE
from ..devices import on_device, without_cudnn_attention
from ..drafting.pairs import Pairs, Scored, TokenTable
from ..prepacking import PrepackedWeights, version_of
from ..rounds_model import RoundsModel
from ..trees.tree import DraftTree
from .cache import TargetCache
from .features import FeatureTaps, columns_of, spread
from .inputs import TargetInputs
from .masks import TreeMasks, layer_windows, likeliest_chain
from .prompt import PromptPairs
from .recurrent import Lag, cut, kept_columns
from .support import check_length, check_rows, rope_limits
from .token_outputs import TokenOutputs
from .twin import stepwise


if TYPE_CHECKING:
    from ..trees.verification import Stop, Walk


# What plain decoding hands back of every token, if `output_...` asks for it.
_TOKEN_OUTPUTS = ("hidden_states", "attentions")


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
        budget (`int`, *optional*, defaults to 0):
            Most drafted tokens of a round, by which a target with recurrent layers is read again; see [`Lag`].
        prepacked ([`PrepackedWeights`], *optional*): What rounds may be read with on a CPU.

    Attributes:
        calls (`int`): Forwards so far.
        compiled_calls (`int`): How many of them had fixed shapes, see [`FixedTarget`].
        captured_calls (`int`): How many of these were replayed.

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
        budget: int = 0,
        *,
        prepacked: PrepackedWeights | None = None,
    ):
        self.target = target
        self.table = TokenTable.of(target)
        self._rows = list(range(input_ids.shape[0]))
        self._index: torch.LongTensor | None = None  # `_rows` on the device, once some have been retired
        self._returns_cache = returns_cache
        check_rows(target, len(self._rows))
        self._inputs = inputs = TargetInputs(target, input_ids, model_kwargs, mask_length, returns_cache)
        self.cache, mask, width = inputs.cache, inputs.mask, inputs.cached + inputs.new
        visible = None if mask is None or bool((mask != 0).all()) else (mask != 0).to(self.device)
        self._chunk_size = inputs.chunk_size(chunk_size, padded=visible is not None)
        self._committed = TargetCache(self.cache, input_ids.shape[0], width, visible, self.device)
        self._next_position = inputs.last_positions(self.device) + 1
        self._limits = rope_limits(target)
        self._ahead = int(self._next_position.max()) - width if self._limits else 0
        self._rereading = inputs.rereading(visible is None, self.device) if self._limits else None
        self._budget = budget
        self._lag: Lag | None = None  # of recurrent states, from the prompt on
        self._scored = 1
        self._last = torch.zeros(input_ids.shape[0], 1, dtype=torch.long, device=self.device)
        self.base = torch.full((input_ids.shape[0],), width, device=self.device) if visible is None else visible.sum(1)
        self.calls = self.compiled_calls = self.captured_calls = 0
        self._masks = TreeMasks(target)
        wanted = [name for name in _TOKEN_OUTPUTS if returns_cache and model_kwargs.get(f"output_{name}")]
        windows = layer_windows(target) if wanted else []
        if not any(self.cache.is_sliding):  # one that was made without the configuration keeps every column
            windows = [None] * len(windows)
        last_chunk = (inputs.new - 1) % (chunk_size or inputs.new) + 1
        self._outputs = TokenOutputs(wanted, len(self._rows), windows, last_chunk)
        self._taps = FeatureTaps(target.get_decoder(), feature_layers)
        # After the taps, which all that reads has. A twin would not hand states and attentions out.
        try:
            self._reader, self._trees = target, RoundsModel(stepwise(target), prepacked, alone=bool(wanted))
        except BaseException:
            self._taps.remove()
            raise

    @property
    def device(self) -> torch.device:
        return self.table.device

    def version(self) -> int:
        """Grows with every change of the weights in place, as optimisers make them."""
        return version_of(self.target.parameters())

    def __enter__(self) -> TargetModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        self._taps.remove()
        self._committed.end(self._returns_cache, broken_off=kind is not None)

    @property
    def chains_only(self) -> bool:
        """Whether the target's attention takes no mask that could show it a draft tree."""
        return self._masks.chains_only

    @property
    def rereads(self) -> bool:
        """Whether the target reads committed tokens again, because its states do not go back."""
        return self._lag is not None

    @property
    def columns(self) -> int:
        """Tokens of a row that the last round read: its tree, and what was read again."""
        return self._scored

    @property
    def fixed(self) -> bool:
        """Whether trees are padded to a few sizes."""
        return False

    @property
    def settled(self) -> bool:
        """Whether the last round took as long as later ones of its size will; before they are captured it does not."""
        return self._trees.settled

    @property
    def prepacked(self) -> bool:
        """Whether rounds are read with prepacked weights."""
        return self._trees.prepacked

    def first_position(self) -> int:
        """Position of the first token that [`~TargetModel.prefill`] reads; above 0 for a continued cache."""
        cached, visible = self._inputs.cached, self._committed.visible
        return cached if visible is None else int(visible[:, :cached].sum(1).min())

    def room(self) -> int | None:
        """Nodes that the cache has room for, the root counted; `None` if it grows."""
        room = self._committed.room()
        return room if room is None or self._lag is None else room - self._lag.longest

    def depth(self) -> int | None:
        """Most levels that the next tree may have below its root; `None` for as many as one likes."""
        width = self._committed.width
        depths = [limit.depth(width + self._ahead) for limit in self._limits]
        if self._rereading is not None:
            depths.append(self._rereading.depth(width))
        if self._lag is not None and self._lag.rests():
            depths.append(0)
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
        rests = self._lag is not None and self._lag.rests()
        return rests or (self.depth() == 0 and any(limit.changes_once for limit in self._limits))

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
        config = self.target.config
        # What reads images may keep where the text begins, and what reads token after token is slow for a prompt.
        if self._trees.model is self.target and config.get_text_config(decoder=True) is config:
            self._reader = self._trees.of_prompt(inputs.new)
        for start in range(0, inputs.new, self._chunk_size):
            end = min(start + self._chunk_size, inputs.new)
            scored = self._forward(**inputs.of_prompt(start, end))
            committed.read_prompt(inputs.cached + end)
            if end == inputs.new:
                committed.begin_rounds()
                self._reader = self._trees.model
                if committed.states.lag:
                    self._lag = Lag(len(self._rows), self._budget)
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
        if self.chains_only:
            tree = likeliest_chain(tree)
        if self._lag is not None:
            tree = cut(tree, self._lag, self._rows)
        return tree.to(self.device)

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
        self._reader = self._trees.next()
        if self._index is not None:
            tree = replace(tree, tokens=tree.tokens[self._index], parents=tree.parents[self._index])
        if self._rereads():
            return self._read_again()
        ids = torch.cat((self._last, tree.tokens[:, 1:].to(self.device)), dim=1)
        depths = tree.depths().to(self.device)
        if self._lag is None:
            return self._read(ids, self._next_position + depths, self._masks.mask(tree, depths, self._committed))
        lengths = self._lag.lengths()
        behind = on_device(lengths, self.device).unsqueeze(1)
        nodes = behind + torch.arange(ids.shape[1], device=self.device)
        return self._read_chains(self._lag.ids(ids), behind, nodes, min(lengths))

    def _read_chains(
        self, ids: torch.LongTensor, behind: torch.LongTensor, nodes: torch.LongTensor | None = None, again: int = 0
    ) -> Scored:
        """
        Read one token after another.

        Args:
            ids (`torch.LongTensor` of shape `[R, W]`): Of the rows that go on.
            behind (`torch.LongTensor` of shape `[R, 1]`): How far the first one of a row is before its root.
            nodes (`torch.LongTensor` of shape `[R, N]`, *optional*): The columns that were asked for.
            again (`int`, *optional*, defaults to 0): How many columns, at least, come before those.
        """
        count = ids.shape[1]
        positions = self._next_position + torch.arange(count, device=self.device) - behind
        last = self._inputs.last_logits(1 if nodes is None else count - again)
        return self._read(ids, positions, self._committed.chain_mask(count), nodes, **last)

    def _read(
        self,
        ids: torch.LongTensor,
        positions: torch.LongTensor,
        mask: torch.Tensor | dict[str, torch.Tensor] | None,
        nodes: torch.LongTensor | None = None,
        **more: Any,
    ) -> Scored:
        self._scored = ids.shape[1]
        self._committed.states.hold(self._scored)
        return self._forward(
            nodes,
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            use_cache=True,
            **{CACHE: self.cache},
            **self._inputs.of_tree(self._scored, self._rows) | self._outputs.flags | more,
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

    def greedy_walk(self, active: Sequence[bool], stop: Stop) -> Walk | None:
        """
        The walk that takes the likeliest token after every node of the last scored tree, where that is known without
        the host; `None` where it is not.

        Args:
            active (sequence of `bool`): One for each row; a row that is not active emits nothing.
            stop (`Stop`): Tells whether an emitted token ends the row.
        """
        return None

    def settle(self, tree: DraftTree, scored: Scored, walk: Walk) -> Pairs:
        """
        [`~TargetModel.commit`] what a round emitted.

        Args:
            tree ([`DraftTree`]): The verified tree.
            scored ([`Scored`]): What was said of it.
            walk ([`Walk`]): What it emitted.

        Returns:
            [`Pairs`]: What the target has learned by it.
        """
        pairs = Pairs.of(tree, scored.features, walk, self.base, self.table)
        self.commit(walk)
        return pairs

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
        if self._lag is None:
            self._outputs.keep(nodes, self._committed)
        else:
            self._outputs.keep(nodes, self._committed, self._lag.lengths())
            nodes = self._lag.commit(walk, self._rows, self._scored)
        if len(self._rows) > 1 and not self._returns_cache:
            nodes = self._retire(nodes, walk.stopped.tolist())
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
        if self._lag is not None:
            self._lag.keep_rows(left)
        return nodes[left]

    def finish(self) -> None:
        """Leave the cache as plain decoding would, for whoever goes on with it."""
        if self._returns_cache:
            self.catch_up()
        behind = self._committed.behind()
        if self._returns_cache and behind:
            # Plain decoding has read the last token of a row if another row has a longer text.
            self.score(DraftTree.root(self._last.squeeze(1)))
            self._committed.commit(torch.tensor(behind, device="cpu").unsqueeze(1).long() - 1, 1)
            self._committed.align_left()
        self._committed.secure(self._committed.width)

    def catch_up(self) -> None:
        """Move the recurrent states, if there are any, to the last committed tokens."""
        for ids, behind in self._lag.catch_up() if self._lag is not None else ():
            self._read_chains(on_device(ids, self.device), on_device(behind, self.device).unsqueeze(1))
            self._committed.commit(kept_columns([bool(tokens) for tokens in behind], self._scored), self._scored)

    @without_cudnn_attention
    def _forward(self, nodes: torch.LongTensor | None = None, **inputs: Any) -> Scored:
        self.calls += 1
        with self._taps.armed():
            outputs = self._reader(**inputs, return_dict=True)
        logits, features = outputs.logits, self._taps.take()
        self._outputs.observe(outputs)
        if nodes is not None:
            skipped = self._scored - logits.shape[1]
            logits = columns_of(logits, nodes - skipped)
            features = tuple(columns_of(feature, nodes) for feature in features)
        if self._index is not None:
            batch = self.base.shape[0]
            features = tuple(spread(feature, self._index.to(feature.device), batch) for feature in features)
        return Scored(logits, features, self._rows)
