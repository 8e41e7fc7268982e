"""Train a small GPT, byte by byte, on the source code of Python's own standard library.

python examples/gpt.py --num-updates 40
python examples/gpt.py --save-dir runs/gpt  # killed and started again, it goes on as if nothing had happened
"""

import argparse
import hashlib
import sysconfig
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from pytorch_accelerated import DEFAULT_CALLBACKS, Trainer
from pytorch_accelerated.callbacks import SaveTrainingStateCallback, TrainerCallback
from pytorch_accelerated.schedulers import CosineLrScheduler


class SourceCode(Dataset[dict[str, Tensor]]):
    """Pieces of files: the bytes of a piece, and for each the byte that follows it."""

    def __init__(self, paths: list[Path], length: int) -> None:
        text = b"\n".join(path.read_bytes() for path in paths)
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.length = length

    def __len__(self) -> int:
        return (len(self.bytes) - 1) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        piece = self.bytes[index * self.length : (index + 1) * self.length + 1].long()
        return {"tokens": piece[:-1], "labels": piece[1:]}


class Block(nn.Module):
    """Attention to what came before, then a small network for each position."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + self.out(attended)
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    """A decoder-only transformer over bytes that returns its own loss, as the models of transformers do."""

    def __init__(self, width: int = 128, num_layers: int = 4, num_heads: int = 4, length: int = 128) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(num_layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        logits = self.head(self.norm(self.blocks(x)))
        if labels is None:
            return {"logits": logits}
        # The loss is computed here, not in the trainer: mixed precision would copy the logits to fp32 on the way out.
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class GPTTrainer(Trainer):
    """Weigh each batch by its tokens."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        output = super().calculate_train_batch_loss(batch)
        return {**output, "num_items_in_batch": batch["labels"].numel()}


class TokensPerSecondCallback(TrainerCallback):
    """Print the loss and the tokens per second, over all processes, every few updates."""

    def __init__(self, every: int, length: int) -> None:
        self.every, self.length = every, length

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        self.start, self.samples = time.perf_counter(), trainer.num_samples

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if trainer.num_updates % self.every == 0:
            loss = trainer.data_pass.mean_loss_so_far()
            rate = (trainer.num_samples - self.samples) * self.length / (time.perf_counter() - self.start)
            lr = trainer.optimizer.param_groups[0]["lr"]
            trainer.print(f"update {trainer.num_updates:4}: loss {loss:.3f}, lr {lr:.2e}, {rate:,.0f} tokens/s")
            self.on_train_run_begin(trainer)


def hash_of(model: nn.Module) -> str:
    """Return a hash of all weights, which the smallest difference in one of them would change."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def write(model: nn.Module, start: str, num_bytes: int, length: int) -> str:
    """Return ``start`` and what the model writes after it."""
    model.eval()
    tokens = torch.tensor([list(start.encode())], device=next(model.parameters()).device)
    for _ in range(num_bytes):
        probabilities = model(tokens[:, -length:])["logits"][0, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1)[None]], dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace")


def main() -> None:
    """Train for some updates, evaluate on files that were not trained on, and write a little code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--num-updates", type=int, default=80, help="optimizer steps; 2000 for code that looks like code"
    )
    parser.add_argument("--num-files", type=int, default=60, help="files of the standard library to train on")
    parser.add_argument("--save-dir", type=Path, help="save the state of the run here, and go on from what is there")
    parser.add_argument("--save-every", type=int, default=20, help="updates between two checkpoints")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    length = 128
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    train_data = SourceCode(files[: arguments.num_files], length)
    eval_data = SourceCode(files[arguments.num_files : arguments.num_files + 2], length)
    callbacks = [*DEFAULT_CALLBACKS, TokensPerSecondCallback(every=20, length=length)]
    if arguments.save_dir is not None:
        callbacks.append(SaveTrainingStateCallback(arguments.save_dir, arguments.save_every, max_checkpoints=2))
    trainer = GPTTrainer(
        GPT(length=length),
        optimizer=partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95)),
        callbacks=callbacks,
        seed=0,
    )
    trainer.train(
        train_data,
        num_epochs=None,
        max_num_train_steps=arguments.num_updates,
        eval_dataset=eval_data,
        per_device_batch_size=8,
        gradient_accumulation_steps=2,
        gradient_clip_norm=1.0,
        create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(
            num_warmup_updates=arguments.num_updates // 10, lr_min=2e-4
        ),
        resume_from="latest" if arguments.save_dir is not None else None,
    )
    trainer.print(f"hash of the weights: {hash_of(trainer.get_model())}")
    trainer.print(f"\n{write(trainer.get_model(), 'def ', 100, length)}")


if __name__ == "__main__":
    main()
