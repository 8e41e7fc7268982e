"""The page of a run, tables and differences of runs, and the callback that collects what the page shows."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import subprocess
import sys
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_diabetes, load_digits
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import TensorDataset
from torchmetrics import Accuracy

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.callbacks.report import MAX_PAIRS, ReportCallback
from pytorch_accelerated.errors import BatchError, RunDirectoryError
from pytorch_accelerated.metrics_log import format_seconds, is_loss, is_number
from pytorch_accelerated.report import compare_runs, diff_runs, write_report
from pytorch_accelerated.report.__main__ import main
from pytorch_accelerated.report.charts import find_charts, log_ticks, thin, ticks
from pytorch_accelerated.report.predictions import class_figures
from pytorch_accelerated.report.reading import depends_on_clock, load_runs, read_predictions
from pytorch_accelerated.report.style import DARK, LIGHT
from tests.support import Interruption, PlainDataset, interrupt_at, make_data, make_mlp, run_processes

EVIL = '<script>alert("x")</script>&amp;'
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


# ---------------------------------------------------------------------------------------------------------------------
# Runs by hand
# ---------------------------------------------------------------------------------------------------------------------


def row(update: int, **values: Any) -> dict[str, Any]:
    counters = {"num_samples": update * 8, "num_steps": update, "num_updates": update}
    epoch = {"current_epoch": (update - 1) // 10 + 1, "num_skipped_updates": 0, "seconds": update * 0.25}
    return counters | epoch | values


def usual_rows(num_updates: int = 30, shift: float = 0.0) -> list[dict[str, Any]]:
    rows = []
    for update in range(1, num_updates + 1):
        loss = 2 / update + shift
        rows.append(
            row(update, train_loss=loss, lr_0=0.1 / update, lr_1=0.01, gradient_norm=1 / 3, samples_per_second=8.0)
        )
        if update % 10 == 0:
            rows.append(row(update, train_loss_epoch=loss + 0.1, train_accuracy=0.5 + update / 100))
            rows.append(row(update, eval_loss_epoch=loss + 0.2, eval_accuracy=0.4 + update / 100))
    return rows


def write_run(path: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
    """Write a run directory in the format that Trainer(run_dir=...) writes."""
    path.mkdir(parents=True)
    session = {"number": 1, "started": "2026-01-02T03:04:05+00:00", "ended": "2026-01-02T03:05:05+00:00"}
    session |= {"outcome": "finished", "error": None, "first_update": 0, "first_epoch": 0, "first_sample": 0}
    session |= {"seconds": 0.0, "resumed_from": None, "command": ["python", "train.py"], "host": "box"}
    session |= {"git": {"commit": "c0ffee", "is_dirty": True}, "versions": {"torch": "2.13"}, "hardware": {"cpu": 4}}
    config = {"run": {"num_epochs": 3}, "optimizer": {"type": "SGD", "groups": [{"lr": 0.1}, {"lr": 0.01}]}}
    config |= {"user": {"note": EVIL, "deep": {"deeper": [1, 2]}}} | changes.pop("config", {})
    facts = {"format": 1, "run_id": path.name, "created": session["started"], "seed": 0, "config": config}
    facts["sessions"] = [session | changed for changed in changes.pop("sessions", [{}])]
    (path / "run.json").write_text(json.dumps(facts | changes))
    lines = [json.dumps({name: plain(value) for name, value in one.items()}) for one in rows or []]
    (path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return path


def plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def page_of(*runs: Path, **kwargs: Any) -> str:
    return write_report(runs, **kwargs).read_text(encoding="utf-8")


def cells_of(page: str, first: str) -> list[str]:
    """Return the cells of the row of a table that begins with ``first``."""
    match = re.search(rf"<tr><t[dh][^>]*>{re.escape(first)}</t[dh]>(.*?)</tr>", page)
    assert match, first
    return [unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", match[1])]


def test_the_page_has_the_numbers_of_the_log(tmp_path: Path) -> None:
    rows = usual_rows()
    run = write_run(tmp_path / "1", rows)
    page = page_of(run)
    assert (run / "report.html").exists()
    for name in ("train_loss", "eval_loss_epoch", "eval_accuracy", "gradient_norm", "lr_0"):
        values = [one[name] for one in rows if name in one]
        last, best, update, number, lowest, highest = cells_of(page, name)
        assert (float(last), int(number)) == (values[-1], len(values))
        assert (float(lowest), float(highest)) == (min(values), max(values))
        assert (best, update) == ((lowest, "30") if "loss" in name else ("", ""))
    assert "lowest eval_loss_epoch 0.266667 at update 30" in page
    assert "highest eval_accuracy" not in page  # nobody said that higher is better
    assert cells_of(page_of(run, best={"eval_accuracy": "max"}), "eval_accuracy")[1:3] == ["0.7", "30"]


@pytest.mark.parametrize("is_one", [True, False])
def test_what_is_a_loss(is_one: bool) -> None:
    names = {
        True: "train_loss train_loss_epoch eval_loss_epoch eval_val_loss_epoch eval_a-b_loss_epoch evaluation_loss "
        "evaluation_test_loss train_kl_loss eval_kl_loss_epoch eval_hamming_loss",
        False: "loss my_loss kl_loss_epoch eval_gloss train_closs_epoch trainloss evaluation_lossless train_loss_kl "
        "train_loss_scale eval_accuracy eval_loss_epoch_2 pretrain_loss eval_loss_test",
    }
    assert [name for name in names[is_one].split() if is_loss(name) != is_one] == []


def test_numbers_and_times() -> None:
    values = [1, 0.5, math.nan, -math.inf, True, "1", None, [1]]
    assert [is_number(value) for value in values] == [True] * 4 + [False] * 4
    times = [0.0, 59.9, 61.0, 3723.0, 360_000.0, math.nan]
    assert [format_seconds(time) for time in times] == ["0:00:00", "0:00:59", "0:01:01", "1:02:03", "100:00:00", "nan"]


def test_the_page_names_things_as_everything_else_does(tmp_path: Path) -> None:
    """Times as the summary, settings as trackers."""
    rows = [*usual_rows(), row(31, seconds=3723.4, is_warm=True)]
    facts = [{"optimizer": {"groups": [{"lr": 0.1}, {"lr": lr}], "betas": [0.9, lr]}, "user": {}} for lr in (0.1, 0.2)]
    runs = [write_run(tmp_path / str(number), rows, config=config) for number, config in enumerate(facts)]
    assert "<dt>time</dt><dd>1:02:03</dd>" in page_of(runs[0])
    assert cells_of(page_of(runs[0]), "is_warm") == ["yes"]  # no curve
    assert compare_runs(runs).settings == {
        "optimizer.groups.1.lr": [0.1, 0.2],
        "optimizer.betas": ["[0.9, 0.1]", "[0.9, 0.2]"],
    }


def test_curves_of_training_and_evaluation_share_a_chart(tmp_path: Path) -> None:
    rows = usual_rows()
    rows.append(
        row(30, eval_night_loss_epoch=3.0, eval_night_accuracy=0.1, system_gpu_0_memory=1.0, system_gpu_1_memory=2.0)
    )
    rows.append(row(30, eval_recalls=[0.1, 0.2], eval_matrix=[[1, 2], [3, 4]], note=EVIL))
    run = write_run(tmp_path / "1", rows)
    charts = {chart.slug: [line.name for line in chart.lines] for chart in find_charts(load_runs([run])[0], {})}
    assert set(charts["loss"]) == {"train_loss", "train_loss_epoch", "eval_loss_epoch", "eval_night_loss_epoch"}
    assert set(charts["accuracy"]) == {"train_accuracy", "eval_accuracy", "eval_night_accuracy"}
    assert charts["lr"] == ["lr_0", "lr_1"]
    assert charts["system_gpu_memory"] == ["system_gpu_0_memory", "system_gpu_1_memory"]
    assert charts["recalls"] == ["eval_recalls[0]", "eval_recalls[1]"]
    page = page_of(run)
    assert "1, 2, 3, 4" in page  # what is no curve is listed
    assert {path.stem for path in (run / "plots").iterdir()} == set(charts)
    for path in (run / "plots").iterdir():
        assert np.asarray(Image.open(path)).std() > 5, path  # something is drawn


def test_the_axes_are_those_of_the_log(tmp_path: Path) -> None:
    run = load_runs([write_run(tmp_path / "1", usual_rows())])[0]
    loss = next(line for chart in find_charts(run, {}) for line in chart.lines if line.name == "train_loss")
    assert loss.positions["updates"].tolist() == list(range(1, 31))
    assert loss.positions["samples"].tolist() == [8 * update for update in range(1, 31)]
    assert loss.positions["seconds"].tolist() == [update / 4 for update in range(1, 31)]
    np.testing.assert_allclose(loss.positions["epochs"], np.arange(1, 31) / 10)
    # In the middle of an epoch its length is that of the one before; without the end of any it is not known.
    unfinished = load_runs([write_run(tmp_path / "2", usual_rows(35))])[0]
    assert unfinished.positions["epochs"][-1] == pytest.approx(3.5)
    assert "epochs" not in load_runs([write_run(tmp_path / "3", usual_rows(9))])[0].positions
    page = page_of(run.path)
    for axis in ("updates", "samples", "epochs", "seconds"):
        for scale in ("linear", "log"):
            assert f"view-{axis}-{scale}" in page
            assert f"#x-{axis}:checked~#y-{scale}:checked~main .view-{axis}-{scale}{{display:block}}" in page
    assert 'id="x-epochs"' not in page_of(tmp_path / "3")


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "1", usual_rows()))
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "<script" not in page and "@import" not in page and "url(" not in page


def test_names_and_values_are_escaped(tmp_path: Path) -> None:
    rows = [row(update, **{EVIL: 1.0, "eval_$x^2$_loss": 2.0, "_hidden": 3.0}, note=EVIL) for update in (1, 2)]
    session = {"outcome": "failed", "error": EVIL, "command": ["python", EVIL], "host": EVIL}
    run = write_run(tmp_path / "1", rows, sessions=[session])
    (run / "log.txt").write_text(EVIL)
    (run / "media").mkdir()
    (run / "media" / "a.txt").write_text(EVIL)
    media = {"kind": "text", "name": EVIL, "files": ["media/a.txt"], "captions": [EVIL]}
    (run / "media" / "index.jsonl").write_text(json.dumps(row(1) | media) + "\n")
    for page in (page_of(run), page_of(run, write_run(tmp_path / "2", rows, seed=EVIL), output=tmp_path / "both.html")):
        assert "<script" not in page
        assert EVIL in unescape(page)
    assert len(list((run / "plots").iterdir())) == 3


def test_a_run_that_has_logged_nothing_or_was_killed(tmp_path: Path) -> None:
    empty = write_run(tmp_path / "1", [], sessions=[{"ended": None, "outcome": None}])
    assert "Nothing has been logged yet" in page_of(empty) and "running, or killed" in page_of(empty)
    (empty / "metrics.jsonl").unlink()
    assert "Nothing has been logged yet" in page_of(empty)
    killed = write_run(tmp_path / "2", usual_rows(5), sessions=[{"ended": None, "outcome": None}])
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"num_updates": 6, "train_lo')
    assert "running, or killed" in page_of(killed)
    assert cells_of(page_of(killed), "train_loss")[0] == "0.4"


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    values = [1.0, math.nan, 3.0, math.inf, -math.inf, 0.5, 0.0, -1.0]
    rows = [row(number + 1, train_loss=value, all_nan=math.nan) for number, value in enumerate(values)]
    page = page_of(write_run(tmp_path / "1", rows))
    assert "train_loss: 3 value(s) are NaN or infinite" in page
    assert "train_loss: 3 value(s) are not above 0" in page  # -inf, 0 and -1
    assert cells_of(page, "train_loss")[1] == "-1"
    assert cells_of(page, "all_nan")[0] == "NaN"
    drawn = re.search(r'view-updates-linear"><svg.*?</svg>', page)
    assert drawn and drawn[0].count("not finite</title>") == 3
    path = re.search(r'class="line l0" d="([^"]+)"', drawn[0])
    assert path and path[1].count("M") == 3
    assert not any("nan" in line or "inf" in line for line in re.findall(r' d="([^"]+)"', page))


def test_thousands_of_rows_keep_their_extremes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = np.arange(50_000.0), rng.normal(size=50_000)
    y[31_234], y[41_234], y[20_000] = 99.0, -99.0, np.nan
    thin_x, thin_y = thin(x, y, 300)
    assert len(thin_x) <= 310 and {31_234.0, 41_234.0, 0.0, 49_999.0} <= set(thin_x.tolist())
    assert np.isnan(thin_y).sum() == 1 and (np.diff(thin_x) > 0).all()
    assert thin(x[:200], y[:200], 300)[0].tolist() == x[:200].tolist()
    rows = [row(update, train_loss=float(value)) for update, value in enumerate(np.nan_to_num(y[28_000:38_000]), 1)]
    page = page_of(write_run(tmp_path / "1", rows))
    assert cells_of(page, "train_loss")[-1] == "99"
    assert len(page) < 400_000


def test_ticks_are_round() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3, 3) == [3]
    assert log_ticks(0.001, 1000) == pytest.approx([0.001, 0.01, 0.1, 1, 10, 100, 1000])
    assert len(log_ticks(1.1, 1.2)) > 2


def test_sessions_and_settings_are_shown(tmp_path: Path) -> None:
    resumed = {
        "number": 2,
        "first_update": 20,
        "resumed_from": "checkpoints/c-1",
        "outcome": "failed",
        "error": "Boom: 7",
    }
    page = page_of(write_run(tmp_path / "1", usual_rows(), sessions=[{"outcome": "interrupted"}, resumed]))
    assert "session 2 began at update 20" in page and 'class="start"' in page
    for text in ("c0ffee", "python train.py", "Boom: 7", "checkpoints/c-1", "groups.1", "deeper", "interrupted"):
        assert text in page, text


def test_media_are_part_of_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "1", usual_rows(3))
    place = run / "media"
    place.mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(place / "a.png")
    (place / "t.csv").write_text("x,y\n1,<b>\n")
    (place / "s.wav").write_bytes(b"RIFF0000WAVE")
    (place / "h.json").write_text(json.dumps({"counts": [1, 5, 2], "edges": [0, 1, 2, 3]}))
    (tmp_path / "secret.txt").write_text("a secret")
    index = [
        {
            "kind": "images",
            "name": "faces",
            "files": ["media/a.png", "media/gone.png"],
            "captions": ["first & best", None],
        },
        {"kind": "table", "name": "table", "files": ["media/t.csv"], "captions": None},
        {"kind": "audio", "name": "sound", "files": ["media/s.wav"], "captions": None},
        {"kind": "histogram", "name": "weights", "files": ["media/h.json"], "captions": None},
        {"kind": "text", "name": "outside", "files": ["../secret.txt"], "captions": None},
    ]
    index += [{"kind": "text", "name": "many", "files": ["media/t.csv"], "captions": None}] * 10
    (place / "index.jsonl").write_text("".join(json.dumps(row(2) | one) + "\n" for one in index))
    page = page_of(run)
    assert base64.b64encode((place / "a.png").read_bytes()).decode() in page
    assert 'alt="faces: first &amp; best"' in page and "media/gone.png is not there" in page
    assert "<audio controls" in page and "&lt;b&gt;" in page
    assert page.count('<rect class="dot l0"') == 3 and "5 from 1 to 2" in page
    assert "a secret" not in page and "outside of the run directory" in page
    assert "10 moments were logged" in page


# ---------------------------------------------------------------------------------------------------------------------
# Several runs
# ---------------------------------------------------------------------------------------------------------------------


def test_several_runs_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "digits"
    for number in (1, 2, 10):
        write_run(base / str(number), usual_rows(shift=number / 10), config={"run": {"num_epochs": number}})
    monkeypatch.chdir(tmp_path)
    assert write_report([base]) == Path("report.html")
    page = Path("report.html").read_text()
    assert cells_of(page, "run.num_epochs") == ["1", "2", "10"]
    assert all((base / str(number) / "plots" / "loss.png").exists() for number in (1, 2, 10))
    table = compare_runs([base], {"eval_accuracy": "max"})
    assert table.runs == ["1", "2", "10"] and table.settings == {"run.num_epochs": [1, 2, 10]}
    best = [best.value for best in table.metrics["eval_loss_epoch"] if best is not None]
    assert best == [2 / 30 + shift + 0.2 for shift in (0.1, 0.2, 1.0)]
    kinds = {name: bests[0].kind for name, bests in table.metrics.items() if bests[0] is not None}
    assert kinds["eval_accuracy"] == "max" and kinds["train_accuracy"] == "last" and kinds["train_loss"] == "min"
    assert not any(depends_on_clock(name) for name in kinds)
    assert "highest eval_accuracy" in str(table) and len(str(table).splitlines()) == 5


def test_directions_are_never_guessed_and_checked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "1", usual_rows())
    with pytest.raises(ValueError, match="Did you mean 'eval_accuracy'"):
        compare_runs([run], {"eval_acuracy": "max"})
    with pytest.raises(ValueError, match="'min' or 'max', got 'higher'"):
        write_report([run], best={"eval_accuracy": "higher"})
    with pytest.raises(RunDirectoryError, match="no run in"):
        compare_runs([tmp_path / "nowhere"])


def test_where_two_runs_part(tmp_path: Path) -> None:
    rows = usual_rows()
    one = write_run(tmp_path / "a" / "1", rows)
    clock = [r | {"seconds": 9.0, "num_steps": 3, "train_peak_memory_allocated_mib": i} for i, r in enumerate(rows)]
    same = write_run(tmp_path / "b" / "1", clock)
    assert diff_runs(one, same).are_equal
    assert "all values until update 30 are the same" in str(diff_runs(one, same))

    changed = [dict(r) for r in rows]
    changed[20]["gradient_norm"] += 1e-9  # update 19: rows of the end of an epoch are among them
    changed[25]["train_loss"] = 7.0
    other = write_run(tmp_path / "c", changed)
    found = diff_runs(one, other).parting
    assert found is not None and (found.update, found.name) == (rows[20]["num_updates"], "gradient_norm")
    assert not diff_runs(one, other).are_equal
    nearly = diff_runs(one, other, rtol=1e-6).parting
    assert nearly is not None and (nearly.name, nearly.second) == ("train_loss", 7.0)

    short = diff_runs(one, write_run(tmp_path / "d", usual_rows(20)))
    assert short.parting is None and not short.are_equal and short.last_updates == (30, 20)
    assert "equal as far as both go" in str(short) and "is longer: it goes to update 30" in str(short)
    missing = diff_runs(one, write_run(tmp_path / "e", [r for r in rows if "eval_loss_epoch" not in r])).parting
    assert missing is not None and (missing.update, missing.name, missing.second) == (10, "eval_loss_epoch", None)
    setting = diff_runs(one, write_run(tmp_path / "f", rows, seed=1))
    assert setting.parting is None and setting.settings == {"seed": [0, 1]} and not setting.are_equal
    nan = [write_run(tmp_path / name, [row(1, train_loss=math.nan, list=[math.nan])]) for name in ("g", "h")]
    assert diff_runs(*nan).are_equal


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, same = (write_run(tmp_path / name, usual_rows()) for name in ("1", "2"))
    other = write_run(tmp_path / "3", usual_rows(shift=1.0))
    assert main(["--diff", str(one), str(same)]) == 0
    assert main(["--diff", str(one), str(other)]) == 1
    assert "the runs part at update 1: train_loss" in capsys.readouterr().out
    assert main([str(tmp_path), "--table", "--best", "eval_accuracy:max"]) == 0
    assert "highest eval_accuracy" in capsys.readouterr().out
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "no run in" in capsys.readouterr().err
    for arguments in (["--diff", str(one)], ["--table", str(one), "--best", "x:up"]):
        with pytest.raises(SystemExit):
            main(arguments)
    script = "import sys; from pytorch_accelerated.report.__main__ import main; code = main(); import matplotlib as m;"
    script += "assert 'matplotlib.pyplot' not in sys.modules; assert m.rcParams == m.rcParamsDefault; sys.exit(code)"
    command = [sys.executable, "-c", script, str(one), "--output", str(tmp_path / "new" / "page.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "new" / "page.html") and not done.stderr
    assert "<h1>Run" in (tmp_path / "new" / "page.html").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# How it looks
# ---------------------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_have_enough_contrast(theme: dict[str, str]) -> None:
    for ground in ("page", "card"):
        for text in ("text", "muted", "link", "good", "bad"):
            assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
    assert contrast(theme["card"], theme["text"]) >= 4.5  # a switch that is on
    for number in range(8):
        assert contrast(theme[f"line-{number}"], theme["card"]) >= 3, number
    for number in range(6):
        assert contrast(theme[f"cell-text-{number}"], theme[f"cell-{number}"]) >= 4.5, number


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it(width: int, tmp_path: Path) -> None:
    rows = [*usual_rows(), row(30, **{"eval_" + "long_name_" * 12: 1.0}, matrix="x" * 300)]
    run = write_run(tmp_path / "1", rows, config={"long": {"w" * 200: "v" * 400}})
    (run / "report_data").mkdir()
    confusion = np.arange(400).reshape(20, 20)
    facts = {
        "task": "classification",
        "num_items": 5,
        "num_updates": 30,
        "current_epoch": 3,
        "class_names": ["name" * 4] * 20,
    }
    np.savez(run / "report_data" / "eval.npz", facts=np.array(json.dumps(facts)), confusion=confusion)
    page = page_of(run)
    # In a frame, because a window cannot be as narrow as a phone.
    measure = "parent.postMessage([innerWidth, document.documentElement.scrollWidth, "
    measure += "[...document.querySelectorAll('.view')].filter(e => e.offsetParent).length, "
    measure += "document.querySelectorAll('.view > svg').length].join(' '), '*');"
    (tmp_path / "copy.html").write_text(page.replace("</body>", f"<script>{measure}</script></body>"))
    outer = tmp_path / "outer.html"
    listen = "<script>addEventListener('message', event => { document.title = event.data; })</script>"
    outer.write_text(f'{listen}<iframe src="copy.html" style="width:{width}px;height:2500px;border:0"></iframe>')
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path}/profile", "--enable-logging=stderr", "--v=0", "--window-size=1400,2600"]
    command += ["--virtual-time-budget=3000", "--dump-dom", outer.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>([\d ]+)</title>", done.stdout)
    assert title, done.stderr
    inner, scrolled, num_views, num_drawings = map(int, title[1].split())
    assert inner == width and scrolled <= width
    assert num_views == num_drawings / 8  # one of four axes and two scales of each chart
    assert "CONSOLE" not in done.stderr, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The callback
# ---------------------------------------------------------------------------------------------------------------------


def digits(num_samples: int = 320) -> TensorDataset:
    x, y = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(x[:num_samples] / 16).float().view(-1, 1, 8, 8), torch.tensor(y[:num_samples]))


def make_cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10))


def train(
    path: Path, callback: ReportCallback | None, model: nn.Module, data: Any, loss: Any, **kwargs: Any
) -> Trainer:
    callbacks = [*([] if callback is None else [callback]), *kwargs.pop("callbacks", [])]
    optimizer = kwargs.pop("optimizer", partial(Adam, lr=0.01))
    metrics, kwargs = kwargs.pop("metrics", None), {"num_epochs": 1, "per_device_batch_size": 32, **kwargs}
    trainer = Trainer(model, loss, optimizer, callbacks=callbacks, run_dir=path, seed=0, metrics=metrics, log_every=5)
    trainer.train(data, eval_dataset=kwargs.pop("eval_dataset", data), **kwargs)
    return trainer


def test_the_page_of_a_classification(tmp_path: Path) -> None:
    data = digits()
    names = [f"digit <{number}>" for number in range(10)]
    accuracy = {"accuracy": Accuracy("multiclass", num_classes=10, average="micro")}
    callback = ReportCallback(class_names=names, num_samples=5, best={"eval_accuracy": "max"}, every_n_epochs=1)
    trainer = train(tmp_path, callback, make_cnn(), data, nn.CrossEntropyLoss(), metrics=accuracy, num_epochs=2)
    run = trainer.run_dir
    assert run is not None
    facts = read_predictions(load_runs([run])[0])[0]
    model = trainer.get_model().eval()
    with torch.no_grad():
        logits = model(data.tensors[0])
    true, predicted = data.tensors[1], logits.argmax(1)
    expected = np.zeros((10, 10), int)
    np.add.at(expected, (true.numpy(), predicted.numpy()), 1)
    confusion = facts["arrays"]["confusion"]
    assert confusion.tolist() == expected.tolist() and facts["num_items"] == 320
    share = trainer.run_history.get_latest_metric("eval_accuracy")
    assert np.trace(confusion) / confusion.sum() == pytest.approx(share)

    losses = nn.functional.cross_entropy(logits, true, reduction="none")
    worst = losses.topk(5)
    np.testing.assert_allclose(facts["arrays"]["sample_loss"], worst.values, rtol=1e-4)
    assert facts["arrays"]["sample_true"].tolist() == true[worst.indices].tolist()
    for number, index in enumerate(worst.indices):
        pixels = (255 * data.tensors[0][index, 0].double()).round().numpy().astype(np.uint8)
        assert facts["arrays"][f"image_{number}"].tolist() == pixels.tolist()

    page = (run / "report.html").read_text()
    figures = class_figures(expected)[3]
    cells = cells_of(page, "digit &lt;3&gt;".replace("&lt;", "&lt;"))
    assert [int(cell) for cell in cells] == expected[3].tolist()
    shown = [f"{figures['precision']:.4f}", f"{figures['recall']:.4f}", f"{figures['f1']:.4f}", str(figures["support"])]
    assert "".join(f'<td class="n">{cell}</td>' for cell in shown) in page
    assert page.count('alt="Sample of the evaluation') == 5 and "<script" not in page
    assert cells_of(page, "eval_accuracy")[0] == repr(share)
    assert cells_of(page, "eval_loss_epoch")[0] == repr(trainer.run_history.get_latest_metric("eval_loss_epoch"))
    assert {"loss.png", "accuracy.png", "classification-eval.png"} <= {path.name for path in (run / "plots").iterdir()}


def test_figures_of_classes_are_those_of_sklearn() -> None:
    from sklearn.metrics import precision_recall_fscore_support

    rng = np.random.default_rng(0)
    true, predicted = rng.integers(5, size=200), rng.integers(5, size=200)
    confusion = np.zeros((5, 5), np.int64)
    np.add.at(confusion, (true, predicted), 1)
    found = class_figures(confusion)
    for key, expected in zip(
        ("precision", "recall", "f1", "support"), precision_recall_fscore_support(true, predicted), strict=True
    ):
        np.testing.assert_allclose([row[key] for row in found], expected)
    assert math.isnan(class_figures(np.array([[3, 0], [0, 0]]))[1]["f1"])


def test_the_page_of_a_regression(tmp_path: Path) -> None:
    x, y = load_diabetes(return_X_y=True)
    data = TensorDataset(torch.tensor(x).float(), torch.tensor(y / 100).float().unsqueeze(1))
    trainer = train(
        tmp_path, ReportCallback(num_samples=3), nn.Linear(10, 1), data, nn.MSELoss(), eval_dataset={"a b": data}
    )
    run = load_runs([tmp_path])[0]
    facts = read_predictions(run)[0]
    assert (facts["file"], facts["eval_name"]) == ("eval-a%20b", "a b")
    with torch.no_grad():
        residual = (trainer.get_model()(data.tensors[0]) - data.tensors[1]).double().flatten()
    row = facts["outputs"][0]
    assert row["num_items"] == len(y) == facts["num_items"] == len(facts["arrays"]["pairs_true"])
    assert row["bias"] == pytest.approx(float(residual.mean()), rel=1e-4)
    assert row["mae"] == pytest.approx(float(residual.abs().mean()), rel=1e-4)
    assert row["rmse"] ** 2 == pytest.approx(trainer.run_history.get_latest_metric("eval_a b_loss_epoch"), rel=1e-4)
    spread = (data.tensors[1].double() - data.tensors[1].double().mean()).pow(2).sum()
    assert row["r2"] == pytest.approx(1 - float(residual.pow(2).sum() / spread), rel=1e-4)
    assert facts["arrays"]["pairs_true"].tolist() == data.tensors[1].flatten().tolist()
    page = (run.path / "report.html").read_text()
    assert repr(row["rmse"]) in page and "True against predicted values, 442 predictions" in page
    assert (run.path / "plots" / "regression-eval-a%20b.png").exists()


def test_what_is_kept_does_not_grow(tmp_path: Path) -> None:
    x = torch.arange(3 * MAX_PAIRS + 1.0).unsqueeze(1)
    data = TensorDataset(x, x * 2)
    sizes = []

    class Watched(ReportCallback):
        def on_eval_step_end(self, trainer: Any, **kwargs: Any) -> None:
            super().on_eval_step_end(trainer, **kwargs)
            sizes.append(len(self._collected.pairs))  # type: ignore[union-attr]

    train(
        tmp_path,
        Watched(),
        nn.Linear(1, 1),
        data,
        nn.MSELoss(),
        num_epochs=1,
        per_device_batch_size=500,
        optimizer=partial(SGD, lr=1e-9),
    )
    assert max(sizes) <= 2 * MAX_PAIRS + 500
    facts = read_predictions(load_runs([tmp_path])[0])[0]
    true = facts["arrays"]["pairs_true"]
    assert MAX_PAIRS / 3 < len(true) <= MAX_PAIRS and len(set(np.diff(true))) == 1  # evenly over all the data
    assert true[0] == 0 and facts["num_items"] == 3 * MAX_PAIRS + 1


def two_processes(path: str) -> list[int]:
    data = PlainDataset(digits(65))  # 65 samples in batches of 8: the last round is one of one process alone
    trainer = train(
        Path(path), ReportCallback(num_samples=6), make_cnn(), data, nn.CrossEntropyLoss(), per_device_batch_size=8
    )
    assert trainer.accelerator.num_processes == 2
    with torch.no_grad():
        logits = trainer.get_model().eval()(data.source.tensors[0])
    losses = nn.functional.cross_entropy(logits, data.source.tensors[1], reduction="none")
    return [logits.argmax(1).tolist(), losses.topk(6).values.tolist()]


def test_each_sample_is_there_once_with_two_processes(tmp_path: Path) -> None:
    returned = run_processes(two_processes, 2, str(tmp_path))
    facts = read_predictions(load_runs([tmp_path])[0])[0]
    expected = np.zeros((10, 10), int)
    np.add.at(expected, (digits(65).tensors[1].numpy(), np.array(returned[0][0])), 1)
    assert facts["arrays"]["confusion"].tolist() == expected.tolist()
    np.testing.assert_allclose(facts["arrays"]["sample_loss"], returned[0][1], rtol=1e-4)
    assert "image_5" in facts["arrays"]


def one_has_nothing(path: str) -> int:
    data, loss = PlainDataset(digits(16)), nn.CrossEntropyLoss()
    callback = ReportCallback(attention_layer="blocks.layers.0.self_attn")
    few = PlainDataset(digits(1))
    trainer = train(Path(path), callback, TinyTransformer(), data, loss, eval_dataset=few, per_device_batch_size=8)
    return trainer.accelerator.num_processes


def test_a_process_that_has_no_sample_at_all(tmp_path: Path) -> None:
    assert run_processes(one_has_nothing, 2, str(tmp_path)) == [2, 2]
    classes, attention = read_predictions(load_runs([tmp_path])[0])
    assert classes["num_items"] == 1 and attention["shape"] == [2, 8, 8]


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_no_step_waits_for_the_device(kind: str, tmp_path: Path) -> None:
    def count(num_samples: int) -> int:
        data = make_data(num_samples) if kind == "classification" else TensorDataset(*[torch.rand(num_samples, 3)] * 2)
        model, loss = (
            (make_mlp(), nn.CrossEntropyLoss()) if kind == "classification" else (nn.Linear(3, 3), nn.MSELoss())
        )
        trainer = Trainer(
            model, loss, partial(SGD, lr=0.1), callbacks=[ReportCallback()], run_dir=tmp_path, log_every=99
        )
        trainer.prepare_model_and_optimizer()
        with trainer.audit_syncs() as audit:
            trainer.train(
                make_data(4) if kind == "classification" else data,
                1,
                data,
                per_device_batch_size=4,
                max_num_train_steps=1,
            )
        return sum(count for sync, count in audit.counts.items() if sync.path.endswith("callbacks/report.py"))

    assert 0 < count(8) == count(80)


def test_the_page_is_written_now_and_then(tmp_path: Path) -> None:
    written = []

    class Look(TrainerCallback):
        def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
            assert trainer.run_dir is not None
            page = trainer.run_dir / "report.html"
            written.append(cells_of(page.read_text(), "eval_loss_epoch")[3] if page.exists() else None)

    train(
        tmp_path,
        ReportCallback(every_n_epochs=2),
        make_mlp(),
        make_data(16),
        nn.CrossEntropyLoss(),
        num_epochs=5,
        callbacks=[Look()],
    )
    assert written == [None, None, "2", "2", "4"]


def test_other_shapes_of_a_classification(tmp_path: Path) -> None:
    """One logit for two classes; pixels with some that do not count; images that are made by a function."""
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    binary = TensorDataset(x, (x[:, :1] > 0).float())
    train(tmp_path / "a", ReportCallback(task="classification"), nn.Linear(4, 1), binary, nn.BCEWithLogitsLoss())
    facts = read_predictions(load_runs([tmp_path / "a"])[0])[0]
    assert facts["arrays"]["confusion"].sum(axis=1).tolist() == [int((x[:, 0] <= 0).sum()), int((x[:, 0] > 0).sum())]
    assert "image_0" not in facts["arrays"]

    images = torch.rand(12, 3, 4, 4) * 7
    masks = torch.randint(3, (12, 4, 4))
    masks[:, 0] = -100
    to_image = lambda sample: sample.mean(0)  # noqa: E731
    callback = ReportCallback(to_image=to_image, num_samples=2)
    train(tmp_path / "b", callback, nn.Conv2d(3, 3, 1), TensorDataset(images, masks), nn.CrossEntropyLoss())
    facts = read_predictions(load_runs([tmp_path / "b"])[0])[0]
    assert facts["num_items"] == 12 * 12 and facts["arrays"]["image_1"].shape == (4, 4)
    assert "stretched" in facts["image_note"]


def test_many_classes(tmp_path: Path) -> None:
    """Too many for a table of counts, and too many for counts at all."""
    for num_classes, text in ((40, "Confusion matrix of 40 classes"), (1100, "Left out: there are 1100 classes")):
        data = make_data(20, outputs=num_classes)
        model = make_mlp(outputs=num_classes)
        trainer = train(tmp_path, ReportCallback(), model, data, nn.CrossEntropyLoss())
        assert trainer.run_dir is not None
        facts = read_predictions(load_runs([trainer.run_dir])[0])[0]
        assert facts["num_items"] == 20 and ("confusion" in facts["arrays"]) == (num_classes == 40)
        assert text in (trainer.run_dir / "report.html").read_text()


def test_predictions_that_are_not_returned_are_asked_for(tmp_path: Path) -> None:
    class Silent(Trainer):
        def calculate_eval_batch_loss(self, batch: Any) -> torch.Tensor:
            return super().calculate_eval_batch_loss(batch)["loss"]  # type: ignore[index]

    kwargs: dict[str, Any] = {"callbacks": [ReportCallback()], "run_dir": tmp_path}
    with pytest.raises(BatchError, match="need predictions and targets") as error:
        Silent(make_mlp(), nn.CrossEntropyLoss(), partial(SGD, lr=0.1), **kwargs).train(make_data(8), 1, make_data(8))
    assert 'task="none"' in "".join(error.value.__notes__)


def test_predictions_of_no_known_kind_are_refused(tmp_path: Path) -> None:
    data, mlp = make_data(16), partial(make_mlp)
    with pytest.raises(BatchError, match='task="none" for a page without predictions'):
        train(tmp_path / "a", ReportCallback(task="regression"), mlp(), data, nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="2 class_names, but the model's predictions are of 3"):
        train(tmp_path / "b", ReportCallback(["x", "y"]), mlp(), data, nn.CrossEntropyLoss())
    trainer = train(tmp_path / "c", ReportCallback(task="none"), mlp(), data, nn.CrossEntropyLoss())
    assert trainer.run_dir is not None and not (trainer.run_dir / "report_data").exists()
    assert (trainer.run_dir / "report.html").exists()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"task": "clasification"}, "Did you mean 'classification'"),
        ({"num_samples": -1}, "num_samples must be at least 0, got -1"),
        ({"every_n_epochs": 0}, "every_n_epochs must be at least 1"),
        ({"best": {"a": "up"}}, "'min' or 'max', got 'up'"),
    ],
)
def test_wrong_arguments(kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReportCallback(**kwargs)


def test_a_run_directory_and_matplotlib_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(make_mlp(), nn.CrossEntropyLoss(), partial(SGD, lr=0.1), callbacks=[ReportCallback()])
    with pytest.raises(ValueError, match="needs a run directory"):
        trainer.train(make_data(8), 1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pytorch-accelerated\[report\]") as error:
        train(tmp_path, ReportCallback(), make_mlp(), make_data(8), nn.CrossEntropyLoss())
    assert "0 updates made" in str(getattr(error.value, "__notes__", ""))


def test_a_run_that_fails_has_its_page(tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        train(tmp_path, ReportCallback(), make_mlp(), make_data(64), nn.CrossEntropyLoss(), callbacks=[interrupt_at(1)])
    run = load_runs([tmp_path])[0]
    page = (run.path / "report.html").read_text()
    assert "failed" in page and "Interruption" in page


def test_a_page_that_cannot_be_written_is_said_and_fails_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(trainer: Trainer) -> None:
        assert trainer.run_dir is not None
        (trainer.run_dir / "plots").write_text("a file where a directory is wanted")

    class Spoiled(ReportCallback):
        def on_train_epoch_begin(self, trainer: Trainer, **kwargs: Any) -> None:
            spoil(trainer)

    said = "The report could not be written (FileExistsError: "
    with pytest.raises(Interruption):
        train(tmp_path / "a", Spoiled(), make_mlp(), make_data(64), nn.CrossEntropyLoss(), callbacks=[interrupt_at(1)])
    assert said in capsys.readouterr().out
    train(tmp_path / "b", Spoiled(), make_mlp(), make_data(64), nn.CrossEntropyLoss())
    assert said in capsys.readouterr().out
    assert "Traceback" not in (tmp_path / "b" / "1" / "log.txt").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


class OwnAttention(nn.Module):
    """Attention whose weights go through a module of their own, as in many vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.drop = nn.Linear(8, 24), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        return (self.drop((q @ k.mT).softmax(-1)) @ v).transpose(1, 2).flatten(2)


