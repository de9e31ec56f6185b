"""The script of before.py with spotguard: what ModelCheckpoint did, and a resume that is exact."""

import argparse

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from spotguard import CheckpointStore, KeepBest, KeepNewest
from spotguard.lightning import SpotGuardCallback


class Regression(pl.LightningModule):
    """A line with noise, and a network for it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(32, 1)
        )

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:  # noqa: ARG002
        return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:  # noqa: ARG002
        self.log("val_loss", torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", nargs="?", default="runs/after")
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    pl.seed_everything(0)
    x = torch.randn(640, 8)
    y = x.sum(dim=1, keepdim=True) + 0.1 * torch.randn(640, 1)
    train = DataLoader(TensorDataset(x[:512], y[:512]), batch_size=16, shuffle=True)
    validation = DataLoader(TensorDataset(x[512:], y[512:]), batch_size=64)

    guard = SpotGuardCallback(arguments.run, every=20, keep=KeepBest(3, "val_loss", mode="min") | KeepNewest(1))
    trainer = pl.Trainer(
        max_epochs=arguments.epochs,
        callbacks=[guard],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=8,
    )
    trainer.fit(Regression(), train, validation, ckpt_path=guard.resume_path())
    measured = [checkpoint for checkpoint in CheckpointStore(arguments.run).list() if "val_loss" in checkpoint.metrics]
    best = min(measured, key=lambda checkpoint: checkpoint.metrics["val_loss"], default=None)
    print("best", best and best.id)


if __name__ == "__main__":
    main()
