"""Serve a build on this machine: the real tritonserver on loopback, until it is stopped."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import PublishError
from pipeline.notices import notice
from pipeline.triton.repository import CONFIG
from pipeline.triton.server import Installation, Server, find_server
from pipeline.triton.twin import write_twin


def repository_of(path: Path) -> Path:
    """Return the model repository in a build directory, or ``path`` itself if it is one.

    Raises:
        PublishError: There is none.
    """
    for candidate in (path / "triton", path):
        if candidate.is_dir() and any((folder / CONFIG).is_file() for folder in candidate.iterdir()):
            return candidate
    raise PublishError(
        "There is no model repository here.",
        where=str(path),
        fix="Name a build directory that was published (`python -m pipeline build` with the target cpu), or a repository.",
    )


@contextmanager
def serving(
    path: Path,
    *,
    environment: Path | None = None,
    http_port: int = 0,
    grpc_port: int = 0,
    installation: Installation | None = None,
) -> Iterator[Server]:
    """Run tritonserver over a build or repository while the block runs.

    A server without the onnxruntime backend gets a twin of the repository, with ONNX Runtime in the python backend; a
    notice says so.

    Raises:
        MissingError: There is no tritonserver.
        PublishError: There is no repository, or the server refuses it.
    """
    repository, found = repository_of(path), installation or find_server(environment)
    with tempfile.TemporaryDirectory(prefix="repository.") as folder:
        if not found.has_onnxruntime:
            repository = write_twin(repository, Path(folder) / "twin")
            notice(
                "served-by-twin",
                "This tritonserver has no onnxruntime backend: ONNX Runtime runs in its python backend.",
            )
        with Server(repository.resolve(), found, http_port=http_port, grpc_port=grpc_port) as server:
            server.wait_until_ready()
            yield server


def serve(path: Path, say: Callable[[str], None], **options: Path | int | None) -> int:
    """Serve until the server ends or the user stops it; return the exit code."""
    with serving(path, **options) as server:  # type: ignore[arg-type]
        names = sorted(d.name for d in repository_of(path).iterdir() if (d / CONFIG).is_file())
        say(f"serving {', '.join(names)}")
        say(f"  http     http://{server.url}/v2/models/{names[0]}")
        say(f"  grpc     {server.grpc_url}")
        say(f"  metrics  http://127.0.0.1:{server.metrics_port}/metrics")
        say("stop with Ctrl-C")
        try:
            return server.process.wait()
        except KeyboardInterrupt:
            return 0
