"""What commands show: progress and warnings on stderr, results on stdout, errors in a few lines."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
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


class _Bars:
    """Shows each stage as a bar with its remaining time; one line per finished stage where there is no terminal."""

    def __init__(self, bars: Bars, terminal: bool) -> None:
        self._bars, self._terminal = bars, terminal
        self._tasks: dict[str, TaskID] = {}
        self._finished: set[str] = set()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)
        if done < total:
            self._finished.discard(stage)
        elif not self._terminal and stage not in self._finished:
            self._finished.add(stage)
            seconds = self._bars.tasks[self._tasks[stage]].elapsed or 0.0
            typer.echo(f"{stage}: {total} done in {seconds:.1f} s", err=True)


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
        if self._terminal:
            self._bars.console.print(f"[yellow]warning:[/yellow] {_escaped(text)}", highlight=False)
        else:
            typer.echo(f"warning: {text}", err=True)


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
    typer.secho(f"error: {what}", err=True, fg=typer.colors.RED)
    for line in more:
        typer.echo(line, err=True)


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
