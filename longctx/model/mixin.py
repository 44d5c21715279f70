"""Classes that are mixed into an architecture's own modules in place.

Only the modules' classes change; the modules, their parameters and the names of these do not.
"""

from __future__ import annotations

from functools import cache
from typing import Any, SupportsIndex

from torch import nn


class Mixin:
    """A base of such classes: `Sub.into(module)` makes `module` an instance of both Sub and its own class."""

    @classmethod
    def into(cls, module: nn.Module) -> None:
        if not isinstance(module, cls):
            module.__class__ = _mixed(cls, type(module))

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickle by the two classes, because no module holds the class that is made of them."""
        reduced, bases = super().__reduce_ex__(protocol), type(self).__bases__
        made_here = len(bases) == 2 and issubclass(bases[0], Mixin) and type(self) is _mixed(*bases)
        return (_blank, bases, *reduced[2:]) if made_here and isinstance(reduced, tuple) else reduced


@cache
def _mixed(mixin: type, family: type) -> type:
    """The class of both; there is one for each pair, so that ZeRO-3 can treat it as a leaf module."""
    return type(f"Trained{family.__name__}", (mixin, family), {})


def _blank(mixin: type, family: type) -> Any:
    return object.__new__(_mixed(mixin, family))
