# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Choosing tokens as plain `generate()` does: processors, argmax or draw, stopping criteria, streamer, scores."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerateDecoderOnlyOutput, logits_process
from transformers.generation.streamers import BaseStreamer

from ..compat import CACHE
from ..devices import on_device
from ..trees.tree import DraftTree


# Processors of transformers that look at one distribution at a time and at nothing else, so that they fit any
# vocabulary. A drafter that draws its tokens draws them from distributions that these have changed as they change the
# target's.
_WARPERS = (
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TemperatureLogitsWarper,
    logits_process.TopHLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.TypicalLogitsWarper,
)
# Those that treat every row by itself, with what they hold row by row: the batch is called one
# row at a time, because rows are at different lengths.
_ROW_WISE: dict[type[LogitsProcessor], str | None] = {
    logits_process.EncoderNoRepeatNGramLogitsProcessor: "generated_ngrams",
    logits_process.EncoderRepetitionPenaltyLogitsProcessor: "encoder_input_ids",
    logits_process.RepetitionPenaltyLogitsProcessor: "prompt_ignore_length",
    **dict.fromkeys(
        (
            *_WARPERS,
            logits_process.ExponentialDecayLengthPenalty,
            logits_process.ForcedBOSTokenLogitsProcessor,
            logits_process.ForcedEOSTokenLogitsProcessor,
            logits_process.InfNanRemoveLogitsProcessor,
            logits_process.LogitNormalization,
            logits_process.MinLengthLogitsProcessor,
            logits_process.MinNewTokensLengthLogitsProcessor,
            logits_process.NoBadWordsLogitsProcessor,
            logits_process.NoRepeatNGramLogitsProcessor,
            logits_process.PrefixConstrainedLogitsProcessor,
            logits_process.SequenceBiasLogitsProcessor,
            logits_process.SuppressTokensAtBeginLogitsProcessor,
            logits_process.SuppressTokensLogitsProcessor,
            logits_process.SynthIDTextWatermarkLogitsProcessor,
            logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
            logits_process.WatermarkLogitsProcessor,
        )
    ),
}
_ROW_WISE_CRITERIA = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)


# Of these, what remembers how it was called: guidance has a cache of its own, which grows by a token with every call.
_REMEMBERS = (
    logits_process.SynthIDTextWatermarkLogitsProcessor,
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
)


