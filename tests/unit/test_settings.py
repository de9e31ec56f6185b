"""Settings from the environment."""

import pytest
import torch

from spotguard import SpotGuard, TrainState
from spotguard.errors import ConfigError
from spotguard.settings import load_settings


def test_without_an_environment_the_defaults_hold() -> None:
    settings = load_settings()
    assert (settings.every, settings.keep, settings.exit_code, settings.max_failures, settings.rehearsal) == (
        "10m",
        3,
        143,
        3,
        None,
    )


def test_the_environment_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"EVERY": "500", "KEEP": "7", "EXIT_CODE": "85", "MAX_FAILURES": "1", "POLL_S": "0.25", "REPEAT_S": "0"}
    for name, value in values.items():
        monkeypatch.setenv(f"SPOTGUARD_{name}", value)
    settings = load_settings()
    found = (
        settings.every,
        settings.keep,
        settings.exit_code,
        settings.max_failures,
        settings.poll_s,
        settings.repeat_s,
    )
    assert found == ("500", 7, 85, 1, 0.25, 0.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KEEP", "0"),
        ("KEEP", "many"),
        ("KEEP", ""),
        ("EXIT_CODE", "0"),
        ("EXIT_CODE", "256"),
        ("MAX_FAILURES", "0"),
        ("POLL_S", "0"),
        ("POLL_S", "-1"),
        ("POLL_S", "nan"),
        ("POLL_S", "inf"),
        ("REPEAT_S", "-1"),
        ("REPEAT_S", "nan"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_the_name_of_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"SPOTGUARD_{name}", value)
    with pytest.raises(ConfigError, match=f"SPOTGUARD_{name}"):
        load_settings()


@pytest.mark.parametrize("value", ["0", "never", "-3", "0.5"])
def test_a_bad_save_policy_in_the_environment_is_refused_by_the_name_of_its_variable(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("SPOTGUARD_EVERY", value)
    with pytest.raises(ConfigError, match="SPOTGUARD_EVERY"):
        SpotGuard("memory://settings", TrainState(model=torch.nn.Linear(1, 1)))


def test_an_argument_wins_and_the_setting_that_it_hides_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOTGUARD_KEEP", "7")
    settings = load_settings()
    with pytest.warns(UserWarning, match="SPOTGUARD_KEEP=7 is ignored: the script sets keep=2"):
        assert settings.choose("keep", 2) == 2
    assert settings.choose("keep", None) == 7
    assert settings.choose("every", "5m") == "5m"  # not set, so nothing is hidden: no warning


def test_the_warning_about_a_hidden_setting_points_at_the_line_of_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOTGUARD_EVERY", "7")
    with pytest.warns(UserWarning, match="SPOTGUARD_EVERY=7 is ignored") as warned:
        SpotGuard("memory://settings", TrainState(model=torch.nn.Linear(1, 1)), every=5)
    assert warned[0].filename == __file__


@pytest.mark.parametrize(
    ("name", "hint"),
    [("SPOTGUARD_EVRY", "is SPOTGUARD_EVERY meant"), ("SPOTGUARD_BUCKET_REGION", "there are SPOTGUARD_")],
)
def test_a_variable_that_no_setting_has_is_warned_about(monkeypatch: pytest.MonkeyPatch, name: str, hint: str) -> None:
    monkeypatch.setenv(name, "5")
    with pytest.warns(UserWarning, match=f"{name} is ignored.*{hint}"):
        load_settings()
