"""Builds one recipe in one directory, killed at one point after another; run by test_stages_resume.py.

Each attempt is a forked child whose store kills the process with SIGKILL where it is told. Prints, as JSON, the
points at which a child died.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.recipe import load
from pipeline.stages import reporting
from pipeline.store import Store
from tests.stages.builds import run

STAGES = ("prepare", "calibrate", "plan/cpu", "ranges/cpu", "quantize/cpu", "engines/cpu", "validate/cpu", "publish")
MOMENTS = ("begins", "has written", "has moved")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: tuple[str, str]) -> None:
    """Let this process die when a stage begins, has written its files, or has moved them but not recorded it."""
    stage, moment = point
    if stage == "report":
        reporting.write_html = lambda *_: die()  # type: ignore[assignment]
        return
    original_run, original_move = Store._run, Store._move

    def run_stage(
        self: Store, name: str, key: str, outputs: list[str], produce: Callable[[Path], Any], *, resumes: bool
    ) -> Any:
        def doomed(work: Path) -> Any:
            if moment == "begins":
                die()
            result = produce(work)
            if moment == "has written":
                die()
            return result

        if name != stage:
            return original_run(self, name, key, outputs, produce, resumes=resumes)
        if moment == "has moved":

            def move(self: Store, work: Path, moved: list[str], aside: Path) -> None:
                original_move(self, work, moved, aside)
                die()

            Store._move = move  # type: ignore[method-assign]
        return original_run(self, name, key, outputs, doomed, resumes=resumes)

    Store._run = run_stage  # type: ignore[method-assign]


def attempt(recipe: Path, directory: Path, point: tuple[str, str] | None) -> bool:
    """Return whether the child was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if point is not None:
                arm(point)
            status = run(load(recipe), directory).exit_code
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"the build failed at {point}")
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def main() -> None:
    recipe, directory = Path(sys.argv[1]), Path(sys.argv[2])
    points = [(stage, moment) for stage in STAGES for moment in MOMENTS] + [("report", "begins")]
    died = [list(point) for point in points if attempt(recipe, directory, point)]
    assert not attempt(recipe, directory, None)
    sys.stdout.write(json.dumps(died))


if __name__ == "__main__":
    main()
