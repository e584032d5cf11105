# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What `specblock bench` puts side by side, by name: plain decoding, transformers' own helpers and tree drafters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..drafters.auto import AutoDrafter
from ..drafters.joined import JoinedDrafter
from ..drafters.lookup import LookupDrafter
from ..drafters.specblock.configuration import SpecBlockConfig
from ..drafting.drafter import TreeDrafter


PLAIN = "vanilla"
PROMPT_LOOKUP_TOKENS = 10  # what transformers' documentation passes
TREES = ("rank_guided", "best_first", "fixed")
"""How a SpecBlock drafter's trees may grow; `fixed` gives every slot the mean of the branching, whatever its rank."""


_WORDS = {
    PLAIN: "plain generate()",
    "prompt_lookup": "transformers' prompt lookup",
    "assistant": "transformers' assisted decoding",
    "dflash_native": "transformers' DFlash",
    "lookup": "look-ups in the text",
    "specblock": "SpecBlock",
    "eagle3": "EAGLE-3",
    "dflash": "DFlash",
    "jetspec": "JetSpec",
    "medusa": "Medusa",
    "parallelspec": "ParallelSpec",
    "falcon": "Falcon",
    "rank_guided": "rank-guided tree",
    "best_first": "best-first tree",
    "fixed": "fixed tree",
}


TRANSFORMERS_OWN = ("assistant", "dflash_native")
"""Methods that a model is named with, after a colon."""


def in_words(name: str) -> str:
    """A method's name as a picture shows it, such as "SpecBlock, best-first tree + look-ups in the text"."""
    first, *joined = name.split("+")
    parts = [_WORDS.get(part, part) for part in first.split(":")]
    return " + ".join([", ".join(parts), *(_WORDS.get(part, part) for part in joined)])


@dataclass
class Method:
    """
    One way to decode.

    Args:
        name (`str`): As it was asked for.
        kind (`str`): `"plain"`, `"transformers"`, `"lookup"`, or the `model_type` of the drafter.
        options (`dict[str, Any]`, *optional*): What `generate()` gets beside the settings that all methods share.
        drafter ([`TreeDrafter`], *optional*): The one among the options.
    """

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    drafter: TreeDrafter | None = None


class MethodLoader:
    """
    Makes methods for one target; a drafter that several of them share is loaded once.

    Args:
        target ([`~transformers.PreTrainedModel`]): Where and as it will run.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        paths (mapping of `str` to `str`): Folder or Hub id of each drafter by the name that methods call it.
    """

    def __init__(self, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, paths: Mapping[str, str]):
        self.target = target
        self.tokenizer = tokenizer
        self.paths = paths
        self._loaded: dict[str, TreeDrafter] = {}

    def load(self, names: Sequence[str]) -> list[Method]:
        """
        Args:
            names (sequence of `str`):
                `vanilla` (added in front if missing, because all others are compared with it), `prompt_lookup`
                (transformers' own), `assistant:MODEL` (transformers' assisted decoding with that model),
                `dflash_native:MODEL` (transformers' own DFlash with a drafter that it has a class for), `lookup`
                (look-ups as trees), `NAME` (the drafter of that name), `NAME:TREE` (with one of `TREES`), and any of
                the last two with `+lookup`.

        Raises:
            ValueError: A name means nothing or stands there twice, or a drafter does not fit the target.
            OSError: A model cannot be had.
        """
        names = list(names) if PLAIN in names else [PLAIN, *names]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"the method {twice[0]!r} is named twice; name every method once.")
        return [self._method(name) for name in names]

    def _method(self, name: str) -> Method:
        if name == PLAIN:
            return Method(name, "plain")
        if name == "prompt_lookup":
            return Method(name, "transformers", {"prompt_lookup_num_tokens": PROMPT_LOOKUP_TOKENS})
        kind, _, model = name.partition(":")
        if kind in TRANSFORMERS_OWN:
            options = self._assistant(model) if kind == "assistant" else self._dflash(model)
            return Method(f"{kind}:{name_of(model)}", "transformers", options)
        drafter = self._drafter(name)
        kind = drafter.config.model_type if name != "lookup" else name
        return Method(name, kind, {"assistant_model": drafter}, drafter)

    def _assistant(self, model: str) -> dict[str, Any]:
        assistant = AutoModelForCausalLM.from_pretrained(model, dtype=self.target.dtype).eval().to(self.target.device)
        options = {"assistant_model": assistant}
        if assistant.config.get_text_config().vocab_size != self.target.config.get_text_config().vocab_size:
            options |= {"tokenizer": self.tokenizer, "assistant_tokenizer": AutoTokenizer.from_pretrained(model)}
        return options

    def _dflash(self, model: str) -> dict[str, Any]:
        config = AutoConfig.from_pretrained(model)
        if not hasattr(config, "target_layer_ids"):
            raise ValueError(
                f"{model} is no DFlash drafter of transformers' own: its configuration ({config.model_type}) has no "
                "target_layer_ids; run it as one of ours, with --drafter NAME=PATH."
            )
        assistant = AutoModel.from_pretrained(model, dtype=self.target.dtype).eval().to(self.target.device)
        return {"assistant_model": assistant, "speculation_type": "dflash"}

    def _drafter(self, name: str) -> TreeDrafter:
        base, plus, added = name.partition("+")
        if plus and (added != "lookup" or base == "lookup"):
            raise ValueError(f"the method {name!r} adds {added!r} to {base!r}; only look-ups join a drafter.")
        if base == "lookup":
            drafter: TreeDrafter = LookupDrafter(self.target.config)
        else:
            if base not in self._loaded:
                self._loaded[base] = self._load(base)
            drafter = self._loaded[base]
        return JoinedDrafter(drafter, LookupDrafter(self.target.config)) if plus else drafter

    def _load(self, base: str) -> TreeDrafter:
        source, _, tree = base.partition(":")
        if source not in self.paths:
            known = ", ".join(self.paths) or "none"
            raise ValueError(
                f"there is no method {base!r}: it is not vanilla, prompt_lookup, assistant:MODEL, dflash_native:MODEL "
                f"or lookup, and the drafters are {known}; name its drafter with --drafter {source}=PATH."
            )
        # The drafter keeps its checkpoint's dtype: it never decides a token, and half the bytes are half the time.
        drafter = AutoDrafter.from_pretrained(self.paths[source], target=self.target, dtype="auto")
        drafter = drafter.eval().to(self.target.device)
        if tree:
            grow_as(drafter, tree)
        return drafter


def name_of(path: str) -> str:
    """The name of a file or folder; a Hub id as it is."""
    return Path(path).resolve().name if Path(path).exists() else path


def grow_as(drafter: TreeDrafter, tree: str) -> None:
    """
    Let a SpecBlock drafter grow its trees by another rule than its configuration's.

    Raises:
        ValueError: There is no such rule, or the drafter has only one.
    """
    config = drafter.config
    if tree not in TREES:
        raise ValueError(f"there is no tree {tree!r}; name {', '.join(TREES[:-1])} or {TREES[-1]}.")
    if not isinstance(config, SpecBlockConfig):
        raise ValueError(
            f"{drafter.label} grows its trees in one way only, so that :{tree} cannot be asked of it; leave it out."
        )
    if tree == "fixed":
        width = max(1, round(sum(config.branching) / len(config.branching)))
        config.branching = [width] * len(config.branching)
        tree = "rank_guided"
    config.expansion = tree
