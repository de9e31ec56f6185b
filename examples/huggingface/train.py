"""A small GPT-2 learns to add, with the `Trainer` of Hugging Face: dropout, AdamW, a cosine schedule, accumulation, evaluation.

Kill it in any way, start it again with the same command: it goes on where the last checkpoint stands, and ends with the same weights. The
three lines that do so are marked.

    python train.py [RUN_DIRECTORY] [--epochs N] [--workers N]
"""

import argparse
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from spotguard.transformers import SpotGuardTrainerCallback  # 1

DIGITS = "0123456789+=;"
LENGTH = 9  # "07+35=42;" has nine characters
ANSWER = 6  # where the sum begins


class Sums(Dataset[dict[str, Any]]):
    """Sums of two numbers below 50, as text; made here, so that nothing is downloaded."""

    def __init__(self, *, held_out: bool) -> None:
        pairs = [(a, b) for a in range(50) for b in range(50)]
        self.pairs = [pair for number, pair in enumerate(pairs) if (number % 7 == 0) == held_out]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        a, b = self.pairs[index]
        tokens = torch.tensor([DIGITS.index(character) for character in f"{a:02}+{b:02}={a + b:02};"])
        labels = tokens.clone()
        labels[:ANSWER] = -100  # the loss counts the answer only
        return {"input_ids": tokens, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small GPT-2 to add numbers below 50.")
    parser.add_argument("run", nargs="?", default="runs/sums", help="where checkpoints are kept (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument(
        "--workers", type=int, default=0, help="worker processes of the data loader (default: %(default)s)"
    )
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # a network this small only waits for the others
    set_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(DIGITS),
            n_positions=LENGTH,
            n_embd=64,
            n_layer=2,
            n_head=4,
            bos_token_id=DIGITS.index(";"),
            eos_token_id=DIGITS.index(";"),
        )
    )
    model.loss_type = "ForCausalLM"  # cannot be told from the name of this class, and would be warned about
    settings = TrainingArguments(
        output_dir="runs/sums-output",
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        logging_steps=50,
        eval_strategy="epoch",
        save_strategy="no",
        dataloader_num_workers=arguments.workers,
        dataloader_pin_memory=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    guard = SpotGuardTrainerCallback(arguments.run, every="2s")  # 2
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=Sums(held_out=False),
        eval_dataset=Sums(held_out=True),
        callbacks=[guard],
    )
    trainer.train(resume_from_checkpoint=guard.resume_path())  # 3
    print(f"loss on sums it has not seen: {trainer.evaluate()['eval_loss']:.4f}")


if __name__ == "__main__":
    main()