class TinyTransformer(nn.Module):
    """Looks at the rows of a digit."""

    def __init__(self, kind: str = "layer", nested: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.blocks = (
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested) if kind == "layer" else OwnAttention()
        )
        self.is_masked = nested
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.squeeze(1)
        if not self.is_masked:
            return self.head(self.blocks(x).mean(1))
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        mask[1:, -2:] = True  # the last rows of all but the first are padding
        return self.head(self.blocks(x, src_key_padding_mask=mask)[:, :6].mean(1))


def test_attention_of_a_torch_layer(tmp_path: Path) -> None:
    """Also where evaluation takes torch's fast path, whose numbers stay what they are."""
    data, loss = digits(64), nn.CrossEntropyLoss()
    callback = ReportCallback(attention_layer="blocks.layers.1.self_attn")
    trainer = train(tmp_path / "a", callback, TinyTransformer(), data, loss, num_epochs=2)
    plain_run = train(tmp_path / "b", None, TinyTransformer(), data, loss, num_epochs=2)
    assert diff_runs(tmp_path / "a", tmp_path / "b").parting is None
    for name in ("train_loss_epoch", "eval_loss_epoch"):
        assert trainer.run_history.get_metric_values(name) == plain_run.run_history.get_metric_values(name)

    run = load_runs([tmp_path / "a"])[0]
    facts = next(facts for facts in read_predictions(run) if facts["task"] == "attention")
    model = trainer.get_model().eval()
    with torch.no_grad():
        hidden = model.blocks.layers[0](data.tensors[0][:1, 0])
        expected = model.blocks.layers[1].self_attn(hidden, hidden, hidden, average_attn_weights=False)[1][0]
    np.testing.assert_allclose(facts["arrays"]["attention"], expected, atol=1e-5)
    assert facts["shape"] == [2, 8, 8]
    assert not model.blocks.layers[1].self_attn._forward_hooks
    page = (run.path / "report.html").read_text()
    assert page.count('alt="Attention of blocks.layers.1.self_attn, head') == 2
    assert (run.path / "plots" / "attention-eval-attention.png").exists()


