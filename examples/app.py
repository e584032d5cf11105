# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The page of `specblock play` as a Hugging Face Space, or anywhere: two answers side by side, one with the drafter. It
needs the extras `demo` and `play`, and what the README installs beside the library.
"""

from specblock_hf import AutoDrafter, JoinedDrafter, LookupDrafter
from specblock_hf.cli.default_target import find_default_drafter, load_default_target
from specblock_hf.cli.play import build_app


target, tokenizer = load_default_target()
drafter = AutoDrafter.from_pretrained(find_default_drafter(), target=target, dtype="auto").eval()
demo = build_app(target, tokenizer, JoinedDrafter(drafter, LookupDrafter(target.config)))

if __name__ == "__main__":
    demo.launch(show_error=True)
