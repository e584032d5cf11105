# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Rounds of fixed shapes: trees, pairs, keys and values live in memory that every call uses again, padded to a few sizes.
On CUDA the rounds are captured as graphs, which the host replays with a few calls instead of launching every kernel.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import has_offloaded_params
from torch import nn
from transformers import PreTrainedModel, StaticCache
from transformers.utils import logging

from ..drafting.drafter import TreeDrafter
from ..drafting.pairs import TokenTable
from ..drafting.pilot import fixed_plan
from ..drafting.plan import DraftingPlan
from ..foreign_hooks import foreign_hooks
from ..target.fixed import MakeStep, TargetRounds
from ..target.support import check_target
from .rounds.drafts import DraftRounds
from .rounds.fingerprint import fingerprint
from .rounds.fused import FusedNetwork, captures_itself, compiled
from .rounds.graphs import PATIENCE, CudaGraphs, Recorder, Step
from .rounds.lending import Lent, Request


logger = logging.get_logger(__name__)

SIZES = (1, 8, 16, 32, 64, 128, 256)
"""Nodes, the root counted, that trees are padded to. A verification of 64 costs a tenth more than of one on a GPU."""

KEPT = 2
"""Drafts of fixed shapes that are kept: of a drafter and of look-ups joined with it, or of two plans, in turns."""

STEP = 512
"""Tokens of a text by which buffers grow that follow the calls."""

LONGEST = 4096
"""
Tokens that a text may get for drafts to have fixed shapes without being asked: every forward of a drafter attends to
all columns that there may ever be.
"""


@dataclass(frozen=True)
class Shapes:
    """
    What rounds are prepared for.

    Args:
        target ([`~transformers.PreTrainedModel`]): The only target.
        batch_size (`int`): Rows of a call.
        max_length (`int`): Most tokens of a row, prompt included.
        tree_sizes (`tuple[int, ...]`, *optional*): What trees are padded to; follows from the plan if not given.
    """

    target: PreTrainedModel
    batch_size: int
    max_length: int
    tree_sizes: tuple[int, ...] | None = None


def recorder_for(device: torch.device) -> Callable[[], Recorder] | None:
    """Makes what captures rounds on a device, CUDA graphs; `None` where nothing does."""
    return partial(CudaGraphs, device) if device.type == "cuda" else None


