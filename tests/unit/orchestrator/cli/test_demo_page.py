"""The demo opens a browser only where it would be a window."""

from __future__ import annotations

import pytest

from orchestrator.cli.demo import has_screen


@pytest.mark.parametrize(
    ("env", "platform", "is_there"),
    [
        ({}, "linux", False),
        ({"DISPLAY": ":0"}, "linux", True),
        ({"WAYLAND_DISPLAY": "wayland-0"}, "linux", True),
        ({}, "darwin", True),
    ],
)
def test_a_browser_of_text_does_not_take_the_terminal(env, platform, is_there):
    assert has_screen(env, platform) is is_there
