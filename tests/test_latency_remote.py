"""A bundle over a real ssh: a server of the test's own on the loopback, with keys of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bare import bare_python

from nas.errors import TableError
from nas.files import read_sealed
from nas.latency import Device
from nas.latency.bundle import PARTIAL, RESULT, read_measurements, write_bundle
from nas.latency.measure import MIN_ROUNDS
from nas.latency.remote import run_over_ssh
from nas.parts import Conv, Part

PART = Part((Conv(8, 3, activation="relu6"),), (8, 12, 12))
SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
needs_sshd = pytest.mark.skipif(
    not (SSHD and shutil.which("ssh") and shutil.which("ssh-keygen")), reason="OpenSSH's server is not installed"
)


@dataclass(frozen=True)
class Server:
    """A running sshd: how to reach it, and the home directory that its sessions get."""

    options: tuple[str, ...]
    home: Path
    python: Path

    @property
    def left(self) -> list[Path]:
        """Bundles that lie on the remote side."""
        return sorted((self.home / ".cache" / "nas" / "bundles").glob("*"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, home, port = tmp_path_factory.mktemp("ssh"), tmp_path_factory.mktemp("home"), free_port()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized_keys")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where a privileged server wants to separate its privileges
    (folder / "config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized_keys\n"
        f"StrictModes no\nPasswordAuthentication no\nUsePAM no\nPidFile none\nSetEnv HOME={home}\n"
    )
    log = (folder / "log").open("w")
    process = subprocess.Popen([str(SSHD), "-D", "-e", "-f", folder / "config"], stderr=log)
    options = (
        "-p", str(port), "-i", str(folder / "user"), "-F", "none", "-o", "StrictHostKeyChecking=no",
        "-o", f"UserKnownHostsFile={folder}/known_hosts", "-o", "IdentitiesOnly=yes", "-o", "LogLevel=ERROR",
    )  # fmt: skip
    try:
        for _ in range(50):
            probe = subprocess.run(
                ["ssh", *options, "127.0.0.1", "echo $HOME"], capture_output=True, text=True, check=False
            )
            if probe.returncode == 0 or process.poll() is not None:
                break
            time.sleep(0.1)
        if probe.returncode or probe.stdout.strip() != str(home):
            pytest.skip(f"sshd does not work here: {probe.stderr}{(folder / 'log').read_text()}")
        yield Server(options, home, bare_python(folder))
    finally:
        process.terminate()
        process.wait()
        log.close()


def bundle(folder: Path, **scenario: Any) -> Path:
    models = {"a": PART.to_onnx(), "b": Part((Conv(32, 3),), (8, 12, 12)).to_onnx()}
    write_bundle(folder, models, PART.to_onnx(), {"seconds": 0.0, "calls": 2, **scenario}, {"for": "me"})
    return folder


@needs_sshd
def test_there_and_back(server: Server, tmp_path: Path) -> None:
    folder, said = bundle(tmp_path / "b"), []
    (folder / "notes.txt").write_text("stay here")
    result = run_over_ssh(
        "127.0.0.1", folder, python=str(server.python), ssh_options=server.options, progress=said.append
    )
    assert result == read_measurements(folder)
    assert list(result.measurement.samples) == ["a", "b"]
    assert result.facts == {"for": "me"}
    assert result.device == Device.local()
    assert [line for line in said if line.startswith(f"round {MIN_ROUNDS},")]
    assert server.left == []
    # once more, with the file of the first time in the folder
    run_over_ssh("127.0.0.1", folder, python=str(server.python), ssh_options=server.options, seconds=0.01)


@needs_sshd
def test_an_interrupted_measurement_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    folder = bundle(tmp_path / "b", seconds=1000.0, max_rounds=1_000_000)

    class Enough(Exception):
        pass

    def stop(line: str) -> None:
        if line.startswith("round 3,"):
            raise Enough

    with pytest.raises(Enough):
        run_over_ssh("127.0.0.1", folder, python=str(server.python), ssh_options=server.options, progress=stop)
    (left,) = server.left
    for _ in range(100):
        if (left / PARTIAL).exists():
            break
        time.sleep(0.1)
    kept = read_sealed(left / PARTIAL)["rounds"]
    assert kept >= 3
    said: list[str] = []
    result = run_over_ssh(
        "127.0.0.1", folder, python=str(server.python), ssh_options=server.options, seconds=0.0, progress=said.append
    )
    assert f"going on after {kept} rounds" in said
    assert result.measurement.rounds == max(kept, MIN_ROUNDS)
    assert server.left == []


@needs_sshd
@pytest.mark.parametrize(
    ("python", "complaint"),
    [
        ("/no/such/python", r"cannot run '/no/such/python': .*not found"),
        (f"{sys.executable} -S -E", r"measurement on 127.0.0.1 failed: run.py needs .*pip install numpy onnxruntime"),
        ("false", "failed: exit status 1, and it said nothing"),
    ],
)
def test_what_the_host_lacks(server: Server, tmp_path: Path, python: str, complaint: str) -> None:
    folder = bundle(tmp_path / "b")
    with pytest.raises(TableError, match=complaint):
        run_over_ssh("127.0.0.1", folder, python=python, ssh_options=server.options)
    assert not (folder / RESULT).exists()
    for path in server.left:
        shutil.rmtree(path)


@needs_sshd
def test_what_the_script_refuses_there_is_said_here(server: Server, tmp_path: Path) -> None:
    folder = bundle(tmp_path / "b", provider="abacus")
    with pytest.raises(TableError, match=r"failed: run.py: onnxruntime .* has no provider 'abacus'"):
        run_over_ssh("127.0.0.1", folder, python=str(server.python), ssh_options=server.options)
    for path in server.left:
        shutil.rmtree(path)


@needs_sshd
def test_a_shell_that_greets(server: Server, tmp_path: Path) -> None:
    """Some people's start-up files print something; it must not end up in the measurements."""
    talkative = tmp_path / "python"
    talkative.write_text(f'#!/bin/sh\necho "Welcome!" >&3\nexec {server.python} "$@"\n')
    talkative.chmod(0o755)
    python = f"true; exec 3>&1; echo Hello; {talkative}"
    result = run_over_ssh("127.0.0.1", bundle(tmp_path / "b"), python=python, ssh_options=server.options)
    assert result.facts == {"for": "me"}


