"""Types of fields that the bodies of several files have."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

#: The engine has 32-bit token ids and counts.
MAX_TOKEN = 2**31 - 1

TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKEN, extra={"expected": "a token id"})]
Name = Annotated[str, Meta(max_length=1024)]
