"""A real Ray cluster on this machine: three nodes, one of them the driver's, with accelerators that they only claim to have.

TensorRT for RTX compiles without a GPU, so engines are built for real on the nodes that claim one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.target import target
from engines.tensorrt.flavour import Flavour
from pipeline.build import build
from pipeline.errors import MissingError
from pipeline.executors.executor import Task
from pipeline.executors.on_ray import RayExecutor
from pipeline.stages.run import BuildOptions
from tests import zoo
from tests.stages import ray_tasks
from tests.stages.builds import fresh, recipe, run, tree
from tests.stages.conftest import Built

ray = pytest.importorskip("ray", reason="the extra [ray] is not installed")
MB = 1 << 20
RTX4090 = "accelerator_type:GeForce-RTX-4090"
STATISTICS = "calibration/statistics.safetensors"


class Nodes:
    """A cluster whose driver's node has no CPU to give, as a head usually is."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 2, "health_check_initial_delay_ms": 0}
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 256 * MB, "_system_config": quick}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self._cluster.address
        self._nodes: dict[str, Any] = {}
        self.kill_later = ""

    def add(self, resource: str | None = None) -> str:
        """Start a node with one CPU; return the start of its identifier."""
        claimed = {"num_gpus": 1, "resources": {resource: 1}} if resource else {}
        node = self._cluster.add_node(num_cpus=1, object_store_memory=128 * MB, **claimed)
        self._nodes[node.node_id[:8]] = node
        return str(node.node_id[:8])

    def kill(self, node: str) -> None:
        """End a node's processes with SIGKILL."""
        self._cluster.remove_node(self._nodes.pop(node), allow_graceful=False)

    def busy(self, node: str) -> bool:
        """Return whether the node's one CPU is taken."""
        free = ray._private.state.available_resources_per_node()
        return not free[self._nodes[node].node_id].get("CPU")

    def stop(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # 15 if not set: a busy machine would hardly run the nodes
        started = Nodes()
        patch.setenv("RAY_ADDRESS", started.address)
        yield started
        started.stop()


@pytest.fixture(scope="module")
def places(nodes: Nodes) -> tuple[str, str]:
    """Two working nodes: a plain one, and one with an RTX 4090."""
    return nodes.add(), nodes.add(RTX4090)


class Watching:
    """Progress that is kept, and can do something in the middle."""

    def __init__(self, act: Callable[[str, int, int], bool] | None = None) -> None:
        self.stages: set[str] = set()
        self.acted = False
        self._act = act

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.stages.add(stage)
        if self._act is not None and not self.acted:
            self.acted = self._act(stage, done, total)


def notices(directory: Path) -> str:
    report = json.loads((directory / "report.json").read_text())
    return "\n".join(f"{n['code']}: {n['message']}" for n in report["notices"])


def test_two_nodes_give_the_bytes_of_one_machine(
    inputs: Path, built: Built, nodes: Nodes, places: tuple[str, str], tmp_path: Path
) -> None:
    """The whole directory: statistics, variants, ranges, compiled layers, repository, manifest."""
    made = recipe(inputs, targets=["cpu", "a100"], executor="ray")
    result = build(made, tmp_path, progress=(seen := Watching()))
    assert tree(tmp_path) == tree(built.directory)
    # No node has an A100: as on one machine without it, and said.
    assert result.report is not None
    assert result.report["targets"]["a100"]["status"] == "compile_checked"
    assert "no-node: No node of the Ray cluster has accelerator_type:A100" in notices(tmp_path)
    assert any(s.startswith("checks/a100 on") for s in seen.stages)
    # Where the work was done is no part of what was asked for: nothing is done again on one machine.
    again = run(recipe(inputs, targets=["cpu", "a100"]), tmp_path)
    assert fresh(again) == []


def test_a_build_goes_to_the_node_with_its_accelerator(
    inputs: Path, nodes: Nodes, places: tuple[str, str], tmp_path: Path
) -> None:
    seen = Watching()
    result = build(recipe(inputs, targets=["rtx4090"], executor="ray"), tmp_path, progress=seen)
    assert result.report is not None
    assert result.report["targets"]["rtx4090"]["status"] == "built"
    assert (tmp_path / "engines/rtx4090/model.plan").read_bytes()[:4] == b"vtrt"
    where = {stage.partition(" on ")[0]: stage[-9:-1] for stage in seen.stages if " on " in stage}
    assert where == {"checks/rtx4090": places[1], "engines/rtx4090": places[1]}


def long_data(folder: Path, samples: int) -> str:
    rng = np.random.default_rng(5)
    ids = rng.integers(3, zoo.VOCABULARY, (samples, 12))
    np.savez(folder / "long.npz", input_ids=ids, attention_mask=np.ones((samples, 12), np.int64))
    return str(folder / "long.npz")


def test_a_node_that_is_killed_while_it_calibrates_changes_no_byte(
    inputs: Path, nodes: Nodes, places: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    victim = nodes.add()

    def kill(stage: str, done: int, total: int) -> bool:
        if stage != "calibrate" or not 0 < done < total // 2 or not nodes.busy(victim):
            return False
        nodes.kill(victim)
        return True

    data = {"data": long_data(tmp_path, 12000), "samples": 12000}
    cut = Watching(kill)
    made = recipe(inputs, calibration=data, executor="ray")
    options = BuildOptions(until="quantize")
    build(made, tmp_path / "ray", options=options, progress=cut)
    assert cut.acted
    assert f"({victim}) or its process was lost" in caplog.text
    build(recipe(inputs, calibration=data), tmp_path / "alone", options=options)
    assert tree(tmp_path / "ray") == tree(tmp_path / "alone")
    assert (tmp_path / "ray" / STATISTICS).is_file()


def test_a_build_goes_on_where_its_node_is_killed_and_another_has_the_accelerator(
    inputs: Path, nodes: Nodes, places: tuple[str, str], tmp_path: Path
) -> None:
    other = nodes.add(RTX4090)
    killed = []

    def kill(stage: str, done: int, total: int) -> bool:
        if not stage.startswith("engines/rtx4090 on") or not 0 < done < total:
            return False
        killed.append(stage[-9:-1])
        nodes.kill(killed[0])
        return True

    seen = Watching(kill)
    result = build(recipe(inputs, targets=["rtx4090"], executor="ray"), tmp_path, progress=seen)
    assert result.report is not None
    assert result.report["targets"]["rtx4090"]["status"] == "built"
    where = {stage[-9:-1] for stage in seen.stages if stage.startswith("engines/")}
    assert where == {places[1], other}
    assert "node-lost: engines/rtx4090 runs again, on " in notices(tmp_path)
    assert f"({killed[0]}) or its process was lost" in notices(tmp_path)


def test_a_task_that_needs_no_gpu_goes_to_another_node_where_the_last_of_its_own_is_lost(
    inputs: Path, nodes: Nodes, places: tuple[str, str], tmp_path: Path
) -> None:
    only = nodes.add("accelerator_type:GeForce-RTX-5090")

    def kill(stage: str, done: int, total: int) -> bool:
        if not stage.startswith("checks/rtx5090 on"):
            return False
        nodes.kill(only)
        return True

    result = build(recipe(inputs, targets=["rtx5090"], executor="ray"), tmp_path, progress=(seen := Watching(kill)))
    assert seen.acted
    assert result.report is not None
    assert result.report["targets"]["rtx5090"]["status"] == "built"
    assert "no-node-left: No node with accelerator_type:GeForce-RTX-5090 is left" in notices(tmp_path)


@pytest.mark.parametrize("joins", [True, False])
def test_a_task_that_needs_its_gpu_waits_for_another_node_and_not_for_ever(
    nodes: Nodes, places: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joins: bool
) -> None:
    """The task stands in for a build with TensorRT, which cannot be had here; the nodes and their loss are real."""
    monkeypatch.setattr("pipeline.executors.cluster.WAIT_FOR_NODE_SECONDS", 60.0 if joins else 1.0)
    first = nodes.add("accelerator_type:A100")
    task = Task(
        name="engines/a100",
        function=ray_tasks.slow,
        graphs=(),
        arguments=("engine",),
        device=target("a100"),
        flavour=Flavour.TENSORRT,
    )
    if joins:  # a program that is in the cluster already stays in it
        ray.init(address=nodes.address, log_to_driver=False)
    executor = RayExecutor()

    def kill(stage: str, done: int, total: int) -> bool:
        if done == 0:
            return False
        nodes.kill(first)
        if joins:
            nodes.kill_later = nodes.add("accelerator_type:A100")
        return True

    try:
        wait = executor.submit(task)
        if joins:
            assert wait(tmp_path, Watching(kill)) == "engine"
            nodes.kill(nodes.kill_later)
        else:
            with pytest.raises(MissingError, match="The nodes with accelerator_type:A100 were lost, and none joined"):
                wait(tmp_path, Watching(kill))
    finally:
        executor.close()
        assert ray.is_initialized() is joins
        ray.shutdown()
