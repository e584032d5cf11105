# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The callback that lets a drafter learn from the verifier while it serves."""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch

from ..checkpoints.saving import save_file_whole
from ..drafting.drafter import DrafterLock, DraftingCall, DraftingCallback, Scope, TreeDrafter
from ..drafting.pairs import Pairs, Scored, TokenTable
from ..trees.tree import DraftTree
from ..trees.verification import Walk
from .bandit import Action, AdaptationBandit, Decision
from .monitor import FallMonitor
from .state import refuse_unsound_state
from .updater import DrafterUpdater, UpdateSettings
from .windows import CallRecorder, WindowBuffer


Policy = Literal["bandit", "always", "never"]

KEPT_DECISIONS = 1000


@dataclass(frozen=True)
class AdaptationEvent:
    """
    Something that happened to the weights.

    Args:
        kind (`str`):
            `"updated"`, `"rolled back"`, `"harder texts"` (tau fell, and would have with the good weights) or
            `"failed"`.
        query (`int`): Queries seen when it was started.
        scope (`str`, *optional*): What an update trained.
        seconds (`float`, *optional*): How long it trained.
        loss (`float`, *optional*): Of the update.
        drift (`float`, *optional*): KL from the drafter before deployment.
    """

    kind: str
    query: int
    scope: str | None = None
    seconds: float | None = None
    loss: float | None = None
    drift: float | None = None


