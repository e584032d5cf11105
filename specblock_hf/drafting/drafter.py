# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The line between drafters and the decoding loop: what a drafter is told, what it answers, and for how long it
remembers.

One round of decoding is `tree = drafter.propose(state, pairs, limits)`, a verification by the target, and new
`Pairs`. A drafter never sees `generate()`, the target's cache or the verification rule; the loop never sees the
drafter's network.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..locks import DrafterLock
from ..planning.controller import PlanController
from ..prepacking import PrepackedWeights
from ..rounds_model import RoundsModel
from .attachment import Attachment, attach
from .pairs import Pairs, Scored, TokenTable

# At run time, because transformers resolves the annotations of models.
from .plan import DraftingPlan, Limits
from .state import DraftState
from .statistics import GenerationStatistics


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..trees.tree import DraftTree
    from ..trees.verification import Walk
    from .target_batch import Losses, TargetBatch


logger = logging.getLogger(__name__)

BUDGET, CPU_BUDGET = 60, 11
"""Nodes of a tree where nothing else is said: a verified node is almost free on a GPU and costs real time on a CPU."""


Scope = Literal["head", "full"]
"""Of an update: the drafter's head, or all of it."""


@dataclass(eq=False)
class DraftingCall:
    """
    One `generate()` call, as its callbacks see it.

    Args:
        drafter ([`TreeDrafter`]): The drafter that the call was given.
        table ([`TokenTable`]): The target's embedding and head.
        batch_size (`int`): Rows of the batch.
        statistics ([`GenerationStatistics`]): Of the call so far; seconds are filled in at its end.
        target_version (`int`, *optional*, defaults to 0):
            Of the target's weights: another one than in the call before where they were changed in place in between.
        notes (`dict`, *optional*):
            What a callback wants to remember for the rest of this call, under itself: a drafter may serve several
            calls at once, and a call that fails takes its notes with it.
    """

    drafter: TreeDrafter
    table: TokenTable
    batch_size: int
    statistics: GenerationStatistics
    target_version: int = 0
    notes: dict[DraftingCallback, Any] = field(default_factory=dict)


class DraftingCallback:
    """
    Listens to the calls of the drafters that it was added to; see [`~TreeDrafter.add_callback`]. Every hook does
    nothing unless a subclass says otherwise. Hooks run in the thread that decodes and must not change what they are
    shown.

    Attributes:
        optional (`bool`):
            What happens when a hook raises. `False`, as here: the call ends with that error. `True`, as for the
            callbacks of this package: it is logged once, the callback hears of no call any more, and the call goes on,
            because nobody's text may be lost to a figure about it.
        failure (`Exception`, *optional*): What ended an optional callback, without its traceback, which is logged.
    """

    optional: bool = False
    failure: Exception | None = None

    def fail(self, error: Exception) -> None:
        """Hear of no call from now on; the first error is logged."""
        if self.failure is None:
            self.failure = error
            logger.error("%s has failed and is off from now on; calls go on.", type(self).__name__, exc_info=error)
            # The log has them. Their frames would keep a call's cache, logits and target alive.
            error.__traceback__ = error.__cause__ = error.__context__ = None

    def on_add(self, drafter: TreeDrafter) -> None:
        """It was added to a drafter."""

    def on_remove(self, drafter: TreeDrafter) -> None:
        """It was taken off a drafter."""

    def on_generate_begin(self, call: DraftingCall) -> None:
        """A call begins; nothing has been read."""

    def on_prompt(self, call: DraftingCall, pairs: Pairs) -> None:
        """The target has read a chunk of the prompts; the last chunk ends with the first emitted tokens."""

    def on_draft(self, call: DraftingCall, tree: DraftTree) -> None:
        """A round has drafted."""

    def on_verify(self, call: DraftingCall, tree: DraftTree, scored: Scored) -> None:
        """The target has scored the draft; nothing of it has been chosen yet."""

    def on_commit(self, call: DraftingCall, tree: DraftTree, scored: Scored, walk: Walk, pairs: Pairs) -> None:
        """
        Tokens have been emitted: by a round, or by the prompt, whose tree is only a root.

        Args:
            call ([`DraftingCall`]): The call.
            tree ([`DraftTree`]): The verified draft.
            scored ([`Scored`]): The target's logits and features at its nodes.
            walk ([`Walk`]): The kept nodes and the emitted tokens.
            pairs ([`Pairs`]): What the target has learned by it; for a prompt, what `on_prompt` was told last.
        """

    def on_generate_end(self, call: DraftingCall) -> None:
        """A call has returned its text; its statistics are complete."""


