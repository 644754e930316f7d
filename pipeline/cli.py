"""The command line: parse, call, print. What a command does is in the rooms it calls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline import cli_output as output
from pipeline.cli_flags import (
    OVERRIDES,
    BuildFlags,
    CalibrateFlags,
    Flags,
    PublishFlags,
    RecipeCommand,
    SimulateFlags,
    check_stage,
    shard_of,
    takes,
)
from pipeline.cli_recipe import recipe_of, source_of
from pipeline.errors import PipelineError, RecipeError

if TYPE_CHECKING:
    from pipeline.build import BuildResult
    from pipeline.recipe import Recipe

_DIRECTORY, _DEBUG = "pipeline.directory", "pipeline.debug"
# Usage errors that Typer itself prints; typer does not export the class under a name of its own.
_USAGE: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class Commands(TyperGroup):
    """The group of commands: a :class:`PipelineError` is printed in a few lines, any other exception is a bug."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Accept ``--debug`` anywhere on the line."""
        ctx.meta[_DEBUG] = "--debug" in args
        return super().parse_args(ctx, [arg for arg in args if arg != "--debug"])

    def invoke(self, ctx: Any) -> Any:
        """Run the command and turn its failure into a message and an exit code."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, _USAGE, BrokenPipeError):
            raise
        except PipelineError as error:
            if ctx.meta[_DEBUG]:
                raise
            output.show_error(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted; run again to resume", err=True)
            raise typer.Exit(output.EXIT_INTERRUPTED) from error
        except Exception as error:
            if ctx.meta[_DEBUG]:
                raise
            output.show_crash(error, ctx.meta.get(_DIRECTORY))
            raise typer.Exit(output.EXIT_BUG) from error


app = typer.Typer(
    cls=Commands,
    name="pipeline",
    help="From a trained model to quantized engines, with proof of what it costs in accuracy, and a Triton repository.\n\n"
    "Exit codes: 0 done, 2 bad input, 3 a gate failed, 4 something this machine lacks, 70 a bug, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=output.show_version, is_eager=True)
    ] = False,
) -> None:
    """See the help of the application."""


@app.command()
def init(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The trained model, as for build.")] = "model.onnx",
    file: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The recipe to write.")] = Path(
        "pipeline.yaml"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace a recipe that is there.")] = False,
) -> None:
    """Write a commented recipe."""
    from pipeline.content import write_atomically
    from pipeline.recipe.reference import template

    if file.exists() and not force:
        raise RecipeError("There is a recipe already.", where=str(file), fix="Pass --force to replace it.")
    source = {"onnx": model} if model == "model.onnx" else source_of(model)
    try:
        write_atomically(file, template({"source": source, "policy": {"preset": "int8"}, "targets": ["cpu"]}))
    except OSError as error:
        raise RecipeError(
            f"The recipe cannot be written: {error.strerror}.", where=str(file), fix="Choose another -o FILE."
        ) from error
    output.show(f"wrote {file}\nname your data under `calibration` and `validate`, then run: python -m pipeline build")


@app.command(cls=RecipeCommand)
@takes(BuildFlags)
def build(ctx: typer.Context, flags: BuildFlags) -> None:
    """Build the whole line: export, calibrate, quantize, build engines, validate, publish.

    Every recipe key is also a flag: --calibration.batch_size 4. Keys: docs/recipe.md.
    """
    _build(
        ctx,
        flags,
        dry_run=flags.dry_run,
        retry=flags.retry,
        require_verdict=flags.require_verdict,
        require_built=flags.require_built,
    )


@app.command(cls=RecipeCommand)
@takes(Flags)
def export(ctx: typer.Context, flags: Flags) -> None:
    """Export the trained model to a checked FP32 ONNX file."""
    _build(ctx, flags, until="export")


@app.command(cls=RecipeCommand)
@takes(CalibrateFlags)
def calibrate(ctx: typer.Context, flags: CalibrateFlags) -> None:
    """Collect activation statistics, whole, in parts, or from parts."""
    _build(ctx, flags, until="calibrate", shard=shard_of(flags.shard), merge=tuple(flags.merge or ()))


@app.command(cls=RecipeCommand)
@takes(Flags)
def quantize(ctx: typer.Context, flags: Flags) -> None:
    """Write the quantized ONNX of every variant."""
    _build(ctx, flags, until="quantize")


@app.command(name="compile", cls=RecipeCommand)
@takes(Flags)
def compile_(ctx: typer.Context, flags: Flags) -> None:
    """Build every target's engine, or check that its variant compiles where this machine has no such GPU."""
    _build(ctx, flags, until="engines")


