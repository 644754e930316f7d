"""``python -m pipeline.harness``: lm-evaluation-harness's own command, with builds among its models."""

from __future__ import annotations

import sys

from pipeline.__main__ import leave_current_folder
from pipeline.errors import PipelineError


def main() -> int:
    """Run the command; a :class:`PipelineError` is printed and its exit code returned."""
    try:
        from pipeline.harness.model import cli_evaluate

        cli_evaluate()
    except PipelineError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    leave_current_folder()
    sys.exit(main())
