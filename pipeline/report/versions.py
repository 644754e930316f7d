"""Versions of everything whose change could change a result."""

from __future__ import annotations

import importlib.metadata
import platform

PACKAGES = ("enginewright", "numpy", "onnx", "onnx-ir", "onnxruntime")


def versions() -> dict[str, str]:
    """Return ``python`` and each of :data:`PACKAGES` with its version; a package that is not there is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return dict(sorted(found.items()))
