"""Callbacks that keep a trajectory of policies and make the reference from it."""

if __name__ != "tpmm_pl.callbacks":
    raise ImportError("import tpmm_pl.callbacks; this folder is a part of the package tpmm_pl")

from tpmm_pl.callbacks.expert_usage import ExpertUsage
from tpmm_pl.callbacks.mixed_pairs import MixedPairs
from tpmm_pl.callbacks.model_export import ModelExport
from tpmm_pl.callbacks.offline_pairs import OfflinePairs
from tpmm_pl.callbacks.on_policy_pairs import OnPolicyPairs
from tpmm_pl.callbacks.reference_merge import ReferenceMerge
from tpmm_pl.callbacks.reward_evaluation import RewardEvaluation
from tpmm_pl.callbacks.reward_export import RewardExport
from tpmm_pl.callbacks.round_checkpoint import FitCheckpoint, RoundCheckpoint
from tpmm_pl.callbacks.round_context import RoundContext
from tpmm_pl.callbacks.round_end import RoundCallback, finish_round
from tpmm_pl.callbacks.round_evaluation import RoundEvaluation
from tpmm_pl.callbacks.trajectory_snapshot import TrajectorySnapshot

__all__ = [
    "ExpertUsage",
    "FitCheckpoint",
    "MixedPairs",
    "ModelExport",
    "OfflinePairs",
    "OnPolicyPairs",
    "ReferenceMerge",
    "RewardEvaluation",
    "RewardExport",
    "RoundCallback",
    "RoundCheckpoint",
    "RoundContext",
    "RoundEvaluation",
    "TrajectorySnapshot",
    "finish_round",
]
