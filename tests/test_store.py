from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import store as store_module
from pipeline.content import ContentHashes, canonical
from pipeline.errors import PipelineError, StoreError
from pipeline.model import save
from pipeline.notices import collecting, notice
from pipeline.store import Store


class Counted:
    """A stage that writes its text to ``out/a.txt`` and counts how often it ran."""

    def __init__(self, text="hello"):
        self.text = text
        self.runs = 0

    def __call__(self, work):
        self.runs += 1
        (work / "out/a.txt").write_text(self.text)
        return {"length": len(self.text), "pair": (1, 2)}


def run(store, produce, inputs=None, name="write", outputs=("out/a.txt",)):
    return store.stage(name, inputs=inputs or {}, outputs=outputs, produce=produce)


def left_over(build):
    """Everything in the build directory that is no result."""
    return sorted(
        str(p.relative_to(build))
        for p in build.rglob("*")
        if ".tmp" in p.name or ".work" in p.parts or p.name == "owner"
    )


def test_runs_once_and_returns_the_same_facts_again(tmp_path):
    produce = Counted()
    first = run(Store(tmp_path / "b"), produce, {"x": 1})
    second = run(Store(tmp_path / "b"), produce, {"x": 1})
    assert produce.runs == 1
    assert (first.fresh, second.fresh) == (True, False)
    assert first.facts == second.facts == {"length": 5, "pair": [1, 2]}
    assert first.key == second.key
    assert first.seconds == second.seconds
    assert first.paths == {"out/a.txt": tmp_path / "b/out/a.txt"}
    assert first.paths["out/a.txt"].read_text() == "hello"
    assert left_over(tmp_path / "b") == []


def test_key_is_canonical_json_of_everything_read(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_versions", lambda: {"numpy": "9.9"})
    file = tmp_path / "in.bin"
    file.write_bytes(b"abc")
    result = run(Store(tmp_path / "b"), Counted(), {"b": [1, file], "a": "ü"})
    text = (
        '{"inputs":{"a":"ü","b":[1,{"sha256":"' + hashlib.sha256(b"abc").hexdigest() + '"}]},'
        '"outputs":["out/a.txt"],"stage":"write","versions":{"numpy":"9.9"}}'
    )
    assert result.key == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("inputs", "again"),
    [({"x": 1}, {"x": 2}), ({"x": 1}, {"y": 1}), ({"x": [1, 2]}, {"x": [2, 1]}), ({"x": None}, {})],
)
def test_other_inputs_run_again(tmp_path, inputs, again):
    produce = Counted()
    run(Store(tmp_path), produce, inputs)
    run(Store(tmp_path), produce, again)
    assert produce.runs == 2


class Halting:
    """Writes one file of three a run, and raises until all are there."""

    def __init__(self):
        self.found = []

    def __call__(self, work):
        folder = work / "out"
        folder.mkdir(exist_ok=True)
        self.found.append(sorted(p.name for p in folder.iterdir()))
        (folder / f"{len(self.found[-1])}.txt").write_text("x")
        if len(self.found[-1]) < 2:
            raise RuntimeError("stopped")


def attempt(store, produce, inputs):
    return store.stage("long/cpu", inputs=inputs, outputs=["out"], produce=produce, resumes=True)


def test_a_stage_that_resumes_finds_what_it_had_begun(tmp_path):
    produce = Halting()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            attempt(Store(tmp_path), produce, {"x": 1})
    assert attempt(Store(tmp_path), produce, {"x": 1}).fresh
    assert produce.found == [[], ["0.txt"], ["0.txt", "1.txt"]]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0.txt", "1.txt", "2.txt"]
    assert not (tmp_path / ".begun").exists()


@pytest.mark.parametrize(("inputs", "force"), [({"x": 2}, False), ({"x": 1}, True)])
def test_what_was_begun_for_other_inputs_or_is_forced_is_not_used(tmp_path, inputs, force):
    produce = Halting()
    with pytest.raises(RuntimeError):
        attempt(Store(tmp_path), produce, {"x": 1})
    with pytest.raises(RuntimeError):
        attempt(Store(tmp_path, force=force), produce, inputs)
    assert produce.found == [[], []]
    assert len(list((tmp_path / ".begun").iterdir())) == 1


