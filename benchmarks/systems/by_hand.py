"""The loop as one writes it without a library, for exactly what is needed: what the others are compared with."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from workloads import NUM_PROCESSES, Job, serve


def train(job: Job) -> int:
    if NUM_PROCESSES > 1:
        return train_in_processes(job)
    if job.accumulation > 1:
        return train_accumulating(job)
    loader = DataLoader(job.dataset, job.batch_size, shuffle=True)
    total = train_epoch(job, job.model.train(), loader)
    print(f"loss {total.item() / len(loader):.4f}")
    return 1


def train_epoch(job: Job, model: nn.Module, loader: DataLoader[Any]) -> Tensor:
    """Train on all batches, and return the sum of the losses."""
    optimizer, loss_func = job.make_optimizer(model.parameters()), job.loss
    total = torch.zeros(())
    for inputs, targets in loader:
        loss = loss_func(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()
    return total


def train_accumulating(job: Job) -> int:
    """Train with accumulation, a limit for the norm of gradients and a schedule."""
    assert job.make_scheduler is not None and job.clip_norm is not None
    loader = DataLoader(job.dataset, job.batch_size, shuffle=True)
    optimizer = job.make_optimizer(job.model.parameters())
    scheduler = job.make_scheduler(optimizer)
    model, loss_func = job.model.train(), job.loss
    parameters = list(model.parameters())
    total = torch.zeros(())
    for step, (inputs, targets) in enumerate(loader, start=1):
        loss = loss_func(model(inputs), targets) / job.accumulation
        loss.backward()
        if step % job.accumulation == 0:
            torch.nn.utils.clip_grad_norm_(parameters, job.clip_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        total += loss.detach()
    print(f"loss {total.item() * job.accumulation / len(loader):.4f}")
    return 1


def train_in_processes(job: Job) -> int:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    sampler: DistributedSampler[object] = DistributedSampler(job.dataset)
    loader = DataLoader(job.dataset, job.batch_size, sampler=sampler)
    sampler.set_epoch(0)
    total = train_epoch(job, DistributedDataParallel(job.model.train()), loader)
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        print(f"loss {total.item() / len(loader) / dist.get_world_size():.4f}")
    return dist.get_world_size()


def evaluate(job: Job) -> int:
    loader = DataLoader(job.dataset, job.batch_size)
    model, loss_func = job.model.eval(), job.loss
    total = torch.zeros(())
    with torch.inference_mode():
        for inputs, targets in loader:
            total += loss_func(model(inputs), targets)
    print(f"loss {total.item() / len(loader):.4f}")
    return 1


if __name__ == "__main__":
    serve(train, evaluate)
