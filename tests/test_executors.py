"""Placement, likeness of nodes and errors of the executor ray, without a cluster; with one: tests/stages/test_stages_ray.py."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engines.target import target, targets
from engines.tensorrt.flavour import Flavour
from engines.tensorrt.gpus import Gpu, visible
from pipeline.build import BuildResult
from pipeline.cli import app
from pipeline.errors import EngineError, MissingError, RecipeError
from pipeline.executors import library, worker
from pipeline.executors.machine import Machine, this_machine
from pipeline.executors.nodes import Node, Placement, accelerator, check_alike, place, shard_cpus, shards_at_once
from pipeline.executors.sending import Sent
from pipeline.notices import collecting
from pipeline.recipe import parse
from pipeline.report.manifest import recipe_values
from pipeline.running.memory import given_memory, weight_memory
from pipeline.stages.run import BuildOptions, Run
from pipeline.types import silent

MACHINE = Machine(
    software={"enginewright": "0", "onnxruntime": "1.31"},
    processor="A",
    tensorrt={Flavour.RTX: "1.7", Flavour.TENSORRT: "10.13"},
)

# What the driver calls each product; nvidia-smi's names as NVIDIA's forum and data sheets print them.
PRODUCTS = {
    "t4": "Tesla T4",
    "a100": "NVIDIA A100-SXM4-80GB",
    "a30": "NVIDIA A30",
    "a10": "NVIDIA A10",
    "l4": "NVIDIA L4",
    "l40s": "NVIDIA L40S",
    "rtx4090": "NVIDIA GeForce RTX 4090",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
    "rtx5090": "NVIDIA GeForce RTX 5090",
}


def node(name: str, *accelerators: str, cpus: int = 4, machine: Machine = MACHINE) -> Node:
    return Node(id=name, host=name, cpus=cpus, accelerators=frozenset(accelerators), machine=machine)


def test_every_target_has_the_name_that_ray_finds_for_its_gpu() -> None:
    """Ray's own detection is the oracle."""
    nvidia = pytest.importorskip("ray._private.accelerators.nvidia_gpu").NvidiaGPUAcceleratorManager
    assert set(PRODUCTS) == {t.name for t in targets() if t.compute_capability}
    for name, product in PRODUCTS.items():
        assert accelerator(target(name)) == nvidia._gpu_name_to_accelerator_type(product)


def test_tensorrt_takes_a_gpu_of_the_target_and_nothing_else() -> None:
    found = place([node("x"), node("y", "A100"), node("z", "H100")], target("a100"), Flavour.TENSORRT)
    assert (found.resource, found.gpus, found.tensorrt) == ("accelerator_type:A100", 1, "10.13")
    with pytest.raises(MissingError, match=r"No node of the Ray cluster has accelerator_type:L4,.* H100"):
        place([node("x"), node("z", "H100")], target("l4"), Flavour.TENSORRT)


def test_tensorrt_for_rtx_takes_the_target_s_node_or_any() -> None:
    nodes = [node("x"), node("y", "A100")]
    own, any_ = (place(nodes, target(name), Flavour.RTX) for name in ("a100", "rtx4090"))
    assert (own.resource, own.gpus, own.tensorrt) == ("accelerator_type:A100", 0, "1.7")
    assert (any_.resource, any_.gpus) == (None, 0)


def test_a_task_fits_where_everything_that_it_takes_is() -> None:
    on_gpu = place([node("y", "A100")], target("a100"), Flavour.TENSORRT)
    assert on_gpu.fits({"CPU": 4, "GPU": 1, "accelerator_type:A100": 1})
    assert not on_gpu.fits({"CPU": 4, "accelerator_type:A100": 1})
    assert not on_gpu.fits({"CPU": 4, "GPU": 1, "accelerator_type:H100": 1})
    # After the large node is lost, a shard of 8 CPUs must not wait for the small one for ever.
    assert [Placement(cpus=8).fits({"CPU": cpus}) for cpus in (4, 8)] == [False, True]


def test_nodes_of_one_accelerator_have_one_tensorrt() -> None:
    other = replace(MACHINE, tensorrt={Flavour.TENSORRT: "10.14"})
    with pytest.raises(MissingError, match=r"differ in TensorRT: 10\.13, 10\.14"):
        place([node("x", "A100"), node("y", "A100", machine=other)], target("a100"), Flavour.TENSORRT)


def test_other_software_is_refused_and_another_processor_is_said() -> None:
    older = replace(MACHINE, software={**MACHINE.software, "onnxruntime": "1.30"})
    with pytest.raises(MissingError, match=r"The node y has onnxruntime 1\.30, and the driver has 1\.31"):
        check_alike([node("x"), node("y", machine=older)], MACHINE)
    with collecting() as said:
        check_alike([node("x"), node("y")], MACHINE)
    assert said == []
    with collecting() as said:
        check_alike([node("x", machine=replace(MACHINE, processor="B"))], MACHINE)
    assert [n.code for n in said] == ["different-processors"]


def test_the_code_s_hash_tells_one_source_from_another() -> None:
    here = this_machine()
    assert len(here.software["enginewright"]) == 12
    assert here == this_machine()


