"""What is logged besides numbers: brought into one form, and written into files.

Nothing here guesses. Where a shape can be read in two ways, or a number lies outside its range, an error says so: a
picture that was rescaled behind one's back hides the very mistake that one looks for.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import enum
import io
import json
import math
import types
import wave
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[Any]

_CHANNELS = (1, 3, 4)  # gray, RGB, RGB with alpha
_MAX_AUDIO_CHANNELS = 8
_ROUNDING = 1e-4  # by which a float may leave its range: interpolation and half precision do


def as_plain(value: Any) -> Any:
    """Return a value made of None, bool, int, float, str, lists and dicts only: what JSON and every tracker know.

    Scalars of numpy and torch become Python's, arrays and tensors nested lists. What is none of these becomes text, so
    that nothing is lost without a word.

    Args:
        value: anything.
    """
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)  # also of a subclass, which JSON would write by its name
    if isinstance(value, float):
        return float(value)
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return _of_array(value)
    if isinstance(value, (argparse.Namespace, types.SimpleNamespace)):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(as_plain(key)): as_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return [as_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)


def _of_array(value: Tensor | Array | np.generic) -> Any:
    if isinstance(value, Tensor):
        if value.is_complex():
            return as_plain(value.detach().resolve_conj().resolve_neg().cpu().numpy())  # waits: its numbers are wanted
        return value.detach().tolist()  # waits for the device: its numbers are wanted
    plain = value.tolist()  # numpy, on the host
    return plain if value.dtype.kind in "biufU" else as_plain(plain)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Return a nested configuration as one level of names with dots, the types of numbers and texts kept.

    A list of mappings counts its items, ``optimizer.groups.0.lr``; any other list, and None, become text. Of two
    entries that would share a name, ``{"a.b": 1, "a": {"b": 2}}``, the second gets an apostrophe.

    Args:
        config: the configuration.
        prefix: what every name begins with.
    """
    flat: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        name, plain = f"{prefix}{key}", as_plain(value)
        if isinstance(plain, list) and plain and all(isinstance(item, dict) for item in plain):
            plain = {str(index): item for index, item in enumerate(plain)}
        if isinstance(plain, dict) and plain:
            found = flatten(plain, f"{name}.")
        else:
            found = {name: plain if isinstance(plain, (bool, int, float, str)) else as_text(plain)}
        for inner, item in found.items():
            while inner in flat:
                inner += "'"
            flat[inner] = item
    return flat


def as_text(value: Any) -> str:
    """Return a value as one line of text: a string as it is, anything else as JSON.

    Args:
        value: anything.
    """
    plain = as_plain(value)
    if isinstance(plain, str):
        return plain
    return str(plain) if plain is None or isinstance(plain, (bool, int, float)) else json.dumps(plain)


# ---------------------------------------------------------------------------------------------------------------------
# One form for each kind
# ---------------------------------------------------------------------------------------------------------------------


def as_images(images: Any) -> list[NDArray[np.uint8]]:
    """Return pictures as arrays of uint8 of shape (height, width, 3).

    Tensors, arrays and PIL images are taken, one or a list, of shapes (H, W), (C, H, W), (H, W, C), and with a leading
    dimension for several. Where first and last dimension could both be the channels, they come first in a tensor, as
    everywhere in torch; an array is refused. Floats lie between 0 and 1, uint8 between 0 and 255; booleans are black
    and white. A fourth channel is how opaque a pixel is, before white.

    Args:
        images: the pictures.

    Raises:
        ValueError: if a shape can be read in two ways, or a number is out of range: nothing is rescaled.
        TypeError: if something is no picture.
    """
    if isinstance(images, (list, tuple)):
        found = []
        for number, image in enumerate(images):
            several = as_images(image) if not isinstance(image, (list, tuple)) else []
            if len(several) != 1:
                raise ValueError(
                    f"Item {number} of the list of images must be one image, got {_describe(image)}. "
                    "Give one tensor of all, or a list of single images."
                )
            found += several
    else:
        pixels = _pixels_of_pil(images) if _is_pil(images) else as_array(images, "images")
        found = [_as_rgb(image) for image in _split_images(pixels, isinstance(images, Tensor))]
    if not found:
        raise ValueError("There are no images to log.")
    return found


