# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Drafters on the Hub: fetching what a repository holds, and publishing a drafter with its card and provenance."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    HfApi,
    ModelCard,
)
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from transformers import PreTrainedModel

from .card import TEMPLATES, CardFacts, hub_id, model_card
from .files import NO_VARIANTS, WEIGHTS
from .provenance import provenance, published
from .saving import save_folder_whole


CARD, CONFIG, PROVENANCE, CUSTOM_GENERATE = (
    "README.md",
    "config.json",
    "provenance.json",
    "custom_generate/generate.py",
)


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    card: ModelCard | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload drafter",
) -> CommitInfo:
    """
    Upload a saved drafter in one commit, and with it the file that `custom_generate="repo"` needs.

    Args:
        folder (`str` or `os.PathLike`): What `save_pretrained` wrote.
        repo_id (`str`): Made if it is not there.
        card ([`~huggingface_hub.ModelCard`], *optional*):
            Goes in place of the folder's card. Without one, a card that the repository has already is left alone.
        private (`bool`, *optional*): Of a new repository.
        token (`str` or `bool`, *optional*): As in [`~huggingface_hub.HfApi`].
        revision (`str`, *optional*): Branch; made if it is not there.
        create_pr (`bool`, *optional*, defaults to `False`): Ask for the change instead of making it.
        commit_message (`str`, *optional*, defaults to `"Upload drafter"`).

    Raises:
        ValueError: There is no such folder.
        OSError: The Hub cannot be reached, or refuses.
    """
    saved_folder(folder)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    except HfHubHTTPError:  # it answers, and says why not
        raise
    except HTTPError as error:
        raise OSError(
            f"The Hub cannot be reached ({error}), so that nothing was uploaded; check the connection, or see what "
            "would be published with `specblock push --dry-run`."
        ) from error
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    files = files_to_publish(folder, repo_id, card)
    if card is None and CARD in files and api.file_exists(repo_id, CARD, revision=revision):
        del files[CARD]
    return api.create_commit(
        repo_id,
        [CommitOperationAdd(name, content) for name, content in files.items()],
        commit_message=commit_message,
        revision=revision,
        create_pr=create_pr,
    )


def saved_folder(folder: str | os.PathLike) -> Path:
    """
    A folder that is there.

    Raises:
        ValueError: It is not, and may be the name of a repository.
    """
    if not Path(folder).is_dir():
        raise ValueError(
            f"{os.fspath(folder)} is no folder, and only what lies in one is uploaded; save the drafter first, with "
            "save_pretrained or `specblock convert`."
        )
    return Path(folder)


def files_to_publish(
    folder: str | os.PathLike, repo_id: str, card: ModelCard | None = None
) -> dict[str, Path | bytes]:
    """
    What [`publish`] uploads, by its place in the repository: the folder's visible files, the card and the file that
    `custom_generate="repo"` needs. Where the configuration names a target by a path of this machine, only the last
    component is published.

    Raises:
        ValueError: There is no such folder.
    """
    root = saved_folder(folder)
    files: dict[str, Path | bytes] = {
        path.relative_to(root).as_posix(): path
        for path in sorted(root.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    }
    config = files.get(CONFIG)
    if isinstance(config, Path):
        values = json.loads(config.read_text(encoding="utf-8"))
        if (said := without_paths(values)) != values:
            files[CONFIG] = (json.dumps(said, indent=2, sort_keys=True) + "\n").encode()
    if card is not None:
        files[CARD] = str(card).encode()
    template = Template((TEMPLATES / "custom_generate.py.txt").read_text(encoding="utf-8"))
    files[CUSTOM_GENERATE] = template.substitute(repo_id=repo_id).encode()
    return files


def without_paths(values: Any) -> Any:
    """A configuration that names models as they may be published: by a Hub id, or by the last component of a path."""
    if isinstance(values, list):
        return [without_paths(value) for value in values]
    if not isinstance(values, dict):
        return values
    return {
        name: hub_id(value) or published(value)
        if name.endswith("name_or_path") and isinstance(value, str)
        else without_paths(value)
        for name, value in values.items()
    }


class HubModel(PreTrainedModel):
    """A [`~transformers.PreTrainedModel`] that writes its card and provenance where it is saved, and uploads both."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        *args,
        push_to_hub: bool = False,
        facts: CardFacts | None = None,
        **kwargs,
    ) -> None:
        """
        As [`~transformers.PreTrainedModel.save_pretrained`], with a model card and `provenance.json`. A card that lies
        in the folder already is kept unless `facts` are given, and so is every other file that holds no weights. What
        fails in the middle leaves the folder as it was.

        Args:
            facts (`CardFacts`, *optional*): What the card says beside the configuration.

        Raises:
            ValueError: A `variant` is asked for.
        """
        if kwargs.get("variant") is not None:
            raise ValueError(f"{save_directory} cannot hold a variant, {kwargs['variant']!r}; {NO_VARIANTS}")
        folder = Path(save_directory)
        names = ("repo_id", "private", "revision", "create_pr", "commit_message")
        upload = {name: kwargs.pop(name) for name in names if name in kwargs}
        repo_id = upload.pop("repo_id", folder.name)
        if not is_main_process:  # its part of a collective operation; it writes nothing
            super().save_pretrained(save_directory, False, *args, **kwargs)
            return
        with save_folder_whole(folder, obsolete=WEIGHTS) as written:
            super().save_pretrained(written, True, *args, **kwargs)
            (written / PROVENANCE).write_text(json.dumps(provenance(), indent=2) + "\n", encoding="utf-8")
            if facts is not None or not (folder / CARD).exists():
                self.model_card(repo_id, facts).save(written / CARD)
        if push_to_hub:
            publish(folder, repo_id, token=kwargs.get("token"), **upload)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        facts: CardFacts | None = None,
        max_shard_size: int | str = "5GB",
        **kwargs,
    ) -> CommitInfo:
        """
        Upload the drafter with its card and provenance.

        Args:
            repo_id (`str`): Made if it is not there.
            facts (`CardFacts`, *optional*): What the card says beside the configuration.
            max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Largest file of weights.
            **kwargs: `private`, `token`, `revision`, `create_pr` and `commit_message`; see [`publish`].
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size, repo_id=repo_id)
            card = self.model_card(repo_id, facts) if facts is not None else None
            return publish(folder, repo_id, card=card, **kwargs)

    def model_card(self, name: str, facts: CardFacts | None = None) -> ModelCard:
        """The card under that name; see [`model_card`]."""
        parameters = sum(weight.numel() for weight in self.parameters())
        return model_card(self.config, name, facts or CardFacts(), parameters)
