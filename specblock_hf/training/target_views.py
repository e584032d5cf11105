# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The target's states and likeliest tokens, computed on each batch or kept on disk for a target small enough."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..checkpoints.saving import save_file_whole, save_text_whole
from ..data.examples import Example
from ..devices import without_cudnn_attention
from ..drafting.target_batch import rows_at_once
from ..target.features import FeatureTaps
from ..target.head import logits_of_states


@dataclass
class TargetView:
    """
    What the target says about one conversation of T tokens, A of them the answer's.

    Args:
        features (`torch.Tensor` of shape `[T, F, d]`): The states that the drafter reads, one per feature layer.
        top_ids (`torch.Tensor` of shape `[A, k]`): The target's likeliest tokens where the answer's tokens were
            predicted.
        top_probs (`torch.Tensor` of shape `[A, k]`): Their probabilities at temperature 1, over the whole vocabulary.
    """

    features: torch.Tensor
    top_ids: torch.Tensor
    top_probs: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that it takes on the disk."""
        return self.features.nbytes + self.top_ids.nbytes + self.top_probs.nbytes


@torch.no_grad()
@without_cudnn_attention
def view_target(
    target: PreTrainedModel, examples: Sequence[Example], feature_layers: Sequence[int], top_k: int
) -> list[TargetView]:
    """
    Run the target once over some conversations of similar length.

    Right padding needs no mask: a causal target's states never depend on what follows. Only the answer's positions go
    through the head, which for a small target costs as much as the layers.
    """
    tokens = [torch.tensor(e.input_ids) for e in examples]
    ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    decoder = target.get_decoder()
    taps = FeatureTaps(decoder, feature_layers)  # what the drafter will be told while it drafts
    try:
        with taps.armed():
            out = decoder(ids.to(target.device), use_cache=False)
        hidden = taps.take()
    finally:
        taps.remove()
    places = torch.arange(ids.shape[1])
    starts = torch.tensor([e.answer_start for e in examples])
    lengths = torch.tensor([len(e.input_ids) for e in examples])
    predicting = ((places >= starts[:, None] - 1) & (places < lengths[:, None] - 1)).flatten().nonzero().squeeze(1)
    last = out.last_hidden_state.flatten(0, 1)
    top_ids, top_probs = _likeliest(target, last[predicting.to(last.device)], top_k)
    # A target that is spread over devices has its states where its layers are.
    states = torch.stack([state.to(top_ids.device) for state in hidden], dim=2)
    answers = [len(e.input_ids) - e.answer_start for e in examples]
    parts = zip(states, tokens, top_ids.split(answers), top_probs.split(answers), strict=True)
    return [TargetView(features[: len(text)], *likeliest) for features, text, *likeliest in parts]


def _likeliest(target: PreTrainedModel, states: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and probabilities `[n, k]` of the likeliest tokens after states `[n, d]`."""
    ids, probs, logits_of = [], [], logits_of_states(target)
    for part in states.split(rows_at_once(target.get_output_embeddings().weight.shape[0], states.device)):
        logits = logits_of(part).float()
        best = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
        ids.append(best.indices.to(torch.int32))
        probs.append((best.values - logits.logsumexp(-1, keepdim=True)).exp())
    return torch.cat(ids), torch.cat(probs)


