"""Configuration files: what is nearer wins, and what is wrong in one is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.settings import Settings, SettingsError, server, settings_page


@pytest.fixture
def say(tmp_path, monkeypatch):
    """Write `./stoker.toml` or the user's own file; nothing else is said anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STOKER_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "stoker").mkdir(parents=True)
    places = {"here": Path("stoker.toml"), "own": tmp_path / "home" / "stoker" / "config.toml"}

    def write(which, text):
        places[which].write_text(text)

    return write


def test_what_is_nearer_wins(say, monkeypatch):
    assert Settings.from_env().bind == "127.0.0.1:8400"
    say("own", '[settings]\nSTOKER_BIND = ":1"\nSTOKER_MAX_PER_DAY = 50\n')
    assert Settings.from_env().bind == ":1"
    say("here", '[settings]\nSTOKER_BIND = ":2"\nSTOKER_KILL_SWITCH = true\n')
    assert Settings.from_env().bind == ":2"
    monkeypatch.setenv("STOKER_BIND", ":3")
    found = Settings.from_env()
    assert (found.bind, found.kill_switch, found.limits.per_day) == (":3", True, 50_000_000)


def test_one_file_can_be_named_in_place_of_both(say, monkeypatch, tmp_path):
    say("own", '[settings]\nSTOKER_BIND = ":1"\n')
    (tmp_path / "etc.toml").write_text('[settings]\nS3_BUCKET = "loras"\n')
    monkeypatch.setenv("STOKER_CONFIG", str(tmp_path / "etc.toml"))
    found = Settings.from_env()
    assert (found.bind, found.s3_bucket) == ("127.0.0.1:8400", "loras")
    monkeypatch.setenv("STOKER_CONFIG", "")
    assert Settings.from_env().s3_bucket == "stoker"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[settings]\nSTOKER_PUBLIC_ULR = "x"', "did you mean 'STOKER_PUBLIC_URL'?"),
        ('[settings]\nVAST_API_KEY = ["sw0rdfish", 1]', "VAST_API_KEY in stoker.toml must be"),
        ('[settings]\nSTOKER_MAX_PER_DAY = "much"', "STOKER_MAX_PER_DAY must be a number"),
        ('ulr = "https://sw0rdfish"', "knows no 'ulr'; did you mean 'url'?"),
        ("settings = 3", "knows no 'settings'"),
        ("url = 3", "url in stoker.toml must be a text"),
        ('url = "unfinished', "stoker.toml is not TOML"),
        ("a = " + "[" * 5000, "stoker.toml "),
        ("x" * 300_000, "larger than 256 kB"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_without_its_values(say, text, words):
    say("here", text)
    with pytest.raises(SettingsError) as told:
        Settings.from_env()
    assert words in str(told.value)
    assert "sw0rdfish" not in str(told.value)


def test_a_file_of_bytes_is_refused(say, tmp_path):
    (tmp_path / "stoker.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="not UTF-8"):
        Settings.from_env()


def asked(**env):
    url, key = server({"XDG_CONFIG_HOME": "home", **env})
    return url, key.reveal()


def test_a_server_is_found_with_its_key(say):
    assert asked() == ("", "")
    say("own", 'url = "https://mine"\napi_key = "k-mine"')
    assert asked() == ("https://mine", "k-mine")
    assert asked(STOKER_API_KEY="k-env") == ("https://mine", "k-env")
    say("here", 'url = "https://theirs"\napi_key = "k-here"')
    assert asked() == ("https://theirs", "k-here")


def test_a_key_of_the_users_own_goes_to_no_server_that_a_directory_names(say):
    say("own", 'url = "https://mine"\napi_key = "k-mine"')
    say("here", 'url = "https://theirs"')
    assert asked() == ("https://theirs", "")
    say("own", 'api_key = "k-mine"')
    assert asked() == ("https://theirs", "")
    assert asked(STOKER_URL="https://named") == ("https://named", "k-mine")


def test_the_page_of_settings_is_up_to_date():
    page = Path(__file__).parents[3] / "docs" / "settings.md"
    assert page.read_text() == settings_page(), "run `stoker docs settings > docs/settings.md`"
