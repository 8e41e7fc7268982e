"""Evaluation and prediction: any number of processes gives what one process gives, each sample once."""

from __future__ import annotations

import collections
import dataclasses
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassAUROC
from torchmetrics.regression import SpearmanCorrCoef

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import LambdaCallback, TrainerCallback
from tests.support import Stream, make_data, make_mlp, run_processes

SIZES, BATCH_SIZES = range(1, 41), range(1, 6)


class Numbers(Dataset[Any]):
    """Sample i is (its features, its number): the model is to return the number."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([float(index), 1.0]), torch.tensor(float(index) ** 2)


class Echo(nn.Module):
    """Returns the number of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0] * self.weight


class Ids(TrainerCallback):
    """Gathers the numbers that evaluation batches bring."""

    def on_eval_epoch_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        self.seen: list[float] = []
        self.steps = 0

    def on_eval_step_end(self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any) -> None:
        self.seen += trainer.gather(batch[0][:, 0]).tolist()
        self.steps += 1


def evaluate_and_predict(cases: list[tuple[int, int, bool]]) -> list[Any]:
    results = []
    ids = Ids()
    trainer = Trainer(Echo(), nn.MSELoss(), callbacks=[ids], metrics={"mean": MeanOfTargets(), "all": AllTargets()})
    for size, batch_size, is_stream in cases:
        numbers = Numbers(size)
        data: Any = Stream(numbers) if is_stream else numbers
        found = trainer.evaluate(data, per_device_batch_size=batch_size)
        predictions = trainer.predict(data, per_device_batch_size=batch_size)
        results.append((found, sorted(ids.seen), ids.steps, predictions))
    return results


class MeanOfTargets(MeanMetric):
    """A metric with a sum and a count for a state."""

    def update(self, predictions: torch.Tensor, targets: torch.Tensor) -> None:
        super().update(targets)


