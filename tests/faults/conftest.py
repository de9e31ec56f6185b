"""Makes the assertions of the shared scenario speak."""

import pytest

pytest.register_assert_rewrite("faults.scenario")
