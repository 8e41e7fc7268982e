"""The published pytorch-accelerated, which has the import name of this library and so lies in a place of its own."""

import sys
from importlib.metadata import distributions
from pathlib import Path

sys.path.insert(0, str(Path(sys.prefix) / "published"))

import torch
from workloads import Job, serve

import pytorch_accelerated
from pytorch_accelerated import Trainer

VERSION = "0.1.61"
PLACE = Path(sys.prefix) / "published"
assert Path(pytorch_accelerated.__file__).is_relative_to(PLACE), pytorch_accelerated.__file__
[found] = [one for one in distributions(path=[str(PLACE)]) if one.name == "pytorch-accelerated"]
assert found.version == VERSION, found.version

# Its default is a worker for each core, which is not what the others are asked for.
LOADING = {"num_workers": 0}


class ClippingTrainer(Trainer):
    """It limits values of gradients only, so a limit for their norm goes where its documentation puts such things."""

    def __init__(self, job: Job, clip_norm: float) -> None:
        super().__init__(job.model, job.loss, job.make_optimizer(job.model.parameters()))
        self.clip_norm = clip_norm

    def optimizer_step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        super().optimizer_step()


def train(job: Job) -> int:
    if job.clip_norm is None:
        trainer = Trainer(job.model, job.loss, job.make_optimizer(job.model.parameters()))
    else:
        trainer = ClippingTrainer(job, job.clip_norm)
    trainer.train(
        job.dataset,
        num_epochs=1,
        per_device_batch_size=job.batch_size,
        gradient_accumulation_steps=job.accumulation,
        create_scheduler_fn=job.make_scheduler,
        train_dataloader_kwargs=LOADING,
    )
    return int(trainer.run_config.num_processes)


def evaluate(job: Job) -> int:
    trainer = Trainer(job.model, job.loss, job.make_optimizer(job.model.parameters()))  # it does not do without one
    trainer.evaluate(job.dataset, per_device_batch_size=job.batch_size, dataloader_kwargs=LOADING)
    return int(trainer.run_config.num_processes)


if __name__ == "__main__":
    serve(train, evaluate)
