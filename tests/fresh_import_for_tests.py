# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The package imported a second time in the same process, as a notebook does that has edited it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from transformers import AutoConfig, AutoModel, GenerationMixin

from specblock_hf.drafters.common.registry import drafter_kinds
from specblock_hf.generation.hook import _WRAPPERS, _owner


HOOKED = tuple(_WRAPPERS)


@contextmanager
def imported_afresh() -> Iterator[ModuleType]:
    """The new package; afterwards all is as it was."""
    old = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "specblock_hf"}
    methods, kinds, finders = (
        [getattr(GenerationMixin, name) for name in HOOKED],
        dict(drafter_kinds()),
        sys.meta_path[:],
    )
    try:
        for name in old:
            del sys.modules[name]
        yield import_module("specblock_hf")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "specblock_hf"]:
            del sys.modules[name]
        sys.modules.update(old)
        sys.meta_path[:] = finders
        for name, method in zip(HOOKED, methods, strict=True):
            setattr(_owner(name), name, method)
        for kind in kinds.values():
            AutoConfig.register(kind.config_class.model_type, kind.config_class, exist_ok=True)
            AutoModel.register(kind.config_class, kind, exist_ok=True)
