"""Metrics that take part in some passes, metrics of the last steps, and recipes that agree with other packages."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import sklearn.metrics
import torch
from rouge_score import rouge_scorer
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryF1Score, MulticlassAccuracy, MulticlassAUROC
from torchmetrics.regression import MeanSquaredError, PearsonCorrCoef
from torchmetrics.retrieval import RetrievalMAP
from torchmetrics.text import ROUGEScore
from torchmetrics.wrappers import Running

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import LambdaCallback, SaveTrainingStateCallback, StepBasedEvaluationCallback
from pytorch_accelerated.metrics import (
    MostFrequentPrediction,
    When,
    Windowed,
    binary_classification_metrics,
    multiclass_classification_metrics,
    question_answering_metrics,
    regression_metrics,
    summarisation_metrics,
    translation_metrics,
)
from tests.support import Interruption, interrupt_at, make_data, make_mlp, run_processes


def accuracy() -> Metric:
    return MulticlassAccuracy(3, average="micro")


def make_trainer(metrics: Any, *callbacks: Any, kind: type[Trainer] = Trainer) -> Trainer:
    sgd = partial(torch.optim.SGD, lr=0.05)
    return kind(make_mlp(), nn.CrossEntropyLoss(), sgd, list(callbacks) or None, seed=3, metrics=metrics)


def epochs_of(trainer: Trainer, name: str) -> list[int]:
    if name not in trainer.run_history.get_metric_names():
        return []
    return [counters["current_epoch"] for counters in trainer.run_history.get_metric_counters(name)]


# --------------------------------------------------------------------------------------------------------------------
# When
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "train", "easy", "hard"),
    [
        ({}, [1, 2, 3, 4], [1, 1, 2, 2, 3, 3, 4, 4], [1, 1, 2, 2, 3, 3, 4, 4]),
        ({"training": False}, [], [1, 1, 2, 2, 3, 3, 4, 4], [1, 1, 2, 2, 3, 3, 4, 4]),
        ({"evaluation": False}, [1, 2, 3, 4], [], []),
        ({"training": False, "eval_names": ["hard"]}, [], [], [1, 1, 2, 2, 3, 3, 4, 4]),
        ({"intermediate": False}, [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]),
        ({"every_n_epochs": 2}, [2, 4], [2, 4], [2, 4]),
        ({"every_n_epochs": 3, "eval_names": ["easy"]}, [3], [3], []),
        ({"condition": lambda trainer: trainer.current_epoch > 2}, [3, 4], [3, 3, 4, 4], [3, 3, 4, 4]),
        ({"condition": lambda trainer: False}, [], [], []),
    ],
)
def test_a_metric_takes_part_when_it_is_said(kwargs: Any, train: Any, easy: Any, hard: Any) -> None:
    """Two evaluation sets, each evaluated within the epochs, too."""
    metrics = {"always": accuracy(), "sometimes": When(accuracy(), **kwargs)}
    trainer = make_trainer(metrics, StepBasedEvaluationCallback(eval_every_n_steps=2))
    trainer.train(make_data(9), 4, {"easy": make_data(4, 1), "hard": make_data(5, 2)}, per_device_batch_size=3)
    history = trainer.run_history
    names = {"train_": train, "eval_easy_": easy, "eval_hard_": hard}
    for prefix, epochs in names.items():
        assert epochs_of(trainer, f"{prefix}sometimes")[: len(epochs)] == epochs, prefix
        assert len(epochs_of(trainer, f"{prefix}sometimes")) == len(epochs), prefix
        if not kwargs:  # where it takes part, its value is the one it has without When
            values = [history.get_metric_values(f"{prefix}{name}") for name in ("sometimes", "always")]
            assert values[0] == values[1]


class Counting(Trainer):
    calls: list[list[str]]

    def update_metrics(self, metrics: Any, batch: Any, batch_output: Any) -> None:
        self.calls.append(sorted(metrics.keys()))
        super().update_metrics(metrics, batch, batch_output)


def test_a_metric_that_takes_no_part_costs_nothing() -> None:
    trainer = make_trainer(
        {"a": When(accuracy(), training=False), "b": When(accuracy(), evaluation=False)}, kind=Counting
    )
    trainer.calls = []
    trainer.train(make_data(4), 1, make_data(4), per_device_batch_size=4)
    assert trainer.calls == [["b"], ["a"]]
    trainer = make_trainer({"a": When(accuracy(), training=False)}, kind=Counting)
    trainer.calls = []
    trainer.train(make_data(4), 2)
    assert trainer.calls == []  # with no metric there is nothing to update
    assert trainer.run_history.get_metric_names() == {"train_loss_epoch"}


def test_collections_single_metrics_and_names() -> None:
    inner = MetricCollection({"micro": accuracy(), "macro": MulticlassAccuracy(3)})
    trainer = make_trainer(
        MetricCollection({"a": When(inner, training=False), "b": accuracy()}, prefix="p_", postfix="_q")
    )
    trainer.train(make_data(8), 1, make_data(8))
    plain = MetricCollection({"a": inner.clone(), "b": accuracy()}, prefix="p_", postfix="_q")
    names = {f"eval_{name}" for name in plain.keys()}  # noqa: SIM118  # iterating gives other names
    assert trainer.run_history.get_metric_names() == {"train_loss_epoch", "train_p_b_q", "eval_loss_epoch"} | names
    trainer = make_trainer(When(accuracy(), training=False))
    trainer.train(make_data(8), 1, make_data(8))
    assert trainer.run_history.get_metric_names() == {"train_loss_epoch", "eval_loss_epoch", "eval_MulticlassAccuracy"}


def test_groups_of_metrics_that_share_states() -> None:
    groups = [["a", "b"], ["c"]]
    metrics = {"a": accuracy(), "b": When(accuracy(), training=False), "c": When(accuracy(), training=False)}
    trainer = make_trainer(MetricCollection(metrics, compute_groups=groups))
    trainer.train(make_data(8), 1, make_data(8))
    history = trainer.run_history
    assert {"train_a", "eval_a", "eval_b", "eval_c"} < history.get_metric_names()
    assert "train_b" not in history.get_metric_names()
    assert history.get_latest_metric("eval_a") == history.get_latest_metric("eval_b")


def test_metrics_that_agree_on_the_first_batch_stay_apart() -> None:
    """Torchmetrics lets them share their states, so that the second goes by the threshold of the first."""
    scores, labels = torch.tensor([0.1, 0.95, 0.6, 0.7]), torch.tensor([0, 1, 1, 1])
    metrics = {"at_half": BinaryAccuracy(0.5), "at_most": BinaryAccuracy(0.9), "f1": BinaryF1Score(0.5)}
    assert evaluate(metrics, scores, labels) == {"at_half": 1, "at_most": 0.5, "f1": 1}
    trainer = make_trainer(metrics)
    assert trainer.metrics.compute_groups == {0: ["at_half", "f1"], 1: ["at_most"]}
    groups = make_trainer(multiclass_classification_metrics(3)).metrics.compute_groups
    assert sorted(map(sorted, groups.values())) == [
        ["accuracy"],
        ["auroc"],
        ["f1", "precision", "recall"],
        ["most_frequent_prediction"],
    ]
    binary = make_trainer(binary_classification_metrics()).metrics.compute_groups
    assert ["accuracy", "f1", "precision", "recall"] in [sorted(group) for group in binary.values()]
    assert ["auroc", "average_precision"] in [sorted(group) for group in binary.values()]
    apart = {"a": RetrievalMAP(), "b": RetrievalMAP(top_k=2), "c": BinaryAUROC(thresholds=3), "d": BinaryAUROC()}
    assert len(make_trainer(apart).metrics.compute_groups) == 4  # whatever a setting is for
    answers = make_trainer(question_answering_metrics()).metrics.compute_groups
    assert list(answers.values()) == [["answer_f1", "exact_match"]]


def test_evaluate_is_of_no_epoch() -> None:
    trainer = make_trainer({"a": When(accuracy(), every_n_epochs=7), "b": When(accuracy(), eval_names=["test"])})
    assert set(trainer.evaluate(make_data(4))) == {"evaluation_loss", "evaluation_a"}
    found = trainer.evaluate({"test": make_data(4), "other": make_data(4)})
    assert {name for name in found if name.endswith("_b")} == {"evaluation_test_b"}


def ask_on_processes() -> Any:
    asked: list[int] = []

    def condition(trainer: Trainer) -> bool:
        asked.append(trainer.current_epoch)
        # Each process would answer in its own way.
        return (trainer.current_epoch + trainer.accelerator.process_index) % 2 == 0

    trainer = make_trainer({"a": When(accuracy(), condition=condition, training=False)})
    trainer.train(make_data(5), 4, make_data(5), per_device_batch_size=2)
    return asked, epochs_of(trainer, "eval_a")


def test_the_main_process_decides() -> None:
    results = run_processes(ask_on_processes, 2)
    assert results == [([1, 2, 3, 4], [2, 4]), ([], [2, 4])]


def fail_to_ask() -> str:
    def condition(trainer: Trainer) -> bool:
        raise ArithmeticError("no idea")

    try:
        make_trainer({"a": When(accuracy(), condition=condition)}).train(make_data(5), 1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_condition_that_fails_ends_the_run_on_all_processes() -> None:
    assert run_processes(fail_to_ask, 2) == ["ArithmeticError: no idea", "RuntimeError: no idea"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: When(3), TypeError, "takes a torchmetrics Metric or MetricCollection, got int"),
        (lambda: When(When(accuracy())), TypeError, "got When"),
        (lambda: When(accuracy(), eval_names="test"), TypeError, r"write \['test'\]"),
        (lambda: When(accuracy(), every_n_epochs=0), ValueError, "at least 1, got 0"),
        (lambda: When(accuracy(), training=False, evaluation=False), ValueError, "never take part"),
        (lambda: Windowed(accuracy(), 0), ValueError, "at least 1, got 0"),
        (lambda: Windowed(When(accuracy()), 3), TypeError, "wraps no other, got When"),
        (lambda: Windowed(Running(accuracy()), 3), TypeError, "wraps no other, got Running"),
        (lambda: Windowed(PearsonCorrCoef(), 3), TypeError, "PearsonCorrCoef cannot be windowed"),
        (lambda: Windowed(ROUGEScore(rouge_keys="rouge1"), 3), TypeError, "ROUGEScore cannot be windowed"),
    ],
)
def test_mistakes_are_named(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# --------------------------------------------------------------------------------------------------------------------
# Windows
# --------------------------------------------------------------------------------------------------------------------


def windowed_metrics() -> dict[str, Metric]:
    return {
        "accuracy": accuracy(),
        "accuracy_3": Windowed(accuracy(), 3),
        "accuracy_100": Windowed(accuracy(), 100),
        "auroc_2": Windowed(MulticlassAUROC(3), 2),
        "loss_3": Windowed(MeanMetric(), 3),
    }


class Watched(Trainer):
    """Notes, for each step, what the windows say and what all processes predicted."""

    def train_epoch_start(self) -> None:
        super().train_epoch_start()
        self.windows: list[Any]
        self.rounds: list[Any]
        if not hasattr(self, "windows"):
            self.windows, self.rounds = [], []

    def update_metrics(self, metrics: Any, batch: Any, batch_output: Any) -> None:
        outputs, targets = batch_output["model_outputs"].detach(), batch[1]
        for name, metric in metrics.items():
            if name == "loss_3":
                metric.update(batch_output["loss"].detach(), weight=batch_output["batch_size"])
            else:
                metric.update(outputs, targets)


def watch(trainer: Trainer, batch: Any, batch_output: Any, step: int, **kwargs: Any) -> None:
    assert isinstance(trainer, Watched) and trainer.data_pass is not None
    outputs, targets = trainer.gather((batch_output["model_outputs"], batch[1]))
    trainer.rounds.append((trainer.current_epoch, outputs.softmax(-1), targets))
    assert trainer.data_pass.has_windowed_metrics
    trainer.windows.append(trainer.data_pass.windowed_results())


def train_with_windows(
    size: int,
    save_dir: str | None = None,
    stop_at: int | None = None,
    resume: bool = False,
    batch_size: int = 2,
) -> Any:
    callbacks: list[Any] = [LambdaCallback(on_train_step_end=watch)]
    if save_dir is not None:
        callbacks += [SaveTrainingStateCallback(save_dir, save_every_n_updates=2), interrupt_at(stop_at)]
    trainer = make_trainer(windowed_metrics(), *callbacks, kind=Watched)
    arguments: dict[str, Any] = {"resume_from": "latest"} if resume else {}
    try:
        trainer.train(make_data(size), 2, make_data(4), per_device_batch_size=batch_size, **arguments)
    except Interruption:
        return None
    assert isinstance(trainer, Watched)
    return trainer.windows, trainer.rounds, trainer.run_history.state_dict()


def expected_windows(rounds: list[Any]) -> list[dict[str, float]]:
    """Return what a loop by hand says of the last steps of each epoch, over all processes."""
    found = []
    for last, (epoch, _, _) in enumerate(rounds):

        def of_last(num_steps: int, last: int = last, epoch: int = epoch) -> tuple[torch.Tensor, torch.Tensor]:
            inside = [row for row in rounds[max(0, last - num_steps + 1) : last + 1] if row[0] == epoch]
            return torch.cat([row[1] for row in inside]), torch.cat([row[2] for row in inside])

        values = {}
        for num_steps in (3, 100):
            scores, targets = of_last(num_steps)
            values[f"accuracy_{num_steps}"] = (scores.argmax(-1) == targets).float().mean().item()
        scores, targets = of_last(3)
        values["loss_3"] = nn.functional.nll_loss(scores.log(), targets).item()
        auroc = MulticlassAUROC(3)
        auroc.distributed_available_fn = lambda: False  # by hand, on this process alone
        auroc.update(*of_last(2))
        values["auroc_2"] = auroc.compute().item()
        found.append(values)
    return found


IGNORED = "ignore:(No (negative|positive) samples|Average precision score)"  # windows that are small


@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize(("num_processes", "size"), [(1, 17), (3, 19)])  # the last round is not everyone's
def test_windows_hold_the_last_steps_of_all_processes(num_processes: int, size: int) -> None:
    results = run_processes(train_with_windows, num_processes, size, timeout=170)
    for windows, rounds, history in results:
        assert sum(len(row[2]) for row in rounds) == 2 * size
        for found, expected in zip(windows, expected_windows(rounds), strict=True):
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert windows == results[0][0]
        # At the end of the epoch they are in the history; of evaluations they are not.
        metrics = history["metrics"]
        last = windows[len(windows) // 2 - 1]
        assert {name: metrics[f"train_{name}"][0][0] for name in last} == last
        assert metrics["train_accuracy"][0][0] == pytest.approx(last["accuracy_100"])
        assert {name for name in metrics if name.startswith("eval")} == {"eval_loss_epoch", "eval_accuracy"}


@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize(("num_processes", "stop_at"), [(1, 7), (2, 3)])
def test_windows_survive_an_interruption_to_the_bit(num_processes: int, stop_at: int, tmp_path: Path) -> None:
    """The windows after the resumption reach back to before it."""
    size = 11 * num_processes
    whole = run_processes(train_with_windows, num_processes, size)
    run_processes(train_with_windows, num_processes, size, str(tmp_path), stop_at)
    resumed = run_processes(train_with_windows, num_processes, size, str(tmp_path), None, True)
    for (windows, _, history), (windows_after, rounds_after, history_after) in zip(whole, resumed, strict=True):
        assert history_after == history
        assert 0 < len(rounds_after) < len(windows)
        assert windows_after == windows[-len(windows_after) :]


@pytest.mark.filterwarnings(IGNORED)
def test_windows_go_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """The steps before count as they were; the window of all steps is exact."""
    [(windows, _, _)] = run_processes(train_with_windows, 1, 24, None, None, False, 4)
    run_processes(train_with_windows, 2, 24, str(tmp_path), 3)
    [(windows_after, _, _)] = run_processes(train_with_windows, 1, 24, str(tmp_path), None, True, 4)
    last = len(windows) // 2 - 1
    assert len(windows_after) == len(windows) - 2
    assert windows_after[last - 2]["accuracy_100"] == pytest.approx(windows[last]["accuracy_100"])
    assert windows_after[last - 2]["loss_3"] == pytest.approx(windows[last]["loss_3"], rel=1e-4)


def test_a_window_alone() -> None:
    metric = Windowed(MeanSquaredError(), num_steps=2)
    for number in range(5):
        metric.update(torch.tensor([float(number)]), torch.tensor([0.0]))
        assert metric.compute() == (number**2 + max(number - 1, 0) ** 2) / min(number + 1, 2)
    assert len(metric._parts) == 2  # memory does not grow
    metric.reset()
    metric.update(torch.tensor([3.0]), torch.tensor([0.0]))
    assert metric.compute() == 9


def train_with_condition(save_dir: str | None = None, stop_at: int | None = None, resume: bool = False) -> Any:
    metrics = {
        "early": When(accuracy(), condition=lambda trainer: trainer.num_updates == 0),
        "late": When(accuracy(), condition=lambda trainer: trainer.num_updates > 0, evaluation=False),
        "nested": When(MetricCollection({"a": accuracy()}), condition=lambda trainer: trainer.num_updates == 0),
    }
    callbacks = []
    if save_dir is not None:
        callbacks = [SaveTrainingStateCallback(save_dir, save_every_n_updates=1), interrupt_at(stop_at)]
    trainer = make_trainer(metrics, *callbacks)
    arguments: dict[str, Any] = {"resume_from": "latest"} if resume else {}
    try:
        trainer.train(make_data(13), 2, make_data(4), per_device_batch_size=2, **arguments)
    except Interruption:
        return None
    return trainer.run_history.state_dict()


def test_what_took_part_before_an_interruption_goes_on_to(tmp_path: Path) -> None:
    num_processes = 2
    whole = run_processes(train_with_condition, num_processes)
    assert {"train_early", "train_nested_a", "train_late"} < whole[0]["metrics"].keys()
    run_processes(train_with_condition, num_processes, str(tmp_path), 2)
    assert run_processes(train_with_condition, num_processes, str(tmp_path), None, True) == whole


# --------------------------------------------------------------------------------------------------------------------
# Recipes
# --------------------------------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """Returns what it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def evaluate(metrics: Any, scores: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    trainer = Trainer(Rows(), lambda outputs, targets: outputs.sum() * 0, callbacks=None, metrics=metrics)
    found = trainer.evaluate(TensorDataset(scores, targets), per_device_batch_size=2)
    return {name.removeprefix("evaluation_"): value for name, value in found.items() if name != "evaluation_loss"}


def evaluate_numbers(from_logits: bool) -> dict[str, Any]:
    """Return all of the recipes for numbers, of 13 samples, and of 7: less than three processes' batches."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}
    for size in (13, 7):
        # Small logits: in many batches all are between 0 and 1.
        logits = torch.rand(size, generator=generator) * 1.6 - 0.6
        labels = torch.randint(2, (size,), generator=generator)
        scores = logits if from_logits else logits.sigmoid()
        binary = binary_classification_metrics(threshold=0.55, from_logits=from_logits)
        truth = labels[:, None].float()  # as BCEWithLogitsLoss has them
        found[f"binary_{size}"] = evaluate(binary, scores[:, None], truth), (logits.sigmoid(), labels)

        logits = torch.rand(size, 4, generator=generator)
        labels = torch.cat([torch.arange(4), torch.randint(4, (size - 4,), generator=generator)])
        scores = logits if from_logits else logits.softmax(1)
        multiclass = multiclass_classification_metrics(4, from_logits=from_logits)
        found[f"multiclass_{size}"] = evaluate(multiclass, scores, labels), (logits.softmax(1), labels)

        values, truth = torch.randn(2, size, 1, generator=generator)
        found[f"regression_{size}"] = evaluate(regression_metrics(), values, truth), (values[:, 0], truth[:, 0])
        values, truth = torch.randn(2, size, 3, generator=generator)
        found[f"outputs_{size}"] = evaluate(regression_metrics(3), values, truth), (values, truth)
    return found


def binary_by_sklearn(scores: Any, labels: Any) -> dict[str, float]:
    predicted = scores > 0.55
    return {
        "accuracy": sklearn.metrics.accuracy_score(labels, predicted),
        "precision": sklearn.metrics.precision_score(labels, predicted),
        "recall": sklearn.metrics.recall_score(labels, predicted),
        "f1": sklearn.metrics.f1_score(labels, predicted),
        "matthews_correlation": sklearn.metrics.matthews_corrcoef(labels, predicted),
        "auroc": sklearn.metrics.roc_auc_score(labels, scores),
        "average_precision": sklearn.metrics.average_precision_score(labels, scores),
        "most_frequent_prediction": max(predicted.mean(), 1 - predicted.mean()),
    }


def multiclass_by_sklearn(scores: Any, labels: Any) -> dict[str, float]:
    predicted = scores.argmax(1)
    average: dict[str, Any] = {"average": "macro", "zero_division": 0}
    return {
        "accuracy": sklearn.metrics.accuracy_score(labels, predicted),
        "precision": sklearn.metrics.precision_score(labels, predicted, **average),
        "recall": sklearn.metrics.recall_score(labels, predicted, **average),
        "f1": sklearn.metrics.f1_score(labels, predicted, **average),
        "auroc": sklearn.metrics.roc_auc_score(labels, scores, multi_class="ovr"),
        "most_frequent_prediction": max((predicted == label).mean() for label in range(4)),
    }


def regression_by_sklearn(values: Any, truth: Any) -> dict[str, float]:
    mse = ((values - truth) ** 2).mean()
    return {
        "mae": sklearn.metrics.mean_absolute_error(truth, values),
        "mse": mse,
        "rmse": math.sqrt(mse),
        "r2": sklearn.metrics.r2_score(truth, values),
    }


@pytest.mark.parametrize(("num_processes", "from_logits"), [(1, False), (2, True)])
def test_recipes_for_numbers_agree_with_scikit_learn(num_processes: int, from_logits: bool) -> None:
    by_hand = {
        "binary": binary_by_sklearn,
        "multiclass": multiclass_by_sklearn,
        "regression": regression_by_sklearn,
        "outputs": regression_by_sklearn,
    }
    for results in run_processes(evaluate_numbers, num_processes, from_logits):
        for name, (found, (scores, labels)) in results.items():
            expected = by_hand[name.split("_")[0]](scores.numpy(), labels.numpy())
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def test_a_model_that_always_says_the_same() -> None:
    found = evaluate({"share": MostFrequentPrediction(3)}, torch.tensor([[0.0, 2.0, 1.0]] * 5), torch.arange(5) % 3)
    assert found == {"share": 1.0}
    metric = MostFrequentPrediction(3, ignore_index=-100)
    metric.update(torch.tensor([[0, 1, 1], [2, 2, 2]]), torch.tensor([[0, 0, 0], [-100, -100, -100]]))
    assert metric.compute() == pytest.approx(2 / 3)


def test_r2_of_one_sample_is_not_a_number() -> None:
    assert math.isnan(evaluate(regression_metrics(), torch.ones(1, 1), torch.ones(1))["r2"])


PREDICTED = [
    "the cat sat on the mat",
    "a dog barks at night, loudly",
    "hello",
    "It's a nice day, isn't it?",
    "the same the same the same",
    "running dogs are runners",
    "",
]
REFERENCES = [
    ["the cat is on the mat", "there is a cat on the mat"],
    ["the dog barks loudly at night", "a dog barks at night"],
    ["hallo", "hi there"],
    ["it is a nice day, is it not?", "a nice day!"],
    ["the same", "the other the same"],
    ["the dogs run", "a runner with dogs"],
    ["nothing", "no text"],
]


class Texts(Dataset[Any]):
    """The predictions are there already; a decoder would make them of tokens."""

    def __init__(self, num_references: int) -> None:
        self.num_references = num_references

    def __len__(self) -> int:
        return len(PREDICTED)

    def __getitem__(self, index: int) -> Any:
        references = REFERENCES[index][: self.num_references]
        return torch.ones(1), PREDICTED[index], references[0] if self.num_references == 1 else references


def collate(rows: list[Any]) -> Any:
    return [torch.stack([row[0] for row in rows]), [row[1] for row in rows], [row[2] for row in rows]]


class TextTrainer(Trainer):
    def calculate_eval_batch_loss(self, batch: Any) -> Any:
        return {"loss": batch[0].sum() * 0, "predictions": batch[1], "targets": batch[2]}


def evaluate_texts(num_references: int) -> dict[str, float]:
    metrics = translation_metrics() | summarisation_metrics() | question_answering_metrics()
    metrics |= {f"{name}_stem": metric for name, metric in summarisation_metrics(use_stemmer=True).items()}
    trainer = TextTrainer(Rows(), callbacks=None, metrics=metrics)
    # With one reference torch's own collate makes lists of strings.
    arguments: Any = {} if num_references == 1 else {"collate_fn": collate}
    found = trainer.evaluate(Texts(num_references), per_device_batch_size=2, **arguments)
    return {name.removeprefix("evaluation_"): value for name, value in found.items() if name != "evaluation_loss"}


def answer_words(text: str) -> list[str]:
    words = "".join(letter for letter in text.lower() if letter.isalnum() or letter.isspace()).split()
    return [word for word in words if word not in ("a", "an", "the")]


def answer_f1(predicted: str, answer: str) -> float:
    ours, theirs = answer_words(predicted), answer_words(answer)
    num_same = sum(min(ours.count(word), theirs.count(word)) for word in set(ours))
    return 2 * num_same / (len(ours) + len(theirs)) if num_same else float(ours == theirs)


def texts_by_others(num_references: int) -> dict[str, float]:
    references = [row[:num_references] for row in REFERENCES]
    columns = [list(column) for column in zip(*references, strict=True)]
    pairs = list(zip(PREDICTED, references, strict=True))
    exact = [max(answer_words(text) == answer_words(right) for right in row) for text, row in pairs]
    f1 = [max(answer_f1(text, right) for right in row) for text, row in pairs]
    found = {
        "bleu": sacrebleu.corpus_bleu(PREDICTED, columns).score / 100,
        "chrf": sacrebleu.corpus_chrf(PREDICTED, columns, word_order=2).score / 100,
        "exact_match": sum(exact) / len(pairs),
        "answer_f1": sum(f1) / len(pairs),
    }
    for suffix, use_stemmer in (("", False), ("_stem", True)):
        scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=use_stemmer)
        scores = [scorer.score_multi(row, text) for text, row in pairs]
        for key in ("rouge1", "rouge2", "rougeL"):
            found[f"{key}{suffix}"] = sum(score[key].fmeasure for score in scores) / len(pairs)
    return found


@pytest.mark.parametrize(("num_processes", "num_references"), [(1, 1), (2, 2)])
def test_recipes_for_texts_agree_with_other_packages(num_processes: int, num_references: int) -> None:
    expected = texts_by_others(num_references)
    assert 0 < expected["bleu"] < 1 and expected["rouge1"] != expected["rouge1_stem"]
    for found in run_processes(evaluate_texts, num_processes, num_references):
        assert found == pytest.approx(expected, rel=1e-4)


def test_answers_by_hand() -> None:
    metrics = question_answering_metrics()
    for metric in metrics.values():
        metric.update(["The Cat!", "in the year 1976"], [["a cat", "dog"], "1976"])
    assert metrics["exact_match"].compute() == 0.5
    assert metrics["answer_f1"].compute() == pytest.approx((1 + 2 * 1 / 4) / 2)  # 1 of 3 words, and all of 1


@pytest.mark.parametrize(
    ("predictions", "targets", "error", "message"),
    [
        (torch.ones(2), ["a", "b"], TypeError, "got Tensor and list of str. Decode tokens"),
        ([1, 2], ["a", "b"], TypeError, "got list of int and list of str"),
        (["a", "b"], [["a"], [3]], TypeError, "got list of str and list of list"),
        (["a", "b"], ["a"], ValueError, "got 2 predictions and 1 targets"),
        (["a", "b"], ["a", []], ValueError, "2 targets, 1 of them empty"),
    ],
)
def test_texts_of_wrong_shapes_are_refused(predictions: Any, targets: Any, error: Any, message: str) -> None:
    for metric in (translation_metrics() | summarisation_metrics() | question_answering_metrics()).values():
        with pytest.raises(error, match=message):
            metric.update(predictions, targets)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "nltk", raising=False)
    for name in [name for name in sys.modules if name.startswith("nltk")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r'pip install "pytorch-accelerated\[text\]"'):
        summarisation_metrics(use_stemmer=True)


# --------------------------------------------------------------------------------------------------------------------
# Lists that torchmetrics exchanges an entry at a time
# --------------------------------------------------------------------------------------------------------------------


class Retrieving(Trainer):
    def update_metrics(self, metrics: Any, batch: Any, batch_output: Any) -> None:
        numbers = batch[0][:, 0]
        texts = [PREDICTED[int(number) % 6] for number in numbers]
        metrics["rouge"].update(texts, [REFERENCES[int(number) % 6][0] for number in numbers])
        metrics["map"].update(numbers.sin(), numbers.long() % 3 == 0, indexes=numbers.long() % 2)


def evaluate_lists(sizes: list[int]) -> list[Any]:
    metrics = {"rouge": ROUGEScore(rouge_keys=("rouge1", "rougeL")), "map": RetrievalMAP()}
    trainer = Retrieving(Rows(), lambda outputs, targets: outputs.sum() * 0, callbacks=None, metrics=metrics)
    found = []
    for size in sizes:
        numbers = torch.arange(float(size))
        found.append(trainer.evaluate(TensorDataset(numbers[:, None], numbers), per_device_batch_size=2))
    return found


def test_metrics_whose_lists_differ_in_length_between_processes() -> None:
    """Torchmetrics alone hangs in these exchanges, one for each entry."""
    sizes = [2, 5, 9, 13]
    alone = evaluate_lists(sizes)
    assert {"evaluation_rouge1_fmeasure", "evaluation_map"} < set(alone[0])
    for results in run_processes(evaluate_lists, 3, sizes, timeout=60):
        for found, expected in zip(results, alone, strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
