"""Takes the newest version of a published model back."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pipeline.errors import PublishError, StoreError
from pipeline.notices import notice
from pipeline.triton.repository import CONFIG, CONFIGS, ROLLED_BACK, versions


def rollback(place: Path) -> dict[str, tuple[int, int]]:
    """Take back the newest version of every model of a repository, or of one model.

    The version before it is served again, with the configuration that it was published with. What was taken back is kept in
    the model's ``.rolled_back`` folder, where the server does not look. Every step is a rename, so a server that polls the
    repository sees one version or the other; nothing changes unless every model has a version to go back to.

    Args:
        place: A repository, or one model's folder in it.

    Returns:
        Model to the version taken back and the one that is served now.

    Raises:
        PublishError: There is no model, or one has a single version.
        StoreError: The folder cannot be changed.
    """
    folders = [place] if (place / CONFIG).is_file() else sorted(f.parent for f in place.glob(f"[!.]*/{CONFIG}"))
    if not folders:
        raise PublishError(
            "There is no model here.", where=str(place), fix="Name a model repository, or one model's folder in it."
        )
    present = {folder: versions(folder) for folder in folders}
    for folder, numbers in present.items():
        if len(numbers) < 2:
            raise PublishError(
                f"{folder.name} has no version before {numbers[-1] if numbers else 1}.",
                where=str(folder),
                fix="Name the folder of a model that has one, or publish another build.",
            )
    try:
        return {folder.name: _back(folder, *numbers[-2:]) for folder, numbers in present.items()}
    except OSError as error:
        raise StoreError(
            f"The model repository could not be changed: {error.strerror or error}.",
            where=str(error.filename or place),
            fix="Make the folder writable and run the same command again.",
        ) from error


def _back(folder: Path, before: int, newest: int) -> tuple[int, int]:
    kept = folder / CONFIGS / f"{before}.pbtxt"
    staged = folder / ROLLED_BACK / CONFIG
    staged.parent.mkdir(exist_ok=True)
    if kept.is_file():
        shutil.copyfile(kept, staged)
        os.replace(staged, folder / CONFIG)  # noqa: PTH105 - both are files; replace keeps the old one until done
    else:
        notice(
            "config-kept",
            f"Version {before} was published without its configuration being kept; that of version {newest} stays.",
            where=str(folder / CONFIG),
        )
    (folder / str(newest)).replace(folder / ROLLED_BACK / str(newest))
    return newest, before
