"""Runs an export in a process of its own.

torch costs hundreds of megabytes that only the end of a process gives back, prints what it likes, and runs the
user's code; none of that reaches this process. The child speaks JSON lines on its standard output: ``progress``,
``notice``, then ``done`` or ``error``. Whatever anything prints there goes to standard error instead, which is kept
and shown only when the child dies.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

from pipeline import errors
from pipeline.errors import SourceError
from pipeline.notices import notice
from pipeline.sources.job import Job
from pipeline.types import Progress

TIMEOUT_SECONDS = 3600.0
"""An export that takes longer is stopped with an error: it hangs, or the model is too large for this machine."""


def run(job: Job, out: Path, progress: Progress, *, timeout_seconds: float = TIMEOUT_SECONDS) -> float:
    """Export ``job`` into the folder ``out`` and return the largest relative difference from torch.

    Raises:
        SourceError: The child said why, died, or took longer than ``timeout_seconds``.
        PipelineError: Any other error that the child reported, under its own class.
    """
    with tempfile.TemporaryFile() as stderr:
        # -P: the working directory may hold a downloaded model, and a json.py in it must not be imported.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.sources.torch_child", job.dumps(), str(out.resolve())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=_environment(),
            text=True,
            encoding="utf-8",
        )
        timed_out = threading.Event()

        def stop() -> None:
            timed_out.set()
            process.kill()

        timer = threading.Timer(timeout_seconds, stop)
        timer.start()
        try:
            assert process.stdout is not None
            final = _listen(process.stdout, progress)
            process.wait()
        finally:  # also on Ctrl-C: the child must not go on alone
            timer.cancel()
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if final is not None:
            return _result(final)
        raise _death(job, process.returncode, stderr, timeout_seconds if timed_out.is_set() else None)


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])  # so that a checkout that is not installed works too
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"}


def _listen(stream: IO[str], progress: Progress) -> dict[str, Any] | None:
    final: dict[str, Any] | None = None
    for line in stream:
        message = json.loads(line)
        if "progress" in message:
            progress(*message["progress"])
        elif "notice" in message:
            notice(message["notice"]["code"], message["notice"]["message"], where=message["notice"]["where"])
        else:
            final = message
    return final


def _result(final: dict[str, Any]) -> float:
    if "done" in final:
        return float(final["done"])
    error = final["error"]
    kind = getattr(errors, error["kind"], SourceError)
    raise kind(error["what"], where=error["where"], fix=error["fix"])


def _death(job: Job, code: int, stderr: IO[bytes], timeout_seconds: float | None) -> SourceError:
    if timeout_seconds is not None:
        return SourceError(
            f"The export was stopped after {timeout_seconds:g} seconds.",
            where=job.target,
            fix="Look for a loop or a download that hangs in the model's code, or export to .onnx yourself.",
        )
    stderr.seek(0)
    lines = stderr.read().decode("utf-8", "replace").strip().splitlines()
    last = lines[-1][:500] if lines else "it said nothing"
    killed = " (killed; perhaps out of memory)" if code == -9 else ""
    return SourceError(
        f"The process that exports the model died with exit code {code}{killed}: {last}",
        where=job.target,
        fix="See the message; a machine with more memory, or a smaller model, may be needed.",
    )
