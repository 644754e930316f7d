"""A hub id becomes a local folder, where there is a network."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.errors import MissingError, SourceError
from pipeline.notices import notice

_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
"""Never ``*.bin`` (pickled weights) or ``*.py``."""


def local_folder(name: str, *, revision: str | None = None) -> Path:
    """Return the folder that ``name`` is, or the folder that the hub id ``name`` was downloaded to.

    Raises:
        SourceError: There is no such folder, and ``name`` is no hub id or the hub does not have it.
        MissingError: The hub cannot be reached, or its client is not installed.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise SourceError(
            "source.huggingface names a file; it takes a folder.", where=name, fix="Name the folder that it is in."
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise SourceError("There is no such folder.", where=name, fix="Check the path, or give a hub id (org/name).")
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise MissingError(
            "Downloading a hub id needs huggingface_hub, which is not installed.",
            where=name,
            fix="pip install '.[torch]', or name a folder.",
        ) from error
    try:
        path = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_WANTED))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise SourceError(
            "There is no such folder, and the hub has no such model or revision (or it is private).",
            where=f"{name} @ {revision or 'main'}",
            fix="Check the name; for a private model, log in with the hub's own client first.",
        ) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise MissingError(
            "There is no such folder, and the hub cannot be reached to download a model of that name.",
            where=name,
            fix="Download it where there is a network and name its folder.",
        ) from error
    if revision is None:
        notice(
            "hub-revision", f"The newest revision was taken: {path.name}. Set source.revision to keep it.", where=name
        )
    return path
