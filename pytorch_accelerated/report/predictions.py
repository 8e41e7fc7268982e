"""What the page shows of predictions: confusion matrix, figures of each class, mistakes, residuals, attention."""

from __future__ import annotations

import math
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytorch_accelerated.report.markup import MISSING, Html, box, card, figure, picture, table
from pytorch_accelerated.report.reading import Numbers
from pytorch_accelerated.report.svg import draw_scatter
from pytorch_accelerated.trackers.media import encode_png

_MAX_CLASSES_AS_TABLE = 30
_MAX_CONFUSIONS = 20
_NUM_SHADES = 6


def show_predictions(facts: dict[str, Any]) -> str:
    """Return the cards of one evaluation set, or of an attention layer, as ``ReportCallback`` left them."""
    shown = {"classification": _show_classification, "regression": _show_regression, "attention": _show_attention}
    at = f"update {facts.get('num_updates', 0)}, epoch {facts.get('current_epoch', 0)}"
    which = f" on {facts['eval_name']}" if facts.get("eval_name") else ""
    heading = f"Attention of {facts['layer']}" if facts["task"] == "attention" else f"Predictions{which}"
    numbers = f"{facts['num_items']} predictions, " if "num_items" in facts else ""
    cards = shown[facts["task"]](facts)
    return f'<h2>{escape(heading)}</h2><p class="muted">{numbers}evaluated at {at}</p>{cards}'


def class_figures(confusion: NDArray[np.int64]) -> list[dict[str, float]]:
    """Return precision, recall, F1 and support of each class; NaN for what nothing was predicted or true of."""
    hits = np.diag(confusion).astype(np.float64)
    true, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    rows = []
    for hit, support, guesses in zip(hits, true, predicted, strict=True):
        rows.append(
            {
                "precision": hit / guesses if guesses else math.nan,
                "recall": hit / support if support else math.nan,
                "f1": 2 * hit / (support + guesses) if support + guesses else math.nan,
                "support": int(support),
            }
        )
    return rows


def class_name(facts: dict[str, Any], number: int) -> str:
    """Return the name of a class, or its number where it has none."""
    names = facts.get("class_names") or []
    return str(names[number]) if 0 <= number < len(names) else str(number)


def _show_classification(facts: dict[str, Any]) -> str:
    arrays = facts["arrays"]
    confusion = arrays.get("confusion")
    cards = []
    if confusion is None:
        cards.append(card("Confusion matrix", f"<p>{escape(facts['left_out'])}</p>"))
    else:
        names = [class_name(facts, number) for number in range(len(confusion))]
        total, right = int(confusion.sum()), int(np.diag(confusion).sum())
        share = f"{right} of {total} right: accuracy {right / total:.6g}" if total else "nothing was evaluated"
        shown = _matrix_table(confusion, names) if len(names) <= _MAX_CLASSES_AS_TABLE else _matrix_image(confusion)
        cards.append(card("Confusion matrix", f"<p>{share}</p>{shown}{_frequent_confusions(confusion, names)}"))
        cards.append(card("Each class", _class_table(confusion, names)))
    return "".join(cards) + _show_samples(facts)


def _matrix_table(confusion: NDArray[np.int64], names: list[str]) -> str:
    heads = "".join(f'<th scope="col" class="n">{escape(name)}</th>' for name in names)
    rows = []
    for name, row in zip(names, confusion, strict=True):
        most = max(int(row.sum()), 1)
        shades = [0 if not count else 1 + min(_NUM_SHADES - 2, int(4.999 * count / most)) for count in row]
        cells = "".join(f'<td class="c{shade}">{count}</td>' for shade, count in zip(shades, row, strict=True))
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    note = '<p class="muted">Rows: true class. Columns: predicted class. Shades: part of the row.</p>'
    head = f"<thead><tr><th>true \\ predicted</th>{heads}</tr></thead>"
    return note + box(f'<table class="matrix">{head}<tbody>{"".join(rows)}</tbody></table>', "Confusion matrix")


def _matrix_image(confusion: NDArray[np.int64]) -> str:
    parts = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    pixels = (255 * (1 - np.sqrt(parts))).astype(np.uint8)  # the root lets rare confusions be seen
    alt = f"Confusion matrix of {len(confusion)} classes, rows true, columns predicted, darker is more of the row"
    return figure(picture(encode_png(pixels), alt, is_small=True), alt + ".")


def _frequent_confusions(confusion: NDArray[np.int64], names: list[str]) -> str:
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MAX_CONFUSIONS]
    pairs = [divmod(int(place), len(names)) for place in order if wrong.flat[place] > 0]
    if not pairs:
        return ""
    rows = [(names[true], names[predicted], int(wrong[true, predicted])) for true, predicted in pairs]
    inner = table(["true", "predicted", "count"], rows, "The most frequent mistakes", numeric=[2])
    return f"<details><summary>The most frequent mistakes</summary>{inner}</details>"


