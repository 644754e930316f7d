"""The TensorRT module that this process drives, under one name: ``from engines.tensorrt.binding import trt``.

Both flavours have one API; types are TensorRT 10.13's (``typings/tensorrt``). Importing this imports TensorRT, so only
modules that are themselves imported when a build or a run starts may do it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from engines.tensorrt.flavour import selected

if TYPE_CHECKING:
    import tensorrt as trt
else:
    trt = importlib.import_module(selected().module)

__all__ = ["trt"]
