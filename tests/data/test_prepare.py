from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from tests.models.tiny import CHAT_TEMPLATE, EOS, WORDS, tiny_tokenizer
from tpmm_pl.data import prepare
from tpmm_pl.data.cache import Encoding, tokenizer_fingerprint
from tpmm_pl.data.prepare import Preparation
from tpmm_pl.data.rows.formats import preferences
from tpmm_pl.data.rows.report import DataReport
from tpmm_pl.data.rows.sources import DataSource
from tpmm_pl.data.table import PairTable
from tpmm_pl.data.tokens.chat import tokenize_pairs
from tpmm_pl.types import InputError

ENCODING = Encoding(max_length=32, max_prompt_length=16)


def chat(index: int) -> dict[str, object]:
    words = [WORDS[(index + k) % 26] for k in range(3)]
    return {
        "prompt": [{"role": "user", "content": f"{words[0]} {WORDS[index // 26 % 26]}"}],
        "chosen": [{"role": "assistant", "content": words[1]}],
        "rejected": [{"role": "assistant", "content": words[2]}],
    }


def plain(index: int, **changes: object) -> dict[str, object]:
    return {
        "prompt": WORDS[index],
        "chosen": WORDS[index + 1],
        "rejected": WORDS[index + 2],
        **changes,
    }


def write(path: Path, *rows: object) -> DataSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(str(path))