def _class_table(confusion: NDArray[np.int64], names: list[str]) -> str:
    rows = []
    for name, figures in zip(names, class_figures(confusion), strict=True):
        shares = [
            MISSING if math.isnan(figures[key]) else f"{figures[key]:.4f}" for key in ("precision", "recall", "f1")
        ]
        rows.append((name, *shares, figures["support"]))
    return table(["class", "precision", "recall", "F1", "support"], rows, numeric=[1, 2, 3, 4], name="Each class")


def _show_samples(facts: dict[str, Any]) -> str:
    arrays = facts["arrays"]
    losses = arrays.get("sample_loss", np.zeros(0))
    if not len(losses):
        return ""
    figures, rows = [], []
    for number, loss in enumerate(losses):
        true, predicted, certainty = _describe_sample(facts, number)
        is_right = facts["task"] == "classification" and true == predicted
        verdict = "right" if is_right else "wrong"
        pixels = arrays.get(f"image_{number}")
        if pixels is not None:
            caption = f"true {true}, predicted {predicted}{certainty}, loss {loss:.4g}"
            what = f"Sample of the evaluation: {caption}"
            content = picture(encode_png(pixels), what, is_small=max(pixels.shape[:2]) <= 128)
            tone = ("good" if is_right else "bad") if facts["task"] == "classification" else "muted"
            word = f'<b class="{tone}">{verdict}</b>: ' if facts["task"] == "classification" else ""
            figures.append(f"<figure>{content}<figcaption>{word}{escape(caption)}</figcaption></figure>")
        rows.append((number + 1, true, predicted, f"{loss:.6g}"))
    note = f'<p class="muted">{escape(facts["image_note"])}</p>' if figures and facts.get("image_note") else ""
    pictures = f'{note}<div class="pictures">{"".join(figures)}</div>' if figures else ""
    listed = table(["", "true", "predicted", "loss"], rows, "The samples of the greatest loss", numeric=[0, 3])
    if pictures:
        listed = f"<details><summary>The same as a table</summary>{listed}</details>"
    return card("Worst predictions first", pictures + listed)


def _describe_sample(facts: dict[str, Any], number: int) -> tuple[str, str, str]:
    arrays = facts["arrays"]
    true, predicted = arrays["sample_true"][number], arrays["sample_predicted"][number]
    if facts["task"] == "regression":
        texts = [", ".join(f"{value:.6g}" for value in np.ravel(row)) for row in (true, predicted)]
        return texts[0], texts[1], ""
    probability = arrays["sample_probability"][number]
    certainty = f" ({probability:.0%})" if math.isfinite(probability) else ""
    return class_name(facts, int(true)), class_name(facts, int(predicted)), certainty


def _show_regression(facts: dict[str, Any]) -> str:
    arrays = facts["arrays"]
    outputs = facts["outputs"]
    heads = (
        ["predicted minus true", *(f"output {row['output']}" for row in outputs)] if len(outputs) > 1 else ["", "value"]
    )
    names = {"num_items": "predictions", "bias": "mean", "mae": "mean of absolute values", "rmse": "root mean square"}
    rows = [(name, *(row[key] for row in outputs)) for key, name in (names | {"r2": "R²"}).items()]
    summary = table(heads, rows, "Residuals: predicted minus true", numeric=range(1, len(heads)))
    true: Numbers = arrays["pairs_true"].astype(np.float64)
    predicted: Numbers = arrays["pairs_predicted"].astype(np.float64)
    shown = len(true) if len(true) == facts["num_items"] else f"{len(true)} of {facts['num_items']}"
    label = f"True against predicted values, {shown} predictions; the dashed line is where both are equal"
    drawing = figure(Html(draw_scatter(true, predicted, label)), label + ".")
    cards = f'<div class="grid-of-cards">{card("True and predicted values", drawing)}{card("Residuals", summary)}</div>'
    return cards + _show_samples(facts)


def attention_pixels(weights: Numbers) -> NDArray[np.uint8]:
    """Return attention weights as shades of grey, white for the greatest."""
    return (255 * weights / max(float(weights.max()), 1e-12)).clip(0, 255).astype(np.uint8)


def _show_attention(facts: dict[str, Any]) -> str:
    weights: Numbers = facts["arrays"]["attention"]
    figures = []
    for head, matrix in enumerate(weights):
        name = f"head {head}, greatest weight {float(matrix.max()):.4g}"
        alt = f"Attention of {facts['layer']}, {name}; rows are queries, columns are keys, brighter is more"
        figures.append(figure(picture(encode_png(attention_pixels(matrix)), alt, is_small=True), name))
    note = f"One sample of the evaluation, {facts['shape'][1]} queries and {facts['shape'][2]} keys. Rows are queries, "
    note += "columns are keys, brighter is more."
    if list(weights.shape[1:]) != facts["shape"][1:]:
        note += f" Averaged to {weights.shape[1]} x {weights.shape[2]}."
    return card("One map per head", f'<p class="muted">{note}</p><div class="pictures">{"".join(figures)}</div>')
