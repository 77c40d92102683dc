"""The versions that runs were made with."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from tpmm_pl.models.card import CARD
from tpmm_pl.report.runs import Run

_PACKAGES = ("tpmm_pl", "torch", "transformers", "peft", "lightning")
_ROW = re.compile(r"^\| (\w+) \| (\S+) \|$", re.MULTILINE)


def recorded_versions(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return versions by package as the model cards of runs have them, distinct ones in order."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for card in sorted(run.path.glob(f"export/*/{CARD}")):
            _, _, section = card.read_text(encoding="utf-8").partition("## Versions\n")
            for package, number in _ROW.findall(section):
                if package != "package" and number != "---":
                    found.setdefault(package, {})[number] = None
    return {package: list(numbers) for package, numbers in found.items()}


def present_versions() -> dict[str, str]:
    """Return the versions of what runs now, when the report is made."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            # a checkout on the path has no metadata
            continue
    return found
