"""Completions by a vLLM engine in this process, which shares the device with training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from tpmm_pl import processes
from tpmm_pl.rollouts.generation import Policy, Sampling, written_policy
from tpmm_pl.rollouts.sampling import completion, end_ids
from tpmm_pl.types import Completion, InputError, Prompt


class VLLMGeneration:
    """Samples by vLLM, one engine a process; between stages it sleeps and holds no memory.

    The engine is given the policy's weights through a folder at every stage. Samples of a prompt
    share its prefill. vLLM draws noise of its own: a seed a prompt makes a stage repeatable as far
    as its kernels are, and other completions than those of transformers.

    Args:
        gpu_memory_utilization: Share of the device's memory that the engine may take.
        dtype: In which it computes.
        max_model_len: Tokens of prompt and completion; the model's own by default.
        engine: Further arguments of ``vllm.LLM``, as ``{enforce_eager: true}``.
    """

    def __init__(
        self,
        gpu_memory_utilization: float = 0.4,
        dtype: str = "bfloat16",
        max_model_len: int | None = None,
        engine: dict[str, Any] | None = None,
    ) -> None:
        self.gpu_memory_utilization = gpu_memory_utilization
        self.dtype = dtype
        self.max_model_len = max_model_len
        self.engine = engine or {}
        self._llm: Any = None

    def __call__(
        self, policy: Policy, prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[Completion]:
        """Give the engine the policy's weights, sample, and put it to sleep.

        Raises:
            InputError: If vLLM is not installed.
        """
        vllm = _vllm()
        with written_policy(policy) as folder:
            self._wake(vllm, str(folder))
            processes.wait()  # nobody reads the folder any more when it is deleted
        try:
            return self._sample(vllm, policy, prompts, sampling)
        finally:
            self._llm.sleep(level=2)

    def _wake(self, vllm: Any, folder: str) -> None:
        if self._llm is None:
            self._llm = vllm.LLM(
                model=folder,
                dtype=self.dtype,
                max_model_len=self.max_model_len,
                gpu_memory_utilization=self.gpu_memory_utilization,
                enable_sleep_mode=True,
                **_beside_others(),
                **self.engine,
            )
            return
        # weights before the cache: both at once with the old ones may not fit
        self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self._llm.wake_up(tags=["kv_cache"])
        self._llm.reset_prefix_cache()

    def _sample(
        self, vllm: Any, policy: Policy, prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[Completion]:
        ends = end_ids(policy.model, policy.tokenizer)
        settings = [
            vllm.SamplingParams(
                n=sampling.samples,
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                seed=sampling.seed(prompt),
                stop_token_ids=list(ends),
                logprobs=0,  # of the sampled token alone
                detokenize=False,
            )
            for prompt in prompts
        ]
        asked = [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts]
        answers = self._llm.generate(asked, settings) if prompts else []
        return [
            completion(prompt, index, one.token_ids, _logps(one), policy.tokenizer, ends)
            for prompt, answer in zip(prompts, answers, strict=True)
            for index, one in enumerate(answer.outputs)
        ]


def _logps(output: Any) -> list[float]:
    steps = zip(output.token_ids, output.logprobs, strict=True)
    return [of_step[token].logprob for token, of_step in steps]


def _vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise InputError(
            f"vLLM cannot be imported ({error}); install it with pip install 'tpmm_pl[vllm]', or"
            " leave pairs.generation out and let transformers generate"
        ) from error
    return vllm


def _beside_others() -> dict[str, str]:
    # one engine a process in the group that is up, found through what torchrun sets
    if processes.count() == 1:
        return {}
    os.environ.setdefault("RANK", str(processes.rank()))
    os.environ.setdefault("WORLD_SIZE", str(processes.count()))
    return {"distributed_executor_backend": "external_launcher"}