def test_what_is_forgotten_is_gone_with_what_was_begun_of_it(tmp_path):
    run(Store(tmp_path), Counted(), name="write/cpu")
    run(Store(tmp_path), Counted(), name="write/cpu-more", outputs=("more/a.txt", "out/a.txt")[1:])
    produce = Halting()
    with pytest.raises(RuntimeError):
        attempt(Store(tmp_path), produce, {"x": 1})
    (tmp_path / "out/mine.txt").write_text("kept")
    for name in ("write/cpu", "long/cpu", "never"):
        Store(tmp_path).forget(name)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert not (tmp_path / ".begun").exists()
    assert sorted(p.name for p in (tmp_path / ".stages").glob("write*")) == ["write.cpu-more.json"]
    again = Counted()
    assert run(Store(tmp_path), again, name="write/cpu").fresh
    assert again.runs == 1


def test_order_of_keys_does_not_matter(tmp_path):
    produce = Counted()
    run(Store(tmp_path), produce, {"x": 1, "y": {"a": 1, "b": 2}})
    run(Store(tmp_path), produce, {"y": {"b": 2, "a": 1}, "x": 1})
    assert produce.runs == 1


def test_package_version_is_part_of_the_key(tmp_path, monkeypatch):
    produce = Counted()
    run(Store(tmp_path), produce)
    monkeypatch.setattr(store_module, "_versions", lambda: {"numpy": "another"})
    run(Store(tmp_path), produce)
    assert produce.runs == 2


def test_changed_input_file_runs_again_and_touched_one_does_not(tmp_path):
    file = tmp_path / "in.txt"
    file.write_text("one")
    produce = Counted()
    run(Store(tmp_path / "b"), produce, {"file": file})
    os.utime(file, ns=(1, 1))
    run(Store(tmp_path / "b"), produce, {"file": file})
    assert produce.runs == 1
    file.write_text("two")  # the same size
    run(Store(tmp_path / "b"), produce, {"file": file})
    assert produce.runs == 2


def test_same_content_at_another_place_is_the_same_input(tmp_path):
    produce = Counted()
    for name in ("one", "two"):
        (tmp_path / name).write_text("same")
        run(Store(tmp_path / "b"), produce, {"file": tmp_path / name})
    assert produce.runs == 1


@pytest.mark.parametrize("change", ["rename", "edit", "add"])
def test_folder_input_is_names_and_contents(tmp_path, change):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/a").write_text("1")
    produce = Counted()
    run(Store(tmp_path / "b"), produce, {"in": folder})
    run(Store(tmp_path / "b"), produce, {"in": folder})
    assert produce.runs == 1
    if change == "rename":
        (folder / "sub/a").rename(folder / "sub/b")
    elif change == "edit":
        (folder / "sub/a").write_text("2")
    else:
        (folder / "c").write_text("")
    run(Store(tmp_path / "b"), produce, {"in": folder})
    assert produce.runs == 2


