# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Holds random conversations twice, plainly and with a drafter, and judges the second by the first."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from batches_for_tests import padded_batch
from cases_for_tests import NETWORKS, Abort, Case
from conftest import prompt_of
from drafter_kinds_for_tests import make_drafter
from interruptions_for_tests import ERRORS, Broken, Ended, Listener, Watch, interrupted
from multimodal_for_tests import prompts_with_images
from refusals_for_tests import is_warranted
from targets_for_tests import LIMIT, config_of, forget_the_past, make_target
from torch import nn
from transformers import DynamicCache, GenerationConfig, StaticCache, set_seed
from verdicts_for_tests import (
    FAULTS,
    SLOW,
    Fault,
    TooSlow,
    Verdict,
    all_close,
    cache_difference,
    is_refusal,
    place,
    sentence,
    short,
    time_limit,
)

from specblock_hf import DraftingPlan
from specblock_hf.compat import CACHE, crop
from specblock_hf.custom_generate import generate_without_hook
from specblock_hf.drafting.drafter import TreeDrafter
from specblock_hf.drafting.pilot import offer_of


def judge(case: Case) -> Verdict:
    """Hold a conversation and say what became of it."""
    start = time.process_time()
    conversation = None
    try:
        with time_limit():
            conversation = Conversation(case)
            verdict = conversation.play()
    except Fault as fault:
        verdict = Verdict(*fault.args)
    except TooSlow as error:
        verdict = Verdict("slow", f"more than {SLOW} s, in {place(error)}")
    verdict.seconds = time.process_time() - start
    verdict.kept = conversation.kept if conversation else 0
    if verdict.outcome in FAULTS:
        # What the call has left behind is none of the next one's business.
        make_target.cache_clear()
    return verdict


@dataclass
class Text:
    """What `generate()` returned: `sequences`, and all of it where it was asked for."""

    sequences: torch.LongTensor
    whole: Any = None


