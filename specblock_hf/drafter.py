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
"""The line between drafters and the decoding loop: what a drafter is told, what it answers, and for how long it
remembers.

One round of decoding is `tree = drafter.propose(state, pairs, limits)`, a verification by the target, and new
`Pairs`. A drafter
never sees `generate()`, the target's cache or the verification rule; the loop never sees the drafter's network.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn
from transformers import PreTrainedConfig

# At run time, because transformers resolves the annotations of models.
from .callbacks import DraftingCallback
from .plan import DraftingPlan, Limits
from .statistics import GenerationStatistics
from .upload import on_device


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .training.objective import TargetBatch
    from .tree import DraftTree
    from .verification import Walk


BUDGET, CPU_BUDGET = 60, 12
"""Nodes of a tree where nothing else is said: a verified node is almost free on a GPU and costs real time on a CPU."""

UNRECORDED_LAYER = -1
"""Stands in `feature_layers` where a checkpoint does not say what it reads; see [`TreeDrafter.feature_layers_for`]."""


def default_feature_layers(num_layers: int) -> tuple[int, ...]:
    """What EAGLE-3 and SpecBlock read of a target of N layers: hidden states 2, N // 2 and N - 3."""
    return (2, num_layers // 2, num_layers - 3)


class TokenTable:
    """
    The target's token embedding and head, as drafters need them; nothing of it is ever copied or saved with a drafter.

    Args:
        embedding (`nn.Module`): The target's input embedding, called with ids `[...]`, giving `[..., d]`.
        head (`nn.Module`): The target's output head, called with `[..., d]`, giving logits `[..., vocab_size]`.
        vocab_size (`int`): Number of ids that the target's head scores.
    """

    def __init__(self, embedding: nn.Module, head: nn.Module, vocab_size: int):
        self.embedding = embedding
        self.output_head = head
        self.vocab_size = vocab_size

    @classmethod
    def of(cls, target: PreTrainedModel) -> TokenTable:
        """Read the table off a stock transformers model."""
        return cls(
            target.get_input_embeddings(), target.get_output_embeddings(), target.config.get_text_config().vocab_size
        )

    def embed(self, ids: torch.LongTensor, raw: bool = False) -> torch.Tensor:
        """
        Args:
            ids (`torch.LongTensor` of any shape): Target token ids, on any device.
            raw (`bool`, *optional*, defaults to `False`):
                Skip what the embedding module does beside the look-up (Gemma scales its rows).

        Returns:
            `torch.Tensor` of shape `[*ids.shape, d]` in the target's dtype, on its device.
        """
        ids = ids.to(self.device)
        if not raw:
            return self.embedding(ids)
        with align_module_device(self.embedding):
            return nn.functional.embedding(ids, self.embedding.weight)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """The target's logits `[..., vocab_size]` of final hidden states `[..., d]`."""
        return self.output_head(hidden)

    @property
    def device(self) -> torch.device:
        """Where embeddings come from, wherever accelerate keeps their weights between forwards."""
        if has_offloaded_params(self.embedding):
            return torch.device(self.embedding._hf_hook.execution_device)
        return self.embedding.weight.device


@dataclass
class Pairs:
    """
    What the target has learned since the drafter was last asked: features at position i together with the token
    x_{i+1} that
    followed. Columns beyond a row's length are padding on the right.

    Args:
        tokens (`torch.LongTensor` of shape `[B, T]`): x_{i+1}; -1 where the prompt came as embeddings.
        features (`tuple` of `torch.Tensor` of shape `[B, T, d]`):
            One tensor per entry of the drafter's `feature_layers`, the target's states at x_i.
        positions (`torch.LongTensor` of shape `[B, T]`): i, counted without padding.
        lengths (`torch.LongTensor` of shape `[B]`): Valid columns of each row; 0 for one that has learned nothing.
        table (`TokenTable`): The target's embedding.
        given_embeds (`torch.Tensor` of shape `[B, T, d]`, *optional*): The embeddings of a prompt that had no ids.
        read (`list[list[int]]`, *optional*):
            `tokens` without padding, where the host knows them; see [`~Pairs.host_tokens`].
    """

    tokens: torch.LongTensor
    features: tuple[torch.Tensor, ...]
    positions: torch.LongTensor
    lengths: torch.LongTensor
    table: TokenTable
    given_embeds: torch.Tensor | None = None
    read: list[list[int]] | None = None

    def embeds(self) -> torch.Tensor:
        """The target's embeddings `[B, T, d]` of `tokens`, made only when a drafter asks for them."""
        if self.given_embeds is not None:
            return self.given_embeds
        return self.table.embed(self.tokens.clamp_min(0))

    def last_tokens(self) -> torch.LongTensor:
        """The last token of each row, `[B]`; any valid id for a row that has learned nothing."""
        last = (self.lengths - 1).clamp_min(0).unsqueeze(1)
        return self.tokens.gather(1, last).clamp_min(0).squeeze(1)

    def host_tokens(self) -> list[list[int]]:
        """The tokens of each row on the host, without padding; read from the device for a prompt only."""
        if self.read is not None:
            return self.read
        return [row[:length] for row, length in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)]

    def host_lengths(self) -> torch.LongTensor:
        """`lengths` on the host; read from the device for a prompt only."""
        return self.lengths.cpu() if self.read is None else torch.tensor([len(row) for row in self.read])

    def of_rows(self, rows: Sequence[int]) -> Pairs:
        """The pairs of these rows of the batch, without columns that are padding in all of them."""
        width = int(self.host_lengths()[list(rows)].max())
        index = on_device(rows, self.tokens.device)

        def picked(values: torch.Tensor) -> torch.Tensor:
            return values[index.to(values.device), :width]

        return replace(
            self,
            tokens=picked(self.tokens),
            features=tuple(picked(feature) for feature in self.features),
            positions=picked(self.positions),
            lengths=self.lengths[index],
            given_embeds=None if self.given_embeds is None else picked(self.given_embeds),
            read=None if self.read is None else [self.read[row] for row in rows],
        )

    @classmethod
    def of(
        cls,
        tree: DraftTree,
        features: tuple[torch.Tensor, ...],
        walk: Walk,
        base: torch.LongTensor,
        table: TokenTable,
    ) -> Pairs:
        """
        The pairs that one verified round teaches: (state of the root, first emitted token), (state of that token,
        second), ...

        Args:
            tree (`DraftTree`): The verified tree; only its depths matter.
            features (`tuple` of `torch.Tensor` of shape `[B, N, d]`): The target's states at every node.
            walk (`Walk`): The kept nodes and the tokens that followed them.
            base (`torch.LongTensor` of shape `[B]`): Position of each row's root.
            table (`TokenTable`): The target's embedding.
        """
        kept = walk.to(base.device)
        gather = kept.nodes.clamp_min(0).unsqueeze(-1)
        steps = torch.arange(kept.nodes.shape[1], device=base.device)
        return cls(
            tokens=kept.tokens,
            features=tuple(f.gather(1, gather.to(f.device).expand(-1, -1, f.shape[-1])) for f in features),
            positions=base.unsqueeze(1) + steps,
            lengths=kept.lengths,
            table=table,
            read=[row[:length] for row, length in zip(walk.tokens.tolist(), walk.lengths.tolist(), strict=True)],
        )


