"""Calibration on several machines: one file of statistics for each shard, and what it must agree on to be added up."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calibrators.collector import Request, Statistics
from pipeline.errors import DataError

_PATTERN = "calibration/shard-*-of-*.safetensors"


def shard_file(shard: tuple[int, int]) -> str:
    """Return where the statistics of shard ``(i, n)`` go in a build directory."""
    return f"calibration/shard-{shard[0]}-of-{shard[1]}.safetensors"


def identity_file(statistics: str) -> str:
    """Return the file beside a shard's statistics that says what they were collected from."""
    return f"{statistics.removesuffix('.safetensors')}.json"


def write_identity(path: Path, identity: Mapping[str, Any]) -> None:
    """Write what a shard was collected from: hashes of model and data, and the mask."""
    path.write_text(json.dumps(identity, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def merged(places: Sequence[Path], identity: Mapping[str, Any], wanted: Sequence[Request]) -> Statistics:
    """Return the sum of all shards, which are those of one run over all data.

    Args:
        places: Build directories, or files of statistics beside their identities.
        identity: What this build would collect from.
        wanted: What this build would collect.

    Raises:
        DataError: A shard is missing or given twice, or comes from another model, other data or another policy.
    """
    parts = []
    for file in _complete(places):
        _check(file, identity)
        parts.append(Statistics.load(file))
    total = Statistics.merge(parts)
    if set(total.requests) != set(wanted):
        raise DataError(
            "The shards hold statistics of other tensors than this recipe needs.",
            where="--merge",
            fix="Run every shard with this recipe: the same policy, and the same targets.",
        )
    return total


def _complete(places: Sequence[Path]) -> list[Path]:
    files = list(itertools.chain.from_iterable([p] if p.is_file() else sorted(p.glob(_PATTERN)) for p in places))
    numbers = [f.stem.removeprefix("shard-").split("-of-") for f in files]
    good = files and all(len(n) == 2 and all(part.isdigit() for part in n) for n in numbers)
    totals = {n[-1] for n in numbers}
    if not good or len(totals) != 1 or sorted(int(n[0]) for n in numbers) != list(range(int(totals.pop()))):
        raise DataError(
            f"The shards are not complete: found {', '.join(sorted(f.name for f in files)) or 'none'}.",
            where="--merge",
            fix="Give every build directory in which `calibrate --shard i/n` ran, each i from 0 to n-1 once.",
        )
    return [file for _, file in sorted(zip([int(n[0]) for n in numbers], files, strict=True))]


def _check(file: Path, identity: Mapping[str, Any]) -> None:
    path = file.with_name(identity_file(file.name))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key, value in identity.items() if found.get(key) != value]
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            "Nothing says what this shard was collected from.",
            where=str(path),
            fix="Copy the .json file along with the shard's statistics, or give its build directory.",
        ) from error
    if differing:
        raise DataError(
            f"The shard was collected from another {' and another '.join(differing)} than this build's.",
            where=str(file),
            fix="Run every shard with the same model, data and settings.",
        )