class TokenChoice:
    """
    What plain `generate()` does once per token, for every row of a batch. Called along the accepted paths in order, it
    leaves the very trace that plain decoding leaves, in user code and in the global random generator. Only in a batch
    that samples do the rows draw in another order: each token still follows the target's own distribution, but a seed
    gives other tokens than it gives plain sampling.

    Args:
        input_ids (`torch.LongTensor` of shape `[B, P]`): The prompts, padded on the left.
        logits_processor ([`~transformers.LogitsProcessorList`]): As prepared by `generate()`.
        stopping_criteria ([`~transformers.StoppingCriteriaList`]): As prepared by `generate()`.
        generation_config ([`~transformers.GenerationConfig`]): Of this call.
        streamer ([`~transformers.generation.streamers.BaseStreamer`], *optional*):
            Gets every token as it is emitted, of a batch of one.

    Raises:
        ValueError: More than one row, and a streamer, processor or criterion that cannot tell rows apart.
    """

    def __init__(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
    ):
        batch_size = input_ids.shape[0]
        if batch_size > 1:
            _check_batch(logits_processor, stopping_criteria, streamer)
        self._processors, self._device = logits_processor, input_ids.device
        self._rows = [
            _RowChoice(
                input_ids[row : row + 1],
                logits_processor if batch_size == 1 else _processors_of_row(logits_processor, row, batch_size),
                stopping_criteria,
                generation_config,
                streamer,
            )
            for row in range(batch_size)
        ]
        self._streamer = streamer
        self._returns_dict = generation_config.return_dict_in_generate
        self._pad = generation_config._pad_token_tensor
        # Whether every token is the likeliest by the target's bare logits, and nothing of these is recorded.
        self.is_greedy = not (generation_config.do_sample or len(logits_processor) or self._rows[0].records)
        self._logits: dict[int, torch.Tensor] = {}
        self._argmax: dict[int, list[int]] = {}

    @property
    def remaining(self) -> list[int]:
        """Tokens that `max_new_tokens` still allows each row; 0 for one that has stopped."""
        return [row.remaining for row in self._rows]

    def observe(self, tree: DraftTree, logits: torch.Tensor, rows: Sequence[int]) -> DraftTree:
        """
        Choose from these logits from now on. This is where a round waits for the device, and where a greedy one reads
        from it: what was drafted and what the target says to it come in one piece.

        Args:
            tree ([`DraftTree`]): What the target has scored, N nodes wide.
            logits (`torch.Tensor` of shape `[R, N, V]`): The target's, at every node.
            rows (sequence of `int`): Which rows of the batch they belong to.

        Returns:
            [`DraftTree`]: The tree with its tokens and parents on the host.
        """
        self._logits = dict(zip(rows, logits, strict=True))
        for row in self._rows:
            row.forget()
        read = [tree.tokens, tree.parents]
        if self.is_greedy:
            # As plain decoding, which makes float32 of them; on a CPU argmax takes five times as long in bfloat16.
            read.append(logits.float().argmax(-1).to(tree.tokens.device))
        tokens, parents, *best = torch.cat(read).cpu().split([len(part) for part in read])
        if best:
            self._argmax = dict(zip(rows, best[0].tolist(), strict=True))
        return replace(tree, tokens=tokens, parents=parents)

    def select(self, row: int, node: int) -> int:
        """The target's token after `node`, whose path must have been emitted; see [`Verifier`]."""
        if self.is_greedy:
            return self._argmax[row][node]
        return self._rows[row].select(self._logits[row][node : node + 1])

    def distributions(self) -> TokenChoice:
        """
        This choice as [`TargetDistributions`].

        Raises:
            ValueError: A processor may remember how it was called, and would be called for drafts that are rejected.
        """
        for processor in self._processors:
            if type(processor) not in _ROW_WISE or isinstance(processor, _REMEMBERS):
                raise ValueError(
                    f"{type(processor).__name__} may remember how it was called, and comparing distributions calls it "
                    'for drafts that are then rejected; draft with verification="walk", or without that processor.'
                )
        return self

    def distribution(self, row: int, node: int, path: list[int]) -> torch.Tensor:
        """
        The target's distribution after `node`, of which `path` need not have been emitted; see
        [`TargetDistributions`].
        """
        return self._rows[row].distribution(node, self._logits[row][node : node + 1], path)

    def keep(self, row: int, node: int) -> None:
        """The token after `node` is emitted next; see [`TargetDistributions`]."""
        self._rows[row].keep(node)

    def warp(self, logits: torch.Tensor) -> torch.Tensor:
        """A drafter's logits `[..., D]`, over any vocabulary, as the request warps the target's; in float32."""
        # Processors may hold tensors, which lie where the prompt does.
        scores = logits.flatten(0, -2).to(self._device, copy=True, dtype=torch.float32)
        for processor in self._processors:
            if isinstance(processor, _WARPERS):
                # They take the text only because every processor does.
                scores = processor(None, scores)
        return scores.view(logits.shape).to(logits.device)

    def stop(self, row: int, token: int) -> bool:
        """Emit a token and tell whether it is the last one of its row; see [`Verifier`]."""
        return self._rows[row].stop(token)

    def output(self, cache: object, more: dict[str, Any]) -> GenerateDecoderOnlyOutput | torch.LongTensor:
        """
        What `generate()` returns. After its end a row holds padding, and zeros as scores and logits.

        Args:
            cache (`object`): The target's.
            more (`dict`): What else the target has to hand back, if it hands back more than tokens.
        """
        if self._streamer is not None:
            self._streamer.end()
        rows, pad = [row.sequence()[0] for row in self._rows], 0 if self._pad is None else int(self._pad)
        sequences = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        if not self._returns_dict:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=_steps([row.scores for row in self._rows]),
            logits=_steps([row.raw_logits for row in self._rows]),
            **{CACHE: cache},
            **more,
        )


