"""Weights in files that plain torch and safetensors read: whole, and under the names that the user's module has."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pytorch_accelerated.checkpoint.files import DurableFile, damage_reported, write_file
from pytorch_accelerated.errors import CheckpointError, CheckpointMismatchError

SAFETENSORS = ".safetensors"

# What torch.compile, activation checkpointing and FSDP1 put into the names of the parameters inside a module.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")

# https://github.com/huggingface/safetensors#format
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def clean_name(name: str) -> str:
    """Return the name of a parameter or module without what wrappers put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "").removesuffix(wrapper.removesuffix("."))
    return name.removesuffix(".")


def weights_of(model: nn.Module) -> dict[str, Any]:
    """Return the ``state_dict`` of a module under clean names, tensors on their device."""
    return {clean_name(name): value for name, value in model.state_dict().items()}


def put_weights(model: nn.Module, weights: Mapping[str, Any], source: Path) -> None:
    """Copy weights into a module.

    Raises:
        CheckpointMismatchError: if names or shapes are not those of the module; nothing has been changed then.
    """
    own = model.state_dict()
    names = {clean_name(name): name for name in own}
    missing = [name for name in names if name not in weights]
    strange = [name for name in weights if name not in names]
    problems = [f"it has no {name}" for name in missing] + [f"the model has no {name}" for name in strange]
    for name, wrapped in names.items():
        value = weights.get(name)
        if name in weights and isinstance(own[wrapped], Tensor) != isinstance(value, Tensor):
            problems.append(f"{name} is {type(value).__name__} there")
        elif isinstance(own[wrapped], Tensor) and isinstance(value, Tensor):
            shapes = tuple(value.shape), tuple(own[wrapped].shape)
            if shapes[0] != shapes[1]:
                problems.append(f"{name} has shape {shapes[0]} there and {shapes[1]} in the model")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointMismatchError(f"{source} is of another model: {'; '.join(problems[:3])}{more}.")
    model.load_state_dict({names[name]: value for name, value in weights.items()})


