"""A model as a graph of its own layers: what its sizes are made of, which may shrink, and the graph with fewer."""

from nas.tracing.shrink import shrunk
from nas.tracing.structure import Block, Group, Structure
from nas.tracing.trace import trace

__all__ = ["Block", "Group", "Structure", "shrunk", "trace"]
