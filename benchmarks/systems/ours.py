"""This library: with its default callbacks, without any (``bare``), or with a number of callbacks that do nothing."""

import sys
from typing import Any

from workloads import Job, serve

from pytorch_accelerated import DEFAULT_CALLBACKS, Trainer
from pytorch_accelerated.callbacks import TrainerCallback

IS_BARE = "bare" in sys.argv


class Listens(TrainerCallback):
    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        pass


class ListensToNothing(TrainerCallback):
    pass


def make_trainer(job: Job, **kwargs: Any) -> Trainer:
    if job.num_callbacks is not None:
        kind = Listens if job.is_listening else ListensToNothing
        kwargs["callbacks"] = [kind() for _ in range(job.num_callbacks)]
    else:
        kwargs["callbacks"] = [] if IS_BARE else DEFAULT_CALLBACKS
    return Trainer(job.model, job.loss, **kwargs)


def train(job: Job) -> int:
    trainer = make_trainer(job, optimizer=job.make_optimizer)
    trainer.train(
        job.dataset,
        num_epochs=job.num_epochs,
        per_device_batch_size=job.batch_size,
        gradient_accumulation_steps=job.accumulation,
        gradient_clip_norm=job.clip_norm,
        create_scheduler_fn=job.make_scheduler,
    )
    return int(trainer.accelerator.num_processes)


def evaluate(job: Job) -> int:
    trainer = make_trainer(job)
    trainer.evaluate(job.dataset, per_device_batch_size=job.batch_size)
    return int(trainer.accelerator.num_processes)


if __name__ == "__main__":
    serve(train, evaluate)
