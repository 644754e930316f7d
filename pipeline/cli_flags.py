"""The flags that build commands share.

A command states its flags as one dataclass; Typer sees them as ordinary parameters (:func:`takes`). Every key of the
recipe is a flag as well: :class:`RecipeCommand` takes those out of the command line before Typer parses it.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
from typer.core import TyperCommand

from pipeline.errors import RecipeError

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
"""Stages in order, as ``--from`` names them: those of :mod:`pipeline.stages`, which ``--help`` should not import."""

OVERRIDES = "pipeline.overrides"
"""Where a command's context keeps the recipe keys given as flags."""

_DATA, _MORE, _RUN = "Data", "More", "Run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """Flags of every command that reads a recipe."""

    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="An .onnx or .pt2 file, a Hugging Face folder or hub id, or package.module:factory. "
            "Without it ./pipeline.yaml is read.",
            show_default=False,
        ),
    ] = None
    recipe: Annotated[Path | None, typer.Option("--recipe", "-r", metavar="FILE", help="Recipe file (YAML).")] = None
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Build directory; build/NAME if not given.")
    ] = None
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="PRESET",
            help="Preset: fp32, fp16, bf16, int8 (W8A8), int8-all, fp8, fp8-int8, int4 (W4A16), w8a16, fp4, nf4.",
        ),
    ] = None
    fallback: Annotated[
        bool, typer.Option("--fallback", help="Give a target that lacks a precision the nearest that it has.")
    ] = False
    target: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="cpu or a GPU such as a100; may be repeated.")
    ] = None
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the build and of the served model.")] = None
    calibration: Annotated[
        str | None, typer.Option(metavar="DATA", help="Samples to calibrate on.", rich_help_panel=_DATA)
    ] = None
    validate: Annotated[
        str | None, typer.Option(metavar="DATA", help="Held-out samples to measure on.", rich_help_panel=_DATA)
    ] = None
    gate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'KEY>=X'", help="Condition to pass, such as 'sqnr_db>=20'; may be repeated.", rich_help_panel=_DATA
        ),
    ] = None
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH", help="Tokenizer for text.", rich_help_panel=_DATA)
    ] = None
    samples: Annotated[
        int | None, typer.Option(metavar="N", help="Calibration samples, at most.", rich_help_panel=_DATA)
    ] = None
    method: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD", help="auto, minmax, percentile, mse, entropy, entropy-trt.", rich_help_panel=_DATA
        ),
    ] = None
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Threads; 0 is one per core.", rich_help_panel=_MORE)
    ] = None
    memory_mb: Annotated[
        int | None,
        typer.Option(metavar="N", help="Memory that weights may take while a model runs, MiB.", rich_help_panel=_MORE),
    ] = None
    costs: Annotated[
        str | None, typer.Option(metavar="PATH", help="costs.json written by profile.", rich_help_panel=_MORE)
    ] = None
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of everything random.", rich_help_panel=_MORE)] = (
        None
    )
    trust_source: Annotated[
        bool, typer.Option("--trust-source", help="Run the code of a torch module or .pt2.", rich_help_panel=_MORE)
    ] = False
    trust_data: Annotated[
        bool,
        typer.Option(
            "--trust-data", help="Run the code of data or a task that is module:callable.", rich_help_panel=_MORE
        ),
    ] = False
    strip_quantization: Annotated[
        bool,
        typer.Option("--strip-quantization", help="Take Q/DQ out of a quantized model first.", rich_help_panel=_MORE),
    ] = False
    force: Annotated[bool, typer.Option("--force", help="Run every stage again.", rich_help_panel=_RUN)] = False
    from_stage: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="STAGE", help=f"Run again from here: {', '.join(STAGES)}.", rich_help_panel=_RUN
        ),
    ] = None
    json: Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.", rich_help_panel=_RUN)] = (
        False
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildFlags(Flags):
    """Flags of ``build``."""

    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Stop after planning; show the precision plan and sizes.", rich_help_panel=_RUN),
    ] = False
    require_verdict: Annotated[
        bool,
        typer.Option("--require-verdict", help="Fail (3) unless a gate was measured and passed.", rich_help_panel=_RUN),
    ] = False
    retry: Annotated[
        bool,
        typer.Option(
            "--retry",
            help="Where a builder refuses a node, plan it in high precision and go on.",
            rich_help_panel=_RUN,
        ),
    ] = False
    require_built: Annotated[
        bool, typer.Option("--require-built", help="Fail (4) unless every engine was built.", rich_help_panel=_RUN)
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishFlags(Flags):
    """Flags of ``publish``."""

    model: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL | DIR...]",
            help="A model, as for build; or finished build directories, whose engines go into one repository (-o).",
            show_default=False,
        ),
    ] = None  # type: ignore[assignment]
    split_by_target: Annotated[
        bool,
        typer.Option("--split-by-target", help="Of build directories: a model for each target.", rich_help_panel=_RUN),
    ] = False
    require_verdict: Annotated[
        bool,
        typer.Option("--require-verdict", help="Fail (3) unless a gate was measured and passed.", rich_help_panel=_RUN),
    ] = False

    rollback: Annotated[
        bool,
        typer.Option(
            "--rollback",
            help="Of a model repository, or one model's folder in it: serve the version before the newest again.",
            rich_help_panel=_RUN,
        ),
    ] = False

    def for_build(self) -> Flags:
        """Return the flags of a build of one model, which then publishes."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(Flags)}
        return Flags(**values | {"model": self.model[0] if self.model else None})


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateFlags(Flags):
    """Flags of ``calibrate``."""

    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Collect only part I of N (0/4 … 3/4).", rich_help_panel=_DATA)
    ] = None
    merge: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Add up these shards' statistics; may be repeated.", rich_help_panel=_DATA),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateFlags(Flags):
    """Flags of ``simulate``."""

    scheme: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this scheme; may be repeated. All if not given.", rich_help_panel=_RUN),
    ] = None


