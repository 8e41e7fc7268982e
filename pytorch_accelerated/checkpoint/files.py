"""How files are written so that no kill leaves half of one, and how the newest whole checkpoint is found.

A checkpoint is a directory. It is written under another name beside its place; each file is flushed to the disk, the
manifest, which holds size and SHA-256 of each, comes last; then the directory is renamed, which happens at once or not
at all, and the directory above it is flushed. So what bears a checkpoint's name is complete, unless the storage lost
something, and that is what the manifest shows.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from pytorch_accelerated.errors import CheckpointError

FORMAT_VERSION = 1
"""Grows when older versions of the library could no longer read what is written."""

MANIFEST = "manifest.json"
"""The file that names all others."""

MODEL, OPTIMIZER, STATE, FACTS = "model.safetensors", "optimizer.pt", "state.pt", "run.json"
"""The other files of a checkpoint: weights; optimizer; random streams, callbacks and the like; counters and history."""

_NAME = re.compile(r"checkpoint-(\d+)-epoch-\d+-update-\d+")
_TEMPORARY, _DISCARDED = ".tmp-", ".discarded-"
_CHUNK = 1 << 22
_SMALL = 1 << 16
_FLUSH_EVERY = 1 << 25
_SECONDS_UNTIL_STALE = 3600.0


def checkpoint_name(sequence: int, epoch: int, update: int) -> str:
    """Return the name of a checkpoint's directory; the greatest ``sequence`` is the newest."""
    return f"checkpoint-{sequence:06d}-epoch-{epoch}-update-{update}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Return what bears a checkpoint's name in a directory, whole or not, newest first."""
    numbered = [(int(match[1]), path) for path in _entries(directory) if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def is_superseded(path: Path) -> bool:
    """Return whether the directory of a checkpoint holds a newer one that is whole."""
    for newer in list_checkpoints(path.parent):
        if newer.name == path.name:
            break
        with suppress(CheckpointError):  # a damaged one does not count
            verify(newer)
            return True
    return False


def next_sequence(directory: Path) -> int:
    """Return the number for the next checkpoint in a directory."""
    newest = next(iter(list_checkpoints(directory)), None)
    match = _NAME.fullmatch(newest.name) if newest else None
    return int(match[1]) + 1 if match else 1


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"cannot look into {directory}: {error.strerror}.") from error


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------


