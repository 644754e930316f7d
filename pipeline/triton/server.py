"""A tritonserver process on loopback: found, started, waited for, stopped."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.errors import MissingError, PublishError
from pipeline.triton.server_flags import server_flags

ENVIRONMENT = "ENGINEWRIGHT_TRITON"
"""Environment variable that names a Python environment with ``nvidia-pytriton``, whose wheel carries tritonserver."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """A tritonserver that can be started here.

    Attributes:
        binary: The server.
        environment: Python environment of the wheel that carries it; ``None`` for a server installed as such (a container).
    """

    binary: Path
    environment: Path | None = None

    @property
    def has_onnxruntime(self) -> bool:
        """Whether the server has NVIDIA's own backends; the wheel's has the python backend alone."""
        return self.environment is None


def find_server(environment: Path | None = None) -> Installation:
    """Return the tritonserver of this machine: on PATH, or in a Python environment with ``nvidia-pytriton``.

    Args:
        environment: The environment; :data:`ENVIRONMENT` and then ``.venv-triton`` in the current folder if not given.

    Raises:
        MissingError: There is none; says how to get one.
    """
    on_path = shutil.which("tritonserver")
    if environment is None and on_path is not None:
        return Installation(binary=Path(on_path))
    named = environment or (Path(os.environ[ENVIRONMENT]) if os.environ.get(ENVIRONMENT) else Path(".venv-triton"))
    found = sorted(named.glob("lib/python3*/site-packages/pytriton/tritonserver/bin/tritonserver"))
    if not found:
        raise MissingError(
            "There is no tritonserver on this machine.",
            where=f"PATH; {named}",
            fix="Run this in Triton's container, or get the server that a wheel carries (Python 3.8 to 3.13, Linux): "
            "python3 -m venv .venv-triton && .venv-triton/bin/pip install nvidia-pytriton==0.7.0 'numpy<2' onnxruntime tokenizers pillow",
        )
    return Installation(binary=found[0].resolve(), environment=named.resolve())


class Server:
    """A running tritonserver; a context manager that stops it.

    Args:
        repository: What it serves.
        installation: Which server.
        http_port: Port for HTTP; 0 takes a free one, and two more for gRPC and metrics.
        grpc_port: Port for gRPC.
        poll_seconds: How often the repository is looked at for new versions; 0 never does.
        keep_going: Start even if some model does not load.

    Raises:
        PublishError: The server does not come up; its own words are kept.
    """

    def __init__(
        self,
        repository: Path,
        installation: Installation,
        *,
        http_port: int = 0,
        grpc_port: int = 0,
        poll_seconds: int = 0,
        keep_going: bool = False,
    ) -> None:
        free = _free_ports(3)
        self.http_port, self.grpc_port, self.metrics_port = http_port or free[0], grpc_port or free[1], free[2]
        self._folder = Path(tempfile.mkdtemp(prefix="tritonserver."))
        self.log = self._folder / "log.txt"
        command = [
            str(installation.binary),
            f"--model-repository={repository}",
            *(f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc")),
            f"--http-port={self.http_port}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-port={self.metrics_port}",
            "--metrics-address=127.0.0.1",
            "--allow-gpu-metrics=false",
            "--exit-timeout-secs=5",
            f"--exit-on-error={'false' if keep_going else 'true'}",
            f"--backend-config=python,shm-region-prefix-name=enginewright{os.getpid()}_{self.http_port}",
        ]
        command += server_flags(repository)
        if poll_seconds:
            command += ["--model-control-mode=poll", f"--repository-poll-secs={poll_seconds}"]
        variables = dict(os.environ)
        if installation.environment is not None:
            command.append(f"--backend-directory={_backends(installation, self._folder)}")
            command.append(f"--cache-directory={installation.binary.parent.parent / 'caches'}")
            variables = _variables(installation, variables)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=variables)

    @property
    def url(self) -> str:
        """Return where it answers, ``127.0.0.1:port``, by HTTP."""
        return f"127.0.0.1:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """Return where it answers by gRPC."""
        return f"127.0.0.1:{self.grpc_port}"

    def wait_until_ready(self, seconds: float = 60.0, *, path: str = "/v2/health/ready") -> None:
        """Return once the server answers ``path`` with 200.

        Raises:
            PublishError: It stopped, or did not become ready in time; its last errors are named.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise self._failed(f"tritonserver stopped with exit code {self.process.returncode}")
            connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=2)
            try:
                connection.request("GET", path)
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            finally:
                connection.close()
            time.sleep(0.1)
        raise self._failed(f"tritonserver did not become ready in {seconds:g} s")

    def errors(self) -> list[str]:
        """Return the log's lines of errors, without time stamps."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line.split("] ", 1)[-1].strip() for line in lines if line.startswith("E")]

    def _failed(self, what: str) -> PublishError:
        said = self.errors()
        return PublishError(
            f"{what}: {said[-1] if said else 'it said nothing'}",
            where=str(self.log),
            fix="Read the log; `python -m pipeline publish` writes the repository again.",
        )

    def stop(self) -> None:
        """Stop the server; kill it if it does not go."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if not isinstance(error, PublishError):  # its message names the log
            shutil.rmtree(self._folder, ignore_errors=True)


def _backends(installation: Installation, folder: Path) -> Path:
    """Return a backend folder with the stub of the environment's Python in it; the wheel keeps one for each version."""
    root = installation.binary.parent.parent
    assert installation.environment is not None
    version = next(p.name for p in sorted((installation.environment / "lib").glob("python3*"))).removeprefix("python")
    out = folder / "backends"
    shutil.copytree(root / "backends" / "python", out / "python")
    shutil.copy(root / "python_backend_stubs" / version / "triton_python_backend_stub", out / "python")
    return out


def _variables(installation: Installation, given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment in which the wheel's server finds its libraries and its stub finds Python."""
    assert installation.environment is not None
    libraries = installation.binary.parents[3] / "nvidia_pytriton.libs"
    path = f"{installation.environment / 'bin'}{os.pathsep}{given.get('PATH', '')}"
    kept = {k: v for k, v in given.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    found = [str(libraries), *filter(None, [given.get("LD_LIBRARY_PATH")])]
    return {**kept, "PATH": path, "LD_LIBRARY_PATH": os.pathsep.join(found)}


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
