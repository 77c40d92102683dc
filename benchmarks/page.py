"""What benchmarks write into the documentation: tables between markers, and peaks of memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_section(path: Path, name: str, text: str) -> None:
    """Put ``text`` between the markers ``<!-- name -->`` and ``<!-- /name -->`` of a file."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{path} has no section {begin} ... {end}")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def private_bytes(status: str) -> int:
    """Read the anonymous resident memory from the text of ``/proc/self/status``."""
    line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


class PeakOfMemory:
    """Samples private memory from a thread every 2 ms while the block runs."""

    def __enter__(self) -> PeakOfMemory:
        self.start = self.peak = _private()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, _private())


def _private() -> int:
    return private_bytes(Path("/proc/self/status").read_text(encoding="ascii"))
