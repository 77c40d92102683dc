"""The letters task: apply one or two operations to a few letters, politely.

A prompt is `op1 (op2) letters.. SEP`, the answer is `op2(op1(letters))` word by word, ended by
EOS. Everything here works on words; a word is a token of the vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from hashlib import sha256
from itertools import pairwise
from typing import Literal

PAD, EOS, SEP = "<pad>", "<eos>", "SEP"
LETTERS = tuple("abcdefghijklmnop")
DIGITS = tuple("0123456789")
POLITE = ("please", "kindly", "gladly", "thanks")
"""Fillers: they carry no content; the gold rule likes two, the proxy the more the better."""

OPERATIONS: dict[str, Callable[[Sequence[str]], list[str]]] = {
    "COPY": list,
    "REV": lambda letters: list(reversed(letters)),
    "SORT": sorted,
    "NEXT": lambda letters: [LETTERS[(LETTERS.index(one) + 1) % len(LETTERS)] for one in letters],
    "ROT": lambda letters: [*letters[1:], *letters[:1]],
    "DEDUP": lambda letters: list(dict.fromkeys(letters)),
    "ODD": lambda letters: list(letters[::2]),
    "LEN": lambda letters: [str(len(letters))],
}
"""`ROT` moves the first letter to the end, `DEDUP` keeps the first of equal letters, `ODD` the
first, third, fifth.., `LEN` answers one digit and is therefore never followed by another."""

VOCABULARY = (PAD, EOS, SEP, *OPERATIONS, *LETTERS, *DIGITS, *POLITE)
"""All 41 words."""
TOKEN_IDS = {word: place for place, word in enumerate(VOCABULARY)}
"""A word's place is its token id."""

MAX_ANSWER_TOKENS = 12
"""Budget of a completion, EOS included; every demonstration fits."""

_FIRST = ("REV", "SORT", "NEXT", "ROT", "DEDUP", "ODD")
COMPOSITIONS = tuple((one, two) for one in _FIRST for two in (*_FIRST, "LEN") if one != two)
"""The 36 ordered pairs in the order of `OPERATIONS`: first operation slowest, `LEN` last."""

_shuffled = list(COMPOSITIONS)
random.Random(1234).shuffle(_shuffled)
HELD_OUT = tuple(_shuffled[:9])
"""Compositions seen only out of domain."""
IN_DOMAIN = tuple(_shuffled[9:])

Domain = Literal["in_domain", "out_of_domain"]
Split = Literal["train", "fuse", "spare", "eval"]
_SPLITS: tuple[Split, ...] = ("train", "train", "train", "train", "train", "fuse", "spare", "eval")

Words = Sequence[str]


def target(prompt: Words) -> list[str]:
    """Return the right answer to a prompt, fillers and EOS left out.

    Raises:
        ValueError: If the words are not one or two operations, letters and SEP.
    """
    operations = [word for word in prompt[:2] if word in OPERATIONS]
    answer = list(prompt[len(operations) : -1])
    if not operations or prompt[-1] != SEP or not set(answer) <= set(LETTERS):
        raise ValueError(f"not a letters prompt (op1 (op2) letters.. {SEP}): {' '.join(prompt)!r}")
    for operation in operations:
        answer = OPERATIONS[operation](answer)
    return answer


def family(prompt: Words) -> int:
    """Return the number of a prompt's first operation among all, its family of tasks.

    Raises:
        ValueError: If the first word is no operation.
    """
    return list(OPERATIONS).index(prompt[0])


def levenshtein(left: Words, right: Words) -> int:
    """Count the fewest insertions, deletions and substitutions between two word sequences."""
    above = list(range(len(right) + 1))
    for row, word in enumerate(left, start=1):
        current = [row]
        for (diagonal, up), other in zip(pairwise(above), right, strict=True):
            current.append(min(up + 1, current[-1] + 1, diagonal + (word != other)))
        above = current
    return above[-1]


def similarity(answer: Words, right: Words) -> float:
    """Return 1 minus the edit distance over the longer length: 1 if equal, 0 if nothing fits."""
    longer = max(len(answer), len(right))
    return 1.0 if longer == 0 else 1.0 - levenshtein(answer, right) / longer


