"""The directory of a run: where every fact of it is, and how it is found again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_accelerated import snapshot
from pytorch_accelerated.errors import RunDirectoryError
from pytorch_accelerated.metrics_log import COUNTERS, RowFile, Table, encode, read_rows, write_whole

if TYPE_CHECKING:
    from pytorch_accelerated.media import Media

RUN, METRICS, TABLE, PRINTED, MEDIA = "run.json", "metrics.jsonl", "metrics.csv", "log.txt", "media"
"""The files of a run directory: its facts, its log and the table of it, what was printed, images and the like."""

MEDIA_INDEX = f"{MEDIA}/index.jsonl"
"""The file with a row for each of the images and the like."""

CHECKPOINTS = "checkpoints"
"""The directory in a run directory that holds the checkpoints."""

_DELIVERED = ".delivered.jsonl"

REPORT_DATA = "report_data"
"""The directory in a run directory that holds what ``ReportCallback`` collects."""

FORMAT_VERSION = 1
_SECONDS_TO_WAIT_FOR_A_LOCK = 15.0  # workers of a process that was killed hold its lock for some seconds


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """Say where the directories of runs are to be, and what is to be asked of the code that makes them."""

    path: str | Path
    """Holds one directory for each run: ``1``, ``2`` and so on."""
    strict: bool = False
    """Whether to refuse to begin a run where the code differs from its git commit, or is in no repository."""
    save_script: bool = True
    """Whether to keep a copy of the script."""
    save_environment: bool = True
    """Whether to keep the environment variables, those that look like secrets hidden."""


class OpenRunDirectory:
    """A run directory in use, on the main process."""

    def __init__(self, path: Path) -> None:
        """Take hold of a directory.

        Raises:
            RunDirectoryError: if another process uses it.
        """
        from filelock import FileLock  # here and below: what no trainer uses is not imported

        self.path = path
        self._lock = FileLock(path / ".lock")
        self.hold()

    def hold(self) -> None:
        """Take hold of the directory again, if it was let go of.

        Raises:
            RunDirectoryError: if another process, or another trainer, uses it.
        """
        from filelock import Timeout

        if self._lock.is_locked:
            return
        path = self.path
        try:
            self._lock.acquire(timeout=_SECONDS_TO_WAIT_FOR_A_LOCK)
        except Timeout:
            raise RunDirectoryError(
                f"{path} is in use by another process, or by another trainer of this one, and two must not write to it "
                "at once. Wait until it has ended, or begin another run."
            ) from None
        # Others may have gone on with it meanwhile.
        self.facts: dict[str, Any] = read_run(path) if (path / RUN).exists() else {}
        self.log = RowFile(path / METRICS)
        self.table = Table(path / TABLE)
        self.media = RowFile(path / MEDIA_INDEX)

    @classmethod
    def create(cls, base: Path) -> OpenRunDirectory:
        """Make the directory with the next number, whoever else does the same at this moment.

        Raises:
            RunDirectoryError: if there cannot be one.
        """
        try:
            base.mkdir(parents=True, exist_ok=True)
            number = max((int(path.name) for path in base.iterdir() if path.name.isdecimal()), default=0) + 1
            while True:
                try:
                    (base / str(number)).mkdir()
                    return cls(base / str(number))
                except FileExistsError:  # somebody was faster
                    number += 1
        except OSError as error:
            raise RunDirectoryError(f"cannot make a run directory in {base}: {error}.") from error

    def note_run(self, facts: Mapping[str, Any]) -> None:
        """Note what is fixed for the length of a session; what was noted of the run before stays."""
        new = {"format": FORMAT_VERSION, "created": _now(), "sessions": []}
        self.facts = {**new, **self.facts, **facts}
        self._write_facts()

    @property
    def is_held(self) -> bool:
        """Whether it is this process's to write to."""
        return self._lock.is_locked

    def begin_session(self, options: RunDirectory, facts: Mapping[str, Any]) -> None:
        """Note that a process begins to work on the run, and under which circumstances."""
        script, git = snapshot.find_script(), snapshot.GitState(snapshot.find_directory(), self.path.parent)
        sessions = self.facts["sessions"]
        directory = self.path / "sessions" / str(len(sessions) + 1)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "git.diff").write_text(git.read_diff(), encoding="utf-8")
        (directory / "packages.txt").write_text(snapshot.list_packages(), encoding="utf-8")
        if options.save_environment:
            text = json.dumps(snapshot.describe_environment(), indent=1)
            (directory / "environment.json").write_text(text, encoding="utf-8")
        if options.save_script and script is not None:
            shutil.copyfile(script, directory / script.name)
        sessions.append(
            {
                "number": len(sessions) + 1,
                "started": _now(),
                "ended": None,
                "outcome": None,
                "error": None,
                "stopped": None,
                **facts,
                **snapshot.describe_machine(),
                "script": None if script is None else str(script),
                "git": git.describe(),
                "versions": snapshot.describe_versions(),
            }
        )
        self._write_facts()

    def end_session(self, outcome: str, error: str | None, stopped: str | None) -> None:
        """Note how the session ended: finished, failed or interrupted, and why it was stopped early."""
        self.facts["sessions"][-1] |= {"ended": _now(), "outcome": outcome, "error": error, "stopped": stopped}
        self._write_facts()

    def write_row(self, row: Mapping[str, Any]) -> None:
        """Add a row to the log and to its table."""
        self.log.append(row)
        if not self.table.append(row):
            self.table.rewrite(read_rows(self.log.path))

    def write_media(self, media: Media, counters: Mapping[str, Any]) -> None:
        """Keep an image or the like, and note when it came."""
        number = self.media.num_rows + 1
        files = media.write(self.path / MEDIA, f"{counters['num_updates']:08d}-{number}")
        names = [str(file.relative_to(self.path)) for file in files]
        self.media.path.parent.mkdir(exist_ok=True)
        self.media.append(
            {**counters, "kind": media.kind, "name": media.name, "files": names, "captions": media.captions}
        )

    def note_delivered(self, num_updates: int, num_rows: int, num_media: int) -> Counter[tuple[Any, ...]]:
        """Return what trackers have got that the log will have no more, now or since an earlier interruption.

        Kept in a file, because the log forgets it. Each is the updates, and the names of a row or kind and name of
        something to look at.

        Args:
            num_updates: that the run goes on from.
            num_rows: rows that the log is about to be cut to.
            num_media: rows that the index of media is about to be cut to.
        """
        rows = read_rows(self.log.path, missing_ok=True)[num_rows:]
        media = read_rows(self.media.path, missing_ok=True)[num_media:]
        cut = Counter((row["num_updates"], *sorted(row.keys() - set(COUNTERS))) for row in rows)
        cut.update((row["num_updates"], row["kind"], row["name"]) for row in media)
        file = RowFile(self.path / _DELIVERED)
        earlier = Counter(tuple(row["key"]) for row in read_rows(file.path, missing_ok=True))
        delivered = Counter({key: n for key, n in (cut | earlier).items() if key[0] >= num_updates})
        file.replace({"key": key} for key in delivered.elements())
        return delivered

    def begin_log(self, source: Path, num_rows: int, num_media: int) -> int:
        """Let the log consist of the first rows of another, or its own; return how many rows it lacks."""
        rows = read_rows(source / METRICS, missing_ok=True)[:num_rows]
        self.log.replace(rows)
        if rows:
            self.table.rewrite(rows)
        media = read_rows(source / MEDIA_INDEX, missing_ok=True)[:num_media]
        if media or self.media.num_rows:
            self.media.path.parent.mkdir(exist_ok=True)
            self.media.replace(media)
        if source.resolve() != self.path.resolve() and (source / MEDIA).is_dir():
            shutil.copytree(source / MEDIA, self.path / MEDIA, dirs_exist_ok=True, ignore=_leave_out_index)
        return num_rows - len(rows)

    def write_line(self, text: str) -> None:
        """Add to what was printed."""
        with (self.path / PRINTED).open("a", encoding="utf-8") as file:
            file.write(text)

    def let_go(self) -> None:
        """Let others use the directory."""
        self._lock.release()

    def _write_facts(self) -> None:
        write_whole(self.path / RUN, encode(self.facts, indent=1))


