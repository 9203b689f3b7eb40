"""Devices: hardware, runtime and scenario (threads, batch), and the fingerprint that ties a table to them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any

import onnx

from nas.files import digest
from nas.latency.energy import Absent, Meter, nvml, rapl
from nas.latency.hardware import machine, visible_gpu
from nas.latency.runtimes import Runner, Runtime, runtimes

PROVENANCE = ("name", "memory_bytes", "system", "governor")


@dataclass(frozen=True)
class Device:
    """What latencies are measured on.

    Attributes:
        name: for people; the default says CPU, runtime and threads.
        cpu, cores: hardware.
        runtime, runtime_version, threads, batch: scenario.
        provider, graph: what executes within the runtime, and how far it may rewrite graphs; "" is its default.
        accelerator: hardware beside the processor that executes; "" where there is none.
        memory_bytes, system, governor: provenance; like the name, no part of the fingerprint. 0 and "" are unknown.
    """

    name: str
    cpu: str
    cores: int
    runtime: str
    runtime_version: str
    threads: int
    batch: int
    provider: str = ""
    graph: str = ""
    accelerator: str = ""
    memory_bytes: int = 0
    system: str = ""
    governor: str = ""

    @classmethod
    def local(
        cls,
        *,
        threads: int = 1,
        batch: int = 1,
        runtime: str = "onnxruntime",
        provider: str = "",
        graph: str = "",
        name: str = "",
    ) -> Device:
        """This machine with the given scenario.

        Raises:
            ContentError: there is no such runtime.
            TableError: the runtime has no such provider or graph level here.
            ExtraError: the runtime's package is not installed.
        """
        opened = runtimes.get(runtime)(provider, graph)
        facts = {
            **machine(), "name": name, "runtime": runtime, "runtime_version": opened.version(), "threads": threads,
            "batch": batch, "provider": opened.provider, "graph": opened.graph, "accelerator": opened.accelerator(),
        }  # fmt: skip
        return cls.from_facts(facts)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Device:
        """A device from its plain form; "" for a name becomes the default one.

        Raises:
            TypeError: a fact that has no default is missing.
        """
        known = {field.name for field in fields(cls)}
        device = cls(**{key: value for key, value in facts.items() if key in known})
        return device if device.name else replace(device, name=device._default_name())

    def _default_name(self) -> str:
        provider = "" if self.accelerator else self.provider.removesuffix("ExecutionProvider")
        batch = f"b{self.batch}" if self.batch > 1 else ""
        words = [self.accelerator or self.cpu, self.runtime, provider, self.graph, f"t{self.threads}", batch]
        return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")

    def load(self, model: onnx.ModelProto, *, part: bool = False) -> Runner:
        """``model``, a whole network or a part of one, ready to run in this device's scenario."""
        runtime = _opened(runtimes.get(self.runtime), self.provider, self.graph)
        load = runtime.load_part if part else runtime.load
        return load(model, threads=self.threads, batch=self.batch)

    def energy_meter(self) -> Meter | Absent:
        """What counts this device's joules on this machine, or why nothing does."""
        if not self.accelerator:
            return rapl()
        return nvml(visible_gpu(int(self.provider.partition(":")[2] or 0)), self.accelerator)

    @property
    def fingerprint(self) -> str:
        """Equal for machines and scenarios whose measurements may be exchanged."""
        return digest(self._facts())[:12]

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """The facts in which another device's plain form differs from this one: ``["threads 2, here 1"]``.

        Empty exactly where the fingerprints agree; what the other does not say is its field's default.
        """
        facts = self._facts()
        theirs = {key: other.get(key, getattr(type(self), key, "unknown")) for key in facts}
        return [
            f"{key.replace('_', ' ')} {theirs[key] or 'default'}, here {value or 'default'}"
            for key, value in facts.items()
            if theirs[key] != value
        ]

    def _facts(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key not in PROVENANCE}

    def as_dict(self) -> dict[str, Any]:
        """Plain form for tables and manifests."""
        return {**asdict(self), "fingerprint": self.fingerprint}


@lru_cache(maxsize=8)
def _opened(kind: type[Runtime], provider: str, graph: str) -> Runtime:
    """Kept, because thousands of parts are loaded and some runtimes look for devices when they are opened."""
    return kind(provider, graph)
