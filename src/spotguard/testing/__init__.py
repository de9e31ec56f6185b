"""For suites of your own: contract suites, `FaultProxy`, and the metadata services of the clouds.

- What every implementation of a protocol of ours has to pass, for third parties too. Needs pytest::

    from spotguard.testing import ObjectStoreContract

    class TestMyStore(ObjectStoreContract):
        @pytest.fixture
        def store(self) -> MyStore:
            return MyStore(...)

    from spotguard.testing import NoticeSourceContract

    class TestMySource(NoticeSourceContract):
        @pytest.fixture
        def new_source(self) -> Callable[[], MySource]:
            return lambda: MySource(...)

        @pytest.fixture
        def announce(self) -> Callable[[], None]:
            return ...  # a function that has a notice stand; what else there is, the class tells

- `FaultProxy` makes the trouble of networks and services between a client and its object store.
- `FakeAws`, `FakeGoogle` and `FakeAzure` tell of interruptions, over HTTP on loopback, as the clouds do::

    with FakeAws() as aws:
        process = subprocess.Popen([sys.executable, "train.py"], env={**os.environ, **aws.environment})
        aws.interrupt("terminate", in_s=20)

Names are bound when they are first used, so that only the contract suites load pytest.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spotguard.testing.metadata import FakeAws, FakeAzure, FakeGoogle
    from spotguard.testing.notice_source import NoticeSourceContract
    from spotguard.testing.object_store import ObjectStoreContract
    from spotguard.testing.proxy import (
        Call,
        DropHeader,
        Fault,
        FaultProxy,
        Flip,
        Latency,
        LostResponse,
        Request,
        Reset,
        Stall,
        Status,
        Truncate,
        each,
        matching,
        nth,
    )

if "pytest" in sys.modules:  # before a suite is imported, in whatever way
    sys.modules["pytest"].register_assert_rewrite("spotguard.testing.notice_source", "spotguard.testing.object_store")

__all__ = [
    "Call",
    "DropHeader",
    "FakeAws",
    "FakeAzure",
    "FakeGoogle",
    "Fault",
    "FaultProxy",
    "Flip",
    "Latency",
    "LostResponse",
    "NoticeSourceContract",
    "ObjectStoreContract",
    "Request",
    "Reset",
    "Stall",
    "Status",
    "Truncate",
    "each",
    "matching",
    "nth",
]

_HOME = {
    **dict.fromkeys(["FakeAws", "FakeAzure", "FakeGoogle"], "metadata"),
    "NoticeSourceContract": "notice_source",
    "ObjectStoreContract": "object_store",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        value = getattr(importlib.import_module(f"spotguard.testing.{_HOME.get(name, 'proxy')}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'spotguard.testing' has no attribute {name!r}")
