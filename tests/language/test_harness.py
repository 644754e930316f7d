"""A build in lm-evaluation-harness: a task defined here, its figures against torch's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from pipeline.build import BuildResult
from pipeline.errors import RecipeError


def test_without_the_package_the_command_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "lm_eval.py").write_text("raise ImportError('it is not here')")
    root = Path(__file__).parents[2]
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]; from pipeline.harness import __main__ as m; sys.exit(m.main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "pip install '.[lm-eval]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """``tiny_choice`` (which of two continuations), ``tiny_text`` (perplexity of texts), ``tiny_generation``."""
    choices = [{"q": "5 17 80", "a": "44 9", "b": "7 31"}, {"q": "12 13", "a": "90 4 3", "b": "8 8 8"}]
    texts = [{"text": "5 17 80 44 9 3 21"}, {"text": "70 8 91"}]
    for name, rows in (("choice", choices), ("text", texts)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(name: str, data: str, more: str) -> None:
        head = f"task: tiny_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/{data}.jsonl}}}}\ntest_split: test\n"
        (tmp_path / f"{name}.yaml").write_text(head + more)

    write(
        "choice",
        "choice",
        'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{[a, b]}}"\ndoc_to_target: 0\n'
        "metric_list: [{metric: acc}]\n",
    )
    write(
        "text",
        "text",
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: word_perplexity}]\n",
    )
    write(
        "generation",
        "choice",
        'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
        'generation_kwargs: {until: [" 3"], max_gen_toks: 7, do_sample: false}\n'
        "metric_list: [{metric: exact_match}]\n",
    )
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_a_build_runs_tasks_with_the_figures_that_torch_gives(
    built: tuple[Path, BuildResult], llama: Path, tasks: Path
) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed ('.[lm-eval]')")
    from lm_eval.tasks import TaskManager

    from pipeline.harness.model import EnginewrightLM

    names = ["tiny_choice", "tiny_text", "tiny_generation"]
    manager = TaskManager(include_path=str(tasks), include_defaults=False)

    def evaluate(target: str, batch_size: int) -> dict[str, list[dict]]:
        model = EnginewrightLM(build=str(built[0]), target=target, batch_size=batch_size)
        found = lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0)
        return {name: sorted(found["samples"][name], key=lambda s: s["doc_id"]) for name in names}

    torch_model = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()

    def likelihood(context: list[int], wanted: list[int]) -> float:
        with torch.no_grad():
            logits = torch_model(torch.tensor([context + wanted])).logits[0].double().log_softmax(-1)
        return sum(float(logits[len(context) + i - 1, token]) for i, token in enumerate(wanted))

    fp32 = evaluate("fp32", 3)
    for sample in fp32["tiny_choice"]:
        doc = sample["doc"]
        context = [int(w) for w in doc["q"].split()]
        wanted = [likelihood(context, [int(w) for w in doc[key].split()]) for key in ("a", "b")]
        np.testing.assert_allclose([float(r[0]) for r in sample["filtered_resps"]], wanted, rtol=1e-4)
    for sample in fp32["tiny_text"]:
        ids = [int(w) for w in sample["doc"]["text"].split()]
        assert float(sample["filtered_resps"][0]) == pytest.approx(likelihood([1], ids), rel=1e-4)
    for sample in fp32["tiny_generation"]:
        ids = torch.tensor([[int(w) for w in sample["doc"]["q"].split()]])
        with torch.no_grad():
            made = torch_model.generate(ids, max_new_tokens=7, do_sample=False, eos_token_id=1, pad_token_id=0)
        text = " ".join(str(int(t)) for t in made[0, ids.shape[1] :] if t > 2)
        assert sample["filtered_resps"][0] == text.partition(" 3")[0]
    # The quantized engine and the simulated GPU variant run the same tasks; they are near, and not the float model.
    for target in ("cpu", "a100"):
        near = [float(s["filtered_resps"][0]) for s in evaluate(target, 1)["tiny_text"]]
        exact = [float(s["filtered_resps"][0]) for s in fp32["tiny_text"]]
        assert near != exact
        np.testing.assert_allclose(near, exact, rtol=0.05)


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_build_or_target_is_an_error_that_says_what_there_is(built: tuple[Path, BuildResult]) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed ('.[lm-eval]')")
    from pipeline.harness.model import EnginewrightLM

    with pytest.raises(RecipeError, match="no target l4"):
        EnginewrightLM(build=str(built[0]), target="l4")
    with pytest.raises(RecipeError, match="holds no finished build"):
        EnginewrightLM(build=str(built[0] / "nowhere"))
    with pytest.raises(RecipeError, match="Name one model"):
        EnginewrightLM()