@dataclass
class DraftState:
    """
    What one `generate()` call makes a drafter remember. Drafters subclass it; nothing of it ever lives on a module,
    so that one drafter serves several threads. A subclass that remembers something of each row overrides
    [`~DraftState.keep_rows`].

    Args:
        table (`TokenTable`): The target's embedding and head.
        batch_size (`int`): Rows that it drafts for, at first those of the batch.
        max_length (`int`): Most positions that the drafter can be told about, prompt included.
        first_position (`int`, *optional*, defaults to 0): Position of the first pair (above 0 for a continued cache).
        generator (`torch.Generator`, *optional*): Private randomness of sampled drafts; the global one belongs to the
            target.
        warp (`Callable`, *optional*):
            Turns a drafter's logits `[..., D]` into those of the request, at its temperature and cut by its warpers.
            Set by the loop where drafts are sampled.

    Attributes:
        drafting (`list[int]`): Which rows of the batch those are.
    """

    table: TokenTable
    batch_size: int
    max_length: int
    first_position: int = 0
    generator: torch.Generator | None = None
    warp: Callable[[torch.Tensor], torch.Tensor] | None = None
    calls: int = field(default=0, init=False)  # drafter forwards so far
    forward_rows: int = field(default=0, init=False)  # and their rows: committed pairs and starts
    drafting: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.drafting = list(range(self.batch_size))

    def keep_rows(self, places: Sequence[int]) -> None:
        """
        Go on with some rows and forget the others, which will never draft again: they must cost nothing any more.

        Args:
            places (sequence of `int`): Indices into `drafting`, in order.
        """
        self.drafting = [self.drafting[place] for place in places]
        self.batch_size = len(self.drafting)