class Conversation:
    """A case under way."""

    def __init__(self, case: Case):
        self.case = case
        self.target = make_target(case.target)
        self.config = config_of(self.target)
        self.batch, self.visible = first_prompts(case, self.target)
        self.ours, self.theirs = self._new_cache(), self._new_cache()
        self.drafter: TreeDrafter | None = None
        self.kept = 0
        self.left_alone = False
        self.alike = True  # an exception may have left caches of different lengths

    def play(self) -> Verdict:
        """
        Raises:
            Fault: In a call.
        """
        verdict = Verdict("same")
        for turn in range(self.case.turns):
            abort = self.case.abort if self.case.abort and self.case.abort.turn == turn else None
            verdict = self._turn(abort, turn)
            if verdict.outcome != "same":
                break
        return verdict

    def _turn(self, abort: Abort | None, turn: int) -> Verdict:
        before = deepcopy(self.theirs) if abort else None
        plain, plain_error = self._attempt(lambda: self._plain(self.theirs))
        random_state, marks = torch.get_rng_state(), _marks(self.target)
        ended = Ended(ERRORS[abort.error], abort.at) if abort else None
        watch = Watch(abort.event, ended) if abort and abort.by == "callback" else Watch()
        listener = self._listener(abort, ended)
        text, error = self._attempt(lambda: self._drafted(abort, ended, watch, listener, plain))
        if _marks(self.target) != marks:
            raise Fault("touched target", f"a call left something behind; it ended with {short(error)}")
        if error is not None and not (abort and type(error) is ERRORS[abort.error]):
            return self._judge_error(error, plain_error, watch)
        if plain is None:
            return Verdict("plain raises", short(plain_error))
        if self.left_alone and (error is None or abort):
            if error is None and not torch.equal(text.sequences, plain.sequences):
                raise Fault("mismatch", "a call that was left alone wrote another text")
            return Verdict("left alone")
        if error is None:
            self._check_bounds(watch, len(plain.sequences))
            self._check_weights()
        if not self._is_reproducible(len(plain.sequences)):
            if error is None:
                self._check_distribution(text.sequences, plain.sequences)
            return Verdict("distribution")
        if error is None:
            self._compare(text, plain, listener, random_state)
            self.alike = True
            self._go_on(plain.sequences, turn)
        else:
            self._go_on(self._after_abort(plain.sequences, listener, before), turn)
            self.alike = self.ours is None or self.ours.get_seq_length() == self.theirs.get_seq_length()
            kind = self.case.target
            if not self.alike and (kind.depends_on_the_past or kind.depends_on_the_cache):
                return Verdict("other past")
        return Verdict("same")

    def _attempt(self, call: Callable[[], Text]) -> tuple[Text | None, BaseException | None]:
        forget_the_past(self.case.target, self.target)
        set_seed(self.case.seed)
        try:
            return call(), None
        except (Exception, *ERRORS.values()) as error:
            return None, error

    def _plain(self, cache: Any, **more: Any) -> Text:
        return self._text(self.target.generate(**self._inputs(cache), **self._options(), **more))

    def _drafted(
        self, abort: Abort | None, ended: Ended | None, watch: Watch, listener: Listener | None, plain: Text | None
    ) -> Text:
        case, by, more = self.case, abort.by if abort else "", {}
        if self.drafter is None or case.drafter.name in ("oracle", "garbage", "third party"):
            self.drafter = make_drafter(case, self.config, self._texts(plain))
        heard = self.drafter.parts[0] if case.drafter.joined and case.seed % 2 else self.drafter
        heard.add_callback(watch)
        if listener is not None:
            more["streamer"] = listener
        if by == "criterion":
            more["stopping_criteria"] = [lambda ids, scores: bool(ended())]
        elif by == "processor":
            more["logits_processor"] = [lambda ids, scores: ended() or scores]
        elif by == "allowed tokens":
            every = list(range(self.config.get_text_config().vocab_size))
            more["prefix_allowed_tokens_fn"] = lambda row, ids: ended() or every
        inputs, options = self._inputs(self.ours), self._options()
        if case.plan is not None and case.plan.place == "call":
            options = {"generation_config": GenerationConfig(**options)}
            options["generation_config"].drafting_plan = DraftingPlan(**case.plan.fields)
        try:
            with (
                interrupted(by, ended, self.drafter, self.target),
                torch.inference_mode(case.entry == "inference mode"),
            ):
                if case.entry == "custom_generate":
                    output = generate_without_hook(self.target, self.drafter, **inputs, **options, **more)
                elif case.entry == "attached":
                    with self.drafter.attach(self.target) as attachment:
                        try:
                            output = self.target.generate(**inputs, **options, **more)
                        finally:
                            self.left_alone = attachment.statistics.left_alone.total() > 0
                    if self.left_alone:
                        return self._text(output)
                else:
                    output = self.target.generate(**inputs, **options, **more, assistant_model=self.drafter)
        finally:
            heard.remove_callback(watch)
        self.kept += sum(self.drafter.last_statistics.accepted)
        return self._text(output)

    def _text(self, output: Any) -> Text:
        return Text(output.sequences, output) if self.case.returns else Text(output)

    def _texts(self, plain: Text | None) -> list[list[int]]:
        """What each row will write, padding removed; nothing where plain decoding fails."""
        if plain is None:
            return [[0]] * len(self.visible)
        rows = plain.sequences
        if self.case.source == "embeds":
            rows = torch.cat((torch.zeros_like(self.visible, dtype=torch.long), rows), dim=1)
        visible = self.visible.repeat_interleave(len(rows) // len(self.visible), dim=0)
        visible = nn.functional.pad(visible, (0, rows.shape[1] - visible.shape[1]), value=True)
        return [row[seen].tolist() for row, seen in zip(rows, visible, strict=True)]

    def _inputs(self, cache: Any) -> dict[str, Any]:
        given = {name: value.clone() for name, value in self.batch.items()}
        # The name before 5.24, too, which later releases go on knowing.
        name = CACHE if self.case.seed % 8 else "past_key_values"
        return given if cache is None else given | {name: cache}

    def _options(self) -> dict[str, Any]:
        case = self.case
        options = case.options | {"pad_token_id": 0} | dict.fromkeys(case.returns[1:], True)
        options |= {"bos_token_id": 1} if case.source == "nothing" else {}
        return options | ({"return_dict_in_generate": True} if case.returns else {})

    def _listener(self, abort: Abort | None, ended: Ended | None) -> Listener | None:
        """Of one prompt; in a batch one that is refused."""
        if abort is not None and abort.by == "streamer":
            return Listener(ended)
        wanted = abort is not None or self.case.seed % 4 == 0
        alone = len(self.visible) * self.case.options.get("num_return_sequences", 1) == 1
        return Listener() if wanted and alone and "num_beams" not in self.case.options else None

    def _new_cache(self) -> Any:
        case = self.case
        if case.cache == "dynamic":
            return DynamicCache(config=self.config)
        if case.cache == "bare":
            return DynamicCache()
        if case.cache == "static":
            new = case.options.get("max_new_tokens", 0)
            return StaticCache(self.config, max_cache_len=self.visible.shape[1] + case.turns * (new + case.more))
        return None

    def _is_reproducible(self, rows: int) -> bool:
        """Whether the tokens of a call follow from its seed."""
        options = self.case.options
        if not options["do_sample"] or options.get("top_k") == 1:
            return True
        return rows == 1 and self._draws_as_plain

    @property
    def _draws_as_plain(self) -> bool:
        """Whether each token takes one draw."""
        return self.case.plan is None or DraftingPlan(**self.case.plan.fields).rule == "walk"

    def _judge_error(self, error: BaseException, plain_error: BaseException | None, watch: Watch) -> Verdict:
        if is_refusal(error):
            if watch.commits:
                raise Fault("late refusal", f"after {watch.commits} commits: {error}")
            if not is_warranted(str(error), self.case):
                raise Fault("needless refusal", sentence(error))
            return Verdict("refused", sentence(error))
        if plain_error is not None and short(error) == short(plain_error):
            return Verdict("plain raises", short(error))
        besides = f"; plain decoding raises {short(plain_error)}" if plain_error is not None else ""
        raise Fault("raw error", f"{short(error)} in {place(error)}{besides}")

    def _check_bounds(self, watch: Watch, rows: int) -> None:
        """Trees and forwards no larger than the plan, and a callback that heard of them."""
        if not watch.commits:
            raise Fault("unheard", "a callback of the drafter heard nothing")
        plan, statistics = self.case.plan, self.drafter.last_statistics
        made = DraftingPlan(**plan.fields) if plan else self.drafter.default_plan(torch.device("cpu"))
        if plan is None and self.drafter.drafting_plan == "auto":
            offer = offer_of(self.drafter, torch.device("cpu"))
            made = DraftingPlan(offer.most, max((way.forwards for way in offer.ways), default=1))
        if watch.widest > made.tree_budget:
            raise Fault("over bound", f"a tree of {watch.widest} nodes by {made}")
        starts = min(made.tree_budget, made.max_starts or made.tree_budget)
        prompt = rows * self.visible.shape[1]
        later = statistics.rounds * rows * (made.num_forwards - 1) * starts
        slots = statistics.rounds * rows * getattr(self.drafter.config, "block_size", 1)
        bound = prompt + rows * statistics.emitted + later + slots
        if statistics.drafter_rows > bound:
            raise Fault("over bound", f"{statistics.drafter_rows} drafter rows, at most {bound} by {made}")

    def _check_distribution(self, ours: torch.LongTensor, theirs: torch.LongTensor) -> None:
        """What holds of tokens that follow the target's distribution whatever they are."""
        prompt = 0 if self.case.source == "embeds" else self._width
        longest = prompt + self.case.options.get("max_new_tokens", LIMIT)
        vocab_size = self.config.get_text_config().vocab_size
        right = torch.equal(ours[:, :prompt], theirs[:, :prompt]) and prompt < ours.shape[1] <= longest
        if not right or not bool(((ours >= 0) & (ours < vocab_size)).all()):
            raise Fault("mismatch", f"{ours.tolist()} cannot be drawn after {theirs[:, :prompt].tolist()}")

    def _check_weights(self) -> None:
        """Whatever it learns from, a sound drafter stays one."""
        if self.case.drafter.name in NETWORKS and self.case.drafter.detail in ("", "train", "bfloat16"):
            weights = self.drafter.network.parameters()
            if not all(bool(weight.isfinite().all()) for weight in weights):
                raise Fault("spoilt drafter", "weights that are no numbers came into service")

    def _compare(self, text: Text, plain: Text, listener: Listener | None, random_state: torch.Tensor) -> None:
        ours, theirs = text.sequences, plain.sequences
        if not torch.equal(ours, theirs):
            raise Fault("mismatch", f"{ours.tolist()} instead of {theirs.tolist()}")
        prompt = 0 if self.case.source == "embeds" else self._width
        if listener is not None and listener.tokens != theirs[0, prompt:].tolist():
            raise Fault("mismatch", f"streamed {listener.tokens} instead of {theirs[0, prompt:].tolist()}")
        visible = self._seen(theirs)
        for name, mine, plainly in (
            ("the user's cache", self.ours, self.theirs),
            ("the returned cache", _cache_of(text.whole), _cache_of(plain.whole)),
        ):
            if plainly is not None and (difference := cache_difference(mine, plainly, visible)):
                raise Fault("mismatch", f"{name}: {difference}")
        if len(ours) == 1:
            for name in self.case.returns[1:]:
                name = name.removeprefix("output_")
                first = (
                    0 if self.alike else 1
                )  # of the tokens that were not cached yet, which the other call had more of
                if not all_close(text.whole[name][first:], plain.whole[name][first:]):
                    raise Fault("mismatch", f"other {name}")
        follows = (len(ours) == 1 and self._draws_as_plain) or not self.case.options["do_sample"]
        if follows and not torch.equal(torch.get_rng_state(), random_state):
            raise Fault("mismatch", "other draws from the global random generator")

    @property
    def _width(self) -> int:
        """Columns of the prompts."""
        return self.visible.shape[1]

    def _seen(self, sequences: torch.LongTensor) -> torch.BoolTensor:
        """Which columns `[rows, columns]` of prompts and texts are not padding."""
        written = sequences if self.case.source == "embeds" else sequences[:, self._width :]
        stops = self.case.options["eos_token_id"] or []
        ends = torch.isin(written, torch.tensor(stops, dtype=torch.long))
        prompts = self.visible.repeat_interleave(len(written) // len(self.visible), dim=0)
        return torch.cat((prompts, ends.long().cumsum(1) - ends.long() == 0), dim=1)

    def _after_abort(self, sequences: torch.LongTensor, listener: Listener | None, before: Any) -> torch.LongTensor:
        """What the user knows of the texts after an exception, with `theirs` as plain decoding would leave it."""
        held, alone = 0 if self.ours is None else int(self.ours.get_seq_length()), len(sequences) == 1
        if alone:
            heard, written = listener.tokens or [], sequences[0, self._width :].tolist()
            if heard != written[: len(heard)]:
                raise Fault("mismatch", f"{heard} before an exception instead of {written}")
            known, least = len(heard), self._width - 1 if heard and self.ours is not None else 0
        else:
            known, least = max(held - self._width, 0), 0
        if not least <= held <= min(self._width + known, sequences.shape[1]):
            raise Fault("mismatch", f"{held} columns are cached after {self._width} + {known} tokens and an exception")
        if self.ours is not None:
            self.theirs = before if alone else self._new_cache()
            ended = Ended(Broken, max(known - 1, 0))
            if alone and known:
                self._attempt(lambda: self._plain(before, streamer=Listener(ended)))
            elif alone and held > int(before.get_seq_length()):
                # The prompt was read and nothing else.
                self._attempt(lambda: self._plain(before, logits_processor=[ended]))
            elif self.case.source == "image":
                # It has been read with one cache and not with the other.
                self.ours, self.theirs = self._new_cache(), self._new_cache()
        return sequences[:, : self._width + known]

    def _go_on(self, sequences: torch.LongTensor, turn: int) -> None:
        """The user reads the texts and writes more."""
        case, rows = self.case, len(sequences)
        if turn + 1 == case.turns:
            return
        if case.between == "copy":
            self.ours, self.theirs = deepcopy(self.ours), deepcopy(self.theirs)
        elif case.between == "crop" and min(int(cache.get_seq_length()) for cache in (self.ours, self.theirs)) > 2:
            # They may not be equally long after an exception.
            for cache in (self.ours, self.theirs):
                crop(cache, 2)
        words = torch.cat([prompt_of(case.more, seed=case.seed + 10 * turn + row) for row in range(rows)])
        ids = torch.cat((sequences, words % self.config.get_text_config().vocab_size), dim=1)
        visible = nn.functional.pad(self._seen(sequences), (0, case.more), value=True)
        added = ids.shape[1] - self._width
        cached = 0 if self.ours is None else int(self.ours.get_seq_length())
        batch = {"input_ids": ids.to(self.batch["input_ids"].dtype)}
        for name, value in self.batch.items():
            if name.endswith("token_type_ids"):
                batch[name] = nn.functional.pad(value, (0, added))
            elif name in ("pixel_values", "image_grid_thw") and not cached:
                batch[name] = value
        self.batch, self.visible = batch | _mask(case, visible), visible


def first_prompts(case: Case, target: Any) -> tuple[dict[str, torch.Tensor], torch.BoolTensor]:
    """The first call's inputs, and which of their columns `[rows, columns]` are not padding."""
    rows = len(case.lengths)
    if case.source == "nothing":
        return {}, torch.ones(1, 1, dtype=torch.bool)
    if case.source == "empty":
        return {"input_ids": torch.zeros(rows, 0, dtype=torch.long)}, torch.ones(rows, 0, dtype=torch.bool)
    if case.source == "image":
        batch = prompts_with_images(case.target.family, case.lengths, case.seed)
    else:
        batch = padded_batch(case.lengths, case.seed)
        batch["input_ids"] %= config_of(target).get_text_config().vocab_size
    visible = batch["attention_mask"].bool()
    if case.mask == "holes" and visible.shape[1] > 2:
        visible[:, visible.shape[1] // 2] = False
        visible[:, -1] = True
    if case.mask == "right":
        batch["input_ids"], visible = batch["input_ids"].flip(1), visible.flip(1)
    batch["input_ids"] = batch["input_ids"].to(getattr(torch, case.ids))
    del batch["attention_mask"]
    if case.source == "embeds":
        with torch.no_grad():
            batch["inputs_embeds"] = target.get_input_embeddings()(batch.pop("input_ids"))
    if case.positions:
        batch["position_ids"] = torch.arange(visible.shape[1]).unsqueeze(0) + case.positions
    return batch | _mask(case, visible), visible


def _mask(case: Case, visible: torch.BoolTensor) -> dict[str, torch.Tensor]:
    if case.mask == "absent" and bool(visible.all()):
        return {}
    dtype = getattr(torch, case.mask) if case.mask in ("bool", "int32", "float32") else torch.long
    return {"attention_mask": visible.to(dtype)}


def _marks(target: nn.Module) -> tuple:
    """What a call must not change. Hooks of transformers are put up by whoever first asks for hidden states."""
    hooks = [
        (name, hook)
        for name, module in target.named_modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not hook.__module__.startswith("transformers.")
    ]
    return hooks, [module.training for module in target.modules()], sorted(vars(target))


def _cache_of(output: Any) -> Any:
    if output is None:
        return None
    return output[CACHE]