@pytest.mark.parametrize(
    ("cpus", "threads", "each", "at_once"),
    [((8, 4), 0, 4, 3), ((8, 4), 8, 8, 1), ((1, 1), 0, 1, 2), ((2, 2), 16, 2, 2)],
)
def test_a_shard_takes_the_threads_asked_for_or_the_smallest_node(
    cpus: tuple[int, ...], threads: int, each: int, at_once: int
) -> None:
    nodes = [node(str(i), cpus=n) for i, n in enumerate(cpus)]
    assert shard_cpus(nodes, threads) == each
    assert shards_at_once(nodes, each) == at_once


def test_a_node_s_files_are_named_as_the_driver_has_them() -> None:
    sent = (Sent(name="model.onnx", folder="/data/build/variants/cpu", files=()),)
    error = EngineError("bad node in /tmp/x/0/model.onnx", where="/tmp/x/0/model.onnx", fix="f")
    found = worker._as_the_driver_knows_it(error, sent, "/tmp/x")
    assert (type(found), found.where, found.fix) == (EngineError, "/data/build/variants/cpu/model.onnx", "f")
    assert found.what == "bad node in /data/build/variants/cpu/model.onnx"


class Ray:
    """A worker's side of Ray: where it is, and an actor that takes any report."""

    remote = staticmethod(lambda *_: None)
    begin = report = property(lambda self: self)

    def get_runtime_context(self) -> Ray:
        return self

    def get_node_id(self) -> str:
        return "abc"


def work_on(software: dict[str, str], function: Callable[..., object], weight_memory: int | None = None) -> worker.Work:
    return worker.Work(
        key="k", function=function, graphs=(), arguments=(), software=software, weight_memory=weight_memory
    )


def test_a_node_holds_no_more_weights_than_the_recipe_lets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "library", Ray)
    here = this_machine().software
    told = worker.run(work_on(here, lambda **_: weight_memory(), 5 << 20), Ray())
    assert (told.value, told.error) == (5 << 20, None)
    assert worker.run(work_on(here, lambda **_: given_memory()), Ray()).value is None


def test_a_node_that_joined_later_refuses_another_driver_s_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "library", Ray)
    done = worker.run(work_on({"onnxruntime": "1.0"}, print), Ray())
    assert done.value is None
    assert isinstance(done.error, MissingError)
    assert "and the driver has 1.0" in done.error.what


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="needs Ray, which is not installed") as caught:
        library.connect()
    assert caught.value.fix == "pip install '.[ray]'"


def test_an_address_where_nobody_answers_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(MissingError, match="There is no Ray cluster to join") as caught:
        library.connect()
    assert caught.value.where == f"RAY_ADDRESS={address}"
    for other in ("ray://127.0.0.1:10001", "local"):
        monkeypatch.setenv("RAY_ADDRESS", other)
        with pytest.raises(MissingError, match=r"not through Ray Client, and it starts none itself"):
            library.connect()


def test_ray_is_not_imported_by_a_build_that_does_not_ask_for_it() -> None:
    import subprocess
    import sys

    code = "import sys, pipeline.build, pipeline.measuring; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_a_library_prints_is_no_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray prints on stdout that a node was lost, from a thread of its own."""

    def build(*_: object, **__: object) -> BuildResult:
        thread = threading.Thread(target=print, args=("Raylet is terminated.",))
        thread.start()
        thread.join()
        return BuildResult(directory=tmp_path, report=None, exit_code=0, summary="done")

    monkeypatch.setattr("pipeline.build.build", build)
    (tmp_path / "m.onnx").write_bytes(b"")
    found = CliRunner().invoke(app, ["build", str(tmp_path / "m.onnx"), "--executor", "ray", "--json"])
    assert json.loads(found.stdout)["exit_code"] == 0
    assert "Raylet is terminated." in found.stderr


def test_builder_files_of_one_machine_are_refused(tmp_path: Path) -> None:
    values = {"source": {"onnx": "m.onnx"}, "executor": "ray", "builder": {"timing_cache": "t.cache"}}
    with pytest.raises(RecipeError, match=r"does not send builder\.timing_cache"):
        Run(parse(values), tmp_path, BuildOptions(), silent)
    with pytest.raises(RecipeError, match="executor"):
        parse({**values, "executor": "dask"})


def test_where_work_is_done_is_no_part_of_a_manifest() -> None:
    local, ray = (parse({"source": {"onnx": "m.onnx"}, "executor": name}) for name in ("local", "ray"))
    assert local != ray
    assert recipe_values(local) == recipe_values(ray)


def test_a_scheduler_s_choice_of_gpu_is_kept() -> None:
    first, second = (Gpu(name="A100", capability=(8, 0), uuid=f"GPU-{i}a", driver="1") for i in (1, 2))
    cases = {
        None: (first, second),
        "": (),
        "1": (second,),
        "1,0": (second, first),
        "GPU-2": (second,),
        "0,7,1": (first,),
        "GPU-": (),
        "-1": (),
    }
    for value, wanted in cases.items():
        assert visible((first, second), value) == wanted, value
