"""A script as it often looks: ModelCheckpoint, and ckpt_path="last". See after.py for the same with spotguard."""

import argparse

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset


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
    parser.add_argument("run", nargs="?", default="runs/before")
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    pl.seed_everything(0)
    x = torch.randn(640, 8)
    y = x.sum(dim=1, keepdim=True) + 0.1 * torch.randn(640, 1)
    train = DataLoader(TensorDataset(x[:512], y[:512]), batch_size=16, shuffle=True)
    validation = DataLoader(TensorDataset(x[512:], y[512:]), batch_size=64)

    checkpoints = ModelCheckpoint(
        dirpath=arguments.run, monitor="val_loss", mode="min", save_top_k=3, save_last=True, every_n_train_steps=20
    )
    trainer = pl.Trainer(
        max_epochs=arguments.epochs,
        callbacks=[checkpoints],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=8,
    )
    trainer.fit(Regression(), train, validation, ckpt_path="last")
    print("best", checkpoints.best_model_path)


if __name__ == "__main__":
    main()
