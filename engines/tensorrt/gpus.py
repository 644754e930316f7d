"""The NVIDIA GPUs of this machine, from ``nvidia-smi``: no CUDA package is needed to ask."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

_QUERY = "--query-gpu=name,compute_cap,uuid,driver_version"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU.

    Attributes:
        name: As NVIDIA sells it.
        capability: CUDA compute capability.
        uuid: What ``CUDA_VISIBLE_DEVICES`` takes.
        driver: Version of the driver.
    """

    name: str
    capability: tuple[int, int]
    uuid: str
    driver: str

    @property
    def sm(self) -> str:
        """``SM80``."""
        return "SM{}{}".format(*self.capability)


def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that the driver lists and ``CUDA_VISIBLE_DEVICES`` leaves to this process; none without a driver.

    A scheduler hands a process its GPU through that variable; ``nvidia-smi`` lists all.
    """
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    try:
        said = subprocess.run(
            [command, _QUERY, "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return visible(parse_gpus(said), os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible(found: Sequence[Gpu], allowed: str | None) -> tuple[Gpu, ...]:
    """Return the GPUs that a value of ``CUDA_VISIBLE_DEVICES`` names, by index or by the start of the UUID, in its order.

    As in CUDA (programming guide, "CUDA environment variables"), what follows a name that fits none is not seen.
    """
    if allowed is None:
        return tuple(found)
    seen: list[Gpu] = []
    for name in (part.strip() for part in allowed.split(",")):
        if name.isdigit():
            matching = list(found[int(name) : int(name) + 1])
        else:
            matching = [gpu for gpu in found if name and gpu.uuid.startswith(name)]
        if len(matching) != 1:
            break
        seen += matching
    return tuple(seen)


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Return what ``nvidia-smi``'s lines say; a line of another form is passed over."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 4 and cells[1].replace(".", "", 1).isdigit() and "." in cells[1]:
            major, minor = cells[1].split(".")
            found.append(Gpu(name=cells[0], capability=(int(major), int(minor)), uuid=cells[2], driver=cells[3]))
    return tuple(found)
