"""A training by the `Trainer` of transformers that is killed at any place ends exactly like one that never was."""

import itertools
import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from equivalence.hf_training import Case, assert_same, run_once

EVERY_STEP = [
    Case("plain"),
    Case("workers", {"dataloader_num_workers": 2}),
    Case("accumulation", {"gradient_accumulation_steps": 3, "num_train_epochs": 4}),
    Case("evaluation", {"eval_strategy": "steps", "eval_steps": 2}),
]
SAMPLED = [
    Case("persistent-workers", {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}),
    Case("accumulation-with-a-rest", {"gradient_accumulation_steps": 4, "num_train_epochs": 4}),
    Case("evaluation-with-workers", {"eval_strategy": "epoch", "eval_on_start": True, "dataloader_num_workers": 2}),
    Case(
        "best-model-and-early-stopping",
        {
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "num_train_epochs": 6,
        },
        stop_early=True,
    ),
    Case("groups-by-length", {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2}),
    Case("global-generator", {"accelerator_config": {"use_seedable_sampler": False}}),
    Case("max-steps", {"max_steps": 8, "gradient_accumulation_steps": 2}),
    Case(
        "plateau",
        {
            "data_seed": 5,
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "eval_strategy": "steps",
            "eval_steps": 3,
            "metric_for_best_model": "eval_loss",
        },
    ),
]


def untouched_run(case: Case, folder: Path) -> tuple[Path, int]:
    """Where it left its results, and how many ticks it had."""
    folder = folder / "untouched"
    assert run_once(case, folder) == 0, (folder / "stderr.txt").read_text()
    return folder, int((folder / "ticks").read_text())


def finish(case: Case, folder: Path) -> None:
    assert run_once(case, folder) == 0, (folder / "stderr.txt").read_text()


@pytest.mark.parametrize("case", EVERY_STEP, ids=str)
def test_sigkill_at_every_step(case: Case, tmp_path: Path) -> None:
    untouched, ticks = untouched_run(case, tmp_path)
    for tick in range(0, ticks, 3):
        folder = tmp_path / f"kill-{tick}"
        assert run_once(case, folder, kill_at=tick) == -signal.SIGKILL, (folder / "stderr.txt").read_text()
        finish(case, folder)
        assert_same(untouched, folder, f"SIGKILL at tick {tick}")


@pytest.mark.parametrize("case", EVERY_STEP, ids=str)
def test_sigterm_to_the_process_group_at_every_step(case: Case, tmp_path: Path) -> None:
    untouched, ticks = untouched_run(case, tmp_path)
    for tick in range(1, ticks, 3):
        folder = tmp_path / f"term-{tick}"
        status = run_once(case, folder, kill_at=tick, number=signal.SIGTERM, group=True)
        assert status in (143, 0), (folder / "stderr.txt").read_text()  # 0: the notice came in the last step
        if status == 143:
            finish(case, folder)
        assert_same(untouched, folder, f"SIGTERM at tick {tick}")


@pytest.mark.parametrize("case", SAMPLED, ids=str)
def test_kills_at_sampled_places_of_further_trainings(case: Case, tmp_path: Path) -> None:
    untouched, ticks = untouched_run(case, tmp_path)
    for tick, number in zip(range(2, ticks, 5), itertools.cycle([signal.SIGKILL, signal.SIGTERM])):
        folder = tmp_path / f"kill-{tick}"
        status = run_once(case, folder, kill_at=tick, number=number, group=number == signal.SIGTERM)
        assert status in (-signal.SIGKILL, 143, 0), (folder / "stderr.txt").read_text()
        if status != 0:
            finish(case, folder)
        assert_same(untouched, folder, f"{number.name} at tick {tick}")


@pytest.mark.parametrize("case", [*EVERY_STEP, *SAMPLED], ids=str)
def test_three_kills_in_one_run(case: Case, tmp_path: Path) -> None:
    untouched, ticks = untouched_run(case, tmp_path)
    draw = random.Random(str(case))
    folder = tmp_path / "run"
    kills = [(draw.randrange(2, ticks // 4), draw.choice([signal.SIGKILL, signal.SIGTERM])) for _ in range(3)]
    for tick, number in kills:
        assert run_once(case, folder, kill_at=tick, number=number) in (-signal.SIGKILL, 143), (
            folder / "stderr.txt"
        ).read_text()
    finish(case, folder)
    assert_same(untouched, folder, f"three kills {kills}")


def timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if not name.endswith(("_runtime", "_per_second"))}
        for line in history
    ]


def test_a_notice_in_an_evaluation_leaves_it_and_the_log_has_it_once(tmp_path: Path) -> None:
    case = Case("evaluation", {"eval_strategy": "steps", "eval_steps": 4, "logging_steps": 3}, every=100)
    untouched, _ = untouched_run(case, tmp_path)
    folder = tmp_path / "interrupted"
    # Epoch, then four steps of three ticks each, then the first batch of the evaluation.
    assert run_once(case, folder, kill_at=1 + 4 * 3, number=signal.SIGTERM) == 143
    assert "stopping at step 3" in (folder / "stderr.txt").read_text(), "the boundary before the step of the evaluation"
    finish(case, folder)
    assert_same(untouched, folder, "SIGTERM in an evaluation")
    logs = [timeless(json.loads((place / "log.json").read_text())) for place in (untouched, folder)]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[1] if "eval_loss" in line] == [4, 8, 12]


def test_a_finished_run_that_is_started_again_trains_no_step(tmp_path: Path) -> None:
    for case in (
        Case("end of an epoch", {"eval_strategy": "epoch", "eval_on_start": True}),
        Case("within an epoch", {"max_steps": 8}),
    ):
        folder = tmp_path / case.name.replace(" ", "-")
        finish(case, folder)
        before = [(folder / name).read_bytes() for name in ("model.pt", "log.json")]
        finish(case, folder)
        lines = (folder / "ledger.jsonl").read_text().splitlines()
        assert lines.index("[-1, []]", 1) == len(lines) - 1, "nothing was trained at the second start"
        assert [(folder / name).read_bytes() for name in ("model.pt", "log.json")] == before
        assert len(list((folder / "run" / "manifests").iterdir())) == 2, "and nothing was saved"
