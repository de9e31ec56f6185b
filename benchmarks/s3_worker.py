"""What the clients in `benchmarks/s3.py` do; that script starts this one, once or more, and says on stdin what is to be done next.

A line of JSON comes in, ``{"case": name, "up": true, "size": bytes, "memory": false}``, and one goes out: seconds, CPU seconds and, with
``memory``, the bytes by which the process grew at its peak. Every client is made and warmed up before it is measured.
"""

import argparse
import gc
import json
import os
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.remove(str(HERE))  # or lightning.py there would be taken for the package
sys.path.append(str(HERE.parent))

from benchmarks import s3_clients, s3_peers  # noqa: E402
from benchmarks.s3_clients import MIB, Setting, Transfer  # noqa: E402

WARM_UP = 64 * MIB
CASES = {  # to the server, and from it
    True: [*s3_clients.UPLOADS, *s3_peers.UPLOADS],
    False: [*s3_clients.DOWNLOADS, *s3_peers.DOWNLOADS],
}


class Worker:
    """Runs cases.

    Args:
        setting: Where.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.cases = {(case.name, up): case for up, cases in CASES.items() for case in cases}
        self.made: dict[tuple[str, bool], Transfer] = {}

    def run(self, name: str, *, up: bool, size: int, memory: bool) -> dict[str, float]:
        """Run one case once."""
        if (name, up) not in self.made:
            self.made[name, up] = self.cases[name, up].make(self.setting)
            self.once(name, up=up, size=MIB if memory else min(WARM_UP, size), memory=False)
        return self.once(name, up=up, size=size, memory=memory)

    def once(self, name: str, *, up: bool, size: int, memory: bool) -> dict[str, float]:
        """Prepare, run, look at what came."""
        setting, transfer = self.setting, self.made[name, up]
        setting.target().unlink(missing_ok=True)
        if up:
            setting.memory[size - MIB : size] = setting.source_end(size)  # a download may have left it blank
            setting.file(size)
        else:
            setting.memory[size - MIB : size] = bytes(MIB)
        if self.cases[name, up].kind == "ours":
            setting.digest(size)
        gc.collect()
        if memory:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak begins anew
        before = resident("VmRSS")
        cpu, began = time.process_time(), time.perf_counter()
        result = transfer(size)
        took, spent = time.perf_counter() - began, time.process_time() - cpu
        grown = resident("VmHWM") - before
        if not up:
            self.check(result, size)
        return {"s": took, "cpu": spent, **({"grown": float(grown)} if memory else {})}

    def check(self, result: Any, size: int) -> None:
        """Has the end come, and is it right?"""
        expected = self.setting.source_end(size)
        if isinstance(result, Path):
            with result.open("rb") as file:
                file.seek(size - MIB)
                assert file.read() == expected
        else:
            assert len(result) == size
            assert memoryview(result)[size - MIB :] == expected


def resident(name: str) -> int:
    """Memory of this process, now (``VmRSS``) or at its peak (``VmHWM``): proc(5)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


def main() -> None:
    """Say what can be run here, then do what is asked for until there is nothing more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("endpoint")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--certificate", type=Path)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    warnings.simplefilter("ignore")
    found = []
    for up, case in [(up, case) for up, cases in CASES.items() for case in cases]:
        missing = [package for package in case.needs if find_spec(package) is None]
        said = {"name": case.name, "kind": case.kind, "up": up, "needs": case.needs, "tls": case.tls}
        found.append({**said, "missing": missing})
    print(json.dumps(found), file=answers)
    if not sys.stdin.isatty():
        worker: Worker | None = None
        for line in sys.stdin:
            asked = json.loads(line)
            answer: dict[str, Any]
            try:
                worker = worker or Worker(Setting(options.endpoint, options.folder, options.certificate))
                answer = worker.run(asked["case"], up=asked["up"], size=asked["size"], memory=asked["memory"])
            except Exception as error:  # noqa: BLE001 - one client that fails is one row
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
