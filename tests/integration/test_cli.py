"""The commands, over a real run in a directory."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from spotguard import CheckpointStore, SpotGuard, TrainState
from spotguard.cli.app import app
from spotguard.errors import ConfigError, NoUsableCheckpointError, SpotguardError, StoreError
from spotguard.stores import LocalObjectStore


@pytest.fixture
def run(tmp_path: Path) -> Path:
    store = CheckpointStore(tmp_path / "run")
    for step, loss in ((100, 0.5), (200, 0.3), (300, float("nan"))):
        store.save({"model": {"weight": [float(step)]}}, step=step, metrics={"val_loss": loss})
    return tmp_path / "run"


def call(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result.stdout


def call_json(*arguments: object, status: int = 0) -> Any:
    return json.loads(call(*arguments, "--json", status=status))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_ls_lists_every_checkpoint(run: Path) -> None:
    assert [item["step"] for item in call_json("ls", run)] == [100, 200, 300]
    text = call("ls", run)
    assert "0001-0000000200" in text
    assert "val_loss=0.3" in text


def test_show_names_every_shard_with_its_digest(run: Path) -> None:
    manifest = call_json("show", run, "200")
    assert [shard["name"] for shard in manifest["shards"]] == ["model"]
    assert manifest["shards"][0]["digest"] in call("show", run, "0001-0000000200")
    assert "0001-0000000300" in call("show", run)


def test_verify_finds_the_flipped_bit_and_says_so_by_its_exit_status(run: Path) -> None:
    assert all(item["whole"] for item in call_json("verify", run))
    flip(run / "checkpoints/0001-0000000200/model.pt")
    verdicts = {item["checkpoint"]: item["whole"] for item in call_json("verify", run, status=1)}
    assert verdicts == {"0001-0000000100": True, "0001-0000000200": False, "0001-0000000300": True}
    assert "DAMAGED" in call("verify", run, "200", status=1)
    call("verify", run, "300")


def test_verify_lists_once_and_reads_once_what_checkpoints_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path / "run")
    for step in range(1, 9):
        store.save({"frozen": {"weight": [0.0]}, "head": {"weight": [float(step)]}}, step=step)
    listed, opened = list[str](), list[str]()

    def listing(self: LocalObjectStore, prefix: str, inner: Any = LocalObjectStore.list) -> Any:
        listed.append(prefix)
        return inner(self, prefix)

    def opening(self: LocalObjectStore, key: str, inner: Any = LocalObjectStore.open, **options: Any) -> Any:
        opened.append(key)
        return inner(self, key, **options)

    monkeypatch.setattr(LocalObjectStore, "list", listing)
    monkeypatch.setattr(LocalObjectStore, "open", opening)
    assert [item["whole"] for item in call_json("verify", tmp_path / "run")] == [True] * 8
    assert len(listed) < 8
    assert [key for key in opened if key.endswith("frozen.pt")] == ["checkpoints/0001-0000000001/frozen.pt"]
    assert len([key for key in opened if key.endswith("head.pt")]) == 8
    flip(tmp_path / "run/checkpoints/0001-0000000001/frozen.pt")
    assert not any(item["whole"] for item in call_json("verify", tmp_path / "run", status=1))


def test_resolve_explains_every_candidate(run: Path) -> None:
    flip(run / "checkpoints/0001-0000000300/model.pt")
    candidates = call_json("resolve", run)["candidates"]
    assert [(item["id"], item["verdict"]) for item in candidates] == [
        ("0001-0000000300", "rejected"),
        ("0001-0000000200", "chosen"),
        ("0001-0000000100", "older"),
    ]
    assert "model.pt is damaged" in call("resolve", run, "--explain")


def test_resolve_fails_when_nothing_is_whole(run: Path) -> None:
    for path in run.glob("checkpoints/*/model.pt"):
        flip(path)
    with pytest.raises(NoUsableCheckpointError):
        call("resolve", run)


def test_rollback_changes_what_is_resumed_and_deletes_nothing(run: Path) -> None:
    assert "0001-0000000200" in call("rollback", "--step", 200, run)
    assert call_json("resolve", run)["checkpoint"] == "0002-0000000200"
    assert [item["in_lineage"] for item in call_json("ls", run)] == [True, True, False, True]
    assert "not in lineage" in call("ls", run)


def test_a_rollback_tells_of_the_bytes_that_it_reads(run: Path) -> None:
    store, read = CheckpointStore(run), list[int]()
    checkpoint = store.rollback(step=200, progress=read.append)
    assert sum(read) == checkpoint.manifest.size


def test_prune_says_what_it_would_do_and_does_what_it_said(run: Path) -> None:
    plan = call_json("prune", run, "--keep", 1, "--dry-run")
    assert plan["checkpoints"] == ["0001-0000000100", "0001-0000000200"]
    assert len(call_json("ls", run)) == 3
    assert call_json("prune", run, "--keep", 1)["checkpoints"] == plan["checkpoints"]
    assert [item["step"] for item in call_json("ls", run)] == [300]
    assert not list(run.glob("checkpoints/0001-0000000100"))


def test_prune_deletes_nothing_while_the_newest_is_damaged_not_even_in_a_dry_run(run: Path) -> None:
    flip(run / "checkpoints/0001-0000000300/model.pt")
    for options in (["--dry-run"], []):
        with pytest.raises(SpotguardError, match="nothing is deleted"):
            call("prune", run, "--keep", 1, *options)
    assert len(call_json("ls", run)) == 3


def test_stop_leaves_a_request(run: Path) -> None:
    call("stop", run)
    assert (run / "stop").exists()


@pytest.mark.parametrize("command", ["ls", "show", "verify", "resolve", "prune", "stop"])
def test_a_typing_error_in_the_uri_is_not_an_empty_run(tmp_path: Path, command: str) -> None:
    call(command, tmp_path / "rnu", status=1)
    assert not (tmp_path / "rnu").exists()
    with pytest.raises(ConfigError, match="scheme"):
        call(command, "gopher://run")


def test_the_console_script_prints_a_line_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from spotguard.cli import main; main()", "ls", "gopher://run"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "gopher" in result.stderr
    assert "Traceback" not in result.stderr


def test_listing_does_not_load_torch(run: Path) -> None:
    code = f"""
