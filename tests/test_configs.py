from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from tpmm_pl.cli import main

CONFIGS = sorted(Path("configs").glob("*.yaml"))
# which complete file an overlay lies on
BASE = {
    "quickstart_hard.yaml": "quickstart.yaml",
    "quickstart_broken.yaml": "quickstart.yaml",
    "quickstart_reward.yaml": "quickstart.yaml",
    "lora.yaml": "preferences.yaml",
    "mixed.yaml": "preferences.yaml",
    "noise.yaml": "preferences.yaml",
    "bf16.yaml": "preferences.yaml",
    "ddp.yaml": "quickstart.yaml",
    "fsdp2.yaml": "preferences.yaml",
}
OVERLAYS = sorted(Path("configs/overlays").glob("*.yaml"))


def parsed(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, object]:
    flags = [word for file in files for word in ("--config", str(file))]
    monkeypatch.setattr(sys, "argv", ["tpmm", "fit", *flags, "--print_config"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    printed: dict[str, object] = yaml.safe_load(capsys.readouterr().out)
    return printed


def contains(whole: object, part: object) -> bool:
    if isinstance(part, dict) and isinstance(whole, dict):
        # numbers that are keys are printed as text
        named = {str(key): value for key, value in whole.items()}
        return all(contains(named.get(str(key)), value) for key, value in part.items())
    return whole == part


def test_there_are_as_many_configs_as_are_parsed_below() -> None:
    assert len(CONFIGS) == 8
    assert {overlay.name for overlay in OVERLAYS} == set(BASE)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_config_parses(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = parsed([config], monkeypatch, capsys)
    assert printed["model"]
    assert printed["data"]


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_every_overlay_reaches_the_settings_of_its_base(
    overlay: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    together = parsed([Path("configs") / BASE[overlay.name], overlay], monkeypatch, capsys)
    assert contains(together, yaml.safe_load(overlay.read_text()))


@pytest.mark.parametrize("config", [*CONFIGS, *OVERLAYS], ids=lambda path: path.name)
def test_every_config_says_in_two_lines_what_it_is_and_how_to_run_it(config: Path) -> None:
    first, second, *_ = config.read_text().splitlines()
    assert first.startswith("# ")
    assert second.startswith("# tpmm fit --config configs/")
