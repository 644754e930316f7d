"""Runs the commands that the tutorials show and writes what they print into the pages.

    make tutorials                                    # all
    python docs/tutorials/regenerate.py minilm        # one

A page's ``console`` blocks are its script: each holds a line ``$ COMMAND`` (continued after a backslash) and the output, which is
replaced by standard output, and by the exit code if a gate failed. Commands run from the repository's
root, in the order of the page, with this Python first on PATH. What differs from run to run (times, ratios of times, folders of
this machine) becomes ``…``, and the line that says that INT8 is slower on this machine is left out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = tuple(sorted(Path(__file__).parent.glob("*.md")))

_BLOCK = re.compile(r"^```console\n\$ (?P<command>(?:.*\\\n)*.*)\n(?P<output>(?:(?!```).*\n)*)```$", re.MULTILINE)
_VARIES = (
    (re.compile(re.escape(f"{ROOT}/")), ""),
    (re.compile(r"\S*/site-packages/"), "…/site-packages/"),
    (re.compile(r"\b(?:\d+ min )?\d+(?:\.\d+)?(?= (?:ms|s)\b)"), "…"),
    (re.compile(r"\b\d+(?:\.\d+)?(?=x\b)"), "…"),
    (re.compile(r"(…(?: ms|x)) {2,}"), r"\1  "),  # a table's padding goes by the figure's length
    (re.compile(r" \(\d+ stages? kept from before\)"), ""),
    (re.compile(r"^The engine is SLOWER than .*\n", re.MULTILINE), ""),
    (re.compile(r"\d+(?= warnings? in the report)"), "…"),  # one of them may be about speed
)
_CODES = {3: "a gate failed"}


def main(names: list[str]) -> None:
    """Write the named pages again, or all."""
    for page in PAGES:
        if not names or page.stem in names:
            page.write_text(from_scratch(page), encoding="utf-8")


def from_scratch(page: Path) -> str:
    """Return a page with the outputs of a run that finds nothing in ``build/tutorials/PAGE``."""
    shutil.rmtree(ROOT / "build/tutorials" / page.stem, ignore_errors=True)
    return regenerated(page.read_text(encoding="utf-8"), run)


def commands(text: str) -> list[str]:
    """Return the commands of a page in their order, each on one line."""
    return [match["command"].replace("\\\n", "") for match in _BLOCK.finditer(text)]


def outputs(text: str) -> list[str]:
    """Return what a page shows for each of its commands."""
    return [match["output"] for match in _BLOCK.finditer(text)]


def regenerated(text: str, runs: Callable[[str], str]) -> str:
    """Return a page with the output of every command replaced by what ``runs`` returns for it."""

    def block(match: re.Match[str]) -> str:
        return f"```console\n$ {match['command']}\n{runs(match['command'])}```"

    return _BLOCK.sub(block, text)


def run(command: str) -> str:
    """Return what a command prints, settled, each line ended; what it says on stderr is passed on.

    Raises:
        SystemExit: It fails with a code that no tutorial shows.
    """
    print(f"$ {command}", file=sys.stderr, flush=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stderr, file=sys.stderr, flush=True)
    if done.returncode and done.returncode not in _CODES:
        raise SystemExit(f"exit code {done.returncode}: {command}")
    ending = f"(exit code {done.returncode}: {_CODES[done.returncode]})\n" if done.returncode else ""
    return settled(done.stdout) + ending


def settled(output: str) -> str:
    """Return an output without what differs from run to run and from machine to machine."""
    for pattern, shown in _VARIES:
        output = pattern.sub(shown, output)
    return "".join(f"{line.rstrip()}\n" for line in output.rstrip().splitlines())


if __name__ == "__main__":
    main(sys.argv[1:])
