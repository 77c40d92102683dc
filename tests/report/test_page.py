from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.report.written_runs import arms, config, drift, gold, pair, write_run, write_scores
from tpmm_pl.report.page import Page, build_page

_VOID = {"meta", "br", "hr", "img", "input", "link"}
_LOADING = {"src", "srcset", "data", "action", "poster", "background"}
_HOSTILE = '</td><script>alert(1)</script><img src=http://x onerror="alert(2)">{{ 7*7 }} $x$'


class Reader(HTMLParser):
    """Reads a page strictly: tags must nest and close; text, tags and attributes are kept."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag
        self.text += " " * (tag in ("td", "th", "small", "div"))

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_self_contained(page: str) -> Reader:
    read = Reader(page)
    assert not {"script", "iframe", "object", "embed", "link", "img", "form"} & set(read.tags)
    assert not [one for one in read.attributes if one[0].startswith("on") or one[0] in _LOADING]
    links = {value for name, value in read.attributes if name.endswith("href")}
    assert all(link.startswith("#") for link in links)
    assert re.findall(r"url\((?!#)", page) == []
    ids = [value for name, value in read.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links} <= set(ids)
    return read


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    tmp_path = tmp_path_factory.mktemp("runs")
    folders = []
    for strategy in ("last", "learned"):
        for seed in (0, 1):
            folder = tmp_path / f"{strategy}-{seed}"
            pairs = [pair("p", "a prompt", f"of {strategy}", "worse")]
            metrics = drift(0.5, 0.4, 0.3, 0.2 + 0.1 * seed)
            write_run(folder, config(seed, strategy), metrics, pairs=pairs)
            write_scores(folder, 3, [0.0, 1.0])
            folders.append(folder)
    return build_page(arms(*folders), "a title", tmp_path / "figures")


def test_a_page_stands_alone(page: Page) -> None:
    read = assert_self_contained(page.html)
    assert read.tags.count("svg") == len(page.figures) // 2 == 7
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert ("content", policy) in read.attributes


def test_a_page_says_what_was_measured(page: Page) -> None:
    text = " ".join(Reader(page.html).text.split())
    assert "4 runs in 2 arms." in text
    assert "last 0.250 ± 0.071 3.000 ± 0.000 3.00 ± 0.00 0.40 ± 0.00" in text
    assert "learned against last in domain +0.000" in text
    assert 'reference.init_args.strategy "last" "learned"' in text
    assert "chosen of learned rejected worse" in text
    assert "Not measured" not in text


def test_every_figure_is_beside_the_page(page: Page) -> None:
    assert sorted(page.figures) == sorted(page.figures[0].parent.iterdir())
    assert {file.stem for file in page.figures} == {
        "scores", "divergence", "wins", "accuracy", "length", "over_optimisation", "coefficients"
    }  # fmt: skip


def test_the_summary_is_plain_json(page: Page) -> None:
    summary = json.loads(json.dumps(page.summary))
    last = summary["arms"][0]
    assert (last["name"], last["seeds"], last["rounds"]) == ("last", [0, 1], 3)
    assert last["results"]["last"]["gold/in_domain"] == pytest.approx([0.2, 0.3])
    assert set(last["over_optimisation"]) == {"gold/in_domain", "proxy/in_domain"}
    assert summary["comparisons"][0]["wins"] == pytest.approx([0.5, 0.5, 0.5])


def test_the_same_runs_make_the_same_page(tmp_path: Path) -> None:
    found = arms(write_run(tmp_path / "a", config(), drift(0.5, 0.4)))
    pages = [build_page(found, "a title", tmp_path / name).html for name in ("one", "two")]
    assert pages[0] == pages[1]


def test_what_data_models_and_folders_say_is_text(tmp_path: Path) -> None:
    settings = config(0, _HOSTILE, note=_HOSTILE)
    run = write_run(
        tmp_path / "<b>&amp;", settings, drift(0.5, 0.4),
        pairs=[pair("p", f"prompt {_HOSTILE}", f"chosen {_HOSTILE}", f"rejected {_HOSTILE}")],
    )  # fmt: skip
    found = arms(run, write_run(tmp_path / "<i>", None, drift(0.5, 0.4)))
    found[0].runs[0].store.update(1, notes={"guard": _HOSTILE})
    built = build_page(found, f"title {_HOSTILE}", tmp_path / "figures")
    read = assert_self_contained(built.html)
    for place in ("prompt", "chosen", "rejected", "title"):
        assert f"{place} {_HOSTILE}" in read.text
    assert "<b>&amp;" in read.text
    assert not {"b", "i"} & set(read.tags)


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    built = build_page(arms(write_run(tmp_path / "a", None, [{}])), "a title", tmp_path / "figures")
    read = assert_self_contained(built.html)
    for name in ("gold scores", "proxy scores", "KL to the start", "win rates"):
        assert f"Not measured: {name}" in read.text
    assert "Nothing to draw" in read.text
    assert "The runs hold no pairs." in read.text
    assert "The run has no config.yaml." in read.text
    assert "not recorded" in read.text
    assert built.figures == []


def test_an_unfinished_run_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    built = build_page(
        arms(write_run(tmp_path / "a", config(), gold(0.5, 0.4))), "a title", tmp_path / "figures"
    )
    assert "is unfinished: it has 1 of 2 rounds" in Reader(built.html).text
    assert [note for note in built.summary["notes"] if "unfinished" in note]