def big_model(fill):
    weight = ir.Value(name="w", const_value=ir.tensor(np.full((64, 64), fill, np.float32), name="w"))
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 64]))
    y = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 64]))
    node = ir.Node("", "MatMul", [x, weight], outputs=[y], name="mm")
    graph = ir.Graph([x], [y], nodes=[node], initializers=[weight], opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def test_onnx_input_includes_its_external_data(tmp_path):
    save(big_model(1.0), tmp_path / "m.onnx")
    produce = Counted()
    run(Store(tmp_path / "b"), produce, {"m": tmp_path / "m.onnx"})
    before = (tmp_path / "m.onnx").read_bytes()
    save(big_model(2.0), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == before  # only the data file differs
    run(Store(tmp_path / "b"), produce, {"m": tmp_path / "m.onnx"})
    assert produce.runs == 2


def test_onnx_output_takes_its_data_along_and_drops_a_stale_one(tmp_path):
    def with_data(work):
        save(big_model(1.0), work / "v/model.onnx")

    def without(work):
        onnx.save(onnx.ModelProto(ir_version=10), work / "v/model.onnx")

    store = Store(tmp_path)
    run(store, with_data, {"n": 1}, outputs=["v/model.onnx"])
    data = tmp_path / "v/model.onnx.data"
    assert data.stat().st_size == 64 * 64 * 4
    data.write_bytes(b"spoilt")
    again = run(store, with_data, {"n": 1}, outputs=["v/model.onnx"])
    assert again.fresh  # a spoilt data file is noticed
    run(store, without, {"n": 2}, outputs=["v/model.onnx"])
    assert not data.exists()


@pytest.mark.parametrize("damage", ["edit", "delete"])
def test_damaged_output_is_made_again(tmp_path, damage):
    produce = Counted()
    out = run(Store(tmp_path), produce).paths["out/a.txt"]
    out.write_text("jello") if damage == "edit" else out.unlink()
    assert run(Store(tmp_path), produce).fresh
    assert out.read_text() == "hello"


def test_folder_output_is_replaced_whole(tmp_path):
    def produce(name):
        def write(work):
            (work / "out").mkdir()
            (work / "out" / name).write_text(name)

        return write

    run(Store(tmp_path), produce("old"), {"n": 1}, outputs=["out"])
    assert not run(Store(tmp_path), produce("old"), {"n": 1}, outputs=["out"]).fresh
    run(Store(tmp_path), produce("new"), {"n": 2}, outputs=["out"])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]


def test_force_runs_all_and_from_stage_that_one_and_later(tmp_path):
    names = ["export", "quantize/cpu", "quantize/gpu", "publish"]

    def fresh(**how):
        store = Store(tmp_path, **how)
        ran = []
        for name in names:
            output = f"{name}.txt"

            def produce(work, output=output, name=name):
                (work / output).write_text(name)

            ran.append(store.stage(name, inputs={}, outputs=[output], produce=produce).fresh)
        return ran

    assert fresh() == [True] * 4
    assert fresh() == [False] * 4
    assert fresh(force=True) == [True] * 4
    assert fresh(from_stage="quantize") == [False, True, True, True]
    assert fresh(from_stage="quantize/gpu") == [False, False, True, True]
    assert fresh() == [False] * 4


def test_stage_that_raises_leaves_the_earlier_result(tmp_path):
    run(Store(tmp_path), Counted("first"), {"n": 1})

    def broken(work):
        (work / "out/a.txt").write_text("half")
        raise PipelineError("no")

    with pytest.raises(PipelineError, match="no"):
        run(Store(tmp_path), broken, {"n": 2})
    assert (tmp_path / "out/a.txt").read_text() == "first"
    assert left_over(tmp_path) == []
    assert not run(Store(tmp_path), Counted("first"), {"n": 1}).fresh


def test_undeclared_files_are_not_kept_and_missing_ones_are_a_bug(tmp_path):
    def extra(work):
        (work / "out/a.txt").write_text("a")
        (work / "out/scratch").write_text("b")

    run(Store(tmp_path), extra)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.txt"]
    with pytest.raises(RuntimeError, match=r"did not write out/a\.txt"):
        run(Store(tmp_path, force=True), lambda work: None)


@pytest.mark.parametrize("output", ["../x", "/etc/x", "", ".stages/x"])
def test_outputs_stay_inside(tmp_path, output):
    with pytest.raises(ValueError, match="inside the build directory"):
        run(Store(tmp_path), Counted(), outputs=[output])


def test_notices_are_said_again_by_a_skipped_stage(tmp_path):
    def produce(work):
        notice("few-samples", "Only 3 samples.", where="data.npz")
        return Counted()(work)

    with collecting() as first:
        run(Store(tmp_path), produce)
    with collecting() as second:
        result = run(Store(tmp_path), produce)
    assert not result.fresh
    assert first == second == list(result.notices)
    assert second[0].code == "few-samples"


def test_seconds_are_in_the_record_only(tmp_path):
    run(Store(tmp_path / "a"), Counted())
    run(Store(tmp_path / "b"), Counted())
    assert (tmp_path / "a/out/a.txt").read_bytes() == (tmp_path / "b/out/a.txt").read_bytes()
    assert "seconds" in json.loads((tmp_path / "a/.stages/write.json").read_text())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": 1}', "null"])
def test_a_spoilt_record_or_hash_memory_only_costs_a_run(tmp_path, text):
    produce = Counted()
    run(Store(tmp_path), produce)
    (tmp_path / ".stages/write.json").write_text(text)
    (tmp_path / ".stages/hashes.json").write_text(text)
    assert run(Store(tmp_path), produce).fresh
    assert not run(Store(tmp_path), produce).fresh


def test_hashes_are_remembered_and_noticed_when_stale(tmp_path, monkeypatch):
    file = tmp_path / "f"
    file.write_bytes(b"one")
    os.utime(file, ns=(1, 1))
    hashes = ContentHashes(tmp_path / "hashes.json")
    assert hashes.of_file(file) == hashlib.sha256(b"one").hexdigest()
    hashes.save()
    monkeypatch.setattr(hashlib, "file_digest", lambda *a: pytest.fail("read again"))
    assert ContentHashes(tmp_path / "hashes.json").of_file(file) == hashlib.sha256(b"one").hexdigest()
    monkeypatch.undo()
    file.write_bytes(b"two")
    assert ContentHashes(tmp_path / "hashes.json").of_file(file) == hashlib.sha256(b"two").hexdigest()


def test_a_file_just_written_is_not_trusted_to_its_clock(tmp_path):
    file = tmp_path / "f"
    hashes = ContentHashes(tmp_path / "hashes.json")
    file.write_bytes(b"one")
    stat = file.stat()
    hashes.of_file(file)
    file.write_bytes(b"two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert hashes.of_file(file) == hashlib.sha256(b"two").hexdigest()


JSONS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSONS, JSONS)
@settings(deadline=None, max_examples=100)
def test_canonical_json_is_injective(one, two):
    assert json.loads(canonical(one)) == one
    assert (canonical(one) == canonical(two)) <= (one == two)


def test_missing_input_says_which(tmp_path):
    with pytest.raises(StoreError) as error:
        run(Store(tmp_path), Counted(), {"data": tmp_path / "gone.npz"})
    assert "gone.npz" in error.value.where


# ---- killed, locked, full ------------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys
from pathlib import Path
from pipeline import store
build, where = Path(sys.argv[1]), sys.argv[2]
die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)