def _is_pil(value: Any) -> bool:
    return any(kind.__module__ == "PIL.Image" and kind.__name__ == "Image" for kind in type(value).__mro__)


def _pixels_of_pil(image: Any) -> Array:
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        raise ValueError(f"A PIL image of mode {image.mode!r} has no fixed range. Convert it first, to 'L' or 'RGB'.")
    has_alpha = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    return np.asarray(image.convert("RGBA" if has_alpha else "RGB"))


def as_array(values: Any, what: str) -> Array:
    """Return a tensor or array as an array on the host.

    Args:
        values: tensor or array.
        what: what it is, for the error.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(values, Tensor):
        values = values.detach()
        if values.dtype in (torch.bfloat16, torch.float16):
            values = values.float()  # numpy knows no bfloat16
        array: Array = values.cpu().numpy()  # waits for the device: it is to be shown
        return array
    if isinstance(values, (np.ndarray, np.generic)):
        return np.asarray(values)
    raise TypeError(f"{what} must be a tensor, an array or a list of them, got {_describe(values)}.")


def _split_images(pixels: Array, prefers_first: bool) -> list[Array]:
    """Return single images of shape (H, W) or (H, W, C); ``prefers_first``: in doubt the channels come first."""
    if 0 in pixels.shape:
        raise ValueError(f"An image of shape {pixels.shape} has no pixels.")
    if pixels.ndim == 2:
        return [pixels]
    if pixels.ndim not in (3, 4):
        raise ValueError(
            f"Images have the shapes (H, W), (C, H, W), (H, W, C), (N, C, H, W) or (N, H, W, C), got {pixels.shape}."
        )
    is_first, is_last = pixels.shape[-3] in _CHANNELS, pixels.shape[-1] in _CHANNELS
    if is_first and is_last and prefers_first:
        is_last = False
    if is_first == is_last:
        problem = "may be the channels" if is_first else "is 1, 3 or 4, which a number of channels is"
        which = "both the first and the last dimension" if is_first else "neither the first nor the last dimension"
        raise ValueError(
            f"It cannot be told how to read images of shape {pixels.shape}: {which} {problem}. "
            "Give a list of images of shape (H, W), or of arrays whose channels are clear: for gray images of shape "
            "(N, H, W), images[:, None]."
        )
    if is_first:
        pixels = np.moveaxis(pixels, -3, -1)
    return [pixels] if pixels.ndim == 3 else list(pixels)


def _as_rgb(image: Array) -> NDArray[np.uint8]:
    if image.dtype == np.bool_:
        image = image.astype(np.uint8) * np.uint8(255)
    elif image.dtype.kind == "f":
        low, high = float(image.min()), float(image.max())  # numpy
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
            raise ValueError(
                f"Images of floats lie between 0 and 1, got {low:g} to {high:g}. Undo the normalisation, divide by "
                "255, or clamp them yourself: nothing is rescaled here."
            )
        image = (image.astype(np.float64).clip(0, 1) * 255).round().astype(np.uint8)
    elif image.dtype != np.uint8:
        raise ValueError(
            f"Images are of floats between 0 and 1, of uint8, or of booleans, got {image.dtype}: convert them, "
            "for example by images.to(torch.uint8)."
        )
    if image.ndim == 2:
        image = image[..., None]
    if image.shape[-1] == 4:
        opacity = image[..., 3:].astype(np.float64) / 255
        image = (image[..., :3] * opacity + 255 * (1 - opacity)).round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))


def as_audio(audio: Any) -> NDArray[np.float32]:
    """Return sound as float32 between -1 and 1, of shape (T,), or (T, channels) for several channels.

    Args:
        audio: tensor or array of shape (T,), (channels, T) or (T, channels); floats, or int16, whose range is known.

    Raises:
        ValueError: if it is empty, out of range, or it cannot be told which dimension is time.
        TypeError: if it is no tensor and no array.
    """
    samples = as_array(audio, "audio")
    if samples.ndim not in (1, 2) or samples.size == 0:
        raise ValueError(f"Audio has the shape (T,), (channels, T) or (T, channels), got {samples.shape}.")
    if samples.ndim == 2:
        is_first, is_last = (size <= _MAX_AUDIO_CHANNELS for size in samples.shape)
        if is_first == is_last:
            raise ValueError(
                f"It cannot be told which dimension of audio of shape {samples.shape} is time: one of them must be at "
                f"most {_MAX_AUDIO_CHANNELS}, the channels."
            )
        samples = samples.T if is_first else samples
        samples = samples[:, 0] if samples.shape[1] == 1 else samples
    if samples.dtype == np.int16:
        return samples.astype(np.float32) / np.float32(32768)
    if samples.dtype.kind != "f":
        raise ValueError(f"Audio is of floats between -1 and 1, or of int16, got {samples.dtype}.")
    peak = float(np.abs(samples).max())  # numpy; NaN where there is one
    if not peak <= 1 + _ROUNDING:
        raise ValueError(f"Audio lies between -1 and 1, got a peak of {peak:g}. Divide it by its peak, or clamp it.")
    return np.ascontiguousarray(samples.astype(np.float32).clip(-1, 1))


def as_table(table: Any, columns: Sequence[str] | None = None) -> tuple[list[str], list[list[Any]]]:
    """Return a table as the names of its columns and its rows, of plain values.

    Args:
        table: a mapping of columns, a list of mappings (what one of them lacks is None), a pandas DataFrame, or rows:
            a list of lists, or an array of two dimensions.
        columns: names of the columns, for rows; None numbers them.

    Raises:
        ValueError: if columns or rows differ in length.
        TypeError: if it is no table.
    """
    if any(kind.__module__.split(".")[0] == "pandas" and kind.__name__ == "DataFrame" for kind in type(table).__mro__):
        names = [str(name) for name in table.columns]
        rows = [list(row) for row in table.itertuples(index=False, name=None)]
    elif isinstance(table, Mapping):
        names, rows = _of_columns(table)
    elif isinstance(table, (list, tuple)) and table and all(isinstance(row, Mapping) for row in table):
        names = [str(name) for name in dict.fromkeys(name for row in table for name in row)]
        rows = [[{str(name): item for name, item in row.items()}.get(name) for name in names] for row in table]
    elif isinstance(table, (list, tuple, np.ndarray, Tensor)):
        rows = [list(row) for row in _of_rows(table)]
        width = len(rows[0]) if rows else len(columns or ())
        names = [str(name) for name in columns] if columns is not None else [str(number) for number in range(width)]
    else:
        raise TypeError(
            "A table is a mapping of columns, a list of mappings, a pandas DataFrame or a list of rows, "
            f"got {_describe(table)}."
        )
    if columns is not None and list(columns) != names:
        raise ValueError(f"columns={list(columns)} are not those of the table, {names}.")
    for number, row in enumerate(rows):
        if len(row) != len(names):
            raise ValueError(
                f"Row {number} of the table has {len(row)} cells, there are {len(names)} columns: {names}."
            )
    return names, [[as_plain(cell) for cell in row] for row in rows]


def _of_columns(table: Mapping[Any, Any]) -> tuple[list[str], list[list[Any]]]:
    columns = {}
    for name, column in table.items():
        column = as_plain(column) if isinstance(column, (Tensor, np.ndarray)) else column
        if isinstance(column, (str, bytes)) or not isinstance(column, Iterable):
            raise TypeError(f"Column {name!r} of the table must be a list of cells, got {_describe(column)}.")
        columns[str(name)] = list(column)
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"The columns of a table have the same length, got {lengths}.")
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _of_rows(table: Any) -> list[Any]:
    rows = as_plain(table) if isinstance(table, (Tensor, np.ndarray)) else list(table)
    if not isinstance(rows, list):
        raise TypeError("A table has rows, got a single number.")
    for number, row in enumerate(rows):
        if not isinstance(row, (list, tuple, np.ndarray, Tensor)):
            raise TypeError(f"Row {number} of the table must be a list of cells, got {_describe(row)}.")
    return rows


def as_histogram_values(values: Any) -> NDArray[np.float64]:
    """Return the numbers whose distribution is wanted, in one dimension.

    Args:
        values: tensor, array or list of numbers, of any shape.

    Raises:
        ValueError: if there is none, or they are complex.
        TypeError: if they are no numbers.
    """
    listed = [as_plain(value) for value in values] if isinstance(values, (list, tuple)) else values
    numbers = as_array(np.asarray(listed) if isinstance(listed, list) else listed, "The values of a histogram")
    if numbers.size == 0 or numbers.dtype.kind == "c":
        raise ValueError(f"A histogram needs real numbers, got {_describe(values)}.")
    if numbers.dtype.kind not in "biuf":
        raise TypeError(f"A histogram needs numbers, got {_describe(values)}.")
    return numbers.astype(np.float64).ravel()


def count_in_bins(values: Array, num_bins: int = 64) -> tuple[NDArray[np.int64], NDArray[np.float64], int]:
    """Return how many values lie in each of equally wide bins, the edges, and how many values are not finite.

    Args:
        values: numbers.
        num_bins: number of bins.
    """
    finite = np.asarray(values, np.float64).ravel()
    finite = finite[np.isfinite(finite)]
    num_others = int(np.size(values) - finite.size)
    if finite.size == 0:
        return np.zeros(1, np.int64), np.asarray([0.0, 1.0]), num_others
    try:
        counts, edges = np.histogram(finite, num_bins)
    except ValueError:  # so close together that no bins fit between them
        low, high = finite.min(), finite.max()
        counts, edges = np.asarray([finite.size]), np.asarray([low, max(high, np.nextafter(low, np.inf))])
    return counts.astype(np.int64), edges, num_others


def describe_histogram(values: Array, num_bins: int = 64) -> dict[str, Any]:
    """Return a histogram as plain data: counts, edges, and how many values there were and were not finite.

    Args:
        values: numbers.
        num_bins: number of bins.
    """
    counts, edges, num_others = count_in_bins(values, num_bins)
    return {
        "counts": counts.tolist(),  # numpy
        "edges": edges.tolist(),  # numpy
        "num_values": int(np.size(values)),
        "num_non_finite": num_others,
    }


def check_captions(captions: Sequence[str] | None, num_images: int) -> list[str] | None:
    """Return the captions as a list of as many texts as there are images, or None.

    Args:
        captions: one text for each image, or None.
        num_images: number of images.

    Raises:
        ValueError: if there are not as many.
        TypeError: if it is a single text.
    """
    if captions is None:
        return None
    if isinstance(captions, str):
        raise TypeError(f"captions must be a list with one text for each image, got the text {captions!r}.")
    texts = [as_text(caption) for caption in captions]
    if len(texts) != num_images:
        raise ValueError(f"There are {num_images} images and {len(texts)} captions.")
    return texts


def _describe(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"{type(value).__name__} of shape {tuple(shape)}" + (
            f" and {value.dtype}" if hasattr(value, "dtype") else ""
        )
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# ---------------------------------------------------------------------------------------------------------------------
# Bytes and files
# ---------------------------------------------------------------------------------------------------------------------


def add_caption(image: NDArray[np.uint8], caption: str) -> NDArray[np.uint8]:
    """Return the picture with a text below it, for trackers that show pictures without one.

    Small pictures are made larger by whole factors, so that the text has room beside pixels that stay sharp.

    Args:
        image: uint8 of shape (H, W, 3).
        caption: the text.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = image.shape[:2]
    factor = max(1, math.ceil(96 / max(height, width)))
    picture = Image.fromarray(image).resize((width * factor, height * factor), Image.Resampling.NEAREST)
    font = ImageFont.load_default()
    canvas = ImageDraw.Draw(picture)
    lines = _broken(caption, lambda text: canvas.textlength(text, font), max(picture.width - 4, 1))
    text = "\n".join(lines)
    left, top, _, bottom = canvas.multiline_textbbox((0, 0), text, font)
    whole = Image.new("RGB", (picture.width, picture.height + math.ceil(bottom - top) + 6), "white")
    whole.paste(picture, (0, 0))
    ImageDraw.Draw(whole).multiline_text((2 - left, picture.height + 3 - top), text, "black", font)
    return np.asarray(whole)


