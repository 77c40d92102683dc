"""What tokenising and packing conversational pairs costs: TRL's way against ours, same tokens.

    python benchmarks/tokenising.py

Both ways begin at rows that are read, TRL's a data set of the ``datasets`` library. TRL's is what
its ``DPOTrainer`` does: ``_prepare_dataset``, then every batch collated by its own collator. Ours
is what a data module does: rows tokenised into a table, then every batch packed. They take turns
in one process of one thread, also in the tokenizer. Times are CPU seconds.

The conversations are drawn, of words that are made here, with lengths like HH's. The tokenizer is
a byte-level BPE trained on such text, with a ChatML template; ``--model`` takes another one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from alternating import at_least, spread
from datasets import Dataset, disable_progress_bars
from hh_pairs import COMPLETIONS, PROMPTS, SYSTEM
from page import markdown, write_section
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

from tpmm_pl.data.batching import collate
from tpmm_pl.data.rows.formats import to_preference
from tpmm_pl.data.rows.sources import DataSource, located_rows
from tpmm_pl.data.table import PairTable
from tpmm_pl.data.tokens.chat import tokenize_pairs
from tpmm_pl.models.load import PretrainedPolicy

BAR = 3.0
BATCH = 4
LONG = 100_000
"""Tokens; neither way cuts a row."""

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY, WORDS = 8192, 20_000
SYLLABLES = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]

Row = dict[str, list[dict[str, str]]]


class Speech:
    """Draws sentences of made words, the frequent ones short, as in languages."""

    def __init__(self, seed: int) -> None:
        self.generator = random.Random(f"{seed}/speech")
        drawn = ("".join(self.generator.choices(SYLLABLES, k=k)) for k in self._syllables())
        self.words = list(islice(dict.fromkeys(drawn), WORDS))
        # Zipf's law
        self.weights = [1 / rank for rank in range(1, len(self.words) + 1)]

    def _syllables(self) -> Iterator[int]:
        for number in range(2 * WORDS):
            yield self.generator.choice((1, 1, 2) if number < 200 else (2, 3, 3, 4))

    def say(self, count: int) -> str:
        """Return ``count`` words, at least one, in sentences."""
        words = self.generator.choices(self.words, self.weights, k=max(count, 1))
        for at, word in enumerate(words):
            begins = at == 0 or words[at - 1][-1] in ".?"
            mark = self.generator.choices(("", ",", ".", "?"), (85, 6, 7, 2))[0]
            words[at] = (word.capitalize() if begins else word) + mark
        return " ".join(words).rstrip(",.?") + "."


def train_tokenizer(speech: Speech) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE as GPT-2 and its successors have it, with a ChatML template."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((speech.say(200) for _ in range(1000)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, chat_template=CHATML
    )


def draw_rows(count: int, speech: Speech, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Draw conversations: a system prompt that all share, some turns, two answers."""
    sample = speech.say(5000)
    words_a_token = 5000 / len(tokenizer(sample, verbose=False)["input_ids"])

    def turn(role: str, tokens: float) -> dict[str, str]:
        return {"role": role, "content": speech.say(round(tokens * words_a_token))}

    system, rows = turn("system", SYSTEM), []
    for _ in range(count):
        length = PROMPTS.draw(speech.generator)
        # an odd number of turns, of 20 to 60 tokens: the last one is the user's
        turns = 1 + 2 * (length // speech.generator.randint(40, 120))
        asked = [turn(("user", "assistant")[at % 2], length / turns) for at in range(turns)]
        answers = [turn("assistant", COMPLETIONS.draw(speech.generator)) for _ in range(2)]
        rows.append({"prompt": [system, *asked], "chosen": answers[:1], "rejected": answers[1:]})
    return rows


def read_rows(path: Path, count: int) -> list[Row]:
    """Read the first conversations of a file as both ways take them."""
    names = ("prompt", "chosen", "rejected")
    rows = ({name: row[name] for name in names} for _, row in located_rows(DataSource(str(path))))
    return list(islice(rows, count))


class Ours:
    """Rows to a table, a table to packed batches."""

    def __init__(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> None:
        self.rows = [to_preference(row, f"row {number}") for number, row in enumerate(rows)]
        self.tokenizer = tokenizer

    def tokens(self) -> PairTable:
        """Apply template and tokenizer."""
        return tokenize_pairs(self.rows, self.tokenizer, max_length=LONG)[0]

    def batches(self, table: PairTable) -> int:
        """Pack every batch; return how many there were."""
        starts = range(0, len(table), BATCH)
        return sum(1 for start in starts if collate(table[start : start + BATCH]))


class Trls:
    """The same through TRL's own trainer and collator."""

    def __init__(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> None:
        self.rows, self.tokenizer = Dataset.from_list(rows), tokenizer
        self.collator = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)

    def tokens(self) -> Dataset:
        """Run the trainer's preparation, for which it needs no model."""
        trainer = SimpleNamespace(_tokenizer=self.tokenizer)
        arguments = SimpleNamespace(
            max_length=None, truncation_mode="keep_start", dataset_num_proc=None
        )
        return DPOTrainer._prepare_dataset(trainer, self.rows, self.tokenizer, arguments, "train")

    def batches(self, rows: Dataset) -> int:
        """Collate every batch; return how many there were."""
        # as the Trainer does, which drops the columns that its model does not take
        used = rows.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
        return sum(1 for _ in DataLoader(used, batch_size=BATCH, collate_fn=self.collator))


@dataclass
class Seconds:
    """CPU seconds of one way, one a repeat."""

    tokens: list[float] = field(default_factory=list)
    batches: list[float] = field(default_factory=list)

    def run(self, way: Ours | Trls) -> Any:
        """Take both steps, note their seconds and return the tokens."""
        made = _timed(way.tokens, self.tokens)
        _timed(lambda: way.batches(made), self.batches)
        return made

    def stages(self) -> dict[str, list[float]]:
        """Return the seconds by what they went into."""
        whole = [one + other for one, other in zip(self.tokens, self.batches, strict=True)]
        return {"rows to tokens": self.tokens, f"batches of {BATCH}": self.batches, "both": whole}


def compare(ours: Ours, theirs: Trls, repeats: int) -> tuple[Seconds, Seconds, int]:
    """Let both ways take turns, after one that is not counted.

    Returns:
        The seconds of ours and of TRL's, and how many pairs have the same tokens.
    """
    same = equal_pairs(ours.tokens(), theirs.tokens(), ours.tokenizer.eos_token_id)
    # a full collection goes through all objects of the libraries, whoever's turn it is
    gc.collect()
    gc.freeze()
    found = {ours: Seconds(), theirs: Seconds()}
    turns = list(found)
    for _ in range(repeats):
        for way in turns:
            found[way].run(way)
        turns.reverse()
    return found[ours], found[theirs], same


def equal_pairs(table: PairTable, rows: Dataset, end: int) -> int:
    """Count the pairs with TRL's tokens, but for what a template writes behind an answer's end.

    TRL trains on that, often a newline, which no model samples that stops at its end.
    """
    if len(table) != len(rows):
        return 0
    ours = ((pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in table)
    theirs = (
        (
            tuple(r["prompt_ids"]),
            *(up_to_end(r[name], end) for name in ("chosen_ids", "rejected_ids")),
        )
        for r in rows
    )
    return sum(one == other for one, other in zip(ours, theirs, strict=True))


def up_to_end(ids: Sequence[int], end: int) -> tuple[int, ...]:
    """Return tokens up to the last ``end``; all of them if there is none."""
    behind = list(reversed(ids)).index(end) if end in ids else 0
    return tuple(ids[: len(ids) - behind])


def table_text(ours: Seconds, theirs: Seconds) -> tuple[str, dict[str, float]]:
    """Return the table and the ratios."""
    rows, ratios = [], {}
    whole = statistics.median(theirs.stages()["both"])
    for stage, seconds in ours.stages().items():
        other = theirs.stages()[stage]
        each = [b / a for a, b in zip(seconds, other, strict=True)]
        ratio = ratios[stage.replace(" ", "_")] = statistics.median(each)
        shares = [f"{statistics.median(one) / whole:.2f}" for one in (other, seconds)]
        bar = BAR if stage == "both" else None
        rows.append([stage, *shares, f"{ratio:.2f}", spread(each), at_least(ratio, bar)])
    header = ["stage, in shares of TRL's time", "TRL", "ours", "ratio", "10 - 90 %", "bar"]
    return markdown(header, rows), ratios


def _timed(work: Callable[[], Any], into: list[float]) -> Any:
    started = time.process_time()
    made = work()
    into.append(time.process_time() - started)
    return made


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, help="pairs; 2300 or, if quick, 300")
    parser.add_argument("--repeats", type=int, help="20 or, if quick, 3")
    parser.add_argument(
        "--pairs", type=Path, help="a file of conversations, in place of drawn ones"
    )
    parser.add_argument("--model", help="whose tokenizer, in place of one trained here")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn pairs")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, help="a file with a section for the table")
    options = parser.parse_args()
    options.count = options.count or (300 if options.quick else 2300)
    options.repeats = options.repeats or (3 if options.quick else 20)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    disable_progress_bars()
    speech = Speech(options.seed)
    if options.model:
        tokenizer = PretrainedPolicy(options.model).load_tokenizer()
    else:
        tokenizer = train_tokenizer(speech)
    if options.pairs:
        rows = read_rows(options.pairs, options.count)
    else:
        rows = draw_rows(options.count, speech, tokenizer)
    way = Ours(rows, tokenizer)
    ours, theirs, same = compare(way, Trls(rows, tokenizer), options.repeats)
    table, ratios = table_text(ours, theirs)
    lengths = {name: statistics.median(one) for name, one in way.tokens().lengths().items()}
    text = table + (
        f"\n\n{len(rows)} pairs, {same} of them with the same tokens; a vocabulary of"
        f" {len(tokenizer)}; medians of {lengths['prompt_ids']:.0f} tokens a prompt and"
        f" {lengths['chosen_ids']:.0f} a chosen answer; medians of {options.repeats} ratios of CPU"
        " seconds, one thread."
    )
    print(text)
    if options.write:
        section = "tokenising" + "_model" * bool(options.model) + "_quick" * options.quick
        write_section(options.write, section, text)
    if options.json:
        settings = {"quick": options.quick, "pairs": len(rows), "same": same}
        settings |= {"repeats": options.repeats, "vocabulary": len(tokenizer), **lengths}
        content = {"ratios": ratios, "settings": settings}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