@app.command(cls=RecipeCommand)
@takes(Flags)
def validate(ctx: typer.Context, flags: Flags) -> None:
    """Measure the engines on held-out data and judge the gates; stored measurements are judged without running.

    Given a build directory instead of a model, on a machine with a GPU of its targets: builds that engine and an FP16 one
    beside it from what the directory holds, and measures both there.
    """
    if flags.model is None or not Path(flags.model, ".stages/recipe.json").is_file():
        _build(ctx, flags, until="validate")
        return
    from pipeline.measuring import measure_build

    ctx.meta[_DIRECTORY] = Path(flags.model)
    with output.watching() as progress:
        result = measure_build(Path(flags.model), targets=flags.target or (), progress=progress)
    _show(flags, result)
    raise typer.Exit(result.exit_code)


@app.command(cls=RecipeCommand)
@takes(PublishFlags)
def publish(ctx: typer.Context, flags: PublishFlags) -> None:
    """Write the Triton repository: of one build, or with the engines that several machines built (DIR...); or roll it back."""
    if flags.rollback:
        _rollback(flags)
        return
    folders = [Path(name) for name in flags.model or () if Path(name, ".stages/recipe.json").is_file()]
    if not folders:
        if flags.model and len(flags.model) > 1:
            raise RecipeError(
                "None of these is a build directory.",
                where=", ".join(flags.model),
                fix="Name the -o directories of builds.",
            )
        _build(ctx, flags.for_build(), until="publish", require_verdict=flags.require_verdict)
        return
    from pipeline.publishing import publish_builds

    with output.watching():
        found = publish_builds(
            [Path(name) for name in flags.model or ()],
            flags.output or Path("model_repository"),
            chosen=flags.target or (),
            split=flags.split_by_target,
            require_verdict=flags.require_verdict,
        )
    if flags.json:
        output.show_json(
            {"repository": str(found.repository) if found.repository else None, "exit_code": found.exit_code}
        )
    else:
        output.show(found.summary)
    raise typer.Exit(found.exit_code)


def _rollback(flags: PublishFlags) -> None:
    from pipeline.triton.rollback import rollback

    if len(flags.model or ()) != 1:
        raise RecipeError(
            "A rollback needs one place.",
            where="--rollback",
            fix="Name a model repository, or one model's folder in it.",
        )
    with output.watching():
        found = rollback(Path((flags.model or [""])[0]))
    if flags.json:
        output.show_json({name: {"rolled_back": newest, "serves": before} for name, (newest, before) in found.items()})
        return
    for name, (newest, before) in found.items():
        output.show(f"{name}: version {newest} taken back, {before} is the newest again")


@app.command()
def serve(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A build directory, or a model repository.")],
    environment: Annotated[
        Path | None,
        typer.Option(
            "--server-env", metavar="DIR", help="Python environment with nvidia-pytriton, whose wheel has the server."
        ),
    ] = None,
    http_port: Annotated[int, typer.Option(metavar="PORT", help="Port for HTTP; a free one if 0.")] = 8000,
    grpc_port: Annotated[int, typer.Option(metavar="PORT", help="Port for gRPC; a free one if 0.")] = 8001,
) -> None:
    """Serve a build with tritonserver on this machine (loopback only), until Ctrl-C."""
    from pipeline.serving import serve as run

    with output.watching():
        code = run(path, output.show, environment=environment, http_port=http_port, grpc_port=grpc_port)
    raise typer.Exit(code)


@app.command(cls=RecipeCommand)
@takes(Flags)
def profile(ctx: typer.Context, flags: Flags) -> None:
    """Time every node in FP32 and INT8 on this machine and write costs.json, which planning reads."""
    from pipeline.build import profile as run

    recipe, directory = _recipe(ctx, flags)
    with output.watching() as progress:
        costs = run(recipe, directory, progress=progress)
    if flags.json:
        output.show_json({"costs": str(costs)})
    else:
        output.show(f"{output.costs_in_words(costs)}\nwrote {costs}; to plan with it, build with --costs {costs}")


@app.command(cls=RecipeCommand)
@takes(SimulateFlags)
def simulate(ctx: typer.Context, flags: SimulateFlags) -> None:
    """Compare quantization schemes on a model, those that no target executes too; deploys nothing.

    The recipe's rules and skip list say which products are quantized; precisions and targets are the schemes' own.
    """
    from pipeline.build import BuildOptions
    from pipeline.build import simulate as run
    from pipeline.report.schemes import scheme_table

    recipe, directory = _recipe(ctx, flags)
    if flags.output is None:
        directory = ctx.meta[_DIRECTORY] = directory.with_name(f"{directory.name}-schemes")
    with output.watching() as progress, output.only_results_on_stdout():
        options = BuildOptions(force=flags.force, from_stage=flags.from_stage)
        found = run(recipe, directory, schemes=flags.scheme or (), options=options, progress=progress)
    rows = [scheme.to_dict() for scheme in found]
    if flags.json:
        output.show_json({"directory": str(directory), "schemes": rows})
        return
    output.show_table(scheme_table(rows).render())


