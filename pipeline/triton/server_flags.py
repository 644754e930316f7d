"""Flags that a server needs for what its repository asks: without them it serves and ignores the wish."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import PublishError
from pipeline.triton.protobuf import ModelConfig, parse
from pipeline.triton.repository import CONFIG

CACHE_BYTES = 256 * 2**20
"""Size of the response cache where this package starts the server."""


def server_flags(repository: Path) -> list[str]:
    """Return ``tritonserver``'s flags for the response cache and rate limits of the models in ``repository``."""
    configs = list(_configs(repository))
    flags = []
    if any(config.response_cache.enable for config in configs):
        flags.append(f"--cache-config=local,size={CACHE_BYTES}")
    if any(group.HasField("rate_limiter") for config in configs for group in config.instance_group):
        flags.append("--rate-limit=execution_count")
    return flags


def _configs(repository: Path) -> Iterator[ModelConfig]:
    for path in sorted(repository.glob(f"[!.]*/{CONFIG}")):
        try:
            yield parse(path.read_text(encoding="utf-8"), where=path.parent.name)
        except (PublishError, OSError, UnicodeDecodeError):
            continue  # the server itself says what is wrong with it
