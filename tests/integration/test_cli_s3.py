"""The commands, over a run in a real bucket."""

import json
import secrets
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from servers import S3Server
from spotguard import CheckpointStore, SpotGuard, TrainState
from spotguard.checkpoint import CheckpointId
from spotguard.cli.app import app
from spotguard.errors import CheckpointNotFoundError, ConfigError, StoreAccessError
from spotguard.stores import ObjectRef, open_store


@pytest.fixture
def run(seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Three checkpoints; the environment leads there."""
    seaweedfs.use(monkeypatch)
    uri = f"s3://{seaweedfs.versioned}/{secrets.token_hex(8)}"
    store = CheckpointStore(uri)
    for step in (100, 200, 300):
        store.save({"model": {"weight": [float(step)]}}, step=step)
    return uri


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def call(*arguments: object, status: int = 0) -> str:
    result = invoke(*arguments)
    assert result.exit_code == status, result.output
    return result.stdout


def call_json(*arguments: object) -> Any:
    return json.loads(call(*arguments, "--json"))


def test_every_command_takes_a_bucket(run: str) -> None:
    assert [item["step"] for item in call_json("ls", run)] == [100, 200, 300]
    assert call_json("show", run)["shards"][0]["version"]
    assert [item["whole"] for item in call_json("verify", run)] == [True] * 3
    assert call_json("resolve", run)["checkpoint"] == "0001-0000000300"
    assert "0001-0000000200" in call("rollback", run, "--step", "200")
    assert call_json("prune", run, "--keep", "1")["kept"] == ["0002-0000000200"]
    assert call_json("verify", run) == [{"checkpoint": "0002-0000000200", "whole": True, "reason": ""}]
    assert "asked" in call("stop", run)
    assert open_store(run).stat("stop") is not None


def test_a_deleted_checkpoint_is_listed_and_comes_back(run: str) -> None:
    assert call_json("ls", run, "--deleted") == []
    open_store(run).delete([ObjectRef("manifests/0001-0000000300.json")])
    assert [item["step"] for item in call_json("ls", run)] == [100, 200]
    (found,) = call_json("ls", run, "--deleted")
    assert (found["checkpoint"], found["restorable"]) == ("0001-0000000300", True)
    assert "can be restored" in call("ls", run, "--deleted")
    explained = call_json("resolve", run, "--explain")
    verdicts = [(item["id"][-3:], item["verdict"]) for item in explained["candidates"]]
    assert verdicts == [("300", "deleted"), ("200", "chosen"), ("100", "older")]
    assert f"'spotguard restore {run} 0001-0000000300' brings it back" in call("resolve", run, "--explain")
    assert "deleted" not in call("resolve", run)
    assert "is back" in call("restore", run, "0001-0000000300")
    assert [item["step"] for item in call_json("ls", run)] == [100, 200, 300]
    with pytest.raises(CheckpointNotFoundError):
        invoke("restore", run, "0001-0000000300")


def test_a_bucket_without_versions_has_nothing_to_bring_back_and_says_so(
    seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    seaweedfs.use(monkeypatch)
    monkeypatch.setattr("spotguard.stores.s3.preflight._said", {(seaweedfs.plain, "versions")})
    uri = f"s3://{seaweedfs.plain}/{secrets.token_hex(8)}"
    CheckpointStore(uri).save({"model": {"weight": [1.0]}}, step=100)
    for command in (("ls", uri, "--deleted"), ("restore", uri, "0001-0000000100")):
        with pytest.raises(ConfigError, match="does not keep versions"):
            invoke(*command)


@pytest.mark.filterwarnings("ignore:bucket .* does not keep versions:UserWarning")
def test_a_run_starts_goes_on_and_is_explained_in_a_bucket_without_versions(
    seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    seaweedfs.use(monkeypatch)
    uri = f"s3://{seaweedfs.plain}/{secrets.token_hex(8)}"
    for steps in (2, 4):
        with SpotGuard(uri, TrainState(model=torch.nn.Linear(1, 1)), every=100, notices="none") as guard:
            for _ in guard.steps(steps):
                pass
    said = capfd.readouterr().err
    assert f"fresh start, no checkpoint in {uri} yet" in said
    assert "resumed from 0001-0000000002" in said
    assert [(item["id"], item["verdict"]) for item in call_json("resolve", uri, "--explain")["candidates"]] == [
        ("0002-0000000004", "chosen"),
        ("0001-0000000002", "older"),
    ]


@pytest.mark.parametrize("everything", [False, True])
def test_a_start_says_which_checkpoint_was_deleted_and_how_it_comes_back(
    seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *, everything: bool
) -> None:
    seaweedfs.use(monkeypatch)
    uri = f"s3://{seaweedfs.versioned}/{secrets.token_hex(8)}"

    def train(steps: int) -> str:
        capfd.readouterr()
        with SpotGuard(uri, TrainState(model=torch.nn.Linear(1, 1)), every=100, notices="none") as guard:
            for _ in guard.steps(steps):
                pass
        return capfd.readouterr().err

    for attempt, steps in ((1, 2), (2, 4)):
        assert "restore" not in train(steps)
        if everything or steps == 4:
            open_store(uri).delete([ObjectRef(CheckpointId(attempt, steps).manifest_key)])
        if everything:
            break
    said, lost = train(4), "0001-0000000002" if everything else "0002-0000000004"
    assert said.count(f"checkpoint {lost} was deleted") == 1
    assert f"'spotguard restore {uri} {lost}' brings it back" in said
    assert ("fresh start" if everything else "resumed from 0001-0000000002") in said


def test_the_lifecycle_rule_is_printed_then_set_beside_those_that_are_there(run: str, seaweedfs: S3Server) -> None:
    prefix = run.removeprefix(f"s3://{seaweedfs.versioned}/") + "/"
    client = seaweedfs.client()
    other = {"ID": prefix, "Filter": {"Prefix": prefix + "logs/"}, "Status": "Enabled", "Expiration": {"Days": 9}}
    client.put_bucket_lifecycle_configuration(Bucket=seaweedfs.versioned, LifecycleConfiguration={"Rules": [other]})
    store = open_store(run)
    with store.create("run.json.bak") as writer:
        writer.write(b"x" * 1000)
    store.delete([ObjectRef("run.json.bak")])

    printed = invoke("s3", "lifecycle", run)
    rule = json.loads(printed.stdout)["Rules"][0]
    assert rule["Filter"] == {"Prefix": prefix}
    assert rule["NoncurrentVersionExpiration"] == {"NoncurrentDays": 7}
    assert "nothing has been changed" in printed.stderr
    assert "deletes objects of this run" in printed.stderr  # the other rule
    assert "whose bytes are not counted" in printed.stderr
    for days in (7, 30):
        told = call_json("s3", "lifecycle", run, "--days", days, "--apply")
        assert told["applied"]
        assert told["noncurrent_versions"] >= 1
        assert told["noncurrent_bytes"] >= 1000
        assert [item["rule"] for item in told["rules_that_do_harm"]] == [prefix]
    rules = client.get_bucket_lifecycle_configuration(Bucket=seaweedfs.versioned)["Rules"]
    client.delete_bucket_lifecycle(Bucket=seaweedfs.versioned)
    client.close()
    assert sorted(item["ID"] for item in rules) == sorted([prefix, f"spotguard {prefix}"])
    expirations = {item["ID"]: item.get("NoncurrentVersionExpiration") for item in rules}
    assert expirations[f"spotguard {prefix}"] == {"NoncurrentDays": 30}


def test_what_only_s3_has_is_refused_elsewhere(tmp_path: object) -> None:
    with pytest.raises(ConfigError, match="s3://"):
        invoke("s3", "lifecycle", tmp_path)


def test_a_user_who_may_only_read_is_given_the_rule(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = moto.restricted("s3:ListBucket", "s3:GetObject")
    reader.use(monkeypatch)
    answer = invoke("s3", "lifecycle", f"s3://{moto.versioned}/{secrets.token_hex(8)}")
    assert answer.exit_code == 0
    assert json.loads(answer.stdout)["Rules"][0]["NoncurrentVersionExpiration"] == {"NoncurrentDays": 7}
    for permission in ("s3:ListBucketVersions", "s3:GetLifecycleConfiguration"):
        assert permission in answer.stderr
    assert "nothing has been changed" in answer.stderr
    refused = CliRunner().invoke(app, ["s3", "lifecycle", f"s3://{moto.versioned}/run", "--apply"])
    assert isinstance(refused.exception, StoreAccessError)
