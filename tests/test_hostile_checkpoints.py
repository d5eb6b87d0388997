"""Checkpoints that are broken or hostile end in one line, before anything is built from them."""

import io
import pickle
import random
import signal
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import in_process, make_model, make_state, same_tensors

from benchmark_latency import main as benchmark_main
from checkpoint import check_resume, load_checkpoint, rebuild_model, save_checkpoint
from compare import main as compare_main
from config import from_dict
from evaluate import main as evaluate_main
from modeling.weights import load_weights
from models import build_model
from predict import main as predict_main
from train import main as train_main
from training.state import TrainState
from utils.errors import UserError

NAN = float("nan")
HEAD = "head.1.weight"
HUGE = 10**5000  # more digits than Python prints


def put(*path: object, value: object) -> Callable[[dict], None]:
    """A change of a checkpoint: the value at a path of keys and indices."""

    def change(state: dict) -> None:
        *above, last = path
        for key in above:
            state = state[key]
        state[last] = value

    return change


def drop(*path: object) -> Callable[[dict], None]:
    def change(state: dict) -> None:
        *above, last = path
        for key in above:
            state = state[key]
        del state[last]

    return change


def fill(*path: object) -> Callable[[dict], None]:
    """The first tensor in a dict of a checkpoint becomes NaN."""

    def change(state: dict) -> None:
        for key in path:
            state = state[key]
        name = next(name for name, value in state.items() if value.is_floating_point())
        state[name] = torch.full_like(state[name], NAN)

    return change


def reshape(state: dict) -> None:
    state["model"][HEAD] = state["model"][HEAD].T


def claim_classes(state: dict) -> None:
    state["classes"] = state["config"]["classes"] = [str(n) for n in range(20_000)]


def claim_expanded(state: dict) -> None:
    """A head for as many classes, which takes no place in the file."""
    claim_classes(state)
    state["model"][HEAD] = torch.zeros(1).expand(20_000, 192)


def use_backbone(name: str) -> Callable[[dict], None]:
    def change(state: dict) -> None:
        state["config"] |= {"model_name": "cnnlstm", "backbone": name}

    return change


