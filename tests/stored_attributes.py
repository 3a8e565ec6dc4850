"""Attributes that a class of another package has, although no class attribute shows them."""

from __future__ import annotations

import dis
import inspect


def stored(kind: type) -> set[str]:
    """Return the attributes that the methods of a class assign on self."""
    return {
        instruction.argval
        for base in kind.__mro__
        for method in vars(base).values()
        if inspect.isfunction(method)
        for instruction in dis.get_instructions(method)
        if instruction.opname == "STORE_ATTR"
    }
