# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json

import pytest
from chat_server import ChatServer, completion
from tokenizers import decoders
from training_for_tests import ALPHABET, char_tokenizer

from specblock_hf.data.examples import prompt_key, render_prompt
from specblock_hf.regeneration import server as serving
from specblock_hf.regeneration.answering import Prompt
from specblock_hf.regeneration.server import Server, ServerAnswering


EOS = ALPHABET.index("3")


def tokenizer():
    made = char_tokenizer()
    made.backend_tokenizer.decoder = decoders.Fuse()
    return made


def prompts(count: int, temperature: float = 0.0) -> list[Prompt]:
    made = []
    for number in range(count):
        messages = [{"role": "user", "content": f"a{ALPHABET[2 + number // 26]}{ALPHABET[2 + number % 26]}"}]
        ids = tuple(render_prompt(tokenizer(), messages))
        given = messages if number % 2 else messages[0]["content"]
        made.append(Prompt(given, "s", prompt_key(messages), ids, temperature, sample=number))
    return made


def ask(server: ChatServer, waiting: list[Prompt], finished=None, **settings) -> tuple[dict, ServerAnswering]:
    found: dict[Prompt, list[int]] = {}
    settings = {"pause": 0.01, "in_flight": 4, "tries": 3} | settings
    asking = ServerAnswering(Server(server.url, "m", **settings), tokenizer(), 7, {EOS})
    asking.ask(waiting, finished or (lambda pairs: found.update({p.name: ids for p, ids in pairs})))
    return found, asking


def echo(body: dict) -> tuple[int, dict, dict]:
    """The prompt turned round."""
    text = body["messages"][-1]["content"][::-1]
    return 200, completion(text, prompt_tokens=len(text) + 1, completion_tokens=len(text) + 1), {}


def reversed_ids(prompt: Prompt) -> list[int]:
    return [*prompt.input_ids[-2::-1], EOS]


@pytest.mark.parametrize("thinking", [None, True, False])
def test_a_server_is_told_whether_the_target_thinks(thinking):
    with ChatServer(echo) as server:
        ask(server, prompts(1), engine="vllm", thinking=thinking)
    (body,) = server.bodies
    assert body.get("chat_template_kwargs") == (None if thinking is None else {"enable_thinking": thinking})


def test_every_prompt_is_asked_once_and_many_at_a_time():
    waiting = prompts(60)
    with ChatServer(echo, delay=0.05) as server:
        found, asking = ask(server, waiting, in_flight=8)
    assert found == {p.name: reversed_ids(p) for p in waiting}
    assert len(server.bodies) == 60 and asking.answered == 60 and asking.retokenised == 0
    assert 4 <= server.most_at_once <= 8
    assert {body["path"] for body in server.bodies} == {"/v1/chat/completions"}


def test_greedy_and_sampled_requests():
    waiting = prompts(2) + prompts(2, 0.7)
    with ChatServer(echo) as server:
        ask(server, waiting, in_flight=1)
    greedy, _, sampled, other = server.bodies
    fixed = {"path": "/v1/chat/completions", "model": "m", "max_tokens": 7, "stream": False}
    assert greedy == {**fixed, "messages": [{"role": "user", "content": "aaa"}], "temperature": 0.0}
    assert sampled.keys() == {*greedy.keys(), "seed", "top_p"}
    assert (sampled["temperature"], sampled["top_p"]) == (0.7, 1.0)
    assert sampled["seed"] == waiting[2].seed(0) % 2**31 != other["seed"]


@pytest.mark.parametrize(
    ("engine", "temperature", "more"),
    [
        ("vllm", 0.0, {"return_token_ids": True, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}),
        ("sglang", 1.0, {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}),
        ("transformers", 0.0, {"generation_config": {"do_sample": False, "repetition_penalty": 1.0}}),
        ("transformers", 1.0, {"generation_config": {"do_sample": True, "top_k": 0, "repetition_penalty": 1.0}}),
    ],
)
def test_what_engines_are_told_beside(engine, temperature, more):
    with ChatServer(echo) as server:
        ask(server, prompts(1, temperature), engine=engine)
    (body,) = server.bodies
    if "generation_config" in body:
        body["generation_config"] = json.loads(body["generation_config"])
    standard = {"path", "model", "messages", "max_tokens", "temperature", "seed", "top_p", "stream"}
    assert {name: value for name, value in body.items() if name not in standard} == more


def test_the_hubs_token_stays_here(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with ChatServer(echo) as server:
        ask(server, prompts(1))
        assert server.keys == {"Bearer none"}
        ask(server, prompts(1), api_key="theirs")
    assert server.keys == {"Bearer none", "Bearer theirs"}


def test_an_answer_cut_off_has_no_end_and_token_ids_are_taken_as_they_are():
    replies = {
        "aaa": completion("bc", "length", completion_tokens=2),
        "aab": completion("bc", token_ids=[4, 1, EOS], completion_tokens=3, reasoning_content="b"),
        "aac": completion("bc", token_ids=[4], completion_tokens=2),
        "aad": completion("", completion_tokens=4),
    }
    waiting = prompts(4)
    with ChatServer(lambda body: (200, replies[body["messages"][-1]["content"]], {})) as server:
        found, asking = ask(server, waiting)
    assert [found[p.name] for p in waiting] == [[3, 4], [4, 1, EOS], [4, EOS], [EOS]]
    assert asking.retokenised == 1  # the last: four tokens that left no text


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 0])
def test_a_busy_server_is_asked_again(status):
    waiting = prompts(5)
    failed: set[str] = set()

    def once(body: dict):
        text = body["messages"][-1]["content"]
        if text not in failed:
            failed.add(text)
            return status, {"error": "busy"}, {}
        return echo(body)

    with ChatServer(once) as server:
        found, _ = ask(server, waiting)
    assert found == {p.name: reversed_ids(p) for p in waiting} and len(server.bodies) == 10


