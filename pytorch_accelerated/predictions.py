"""What becomes of predictions: they are gathered on every process, or written to a file while they are made."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from pytorch_accelerated import distributed

Columns = dict[str, Any]
"""By name, for some samples: an array whose first dimension is the sample, or a list of plain objects."""

_SUFFIXES = (".parquet", ".npz", ".jsonl")
_ROWS_IN_A_GROUP, _BYTES_IN_A_GROUP = 2**16, 2**26


def collect_predictions(
    accelerator: Accelerator, save_to: str | os.PathLike[str] | None, overwrite: bool
) -> GatheredPredictions | WrittenPredictions:
    """Return what takes the outputs of a prediction, a batch at a time, and has its result in the end. Collective.

    Args:
        accelerator: the processes.
        save_to: the file to write; None to gather the outputs.
        overwrite: whether a file that is there may be replaced.

    Raises:
        FileExistsError: if there is a file, and it may not be replaced.
        ImportError: if the format needs a package that is not installed.
        ValueError: if the suffix of the file says no format.
    """
    if save_to is None:
        return GatheredPredictions(accelerator)
    return WrittenPredictions(accelerator, Path(save_to), overwrite)


class GatheredPredictions:
    """Keep the outputs of all processes, on the CPU of each."""

    def __init__(self, accelerator: Accelerator) -> None:
        """Begin with no outputs."""
        self._accelerator = accelerator
        self._outputs: list[Any] = []

    def __enter__(self) -> GatheredPredictions:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def add(self, output: Any, has_samples: bool) -> None:
        """Add the output of a batch; ``has_samples`` says whether it is this process's own. Collective."""
        gathered = distributed.gather(self._accelerator, output, contributes=has_samples)
        # To the host at once, which waits for the device: the outputs of a dataset may not fit on it.
        self._outputs.append(distributed.to_host(gathered))

    def result(self) -> Any:
        """Return the outputs, joined in the order of the dataset."""
        return distributed.concatenate(self._outputs)


class WrittenPredictions:
    """Write the outputs to a file, of which each process writes its part while the main process joins them in the end.

    A process has the outputs of one batch in memory at a time. Its part lies in a directory beside the file, which goes
    away with the end of the prediction, also by a failure.
    """

    def __init__(self, accelerator: Accelerator, path: Path, overwrite: bool) -> None:
        """Make the directory for the parts. Collective; see ``collect_predictions``."""
        if path.suffix not in _SUFFIXES:
            raise ValueError(f"save_to must end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}, got {str(path)!r}.")
        if path.suffix == ".parquet":
            _import_pyarrow()
        self._accelerator = accelerator
        self._path = path
        self._overwrite = overwrite
        self._num_batches = 0
        self._directory = distributed.on_main_process(accelerator, self._make_directory, FileExistsError)
        self._part: IO[bytes] | None = None

    def _make_directory(self) -> Path:
        self._refuse_to_overwrite()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{self._path.name}.", dir=self._path.parent.absolute()))

    def _refuse_to_overwrite(self) -> None:
        if self._path.is_dir() or (self._path.exists() and not self._overwrite):
            raise FileExistsError(
                f"save_to={str(self._path)!r} is there already. Give another path, or overwrite=True."
            )

    def __enter__(self) -> WrittenPredictions:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._part is not None:
            self._part.close()
        if self._accelerator.is_main_process:
            shutil.rmtree(self._directory, ignore_errors=True)  # what cannot be removed must not hide a failure

    def add(self, output: Any, has_samples: bool) -> None:
        """Write the output of a batch; ``has_samples`` says whether it is this process's own.

        Raises:
            FileNotFoundError: if the directory is not there for this process.
            TypeError: if the output cannot be written in this format.
            ValueError: if parts of it have different numbers of samples.
        """
        if self._part is None:
            if not self._directory.is_dir():
                raise FileNotFoundError(
                    f"process {self._accelerator.process_index} does not see {self._directory}, which process 0 has "
                    "made: save_to must be on storage that all machines share."
                )
            self._part = self._part_of(self._accelerator.process_index).open("wb")
        columns = _columns_of(output, self._path.suffix)
        if not has_samples:
            columns = {name: values[:0] for name, values in columns.items()}
        _write_part(self._part, columns)
        self._num_batches += 1

    def _part_of(self, process: int) -> Path:
        return self._directory / f"process_{process}"

    def result(self) -> Path:
        """Join the parts of all processes, and return the path of the file. Collective.

        Raises:
            FileExistsError: if there is a file by now, and it may not be replaced.
            TypeError: if the outputs of different batches do not fit together.
            ValueError: if they do not, or there are none.
        """
        if self._part is not None:
            self._part.close()
        numbers = distributed.gather_rows(self._accelerator, self._num_batches)  # all parts are complete now
        if not any(numbers):
            raise ValueError("there is nothing to write: the data gave no batch.")
        distributed.on_main_process(self._accelerator, self._join, ValueError)
        return self._path

    def _join(self) -> None:
        write: Callable[[Path, Callable[[], Iterator[Columns]]], None]
        write = {".parquet": _write_parquet, ".npz": _write_npz, ".jsonl": _write_jsonl}[self._path.suffix]
        joined = self._directory / f"joined{self._path.suffix}"
        write(joined, self._batches)
        with joined.open("rb") as file:
            os.fsync(file.fileno())
        self._refuse_to_overwrite()
        os.replace(joined, self._path)

    def _batches(self) -> Iterator[Columns]:
        """Yield the outputs in the order of the dataset: of the first step those of each process, and so on."""
        with ExitStack() as stack:
            processes = range(self._accelerator.num_processes)
            parts = [stack.enter_context(self._part_of(process).open("rb")) for process in processes]
            names: list[str] | None = None
            for _ in range(self._num_batches):
                for part in parts:
                    columns = _read_part(part)
                    names = names if names is not None else list(columns)
                    if list(columns) != names:
                        raise ValueError(
                            f"the outputs of different batches cannot be joined, they have the columns {names} and "
                            f"{list(columns)}. Override calculate_predictions to return the same for each batch."
                        )
                    if len(next(iter(columns.values()))):
                        yield columns


