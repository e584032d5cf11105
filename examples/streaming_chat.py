# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A chat in the terminal, sampled and streamed, with what each answer cost. An empty line or Ctrl-D ends it."""

from transformers import TextStreamer

from specblock_hf import SpecBlockDrafter
from specblock_hf.cli.default_target import find_default_drafter, load_default_target


def main():
    target, tokenizer = load_default_target()
    drafter = SpecBlockDrafter.from_pretrained(find_default_drafter(), dtype="auto")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages = []
    while question := read_line("> "):
        messages.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = target.generate(
            **inputs,
            assistant_model=drafter,
            streamer=streamer,
            max_new_tokens=256,
            do_sample=True,
            temperature=0.7,
            top_p=0.9,
        )
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        statistics = drafter.last_statistics
        print(f"[{statistics.tokens_per_second:.1f} tokens/s, {statistics.tau:.2f} tokens a round]\n")


def read_line(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    main()