@dataclass(eq=False, repr=False)
class OnlineAdaptationCallback(DraftingCallback):
    """
    Updates a drafter from the verifier's feedback while it serves, where that is expected to pay
    (https://huggingface.co/papers/2605.07243, section 3.4, appendices A.3 and D). Whatever it does changes the speed
    of later calls and never a text. Add it to one drafter; a call of `generate()` is a query. It learns from one
    target at a time: what another one said, or the same before its weights changed, is forgotten.

    Args:
        policy (`str`, *optional*, defaults to `"bandit"`):
            `"always"` makes a full update every `every` queries (online speculative decoding,
            https://huggingface.co/papers/2310.07177), `"never"` none; both are for comparison.
        bandit ([`AdaptationBandit`], *optional*): With constants of its own.
        settings ([`UpdateSettings`], *optional*): How an update trains.
        every (`int`, *optional*, defaults to 8): For `policy="always"`.
        fresh_tokens (`int`, *optional*, defaults to 192):
            Tokens of the target that must have come in since the last update, for the bandit to make another.
        buffer_bytes (`int`, *optional*, defaults to 64 MiB): Bound of what is kept to train on.
        window_tokens (`int`, *optional*, defaults to 512): Most tokens that are kept of a text, its last ones.
        top_k (`int`, *optional*, defaults to 32): Tokens that are kept of each of the target's distributions.
        background (`bool`, *optional*, defaults to `True`):
            Train in a thread of its own (on CUDA, on a stream of its own), while calls go on. Otherwise the call that
            triggers an update returns after it, which makes a run repeatable.
        device (`torch.device` or `str`, *optional*): Where to train; the drafter's own by default.
        monitor ([`FallMonitor`], *optional*): When to roll back.
        clock (`Callable[[], float]`, *optional*, defaults to `time.perf_counter`):
            What throughput is measured with; `time.process_time` on a CPU that others use as well.

    Attributes:
        decisions (`deque` of [`Decision`]): The last thousand, one for each query.
        events (`deque` of [`AdaptationEvent`]): The last thousand changes of the weights.
        failure (`Exception`, *optional*):
            What ended the adaptation; it is logged once, with its traceback, and the drafter serves on.

    Example:

    ```python
    >>> from specblock_hf.adaptation import OnlineAdaptationCallback

    >>> callback = OnlineAdaptationCallback()
    >>> drafter.add_callback(callback)
    >>> for inputs in requests:
    ...     output = target.generate(**inputs, assistant_model=drafter)
    >>> callback.save_pretrained("adapted-drafter")
    ```

    Raises:
        ValueError: An unknown policy or a number out of range.
    """

    optional = True

    policy: Policy = "bandit"
    _: KW_ONLY
    bandit: AdaptationBandit | None = None
    settings: UpdateSettings | None = None
    every: int = 8
    fresh_tokens: int = 192
    buffer_bytes: int = 64 * 2**20
    window_tokens: int = 512
    top_k: int = 32
    background: bool = True
    device: torch.device | str | None = None
    monitor: FallMonitor | None = None
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        if self.policy not in ("bandit", "always", "never"):
            raise ValueError(f"there is no policy {self.policy!r}; choose bandit, always or never.")
        if min(self.every, self.buffer_bytes, self.window_tokens, self.top_k) < 1 or self.fresh_tokens < 0:
            raise ValueError(
                f"every is {self.every}, buffer_bytes {self.buffer_bytes}, window_tokens {self.window_tokens}, top_k "
                f"{self.top_k} and fresh_tokens {self.fresh_tokens}; give at least 1 (fresh_tokens: 0) of each."
            )
        self.bandit = self.bandit or AdaptationBandit()
        self.settings = self.settings or UpdateSettings()
        self.monitor = self.monitor or FallMonitor()
        self.buffer = WindowBuffer(self.buffer_bytes)
        self.decisions: deque[Decision] = deque(maxlen=KEPT_DECISIONS)
        self.events: deque[AdaptationEvent] = deque(maxlen=KEPT_DECISIONS)
        self.queries = self.updates = 0
        self._updater: DrafterUpdater | None = None
        self._good: list[torch.Tensor] = []
        self._candidate: list[torch.Tensor] | None = None
        self._candidate_updates = 0  # that it has behind it
        self._unpaid = 0.0
        self._target: tuple[weakref.ref | None, int] = (None, 0)  # its embedding and version
        self._pending: Future | None = None
        self._stream: torch.cuda.Stream | None = None
        self._removed = False
        self._executor: ThreadPoolExecutor | None = None
        self._lock = DrafterLock()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        if self._updater is not None:
            raise TypeError(
                "this callback adapts a drafter and cannot be copied or pickled along; copy the drafter, or take the "
                "callback's state_dict()."
            )
        return vars(self)

    def on_add(self, drafter: TreeDrafter) -> None:
        if self._updater is not None:
            raise ValueError("this callback adapts a drafter already; make another one for another drafter.")
        self._process = os.getpid()
        if self.policy == "never":
            return
        self._updater = DrafterUpdater(drafter, self.settings, self.device)
        self._good = self._updater.snapshot()
        if self.background:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="drafter-update")

    def on_remove(self, drafter: TreeDrafter) -> None:
        with self._lock:
            self._removed = True
        self.wait()
        if self._executor is not None and self._is_here:
            self._executor.shutdown()

    def on_generate_begin(self, call: DraftingCall) -> None:
        if self.learns:
            dtype = self.updater.deployed.dtype
            top_k = min(self.top_k, call.table.vocab_size)
            recorder = CallRecorder(call.batch_size, dtype, self.window_tokens, top_k, self.buffer_bytes)
            target = (weakref.ref(call.table.embedding), call.target_version)
            call.notes[self] = (recorder, self.clock(), self._busy(), target)
            if target != self._target:
                # What another target said, or this one before it changed, is not what it would say now.
                with self._lock:
                    self.buffer.clear()
                    self._target = target

    def on_prompt(self, call: DraftingCall, pairs: Pairs) -> None:
        if self in call.notes:
            call.notes[self][0].add_prompt(pairs)

    def on_commit(self, call: DraftingCall, tree: DraftTree, scored: Scored, walk: Walk, pairs: Pairs) -> None:
        if self not in call.notes:
            return
        recorder = call.notes[self][0]
        if call.statistics.rounds == 0:
            recorder.close_prompt(scored)
        else:
            recorder.add_round(tree, scored, walk, pairs)

    def on_generate_end(self, call: DraftingCall) -> None:
        if self not in call.notes:
            return
        recorder, began, updating, target = call.notes.pop(self)
        seconds, windows, signal = self.clock() - began, recorder.windows(), recorder.signal()
        statistics = call.statistics
        rounds = len(statistics.accepted)
        with self._lock:
            if self._removed:
                return
            ours = target == self._target
            for window in windows if ours else ():
                self.buffer.add(window)
            self._watch(sum(statistics.accepted) + rounds, rounds)
            # What an update in this thread took is paid by the query that follows it.
            updating = updating or self._busy() or self._unpaid > 0
            seconds, self._unpaid = seconds + self._unpaid, 0.0
            decision = self._decide(signal, statistics.emitted, seconds, updating, ours)
            self.decisions.append(decision)
            self.queries += 1
            if decision.action != "skip":
                self._start(decision.action, call.table)

    @property
    def learns(self) -> bool:
        """Whether it still takes anything in."""
        return self.policy != "never" and self.failure is None and self._is_here

    @property
    def _is_here(self) -> bool:
        """Not in a forked process, which has neither the thread that trains nor what that was doing."""
        return self._process == os.getpid()

    @property
    def updater(self) -> DrafterUpdater:
        """
        Raises:
            ValueError: The callback was not added to a drafter, or never learns.
        """
        if self._updater is None:
            raise ValueError(
                "this callback has no drafter to adapt; call drafter.add_callback(callback) first, with a policy that "
                "learns."
            )
        return self._updater

    def wait(self) -> None:
        """Let an update that is under way finish."""
        pending = self._pending
        if pending is not None and self._is_here:
            pending.result()

    def save_pretrained(self, folder: str | os.PathLike, **kwargs: Any) -> None:
        """
        Save the adapted drafter as `from_pretrained` loads it: configuration and weights, nothing that anybody wrote.

        Args:
            folder (`str` or `os.PathLike`): Where to.
            **kwargs: For the drafter's own `save_pretrained`.
        """
        self.wait()
        deployed = self.updater.deployed
        with deployed.lock:
            deployed.save_pretrained(folder, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """What a service needs to go on after a restart, for `torch.save`: weights and numbers, no text."""
        with self._lock:
            self.wait()
            # A copy: no update begins meanwhile, but the next one would change what is just being written.
            return deepcopy(
                {
                    "updater": self.updater.state_dict(),
                    "bandit": self.bandit.state_dict(),
                    "good": self._good,
                    "queries": self.queries,
                    "updates": self.updates,
                }
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on from where `state_dict` was called; the adapted weights come into service.

        Raises:
            ValueError: It is no such state, another drafter's, or holds values that are not finite; nothing has
                changed.
        """
        lacking = {"updater", "bandit", "good", "queries", "updates"} - state.keys()
        if lacking:
            raise ValueError(
                f"this is not the state of an adaptation: it lacks {', '.join(sorted(lacking))}; load what "
                "state_dict() gave."
            )
        refuse_unsound_state(state["good"])
        if [weight.shape for weight in state["good"]] != [weight.shape for weight in self.updater.snapshot()]:
            raise ValueError(
                "this state's good weights are another drafter's; load it for the drafter that it was saved from."
            )
        with self._lock:
            self.wait()
            self.updater.load_state_dict(state["updater"])
            self.bandit.load_state_dict(state["bandit"])
            self._good, self._candidate, self._candidate_updates = deepcopy(state["good"]), None, 0
            self.queries, self.updates = state["queries"], state["updates"]
            self.monitor.reset()

    def save_state(self, path: str | os.PathLike) -> None:
        """`state_dict` in a file, written whole or not at all."""
        state = self.state_dict()
        save_file_whole(path, lambda partial: torch.save(state, partial))

    def load_state(self, path: str | os.PathLike) -> None:
        """`load_state_dict` of a file that `save_state` wrote; raises as that does."""
        self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def _decide(self, signal: float, tokens: int, seconds: float, updating: bool, ours: bool) -> Decision:
        # Texts of another target are not to be learned with this call's table.
        ready = ours and len(self.buffer) > 0 and not self._busy()
        if self.policy == "always":
            action: Action = "full" if ready and (self.queries + 1) % self.every == 0 else "skip"
            return Decision(self.queries, action, "schedule", signal)
        ready = ready and self.buffer.fresh_tokens >= self.fresh_tokens
        return self.bandit.step(signal, tokens, seconds, ready, updating)

    def _busy(self) -> bool:
        return self._pending is not None and not self._pending.done()

    def _watch(self, emitted: int, rounds: int) -> None:
        """Keep the weights of the last interval that held; go back to them when too many fell."""
        verdict = self.monitor.see(emitted, rounds)
        if verdict == "open":
            return
        if verdict == "fallen" and self.updates:
            self.wait()
            kept = self.updater.share_kept(self._good, self.buffer.newest(self.monitor.interval))
            self.monitor.reset()
            if kept is None or kept < 1 - self.monitor.least_fall / 2:
                self.updater.restore(self._good)
                self.bandit.reset()
                self.buffer.clear()
                self._candidate = None
                self.events.append(AdaptationEvent("rolled back", self.queries))
                return
            # The good weights would have fallen as well: what got worse are the texts.
            self.events.append(AdaptationEvent("harder texts", self.queries))
        if verdict == "held" and self._candidate is not None:
            self._good = self._candidate
        # In service when the next interval begins; good if that interval holds.
        if self.updates != self._candidate_updates:
            # Counted before: an update that is published meanwhile is looked at once more.
            self._candidate_updates = self.updates
            self._candidate = self.updater.snapshot()

    def _start(self, scope: Scope, table: TokenTable) -> None:
        query, work = self.queries, (scope, self.updater.draw(self.buffer), self.buffer.newest(1), table)
        if self._executor is None:
            began = self.clock()
            self._update(query, work, None)
            self._unpaid = self.clock() - began
            return
        device, ready = self.updater.device, None
        if device.type == "cuda":
            # One for all updates: memory that was freed on a stream is there for that stream alone.
            self._stream = self._stream or torch.cuda.Stream(device)
            ready = torch.cuda.current_stream(device).record_event()
        self._pending = self._executor.submit(self._update, query, work, ready)

    def _update(self, query: int, work: tuple[Scope, Any, Any, TokenTable], ready: torch.cuda.Event | None) -> None:
        """One update from buffer to service, `work` being its arguments. A failure ends the adaptation alone."""
        updater, began = self.updater, time.perf_counter()
        stream: Any = nullcontext()
        try:
            if ready is not None:
                self._stream.wait_event(ready)
                stream = torch.cuda.stream(self._stream)
            with stream:
                numbers = updater.update(*work)
        except Exception as error:
            self.events.append(AdaptationEvent("failed", query, work[0]))
            self.fail(error)
            return
        self.updates += 1
        self.events.append(AdaptationEvent("updated", query, work[0], time.perf_counter() - began, **numbers))