import sys
from spotguard.cli.app import app
app(['ls', {str(run)!r}], standalone_mode=False)
assert 'torch' not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_commands_run_as_a_module_and_on_a_terminal_without_the_letters(run: Path) -> None:
    odd = run.rename(run.with_name("läuft"))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    listed = subprocess.run(
        [sys.executable, "-m", "spotguard", "ls", str(odd)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert listed.returncode == 0, listed.stderr
    assert "l\\xe4uft" in listed.stdout
    assert "Usage: spotguard" in subprocess.check_output([sys.executable, "-m", "spotguard", "--help"], text=True)


def test_resolve_says_that_a_start_is_refused_where_the_record_of_the_run_is_gone(run: Path) -> None:
    call("resolve", run)
    (run / "run.json").unlink()
    with pytest.raises(StoreError, match=r"run.json is gone: a start is refused"):
        call("resolve", run)
    with pytest.raises(StoreError, match=r"no run.json"), SpotGuard(run, TrainState(model=torch.nn.Linear(1, 1))):
        pass


def test_what_reads_every_byte_tells_how_many_there_are_and_comes_to_that(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards that checkpoints share are read, and counted, once."""
    told: list[tuple[int | None, int]] = []

    @contextlib.contextmanager
    def bar(title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        counts: list[int] = []
        yield counts.append
        told.append((total, sum(counts)))

    monkeypatch.setattr("spotguard.cli.app.bar", bar)
    store = CheckpointStore(run)
    for step in (400, 500):
        store.save({"model": {"weight": [1.0]}}, step=step)  # the second is the same
    call("verify", run)
    call("verify", run, "200")
    call("rollback", run, "--step", "200")
    assert [total == done for total, done in told] == [True] * 3
    sizes = [checkpoint.manifest.size for checkpoint in store.list()]
    assert told[0][0] == sum(sizes[:4])
    assert told[1][0] == told[2][0] == sizes[1]
