"""What the comparisons with TRL are asked for: model, pairs, batches, and where results go."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hh_pairs import draw_pairs, read_pairs
from page import write_section

from tpmm_pl.models.load import PretrainedPolicy
from tpmm_pl.types import InputError, Pair


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what says which model, pairs and batches a benchmark takes."""
    parser.add_argument("--batches", type=int, help="20 or, if quick, 4")
    parser.add_argument("--batch_size", type=int, default=4, help="pairs a batch")
    parser.add_argument("--pairs", type=Path, help="a file of pairs, in place of drawn ones")
    parser.add_argument("--model", help="a folder, in place of random weights; --pairs needs it")
    parser.add_argument("--peaks", type=int, help="processes a peak; 3 or, if quick, 1")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn pairs")
    parser.add_argument("--quick", action="store_true", help="the small model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, help="a file with a section for each part")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what does not go together, and fill in what depends on ``--quick``."""
    if options.pairs and not options.model:
        parser.error(f"--pairs {options.pairs} needs --model, whose tokenizer reads it")
    if options.quick and options.model:
        parser.error(f"--quick is a random model; leave it or --model {options.model} out")
    if options.batches is not None and options.batches < 1:
        parser.error(f"--batches {options.batches}: give 1 or more")
    options.batches = options.batches or (4 if options.quick else 20)
    options.peaks = options.peaks or (1 if options.quick else 3)


def chosen_pairs(options: argparse.Namespace, vocabulary: int) -> list[Pair]:
    """Draw or read the pairs of all batches.

    Raises:
        InputError: If a file cannot be read or has too few pairs.
    """
    count = options.batches * options.batch_size
    if not options.pairs:
        return draw_pairs(count, vocabulary, options.seed)
    pairs = read_pairs(options.pairs, PretrainedPolicy(options.model).load_tokenizer(), count)
    if len(pairs) < count:
        raise InputError(f"{options.pairs} has {len(pairs)} usable pairs; lower --batches")
    return pairs


Part = Callable[[argparse.Namespace], tuple[str, dict[str, float]]]
"""Measures; returns a table and its ratios."""


def run_parts(script: str, parts: Mapping[str, Part], options: argparse.Namespace) -> None:
    """Measure the parts that are asked for; print and write their tables and ratios.

    Args:
        script: Its name begins the names of the documentation's sections.
        parts: All, by name.
        options: What was asked for.
    """
    ratios: dict[str, float] = {}
    for name in options.parts:
        text, of_part = parts[name](options)
        ratios |= of_part
        print(text, end="\n\n", flush=True)
        if options.write:
            write_section(options.write, section(f"{script}_{name}", options), text)
    if options.json:
        content = {"ratios": ratios, "settings": settings(options)}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def section(name: str, options: argparse.Namespace) -> str:
    """Return the name of a section of the documentation: other models and pairs have others."""
    size = "_quick" if options.quick else "_model" if options.model else ""
    return name + size + ("_pairs" if options.pairs else "")


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the ratios depend on."""
    names = ("quick", "batches", "batch_size", "peaks", "seed", "model")
    chosen = {name: getattr(options, name) for name in names}
    chosen |= {"pairs": str(options.pairs) if options.pairs else "drawn"}
    return chosen | {name: version(name) for name in ("torch", "transformers", "trl")}
