"""What the guard costs, as ratios measured in one go: `python benchmarks/run.py`.

Each figure is the median of several interleaved runs. Machine noise is large: trust the ratios, not the times.
"""

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch

from spotguard import SpotGuard, TrainState
from spotguard.state.snapshot import HostBuffers

ROUNDS = 7


def interleaved(*actions: Callable[[], float]) -> list[float]:
    """Medians, the actions taking turns."""
    times: list[list[float]] = [[] for _ in actions]
    for _ in range(ROUNDS):
        for kept, action in zip(times, actions, strict=True):
            gc.collect()
            kept.append(action())
    return [statistics.median(kept) for kept in times]


def step_cost() -> dict[str, float]:
    """Seconds for each step of an empty loop: over a list, and over a list through the guard."""
    batches, count = [0] * 100_000, 100_000
    state = TrainState(model=torch.nn.Linear(1, 1))

    def plain() -> float:
        began = time.perf_counter()
        for _ in batches:
            pass
        return (time.perf_counter() - began) / count

    with tempfile.TemporaryDirectory() as folder, SpotGuard(folder, state, every="1h") as guard:
        epochs = guard.epochs(ROUNDS + 1)

        def guarded() -> float:
            next(epochs)
            began = time.perf_counter()
            for _ in guard.batches(batches):
                pass
            return (time.perf_counter() - began) / count

        bare, with_guard = interleaved(plain, guarded)
    return {"per step, microseconds": (with_guard - bare) * 1e6}


def save_stall(size: int) -> dict[str, float]:
    """Stall of a save against one copy of the same bytes into kept buffers."""
    width = 1024
    model = torch.nn.ModuleList(
        torch.nn.Linear(width, width, bias=False) for _ in range(size // 3 // (4 * width * width))
    )
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    state = TrainState(model=model, optimizer=optimizer)
    tensors = [*model.parameters(), *(value for item in optimizer.state.values() for value in item.values())]
    kept = [torch.zeros_like(tensor) for tensor in tensors]
    buffers = HostBuffers()

    def copy() -> float:
        began = time.perf_counter()
        with torch.no_grad():
            for target, source in zip(kept, tensors, strict=True):
                target.copy_(source)
        return time.perf_counter() - began

    def clone() -> float:
        began = time.perf_counter()
        held = [tensor.clone() for tensor in tensors]
        took = time.perf_counter() - began
        del held
        return took

    def snapshot() -> float:
        began = time.perf_counter()
        for name, tree in state.state_dicts().items():
            buffers.capture(name, tree)
        return time.perf_counter() - began

    def torch_save() -> float:
        with tempfile.NamedTemporaryFile() as file:
            began = time.perf_counter()
            torch.save(state.state_dicts(), file.name)
            return time.perf_counter() - began

    copy()
    buffers.prepare(state.state_dicts())
    first = snapshot()
    copied, stalled, cloned, saved = interleaved(copy, snapshot, clone, torch_save)
    return {
        "state, GB": sum(tensor.nbytes for tensor in tensors) / 1e9,
        "one copy, ms": copied * 1e3,
        "stall / copy": stalled / copied,
        "clone() / copy": cloned / copied,
        "torch.save() / copy": saved / copied,
        "first save at once, while buffers are being touched / copy": first / copied,
    }


def import_time() -> dict[str, float]:
    """Seconds that ``import spotguard`` adds to an interpreter's start, and whether heavy modules came with it."""
    code = (
        "import time, sys; began = time.perf_counter(); import spotguard; "
        "print(time.perf_counter() - began, *[name in sys.modules for name in ('torch', 'boto3')])"
    )

    def once() -> float:
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        assert answer[1:] == ["False", "False"], answer
        return float(answer[0])

    return {"import spotguard, ms": interleaved(once)[0] * 1e3}


def main() -> None:
    """Print every figure."""
    figures = {**step_cost(), **save_stall(1 << 30), **import_time()}
    for name, value in figures.items():
        print(f"{name:50} {value:8.2f}")
    if "--json" in sys.argv:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
