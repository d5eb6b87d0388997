"""Checkpoints that are broken or hostile end in one line, before anything is built from them."""

import io
import pickle
import random
import subprocess
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import ROOT, make_model, make_state

from benchmark_latency import main as benchmark_main
from checkpoint import check_resume, load_checkpoint, rebuild_model, save_checkpoint
from compare import main as compare_main
from config import from_dict
from evaluate import main as evaluate_main
from predict import main as predict_main
from train import main as train_main
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
        next(value for value in state.values() if value.is_floating_point()).fill_(NAN)

    return change


def reshape(state: dict) -> None:
    state["model"][HEAD] = state["model"][HEAD].T


def claim_classes(state: dict) -> None:
    state["classes"] = state["config"]["classes"] = [str(n) for n in range(20_000)]


def claim_expanded(state: dict) -> None:
    """A head for as many classes, which takes no place in the file."""
    claim_classes(state)
    state["model"][HEAD] = torch.zeros(1).expand(20_000, 192)


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
    "rng's torch of floats": put("rng", 0, "torch", value=torch.zeros(5056)),
    "rng's python short": put("rng", 0, "python", value=[3, [1, 2], None]),
    "rng's python of texts": put("rng", 0, "python", value=["a", "b", "c"]),
    "rng's python empty": put("rng", 0, "python", value=[]),
    "rng's cuda of floats": put("rng", 0, "cuda", value=[torch.zeros(16)]),
}  # fmt: skip


@pytest.fixture
def write(trained: tuple[Path, str], tmp_path: Path) -> Callable:
    """Change a checkpoint of the tiny run, and write it into a run folder."""

    def call(change: Callable[[dict], None], name: str = "best.pt") -> Path:
        state = torch.load(trained[0] / name, weights_only=True)
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


def resume(path: Path) -> None:
    saved = load_checkpoint(path)
    config = from_dict(saved["config"])
    options = {"n_frames": config.n_frames, "image_size": config.image_size}
    state = make_state(config, make_model("vivit", 3, **options))
    before = random.getstate()
    try:
        check_resume(saved, state.state_dict(), state.optimizer, path.parent)
    except UserError:
        assert random.getstate() == before
        raise
    state.load_state_dict(saved)


@pytest.mark.parametrize("what", BROKEN_RESUME)
def test_a_broken_state_of_training_is_one_line(what: str, write) -> None:
    path = write(BROKEN_RESUME[what], "last.pt")
    with pytest.raises(UserError) as refused:
        resume(path)
    message = str(refused.value)
    assert str(path.parent) in message
    assert len(message.splitlines()) == 1


def test_intact_checkpoints_pass(trained) -> None:
    rebuild_model(load_checkpoint(trained[0]))
    resume(trained[0] / "last.pt")


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


def run_code(code: str, path: Path, check: bool) -> subprocess.CompletedProcess:
    """Run a program that gets the path as its argument."""
    command = [sys.executable, "-c", code, str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=check)


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
    path = tmp_path / "bomb.pt"
    if callable(BOMBS[what]):
        BOMBS[what](path)
    else:
        torch.save({"format_version": 1, "config": {}, "classes": [], **BOMBS[what]}, path)
    assert path.stat().st_size < 50_000_000
    code = (
        "import sys, resource, torch, checkpoint\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: checkpoint.load_checkpoint(sys.argv[1])\n"
        "except checkpoint.UserError as error: print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    done = run_code(code, path, check=True)
    line, megabytes = done.stdout.splitlines()
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
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"model": {}})
    before = path.read_bytes()
    code = (
        "import resource, signal, sys, torch\n"
        "from checkpoint import save_checkpoint\n"
        "from utils.cli import cli_main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "cli_main(lambda: save_checkpoint(sys.argv[1], {'model': {'a': torch.zeros(10**6)}}))()\n"
    )
    done = run_code(code, path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}: the file is larger than this disk")
    assert len(done.stderr.splitlines()) == 1
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
