"""Search spaces from a user's own model: what may be chosen in it, and what its pieces cost."""

from nas.derived.space import DerivedSpace

__all__ = ["DerivedSpace"]
