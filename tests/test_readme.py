"""What README and the docs show is run, and what they point at exists."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]


def names(pages: list[Path]) -> list[str]:
    return [page.name for page in pages]


@pytest.mark.parametrize("page", WITH_CODE, ids=names(WITH_CODE))
def test_the_python_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    text = page.read_text()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for match in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
            first_line = text[: match.start(1)].count("\n")
            exec(compile("\n" * first_line + match[1], str(page), "exec"), namespace)
    if page.name == "README.md":
        accuracies = [float(number) for number in re.findall(r"0\.\d+", out.getvalue().rsplit("[", 1)[-1])]
        assert "evaluation_accuracy" in out.getvalue() and accuracies


def test_every_page_with_code_was_found() -> None:
    assert len(WITH_CODE) >= 10


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_tests_that_are_named_as_proof_exist(page: Path) -> None:
    for file, test in re.findall(r"(tests/test_\w+\.py)(?:::(test_\w+))?", page.read_text()):
        source = (ROOT / file).read_text()
        assert not test or f"def {test}(" in source, f"{page.name}: {file}::{test}"
    for test in re.findall(r"[(`](test_\w+)`", page.read_text()):
        assert any(f"def {test}(" in path.read_text() for path in (ROOT / "tests").glob("*.py")), f"{page.name}: {test}"


def test_commands_in_readme_are_those_that_are_run() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", readme.split("## Quickstart")[0]):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in re.findall(r"(examples/\w+\.py)", readme):
        assert (ROOT / script).exists(), script
    for line in re.findall(r"pip install .*", readme):
        assert "-c constraints.txt" in line
    assert "--constraint constraints.txt" in makefile
    assert makefile.count("pip install") == 1  # every target installs by the one line that has the constraints


def test_the_constraints_pin_every_dependency() -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    canonical = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    config = (ROOT / "setup.cfg").read_text()
    required = re.findall(r"^    ([\w-]+)(?:>=.*)$", config.split("install_requires")[1], re.MULTILINE)
    assert len(required) > 15
    for name in required:
        if name != "packages":
            assert name.lower() in canonical, name
    assert "+" not in canonical["torch"]  # a local build would be found on one machine only
