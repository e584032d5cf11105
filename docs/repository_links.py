# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""For mkdocs: the site has no copy of the repository's other files, so that links to them become their names."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """`[words](../file)` as `words (file)`, the name alone where it is said already."""

    def named(match: re.Match[str]) -> str:
        words, path = match[1], match[2]
        return words if path.rstrip("/").split("/")[-1] in words else f"{words} (`{path}`)"

    return re.sub(r"!?\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)", named, markdown)
