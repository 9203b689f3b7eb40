"""A bundle measured on a machine that ssh reaches: sent, run, fetched and removed in one connection."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import tarfile
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from nas.errors import TableError
from nas.files import read_sealed, write_atomic
from nas.latency.bundle import CODE, RESULT, SCRIPT, BundleResult, read_measurements

SENT = ("bundle.json", "models", *CODE.values())
#: Exit statuses of the remote shell; those of the script and of ssh itself are others.
NO_FOLDER, NO_TAR = 71, 72
MARKER = "--- measurements ---"  # before it stands whatever the remote shell says when it starts
#: Models in, progress on stderr, the measurements on stdout. What an interrupted run left there is gone on with; the
#: folder is in the home directory, because nobody else can write there.
REMOTE = """
umask 077
folder="$HOME/.cache/nas/bundles/{name}"
mkdir -p "$folder" && cd "$folder" || exit {no_folder}
tar -xof - || exit {no_tar}
{python} {script} --resume{options} </dev/null >&2 || exit
echo "{marker}" && cat {result} && cd / && rm -rf "$folder"
"""


def run_over_ssh(
    host: str,
    folder: Path,
    *,
    python: str = "python3",
    ssh_options: Sequence[str] = (),
    seconds: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> BundleResult:
    """Measure a bundle on ``host``, and put its ``measurements.json`` into ``folder``.

    Args:
        host: as ssh takes it: ``pi@board`` or a name of ``~/.ssh/config``. It needs a POSIX shell and tar.
        folder: a bundle.
        python: the remote command that starts Python with numpy and onnxruntime, such as ``~/venv/bin/python``.
        ssh_options: for ssh, before the host: ``("-p", "2222", "-i", "key")``. No password is asked for unless
            ``-o BatchMode=no`` is among them.
        seconds: measuring time, instead of the bundle's.
        progress: called with each line that the remote script says.

    Raises:
        TableError: there is no ssh, the host cannot be reached, lacks something, or the measurement fails. What was
            measured before stays on the host, and the next call for the same bundle goes on with it.
    """
    if not host or host.startswith("-"):
        raise TableError(f"{host!r} is no host.", expected="user@machine, or a name that ssh knows")
    try:
        name = read_sealed(folder / "bundle.json")["sha256"][:16]
        if missing := [path for path in SENT if not (folder / path).exists()]:
            raise ValueError(f"it has no {missing[0]}")
    except (OSError, ValueError) as error:
        raise TableError(f"{folder} is no bundle: {error}.", remedy="write it again") from error
    options = "" if seconds is None else f" --seconds {seconds:g}"
    script = REMOTE.format(
        name=name, python=python, script=SCRIPT, options=options, result=RESULT, marker=MARKER,
        no_folder=NO_FOLDER, no_tar=NO_TAR,
    )  # fmt: skip
    # Options of the user's come first, because ssh keeps the first value that it is given.
    quiet = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=30")
    command = ["ssh", *ssh_options, *quiet, "--", host, f"sh -c {shlex.quote(script)}"]
    with tempfile.TemporaryFile() as fetched:
        status, said = _run(command, folder, fetched, progress)
        if status:
            raise _failure(host, python, status, said)
        fetched.seek(0)
        write_atomic(folder / RESULT, fetched.read().rpartition(f"{MARKER}\n".encode())[2])
    return read_measurements(folder)


def _run(
    command: Sequence[str], folder: Path, output: IO[bytes], progress: Callable[[str], None] | None
) -> tuple[int, list[str]]:
    """Exit status, and the last lines that were said."""
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.PIPE)
    except FileNotFoundError:
        raise TableError("There is no ssh on this machine.", remedy="install OpenSSH's client") from None
    said: deque[str] = deque(maxlen=20)
    with process:
        try:
            # The remote side reads all of it before it says more than a pipe holds; where it hangs up, it says why.
            with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # type: ignore[union-attr]
                _send(folder, pipe)
            for line in process.stderr or ():
                if text := line.decode(errors="replace").strip():
                    said.append(text)
                    if progress is not None:
                        progress(text)
            return process.wait(), list(said)
        finally:
            if process.poll() is None:  # the remote script ends when it next wants to say something
                process.terminate()


def _send(folder: Path, pipe: IO[bytes]) -> None:
    """What the remote side needs as a tar, and nothing else that may lie in the folder."""
    with tarfile.open(fileobj=pipe, mode="w|") as archive:
        for name in SENT:
            archive.add(folder / name, name)


def _failure(host: str, python: str, status: int, said: Sequence[str]) -> TableError:
    last = said[-1] if said else f"exit status {status}, and it said nothing"
    if status == 255:
        return TableError(f"ssh cannot reach {host}: {last}", remedy=f"does `ssh {host} true` work without a password?")
    if status == NO_FOLDER:
        return TableError(f"{host} cannot make a folder in its home directory: {last}")
    if status == NO_TAR:
        return TableError(f"{host} cannot unpack the bundle: {last}", expected="tar, and room on its disk")
    if status in (126, 127):
        return TableError(f"{host} cannot run {python!r}: {last}", remedy="name its Python with numpy and onnxruntime")
    return TableError(f"The measurement on {host} failed: {last}")