def only_storable(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state_dict that files of safetensors can hold."""
    return {name: value for name, value in weights.items() if _why_not(value) is None}


def _why_not(value: Any) -> str | None:
    """Return what keeps a value out of a file of safetensors; None if nothing does."""
    if not isinstance(value, Tensor):
        return f"is of type {type(value).__name__}"  # a module's get_extra_state may be anything
    if value.layout is not torch.strided or value.is_quantized:
        return f"has the layout {value.layout}" if not value.is_quantized else "is quantized"
    return None if value.dtype in _DTYPES else f"has the type {value.dtype}"


def write_safetensors(file: DurableFile, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors, one at a time, in the format of safetensors.

    Its own writer would need a second copy of all of them in memory, or would write past us, so that the hash took
    another reading. A tensor that shares its memory with another is written out all the same: then plain ``load_file``
    and ``load_state_dict`` read the file.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    # Larger elements first, so that each tensor begins at a multiple of the size of its elements, as readers want it.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for _, tensor in ordered:
        if tensor.numel():
            file.write(_bytes_of(tensor))


def _bytes_of(tensor: Tensor) -> memoryview:
    host = tensor.detach().cpu()  # waits for the device: the weights are wanted on the disk
    host = host.resolve_conj().resolve_neg().contiguous()
    if host.is_complex():
        host = torch.view_as_real(host)
    # Not reshape(-1): a single element may keep a stride, which a view as bytes refuses.
    return memoryview(host.as_strided((host.numel(),), (1,)).view(torch.uint8).numpy().data)


def save_weights(path: Path, weights: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """Write weights to one file, for ``.safetensors`` in that format and otherwise in torch's; return its SHA-256.

    Raises:
        CheckpointError: if it cannot be written; what was at ``path`` is as it was.
    """
    if path.suffix != SAFETENSORS:
        return save_with_torch(path, dict(weights))
    for name, value in weights.items():
        if (reason := _why_not(value)) is not None:
            raise CheckpointError(
                f"{name} {reason}, which files of safetensors cannot hold. Save to a file with another ending, such as "
                ".pt, which torch.load reads."
            )
    tensors = only_storable(weights)
    return write_file(path, lambda file: write_safetensors(file, tensors, {"format": "pt", **metadata}))


def save_with_torch(path: Path, value: Any) -> str:
    """Write what ``torch.load(path, weights_only=True)`` reads to one file; return its SHA-256.

    Raises:
        CheckpointError: if it cannot be written; what was at ``path`` is as it was.
        TypeError: if it could not be loaded again.
    """
    plain = as_plain(value)
    check_loadable(plain, path.name)
    return write_file(path, lambda file: save_plain(plain, file))


def save_plain(value: Any, file: DurableFile) -> None:
    """Write a value with torch."""
    torch.save(value, file)  # type: ignore[arg-type]  # torch asks for write and flush alone


def save_without_checksums(value: Any, file: DurableFile) -> None:
    """Write a value with torch, without the CRC-32 of its parts, which takes a third of the time.

    ``torch.load`` reads it; unzipping it complains. In a checkpoint the SHA-256 of the whole file takes its place.
    """
    before = torch.serialization.get_crc32_options()  # torch has it for the whole process only
    torch.serialization.set_crc32_options(False)
    try:
        save_plain(value, file)
    finally:
        torch.serialization.set_crc32_options(before)


def read_weights(path: Path) -> dict[str, Any]:
    """Return the weights in a file: of safetensors, or a state_dict of torch.

    Raises:
        CheckpointError: if it is not there or cannot be read.
    """
    check_is_file(path)
    if path.suffix == SAFETENSORS:
        with damage_reported(path):
            return dict(load_file(path))
    value = read_with_torch(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no state_dict, but {type(value).__name__}.")
    return value


def check_is_file(path: Path) -> None:
    """Raise CheckpointError if there is no file at ``path``."""
    try:
        is_file = path.is_file()
    except OSError as error:  # such as a name that is too long
        raise CheckpointError(f"{path}: {error.strerror}.") from error
    if not is_file:
        raise CheckpointError(f"there is no file {path}.")


def read_with_torch(path: Path) -> Any:
    """Return what is in a file of torch, on the CPU, without running any code that is in it.

    Raises:
        CheckpointError: if it cannot be read, or holds more than plain data.
    """
    with damage_reported(path):
        return torch.load(path, map_location="cpu", weights_only=True)


def as_plain(value: Any) -> Any:
    """Return nested lists and dicts with numbers of numpy made into Python's, which are the same numbers."""
    if isinstance(value, np.generic):
        return value.item()  # waits for nothing: numpy lives on the host
    if type(value) in (list, tuple, set):
        return type(value)(as_plain(item) for item in value)
    if type(value) in (dict, OrderedDict, Counter):
        return _rebuilt(value, as_plain)
    return value


def _rebuilt(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return a dict of the same kind with other values."""
    result = type(value)()
    for key, item in value.items():
        result[as_plain(key)] = function(item)
    return result


def copied(value: Any, into: Any = None) -> Any:
    """Return a copy of nested lists and dicts that shares no tensor with them, on the CPU.

    Args:
        value: what to copy.
        into: an earlier copy, whose memory is used again where it fits: fresh memory costs more than the copying.
    """
    if isinstance(value, Tensor):
        # The one wait for the device that saving in the background takes.
        is_fit = isinstance(into, Tensor) and (into.shape, into.dtype) == (value.shape, value.dtype)
        if is_fit and into.layout is value.layout is torch.strided and into.stride() == value.stride():
            return into.copy_(value.detach())
        return value.detach().to("cpu", copy=True)
    if type(value) in (list, tuple, set):
        earlier = into if type(into) is type(value) and not isinstance(into, set) and len(into) == len(value) else None
        return type(value)(copied(item, earlier and earlier[n]) for n, item in enumerate(value))
    if type(value) in (dict, OrderedDict, Counter):
        result = type(value)()
        for key, item in value.items():
            result[key] = copied(item, into.get(key) if isinstance(into, dict) else None)
        return result
    return value


_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def check_loadable(value: Any, where: str) -> None:
    """Refuse what ``torch.load(weights_only=True)`` would not give back.

    Raises:
        TypeError: if there is such a thing; the message says where.
    """
    for place, item in _walk(value, where):
        if type(item) not in _PLAIN and type(item) not in (Tensor, nn.Parameter):
            raise TypeError(
                f"a checkpoint holds plain data only, but {place} is of type {type(item).__name__}. Return tensors, "
                "numbers, strings, lists, tuples and dicts from state_dict; of a numpy array or number, .tolist()."
            )


def _walk(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if type(value) in (dict, OrderedDict, Counter):
        for key, item in value.items():
            yield from _walk(key, f"a key of {place}")
            yield from _walk(item, f"{place}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for number, item in enumerate(value):
            yield from _walk(item, f"{place}[{number}]")
    else:
        yield place, value