class AllTargets(BinaryAUROC):
    """A metric that keeps every sample, in two lists of different types."""

    def update(self, predictions: torch.Tensor, targets: torch.Tensor) -> None:
        super().update(predictions / 100, (targets % 3 == 0).long())


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:No (negative|positive) samples in targets")
def test_each_sample_counts_once(num_processes: int) -> None:
    """Sizes 1 to 40, batches 1 to 5, map-style and iterable; also fewer samples than processes."""
    cases = list(product(SIZES, BATCH_SIZES, (False, True)))
    by_process = run_processes(evaluate_and_predict, num_processes, cases, timeout=300)
    for number, (size, batch_size, _) in enumerate(cases):
        numbers = torch.arange(size, dtype=torch.float32)
        expected_loss = ((numbers - numbers**2) ** 2).double().mean().item()
        auroc = BinaryAUROC()
        auroc.update(numbers / 100, (numbers**2 % 3 == 0).long())
        for results in by_process:
            found, seen, steps, predictions = results[number]
            assert seen == numbers.tolist()
            assert steps == -(-size // (batch_size * num_processes))
            assert torch.equal(predictions, numbers)
            assert found["evaluation_loss"] == pytest.approx(expected_loss, rel=1e-6)
            assert found["evaluation_mean"] == pytest.approx((numbers**2).mean().item(), rel=1e-6)
            assert found["evaluation_all"] == pytest.approx(auroc.compute().item(), rel=1e-6)
            assert found == by_process[0][number][0]


# --------------------------------------------------------------------------------------------------------------------
# Other loaders
# --------------------------------------------------------------------------------------------------------------------


class BatchStream(IterableDataset[Any]):
    """Yields whole batches of different sizes."""

    def __iter__(self) -> Any:
        numbers = Numbers(11)
        for first, last in ((0, 3), (3, 4), (4, 9), (9, 11)):
            yield [torch.stack(parts) for parts in zip(*(numbers[i] for i in range(first, last)), strict=True)]


class OwnWay(DataLoader[Any]):
    """A DataLoader that iterates in its own way."""

    def __iter__(self) -> Any:
        yield from super().__iter__()


class Uneven:
    """A batch sampler with batches of different sizes."""

    def __iter__(self) -> Any:
        yield from ([0, 1, 2], [3], [4, 5, 6, 7], [8, 9], [10])

    def __len__(self) -> int:
        return 5


def evaluate_with_loaders() -> list[Any]:
    ids = Ids()
    trainer = Trainer(Echo(), nn.MSELoss(), callbacks=[ids])
    loaders = {
        "plain": DataLoader(Numbers(11), batch_size=3),
        "shuffled": DataLoader(Numbers(11), batch_size=3, shuffle=True),
        "batch sampler": DataLoader(Numbers(11), batch_sampler=Uneven()),
        "batches": DataLoader(BatchStream(), batch_size=None),
        "own way": OwnWay(Numbers(11), batch_size=3),
        "workers": DataLoader(Numbers(11), batch_size=3, num_workers=2),
        "sampler": DataLoader(Numbers(11), batch_size=2, sampler=BackwardSampler()),
        "nested": DataLoader(Numbers(11), batch_sampler=BatchSampler(range(11), 4, drop_last=False)),
        "drop_last": DataLoader(Numbers(11), batch_size=1, drop_last=True),
    }
    results = []
    for name, loader in loaders.items():
        found = trainer.evaluate(loader)
        results.append((name, sorted(ids.seen), found["evaluation_loss"]))
    return results


class BackwardSampler:
    def __iter__(self) -> Any:
        return iter(range(10, -1, -1))

    def __len__(self) -> int:
        return 11


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_ready_loaders_and_samplers(num_processes: int) -> None:
    numbers = torch.arange(11.0)
    expected = ((numbers - numbers**2) ** 2).mean().item()
    for results in run_processes(evaluate_with_loaders, num_processes):
        for name, seen, loss in results:
            if name == "drop_last":
                assert seen == list(range(11 // num_processes * num_processes))
            else:
                assert seen == numbers.tolist(), name
                assert loss == pytest.approx(expected, rel=1e-6), name


# --------------------------------------------------------------------------------------------------------------------
# Metrics that are hard to exchange
# --------------------------------------------------------------------------------------------------------------------


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).softmax(-1)


class CorrelationTrainer(Trainer):
    def update_metrics(self, metrics: Any, batch: Any, batch_output: Any) -> None:
        metrics["auroc"].update(batch_output["model_outputs"], batch[1])
        metrics["accuracy"].update(batch_output["model_outputs"], batch[1])
        metrics["spearman"].update(batch_output["model_outputs"][:, 0], batch[1].float())


def evaluate_metrics(sizes: list[int]) -> list[Any]:
    metrics = MetricCollection(
        {
            "auroc": MulticlassAUROC(3),
            "accuracy": MulticlassAccuracy(3, average="micro"),
            "spearman": SpearmanCorrCoef(),
        },
        compute_groups=False,
    )
    trainer = CorrelationTrainer(Scores(), nn.CrossEntropyLoss(), callbacks=None, metrics=metrics)
    return [trainer.evaluate(make_data(size), per_device_batch_size=2) for size in sizes]


@pytest.mark.filterwarnings("ignore")  # torchmetrics warns of sets too small for a metric
def test_metrics_that_keep_all_samples_when_a_process_has_none() -> None:
    """Matrix and integer states, with fewer samples than processes."""
    sizes = [2, 3, 7, 13]
    alone = evaluate_metrics(sizes)
    for results in run_processes(evaluate_metrics, 3, sizes):
        for found, expected in zip(results, alone, strict=True):
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True)


# --------------------------------------------------------------------------------------------------------------------
# Structures
# --------------------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    score: torch.Tensor
    parts: dict[str, Any]


class Structured(Trainer):
    def calculate_predictions(self, batch: Any) -> Any:
        numbers = batch[0][:, 0]
        return Pair(numbers, {"twice": (numbers * 2, numbers.long()), "names": [f"n{int(n)}" for n in numbers]})


def predict_structure(size: int) -> Any:
    return Structured(Echo(), nn.MSELoss(), callbacks=None).predict(Numbers(size), per_device_batch_size=2)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 5, 12])
def test_predictions_keep_their_structure(num_processes: int, size: int) -> None:
    for result in run_processes(predict_structure, num_processes, size):
        assert type(result) is Pair
        assert result.score.tolist() == list(range(size))
        assert result.parts["twice"][0].tolist() == [2 * n for n in range(size)]
        assert result.parts["twice"][1].dtype == torch.int64
        assert result.parts["names"] == [f"n{n}" for n in range(size)]
        assert not result.score.is_inference()


def test_predictions_of_different_shapes_are_refused() -> None:
    class Ragged(Trainer):
        def calculate_predictions(self, batch: Any) -> Any:
            return torch.zeros(len(batch[0]), int(batch[0][0, 0]) + 1)

    with pytest.raises(ValueError, match=r"cannot be joined.*\[\(1,\), \(3,\), \(5,\)\].*calculate_predictions"):
        Ragged(Echo(), callbacks=None).predict(Numbers(5), per_device_batch_size=2)


