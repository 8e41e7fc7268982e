"""Ignite, with the engines that it makes itself and its progress bar."""

import ignite.distributed as idist
import torch
from ignite.engine import Engine, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import ProgressBar
from ignite.metrics import Loss, RunningAverage
from torch import Tensor
from workloads import NUM_PROCESSES, Job, serve


def train(job: Job) -> int:
    if NUM_PROCESSES > 1 and idist.backend() is None:
        idist.initialize("gloo")
    # It divides the size that it is given by the number of processes.
    loader = idist.auto_dataloader(job.dataset, batch_size=job.batch_size * NUM_PROCESSES, shuffle=True)
    model = idist.auto_model(job.model)
    optimizer = idist.auto_optim(job.make_optimizer(model.parameters()))
    if job.accumulation > 1:
        trainer = make_accumulating_trainer(job, model, optimizer)
    else:
        trainer = create_supervised_trainer(model, optimizer, job.loss, idist.device())
    RunningAverage(output_transform=lambda loss: loss).attach(trainer, "loss")
    if idist.get_rank() == 0:
        ProgressBar().attach(trainer, ["loss"])
    trainer.run(loader, max_epochs=1)
    return int(idist.get_world_size())


def make_accumulating_trainer(job: Job, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Engine:
    """Return an engine with a step of one's own, because the ready-made one does not clip."""
    assert job.make_scheduler is not None and job.clip_norm is not None
    scheduler = job.make_scheduler(optimizer)

    def update(engine: Engine, batch: tuple[Tensor, Tensor]) -> float:
        model.train()
        inputs, targets = batch
        loss = job.loss(model(inputs), targets) / job.accumulation
        loss.backward()
        if engine.state.iteration % job.accumulation == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return loss.item() * job.accumulation

    return Engine(update)


def evaluate(job: Job) -> int:
    loader = idist.auto_dataloader(job.dataset, batch_size=job.batch_size)
    evaluator = create_supervised_evaluator(job.model, {"loss": Loss(job.loss)}, idist.device())
    ProgressBar().attach(evaluator)
    evaluator.run(loader)
    print(f"loss {evaluator.state.metrics['loss']:.4f}")
    return int(idist.get_world_size())


if __name__ == "__main__":
    serve(train, evaluate)
