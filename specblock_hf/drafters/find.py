# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Which drafters there are for a target, and which of them fit. Every one is judged by its `config.json`, and offline by
whether its weights are there as well: no weights are downloaded and no code of a repository is run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..checkpoints.configuration_checks import refusing_misfits
from ..checkpoints.files import DrafterFiles
from ..checkpoints.index import HubIndex, Listed
from ..checkpoints.loading import auto_class
from ..data.template import PromptStyle
from .common.registry import drafter_kind, published_layouts
from .known import KnownDrafter, known_drafter, known_drafters
from .layouts import OURS, layout_of


MOST_CHECKED = 24
"""Candidates whose `config.json` is read, the likeliest first."""


@dataclass(frozen=True)
class Candidate:
    """
    A drafter that may be for a target.

    Args:
        name (`str`): Hub id.
        trained_for (`str`, *optional*): The target, or the model that it was made from; `None` if nobody says.
        distance (`int`, *optional*, defaults to 0): Steps from the target up to that model.
        listed (`Listed`, *optional*): What the Hub says.
        known ([`KnownDrafter`], *optional*): What the package's list says.
        kind (`str`, *optional*): `model_type` of its configuration; empty if there is none to be read.
        layout (`str`, *optional*): Name of its layout.
        config (`dict`, *optional*): What its `config.json` says.
        misfit (`str`, *optional*): Why it does not fit, in one sentence; `None` if it does.
    """

    name: str
    trained_for: str | None = None
    distance: int = 0
    listed: Listed | None = None
    known: KnownDrafter | None = None
    kind: str = ""
    layout: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    misfit: str | None = None

    @property
    def fits(self) -> bool:
        return self.misfit is None

    @property
    def revision(self) -> str | None:
        """What to load of it."""
        return self.known.revision if self.known else None

    @property
    def prompt_style(self) -> PromptStyle:
        """What it was trained behind, as far as anybody says."""
        return PromptStyle.recorded(self.config, self.known.thinking if self.known else None)

    @property
    def rank(self) -> tuple[int, int, int]:
        """Sorts the likeliest first: trained for the nearest model, then in the list's order, then much downloaded."""
        order = known_drafters().index(self.known) if self.known else len(known_drafters())
        return self.distance, order, -(self.listed.downloads if self.listed else 0)


@dataclass(frozen=True)
class Findings:
    """
    What a search for drafters has found.

    Args:
        target (`str`): What was searched for.
        candidates (`tuple[Candidate, ...]`): Those that fit first, each part with the likeliest first.
        notes (`tuple[str, ...]`): What could not be asked, and what was left out.
    """

    target: str
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...] = ()

    def best(self) -> Candidate:
        """
        The likeliest that fits.

        Raises:
            ValueError: None does; the message names the nearest ones and why they do not.
        """
        if self.candidates and self.candidates[0].fits:
            return self.candidates[0]
        nearest = "; ".join(f"{one.name} ({one.misfit.rstrip('.')})" for one in self.candidates[:3])
        clauses = [note[:1].lower() + note[1:].rstrip(".") for note in self.notes]
        told = [f"the nearest are {nearest}" if nearest else "none is known", *clauses]
        raise ValueError(
            f"No drafter was found that fits {self.target}: {'; '.join(told)}; train one with `specblock train`, or "
            "pass assistant_model=LookupDrafter(target.config), which needs no training."
        )


