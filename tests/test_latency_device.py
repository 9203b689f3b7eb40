"""Devices: what is measured on, and what makes two of them one."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import onnxruntime as ort
import pytest

from nas.errors import ContentError
from nas.latency import Device
from nas.latency.hardware import cpu_model, governor, machine, nvidia_gpu, visible_gpu
from nas.parts import Conv, Part

PART = Part((Conv(8, 3, activation="relu6"),), (4, 8, 8))


def test_the_local_device() -> None:
    device = Device.local()
    assert (device.threads, device.batch, device.runtime) == (1, 1, "onnxruntime")
    assert device.runtime_version == ort.__version__
    assert device.cpu == cpu_model() != ""
    assert device.cores >= 1
    assert {key: value for key, value in device.as_dict().items() if key in machine()} == machine()
    assert Device.from_facts(device.as_dict()) == device
    assert Device.from_facts({**device.as_dict(), "name": ""}) == device
    assert device.name.endswith("-onnxruntime-t1")
    assert Device.local(batch=8, threads=2).name.endswith("-onnxruntime-t2-b8")
    assert Device.local(name="mine").name == "mine"


def test_the_fingerprint_is_everything_but_the_name() -> None:
    device = Device.local()
    assert len(device.fingerprint) == 12
    assert replace(device, name="other").fingerprint == device.fingerprint
    changed = {"cpu": "x", "cores": 99, "runtime": "y", "runtime_version": "0", "threads": 7, "batch": 9}
    prints = {replace(device, **{key: value}).fingerprint for key, value in changed.items()}  # type: ignore[arg-type]
    assert len(prints | {device.fingerprint}) == 7
    assert device.as_dict()["fingerprint"] == device.fingerprint


def test_an_unknown_runtime() -> None:
    with pytest.raises(ContentError, match=r"Unknown runtime 'abacus'[^$]*onnxruntime"):
        Device.local(runtime="abacus")


def test_provenance_is_no_part_of_the_fingerprint() -> None:
    device = Device.local()
    assert device.memory_bytes > 0
    assert platform.release() in device.system
    assert device.governor == governor()
    other = replace(device, memory_bytes=1, system="BeOS 5", governor="powersave")
    assert other.fingerprint == device.fingerprint
    assert other.differences(device.as_dict()) == []


def test_a_gpu_is_part_of_the_fingerprint() -> None:
    device = Device.local()
    gpus = [replace(device, provider="CUDAExecutionProvider", accelerator=name) for name in ("A100", "H100")]
    assert len({d.fingerprint for d in (device, *gpus)}) == 3
    assert gpus[1].differences(gpus[0].as_dict()) == ["accelerator A100, here H100"]


def test_one_name_for_each_provider_and_graph_level() -> None:
    named = Device.local(provider="CPUExecutionProvider", graph="all")
    assert (named.provider, named.graph) == ("", "")
    assert named == Device.local(provider="cpu") == Device.local()
    basic = Device.local(graph="basic")
    assert basic.graph == "basic"
    assert basic.name.endswith("-onnxruntime-basic-t1")
    assert basic.fingerprint != named.fingerprint


def test_differences_are_readable_and_say_which_is_here() -> None:
    here = Device.local()
    there = replace(here, cpu="Cortex-A76", threads=2, graph="basic").as_dict()
    assert here.differences(there) == [
        f"cpu Cortex-A76, here {here.cpu}",
        "threads 2, here 1",
        "graph basic, here default",
    ]
    assert here.differences(here.as_dict()) == []
    old = {key: value for key, value in here.as_dict().items() if key not in ("provider", "graph", "accelerator")}
    assert here.differences(old) == []  # tables from before providers
    assert "runtime unknown, here onnxruntime" in here.differences({})


def test_a_device_loads_models_in_its_scenario() -> None:
    runner = Device.local(batch=3, graph="disabled").load(PART.to_onnx(3))
    (output,) = runner.outputs()
    assert output.shape == (3, 8, 8, 8)
    assert "Clip" in runner.fused()  # nothing was fused


def test_what_the_system_does_not_say(tmp_path: Path) -> None:
    assert governor(tmp_path) == ""
    (tmp_path / "cpu0" / "cpufreq").mkdir(parents=True)
    (tmp_path / "cpu0" / "cpufreq" / "scaling_governor").write_text("schedutil\n")
    assert governor(tmp_path) == "schedutil"
    assert nvidia_gpu(99) == ""


def test_cuda_counts_among_the_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpu(1) == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-1234")
    assert [visible_gpu(i) for i in range(3)] == ["3", "GPU-1234", "2"]
