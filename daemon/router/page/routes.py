"""The page at / and its figures at /overview, as a part of the control plane."""

from __future__ import annotations

import re
from base64 import b64encode
from functools import cache
from hashlib import sha256
from pathlib import Path

from flask import Blueprint, Response, request

from ..board.board import Board
from ..config.settings import Settings
from ..http import refusals
from .overview import Overview

#: The browser guesses no other type, keeps nothing, and tells no other site of the router.
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def routes(board: Board, settings: Settings) -> Blueprint:
    """Return the routes. The page itself needs no key, because the figures are not in it."""
    blueprint = Blueprint("page", __name__)
    overview = Overview(board, settings.policy.name)

    @blueprint.get("/")
    def page() -> Response:
        html, policy = _page()
        headers = {**_HEADERS, "Content-Security-Policy": policy}
        return Response(html, mimetype="text/html", headers=headers)

    @blueprint.get("/overview")
    def figures() -> Response:
        if not settings.keys.allow(request.headers.get("Authorization", "")):
            refusal = refusals.no_key()
            return Response(refusal.body, refusal.status, {**_HEADERS, **dict(refusal.headers)})
        return Response(overview.json(), mimetype="application/json", headers=_HEADERS)

    return blueprint


@cache
def _page() -> tuple[bytes, str]:
    """Return the page, and a policy that allows only its own script and style."""
    html = Path(__file__).with_name("page.html").read_bytes()
    script, style = (_hash_of(tag, html) for tag in (b"script", b"style"))
    return html, "; ".join(
        (
            "default-src 'none'",
            f"script-src {script}",
            f"style-src {style}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            # No text can become HTML: assignments to innerHTML fail.
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _hash_of(tag: bytes, html: bytes) -> str:
    [content] = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), html, re.DOTALL)
    return f"'sha256-{b64encode(sha256(content).digest()).decode()}'"
