"""Masks: compression forms that are better on no cost in the objective than the plain form, by the latency table.

A *form* is a value of a compression choice that is not its plain one: int8 in a stage, a share that is pruned. Where it
is no better on any cost in the objective, all other genes equal, it can only lose quality, so it is not worth a
training on this device. :meth:`Masks.repair` sets such genes to their plain value. The genome keeps its shape and the
candidate its id, so what was evaluated for one device serves every other.

What switching to plain saves depends only on the genes that the affected sites read, so it is tabulated: repairing a
matrix of genomes is a lookup per compression choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.genes import deciding_genes, strides_of
from nas.latency.estimator import CHUNK, Additive, CostEstimator, SiteCosts
from nas.space import Genomes, SearchSpace, Value

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.intp]
NOISE = 1e-9  # of a cost's largest entry: below it a difference is one of rounding
DENSE = 1_000_000  # entries of a table over the genes of several sites; beyond, the sites are looked up one by one
SAMPLE = 20_000  # genomes that shares are counted over; spaces that are no larger are counted whole
TELLING = 0.5  # between the shares at two values of a choice: so much, and it is worth saying where


@dataclass(frozen=True)
class MaskedForm:
    """A compression form that does not pay, in words and figures.

    Attributes:
        choices: the choice; several where their forms do not pay together.
        value: the form; None where there are several choices.
        plain: what stands in its place.
        share: of the candidates that have this form, how many are better off without it.
        everywhere: whether that is known of all of them.
        excess: cost in the objective → what the form adds to its average over those, relative.
        where: value of another choice → share there, of the choice (``by``) that it depends on most.
    """

    choices: tuple[str, ...]
    value: Value | None
    plain: Value
    share: float
    everywhere: bool
    excess: dict[str, float]
    by: str = ""
    where: dict[Value, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """``stage1.bits=8``, or the choices that do not pay together."""
        return f"{self.choices[0]}={self.value}" if len(self.choices) == 1 else f"{', '.join(self.choices)} together"

    @property
    def scope(self) -> str:
        """``everywhere``, or where, in words."""
        if self.everywhere:
            return "everywhere"
        share = f"in {_percent(self.share)} of its candidates"
        if not self.where:
            return share
        return f"{share} ({', '.join(f'{self.by}={value}: {_percent(s)}' for value, s in self.where.items())})"

    @property
    def why(self) -> str:
        """``latency_ms +12 %, size_bytes +0 %``: on average, where it is masked."""
        return ", ".join(f"{cost} {100 * more:+.1f} %" for cost, more in self.excess.items())

    def plain_form(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "choices": list(self.choices), "value": self.value, "plain": self.plain, "name": self.name,
            "scope": self.scope, "share": self.share, "everywhere": self.everywhere, "excess": self.excess,
            "by": self.by, "where": [{"value": value, "share": share} for value, share in self.where.items()],
        }  # fmt: skip


class Masks:
    """The forms of one space that do not pay on the devices of one objective.

    Args:
        space: whose genomes are repaired.
        costs: those in the objective.
        moves: in the order in which they are tried.
        forms: for people.
    """

    def __init__(
        self, space: SearchSpace, costs: Sequence[str] = (), moves: Iterable[Move] = (),
        forms: Iterable[MaskedForm] = (),
    ) -> None:  # fmt: skip
        self.space, self.costs = space, tuple(costs)
        self.moves, self.forms = tuple(moves), tuple(forms)
        # By move, those that may become due when it is made.
        self._follows = [
            [i for i, other in enumerate(self.moves) if other is not move and move.changes & other.reads]
            for move in self.moves
        ]

    def repair(self, genomes: Genomes) -> Genomes:
        """The genomes ``[n, choices]`` with every masked gene at its plain value.

        Choice by choice in the order of the genome, then the groups that are coupled, each in the context that the
        switches before it left; again, until nothing changes. So a repaired genome is its own repair, no switch raises
        a cost in the objective, and the result depends on no other row. Dormant genes stay as they are, and do not
        matter: canonical forms of repaired genomes are repaired.
        """
        repaired = np.array(np.atleast_2d(genomes), dtype=np.int64, order="C")
        if self.moves:
            for start in range(0, len(repaired), CHUNK):
                columns = np.array(repaired[start : start + CHUNK].T, order="C")
                self._settle(columns)
                repaired[start : start + CHUNK] = columns.T
        return repaired

    def _settle(self, columns: Genomes) -> None:
        """Repair ``columns [choices, n]`` in place."""
        n = columns.shape[1]
        due: list[Bools | None] = [np.ones(n, dtype=bool)] * len(self.moves)  # columns in which a move may be due
        while any(where is not None for where in due):
            for turn, move in enumerate(self.moves):
                where, due[turn] = due[turn], None
                if where is None:
                    continue
                switched = move.apply(columns, None if where.all() else np.flatnonzero(where))
                if switched is None:
                    continue
                for other in self._follows[turn]:
                    before = due[other]
                    due[other] = switched if before is None else before | switched


class Move:
    """Setting some genes of one technique to their plain values, where that makes no cost in the objective worse.

    Args:
        space: whose genomes these are.
        plain: gene → index of its plain value.
        sites: all sites, with the costs in the objective only.
        noise: per cost, what a form must save to count as better.

    Attributes:
        changes: the genes that it sets; ``reads``: those on which it depends whether it does.
        always: pairs of a gene and a value index that are masked whatever the other genes are; of single genes.
    """

    def __init__(self, space: SearchSpace, plain: dict[int, int], sites: Sequence[SiteCosts], noise: Array) -> None:
        self.space, self.plain, self.noise = space, dict(sorted(plain.items())), noise
        self.changes = frozenset(plain)
        self.always: set[tuple[int, int]] = set()
        self._differences: list[SiteCosts] = []
        self._table: Bools | None = None
        reading = [s for s in sites if self.changes & set(s.site.genes.tolist())]
        # A gene that some site always reads is never dormant; of the others it is looked up.
        self._certain = {
            gene for s in reading for column, gene in enumerate(s.site.genes.tolist()) if s.site.reads[:, column].all()
        }
        differences = [SiteCosts(s.site, _difference(s, self.plain, space.cardinalities)) for s in reading]
        union = sorted({*self.changes, *(gene for s in reading for gene in s.site.genes.tolist())})
        if math.prod(space.cardinalities[union].tolist()) <= DENSE:
            self._genes, self._table = self._tabulated(union, differences)
        else:
            self._genes, self._differences = tuple(union), differences
        self._strides = strides_of(space.cardinalities[list(self._genes)].tolist()).tolist()
        self.reads = frozenset(self._genes if self.changes <= self._certain else range(len(space.choices)))

    @property
    def possible(self) -> bool:
        """Whether it may ever be made."""
        return self._table is None or bool(self._table.any())

    def _tabulated(self, union: list[int], differences: list[SiteCosts]) -> tuple[tuple[int, ...], Bools]:
        """The genes that decide, and whether the move is made, over those."""
        sizes = self.space.cardinalities
        shape = sizes[union].tolist()
        better = np.zeros(shape, dtype=bool)
        for cost in range(len(self.noise)):
            total = np.zeros(shape)
            for site, values in differences:
                own = [int(size) if gene in site.genes else 1 for gene, size in zip(union, shape, strict=True)]
                total += values[:, cost].reshape(own)
            better |= total < -self.noise[cost]
        masked = ~better
        if len(self.plain) == 1:
            gene, plain = next(iter(self.plain.items()))
            axis = union.index(gene)
            everywhere = np.moveaxis(masked, axis, 0).reshape(shape[axis], -1).all(axis=1)
            self.always = {(gene, value) for value in np.flatnonzero(everywhere).tolist() if value != plain}
        masked[tuple(self.plain.get(gene, slice(None)) for gene in union)] = False
        return deciding_genes(union, masked)

    def apply(self, columns: Genomes, rows: Rows | None = None) -> Bools | None:
        """Make the move in ``columns [choices, n]`` where it is due; returns where it was made ``[n]``, if anywhere.

        Args:
            rows: the columns to look at; all by default.
        """
        due = self._due(columns, np.arange(columns.shape[1]) if rows is None else rows, everywhere=rows is None)
        if not len(due):
            return None
        switched = np.zeros(columns.shape[1], dtype=bool)
        active = None if self.changes <= self._certain else self.space.active(columns[:, due].T).T
        for gene, plain in self.plain.items():
            where = columns[gene, due] != plain
            if gene not in self._certain and active is not None:
                where &= active[gene]
            columns[gene, due[where]] = plain
            switched[due[where]] = True
        return switched if switched.any() else None

    def _due(self, columns: Genomes, rows: Rows, everywhere: bool) -> Rows:
        """Those of the ``rows`` in which the move is due, dormant genes aside."""
        if self._table is not None:
            index = _index(columns, self._genes, self._strides, None if everywhere else rows)
            return rows[self._table.take(index)]
        forms = np.sum([columns[gene, rows] != plain for gene, plain in self.plain.items()], axis=0)
        rows = rows[forms > (len(self.plain) > 1)]  # a single form of several choices is the choice's own move
        saved = np.zeros((len(self.noise), len(rows)))
        for site, values in self._differences:
            index = _index(columns, site.genes.tolist(), site.strides.tolist(), rows)
            for cost in range(len(self.noise)):
                saved[cost] += values[:, cost].take(index)
        return rows[(saved >= -self.noise[:, None]).all(axis=0)]


def find_masks(space: SearchSpace, estimator: CostEstimator, costs: Iterable[str]) -> Masks:
    """The forms of ``space`` that are better on none of ``costs``, by the estimator's prediction, than the plain form.

    Compared are, all other genes equal, each form with the plain value of its choice; and all choices of one technique
    together with all of them plain, where sites read several of them: between an int8 stage and its neighbours lie
    boundaries, so that neither of two int8 stages may be better off alone and yet both together.

    A form counts as better if any cost is lower by more than rounding. The table's error is no part of it: between two
    predictions that it cannot tell apart the form has the benefit of the doubt if its own is the lower one, and the
    plain value if it is not, because plain costs no quality.

    Args:
        costs: those in the objective: with a limit, or read by the reward or by the strategy, whatever device they
            are of. Without any, nothing is masked; nor where the estimator is no sum over sites.
    """
    costs = tuple(dict.fromkeys(costs))
    known = estimator.by_site() if isinstance(estimator, Additive) else []
    if not known or not costs:
        return Masks(space, costs)
    columns = [estimator.costs.index(cost) for cost in costs]
    sites = [SiteCosts(site, values[:, columns]) for site, values in known]
    noise = NOISE * np.max([np.abs(values).max(axis=0) for _, values in sites], axis=0)
    plain = {
        gene: choice.index(choice.plain)
        for gene, choice in enumerate(space.choices)
        if choice.plain is not None and len(choice.values) > 1
    }
    counted = _Counted(space, estimator, costs, columns)
    single = [Move(space, {gene: index}, sites, noise) for gene, index in plain.items()]
    single = [move for move in single if move.possible and counted.due(move).any()]
    joint = [Move(space, together, sites, noise) for together in _coupled(space, plain, sites)]
    alone = counted.repaired_by(Masks(space, costs, single))
    joint = [move for move in joint if move.possible and alone.due(move).any()]
    forms = [form for move in single for form in counted.single(move)] + [alone.joint(move, counted) for move in joint]
    return Masks(space, costs, [*single, *joint], forms)


def _coupled(space: SearchSpace, plain: dict[int, int], sites: Sequence[SiteCosts]) -> list[dict[int, int]]:
    """Compression choices of one kind of which some site reads several, with their plain indices."""
    found = []
    for kind in dict.fromkeys(space.kinds[list(plain)].tolist()):
        genes = {gene for gene in plain if space.kinds[gene] == kind}
        if any(len(genes & set(site.genes.tolist())) > 1 for site, _ in sites):
            found.append({gene: plain[gene] for gene in sorted(genes)})
    return found


def _difference(tabulated: SiteCosts, plain: dict[int, int], sizes: npt.NDArray[np.int64]) -> Array:
    """What each entry of a site costs beyond the one with the plain values, ``[entries, k]``.

    Of genes that the plain form reads and this one does not, the value that suits the form best counts: they may be
    dormant, and a dormant gene must not decide anything.
    """
    site, values = tabulated
    genes = site.genes.tolist()
    shape = sizes[genes].tolist()
    table = values.reshape(*shape, values.shape[1])
    without = table
    for axis, gene in enumerate(genes):
        if gene in plain:
            without = without.take([plain[gene]], axis=axis)
    difference = (table - without).reshape(values.shape)
    unread = ~site.reads
    unread[:, [gene in plain for gene in genes]] = False
    if unread.any():
        places = np.indices(shape).reshape(len(shape), -1).T
        places[unread] = 0
        same = places @ site.strides
        lowest = np.full_like(difference, np.inf)
        np.minimum.at(lowest, same, difference)
        difference = lowest[same]
    return np.asarray(difference)


def _index(columns: Genomes, genes: Sequence[int], strides: Sequence[int], rows: Rows | None) -> Rows:
    """Entry of a table over ``genes`` for every column, or for some ``rows`` of them."""
    index = np.zeros(columns.shape[1] if rows is None else len(rows), dtype=np.intp)
    for gene, stride in zip(genes, strides, strict=True):
        index += (columns[gene] if rows is None else columns[gene].take(rows)) * stride
    return index


class _Counted:
    """Genomes over which shares and averages are counted: all of a small space, else a uniform sample."""

    def __init__(
        self, space: SearchSpace, estimator: CostEstimator, costs: tuple[str, ...], columns: list[int],
        genomes: Genomes | None = None,
    ) -> None:  # fmt: skip
        self.space, self.estimator, self.costs, self.columns = space, estimator, costs, columns
        self.whole = space.size <= SAMPLE
        if genomes is None:
            sizes = tuple(space.cardinalities.tolist())
            everything = np.indices(sizes).reshape(len(sizes), -1).T if self.whole else None
            genomes = space.sample(np.random.default_rng(0), SAMPLE) if everything is None else everything
        self.genomes = np.asarray(genomes, dtype=np.int64)
        self.active = space.active(self.genomes)

    def repaired_by(self, masks: Masks) -> _Counted:
        return _Counted(self.space, self.estimator, self.costs, self.columns, masks.repair(self.genomes))

    def due(self, move: Move) -> Bools:
        """Which of them the move would change, ``[n]``."""
        columns = np.array(self.genomes.T, order="C")  # a copy, which the move changes
        switched = move.apply(columns)
        return np.zeros(len(self.genomes), dtype=bool) if switched is None else switched

    def single(self, move: Move) -> list[MaskedForm]:
        """The masked values of one choice."""
        (gene, plain), due, forms = next(iter(move.plain.items())), self.due(move), []
        choice = self.space.choices[gene]
        for index, value in enumerate(choice.values):
            having = self.active[:, gene] & (self.genomes[:, gene] == index)
            if not (due & having).any():
                continue
            share = float(due[having].mean())
            everywhere = (gene, index) in move.always or (self.whole and share == 1)
            by, where = ("", {}) if everywhere else self._where(gene, having, due)
            excess = self._excess(due & having, {gene: plain})
            forms.append(
                MaskedForm((choice.name,), value, choice.values[plain], share, everywhere, excess, by, where)
            )
        return forms

    def joint(self, move: Move, before: _Counted) -> MaskedForm:
        """What is masked together, of ``before``'s genomes that have several forms; these have no single one masked."""
        due = self.due(move)
        forms = np.sum([before.genomes[:, gene] != plain for gene, plain in move.plain.items()], axis=0)
        genes = list(move.plain)
        names = tuple(self.space.choices[gene].name for gene in genes)
        value = self.space.choices[genes[0]].values[move.plain[genes[0]]]
        share = float((due & (forms > 1)).sum() / max(1, (forms > 1).sum()))
        return MaskedForm(names, None, value, share, False, self._excess(due, move.plain))

    def _excess(self, rows: Bools, plain: dict[int, int]) -> dict[str, float]:
        """How far the mean costs are above those with the plain values, relative."""
        some = self.genomes[rows]
        without = some.copy()
        for gene, index in plain.items():
            without[:, gene] = index
        now, then = (self.estimator.price(genomes)[:, self.columns].mean(axis=0) for genomes in (some, without))
        # A fit to noise may predict what is no cost; nothing is relative to that.
        return {name: float(a / b) - 1 for name, a, b in zip(self.costs, now, then, strict=True) if b > 0}

    def _where(self, gene: int, having: Bools, due: Bools) -> tuple[str, dict[Value, float]]:
        """The other choice between whose values the share differs most, and its shares, if that tells much."""
        best: tuple[float, str, dict[Value, float]] = (TELLING, "", {})
        for other, choice in enumerate(self.space.choices):
            rows = [having & (self.genomes[:, other] == index) for index in range(len(choice.values))]
            if other != gene and len(rows) > 1 and all(row.any() for row in rows):
                shares = {value: float(due[row].mean()) for value, row in zip(choice.values, rows, strict=True)}
                spread = max(shares.values()) - min(shares.values())
                best = max(best, (spread, choice.name, shares), key=lambda found: found[0])
        return best[1], best[2]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share in (0.0, 1.0) or 0.01 <= share <= 0.99 else f"{100 * share:.1f} %"


def note(masks: Masks, most: int = 6) -> str:
    """One line for people; empty where nothing is masked."""
    if not masks.forms:
        return ""
    order = sorted(masks.forms, key=lambda form: (not form.everywhere, -form.share))
    said = [f"{form.name} {form.scope} ({form.why})" for form in order[:most]]
    if len(order) > most:
        said.append(f"and {len(order) - most} more, see the report")
    return "masked on this device, better on no cost in the objective: " + "; ".join(said)
