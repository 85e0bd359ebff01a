"""The pages: Flask views and Jinja templates over the same store as the API, without a build step.

Each module beside has the views of one page and a `register(blueprint, deps, …)`; `access` admits
people, `templates/base.html` is the frame, `static/` has our own script and style, and
`static/vendor/` what others wrote, pinned.
"""

from __future__ import annotations

from orchestrator.dashboard.routes import install

__all__ = ["install"]
