"""Runs `tpmm` in forked children of one process that has imported everything, and kills them.

Reads a request a line from standard input, a JSON object: ``argv``, the file ``log`` for what the
child prints, the file ``seen`` for the batches it trains on, ``environment`` to add, and how it
ends:

- ``seconds``: SIGKILL from outside after so much processor time of the child; or
- ``strike``: a point that strikes the child with a signal from inside: ``signal`` by name,
  ``at`` a function as ``module:Class.function``, ``calls`` which of its calls, from 1, ``after``
  whether behind it; or in place of ``at`` a file, ``write``, part of the path of one that is being
  written beside its place: SIGKILL leaves half of it.

Answers a JSON object a line: ``code``, the exit code, negative for a signal, and ``seconds`` of the
child's processor time.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import reduce
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

_WARM = (
    "matplotlib.pyplot",
    "torch.utils.tensorboard",
    "tpmm_pl.callbacks",
    "tpmm_pl.commands.train",
    "tpmm_pl.toy.judges",
    "tpmm_pl.toy.module",
    "tpmm_pl.toy.start",
    "transformers.models.llama.modeling_llama",
)


def serve() -> None:
    """Answer requests until the input ends."""
    for name in _WARM:
        import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _be_child(request)
        answers.write(json.dumps(_watch(child, request.get("seconds"))) + "\n")
        answers.flush()


def _watch(child: int, seconds: float | None) -> dict[str, float]:
    ended = select.poll()
    ended.register(os.pidfd_open(child), select.POLLIN)
    clock = (~child << 3) | 2  # of a process's time on the processor, as Linux numbers clocks
    while not ended.poll(5):
        if seconds is not None and time.clock_gettime(clock) >= seconds:
            os.kill(child, signal.SIGKILL)
            seconds = None
    _, status, usage = os.wait4(child, 0)
    spent = usage.ru_utime + usage.ru_stime
    return {"code": os.waitstatus_to_exitcode(status), "seconds": spent}


def _be_child(request: dict[str, Any]) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 70
    try:
        sys.argv = ["tpmm", *request["argv"]]
        os.environ.update(request.get("environment") or {})
        _note_batches(Path(request["seen"]))
        if (strike := request.get("strike")) is not None:
            _arm(**strike)
        code = _main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _main() -> int:
    from tpmm_pl.cli import main

    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 71
    return 0


def _note_batches(seen: Path) -> None:
    from tpmm_pl.modules.dpo import DPOModule

    step = DPOModule.training_step

    def noting(self: Any, batch: Any, batch_idx: int) -> Any:
        tokens = sha256(b"".join(m.tree.tokens.numpy().tobytes() for m in batch)).hexdigest()[:16]
        with seen.open("a") as opened:
            opened.write(f"{self.current_epoch} {batch_idx} {tokens}\n")
        return step(self, batch, batch_idx)

    DPOModule.training_step = noting  # type: ignore[method-assign]


def _arm(
    *,
    signal: str,
    at: str = "",
    write: str = "",
    calls: Sequence[int] = (1,),
    after: bool = False,
) -> None:
    count = 0

    def strikes() -> bool:
        nonlocal count
        count += 1
        return count in calls

    if write:
        _arm_write(write, signal, strikes)
    else:
        _arm_call(at, signal, strikes, after)


def _arm_call(at: str, name: str, strikes: Callable[[], bool], after: bool) -> None:
    module, _, path = at.partition(":")
    *owners, attribute = path.split(".")
    owner = reduce(getattr, owners, import_module(module))
    original = getattr(owner, attribute)

    def struck(*args: Any, **kwargs: Any) -> Any:
        now = strikes()
        if now and not after:
            _strike(name)
        result = original(*args, **kwargs)
        if now and after:
            _strike(name)
        return result

    setattr(owner, attribute, struck)


def _arm_write(part: str, name: str, strikes: Callable[[], bool]) -> None:
    flush = os.fsync

    def struck(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.isfile(path) and re.search(part, path) and strikes():
            if name == "SIGKILL":
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            _strike(name)
        flush(descriptor)

    vars(os)["fsync"] = struck


def _strike(name: str) -> None:
    os.kill(os.getpid(), signal.Signals[name])


if __name__ == "__main__":
    serve()
