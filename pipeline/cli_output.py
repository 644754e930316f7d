"""What commands show: progress and warnings on stderr, results on stdout, errors in a few lines."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import shutil
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID
    from rich.table import Table

EXIT_BUG, EXIT_INTERRUPTED = 70, 130


WIDTH = 100
"""Columns of text where there is no terminal."""

_TITLES = {
    "write": "write model",
    "send": "read and send data",
    "scales": "quantize: scales",
    "quantize": "quantize: weights",
    "tune": "choose ranges",
    "validate": "validate: outputs",
    "task": "validate: task",
    "latency": "validate: latency",
    "layers": "validate: layers",
}
"""Stages whose name alone says too little."""

_REPORT_SECONDS = 20.0
"""Where there is no terminal, a stage that goes on longer says so this often."""

_EVEN_STEPS = 8
"""A stage of fewer steps than this has uneven ones, which say nothing about the time left."""


class _Bars:
    """Shows each stage as a bar with its remaining time; where there is no terminal, lines for a log.

    A stage's time is counted from the end of the one before: some report only when they are through.
    """

    def __init__(self, bars: Bars, terminal: bool) -> None:
        self._bars, self._terminal = bars, terminal
        self._tasks: dict[str, TaskID] = {}
        self._finished: set[str] = set()
        self._began = self._said = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        title = _TITLES.get(stage, stage)
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(title, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)
        now = time.monotonic()
        if done < total:
            self._finished.discard(stage)
            if not self._terminal and done and now - self._said >= _REPORT_SECONDS:
                left = (now - self._began) / done * (total - done)
                guess = f", about {left:.0f} s left" if total >= _EVEN_STEPS else ""
                self._say(f"{title}: {done} of {total}{guess}", now)
        elif stage not in self._finished:
            self._finished.add(stage)
            if not self._terminal:
                self._say(f"{title}: done in {now - self._began:.1f} s", now)
            self._began = now

    def _say(self, line: str, now: float) -> None:
        typer.echo(line, err=True)
        self._said = now


class _Warnings(logging.Handler):
    """Shows notices as they are said, each once."""

    def __init__(self, bars: Bars, terminal: bool) -> None:
        super().__init__()
        self._bars, self._terminal, self._said = bars, terminal, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text in self._said:
            return
        self._said.add(text)
        lines = wrapped(f"warning: {text}", hanging=9)
        if self._terminal:
            shown = _escaped(lines).replace("warning:", "[yellow]warning:[/yellow]", 1)
            self._bars.console.print(shown, highlight=False, soft_wrap=True)
        else:
            typer.echo(lines, err=True)


@contextlib.contextmanager
def watching() -> Iterator[_Bars]:
    """Show progress and notices on stderr during the block; yields what a stage calls to report progress."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    log = logging.getLogger("pipeline.notice")
    handler, propagate = _Warnings(bars, console.is_terminal), log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        with bars:
            yield _Bars(bars, console.is_terminal)
    finally:
        log.removeHandler(handler)
        log.propagate = propagate


@contextlib.contextmanager
def only_results_on_stdout() -> Iterator[None]:
    """Send to stderr during the block what libraries print on stdout, as Ray does about a lost node."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def show(text: str) -> None:
    """Print a result on stdout."""
    typer.echo(text)


def show_json(value: Any) -> None:
    """Print a machine-readable result on stdout."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def show_table(table: Table) -> None:
    """Print a table on stdout: as wide as the terminal, or as its content where there is none."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        wide = Console(width=4096)
        console = Console(width=max(80, wide.measure(table).maximum))
    console.print(table)


def show_error(error: PipelineError) -> None:
    """Print what happened, where and what to do on stderr."""
    what, *more = str(error).splitlines()
    typer.secho(wrapped(f"error: {what}", hanging=7), err=True, fg=typer.colors.RED)
    for line in more:
        typer.echo(wrapped(line, hanging=len(line) - len(line.lstrip()) + 2), err=True)


def wrapped(line: str, *, hanging: int) -> str:
    """Return a message broken between words to fit the terminal; lines after the first are indented by ``hanging``."""
    width = shutil.get_terminal_size((WIDTH, 24)).columns if sys.stderr.isatty() else WIDTH
    if len(line) <= width:
        return line
    return textwrap.fill(
        line, max(width, 40), subsequent_indent=" " * hanging, break_long_words=False, break_on_hyphens=False
    )


def costs_in_words(file: Path) -> str:
    """Return what a ``costs.json`` says, in a sentence."""
    nodes = json.loads(file.read_text(encoding="utf-8"))["nodes"]
    fp32, int8 = (sum(node[key] for node in nodes.values()) for key in ("fp32_ms", "int8_ms"))
    slower = sum(node["int8_ms"] >= node["fp32_ms"] for node in nodes.values())
    return (
        f"{len(nodes)} quantized nodes take {int8:.3g} ms, in FP32 {fp32:.3g} ms; "
        f"{slower or 'none'} of them {'is' if slower == 1 else 'are'} slower in INT8"
    )


def show_version(wanted: bool) -> None:
    """Print the version and end, if it is ``wanted``: the callback of an option."""
    if wanted:
        typer.echo(f"enginewright {importlib.metadata.version('enginewright')}")
        raise typer.Exit


def show_crash(error: Exception, directory: Path | None) -> None:
    """Write the traceback of a bug to a file and say where it is."""
    folder = directory if directory is not None and directory.is_dir() else Path(tempfile.gettempdir())
    log = folder / f"crash-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.log"
    text = "".join(traceback.format_exception(error))
    try:
        log.write_text(f"{' '.join(sys.argv)}\nPython {sys.version}\n\n{text}", encoding="utf-8")
        place = f"the traceback is in {log}"
    except OSError as refused:
        place = f"no crash log could be written ({refused.strerror}); run again with --debug to see the traceback"
    typer.secho(
        f"error: this is a bug ({type(error).__name__}: {_first_line(error)}); {place}", err=True, fg=typer.colors.RED
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
