"""The command ``tpmm``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import NamedTuple, get_origin, get_type_hints


class Command(NamedTuple):
    """A command: where it lives, its positional arguments with help, and what it does."""

    module: str
    function: str
    positional: Mapping[str, str]
    does: str


COMMANDS = {
    "fit": Command(
        "train", "train", {}, "train policies round after round, reward models, or merge weights"
    ),
    "pairs": Command(
        "pairs",
        "make_pairs",
        {"run": "folder of a run whose fit waits for completions"},
        "sample and judge a part of a round's completions, as a job of its own",
    ),
    "merge": Command(
        "merge",
        "merge_models",
        {"sources": "folders or hub ids of models of one architecture, or the folder of one run"},
        "merge checkpoints of any trainer, or a run's snapshots, into one model",
    ),
    "upcycle": Command(
        "upcycle",
        "upcycle_model",
        {"model": "hub id or folder of a dense reward model with one output"},
        "make a dense reward model a mixture of experts",
    ),
    "consolidate": Command(
        "consolidate",
        "consolidate_model",
        {"directory": "mixture of experts, as `tpmm upcycle` and its training write it"},
        "merge a mixture of experts into a dense reward model",
    ),
    "report": Command(
        "report",
        "report_runs",
        {"runs": "run folders, or folders of runs; those that differ only in the seed are one arm"},
        "show runs on one page: curves, over-optimisation, coefficients, samples",
    ),
}
_SWITCHES = {
    "overwrite": "replace what is at --out",
    "json": "print one JSON object and nothing else",
    "normalize": "divide the merge by the sum of the weights",
    "trust_remote_code": "run code that comes with a model",
}
"""Settings that are on where they are named, of the commands that have them."""

_HELP = """usage: tpmm COMMAND [options]

Preference alignment that stays good in late rounds.

commands:
{commands}

examples:
  tpmm fit --config configs/quickstart.yaml
  tpmm fit --config configs/quickstart.yaml --reference.strategy last
  tpmm upcycle runs/reward_dense/export/reward --out runs/experts
  tpmm merge sft dpo-1 dpo-2 --out merged
  tpmm report runs/ablation --out report.html
  tpmm COMMAND --help
"""


def main() -> None:
    """Run the command in ``sys.argv``; exit 0 done, 1 the run failed, 2 usage or bad input."""
    # three deprecations that Lightning's use of jsonargparse 4.53 triggers
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    # tables of weights that a fresh head lacks, and of layers that no device mesh shards
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<12} {one.does}" for name, one in COMMANDS.items())
        print(_HELP.format(commands=lines))
        return
    if arguments[0] not in COMMANDS:
        near = get_close_matches(arguments[0], COMMANDS, n=2) or list(COMMANDS)
        _end(2, f"there is no command {arguments[0]!r}; did you mean {' or '.join(near)}?")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars are for terminals
    # imported late: torch, transformers and lightning take seconds, `tpmm --help` should not
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from tpmm_pl.files import disk_fault
    from tpmm_pl.types import InputError, RunError

    command = COMMANDS[arguments[0]]
    function = getattr(import_module(f"tpmm_pl.commands.{command.module}"), command.function)
    try:
        if arguments[0] == "fit":
            function()
        else:
            _call(function, command, arguments)
    except InputError as error:
        _end(2, str(error))
    except SIGTERMException:
        sys.exit(143)
    except Exception as error:
        if (fault := disk_fault(error)) is not None:
            again = "go on with --ckpt_path last" if arguments[0] == "fit" else "run it again"
            _end(1, f"{fault}, then {again}")
        if isinstance(error, RunError):
            _end(1, str(error))
        raise


def _call(function: Callable[..., None], command: Command, arguments: list[str]) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"tpmm {arguments[0]}", description=command.does)
    kinds = get_type_hints(function)
    for name, text in command.positional.items():
        several = "+" if get_origin(kinds[name]) is list else None
        parser.add_argument(name, type=str, nargs=several, help=text)
    switches = {name: text for name, text in _SWITCHES.items() if name in kinds}
    for name, text in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    handled: set[str | int] = {*command.positional, *switches}
    parser.add_function_arguments(function, as_group=False, as_positional=False, skip=handled)
    settings = parser.instantiate_classes(parser.parse_args(_underscored(arguments[1:])))
    function(**vars(settings))


def _underscored(arguments: list[str]) -> list[str]:
    # --shared-coefficient is --shared_coefficient
    names = (argument.partition("=") for argument in arguments)
    return [
        (name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name) + rest
        for name, *value in names
        for rest in ["".join(value)]
    ]


def _end(code: int, sentence: str) -> None:
    print(f"tpmm: error: {sentence}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
