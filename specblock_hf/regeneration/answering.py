# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Answering many prompts at once. A batch has slots, a prompt takes the slot of one that is answered, and the cache is
written in place: no step copies it and none runs half empty while prompts wait.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..compat import CACHE
from ..devices import without_cudnn_attention
from .slot_cache import BatchCache, SlotCache


REFILL_SHARE = 0.125  # of the slots must be free before prompts are read into them: reading many at once is cheaper
DROP_SHARE = 0.25  # of the slots must be free, with no prompt left, before they are dropped: that copies the cache
PREFILL_TOKENS = 16384  # of one forward that reads prompts
BATCHES_IN_A_GROUP = 16  # a group ends with slots that nobody refills, so it should not end often


@dataclass(frozen=True)
class Prompt:
    """
    A prompt that waits for an answer.

    Args:
        given (`str` or `list[dict[str, str]]`): The text or the messages, as they will be written beside the answer.
        source (`str`): Where it comes from.
        key (`str`): Digest of the messages.
        input_ids (`tuple[int, ...]`): What the target reads.
        temperature (`float`): 0 for a greedy answer.
        sample (`int`, *optional*, defaults to 0): Which of its answers at that temperature is meant.
    """

    given: str | list[dict[str, str]]
    source: str
    key: str
    input_ids: tuple[int, ...]
    temperature: float
    sample: int = 0

    @property
    def name(self) -> tuple[str, float, int]:
        """What tells it from all others, in every process and every run."""
        return self.key, self.temperature, self.sample

    def seed(self, seed: int) -> int:
        """Of its own draws (63 bits), so that they do not depend on what else is in the batch."""
        digest = hashlib.sha256(f"{seed} {self.key} {self.temperature} {self.sample}".encode())
        return int(digest.hexdigest()[:15], 16)


