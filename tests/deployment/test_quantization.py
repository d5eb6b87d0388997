"""int8: what is quantised, from which clips, and what is done when it costs too much."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, lively

from clips.manifest import ClipRow
from deployment import quantization
from deployment.files import read_exported, read_metadata
from deployment.graph import to_openvino, trace
from deployment.quantization import Cost, calibration_rows, measure_cost, quantize
from deployment.step import ClipsByStep, StepNames, trace_step
from evaluation.predictions import Predictions
from modeling.engines import OpenVINOEngine
from utils.errors import UserError

openvino = pytest.importorskip("openvino")
pytest.importorskip("nncf")

N, SIZE = 4, 32


def clips(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (1, N, 3, SIZE, SIZE), dtype=np.uint8) for _ in range(count)]


@pytest.fixture(scope="module")
def tsm() -> "openvino.Model":
    return to_openvino(trace(lively(), N, SIZE))


@pytest.fixture(scope="module")
def int8(tsm: "openvino.Model") -> "openvino.Model":
    return quantize(tsm, clips(4), transformer=False, vnni=False)


def sources(node: "openvino.Node", through: set[str]) -> set[str]:
    """The kinds of nodes that a value comes from, looked for through nodes that only move it."""
    kinds = set()
    for value in node.input_values():
        source = value.get_node()
        kind = source.get_type_name()
        kinds |= sources(source, through) if kind in through else {kind}
    return kinds


def test_every_convolution_of_a_tsm_reads_int8(int8: "openvino.Model") -> None:
    """Also those behind the shifts, which would be left in fp32 if the shift had its own zeros."""
    moving = {"Reshape", "Slice", "StridedSlice", "Pad", "Concat", "MaxPool"}
    convs = [op for op in int8.get_ordered_ops() if op.get_type_name() == "Convolution"]
    assert len(convs) == 20
    for conv in convs:
        data, weights = (value.get_node() for value in conv.input_values())
        kinds = {data.get_type_name()}
        if kinds & moving:
            kinds = sources(data, moving)
        assert kinds - {"Constant"} == {"FakeQuantize"}, conv.get_friendly_name()
        constants = {weights.get_type_name()} | sources(weights, {"Multiply", "Convert"})
        assert "Constant" in constants


def test_the_weights_are_int8(
    tsm: "openvino.Model", int8: "openvino.Model", tmp_path: Path
) -> None:
    def size(model: "openvino.Model", name: str) -> int:
        openvino.serialize(model, tmp_path / f"{name}.xml", tmp_path / f"{name}.bin")
        return (tmp_path / f"{name}.bin").stat().st_size

    assert size(int8, "int8") < 0.3 * size(tsm, "fp32")


def test_without_vnni_products_cannot_overflow(int8: "openvino.Model") -> None:
    """A pair of products of 8 bits by 7 bits fits into 16 bits: 2 x 255 x 64 < 32768."""
    for op in int8.get_ordered_ops():
        if op.get_type_name() == "Constant" and op.get_element_type() == openvino.Type.i8:
            assert abs(op.get_data().astype(int)).max() <= 64


@torch.inference_mode()
def test_int8_answers_like_fp32_and_twice_the_same(
    tsm: "openvino.Model", int8: "openvino.Model"
) -> None:
    again = quantize(tsm, clips(4), transformer=False, vnni=False)
    fp32, first, second = (OpenVINOEngine(model, 1) for model in (tsm, int8, again))
    batch = torch.from_numpy(np.concatenate(clips(16, seed=1)))
    logits = fp32(batch)
    assert torch.equal(first(batch), second(batch))
    difference = (first(batch) - logits).abs().max() / logits.std()
    assert 0 < difference < 0.5


def test_nothing_is_printed(tsm: "openvino.Model", capsys: pytest.CaptureFixture) -> None:
    quantize(tsm, clips(1), transformer=False, vnni=True)
    assert capsys.readouterr().out == ""


def test_nothing_is_sent() -> None:
    """Neither OpenVINO nor NNCF finds the package that sends statistics."""
    code = """
from utils.errors import require_package
require_package("openvino", "a test")
require_package("nncf", "a test")
import nncf.telemetry.wrapper, openvino.tools.ovc.convert_impl as ovc
print(ovc.tm.__name__, nncf.telemetry.wrapper.telemetry)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "telemetry_stub" in done.stdout
    assert "MagicMock" in done.stdout


def rows(patients: str, split: str, per_class: int = 3) -> list[ClipRow]:
    return [
        ClipRow(Path(f"{split}-{patient}-{label}-{i}.mp4"), label, patient)
        for patient in patients
        for label in range(2)
        for i in range(per_class)
    ]


