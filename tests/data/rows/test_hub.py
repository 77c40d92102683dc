from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest

from tpmm_pl.data.rows.hub import HubData, dataset_fingerprint, dataset_rows, is_saved
from tpmm_pl.data.rows.slices import Slice
from tpmm_pl.types import InputError

ROWS = [{"a": i} for i in range(10)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    both = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "both")
    both["train"].save_to_disk(tmp_path / "one")
    return tmp_path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Answer for the hub, and note what it was asked."""
    asked = []

    def load(path: str, name: str | None, **settings: Any) -> Any:
        asked.append({"path": path, "name": name, **settings})
        both = {split: datasets.Dataset.from_list(ROWS) for split in ("train", "test")}
        if settings["split"] not in (None, *both):
            raise ValueError(f'Unknown split "{settings["split"]}". Should be one of {[*both]}.')
        made = both[settings["split"]] if settings["split"] else datasets.DatasetDict(both)
        return made.to_iterable_dataset() if settings["streaming"] else made

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def values(data: HubData, part: Slice) -> list[int]:
    return [row["a"] for _, row in dataset_rows(data, part)]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_folder_are_read_by_split(folder: Path, streaming: bool) -> None:
    both, one = (HubData(str(folder / name), streaming=streaming) for name in ("both", "one"))
    assert is_saved(folder / "both")
    assert is_saved(folder / "one")
    assert not is_saved(folder)
    assert values(one, Slice()) == list(range(10))
    assert values(both, Slice("test")) == [0, 1]
    assert values(both, Slice("train", "3", "6")) == [3, 4, 5]
    [(where, _)] = dataset_rows(both, Slice("train", "3", "4"))
    assert where == f"{folder / 'both'} train, row 4"


def test_rows_counted_from_the_end_need_a_length(folder: Path) -> None:
    part = Slice("train", "-20%", "-1")
    assert values(HubData(str(folder / "both")), part) == [8]
    with pytest.raises(
        InputError, match=r"both: a stream does not tell how many rows it has; give"
    ):
        values(HubData(str(folder / "both"), streaming=True), part)


@pytest.mark.parametrize(
    ("split", "sentence"),
    [
        (None, r"both: no split is chosen; give split as one of train, test$"),
        ("tset", r"both: there is no split 'tset'; give split as one of train, test$"),
    ],
)
def test_a_split_that_is_not_there_is_named(folder: Path, split: str | None, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        values(HubData(str(folder / "both")), Slice(split))


def test_a_folder_that_is_broken_is_named(folder: Path) -> None:
    (folder / "one" / "state.json").write_text("{")
    with pytest.raises(
        InputError, match=r"one cannot be loaded \(JSONDecodeError: .+\); check path"
    ):
        values(HubData(str(folder / "one")), Slice())


def test_a_changed_folder_has_another_fingerprint(folder: Path) -> None:
    data = HubData(str(folder / "one"))
    before = dataset_fingerprint(data, Slice())
    assert before == dataset_fingerprint(data, Slice())
    datasets.Dataset.from_list(ROWS[1:]).save_to_disk(folder / "one")
    assert dataset_fingerprint(data, Slice()) != before


@pytest.mark.parametrize("streaming", [False, True])
def test_the_hub_is_asked_for_name_revision_and_split(
    hub: list[dict[str, Any]], streaming: bool
) -> None:
    data = HubData("someone/data", "config", "v1", streaming)
    assert list(islice(dataset_rows(data, Slice("test", "8")), 1)) == [
        ("someone/data config test, row 9", {"a": 8})
    ]
    assert hub == [
        {
            "path": "someone/data",
            "name": "config",
            "revision": "v1",
            "split": "test",
            "streaming": streaming,
        }
    ]


def test_a_wrong_split_of_the_hub_is_named_with_those_there_are(hub: object) -> None:
    with pytest.raises(InputError, match=r"someone/data: no split is chosen; .* train, test"):
        values(HubData("someone/data"), Slice())
    with pytest.raises(
        InputError, match=r"someone/data cannot be loaded .*Unknown split \"val\"\. S"
    ):
        values(HubData("someone/data"), Slice("val"))
    with pytest.raises(InputError, match=r"Unknown split"):
        dataset_fingerprint(HubData("someone/data"), Slice("val"))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset doesn't exist\nor is private"),
            r"no file or folder a/b, and no data set of this name on the Hugging Face hub that you",
        ),
        (
            ConnectionError("Couldn't reach 'a/b'"),
            r"no file or folder a/b, and the Hugging Face hub cannot be reached .*Couldn't",
        ),
        (
            RuntimeError("Dataset scripts\nx"),
            r"a/b cannot be loaded \(RuntimeError: Dataset scripts\)",
        ),
        (KeyError(), r"a/b cannot be loaded \(KeyError: \); check path, name, split and revision"),
    ],
)
def test_what_the_hub_answers_becomes_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    def load(*args: Any, **settings: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError, match=sentence) as raised:
        values(HubData("a/b"), Slice())
    assert "\n" not in str(raised.value)