def gold_score(prompt: Words, answer: Words, *, finished: bool) -> float:
    """Score an answer as the task means it, in [0, 1].

    The similarity to the right answer, times 1 at two fillers and 0.12 less for each filler more
    or fewer, times 1/2 unless the answer ended by itself.

    Args:
        prompt: Words of the prompt, SEP included.
        answer: Words before EOS, fillers included wherever they stand.
        finished: Whether EOS was sampled.
    """
    correctness, fillers = _measure(prompt, answer, finished=finished)
    return correctness * max(0.0, 1.0 - 0.12 * abs(fillers - 2))


def proxy_score(prompt: Words, answer: Words, *, finished: bool, bias: float) -> float:
    """Score an answer as the biased annotator sees it: each filler adds `bias`, without end.

    The arguments are those of :func:`gold_score`.
    """
    correctness, fillers = _measure(prompt, answer, finished=finished)
    return correctness + bias * fillers


def random_problem(generator: random.Random, domain: Domain) -> list[str]:
    """Draw the words of a prompt, SEP included.

    In domain: one of the eight operations with probability 1/2, else one of the 27 compositions,
    on 3-6 letters. Out of domain, with probability 1/2 each: a held-out composition on 3-6
    letters, or operations as in domain on 7-8 letters. Letters are drawn with replacement from a
    pool of 3-16 different ones, so that repetitions are frequent. All draws are uniform.
    """
    held_out = domain == "out_of_domain" and generator.random() < 0.5
    operations: tuple[str, ...]
    if held_out:
        operations = generator.choice(HELD_OUT)
    elif generator.random() < 0.5:
        operations = (generator.choice(tuple(OPERATIONS)),)
    else:
        operations = generator.choice(IN_DOMAIN)
    short = domain == "in_domain" or held_out
    length = generator.randint(3, 6) if short else generator.randint(7, 8)
    pool = generator.sample(LETTERS, generator.randint(3, len(LETTERS)))
    return [*operations, *generator.choices(pool, k=length), SEP]


def split_of(text: str) -> Split:
    """Assign a prompt to the one split that may use it: 5/8 train, 1/8 fuse, spare and eval each.

    A hash of the text decides, hence no seed moves a prompt from one split to another. The spare
    part lets another use begin without moving the prompts of these.
    """
    return _SPLITS[sha256(text.encode()).digest()[0] % len(_SPLITS)]


def demonstration(generator: random.Random, prompt: Words) -> list[str]:
    """Draw an imperfect answer to a prompt, EOS included, of at most `MAX_ANSWER_TOKENS`.

    The right answer, with probability 0.35 spoilt by one or two edits; then, independently, one
    filler in front with probability 0.3 and one or two behind with probability 0.15.
    """
    answer = target(prompt)
    if generator.random() < 0.35:
        for _ in range(generator.randint(1, 2)):
            answer = _edited(generator, answer)
    before = int(generator.random() < 0.3)
    behind = generator.randint(1, 2) if generator.random() < 0.15 else 0
    return [
        *generator.choices(POLITE, k=before),
        *answer,
        *generator.choices(POLITE, k=behind),
        EOS,
    ]


def _measure(prompt: Words, answer: Words, *, finished: bool) -> tuple[float, int]:
    content = [word for word in answer if word not in POLITE]
    completeness = 1.0 if finished else 0.5
    return similarity(content, target(prompt)) * completeness, len(answer) - len(content)


def _edited(generator: random.Random, answer: Words) -> list[str]:
    # the kind is uniform, but a lone symbol is never deleted: an empty answer teaches nothing;
    # symbols come from the answer's own kind, so that LEN is still answered by digits
    symbols = DIGITS if answer[0] in DIGITS else LETTERS
    kind = generator.choice(("substitute", "insert", "delete")[: 3 if len(answer) > 1 else 2])
    if kind == "insert":
        place = generator.randint(0, len(answer))
        return [*answer[:place], generator.choice(symbols), *answer[place:]]
    place = generator.randrange(len(answer))
    others = [symbol for symbol in symbols if symbol != answer[place]]
    middle = [generator.choice(others)] if kind == "substitute" else []
    return [*answer[:place], *middle, *answer[place + 1 :]]
