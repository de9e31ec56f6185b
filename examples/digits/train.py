"""Handwritten digits, with everything a real script has: dropout, AdamW, a cosine schedule, gradient accumulation.

Kill it in any way, start it again with the same command: it goes on where the last checkpoint stands, and ends with the same weights. The
four lines that do so are marked.

    python train.py [RUN_DIRECTORY] [--epochs N] [--workers N]
"""

import argparse
import random

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from spotguard import SpotGuard, TrainState  # 1

ACCUMULATE = 4  # batches per optimizer step


class Net(nn.Module):
    """Two convolutions and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout2d(0.1),
        )
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Ten logits for each image."""
        y: torch.Tensor = self.head(self.features(x))
        return y


def load_data() -> tuple[TensorDataset, TensorDataset]:
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[360:], order[:360]
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


@torch.no_grad()
def evaluate(model: nn.Module, data: TensorDataset) -> str:
    model.eval()
    x, y = data.tensors
    logits = model(x)
    loss = nn.functional.cross_entropy(logits, y)
    accuracy = (logits.argmax(dim=1) == y).float().mean()
    model.train()
    return f"test loss {loss:.4f}   test accuracy {accuracy:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a small convolutional network on scikit-learn's handwritten digits."
    )
    parser.add_argument(
        "run", nargs="?", default="runs/digits", help="where checkpoints are kept (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument(
        "--workers", type=int, default=0, help="worker processes of the data loader (default: %(default)s)"
    )
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # a network this small only waits for the others
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

    train, test = load_data()
    loader = DataLoader(train, batch_size=32, shuffle=True, num_workers=arguments.workers)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=arguments.epochs)

    state = TrainState(model=model, optimizer=optimizer, scheduler=scheduler)
    with SpotGuard(arguments.run, state, every="2s") as guard:  # 2
        for epoch in guard.epochs(arguments.epochs):  # 3
            for x, y in guard.batches(loader):  # 4
                loss = nn.functional.cross_entropy(model(x), y) / ACCUMULATE
                loss.backward()
                if (guard.batch + 1) % ACCUMULATE == 0 or guard.batch + 1 == len(loader):
                    optimizer.step()
                    optimizer.zero_grad()
            scheduler.step()
            print(f"epoch {epoch + 1:2d}   {evaluate(model, test)}", flush=True)
    print(f"done       {evaluate(model, test)}")


if __name__ == "__main__":
    main()
