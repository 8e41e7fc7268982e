"""A loop with Accelerate, as its documentation teaches."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from workloads import Job, serve


def train(job: Job) -> int:
    accelerator = Accelerator(gradient_accumulation_steps=job.accumulation)
    loader = DataLoader(job.dataset, job.batch_size, shuffle=True)
    optimizer = job.make_optimizer(job.model.parameters())
    scheduler = None if job.make_scheduler is None else job.make_scheduler(optimizer)
    model, optimizer, loader, scheduler = accelerator.prepare(job.model, optimizer, loader, scheduler)
    model.train()
    total = torch.zeros((), device=accelerator.device)
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            loss = job.loss(model(inputs), targets)
            accelerator.backward(loss)
            if job.clip_norm is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), job.clip_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
        total += loss.detach()
    mean = accelerator.reduce(total, "mean").item() / len(loader)
    accelerator.print(f"loss {mean:.4f}")
    return int(accelerator.num_processes)


def evaluate(job: Job) -> int:
    accelerator = Accelerator()
    model, loader = accelerator.prepare(job.model, DataLoader(job.dataset, job.batch_size))
    model.eval()
    total = torch.zeros((), device=accelerator.device)
    with torch.inference_mode():
        for inputs, targets in loader:
            total += job.loss(model(inputs), targets)
    mean = accelerator.reduce(total, "mean").item() / len(loader)
    accelerator.print(f"loss {mean:.4f}")
    return int(accelerator.num_processes)


if __name__ == "__main__":
    serve(train, evaluate)
