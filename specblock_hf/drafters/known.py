# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The drafters that are known without asking the Hub: `known.json` beside this file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple


LIST = Path(__file__).parent / "known.json"


class Acceptance(NamedTuple):
    """
    What somebody has stated about a drafter, under conditions of their own; figures of different sources do not
    compare.

    Args:
        tau (`float`): Tokens a round, as the source counts them.
        setting (`str`): Model, data, temperature and tree, as far as they are stated.
        source (`str`): Where.
        date (`str`): When, year and month at least.
    """

    tau: float
    setting: str
    source: str
    date: str


@dataclass(frozen=True)
class KnownDrafter:
    """
    A drafter of the list, in which the better ones for a target come first.

    Args:
        id (`str`): On the Hub.
        target (`str`): Hub id of what it was trained for.
        kind (`str`): `model_type` of its configuration here; empty if it cannot be run.
        layout (`str`): Name of the layout that it is published in.
        source (`str`): Who says that both belong together.
        revision (`str`, *optional*): Commit, tag or branch to load; the newest if there is none.
        licence (`str`, *optional*): Of the weights.
        thinking (`bool`, *optional*): Whether it was trained on answers in thinking mode, if that is said.
        acceptance ([`Acceptance`], *optional*): What is stated about it.
    """

    id: str
    target: str
    kind: str
    layout: str
    source: str
    revision: str | None = None
    licence: str | None = None
    thinking: bool | None = None
    acceptance: Acceptance | None = None


@cache
def _list() -> dict[str, Any]:
    return json.loads(LIST.read_text(encoding="utf-8"))


def layouts_tested() -> dict[str, str]:
    """How the reader of each layout is tested: by recorded golden tensors, or by a run beside a project's own code."""
    return _list()["tested"]


@cache
def known_drafters() -> tuple[KnownDrafter, ...]:
    """The list, in order."""
    return tuple(
        KnownDrafter(**row | {"acceptance": Acceptance(**row["acceptance"]) if row.get("acceptance") else None})
        for row in _list()["drafters"]
    )


def known_drafter(name: str) -> KnownDrafter | None:
    """The one with this Hub id."""
    return next((drafter for drafter in known_drafters() if drafter.id.lower() == name.lower()), None)