class Counted:
    """Counts the calls of the tokeniser."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(
        self, rows: Sequence[Any], tokenizer: PreTrainedTokenizerBase, **settings: Any
    ) -> tuple[PairTable, Counter[str]]:
        self.rows += len(rows)
        return tokenize_pairs(rows, tokenizer, **settings)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counter = Counted()
    monkeypatch.setattr(prepare, "tokenize_pairs", counter)
    return counter


def prepared(
    source: DataSource,
    cache: Path | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    encoding: Encoding = ENCODING,
    **settings: Any,
) -> tuple[PairTable, DataReport]:
    made = Preparation(tokenizer or tiny_tokenizer(), encoding, cache_dir=cache, **settings)
    (table,) = made.tables([source])
    return table, made.report


def test_a_table_holds_what_tokenising_all_rows_at_once_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_CHUNK", 7)
    rows = [chat(index) if index % 3 else plain(index % 20) for index in range(60)]
    source = write(tmp_path / "d.jsonl", *rows)
    expected, _ = tokenize_pairs(
        list(preferences(source, DataReport())),
        tiny_tokenizer(),
        max_length=32,
        max_prompt_length=16,
    )
    assert len(expected) == 60
    for cache in (tmp_path / "cache", None):
        table, report = prepared(source, cache)
        assert list(map(repr, table)) == list(map(repr, expected))
        assert report.sources[str(tmp_path / "d.jsonl")].read == 60


def test_a_second_start_calls_no_tokenizer_and_tells_the_same(
    tmp_path: Path, counted: Counted
) -> None:
    rows = [chat(index) for index in range(2998)]
    same = plain(0, chosen="w1", rejected="w1")
    cut = plain(1, chosen=" ".join(WORDS * 2))
    source = write(tmp_path / "d.jsonl", *rows, same, cut)
    first, told = prepared(source, tmp_path / "cache")
    assert counted.rows == 2999
    second, again = prepared(source, tmp_path / "cache")
    assert counted.rows == 2999
    assert list(map(repr, second)) == list(map(repr, first))
    assert again.table() == told.table()
    assert "dropped: chosen and rejected identical" in again.table()
    assert "cut: completions cut off" in again.table()


def test_the_memory_of_a_cached_pair_is_its_numbers_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", *[chat(index) for index in range(3000)])
    prepared(source, tmp_path / "cache")
    before = pa.total_allocated_bytes()
    table, _ = prepared(source, tmp_path / "cache")
    own = sum(values.nbytes for values in table.numbers.values())
    own += table.rows.nbytes + table.swapped.nbytes
    # six numbers and a bool, a place and a bool
    assert own == 58 * 3000
    # the numbers are among them; texts and tokens would be some hundred bytes a pair more
    assert pa.total_allocated_bytes() - before < 60 * 3000
    assert sum(1 for _ in table) == 3000


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("max_length", 31),
        ("max_prompt_length", 15),
        ("truncation", "keep_start"),
        ("whole_turns", True),
    ],
)
def test_each_setting_of_the_encoding_misses_the_cache(
    change: str, value: object, tmp_path: Path, counted: Counted
) -> None:
    source = write(tmp_path / "d.jsonl", chat(0))
    prepared(source, tmp_path / "cache")
    changed = {**vars(ENCODING), change: value}
    prepared(source, tmp_path / "cache", encoding=Encoding(**changed))
    assert counted.rows == 2


def test_a_changed_template_misses_the_cache(tmp_path: Path, counted: Counted) -> None:
    source = write(tmp_path / "d.jsonl", chat(0))
    tokenizer = tiny_tokenizer()
    first, _ = prepared(source, tmp_path / "cache", tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE.replace(" <eos>", " <system> <eos>")
    second, _ = prepared(source, tmp_path / "cache", tokenizer)
    assert counted.rows == 2
    assert second[0].chosen_ids != first[0].chosen_ids


def test_changed_rows_miss_the_cache_and_a_moved_file_hits_it(
    tmp_path: Path, counted: Counted
) -> None:
    prepared(write(tmp_path / "d.jsonl", chat(0)), tmp_path / "cache")
    prepared(write(tmp_path / "d.jsonl", chat(1)), tmp_path / "cache")
    assert counted.rows == 2
    _, report = prepared(write(tmp_path / "e.jsonl", chat(1)), tmp_path / "cache")
    assert counted.rows == 2
    assert list(report.sources) == [str(tmp_path / "e.jsonl")]


def test_a_weight_says_how_sources_are_mixed_and_hits_the_cache(
    tmp_path: Path, counted: Counted
) -> None:
    source = write(tmp_path / "d.jsonl", chat(0))
    prepared(source, tmp_path / "cache")
    prepared(DataSource(source.path, weight=0.5), tmp_path / "cache")
    assert counted.rows == 1


def test_padding_and_truncation_of_the_last_call_are_not_the_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["w1", "w1 w2"], padding=True, truncation=True, max_length=1)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_fingerprint(tokenizer) != before


def test_a_tokenizer_without_a_backend_has_a_fingerprint_too() -> None:
    assert tokenizer_fingerprint(ByT5Tokenizer()) == tokenizer_fingerprint(ByT5Tokenizer())
    other = ByT5Tokenizer(extra_ids=3)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(ByT5Tokenizer())


@pytest.mark.parametrize("damage", ["cut", "flip", "no entry", "foreign entry"])
def test_a_damaged_entry_is_made_again_and_said(
    damage: str, tmp_path: Path, counted: Counted, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "d.jsonl", *[chat(index) for index in range(5)])
    first = list(map(repr, prepared(source, tmp_path / "cache")[0]))
    (path,) = (tmp_path / "cache").glob("*/pairs.arrow")
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-100])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "no entry":
        path.with_name("entry.json").unlink()
    else:
        path.with_name("entry.json").write_text("[]")
    second, _ = prepared(source, tmp_path / "cache")
    assert counted.rows == 10
    assert list(map(repr, second)) == first
    said = capsys.readouterr().err
    assert said.count("are damaged") == 1
    assert "they are made again" in said


def _prepare_once(path: str, cache: Path) -> list[tuple[int, ...]]:
    (table,) = Preparation(tiny_tokenizer(), ENCODING, cache_dir=cache).tables([DataSource(path)])
    return [pair.chosen_ids for pair in table]


@pytest.mark.slow
def test_two_runs_at_once_make_an_entry_once(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", *[chat(index) for index in range(300)])
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.starmap(_prepare_once, [(source.path, tmp_path / "cache")] * 2)
    assert found[0] == found[1]
    assert [path.suffix for path in sorted((tmp_path / "cache").iterdir())] == ["", ".lock"]


def test_a_failed_preparation_leaves_no_entry(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", chat(0), {"prompt": "w1"})
    with pytest.raises(InputError, match=r"d\.jsonl, line 2"):
        prepared(source, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_bad_rows_are_skipped_within_their_number_also_from_the_cache(tmp_path: Path) -> None:
    answered = {**chat(1), "rejected": [{"role": "assistant"}]}
    source = write(tmp_path / "d.jsonl", chat(0), answered, chat(2))
    table, report = prepared(source, tmp_path / "cache", max_bad_rows=1)
    assert len(table) == 2
    assert len(report.sources[source.label].bad) == 1
    with pytest.raises(InputError, match=r"d\.jsonl, line 2.*max_bad_rows, now 0"):
        prepared(source, tmp_path / "cache", max_bad_rows=0)


def test_a_row_that_the_template_refuses_is_a_bad_row(tmp_path: Path) -> None:
    strict = "{{ raise_exception('no systems') if messages[0]['role'] == 'system' }}"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = strict.replace(" }}", " else '' }}") + CHAT_TEMPLATE
    system: list[object] = [{"role": "system", "content": "w3"}]
    refused = chat(1)
    refused["prompt"] = system + list(refused["prompt"])  # type: ignore[call-overload]
    source = write(tmp_path / "d.jsonl", chat(0), refused, chat(2))
    with pytest.raises(InputError, match=r"line 2: the chat template refuses .*_bad_rows, now 0"):
        prepared(source, None, tokenizer, max_bad_rows=0)
    table, report = prepared(source, None, tokenizer, max_bad_rows=1)
    assert [pair.prompt_ids[1:2] for pair in table] == [(6,), (8,)]
    assert len(report.sources[source.label].bad) == 1


def test_conversations_stay_with_their_prompts(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", chat(0), plain(3), chat(0), chat(2))
    table, _ = prepared(source, tmp_path / "cache")
    first, second, third = table.prompts()
    assert first.messages == ({"role": "user", "content": "w0 w0"},)
    assert (second.text, second.ids, second.messages) == ("w3", (9,), None)
    assert third.messages == ({"role": "user", "content": "w2 w0"},)


def test_a_stream_yields_the_pairs_of_its_sources_in_proportion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_CHUNK", 50)
    rare = write(tmp_path / "rare.jsonl", *[chat(index) for index in range(600)])
    often = write(tmp_path / "often.jsonl", *[plain(index % 20) for index in range(600)])
    sources = [DataSource(rare.path, weight=1), DataSource(often.path, weight=3)]
    report = DataReport()
    made = Preparation(tiny_tokenizer(), ENCODING)
    chunks = list(made.stream(sources, report, seed=0))
    assert [len(chunk) for chunk in chunks] == [50] * 24
    counts = [sum(pair.prompt in WORDS for pair in chunk) for chunk in chunks[:12]]
    # 600 draws at 3/4: 450, five standard deviations are 53
    assert sum(counts) == pytest.approx(450, abs=53)
    assert [report.sources[source.label].read for source in sources] == [600, 600]
    again = made.stream(sources, DataReport(), seed=0)
    assert list(map(repr, next(again))) == list(map(repr, chunks[0]))


def test_an_answer_ends_once(tmp_path: Path) -> None:
    table, _ = prepared(write(tmp_path / "d.jsonl", chat(0), plain(0)), tmp_path / "cache")
    assert all(pair.chosen_ids.count(EOS) == 1 == pair.rejected_ids.count(EOS) for pair in table)


def test_a_parquet_file_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist([plain(index) for index in range(20)]), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"d\.parquet cannot be read .*it may be cut off"):
        prepared(DataSource(str(path)), tmp_path / "cache")


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    source = write(tmp_path / "d.jsonl", plain(0))
    with pytest.raises(InputError, match=r"file/cache .*; choose another data\.cache_dir"):
        prepared(source, tmp_path / "file" / "cache")
