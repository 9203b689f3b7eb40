"""Measure this bundle's models on this machine. Needs Python 3.9 or newer, numpy and onnxruntime, nothing else.

python run.py                measure, and write measurements.json
python run.py --resume       go on after an interruption (Ctrl-C keeps every round that was finished)
python run.py --seconds 60   measure for another time than the bundle says
"""

import argparse
import datetime
import hashlib
import platform
import signal
import sys
import time
from pathlib import Path

# Plain on purpose: this file is copied into every bundle and must run anywhere, or say why it does not.
try:
    if sys.version_info < (3, 9):
        raise ImportError("this is Python " + platform.python_version())
    import numpy as np
    import onnxruntime  # noqa: F401
except ImportError as error:
    print("run.py needs Python 3.9, numpy and onnxruntime (%s): pip install numpy onnxruntime" % error, file=sys.stderr)
    sys.exit(2)

from energy import metered, nvml, rapl
from files import read_sealed, write_sealed
from hardware import machine, nvidia_gpu, visible_gpu
from measure import MIN_ROUNDS, Samples, interleave
from sessions import Session, SessionError, gpu_index, graph_name, provider_name, version

HERE = Path(__file__).resolve().parent
RESULT, PARTIAL = HERE / "measurements.json", HERE / "measurements.partial.json"
SCHEMA_VERSION = 1
SAY_EVERY, SAVE_EVERY = 1.0, 10.0  # seconds


class Refusal(Exception):
    """What the user can mend, in one line."""


def say(text, end="\n"):
    """On stderr; a line that is still growing is overwritten where somebody watches it."""
    watched = sys.stderr.isatty()
    print(("\r\033[K" if watched else "") + text, end=end if watched else "\n", file=sys.stderr, flush=True)


def read(path, remedy):
    """A JSON file that carries its own digest."""
    try:
        return read_sealed(path)
    except (OSError, ValueError) as error:
        raise Refusal("%s cannot be used (%s): %s" % (path.name, error, remedy)) from error


def read_bundle():
    """bundle.json, checked together with the models beside it."""
    bundle = read(HERE / "bundle.json", "copy the bundle again")
    for entry in [bundle["yardstick"], *bundle["models"].values()]:
        path = HERE / entry["file"]
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            raise Refusal(entry["file"] + " is missing, damaged or edited: copy the bundle again")
    return bundle


def device_of(scenario):
    """This machine with the bundle's scenario, in the words of a latency table."""
    provider, graph = provider_name(scenario["provider"]), graph_name(scenario["graph"])
    gpu = gpu_index(provider)
    return {
        **machine(), "name": "", "runtime": "onnxruntime", "runtime_version": version(), "threads": scenario["threads"],
        "batch": scenario["batch"], "provider": provider, "graph": graph,
        "accelerator": "" if gpu is None else nvidia_gpu(gpu) or "NVIDIA GPU",
    }  # fmt: skip


def begin(bundle, device, resume):
    """What a measurement starts from: nothing, or what an earlier one left."""
    if not PARTIAL.exists():
        empty = {name: {"calls": [], "yardstick": []} for name in bundle["models"]}
        return {"bundle": bundle, "device": device, "complete": False, "rounds": 0, "seconds": 0.0, "samples": empty}
    if not resume:
        raise Refusal("an unfinished measurement is in " + PARTIAL.name + ": go on with --resume, or delete it")
    state = read(PARTIAL, "delete it")
    if state["bundle"] != bundle or state["device"] != device:
        raise Refusal(PARTIAL.name + " is of another bundle, or the machine has changed: delete it")
    say("going on after %d rounds" % state["rounds"])
    return state


def measure(state, sessions, yardstick, seconds):
    """Round after round, until the time is over or the watched models repeat; a round is kept whole or not at all."""
    scenario, saved, said = state["bundle"]["scenario"], time.monotonic(), 0.0
    while state["rounds"] < scenario["max_rounds"]:
        if state["rounds"] >= MIN_ROUNDS:
            noise = [Samples(**state["samples"][name]).timing().noise for name in scenario["watch"]]
            if state["seconds"] > seconds or (noise and np.mean(noise) <= scenario["target_noise"]):
                break
        seed = scenario["seed"] + state["rounds"]
        seen = interleave(sessions, yardstick, seconds=1.0, max_rounds=1, calls=scenario["calls"], seed=seed)
        for name, samples in seen.samples.items():
            state["samples"][name]["calls"] += [[round(ms, 6) for ms in visit] for visit in samples.calls]
            state["samples"][name]["yardstick"] += [round(ms, 6) for ms in samples.yardstick]
        state["rounds"] += 1
        state["seconds"] += seen.seconds
        if state["rounds"] > MIN_ROUNDS and time.monotonic() - said < SAY_EVERY:
            continue
        said, least = time.monotonic(), (MIN_ROUNDS - state["rounds"]) * state["seconds"] / state["rounds"]
        left = max(0.0, seconds - state["seconds"], least)
        say("round %d, %.0f s, about %.0f s left" % (state["rounds"], state["seconds"], left), end="")
        if time.monotonic() - saved > SAVE_EVERY:
            save(PARTIAL, state)
            saved = time.monotonic()


def save(path, state):
    """With the date, and what measured."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    write_sealed(path, {**state, "schema_version": SCHEMA_VERSION, "python": platform.python_version(), "date": now})


def main():
    """Measure; what the user can mend is raised as a Refusal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--seconds", type=float)
    options, bundle = parser.parse_args(), read_bundle()
    seconds = bundle["scenario"]["seconds"] if options.seconds is None else options.seconds
    if options.resume and RESULT.exists() and read(RESULT, "delete it")["bundle"] == bundle:
        return say("measured already: " + RESULT.name)
    device, sessions = device_of(bundle["scenario"]), {}
    state = begin(bundle, device, options.resume)
    scenario = {key: device[key] for key in ("threads", "batch", "provider", "graph")}
    yardstick = Session(str(HERE / bundle["yardstick"]["file"]), bound=True, **scenario)
    parts = set(bundle["scenario"]["parts"])
    for name, entry in bundle["models"].items():
        say("loading %d of %d" % (len(sessions) + 1, len(bundle["models"])), end="")
        sessions[name] = Session(str(HERE / entry["file"]), bound=name in parts, **scenario)
    state["fused"] = {name: session.fused() for name, session in sessions.items()}
    try:
        measure(state, sessions, yardstick, seconds)
        gpu, wanted = gpu_index(device["provider"]), bundle["scenario"]["energy"]
        meter = rapl() if gpu is None else nvml(visible_gpu(gpu), device["accelerator"])
        runs = {name: sessions[name] for name in wanted}
        state["energy"] = metered(meter, runs, bundle["scenario"]["energy_seconds"])
    finally:
        if state["rounds"]:
            save(PARTIAL, state)
    save(RESULT, {**state, "complete": True})
    PARTIAL.unlink()
    say("%d models in %d rounds: send %s back" % (len(sessions), state["rounds"], RESULT.name))


if __name__ == "__main__":
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # SIGINT too: a shell's background job would ignore it
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        main()
    except (Refusal, SessionError) as error:
        print("\nrun.py: " + str(error), file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, BrokenPipeError):
        kept = "go on with --resume" if PARTIAL.exists() else "before the first round was finished"
        print("\nrun.py: interrupted, " + kept, file=sys.stderr)
        sys.exit(130)
