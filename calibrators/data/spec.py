"""What the user asked to be read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """Where samples are and how they become model inputs; the recipe's ``calibration`` and ``validate`` sections.

    Attributes:
        data: ``.npz``, folder of ``.npy``/``.npz`` or of images, ``.jsonl``, ``.txt`` or ``package.module:callable``.
            A relative path starts at the current folder.
        template: How a ``.jsonl`` record (or a ``.txt`` line, as ``text``) becomes the text to tokenize.
        tokenizer: Folder or ``tokenizer.json``; for images a folder whose ``preprocessor_config.json`` is used.
        max_length: Tokens per sample; longer text is cut.
        join: Whether texts are joined and cut into windows of ``max_length`` tokens instead of being a sample each.
        preprocessing: Image preprocessing (see :class:`calibrators.data.preprocessing.Preprocessing`).
        samples: At most this many samples are read: the first ones.
        batch_size: Samples per batch; a fixed batch dimension in the model wins.
        trust_data: Whether ``package.module:callable`` may be imported and called.
    """

    data: str
    template: str = "{text}"
    tokenizer: Path | None = None
    max_length: int = 128
    join: bool = False
    preprocessing: dict[str, Any] | None = None
    samples: int = 512
    batch_size: int = 8
    trust_data: bool = False

    def __post_init__(self) -> None:
        for name in ("max_length", "samples", "batch_size"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, not {getattr(self, name)}.", where=self.data)
