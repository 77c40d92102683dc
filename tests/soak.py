"""Kills runs again and again: each goes on from where the last kill has left it.

    python tests/soak.py --kills 300

A chain of runs of one configuration. Every start of a run is killed by SIGKILL at a random moment,
up to some times a run; then it may end, and is compared bit for bit with a run that nobody has
killed. A killed start that has done less than its predecessors counts: more than a few in a row
mean that a run makes no progress. Ends with 1 on any difference.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# tests are no installed package
sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.killed_runs import ROUNDS, SIGKILLED, Runs, differences, leftovers
from tpmm_pl.trajectory import TrajectoryStore

_KILLS_A_RUN = 12
_SPAN = (0.3, 0.8)
"""Shares of a whole run's time between which a start is killed. Nearly half of it goes by until the
settings are read and the model is loaded; a start that was resumed has less left to do."""
_STILL = 6
"""Kills in a row, each after at least half the time of a whole run, that may bring nothing."""


@dataclass
class Account:
    """What became of one run of the chain."""

    number: int
    kills: int = 0
    where: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def row(self) -> str:
        """Return the run's row of the table."""
        stopped = " ".join(f"{name}:{count}" for name, count in sorted(self.where.items()))
        return f"{self.number:>4} {self.kills:>5}  {'; '.join(self.wrong) or 'same':<12}  {stopped}"


def main() -> int:
    """Run the chain; return 1 if a run differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    began, accounts = time.monotonic(), list[Account]()
    with Runs(folder) as runs:
        runs.fit("start")  # makes the start that all share
        whole = runs.fit("unbroken")
        if whole.code:
            print(runs.log("unbroken").read_text(), file=sys.stderr)
            return 1
        print(f"a whole run: {whole.seconds:.1f} s of processor time, {ROUNDS} rounds")
        print(" run kills  end           killed in (round.stages on disk: times)", flush=True)
        for account in _chain(runs, whole.seconds, options.kills, random.Random(options.seed)):
            accounts.append(account)
            print(account.row(), flush=True)
    shutil.rmtree(folder)
    broken = sum(bool(account.wrong) for account in accounts)
    kills = sum(account.kills for account in accounts)
    print(
        f"{kills} kills in {len(accounts)} runs, {broken} runs differ;"
        f" seed {options.seed}, {time.monotonic() - began:.0f} s"
    )
    return int(broken > 0)


def _chain(runs: Runs, seconds: float, kills: int, moments: random.Random) -> Iterator[Account]:
    left, number = kills, 0
    while left:
        number += 1
        account = Account(number)
        _one(runs, account, seconds, min(left, moments.randint(1, _KILLS_A_RUN)), moments)
        left -= account.kills
        shutil.rmtree(runs.root(f"run_{number}").parent)
        yield account


def _one(runs: Runs, account: Account, seconds: float, kills: int, moments: random.Random) -> None:
    name, still = f"run_{account.number}", 0
    while account.kills < kills and still <= _STILL:
        before = _progress(runs.root(name))
        moment = seconds * moments.uniform(*_SPAN)
        code = runs.resume(name, seconds=moment).code
        if code != SIGKILLED:
            account.wrong += [f"exit code {code}"] if code else []
            break
        account.kills += 1
        after = _progress(runs.root(name))
        place = f"{after[0]}.{after[1]}"
        account.where[place] = account.where.get(place, 0) + 1
        still = 0 if after != before or moment < seconds / 2 else still + 1
    if still > _STILL:
        account.wrong.append(f"{still} kills in a row brought nothing")
    ended = runs.resume(name)
    if ended.code:
        account.wrong.append(runs.log(name).read_text().strip().splitlines()[-1])
    else:
        account.wrong += differences(runs, name, "unbroken")
        account.wrong += [f"left over: {path.name}" for path in leftovers(runs.root(name))]


def _progress(root: Path) -> tuple[int, int, float]:
    records = TrajectoryStore(root / "trajectory").rounds
    checkpoint = root / "checkpoints" / "last.ckpt"
    written = checkpoint.stat().st_mtime if checkpoint.exists() else 0.0
    if not records:
        return -1, 0, written
    return records[-1].round, len(set(records[-1].seconds) - {"train"}), written


if __name__ == "__main__":
    sys.exit(main())
