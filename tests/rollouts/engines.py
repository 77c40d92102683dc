"""Engines beside the run, made of transformers: what vLLM answers, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from types import SimpleNamespace
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from tpmm_pl.rollouts import sample_completions
from tpmm_pl.types import Prompt


class Engine:
    """Loads a policy from a folder and completes prompts, the most likely tokens or drawn ones."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.model: Any = None
        self._lock = Lock()
        if folder is not None:
            self.load(folder)

    def load(self, folder: str | Path) -> None:
        assert Path(folder).is_absolute()
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def complete(
        self, prompt: Sequence[int], n: int, max_tokens: int, temperature: float, seed: int
    ) -> list[tuple[list[int], list[float]]]:
        """Return tokens and log-probabilities of each sample."""
        with self._lock:
            made = sample_completions(
                self.model,
                self.tokenizer,
                [Prompt("", "", tuple(prompt))],
                samples=n,
                max_new_tokens=max_tokens,
                temperature=temperature,
                key=str(seed),
            )
        # all of a completion's log-probability at its first token: only the sum is looked at
        return [(list(c.ids), [c.logps, *[0.0] * (len(c.ids) - 1)]) for c in made]


class Server:
    """A server that speaks what ``vllm serve`` speaks; its ``faults`` are answered first."""

    def __init__(self, engine: Engine, key: str | None = None) -> None:
        self.engine = engine
        self.key = key
        self.asked: list[tuple[str, Any]] = []
        self.keys: list[str | None] = []
        self.faults: list[tuple[int, str, dict[str, str]]] = []
        self.url = ""

    def answer(self, path: str, body: Any, key: str | None) -> tuple[int, str, dict[str, str]]:
        self.asked.append((path, body))
        self.keys.append(key)
        if self.faults:
            return self.faults.pop(0)
        if self.key is not None and key != f"Bearer {self.key}":
            return 401, f"the key {key} is wrong", {}
        if path == "/v1/models":
            return 200, json.dumps({"data": [{"id": "policy"}]}), {}
        if path == "/collective_rpc" and body["method"] == "reload_weights":
            self.engine.load(body["kwargs"]["weights_path"])
            return 200, "", {}
        if path == "/reset_prefix_cache":
            return 200, "", {}
        if path != "/v1/completions":
            return 404, "", {}
        names = ("prompt", "n", "max_tokens", "temperature", "seed")
        made = self.engine.complete(*(body[name] for name in names))
        choices = [
            {"index": index, "token_ids": ids, "logprobs": {"token_logprobs": logps}}
            for index, (ids, logps) in enumerate(made)
        ]
        return 200, json.dumps({"choices": choices[::-1]}), {}


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Run a server on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(content) if content else None
            status, text, headers = server.answer(
                self.path, body, self.headers.get("Authorization")
            )
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(text))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST

        def log_message(self, *_: Any) -> None: ...

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listening.server_port}"
    thread = Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


class FakeLLM:
    """As ``vllm.LLM``, as far as it is called."""

    made: list[FakeLLM]

    def __init__(self, model: str, **settings: Any) -> None:
        assert settings.pop("enable_sleep_mode")
        self.settings = settings
        self.awake = {"weights", "kv_cache"}
        self.cached: list[tuple[int, ...]] = []
        self._engine = Engine(model)
        FakeLLM.made.append(self)

    def sleep(self, level: int) -> None:
        assert level == 2
        self.awake = set()
        self._engine.model = None

    def wake_up(self, tags: list[str]) -> None:
        self.awake |= set(tags)

    def collective_rpc(self, method: str, kwargs: dict[str, str]) -> None:
        assert method == "reload_weights"
        assert self.awake == {"weights"}
        self._engine.load(kwargs["weights_path"])

    def reset_prefix_cache(self) -> None:
        self.cached = []

    def generate(self, prompts: list[dict[str, list[int]]], settings: list[Any]) -> list[Any]:
        assert self.awake == {"weights", "kv_cache"}
        assert not self.cached
        answers = []
        for prompt, wanted in zip(prompts, settings, strict=True):
            ids = prompt["prompt_token_ids"]
            self.cached.append(tuple(ids))
            made = self._engine.complete(
                ids, wanted.n, wanted.max_tokens, wanted.temperature, wanted.seed
            )
            outputs = [
                SimpleNamespace(
                    token_ids=tokens,
                    logprobs=[
                        # the most likely token comes along
                        {token: SimpleNamespace(logprob=one), -1: SimpleNamespace(logprob=7.0)}
                        for token, one in zip(tokens, logps, strict=True)
                    ],
                )
                for tokens, logps in made
            ]
            answers.append(SimpleNamespace(outputs=outputs))
        return answers


def fake_vllm() -> SimpleNamespace:
    """Return a module whose engines are counted in ``FakeLLM.made``."""
    FakeLLM.made = []
    return SimpleNamespace(LLM=FakeLLM, SamplingParams=SimpleNamespace)