def test_predict_refuses_to_shuffle() -> None:
    with pytest.raises(ValueError, match="order of the dataset"):
        Trainer(Echo(), callbacks=None).predict(Numbers(5), dataloader_kwargs={"shuffle": True})


def test_predict_from_tensors_tuples_and_dicts() -> None:
    class Tensors(Dataset[Any]):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> Any:
            return torch.tensor([float(index), 0.0])

    class Dicts(Tensors):
        def __getitem__(self, index: int) -> Any:
            return {"x": super().__getitem__(index), "labels": index}

    trainer = Trainer(Echo(), nn.MSELoss(), callbacks=None)
    for data in (Tensors(), Dicts(), Numbers(5)):
        assert trainer.predict(data, per_device_batch_size=2).tolist() == [0, 1, 2, 3, 4]


# --------------------------------------------------------------------------------------------------------------------
# Around evaluation
# --------------------------------------------------------------------------------------------------------------------


def test_evaluation_leaves_training_history_alone_and_adds_to_it() -> None:
    model = make_mlp()
    trainer = Trainer(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1), callbacks=None)
    trainer.train(make_data(8), 2, make_data(4))
    before = {name: trainer.run_history.get_metric_values(name) for name in trainer.run_history.get_metric_names()}
    counters = trainer.run_history.state_dict()["counters"]
    result = trainer.evaluate(make_data(6))
    assert set(result) == {"evaluation_loss"}
    for name, values in before.items():
        assert trainer.run_history.get_metric_values(name) == values
    assert trainer.run_history.get_latest_metric("evaluation_loss") == result["evaluation_loss"]
    assert trainer.run_history.state_dict()["counters"] == counters


def test_named_sets_have_names_of_their_own() -> None:
    model = make_mlp()
    names: list[Any] = []
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=1e-30),
        callbacks=[LambdaCallback(on_eval_epoch_begin=lambda trainer, eval_name, **kwargs: names.append(eval_name))],
        metrics={"accuracy": MulticlassAccuracy(3, average="micro")},
    )
    sets = {"easy": make_data(6, seed=1), "hard": make_data(9, seed=2)}
    history = trainer.train(make_data(8), 1, sets)
    assert names == ["easy", "hard"]
    assert history.get_metric_names() == {
        "train_loss_epoch",
        "train_accuracy",
        "eval_easy_loss_epoch",
        "eval_easy_accuracy",
        "eval_hard_loss_epoch",
        "eval_hard_accuracy",
    }
    results = trainer.evaluate(sets)
    for name, data in sets.items():
        loss = nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).item()
        accuracy = (model(data.tensors[0]).argmax(-1) == data.tensors[1]).float().mean().item()
        assert history.get_latest_metric(f"eval_{name}_loss_epoch") == pytest.approx(loss, rel=1e-6)
        assert results[f"evaluation_{name}_loss"] == pytest.approx(loss, rel=1e-6)
        assert results[f"evaluation_{name}_accuracy"] == pytest.approx(accuracy)


def test_a_single_metric_goes_by_its_own_name_and_trains_without_a_second_forward() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = make_mlp(), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.net(x)

    model = Counting()
    metric = MulticlassAccuracy(3, average="micro")
    trainer = Trainer(
        model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=1e-30), callbacks=None, metrics=metric
    )
    data = make_data(10)
    history = trainer.train(data, 1, per_device_batch_size=4)
    assert model.calls == 3
    expected = (model(data.tensors[0]).argmax(-1) == data.tensors[1]).float().mean().item()
    assert history.get_latest_metric("train_MulticlassAccuracy") == pytest.approx(expected)
    assert trainer.metrics is metric


