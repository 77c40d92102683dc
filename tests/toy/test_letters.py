from __future__ import annotations

import random

import pytest

from tpmm_pl.toy.letters import (
    COMPOSITIONS,
    HELD_OUT,
    IN_DOMAIN,
    LETTERS,
    MAX_ANSWER_TOKENS,
    OPERATIONS,
    POLITE,
    VOCABULARY,
    Domain,
    demonstration,
    gold_score,
    levenshtein,
    proxy_score,
    random_problem,
    similarity,
    split_of,
    target,
)


def test_the_vocabulary_has_41_words_at_the_documented_places() -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY) == 41
    assert VOCABULARY[3:11] == ("COPY", "REV", "SORT", "NEXT", "ROT", "DEDUP", "ODD", "LEN")
    assert VOCABULARY[11] == "a"
    assert VOCABULARY[26] == "p"
    assert VOCABULARY[27:37] == tuple("0123456789")
    assert VOCABULARY[37:] == POLITE


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("COPY c a b SEP", "c a b"),
        ("REV c a b SEP", "b a c"),
        ("SORT c a b a SEP", "a a b c"),
        ("NEXT a o p SEP", "b p a"),
        ("ROT c a b SEP", "a b c"),
        ("DEDUP c a c b a SEP", "c a b"),
        ("ODD a b c d e SEP", "a c e"),
        ("LEN a b c d SEP", "4"),
        ("REV ODD a b c d SEP", "d b"),
        ("ODD REV a b c d SEP", "c a"),
        ("NEXT SORT p a SEP", "a b"),
        ("DEDUP LEN a b a a SEP", "2"),
    ],
)
def test_the_target_applies_the_first_operation_first(prompt: str, answer: str) -> None:
    assert target(prompt.split()) == answer.split()


@pytest.mark.parametrize("prompt", ["a b SEP", "REV a b", "REV SORT NEXT a SEP", "REV 3 SEP"])
def test_a_foreign_prompt_is_refused_with_its_text(prompt: str) -> None:
    with pytest.raises(ValueError, match=f"not a letters prompt.*{prompt}"):
        target(prompt.split())


@pytest.mark.parametrize(
    ("left", "right", "distance"),
    [("", "", 0), ("abc", "abc", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3)],
)
def test_levenshtein_counts_edits(left: str, right: str, distance: int) -> None:
    assert levenshtein(left, right) == levenshtein(right, left) == distance


def test_similarity_is_one_minus_distance_over_the_longer_length() -> None:
    assert similarity("abcd", "abd") == pytest.approx(3 / 4)
    assert similarity("ab", "cd") == 0
    assert similarity("", "") == 1


@pytest.mark.parametrize(
    ("answer", "finished", "gold", "proxy"),
    [
        ("b a", True, 0.76, 1.0),
        ("please b a", True, 0.88, 1.1),
        ("please b a thanks", True, 1.0, 1.2),
        ("please b thanks a kindly", True, 0.88, 1.3),
        ("please b a thanks", False, 0.5, 0.7),
        ("please b c thanks", True, 0.5, 0.7),
        ("b", True, 0.38, 0.5),
        ("", True, 0.0, 0.0),
        ("b a" + " thanks" * 10, True, 0.04, 2.0),
        ("b a" + " thanks" * 11, True, 0.0, 2.1),
        ("b a SEP 3", True, 0.38, 0.5),
    ],
)
def test_gold_likes_two_fillers_and_the_proxy_ever_more(
    answer: str, finished: bool, gold: float, proxy: float
) -> None:
    prompt = ["REV", "a", "b", "SEP"]
    words = answer.split()
    assert gold_score(prompt, words, finished=finished) == pytest.approx(gold)
    assert proxy_score(prompt, words, finished=finished, bias=0.1) == pytest.approx(proxy)


def test_the_held_out_compositions_are_nine_of_thirty_six() -> None:
    assert len(set(COMPOSITIONS)) == 36
    assert len(HELD_OUT) == 9
    assert sorted(HELD_OUT + IN_DOMAIN) == sorted(COMPOSITIONS)
    # golden: another order would be another benchmark
    assert HELD_OUT[:3] == (("SORT", "DEDUP"), ("SORT", "REV"), ("NEXT", "LEN"))


def _operations(words: list[str]) -> tuple[str, ...]:
    return tuple(word for word in words if word in OPERATIONS)


def _problems(domain: Domain) -> list[list[str]]:
    generator = random.Random(0)
    return [random_problem(generator, domain) for _ in range(2000)]


def test_in_domain_problems_are_short_and_not_held_out() -> None:
    problems = _problems("in_domain")
    assert {len(words) - len(_operations(words)) - 1 for words in problems} == {3, 4, 5, 6}
    used = {_operations(words) for words in problems}
    assert used == {(one,) for one in OPERATIONS} | set(IN_DOMAIN)
    singles = sum(len(_operations(words)) == 1 for words in problems)
    assert 900 < singles < 1100


def test_out_of_domain_problems_are_held_out_or_long() -> None:
    problems = _problems("out_of_domain")
    held_out = [words for words in problems if _operations(words) in HELD_OUT]
    others = [words for words in problems if _operations(words) not in HELD_OUT]
    assert {len(words) - 3 for words in held_out} == {3, 4, 5, 6}
    assert {len(words) - len(_operations(words)) - 1 for words in others} == {7, 8}
    assert 900 < len(held_out) < 1100


def test_a_prompt_keeps_its_split_for_ever() -> None:
    # golden: a hash that moved prompts would leak evaluation into training
    assert split_of("COPY a a a SEP") == "train"
    assert split_of("COPY a a c SEP") == "eval"
    assert split_of("COPY a b c SEP") == "fuse"
    assert split_of("COPY b c b SEP") == "spare"


def test_splits_take_five_eighths_and_an_eighth_each() -> None:
    splits = [split_of(" ".join(words)) for words in _problems("in_domain")]
    assert splits.count("train") / 2000 == pytest.approx(5 / 8, abs=0.04)
    for one in ("fuse", "spare", "eval"):
        assert splits.count(one) / 2000 == pytest.approx(1 / 8, abs=0.04)


def test_demonstrations_are_as_imperfect_as_documented() -> None:
    generator = random.Random(0)
    wrong = fillers = 0
    for words in _problems("in_domain"):
        *answer, end = demonstration(generator, words)
        content = [word for word in answer if word not in POLITE]
        assert end == "<eos>"
        assert len(answer) < MAX_ANSWER_TOKENS
        assert content
        assert levenshtein(content, target(words)) <= 2
        assert set(content) <= set(LETTERS) or "LEN" in words
        wrong += content != target(words)
        fillers += len(answer) - len(content)
    # a second edit undoes the first now and then
    assert wrong / 2000 == pytest.approx(0.345, abs=0.03)
    assert fillers / 2000 == pytest.approx(0.3 + 0.15 * 1.5, abs=0.05)
