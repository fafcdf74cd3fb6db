"""The chat page, found by name: it lies beside the package, in ``ui/``, and is no part of it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse

import shoal
from shoal.api.app import UiMount
from shoal.errors import ResourceError

MOUNT = "ui.mount:mount"


def chat_page(base_url: str, model: str | None = None, mount: str = MOUNT) -> UiMount:
    """What puts the chat page on an app; the page asks the API at `base_url` (which ends in /v1) for `model` (None: the
    server's first). `mount` is ``module:function``. Raises ResourceError when it, or gradio, is not there.
    """
    module, _, name = mount.partition(":")
    checkout = str(Path(shoal.__file__).parents[2])  # of a package that runs from its sources
    try:
        sys.path.append(checkout)
        put = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ResourceError(
            "the chat page", got=str(error), do="pip install 'shoal[ui]' and run from a checkout, or switch it off"
        ) from error
    finally:
        sys.path.remove(checkout)

    def mount_page(app: FastAPI) -> FastAPI:
        app = put(app, base_url=base_url, model=model)
        app.add_route("/ui", _into, include_in_schema=False)
        return app

    return mount_page


def _into(request: Request) -> RedirectResponse:
    """The page's addresses are relative to ``/ui/``. So is this one, since a proxy may have changed scheme, host and path."""
    return RedirectResponse(f"ui/?{request.url.query}".rstrip("?"))
