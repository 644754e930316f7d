"""Which TensorRT a process drives: ``tensorrt`` or ``tensorrt-rtx``. Polygraphy drives one per process, so we do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from enum import StrEnum

from pipeline.errors import EngineError, MissingError

_SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"


class Flavour(StrEnum):
    """A TensorRT that can be installed."""

    TENSORRT = "tensorrt"
    RTX = "tensorrt-rtx"

    @property
    def module(self) -> str:
        """The Python module's name."""
        return self.value.replace("-", "_")

    @property
    def label(self) -> str:
        """As people write it."""
        return "TensorRT" if self is Flavour.TENSORRT else "TensorRT for RTX"


_DISTRIBUTIONS = {
    Flavour.TENSORRT: ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
    Flavour.RTX: ("tensorrt-rtx-cu12", "tensorrt-rtx-cu13", "tensorrt-rtx"),
}
_EXTRAS = {
    Flavour.TENSORRT: "On the machine with the GPU: pip install '.[tensorrt]'",
    Flavour.RTX: "pip install '.[rtx]'",
}
_selected: list[Flavour] = []


def installed(flavour: Flavour) -> str | None:
    """Return the version that is installed, without importing it; ``None`` if there is none.

    Type stubs put a folder ``tensorrt`` without code beside the packages, which Python finds as a namespace.
    """
    spec = importlib.util.find_spec(flavour.module)
    if spec is None or spec.origin is None:
        return None
    for name in _DISTRIBUTIONS[flavour]:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def ready(flavour: Flavour) -> str | None:
    """Return the version that can build here; ``None`` where it, or Polygraphy, which drives it, is not installed."""
    return installed(flavour) if importlib.util.find_spec("polygraphy") is not None else None


def require(flavour: Flavour, purpose: str) -> str:
    """Return the version that is installed.

    Args:
        flavour: The TensorRT that is needed.
        purpose: What for, as the start of a sentence (``A compile check``).

    Raises:
        MissingError: It, or Polygraphy, is not installed; names the extra.
    """
    version = installed(flavour)
    missing = flavour.label if version is None else "Polygraphy"
    if version is None or importlib.util.find_spec("polygraphy") is None:
        raise MissingError(f"{purpose} needs {missing}, which is not installed.", fix=_EXTRAS[flavour])
    return version


def select(flavour: Flavour) -> None:
    """Make this process drive ``flavour``; to be called before :mod:`engines.tensorrt.binding` is imported.

    Raises:
        EngineError: The process drives the other one already.
    """
    if _selected and _selected[0] is not flavour:
        raise EngineError(
            f"This process drives {_selected[0].label} and cannot drive {flavour.label} as well.",
            fix="Use another process; builds and checks have their own.",
        )
    if not _selected:
        # Polygraphy reads the variable when it is imported and imports that TensorRT.
        os.environ[_SWITCH] = "1" if flavour is Flavour.RTX else "0"
        _selected.append(flavour)


def selected() -> Flavour:
    """Return what this process drives.

    Raises:
        EngineError: Nothing was selected yet.
    """
    if not _selected:
        raise EngineError("No TensorRT was selected.", fix="Call engines.tensorrt.flavour.select first.")
    return _selected[0]


def release(version: str) -> tuple[int, int]:
    """Return (major, minor) of a version as TensorRT writes it: ``10.13.3.9.post1`` is (10, 13)."""
    numbers = re.findall(r"\d+", version)
    return int(numbers[0]), int(numbers[1])
