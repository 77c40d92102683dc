from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tpmm_pl.report.figures import gold_proxy_figure
from tpmm_pl.trajectory import Record

RECORDS = [
    Record(
        index,
        metrics={
            "gold/in_domain": 0.5 + 0.1 * index,
            "proxy/in_domain": 1.0 * index,
            "kl/policy_sft/in_domain": 2.0 * index,
        },
    )
    for index in range(3)
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    save = Figure.savefig

    def kept(self: Figure, *args: object, **settings: object) -> None:
        figures.append(self)
        save(self, *args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", kept)
    return figures


def lines(axes: Axes) -> dict[str, list[float]]:
    return {str(line.get_label()): list(line.get_ydata()) for line in axes.lines}  # type: ignore[arg-type]


def test_gold_proxy_and_divergence_are_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    out = tmp_path / "figures" / "gold_proxy.png"
    assert gold_proxy_figure(RECORDS, out, "a run")
    assert out.read_bytes().startswith(b"\x89PNG")
    scores, divergence = drawn[0].axes
    assert lines(scores) == {
        "gold, in domain": pytest.approx([0.5, 0.6, 0.7]),
        "proxy, in domain": [0.0, 1.0, 2.0],
    }
    assert list(lines(divergence).values()) == [[0.0, 2.0, 4.0]]
    assert drawn[0].get_suptitle() == "a run"


def test_a_merge_is_drawn_from_the_round_that_has_one(tmp_path: Path, drawn: list[Figure]) -> None:
    later = Record(3, metrics={"merge/gold/in_domain": 0.9, "gold/out_of_domain": 0.2})
    assert gold_proxy_figure([*RECORDS, later], tmp_path / "figure.png", "a run")
    (merge,) = [line for line in drawn[0].axes[0].lines if line.get_label() == "gold of the merge"]
    assert (list(merge.get_xdata()), list(merge.get_ydata())) == ([3], [0.9])  # type: ignore[arg-type]


@pytest.mark.parametrize("records", [[], [Record(0, metrics={"proxy/in_domain": 1.0})]])
def test_without_gold_nothing_is_drawn(records: list[Record], tmp_path: Path) -> None:
    assert not gold_proxy_figure(records, tmp_path / "figure.png", "a run")
    assert list(tmp_path.iterdir()) == []
