"""Nothing that is read can bring code along."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path for folder in ("tpmm_pl", "callbacks") for path in (ROOT / folder).rglob("*.py")
)
_PICKLING = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def faults(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"imports {one.name}" for one in node.names if _pickles(one.name))
        elif isinstance(node, ast.ImportFrom) and _pickles(node.module or ""):
            yield f"imports {node.module}"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _trusting_defaults(node)
        elif isinstance(node, ast.Call):
            yield from _trusting_calls(node)


def _pickles(module: str) -> bool:
    return module.partition(".")[0] in _PICKLING


def _trusting_defaults(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    given = function.args
    places = given.posonlyargs + given.args
    with_defaults = [
        *zip(places[len(places) - len(given.defaults) :], given.defaults, strict=True),
        *zip(given.kwonlyargs, given.kw_defaults, strict=True),
    ]
    for argument, default in with_defaults:
        trusted = argument.arg == "trust_remote_code" and default is not None
        if trusted and not (isinstance(default, ast.Constant) and default.value is False):
            yield f"{function.name} trusts remote code by default"


def _trusting_calls(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
    if name == "torch.load" and given.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    elif given.get("weights_only") == "False" and not name.endswith("save_checkpoint"):
        yield f"{name} with weights_only=False"
    for word in ("trust_remote_code", "allow_pickle"):
        if given.get(word) == "True":
            yield f"{name} with {word}=True"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_unpickles_or_trusts_remote_code(path: Path) -> None:
    assert list(faults(ast.parse(path.read_text(encoding="utf-8")))) == []


def test_all_files_are_looked_at() -> None:
    assert len(FILES) > 80


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import torch, dill as d",
        "from joblib.numpy_pickle import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=choice)",
        "trainer.fit(module, weights_only=False)",
        "def load(path, trust_remote_code=True): ...",
        "def load(path, *, trust_remote_code=None): ...",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_what_could_bring_code_along_is_found(code: str) -> None:
    assert len(list(faults(ast.parse(code)))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(path, weights_only=True)",
        "trainer.save_checkpoint(path, weights_only=False)",
        "def load(path, *, trust_remote_code=False): ...",
        "def load(path, trust_remote_code): ...",
        "AutoModel.from_pretrained(path, trust_remote_code=self.trust_remote_code)",
    ],
)
def test_what_brings_none_is_let_pass(code: str) -> None:
    assert list(faults(ast.parse(code))) == []