def _broken(text: str, length_of: Any, width: float) -> list[str]:
    """Return the lines of a text, none wider than ``width`` where a word fits."""
    lines: list[str] = []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and length_of(longer) > width:
                lines.append(line)
                longer = word
            while len(longer) > 1 and length_of(longer) > width:
                fitting = next((n for n in range(len(longer) - 1, 1, -1) if length_of(longer[:n]) <= width), 1)
                lines.append(longer[:fitting])
                longer = longer[fitting:]
            line = longer
        lines.append(line)
    return lines


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Return a picture as the bytes of a PNG file.

    Args:
        image: uint8 of shape (H, W, 3).
    """
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def encode_figure(figure: Figure) -> bytes:
    """Return a matplotlib figure as the bytes of a PNG file; the figure and its canvas stay as they are.

    Args:
        figure: the figure.
    """
    if not callable(getattr(figure, "savefig", None)):
        raise TypeError(f"A figure is a matplotlib.figure.Figure, got {_describe(figure)}.")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi="figure")
    return buffer.getvalue()


def decode_png(data: bytes) -> NDArray[np.uint8]:
    """Return the picture in the bytes of a PNG file, as uint8 of shape (H, W, 3).

    Args:
        data: the bytes.
    """
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return as_images(image)[0]


def encode_wav(audio: NDArray[np.float32], sample_rate: int) -> bytes:
    """Return sound as the bytes of a WAV file of 16 bits.

    Args:
        audio: float32 between -1 and 1, of shape (T,) or (T, channels).
        sample_rate: samples per second.
    """
    if sample_rate < 1:
        raise ValueError(f"sample_rate must be at least 1, got {sample_rate}.")
    samples = (np.asarray(audio, np.float64) * 32768).round().clip(-32768, 32767).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(samples.shape[1] if samples.ndim == 2 else 1)
        file.setsampwidth(2)
        file.setframerate(int(sample_rate))
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


def encode_csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table as the text of a CSV file; None is an empty cell, a list is JSON.

    Args:
        columns: names of the columns.
        rows: the rows.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([["" if cell is None else as_text(cell) for cell in row] for row in rows])
    return buffer.getvalue()


def save_image(path: Path, image: NDArray[np.uint8]) -> None:
    """Write a picture into a PNG file.

    Args:
        path: of the file.
        image: uint8 of shape (H, W, 3).
    """
    path.write_bytes(encode_png(image))


def save_figure(path: Path, figure: Figure) -> None:
    """Write a matplotlib figure into a PNG file.

    Args:
        path: of the file.
        figure: the figure.
    """
    path.write_bytes(encode_figure(figure))


def save_wav(path: Path, audio: NDArray[np.float32], sample_rate: int) -> None:
    """Write sound into a WAV file of 16 bits.

    Args:
        path: of the file.
        audio: float32 between -1 and 1, of shape (T,) or (T, channels).
        sample_rate: samples per second.
    """
    path.write_bytes(encode_wav(audio, sample_rate))


def save_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table into a CSV file.

    Args:
        path: of the file.
        columns: names of the columns.
        rows: the rows.
    """
    path.write_text(encode_csv(columns, rows), encoding="utf-8", newline="")
