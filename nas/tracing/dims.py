"""What the sizes of a traced model are made of, and which of them may shrink together.

Every axis of every tensor is written as variables: a convolution's output channels are one, the output of a fused
q, k, v projection is the product of 3, the heads and the dimensions of a head, a concatenation is a sum. An operator
says which of its axes are the same. What is left unbound at the end are the *groups*: sizes that may be chosen freely,
each with every slice of every parameter that belongs to it. (torch-pruning's dependency graph, Fang et al. 2023,
"DepGraph: Towards Any Structural Pruning", finds such groups of layers; here an axis may also be a product, so that
heads, and the numbers in a reshape, are part of it.) Here is the algebra; :mod:`nas.tracing.follow` takes it through a
model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch


class Var:
    """A size that may be chosen, unless it is tied.

    Attributes:
        size: as the model has it.
        name: of the layer whose outputs it counts.
        role: "" for channels or units, "heads" or "head_dim" in attention.
        tied: why it has to stay, or "".
        bound: what it turned out to be made of, or nothing.
    """

    def __init__(self, size: int, name: str, role: str = "", tied: str = "") -> None:
        self.size, self.name, self.role, self.tied = size, name, role, tied
        self.bound: Dim | None = None

    def __repr__(self) -> str:
        return f"{self.name}{'.' + self.role if self.role else ''}[{self.size}]"


Factor = Var | int
Product = tuple[Factor, ...]


@dataclass(frozen=True)
class Dim:
    """An axis: a sum of products, in the order in which they lie in memory."""

    terms: tuple[Product, ...]

    @property
    def size(self) -> int:
        """As the model has it."""
        return sum(math.prod(_size(f) for f in term) for term in self.terms)

    @property
    def variables(self) -> list[Var]:
        """Every variable in it, as far as it is known."""
        return [f for term in self.terms for f in term if isinstance(f, Var)]

    def sized(self, sizes: Mapping[Var, int]) -> int:
        """Its size where the variables have others; resolved axes only."""
        return sum(math.prod(sizes.get(f, f.size) if isinstance(f, Var) else f for f in term) for term in self.terms)

    def kept(self, chosen: Mapping[Var, torch.Tensor]) -> torch.Tensor:
        """Which places of the axis are kept, where of a variable the places ``chosen`` are; resolved axes only."""
        start, found = 0, []
        for term in self.terms:
            places = torch.zeros(1, dtype=torch.long)
            for f in term:
                own = chosen.get(f) if isinstance(f, Var) else None
                own = torch.arange(_size(f)) if own is None else own
                places = (places[:, None] * _size(f) + own[None, :]).flatten()
            found.append(start + places)
            start += math.prod(_size(f) for f in term)
        return torch.cat(found)

    def place(self, variable: Var) -> torch.Tensor:
        """Place of the variable that every place of the axis belongs to, ``[size]``, -1 where none."""
        found = []
        for term in self.terms:
            places = torch.full((1,), -1, dtype=torch.long)
            for f in term:
                own = torch.arange(_size(f)) if f is variable else torch.full((_size(f),), -1)
                places = torch.maximum(places[:, None], own[None, :]).flatten()
            found.append(places)
        return torch.cat(found)


def _size(factor: Factor) -> int:
    return factor.size if isinstance(factor, Var) else factor


def constant(size: int) -> Dim:
    """An axis that stays."""
    return Dim(((),) if size == 1 else ((size,),))


def resolve(dim: Dim) -> Dim:
    """The axis by what its variables were bound to."""
    terms: list[Product] = []
    for term in dim.terms:
        if len(term) == 1 and isinstance(term[0], Var) and term[0].bound is not None:
            terms += resolve(term[0].bound).terms
            continue
        factors: list[Factor] = []
        for f in term:
            inner = resolve(f.bound) if isinstance(f, Var) and f.bound is not None else None
            if inner is None:
                factors.append(f)
            elif len(inner.terms) == 1:
                factors += inner.terms[0]
            else:  # a sum within a product has no simple order
                tie([inner], "a concatenation is reshaped")
                factors.append(_size(f))
        terms.append(tuple(factors))
    whole = Dim(tuple(terms))
    return whole if len(terms) == 1 or whole.variables else constant(whole.size)


def tie(dims: Iterable[Dim], reason: str) -> None:
    """Whatever these axes are made of stays as it is."""
    for dim in dims:
        for variable in resolve(dim).variables:
            variable.tied = variable.tied or reason


def unify(a: Dim, b: Dim) -> None:
    """The two axes are one. Where their structures do not fit, both are tied."""
    a, b = resolve(a), resolve(b)
    if a == b:
        return
    if a.size == b.size and len(a.terms) == len(b.terms) == 1 and _aligned(a.terms[0], b.terms[0]):
        return
    for one, other in ((a, b), (b, a)):
        alone = one.terms[0][0] if len(one.terms) == 1 and len(one.terms[0]) == 1 else None
        if isinstance(alone, Var) and a.size == b.size and len(other.terms) > 1:
            if alone.tied:
                tie([other], alone.tied)
            alone.bound = other
            return
    if a.size == b.size and len(a.terms) == len(b.terms):
        pairs = list(zip(a.terms, b.terms, strict=True))
        if all(Dim((x,)).size == Dim((y,)).size for x, y in pairs):
            for x, y in pairs:
                unify(Dim((x,)), Dim((y,)))
            return
    tie([a, b], "axes of different make-up meet")


def _aligned(a: Product, b: Product) -> bool:
    """Bind the factors of two products of one size to each other; False where they interleave."""
    left, right = list(a), list(b)
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if _size(x) == _size(y):
            _same(x, y)
            continue
        small, large, rest = (x, y, right) if _size(x) < _size(y) else (y, x, left)
        if _size(large) % _size(small):
            return False
        first, second = _split(large, _size(small))
        _same(small, first)
        rest.insert(0, second)
    return not left and not right


def _split(factor: Factor, size: int) -> tuple[Factor, Factor]:
    """A factor as a product of ``size`` and the rest."""
    if isinstance(factor, int):
        return size, factor // size
    first, second = (Var(s, factor.name, tied=factor.tied) for s in (size, factor.size // size))
    factor.bound = Dim(((first, second),))
    return first, second


def _same(x: Factor, y: Factor) -> None:
    if x is y:
        return
    if isinstance(x, Var) and isinstance(y, Var):
        x.tied = x.tied or y.tied
        x.role = x.role or y.role
        y.bound = Dim(((x,),))
        return
    for f in (x, y):
        if isinstance(f, Var):
            f.tied = f.tied or "it meets a fixed size"


def reshaped(dims: Sequence[Dim], sizes: Sequence[int]) -> list[Dim] | None:
    """Axes of the same numbers in another shape, or nothing where the sizes cut through variables."""
    queue: list[Factor | Dim] = []
    for dim in map(resolve, dims):
        queue += [f for f in dim.terms[0] if f != 1] if len(dim.terms) == 1 else [dim]
    found = []
    for size in sizes:
        taken: list[Factor] = []
        room = size
        whole: Dim | None = None
        while room > 1:
            if not queue:
                return None
            head = queue.pop(0)
            if isinstance(head, Dim):
                if head.size != room or taken:
                    return None
                whole, room = head, 1
                continue
            if room % _size(head) == 0:
                taken.append(head)
                room //= _size(head)
            elif _size(head) % room == 0:
                first, second = _split(head, room)
                taken.append(first)
                queue.insert(0, second)
                room = 1
            else:
                return None
        found.append(whole or Dim((tuple(taken),)))
    return found
