# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
For mkdocs: the site has no copy of the repository's other files, so that links to them become their names; and what
docstrings say of types, in Hugging Face's format, is shown without its marks.
"""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """`[words](../file)` as `words (file)`, the name alone where it is said already."""

    def named(match: re.Match[str]) -> str:
        words, path = match[1], match[2]
        return words if path.rstrip("/").split("/")[-1] in words else f"{words} (`{path}`)"

    return re.sub(r"!?\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)", named, markdown)


def on_page_content(html: str, **kwargs: Any) -> str:
    """A type as words, its default where the signature has none, and names of classes and methods as code."""

    def words(match: re.Match[str]) -> str:
        text, default = match[1], match[2]
        text = re.sub(r"\[`~?(?:\w+\.)*(\w+)`\]", r"\1", text).replace("*optional*", "optional").replace("`", "")
        return f"(<code>{text.split(', defaults to')[0] if default else text}</code>{default}"

    html = re.sub(r"\(<code>((?:[^<`]*[`*])+[^<]*)</code>(, default:|)", words, html)
    return re.sub(r"\[<code>~?(?:\w+\.)*(\w+)</code>\]", r"<code>\1</code>", html)
