"""The login of the pages: a form for an API key, and the cookies that a browser then sends.

Notable: the cookie holds the key itself. So a login outlives the service, and holds at every gateway; scripts cannot read it.
No cookie names a path: browsers then send it to what lies beside the form, whatever path a proxy puts before it.
"""

from __future__ import annotations

import base64
import binascii
import re
import secrets
from collections.abc import Mapping

LOGIN, LOGOUT = "/login", "/logout"  # below the pages' path
KEY, SESSION = "shoal-key", "shoal-page"  # cookies
KEPT_SECONDS = 30 * 24 * 3600
_SESSION = re.compile(r"[A-Za-z0-9_-]{43}")

FORM = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Log in · Shoal</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
  :root {{ color-scheme: light dark; }}
  body {{ font: 1rem system-ui, sans-serif; max-width: 24rem; margin: 12vh auto; padding: 0 1rem; }}
  label, input, button {{ display: block; width: 100%; box-sizing: border-box; font: inherit; margin: 0.5rem 0; }}
  input, button {{ padding: 0.5rem; }}
</style></head>
<body><main><h1>Shoal</h1>
<form method="post" action="login?to={to}">
<label for="key">API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button>Log in</button>
</form>
<p>{said}</p></main></body></html>
"""
ASKED = "This server answers only with one of its API keys."
WRONG = '<strong role="alert">This is none of the server\'s API keys.</strong>'


def key_of(cookies: Mapping[str, str]) -> str:
    """The API key that a browser logged in with; empty without one."""
    try:
        key = base64.urlsafe_b64decode(cookies.get(KEY, "")).decode()
    except (binascii.Error, ValueError):
        return ""
    return key if is_key(key) else ""


def is_key(text: str) -> bool:
    """Whether an HTTP header can carry `text` as a key."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


def session_of(cookies: Mapping[str, str]) -> str:
    """The name of a browser's session; empty without one."""
    given = cookies.get(SESSION, "")
    return given if _SESSION.fullmatch(given) else ""


def new_session() -> str:
    return secrets.token_urlsafe(32)


def keep_key(key: str) -> str:
    """A Set-Cookie header's value: the browser sends `key` from now on; an empty one is forgotten."""
    seconds = KEPT_SECONDS if key else 0
    return f"{KEY}={base64.urlsafe_b64encode(key.encode()).decode()}; Max-Age={seconds}; HttpOnly; SameSite=Lax"


def keep_session(session: str) -> str:
    return f"{SESSION}={session}; HttpOnly; SameSite=Lax"
