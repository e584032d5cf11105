# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Answers from a server that speaks OpenAI's chat protocol and serves the target with an engine of its own."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module

from huggingface_hub import AsyncInferenceClient, ChatCompletionOutput, InferenceTimeoutError
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedTokenizerBase

from ..compat import HTTP
from ..data.template import SWITCH
from .answering import Prompt


# What the client lets through when there is no connection comes from the package that it is built on.
_HTTP = import_module(HTTP)


ENGINES: dict[str, dict] = {
    "openai": {},
    "vllm": {"return_token_ids": True, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
    "sglang": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "transformers": {},
}
"""
What an engine's requests say beside the standard fields, so that no processor of the target's generation configuration
changes its distribution, and that the answer comes as token ids where the engine offers them.
"""

BUSY = {408, 425, 429, 500, 502, 503, 504}
"""Statuses that ask for another try."""

OF_THE_PROMPT = {400, 413}
"""Statuses that may concern one prompt alone, most often its length."""

REFUSALS = 16  # prompts may be refused before any is answered
LONGEST_WAIT = 60.0  # seconds between two tries
ANSWER = "specblock"  # that no chat template says itself


@dataclass(frozen=True)
class Server:
    """
    Whom to ask, and how.

    Args:
        url (`str`): Up to and including `/v1`.
        model (`str`): Its name for the target.
        engine (`str`, *optional*, defaults to `"openai"`): One of [`ENGINES`].
        api_key (`str`, *optional*): Sent as the bearer token. The Hub's token of this machine never is.
        in_flight (`int`, *optional*, defaults to 64): Requests at a time.
        tries (`int`, *optional*, defaults to 8): Of every request, with growing pauses between them.
        timeout (`float`, *optional*, defaults to 600.0): Seconds for one answer.
        pause (`float`, *optional*, defaults to 1.0): Seconds before the second try, doubled with every other.
        thinking (`bool`, *optional*): Whether its chat template lets the target think; as it has it if not given.
    """

    url: str
    model: str
    engine: str = "openai"
    api_key: str | None = None
    in_flight: int = 64
    tries: int = 8
    timeout: float = 600.0
    pause: float = 1.0
    thinking: bool | None = None


class ServerAnswering:
    """
    Asks a server for answers, many at a time.

    Args:
        server ([`Server`]): Whom.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The target's, for a server that gives texts and not token ids.
        max_new_tokens (`int`): Longest answer.
        stop_ids (`set[int]`): Tokens that end an answer.
        seed (`int`, *optional*, defaults to 0): Of sampled answers, together with what identifies the prompt.

    Raises:
        ValueError: The tokenizer has no chat template, so the server and the trainer would read different prompts.
    """

    def __init__(
        self,
        server: Server,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        stop_ids: set[int],
        seed: int = 0,
    ):
        if tokenizer.chat_template is None:
            raise ValueError(
                "a chat server cannot answer for a target whose tokenizer has no chat template; leave out --server, "
                "or give the tokenizer the template that the server uses."
            )
        self.server = server
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.stop_ids = stop_ids
        self.seed = seed
        self.answered = 0
        self.refused: list[str] = []
        """What the server said about prompts that it would not answer."""
        self.retokenised = 0
        """Answers whose text has another number of tokens than the server generated."""

    @cached_property
    def end(self) -> int:
        """What stands at the end of answers of which the server says nothing but that they ended."""
        return _end_of_answers(self.tokenizer, self.stop_ids)

    def ask(self, prompts: Iterable[Prompt], finished: Callable[[list[tuple[Prompt, list[int]]]], None]) -> None:
        """
        Ask for all answers.

        Args:
            prompts (iterable of [`Prompt`]): The prompts.
            finished (`Callable`): Told of every answer as it comes.

        Raises:
            ValueError: The server refuses the requests, or reads prompts differently.
            OSError: It does not answer, however often it is asked.
        """
        waiting = iter(prompts)
        asyncio.run(self._ask_all(waiting, finished))

    async def _ask_all(self, waiting: Iterator[Prompt], finished: Callable) -> None:
        # Without a key the client would show the server this machine's token for the Hub.
        key = self.server.api_key or "none"
        async with AsyncInferenceClient(base_url=self.server.url, api_key=key, timeout=self.server.timeout) as client:
            workers = [
                asyncio.create_task(self._work(client, waiting, finished)) for _ in range(self.server.in_flight)
            ]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, client: AsyncInferenceClient, waiting: Iterator[Prompt], finished: Callable) -> None:
        for prompt in waiting:  # shared by all workers: each prompt goes to one of them
            ids = await self._answer(client, prompt)
            if ids is not None:
                self.answered += 1
                finished([(prompt, ids)])

    async def _answer(self, client: AsyncInferenceClient, prompt: Prompt) -> list[int] | None:
        """The answer's tokens, or `None` if the server refuses this prompt."""
        pause = self.server.pause
        failure: Exception
        for number in range(1, self.server.tries + 1):
            try:
                return self._ids(prompt, await client.chat_completion(**self._request(prompt)))
            except HfHubHTTPError as error:
                if error.response.status_code not in BUSY:
                    self._refuse(error)
                    return None
                failure, asked = error, error.response.headers.get("Retry-After", "")
            except (_HTTP.TransportError, InferenceTimeoutError) as error:
                failure, asked = error, ""
            if number < self.server.tries:
                wait = float(asked) if asked.isdecimal() else pause * random.uniform(0.5, 1.0)
                await asyncio.sleep(min(wait, LONGEST_WAIT))
                pause *= 2
        raise OSError(
            f"{self.server.url} gave no answer in {self.server.tries} tries ({_said(failure)}); what was answered is "
            "kept, so start the command again when the server is up."
        ) from failure

    def _request(self, prompt: Prompt) -> dict:
        body = dict(ENGINES[self.server.engine])
        if self.server.engine == "transformers":
            # It samples only if the generation configuration says so, whatever the temperature.
            settings = {"do_sample": True, "top_k": 0} if prompt.temperature > 0 else {"do_sample": False}
            body["generation_config"] = json.dumps({**settings, "repetition_penalty": 1.0})
        if self.server.thinking is not None:
            body["chat_template_kwargs"] = {SWITCH: self.server.thinking}
        sampling = {"seed": prompt.seed(self.seed) % 2**31, "top_p": 1.0} if prompt.temperature > 0 else {}
        messages = prompt.given
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return {
            "messages": messages,
            "model": self.server.model,
            "max_tokens": self.max_new_tokens,
            "temperature": prompt.temperature,
            "extra_body": body or None,
            **sampling,
        }

    def _ids(self, prompt: Prompt, reply: ChatCompletionOutput) -> list[int]:
        """The answer's tokens: the server's own, or those of its text, with the one that ended it."""
        # By attributes: in the reply as a dict, what the client does not know is left out.
        choice, message = reply.choices[0], reply.choices[0].message
        reason, usage = choice.finish_reason, dict(reply.usage or {})
        read = usage.get("prompt_tokens")
        if read not in (None, len(prompt.input_ids)):
            raise ValueError(
                f"the server read {read} tokens where the target's chat template makes {len(prompt.input_ids)}, so a "
                "drafter would be trained on other prompts; serve the target with its own tokenizer and template."
            )
        own = choice.get("token_ids")
        apart = [name for name in ("reasoning", "reasoning_content", "tool_calls") if message.get(name)]
        if reason not in ("stop", "length") or (apart and not own):
            raise ValueError(
                f"the server took an answer apart (finish_reason {reason}, {', '.join(apart) or 'content'}), so its "
                "text is not all that the target wrote; start it without parsers for reasoning and tool calls."
            )
        ids = list(own) if own else self.tokenizer.encode(message.get("content") or "", add_special_tokens=False)
        if reason == "stop" and not (ids and ids[-1] in self.stop_ids):
            ids.append(self.end)
        self.retokenised += usage.get("completion_tokens") not in (None, len(ids))
        return ids

    def _refuse(self, error: HfHubHTTPError) -> None:
        """Note that a prompt was refused; raise if it is not about the prompt."""
        status = error.response.status_code
        self.refused.append(_said(error))
        if status not in OF_THE_PROMPT or (self.answered == 0 and len(self.refused) >= REFUSALS):
            raise ValueError(
                f"{self.server.url} refuses to answer as {self.server.model} ({_said(error)}); check --server, "
                "--model, --engine and --api-key."
            ) from error


def _end_of_answers(tokenizer: PreTrainedTokenizerBase, stop_ids: set[int]) -> int:
    """
    What the target most likely ends an answer with: what the chat template puts behind one, which may be another token
    than the tokenizer's EOS.
    """
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ANSWER}]
    _, found, behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(ANSWER)
    ids = tokenizer.encode(behind.lstrip(), add_special_tokens=False) if found else []
    if ids and ids[0] in stop_ids:
        return ids[0]
    return min(stop_ids) if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def _said(error: Exception) -> str:
    """The server's own words, or else the client's."""
    if isinstance(error, HfHubHTTPError):
        return f"status {error.response.status_code}: {error.response.text[:300]}"
    return f"{type(error).__name__}: {error}"
