"""Exported folders on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # public, unlisted

from tpmm_pl.models.location import first_line
from tpmm_pl.types import InputError


def check_repository(name: str) -> None:
    """Refuse what cannot be a repository's id.

    Raises:
        InputError: With an example.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(
            f"export.push_to_hub is {name!r}, which is no repository id; give one such as"
            " owner/name"
        ) from error


def push_folder(folder: Path, repository: str) -> str | None:
    """Upload a folder as the content of a model repository, which is made if it is not there.

    Args:
        folder: Complete on disk.
        repository: Its id, ``owner/name``.

    Returns:
        ``None``, or a sentence that says why it failed and how to repeat it: a run is not lost by
        what the hub refuses.
    """
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"Export {folder.name}"
        )
    except Exception as error:  # the kinds differ by version: network, permission, quota, token
        return (
            f"{folder} was not pushed to {repository} ({first_line(error)}); the folder is"
            f" complete, repeat with: hf upload {repository} {folder}"
        )
    return None
