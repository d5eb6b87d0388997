"""pretrain.py from end to end, what train.py takes from it, and what it refuses."""

import json
import os
import re
import shutil
import signal
import socket
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import make_clip, make_data, only_run, pan, same_tensors, start_script, train_flags
from PIL import Image

import cross_validate
import evaluate
import train
from checkpoint import load_checkpoint
from clips.fingerprints import pack
from clips.manifest import ClipRow, read_manifest
from config import TrainConfig, from_dict
from modeling.weights import load_weights
from models import MODELS, build_model
from pretrain import main, pretrain
from pretraining.results import load_last
from pretraining.settings import UNUSED, PretrainConfig, resolve, shared_settings
from training.leakage import pretraining_leaks
from utils.errors import UserError
from utils.interrupt import Interrupt
from video.encoder import write_video
from video.excerpt import Excerpt, write_excerpts

pytestmark = pytest.mark.usefixtures("no_figures")

CLASSES = ("dark", "grey", "light")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_data`, but each clip shows a picture of its own that moves; read-only."""
    root = tmp_path_factory.mktemp("data")
    make_data(root, CLASSES, {"train": 6, "val": 3, "test": 3}, frames=2)
    for number, path in enumerate(sorted(root.rglob("*.mp4"))):
        coarse = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC))
        write_video(path, [picture[t : t + 64, t : t + 64] for t in range(20)])
    return root


def tiny(data: Path, folder: Path, **settings: object) -> PretrainConfig:
    values = {"data": (str(data),), "n_frames": 4, "image_size": 32, "epochs": 2, "batch_size": 6}
    values |= {"num_workers": 0, "device": "cpu", "precision": "fp32", "patch_size": 8}
    values |= {"run_dir": str(folder / "runs"), "decoder_width": 32, "decoder_depth": 1}
    return PretrainConfig(**{**values, **settings})


def flags(data: Path, *more: object) -> list[str]:
    own = ["--epochs", "2", "--n-frames", "4", "--image-size", "32", "--batch-size", "6"]
    own += ["--num-workers", "0", "--device", "cpu", "--precision", "fp32", "--patch-size", "8"]
    return [str(data), *own, "--decoder-width", "32", "--dropout", "0.1", *map(str, more)]


@pytest.fixture(scope="module")
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder of a tiny mae on the training clips; read-only."""
    return pretrain(tiny(data, tmp_path_factory.mktemp("pretrained")))


def test_the_run_folder_is_complete(pretrained: Path, data: Path) -> None:
    run = pretrained.parent
    names = {path.name for path in run.iterdir()}
    assert names == {
        *("config.json", "environment.json", "train.log", "metrics.csv", "curves.png"),
        *("last.pt", "encoder.pt", "clips.csv"),
    }  # no frames of somebody's own clips
    table = pd.read_csv(run / "clips.csv")
    assert len(table) == 18
    assert set(table["patient"]) == {"train0", "train1"}
    log = (run / "train.log").read_text()
    assert "18 clips of 2 known patients" in log
    few, full = map(float, re.search(r"encoder: (\S+) GFLOP .*, (\S+) for all", log).groups())
    assert few < full / 2
    losses = pd.read_csv(run / "metrics.csv")["train_loss"]
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_the_encoder_names_no_patient_and_no_file(pretrained: Path, data: Path) -> None:
    content = pretrained.read_bytes()
    for name in (b"train0", b"train1", b"0_0.mp4", str(data).encode()):
        assert name not in content
    assert b"pretraining" in content
    state = torch.load(pretrained, weights_only=True)
    assert len(state["pretraining"]["patients"]) == 2
    assert len(state["pretraining"]["files"]) == 18


def test_the_weights_arrive_and_the_head_is_new(pretrained: Path) -> None:
    config = TrainConfig(model_name="vivit", n_frames=4, image_size=32, patch_size=8)
    torch.manual_seed(5)
    model = build_model(config, 3)
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    loaded = load_weights(model, str(pretrained))
    assert "all but the head, which is new" in loaded.line
    assert loaded.pretraining["method"] == "mae"
    state = torch.load(pretrained, weights_only=True)["model"]
    for key, value in model.state_dict().items():
        expected = fresh[key] if key.startswith("head.") else state[key]
        assert torch.equal(value, expected), key
    assert not state.keys() - fresh.keys()
    assert not same_tensors(
        {key: fresh[key] for key in state if "weight" in key},
        {key: state[key] for key in state if "weight" in key},
    )
    model = build_model(config, 3)
    assert load_weights(model, str(pretrained.parent)).pretraining  # the run folder too


def test_an_encoder_of_another_model_is_refused(pretrained: Path) -> None:
    model = build_model(TrainConfig(model_name="cnnlstm"), 3)
    with pytest.raises(UserError, match="does not fit CNNLSTM"):
        load_weights(model, str(pretrained))


def test_a_damaged_provenance_is_refused_and_not_dropped(pretrained: Path, tmp_path: Path) -> None:
    state = torch.load(pretrained, weights_only=True)
    state["pretraining"] = {**state["pretraining"], "patients": torch.zeros(2)}
    torch.save(state, tmp_path / "encoder.pt")
    config = TrainConfig(model_name="vivit", n_frames=4, image_size=32, patch_size=8)
    with pytest.raises(UserError, match=r"damaged: pretraining\.patients"):
        load_weights(build_model(config, 3), str(tmp_path / "encoder.pt"))


@pytest.mark.parametrize(
    ("method", "model", "more"),
    [
        ("mae", "timesformer", {"image_size": 16, "shuffle_frames": True, "with_frames": True}),
        ("distil", "vivit", {"teacher": "random"}),
        ("distil", "tsm_resnet", {"teacher": "random", "views": 2}),
        ("order", "cnnlstm", {"n_frames": 6, "lstm_hidden": 16}),
    ],
)
def test_methods_train_and_their_encoders_load(method, model, more, data, tmp_path) -> None:
    settings = {"method": method, "model_name": model, "epochs": 1, **more}
    unused = {} if method == "mae" else {"decoder_width": 96, "decoder_depth": 2}
    patches = {} if model in ("vivit", "timesformer") else {"patch_size": 16}
    config = tiny(data, tmp_path, weights="none", **{**settings, **unused, **patches})
    output = pretrain(config)
    row = pd.read_csv(output.parent / "metrics.csv").iloc[0]
    assert row["train_loss"] > 0
    if method == "order":
        assert row["chance"] == pytest.approx(1 / 12, abs=1e-5)
    assert (output.parent / "reconstruction.png").exists() == bool(more.get("with_frames"))
    fresh = build_model(resolve(config), 3)
    assert load_weights(fresh, str(output)).pretraining["method"] == method


def test_distillation_from_a_teacher_says_where_it_comes_from(data, tmp_path) -> None:
    teacher = build_model(TrainConfig(model_name="cnnlstm", lstm_layers=0), 2)
    weights = {f"module.{k}": v for k, v in teacher.backbone.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "teacher.pth")
    config = tiny(
        data, tmp_path, method="distil", teacher="resnet18", epochs=1, views=1,
        teacher_weights=str(tmp_path / "teacher.pth"), weights="none", decoder_width=96,
        decoder_depth=2,
    )  # fmt: skip
    output = pretrain(config)
    state = torch.load(output, weights_only=True)
    assert state["pretrained"]["teacher"] == "resnet18"
    (features,) = (output.parent / "teacher").iterdir()
    assert features.suffix == ".npy"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "focal"}, "loss has no effect in pretraining"),
        ({"mixup_alpha": 0.2}, "mixup_alpha has no effect in pretraining"),
        ({"model_name": "mvit"}, "method mae is for vivit, timesformer"),
        ({"method": "order", "model_name": "cnnlstm", "n_frames": 8}, "a multiple of 3"),
        ({"method": "order", "mask_ratio": 0.5}, "mask_ratio is a setting of method mae"),
        ({"decoder_width": 50}, "multiple of 32"),
        ({"image_size": 50}, "image_size 50 must be a multiple"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message, data, tmp_path) -> None:
    with pytest.raises(UserError, match=message):
        pretrain(tiny(data, tmp_path, **settings))
    assert not list(tmp_path.rglob("*.pt"))


def test_flags_without_effect_are_refused(data, tmp_path, mistake, run_main) -> None:
    code, stderr = mistake(main, *flags(data, "--loss", "focal"), cwd=tmp_path)
    assert code == 2
    assert "error: --loss has no effect in pretrain.py: leave it out" in stderr
    done = run_main(main, "--help", cwd=tmp_path)
    assert "--mask-ratio" in done.stdout
    assert "--learning-rate" in done.stdout
    assert not [name for name in UNUSED if f"--{name.replace('_', '-')} " in done.stdout]


def test_an_interrupted_run_resumes_exactly(data, tmp_path, run_main, monkeypatch) -> None:
    """Stopped by a signal in the middle of the second epoch: every number equal, bit for bit."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    run_main(main, *flags(data), cwd=whole)
    calls, check = [], Interrupt.check

    def stop_at_the_fifth(interrupt: Interrupt) -> None:
        calls.append(interrupt)
        if len(calls) == 5:  # of three batches per epoch
            os.kill(os.getpid(), signal.SIGTERM)
        check(interrupt)

    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "check", stop_at_the_fifth)
        done = run_main(main, *flags(data), cwd=stopped, code=128 + signal.SIGTERM)
    run = only_run(stopped)
    assert f"python pretrain.py --resume {run.relative_to(stopped)}" in done.stdout
    assert load_last(run)["step"] == 2
    assert not (run / "encoder.pt").exists()
    done = run_main(main, "--resume", run, cwd=tmp_path)  # from wherever it is resumed
    assert "resumed at epoch 2, batch 3" in done.stdout
    first, second = load_last(only_run(whole)), load_last(run)
    assert same_tensors(first["model"], second["model"])
    losses = [[row["train_loss"] for row in state["history"]] for state in (first, second)]
    assert losses[0] == losses[1]
    encoders = [torch.load(folder / "encoder.pt") for folder in (only_run(whole), run)]
    assert same_tensors(encoders[0]["model"], encoders[1]["model"])
    assert same_tensors(
        *({k: e["pretraining"][k] for k in ("patients", "files", "frames")} for e in encoders)
    )


def test_a_resumed_run_keeps_its_settings(pretrained, tmp_path, mistake) -> None:
    run = tmp_path / "run"
    shutil.copytree(pretrained.parent, run)
    code, stderr = mistake(main, "--resume", run, "--mask-ratio", "0.5", cwd=tmp_path)
    assert code == 2
    assert "a resumed run keeps its settings: mask_ratio" in stderr


def test_the_state_of_a_pretraining_is_no_classifier(pretrained: Path) -> None:
    for name in ("last.pt", "encoder.pt"):
        with pytest.raises(UserError, match="is of a pretraining"):
            load_checkpoint(pretrained.parent, name)


def finetune(data: Path, encoder: Path, *more: object) -> list[str]:
    arguments = train_flags(data, "--epochs", 1, "--patch-size", 8)
    arguments[arguments.index("--weights") + 1] = str(encoder)
    return [*arguments, *map(str, more)]


def test_training_on_other_patients_is_allowed(pretrained, data, tmp_path, run_main) -> None:
    done = run_main(train.main, *finetune(data, pretrained), cwd=tmp_path)
    assert "all but the head, which is new" in done.stdout
    run = only_run(tmp_path)
    results = json.loads((run / "test_metrics.json").read_text())
    assert [w["kind"] for w in results["warnings"] if w["kind"] == "leakage"] == []
    # The provenance goes on: a run that starts from this run knows it too.
    model = build_model(load_config(run), 3)
    assert load_weights(model, str(run)).pretraining.keys() == {
        *("method", "clips", "licence", "patients", "files", "frames")
    }


def load_config(run: Path) -> TrainConfig:
    return from_dict(load_checkpoint(run)["config"])


def leaking(source: Path, folder: Path, kind: str) -> Path:
    """A copy of data whose test split holds something of the training, under another name."""
    shutil.copytree(source, folder)
    table = pd.read_csv(folder / "test.csv")
    if kind == "patient":
        table.loc[0, "patient"] = "train1"
    elif kind == "content":
        seen = folder / "clips" / pd.read_csv(source / "train.csv")["path"][0]
        shutil.copy(seen, folder / "clips" / table["path"][0])
    table.to_csv(folder / "test.csv", index=False)
    return folder


@pytest.mark.parametrize(
    ("kind", "named"), [("patient", "1 patients of test: train1"), ("content", "0_0.mp4")]
)
def test_training_is_refused_if_the_test_was_pretrained_on(
    kind, named, pretrained, data, tmp_path, mistake
) -> None:
    shared = leaking(data, tmp_path / "data", kind)
    code, stderr = mistake(train.main, *finetune(shared, pretrained), cwd=tmp_path)
    assert code == 2
    assert len(stderr.strip().splitlines()) == 1
    assert "the weights were pretrained on" in stderr
    assert named in stderr
    assert "--exclude" in stderr
    assert "--allow-pretraining-leak" in stderr
    assert not (tmp_path / "runs").exists()


def test_the_refusal_survives_a_training_in_between(
    pretrained, data, tmp_path, run_main, mistake
) -> None:
    """encoder.pt to a run, the run to another one whose test was pretrained on."""
    run_main(train.main, *finetune(data, pretrained), cwd=tmp_path)
    shared = leaking(data, tmp_path / "data", "patient")
    code, stderr = mistake(train.main, *finetune(shared, only_run(tmp_path)), cwd=tmp_path)
    assert code == 2
    assert "train1" in stderr


def test_an_allowed_leak_is_in_the_results(
    pretrained, data, tmp_path, run_main, monkeypatch
) -> None:
    shared = leaking(data, tmp_path / "data", "content")
    arguments = finetune(shared, pretrained, "--allow-pretraining-leak")
    done = run_main(train.main, *arguments, cwd=tmp_path)
    assert "LEAKAGE: 1 clips of test were pretrained on" in done.stdout
    run = only_run(tmp_path)
    for folder in (run, run / "evaluate_test"):
        if folder != run:  # evaluate.py says it too
            run_main(evaluate.main, run, "--num-workers", 0, "--output", folder, cwd=tmp_path)
        results = json.loads((folder / "test_metrics.json").read_text())
        (warning,) = [w for w in results["warnings"] if w["kind"] == "leakage"]
        assert warning["text"].startswith("1 clips of test were pretrained on")
        assert "0_0" not in warning["text"]


def test_a_clip_that_was_cut_out_of_a_pretrained_video_is_found(tmp_path: Path) -> None:
    """The video has another name and is cut into windows; the test clip is an excerpt, encoded
    again, at other times."""
    video = tmp_path / "operation.mp4"

    write_video(video, pan(1, 1, 300))
    config = tiny(video, tmp_path, epochs=1, seconds=1.0, stride=1.0, batch_size=4)
    output = pretrain(config)
    table = pd.read_csv(output.with_name("clips.csv"))
    assert table["used"].value_counts().to_dict() == {"yes": 12, "cut into windows": 1}
    clip, other = tmp_path / "clip.mp4", make_clip(tmp_path / "other.mp4", 200, 30)
    assert write_excerpts(video, [Excerpt(3.3, 4.7, clip)]) == [""]
    seen = torch.load(output, weights_only=True)["pretraining"]
    rows = {"train": [ClipRow(clip, 0)], "val": [ClipRow(other, 0)], "test": [ClipRow(clip, 0)]}
    with pytest.raises(UserError, match=r"1 clips of test: .*clip\.mp4"):
        pretraining_leaks(seen, rows, TrainConfig(num_workers=0))
    assert pretraining_leaks(seen, {**rows, "test": rows["val"]}, TrainConfig(num_workers=0)) == []
    assert pretraining_leaks({}, rows, TrainConfig(num_workers=0)) == []


def test_excluded_patients_are_not_seen(data, tmp_path) -> None:
    manifest = tmp_path / "test.csv"
    table = pd.read_csv(data / "train.csv")
    rows = table[table["patient"] == "train0"]
    rows.assign(path=str(data / "clips") + "/" + rows["path"]).to_csv(manifest, index=False)
    output = tmp_path / "a new folder" / "mine.pt"
    settings = {"epochs": 1, "exclude": (str(manifest),), "output": str(output)}
    assert pretrain(tiny(data, tmp_path, **settings)) == output
    assert [path.name for path in output.parent.iterdir()] == ["mine.pt"]  # and no names
    seen = torch.load(output, weights_only=True)["pretraining"]
    train_rows = read_manifest(data / "train.csv", None, CLASSES)
    named = {r.patient for r in train_rows}
    assert named == {"train0", "train1"}
    only = [row for row in train_rows if row.patient == "train0"]
    assert pretraining_leaks(seen, {"test": only}, TrainConfig(num_workers=0)) == []
    with pytest.raises(UserError, match="train1"):
        pretraining_leaks(seen, {"test": train_rows}, TrainConfig(num_workers=0))


def test_pretraining_on_top_of_another_one_has_seen_both(pretrained, data, tmp_path) -> None:
    config = tiny(data / "clips" / "val", tmp_path, epochs=1, weights=str(pretrained), batch_size=9)
    state = torch.load(pretrain(config), weights_only=True)
    assert state["pretraining"]["method"] == "mae, then mae"
    assert len(state["pretraining"]["files"]) == 18 + 9


def test_the_pretraining_of_a_training_shares_its_data_and_model(data: Path) -> None:
    training = TrainConfig(
        data_root=str(data), model_name="timesformer", n_frames=4, image_size=32, loss="focal",
        epochs=7, weights="none",
    )  # fmt: skip
    config = resolve(shared_settings(training, method="mae", epochs=3))
    assert (config.model_name, config.n_frames, config.epochs) == ("timesformer", 4, 3)
    assert config.data_root == str(data)
    assert config.loss == "cross_entropy"
    with pytest.raises(UserError, match="pretraining is for rgb alone"):
        resolve(shared_settings(TrainConfig(model_name="tsm_resnet", modality="rgbdiff")))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_calls_its_classifier_head(name: str) -> None:
    """By that name an encoder is saved without it, and keeps the new one when it is loaded."""
    with torch.device("meta"):
        one, other = (
            build_model(TrainConfig(model_name=name, n_frames=16, image_size=64), n) for n in (2, 5)
        )
    states = one.state_dict(), other.state_dict()
    changed = {key for key in states[0] if states[0][key].shape != states[1][key].shape}
    assert changed
    assert all(key.startswith("head.") for key in changed)


def test_two_processes_pretrain_one_encoder(data: Path, tmp_path: Path) -> None:
    """Two processes with three clips each make as many steps as one with six."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    # The environment that torchrun makes.
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    arguments = flags(data, "--batch-size", 3, "--epochs", 1)
    processes = [
        start_script("pretrain.py", *arguments, cwd=tmp_path, **group, RANK=rank, LOCAL_RANK=rank)
        for rank in ("0", "1")
    ]
    for process in processes:
        process.join(100)
    assert [p.exitcode for p in processes] == [0, 0], (tmp_path / "out.txt").read_text()
    run = only_run(tmp_path)
    last, state = load_last(run), torch.load(run / "encoder.pt", weights_only=True)
    assert len(state["pretraining"]["files"]) == 18
    assert len(last["rng"]) == 2
    assert last["scheduler"]["last_epoch"] == 3


def test_each_fold_starts_from_its_own_pretraining(data: Path, tmp_path: Path, run_main) -> None:
    """Its encoder knows the patients of its training clips alone, so that train.py refuses none."""
    for fold, (test, val, trained) in enumerate(
        (("test", "val", "train"), ("train", "test", "val")), start=1
    ):
        folder = tmp_path / "folds" / f"fold{fold}"
        folder.mkdir(parents=True)
        for name, source in (("test", test), ("val", val), ("train", trained)):
            shutil.copy(data / f"{source}.csv", folder / f"{name}.csv")
    own = flags(data)[1:]
    del own[own.index("--decoder-width") :]
    arguments = ["--folds", tmp_path / "folds", "--data-root", data, "--model-name", "vivit", *own]
    more = ["--pretrain", "mae", "--pretrain-epochs", 1]
    run_main(cross_validate.main, *arguments, *more, cwd=tmp_path)
    run = only_run(tmp_path)
    assert len(pd.read_csv(run / "predictions.csv")) == 27
    for fold, trained in (("fold1", "train"), ("fold2", "val")):
        rows = read_manifest(data / f"{trained}.csv", data, CLASSES)
        encoder = run / f"{fold}_pretraining" / "encoder.pt"
        seen = load_checkpoint(run / fold)["pretraining"]
        assert same_tensors(
            {"patients": seen["patients"]},
            {"patients": pack("mae", len(rows), "", rows, [], [])["patients"]},
        )
        started_from = json.loads((run / fold / "config.json").read_text())["weights"]
        assert (tmp_path / started_from).samefile(encoder)
    # Finished pretrainings are not repeated.
    before = {path: path.stat().st_mtime_ns for path in run.glob("*/encoder.pt")}
    assert len(before) == 2
    (run / "fold2" / "test_metrics.json").unlink()
    run_main(cross_validate.main, "--resume", run, cwd=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pretrain", "mae", "--weights", "no.pt"], "weights 'no.pt': neither a file nor one of"),
        (["--pretrain", "order"], "method order is for tsm_resnet, cnnlstm, r2plus1d, not vivit"),
        (["--pretrain-epochs", "3"], "pretrain_epochs has no effect without pretrain"),
    ],
)
def test_wrong_pretraining_of_folds(data: Path, tmp_path: Path, mistake, more, message) -> None:
    (tmp_path / "folds" / "fold1").mkdir(parents=True)
    for name in ("train", "val", "test"):
        shutil.copy(data / f"{name}.csv", tmp_path / "folds" / "fold1")
    arguments = ["--folds", tmp_path / "folds", "--data-root", data, "--model-name", "vivit"]
    arguments += ["--n-frames", "4", "--image-size", "32", "--num-workers", "0"]
    assert message in mistake(cross_validate.main, *arguments, *more, cwd=tmp_path).stderr
    assert not (tmp_path / "runs").exists()


def test_copies_of_excluded_clips_are_not_seen(data: Path, tmp_path: Path) -> None:
    """Under another name and in another folder, without patients; encoded again."""
    clips, excluded = tmp_path / "clips", tmp_path / "excluded"
    clips.mkdir()
    excluded.mkdir()
    for number, path in enumerate(sorted((data / "clips" / "train").glob("*.mp4"))[:4]):
        shutil.copy(path, clips / f"{number}.mp4")
    assert write_excerpts(clips / "2.mp4", [Excerpt(0.0, 0.7, excluded / "a.mp4")]) == [""]
    config = tiny(clips, tmp_path, epochs=1, batch_size=3, exclude=(str(excluded),))
    table = pd.read_csv(pretrain(config).with_name("clips.csv"))
    used = {Path(row.path).name: row.used for row in table.itertuples()}
    assert used.pop("2.mp4") == "no: looks like an excluded clip"
    assert used == dict.fromkeys(("0.mp4", "1.mp4", "3.mp4"), "yes")
