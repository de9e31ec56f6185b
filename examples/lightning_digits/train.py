"""Handwritten digits with Lightning: a schedule that follows a metric, early stopping, validation within the epoch, dropout, augmentation.

Kill it in any way, start it again with the same command: it goes on where the last checkpoint stands, and ends with the same weights. The
lines that do so are marked.

    python train.py [RUN_DIRECTORY] [--epochs N] [--workers N]
"""

import argparse
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset

from spotguard.lightning import SpotGuardCallback  # 1


class Digits(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Images of 8 x 8 pixels; those for training are shifted a little, at random."""

    def __init__(self, *, train: bool) -> None:
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        chosen = order[360:] if train else order[:360]
        self.images = torch.tensor(digits.images, dtype=torch.float32)[chosen].unsqueeze(1) / 16
        self.labels = torch.tensor(digits.target)[chosen]
        self.train = train

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[index]
        if self.train:
            image = image.roll(tuple(torch.randint(-1, 2, (2,)).tolist()), dims=(1, 2))
        return image, self.labels[index]


class Classifier(pl.LightningModule):
    """Two convolutions and two linear layers."""

    def __init__(self, learning_rate: float = 2e-3) -> None:  # noqa: ARG002 - save_hyperparameters() reads it
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout2d(0.1),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 64),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(64, 10),
        )

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:  # noqa: ARG002
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:  # noqa: ARG002
        logits = self.net(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))
        self.log("val_accuracy", (logits.argmax(dim=1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["learning_rate"])
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small convolutional network on handwritten digits.")
    parser.add_argument("run", nargs="?", default="runs/lightning-digits", help="where checkpoints are kept")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--workers", type=int, default=0, help="worker processes of the data loader")
    arguments = parser.parse_args()

    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    torch.set_num_threads(1)  # a network this small only waits for the others
    pl.seed_everything(0)

    train = DataLoader(Digits(train=True), batch_size=32, shuffle=True, num_workers=arguments.workers)
    validation = DataLoader(Digits(train=False), batch_size=120)
    guard = SpotGuardCallback(arguments.run, every="2s")  # 2
    trainer = pl.Trainer(
        max_epochs=arguments.epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        val_check_interval=0.5,
        callbacks=[EarlyStopping("val_loss", patience=4), guard],  # 3
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), train, validation, ckpt_path=guard.resume_path())  # 4
    found = {name: f"{float(value):.4f}" for name, value in sorted(trainer.callback_metrics.items())}
    print("done", found, flush=True)


if __name__ == "__main__":
    main()
