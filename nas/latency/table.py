"""Latency tables: part key → measurements on one device, with the fit to whole nets and full provenance."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nas.errors import TableError
from nas.files import digest, write_json
from nas.latency.check import SCHEMA_VERSION, problems, read, rebuild, remedy
from nas.latency.fit import FitError, LinearFit
from nas.latency.keys import nearest
from nas.latency.measure import Timing


@dataclass(frozen=True)
class Entry:
    """What one part costs.

    Attributes:
        timing: milliseconds of one call; where the part was not measured, as they are expected to be.
        value: the aggregated ms that sums use.
        fused: operators that the runtime really executed → how many.
        measured: whether the part itself was; otherwise it was interpolated between parts that were.
        uncertainty: of ``value``, relative, one standard deviation: repeatability, or that of the interpolation.
        energy_mj: millijoules of one call; None where the machine cannot say.
        weight_bytes, peak_bytes: of the stored weights, and of the activations that live at one time at most, for the
            device's batch: arithmetic, and None where it is not known what the part is made of.
        correction: relative, of what it contributes to the latency of a whole network, beside the fit.
    """

    timing: Timing
    value: float
    fused: dict[str, int] = field(default_factory=dict)
    measured: bool = True
    uncertainty: float = 0.0
    energy_mj: float | None = None
    weight_bytes: int | None = None
    peak_bytes: int | None = None
    correction: float = 0.0


@dataclass(frozen=True)
class Net:
    """A whole network that sums of parts are fitted to.

    Attributes:
        parts: part key → how many of it the network executes.
        measured_ms, p95_ms, size_bytes: as measured.
        predicted_ms: by a fit that did not see it.
        plain_sum_ms: of the parts as measured one by one.
        source: where it comes from: ``calibration``, or the finalist of a search.
    """

    parts: dict[str, int]
    measured_ms: float
    p95_ms: float
    size_bytes: float
    predicted_ms: float
    plain_sum_ms: float
    source: str = "calibration"


@dataclass(frozen=True)
class LatencyTable:
    """A table for one device.

    Attributes:
        space: name of the space that it was built for (keys of other spaces may be in it too).
        device: as :meth:`Device.as_dict` gives it; of imported tables, what is known.
        entries: part key → entry.
        fits: cost name (``latency_ms``, ``latency_p95_ms``, ``size_bytes``) → fit to whole nets.
        errors: cost name → leave-one-out error of that fit.
        noise: relative difference between two halves of the rounds on whole nets.
        nets: the networks that the fits come from.
        protocol: how it was measured.
        date, nas_version: when and by what.
        interpolation: how well parts that were held out are predicted by the others, where parts are interpolated.
        energy: what the energy figures come from, or why there are none.
        origin: source and licence of figures that were not measured by this framework.
    """

    space: str
    device: dict[str, Any]
    entries: dict[str, Entry]
    fits: dict[str, LinearFit]
    errors: dict[str, FitError]
    noise: float
    nets: list[Net]
    protocol: dict[str, Any]
    date: str
    nas_version: str
    interpolation: dict[str, Any] = field(default_factory=dict)
    energy: str = ""
    origin: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Readable name: space and device."""
        return f"{self.space}-{self.device['name']}"

    def entry(self, key: str) -> Entry:
        """The entry of a part key; raises TableError naming the nearest one where it is missing."""
        if key not in self.entries:
            raise self.lacks([key], 1)
        return self.entries[key]

    def lacks(self, missing: list[str], wanted: int, space: str = "") -> TableError:
        """The error for parts that the table does not have.

        Args:
            wanted: how many parts were asked for.
            space: name of the space that asks for them.
        """
        near = nearest(missing[0], self.entries)
        return TableError(
            f"Table {self.name!r} lacks {len(missing)} of {wanted} parts, the first {missing[0]!r}"
            + (f"; the nearest that it has is {near!r}." if near else ".")
            + (f" It was built for space {self.space!r}, not {space!r}." if space not in ("", self.space) else ""),
            remedy="a network of blocks that its publisher measured, or another table (`nas tables list`)"
            if self.origin
            else rebuild(space or self.space) + ", with the settings that the space has here",
        )

    def error(self, cost: str) -> FitError:
        """How far off sums of parts are for a cost.

        Raises:
            TableError: nobody knows, because they were never compared with whole networks.
        """
        if cost not in self.errors:
            raise TableError(
                f"Table {self.name!r} has no error for {cost}: its sums were never compared with whole networks.",
                expected="a table that was fitted to whole networks",
                remedy=rebuild(self.space),
            )
        return self.errors[cost]

    def missing(self, keys: list[str]) -> list[str]:
        """Keys that the table lacks."""
        return [key for key in keys if key not in self.entries]

    # ---- files -------------------------------------------------------------------------------

    def _content(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "unit": "ms",
            "space": self.space,
            "device": self.device,
            "date": self.date,
            "nas_version": self.nas_version,
            "noise": self.noise,
            "errors": {cost: asdict(error) for cost, error in self.errors.items()},
            "protocol": self.protocol,
            "fits": {cost: fit.as_dict() for cost, fit in self.fits.items()},
            "interpolation": self.interpolation,
            "energy": self.energy,
            "origin": self.origin,
            "nets": [asdict(net) for net in self.nets],
            "entries": {key: _plain_entry(entry) for key, entry in self.entries.items()},
        }

    @property
    def sha256(self) -> str:
        """Digest of the content; an edited file no longer has its own."""
        # Through JSON once, so that tuples and lists have one form before and after a file.
        return digest(json.loads(json.dumps(self._content())))

    def save(self, path: Path) -> None:
        """Write atomically."""
        write_json(path, {**self._content(), "sha256": self.sha256})

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Read and check a table file.

        Raises:
            TableError: unreadable, truncated, edited, of another schema or unit, with a key twice, or with values that
                are no times.
        """
        raw = read(path)
        wrong = [problem.text for problem in problems(raw) if problem.fatal]
        if wrong:
            more = f" (and {len(wrong) - 1} more: `nas tables validate` lists them)" if len(wrong) > 1 else ""
            colon = "" if wrong[0].startswith(("is ", "does ")) else ":"
            raise TableError(f"{path}{colon} {wrong[0]}{more}.", remedy=remedy(raw))
        return cls._parse(raw)

    @classmethod
    def _parse(cls, raw: dict[str, Any]) -> LatencyTable:
        return cls(
            space=raw["space"],
            device=raw["device"],
            entries={key: _entry(e) for key, e in raw["entries"].items()},
            fits={cost: LinearFit(**{k: _plain_tuple(v) for k, v in f.items()}) for cost, f in raw["fits"].items()},
            errors={cost: FitError(**e) for cost, e in raw["errors"].items()},
            noise=raw["noise"],
            nets=[Net(**net) for net in raw["nets"]],
            protocol=raw["protocol"],
            date=raw["date"],
            nas_version=raw["nas_version"],
            interpolation=raw["interpolation"],
            energy=raw["energy"],
            origin=raw["origin"],
        )


def _plain_entry(entry: Entry) -> dict[str, Any]:
    plain = asdict(entry)
    return {**plain.pop("timing"), **plain}


def _entry(e: dict[str, Any]) -> Entry:
    timing = Timing(e["p50"], e["p95"], e["mean"], e["n"], e["noise"])
    return Entry(
        timing, e["value"], e["fused"], e["measured"], e["uncertainty"], e["energy_mj"],
        e.get("weight_bytes"), e.get("peak_bytes"), e.get("correction", 0.0),
    )  # fmt: skip


def _plain_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