_Kind = TypeVar("_Kind")


def takes(kind: type[_Kind]) -> Callable[[Callable[[typer.Context, _Kind], None]], Callable[..., None]]:
    """Let a command receive its flags as one ``kind`` object while Typer sees each field as a parameter."""

    def decorate(command: Callable[[typer.Context, _Kind], None]) -> Callable[..., None]:
        def called(ctx: typer.Context, **given: Any) -> None:
            command(ctx, kind(**given))

        hints = get_type_hints(kind, include_extras=True)
        fields = dataclasses.fields(kind)  # type: ignore[arg-type]
        parameters = [inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
        parameters += [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
            for f in fields
        ]
        called.__name__, called.__doc__ = command.__name__, command.__doc__
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in parameters}
        return called

    return decorate


class RecipeCommand(TyperCommand):
    """A command that also takes every recipe key as a flag: ``--calibration.samples 64``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep the recipe keys among ``args`` in ``ctx.meta`` and parse the rest.

        Raises:
            RecipeError: A flag that is neither an option nor a recipe key; names the nearest.
        """
        overrides: dict[str, str] = {}
        rest = self._split(args, overrides)
        ctx.meta[OVERRIDES] = overrides
        return super().parse_args(ctx, rest)

    def _split(self, args: list[str], overrides: dict[str, str]) -> list[str]:
        options = {name: param for param in self.params for name in param.opts if name.startswith("-")}
        rest: list[str] = []
        queue = list(args)
        while queue:
            token = queue.pop(0)
            flag, has_value, value = token.partition("=")
            if token == "--":
                return [*rest, token, *queue]
            if not token.startswith("--") or flag == "--help" or flag in options:
                rest.append(token)
                if flag in options and not has_value and not getattr(options[flag], "is_flag", False) and queue:
                    rest.append(queue.pop(0))
                continue
            key = _known_key(flag, list(options))
            overrides[key] = value if has_value else _next_value(key, queue)
        return rest


def _known_key(flag: str, options: list[str]) -> str:
    from pipeline.recipe import Recipe
    from pipeline.recipe.text import find_key

    key = flag.removeprefix("--").replace("-", "_")
    near = difflib.get_close_matches(flag, options, n=1, cutoff=0.75)
    try:
        find_key(key, Recipe)
    except RecipeError as error:
        if near and "." not in flag:
            raise RecipeError(
                f"There is no option {flag}; did you mean {near[0]}?",
                where="command line",
                fix="Run with --help to see all.",
            ) from error
        raise
    return key


def _next_value(key: str, queue: list[str]) -> str:
    """Return the flag's value; a true-or-false key may go without."""
    from pipeline.recipe import Recipe
    from pipeline.recipe.text import is_switch

    follows = queue[0] if queue else None
    if is_switch(key, Recipe) and follows not in ("true", "false"):
        return "true"
    if follows is None or follows.startswith("--"):
        raise RecipeError(f"--{key} needs a value.", where="command line", fix=f"Write --{key} VALUE.")
    return queue.pop(0)


def check_stage(stage: str | None) -> None:
    """Refuse a ``--from`` that names no stage.

    Raises:
        RecipeError: Names the nearest stage.
    """
    if stage is None or stage.partition("/")[0] in STAGES:
        return
    near = difflib.get_close_matches(stage, STAGES, n=1)
    raise RecipeError(
        f"There is no stage {stage!r}" + (f"; did you mean {near[0]}?" if near else "."),
        where="--from",
        fix=f"The stages are: {', '.join(STAGES)}.",
    )


def shard_of(text: str | None) -> tuple[int, int] | None:
    """Return ``"1/4"``, the second of four parts, as ``(1, 4)``.

    Raises:
        RecipeError: Not ``I/N`` with 0 <= I < N.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or int(match[1]) >= int(match[2]):
        raise RecipeError(f"{text!r} is no part.", where="--shard", fix="Write --shard 0/4 … 3/4.")
    return int(match[1]), int(match[2])
