"""The command ``tpmm``."""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches

COMMANDS = {
    "fit": "train a policy round after round, or the coefficients of a finished trajectory",
}

_HELP = """usage: tpmm COMMAND [options]

Preference alignment that stays good in late rounds.

commands:
{commands}

examples:
  tpmm fit --config configs/quickstart.yaml
  tpmm fit --config configs/quickstart.yaml --reference.strategy last
  tpmm fit --help
"""


def main() -> None:
    """Run the command in ``sys.argv``; exit 0 done, 1 the run failed, 2 usage or bad input."""
    # three deprecations that Lightning's use of jsonargparse 4.53 triggers
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
        print(_HELP.format(commands=lines))
        return
    if arguments[0] not in COMMANDS:
        near = get_close_matches(arguments[0], COMMANDS, n=2) or list(COMMANDS)
        _end(2, f"there is no command {arguments[0]!r}; did you mean {' or '.join(near)}?")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars are for terminals
    # imported late: torch, transformers and lightning take seconds, `tpmm --help` should not
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from tpmm_pl.commands.train import train
    from tpmm_pl.types import InputError, RunError

    try:
        train()
    except InputError as error:
        _end(2, str(error))
    except RunError as error:
        _end(1, str(error))
    except SIGTERMException:
        sys.exit(143)


def _end(code: int, sentence: str) -> None:
    print(f"tpmm: error: {sentence}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