class FeatureStore:
    """
    Target views on disk, in shards written whole or not at all, so that an interrupted run goes on where it stopped.
    A view is found by its text, so that a folder serves every run over some of its texts, and a run that brings more
    adds theirs.

    Args:
        folder (`str` or `Path`): Where the shards lie.
        examples (`Sequence[Example]`): The conversations.
        shard_size (`int`, *optional*, defaults to 128): Most conversations of a shard.
    """

    def __init__(self, folder: str | Path, examples: Sequence[Example], shard_size: int = 128):
        self.folder = Path(folder)
        self.examples = examples
        self.shard_size = shard_size
        self.keys = [_key(example) for example in examples]
        self._places: dict[str, tuple[Path, int]] = {}

    def build(
        self,
        target: PreTrainedModel,
        feature_layers: Sequence[int],
        top_k: int = 64,
        batch_tokens: int = 4096,
        part: tuple[int, int] = (0, 1),
        progress: bool = True,
    ) -> None:
        """
        Compute all missing views, with a progress bar; they are stored in the target's dtype.

        Args:
            target ([`~transformers.PreTrainedModel`]): The target.
            feature_layers (`Sequence[int]`): Which of its hidden states are kept.
            top_k (`int`, *optional*, defaults to 64): How many of its likeliest tokens are kept.
            batch_tokens (`int`, *optional*, defaults to 4096): Tokens of one forward, padding included.
            part (`tuple[int, int]`, *optional*, defaults to `(0, 1)`):
                Number of this process and of all processes, which share the work among them.
            progress (`bool`, *optional*, defaults to `True`): Show a bar on the standard error stream.

        Raises:
            ValueError: The folder holds views of another kind.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        meta = {
            "feature_layers": list(feature_layers),
            "top_k": top_k,
            "target": target.config.name_or_path,
            "dtype": str(target.dtype),
            "found_by": "text",
        }
        meta_path = self.folder / "meta.json"
        if meta_path.exists() and (found := json.loads(meta_path.read_text())) != meta:
            raise ValueError(f"{self.folder} holds views of {found}, not of {meta}; remove it or name another folder.")
        number, count = part
        if number == 0:
            save_text_whole(meta_path, json.dumps(meta))
        self._look()
        # Shards of few lengths, so that batches need little padding. They are the same in every process, whatever the
        # others have written by now.
        first_of = {key: index for index, key in reversed(list(enumerate(self.keys)))}
        order = sorted(first_of.values(), key=lambda index: len(self.examples[index].input_ids))
        tokens = sum(len(self.examples[index].input_ids) for index in order)
        with tqdm(total=tokens, unit="tok", desc="target views", disable=number > 0 or not progress) as bar:
            for first in range(number * self.shard_size, len(order), count * self.shard_size):
                members = order[first : first + self.shard_size]
                missing = [index for index in members if self.keys[index] not in self._places]
                if missing:
                    self._write(missing, target, feature_layers, top_k, batch_tokens)
                bar.update(sum(len(self.examples[index].input_ids) for index in members))

    def _look(self) -> None:
        """What the folder holds by now."""
        for path in self.folder.glob("views-*.safetensors"):
            with safe_open(path, framework="pt") as file:
                keys = file.metadata()["keys"].split()
            self._places |= {key: (path, slot) for slot, key in enumerate(keys)}

    def _write(self, members, target, feature_layers, top_k, batch_tokens):
        views = []
        per_batch = max(1, batch_tokens // len(self.examples[members[-1]].input_ids))
        for first in range(0, len(members), per_batch):
            chunk = [self.examples[index] for index in members[first : first + per_batch]]
            views += view_target(target, chunk, feature_layers, top_k)
        tensors = {}
        for slot, view in enumerate(views):
            tensors[f"{slot}.features"] = view.features.contiguous()
            tensors[f"{slot}.top_ids"] = view.top_ids
            tensors[f"{slot}.top_probs"] = view.top_probs
        keys = " ".join(self.keys[index] for index in members)
        name = f"views-{hashlib.sha256(keys.encode()).hexdigest()[:16]}.safetensors"
        save_file_whole(self.folder / name, lambda path: save_file(tensors, path, metadata={"keys": keys}))

    def __getitem__(self, index: int) -> TargetView:
        key = self.keys[index]
        if key not in self._places:  # written since, maybe by another process
            self._look()
        path, slot = self._places[key]
        with safe_open(path, framework="pt") as file:
            return TargetView(*(file.get_tensor(f"{slot}.{name}") for name in ("features", "top_ids", "top_probs")))


def _key(example: Example) -> str:
    """Views are of this very text, answered from this very place."""
    return hashlib.sha256(json.dumps([example.answer_start, example.input_ids]).encode()).hexdigest()
