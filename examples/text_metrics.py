"""Measure texts: BLEU, chrF, ROUGE and right answers of a small model that learns to spell numbers; 10 seconds.

The model reads a number, such as 407, and writes it in words, a letter at a time. Writing takes as many forward passes
as there are letters, so it is done at the end of every fifth epoch only.

python examples/text_metrics.py
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import LogMetricsCallback
from pytorch_accelerated.metrics import (
    When,
    Windowed,
    question_answering_metrics,
    summarisation_metrics,
    translation_metrics,
)

ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ONES += ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
LETTERS = sorted({letter for word in ONES + TENS for letter in word} | set("hundred "))
END, NUM_SYMBOLS, MAX_LENGTH = 0, len(LETTERS) + 1, 30  # symbol 0 begins and ends a text


def spell(number: int) -> str:
    """Return a number below 1000 in words."""
    if number >= 100:
        rest = f" {spell(number % 100)}" if number % 100 else ""
        return f"{ONES[number // 100]} hundred{rest}"
    if number >= 20:
        return TENS[number // 10 - 2] + (f" {ONES[number % 10]}" if number % 10 else "")
    return ONES[number]


def encode(text: str) -> list[int]:
    """Return the symbols of a text, padded by the sign of its end."""
    symbols = [LETTERS.index(letter) + 1 for letter in text]
    return symbols + [END] * (MAX_LENGTH - len(symbols))


def decode(symbols: list[int]) -> str:
    """Return the text up to the sign of its end."""
    length = symbols.index(END) if END in symbols else len(symbols)
    return "".join(LETTERS[symbol - 1] for symbol in symbols[:length])


class Speller(nn.Module):
    """A recurrent network that is given the three digits with each letter."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(NUM_SYMBOLS, 16)
        self.net = nn.GRU(16 + 30, 96, batch_first=True)
        self.head = nn.Linear(96, NUM_SYMBOLS)

    def forward(self, digits: Tensor, symbols: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits of the symbols that come next, and the state."""
        known = nn.functional.one_hot(digits, 10).flatten(1).float()[:, None].expand(-1, symbols.shape[1], -1)
        hidden, state = self.net(torch.cat([self.letters(symbols), known], dim=-1), state)
        return self.head(hidden), state

    @torch.no_grad()
    def write(self, digits: Tensor) -> list[str]:
        """Return what the model writes, the likeliest symbol each time."""
        symbols, state = torch.full((len(digits), 1), END, device=digits.device), None
        written = []
        for _ in range(MAX_LENGTH):
            logits, state = self(digits, symbols, state)
            symbols = logits.argmax(-1)
            written.append(symbols)
        return [decode(row) for row in torch.cat(written, dim=1).tolist()]


class SpellingTrainer(Trainer):
    """Learns the next letter; where there are metrics of texts, lets the model write."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        digits, texts = batch
        begun = torch.cat([torch.full_like(texts[:, :1], END), texts[:, :-1]], dim=1)
        logits = self.model(digits, begun)[0].transpose(1, 2)
        return {"loss": nn.functional.cross_entropy(logits, texts), "model_outputs": logits, "targets": texts}

    calculate_eval_batch_loss = calculate_train_batch_loss

    def update_metrics(self, metrics: Any, batch: Any, batch_output: dict[str, Any]) -> None:
        for name, metric in metrics.items():
            if name.startswith("letters"):
                metric.update(batch_output["model_outputs"], batch_output["targets"])
        texts = [name for name in metrics if not name.startswith("letters")]
        if texts:
            written, right = self.get_model().write(batch[0]), [decode(row) for row in batch[1].tolist()]
            for name in texts:
                metrics[name].update(written, right)

    def calculate_predictions(self, batch: Any) -> dict[str, Any]:
        numbers = (batch[0] * torch.tensor([100, 10, 1], device=self.device)).sum(1)
        return {"number": numbers, "text": self.get_model().write(batch[0])}


def main() -> None:
    torch.manual_seed(0)
    numbers = torch.randperm(1000)
    digits = torch.stack([numbers // 100, numbers // 10 % 10, numbers % 10], dim=1)
    texts = torch.tensor([encode(spell(number)) for number in numbers.tolist()])
    train_data, test_data = TensorDataset(digits[:850], texts[:850]), TensorDataset(digits[850:], texts[850:])
    of_texts = translation_metrics() | summarisation_metrics() | question_answering_metrics()
    trainer = SpellingTrainer(
        Speller(),
        None,
        partial(torch.optim.AdamW, lr=5e-3),
        callbacks=[LogMetricsCallback],
        metrics={
            "letters": MulticlassAccuracy(NUM_SYMBOLS, average="micro"),
            "letters_of_last_10_steps": Windowed(MulticlassAccuracy(NUM_SYMBOLS, average="micro"), num_steps=10),
            **{name: When(metric, training=False, every_n_epochs=5) for name, metric in of_texts.items()},
        },
        seed=0,
    )
    history = trainer.train(train_data, num_epochs=10, eval_dataset=test_data, per_device_batch_size=32)
    assert len(history.get_metric_values("eval_letters")) == 10
    assert len(history.get_metric_values("eval_bleu")) == 2
    with tempfile.TemporaryDirectory() as directory:
        path = trainer.predict(test_data, 32, save_to=Path(directory) / "spelled.jsonl")
        if trainer.accelerator.is_main_process:
            trainer.print("\nfirst lines of the predictions:", *path.read_text().splitlines()[:5], sep="\n")


if __name__ == "__main__":
    main()
