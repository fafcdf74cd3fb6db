"""What stands before Ray Serve's HTTP proxy; Serve calls `middlewares` in the proxy's process (`serve.SERVE_SETTINGS`)."""

from __future__ import annotations

from starlette.middleware import Middleware

from shoal.api.door import Door
from shoal.api.middleware import Identified, Present


def middlewares() -> list[Middleware]:
    """The outermost last."""
    return [Middleware(Identified), Middleware(Present), Middleware(Door)]
