"""The environment is read in one place, and what is wrong in it is named."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from pathlib import Path

import pytest

from infra.settings import Settings, SettingsError
from state.events import Secret
from state.money import Limits

NUMBERS = [
    "STOKER_VAST_PACE",
    "STOKER_LEASE_HOURS",
    "STOKER_MAX_PER_HOUR",
    "STOKER_MAX_PER_DAY",
    "STOKER_RETENTION_DAYS",
]
FLAGS = ["STOKER_KILL_SWITCH", "STOKER_PRIVATE_WEBHOOKS", "STOKER_PRIVATE_BASES"]


def other(value):
    """A value of the same kind that is not the default."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 2
    if isinstance(value, Path):
        return Path("/somewhere/else")
    if isinstance(value, Secret):
        return Secret("sw0rdfish")
    if isinstance(value, timedelta):
        return value + timedelta(hours=2)
    if isinstance(value, Limits):
        fields = dataclasses.fields(Limits)
        return Limits(**{field.name: other(getattr(value, field.name)) for field in fields})
    if isinstance(value, tuple):
        return (Secret("sw0rdfish-new"), Secret("sw0rdfish-old"))
    return value + "-other"


EVERY = dataclasses.replace(
    Settings(),
    **{
        field.name: other(getattr(Settings(), field.name)) for field in dataclasses.fields(Settings)
    },
)


def test_what_a_child_process_reads_is_what_its_parent_had():
    assert Settings.from_env(EVERY.to_env()) == EVERY
    plain = Settings.from_env({})
    assert Settings.from_env(plain.to_env()) == plain


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["many", "1,5", "0x10"])
def test_a_number_that_is_none_names_its_variable(name, value):
    with pytest.raises(SettingsError, match=name):
        Settings.from_env({name: value})


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", ["maybe", "2", "on fire"])
def test_a_flag_that_is_none_names_its_variable(name, value):
    with pytest.raises(SettingsError, match=name):
        Settings.from_env({name: value})


def test_no_secret_is_shown():
    assert "sw0rdfish" not in repr(EVERY)
    assert "sw0rdfish" not in str(EVERY)
