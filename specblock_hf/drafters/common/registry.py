# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The kinds of drafters that there are: those of this package, and those that other packages register."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any

from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.utils import logging

from .layout import Layout


logger = logging.get_logger(__name__)

ENTRY_POINTS = "specblock_hf.drafters"
"""Group of the entry points that name modules of other packages which register drafters."""

DrafterClass = type[Any]
"""Of a [`TreeDrafter`] that is a [`~transformers.PreTrainedModel`], for which there is no annotation."""

_KINDS: dict[str, DrafterClass] = {}
_TRAINABLE: dict[str, tuple[DrafterClass, dict[str, Any]]] = {}
_LAYOUTS: dict[str, tuple[DrafterClass, Layout]] = {}


def register_drafter(
    config_class: type[PreTrainedConfig],
    drafter_class: DrafterClass,
    *,
    trainable: Mapping[str, dict[str, Any]] | None = None,
    layouts: Iterable[Layout] = (),
) -> None:
    """
    Make a kind of drafter known: [`AutoDrafter`] and transformers' Auto classes load it by the `model_type` of its
    configuration, and `specblock train --drafter NAME` trains it. Of a package of your own, call it in a module that
    an entry point of the group `specblock_hf.drafters` names; then the commands find it without importing it.

    Args:
        config_class (`type[PreTrainedConfig]`):
            With a `model_type` of its own; to be trainable also with `for_target(target_config, **overrides)`.
        drafter_class (`type`): A [`~transformers.PreTrainedModel`] that is a [`TreeDrafter`].
        trainable (`dict[str, dict]`, *optional*):
            Names for `specblock train --drafter`, each with the fields of the configuration that make that form of the
            drafter. Defaults to the `model_type` alone; `{}` for one that cannot be trained.
        layouts (`Iterable[Layout]`, *optional*):
            Ways in which others publish drafters of this kind, to be read and maybe written.

    Raises:
        ValueError: Another drafter has this `model_type`, or one of the names or layouts already.
    """
    model_type = config_class.model_type
    forms: Mapping[str, dict[str, Any]] = {model_type: {}} if trainable is None else trainable
    published = {layout.name: (drafter_class, layout) for layout in layouts}
    taken = {name: kind for name, (kind, _) in _TRAINABLE.items() if name in forms}
    taken |= {name: kind for name, (kind, _) in _LAYOUTS.items() if name in published}
    for name, other in ({model_type: _KINDS.get(model_type, drafter_class)} | taken).items():
        # Not by identity: a notebook that runs a module again defines its class again.
        if (other.__module__, other.__qualname__) != (drafter_class.__module__, drafter_class.__qualname__):
            raise ValueError(f"{name!r} is {other.__module__}.{other.__qualname__} already; choose another name.")
    _KINDS[model_type] = drafter_class
    _TRAINABLE.update({name: (drafter_class, fields) for name, fields in forms.items()})
    _LAYOUTS.update(published)
    AutoConfig.register(model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, drafter_class, exist_ok=True)


def drafter_kind(model_type: Any) -> DrafterClass | None:
    """The class of drafters with this `model_type`; `None` for one that nobody has registered."""
    if model_type not in _KINDS:
        _load_entry_points()
    return _KINDS.get(model_type)


def drafter_kinds() -> Mapping[str, DrafterClass]:
    """Classes of drafters by the `model_type` of their configurations, those of other packages included."""
    _load_entry_points()
    return _KINDS


def trainable_drafters() -> Mapping[str, tuple[DrafterClass, dict[str, Any]]]:
    """What `specblock train --drafter` makes: the class, and the fields of its configuration that make that form."""
    _load_entry_points()
    return _TRAINABLE


def published_layouts() -> Mapping[str, tuple[DrafterClass, Layout]]:
    """Layouts that others publish drafters in, by name, each with the class of those drafters."""
    _load_entry_points()
    return _LAYOUTS


def _load_entry_points() -> None:
    # Importing a module a second time does nothing.
    for entry_point in entry_points(group=ENTRY_POINTS):
        try:
            entry_point.load()
        except ImportError as error:
            logger.warning_once(f"{entry_point.value} registers no drafter, because it cannot be imported: {error}")
