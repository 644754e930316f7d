"""The tools that ours are measured beside; each lives in an environment of its own, named by its Python."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import Cost, measured
from benchmarks.tables import progress

SCRIPT = Path(__file__).with_name("quantize_peer.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One way to quantize with another tool.

    Attributes:
        title: As a table names it.
        tool: Which environment it needs: ``ort``, ``nncf`` or ``modelopt``.
    """

    title: str
    tool: str


PEERS: Mapping[str, Peer] = {
    "ort-dynamic": Peer(title="ONNX Runtime dynamic", tool="ort"),
    "ort-static": Peer(title="ONNX Runtime static, defaults", tool="ort"),
    "ort-static-gemm-entropy": Peer(title="ONNX Runtime static, Entropy on MatMuls", tool="ort"),
    "ort-static-tuned-symmetric": Peer(title="ONNX Runtime static, hand-tuned symmetric", tool="ort"),
    "ort-static-tuned-asymmetric": Peer(title="ONNX Runtime static, hand-tuned asymmetric", tool="ort"),
    "nncf-performance": Peer(title="NNCF PERFORMANCE", tool="nncf"),
    "nncf-mixed": Peer(title="NNCF MIXED", tool="nncf"),
    "modelopt-max": Peer(title="Model-Optimizer INT8 max", tool="modelopt"),
    "ort-int4": Peer(title="ONNX Runtime INT4 in blocks of 128, round to nearest", tool="ort"),
    "modelopt-int4-awq": Peer(title="Model-Optimizer INT4 AWQ clip", tool="modelopt"),
    "modelopt-entropy": Peer(title="Model-Optimizer INT8 entropy", tool="modelopt"),
}


def add_arguments(parser: argparse.ArgumentParser, *tools: str) -> None:
    """Let the command line name the Python of each tool's environment."""
    for tool in tools:
        parser.add_argument(
            f"--{tool}-python", type=Path, help=f"Python that has {tool}; without it the peer is not measured"
        )


def pythons(given: argparse.Namespace) -> dict[str, Path]:
    """Return tool to Python, for the tools that the command line named."""
    found = {tool: getattr(given, f"{tool}_python", None) for tool in ("ort", "nncf", "modelopt")}
    return {tool: path for tool, path in found.items() if path is not None}


def quantize(
    name: str, python: Path, model: Path, data: Path, samples: int, out: Path, left_out: Sequence[str] = ()
) -> Cost:
    """Quantize ``model`` with a peer into ``out``, but for the nodes ``left_out``, and return what that cost."""
    out.parent.mkdir(parents=True, exist_ok=True)
    arguments = [name, str(model), str(data), str(samples), str(out)]
    if left_out:
        listed = out.with_suffix(".left_out.txt")
        listed.write_text("\n".join(left_out))
        arguments.append(str(listed))
    return measured([str(python), "-P", str(SCRIPT), *arguments], environment={"HF_HUB_OFFLINE": "1"})


def quantized(name: str, python: Path, model: Path, data: Path, samples: int, folder: Path) -> Path | str:
    """Return the model as a peer quantizes it, made once in ``folder``; if the peer fails, the reason."""
    out = folder / f"{model.stem}.{name}.{samples}.onnx"
    if not out.exists():
        progress(f"{PEERS[name].title}: quantizing {model.name}")
        try:
            quantize(name, python, model, data, samples, out)
        except RuntimeError as error:
            return f"failed: {str(error).splitlines()[-1][:120]}"
    return out
