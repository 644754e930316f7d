"""One run over the stages of a recipe: what they share, and how far it goes."""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from calibrators.data.open import check_place, open_data
from calibrators.data.spec import DataSpec
from engines.target import Target
from engines.target import target as find_target
from pipeline.content import write_atomically
from pipeline.errors import RecipeError
from pipeline.executors.executor import Executor, LocalExecutor, Task, Waiting
from pipeline.notices import Notice, collecting
from pipeline.policy.fallback import policy_on
from pipeline.policy.planning import family
from pipeline.recipe import Data, PolicyConfig, Recipe, parse, to_dict
from pipeline.running.memory import weights_within
from pipeline.sources.export import Exported
from pipeline.store import StageResult, Store
from pipeline.types import CalibrationData, Progress, TensorInfo
from pipeline.validation.thresholds import parse_gates

CANONICAL = "model.fp32.onnx"
STATISTICS = "calibration/statistics.safetensors"
OVERRIDES = "overrides.json"
MASK = "attention_mask"

RECIPE = ".stages/recipe.json"
DRY_RUN = "dry-run"

STAGES = (
    "export",
    "prepare",
    "calibrate",
    "mixed",
    "plan",
    "smooth",
    "rounding",
    "ranges",
    "quantize",
    "engines",
    "validate",
    "publish",
)
"""Stages in order; a build can stop after each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How a build runs; nothing here changes what it makes.

    Attributes:
        until: Stop after this stage; ``None`` goes to the end.
        force: Run every stage again.
        from_stage: Run this stage and all later ones again.
        dry_run: Stop after planning and calibrate nothing.
        require_verdict: A verdict that is not ``passed`` publishes nothing and is an error.
        require_built: A target without a built engine is an error.
        retry: Where a builder refuses a node, plan again without it and go on.
        shard: ``(i, n)``: calibrate on every n-th batch only, from the i-th, and stop.
        merge: Build directories (or files) with all shards; their sum is this build's calibration.
    """

    until: str | None = None
    force: bool = False
    from_stage: str | None = None
    dry_run: bool = False
    require_verdict: bool = False
    require_built: bool = False
    retry: bool = False
    shard: tuple[int, int] | None = None
    merge: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A stage whose work may be done on another machine.

    Attributes:
        key: Everything the result depends on.
        outputs: What ``write`` writes, relative to the build directory.
        task: The work; its name is the stage's.
        write: Writes the task's result below a folder.
    """

    key: dict[str, Any]
    outputs: list[str]
    task: Task
    write: Callable[[Any, Path], None]


class Reached(Exception):  # noqa: N818 (no error: the stage that was asked for is done)
    """The last stage that was asked for is done."""


P = ParamSpec("P")
R = TypeVar("R")


def step(method: Callable[Concatenate[Run, P], R]) -> Callable[Concatenate[Run, P], R]:
    """End the line after this stage if it is the one to stop after."""

    @functools.wraps(method)
    def wrapped(run: Run, /, *args: P.args, **kwargs: P.kwargs) -> R:
        result = method(run, *args, **kwargs)
        if not run.drafts and method.__name__ in (run.options.until, "plan" if run.options.dry_run else None):
            raise Reached
        return result

    return wrapped


def stored_recipe(directory: Path) -> Recipe:
    """Return the recipe of the last build in ``directory``.

    Raises:
        RecipeError: Nothing was built there.
    """
    try:
        values = json.loads((directory / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            "The folder holds no build.", where=str(directory), fix="Name the -o directory of a build."
        ) from error
    return parse(values, where=str(directory / RECIPE))


def check_executor(recipe: Recipe) -> None:
    """Refuse builder keys that name files of one machine where another one builds.

    Raises:
        RecipeError: Names the key.
    """
    builder = recipe.builder
    given = {"timing_cache": builder.timing_cache, "plugin_libraries": builder.plugin_libraries or None}
    for key, value in given.items():
        if recipe.executor == "ray" and value is not None:
            raise RecipeError(
                f"The executor ray does not send builder.{key} to the nodes.",
                where=f"builder.{key}",
                fix="Leave it out, or build on the machine with the GPU with executor: local.",
            )


class Run:
    """One run over the stages of a recipe.

    Args:
        recipe: What is asked for; a precision that one of its targets lacks, a gate on no measurement or data that is
            not there is refused here.
        directory: The build directory.
        options: How to run.
        progress: Told how far each long stage is.
    """

    def __init__(self, recipe: Recipe, directory: Path, options: BuildOptions, progress: Progress) -> None:
        self.recipe = recipe
        self.directory = directory
        self.options = options
        self.progress = progress
        self.drafts = False
        self.store = Store(directory, force=options.force, from_stage=options.from_stage)
        self.results: list[StageResult] = []
        self.notices: list[Notice] = []
        self._opened: dict[tuple[object, ...], CalibrationData] = {}
        self._begun: dict[str, Waiting] = {}
        self._executor: Executor | None = None
        self.targets = {t.name: t for t in map(find_target, recipe.targets)}
        self.policies: dict[str, PolicyConfig] = {}
        self.families = self._families()
        parse_gates(recipe.validate_.gates)
        check_executor(recipe)
        for section in (recipe.calibration, recipe.validate_):
            if section.data is not None:
                check_place(section.data)

    @contextlib.contextmanager
    def running(self, *, record: bool = True) -> Iterator[None]:
        """Hold the build directory and gather notices; stop quietly after the stage that was asked for last.

        Args:
            record: Keep the recipe as the directory's own.
        """
        if self.options.until is not None and self.options.until not in STAGES:
            raise RecipeError(f"There is no stage {self.options.until!r}.", fix=f"Stages are {', '.join(STAGES)}.")
        memory_mb = self.recipe.memory_mb
        within = weights_within(None if memory_mb is None else memory_mb << 20)
        with self.store.locked(), collecting() as notices, within:
            self.notices = notices
            if record and not self.options.dry_run:
                write_atomically(self.directory / RECIPE, json.dumps(to_dict(self.recipe), indent=1) + "\n")
            try:
                with contextlib.suppress(Reached):
                    yield
            finally:
                if self._executor is not None:
                    self._executor.close()
                    self._executor = None
                self._begun.clear()

    @contextlib.contextmanager
    def drafting(self) -> Iterator[None]:
        """Let variants that are made inside the block go to ``draft/`` and not to ``variants/``; no stage ends the line."""
        self.drafts = True
        try:
            yield
        finally:
            self.drafts = False

    def folder(self, family: str) -> str:
        """Return where a variant is, relative to the build directory."""
        return f"draft/{family}" if self.drafts else f"variants/{family}"

    def part(self, stage: str, family: str) -> str:
        """Return the name of the part of a stage that makes this variant."""
        return f"{stage}/draft/{family}" if self.drafts else f"{stage}/{family}"

    def forget(self, stage: str, family: str) -> None:
        """Remove what an earlier run made of a variant in a stage that this recipe does not ask for; a dry run removes nothing."""
        if not self.options.dry_run:
            self.store.forget(self.part(stage, family))

    @property
    def executor(self) -> Executor:
        """What does the heavy work; a cluster is joined when it is first needed.

        Raises:
            MissingError: The recipe says ``ray``, and there is no Ray or no cluster.
        """
        if self._executor is None:
            if self.recipe.executor == "ray":
                from pipeline.executors.on_ray import RayExecutor

                self._executor = RayExecutor()
            else:
                self._executor = LocalExecutor()
        return self._executor

    def begin(self, job: Job) -> None:
        """Start a job that :meth:`finish` will wait for, unless its result is there already.

        Raises:
            MissingError: There is nowhere to do it.
        """
        if not self.store.has(job.task.name, inputs=job.key, outputs=job.outputs):
            self._begun[job.task.name] = self.executor.submit(job.task)

    def finish(self, job: Job) -> StageResult:
        """Return a job's stage result from the store, or do its work first.

        Raises:
            MissingError: There is nowhere to do it.
            PipelineError: What the work itself raises.
        """

        def produce(work: Path) -> None:
            waiting = self._begun.pop(job.task.name, None) or self.executor.submit(job.task)
            with tempfile.TemporaryDirectory(dir=work) as scratch:
                made = waiting(Path(scratch), self.progress)
            job.write(made, work)

        return self.stage(job.task.name, job.key, job.outputs, produce)

    def facts(self, name: str) -> dict[str, Any]:
        """Return what a stage of this run recorded; empty if it did not run."""
        return next((r.facts for r in self.results if r.name == name), {})

    def open(self, section: Data, exported: Exported, inputs: tuple[TensorInfo, ...]) -> CalibrationData | None:
        """Return the samples that a section of the recipe names, checked against the model's inputs; ``None`` without.

        Opening may mean tokenizing a whole corpus, so each section is opened once in a run.
        """
        if section.data is None:
            return None
        key = (type(section).__name__, exported.folder, inputs)
        if key not in self._opened:
            self._opened[key] = self._open(section, exported, inputs)
        return self._opened[key]

    def mask(self, inputs: tuple[TensorInfo, ...]) -> str | None:
        """Return the input that is 0 at padding, if there is one and calibration leaves padding out."""
        known = any(info.name == MASK for info in inputs)
        return MASK if known and self.recipe.calibration.ignore_padding else None

    def _open(self, section: Data, exported: Exported, inputs: tuple[TensorInfo, ...]) -> CalibrationData:
        spec = DataSpec(
            data=section.data or "",
            template=section.template,
            tokenizer=section.tokenizer or exported.folder,
            max_length=section.max_length,
            join=section.join,
            preprocessing=section.preprocessing,
            samples=section.samples,
            batch_size=section.batch_size,
            trust_data=section.trust_data,
        )
        return open_data(spec, inputs)

    def stage(
        self,
        name: str,
        inputs: dict[str, Any],
        outputs: list[str],
        produce: Callable[[Path], dict[str, Any] | None],
        *,
        resumes: bool = False,
    ) -> StageResult:
        """Return a stage's result from the store, running it if it is not there; see :meth:`pipeline.store.Store.stage`."""
        result = self.store.stage(name, inputs=inputs, outputs=outputs, produce=produce, resumes=resumes)
        self.results.append(result)
        return result

    def _families(self) -> dict[str, list[Target]]:
        families: dict[str, list[Target]] = {}
        for device in self.targets.values():
            policy = policy_on(device, self.recipe.policy)
            name = family(device, policy)
            if self.policies.setdefault(name, policy) != policy:
                raise RecipeError(
                    f"{families[name][0].title} and {device.title} would need different graphs under the name {name}.",
                    where=f"target {device.name}, policy.fallback",
                    fix="Build them in two directories, or ask for what both have.",
                )
            families.setdefault(name, []).append(device)
        return families
