from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tpmm_pl.models import hub
from tpmm_pl.models.hub import check_repository, push_folder
from tpmm_pl.types import InputError


class RecordingHub:
    """Stands for the hub's client; writes down what it is asked."""

    calls: list[tuple[Any, ...]]
    fails: Exception | None = None

    def create_repo(self, repo_id: str, *, exist_ok: bool) -> None:
        self.calls.append(("create_repo", repo_id, exist_ok))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        files = sorted(path.name for path in folder_path.iterdir())
        self.calls.append(("upload_folder", repo_id, files, commit_message))
        if self.fails is not None:
            raise self.fails


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> RecordingHub:
    one = RecordingHub()
    one.calls = []
    monkeypatch.setattr(hub, "HfApi", lambda: one)
    return one


def test_a_folder_becomes_the_repositorys_content(recorder: RecordingHub, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "README.md").write_text("card")
    assert push_folder(tmp_path / "merged", "owner/name") is None
    assert recorder.calls == [
        ("create_repo", "owner/name", True),
        ("upload_folder", "owner/name", ["README.md"], "Export merged"),
    ]


@pytest.mark.parametrize("error", [OSError("no network\nmore"), RuntimeError("no network")])
def test_a_failed_push_says_how_to_repeat_it(
    error: Exception, recorder: RecordingHub, tmp_path: Path
) -> None:
    recorder.fails = error
    sentence = push_folder(tmp_path, "owner/name")
    assert sentence == (
        f"{tmp_path} was not pushed to owner/name (no network); the folder is complete, repeat"
        f" with: hf upload owner/name {tmp_path}"
    )


def test_what_cannot_be_a_repository_is_refused() -> None:
    check_repository("owner/name")
    for name in ("https://huggingface.co/owner/name", "a/b/c", ""):
        with pytest.raises(InputError, match=r"is no repository id; give one such as owner/name"):
            check_repository(name)
