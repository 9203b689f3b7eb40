"""Devices: hardware, runtime and scenario (threads, batch), and the fingerprint that ties a table to them."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from nas.files import digest
from nas.latency.runtimes import Runner, runtimes


@dataclass(frozen=True)
class Device:
    """What latencies are measured on.

    Attributes:
        name: for people; the default says CPU, runtime and threads.
        cpu, cores: hardware.
        runtime, runtime_version, threads, batch: scenario.
        provider, graph: what executes within the runtime, and how far it may rewrite graphs; "" is its default.
        accelerator: hardware beside the processor that executes; "" where there is none.
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
        cpu = cpu_model()
        opened = runtimes.get(runtime)(provider, graph)
        slug = re.sub(r"[^a-z0-9]+", "-", (opened.accelerator() or cpu).lower()).strip("-")
        default = f"{slug}-{runtime}-t{threads}" + (f"-b{batch}" if batch > 1 else "")
        return cls(
            name or default, cpu, os.cpu_count() or 1, runtime, opened.version(), threads, batch, provider, graph,
            opened.accelerator(),
        )  # fmt: skip

    def load(self, model: onnx.ModelProto) -> Runner:
        """``model``, ready to run in this device's scenario."""
        runtime = runtimes.get(self.runtime)(self.provider, self.graph)
        return runtime.load(model, threads=self.threads, batch=self.batch)

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
        return {key: value for key, value in asdict(self).items() if key != "name"}

    def as_dict(self) -> dict[str, Any]:
        """Plain form for tables and manifests."""
        return {**asdict(self), "fingerprint": self.fingerprint}


def cpu_model() -> str:
    """The processor's name and, where it can be read, its model number (virtual machines share names)."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|model)\s*:\s*(.+)$", info, re.MULTILINE))
    name = fields.get("model name") or platform.machine()
    return f"{name} model {fields['model']}" if "model" in fields else name
