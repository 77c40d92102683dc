"""Every round's policy and merge, measured; one printed row a round."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_only

from tpmm_pl import processes
from tpmm_pl.callbacks.round_context import RoundContext, Stage
from tpmm_pl.callbacks.round_end import RoundCallback
from tpmm_pl.data.pairs import read_pairs, write_pairs
from tpmm_pl.data.table import as_table, with_reference
from tpmm_pl.evaluation import (
    Answers,
    accuracy_metrics,
    table_header,
    table_row,
    win_metrics,
)
from tpmm_pl.models.scoring import score_shared
from tpmm_pl.noise import LabelNoise
from tpmm_pl.pairing import pair_completions
from tpmm_pl.rollouts import sample_shared
from tpmm_pl.rounds import one_hot
from tpmm_pl.types import Completion, InputError, Judge, Pair, PairLogps, Prompt, Recipe

Contenders = dict[str, Recipe]


class RoundEvaluation(RoundCallback):
    """Measures the policy and the merge after every round, and what may be shipped at the end.

    On the data's evaluation prompts: scores by the judges, win rates against the start and the
    previous policy, KL to the start, length. On its held-out pairs: accuracy of the implicit
    reward against the start, also of runs whose loss has no reference, so that runs compare;
    where the data brings no pairs but a gold judge is given, pairs are
    sampled from the start and labelled without noise. The same noise is used in all rounds, so
    comparisons are paired.

    Args:
        gold: The judge that training never sees.
        proxy: The judge that labels training pairs.
        max_new_tokens: Budget of a completion.
        temperature: Of sampling; KL is measured at 1 only. Greedy answers are added for what may
            be shipped.
        batch_size: Completions generated at once.
    """

    def __init__(
        self,
        gold: Judge | None = None,
        proxy: Judge | None = None,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        batch_size: int = 256,
    ) -> None:
        super().__init__()
        judges = {"gold": gold, "proxy": proxy}
        self.judges = {name: judge for name, judge in judges.items() if judge is not None}
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.batch_size = batch_size
        self._header_printed = False

    def stages(self) -> dict[str, Stage]:
        """Return the stages that measure a round and what may be shipped."""
        return {"evaluate": self.evaluate, "evaluate_ship": self.evaluate_ship}

    def evaluate(self, context: RoundContext) -> None:
        """Measure the policy and the merge, write metrics and scores, print the row."""
        index, store = context.round_index, context.store
        policy = one_hot(index)
        contenders = {"": policy}
        recipe = store.record(index).recipe
        if recipe is not None and len(recipe.snapshots) > 1:
            contenders["merge/"] = recipe
        if index == 0:
            self._write_held_out_pairs(context)
        answers = self._answers(context, contenders, self.temperature)
        metrics = self._accuracies(context, contenders) if index else {}
        for (prefix, domain), answer in answers.items():
            found = answer.metrics(domain) | self._wins(context, answer, domain)
            metrics |= {f"{prefix}{name}": value for name, value in found.items()}
        scores = {f"{prefix}{domain}": a.scores for (prefix, domain), a in answers.items()}
        context.write(store.folder(index) / "scores.json", json.dumps(scores))
        store.update(index, metrics=metrics)
        context.log(metrics)
        self._print_row(context)

    def evaluate_ship(self, context: RoundContext) -> None:
        """Measure the last policy and every recipe that may be shipped, sampled and greedy."""
        index, store = context.round_index, context.store
        ship = {name: r for name, r in store.record(index).ship.items() if name != "chosen"}
        contenders = {"last": one_hot(index), **ship}
        metrics: dict[str, float] = {}
        for mode, temperature in (("sampled", self.temperature), ("greedy", 0.0)):
            for (name, domain), answer in self._answers(context, contenders, temperature).items():
                found = answer.metrics(domain)
                metrics |= {f"ship/{name}/{mode}/{m}": value for m, value in found.items()}
        store.update(index, metrics=metrics)
        context.log(metrics)
        _print_shipped(metrics, list(contenders))

    def _answers(
        self, context: RoundContext, contenders: Contenders, temperature: float
    ) -> dict[tuple[str, str], Answers]:
        prompts: dict[str, list[Prompt]] = dict(context.data.eval_prompts())
        if not prompts:
            return {}
        answers = {}
        for name, recipe in contenders.items():
            context.load(recipe)
            for domain, asked in prompts.items():
                answers[name, domain] = self._answer(context, asked, domain, temperature)
        if temperature != 1:
            # answers of another distribution than the policy's say nothing of its divergence
            return answers
        for answer in answers.values():
            answer.start_logps = context.scores(answer.completions, one_hot(0)).tolist()
        return answers

    def _answer(
        self, context: RoundContext, prompts: list[Prompt], domain: str, temperature: float
    ) -> Answers:
        with context.passes():
            completions = sample_shared(
                context.policy,
                context.data.tokenizer,
                prompts,
                samples=1,
                max_new_tokens=self.max_new_tokens,
                temperature=temperature,
                key=f"{context.seed}/evaluation/{domain}",
                batch_size=self.batch_size,
                title=f"round {context.round_index}: evaluating {domain}",
            )
        return Answers(completions, {name: self._judged(name, completions) for name in self.judges})

    def _judged(self, name: str, completions: Sequence[Completion]) -> list[float]:
        mine = processes.share(completions)
        return processes.gathered(self.judges[name](mine) if mine else [])

    def _wins(self, context: RoundContext, answer: Answers, domain: str) -> dict[str, float]:
        found: dict[str, float] = {}
        if not answer.scores:
            return found
        judge = next(iter(answer.scores))
        opponents = {"sft": 0, "previous": context.round_index - 1}
        for opponent, index in opponents.items() if context.round_index > 0 else ():
            file = context.store.folder(index) / "scores.json"
            try:
                theirs = json.loads(file.read_text(encoding="utf-8"))[domain][judge]
            except (OSError, ValueError, LookupError) as error:
                warnings.warn(
                    f"{file} cannot be read ({error!r}); round {context.round_index} has no win"
                    f" rates against round {index}",
                    stacklevel=2,
                )
            else:
                found |= win_metrics(answer.scores[judge], theirs, opponent, domain)
        return found

    def _accuracies(self, context: RoundContext, contenders: Contenders) -> dict[str, float]:
        metrics: dict[str, float] = {}
        pairs = self._held_out_pairs(context)
        for prefix, recipe in contenders.items():
            for domain, known in pairs.items():
                context.load(recipe)
                logps = self._score(context, known)
                found = accuracy_metrics(known, logps, domain)
                metrics |= {f"{prefix}{name}": value for name, value in found.items()}
        return metrics

    def _held_out_pairs(self, context: RoundContext) -> dict[str, Sequence[Pair]]:
        folder, data = context.store.folder(0), context.data
        written = {f.stem.removeprefix("held_out_") for f in folder.glob("held_out_*.parquet")}
        given = data.eval_pairs() or (data.eval_prompts() if "gold" in self.judges else {})
        pairs: dict[str, Sequence[Pair]] = {}
        for domain in sorted(written | {domain for domain, some in given.items() if some}):
            file = folder / f"held_out_{domain}.parquet"
            try:
                pairs[domain] = read_pairs(file)
            except InputError:
                # no round makes it again: without the round, the text is the same and shown once
                warnings.warn(
                    f"no held-out pairs can be read in {file}; accuracies of {domain} are left"
                    " out for as long as that is so",
                    stacklevel=2,
                )
        return pairs

    def _write_held_out_pairs(self, context: RoundContext) -> None:
        context.load(one_hot(0))
        known = dict(context.data.eval_pairs()) or self._clean_pairs(context)
        for domain, pairs in ((domain, pairs) for domain, pairs in known.items() if pairs):
            logps = self._score(context, pairs)
            if processes.is_first():
                path = context.store.folder(0) / f"held_out_{domain}.parquet"
                write_pairs(path, with_reference(pairs, logps))

    def _clean_pairs(self, context: RoundContext) -> dict[str, list[Pair]]:
        if "gold" not in self.judges:
            return {}
        pairs = {}
        for domain, prompts in context.data.eval_prompts().items():
            key = f"{context.seed}/held_out/{domain}"
            with context.passes():
                completions = sample_shared(
                    context.policy, context.data.tokenizer, prompts, samples=2,
                    max_new_tokens=self.max_new_tokens, key=key, batch_size=self.batch_size,
                )  # fmt: skip
            pairs[domain] = pair_completions(
                completions,
                self._judged("gold", completions),
                method="best_worst",
                noise=LabelNoise(),
                generator=context.generator("held_out"),
            )
        return pairs

    def _score(self, context: RoundContext, pairs: Sequence[Pair]) -> PairLogps:
        with context.passes():
            return score_shared(context.policy, as_table(pairs), token_budget=context.token_budget)

    @rank_zero_only
    def _print_row(self, context: RoundContext) -> None:
        records = context.store.rounds
        columns = {name: 0.0 for record in records for name in record.metrics}
        if context.round_index == 0:
            # its row comes with the next one's, when it is known which columns there are
            return
        if not self._header_printed:
            self._header_printed = True
            print(table_header(columns))
            earlier = records[: context.round_index]
            print("\n".join(table_row(record, columns) for record in earlier))
        print(table_row(records[context.round_index], columns), flush=True)


@rank_zero_only
def _print_shipped(metrics: dict[str, float], names: list[str]) -> None:
    domains = ("in_domain", "out_of_domain")
    columns = [(mode, domain) for mode in ("sampled", "greedy") for domain in domains]
    for judge in ("gold", "proxy"):
        if f"ship/last/sampled/{judge}/in_domain" not in metrics:
            continue
        print(f"\n{judge:>8} of what may be shipped: sampled in / out of domain, greedy in / out")
        for name in names:
            values = [metrics.get(f"ship/{name}/{m}/{judge}/{d}") for m, d in columns]
            cells = [f"{'-' if v is None else f'{v:.3f}':>7}" for v in values]
            print(f"{name:>8} {' '.join(cells)}", flush=True)
