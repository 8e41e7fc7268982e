"""The log of a run: one JSON object a line for each moment at which something was measured, and a table of the same."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

COUNTERS = ("num_samples", "num_steps", "num_updates", "current_epoch", "num_skipped_updates", "seconds")
"""What each row begins with: how far the run had come, and the seconds it had taken, interruptions left out."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RowFile:
    """A file of rows, one JSON object a line, that a run adds to and that an interrupted run goes on with."""

    def __init__(self, path: Path) -> None:
        """Take the path; what is there already is kept."""
        self.path = path
        # Counted and not read: an evaluation that opens the directory again need not understand the log.
        self.num_rows = path.read_bytes().count(b"\n") if path.exists() else 0

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row; it is in the file when this returns, and on the disk after ``sync``."""
        # Opened for each row: rows come at log points only, and nobody has to close the file of a run that dies.
        with self.path.open("ab") as file:
            file.write(encode(row))
        self.num_rows += 1

    def sync(self) -> None:
        """Wait until all rows are on the disk: a checkpoint must not be newer than the rows it counts."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def replace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Put other rows in the place of all there are, at once or not at all."""
        lines = [encode(row) for row in rows]
        write_whole(self.path, b"".join(lines))
        self.num_rows = len(lines)


class Table:
    """A CSV file that shows the rows of a log, one column for each counter and value."""

    def __init__(self, path: Path) -> None:
        """Take the path; ``rewrite`` brings the file to be."""
        self.path = path
        self._columns: list[str] = []

    def append(self, row: Mapping[str, Any]) -> bool:
        """Write a row, and return whether it had a place: with a value that has no column yet, call ``rewrite``."""
        if not self._columns or any(name not in self._columns for name in row):
            return False
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(self._lines([row]))
        return True

    def rewrite(self, rows: list[dict[str, Any]]) -> None:
        """Write all rows anew."""
        names = dict.fromkeys(name for row in rows for name in row)
        self._columns = [*COUNTERS, *(name for name in names if name not in COUNTERS)]
        head = io.StringIO()
        csv.writer(head).writerow(self._columns)
        write_whole(self.path, (head.getvalue() + self._lines(rows)).encode())

    def _lines(self, rows: Iterable[Mapping[str, Any]]) -> str:
        lines = io.StringIO()
        writer = csv.writer(lines)
        for row in rows:
            writer.writerow([_as_cell(row.get(name)) for name in self._columns])
        return lines.getvalue()


def encode(data: Mapping[str, Any], indent: int | None = None) -> bytes:
    """Return plain data as strict JSON, in which numbers that are not finite are strings."""
    return json.dumps(_as_json(data), ensure_ascii=False, allow_nan=False, indent=indent).encode() + b"\n"


def read_rows(path: Path, missing_ok: bool = False) -> list[dict[str, Any]]:
    """Return the rows of a file, numbers that are not finite as such.

    A last line without an end, as a process that was killed may leave behind, is no row.

    Args:
        path: of the file.
        missing_ok: whether a file that is not there has no rows.

    Raises:
        FileNotFoundError: if there is no file, and there must be one.
        ValueError: if another line is no row.
    """
    rows: list[dict[str, Any]] = []
    if missing_ok and not path.exists():
        return rows
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}.")
        rows.append({name: _from_json(value) for name, value in row.items()})
    return rows


def is_loss(name: str) -> bool:
    """Return whether a value is a loss, of which lower is better; of nothing else the name says what is better.

    Losses are the values of training and evaluation whose last word, ``_epoch`` left out, is ``loss``: ``train_loss``,
    ``eval_loss_epoch``, ``evaluation_test_loss``, and those that only the user knows, such as ``eval_hamming_loss``:
    from the name nobody could tell it from the loss of an evaluation set. ``eval_gloss``, ``train_loss_kl`` and
    ``my_loss`` are none.
    """
    return re.fullmatch(r"(train|eval|evaluation)_(.+_)?loss(_epoch)?", name, re.DOTALL) is not None


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return whether a value is a number, finite or not; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def format_seconds(seconds: float) -> str:
    """Return a time as hours, minutes and seconds: ``1:02:03``."""
    if not math.isfinite(seconds):
        return str(seconds)
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file at once or not at all."""
    replace_file(path, lambda unfinished: unfinished.write_bytes(content))


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` write a file, which appears at ``path`` at once or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _as_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(name): _as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return value if isinstance(value, str | int | float | None) else repr(value)


def _from_json(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    return [_from_json(item) for item in value] if isinstance(value, list) else value


def _as_cell(value: Any) -> Any:
    if value is None:
        return ""
    return json.dumps(_as_json(value)) if isinstance(value, list | tuple | dict) else _as_json(value)
