"""The memory that a save to S3 and a download from it need beside the shard: as the system counts it, in a process of their own."""

import json
import subprocess
import sys

import pytest

from servers import S3Server

MIB = 1 << 20
MEASURE = """
import json, secrets, sys, warnings
from pathlib import Path

import torch

from spotguard.checkpoint import Digest
from spotguard.pipeline.history import claim_attempt, open_run
from spotguard.pipeline.writer import Writer
from spotguard.policies import KeepNewest
from spotguard.state.snapshot import HostBuffers, ShardImage, Snapshot
from spotguard.stores.s3 import S3ObjectStore

warnings.simplefilter("ignore")  # the bucket keeps no versions
grown = {}


def resident(name):
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


def measured(name, action):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    action()
    grown[name] = resident("VmHWM") - before


def commit(step, tensor):
    image = ShardImage("model", None, HostBuffers().capture("model", {"weight": tensor}))
    snapshot = Snapshot(step, 0, step, finished=False, shards=(image,))

    def submit():
        writer.submit(snapshot, {})
        writer.drain()
        assert writer.error is None, writer.error

    return submit


def read(buffer, digest):
    with store.open(writer.last.shards[0].key) as reader:
        assert reader.read_into(buffer, 0, None, digest) == len(buffer)


store = S3ObjectStore(f"{sys.argv[1]}/{secrets.token_hex(8)}")
writer = Writer(
    store,
    run_id=open_run(store).run_id,
    attempt=claim_attempt(store).attempt,
    retention=KeepNewest(1),
    publish=lambda event: None,
)
size = int(sys.argv[2])
commit(1, torch.ones(48 << 18))()  # boto3 is loaded, threads have stacks; more than one part, as all that follows
read(bytearray(writer.last.shards[0].size), Digest())
measured("save", commit(2, torch.arange(size // 4, dtype=torch.int32)))
buffer = bytearray(writer.last.shards[0].size)
buffer[:] = b"x" * len(buffer)  # each page is there
digest = Digest()
measured("download", lambda: read(buffer, digest))
assert str(digest) == writer.last.shards[0].digest
print(json.dumps({"connections": store.connection.options.connections, **grown}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from proc(5)")
def test_a_save_and_a_download_need_no_more_memory_than_what_is_on_its_way(
    seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    seaweedfs.use(monkeypatch)
    command = [sys.executable, "-c", MEASURE, f"s3://{seaweedfs.plain}", str(224 * MIB)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    grown = json.loads(ended.stdout)
    assert grown["save"] < grown["connections"] * 8 * MIB
    assert grown["download"] < grown["connections"] * 8 * MIB  # into memory that is there