def find_runs(path: Path) -> list[Path]:
    """Return the run directories at a path, in the order of their numbers: itself, or those it holds.

    Raises:
        RunDirectoryError: if there is none.
    """
    if (path / RUN).is_file():
        return [path]
    found = list_runs(path)
    if not found:
        raise RunDirectoryError(
            f"there is no run in {path}: expected a directory that Trainer(run_dir=...) has made, with {RUN}, or one "
            "that holds such directories."
        )
    return found


def list_runs(base: Path) -> list[Path]:
    """Return the run directories in ``base``, in the order of their numbers."""
    found = [entry.parent for entry in base.glob(f"*/{RUN}")] if base.is_dir() else []
    return sorted(found, key=lambda run: (int(run.name) if run.name.isdecimal() else 0, run.name))


def find_by_id(base: Path, run_id: str) -> Path | None:
    """Return the newest run directory in ``base`` that is of a run; None where there is none."""
    return next((run for run in reversed(list_runs(base)) if read_run(run).get("run_id") == run_id), None)


def refuse_dirty_tree(base: Path) -> None:
    """Refuse to go on where the code is not that of a commit; the directories of runs do not count.

    Raises:
        RunDirectoryError: if it is not.
    """
    git = snapshot.GitState(snapshot.find_directory(), base)
    if git.commit is None:
        why = git.problem or f"{snapshot.find_directory()} is in no repository, or git is not installed"
        raise RunDirectoryError(
            f"a strict run directory needs code in a git commit: {why}. Commit the code, or leave strict out."
        )
    if git.changes:
        more = f" and {len(git.changes) - 5} more" if len(git.changes) > 5 else ""
        raise RunDirectoryError(
            f"a strict run directory needs code as it was committed, but {', '.join(git.changes[:5])}{more} differ(s) "
            f"from commit {git.commit[:10]}. Commit or stash it, or leave strict out."
        )


def run_of_checkpoint(checkpoint: Path) -> Path | None:
    """Return the run directory that a checkpoint lies in; None where it lies elsewhere."""
    owner = checkpoint.resolve().parent.parent
    return owner if checkpoint.parent.name == CHECKPOINTS and (owner / RUN).is_file() else None


def read_run(path: Path) -> dict[str, Any]:
    """Return the facts of a run.

    Raises:
        RunDirectoryError: if they cannot be read.
    """
    try:
        facts: dict[str, Any] = json.loads((path / RUN).read_text(encoding="utf-8"))
        version = facts["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"{path / RUN} cannot be read: {error!r}. Is {path} a run directory?") from error
    if version > FORMAT_VERSION:
        raise RunDirectoryError(
            f"{path} was made by a newer version of this library: its format is {version}, and this version reads up "
            f"to {FORMAT_VERSION}. Upgrade: pip install --upgrade pytorch-accelerated."
        )
    return facts


def _leave_out_index(directory: str, names: list[str]) -> list[str]:
    return [name for name in names if f"{Path(directory).name}/{name}" == MEDIA_INDEX]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