def test_calibration_clips_are_spread_over_training_patients_and_classes() -> None:
    splits = {"train": rows("abcd", "train"), "val": rows("e", "val"), "test": rows("f", "test")}
    chosen = calibration_rows(splits, 16)
    assert len(set(chosen)) == 16
    assert set(chosen) <= set(splits["train"])
    counts = {
        (p, y): sum((r.patient, r.label) == (p, y) for r in chosen) for p in "abcd" for y in (0, 1)
    }
    assert set(counts.values()) == {2}
    assert calibration_rows(splits, 1000) and len(calibration_rows(splits, 1000)) == 24


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_patient_of_another_split_is_not_calibrated_on(split: str) -> None:
    splits = {"train": rows("abc", "train"), "val": rows("e", "val"), "test": rows("f", "test")}
    splits[split] = rows("ca", split)
    with pytest.raises(UserError, match=f"patients of the training are in {split} as well"):
        calibration_rows(splits, 8)


def predictions(answers: list[int], labels: list[int], patients: str) -> Predictions:
    rows = enumerate(zip(labels, patients, strict=True))
    table = [ClipRow(Path(f"{i}.mp4"), label, patient) for i, (label, patient) in rows]
    return Predictions(table, np.eye(2)[answers] * 0.8 + 0.1)


def test_the_cost_by_hand() -> None:
    labels = [0, 0, 0, 1, 1, 1]
    fp32 = predictions(labels, labels, "aabbcc")
    int8 = predictions([0, 0, 1, 1, 1, 1], labels, "aabbcc")
    cost = measure_cost(fp32, int8)
    assert cost[:3] == (6, 3, pytest.approx(5 / 6))
    # Class 0: precision 1, recall 2/3; class 1: precision 3/4, recall 1.
    assert cost.after == pytest.approx((0.8 + 6 / 7) / 2)
    assert cost.before == 1
    assert not cost.acceptable
    low, high = cost.interval
    assert low < cost.difference <= high == 0
    assert "difference -0.1714" in cost.describe()
    assert "cannot exclude a loss" in cost.describe()
    assert measure_cost(fp32, fp32).acceptable


def test_unknown_patients_give_no_interval() -> None:
    labels = [0, 1, 0, 1]
    fp32 = predictions(labels, labels, [None] * 4)
    assert "no interval" in measure_cost(fp32, fp32).describe()


@pytest.mark.parametrize("lost", [False, True])
def test_export_keeps_fp32_where_int8_loses_more_than_a_point(
    lost: bool,
    trained: tuple[Path, str],
    run_main: Callable,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from export import main

    run, file = trained[0], tmp_path / "net.xml"
    cost = Cost(9, 3, 0.5 if lost else 1.0, 0.9, 0.8 if lost else 0.9, [-0.2, 0.0])
    monkeypatch.setattr(quantization, "measure_cost", lambda *_: cost)
    flags = ["--format", "openvino", "--int8", "--output", file, "--num-workers", 0]
    done = run_main(main, run, *flags, cwd=tmp_path, code=int(lost))
    assert ("the file stays in fp32" in done.stdout) == lost
    state, engine = read_exported(file)
    assert state["exported"]["precision"] == ("fp32" if lost else "int8")
    assert ("int8" in read_metadata(file)) != lost
    assert engine(torch.from_numpy(np.concatenate(clips(2)))).shape == (2, 3)


def test_the_step_of_a_stream_in_int8() -> None:
    """The number of frames seen stays exact, and every convolution reads int8."""
    model = lively(shift_mode="causal")
    program, memory = trace_step(model, N, SIZE)
    names = StepNames(len(memory))
    graph = to_openvino(program, names.inputs, names.outputs)
    fp32 = OpenVINOEngine(graph, 1)
    fp32.memory = memory
    batch = torch.from_numpy(np.concatenate(clips(6)))
    by_step = ClipsByStep(fp32)
    with torch.inference_mode():
        torch.testing.assert_close(by_step(batch), model(batch), atol=1e-5, rtol=0)
    samples = [inputs for clip in batch for inputs in by_step.inputs(clip)]
    assert [inputs["memory_0"].item() for inputs in samples] == [N // 2, N - 1] * len(batch)
    quantised = quantize(graph, samples, transformer=False, vnni=False)
    convs = [op for op in quantised.get_ordered_ops() if op.get_type_name() == "Convolution"]
    moving = {"Reshape", "Slice", "StridedSlice", "Concat", "MaxPool", "Unsqueeze", "Squeeze"}
    for conv in convs:
        assert sources(conv, {*moving, "Multiply", "Convert"}) - {"Constant"} == {"FakeQuantize"}
    int8 = OpenVINOEngine(quantised, 1)
    int8.memory = memory
    zeros = ClipsByStep(int8).empty_memory()
    for seen in (1, 2, 3, 4, 4):
        outputs = int8.compute({"frame": batch[:1, 0].numpy(), **zeros})
        zeros = {name: outputs[f"{name}_next"].copy() for name in zeros}
        assert zeros["memory_0"].item() == seen
    logits = by_step(batch)
    difference = (ClipsByStep(int8)(batch) - logits).abs().max() / logits.std()
    assert 0 < difference < 0.5


def test_without_nncf_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(UserError, match="--int8 needs a package: pip install") as error:
        quantize(None, [], transformer=False, vnni=True)
    assert "\n" not in str(error.value)
