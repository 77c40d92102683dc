"""Completions of the policy: sampled here, in several processes, or by an engine beside it."""

from tpmm_pl.rollouts.generation import TransformersGeneration
from tpmm_pl.rollouts.sampling import sample_completions
from tpmm_pl.rollouts.server import ServerGeneration
from tpmm_pl.rollouts.sharing import sample_shared
from tpmm_pl.rollouts.vllm_engine import VLLMGeneration

__all__ = [
    "ServerGeneration",
    "TransformersGeneration",
    "VLLMGeneration",
    "sample_completions",
    "sample_shared",
]