def no_numbers(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """The values as tensors of the same shape that no weight can be."""
    with warnings.catch_warnings(action="ignore"):  # some of these kinds are deprecated
        return {
            "on the meta device": values.to("meta"),
            "sparse": values.to_sparse(),
            "sparse by rows": values.to_sparse_csr(),
            "of 8 bits": values.to(torch.float8_e4m3fn),
            "quantized": torch.quantize_per_tensor(values, 0.1, 0, torch.qint8),
            "bool": values > 0,
            "complex": values.to(torch.complex64),
            "integers": values.to(torch.int64),
        }


ODD_HEADS = no_numbers(torch.ones(3, 192))

# Of best.pt: refused by load_checkpoint.
BROKEN = {
    "no model": drop("model"),
    "no config": drop("config"),
    "no classes": drop("classes"),
    "no classes in config": drop("config", "classes"),
    "model None": put("model", value=None),
    "model a list": put("model", value=[]),
    "model empty": put("model", value={}),
    "model of numbers": put("model", value={"head.weight": 3}),
    "model with a number as key": put("model", 3, value=torch.zeros(2)),
    "weight missing": drop("model", HEAD),
    "weight unknown": put("model", "other", value=torch.zeros(2)),
    "weight of another shape": reshape,
    "weight not finite": fill("model"),
    **{f"weight {kind}": put("model", HEAD, value=value) for kind, value in ODD_HEADS.items()},
    "config a list": put("config", value=["model_name"]),
    "config with a number as key": put("config", 3, value=1),
    "format a text": put("format_version", value="one"),
    "format None": put("format_version", value=None),
    "format a bool": put("format_version", value=True),
    "format a list": put("format_version", value=[1]),
    "format huge": put("format_version", value=HUGE),
    "classes numbers": put("classes", value=[1, 2, 3]),
    "classes a text": put("classes", value="dark"),
    "classes others": put("classes", value=["a", "b", "c"]),
    "classes fewer": put("classes", value=["dark"]),
    "many classes": claim_classes,
    "many classes and a head": claim_expanded,
    "image_size a text": put("config", "image_size", value="big"),
    "image_size None": put("config", "image_size", value=None),
    "image_size 33": put("config", "image_size", value=33),
    "image_size huge": put("config", "image_size", value=HUGE),
    "n_frames a list": put("config", "n_frames", value=[1]),
    "n_frames 0": put("config", "n_frames", value=0),
    "n_frames a fraction": put("config", "n_frames", value=4.5),
    "n_frames a million": put("config", "n_frames", value=10**6),
    "epochs a text": put("config", "epochs", value="2"),
    "epochs -3": put("config", "epochs", value=-3),
    "dropout NaN": put("config", "dropout", value=NAN),
    "dropout True": put("config", "dropout", value=True),
    "model_name unknown": put("config", "model_name", value="gpt"),
    "model_name a list": put("config", "model_name", value=["vivit"]),
    "model_name another": put("config", "model_name", value="cnnlstm"),
    "backbone unknown": use_backbone("resnet19"),
    "backbone a list": put("config", "backbone", value=["resnet18"]),
    "backbone a path": use_backbone("timm:../../x"),
    "backbone of a stranger": use_backbone("timm:hf-hub:stranger/network"),
    "backbone with a long name": use_backbone("timm:" + "x" * 10**6),
    "backbone of 7 billion weights": use_backbone("timm:vit_7b_patch16_dinov3"),
    "modality a dict": put("config", "modality", value={}),
    "device a number": put("config", "device", value=3),
    "data_root with a zero byte": put("config", "data_root", value="a\0b"),
    "epoch a text": put("epoch", value="3"),
    "epoch -1": put("epoch", value=-1),
    "calibration a list": put("calibration", value=[1.0]),
    "calibration without confidence": drop("calibration", "confidence"),
    "calibration without correct": drop("calibration", "correct"),
    "calibration of other lengths": put("calibration", "correct", value=[True]),
    "temperature 0": put("calibration", "temperature", value=0.0),
    "temperature NaN": put("calibration", "temperature", value=NAN),
    "threshold a text": put("calibration", "threshold", value="high"),
    "novelty None": put("novelty", value=None),
    "novelty a list": put("novelty", value=[1.0]),
    "novelty without means": drop("novelty", "means"),
    "novelty without distances": drop("novelty", "distances"),
    "novelty's distances texts": put("novelty", "distances", value=["1"] * 9),
    "novelty's distance NaN": put("novelty", "distances", 0, value=NAN),
    "novelty's means a list": put("novelty", "means", value=[[1.0]]),
    "novelty's means a number": put("novelty", "means", value=torch.tensor(1.0)),
    "novelty's means none": put("novelty", "means", value=torch.zeros(0, 192).double()),
    "novelty's means too many": put(
        "novelty", "means", value=torch.zeros(1).double().expand(4, 192)
    ),
    "novelty's means of another width": put("novelty", "means", value=torch.zeros(3, 9).double()),
    "novelty's means of floats": put("novelty", "means", value=torch.zeros(3, 192)),
    "novelty's means NaN": put("novelty", "means", value=torch.full((3, 192), NAN).double()),
    **{
        f"novelty's means {kind}": put("novelty", "means", value=value)
        for kind, value in ODD_HEADS.items()
    },
    "frame_rate a text": put("frame_rate", value="25"),
    "frame_rate negative": put("frame_rate", value=-25.0),
    "class_counts a number": put("class_counts", value=3),
    "class_counts fewer": put("class_counts", value=[3]),
    "history a dict": put("history", value={"epoch": 1}),
    "history of lists": put("history", value=[[1, 2]]),
    "history without losses": put("history", value=[{"epoch": 1}]),
    "history of texts": put("history", 0, "val_loss", value="low"),
    "best a list": put("best", value=[1]),
    "best without an epoch": drop("best", "epoch"),
}

# Of last.pt: refused before any part of the training takes a value.
BROKEN_RESUME = {
    **{f"no {key}": drop(key) for key in ("optimizer", "scheduler", "scaler", "step", "totals",
                                          "rng", "unreadable", "history", "best", "epoch")},
    **{f"{key} None": put(key, value=None) for key in ("optimizer", "scheduler", "scaler", "rng",
                                                       "totals", "best", "history")},
    "step a text": put("step", value="2"),
    "step -1": put("step", value=-1),
    "totals short": put("totals", value=[[1.0]]),
    "totals NaN": put("totals", value=[[NAN, 1.0, 1.0]]),
    "totals of more processes": put("totals", value=[[0.0] * 3] * 2),
    "unreadable numbers": put("unreadable", value=[3]),
    "optimizer without groups": drop("optimizer", "param_groups"),
    "optimizer of other groups": put("optimizer", "param_groups", value=[]),
    "optimizer of other parameters": put("optimizer", "param_groups", 0, "params", value=[99]),
    "optimizer's rate a text": put("optimizer", "param_groups", 0, "lr", value="fast"),
    "optimizer's rate NaN": put("optimizer", "param_groups", 0, "lr", value=NAN),
    "optimizer's betas a number": put("optimizer", "param_groups", 0, "betas", value=0.9),
    "optimizer's betas one": put("optimizer", "param_groups", 0, "betas", value=[0.9]),
    "optimizer's state a list": put("optimizer", "state", value=[]),
    "optimizer's average missing": drop("optimizer", "state", 0, "exp_avg"),
    "optimizer's average of another shape": put("optimizer", "state", 0, "exp_avg",
                                                value=torch.zeros(1)),
    "optimizer's average NaN": fill("optimizer", "state", 0),
    **{f"optimizer's average {kind}": put("optimizer", "state", 0, "exp_avg", value=value)
       for kind, value in no_numbers(torch.zeros(1, 192)).items()},
    "optimizer's step on the meta device": put("optimizer", "state", 0, "step",
                                               value=torch.zeros((), device="meta")),
    "optimizer's average of no parameter": put("optimizer", "state", 9999, value={}),
    "scheduler empty": put("scheduler", value={}),
    "scheduler's epoch a text": put("scheduler", "last_epoch", value="3"),
    "scheduler's parts a number": put("scheduler", "_schedulers", value=3),
    "scheduler's parts missing": put("scheduler", "_schedulers", value=[]),
    "scheduler's part of texts": put("scheduler", "_schedulers", 0, "base_lrs", value=["x"]),
    "scaler of another kind": put("scaler", value={"scale": [1.0]}),
    "rng of numbers": put("rng", value=[3]),
    "rng without torch": drop("rng", 0, "torch"),
    "rng's torch short": put("rng", 0, "torch", value=torch.zeros(3, dtype=torch.uint8)),
    "rng's torch on the meta device": put("rng", 0, "torch", value=torch.zeros(
        5056, dtype=torch.uint8, device="meta")),
    "rng's torch of floats": put("rng", 0, "torch", value=torch.zeros(5056)),
    "rng's python short": put("rng", 0, "python", value=[3, [1, 2], None]),
    "rng's python of texts": put("rng", 0, "python", value=["a", "b", "c"]),
    "rng's python empty": put("rng", 0, "python", value=[]),
    "rng's cuda of floats": put("rng", 0, "cuda", value=[torch.zeros(16)]),
}  # fmt: skip


def copied(value: object) -> object:
    """A checkpoint whose dicts and lists can be changed; the tensors are shared."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def saved(trained: tuple[Path, str]) -> dict[str, dict]:
    """The checkpoints of the tiny run. The optimizer's averages are zeros that take no place."""
    states = {n: torch.load(trained[0] / n, weights_only=True) for n in ("best.pt", "last.pt")}
    for averages in states["last.pt"]["optimizer"]["state"].values():
        averages |= {k: torch.zeros(1).expand(averages[k].shape) for k in ("exp_avg", "exp_avg_sq")}
    return states


@pytest.fixture
def write(saved: dict[str, dict], tmp_path: Path) -> Callable:
    """Change a checkpoint of the tiny run, and write it into a run folder."""

    def call(change: Callable[[dict], None], name: str = "best.pt") -> Path:
        state = copied(saved[name])
        change(state)
        torch.save(state, tmp_path / name)
        return tmp_path / name

    return call


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkpoint_is_one_line(what: str, write) -> None:
    path = write(BROKEN[what])
    with pytest.raises(UserError) as refused:
        load_checkpoint(path)
    message = str(refused.value)
    assert str(path) in message
    assert len(message.splitlines()) == 1
    assert len(message) < 500


@pytest.fixture(scope="module")
def fresh(saved: dict[str, dict]) -> tuple[TrainState, dict]:
    """The state of a run that begins, which no check may change, and its checkpoint."""
    config = from_dict(saved["last.pt"]["config"])
    options = {"n_frames": config.n_frames, "image_size": config.image_size}
    state = make_state(config, make_model("vivit", 3, **options))
    return state, state.state_dict()


@pytest.mark.parametrize("what", BROKEN_RESUME)
def test_a_broken_state_of_training_is_one_line(what: str, write, fresh) -> None:
    path, before = write(BROKEN_RESUME[what], "last.pt"), random.getstate()
    with pytest.raises(UserError) as refused:
        check_resume(load_checkpoint(path), fresh[1], fresh[0].optimizer, path.parent)
    message = str(refused.value)
    assert str(path.parent) in message
    assert len(message.splitlines()) == 1
    assert random.getstate() == before


def test_intact_checkpoints_pass(trained, write, fresh) -> None:
    rebuild_model(load_checkpoint(trained[0]))
    for path in (trained[0] / "last.pt", write(lambda _: None, "last.pt")):
        state = load_checkpoint(path)
        check_resume(state, fresh[1], fresh[0].optimizer, path.parent)
    make_state(from_dict(state["config"]), rebuild_model(state)).load_state_dict(state)


@pytest.mark.parametrize("what", ["not finite", *ODD_HEADS])
def test_weights_of_another_kind_are_refused(what: str, saved, tmp_path: Path) -> None:
    """By --weights, from a checkpoint of this project and from the model's weights alone."""
    config = from_dict(saved["best.pt"]["config"])
    own = build_model(config, 3)
    before = copied(own.state_dict())
    path, state = tmp_path / "best.pt", copied(saved["best.pt"])
    BROKEN[f"weight {what}"](state)
    for content in (state, state["model"]):
        torch.save(content, path)
        with pytest.raises(UserError) as refused:
            load_weights(own, str(path))
        assert str(path) in str(refused.value)
        assert len(str(refused.value).splitlines()) == 1
        assert same_tensors(own.state_dict(), before)


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (evaluate_main, ["{run}", "--num-workers", 0]),
        (predict_main, ["{run}", __file__]),
        (train_main, ["--resume", "{run}"]),
        (compare_main, ["{run}", "{trained}"]),
        (benchmark_main, ["--model-names", "{run}"]),
    ],
)
def test_scripts_end_in_one_line(main, arguments, write, trained, tmp_path, mistake) -> None:
    for name in ("best.pt", "last.pt"):
        write(BROKEN["image_size a text"], name)
    for name in ("predictions.csv", "test_metrics.json", "config.json"):
        (tmp_path / name).write_bytes((trained[0] / name).read_bytes())
    names = {"run": tmp_path, "trained": trained[0]}
    filled = [str(argument).format(**names) for argument in arguments]
    stderr = mistake(main, *filled, cwd=tmp_path).stderr
    assert "image_size" in stderr
    assert len(stderr.strip().splitlines()) == 1