class _RowChoice:
    """
    The choice of one row's tokens; the arguments are those of [`TokenChoice`] for a batch of one.

    Attributes:
        scores (`tuple` of `torch.Tensor` of shape `[1, V]`, *optional*): Of every emitted token, if asked for.
        raw_logits (`tuple` of `torch.Tensor` of shape `[1, V]`, *optional*): The same before any processor.
    """

    def __init__(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None,
    ):
        self._input_ids = input_ids
        self._pending: list[int] = []
        self._processors = logits_processor
        self._streamer = streamer
        self._do_sample = generation_config.do_sample
        returns_dict = generation_config.return_dict_in_generate
        self.scores: tuple | None = () if returns_dict and generation_config.output_scores else None
        self.raw_logits: tuple | None = () if returns_dict and generation_config.output_logits else None
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._stopped = False
        self._max_length = stopping_criteria.max_length
        # Length and EOS are decided on the host, without a tensor; whatever else there is, is called as plain decoding
        # calls it.
        self._criteria = StoppingCriteriaList(rule for rule in stopping_criteria if not _decided_on_host(rule))
        self._max_lengths = [rule.max_length for rule in stopping_criteria if type(rule) is MaxLengthCriteria]
        self._eos = {
            token
            for rule in stopping_criteria
            if type(rule) is EosTokenCriteria
            for token in rule.eos_token_id.flatten().tolist()
        }

    @property
    def records(self) -> bool:
        return self.scores is not None or self.raw_logits is not None

    @property
    def length(self) -> int:
        """Tokens so far, prompt included."""
        return self._input_ids.shape[1] + len(self._pending)

    @property
    def remaining(self) -> int:
        return 0 if self._stopped else max(self._max_length - self.length, 0)

    def select(self, logits: torch.Tensor) -> int:
        """The target's token where its logits are these `[1, V]`."""
        scores, logits = self._process(self.sequence(), logits)
        self._record(scores, logits)
        if not self._do_sample:
            return int(scores.argmax(-1))
        return int(torch.multinomial(nn.functional.softmax(scores, dim=-1), num_samples=1))

    def distribution(self, node: int, logits: torch.Tensor, path: list[int]) -> torch.Tensor:
        """The target's distribution `[V]` at a node with these logits `[1, V]`, below drafted tokens `path`."""
        sequence = self.sequence()
        scores, logits = self._process(torch.cat((sequence, sequence.new_tensor([path])), dim=1), logits)
        if self.records:
            self._seen[node] = (scores, logits)
        return scores[0].softmax(-1, dtype=torch.float64)

    def keep(self, node: int) -> None:
        if self.records:
            self._record(*self._seen[node])

    def forget(self) -> None:
        """The nodes of a new tree are others."""
        self._seen = {}

    def _process(self, input_ids: torch.LongTensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[1, V]` after and before every processor."""
        logits = logits.to(copy=True, dtype=torch.float32, device=input_ids.device)
        return self._processors(input_ids, logits), logits

    def _record(self, scores: torch.Tensor, logits: torch.Tensor) -> None:
        if self.scores is not None:
            self.scores += (scores,)
        if self.raw_logits is not None:
            self.raw_logits += (logits,)

    def stop(self, token: int) -> bool:
        self._pending.append(token)
        self._stopped = token in self._eos or any(self.length >= most for most in self._max_lengths)
        if self._criteria:
            self._stopped |= bool(self._criteria(self.sequence(), self.scores))
        if self._streamer is not None:
            self._streamer.put(torch.tensor([token], device="cpu"))
        return self._stopped

    def sequence(self) -> torch.LongTensor:
        """Prompt and emitted tokens, `[1, L]`."""
        if self._pending:
            emitted = on_device([self._pending], self._input_ids.device)
            self._input_ids = torch.cat((self._input_ids, emitted), dim=1)
            self._pending = []
        return self._input_ids


def _decided_on_host(rule: StoppingCriteria) -> bool:
    """EOS, and a length limit that has no reminder to give about the target's maximum length."""
    if type(rule) is MaxLengthCriteria:
        return rule.max_position_embeddings is None or rule.max_length <= rule.max_position_embeddings + 1
    return type(rule) is EosTokenCriteria


def _steps(rows: list[tuple | None]) -> tuple | None:
    """Every row's tensors `[1, V]`, one for each of its tokens, as one `[B, V]` for each step."""
    if rows[0] is None:
        return None
    zeros = torch.zeros_like(rows[0][0])
    return tuple(
        torch.cat([row[step] if step < len(row) else zeros for row in rows]) for step in range(max(map(len, rows)))
    )


def _check_batch(
    logits_processor: LogitsProcessorList, stopping_criteria: StoppingCriteriaList, streamer: BaseStreamer | None
) -> None:
    """Refuse what plain decoding calls once for a whole batch, whose rows are at different lengths here."""
    if streamer is not None:
        raise ValueError("a streamer takes the tokens of one prompt at a time; call generate() for each prompt.")
    strange = [rule for rule in logits_processor if type(rule) not in _ROW_WISE]
    strange += [rule for rule in stopping_criteria if type(rule) not in _ROW_WISE_CRITERIA]
    if strange:
        raise ValueError(
            f"{type(strange[0]).__name__} may look at a whole batch at once, whose rows are at different lengths with "
            "a drafter; call generate() for each prompt, or drop assistant_model."
        )
    kinds = {type(rule) for rule in stopping_criteria}
    if not kinds <= {EosTokenCriteria, MaxLengthCriteria} and EosTokenCriteria not in kinds:
        raise ValueError(
            "without eos_token_id plain decoding lets rows that have stopped run on until the whole batch has; set "
            "eos_token_id, or leave out stop_strings and max_time."
        )


def _processors_of_row(processors: LogitsProcessorList, row: int, batch_size: int) -> LogitsProcessorList:
    """The processors as they are for one row of the batch."""
    return LogitsProcessorList(_processor_of_row(processor, row, batch_size) for processor in processors)


def _processor_of_row(processor: Any, row: int, batch_size: int) -> LogitsProcessor:
    # A copy: those that remember do so in attributes of their own, which they replace and do not change.
    own, held = copy(processor), _ROW_WISE[type(processor)]
    if type(own) is logits_process.PrefixConstrainedLogitsProcessor:
        # Asked by what counts as one prompt to it: since 5.24 all sequences of a prompt, before each of them.
        allowed, prompt = own._prefix_allowed_tokens_fn, row // own._num_beams
        own._prefix_allowed_tokens_fn, own._num_beams = lambda _, ids: allowed(prompt, ids), 1
    elif type(own) is logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor:
        # It decodes a text of its own next to each row's, with a cache of its own.
        context = dict(own.unconditional_context)
        for name in ("input_ids", "attention_mask"):
            if context[name] is not None:
                context[name] = context[name][_prompt_of_row(row, batch_size, len(context[name]))]
        own.unconditional_context = context
    elif held is not None and isinstance(values := vars(own)[held], torch.Tensor | list):
        setattr(own, held, values[_prompt_of_row(row, batch_size, len(values))])
        if type(own) is logits_process.EncoderNoRepeatNGramLogitsProcessor:
            own.batch_size = 1
    return own


def _prompt_of_row(row: int, batch_size: int, prompts: int) -> slice:
    """Where what is held for each prompt has a row's entry; several sequences may continue one prompt."""
    prompt = row * prompts // batch_size
    return slice(prompt, prompt + 1)