class CompiledRounds:
    """
    Buffers and graphs of a drafter's rounds. They serve one call at a time; others run eagerly meanwhile. A copied or
    pickled drafter has none. A joined drafter may have them from the one that it joins with others.

    Args:
        device (`torch.device`): Where everything is.
        shapes ([`Shapes`], *optional*): What they are prepared for; they follow the calls if not given.
        options (`dict`, *optional*): Of `torch.compile`, for forwards that are fused as well.
    """

    def __init__(
        self,
        device: torch.device,
        shapes: Shapes | None = None,
        options: dict[str, Any] | None = None,
    ):
        self._shapes, self._options = shapes, options
        self.device, self.kept = device, KEPT
        self._recorder = recorder_for(device)
        self._patience = PATIENCE if shapes is None else 0
        self._broken: str | None = None
        self._target: TargetRounds | None = None
        self._drafts: list[DraftRounds] = []  # the one used last at the end
        self._prints: WeakKeyDictionary[TargetRounds | DraftRounds, Hashable] = WeakKeyDictionary()
        self._free = threading.Lock()

    def forget(self) -> None:
        """Let go of drafts beyond those that are kept."""
        del self._drafts[: -self.kept]
        gc.collect()  # their parts hold each other

    @property
    def follows(self) -> bool:
        """They are of the shapes that calls have."""
        return self._shapes is None

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return (type(None), ())

    @contextmanager
    def lend(self, request: Request) -> Iterator[Lent]:
        """Give a call what fits it, for as long as the context lasts."""
        if not self._free.acquire(blocking=False):
            yield Lent(reason="another call has the buffers at the moment")
            return
        try:
            lent = self._lent(request)
            if request.hindrance and request.hindrance in (lent.reason or ""):
                logger.warning_once(f"Rounds run eagerly: {request.hindrance}")
            yield lent
        finally:
            self._free.release()

    def afresh(self, request: Request) -> Lent:
        """What a call would be lent, in buffers of its own that are captured at their first use."""
        own = CompiledRounds(self.device, self._shapes, self._options)
        own._patience = 0
        return own._lent(request)

    def prepare(self, request: Request) -> None:
        """
        Make the buffers before any call needs them.

        Raises:
            `ValueError`: The target cannot have rounds of fixed shapes.
        """
        self._target_for(request)
        if self._why_no_drafts(request) is None:
            self._drafts_for(request)

    def _lent(self, request: Request) -> Lent:
        lent, reasons = Lent(), []
        for name, why_not, made in (
            ("target", self._why_no_target, self._target_for),
            ("drafts", self._why_no_drafts, self._drafts_for),
        ):
            reason = why_not(request)
            if reason is None:
                try:
                    setattr(lent, name, made(request))
                except (ValueError, torch.OutOfMemoryError) as error:
                    reason = str(error)
                    logger.warning_once(f"Rounds run eagerly: {reason}")
            reasons.append(reason)
        lent.reason = "; ".join(reason for reason in dict.fromkeys(reasons) if reason) or None
        return lent

    def _why_no_target(self, request: Request) -> str | None:
        """Why a call's trees are not verified in fixed shapes; an empty text where nobody asked for it."""
        follows = self._shapes is None
        if follows and (type(request.cache) is not StaticCache or self._recorder is None):
            return self._broken or ""
        if request.returns_cache:
            return "the call's cache is somebody else's or handed out"
        return request.hindrance or self._why_neither(request)

    def _why_no_drafts(self, request: Request) -> str | None:
        plan = request.plan
        if plan.tree_budget == 0 or (self._shapes is None and self._recorder is None):
            return self._broken or ""
        if not request.drafter.has_fixed_rounds:
            return f"a round of {request.drafter.label} has no fixed shapes"
        if plan.draft_sampling != "topk":
            return "the shapes of drawn trees follow from what they are drawn from"
        if self._shapes is None and request.length > LONGEST:
            return f"drafts for a text of up to {request.length} tokens would attend to as many from the first one on"
        network = request.drafter.network
        if isinstance(network, nn.Module) and network.device != TokenTable.of(request.target).device:
            logger.warning_once(
                f"the {network.label} is on {network.device} and its target elsewhere, which waits for it in "
                "every round; put it there by .to(target.device)."
            )
            return "drafter and target are on different devices"
        if self._shapes is not None and request.returns_cache:
            return self._why_no_target(request)
        return self._why_neither(request)

    def _why_neither(self, request: Request) -> str | None:
        shapes = self._shapes
        if self._broken is not None:
            return self._broken
        if shapes is None:
            return None
        if request.target is not shapes.target:
            return "rounds were compiled for another target"
        if request.target.device != self.device:
            return f"rounds were compiled on {self.device}"
        if request.batch_size != shapes.batch_size:
            return f"rounds were compiled for a batch of {shapes.batch_size}"
        if request.length > shapes.max_length:
            return f"rounds were compiled for at most {shapes.max_length} tokens"
        return None

    def _target_for(self, request: Request) -> TargetRounds:
        target, made = request.target, self._target
        length = self._length_of(request)
        layers = tuple(request.drafter.feature_layers_for(target))
        sizes = self._sizes_of(request.plan)
        fits = (
            made is not None
            and made.target is target
            and (made.layers, made.batch_size) == (layers, request.batch_size)
            and made.max_length >= length
            and made.sizes[-1] >= sizes[-1]
        )
        if fits and self._unchanged(made, "target", target):
            return made
        if made is not None:
            self._target = made = None
            gc.collect()  # its memory goes first, and its parts hold each other
        self._check_replays(target)
        # Calls outside of inference mode could not write to memory that was made within.
        with torch.inference_mode(False), torch.no_grad():
            self._target = TargetRounds(
                target, layers, request.batch_size, length, sizes, self._steps(), self._compiler(compiled)
            )
        self._prints[self._target] = fingerprint(target)
        return self._target

    def _drafts_for(self, request: Request) -> DraftRounds:
        drafter, table = request.drafter, TokenTable.of(request.target)
        length, parts = self._length_of(request), [table.embedding, table.output_head]
        if isinstance(drafter.network, nn.Module):
            parts.append(drafter.network)

        def made_for(kept: DraftRounds) -> bool:
            return (
                kept.drafter is drafter
                and kept.table.embedding is table.embedding
                and kept.batch_size == request.batch_size
                and kept.plan == request.plan
            )

        made = next(filter(made_for, self._drafts), None)
        if made is not None:
            self._drafts.remove(made)
            if made.max_length < length or not self._unchanged(made, "drafter", *parts):
                made = None
                gc.collect()
        if made is None:
            while len(self._drafts) >= self.kept:
                self._drafts.pop(0)
                gc.collect()
            self._check_replays(*parts)
            with torch.inference_mode(False), torch.no_grad():
                made = DraftRounds(
                    *(drafter, table, request.batch_size, length, request.plan),
                    *(self._steps(), self._compiler(FusedNetwork)),
                )
            self._prints[made] = fingerprint(*parts)
        self._drafts.append(made)
        return made

    def _check_replays(self, *parts: nn.Module) -> None:
        """Refuse to capture what a replay would leave out."""
        if self._recorder is None:
            return
        for part in parts:
            for module in part.modules():
                if has_offloaded_params(module):
                    raise ValueError(
                        f"weights of {type(part).__name__} are kept elsewhere between forwards, which replayed rounds "
                        "would not fetch; load it onto one device."
                    )
                for hook in foreign_hooks(module):
                    raise ValueError(
                        f"{type(part).__name__} has forward hooks ({hook!r}), which replayed rounds would not call; "
                        "remove them."
                    )

    def _unchanged(self, made: TargetRounds | DraftRounds, name: str, *parts: nn.Module) -> bool:
        if self._prints[made] == fingerprint(*parts):
            return True
        logger.info(f"The {name} has changed beyond its weights' values; rounds are captured anew.")
        return False

    def _length_of(self, request: Request) -> int:
        return self._shapes.max_length if self._shapes else -(-request.length // STEP) * STEP

    def _sizes_of(self, plan: DraftingPlan) -> tuple[int, ...]:
        if self._shapes and self._shapes.tree_sizes:
            return self._shapes.tree_sizes
        nodes = plan.tree_budget + 1
        if nodes > SIZES[-1]:
            return (*SIZES, nodes)
        return SIZES[: next(place for place, size in enumerate(SIZES) if size >= nodes) + 1]

    def _compiler(self, kind: Callable[..., Callable[..., Any]]) -> Callable[..., Callable[..., Any]] | None:
        return None if self._options is None else partial(kind, options=self._options)

    def _steps(self) -> MakeStep:
        """Makes steps that are captured into a pool of memory of their own, and by nobody once one has failed."""
        recorder = self._recorder and self._recorder()

        def recorder_now() -> Recorder | None:
            return self._recorder and recorder

        return lambda function: Step(function, recorder_now, self._gave_up, self._patience)

    def _gave_up(self, error: Exception) -> None:
        """Something could not be captured: what there is goes on uncaptured, and later calls run eagerly."""
        self._broken = f"a round could not be captured: {error}"
        self._recorder = None
        logger.warning_once(f"Rounds run eagerly: {self._broken}")


def compile_rounds(
    target: PreTrainedModel,
    drafter: TreeDrafter,
    *,
    batch_size: int = 1,
    max_length: int = 1024,
    tree_sizes: Sequence[int] | None = None,
    fuse: bool = False,
    **options: Any,
) -> CompiledRounds:
    """
    Let `target.generate(assistant_model=drafter)` run rounds of fixed shapes from now on, in memory that is held for
    them; the text stays the same. On CUDA they are captured as graphs, in the first round that needs them, which takes
    about a second each. On a CPU they run as they are, which is only worth it with `fuse`. The target itself is not
    changed for anybody. A call runs eagerly if it has another batch size or may get longer, passes or returns a cache,
    or overlaps with another call; `last_statistics` counts the rounds and says why not. Prompts are read eagerly. To
    go back, set `drafter.compiled_rounds = None`.

    On CUDA calls with `cache_implementation="static"` have such rounds without this function as well, and drafts are
    captured whatever the cache is; see `captures_rounds` of [`TreeDrafter`].

    Args:
        target ([`~transformers.PreTrainedModel`]):
            The target, where and as it will run; all its layers attend to the whole prefix. If adapters are changed
            afterwards, rounds are captured anew.
        drafter ([`TreeDrafter`]): Its drafter; [`calibrate`] it before.
        batch_size (`int`, *optional*, defaults to 1): Rows of a call, all sequences of all prompts counted.
        max_length (`int`, *optional*, defaults to 1024):
            Most tokens of a row, prompt included. Memory for them is held as long as the drafter is compiled, and
            every forward attends over all of it.
        tree_sizes (sequence of `int`, *optional*):
            Numbers of nodes, the root counted, that trees are padded to; a larger tree loses its last nodes. Defaults
            to 1, 8, 16, 32, ... up to what the drafting plan needs.
        fuse (`bool`, *optional*, defaults to `False`):
            Compile the forwards with `torch.compile` as well, which can take minutes, for fewer kernels.
        options (*optional*): Of `torch.compile`; any of them fuses.

    Returns:
        [`CompiledRounds`]: Also kept as `drafter.compiled_rounds`.

    Raises:
        `ValueError`: The target's attention or cache cannot be compiled for trees, the drafter is for another
            target, or `options` capture graphs by themselves.
    """
    check_target(target)
    drafter.check_target(target)
    if target.device.type == "cuda" and captures_itself(options):
        raise ValueError(
            "torch.compile would capture graphs of its own within those of rounds, which cannot be; leave "
            "triton.cudagraphs and the backend cudagraphs out, and take the mode max-autotune-no-cudagraphs if any."
        )
    shapes = Shapes(target, batch_size, max_length, tuple(sorted(tree_sizes)) if tree_sizes else None)
    rounds = CompiledRounds(target.device, shapes, options if fuse or options else None)
    plan = fixed_plan(drafter.drafting_plan, drafter, target.device)
    rounds.prepare(Request(target, drafter, plan, batch_size, max_length))
    drafter.compiled_rounds = rounds
    return rounds


def rounds_of(drafter: TreeDrafter, device: torch.device) -> CompiledRounds | None:
    """What a call may be lent from: what was compiled, on CUDA what calls before it have left, or nothing."""
    rounds = drafter.compiled_rounds
    elsewhere = device.type == "meta"  # weights that are fetched for each forward
    if rounds is not None and rounds.follows and rounds.device != device and not elsewhere:  # a graph is of one device
        rounds = drafter.compiled_rounds = None
    if rounds is None and drafter.captures_rounds and device.type == "cuda":
        rounds = drafter.compiled_rounds = CompiledRounds(device)
    return rounds


@contextmanager
def keeping(drafter: TreeDrafter, device: torch.device, plans: int) -> Iterator[None]:
    """Keep the drafts of so many plans, for whoever decodes by them in turns."""
    rounds = rounds_of(drafter, device)
    if rounds is None:
        yield
        return
    before, rounds.kept = rounds.kept, max(rounds.kept, plans)
    try:
        yield
    finally:
        rounds.kept = before
        rounds.forget()


@contextmanager
def lend(request: Request) -> Iterator[Lent]:
    """Give a call, for as long as the context lasts, what fits it of [`CompiledRounds`]."""
    rounds = rounds_of(request.drafter, request.target.device)
    if rounds is None:
        yield Lent()
        return
    with rounds.lend(request) as lent:
        yield lent


def lend_afresh(request: Request) -> Lent:
    """What a call would be lent, for whoever measures it; see [`~CompiledRounds.afresh`]."""
    rounds = rounds_of(request.drafter, request.target.device)
    return Lent() if rounds is None else rounds.afresh(request)
