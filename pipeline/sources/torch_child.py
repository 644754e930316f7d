"""The child process: ``python -m pipeline.sources.torch_child JOB OUT``, started by :mod:`pipeline.sources.child`."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO

from pipeline.errors import PipelineError
from pipeline.notices import collecting
from pipeline.sources.job import Job


def main(arguments: list[str]) -> int:
    """Carry out the job and report on standard output; return the exit code."""
    channel = _take_standard_output()

    def say(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    job, out = Job.loads(arguments[0]), Path(arguments[1])
    logging.getLogger("pipeline.notice").addHandler(logging.NullHandler())
    with collecting() as notices:
        try:
            from pipeline.sources import torch_jobs

            difference = torch_jobs.run(job, out, lambda *step: say(progress=step))
            final: dict[str, Any] = {"done": difference}
        except PipelineError as error:
            fields = {"kind": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix}
            final = {"error": fields}
        except MemoryError:
            traceback.print_exc()
            return 1
    for item in notices:
        say(notice=item.to_dict())
    say(**final)
    return 0


def _take_standard_output() -> TextIO:
    """Return the stream to the parent; whatever else is printed goes to standard error from now on."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


if __name__ == "__main__":
    # os._exit: the results are written, and torch's worker threads must not hold the end of the process up.
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
