"""Find where a program waits for its device: values that are read, and copies that are waited for."""

from __future__ import annotations

import sys
import sysconfig
from collections import Counter
from pathlib import Path
from types import FrameType, ModuleType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# Operations whose result, or the size of it, the host must know before it can go on.
_READS: dict[Any, str] = {
    _aten._local_scalar_dense.default: "a value is read, by item(), float(), int() or a condition",
    _aten.equal.default: "torch.equal",
    _aten.nonzero.default: "nonzero(), or torch.where with one argument",
    _aten.masked_select.default: "masked_select()",
    _aten._unique2.default: "unique()",
    _aten.unique_dim.default: "unique()",
    _aten.unique_consecutive.default: "unique_consecutive()",
}
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
# Where tensors are on the CPU already these dispatch no operation.
_METHODS: dict[Any, str] = {
    Tensor.cpu: "cpu()",
    Tensor.tolist: "tolist()",
    Tensor.numpy: "numpy()",
    Tensor.__array__: "an array of numpy is made of a tensor",
}


class Sync(NamedTuple):
    """A place in a program that waits for the device."""

    owner: str
    """``"user"``, ``"library"`` or ``"optimizer"``: whose code the place is in."""
    operation: str
    """What is done there, in words."""
    path: str
    """The file."""
    line: int
    """The number of the line, from 1."""
    function: str
    """The name of the function."""

    def __str__(self) -> str:
        return f"{self.path}:{self.line} in {self.function}: {self.operation}"


class SyncAudit:
    """Find every place that waits for the device while the block runs.

    An accelerator works through its queue while the host prepares what comes next. Reading a value from it, or copying
    without ``non_blocking``, makes the host wait until the queue is empty, and the device wait for the host afterwards.
    On the CPU nothing has to be waited for; there every read counts that would wait elsewhere, so that code can be
    looked at where there is no accelerator. What datasets, samplers and collate functions do with tensors on the CPU
    does not count, as these are on the CPU everywhere.

    The block becomes many times slower. Explicit waits (``torch.cuda.synchronize``) are not found.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin with nothing found.

        Args:
            device: what the program computes on.
        """
        self.counts: Counter[Sync] = Counter()
        """How often each place waited."""
        self._device = device

    def find(self, owner: str) -> list[Sync]:
        """Return the places in the code of ``owner`` ("user", "library" or "optimizer"), the most frequent first."""
        return [sync for sync, _ in self.counts.most_common() if sync.owner == owner]

    def __str__(self) -> str:
        places = self.find("user")
        lines = [f"{self.counts[sync]:>6} x {sync}" for sync in places]
        total = sum(self.counts[sync] for sync in places)
        what = (
            f"{total} waits for the device in {len(places)} places of your code"
            if places
            else "no wait for the device in your code"
        )
        others = {owner: sum(self.counts[sync] for sync in self.find(owner)) for owner in ("library", "optimizer")}
        rest = f"the library's own log points: {others['library']}, the optimizer's: {others['optimizer']}"
        return "\n".join([f"{what} ({rest})", *lines])

    def __enter__(self) -> SyncAudit:
        self._modes = _Methods(self), _Operations(self)
        for mode in self._modes:
            mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]

    def add(self, operation: str, *tensors: Tensor) -> None:
        """Count a wait for tensors at the place that is being executed."""
        is_on_host = all(tensor.device.type == "cpu" for tensor in tensors)
        if is_on_host and self._device.type != "cpu":
            return
        place = _locate(sys._getframe(1), is_on_host)
        if place is not None:
            owner, frame = place
            code = frame.f_code
            self.counts[Sync(owner, operation, code.co_filename, frame.f_lineno, code.co_qualname)] += 1


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, audit: SyncAudit) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._audit = audit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READS:
            self._audit.add(_READS[func], args[0])
        elif func in _INDEXING:
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            if masks:
                self._audit.add("indexing with a mask", masks[0])
        result = func(*args, **kwargs)
        if func in (_aten._to_copy.default, _aten.copy_.default):
            is_waited_for = not (kwargs.get("non_blocking") or (func is _aten.copy_.default and args[2:3] == (True,)))
            source = args[0] if func is _aten._to_copy.default else args[1]
            if is_waited_for and source.device.type != result.device.type:
                self._audit.add(f"copy from {source.device.type} to {result.device.type}", source, result)
        return result


class _Methods(TorchFunctionMode):
    def __init__(self, audit: SyncAudit) -> None:
        super().__init__()
        self._audit = audit

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(args[0] if args else None, Tensor) and args[0].device.type == "cpu":
            if func in _METHODS:
                self._audit.add(_METHODS[func], args[0])
            elif func is Tensor.to and any(str(value) == "cpu" for value in (*args[1:2], kwargs.get("device"))):
                self._audit.add('to("cpu")', args[0])
        return func(*args, **kwargs)


def _directory(module: ModuleType) -> str:
    return str(Path(str(module.__file__)).parent) + "/"


_PACKAGE = str(Path(__file__).parent) + "/"
_TORCH = _directory(torch)
_OF_DATA = (f"{_TORCH}utils/data/", f"{_PACKAGE}dealing.py", f"{_PACKAGE}data.py")
_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"] + "/"
_OTHERS = ("torch", "accelerate", "torchmetrics", "tqdm")


def _locate(frame: FrameType | None, is_on_host: bool) -> tuple[str, FrameType] | None:
    """Return whose code a wait is in and where, passing over what acts for the one who called it.

    Returns:
        None where that is code of data on the host, which waits for nothing.
    """
    others = tuple(_directory(sys.modules[name]) for name in _OTHERS if name in sys.modules)
    found: FrameType | None = None
    is_optimizer = False
    while frame is not None:
        path = frame.f_code.co_filename
        if is_on_host and path.startswith(_OF_DATA):
            return None
        is_third = path.startswith((*others, "<", __file__))
        is_third = is_third or (path.startswith(_STANDARD_LIBRARY) and "site-packages" not in path)
        if found is None and not is_third:
            found = frame
        elif found is None and path.startswith(f"{_TORCH}optim/"):
            is_optimizer = True
        frame = frame.f_back
    if found is None:
        return None
    if is_optimizer:
        return "optimizer", found
    return "library" if found.f_code.co_filename.startswith(_PACKAGE) else "user", found
