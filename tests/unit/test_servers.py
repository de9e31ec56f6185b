"""The servers that other tests use: they end with their last user, and turn away whoever may not."""

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from servers import AzureServer, GcsServer, S3Server

USER = """
import sys, types
from pathlib import Path
import servers

class Factory:
    getbasetemp = staticmethod(lambda: Path(sys.argv[1]))

def start(keeper):
    keeper.run(sys.executable, "-c", "import os; print(os.getpid(), flush=True); import time; time.sleep(1000)")
    return {"pid": keeper.until("the server", keeper.log).strip()}

with servers._shared("sleeper", types.SimpleNamespace(config=None), Factory, start) as fields:
    print(fields["pid"], flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for a process that is nobody's child by a pidfd")
def test_a_server_is_shared_and_is_gone_with_its_last_user_even_one_that_was_killed(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with contextlib.ExitStack() as stack:
        users = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", USER, str(tmp_path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=environment,
                    text=True,
                )
            )
            for _ in range(2)
        ]
        first, second = (int(user.stdout.readline()) for user in users if user.stdout)
        assert first == second
        server = os.pidfd_open(first)
        stack.callback(os.close, server)
        users[0].communicate()  # the end of its input, and of it
        assert select.select([server], [], [], 0)[0] == []
        users[1].send_signal(signal.SIGKILL)
        users[1].wait()
        assert select.select([server], [], [], 30)[0] == [server]


def test_an_s3_server_checks_signatures_and_keeps_versions(seaweedfs: S3Server) -> None:
    client = seaweedfs.client()
    key = "test_servers/object"
    versions = [
        client.put_object(Bucket=seaweedfs.versioned, Key=key, Body=body)["VersionId"] for body in (b"old", b"new")
    ]
    assert client.get_object(Bucket=seaweedfs.versioned, Key=key, VersionId=versions[0])["Body"].read() == b"old"
    assert "VersionId" not in client.put_object(Bucket=seaweedfs.plain, Key=key, Body=b"")
    client.close()
    stranger = S3Server(seaweedfs.endpoint, seaweedfs.access_key, "wrong").client()
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        stranger.list_objects_v2(Bucket=seaweedfs.plain)
    stranger.close()


def test_a_restricted_user_may_do_what_it_may(moto: S3Server) -> None:
    key = "test_servers/object"
    owner, reader = moto.client(), moto.restricted("s3:GetObject").client()
    hoarder = moto.restricted("s3:DeleteObject", denied=True).client()
    owner.put_object(Bucket=moto.plain, Key=key, Body=b"bytes")
    assert reader.get_object(Bucket=moto.plain, Key=key)["Body"].read() == b"bytes"
    with pytest.raises(ClientError, match="AccessDenied"):
        reader.put_object(Bucket=moto.plain, Key=key, Body=b"")
    hoarder.put_object(Bucket=moto.plain, Key=key, Body=b"")
    with pytest.raises(ClientError, match="AccessDenied"):
        hoarder.delete_object(Bucket=moto.plain, Key=key)
    for client in (owner, reader, hoarder):
        client.close()


def test_the_environment_leads_a_client_to_the_server(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    monkeypatch.setenv("AWS_PROFILE", "of-somebody-else")
    moto.use(monkeypatch)
    client = boto3.session.Session().client("s3")
    assert {bucket["Name"] for bucket in client.list_buckets()["Buckets"]} >= {moto.plain, moto.versioned}
    client.close()


def test_gcs_and_azurite_create_exclusively(
    gcs: GcsServer, azurite: AzureServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    gcs.use(monkeypatch)
    azurite.use(monkeypatch)
    for protocol, server, folder in (("gs", gcs, gcs.bucket), ("az", azurite, azurite.container)):
        fs = fsspec.filesystem(protocol, **server.options(), skip_instance_cache=True)
        key = f"{folder}/test_servers/object"
        fs.pipe_file(key, b"bytes", mode="create")
        with pytest.raises(FileExistsError):
            fs.pipe_file(key, b"other", mode="create")
        assert fs.cat_file(key) == b"bytes"
