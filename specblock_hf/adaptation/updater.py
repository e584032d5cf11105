# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Training the second copy of a drafter on what the target has just said, and bringing it into service
(https://huggingface.co/papers/2605.07243, section 3.4).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..checkpoints.loading import unsound
from ..devices import synchronize, without_cudnn_attention
from ..drafting.drafter import Scope, TreeDrafter
from ..drafting.pairs import TokenTable
from ..drafting.target_batch import TargetBatch
from ..training.batches import draft_ids_of
from .state import differences, refuse_unsound_state
from .windows import Window, WindowBuffer, collate


Steps = Sequence[Sequence[Window]]
"""The windows of every step of an update."""

DRIFT_ROWS = 256  # predictions of a text on which the drift is estimated: each is a row over the draft vocabulary


@dataclass(frozen=True)
class UpdateSettings:
    """
    How an update trains. The paper's values are not public; these were tuned on another stream than the reported one.

    Args:
        learning_rate (`float`, *optional*, defaults to 2e-4):
            Of AdamW, constant after the warm-up; at 5e-4 the first updates cost acceptance, 1.5e-3 was unstable.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.95)`): Of AdamW, as in training.
        max_grad_norm (`float`, *optional*, defaults to 0.5): As in training.
        steps (`int`, *optional*, defaults to 4): Steps of an update.
        warmup_steps (`int`, *optional*, defaults to 8):
            Over how many steps the rate rises linearly, at first and after a rollback: AdamW knows no scale yet, and
            its first steps at the full rate cost acceptance.
        batch_tokens (`int`, *optional*, defaults to 512): Most pairs of a step.
        averaging (`float`, *optional*, defaults to 0.95):
            What comes into service is the moving average of the trained weights, which keeps this share of itself at
            every step: steps are small and noisy, and what they have in common is what was learned. 0 deploys the
            trained weights themselves and saves a copy of the drafter.
        drift_weight (`float`, *optional*, defaults to 0.1):
            Weight lambda of KL(drafter before deployment || drafter), for SpecBlock and EAGLE-3; 0 saves that copy of
            the drafter and its time. It is taken once an update, on one of the newest texts, for all of its steps.
        objective (*optional*): An instance of the drafter's `objective_class`; its defaults if not given.
        autocast (`bool`, *optional*, defaults to `False`): Compute in bfloat16; the trained weights stay in float32.
        seed (`int`, *optional*, defaults to 0): Of the windows that are drawn and of the objective's own draws.
    """

    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 0.5
    steps: int = 4
    warmup_steps: int = 8
    batch_tokens: int = 512
    averaging: float = 0.95
    drift_weight: float = 0.1
    objective: Any = None
    autocast: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_tokens < 1 or self.learning_rate <= 0 or self.drift_weight < 0:
            raise ValueError(
                f"{self} cannot train; an update has at least one step of at least one token, a learning rate above 0 "
                "and a drift weight of 0 or more."
            )
        if not 0 <= self.averaging < 1:
            raise ValueError(f"averaging is {self.averaging}; the share that an average keeps lies in [0, 1).")


class DrafterUpdater:
    """
    Two copies of a drafter: the deployed one drafts and does not change in between calls of `publish`; the trained one
    learns, in float32, along with its moving average.

    Args:
        drafter ([`TreeDrafter`]): In service; its weights are changed in place, under its lock.
        settings ([`UpdateSettings`]): How to train.
        device (`torch.device`, *optional*): Where to train; the drafter's own by default.

    Raises:
        ValueError: The drafter has no weights, none that may be changed, or a drift that is not known.
    """

    def __init__(self, drafter: TreeDrafter, settings: UpdateSettings, device: torch.device | str | None = None):
        self.settings = settings
        self.deployed = cast(Any, drafter.network)
        if not self.deployed.parameters_of("full"):
            raise ValueError(
                f"{type(drafter).__name__} has no weights that could learn; adapt a drafter with weights, or leave "
                "the callback out."
            )
        if settings.drift_weight and not self.deployed.predicts_at_once:
            raise ValueError(
                f"the drift of a {type(self.deployed).__name__} from what it was cannot be measured; pass "
                "settings=UpdateSettings(drift_weight=0.0)."
            )
        if any(parameter.is_inference() for parameter in self.deployed.parameters_of("full")):
            raise ValueError(
                "this drafter was loaded inside of torch.inference_mode(), which forbids to change its weights; load "
                "it outside."
            )
        self.device = torch.device(device if device is not None else self.deployed.device)
        self.trained = self._copy().float()
        self.averaged = self._copy().float().requires_grad_(False) if settings.averaging else None
        self._average = get_ema_multi_avg_fn(settings.averaging)
        self.original = self._copy().requires_grad_(False) if settings.drift_weight else None
        self.random = random.Random(settings.seed)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.optimizer, self.steps_taken = self._new_optimizer(), 0
        self.draft_ids = draft_ids_of(self.deployed, self.deployed.config.vocab_size).to(self.device)

    def draw(self, buffer: WindowBuffer) -> list[list[Window]]:
        """What an update will train on: the windows of every step."""
        return buffer.draw(self.settings.steps, self.settings.batch_tokens, self.random)

    def update(
        self, scope: Scope, steps: Steps, held: Sequence[Window] = (), table: TokenTable | None = None
    ) -> dict[str, float]:
        """
        Train and bring into service. What fails is rolled back: all copies are then what is in service.

        Args:
            scope (`str`): As in `train`.
            steps (sequence of sequences of [`Window`]): As in `train`.
            held (sequence of [`Window`], *optional*): As in `publish`.
            table ([`TokenTable`], *optional*): As in `train`.

        Returns:
            `dict[str, float]`: As `train`.

        Raises:
            ValueError: The update ended in values that are not finite.
        """
        try:
            numbers = self.train(scope, steps, table)
            if not all(map(math.isfinite, numbers.values())):
                raise ValueError(f"the {scope} update ended in {numbers}, which is not finite.")
            self.publish(held, table)
        except Exception:
            self._begin_from(self.snapshot())
            raise
        return numbers

    @without_cudnn_attention
    def train(self, scope: Scope, steps: Steps, table: TokenTable | None = None) -> dict[str, float]:
        """
        Train the second copy for one update; the first one is not touched.

        Args:
            scope (`str`): `"head"` trains what comes after the decoder layers, `"full"` everything.
            steps (sequence of sequences of [`Window`]): From `draw`.
            table ([`TokenTable`], *optional*): The target's, for drafters that predict with its head.

        Returns:
            `dict[str, float]`: `loss`, the mean over the steps, and `drift`, at the first one.
        """
        settings = self.settings
        for parameter in self.trained.parameters_of("full"):
            parameter.requires_grad_(scope == "full")
        for parameter in self.trained.parameters_of(scope):
            parameter.requires_grad_(True)
        losses, drift = [], torch.zeros((), device=self.device)
        with ExitStack() as stack:
            # The caller may generate without gradients or in inference mode; an update runs in neither.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(self.device.type, torch.bfloat16, enabled=settings.autocast))
            for windows in steps:
                batch = collate(windows, self.draft_ids, torch.float32, table)
                loss = self.trained.loss(batch, settings.objective, generator=self.generator)["loss"]
                losses.append(loss.detach())
                if settings.drift_weight and len(losses) == 1:
                    drift = self._drift(windows[:1])
                    loss = loss + len(steps) * settings.drift_weight * drift
                # Of nothing else: the target's head may be on the way, and it is not ours to leave gradients in.
                loss.backward(inputs=self.trained.parameters_of(scope))
                nn.utils.clip_grad_norm_(self.trained.parameters_of(scope), settings.max_grad_norm)
                self.steps_taken += 1
                for group in self.optimizer.param_groups:
                    group["lr"] = settings.learning_rate * min(1.0, self.steps_taken / max(settings.warmup_steps, 1))
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                # Autocast would go on with the weights of its first step.
                torch.clear_autocast_cache()
                if self.averaged is not None:
                    self._average(self.averaged.parameters_of(scope), self.trained.parameters_of(scope), None)
        return {"loss": float(torch.stack(losses).mean()), "drift": float(drift.detach())}

    def publish(self, held: Sequence[Window] = (), table: TokenTable | None = None) -> None:
        """
        Bring what was learned into service, between two drafts, if a drafter with these weights can draft.

        Args:
            held (sequence of [`Window`], *optional*): Texts for which its predictions have to be finite.
            table ([`TokenTable`], *optional*): As in `train`.

        Raises:
            ValueError: The weights, in the precision of the drafter in service, or its predictions are not finite.
        """
        learned, candidate = self.trained if self.averaged is None else self.averaged, self._copy()
        self._write(candidate, learned.parameters_of("full"))
        broken = unsound(dict(candidate.named_parameters()))
        if broken:
            raise ValueError(f"what was learned is not finite, or absurdly large, in {', '.join(broken)}.")
        if held and not math.isfinite(self._loss_of(candidate, held, table)):
            raise ValueError("what was learned predicts values that are not finite.")
        self._write(self.deployed, candidate.parameters_of("full"))

    def snapshot(self) -> list[torch.Tensor]:
        """A copy of the weights that are in service."""
        with self.deployed.lock:
            return [parameter.detach().clone() for parameter in self.deployed.parameters_of("full")]

    def restore(self, weights: Sequence[torch.Tensor]) -> None:
        """
        Go back to a snapshot, with all copies; what the optimiser remembers is dropped.

        Args:
            weights (sequence of `torch.Tensor`): From `snapshot`.
        """
        self._write(self.deployed, weights)
        self._begin_from(weights)

    def share_kept(self, weights: Sequence[torch.Tensor], windows: Sequence[Window]) -> float | None:
        """
        The drafter in service against a snapshot on the same texts, so that it does not matter how hard they are.

        Args:
            weights (sequence of `torch.Tensor`): From `snapshot`.
            windows (sequence of [`Window`]): Texts.

        Returns:
            `float`, *optional*: Tokens a round of the former over those of the latter, if each place of the texts
            began a round that drafts a chain by one forward. `None` without texts, and for drafters other than
            SpecBlock's and EAGLE-3's.
        """
        if not windows or not self.deployed.predicts_at_once:
            return None
        # Copies of both, because updates may have a device of their own.
        now, then = self._copy(), self._copy()
        self._write(then, weights)
        return self.tokens_a_round(now, windows) / self.tokens_a_round(then, windows)

    @torch.no_grad()
    @without_cudnn_attention
    def tokens_a_round(self, drafter: Any, windows: Sequence[Window]) -> float:
        """
        What a drafter would be worth on texts, without decoding them.

        Args:
            drafter ([`SpecBlockModel`] or [`Eagle3Model`]): In service or a copy; on the device of updates.
            windows (sequence of [`Window`]): Texts.

        Returns:
            `float`: Tokens that a round emits, if each place of the texts begins one that drafts a chain by one
            forward.
        """
        kept = rounds = 0
        for window in windows:
            batch = collate([window], self.draft_ids, torch.float32)
            places, wanted = self._predicted(batch)
            starts = wanted[..., 0].flatten().nonzero().squeeze(1)
            slots = places.shape[1]
            rows = starts[:, None] * slots + torch.arange(slots, device=self.device)
            guesses = _first_logits(drafter, batch, rows.flatten()).argmax(-1).view(-1, slots)
            right = wanted[0, starts] & (guesses == self.draft_ids[batch.tokens[0, places[starts]]])
            kept += int(right.cumprod(-1).sum())
            rounds += len(starts)
        return 1 + kept / max(rounds, 1)

    def state_dict(self) -> dict[str, Any]:
        """
        The trained copy and its average, the drafter before deployment, the optimiser and the state of all draws; no
        window.
        """
        return {
            "trained": self.trained.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "original": None if self.original is None else self.original.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps_taken": self.steps_taken,
            "random": [list(part) if isinstance(part, tuple) else part for part in self.random.getstate()],
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on from where `state_dict` was called, and bring those weights into service.

        Raises:
            ValueError: They are another drafter's, or hold values that are not finite; nothing has changed.
        """
        self._refuse(state)
        self.trained.load_state_dict(state["trained"])
        if self.averaged is not None:
            # A service that did not average so far has no average to go on from.
            self.averaged.load_state_dict(state["averaged"] or state["trained"])
        if self.original is not None and state.get("original"):
            # Otherwise the state is older, or knew no drift, and the anchor is what was in service at first.
            self.original.load_state_dict(state["original"])
        # Its moments alone: the rest is this updater's settings.
        moments = {"state": deepcopy(state["optimizer"]["state"])}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | moments)
        self.steps_taken = state["steps_taken"]
        self.random.setstate(tuple(tuple(part) if isinstance(part, list) else part for part in state["random"]))
        self.generator.set_state(state["generator"])
        self.publish()

    def _refuse(self, state: dict[str, Any]) -> None:
        for theirs in filter(None, (state["trained"], state["averaged"], state.get("original"))):
            other = differences(self.trained.state_dict(), theirs)
            if other:
                raise ValueError(
                    f"this state is another drafter's: they differ in {', '.join(sorted(other))}; load it for the "
                    "drafter that it was saved from."
                )
        refuse_unsound_state(state)

    def _begin_from(self, weights: Sequence[torch.Tensor]) -> None:
        for learning in (self.trained, self.averaged):
            if learning is not None:
                self._write(learning, weights)
        self.optimizer, self.steps_taken = self._new_optimizer(), 0

    def _loss_of(self, drafter: Any, windows: Sequence[Window], table: TokenTable | None) -> float:
        batch, generator = collate(windows, self.draft_ids, drafter.dtype, table), torch.Generator()
        with torch.inference_mode(False), torch.no_grad():
            return float(drafter.loss(batch, self.settings.objective, generator=generator)["loss"])

    def _drift(self, windows: Sequence[Window]) -> torch.Tensor:
        """KL(drafter before deployment || trained copy) of the first forward's predictions, a sample of them."""
        batch = collate(windows, self.draft_ids, torch.float32)
        _, wanted = self._predicted(batch)
        rows = wanted.flatten().nonzero().squeeze(1)
        chosen = rows[torch.randperm(len(rows), generator=self.generator, device="cpu")[:DRIFT_ROWS].to(rows.device)]
        if not len(chosen):
            return torch.zeros((), device=self.device)
        with torch.no_grad():
            before = _first_logits(self.original, batch, chosen).log_softmax(-1)
        now = _first_logits(self.trained, batch, chosen).log_softmax(-1)
        return nn.functional.kl_div(now, before, reduction="batchmean", log_target=True)

    def _predicted(self, batch: TargetBatch) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """The place `[pairs, slots]` that each slot predicts, and `[B, pairs, slots]`: the target wrote it."""
        pairs = torch.arange(batch.tokens.shape[1] - 1, device=self.device)
        places = pairs[:, None] + 2 + torch.arange(self.trained.config.block_size, device=self.device)
        inside = places < batch.lengths[:, None, None]
        places = places.clamp_max(batch.tokens.shape[1] - 1)
        return places, batch.scored[:, places] & inside

    def _copy(self) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return deepcopy(self.deployed).to(self.device).eval()

    def _new_optimizer(self) -> torch.optim.AdamW:
        settings, weights = self.settings, self.trained.parameters_of("full")
        # A small step is mostly the optimiser's: fused, it reads the weights once.
        return torch.optim.AdamW(
            weights, lr=settings.learning_rate, betas=settings.betas, weight_decay=0.0, fused=True
        )

    def _write(self, drafter: Any, weights: Sequence[torch.Tensor]) -> None:
        """
        Copy weights into a drafter in place, where they differ: others count as unchanged, and nothing that was made
        of them is made anew. Under its lock nobody drafts, so that nobody sees half of it.
        """
        with drafter.lock, torch.inference_mode(False), torch.no_grad():
            # Neither may a draft that is still running on the device, whoever's stream it is on.
            synchronize(drafter.device)
            for parameter, new in zip(drafter.parameters_of("full"), weights, strict=True):
                new = new.to(parameter)
                if not torch.equal(parameter, new):
                    parameter.copy_(new)
            synchronize(drafter.device)
            # A service may be within one autocast, which would go on with the weights of before.
            torch.clear_autocast_cache()


def _first_logits(drafter: Any, batch: TargetBatch, rows: torch.LongTensor) -> torch.Tensor:
    """Logits `[n, draft_vocab_size]` in float32 of some of the first forward's predictions, counted row by row."""
    pairs = torch.arange(batch.tokens.shape[1] - 1, device=batch.tokens.device).expand(len(batch.tokens), -1)
    embeds, features = batch.embeds[:, 1:].to(drafter.dtype), batch.features[:, :-1].to(drafter.dtype)
    hidden = drafter(embeds, drafter.project_features(features), pairs)
    slots = torch.arange(hidden.shape[2], device=rows.device)
    # A block's first slot has the pair's own token to go by, the others the text's token before theirs.
    before = batch.tokens[:, (pairs[0, :, None] + 1 + slots).clamp_max(batch.tokens.shape[1] - 1)]
    before = before.masked_fill(slots == 0, -1).flatten()[rows]
    return drafter.draft_logits(hidden.flatten(0, -2)[rows], before)[1].float()
