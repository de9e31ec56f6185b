"""What a client adds to the moving of a gigabyte to and from S3, ours beside others: `python benchmarks/s3.py`.

The server throws away what it gets and serves from memory (`null_s3.py`), on loopback and in a process of its own. All clients take turns,
and each figure is a ratio to the best that plain HTTP does in the same run. Machine noise is large: trust the ratios, not the times.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
UPLOAD_GOAL, DOWNLOAD_GOAL = 1.2, 1.5  # times the limit


@dataclasses.dataclass
class Row:
    """A client, and what was measured.

    Attributes:
        name: Of the client, and how it was used.
        kind: ``"limit"``, ``"digest"`` (the limit with a digest on), ``"ours"`` or ``"peer"``.
        up: To the server, or from it.
        python: The interpreter that has it.
        note: Why there are no figures.
        seconds: For each round.
        cpu: CPU seconds of the client for each round.
        grown: Bytes by which its process grew at the peak of one transfer.
    """

    name: str
    kind: str
    up: bool
    python: str
    note: str = ""
    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)
    grown: float | None = None


class Worker:
    """A process that runs clients.

    Args:
        python: Its interpreter.
        arguments: Of `s3_worker.py`.
    """

    def __init__(self, python: str, arguments: Sequence[str]) -> None:
        command = [python, str(HERE / "s3_worker.py"), *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.cases: list[dict[str, Any]] = self._answer()

    def run(self, row: Row, size: int, *, memory: bool = False) -> dict[str, Any]:
        """Move so many bytes once."""
        assert self._process.stdin is not None
        asked = {"case": row.name, "up": row.up, "size": size, "memory": memory}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = self._answer()
        return answer

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"the process of the clients ended with status {self._process.wait()}")
        return json.loads(line)


@contextlib.contextmanager
def serving(folder: Path, size: int, *, tls: bool) -> Iterator[list[str]]:
    """A server; gives the arguments of the processes of the clients."""
    with (folder / "served").open("wb") as file:
        for number in range(-(-size // MIB)):
            block = random.Random(number).randbytes(4096) * (MIB // 4096)
            file.write(block[: size - number * MIB])
    certificate = make_certificate(folder) if tls else None
    command = [sys.executable, str(HERE / "null_s3.py"), str(folder / "served")]
    command += ["--tls", str(certificate)] if certificate else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            endpoint = f"{'https' if certificate else 'http'}://127.0.0.1:{port}"
            os.environ |= {
                "AWS_ACCESS_KEY_ID": "bench",
                "AWS_SECRET_ACCESS_KEY": "bench",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
                "AWS_ENDPOINT_URL_S3": endpoint,
            }
            if certificate:
                os.environ["AWS_CA_BUNDLE"] = str(certificate)
            yield [endpoint, str(folder), *(["--certificate", str(certificate)] if certificate else [])]
        finally:
            server.kill()


def make_certificate(folder: Path) -> Path:
    """A key and a certificate for 127.0.0.1 in one file."""
    key, path = folder / "key.pem", folder / "tls.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", "/CN=spotguard bench", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(path)),
        ],
        check=True,
        capture_output=True,
    )
    path.write_text(path.read_text() + key.read_text())
    return path


def rows_of(workers: dict[str, Worker], *, tls: bool, only: str) -> list[Row]:
    """Every client, with the first interpreter that has it."""
    rows = []
    for said in zip(*(worker.cases for worker in workers.values()), strict=True):
        python = next((name for name, case in zip(workers, said, strict=True) if not case["missing"]), None)
        case = said[0]
        note = "" if python else f"not installed (pip install {' '.join(case['needs'])})"
        if tls and not case["tls"]:
            note = note or "takes no certificate of our own"
        if only in case["name"] or case["kind"] in ("limit", "digest"):
            rows.append(Row(case["name"], case["kind"], case["up"], python or "", note))
    return rows


def measure(rows: Sequence[Row], workers: dict[str, Worker], size: int, rounds: int, console: Console) -> None:
    """Let all take turns, in another order each round."""
    for number in range(rounds):
        console.print(f"round {number + 1} of {rounds}", style="dim")
        for row in random.Random(number).sample(rows, len(rows)):
            if row.note:
                continue
            answer = workers[row.python].run(row, size)
            if "error" in answer:
                row.note = str(answer["error"])
                continue
            row.seconds.append(answer["s"])
            row.cpu.append(answer["cpu"])


def measure_memory(rows: Sequence[Row], arguments: Sequence[str], size: int, console: Console) -> None:
    """One transfer each, in a process of its own."""
    console.print("memory", style="dim")
    for row in rows:
        if not row.note:
            worker = Worker(row.python, arguments)
            row.grown = worker.run(row, size, memory=True).get("grown")
            worker.close()


def limit_of(rows: Sequence[Row], *, up: bool) -> Row:
    """The shape in which plain HTTP is fastest."""
    return min(
        (row for row in rows if row.kind == "limit" and row.up == up), key=lambda row: statistics.median(row.seconds)
    )


def ratios(row: Row, rows: Sequence[Row]) -> tuple[float, float]:
    """Median and best time, each over that of the limit."""
    group = [other for other in rows if other.kind == "limit" and other.up == row.up]
    return (
        statistics.median(row.seconds) / statistics.median(limit_of(rows, up=row.up).seconds),
        min(row.seconds) / min(min(other.seconds) for other in group),
    )


def table_of(rows: Sequence[Row], size: int, *, up: bool) -> Table:
    """One direction."""
    table = Table(title=f"{'upload' if up else 'download'} of {size / 1e9:.2f} GB")
    for title in ("client", "time / limit, median", "best", "GB/s, median", "client CPU s/GB", "extra memory, MB"):
        table.add_column(title, justify="left" if title == "client" else "right")
    limit = limit_of(rows, up=up)
    wanted = [row for row in rows if row.up == up]
    order = {"limit": 0, "digest": 1, "ours": 2, "peer": 3}
    for row in sorted(wanted, key=lambda row: order[row.kind]):
        style = {"limit": "dim", "digest": "dim", "ours": "bold", "peer": ""}[row.kind]
        name = f"{row.name} = limit" if row is limit else row.name
        if row.note or not row.seconds:
            table.add_row(name, row.note, style=style)
            continue
        median, best = ratios(row, rows)
        table.add_row(
            name,
            f"{median:.2f}",
            f"{best:.2f}",
            f"{size / 1e9 / statistics.median(row.seconds):.2f}",
            f"{statistics.median(row.cpu) / size * 1e9:.2f}",
            "" if row.grown is None else f"{row.grown / 1e6:.0f}",
            style=style,
        )
    return table


def goals(rows: Sequence[Row]) -> Iterator[str]:
    """Whether ours is where it should be."""
    for up, goal in ((True, UPLOAD_GOAL), (False, DOWNLOAD_GOAL)):
        measured = [row for row in rows if row.up == up and row.seconds and not row.note]
        peers = [row for row in measured if row.kind == "peer"]
        bare = min(statistics.median(row.seconds) for row in measured if row.kind == "digest") / statistics.median(
            limit_of(rows, up=up).seconds
        )
        yield f"{'upload' if up else 'download'}: plain HTTP with a digest on is at {bare:.2f}"
        ahead = min(peers, key=lambda row: ratios(row, rows), default=None)
        if ahead is not None:
            yield f"{'upload' if up else 'download'}: the fastest other is {ahead.name}, at {ratios(ahead, rows)[0]:.2f}"
        for row in measured:
            if row.kind == "ours":
                median, best = ratios(row, rows)
                line = f"  {row.name}: {median:.2f}, at best {best:.2f}; the goal of {goal} is {met(median <= goal)}"
                yield line if ahead is None else f"{line}; ahead of every other: {met(median < ratios(ahead, rows)[0])}"


def met(good: bool) -> str:  # noqa: FBT001
    return "met" if good else "NOT met"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=float, default=1.0, help="gigabytes of the object")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tls", action="store_true", help="over TLS, with a certificate of our own (takes openssl)")
    parser.add_argument("--peers", action="append", default=[], metavar="PYTHON", help="an interpreter that has others")
    parser.add_argument("--only", default="", metavar="TEXT", help="clients whose name has this in it, and the limit")
    parser.add_argument("--no-memory", action="store_true", help="leave out the extra memory")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON too")
    options = parser.parse_args()
    console, size = Console(width=None if sys.stdout.isatty() else 160), int(options.size * 1e9)
    shm = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder,
        serving(Path(folder), size, tls=options.tls) as arguments,
    ):
        workers = {python: Worker(python, arguments) for python in dict.fromkeys([sys.executable, *options.peers])}
        try:
            rows = rows_of(workers, tls=options.tls, only=options.only)
            measure(rows, workers, size, options.rounds, console)
        finally:
            for worker in workers.values():
                worker.close()
        if not options.no_memory:
            measure_memory(rows, arguments, size, console)
    console.print(
        f"Python {platform.python_version()}, boto3 {version('boto3')}, {os.cpu_count()} cores, "
        f"{'https' if options.tls else 'http'}, {options.rounds} rounds"
    )
    for up in (True, False):
        console.print(table_of(rows, size, up=up))
    for line in goals(rows):
        console.print(line)
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
