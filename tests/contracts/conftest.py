"""What the tests of notice sources share; makes the assertions in it speak."""

import pytest

pytest.register_assert_rewrite("contracts.sources")

from contracts.sources import aws, azure, google, listen, service  # noqa: E402

__all__ = ["aws", "azure", "google", "listen", "service"]
