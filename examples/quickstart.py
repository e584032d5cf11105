# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The least there is to it: a stock model, a drafter, one argument. The text is the same as without the drafter."""

from specblock_hf import SpecBlockDrafter
from specblock_hf.cli.default_target import find_default_drafter, load_default_target


target, tokenizer = load_default_target()  # or AutoModelForCausalLM.from_pretrained(...)
drafter = SpecBlockDrafter.from_pretrained(find_default_drafter(), dtype="auto")

inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Write a Python function that reverses the words of a sentence."}],
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)
output = target.generate(**inputs, assistant_model=drafter, max_new_tokens=128, do_sample=False)

print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print()
print(drafter.last_statistics.summary())
