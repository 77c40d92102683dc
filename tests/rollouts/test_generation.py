from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.models.tiny import tiny_tokenizer
from tests.rollouts.engines import Engine, FakeLLM, Server, fake_vllm, serving
from tests.rollouts.test_sampling import ids, model, prompts
from tpmm_pl.rollouts import ServerGeneration, TransformersGeneration, VLLMGeneration
from tpmm_pl.rollouts.generation import Generation, Policy, Sampling
from tpmm_pl.types import InputError, RunError

GREEDY = Sampling(
    samples=2, max_new_tokens=12, temperature=0.0, key="0/1/pairs", batch_size=8, title="sampling"
)
DRAWN = replace(GREEDY, temperature=1.0)
ENGINES = ["server", "vllm"]


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server(Engine())) as running:
        yield running


@pytest.fixture
def engine(
    request: pytest.FixtureRequest, server: Server, monkeypatch: pytest.MonkeyPatch
) -> Generation:
    if request.param == "server":
        return ServerGeneration([f"{server.url}/v1/"], attempts=1)
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm())
    return VLLMGeneration()


def policy(root: Path, made: nn.Module | None = None) -> Policy:
    weights = model() if made is None else made
    return Policy(weights.eval(), tiny_tokenizer(), root / "run/.generation/001", nullcontext)


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_an_engine_completes_as_the_policy_itself_does(engine: Generation, tmp_path: Path) -> None:
    # other weights at the second time: those of the first must be gone
    for scale in (4.0, 3.0):
        own = policy(tmp_path, model(scale=scale))
        expected = TransformersGeneration()(own, prompts(), GREEDY)
        made = engine(own, prompts(), GREEDY)
        assert [(c.prompt, c.index) for c in made] == [(c.prompt, c.index) for c in expected]
        assert ids(made) == ids(expected)
        assert [(c.text, c.finished) for c in made] == [(c.text, c.finished) for c in expected]
        assert [c.logps for c in made] == pytest.approx([c.logps for c in expected], abs=1e-4)
        assert not own.folder.exists()
    assert engine(own, [], GREEDY) == []


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_adapters_are_merged_into_a_copy(engine: Generation, tmp_path: Path) -> None:
    adapted = get_peft_model(model(), LoraConfig(task_type="CAUSAL_LM", r=2))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    own = policy(tmp_path, adapted)
    expected = TransformersGeneration()(own, prompts(), GREEDY)
    assert ids(engine(own, prompts(), GREEDY)) == ids(expected)
    assert ids(expected) != ids(TransformersGeneration()(policy(tmp_path), prompts(), GREEDY))
    after = adapted.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_the_same_key_draws_the_same_and_another_prompt_anew(
    engine: Generation, tmp_path: Path
) -> None:
    own = policy(tmp_path)
    twins = [*prompts()[:1], replace(prompts()[0], prompt_id="twin")]
    first = engine(own, twins, DRAWN)
    assert engine(own, twins, DRAWN) == first
    assert len({completion.ids for completion in first}) > 2
    assert ids(engine(own, twins[1:], DRAWN)) == {
        k: i for k, i in ids(first).items() if k[0] == "twin"
    }
    assert ids(engine(own, twins, replace(DRAWN, key="0/2/pairs"))) != ids(first)


def test_vllm_sleeps_after_every_stage_also_where_one_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm())
    engine = VLLMGeneration(max_model_len=64, engine={"enforce_eager": True})
    engine(policy(tmp_path), prompts(), GREEDY)
    (llm,) = FakeLLM.made
    assert llm.awake == set()
    wanted = {"dtype": "bfloat16", "max_model_len": 64, "gpu_memory_utilization": 0.4}
    assert llm.settings == {**wanted, "enforce_eager": True}
    monkeypatch.setattr(llm, "generate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine(policy(tmp_path), prompts(), GREEDY)
    assert llm.awake == set()
    assert len(FakeLLM.made) == 1


def test_a_missing_vllm_is_named_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        InputError, match=r"install it with pip install 'tpmm_pl\[vllm\]', or leave"
    ):
        VLLMGeneration()(policy(tmp_path), prompts(), GREEDY)
    assert not policy(tmp_path).folder.exists()


def test_prompts_are_dealt_over_all_servers(tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(Server(Engine()))) for _ in range(2)]
        engine = ServerGeneration([server.url for server in servers], attempts=1)
        made = engine(policy(tmp_path), prompts(), GREEDY)
    assert ids(made) == ids(TransformersGeneration()(policy(tmp_path), prompts(), GREEDY))
    bodies = [[body for path, body in s.asked if path == "/v1/completions"] for s in servers]
    assert [len(asked) for asked in bodies] == [3, 2]
    for server in servers:
        loaded = [
            path for path, _ in server.asked if path in ("/collective_rpc", "/reset_prefix_cache")
        ]
        assert loaded == ["/collective_rpc", "/reset_prefix_cache"]
    body = bodies[0][0]
    assert body["model"] == "policy"
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert {name: body[name] for name in neutral} == neutral
    assert len({asked["seed"] for asked in [*bodies[0], *bodies[1]]}) == 5


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_is_busy_is_asked_again(status: int, server: Server, tmp_path: Path) -> None:
    server.faults = [(status, "", {})] * 2
    engine = ServerGeneration([server.url], attempts=3, backoff=0.0)
    assert len(engine(policy(tmp_path), prompts(), GREEDY)) == 10
    assert [path for path, _ in server.asked[:3]] == ["/collective_rpc"] * 3


