from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {path.name: path.read_bytes() for path in (ROOT / "callbacks").glob("*.py")}


def run(
    *command: str | Path, cwd: Path, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path or "")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel made from it."""
    tree = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for folder in ("tpmm_pl", "callbacks"):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    out = tmp_path_factory.mktemp("dist")
    # no isolation: setuptools is a development dependency, so that no network is needed
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=tree)
    return out


@pytest.fixture(scope="module")
def installed(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside of the checkout that the wheel is installed in."""
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    (wheel,) = distributions.glob("*.whl")
    run(*pip, "--target", target, wheel, cwd=target)
    return target


def test_the_checkout_holds_real_callbacks_behind_one_relative_link() -> None:
    assert (ROOT / "tpmm_pl" / "callbacks").readlink() == Path("../callbacks")
    assert not (ROOT / "callbacks").is_symlink()
    assert "__init__.py" in SOURCES


def test_callbacks_cannot_be_imported_by_their_bare_name() -> None:
    spec = spec_from_file_location("callbacks", ROOT / "callbacks" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"tpmm_pl\.callbacks"):
        spec.loader.exec_module(module_from_spec(spec))


def test_wheel_holds_the_callbacks_inside_the_package_and_nothing_beside_it(
    distributions: Path,
) -> None:
    (path,) = distributions.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        packed = {
            Path(name).name: wheel.read(name)
            for name in names
            if name.startswith("tpmm_pl/callbacks/")
        }
    assert packed == SOURCES
    # the package and tpmm_pl-VERSION.dist-info
    assert {name.split("/")[0].split("-")[0] for name in names} == {"tpmm_pl"}


def test_wheel_holds_every_module_of_the_checkout(distributions: Path) -> None:
    (path,) = distributions.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        packed = {name for name in wheel.namelist() if name.endswith(".py")}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tpmm_pl").rglob("*.py")}
    assert packed == modules | {f"tpmm_pl/callbacks/{name}" for name in SOURCES}


def test_sdist_holds_the_callbacks_as_real_files(distributions: Path) -> None:
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        packed = {
            Path(member.name).name: file.read()
            for member in sdist
            if Path(member.name).parts[1:3] == ("tpmm_pl", "callbacks")
            if (file := sdist.extractfile(member)) is not None  # None for the folder itself
        }
    assert packed == SOURCES


def test_installed_wheel_shows_its_commands_away_from_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    where = "from importlib.util import find_spec; print(find_spec('tpmm_pl').origin)"
    found = run(sys.executable, "-c", where, cwd=tmp_path, path=installed)
    assert Path(found.stdout.strip()).is_relative_to(installed)
    assert "fit" in run(installed / "bin" / "tpmm", "--help", cwd=tmp_path, path=installed).stdout


@pytest.mark.slow
def test_installed_wheel_reads_the_quickstart_config(installed: Path, tmp_path: Path) -> None:
    config = shutil.copy(ROOT / "configs" / "quickstart.yaml", tmp_path)
    command = (installed / "bin" / "tpmm", "fit", "--print_config", "--config", config)
    printed = run(*command, cwd=tmp_path, path=installed).stdout
    assert "ReferenceMerge" in printed
