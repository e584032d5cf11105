# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The files of a drafter, in a folder or on the Hub."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file


LOCATION_OPTIONS = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download")


WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
"""Patterns of the files that weights are written to, one of which would be read in place of the others."""


@dataclass(frozen=True)
class DrafterFiles:
    """
    The files of a checkpoint, in a folder or on the Hub; downloaded when asked for.

    Args:
        name (`str` or `os.PathLike`): Folder or Hub id.
        options (`dict`, *optional*):
            `revision`, `subfolder`, `cache_dir`, `token`, `local_files_only` and `force_download`, as in
            `from_pretrained`.
    """

    name: str | os.PathLike
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str | os.PathLike, kwargs: Mapping[str, Any]) -> DrafterFiles:
        """With those of the arguments of a `from_pretrained` that say where files are."""
        options = {key: kwargs[key] for key in LOCATION_OPTIONS if kwargs.get(key) is not None}
        return cls(os.fspath(name), options)

    @cached_property
    def config(self) -> dict[str, Any]:
        """
        What `config.json` says.

        Raises:
            OSError: There is none, or it cannot be had.
            ValueError: It is not JSON.
        """
        path = self.path("config.json")
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"config.json of {self.name} is not valid JSON ({error}); download it again.") from error

    def path(self, filename: str) -> Path:
        """
        A file that must be there.

        Raises:
            OSError: It is not, cannot be had, or was damaged on the way.
        """
        found = self.optional(filename)
        if found is None:
            raise OSError(
                f"{self.name} has no {filename}, or not in the cache if the Hub may not be asked; check the name, "
                "revision and subfolder."
            )
        return found

    def optional(self, filename: str) -> Path | None:
        """A file that may be there, or `None`; raises as [`~DrafterFiles.path`] if that cannot be told."""
        options = dict(self.options)
        subfolder = options.pop("subfolder", None)
        if Path(self.name).is_dir():
            path = Path(self.name, subfolder or "", filename)
            return path if path.is_file() else None
        try:
            before = self._in_cache(filename)
            found = hf_hub_download(os.fspath(self.name), filename, subfolder=subfolder, **options)
        except LocalEntryNotFoundError as error:
            if is_offline_mode() or options.get("local_files_only"):
                return None
            raise OSError(
                f"{filename} of {self.name} is not in the cache and the Hub cannot be asked for it "
                f"({error.__cause__ or error}); try again."
            ) from error
        except EntryNotFoundError:
            return None
        except (HTTPError, HFValidationError) as error:
            raise OSError(self._explain(error)) from error
        if found != before or options.get("force_download"):
            self._check_hash(Path(found), filename)
        return Path(found)

    def _explain(self, error: Exception) -> str:
        if isinstance(error, GatedRepoError):
            return f"{self.name} is gated; accept its terms on the Hub, and pass token= or log in."
        if isinstance(error, RevisionNotFoundError):
            return (
                f"{self.name} has no revision {self.options['revision']}; name one of its branches, tags or commits."
            )
        if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
            return (
                f"{self.name} is neither a folder nor a Hub repository that can be seen; check the name, and pass "
                "token= or log in if the repository is private."
            )
        return f"The Hub does not give {self.name} ({error}); try again later."

    def weights(self) -> list[Path]:
        """
        The files with the weights: one or several of safetensors, otherwise PyTorch's.

        Raises:
            OSError: There are none, one is missing, or one was damaged on the way.
        """
        for single in ("model.safetensors", "pytorch_model.bin"):
            if (path := self.optional(single)) is not None:
                return [path]
            if (index := self.optional(f"{single}.index.json")) is not None:
                return [
                    self.path(shard) for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))
                ]
        raise OSError(
            f"{self.name} has neither model.safetensors nor pytorch_model.bin, so there are no weights to load; check "
            "the name, revision and subfolder."
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """
        All weights by name.

        Raises:
            ValueError: A file holds something else than tensors, or cannot be read.
        """
        return {name: tensor for path in self.weights() for name, tensor in read_tensors(path).items()}

    def _in_cache(self, filename: str) -> str | None:
        found = try_to_load_from_cache(
            os.fspath(self.name),
            os.path.join(self.options.get("subfolder", ""), filename),
            cache_dir=self.options.get("cache_dir"),
            revision=self.options.get("revision"),
        )
        return found if isinstance(found, str) else None

    def _check_hash(self, path: Path, filename: str) -> None:
        # The client compares sizes only. The cache names a file after what the Hub says its hash is: the sha256 of a
        # large file, git's sha1 of a small one.
        stored = path.resolve()
        size = stored.stat().st_size
        digest = {64: hashlib.sha256(), 40: hashlib.sha1(b"blob %d\0" % size)}.get(len(stored.name))
        if digest is None:
            return
        with stored.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != stored.name:
            stored.unlink()
            path.unlink(missing_ok=True)
            raise OSError(
                f"{filename} of {self.name} arrived damaged: its hash is not the one that the Hub states; the copy "
                "was deleted, so load it again."
            )


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """
    The tensors of a safetensors or PyTorch file.

    Raises:
        ValueError: It holds something else than tensors, or cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every format fails in its own way
        raise ValueError(
            f"{path} is damaged or holds more than tensors, so it is not loaded ({type(error).__name__}); download it "
            "again, or convert it to safetensors where you trust it."
        ) from error
