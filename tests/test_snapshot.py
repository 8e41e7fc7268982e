"""What is recorded of code, packages, environment and command line: enough to bring the code back, and no secrets."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pytorch_accelerated import snapshot
from pytorch_accelerated.snapshot import GitState, describe_command, describe_environment, list_packages

ROOT = Path(__file__).parent.parent


def git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), "-c", "user.name=n", "-c", "user.email=e@x", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a git repository with one commit, of a few files."""
    project = tmp_path / "project"
    (project / "package").mkdir(parents=True)
    (project / "train.py").write_text("x = 1\ny = 2\nz = 3\n")
    (project / "gone.py").write_text("old\n")
    (project / "moved.py").write_text("".join(f"line {number}\n" for number in range(30)))
    (project / "package" / "latin.txt").write_bytes("caf\u00e9\n".encode("latin-1"))
    (project / "weights.bin").write_bytes(bytes(range(256)))
    (project / ".gitignore").write_text("ignored/\n")
    git(project, "init", "--quiet", "--initial-branch", "main")
    git(project, "add", ".")
    git(project, "commit", "--quiet", "-m", "first")
    return project


def make_clone(repository: Path) -> Path:
    """Return a clean checkout of the repository's commit."""
    clone = repository.parent / "clone"
    git(repository.parent, "clone", "--quiet", str(repository), str(clone))
    return clone


def apply(diff: str, clone: Path) -> None:
    patch = clone.parent / "git.diff"
    patch.write_text(diff, encoding="utf-8")
    git(clone, "apply", str(patch))