def find_drafters(
    target: str | os.PathLike | PreTrainedModel | PreTrainedConfig,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> Findings:
    """
    Drafters for a target, from the Hub and from a list in the package: those that name it as their base model, or what
    it was itself made from (fine-tuned, quantised). Where the Hub may not or cannot be asked, from the cache.

    Args:
        target (`str`, `os.PathLike`, [`~transformers.PreTrainedModel`] or [`~transformers.PreTrainedConfig`]):
            The target, or the folder or Hub id of one, whose `config.json` alone is read.
        revision (`str`, *optional*): Branch, tag or commit of the target, where it is named.
        token (`str` or `bool`, *optional*): For the Hub.
        cache_dir (`str` or `os.PathLike`, *optional*): Where downloaded files are.
        local_files_only (`bool`, *optional*, defaults to `False`): Ask nobody.

    Raises:
        OSError: The target's configuration cannot be had.
        ValueError: It describes no model that transformers can build.
    """
    index = HubIndex(token, cache_dir, local_files_only)
    model, name = _model_and_name(target, revision=revision, **index.options)
    lineage = index.lineage(name, revision) if name else []
    if name and os.path.isdir(name) and len(lineage) == 1:
        index.notes.append(f"{name} is a folder that names no model of the Hub; search by the name that it has there.")
    candidates = sorted(_candidates(index, lineage), key=lambda one: one.rank)
    # To look at what is cached costs nothing.
    most = MOST_CHECKED if index.is_asked else len(candidates)
    judged = [_judge(one, model, lineage, index.options) for one in candidates[:most]]
    if len(candidates) > most:
        index.notes.append(f"{len(candidates) - most} less likely ones were not looked at.")
    # Of the cache's repositories, which may be anything, those that are drafters.
    judged = [one for one in judged if one.trained_for or one.kind]
    judged.sort(key=lambda one: (not one.fits, one.rank))
    return Findings(name or f"this {type(model).__name__}", tuple(judged), tuple(index.notes))


def _model_and_name(target: Any, **options: Any) -> tuple[PreTrainedModel, str]:
    """A target as what it is asked of here, and its name."""
    if isinstance(target, PreTrainedModel):
        return target, target.config.name_or_path
    if not isinstance(target, PreTrainedConfig):
        target = AutoConfig.from_pretrained(os.fspath(target), trust_remote_code=False, **options)
    with refusing_misfits(target.name_or_path), torch.device("meta"):
        return auto_class(target).from_config(target, trust_remote_code=False), target.name_or_path


def _candidates(index: HubIndex, lineage: list[str]) -> list[Candidate]:
    found: dict[str, Candidate] = {}
    words = sorted({word for _, layout in published_layouts().values() for word in layout.hub_words})
    for distance, base in enumerate(lineage):
        for known in known_drafters():
            if known.target.lower() == base.lower():
                found.setdefault(known.id, Candidate(known.id, base, distance, known=known))
        for listed in index.made_from(base, words):
            if listed.name not in found and listed.name not in lineage:
                found[listed.name] = Candidate(listed.name, base, distance, known=known_drafter(listed.name))
            if listed.name in found:
                found[listed.name] = replace(found[listed.name], listed=listed)
    for name in index.cached():
        if name not in lineage:
            found.setdefault(name, Candidate(name, distance=len(lineage)))
    return list(found.values())


def _judge(candidate: Candidate, target: PreTrainedModel, lineage: list[str], options: Mapping[str, Any]) -> Candidate:
    """The candidate with what its `config.json` says of it, and whether that suits the target."""
    files = DrafterFiles.of(candidate.name, {**options, "revision": candidate.revision})
    try:
        layout = layout_of(files.config, candidate.name)
        candidate = replace(candidate, layout=OURS if layout is None else layout.name, config=files.config)
        with refusing_misfits(candidate.name):
            if layout is None:
                kind = drafter_kind(files.config["model_type"])
                config = kind.config_class.from_dict(files.config, name_or_path=candidate.name)
            else:
                nameless = copy(target.config)
                nameless.name_or_path = ""  # which would pass for what the file says
                config = layout.read_config(files.config, candidate.name, {}, nameless)
                kind = drafter_kind(config.model_type)
            candidate = _with_target(replace(candidate, kind=config.model_type), config, lineage)
            with torch.device("meta"):
                kind(copy(config)).check_target(target)
        if candidate.trained_for is None:
            raise ValueError("its sizes fit, but nothing says that it is for this target; load it by its name.")
        if options.get("local_files_only"):
            files.weights()  # of a drafter that was only looked at there is no more than the configuration
    except (ValueError, OSError) as error:
        return replace(candidate, misfit=" ".join(str(error).split()))
    return candidate


def _with_target(candidate: Candidate, config: PreTrainedConfig, lineage: list[str]) -> Candidate:
    """The candidate with the target that its own configuration names, where nobody else has named one."""
    stated = config.target_name_or_path
    if candidate.trained_for is not None or stated not in lineage:
        return candidate
    return replace(candidate, trained_for=stated, distance=lineage.index(stated))
