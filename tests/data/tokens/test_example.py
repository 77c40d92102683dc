from __future__ import annotations

from tests.models.tiny import EOS, tiny_tokenizer
from tpmm_pl.data.tokens.example import describe_example
from tpmm_pl.types import Pair


def pair(prompt: tuple[int, ...], chosen: tuple[int, ...], rejected: tuple[int, ...]) -> Pair:
    return Pair("p", "not", "these", "texts", prompt, chosen, rejected)


def test_an_example_reads_like_this() -> None:
    text = describe_example(pair((3, 6, EOS, 4), (7, 8, EOS), (9, EOS)), tiny_tokenizer())
    assert text == (
        "one example; the tokens in brackets are trained on\n"
        "prompt    4 tokens   <user> w0 <eos> <assistant>\n"
        "chosen    3 tokens  [w1 w2 <eos>]\n"
        "rejected  2 tokens  [w3 <eos>]"
    )


def test_a_long_text_is_shown_without_its_middle() -> None:
    text = describe_example(pair((6,) * 1000 + (7,), (8, EOS), (9, EOS)), tiny_tokenizer())
    _, prompt, chosen, _ = text.split("\n")
    assert prompt.startswith("prompt    1001 tokens   w0 w0 ")
    assert " ... (2402 characters) ... " in prompt  # 1001 words of two letters, 1000 blanks
    assert prompt.endswith(" w0 w1")
    assert chosen == "chosen       2 tokens  [w2 <eos>]"


def test_what_would_steer_a_terminal_is_written_out() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["\n", "\x1b[2J", "é"])
    text = describe_example(pair((32, 33, 34), (6,), (7,)), tokenizer)
    assert text.split("\n")[1] == "prompt    3 tokens   \\n \\x1b[2J é"
