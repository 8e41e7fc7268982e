"""The Trainer of transformers, with a model that is not one of its own."""

from typing import Any

from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments
from workloads import Job, serve


class LossTrainer(Trainer):
    """Calculate the loss outside of the model, as its documentation does it."""

    def __init__(self, job: Job, **kwargs: Any) -> None:
        super().__init__(job.model, data_collator=collate, **kwargs)
        self.loss_func = job.loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        outputs = model(inputs["inputs"])
        loss = self.loss_func(outputs, inputs["labels"])
        return (loss, {"logits": outputs}) if return_outputs else loss


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    inputs, labels = default_collate(samples)
    return {"inputs": inputs, "labels": labels}


def make_arguments(job: Job) -> TrainingArguments:
    """Return its defaults but for what the others are asked for, too, and for files that it would write.

    By default it clips gradients, lets the learning rate fall and takes batches of 8.
    """
    return TrainingArguments(
        num_train_epochs=1,
        per_device_train_batch_size=job.batch_size,
        per_device_eval_batch_size=job.batch_size,
        gradient_accumulation_steps=job.accumulation,
        max_grad_norm=0.0 if job.clip_norm is None else job.clip_norm,
        lr_scheduler_type="constant",  # unless a scheduler is given
        label_names=["labels"],
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )


def train(job: Job) -> int:
    optimizer = job.make_optimizer(job.model.parameters())
    scheduler = None if job.make_scheduler is None else job.make_scheduler(optimizer)
    arguments = make_arguments(job)
    trainer = LossTrainer(job, args=arguments, train_dataset=job.dataset, optimizers=(optimizer, scheduler))
    trainer.train()
    return int(arguments.world_size)


def evaluate(job: Job) -> int:
    arguments = make_arguments(job)
    LossTrainer(job, args=arguments, eval_dataset=job.dataset).evaluate()
    return int(arguments.world_size)


if __name__ == "__main__":
    serve(train, evaluate)
