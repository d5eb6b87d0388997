"""export.py: files that compute what the model does, or none."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint import load_checkpoint, rebuild_model
from config import from_dict
from deployment.files import read_exported, read_metadata
from export import main
from training.engine import evaluate
from training.loaders import eval_loader, load_splits

onnxruntime = pytest.importorskip("onnxruntime")
openvino = pytest.importorskip("openvino")
pytest.importorskip("onnxscript")


@pytest.fixture
def run(trained: tuple[Path, str], tmp_path: Path) -> Path:
    """A run folder with nothing but its best checkpoint."""
    folder = tmp_path / "a run"
    folder.mkdir()
    shutil.copy(trained[0] / "best.pt", folder)
    return folder


def test_an_onnx_file_without_this_project(run: Path, run_main: Callable) -> None:
    done = run_main(main, run, "--dynamic-batch", "--num-workers", 0, cwd=run.parent)
    path = run / "vivit.onnx"
    assert f"exported: {path}" in done.stdout
    assert "in the features, on 27 clips of the run and 23 clips of noise" in done.stdout
    assert {file.name for file in run.iterdir()} == {"best.pt", "vivit.onnx"}

    state = load_checkpoint(run)
    model, config = rebuild_model(state), from_dict(state["config"])
    session = onnxruntime.InferenceSession(path)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == ["dark", "grey", "light"]
    assert float(about["temperature"]) == state["calibration"]["temperature"]
    clips = torch.randint(256, (3, config.n_frames, 3, 32, 32), dtype=torch.uint8)
    (logits,) = session.run(["logits"], {"clips": clips.numpy()})
    with torch.inference_mode():
        np.testing.assert_allclose(logits, model(clips).numpy(), rtol=0, atol=1e-4)

    content = path.read_bytes()  # patients are train0, val1 ...; clips 0_1.mp4
    for private in (b"train0", b"val1", b".mp4", str(run.parent).encode(), b"tiny data"):
        assert private not in content

    # The engine stands where the model does.
    described, engine = read_exported(path)
    rows = load_splits(config)["val"]
    expected, found = (
        evaluate(network, eval_loader(rows, config), torch.device("cpu"), with_features=True)
        for network in (model, engine)
    )
    np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.features, expected.features, rtol=0, atol=1e-4)
    assert torch.equal(described["novelty"]["means"], state["novelty"]["means"])


def test_openvino_files_and_what_is_not_overwritten(
    run: Path, run_main: Callable, mistake: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "--format", "openvino", "--num-workers", 0
    (run / "vivit.bin").write_text("somebody's")
    assert "vivit.bin: exists already" in mistake(main, run, *flags, cwd=run).stderr
    (run / "vivit.bin").unlink()

    # Without parity nothing is written.
    with monkeypatch.context() as patch:
        patch.setattr("deployment.parity.TOLERANCE", 0.0)
        found = mistake(main, run, *flags, "--data-root", run / "none", cwd=run)
        assert "the openvino file does not compute what the model does: on 50 clips" in found.stderr
    assert {file.name for file in run.iterdir()} == {"best.pt"}

    done = run_main(main, run, *flags, "--data-root", run / "none", cwd=run)
    assert "on 50 clips of noise, not of the run (" in done.stdout
    assert "no such folder" in done.stdout
    assert {file.name for file in run.iterdir()} == {"best.pt", "vivit.xml", "vivit.bin"}
    assert read_metadata(run / "vivit.xml")["batch"] == "1"
    engine = read_exported(run / "vivit.xml")[1]
    clips = torch.randint(256, (3, 4, 3, 32, 32), dtype=torch.uint8)
    model = rebuild_model(load_checkpoint(run))
    with torch.inference_mode():
        torch.testing.assert_close(engine(clips), model(clips), rtol=0, atol=1e-4)


def test_mistakes_are_found_before_the_work(run: Path, mistake: Callable) -> None:
    def line(*flags: object) -> str:
        text = mistake(main, run, *flags, cwd=run).stderr
        assert text.count("\n") == 1
        return text

    assert "must end in .onnx" in line("--output", "x.xml")
    assert "must end in .xml" in line("--output", "x.onnx", "--format", "openvino")
    assert "n_frames = 0" in line("--n-frames", 0)
    assert "made for 4 frames" in line("--n-frames", 8)
    assert "this vivit cannot" in line("--streaming")
    (run / "vivit.onnx").write_text("somebody's")
    assert "is not overwritten" in line()
    (run / "folder.onnx").mkdir()
    assert "is a folder" in line("--output", "folder.onnx")
    assert "no such checkpoint" in mistake(main, run / "none", cwd=run).stderr


def test_missing_packages_are_one_line(
    run: Path, mistake: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in (("onnxscript", "onnx"), ("openvino", "openvino")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            found = mistake(main, run, "--format", name, cwd=run)
        assert f"--format {name} needs a package" in found.stderr
