"""What a file or folder holds, as one SHA-256; remembered, so that a file that did not change is read once."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import StoreError

JSON = None | bool | int | float | str | list[Any] | tuple[Any, ...] | Mapping[str, Any]
"""What a stage's key may be made of; a :class:`~pathlib.Path` anywhere inside stands for the content there."""

_SETTLED_NS = 50_000_000
"""A file written less than 50 ms ago is not remembered: a second write could leave its time and size as they are."""


class ContentHashes:
    """SHA-256 of files, remembered by (path, size, modification time, inode) in one JSON file.

    Args:
        memory: Where the hashes are kept; a file that cannot be read counts as empty.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        try:
            known = json.loads(memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if isinstance(known, dict):
            self._known = {k: v for k, v in known.items() if isinstance(v, list) and len(v) == 4}

    def of_file(self, path: Path, *, final: Path | None = None) -> str:
        """Return the SHA-256 (hex) of one file.

        Args:
            path: The file.
            final: Where the file is going to be renamed to; it is remembered under that name.
        """
        name = str((final or path).absolute())
        stat = path.stat()
        seen = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self._known.get(name)
        if known is not None and known[:3] == seen:
            return str(known[3])
        settled = time.time_ns() - stat.st_mtime_ns > _SETTLED_NS
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if settled:
            self._known[name] = [*seen, digest]
            self._changed = True
        return digest

    def of_path(self, path: Path) -> str:
        """Return the SHA-256 (hex) of a file, of an ONNX model with its external data, or of a folder's names and files.

        Raises:
            StoreError: There is nothing at ``path``, or it cannot be read.
            ModelError: An ``.onnx`` file that is broken or names data outside its folder.
        """
        try:
            if path.is_dir():
                return _combined({name: self.of_file(file) for name, file in folder_files(path)})
            if path.suffix == ".onnx":
                from pipeline import model  # imports onnx: 0.5 s that other stages do not need

                found = {str(file.relative_to(path.parent)): self.of_file(file) for file in model.files(path)}
                # The model's own name is no content; the names of its data files are in the protobuf.
                return _combined({"": found.pop(path.name), **found})
            return self.of_file(path)
        except OSError as error:
            raise StoreError(
                f"An input of this build cannot be read: {error.strerror or error}.",
                where=str(path),
                fix="Check the path and its permissions.",
            ) from error

    def replaced(self, value: JSON | Path) -> Any:
        """Return ``value`` with every path in it replaced by the hash of its content."""
        if isinstance(value, Path):
            return {"sha256": self.of_path(value)}
        if isinstance(value, Mapping):
            return {str(key): self.replaced(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.replaced(item) for item in value]
        return value

    def save(self) -> None:
        """Write what was learnt, leaving out files that are gone."""
        if not self._changed:
            return
        self._known = {name: seen for name, seen in sorted(self._known.items()) if Path(name).exists()}
        write_atomically(self._memory, canonical(self._known))
        self._changed = False


def folder_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name relative to ``folder`` with ``/``, file) in sorted order; links to folders are not followed."""
    found = [Path(root) / name for root, _, names in os.walk(folder) for name in names]
    yield from sorted((file.relative_to(folder).as_posix(), file) for file in found)


def canonical(value: Any) -> str:
    """Return the one JSON text of ``value``: sorted keys, no spaces, no NaN.

    Raises:
        TypeError: ``value`` holds something that is not JSON.
        ValueError: ``value`` holds a NaN or an infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """Return the SHA-256 (hex) of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical(value).encode("utf-8", "surrogatepass")).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` beside ``path`` and rename it, so that no reader ever sees half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _combined(found: Mapping[str, str]) -> str:
    return digest(sorted(found.items()))
