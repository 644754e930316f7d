"""Resumable stage results in a build directory.

A stage is a function from hashed inputs to files. Its result is kept with the hash of everything it read; a stage
whose inputs did not change and whose files are still what it wrote is skipped. Files are written in a folder of their
own, renamed into place, and the stage's record is written last, so a build that is killed at any point goes on where
it stopped and never shows half a file::

    <build directory>/
      .lock  .stages/owner        one process at a time
      .stages/<stage>.json        key, SHA-256 of every output, facts, notices, seconds
      .stages/hashes.json         hashes remembered by path, size, modification time and inode
      .work/                      what is being written right now
      .begun/<stage>.<key>/       the same of a stage that goes on within itself
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import filelock

from pipeline.content import JSON, ContentHashes, canonical, digest, folder_files, write_atomically
from pipeline.errors import StoreError
from pipeline.notices import Notice, collecting, notice

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """What a stage left behind.

    Attributes:
        name: The stage's name.
        key: SHA-256 (hex) of everything the stage read.
        facts: What ``produce`` returned, as JSON.
        paths: Every declared output and where it is.
        fresh: Whether the stage ran now; ``False`` if an earlier result was still good.
        seconds: Wall-clock seconds the stage took when it ran.
        notices: What it had to say when it ran.
    """

    name: str
    key: str
    facts: dict[str, Any]
    paths: dict[str, Path]
    fresh: bool
    seconds: float
    notices: tuple[Notice, ...]


class Store:
    """The stage results of one build directory.

    Args:
        directory: The build directory; made when the first stage runs.
        force: Run every stage again.
        from_stage: Run this stage and every later one again; ``quantize`` also means ``quantize/cpu``.
    """

    def __init__(self, directory: Path, *, force: bool = False, from_stage: str | None = None) -> None:
        self.directory = directory
        self._rerun = force
        self._from_stage = from_stage
        self._held = False
        self._records = directory / ".stages"
        self._work = directory / ".work"
        self._begun = directory / ".begun"
        self._hashes = ContentHashes(self._records / "hashes.json")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the build directory during the block.

        The operating system frees the lock of a process that was killed; what that process had begun is removed.

        Raises:
            StoreError: Another process is building here, or the directory cannot be written.
        """
        if self._held:
            yield
            return
        with _writing(self.directory, making=True):
            self._records.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.directory / ".lock", timeout=0)
        owner = self._records / "owner"
        try:
            with _writing(self.directory):
                lock.acquire()
        except filelock.Timeout as error:
            raise StoreError(
                f"Another process (pid {_read(owner) or 'unknown'}) is building in this directory.",
                where=str(self.directory),
                fix="Wait for it, stop it, or choose another -o DIR.",
            ) from error
        try:
            with _writing(self.directory):
                owner.write_text(str(os.getpid()), encoding="utf-8")
                _remove(self._work)
            self._held = True
            with _writing(self.directory):
                yield
        finally:
            self._held = False
            owner.unlink(missing_ok=True)
            for folder in (self._work, self._begun):
                with contextlib.suppress(OSError):  # only an empty one goes
                    folder.rmdir()
            lock.release()

    def stage(
        self,
        name: str,
        *,
        inputs: Mapping[str, JSON | Path],
        outputs: Sequence[str],
        produce: Callable[[Path], dict[str, Any] | None],
        resumes: bool = False,
    ) -> StageResult:
        """Return the stage's result, running ``produce`` only if there is none for these inputs.

        Args:
            name: ``prepare``, ``quantize/cpu``: unique in the build directory.
            inputs: Everything the result depends on: JSON, and paths that stand for the content there (a file, a
                folder, an ``.onnx`` with its external data).
            outputs: Files or folders that ``produce`` writes, relative to the build directory; ``x/model.onnx`` takes
                ``x/model.onnx.data`` along if there is one.
            produce: Writes every output below the folder it is given (their parents are there already) and returns
                facts: JSON that is kept with the result. If it raises, the earlier result stays.
            resumes: What ``produce`` wrote for the same inputs before it was killed, or raised, is in its folder again;
                it must know whole files from half ones.

        Raises:
            StoreError: The disk is full, the directory is not writable or in use, or an input is missing.
        """
        names = [_checked(output) for output in outputs]
        with self.locked():
            self._rerun = self._rerun or self._starts_here(name)
            key = self._key(name, inputs, names)
            record = None if self._rerun else self._good_record(name, key)
            fresh = record is None
            if record is None:
                record = self._run(name, key, names, produce, resumes=resumes)
            with _writing(self.directory):
                self._hashes.save()
        said = tuple(Notice(**item) for item in record["notices"])
        if not fresh:
            for item in said:
                notice(item.code, item.message, where=item.where)
        return StageResult(
            name=name,
            key=key,
            facts=record["facts"],
            paths={output: self.directory / output for output in names},
            fresh=fresh,
            seconds=record["seconds"],
            notices=said,
        )

    def has(self, name: str, *, inputs: Mapping[str, JSON | Path], outputs: Sequence[str]) -> bool:
        """Return whether :meth:`stage` would find the result there and run nothing."""
        again = self._rerun or self._starts_here(name)
        return not again and self._good_record(name, self._key(name, inputs, outputs)) is not None

    def forget(self, name: str) -> None:
        """Remove a stage's result and what was begun of it: the files would be taken for those of this build."""
        with self.locked():
            try:
                files = list(json.loads(self._record_path(name).read_text(encoding="utf-8"))["files"])
            except (OSError, ValueError, KeyError, TypeError):
                files = []  # no result, or half a record
            with _writing(self.directory):
                for begun in self._begun.glob(f"{name.replace('/', '.')}.*"):
                    _remove(begun)
                for file in files:
                    (self.directory / file).unlink(missing_ok=True)
                    with contextlib.suppress(OSError):  # only a folder that holds nothing else goes
                        (self.directory / file).parent.rmdir()
                self._record_path(name).unlink(missing_ok=True)

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 (hex) of one file, remembered as long as the file does not change."""
        return self._hashes.of_file(path)

    def _key(self, name: str, inputs: Mapping[str, JSON | Path], outputs: Sequence[str]) -> str:
        found = self._hashes.replaced(inputs)
        return digest({"stage": name, "versions": _versions(), "outputs": list(outputs), "inputs": found})

    def _starts_here(self, name: str) -> bool:
        start = self._from_stage
        return start is not None and (name == start or name.startswith(f"{start}/"))

    def _record_path(self, name: str) -> Path:
        return self._records / f"{name.replace('/', '.')}.json"

    def _good_record(self, name: str, key: str) -> dict[str, Any] | None:
        """Return the stage's record if it has this key and its files still hold what it wrote."""
        try:
            record: dict[str, Any] = json.loads(self._record_path(name).read_text(encoding="utf-8"))
            if record["key"] != key:
                return None
            good = all(self._hashes.of_file(self.directory / file) == seen for file, seen in record["files"].items())
        except (OSError, ValueError, KeyError, TypeError):
            return None  # no record, half a record from a crashed machine, or a file that is gone: run the stage
        return record if good else None

    def _run(
        self,
        name: str,
        key: str,
        outputs: list[str],
        produce: Callable[[Path], dict[str, Any] | None],
        *,
        resumes: bool,
    ) -> dict[str, Any]:
        with _writing(self.directory):
            self._work.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=f"{name.replace('/', '.')}.", dir=self._work))
            work, earlier = self._begun_before(name, key) if resumes else scratch / "new", scratch / "earlier"
        try:
            with _writing(self.directory):
                work.mkdir(parents=True, exist_ok=True)
                for output in outputs:
                    (work / output).parent.mkdir(parents=True, exist_ok=True)
                start = time.perf_counter()
                with collecting() as said:
                    facts = produce(work) or {}
                record = {
                    "key": key,
                    "outputs": outputs,
                    "files": self._hash_outputs(name, work, outputs),
                    "facts": json.loads(canonical(facts)),
                    "notices": [item.to_dict() for item in said],
                    "seconds": time.perf_counter() - start,
                }
                self._move(work, outputs, earlier)
                write_atomically(self._record_path(name), canonical(record))
                _remove(work)
        finally:
            _remove(scratch)
        return record

    def _begun_before(self, name: str, key: str) -> Path:
        """Return the folder of a stage that goes on within itself; what was begun for other inputs is removed."""
        stage = name.replace("/", ".")
        folder = self._begun / f"{stage}.{key[:16]}"
        for other in self._begun.glob(f"{stage}.*"):
            if other != folder or self._rerun:
                _remove(other)
        return folder

    def _hash_outputs(self, name: str, work: Path, outputs: list[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for output in _with_data(work, outputs):
            made = work / output
            if not made.exists():
                raise RuntimeError(f"stage {name} did not write {output}")
            files = [(f"{output}/{part}", file) for part, file in folder_files(made)] if made.is_dir() else []
            for relative, file in files or ([(output, made)] if made.is_file() else []):
                found[relative] = self._hashes.of_file(file, final=self.directory / relative)
        return found

    def _move(self, work: Path, outputs: list[str], aside: Path) -> None:
        """Rename every output into place; on failure put the earlier ones back."""
        moved: list[str] = []
        kept: list[str] = []
        try:
            # The data of an earlier model must not stay beside a new one that has none.
            for output in _with_data(self.directory, outputs):
                if os.path.lexists(self.directory / output):
                    (aside / output).parent.mkdir(parents=True, exist_ok=True)
                    (self.directory / output).rename(aside / output)
                    kept.append(output)
            for output in _with_data(work, outputs):
                (self.directory / output).parent.mkdir(parents=True, exist_ok=True)
                (work / output).rename(self.directory / output)
                moved.append(output)
        except OSError:
            for output in moved:
                _remove(self.directory / output)
            for output in kept:
                (aside / output).rename(self.directory / output)
            raise


def _with_data(root: Path, outputs: list[str]) -> list[str]:
    data = [f"{output}.data" for output in outputs if output.endswith(".onnx") and (root / f"{output}.data").exists()]
    return [*outputs, *(name for name in data if name not in outputs)]


def _checked(output: str) -> str:
    path = PurePosixPath(output)
    if (
        path.is_absolute()
        or ".." in path.parts
        or not path.parts
        or path.parts[0] in (".stages", ".work", ".begun", ".lock")
    ):
        raise ValueError(f"an output is a path inside the build directory, not {output!r}")
    return str(path)


@functools.cache
def _versions() -> dict[str, str]:
    """Return the versions of this package and of those that decide what its stages write."""
    found = {}
    for name in ("enginewright", "numpy", "onnx", "onnx-ir", "onnxruntime"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
            found[name] = "0"
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(directory: Path, *, making: bool = False) -> Iterator[None]:
    """Turn the operating system's refusal to write into a :class:`StoreError`; other errors pass.

    Args:
        directory: The build directory.
        making: The directory is being made, so "no such file" is a refusal too (below /proc, a dangling link).
    """
    refusals = _UNWRITABLE | {errno.ENOENT} if making else _UNWRITABLE
    try:
        yield
    except OSError as error:
        where = str(error.filename or directory)
        if error.errno in _FULL:
            what, fix = "The disk is full.", "Free some space or choose another -o DIR, and run again to resume."
        elif error.errno in refusals and (not error.filename or _inside(Path(where), directory)):
            what, fix = (
                f"The build directory cannot be written: {error.strerror}.",
                "Check its permissions or choose another -o DIR.",
            )
        else:
            raise
        raise StoreError(what, where=where, fix=fix) from error


def _inside(path: Path, directory: Path) -> bool:
    path, directory = path.absolute(), directory.absolute()
    return path.is_relative_to(directory) or directory.is_relative_to(path)
