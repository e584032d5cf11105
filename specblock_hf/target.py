# Copyright 2026 The specblock_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
The adapter around a stock transformers model: the only place that knows transformers' caches, masks and version
differences.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .compat import CACHE, layer_types
from .devices import without_cudnn_attention
from .drafter import Pairs, TokenTable
from .outputs import TokenOutputs
from .prompt import PromptPairs
from .target_cache import TargetCache, check_cache
from .target_mask import TreeMasks, layer_windows, likeliest_chain
from .tree import DraftTree
from .upload import on_device


if TYPE_CHECKING:
    from .compilation import CompiledTarget
    from .verification import Walk


logger = logging.get_logger(__name__)

# What `generate()` hands on to the target and this adapter handles. Anything else would be dropped or go stale inside
# a round.
_KNOWN_INPUTS = {
    CACHE,
    "attention_mask",
    "inputs_embeds",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "position_ids",
    "use_cache",
}


# What plain decoding hands back of every token, if `output_...` asks for it.
_TOKEN_OUTPUTS = ("hidden_states", "attentions")


def check_target(target: PreTrainedModel) -> None:
    """
    Refuse targets whose trees cannot be verified exactly.

    Raises:
        ValueError: In one sentence: what, why and what to do.
    """
    name = type(target).__name__
    if target.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder and draft trees need a decoder-only target; drop assistant_model."
        )
    if target._is_stateful:
        raise ValueError(
            f"{name} keeps a recurrent state that cannot return to an earlier token of a draft tree; drop "
            "assistant_model."
        )
    decoder = target.get_decoder()
    taken = inspect.signature(target.forward).parameters
    config = target.config.get_text_config(decoder=True)
    needed = {"attention_mask", CACHE, "position_ids"}
    if not needed <= taken.keys() or len(decoder_layers(decoder)) != config.num_hidden_layers:
        raise ValueError(
            f"{name} takes no position_ids or no cache or does not list its layers as get_decoder().layers or "
            ".h, which a draft tree needs; drop assistant_model."
        )
    if config.model_type == "gpt_neo" or (config.model_type == "falcon" and config.alibi):
        raise ValueError(
            f"{name} counts distances in columns of the cache, where siblings of a draft tree lie next to each other; "
            "drop assistant_model."
        )
    if TreeMasks(target).chains_only:
        logger.warning_once(
            f"attn_implementation={decoder.config._attn_implementation!r} takes no mask that could show it a draft "
            "tree, so only the likeliest path of every draft is verified and fewer tokens are accepted; "
            'target.set_attn_implementation("sdpa") before generate() has whole trees verified.'
        )
    unknown = set(layer_types(target)) - {"full_attention", "sliding_attention", "dummy"}
    if unknown:
        raise ValueError(
            f"{name} has layers of type {', '.join(sorted(unknown))}, which cannot score a draft tree exactly; drop "
            "assistant_model."
        )


def decoder_layers(decoder: nn.Module) -> Sequence[nn.Module]:
    """The decoder's layers, which GPT-2 and the families after it call `h`; none if it has another name for them."""
    for name in ("layers", "h"):
        if hasattr(decoder, name):
            return getattr(decoder, name)
    return ()


@dataclass
class Scored:
    """
    What a forward of the target says.

    Args:
        logits (`torch.Tensor` of shape `[R, N, V]`):
            At every node; at the last position only for a prompt. Of the R rows that had not been retired.
        features (`tuple` of `torch.Tensor` of shape `[B, N, d]`):
            One for each of the drafter's `feature_layers`; those of retired rows mean nothing.
        rows (sequence of `int`): Which rows of the batch the logits belong to.
    """

    logits: torch.Tensor
    features: tuple[torch.Tensor, ...]
    rows: Sequence[int]


