"""``python -m pipeline``.

Python puts the current folder first on the module path of ``python -m``. People run this in the folder of a model they
downloaded, and a ``yaml.py`` lying there would be imported, so the folder is taken off before anything else is imported.
It stays if it is the folder that holds this very package: a checkout that is not installed.
"""

import os
import sys


def leave_current_folder() -> None:
    """Take the current folder off the front of the module path, where ``-m`` (without ``-P``) put it.

    Processes that this one starts do not get it either: ``multiprocessing`` starts them with ``-c``, which does the same.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    if sys.flags.safe_path or not sys.path:
        return
    first = sys.path.pop(0)
    from pathlib import Path

    if Path(first).resolve() == Path(__file__).resolve().parents[1]:
        sys.path.insert(0, first)


if __name__ == "__main__":
    leave_current_folder()

    from pipeline.cli import app

    app(prog_name="python -m pipeline")