def _write_part(file: IO[bytes], columns: Columns) -> None:
    kinds = [[name, isinstance(values, np.ndarray)] for name, values in columns.items()]
    file.write(json.dumps(kinds).encode() + b"\n")
    for values in columns.values():
        if isinstance(values, np.ndarray):
            np.lib.format.write_array(file, values, allow_pickle=False)
        else:
            file.write(json.dumps(values).encode() + b"\n")


def _read_part(file: IO[bytes]) -> Columns:
    """Return the columns that ``_write_part`` has written next."""
    return {
        name: np.lib.format.read_array(file, allow_pickle=False) if is_array else json.loads(file.readline())
        for name, is_array in json.loads(file.readline())
    }


# --------------------------------------------------------------------------------------------------------------------
# Columns
# --------------------------------------------------------------------------------------------------------------------


def _columns_of(output: Any, suffix: str) -> Columns:
    """Return the parts of a nested output by name, on the CPU.

    Raises:
        TypeError: if something in it cannot be written in the format of ``suffix``.
        ValueError: if the parts have different numbers of samples, or there are none.
    """
    columns: Columns = {}
    # Waits for the device: the outputs of a dataset may not fit on it.
    _add_columns(columns, "", distributed.to_host(output), suffix)
    sizes = {name: len(values) for name, values in columns.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(
            f"the parts of a prediction must have as many rows as the batch has samples, got {sizes}. Override "
            "calculate_predictions to return tensors whose first dimension is the sample."
        )
    return columns


def _add_columns(columns: Columns, name: str, data: Any, suffix: str) -> None:
    own_name = name or "prediction"
    if own_name in columns:
        raise ValueError(f"two parts of the predictions have the same name for a column, {own_name!r}: rename one.")
    if data is None:
        return
    if isinstance(data, Tensor):
        columns[own_name] = _as_array(data if data.ndim else data[None], own_name, suffix)
    elif isinstance(data, Mapping):
        for key, value in data.items():
            _add_columns(columns, f"{name}.{key}" if name else str(key), value, suffix)
    elif distributed.is_nested(data):
        if hasattr(data, "_fields"):  # a named tuple
            _add_columns(columns, name, dict(zip(data._fields, data, strict=True)), suffix)
        else:
            _add_columns(columns, own_name, dict(enumerate(data)), suffix)
    elif isinstance(data, list | tuple):
        if suffix == ".npz":
            raise TypeError(
                f"column {own_name!r} of the predictions has Python objects, which a file of {suffix} does not hold; "
                f"use {_SUFFIXES[0]} or {_SUFFIXES[2]}."
            )
        columns[own_name] = [_as_plain(row, own_name) for row in data]
    else:
        raise TypeError(
            f"cannot write {type(data).__name__} (column {own_name!r}); expected tensors, nested tuples, lists and "
            "dicts of tensors, or lists of one object for each sample. Override calculate_predictions to return such."
        )


def _as_array(tensor: Tensor, name: str, suffix: str) -> np.ndarray[Any, Any]:
    if tensor.is_complex() and suffix != ".npz":
        raise TypeError(f"column {name!r} of the predictions is complex, which a file of {suffix} does not hold.")
    if tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
        tensor = tensor.float()  # of which numpy has no type; all fit
    array: np.ndarray[Any, Any] = tensor.resolve_conj().resolve_neg().detach().numpy()
    return array


def _as_plain(row: Any, name: str) -> Any:
    """Return an object with nothing in it but lists, dicts, strings and numbers."""
    if row is None or isinstance(row, bool | int | float | str):
        return row
    if isinstance(row, Tensor | np.ndarray | np.generic):
        return row.tolist()  # waits for nothing: tensors are on the CPU by now
    if isinstance(row, Mapping):
        return {str(key): _as_plain(value, name) for key, value in row.items()}
    if isinstance(row, list | tuple):
        return [_as_plain(value, name) for value in row]
    raise TypeError(
        f"column {name!r} of the predictions holds {type(row).__name__}, which cannot be written. Override "
        "calculate_predictions to return tensors, numbers, strings, lists or dicts."
    )


# --------------------------------------------------------------------------------------------------------------------
# Formats
# --------------------------------------------------------------------------------------------------------------------


def _write_jsonl(path: Path, batches: Callable[[], Iterator[Columns]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for columns in batches():
            lists = [values if isinstance(values, list) else values.tolist() for values in columns.values()]  # numpy
            for row in zip(*lists, strict=True):
                file.write(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n")


def _write_npz(path: Path, batches: Callable[[], Iterator[Columns]]) -> None:
    num_samples = 0
    shapes: dict[str, set[tuple[int, ...]]] = {}
    types: dict[str, Any] = {}
    for columns in batches():
        num_samples += len(next(iter(columns.values())))
        for name, values in columns.items():
            shapes.setdefault(name, set()).add(values.shape[1:])
            types[name] = np.result_type(types.get(name, values.dtype), values.dtype)
    for name, found in shapes.items():
        if len(found) > 1:
            raise ValueError(
                f"column {name!r} of the predictions cannot be joined, its shapes after the first dimension are "
                f"{sorted(found)}. Override calculate_predictions to return outputs of one shape, for example padded "
                "to a fixed length, or use .parquet or .jsonl."
            )
    with zipfile.ZipFile(path, "w") as archive:  # as np.savez makes it, without all of an array in memory
        for name, [shape] in shapes.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                descr = np.lib.format.dtype_to_descr(types[name])
                header = {"descr": descr, "fortran_order": False, "shape": (num_samples, *shape)}
                np.lib.format.write_array_header_2_0(file, header)
                for columns in batches():
                    file.write(np.ascontiguousarray(columns[name], types[name]).tobytes())


def _import_pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError('a file of .parquet needs pyarrow: pip install "pytorch-accelerated[parquet]"') from error


def _write_parquet(path: Path, batches: Callable[[], Iterator[Columns]]) -> None:
    arrow, parquet = _import_pyarrow()
    schema: Any = None
    for columns in batches():
        try:
            found = arrow.schema({name: _as_arrow(arrow, values).type for name, values in columns.items()})
            if schema is None or not found.equals(schema):
                known = [] if schema is None else [schema]
                schema = arrow.unify_schemas([*known, found], promote_options="permissive")
        except (arrow.ArrowInvalid, arrow.ArrowTypeError) as error:
            raise TypeError(f"the predictions of different samples are of types that do not fit: {error}") from error
    group: list[Any] = []
    with parquet.ParquetWriter(path, schema) as writer:
        for columns in batches():
            arrays = [_as_arrow(arrow, columns[field.name], field.type) for field in schema]
            group.append(arrow.Table.from_arrays(arrays, schema=schema))
            if sum(map(len, group)) >= _ROWS_IN_A_GROUP or sum(t.nbytes for t in group) >= _BYTES_IN_A_GROUP:
                writer.write_table(arrow.concat_tables(group))
                group = []
        if group:
            writer.write_table(arrow.concat_tables(group))


def _as_arrow(arrow: Any, values: Any, as_type: Any = None) -> Any:
    """Return a column as an array of arrow; of an array with more dimensions each sample is a nested list."""
    if isinstance(values, list):
        return arrow.array(values, type=as_type)
    column = arrow.array(values.reshape(-1))
    for axis in reversed(range(1, values.ndim)):
        size, num_lists = values.shape[axis], int(np.prod(values.shape[:axis]))
        column = arrow.ListArray.from_arrays(arrow.array(np.arange(num_lists + 1) * size, arrow.int32()), column)
    return column if as_type is None or column.type == as_type else column.cast(as_type)