class DurableFile:
    """A file to write to that finds its hash on the way and reaches the disk before it is closed.

    An error while writing is kept and raised by ``close``, because writers in C++ would bury it.
    """

    def __init__(self, path: Path, threads: ThreadPoolExecutor) -> None:
        """Create the file at ``path``; one of two ``threads`` hashes meanwhile, the other keeps the disk busy."""
        self.size = 0
        self._digest = hashlib.sha256()
        self._threads = threads
        self._hashing: Future[None] | None = None
        self._flushing: Future[None] | None = None
        self._size_at_flush = 0
        self._error: OSError | None = None
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)

    def write(self, data: Any) -> int:
        """Write bytes, or anything with the bytes of a contiguous buffer; return how many."""
        view = memoryview(data).cast("B")
        if self._error is None:
            try:
                self._write(view)
            except OSError as error:
                self._error = error
        return view.nbytes

    def flush(self) -> None:
        """Do nothing: there is no buffer. Writers call it."""

    def close(self) -> str:
        """Flush the file to the disk, close it and return the hash. Raises OSError, also one that came earlier."""
        try:
            self._wait_for_flush()
            if self._error is not None:
                raise self._error
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Close the file as it is."""
        with suppress(OSError):  # something else has failed already
            self._wait_for_flush()
        os.close(self._descriptor)

    def _write(self, view: memoryview) -> None:
        try:
            for start in range(0, view.nbytes, _CHUNK):
                chunk = view[start : start + _CHUNK]
                self._wait()
                if chunk.nbytes <= _SMALL:
                    self._digest.update(chunk)
                else:  # beside the writing; both let go of Python's lock
                    self._hashing = self._threads.submit(self._digest.update, chunk)
                written = 0
                while written < chunk.nbytes:  # the system may take less than it is given
                    written += os.write(self._descriptor, chunk[written:])
                self.size += chunk.nbytes
                self._flush_early()
        finally:
            self._wait()  # the caller may use its buffer again

    def _flush_early(self) -> None:
        """Let the disk begin with what is written, so that there is little to wait for at the end."""
        is_idle = self._flushing is None or self._flushing.done()
        if is_idle and self.size - self._size_at_flush >= _FLUSH_EVERY:
            self._wait_for_flush()
            self._size_at_flush = self.size
            self._flushing = self._threads.submit(os.fsync, self._descriptor)

    def _wait_for_flush(self) -> None:
        """Wait for an early flush. Raises OSError if it failed, which the system tells only once."""
        if self._flushing is not None:
            flushing, self._flushing = self._flushing, None
            flushing.result()

    def _wait(self) -> None:
        if self._hashing is not None:
            hashing, self._hashing = self._hashing, None
            hashing.result()


Writer = Callable[[DurableFile], None]


def write_file(path: Path, writer: Writer) -> str:
    """Write one file that takes the place of any other at once, and return its SHA-256.

    Raises:
        CheckpointError: if it cannot be written; the message says whether what was at ``path`` is as it was.
    """
    temporary = path.parent / f"{_temporary_prefix()}{path.name}"
    is_replaced = False
    try:
        _make_directory(path.parent)
        with ThreadPoolExecutor(max_workers=2) as threads:
            digest, _ = _write(temporary, writer, threads)
        os.replace(temporary, path)
        is_replaced = True
        _sync_directory(path.parent)
        return digest
    except OSError as error:
        raise _cannot_save(path, error, is_replaced) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_checkpoint(target: Path, writers: Mapping[str, Writer], facts: Mapping[str, Any]) -> None:
    """Write a checkpoint; it appears under its name complete, or not at all.

    Args:
        target: the directory to be; must not exist yet.
        writers: for the name of each file, what writes it.
        facts: what the manifest says besides names, sizes and hashes.

    Raises:
        CheckpointError: if there is something at ``target``, or it cannot be written.
    """
    temporary = target.parent / f"{_temporary_prefix()}{target.name}"
    try:
        if os.path.lexists(target):
            raise CheckpointError(f"{target} is there already, and a checkpoint never replaces another.")
        _make_directory(target.parent)
        temporary.mkdir()
        files: dict[str, dict[str, Any]] = {}
        with ThreadPoolExecutor(max_workers=2) as threads:
            for name, writer in writers.items():
                digest, size = _write(temporary / name, writer, threads)
                files[name] = {"size": size, "sha256": digest}
            content = {"format_version": FORMAT_VERSION, **facts, "files": files}
            _write(temporary / MANIFEST, lambda file: _write_all(file, _sealed(content)), threads)
        _sync_directory(temporary)
        os.replace(temporary, target)
        try:
            _sync_directory(target.parent)
        except OSError:
            os.replace(target, temporary)  # it might not outlive a loss of power, so it is not there
            raise
    except OSError as error:
        raise _cannot_save(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already, unless something was raised


def _write_all(file: DurableFile, data: bytes) -> None:
    file.write(data)


def _write(path: Path, writer: Writer, threads: ThreadPoolExecutor) -> tuple[str, int]:
    file = DurableFile(path, threads)
    is_written = False
    try:
        writer(file)
        is_written = True
    finally:
        if not is_written:
            file.abandon()
    return file.close(), file.size


def _make_directory(path: Path) -> None:
    """Make a directory and those above it that are missing, and flush their names to the disk."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        _sync_directory(directory.parent)


def _sync_directory(path: Path) -> None:
    """Flush the names in a directory to the disk, where the system knows of that."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that flush names by themselves
            raise
    finally:
        os.close(descriptor)


def _temporary_prefix() -> str:
    return f"{_TEMPORARY}{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}-"


def _host() -> str:
    return re.sub(r"\W", "_", socket.gethostname())


def _cannot_save(target: Path, error: OSError, is_replaced: bool = False) -> CheckpointError:
    where = f" ({error.filename})" if error.filename and str(error.filename) != str(target) else ""
    rest = "What was saved before is as it was; nothing of this one is left behind."
    if is_replaced:
        rest = "It has been replaced, but may be lost if the power fails."
    return CheckpointError(f"cannot save {target}: {error.strerror or error}{where}. {rest}")


def check_writable(directory: Path) -> None:
    """Make a directory, and write a file into it for trial. Raises CheckpointError if that fails."""
    trial = directory / f"{_temporary_prefix()}trial"
    try:
        _make_directory(directory)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise _cannot_save(directory, error) from error


def remove_leftovers(directory: Path) -> None:
    """Delete what saves that were killed have left in a directory; what another process may be writing stays."""
    for path in _entries(directory):
        match = re.match(rf"({re.escape(_TEMPORARY)}|{re.escape(_DISCARDED)})(\w+)-(\d+)-", path.name)
        if match is None:
            continue
        with suppress(OSError, OverflowError):  # a number that is too large for a process is nobody's
            is_alive = match[2] == _host() and int(match[3]) != os.getpid() and psutil.pid_exists(int(match[3]))
            age = time.time() - path.lstat().st_mtime
            if not is_alive and (match[2] == _host() or age > _SECONDS_UNTIL_STALE):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def remove_old(candidates: list[Path], max_checkpoints: int) -> None:
    """Delete checkpoints, so that at most ``max_checkpoints`` are left.

    Args:
        candidates: whole checkpoints, newest first.
        max_checkpoints: how many of them stay.

    Raises:
        CheckpointError: if one cannot be deleted.
    """
    for path in candidates[max_checkpoints:]:
        # Renamed first: a kill in the middle must not leave something that bears a checkpoint's name.
        discarded = path.parent / f"{_DISCARDED}{_host()}-{os.getpid()}-{path.name}"
        try:
            os.replace(path, discarded)
            shutil.rmtree(discarded)
        except OSError as error:
            raise CheckpointError(f"cannot delete the old checkpoint {path}: {error.strerror}.") from error


# --------------------------------------------------------------------------------------------------------------------
# Verifying and finding
# --------------------------------------------------------------------------------------------------------------------


def _sealed(content: dict[str, Any]) -> bytes:
    """Return the bytes of a manifest: its content, and the hash of that."""
    return _dumps({"content": content, "sha256": hashlib.sha256(_dumps(content)).hexdigest()})


def _dumps(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's manifest.

    Raises:
        CheckpointError: if it is not there, is damaged, or is of a newer version of the library.
    """
    try:
        data = _read(path / MANIFEST)
        sealed = json.loads(data)
        content: dict[str, Any] = sealed["content"]
        is_whole = _sealed(content) == data
        version = int(content["format_version"])
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{MANIFEST} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        raise CheckpointError(f"{MANIFEST} is damaged") from None
    if not is_whole:
        raise CheckpointError(f"{MANIFEST} is damaged")
    if version > FORMAT_VERSION:
        raise CheckpointError(f"it has format {version}, and this version of the library reads up to {FORMAT_VERSION}")
    return content


def verify(path: Path) -> dict[str, Any]:
    """Check each file of a checkpoint by size and hash, and return the content of its manifest.

    Raises:
        CheckpointError: if a file is missing or damaged; the message names the file and what is wrong with it.
    """
    content = read_manifest(path)
    try:
        files = {str(name): (int(facts["size"]), str(facts["sha256"])) for name, facts in content["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise CheckpointError(f"{MANIFEST} is damaged") from None
    for name in (MODEL, OPTIMIZER, STATE, FACTS):
        if name not in files:
            raise CheckpointError(f"{MANIFEST} does not name {name}")
    for name, (expected_size, expected_hash) in files.items():
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise CheckpointError(f"{MANIFEST} names the file {name!r}, which is not one of the checkpoint's directory")
        try:
            size = _stat_plain(path / name).st_size
            if size != expected_size:
                raise CheckpointError(f"{name} has {size} bytes instead of {expected_size}")
            if _hash(path / name) != expected_hash:
                raise CheckpointError(f"{name} is damaged: its SHA-256 is not the one in {MANIFEST}")
        except FileNotFoundError:
            raise CheckpointError(f"{name} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error.strerror}") from error
        except ValueError:  # no name of a file has such characters
            raise CheckpointError(f"{MANIFEST} names the file {name!r}, which cannot be") from None
    return content


def _stat_plain(path: Path) -> os.stat_result:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path.name} is not a plain file")
    return found


def _read(path: Path) -> bytes:
    _stat_plain(path)
    return path.read_bytes()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_newest(directory: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest whole checkpoint in a directory; None if there is no checkpoint at all.

    Args:
        directory: where to look; it may be missing.
        say: called with a line for each checkpoint that is passed over.

    Raises:
        CheckpointError: if there are checkpoints, but none is whole.
    """
    candidates = list_checkpoints(directory)
    for path in candidates:
        try:
            verify(path)
            return path
        except CheckpointError as error:
            say(f"Passed over {path}: {error}.")
    if candidates:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoints in {directory} is whole. To begin anew, move them away."
        )
    return None


def is_checkpoint(path: Path) -> bool:
    """Return whether a directory is a checkpoint, whole or not, rather than one that holds some."""
    if _NAME.fullmatch(path.name) is not None or (path / MANIFEST).exists():
        return True
    # A damaged one by another name. Weights alone may lie beside the checkpoints of a directory.
    return not list_checkpoints(path) and any((path / name).exists() for name in (OPTIMIZER, STATE, FACTS))


@contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """Let whatever goes wrong while a checkpoint is read be told as its damage."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"the checkpoint {path} lacks {Path(str(error.filename)).name}.") from error
    except Exception as error:
        if type(error).__name__ == "UnpicklingError":
            # Torch's own words propose to run what is in it.
            raise CheckpointError(f"{path} is damaged, or holds more than plain data, which is not loaded.") from None
        raise CheckpointError(f"the checkpoint {path} cannot be read: {type(error).__name__}: {error}") from error