def test_pauses_grow_and_the_servers_wish_comes_first(monkeypatch):
    pauses = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(serving.asyncio, "sleep", sleep)
    replies = [(503, {}, {}), (503, {}, {}), (429, {}, {"Retry-After": "7"}), (429, {}, {"Retry-After": "900"})]
    with ChatServer(lambda body: replies.pop(0) if replies else echo(body)) as server:
        ask(server, prompts(1), tries=6, pause=1.0)
    first, second, *wished = pauses
    assert 0.5 <= first <= 1.0 and 1.0 <= second <= 2.0 and wished == [7.0, 60.0]


def test_a_server_that_stays_down_ends_the_run_with_what_was_answered():
    kept = []

    def down_at_last(body: dict):
        return echo(body) if len(server.bodies) <= 5 else (503, {"error": "restarting"}, {})

    with ChatServer(down_at_last) as server:
        with pytest.raises(OSError, match=r"gave no answer in 3 tries \(status 503.*restarting.*what was answered is"):
            ask(server, prompts(30), finished=kept.extend)
    assert len(kept) == 5
    with pytest.raises(OSError, match="gave no answer in 2 tries .*start the command again when the server is up"):
        ask(server, prompts(1), tries=2)  # nobody listens any more


def test_a_prompt_that_is_refused_is_left_out():
    def too_long(body: dict):
        wrong = body["messages"][-1]["content"] == "aac"
        return (400, {"error": "5000 tokens are too many"}, {}) if wrong else echo(body)

    waiting = prompts(5)
    with ChatServer(too_long) as server:
        found, asking = ask(server, waiting)
    assert found.keys() == {p.name for p in waiting} - {waiting[2].name} and len(server.bodies) == 5
    assert asking.refused == ['status 400: {"error": "5000 tokens are too many"}']


@pytest.mark.parametrize(("status", "requests"), [(401, 1), (404, 1), (422, 1), (400, 16)])
def test_requests_that_are_all_refused_end_the_run(status, requests):
    with ChatServer(lambda body: (status, {"error": "no such model"}, {})) as server:
        with pytest.raises(ValueError, match=f"refuses to answer as m .status {status}.*no such model.*--model"):
            ask(server, prompts(40), in_flight=1)
    assert len(server.bodies) == requests


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (completion("a", prompt_tokens=40), "the server read 40 tokens where the target's chat template makes 4"),
        (completion("a", reasoning_content="b"), r"took an answer apart \(finish_reason stop, reasoning_content\)"),
        (completion("a", reasoning="b"), r"took an answer apart \(finish_reason stop, reasoning\)"),
        (completion("a", "content_filter"), r"took an answer apart \(finish_reason content_filter, content\)"),
    ],
)
def test_answers_that_are_not_the_targets_are_refused(reply, message):
    with ChatServer(lambda body: (200, reply, {})) as server, pytest.raises(ValueError, match=message):
        ask(server, prompts(3))


def test_a_tokenizer_without_a_template_is_refused():
    bare = tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template; leave out --server, or"):
        ServerAnswering(Server("http://127.0.0.1:9/v1", "m"), bare, 7, {EOS})


@pytest.mark.parametrize(
    ("behind", "stops", "end"),
    [
        ("{{ ' 2' }}", "23", "2"),  # as Llama 3 ends a turn, with another token than the EOS of its tokenizer
        ("{{ '2\n' }}", "3", "3"),  # which ends turns and stops nothing
        ("", "23", "3"),
    ],
)
def test_an_answer_ends_with_what_the_template_puts_behind_it(behind, stops, end):
    made = tokenizer()
    said = "{{ m['content'] }}{% if m['role'] == 'assistant' %}" + behind + "{% endif %}"
    made.chat_template = made.chat_template.replace("{{ m['content'] }}", said)
    stop_ids = {ALPHABET.index(token) for token in stops}
    with ChatServer(echo) as server:
        asking, found = ServerAnswering(Server(server.url, "m"), made, 7, stop_ids), []
        asking.ask(prompts(1), found.extend)
    ((prompt, ids),) = found
    assert ids == [*prompt.input_ids[-2::-1], ALPHABET.index(end)]


def test_a_tokenizer_without_an_eos_has_its_answers_end_with_a_stop_token():
    made = tokenizer()
    made.eos_token = None
    assert ServerAnswering(Server("http://127.0.0.1:9/v1", "m"), made, 7, {9, 5}).end == 5
