r"""What TensorRT for RTX makes of each preset: kernels, bytes moved, fused attention, beside the same model in FP16.

    python -m benchmarks.compiled --models build/bench/models --work build/bench/work --only minilm

Bytes are inputs, constants and outputs of every kernel for one calibration batch; the estimate is a roofline at the data sheet's
rates, not a measurement. ``--peer TITLE=FILE.onnx`` compiles another tool's graph beside them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from benchmarks.processes import measured
from benchmarks.tables import print_header, print_table, progress
from engines.compile_check import checked_capability, compile_check
from engines.compiled_layers import CompiledLayers
from engines.roofline import estimate_ms
from engines.target import Target
from engines.target import target as find_target

EMBEDDINGS = '[{"role": "embedding", "precision": "int8"}]'
GRAPHS = {
    "`int8`, smoothing off": ["--precision", "int8", "--policy.smooth", "off"],
    "`int8`": ["--precision", "int8"],
    "`int8`, embeddings in INT8": ["--precision", "int8", "--policy.rules", EMBEDDINGS],
    "`int8-all`, smoothing off": ["--precision", "int8-all", "--policy.smooth", "off"],
    "`int8-all`": ["--precision", "int8-all"],
}
"""Title to the flags of the variant that is compiled; ResNet-50 has the first alone, without attention and GEMMs to smooth."""
HEADER = [
    "model",
    "graph",
    "kernels",
    "MB moved",
    "engine MB",
    "low-precision FLOPs",
    "fused attention",
    "estimate, ms",
]


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("build/bench/models"))
    parser.add_argument("--work", type=Path, default=Path("build/bench/work"))
    parser.add_argument("--only", nargs="+", default=["minilm"], choices=["minilm", "bert", "resnet50"])
    parser.add_argument("--target", default="a100")
    parser.add_argument("--samples", type=int, default=64, help="calibration samples")
    parser.add_argument("--peer", action="append", default=[], metavar="TITLE=FILE", help="of the first model")
    given = parser.parse_args()
    device = find_target(given.target)
    print_header("Compiled layers", "benchmarks.compiled", [f"target {device.title}, {given.samples} samples"])
    rows = []
    for name in given.only:
        fp16 = None
        for number, (title, flags) in enumerate(GRAPHS.items()):
            if number and name == "resnet50":
                break
            progress(f"{name}: {title}")
            made, beside = _compiled(given, name, flags, given.work / f"compiled.{name}.{number}")
            if fp16 is None:
                fp16 = beside
                rows.append([name, "FP16", *_figures(fp16, device)])
            rows.append([name, title, *_figures(made, device)])
    for title, _, file in (peer.partition("=") for peer in given.peer):
        progress(title)
        data = np.load(given.models / f"{given.only[0]}_calib.npz")
        shapes = {key: (8, *data[key].shape[1:]) for key in data.files}
        assert device.compute_capability is not None
        capability = checked_capability(device.compute_capability)
        assert capability is not None
        rows.append([given.only[0], title, *_figures(compile_check(Path(file), capability, shapes), device)])
    print_table(HEADER, rows)


def _compiled(
    given: argparse.Namespace, name: str, flags: list[str], folder: Path
) -> tuple[CompiledLayers, CompiledLayers]:
    command = [sys.executable, "-m", "pipeline", "compile", str(given.models / f"{name}.onnx"), *flags]
    command += ["--target", given.target, "--calibration", str(given.models / f"{name}_calib.npz")]
    command += ["--samples", str(given.samples), "-o", str(folder)]
    measured(command)
    check = folder / "checks" / given.target
    variant, fp16 = (
        CompiledLayers.from_json((check / file).read_text(encoding="utf-8"))
        for file in ("compiled.json", "compiled.fp16.json")
    )
    return variant, fp16


def _figures(layers: CompiledLayers, device: Target) -> list[str]:
    share, estimate = layers.low_precision_flops_share, estimate_ms(layers, device)
    return [
        str(layers.kernels),
        f"{layers.bytes_moved / 1e6:.1f}",
        f"{layers.engine_bytes / 1e6:.1f}",
        "–" if share is None else f"{share:.1%}",
        str(layers.fused_attention),
        "not measured" if estimate is None else f"{estimate:.3f}",
    ]


if __name__ == "__main__":
    main()