def groups_of(
    prompts: Sequence[Prompt], batch_size: int, batch_tokens: int, max_new_tokens: int, seed: int = 0
) -> list[tuple[int, list[Prompt]]]:
    """
    Prompts of similar length, longest first, in groups of random order, so that a run that is stopped early leaves a
    fair sample and its speed so far tells the time left.

    Args:
        prompts (`Sequence[Prompt]`): All of them.
        batch_size (`int`): Most prompts that are answered at once.
        batch_tokens (`int`): Most tokens of their cache, padding and answers included; a prompt that alone needs more
            still gets its answer.
        max_new_tokens (`int`): Longest answer.
        seed (`int`, *optional*, defaults to 0): Of the order.

    Returns:
        `list[tuple[int, list[Prompt]]]`: Of every group the slots of its batch, and its prompts.
    """
    waiting = sorted(prompts, key=lambda p: (-len(p.input_ids), p.key, p.sample))
    groups = []
    while waiting:
        columns = len(waiting[0].input_ids) + max_new_tokens
        slots = max(1, min(batch_size, batch_tokens // columns))
        # Those that need less than half of the columns get a batch with more slots.
        group = waiting[: slots * BATCHES_IN_A_GROUP]
        count = sum(2 * (len(p.input_ids) + max_new_tokens) >= columns for p in group)
        groups.append((min(slots, count), waiting[:count]))
        waiting = waiting[count:]
    random.Random(seed).shuffle(groups)
    return groups


def without_refills(groups: Iterable[tuple[int, list[Prompt]]]) -> Iterator[tuple[int, list[Prompt]]]:
    """The same prompts in groups that fill their slots once, and that one forward reads: for recurrent layers."""
    for slots, prompts in groups:
        for first in range(0, len(prompts), slots):
            yield from ((len(part), part) for part in _parts(prompts[first : first + slots]))


class Answering:
    """
    Answers a group of prompts from the target's bare distribution: no processor of its generation configuration takes
    part.

    Args:
        target ([`~transformers.PreTrainedModel`]): A decoder-only model.
        slots (`int`): Prompts that are answered at once.
        longest (`int`): Tokens of the longest prompt.
        max_new_tokens (`int`): Longest answer.
        stop_ids (`set[int]`): Tokens that end an answer; they are part of it.
        seed (`int`, *optional*, defaults to 0): Of sampled answers, together with what identifies the prompt.
        written (`Callable`, *optional*): Told how many tokens each forward has added.
        refills (`bool`, *optional*, defaults to `True`):
            Slots may be taken again; of a target with recurrent layers they cannot, see [`without_refills`].

    Raises:
        ValueError: The target has layers of another kind.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        slots: int,
        longest: int,
        max_new_tokens: int,
        stop_ids: set[int],
        seed: int = 0,
        written: Callable[[int], None] = lambda tokens: None,
        refills: bool = True,
    ):
        device = target.device
        self.target = target
        self.max_new_tokens = max_new_tokens
        self.stop_ids = stop_ids
        self.seed = seed
        self.written = written
        self.cache = SlotCache(target, slots, longest + max_new_tokens) if refills else BatchCache(target)
        self.prompts: list[Prompt | None] = [None] * slots
        self.answers: list[list[int]] = [[] for _ in range(slots)]
        self.tokens = torch.zeros(slots, dtype=torch.long, device=device)
        self.positions = torch.zeros(slots, dtype=torch.long, device=device)
        self.temperatures = torch.zeros(slots, device=device)
        self.draws = torch.zeros(slots, max_new_tokens, device=device)

    def __call__(self, prompts: Iterable[Prompt]) -> Iterator[list[tuple[Prompt, list[int]]]]:
        """Answers as they are finished, each beside its prompt."""
        waiting = deque(prompts)
        while True:
            free = [slot for slot, prompt in enumerate(self.prompts) if prompt is None]
            slots = len(self.prompts)
            if waiting and len(free) >= min(slots, max(1, REFILL_SHARE * slots)):
                taken = [waiting.popleft() for _ in free[: len(waiting)]]
                for part in _parts(taken):
                    self._read(part, free[: len(part)])
                    free = free[len(part) :]
            elif len(free) == slots:
                return
            else:
                if not waiting and len(free) >= max(1, DROP_SHARE * slots):
                    self._drop(free)
                self._step()
            if finished := self._finished():
                yield finished

    @torch.inference_mode()
    @without_cudnn_attention
    def _read(self, prompts: list[Prompt], slots: list[int]) -> None:
        """Read prompts into free slots and choose their answers' first tokens."""
        device = self.target.device
        inputs, mask = (tensor.to(device) for tensor in _left_padded([p.input_ids for p in prompts]))
        cache = self.cache.to_read()
        logits = self.target(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: cache},
        ).logits
        at = torch.tensor(slots, device=device)
        self.cache.place(at, cache, mask.bool())
        self.positions[at] = mask.sum(1)
        self.temperatures[at] = torch.tensor([p.temperature for p in prompts], device=device)
        for slot, prompt in zip(slots, prompts, strict=True):
            self.prompts[slot], self.answers[slot] = prompt, []
            if prompt.temperature > 0:
                generator = torch.Generator().manual_seed(prompt.seed(self.seed))
                self.draws[slot] = torch.rand(self.max_new_tokens, generator=generator).to(device)
        self._choose(logits[:, -1], at)

    @torch.inference_mode()
    @without_cudnn_attention
    def _step(self) -> None:
        """One more token for every slot; what comes to a free one is never looked at."""
        busy = [slot for slot, prompt in enumerate(self.prompts) if prompt is not None]
        mask = self.cache.extend(busy)
        logits = self.target(
            input_ids=self.tokens[:, None],
            attention_mask=mask,
            position_ids=self.positions[:, None],
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: self.cache.cache},
        ).logits
        at = torch.tensor(busy, device=self.target.device)
        self.positions[at] += 1
        self._choose(logits[at, -1] if len(busy) < len(self.prompts) else logits[:, -1], at)

    def _choose(self, logits: torch.Tensor, at: torch.LongTensor) -> None:
        """Let slots `at` `[R]` go on with tokens that `logits` `[R, V]` allow."""
        slots = at.tolist()
        step = torch.tensor([len(self.answers[slot]) for slot in slots], device=at.device)
        chosen = choose(logits, self.temperatures[at], self.draws[at, step])
        self.tokens[at] = chosen
        for slot, token in zip(slots, chosen.tolist(), strict=True):
            self.answers[slot].append(token)
        self.written(len(slots))

    def _finished(self) -> list[tuple[Prompt, list[int]]]:
        """Take the answers that have ended out of their slots."""
        pairs = []
        for slot, (prompt, answer) in enumerate(zip(self.prompts, self.answers, strict=True)):
            if prompt is not None and (len(answer) == self.max_new_tokens or answer[-1] in self.stop_ids):
                pairs.append((prompt, answer))
                self.prompts[slot] = None
        return pairs

    @torch.inference_mode()
    def _drop(self, free: list[int]) -> None:
        keep = [slot for slot in range(len(self.prompts)) if slot not in free]
        at = torch.tensor(keep, device=self.target.device)
        self.cache.keep(at)
        self.prompts, self.answers = [self.prompts[s] for s in keep], [self.answers[s] for s in keep]
        self.tokens, self.positions = self.tokens[at], self.positions[at]
        self.temperatures, self.draws = self.temperatures[at], self.draws[at]


def choose(logits: torch.Tensor, temperatures: torch.Tensor, draws: torch.Tensor) -> torch.LongTensor:
    """
    One token a row: the likeliest, or the one in whose share of the cumulated distribution the row's draw falls.

    Args:
        logits (`torch.Tensor` of shape `[R, V]`): Of the next token.
        temperatures (`torch.Tensor` of shape `[R]`): 0 takes the likeliest token.
        draws (`torch.Tensor` of shape `[R]`): Uniform in [0, 1).
    """
    chosen = logits.float().argmax(-1)  # bfloat16's takes a CPU five times as long
    sampled = temperatures > 0
    if bool(sampled.any()):
        distribution = (logits[sampled].float() / temperatures[sampled, None]).softmax(-1)
        cumulated = distribution.cumsum(-1)
        total = cumulated[:, -1:]
        # Below the total even after rounding, or a token without any probability could follow.
        point = torch.minimum(draws[sampled, None] * total, total.nextafter(torch.zeros_like(total)))
        chosen[sampled] = torch.searchsorted(cumulated, point, right=True).squeeze(1)
    return chosen


def _parts(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    """Prompts that one forward reads: [`PREFILL_TOKENS`] with their padding, but at least one prompt."""
    part: list[Prompt] = []
    longest = 0
    for prompt in prompts:
        longest = max(longest, len(prompt.input_ids))
        if part and (len(part) + 1) * longest > PREFILL_TOKENS:
            yield part
            part, longest = [], len(prompt.input_ids)
        part.append(prompt)
    yield part


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Ids and mask `[B, longest]`; what stands in the padding is of no account."""
    longest = max(len(prompt) for prompt in prompts)
    ids, mask = torch.zeros(2, len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask
