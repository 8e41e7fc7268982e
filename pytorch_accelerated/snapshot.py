"""The circumstances of a run: code, packages, environment, hardware."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

SECONDS_FOR_GIT = 60.0
"""How long git may take for all that one ``GitState`` asks of it: a run is not to wait for a file system that hangs."""

_LARGEST_UNTRACKED_FILE, _MOST_UNTRACKED_FILES = 1_000_000, 200  # bytes; beyond them it is data rather than code

# A name is secret by how one of its words ends (APIKEY, but not KEYBOARD; TOKEN, but not TOKENIZERS), or by a part that
# leaves no doubt wherever it stands.
_SECRET_NAME = re.compile(
    r"(?:KEY|TOKEN|PASS|PWD|JWT|DSN|AUTH|(?<!SA)CRED|(?<![A-Z])PAT|CONN(?:ECTION)?_?STR(?:ING)?)S?[0-9]*(?![A-Z])"
    r"|SECRET|PASSW|PASSPHR|CREDENTIAL|AUTHORI[SZ]ATION|AUTHENTIC|COOKIE|WEBHOOK|PRIVATE"
)
_SECRET_VALUE = re.compile(
    r"""://[^\s/?#]*@|://[^\s/@:]*:[^\s@]*@                           # user info in a URL; a password may hold a slash
    |(?i://[^\s/]*\bhooks\.|hooks\.slack\.com|discord(?:app)?\.com/api/webhooks|webhook\.office\.com)
    |(?i:(?:key|token|secret|signature|password|passwd|(?<![a-z])sig|(?<![a-z])pwd)(?:=|["']\s*:))
    |eyJ[\w-]*\.[\w-]*\.                                            # a JSON web token
    |(?<![\w-])(?:gh[pousr]_|github_pat_|glpat-|xox[baprs]-)\w
    |(?<![\w-])(?:sk-[\w-]{8}|AKIA[0-9A-Z]{16})
    |(?<![\w/-])hf_(?:(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8}|[a-z]{16})    # no hf_cache, no hf_checkpoints
    |-----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY""",
    re.VERBOSE,
)
_SECRET_FILE = re.compile(
    r"\.env.*|.*\.(?:env|pem|key|p12|pfx|jks|keystore|kdbx|ppk|asc|gpg)|id_(?:rsa|dsa|ecdsa|ed25519).*"
    r"|.*(?:credential|secret|passwo?r?d).*|.*(?:token|api[_-]?key)s?(?:\.(?!py$|ipynb$).*)?"
    r"|[._]netrc|\.(?:pgpass|npmrc|pypirc|htpasswd)|kaggle\.json",
    re.IGNORECASE,
)
_SECRET_DIRECTORY = re.compile(r"\.(?:env|ssh|aws|gnupg|kube)|.*(?:credential|secret).*", re.IGNORECASE)


def find_script() -> Path | None:
    """Return the file that Python was started with; None in a notebook, at a prompt, and for a program of a package."""
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    return Path(path).resolve() if path and Path(path).is_file() else None


def find_directory() -> Path:
    """Return the directory of the script; without one the working directory."""
    script = find_script()
    return Path.cwd() if script is None else script.parent


class GitState:
    """The commit that a directory's repository is at, and what differs from it."""

    def __init__(self, directory: Path, left_out: Path) -> None:
        """Ask git; there is no commit where there is no repository, no git, or one that cannot tell.

        Args:
            directory: any in the repository.
            left_out: a directory in which nothing counts as a change.
        """
        self.problem: str | None = None
        """Why git could not tell; None where it could, and where there is no repository or no git."""
        self.root, self._seconds_left = directory.resolve(), SECONDS_FOR_GIT
        self.commit = self._ask("rev-parse", "--verify", "HEAD")
        self.branch, entries = None, list[str]()
        if self.commit is not None:
            self.branch = self._ask("rev-parse", "--abbrev-ref", "HEAD")
            self.root = Path(self._ask("rev-parse", "--show-toplevel") or directory).resolve()
            # -z: names as they are.
            status = self._ask("status", "--porcelain", "--no-renames", "--untracked-files=all", "-z")
            outside = left_out.resolve()
            entries = [entry for entry in (status or "").split("\0") if entry]
            entries = [entry for entry in entries if not (self.root / entry[3:]).is_relative_to(outside)]
        if self.problem is not None:
            self.commit = None  # a commit without its changes would pass for code as it was committed
        self.changes = [entry[3:] for entry in entries]
        """Files that differ from the commit or are not in it, relative to ``root``."""
        self._untracked = [entry[3:] for entry in entries if entry.startswith("??")]

    def read_diff(self) -> str:
        """Return what ``git apply`` needs to make the code of this moment from the commit.

        It has what has changed in files that git knows, and the untracked text files of up to 1 MB, 200 at most, that
        are not in the directory left out and whose name does not look like a secret's.
        """
        if self.commit is None:
            return ""
        patches = [self._read_patch("HEAD")]
        untracked = [path for path in self._untracked if not _holds_secrets(path) and _is_text(self.root / path)]
        for path in untracked[:_MOST_UNTRACKED_FILES]:
            patches.append(self._read_patch("--no-index", "--", "/dev/null", path))
        return "".join(patches)

    def describe(self) -> dict[str, Any] | None:
        """Return commit, branch and what has changed as plain data; None where there is no repository, or no git.

        Where git could not tell there is no commit, but the ``problem``.
        """
        problem = {} if self.problem is None else {"problem": self.problem}
        if self.commit is None:
            return {"commit": None, **problem} if problem else None
        return {
            "commit": self.commit,
            "branch": self.branch,
            "is_dirty": bool(self.changes),
            "changes": self.changes[:200],
            **problem,
        }

    def _read_patch(self, *what: str) -> str:
        # Against the user's settings, under which a diff may not be a patch.
        plain = "--binary --no-color --no-ext-diff --no-textconv --unified=3 --ignore-submodules=dirty"
        arguments = ("diff", *plain.split(), "--src-prefix=a/", "--dst-prefix=b/", *what)
        patch = self._run(*arguments, expected=(0, 1)) or b""  # 1: files differ
        try:
            return patch.decode()
        except UnicodeDecodeError:  # a file in another encoding, which only a binary patch takes through a text
            with tempfile.NamedTemporaryFile("w", suffix=".gitattributes") as attributes:
                attributes.write("* -diff\n")
                attributes.flush()
                patch = self._run("-c", f"core.attributesFile={attributes.name}", *arguments, expected=(0, 1)) or b""
            return patch.decode(errors="replace")

    def _ask(self, *arguments: str) -> str | None:
        output = self._run(*arguments)
        return None if output is None else output.decode(errors="replace").rstrip()

    def _run(self, *arguments: str, expected: tuple[int, ...] = (0,)) -> bytes | None:
        git = shutil.which("git")
        if git is None or self.problem is not None:  # what has failed once is not waited for again
            return None
        # No lock of the repository is taken, so that a commit made at the same time does not fail. Messages are read.
        environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
        environment.pop("GIT_DIFF_OPTS", None)  # stronger than the arguments
        asked, started = f"git {' '.join(arguments)}"[:60], time.monotonic()
        try:
            done = subprocess.run(
                [git, "-C", str(self.root), *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=environment,
                timeout=self._seconds_left,
                check=False,
            )
        except subprocess.TimeoutExpired:
            self.problem = f"{asked} took too long: git is given {SECONDS_FOR_GIT:g} seconds"
            return None
        except OSError as error:
            self.problem = f"{asked} could not be run: {error}"
            return None
        self._seconds_left = max(0.0, self._seconds_left - (time.monotonic() - started))
        if done.returncode in expected:
            return done.stdout
        message = done.stderr.decode(errors="replace").strip()
        if "not a git repository (or any" not in message:  # which is no problem; a broken link to one is
            self.problem = f"{asked} failed with exit code {done.returncode}: {message[:500] or 'no message'}"
        return None


@functools.cache  # hundreds of files are read; what is installed is asked for in each run of a process
def list_packages() -> str:
    """Return the installed distributions with their versions, one a line, as ``pip freeze`` would."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata  # parsed anew by each access, also by those of .name and .version
        name = metadata["Name"] or ""
        found.setdefault(name.lower(), f"{name}=={metadata['Version']}")  # the first one on the path is imported
    return "".join(f"{line}\n" for name, line in sorted(found.items()) if name)


def describe_versions() -> dict[str, str]:
    """Return the versions of what numbers depend on most."""
    versions = {"python": platform.python_version()}
    for name in ("pytorch-accelerated", "torch", "accelerate", "torchmetrics", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a source tree that is on the path without being installed
            versions[name] = "not installed"
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    return versions


def describe_environment() -> dict[str, str]:
    """Return the environment variables; those whose name or value looks like a secret are hidden."""
    return {
        name: "<hidden>" if _is_secret_variable(name) or _SECRET_VALUE.search(value) else value
        for name, value in sorted(os.environ.items())
    }


def describe_command() -> list[str]:
    """Return the command line of this process, with what looks like a secret hidden."""
    return [_hide(word, before) for before, word in itertools.pairwise(["", *sys.orig_argv])]


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """Return processor, memory and accelerators of this machine."""
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": _find_processor(),
        "num_cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "device": str(device),
    }
    if device.type == "cuda":
        facts["gpus"] = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        facts["gpu_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
    return facts


def describe_machine() -> dict[str, Any]:
    """Return where this process runs."""
    return {"host": socket.gethostname(), "process_id": os.getpid(), "cwd": os.getcwd(), "command": describe_command()}


def _find_processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else platform.machine()


def _has_secret_name(name: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)  # apiKey
    return bool(_SECRET_NAME.search(re.sub(r"[^A-Z0-9]+", "_", words.upper())))


def _is_secret_variable(name: str) -> bool:
    return name not in ("PWD", "OLDPWD") and _has_secret_name(name)  # the two are directories


def _hide(word: str, before: str) -> str:
    is_option = re.fullmatch(r"-[^=:\s]+", before) is not None  # one that has no value yet
    if is_option and _has_secret_name(before):
        return "<hidden>"  # also where it begins with a dash: a password may
    for separator in re.finditer("[=:]", word):
        name = word[: separator.start()]
        is_name = separator[0] == "=" or "/" not in name  # tests/test_key.py::test_it is none
        if is_name and _has_secret_name(name) and not _SECRET_VALUE.search(name):
            return f"{word[: separator.end()]}<hidden>"
    return "<hidden>" if _SECRET_VALUE.search(word) else word


def _holds_secrets(path: str) -> bool:
    *directories, name = Path(path).parts
    return bool(_SECRET_FILE.fullmatch(name)) or any(_SECRET_DIRECTORY.fullmatch(part) for part in directories)


def _is_text(path: Path) -> bool:
    try:
        if path.is_symlink():
            return not path.is_dir()  # git compares what is in the directory
        if not path.is_file() or path.stat().st_size > _LARGEST_UNTRACKED_FILE:
            return False
        return b"\0" not in path.read_bytes()
    except OSError:  # gone meanwhile, or not ours to read
        return False