def tap(decoder: nn.Module, index: int, keep: Callable[[torch.Tensor], None]) -> torch.utils.hooks.RemovableHandle:
    """Hand a state of the decoder to `keep` in every forward; `index` is one of transformers' `hidden_states`."""
    layers = decoder_layers(decoder)
    if index == 0:
        return layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: keep(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    if index == len(layers):
        return decoder.register_forward_hook(lambda _, args, output: keep(output[0]))
    return layers[index - 1].register_forward_hook(
        lambda _, args, output: keep(output[0] if isinstance(output, tuple) else output)
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
        compiled ([`CompiledTarget`], *optional*):
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
        compiled: CompiledTarget | None = None,
    ):
        self.target = target
        self._compiled = compiled
        self.table = TokenTable.of(target)
        self._rows = list(range(input_ids.shape[0]))
        self._index: torch.LongTensor | None = None  # `_rows` on the device, once some have been retired
        self._returns_cache = returns_cache
        _check_inputs(model_kwargs, len(self._rows), returns_cache)
        self.cache = model_kwargs[CACHE]
        self._kwargs = model_kwargs
        self._ids = input_ids
        mask = model_kwargs.get("attention_mask")
        self._new = self._count_new(mask.shape[1] if mask is not None else mask_length)
        self._chunk_size = chunk_size or self._new
        visible = None if mask is None or bool((mask != 0).all()) else (mask != 0).to(self.device)
        width = int(self.cache.get_seq_length()) + self._new
        self._committed = TargetCache(self.cache, input_ids.shape[0], width, visible)
        self._next_position = model_kwargs["position_ids"][..., -1:].to(self.device) + 1
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
        cached, visible = self._committed.width - self._new, self._committed.visible
        return cached if visible is None else int(visible[:, :cached].sum(1).min())

    def room(self) -> int | None:
        """Nodes that the cache has room for, the root counted; `None` if it grows."""
        return self._committed.room()

    def prefill(self) -> Iterator[tuple[Scored, Pairs]]:
        """
        Read the prompt chunk by chunk. The token that follows the prompt is not known yet: it is -1 in the last
        chunk's pairs, which [`~TargetModel.close_prompt`] completes. After the last chunk the prompt's last token
        counts as a scored root.
        """
        committed = self._committed
        committed.begin_prompt()
        prompt = PromptPairs(
            self.table, self._ids, self._kwargs.get("inputs_embeds"), self._new, committed.visible, committed.width
        )
        for start in range(0, self._new, self._chunk_size):
            end = min(start + self._chunk_size, self._new)
            scored = self._forward(**self._prompt_inputs(start, end))
            committed.read_prompt(committed.width - self._new + end)
            if end == self._new:
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
            **self._outputs.flags,
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

    def _count_new(self, mask_length: int | None) -> int:
        """Prompt tokens that the cache does not hold yet; `generate()` may be given all ids or only the new ones."""
        embeds, cached = self._kwargs.get("inputs_embeds"), int(self.cache.get_seq_length())
        if embeds is not None:
            new = embeds.shape[1] - cached
        elif self._ids.shape[1] == mask_length:
            new = mask_length - cached
        else:
            new = self._ids.shape[1]
        if new < 1:
            raise ValueError(
                f"the cache already holds {cached} tokens, which leaves nothing of the prompt to read; crop it "
                "by one token or more, or pass a longer prompt."
            )
        return new

    def _prompt_inputs(self, start: int, end: int) -> dict[str, Any]:
        """The target's inputs for new prompt tokens `start` to `end`."""
        mask, embeds = self._kwargs.get("attention_mask"), self._kwargs.get("inputs_embeds")
        skipped, left = self._ids.shape[1] - self._new, self._new - end
        ids = self._ids
        if embeds is None:
            ids = ids[:, skipped + start : skipped + end]
        else:
            embeds = embeds[:, embeds.shape[1] - self._new :][:, start:end]
        return self.target.prepare_inputs_for_generation(
            ids,
            is_first_iteration=True,
            **self._kwargs
            | {
                "inputs_embeds": embeds,
                "attention_mask": mask if mask is None else mask[:, : mask.shape[1] - left],
                "position_ids": self._kwargs["position_ids"][..., : self._kwargs["position_ids"].shape[-1] - left],
            },
        )

    def _forward(self, **inputs: Any) -> Scored:
        self.calls += 1
        with self._taps.armed(), without_cudnn_attention:
            outputs = self.target(**inputs, return_dict=True)
        features = self._taps.take()
        self._outputs.see(outputs)
        if self._index is not None:
            batch = self.base.shape[0]
            features = tuple(_spread(feature, self._index.to(feature.device), batch) for feature in features)
        return Scored(outputs.logits, features, self._rows)


def _spread(values: torch.Tensor, rows: torch.LongTensor, batch: int) -> torch.Tensor:
    """Some rows of a batch as a whole batch; the others mean nothing, but are numbers."""
    return values.new_zeros(batch, *values.shape[1:]).index_copy_(0, rows, values)


def _check_inputs(model_kwargs: dict[str, Any], batch_size: int, returns_cache: bool) -> None:
    check_cache(model_kwargs.get(CACHE), batch_size, returns_cache)
    unknown = sorted(name for name, value in model_kwargs.items() if value is not None and name not in _KNOWN_INPUTS)
    if unknown:
        raise ValueError(
            f"generate() got {', '.join(unknown)}, which tree drafting does not pass on to the target; leave it out, "
            "or drop assistant_model."
        )
    mask = model_kwargs.get("attention_mask")
    if mask is not None and not bool((mask[:, -1] != 0).all()):
        raise ValueError(
            "attention_mask hides the last token of a prompt, which the next one is chosen from; pad prompts on the "
            'left, with padding_side="left".'
        )