def test_a_resumed_training_with_a_broken_state_is_one_line(write, mistake, tmp_path) -> None:
    write(BROKEN_RESUME["optimizer's average of another shape"], "last.pt")
    stderr = mistake(train_main, "--resume", tmp_path, cwd=tmp_path).stderr
    assert "cannot continue from its last.pt (its optimizer's averages of parameter 0" in stderr
    assert len(stderr.strip().splitlines()) == 1


class _Asks:
    """What a file can ask torch to make."""

    def __reduce__(self) -> tuple:
        return bytearray, (6_000_000_000,)


def compressed(path: Path) -> None:
    """A checkpoint whose tensor of 300 MB is compressed."""
    file = io.BytesIO()
    torch.save({"format_version": 1, "model": {"a": torch.zeros(1)}}, file)
    with (
        zipfile.ZipFile(file) as intact,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb,
    ):
        for record in intact.infolist():
            if not record.filename.endswith("data/0"):
                bomb.writestr(record.filename, intact.read(record))
                continue
            with bomb.open(record.filename, "w", force_zip64=True) as zeros:
                for _ in range(30):
                    zeros.write(bytes(10_000_000))


def three_million_classes(path: Path) -> None:
    """Written without torch.save, which would take half a minute."""
    with zipfile.ZipFile(path, "w") as archive:
        state = {"format_version": 1, "classes": list(map(str, range(3_000_000)))}
        archive.writestr("best/data.pkl", pickle.dumps(state, protocol=2))
        archive.writestr("best/version", "3")


