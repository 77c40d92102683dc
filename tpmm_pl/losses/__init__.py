"""Preference losses: pure functions from log-probabilities or rewards to one loss a pair."""

from tpmm_pl.losses.anchored import (
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    log_ratios,
    nca_loss,
    sppo_hard_loss,
)
from tpmm_pl.losses.choice import PreferenceLoss, Term, preference_loss
from tpmm_pl.losses.inputs import per_token
from tpmm_pl.losses.margin import (
    cdpo_loss,
    discopop_loss,
    dpo_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    log_ratio_margin,
    rdpo_loss,
)
from tpmm_pl.losses.reference_free import orpo_loss, sft_loss, simpo_loss
from tpmm_pl.losses.reward import bradley_terry_loss
from tpmm_pl.losses.transport import aot_loss, aot_unpaired_loss

__all__ = [
    "PreferenceLoss",
    "Term",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "bco_loss",
    "bradley_terry_loss",
    "cdpo_loss",
    "discopop_loss",
    "dpo_loss",
    "exo_loss",
    "hinge_loss",
    "ipo_loss",
    "log_ratio_margin",
    "log_ratios",
    "nca_loss",
    "orpo_loss",
    "per_token",
    "preference_loss",
    "rdpo_loss",
    "sft_loss",
    "simpo_loss",
    "sppo_hard_loss",
]
