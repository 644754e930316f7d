"""What the child process is asked to export, as one line of JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One export.

    Attributes:
        kind: Which kind of source ``target`` names.
        target: A Hugging Face folder, ``package.module:factory``, or a ``.pt2`` file.
        opset: Opset of the graph to write.
        task: For ``huggingface``: the task, a key of :data:`pipeline.sources.folder.TASKS`.
        pooled: For ``huggingface``: whether the pooler's output is wanted if its weights exist.
        kv_cache: For ``huggingface``: whether a causal LM's keys and values are inputs and outputs.
    """

    kind: Literal["huggingface", "module", "pt2"]
    target: str
    opset: int
    task: str | None = None
    pooled: bool = True
    kv_cache: bool = False

    def dumps(self) -> str:
        """Return the job as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> Job:
        """Return the job that :meth:`dumps` wrote."""
        return cls(**json.loads(text))
