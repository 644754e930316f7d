"""Writing a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from pipeline.errors import StoreError


def write_whole(path: Path, data: bytes) -> None:
    """Write ``data`` beside ``path`` and rename it, so that a failure leaves what was there before.

    Raises:
        StoreError: The folder cannot be made or written, or the disk is full.
    """
    staging = path.with_name(f".{os.getpid()}.tmp-{path.name}"[:200])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.write_bytes(data)
        staging.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            staging.unlink()
        raise StoreError(
            f"The file could not be written: {error.strerror or error}.",
            where=str(path),
            fix="Free some disk space or choose another folder.",
        ) from error