def test_what_a_server_does_not_answer_the_next_one_is_asked(server: Server) -> None:
    dead = "http://127.0.0.1:1"
    engine = ServerGeneration([dead, server.url], attempts=2, backoff=0.0)
    answer = {"data": [{"id": "policy"}]}
    assert engine.servers.ask("/v1/models") == (f"{server.url}/v1/models", answer)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (
            (401, "", {}),
            r"/collective_rpc answers 401 .*; put the server's key into the environment",
        ),
        (
            (404, "", {}),
            r"/collective_rpc answers 404 .*; check the URL, and start vLLM with VLLM_S",
        ),
        ((400, "no\nsuch", {}), r"/collective_rpc answers 400 .*; it says: no such$"),
        ((302, "", {"Location": "/x"}), r"/collective_rpc answers 302 "),
    ],
)
def test_a_refusal_is_one_sentence_and_final(
    fault: tuple[int, str, dict[str, str]], sentence: str, server: Server, tmp_path: Path
) -> None:
    server.faults = [fault]
    with pytest.raises(InputError, match=sentence) as refusal:
        ServerGeneration([server.url], attempts=3)(policy(tmp_path), prompts(), GREEDY)
    assert "\n" not in str(refusal.value)
    assert len(server.asked) == 1
    assert not policy(tmp_path).folder.exists()


@pytest.mark.parametrize("fault", [(503, "", {}), (200, "<html>", {})])
def test_a_server_that_never_answers_ends_the_run_in_one_sentence(
    fault: tuple[int, str, dict[str, str]], server: Server, tmp_path: Path
) -> None:
    server.faults = [fault] * 3
    engine = ServerGeneration([server.url], attempts=3, backoff=0.0)
    with pytest.raises(
        RunError, match=r"after 3 attempts; see to the server, then go on with --ckp"
    ):
        engine(policy(tmp_path), prompts(), GREEDY)


@pytest.mark.parametrize(
    "answer", [{}, {"choices": []}, {"choices": [{"index": 0, "text": "w1"}] * 2}, [1]]
)
def test_an_answer_without_tokens_is_refused(
    answer: Any, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ServerGeneration(["http://127.0.0.1:1", server.url], attempts=2, backoff=0.0)
    monkeypatch.setattr(engine, "_load", lambda folder: None)  # the first server never answers
    given = server.answer

    def without_tokens(path: str, body: Any, key: str | None) -> tuple[int, str, dict[str, str]]:
        if path == "/v1/completions":
            return 200, json.dumps(answer), {}
        return given(path, body, key)

    monkeypatch.setattr(server, "answer", without_tokens)
    sentence = f"^{server.url}/v1/completions answers without 2 completions of token_ids"
    with pytest.raises(InputError, match=sentence):
        engine(policy(tmp_path), prompts(), GREEDY)


@pytest.mark.parametrize(
    "answer",
    [None, [], "no", {}, {"data": None}, {"data": []}, {"data": [{}]}, {"data": [{"id": 1}]}],
)
def test_an_answer_that_names_no_model_is_one_sentence(
    answer: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ServerGeneration([server.url])
    monkeypatch.setattr(server, "answer", lambda *_: (200, json.dumps(answer), {}))
    sentence = f"{server.url}/v1/models answers {answer!r}, which names no model; check"
    with pytest.raises(InputError, match=f"^{re.escape(sentence)}"):
        engine.servers.model()


def test_the_key_is_the_environments_and_reaches_the_server_alone(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLICY_KEY", " secret-4711\n")
    server.key = "secret-4711"
    engine = ServerGeneration([server.url], api_key_env="POLICY_KEY", attempts=1)
    engine(policy(tmp_path), prompts(), GREEDY)
    assert set(server.keys) == {"Bearer secret-4711"}
    assert "secret" not in repr([vars(engine), vars(engine.servers)])


@pytest.mark.parametrize("status", [400, 401, 403, 404, 503])
def test_no_error_says_the_key(
    status: int, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLICY_KEY", "secret-4711")
    server.faults = [(status, "the key secret-4711 is wrong", {})]
    engine = ServerGeneration([server.url], api_key_env="POLICY_KEY", attempts=1)
    with pytest.raises((InputError, RunError)) as error:
        engine(policy(tmp_path), prompts(), GREEDY)
    chain = [error.value, error.value.__cause__, error.value.__context__]
    assert not any("secret" in f"{one} {one!r}" for one in chain)


@pytest.mark.parametrize("key", ["", "  ", "two\nlines", "schlüssel"])
def test_a_key_that_is_none_is_refused_unquoted(
    key: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLICY_KEY", key)
    engine = ServerGeneration([server.url], api_key_env="POLICY_KEY")
    with pytest.raises(InputError, match="POLICY_KEY holds no key; set it to"):
        engine.servers.ask("/v1/models")
    assert server.asked == []


def test_a_redirect_does_not_carry_the_key_elsewhere(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLICY_KEY", "secret-4711")
    with serving(Server(Engine())) as other:
        for status in (301, 302, 303, 307, 308):
            server.faults = [(status, "", {"Location": f"{other.url}/v1/models"})]
            engine = ServerGeneration([server.url], api_key_env="POLICY_KEY")
            with pytest.raises(InputError, match=f"answers {status}"):
                engine.servers.ask("/v1/models")
    assert other.asked == []


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"urls": []}, "give at least one"),
        ({"urls": ["node1:8000"]}, "node1:8000 is no URL of a server"),
        ({"urls": ["file:///etc/passwd"]}, "is no URL of a server"),
        (
            {"urls": ["http://me:secret@node1"]},
            "^a URL of node1 holds a password; put the key into",
        ),
        ({"urls": ["http://node1"], "attempts": 0}, "attempts 0"),
        ({"urls": ["http://node1"], "concurrency": 0}, "concurrency is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as refusal:
        ServerGeneration(**settings)
    assert "secret" not in str(refusal.value)
