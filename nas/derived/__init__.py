"""Search spaces from a user's own model: traced, its groups, layers and blocks found, its pieces priced."""

from nas.derived.space import DerivedSpace
from nas.derived.structure import Structure
from nas.derived.trace import trace

__all__ = ["DerivedSpace", "Structure", "trace"]
