"""A measurement on disk: what an interrupted session saw, so that the next one goes on with it."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np

from nas.errors import TableError
from nas.files import write_atomic
from nas.latency.measure import Measurement, Samples

REMEDY = "delete it, or profile without --resume"


def save(path: Path, seen: Measurement, identity: str) -> None:
    """Write atomically; ``identity`` says what was measured, where."""
    names = list(seen.samples)
    buffer = io.BytesIO()
    head = {"identity": identity, "names": names, "reference": seen.reference, "seconds": seen.seconds}
    np.savez_compressed(
        buffer,
        head=np.frombuffer(json.dumps(head).encode(), np.uint8),
        calls=np.array([seen.samples[name].calls for name in names], np.float32),
        yardstick=np.array([seen.samples[name].yardstick for name in names], np.float32),
    )
    write_atomic(path, buffer.getvalue())


def load(path: Path) -> tuple[Measurement, str]:
    """The measurement and its identity.

    Raises:
        TableError: the file is damaged.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            head = json.loads(file["head"].tobytes())
            calls, yardstick = file["calls"].astype(float), file["yardstick"].astype(float)
        if not (np.isfinite(calls).all() and (calls > 0).all() and np.isfinite(yardstick).all()):
            raise ValueError("times that are no times")
        pairs = zip(head["names"], calls.tolist(), yardstick.tolist(), strict=True)
        samples = {name: Samples(visits, beside) for name, visits, beside in pairs}
        return Measurement(samples, head["reference"], head["seconds"], calls.shape[1]), str(head["identity"])
    except (EOFError, OSError, ValueError, KeyError, IndexError, TypeError, zipfile.BadZipFile) as error:
        raise TableError(f"{path} is no measurement that can be gone on with: {error}.", remedy=REMEDY) from error