def test_evaluating_inside_training_changes_nothing_of_the_training() -> None:
    """Mode of each module, random streams, gradients, metrics: also where the model draws in evaluation."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_mlp(dropout=0.5)
            self.frozen = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(self.frozen(x)) + 0.01 * torch.randn(len(x), 3)

    def train(evaluates: bool) -> Any:
        torch.manual_seed(3)
        model = Noisy()
        model.frozen.eval()
        data = make_data(20)
        modes = []

        def evaluate(trainer: Trainer, **kwargs: Any) -> None:
            if evaluates:
                trainer.evaluate(make_data(7), per_device_batch_size=2)
                trainer.predict(make_data(7), per_device_batch_size=2)

        trainer = Trainer(
            model,
            nn.CrossEntropyLoss(),
            torch.optim.Adam(model.parameters(), lr=0.01),
            callbacks=[
                LambdaCallback(on_train_step_end=evaluate, on_train_update_end=evaluate),
                LambdaCallback(
                    on_train_step_begin=lambda trainer, **kwargs: modes.append([m.training for m in model.modules()])
                ),
            ],
            metrics={"accuracy": MulticlassAccuracy(3, average="micro")},
        )
        history = trainer.train(data, 2, make_data(5) if evaluates else None, gradient_accumulation_steps=2)
        assert all(mode == modes[0] for mode in modes)
        return {k: v.clone() for k, v in model.state_dict().items()}, history.get_metric_values("train_accuracy")

    plain, busy = train(False), train(True)
    assert plain[1] == busy[1]
    for name, value in plain[0].items():
        assert torch.equal(value, busy[0][name]), name


# --------------------------------------------------------------------------------------------------------------------
# Models that make their own loss, as those of Hugging Face
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Output:
    loss: torch.Tensor | None
    logits: torch.Tensor


class OwnLoss(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = make_mlp(), kind

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.net(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        if self.kind == "object":
            return Output(loss, logits)
        made = {"loss": loss, "logits": logits}
        return made if self.kind == "dict" else collections.OrderedDict(made)


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return 21

    def __getitem__(self, index: int) -> Any:
        x, y = make_data(21)[index]
        return {"x": x, "labels": y}


@pytest.mark.parametrize("kind", ["object", "dict", "OrderedDict"])
def test_models_that_make_their_own_loss(kind: str) -> None:
    model = OwnLoss(kind)
    metrics = {"accuracy": MulticlassAccuracy(3, average="micro")}
    trainer = Trainer(model, None, lambda p: torch.optim.SGD(p, lr=0.1), None, metrics=metrics)
    trainer.train(Rows(), 1, Rows())
    results = trainer.evaluate(Rows())
    x, y = make_data(21).tensors
    logits = model.net(x)
    assert results["evaluation_loss"] == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-6)
    assert results["evaluation_accuracy"] == pytest.approx((logits.argmax(-1) == y).float().mean().item())
    predicted = trainer.predict(Rows())
    assert set(predicted) == {"logits"}  # a loss is none of any sample's
    assert torch.allclose(predicted["logits"], logits)


def test_models_that_make_their_own_loss_of_many_labels_are_told_about_counts() -> None:
    class Tokens(Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            return {"x": torch.ones(4), "labels": torch.tensor([1, -100])}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_mlp()

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
            return {"loss": nn.functional.cross_entropy(self.net(x), labels[:, 0])}

    with pytest.warns(UserWarning, match="return it as 'num_items_in_batch'"):
        Trainer(Model(), None, lambda p: torch.optim.SGD(p, lr=0.1), None).train(Tokens(), 1)


def test_a_forgotten_loss_function_is_named() -> None:
    with pytest.raises(TypeError) as raised:
        Trainer(make_mlp(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), callbacks=None).train(make_data(4), 1)
    assert any("the trainer has no loss_func, so the whole batch" in note for note in raised.value.__notes__)


def test_outputs_that_cannot_be_joined_are_refused_and_detections_are_kept_by_image() -> None:
    class Detector(Trainer):
        def calculate_predictions(self, batch: Any) -> Any:
            return [{"boxes": torch.full((int(x[0]) % 3, 4), float(x[0]))} for x in batch[0]]

    data = TensorDataset(torch.arange(7.0)[:, None])
    found = Detector(nn.Identity(), callbacks=None).predict(data, per_device_batch_size=3)
    assert [row["boxes"].shape for row in found] == [(n % 3, 4) for n in range(7)]

    class Odd(Trainer):
        def calculate_predictions(self, batch: Any) -> Any:
            return self.output(batch)

    trainer = Odd(nn.Identity(), callbacks=None)
    trainer.output = lambda batch: batch[0].numpy()
    with pytest.raises(TypeError, match="cannot join ndarray over batches and processes"):
        trainer.predict(data)
    trainer.output = lambda batch: [*batch[0]]  # one tensor a sample, not one a batch
    with pytest.raises(ValueError, match=r"they have .* elements\. Override calculate_predictions"):
        trainer.predict(data, per_device_batch_size=3)
    trainer.output = lambda batch: (batch[0], None)
    values, nothing = trainer.predict(data, per_device_batch_size=3)
    assert values.flatten().tolist() == list(range(7)) and nothing is None