@app.command()
def extract(
    ctx: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="A build directory.")],
    nodes: Annotated[list[str], typer.Argument(metavar="NODE...", help="Node names, as inspect shows them.")],
    out: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to write to.")] = Path("extracted"),
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Variant (cpu, gpu-int8); the first if not given.")
    ] = None,
) -> None:
    """Write one layer alone, float and quantized, with its inputs and expected outputs."""
    from pipeline.build import extract as run

    ctx.meta[_DIRECTORY] = directory
    with output.watching():
        found = run(directory, nodes, out, variant=variant)
    count = f"{len(found.nodes)} node" + ("" if len(found.nodes) == 1 else "s")
    output.show(f"wrote {count} to {out}: {', '.join(sorted(file.name for file in out.iterdir()))}")


@app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="An .onnx file (its roles) or a build directory (its precision plans)."),
    ],
    target: Annotated[
        str | None, typer.Option(help="Of a build: what the compiler made of this target's variant.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="With --target: another build directory to compare with.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Every node of every block; every kernel.")] = False,
    as_json: Json = False,
) -> None:
    """Show what every node is for, or which precision it got and which rule decided, or what a compiler made of it."""
    from pipeline.inspection import inspect_path

    if target is not None:
        from pipeline.inspection_compiled import compiled_tables

        tables = compiled_tables(path, target, against=against, verbose=verbose)
        if as_json:
            output.show_json([t.to_dict() for t in tables])
            return
        for one in tables:
            output.show_table(one.render())
            output.show("")
        return
    found = inspect_path(path, verbose=verbose)
    if as_json:
        output.show_json(found.facts)
        return
    for table in found.tables:
        output.show_table(table)
    if not verbose:
        output.show(f"every node: python -m pipeline inspect -v {path}")


@app.command()
def report(
    builds: Annotated[
        list[Path], typer.Argument(metavar="DIRECTORY...", help="Build directories; two or more compare.")
    ],
    as_json: Json = False,
) -> None:
    """Show what builds came to, side by side."""
    from pipeline.report.compare import compare, read_report

    tables = compare(tuple(read_report(path) for path in builds))
    if as_json:
        output.show_json([table.to_dict() for table in tables])
        return
    for table in tables:
        output.show_table(table.render())
        output.show("")


@app.command()
def lint(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="An .onnx file, or a build directory (its variants for GPUs).")
    ],
    target: Annotated[str | None, typer.Option(metavar="NAME", help="Judge for this GPU, such as a100.")] = None,
    form: Annotated[str, typer.Option("--format", metavar="FORMAT", help="text, json or sarif.")] = "text",
    repair: Annotated[bool, typer.Option("--fix", help="Repair what is safe to repair; needs -o.")] = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Where to write the repaired model.")
    ] = None,
) -> None:
    """Judge Q/DQ placement as TensorRT will; 3 if it would refuse the graph or compute something else. Rules: docs/lint.md."""
    from pipeline.lint.command import run

    with output.watching():
        found = run(path, target=target, form=form, repair=repair, out=out)
    output.show(found.text)
    if found.remark:
        typer.echo(found.remark, err=True)
    raise typer.Exit(found.exit_code)


@app.command()
def matrix(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as pipeline.yaml.")],
) -> None:
    """Print the CI job matrix of a recipe as one line of JSON: a job for every GPU that an engine is built on."""
    import json

    from pipeline.matrix import matrix as jobs
    from pipeline.recipe import load

    output.show(json.dumps(jobs(load(recipe))))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what this machine can do, and what to install for the rest."""
    from pipeline.doctor import examine

    found = examine()
    if as_json:
        output.show_json(found.to_dict())
        return
    for table in found.tables():
        output.show_table(table.render())
        output.show("")


def _recipe(ctx: typer.Context, flags: Flags) -> tuple[Recipe, Path]:
    check_stage(flags.from_stage)
    recipe, directory = recipe_of(flags, ctx.meta[OVERRIDES])
    ctx.meta[_DIRECTORY] = directory
    return recipe, directory


def _build(ctx: typer.Context, flags: Flags, *, until: str | None = None, **more: Any) -> None:
    recipe, directory = _recipe(ctx, flags)
    from pipeline.build import BuildOptions
    from pipeline.build import build as run

    with output.watching() as progress, output.only_results_on_stdout():
        result = run(
            recipe,
            directory,
            options=BuildOptions(until=until, force=flags.force, from_stage=flags.from_stage, **more),
            progress=progress,
        )
    if more.get("dry_run") and not flags.json:
        _show_plans(result.directory)
    _show(flags, result)
    if more.get("dry_run") and not flags.json:
        output.show(f"every node: python -m pipeline inspect -v {result.directory / 'dry-run'}")
    raise typer.Exit(result.exit_code)


def _show(flags: Flags, result: BuildResult) -> None:
    if flags.json:
        facts = {"directory": str(result.directory), "exit_code": result.exit_code, "report": result.report}
        output.show_json(facts)
    else:
        output.show(result.summary)


def _show_plans(directory: Path) -> None:
    from pipeline.inspection import precision_plans

    for table in precision_plans(directory, folder="dry-run"):
        output.show_table(table.render())
        output.show("")
