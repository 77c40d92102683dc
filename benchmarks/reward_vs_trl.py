"""A step of a reward model against TRL's, and eight answers of a prompt scored in one tree.

    python benchmarks/reward_vs_trl.py

Ours takes turns with TRL's ``RewardTrainer`` on the same pairs, from the same weights, in one
process of one thread: forward, backward, fused AdamW and ``zero_grad``, in CPU seconds of the
process, so other processes do not count. Scoring takes turns with the model's own forward pass on
padded rows. The model has SmolLM2-135M's shape and random weights, ``--quick`` takes a smaller one,
``--model`` real weights; pairs are drawn with lengths like HH's, ``--pairs`` reads real ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from alternating import Compared, agreement, alternate, at_least
from fusion import FULL, SMALL
from hh_pairs import Rows, TokenCounts, count_tokens, draw_completions, typical, unused_token
from moe import random_reward_model
from page import markdown
from torch import Tensor
from transformers import PreTrainedModel
from trl_options import add_options, check_options, chosen_pairs, run_parts
from trl_steps import RATE, quiet, reward_step
from trl_tables import HEADER, millions, ratio_row, token_ranges, token_table

from tpmm_pl.data.batching import collate
from tpmm_pl.data.packing import pack_rows, pair_rows
from tpmm_pl.losses import bradley_terry_loss
from tpmm_pl.models.reward import PretrainedReward, RewardScorer
from tpmm_pl.types import InputError, Pair, PairBatch

BAR, TOKENS_BAR = 3.0, 3.0
COMPLETIONS = 8


class OurStep:
    """Forward, backward, fused AdamW and ``zero_grad``."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[PairBatch]) -> None:
        self.scorer, self.batches = RewardScorer(model), batches
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=RATE, weight_decay=0.0, fused=True
        )

    def __call__(self, number: int) -> float:
        """Take a step on a batch; return its loss."""
        rewards = self.scorer(self.batches[number])
        loss = bradley_terry_loss(rewards.chosen, rewards.rejected).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


class TreeScores:
    """Scores the answers of a prompt in one tree; a step is a prompt."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Rows]) -> None:
        self.scorer, self.trees = RewardScorer(model), [pack_rows(rows) for rows in prompts]
        self.scores: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, number: int) -> float:
        """Keep the scores of a prompt's answers; return their mean."""
        self.scores[number] = self.scorer.rows(self.trees[number])
        return float(self.scores[number].mean())


class PaddedScores:
    """Scores the answers of a prompt in padded rows, by the model's own forward."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Rows], pad_id: int) -> None:
        self.model = model
        model.config.pad_token_id = pad_id
        self.rows = [_padded(rows, pad_id) for rows in prompts]
        self.scores: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, number: int) -> float:
        """Keep the scores of a prompt's answers; return their mean."""
        ids, mask = self.rows[number]
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        self.scores[number] = logits[:, 0]
        return float(self.scores[number].mean())


def model_maker(options: argparse.Namespace) -> Callable[[], PreTrainedModel]:
    """Return what makes the starting model, in training mode without dropout."""
    if options.model:
        return PretrainedReward(options.model).load_model
    return lambda: random_reward_model(SMALL if options.quick else FULL).train()


def compare_steps(
    make_model: Callable[[], PreTrainedModel], pairs: Sequence[Pair], size: int
) -> tuple[Compared, list[TokenCounts]]:
    """Train both sides from the same weights; return what was measured, and the tokens."""
    trl = reward_step(make_model(), pairs, size=size, pad_id=unused_token(pair_rows(pairs)))
    batches = [[pairs[index] for index in part] for part in trl.order]
    ours = OurStep(make_model(), [collate(batch) for batch in batches])
    rows = [pair_rows(batch) for batch in batches]
    found = alternate(ours, trl, len(batches), typical(rows))
    return found, [count_tokens(one) for one in rows]


def measure_steps(options: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """Return the table of training steps, and the ratios."""
    make_model, size = model_maker(options), options.batch_size
    model = make_model()
    pairs = chosen_pairs(options, model.config.vocab_size)
    print(token_table(pairs, size), end="\n\n", flush=True)
    found, counts = compare_steps(make_model, pairs, size)
    bar = None if options.quick or options.pairs else BAR
    cells, ratios = ratio_row("reward_step", "RewardTrainer, as it comes", found, counts)
    cells += [found.losses(), at_least(ratios["reward_step"], bar)]
    header = [*HEADER, "losses", "bar"]
    text = markdown(header, [cells]) + (
        f"\n\n{millions(model)} million parameters, {len(counts)} batches of {size} pairs; TRL's "
        "CPU seconds over ours, one thread, medians. Operations of the batch of median length. "
        f"{token_ranges(pairs, size)}."
    )
    return text, ratios


def measure_scores(options: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """Return the table of scoring the completions of one prompt, and the ratios."""
    model = model_maker(options)().eval()
    prompts = draw_completions(options.batches, COMPLETIONS, model.config.vocab_size, options.seed)
    pad_id = unused_token([row for rows in prompts for row in rows])
    trees, padded = TreeScores(model, prompts), PaddedScores(model, prompts, pad_id)
    counts = [count_tokens(rows) for rows in prompts]
    found = alternate(trees, padded, len(prompts), typical(prompts))
    cells, ratios = ratio_row(
        "reward_scores", "padded rows, the model's own forward", found, counts
    )
    tokens = sum(c.padded for c in counts) / sum(c.unique for c in counts)
    together = found.ratio_of_totals() / tokens
    worst = max(
        float((trees.scores[number] - padded.scores[number]).abs().max())
        for number in range(len(prompts))
    )
    ratios |= {"reward_scores_tokens": tokens, "reward_scores_time_over_tokens": together}
    cells += [f"{tokens:.2f}", f"{together:.2f}", agreement(worst)]
    cells += [at_least(tokens, TOKENS_BAR) + " (tokens)"]
    header = [*HEADER, "tokens", "time / tokens", "score difference", "bar"]
    text = markdown(header, [cells]) + (
        f"\n\n{millions(model)} million parameters, {len(prompts)} prompts of {COMPLETIONS} "
        "completions each, without gradients; padded rows over the tree, *tokens* and *time / "
        "tokens* of the totals."
    )
    return text, ratios


def _padded(rows: Rows, pad_id: int) -> tuple[Tensor, Tensor]:
    whole = [torch.tensor([*prompt, *completion]) for prompt, completion in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(whole, batch_first=True, padding_value=pad_id)
    return ids, pad([torch.ones_like(row) for row in whole], batch_first=True)


PARTS = {"steps": measure_steps, "scores": measure_scores}


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    check_options(parser, options)
    torch.set_num_threads(1)
    quiet()
    try:
        run_parts("reward_vs_trl", PARTS, options)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
