"""``python -m pipeline`` in a folder that somebody else filled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline
from pipeline.__main__ import leave_current_folder

CHECKOUT = Path(pipeline.__file__).resolve().parents[1]
HOSTILE = "import pathlib; pathlib.Path('executed').touch(); raise SystemExit('executed ' + __name__)\n"


def run(folder: Path, *args: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run in ``folder`` with the checkout importable the way an installed package is."""
    command = ["-c", code] if code is not None else ["-m", "pipeline", *args]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_modules_in_the_current_folder_are_not_imported(tmp_path):
    for name in ("yaml", "typer", "numpy", "onnx", "pydantic", "pathlib", "rich"):
        (tmp_path / f"{name}.py").write_text(HOSTILE)
    result = run(tmp_path, "init")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "pipeline.yaml").is_file()
    assert not (tmp_path / "executed").exists()
    # The trap works: without `-m pipeline` doing something about it, Python imports it.
    assert "executed yaml" in run(tmp_path, code="import yaml").stderr


def test_processes_that_it_starts_do_not_import_them_either(tmp_path, monkeypatch):
    (tmp_path / "yaml.py").write_text(HOSTILE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    leave_current_folder()
    assert run(tmp_path, code="import yaml").returncode == 0


def test_the_folder_stays_if_it_holds_this_package(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    for folder, stays in ((CHECKOUT, True), (tmp_path, False)):
        monkeypatch.setattr(sys, "path", [str(folder), "/elsewhere"])
        leave_current_folder()
        assert (str(folder) in sys.path) is stays
        assert sys.path[-1] == "/elsewhere"


@pytest.mark.parametrize("trusted", [True, False])
def test_code_that_the_recipe_names_and_trusts_is_found_in_the_current_folder(tmp_path, trusted):
    (tmp_path / "mydata.py").write_text(
        "import numpy as np\n\ndef samples():\n    for i in range(4):\n        yield {'x': np.full(3, i, np.float32)}\n"
    )
    code = (
        "import sys; sys.path.remove('')\n"  # what `python -m pipeline` does
        "import numpy as np\n"
        "from calibrators.data.open import open_data\n"
        "from calibrators.data.spec import DataSpec\n"
        "from pipeline.types import TensorInfo\n"
        "x = TensorInfo(name='x', dtype=np.dtype('float32'), shape=('batch', 3))\n"
        f"print(len(open_data(DataSpec(data='mydata:samples', trust_data={trusted}), [x])))\n"
    )
    result = run(tmp_path, code=code)
    assert (result.stdout.strip() == "4") is trusted, result.stderr


def test_a_task_in_the_current_folder_is_found(tmp_path):
    (tmp_path / "mytask.py").write_text("def metric(runner, data, labels):\n    return {'answer': 42}\n")
    code = (
        "import sys; sys.path.remove('')\n"
        "from pipeline.recipe import Validation\n"
        "from pipeline.validation.tasks import open_task\n"
        "task = open_task(Validation(task='mytask:metric', trust_data=True), [])\n"
        "print(task.score(None, None))\n"
    )
    result = run(tmp_path, code=code)
    assert "42" in result.stdout, result.stderr