def produce(work):
    (work / "out/a.txt").write_text("new a")
    if where == "produce":
        die()
    (work / "out/b").mkdir()
    (work / "out/b/c.txt").write_text("new c")

if where == "moves":
    rename, count = Path.rename, [0]
    def counting(self, target):
        count[0] += 1
        if count[0] == int(sys.argv[3]):
            die()
        return rename(self, target)
    Path.rename = counting
if where == "record":
    store.write_atomically = die
store.Store(build).stage("s", inputs={"n": 2}, outputs=["out/a.txt", "out/b"], produce=produce)
"""


def two_files(text, ran):
    def produce(work):
        ran.append(text)
        (work / "out/a.txt").write_text(f"{text} a")
        (work / "out/b").mkdir()
        (work / "out/b/c.txt").write_text(f"{text} c")

    return produce


FIRST = [["produce"], ["moves", "1"], ["moves", "2"], ["record"]]
AGAIN = [*FIRST, ["moves", "3"], ["moves", "4"]]  # the earlier files are moved aside first


@pytest.mark.parametrize(("where", "earlier"), [*((w, False) for w in FIRST), *((w, True) for w in AGAIN)])
def test_killed_build_resumes(tmp_path, where, earlier):
    outputs, ran = ["out/a.txt", "out/b"], []
    if earlier:
        Store(tmp_path).stage("s", inputs={"n": 1}, outputs=outputs, produce=two_files("old", ran))
    child = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), *where], capture_output=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    for file in tmp_path.glob("out/**/*.txt"):  # whatever is there is whole
        assert file.read_text() in {"old a", "new a", "old c", "new c"}
    ran.clear()
    result = Store(tmp_path).stage("s", inputs={"n": 2}, outputs=outputs, produce=two_files("new", ran))
    assert result.fresh
    assert ran == ["new"]
    assert (tmp_path / "out/a.txt").read_text() == "new a"
    assert (tmp_path / "out/b/c.txt").read_text() == "new c"
    assert left_over(tmp_path) == []
    # and back to the earlier inputs: the mixture that the killed build left is not taken for the old result
    Store(tmp_path).stage("s", inputs={"n": 1}, outputs=outputs, produce=two_files("old", ran))
    assert (tmp_path / "out/a.txt").read_text() == "old a"


def test_killed_between_moves_never_passes_for_the_old_result(tmp_path):
    outputs, ran = ["out/a.txt", "out/b"], []
    Store(tmp_path).stage("s", inputs={"n": 1}, outputs=outputs, produce=two_files("old", ran))
    subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), "moves", "4"], capture_output=True, check=False)
    assert Store(tmp_path).stage("s", inputs={"n": 1}, outputs=outputs, produce=two_files("old", ran)).fresh


def test_failed_move_puts_the_earlier_files_back(tmp_path, monkeypatch):
    outputs, ran = ["out/a.txt", "out/b"], []
    Store(tmp_path).stage("s", inputs={"n": 1}, outputs=outputs, produce=two_files("old", ran))
    rename, count = Path.rename, [0]

    def failing(self, target):
        count[0] += 1
        if count[0] == 4:  # two asides, the first new one, then this
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(StoreError, match="disk is full"):
        Store(tmp_path).stage("s", inputs={"n": 2}, outputs=outputs, produce=two_files("new", ran))
    monkeypatch.undo()
    assert (tmp_path / "out/a.txt").read_text() == "old a"
    assert (tmp_path / "out/b/c.txt").read_text() == "old c"
    assert not Store(tmp_path).stage("s", inputs={"n": 1}, outputs=outputs, produce=two_files("old", ran)).fresh


HOLD = """
import sys, time
from pathlib import Path
from pipeline.store import Store
with Store(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock_names_the_other_process_and_dies_with_it(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match=f"pid {child.pid}"), Store(tmp_path).locked():
            pytest.fail("entered")
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    with Store(tmp_path).locked():
        pass


def _write_much(path, queue):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, 64 * 1024))

    def produce(work):
        (work / "out/a.txt").write_bytes(b"x" * (1 << 20))

    try:
        run(Store(path), produce, {"n": 2})
        queue.put("no error")
    except StoreError as error:
        queue.put(str(error))


def test_a_full_disk_is_a_clear_error_and_leaves_what_was_there(tmp_path):
    run(Store(tmp_path), Counted("first"), {"n": 1})
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=_write_much, args=(tmp_path, queue))
    child.start()
    child.join()
    said = queue.get()
    assert "disk is full" in said
    assert "fix:" in said
    assert (tmp_path / "out/a.txt").read_text() == "first"
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_unwritable_directory(tmp_path, monkeypatch, code):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code), str(tmp_path / "b"))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreError, match="cannot be written"):
        run(Store(tmp_path / "b"), Counted())


def test_build_directory_that_is_a_file(tmp_path):
    (tmp_path / "b").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        run(Store(tmp_path / "b"), Counted())


def test_an_operating_system_error_that_is_no_refusal_to_write_passes(tmp_path):
    def produce(work):
        Path("/nonexistent/file").read_text()

    with pytest.raises(FileNotFoundError):
        run(Store(tmp_path), produce)


def test_import_is_light():
    code = "import sys, pipeline.store; print(sorted(m for m in ('onnx', 'torch', 'onnxruntime') if m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
