"""Write what TensorRT's Python API has in each version, and the types that mypy checks our GPU-only code against.

TensorRT itself installs only beside an NVIDIA driver, but its bindings are ordinary wheels, and their extension module
imports once libraries of its needs' names export the few functions that it links to. This script makes such libraries
(every function empty), imports each version in a process of its own and lists its classes' attributes::

    for version in 10.0.1 10.13.3.9.post1 10.16.1.11 11.4.0.106; do   # any number; the files hold first and last
        pip download --no-deps --only-binary=:all: tensorrt-cu12-bindings==$version -d wheels
    done
    pip download --no-deps tensorrt-stubs==10.13.0.35.1 -d wheels
    python tests/engines/tensorrt_api.py wheels

It needs `gcc`, `nm` and `readelf`, and a Python of the wheels' version. Written are `tests/engines/tensorrt_api.tsv`
(attribute, first and last version that has it) and `typings/tensorrt/__init__.pyi`: the part of tensorrt-stubs (MIT
licence) that we use, without its docstrings and its syntax errors.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
TABLE = HERE / "tensorrt_api.tsv"
TYPES = HERE.parents[1] / "typings" / "tensorrt" / "__init__.pyi"

CLASSES = (
    *("Builder", "BuilderFlag", "IBuilderConfig", "INetworkDefinition", "NetworkDefinitionCreationFlag", "ITensor"),
    *("OnnxParser", "ParserError", "ILogger", "IProgressMonitor", "IOptimizationProfile", "ITimingCache"),
    *("IHostMemory", "MemoryPoolType", "TacticSource", "TilingOptimizationLevel", "HardwareCompatibilityLevel"),
    *("ProfilingVerbosity", "Runtime", "ICudaEngine", "IExecutionContext", "EngineInspector", "TensorIOMode"),
    *("LayerInformationFormat", "DataType", "Dims", "IInt8Calibrator", "IInt8EntropyCalibrator2"),
    *("IInt8MinMaxCalibrator", "CalibrationAlgoType"),
)
"""The classes that we use; of the others only the name is listed."""

_LINKED = re.compile(r"^(?:create|get|init)\w+$")


def names(extension: Path) -> set[str]:
    """Return ``Class`` and ``Class.attribute`` of everything public in an extension module that can be imported."""
    spec = importlib.util.spec_from_file_location("tensorrt_bindings.tensorrt", extension)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {name for name in dir(module) if not name.startswith("_")}
    for name in CLASSES:
        found |= {f"{name}.{a}" for a in dir(getattr(module, name, None)) if hasattr(module, name) and a[0] != "_"}
    return {name for name in found if not name.endswith((".name", ".value"))}


def _in_another_process(wheel: Path) -> set[str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract("tensorrt_bindings/tensorrt.so", folder)
        extension = folder / "tensorrt_bindings" / "tensorrt.so"
        symbols = _run("nm", "-D", "--undefined-only", str(extension)).split()
        code = "".join(f"void {s}(void) {{}}\n" for s in sorted(set(symbols)) if _LINKED.match(s))
        (folder / "empty.c").write_text(code, encoding="utf-8")
        for library in set(re.findall(r"\[(libnv[^]]+)\]", _run("readelf", "-d", str(extension)))):
            _run(
                "gcc",
                "-shared",
                "-fPIC",
                "-w",
                "-o",
                str(folder / library),
                f"-Wl,-soname,{library}",
                f"{folder}/empty.c",
            )
        environment = {"LD_LIBRARY_PATH": name}
        code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import tensorrt_api as t; from pathlib import Path; "
        code += f"print('\\n'.join(sorted(t.names(Path({str(extension)!r})))))"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        return set(done.stdout.split())


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def table(wheels: list[Path]) -> str:
    """Return one line per attribute: name, first version, last version; versions are major.minor."""
    versions = {tuple(int(n) for n in re.findall(r"\d+", w.name.split("-")[1])[:2]): w for w in wheels}
    have = {version: _in_another_process(versions[version]) for version in sorted(versions)}
    lines = ["# versions\t" + " ".join(_text(v) for v in have)]
    for name in sorted(set().union(*have.values())):
        those = [v for v in have if name in have[v]]
        assert those == [v for v in have if those[0] <= v <= those[-1]], f"{name} comes and goes"
        lines.append(f"{name}\t{_text(those[0])}\t{_text(those[-1])}")
    return "\n".join(lines) + "\n"


def _text(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)


_KEPT_DUNDERS = ("__init__", "__int__", "__bool__", "__buffer__", "__len__", "__getitem__")


class _Reduce(ast.NodeTransformer):
    """Take docstrings out, and replace every type that is not kept by ``Any``."""

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.decorator_list, self.overloaded = [], set[str]()
        node.bases = [b for b in node.bases if isinstance(b, ast.Name) and b.id in CLASSES]
        node.body = [b for b in map(self.visit, node.body) if b and not isinstance(b, ast.Expr)] or [ast.Pass()]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        if node.name.startswith("__") and node.name not in _KEPT_DUNDERS:
            return None
        if "overload" in " ".join(map(ast.unparse, node.decorator_list)):
            # Of several signatures the first: the others differ in types that are Any here.
            if node.name in self.overloaded:
                return None
            self.overloaded.add(node.name)
            node.decorator_list = []
        node.body = [ast.Expr(ast.Constant(...))]
        for argument in (
            *node.args.posonlyargs,
            *node.args.args,
            *node.args.kwonlyargs,
            node.args.vararg,
            node.args.kwarg,
        ):
            if argument is not None and argument.annotation is not None:
                argument.annotation = _known(argument.annotation)
            if argument is not None:
                argument.annotation = None if argument.arg == "self" else argument.annotation or ast.Name("Any")
        node.args.defaults = [ast.Constant(...) for _ in node.args.defaults]
        node.returns = _known(node.returns) if node.returns else ast.Name("Any")
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if ast.unparse(node.target) == "__hash__":
            return None
        node.annotation, node.value = _known(node.annotation), None
        return node


_PLAIN = {"int", "str", "bool", "float", "bytes", "None", "list", "tuple", "dict", "object", "set"}


def _known(annotation: ast.expr) -> ast.expr:
    text = ast.unparse(annotation).replace("typing.", "")
    for word in set(re.findall(r"[A-Za-z_][\w.]*", text)):
        if word in ("SupportsInt", "SupportsFloat"):
            text = re.sub(rf"\b{word}\b", word.removeprefix("Supports").lower(), text)
        elif word not in _PLAIN and word not in CLASSES and word not in ("ClassVar", "Any"):
            text = re.sub(rf"(?<![\w.]){re.escape(word)}(?:\[[^\]]*\])?(?![\w.])", "Any", text)
    # A parameter list of its own, or a bare container, is more than these types need.
    plain = "..." not in text and text not in ("list", "dict", "tuple")
    return ast.parse(text if plain else "Any", mode="eval").body


def types(wheel: Path) -> str:
    """Return the part of tensorrt-stubs that we use, as one stub file."""
    with zipfile.ZipFile(wheel) as archive:
        source = archive.read("tensorrt_bindings/tensorrt.pyi").decode()
    # What stubgen made of C++ signatures that Python cannot write: a parameter called `in`, a default in the middle.
    source = re.sub(r"\bin: list", "inputs: list", source)
    source = source.replace(
        "power: Weights = None, channel_axis: int", "power: Weights = None, channel_axis: int = ..."
    )
    kept = [_Reduce().visit(n) for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name in CLASSES]
    body = "\n\n".join(ast.unparse(ast.fix_missing_locations(node)) for node in kept)
    head = (
        '"""The part of tensorrt-stubs (MIT licence, sync.dev) that we use; made by tests/engines/tensorrt_api.py."""\n'
    )
    tail = "def nptype(trt_type: DataType) -> Any: ...\ndef init_libnvinfer_plugins(logger: Any, namespace: str) -> bool: ...\n"
    return f"{head}\nfrom typing import Any, ClassVar\n\n__version__: str\n\n{tail}\n{body}\n"


def main(folder: Path) -> None:
    """Write both files from the wheels in a folder."""
    TABLE.write_text(table(sorted(folder.glob("tensorrt_*bindings-*.whl"))), encoding="utf-8")
    TYPES.parent.mkdir(parents=True, exist_ok=True)
    TYPES.write_text(types(next(folder.glob("tensorrt_stubs-*.whl"))), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
