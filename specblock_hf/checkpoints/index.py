# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What is on the Hub that was made from a model; or in its cache, where the Hub may not or cannot be asked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CacheNotFound, HfApi, ModelInfo, is_offline_mode, metadata_load, scan_cache_dir
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from yaml import YAMLError

from .files import DrafterFiles, id_in_cache


TAG = "speculative-decoding"
"""What authors of drafters tag them with, whatever their kind."""
MOST_LISTED = 100
LONGEST_LINEAGE = 8
_BITS = {"F64": 64, "F32": 32, "I32": 32, "BF16": 16, "F16": 16, "I64": 64, "U8": 8, "I8": 8, "BOOL": 8}


@dataclass(frozen=True)
class Listed:
    """
    What the Hub says of a repository before anything of it is downloaded.

    Args:
        name (`str`): Its id.
        downloads (`int`): In the last month.
        size (`int`, *optional*): Bytes of its weights, if these are safetensors.
        licence (`str`, *optional*): Of the weights.
    """

    name: str
    downloads: int = 0
    size: int | None = None
    licence: str | None = None

    @classmethod
    def of(cls, info: ModelInfo) -> Listed:
        counts = info.safetensors.parameters.items() if info.safetensors else ()
        bits = sum(_BITS.get(dtype, 16) * number for dtype, number in counts)
        licences = [tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")]
        return cls(info.id, info.downloads or 0, bits // 8 or None, licences[0] if licences else None)


@dataclass
class HubIndex:
    """
    The Hub as an index. After the first time that it does not answer, the cache has to do.

    Args:
        token (`str` or `bool`, *optional*): For the Hub.
        cache_dir (`str` or `os.PathLike`, *optional*): Where downloaded files are.
        local_files_only (`bool`, *optional*, defaults to `False`): Ask nobody.

    Attributes:
        notes (`list[str]`): What could not be asked and why, as sentences.
        is_asked (`bool`): Whether the Hub is asked; no longer once it could not be.
    """

    token: str | bool | None = None
    cache_dir: str | os.PathLike | None = None
    local_files_only: bool = False
    notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._api = HfApi(token=self.token)
        self.is_asked = not (self.local_files_only or is_offline_mode())

    @property
    def options(self) -> dict[str, Any]:
        """For [`DrafterFiles`]."""
        asked = {"token": self.token, "cache_dir": self.cache_dir}
        return asked | {"local_files_only": True} if not self.is_asked else asked

    def lineage(self, name: str, revision: str | None = None) -> list[str]:
        """
        A model and what it was made from, by the `base_model` of their cards, the nearest first.

        Args:
            name (`str`): Folder or Hub id.
            revision (`str`, *optional*): Of the model itself.
        """
        found = [name]
        for model in found:  # grows on the way
            bases = self._bases(model, revision if model == name else None)
            found += [base for base in bases if base not in found]
            if len(found) >= LONGEST_LINEAGE:
                break
        return found[:LONGEST_LINEAGE]

    def made_from(self, base: str, words: Sequence[str]) -> Iterator[Listed]:
        """
        Repositories that name a model as their base and look like drafters.

        Args:
            base (`str`): Hub id of the model.
            words (sequence of `str`): Of which one is part of the name of a drafter that is not tagged as one.
        """
        family = f"base_model:{base}"
        queries: list[dict[str, Any]] = [{"filter": [family, TAG]}]
        queries += [{"filter": family, "search": word} for word in words]
        seen: set[str] = set()
        for query in queries if "/" in base and not os.path.isdir(base) else ():
            for info in self._list(query):
                if info.id not in seen:
                    seen.add(info.id)
                    yield Listed.of(info)

    def cached(self) -> Iterator[str]:
        """Repositories in the cache, where nobody else is asked."""
        folder = None if self.cache_dir is None else os.fspath(self.cache_dir)
        try:
            found = frozenset() if self.is_asked else scan_cache_dir(folder).repos
        except CacheNotFound:
            return
        yield from sorted(repo.repo_id for repo in found if repo.repo_type == "model")

    def _bases(self, name: str, revision: str | None) -> list[str]:
        if (stored := id_in_cache(name)) is not None:
            return [stored]
        bases: Any = None
        renamed: list[str] = []
        if os.path.isdir(name) or not self.is_asked:
            path = DrafterFiles.of(name, {**self.options, "revision": revision}).optional("README.md")
            bases = path and (_metadata(path) or {}).get("base_model")
        else:
            try:
                info = self._api.model_info(name, revision=revision, expand=["cardData"])
                bases = info.card_data and info.card_data.base_model
                renamed = [info.id]  # if it was
            except (RepositoryNotFoundError, HFValidationError):
                return []  # a folder of another machine, or a name that says nothing to the Hub
            except (HTTPError, ValueError) as error:
                self._give_up(error)
                return self._bases(name, revision)
        bases = [bases] if isinstance(bases, str) else bases or []
        return renamed + [base for base in bases if isinstance(base, str)]

    def _list(self, query: dict[str, Any]) -> list[ModelInfo]:
        if not self.is_asked:
            return []
        try:
            expand: list[Any] = ["downloads", "safetensors", "tags"]
            return list(self._api.list_models(**query, sort="downloads", limit=MOST_LISTED, expand=expand))
        except (HTTPError, ValueError) as error:
            self._give_up(error)
            return []

    def _give_up(self, error: Exception) -> None:
        self.is_asked = False
        what = " ".join(str(error).split("\n")[0].split())
        self.notes.append(
            f"The Hub could not be asked ({what}), so only the cache and the package's list were searched."
        )


def _metadata(path: Path) -> dict[str, Any] | None:
    """What stands above the text of a card, if that can be read."""
    try:
        return metadata_load(path)
    except (ValueError, YAMLError):
        return None