class DrafterLock:
    """A re-entrant lock that copies as a fresh one, so that a drafter stays deep-copyable and picklable."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: dict) -> DrafterLock:
        return DrafterLock()

    def __reduce__(self) -> tuple:
        return (DrafterLock, ())


class TreeDrafter(ABC):
    """
    Proposes token trees for a target. Anything that implements this goes into `target.generate(assistant_model=...)`.

    Attributes:
        feature_layers (`tuple[int, ...]`):
            Which of the target's `hidden_states` the drafter reads, in transformers' indexing: 0 is the embedding, i
            the output of decoder layer i - 1, and the number of layers the state after the final norm.
            `UNRECORDED_LAYER` where that follows from the target's depth.
        drafting_plan ([`DraftingPlan`], *optional*):
            How much a round drafts; `None` asks `default_plan`. A call's own `generation_config.drafting_plan` goes
            first.
        compiled_rounds ([`CompiledRounds`], *optional*):
            Made by [`compile_rounds`]; `None` runs everything uncompiled.
        last_statistics ([`GenerationStatistics`], *optional*):
            Of the last finished call; with several threads the last one wins.
        objective_class (`type`, *optional*):
            A frozen dataclass of what may be chosen about the objective beside the batch, with a default for
            everything; `specblock train --objective NAME=VALUE` sets its fields. `None` if there is nothing to choose.
        lock (`DrafterLock`):
            Held around `propose` and around any in-place change of the weights. Every drafter has one from the start.
        can_sample (`bool`): Whether it can draw trees, see [`DraftingPlan`].
        callbacks (`tuple` of [`DraftingCallback`]): Who listens to its calls; see `add_callback`.
    """

    config: PreTrainedConfig
    lock: DrafterLock
    feature_layers: tuple[int, ...] = ()
    objective_class: type | None = None
    drafting_plan: DraftingPlan | None = None
    compiled_rounds: Any = None
    last_statistics: GenerationStatistics | None = None
    can_sample: bool = False
    callbacks: tuple[DraftingCallback, ...] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        drafter = super().__new__(cls)
        # Here, so that it is there whatever a subclass does in its `__init__`, and is one whichever thread asks first.
        vars(drafter)["lock"] = DrafterLock()
        return drafter

    @property
    def label(self) -> str:
        """What to call the drafter in reports."""
        return type(self).__name__

    @property
    def network(self) -> TreeDrafter:
        """The drafter that holds the weights: this one, or the part of a joined one that has them."""
        return self

    def add_callback(self, callback: DraftingCallback) -> None:
        """Let a [`DraftingCallback`] listen to every call that begins from now on."""
        self.callbacks = (*self.callbacks, callback)
        callback.on_add(self)

    def remove_callback(self, callback: DraftingCallback) -> None:
        """
        Take a callback off; calls under way still tell it.

        Raises:
            `ValueError`: It was not added.
        """
        if callback not in self.callbacks:
            raise ValueError(f"this {type(callback).__name__} was not added to this drafter; remove one that was.")
        self.callbacks = tuple(other for other in self.callbacks if other is not callback)
        callback.on_remove(self)

    def default_plan(self, device: torch.device) -> DraftingPlan:
        """What to draft on a device that was not calibrated for."""
        return DraftingPlan(CPU_BUDGET if device.type == "cpu" else BUDGET, 1)

    def acceptance(self, with_lookup: bool = False) -> list[tuple[DraftingPlan, float]]:
        """
        Plans to choose from and the tau of each, alone or joined with a [`LookupDrafter`]; without figures the default
        plans, with a tau of 2.
        """
        return [(self.default_plan(torch.device(kind)), 2.0) for kind in ("cpu", "cuda")]

    @abstractmethod
    def check_target(self, target: PreTrainedModel) -> None:
        """Raise a `ValueError` with one sentence if the drafter cannot draft for `target`."""

    def feature_layers_for(self, target: PreTrainedModel) -> tuple[int, ...]:
        """`feature_layers`, or the usual ones for this target's depth where the checkpoint does not record them."""
        if UNRECORDED_LAYER not in self.feature_layers:
            return self.feature_layers
        return default_feature_layers(target.config.get_text_config().num_hidden_layers)

    @abstractmethod
    def begin(self, table: TokenTable, batch_size: int, max_length: int, *, first_position: int = 0) -> DraftState:
        """A fresh memory for one `generate()` call; see [`DraftState`] for the arguments."""

    @abstractmethod
    def extend(self, state: DraftState, pairs: Pairs) -> None:
        """Take `pairs` in as context without drafting (all prompt chunks but the last)."""

    @abstractmethod
    def propose(self, state: DraftState, pairs: Pairs, limits: Limits) -> DraftTree:
        """
        Take `pairs` in and draft a tree below each row's last token. Only rows that may still draft are asked for,
        see [`~DraftState.keep_rows`].

        Returns:
            [`DraftTree`]: Node 0 is the last token of `pairs`; at most `max(limits.nodes)` nodes follow, none deeper
            than `limits.depth`. What goes beyond is cut off, and what cannot be scored is left out; see
            `specblock_hf.proposal`.
        """

    def loss(
        self,
        batch: TargetBatch,
        objective: Any = None,
        *,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        The drafter's training objective and its parts, for the trainer and the online updater alike. `specblock train
        --drafter NAME` trains whatever implements this and is listed in `specblock_hf.auto.TRAINABLE`: the
        configuration class makes a drafter for a target (`config_class.for_target(target.config, **overrides)`), the
        drafter has the draft vocabulary of [`DraftHead`] or says all that the target can.

        Args:
            batch ([`TargetBatch`]): Texts and the target's view of them; the features are those of `feature_layers`.
            objective (*optional*): An instance of `objective_class`; its defaults if not given.
            progress (`float`, *optional*, defaults to 1.0):
                Share of the run's steps that are done, for parts that join later.
            generator (`torch.Generator`, *optional*):
                Randomness of this batch, on the CPU. An objective draws from nothing else, so that a resumed run takes
                the very same steps.

        Returns:
            `dict[str, torch.Tensor]`: `"loss"` is the total, to be differentiated: a mean over places, so that batches
            of any size weigh the same. Other 0-dimensional entries are parts that are logged by their names. Entries
            with dimensions are counts, which are added up over batches: `"agreed"` and `"counted"` of shape
            `[forwards, slots]`, the guesses that were the text's token and all guesses; `"rank_confusion"` of shape
            `[buckets, buckets]`, places by true (row) and predicted bucket, for drafters with a rank head.

        Raises:
            `TypeError`: The drafter has no weights.
        """
        raise TypeError(f"{type(self).__name__} has no weights to train; train the drafter that it goes with.")

    def parameters_of(self, scope: Literal["head", "full"]) -> list[nn.Parameter]:
        """The parameters that an update of this scope may change; none for a drafter without weights."""
        return []
