"""Predictions in files: what ``predict`` returns, in its order, from any number of processes."""

from __future__ import annotations

import json
import os
import signal
import sys
import zipfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import LambdaCallback
from tests.support import Stream, run_processes, run_until_killed

SIZES = range(1, 14)
SUFFIXES = (".parquet", ".npz", ".jsonl")


class Parts(NamedTuple):
    score: torch.Tensor
    more: dict[str, Any]


class Numbered(Trainer):
    """Predicts, for sample i, things that follow from i."""

    def calculate_predictions(self, batch: Any) -> Any:
        numbers = batch[0][:, 0]
        more = {
            "class": numbers.long() % 3,
            "pair": (numbers.double() / 7, numbers > 2),
            "image": torch.arange(6.0).view(2, 3) * numbers[:, None, None],
            "half": numbers.to(torch.bfloat16),
            "nothing": None,
        }
        return Parts(numbers[:, None] * torch.tensor([1.0, 0.1]), more)


class WithTexts(Numbered):
    def calculate_predictions(self, batch: Any) -> Any:
        numbers = [int(number) for number in batch[0][:, 0]]
        texts = [f"näme\n{number}" for number in numbers]
        boxes = [{"boxes": torch.full((number % 3, 2), float(number)), "of": {"n": number}} for number in numbers]
        return {"numbers": super().calculate_predictions(batch), "texts": texts, "found": boxes}


def plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def read(path: Path) -> dict[str, Any]:
    """Return the columns of a file as nested lists."""
    if path.suffix == ".npz":
        return {name: plain(array) for name, array in np.load(path).items()}
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert path.read_bytes().endswith(b"\n")
        return {name: [row[name] for row in rows] for name in rows[0]}
    return pyarrow.parquet.read_table(path).to_pydict()


def columns_of(output: Any, name: str = "") -> dict[str, Any]:
    """Return what ``predict`` returned as nested lists, by the names that the docs give."""
    if output is None:
        return {}
    if hasattr(output, "_asdict"):
        output = output._asdict()
    if isinstance(output, dict):
        parts = [columns_of(value, f"{name}.{key}" if name else key) for key, value in output.items()]
        return {key: value for part in parts for key, value in part.items()}
    if isinstance(output, tuple):
        return columns_of({str(number): value for number, value in enumerate(output)}, name or "prediction")
    if isinstance(output, list):
        plain_rows = [
            {"boxes": plain(row["boxes"]), "of": row["of"]} if isinstance(row, dict) else row for row in output
        ]
        return {name or "prediction": plain_rows}
    return {name or "prediction": plain(output)}


def numbered(size: int) -> TensorDataset:
    return TensorDataset(torch.arange(float(size))[:, None])


def predict_twice(directory: str, cases: list[tuple[int, int, bool]], with_texts: bool) -> list[Any]:
    trainer = (WithTexts if with_texts else Numbered)(nn.Identity(), callbacks=None)
    kept = []
    for number, (size, batch_size, is_stream) in enumerate(cases):
        data: Any = Stream(numbered(size)) if is_stream else numbered(size)
        kept.append(trainer.predict(data, per_device_batch_size=batch_size))
        for suffix in SUFFIXES:
            if with_texts and suffix == ".npz":
                continue
            path = Path(directory, f"{number}{suffix}")
            found = trainer.predict(data, per_device_batch_size=batch_size, save_to=path)
            assert found == path and path.exists()  # on every process
    return kept