BOMBS = {
    "compressed": compressed,
    "three million classes": three_million_classes,
    "expanded": {"model": {"a": torch.zeros(1).expand(10**5, 10**5)}},
    "one tensor many times": {"model": dict.fromkeys(range(3000), torch.zeros(500, 1000))},
    "bytearray": {"model": _Asks()},
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_file_that_would_fill_the_memory_is_refused(what: str, tmp_path: Path) -> None:
    """In a process of its own, whose largest use of memory is measured."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "bomb.pt"
    if callable(BOMBS[what]):
        BOMBS[what](path)
    else:
        torch.save({"format_version": 1, "config": {}, "classes": [], **BOMBS[what]}, path)
    assert path.stat().st_size < 50_000_000

    def main() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            load_checkpoint(path)
        except UserError as error:
            print(error)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)

    code, output = in_process(main, tmp_path)
    assert code == 0, output
    line, megabytes = output.splitlines()
    assert "cannot be loaded" in line
    assert int(megabytes) < 150


def test_a_structure_of_shared_lists_is_walked_once(tmp_path: Path) -> None:
    shared: list = []
    for _ in range(60):
        shared = [shared, shared]
    torch.save({"format_version": 1, "model": shared}, tmp_path / "best.pt")
    with pytest.raises(UserError, match="no 'config' in it"):
        load_checkpoint(tmp_path)


def test_files_of_other_programs_are_called_what_they_are(tmp_path: Path) -> None:
    weights = make_model("tsm_resnet", 7).backbone.state_dict()
    for content in (weights, {"state_dict": {f"module.{k}": v for k, v in weights.items()}}):
        torch.save(content, tmp_path / "best.pt")
        with pytest.raises(UserError, match=r"120 tensors of another program.* --weights"):
            load_checkpoint(tmp_path)
    torch.save({"args": Namespace(a=1), "model": weights}, tmp_path / "best.pt")
    with pytest.raises(UserError, match=r"holds Python objects \(argparse.Namespace\)"):
        load_checkpoint(tmp_path)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """The limit on the size of files stands for the disk; torch gives its own error for both."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "run" / "last.pt"
    path.parent.mkdir()
    save_checkpoint(path, {"model": {}})
    before = path.read_bytes()

    def main() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        save_checkpoint(path, {"model": {"a": torch.zeros(10**6)}})

    code, output = in_process(main, tmp_path)
    assert code == 2
    assert output.startswith(f"error: {path}: the file is larger than this disk")
    assert len(output.splitlines()) == 1
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]