@needs_sshd
def test_a_key_that_is_not_welcome(server: Server, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "stranger"], check=True)
    options = [str(tmp_path / "stranger") if o.endswith("/user") else o for o in server.options]
    with pytest.raises(TableError, match=r"ssh cannot reach 127.0.0.1: .*Permission denied"):
        run_over_ssh("127.0.0.1", bundle(tmp_path / "b"), ssh_options=options)


@needs_sshd
def test_a_home_where_nothing_can_be_written(server: Server, tmp_path: Path) -> None:
    (server.home / ".cache" / "nas").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(server.home / ".cache" / "nas" / "bundles", ignore_errors=True)
    (server.home / ".cache" / "nas" / "bundles").write_text("a file in the way")
    try:
        with pytest.raises(TableError, match=r"127\.0\.0\.1 cannot make a folder"):
            run_over_ssh("127.0.0.1", bundle(tmp_path / "b"), ssh_options=server.options)
    finally:
        (server.home / ".cache" / "nas" / "bundles").unlink()


@pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh")
def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"ssh cannot reach 127.0.0.1: .*Connection refused"):
        run_over_ssh("127.0.0.1", bundle(tmp_path / "b"), ssh_options=("-p", str(free_port()), "-F", "none"))


def test_without_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bundle(tmp_path / "b")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TableError, match="no ssh on this machine"):
        run_over_ssh("board", folder)


@pytest.mark.parametrize("host", ["", "-oProxyCommand=touch pwned"])
def test_what_is_no_host(tmp_path: Path, host: str) -> None:
    with pytest.raises(TableError, match="is no host"):
        run_over_ssh(host, bundle(tmp_path / "b"))


def test_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="is no bundle"):
        run_over_ssh("board", tmp_path)
    (bundle(tmp_path / "b") / "run.py").unlink()
    with pytest.raises(TableError, match=r"is no bundle: it has no run\.py"):
        run_over_ssh("board", tmp_path / "b")