def read_tree(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Return the modes and contents of all files, those of git itself left out."""
    return {
        str(path.relative_to(directory)): (
            path.lstat().st_mode,
            os.fsencode(os.readlink(path)) if path.is_symlink() else path.read_bytes(),
        )
        for path in directory.rglob("*")
        if (path.is_symlink() or path.is_file()) and ".git" not in path.relative_to(directory).parts
    }


def put_fake_git(monkeypatch: pytest.MonkeyPatch, directory: Path, script: str) -> None:
    """Put another git before the real one on the path, which the script has as ``$REAL``."""
    real = shutil.which("git")
    (directory / "bin").mkdir()
    (directory / "bin" / "git").write_text(f"#!/bin/sh\nREAL={real}\n{script}\n")
    (directory / "bin" / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory / 'bin'}{os.pathsep}{os.environ['PATH']}")


def test_the_diff_brings_all_of_the_code_back(repository: Path) -> None:
    clone = make_clone(repository)
    (repository / "train.py").write_text("x = 1\ny = 22\nz = 3")  # and no line end
    (repository / "gone.py").unlink()
    git(repository, "mv", "moved.py", "package/moved_here.py")
    (repository / "weights.bin").write_bytes(bytes(reversed(range(256))))
    (repository / "staged.py").write_text("staged = 1\n")
    git(repository, "add", "staged.py")
    (repository / "new").mkdir()
    (repository / "new" / "model.py").write_text("n\u00e4 = '\u2603'\nwindows\r\nmac\rend")
    (repository / "new" / 'a "strange" n\u00e4me\twith tab.py').write_text("strange\n")
    (repository / "-dash.py").write_text("dash\n")
    (repository / "new" / "empty.py").write_text("")
    (repository / "new" / "run.sh").write_text("#!/bin/sh\n")
    (repository / "new" / "run.sh").chmod(0o755)
    (repository / "link.py").symlink_to("train.py")
    (repository / "new" / "tokenizer.py").write_text("t\n")
    state = GitState(repository / "package", repository / "runs")
    assert state.problem is None and state.root == repository.resolve()
    apply(state.read_diff(), clone)
    assert read_tree(clone) == read_tree(repository)
    assert (clone / "new" / "empty.py").exists() and (clone / "link.py").is_symlink()


def test_files_in_another_encoding_come_back(repository: Path) -> None:
    clone = make_clone(repository)
    (repository / "package" / "latin.txt").write_bytes("th\u00e9\n".encode("latin-1"))
    (repository / "package" / "new.txt").write_bytes("\u00fcber\n".encode("latin-1"))
    apply(GitState(repository / "package", repository / "runs").read_diff(), clone)
    assert read_tree(clone) == read_tree(repository)


def test_the_settings_of_the_user_do_not_break_the_diff(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = make_clone(repository)
    settings = {
        "color.ui": "always",
        "diff.noprefix": "true",
        "diff.mnemonicPrefix": "true",
        "diff.relative": "true",
        "diff.context": "0",
        "diff.external": "false",
        "diff.upper.textconv": "tr a-z A-Z <",
        "status.showUntrackedFiles": "no",
        "core.quotePath": "false",
    }
    for name, value in settings.items():
        git(repository, "config", name, value)
    monkeypatch.setenv("GIT_DIFF_OPTS", "--unified=0")
    (repository / ".git" / "info" / "attributes").write_text("*.py diff=upper\n")
    (repository / "train.py").write_text("x = 1\ny = 22\nz = 3\n")
    (repository / "n\u00e4w.py").write_text("new\n")
    apply(GitState(repository / "package", repository / "runs").read_diff(), clone)
    assert read_tree(clone) == read_tree(repository)


def test_what_is_no_code_is_not_in_the_diff(repository: Path) -> None:
    (repository / "runs" / "1").mkdir(parents=True)
    (repository / "runs" / "1" / "log.txt").write_text("MARK\n")
    (repository / "ignored").mkdir()
    (repository / "ignored" / "x.py").write_text("MARK\n")
    (repository / "large.txt").write_text("MARK\n" * 200_001)
    (repository / "binary.npy").write_bytes(b"MARK\0")
    (repository / "directory").symlink_to(repository / "package")
    nested = repository / "nested"
    git(repository, "init", "--quiet", str(nested))
    (nested / "x.py").write_text("MARK\n")
    state = GitState(repository, repository / "runs")
    assert state.read_diff() == "" and state.problem is None
    assert "large.txt" in state.changes and "runs/1/log.txt" not in state.changes
    (repository / "fits.txt").write_text("MARK\n" * 200_000)
    assert "fits.txt" in GitState(repository, repository / "runs").read_diff()


@pytest.mark.parametrize(
    "name",
    [
        ".env", ".env.local", ".envrc", "prod.env", "server.pem", "tls.key", "id_rsa", "id_ed25519.pub", "credentials",
        "aws_credentials.json", "Credentials.csv", "client_secret.json", "passwords.txt", "hf_token", "token.txt",
        "api_key.txt", ".netrc", ".npmrc", "kaggle.json", ".aws/config", "secrets/plain.txt",
    ],
)  # fmt: skip
def test_untracked_files_that_look_secret_are_not_in_the_diff(repository: Path, name: str) -> None:
    (repository / name).parent.mkdir(exist_ok=True)
    (repository / name).write_text("MARK\n")
    state = GitState(repository, repository / "runs")
    assert state.changes == [name] and state.read_diff() == ""


@pytest.mark.parametrize("name", ["tokenizer.py", "token.py", "keys.py", "environment.yml", "tokens/vocabulary.py"])
def test_other_untracked_files_are_in_the_diff(repository: Path, name: str) -> None:
    (repository / name).parent.mkdir(exist_ok=True)
    (repository / name).write_text("MARK\n")
    assert "+MARK" in GitState(repository, repository / "runs").read_diff()


def test_the_diff_has_200_untracked_files_at_most(repository: Path) -> None:
    for number in range(203):
        (repository / f"new_{number:03}.py").write_text("x\n")
    diff = GitState(repository, repository / "runs").read_diff()
    assert re.findall(r"^\+\+\+ b/new_(\d+)\.py", diff, re.MULTILINE) == [f"{number:03}" for number in range(200)]


def test_the_state_is_described(repository: Path, tmp_path: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD").strip()
    clean = {"commit": commit, "branch": "main", "is_dirty": False, "changes": []}
    assert GitState(repository, repository / "runs").describe() == clean
    (repository / "new.py").write_text("x\n")
    dirty = clean | {"is_dirty": True, "changes": ["new.py"]}
    assert GitState(repository, repository / "runs").describe() == dirty


def test_without_repository_or_git_there_is_nothing(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        state = GitState(tmp_path, tmp_path / "runs")
        assert state.describe() is None and state.problem is None and state.read_diff() == "" and state.changes == []
        monkeypatch.setenv("PATH", str(tmp_path))
    assert GitState(repository, tmp_path).describe() is None


def test_a_repository_without_commit_is_a_problem(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    state = GitState(tmp_path, tmp_path / "runs")
    assert state.describe() == {"commit": None, "problem": state.problem}
    assert state.problem is not None and state.problem.startswith("git rev-parse --verify HEAD failed with exit code")


@pytest.mark.parametrize("slow", ["rev-parse", "status"])
def test_a_slow_git_is_not_waited_for(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    put_fake_git(monkeypatch, tmp_path, f'case "$*" in *{slow}*) sleep 30;; esac\nexec $REAL "$@"')
    monkeypatch.setattr(snapshot, "SECONDS_FOR_GIT", 1.0)
    started = time.monotonic()
    state = GitState(repository, repository / "runs")
    assert state.read_diff() == ""
    assert time.monotonic() - started < 10
    assert state.commit is None and state.describe() == {"commit": None, "problem": state.problem}
    assert state.problem is not None and f"git {slow}" in state.problem and "1 seconds" in state.problem


def test_the_limit_is_for_all_questions_together(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(50):
        (repository / f"new_{number}.py").write_text("x\n")
    put_fake_git(monkeypatch, tmp_path, 'case "$*" in *no-index*) sleep 0.5;; esac\nexec $REAL "$@"')
    monkeypatch.setattr(snapshot, "SECONDS_FOR_GIT", 3.0)
    started = time.monotonic()
    state = GitState(repository, repository / "runs")
    diff = state.read_diff()
    assert time.monotonic() - started < 10
    assert 1 <= diff.count("+++ b/new_") < 10
    described = state.describe()
    assert described is not None and "git diff" in described["problem"] and len(described["changes"]) == 50
    assert described["commit"] is not None


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "echo 'fatal: detected dubious ownership' >&2; exit 128",
            "failed with exit code 128: fatal: detected dubious",
        ),
        ("kill -9 $$", "failed with exit code -9: no message"),
        ('case "$*" in *status*) exit 3;; esac; exec $REAL "$@"', "git status"),
    ],
)
def test_a_broken_git_is_a_problem(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    put_fake_git(monkeypatch, tmp_path, script)
    state = GitState(repository, repository / "runs")
    assert state.commit is None and state.read_diff() == ""
    assert state.problem is not None and message in state.problem
    assert state.describe() == {"commit": None, "problem": state.problem}


def test_a_git_that_cannot_be_started_is_a_problem(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_fake_git(monkeypatch, tmp_path, "")
    (tmp_path / "bin" / "git").write_text("#!/no/such/interpreter\n")
    state = GitState(repository, repository / "runs")
    assert state.problem is not None and "could not be run" in state.problem
    assert state.describe() == {"commit": None, "problem": state.problem}


@pytest.mark.parametrize(
    "name",
    [
        "MY_API_KEY", "APIKEY", "OPENAIAPIKEY", "apiKey", "API_KEYS", "KEY_2", "SECRET_KEY_BASE", "HF_TOKEN", "TOKEN2",
        "TOKEN_GITHUB", "ACCESSTOKEN", "PGPASSWORD", "DB_PASS", "PASSPHRASE", "MYSQL_PWD", "DBPWD", "GITHUB_PAT", "PAT",
        "PAT_AZURE", "MY_JWT", "GCP_CRED", "CREDS", "CREDENTIALS", "AUTH", "AUTHORIZATION", "SENTRY_DSN", "COOKIE",
        "DB_CONN_STR", "CONNSTR", "CONNECTION_STRING", "AzureConnectionString", "SLACK_WEBHOOK_URL", "PRIVATE_STUFF",
    ],
)  # fmt: skip
def test_variables_with_a_secret_name_are_hidden(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "value")
    assert describe_environment()[name] == "<hidden>"


@pytest.mark.parametrize(
    "name",
    [
        "PATH", "PYTHONPATH", "PATHS", "LD_LIBRARY_PATH", "COMPAT", "PATTERN", "TOKENIZERS_PARALLELISM", "KEYBOARD",
        "PWD", "OLDPWD", "AUTHOR", "NUM_PASSES", "SACRED", "CONN_STRIDE", "PYTHONHASHSEED", "OMP_NUM_THREADS", "HOME",
    ],
)  # fmt: skip
def test_innocent_variables_stay(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "value")
    assert describe_environment()[name] == "value"


SECRET_VALUES = [
    "postgres://me:s3cr3t@host/db", "postgres://me:s3/cr3t@host/db", "https://s3cr3t@github.com/x.git", "redis://:p@h",
    "https://hooks.slack.com/services/T0/B0/x", "https://hooks.zapier.com/x", "https://discord.com/api/webhooks/1/x",
    "https://discordapp.com/api/webhooks/1/x", "https://firm.webhook.office.com/webhookb2/x",
    "Endpoint=sb://x;SharedAccessKey=s3cr3t", "https://x.net/blob?sv=1&SIG=s3cr3t", "https://x.net/?api_key=s3cr3t",
    "host=x password=s3cr3t", "https://x.net?X-Amz-Signature=s", '{"token": "s3cr3t"}',
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc", "Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc", "ghp_abcDEF123",
    "github_pat_11ABC", "hf_abcDEF123456", "sk-abcdef123456", "sk-proj-abcdef", "xoxb-12-34", "AKIAIOSFODNN7EXAMPLE",
    "-----BEGIN RSA PRIVATE KEY-----",
]  # fmt: skip
PLAIN_VALUES = [
    "/usr/bin:/opt/monkey:/bin", "https://github.com/x/y.git", "git@github.com:x/y.git", "https://host:8080/path",
    "/data/hf_cache", "hf_checkpoints", "risk-analysis-of-things", "scikit-learn", "design=flat", "me@host", "eyJ",
    "3e-4", "bert-base-uncased", "/opt/githooks.d", "AKIA", "tokenizer=fast", "1.2.3", "",
]  # fmt: skip


@pytest.mark.parametrize("value", SECRET_VALUES)
def test_secret_values_are_hidden(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PLAIN", value)
    assert describe_environment()["PLAIN"] == "<hidden>"
    for word in (value, f"--url={value}"):
        monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", word, "last"])
        [*first, hidden, last] = describe_command()
        assert (first, last) == (["python", "train.py"], "last")
        assert "<hidden>" in hidden and "s3cr3t" not in hidden and value not in hidden


@pytest.mark.parametrize("value", PLAIN_VALUES)
def test_innocent_values_stay(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PLAIN", value)
    assert describe_environment()["PLAIN"] == value
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", value, f"--x={value}", "--x", value])
    assert describe_command() == ["python", "train.py", value, f"--x={value}", "--x", value]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--token", "K"], ["--token", "<hidden>"]),
        (["--token", "-K", "--lr", "1"], ["--token", "<hidden>", "--lr", "1"]),
        (["--apiKey", "--token", "K"], ["--apiKey", "<hidden>", "<hidden>"]),
        (["--password=K=K", "x"], ["--password=<hidden>", "x"]),
        (["config.api_key=K"], ["config.api_key=<hidden>"]),
        (["config.api_key:K"], ["config.api_key:<hidden>"]),
        (["+config.db.pwd=K"], ["+config.db.pwd=<hidden>"]),
        (["a:config.api_key:K"], ["a:config.api_key:<hidden>"]),
        (["--header", "Authorization: Bearer K"], ["--header", "Authorization:<hidden>"]),
        (["--config", '{"lr": 1, "api_key": "K"}'], ["--config", '{"lr": 1, "api_key":<hidden>']),
        (["--opts=a=1,token=K"], ["--opts=a=1,token=<hidden>"]),
        (["--url=ghp_Kx,key=K"], ["<hidden>"]),
        (["--tokenizer", "bert", "--keyboard=us"], ["--tokenizer", "bert", "--keyboard=us"]),
        (["tests/test_key.py::test_it", "-m", "slow"], ["tests/test_key.py::test_it", "-m", "slow"]),
        (["--lr=3", "module:function", "key", "x"], ["--lr=3", "module:function", "key", "x"]),
    ],
)
def test_secrets_of_the_command_line_are_hidden(given: list[str], expected: list[str]) -> None:
    code = "import json; from pytorch_accelerated.snapshot import describe_command as d; print(json.dumps(d()))"
    # A real command line: the interpreter's own options and the words after them are all in it.
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if given[0] == "--token" and len(given) == 2:
        command = [sys.executable, "-c", code, *given]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        assert done.stdout.rstrip().endswith('"--token", "<hidden>"]')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "orig_argv", ["python", "train.py", *given])
        assert describe_command() == ["python", "train.py", *expected]


def test_packages_are_listed_once_and_the_first_on_the_path_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for directory, version in (("second", "1.0"), ("first", "2.0")):
        information = tmp_path / directory / f"Some_Thing-{version}.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: Some-Thing\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path / directory))
    list_packages.cache_clear()
    try:
        listed = list_packages()
        assert "Some-Thing==2.0\n" in listed and "Some-Thing==1.0" not in listed
        assert re.search(r"^torch==\S+$", listed, re.MULTILINE)
        names = [line.partition("==")[0].lower() for line in listed.splitlines()]
        assert names == sorted(set(names))
        shutil.rmtree(tmp_path / "first")
        assert list_packages() is listed  # not read again
    finally:
        list_packages.cache_clear()
