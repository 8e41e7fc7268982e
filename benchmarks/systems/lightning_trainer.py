"""Lightning, as its documentation begins."""

import lightning
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from workloads import NUM_PROCESSES, Job, serve

# Its logger and its checkpoints are off because they write files, which nothing else here does. Where the package rich
# happens to be installed, as it is here because of others, the bar is another one than what comes with Lightning alone.
DEFAULTS = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "devices": NUM_PROCESSES}


class Module(lightning.LightningModule):
    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job, self.model, self.loss = job, job.model, job.loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        inputs, targets = batch
        loss = self.loss(self.model(inputs), targets)
        self.log("train_loss", loss, on_step=False, on_epoch=True)  # the mean, which the others report, too
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        inputs, targets = batch
        self.log("loss", self.loss(self.model(inputs), targets))

    def configure_optimizers(self) -> Optimizer | dict[str, object]:
        optimizer = self.job.make_optimizer(self.parameters())
        if self.job.make_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.job.make_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def train(job: Job) -> int:
    trainer = lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=job.accumulation,
        gradient_clip_val=job.clip_norm,
        callbacks=[TQDMProgressBar()],
        **DEFAULTS,
    )
    trainer.fit(Module(job), DataLoader(job.dataset, job.batch_size, shuffle=True))
    return int(trainer.world_size)


def evaluate(job: Job) -> int:
    trainer = lightning.Trainer(callbacks=[TQDMProgressBar()], **DEFAULTS)
    trainer.validate(Module(job), DataLoader(job.dataset, job.batch_size))
    return int(trainer.world_size)


if __name__ == "__main__":
    serve(train, evaluate)