@pytest.mark.parametrize("with_texts", [False, True])
@pytest.mark.parametrize(
    "num_processes", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_file_holds_what_predict_returns(num_processes: int, with_texts: bool, tmp_path: Path) -> None:
    """Sizes 1 to 13, batches 1 to 5, map-style and iterable; also fewer samples than processes."""
    cases = [(size, batch_size, (size + batch_size) % 2 == 0) for size, batch_size in product(SIZES, range(1, 6))]
    cases = cases[:: 4 if with_texts else 1]
    results = run_processes(predict_twice, num_processes, str(tmp_path), cases, with_texts, timeout=170)
    for number, (size, _, _) in enumerate(cases):
        expected = columns_of(results[0][number])
        assert len(next(iter(expected.values()))) == size
        for suffix in SUFFIXES:
            if not (with_texts and suffix == ".npz"):
                assert read(tmp_path / f"{number}{suffix}") == expected, (number, suffix)
    assert not [path for path in tmp_path.iterdir() if path.suffix not in SUFFIXES]  # no directory of parts is left


def test_types_are_kept(tmp_path: Path) -> None:
    trainer = Numbered(nn.Identity(), callbacks=None)
    path = trainer.predict(numbered(5), 2, save_to=tmp_path / "a" / "b.npz")  # makes the directory
    arrays = np.load(path)
    assert {name: (array.dtype.name, array.shape) for name, array in arrays.items()} == {
        "score": ("float32", (5, 2)),
        "more.class": ("int64", (5,)),
        "more.pair.0": ("float64", (5,)),
        "more.pair.1": ("bool", (5,)),
        "more.image": ("float32", (5, 2, 3)),
        "more.half": ("float32", (5,)),
    }
    schema = pyarrow.parquet.read_schema(trainer.predict(numbered(5), 2, save_to=str(tmp_path / "b.parquet")))
    assert [str(field.type).replace("element", "item") for field in schema] == [
        "list<item: float>",
        "int64",
        "double",
        "bool",
        "list<item: list<item: float>>",
        "float",
    ]


class Returning(Trainer):
    output: Callable[[Any], Any]

    def calculate_predictions(self, batch: Any) -> Any:
        return self.output(batch)


def test_outputs_of_other_kinds(tmp_path: Path) -> None:
    trainer = Returning(nn.Identity(), callbacks=None)

    def save(name: str, output: Any, size: int = 5) -> dict[str, Any]:
        trainer.output = output
        return read(trainer.predict(numbered(size), 2, save_to=tmp_path / name))

    assert save("bare.npz", lambda batch: batch[0][:, 0]) == {"prediction": [0, 1, 2, 3, 4]}
    assert save("bare.jsonl", lambda batch: [f"{int(x)}" for x in batch[0]]) == {"prediction": list("01234")}
    infinite = save("infinite.jsonl", lambda batch: batch[0][:, 0] / 0, 2)["prediction"]
    assert np.isnan(infinite[0]) and infinite[1] == float("inf")
    # Lengths and types may differ between batches where the format can hold that.
    ragged = [[1.0] * (n // 2 + 1) for n in range(5)]
    for suffix in (".parquet", ".jsonl"):
        made = save(f"ragged{suffix}", lambda batch: torch.ones(len(batch[0]), int(batch[0][0, 0]) // 2 + 1))
        assert made == {"prediction": ragged}
    found = save("mixed.parquet", lambda batch: {"x": [None if x < 3 else float(x) for x in batch[0]]})
    assert found == {"x": [None, None, None, 3.0, 4.0]}
    found = save("dicts.parquet", lambda batch: {"x": [{"n" if x < 2 else "m": int(x)} for x in batch[0]]}, 3)
    assert found == {"x": [{"n": 0, "m": None}, {"n": 1, "m": None}, {"n": None, "m": 2}]}


def test_a_large_file_has_groups_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_accelerated import predictions

    monkeypatch.setattr(predictions, "_ROWS_IN_A_GROUP", 4)
    path = Numbered(nn.Identity(), callbacks=None).predict(numbered(11), 2, save_to=tmp_path / "x.parquet")
    file = pyarrow.parquet.ParquetFile(path)
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [4, 4, 3]
    assert file.read().to_pydict()["more.class"] == [n % 3 for n in range(11)]


# --------------------------------------------------------------------------------------------------------------------
# Refusals and failures
# --------------------------------------------------------------------------------------------------------------------


def test_a_file_is_not_overwritten_in_silence(tmp_path: Path) -> None:
    trainer = Numbered(nn.Identity(), callbacks=None)
    path = tmp_path / "x.npz"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match=r"x\.npz' is there already\. Give another path, or overwrite=True"):
        trainer.predict(numbered(3), save_to=path)
    assert path.read_text() == "precious"
    trainer.predict(numbered(3), save_to=path, overwrite=True)
    assert read(path)["more.class"] == [0, 1, 2]
    (tmp_path / "d.npz").mkdir()
    with pytest.raises(FileExistsError, match=r"d\.npz"):
        trainer.predict(numbered(3), save_to=tmp_path / "d.npz", overwrite=True)
    # Nor one that has come while the predictions were made.
    late = tmp_path / "late.npz"
    trainer.callback_handler.add_callback(LambdaCallback(on_predict_epoch_end=lambda *a, **k: late.write_text("other")))
    with pytest.raises(FileExistsError, match=r"late\.npz"):
        trainer.predict(numbered(3), save_to=late)
    assert late.read_text() == "other"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.npz", "late.npz", "x.npz"]


@pytest.mark.parametrize(
    ("name", "output", "error", "message"),
    [
        ("x.csv", None, ValueError, r"must end in \.parquet, \.npz or \.jsonl, got '.*x\.csv'"),
        ("x", None, ValueError, "must end in"),
        ("x.npz", lambda batch: ["a" for _ in batch[0]], TypeError, r"'prediction' .* Python objects.* use \.parquet"),
        ("x.jsonl", lambda batch: [object() for _ in batch[0]], TypeError, "'prediction' .* holds object, which"),
        ("x.jsonl", lambda batch: batch[0].numpy(), TypeError, "cannot write ndarray"),
        ("x.jsonl", lambda batch: batch[0] * 1j, TypeError, "'prediction' .* is complex"),
        ("x.jsonl", lambda batch: (batch[0], batch[0][:1]), ValueError, "as many rows.*prediction.1': 1"),
        ("x.jsonl", lambda batch: None, ValueError, "as many rows"),
        ("x.npz", lambda batch: torch.ones(len(batch[0]), int(batch[0][0, 0]) + 1), ValueError, r"\[\(1,\), \(3,\)"),
        ("x.jsonl", lambda batch: {f"n{int(batch[0][0, 0])}": batch[0]}, ValueError, r"the columns \['n0'\] and"),
        ("x.jsonl", lambda batch: {"a": {"b": batch[0]}, "a.b": batch[0]}, ValueError, "the same name .* 'a.b'"),
        ("x.parquet", lambda batch: [int(n) if n < 2 else "a" for n in batch[0]], TypeError, "do not fit"),
    ],
)
def test_what_cannot_be_written_is_refused(
    name: str, output: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    trainer = Returning(nn.Identity(), callbacks=None)
    trainer.output = output
    with pytest.raises(error, match=message):
        trainer.predict(numbered(5), 2, save_to=tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'pip install "pytorch-accelerated\[parquet\]"'):
        Numbered(nn.Identity(), callbacks=None).predict(numbered(3), save_to=tmp_path / "x.parquet")


class Failing(Dataset[Any]):
    def __init__(self, bad: int) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        if index == self.bad:
            raise ArithmeticError(f"sample {index}")
        return (torch.tensor([float(index)]),)


def fail(directory: str, bad: int) -> str:
    try:
        Numbered(nn.Identity(), callbacks=None).predict(Failing(bad), 2, save_to=Path(directory, "x.jsonl"))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("bad", [5, 7])  # of the first process and the second
def test_a_failure_leaves_nothing_behind(bad: int, tmp_path: Path) -> None:
    messages = run_processes(fail, 2, str(tmp_path), bad)
    assert any(f"ArithmeticError: sample {bad}" in message for message in messages), messages
    assert not [message for message in messages if message == "no error"]
    assert not list(tmp_path.iterdir())


def refuse(directory: str) -> str:
    path = Path(directory, "x.jsonl")
    try:
        Numbered(nn.Identity(), callbacks=None).predict(numbered(4), 2, save_to=path)
    except FileExistsError as error:
        return str(error)
    return "no error"


def test_all_processes_refuse_alike(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("precious")
    for message in run_processes(refuse, 2, str(tmp_path)):
        assert "is there already" in message
    assert (tmp_path / "x.jsonl").read_text() == "precious"


def die(directory: str) -> None:
    def kill(trainer: Trainer, step: int, **kwargs: Any) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer = Numbered(nn.Identity(), callbacks=[LambdaCallback(on_predict_step_end=kill)])
    trainer.predict(numbered(9), 2, save_to=Path(directory, "x.jsonl"), overwrite=True)


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("old")
    assert run_until_killed(die, 1, str(tmp_path)) == [-signal.SIGKILL]
    assert (tmp_path / "x.jsonl").read_text() == "old"


def memory_of(directory: str) -> int:
    """Return by how many bytes Python's memory for outputs grew: those of one batch, not of all."""
    import tracemalloc

    trainer = Returning(nn.Identity(), callbacks=None)
    trainer.output = lambda batch: {"text": ["x" * 100_000 for _ in batch[0]]}
    trainer.predict(numbered(2), 1, save_to=Path(directory, "first.jsonl"))
    tracemalloc.start()
    trainer.predict(numbered(200), 1, save_to=Path(directory, "x.jsonl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_stays_that_of_a_batch(tmp_path: Path) -> None:
    [peak] = run_processes(memory_of, 1, str(tmp_path))
    assert (tmp_path / "x.jsonl").stat().st_size > 20_000_000
    assert peak < 4_000_000


def test_the_archive_is_one_that_numpy_and_zip_read(tmp_path: Path) -> None:
    path = Numbered(nn.Identity(), callbacks=None).predict(numbered(3), save_to=tmp_path / "x.npz")
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