def test_attention_of_an_own_layer(tmp_path: Path) -> None:
    train(
        tmp_path,
        ReportCallback(attention_layer="blocks.drop"),
        TinyTransformer("own"),
        digits(64),
        nn.CrossEntropyLoss(),
    )
    facts = next(f for f in read_predictions(load_runs([tmp_path])[0]) if f["task"] == "attention")
    assert facts["shape"] == [2, 8, 8]
    np.testing.assert_allclose(facts["arrays"]["attention"].sum(-1), 1, rtol=1e-5)


def test_layers_without_attention(tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"data": digits(64), "loss": nn.CrossEntropyLoss()}
    with pytest.raises(ValueError, match=r"Did you mean 'blocks\.layers\.1\.self_attn'"):
        train(tmp_path / "a", ReportCallback(attention_layer="blocks.layer.1.self_attn"), TinyTransformer(), **kwargs)
    assert load_runs([tmp_path / "a"])[0].rows == []
    with pytest.raises(ValueError, match="saw no attention weights of the layer 'head'"):
        train(tmp_path / "b", ReportCallback(attention_layer="head"), TinyTransformer(), **kwargs)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_attention_with_nested_tensors(tmp_path: Path) -> None:
    for number in (0, 1):
        callback = ReportCallback(attention_layer=f"blocks.layers.{number}.self_attn")
        model = TinyTransformer(nested=True)
        train(tmp_path / str(number), callback, model, digits(64), nn.CrossEntropyLoss(), num_epochs=1)
        [found] = [f for f in read_predictions(load_runs([tmp_path / str(number)])[0]) if f["task"] == "attention"]
        assert found["shape"] == [2, 8, 8]
        np.testing.assert_allclose(found["arrays"]["attention"].sum(-1), 1, rtol=1e-5)
