"""Completions by vLLM servers elsewhere, over their OpenAI-compatible interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tqdm.auto import tqdm

from tpmm_pl import processes
from tpmm_pl.rollouts.endpoint import Endpoints
from tpmm_pl.rollouts.generation import Policy, Sampling, written_policy
from tpmm_pl.rollouts.sampling import completion, end_ids
from tpmm_pl.types import Completion, InputError, Prompt

T = TypeVar("T")


class ServerGeneration:
    """Samples by servers that ``vllm serve`` has started, prompts dealt over them.

    At every stage the servers load the policy's weights from a folder below the run's, which they
    must see at the same path. They draw noise of their own: a seed a prompt makes a stage
    repeatable as far as their kernels are.

    Args:
        urls: Of the servers, as ``http://node1:8000``.
        api_key_env: Name of the environment variable that holds their key; the key itself belongs
            into no config.
        timeout: Seconds a request may take.
        attempts: How often a request is made, each time at the next server.
        backoff: Seconds before the second attempt; twice as many before each further one.
        concurrency: Prompts in flight at a server and process.

    Raises:
        InputError: If a setting cannot be.
    """

    def __init__(
        self,
        urls: list[str],
        api_key_env: str | None = None,
        timeout: float = 600.0,
        attempts: int = 5,
        backoff: float = 1.0,
        concurrency: int = 64,
    ) -> None:
        if concurrency < 1:
            raise InputError(f"concurrency is {concurrency}; it must be at least 1")
        self.servers = _Servers(urls, api_key_env, timeout, attempts, backoff)
        self.concurrency = concurrency

    def __call__(
        self, policy: Policy, prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[Completion]:
        """Have the servers load the policy's weights, then ask them.

        Raises:
            InputError: If a server refuses, or answers without a model or tokens.
            RunError: If none answers.
        """
        with written_policy(policy) as folder:
            processes.from_first(lambda: self._load(str(folder)))
        model = self.servers.model()
        ends = end_ids(policy.model, policy.tokenizer)
        common = {
            "model": model,
            "n": sampling.samples,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            # the model's own settings of generation would bend the softmax that is sampled
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(ends),
            "logprobs": 1,
            "return_token_ids": True,
        }

        def ask(numbered: tuple[int, Prompt]) -> list[tuple[list[int], list[float]]]:
            number, prompt = numbered
            body = {**common, "prompt": list(prompt.ids), "seed": sampling.seed(prompt)}
            url, answer = self.servers.ask("/v1/completions", body, first=number)
            return _tokens(url, answer, sampling.samples)

        return [
            completion(prompt, index, *made, policy.tokenizer, ends)
            for prompt, answer in zip(prompts, self._each(ask, prompts, sampling), strict=True)
            for index, made in enumerate(answer)
        ]

    def _each(
        self, ask: Callable[[tuple[int, Prompt]], T], prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[T]:
        pool = ThreadPoolExecutor(self.concurrency * len(self.servers.urls))
        try:
            answers = pool.map(ask, enumerate(prompts))
            bar = tqdm(answers, sampling.title, len(prompts), False, unit="prompt", disable=None)
            return list(bar)
        finally:
            # where one prompt is refused the others need not be asked
            pool.shutdown(cancel_futures=True)

    def _load(self, folder: str) -> None:
        reload = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        self.servers.ask_each("/collective_rpc", reload)
        self.servers.ask_each("/reset_prefix_cache", {})


class _Servers(Endpoints):
    """Servers whose answers come with the URL of the one that has answered."""

    def model(self) -> str:
        """Return the name of the model that they serve."""
        url, answer = self.ask("/v1/models")
        try:
            if isinstance(name := answer["data"][0]["id"], str):
                return name
        except (LookupError, TypeError):
            pass
        said = self._without_key(repr(answer))[:200]
        raise InputError(
            f"{url} answers {said}, which names no model; check that the URL is a vLLM server's"
        )

    def _send(self, url: str, body: Any) -> tuple[str, Any]:
        return url, super()._send(url, body)


def _tokens(url: str, answer: Any, samples: int) -> list[tuple[list[int], list[float]]]:
    try:
        ordered = sorted(answer["choices"], key=lambda choice: choice["index"])
        made = [(one["token_ids"], one["logprobs"]["token_logprobs"]) for one in ordered]
    except (LookupError, TypeError):
        made = []
    if len(made) != samples or any(not ids or len(ids) != len(logps) for ids, logps in made):
        raise InputError(
            f"{url} answers without {samples} completions of token_ids and log-probabilities; it"
            " must be a vLLM that knows return_token_ids"
        )
    return made