class TreeDrafter(ABC):
    """
    Proposes token trees for a target. Anything that implements this goes into `target.generate(assistant_model=...)`.

    Attributes:
        feature_layers (`tuple[int, ...]`):
            Which of the target's `hidden_states` the drafter reads, in transformers' indexing: 0 is the embedding, i
            the output of decoder layer i - 1, and the number of layers the state after the final norm.
            Where that depends on the target's depth, see `feature_layers_for`.
        drafting_plan ([`DraftingPlan`] or `"auto"`, *optional*, defaults to `"auto"`):
            How much a round drafts: a plan, `None` for the default plan of where the drafter is, or `"auto"` to have
            it found while decoding, nothing where nothing pays. A call's own `generation_config.drafting_plan` goes
            first.
        controller ([`PlanController`]): Finds the plan, and keeps what it has learned from call to call.
        look_ups (`str`): Whether it drafts what the text has said before: `"none"`, `"joined"` to what its network
            drafts, or `"alone"`.
        acceptance_measured (`bool`): What `acceptance` gives was measured with this very drafter.
        compiled_rounds ([`CompiledRounds`], *optional*):
            Buffers and graphs of rounds of fixed shapes: made by [`compile_rounds`], or on CUDA by the first call.
        captures_rounds (`bool`):
            Whether calls on CUDA capture rounds as graphs of their own accord. Set both, to `None` and `False`, to
            have every round run eagerly.
        prepacked_weights ([`PrepackedWeights`], *optional*):
            Copies of the target's weights, and the drafter's, by which rounds on an x86 CPU take less time, made when
            a call has had some rounds. `None` to have none, for the memory; `PrepackedWeights(most_bytes)` for larger
            models.
        last_statistics ([`GenerationStatistics`], *optional*):
            Of the last finished call; with several threads the last one wins.
        objective_class (`type`, *optional*):
            A frozen dataclass of what may be chosen about the objective beside the batch, with a default for
            everything; `specblock train --objective NAME=VALUE` sets its fields. `None` if there is nothing to choose.
        lock (`DrafterLock`):
            Held around `propose` and around any in-place change of the weights. Every drafter has one from the start.
        has_fixed_rounds (`bool`):
            Whether a round's shapes follow from a plan alone, so that `begin_fixed` may be called.
        can_sample (`bool`): Whether it can draw trees, see [`DraftingPlan`].
        callbacks (`tuple` of [`DraftingCallback`]): Who listens to its calls; see `add_callback`.
        predicts_at_once (`bool`):
            Whether one call of the network with embeddings, projected features and positions of a text gives what the
            first forward of a round would at each of its places, `[B, T, K, d]`.

    A copy, pickled ones included, has the configuration, weights and drafting plan. Who listens to the original, what
    was compiled for it and what its last call did stay with the original.
    """

    config: PreTrainedConfig
    lock: DrafterLock
    feature_layers: tuple[int, ...] = ()
    objective_class: type | None = None
    drafting_plan: DraftingPlan | Literal["auto"] | None = "auto"
    controller: PlanController
    look_ups: Literal["none", "joined", "alone"] = "none"
    acceptance_measured: bool = False
    compiled_rounds: Any = None
    captures_rounds: bool = True
    prepacked_weights: PrepackedWeights | None = None
    last_statistics: GenerationStatistics | None = None
    has_fixed_rounds: bool = False
    can_sample: bool = False
    callbacks: tuple[DraftingCallback, ...] = ()
    predicts_at_once: bool = False
    # The last one is torch's: what `module.compile()` has made of the original.
    _not_copied: tuple[str, ...] = ("callbacks", "compiled_rounds", "last_statistics", "_compiled_call_impl")

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        drafter = super().__new__(cls)
        # Here, so that it is there whatever a subclass does in its `__init__`, and is one whichever thread asks first.
        vars(drafter)["lock"] = DrafterLock()
        vars(drafter)["controller"] = PlanController()
        vars(drafter)["prepacked_weights"] = PrepackedWeights()
        return drafter

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self._not_copied}

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
        callback.on_add(self)  # which may refuse
        self.callbacks = (*self.callbacks, callback)

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

    def attach(self, target: nn.Module) -> Attachment:
        """
        Serve all calls of `target.generate()` that name no assistant, whoever makes them: an evaluation harness, a
        trainer that lets its policy write, a pipeline. Calls that a drafter cannot serve (beams, an assistant of their
        own, a row-wise processor that nobody knows) run as they would without it, and are counted with the reason.

        Args:
            target ([`~transformers.PreTrainedModel`]): The model, or a wrapper around it, such as peft's.

        Returns:
            [`Attachment`]: To be detached, or used as a context manager, with statistics. A target that nobody else
                holds any more is gone with it, unless the drafter has rounds of fixed shapes, which hold it.

        Raises:
            ValueError: The target has a drafter attached already, is not one to draft for, or another's.

        Example:

        ```python
        >>> with drafter.attach(target) as attachment:
        ...     target.generate(**inputs)
        >>> print(attachment.statistics.tau)
        ```
        """
        return attach(self, target)

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
        """`feature_layers`, or what they are for this target where that depends on its depth."""
        return self.feature_layers

    @abstractmethod
    def begin(self, table: TokenTable, batch_size: int, max_length: int, *, first_position: int = 0) -> DraftState:
        """A fresh memory for one `generate()` call; see [`DraftState`] for the arguments."""

    def begin_fixed(self, table: TokenTable, batch_size: int, max_length: int, width: int) -> DraftState:
        """
        A memory that many calls use one after the other, for rounds of fixed shapes, which may be captured: with it
        and [`FixedLimits`], `propose` must neither ask the device for anything nor do anything on the host that
        differs from round to round. What has to be found on the host goes into `find`.

        Args:
            table (`TokenTable`): The target's embedding and head.
            batch_size (`int`): Rows that it drafts for.
            max_length (`int`): Most positions that the drafter can be told about.
            width (`int`): Pairs that every round tells, padding counted.
        """
        raise NotImplementedError(f"{type(self).__name__} has no rounds of fixed shapes.")

    def find(self, state: DraftState, pairs: Pairs, limits: Limits) -> None:
        """What of a round of fixed shapes is found on the host, before `propose`; put into the state's buffers."""
        return None

    def deepest(self, plan: DraftingPlan) -> int:
        """Levels of the deepest tree that a plan allows."""
        return plan.tree_budget

    def rounds_model(self, weights: PrepackedWeights | None) -> RoundsModel[Any] | None:
        """
        What runs as the drafter's network in the rounds of a call; `None` for a drafter without weights of its own.

        Args:
            weights ([`PrepackedWeights`], *optional*): May make it faster.
        """
        return None

    def with_network(self, network: Any) -> TreeDrafter:
        """The drafter, its lock and settings included, with what [`~TreeDrafter.rounds_model`] gave for a round."""
        return self

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
            `specblock_hf.drafting.proposal`.
        """

    def loss(
        self,
        batch: TargetBatch,
        objective: Any = None,
        *,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Losses:
        """
        The drafter's training objective and its parts, for the trainer and the online updater alike. `specblock train
        --drafter NAME` trains whatever implements this and is registered, see [`register_drafter`]: the
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
        if self.objective_class is None:
            raise TypeError(f"{type(self).__name__} has no weights to train; train the drafter that it goes with.")
        return self._loss(batch, objective or self.objective_class(), progress, generator)

    def _loss(self, batch: TargetBatch, objective: Any, progress: float, generator: Any) -> Losses:
        """What `loss` returns, of a kind with an `objective_class`."""
        raise NotImplementedError

    def parameters_of(self, scope: Scope) -> list[nn.Parameter]:
        """The parameters that an update of this scope may change; none for a drafter without weights."""
        return []
