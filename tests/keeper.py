"""Keeps servers running for as long as somebody uses them: started by `servers`, which tells it what to run.

    python keeper.py FOLDER < commands

Every line of the input is the command of one server, as a list in JSON. When the input ends, the keeper waits for the file
``FOLDER/users``: each user holds a shared lock of it, which the system takes away from whoever ends, in whatever way. With the
last of them gone the servers are killed and their data is deleted.
"""

import ctypes
import fcntl
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def follow_into_death(prctl: "ctypes._NamedFuncPointer | None") -> None:
    """In a new server: die with the keeper, should somebody kill that."""
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(folder: Path) -> None:
    """Start, wait, stop."""
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    with (folder / "log").open("ab") as log:
        start = functools.partial(
            subprocess.Popen,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=functools.partial(follow_into_death, prctl),
        )
        servers = [start(json.loads(line)) for line in sys.stdin]
    with (folder / "users").open("ab") as users:
        fcntl.lockf(users, fcntl.LOCK_EX)
        (folder / "server.json").unlink(missing_ok=True)
        for server in servers:
            server.kill()
        for server in servers:
            server.wait()
        shutil.rmtree(folder / "data", ignore_errors=True)
        litter = json.loads((folder / "litter.json").read_text()) if (folder / "litter.json").exists() else []
        for path in litter:
            Path(path).unlink(missing_ok=True)


if __name__ == "__main__":
    if os.fork():  # the one who started this has nothing left to wait for
        os._exit(0)
    os.setsid()  # Ctrl-C is for the tests
    main(Path(sys.argv[1]))
