"""TrainConfig: what its defaults mean, earlier names of settings, and what is refused."""

import dataclasses
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from helpers import ROOT

import utils.device
from clips.manifest import CLASSES
from clips.manifest_formats import ManifestOptions
from clips.transforms import CROP_COUNTS
from cnn_lstm import CNNLSTM
from config import (
    DEMO_DEFAULTS,
    OLD_NAMES,
    OLD_VALUES,
    OWN_DATA_DEFAULTS,
    TrainConfig,
    differences,
    from_dict,
    manifest_paths,
    names_with,
)
from modeling.backbones import BACKBONES, build_backbone
from modeling.encoders import list_encoders
from modeling.frame_encoder import FrameEncoder
from models import MODELS
from train import main
from training.checks import check_smallest_batch, refuse_changes, resolve
from training.losses import LOSSES, Criterion
from tsm_resnet import TSM
from utils.cli import field_docs
from utils.errors import UserError
from video.clip_reader import FrameSampler
from video.motion import Modality

FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
HINTS = get_type_hints(TrainConfig)
OWN = {"model_name": MODELS, "loss": LOSSES}  # whose choices are no Literal: own ones join them


def choices_of(name: str) -> tuple:
    return tuple(OWN.get(name) or get_args(HINTS[name]))


def test_none_means_what_suits_the_data() -> None:
    demo, own = resolve(TrainConfig()), resolve(TrainConfig(data_root="x", classes=CLASSES))
    assert (demo.weights, own.weights) == ("none", "default")
    assert (demo.image_size, own.image_size) == (DEMO_DEFAULTS["image_size"], 224)
    assert own.epochs == OWN_DATA_DEFAULTS["epochs"]
    assert resolve(TrainConfig(image_size=80, epochs=3)).image_size == 80
    unset = {field.name for field in dataclasses.fields(TrainConfig) if field.default is None}
    unset.remove("classes")  # those of the labels
    assert unset == set(DEMO_DEFAULTS) == set(OWN_DATA_DEFAULTS)


def test_round_trip_through_a_checkpoint() -> None:
    config = resolve(TrainConfig(classes=("a", "b"), model_name="vivit"))
    saved = dataclasses.asdict(config) | {"classes": ["a", "b"], "a_setting_of_the_future": 1}
    assert from_dict(saved) == config


def test_every_field_has_a_help_text() -> None:
    texts = field_docs(TrainConfig)
    assert texts.keys() == FIELDS.keys()
    assert all(text.strip() for text in texts.values())


# What an earlier version wrote into a checkpoint.
# fmt: off
EARLIER = {
    "data_root": "/data/SLAM", "train_csv": "train.csv", "val_csv": "val.csv",
    "test_csv": "test.csv", "classes": ("a", "b"), "skip_unreadable": False, "cache": "",
    "check_clips": True, "n_frames": 12, "image_size": 96, "inputs": "rgb+gradients",
    "sampling": "random", "eval_sampling": "uniform", "flip": 0.4, "rotation": 10.0,
    "translate": 0.05, "zoom": 0.2, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2,
    "hue": 0.02, "rand_augment": 2, "rand_magnitude": 11, "erasing": 0.25, "model": "cnn_lstm",
    "weights": "none", "backbone": "resnet18", "fusion": "early", "shift_place": "blockres",
    "shift_div": 8, "shift_mode": "bidirectional", "carry_past": 0.4, "grid": 2,
    "lstm_hidden": 64, "lstm_layers": 1, "bidirectional": False, "temporal_pooling": "mean",
    "dropout": 0.0, "drop_path": 0.0, "freeze_to": "layer4", "freeze_batchnorm": False,
    "features": "/cache/features", "feature_draws": 3, "layer_decay": 1.0, "epochs": 5,
    "batch_size": 8, "accumulation": 2, "learning_rate": 0.0003, "weight_decay": 0.05,
    "warmup_epochs": 1.0, "loss": "logit_adjustment", "label_smoothing": 0.0, "focal_gamma": 2.0,
    "adjustment_tau": 0.7, "class_weights": "effective", "effective_beta": 0.99, "mixup": 0.2,
    "cutmix": 0.5, "tau": 1.0, "clip_norm": 0.5, "ema": 0.9, "amp": "bf16", "test_views": 1,
    "test_crops": 1, "select_by": "accuracy", "wanted_error": 0.2, "patience": 4, "workers": 1,
    "seed": 3, "device": "auto", "compile": False, "gradient_checkpointing": False,
    "run_dir": "runs", "resume": "", "tensorboard": False, "wandb": False,
}
# fmt: on


def test_the_config_of_an_earlier_version_is_understood() -> None:
    assert from_dict(EARLIER) == TrainConfig(
        data_root="/data/SLAM",
        rotation=10.0,
        translate=0.05,
        classes=("a", "b"),
        n_frames=12,
        image_size=96,
        modality="rgb+rgbdiff",
        hflip_prob=0.4,
        scale=0.2,
        rand_augment=2,
        ra_magnitude=11,
        random_erase=0.25,
        mixup_alpha=0.2,
        cutmix_alpha=0.5,
        model_name="cnnlstm",
        weights="none",
        fusion="early",
        shift_buffer_prob=0.4,
        spatial_pool=2,
        lstm_hidden=64,
        freeze_until="layer4",
        feature_cache="/cache/features",
        feature_augmentations=3,
        loss="logit_adjustment",
        logit_adjust_tau=0.7,
        class_weights="effective",
        class_balanced_beta=0.99,
        sampler_tau=1.0,
        epochs=5,
        gradient_accumulation_steps=2,
        learning_rate=3e-4,
        max_grad_norm=0.5,
        ema_decay=0.9,
        precision="bf16",
        monitor="accuracy",
        early_stopping_patience=4,
        target_error=0.2,
        num_workers=1,
        seed=3,
    )
    # Only these are new, and none is lost.
    new = {"csv", *(field.name for field in dataclasses.fields(ManifestOptions))}
    new |= {"head", "allow_pretraining_leak", "model_size", "patch_size", "tubelet_frames"}
    new |= {"attention", "pixel_mean", "pixel_std"}
    assert {OLD_NAMES.get(name, name) for name in EARLIER} | new == FIELDS.keys()


def test_earlier_names_lead_to_settings_and_values_that_exist() -> None:
    assert OLD_NAMES.keys() <= EARLIER.keys()
    assert set(OLD_NAMES.values()) <= FIELDS.keys()
    assert not OLD_NAMES.keys() & FIELDS.keys()
    assert len(set(OLD_NAMES.values())) == len(OLD_NAMES)
    for name, spellings in OLD_VALUES.items():
        choices = choices_of(name)
        assert set(spellings.values()) <= set(choices)
        assert not spellings.keys() & set(choices)
        for old, new in spellings.items():
            assert getattr(TrainConfig(**{name: old}), name) == new


def test_metadata_names_settings_and_values_that_exist() -> None:
    for field in FIELDS.values():
        needs, only_with = field.metadata.get("needs"), field.metadata.get("only_with") or {}
        assert not needs or needs in FIELDS, field.name
        for other, values in only_with.items():
            assert set(values) < set(choices_of(other)), field.name
    assert set(names_with("neutral", True)) < set(names_with("resumable", True))
    assert set(names_with("pixels", "all clips", "training clips")) == {
        *("cache", "n_frames", "image_size", "modality", "sampling", "eval_sampling", "hue"),
        *("hflip_prob", "rotation", "translate", "scale", "brightness", "contrast", "saturation"),
        *("rand_augment", "ra_magnitude", "random_erase"),
    }


def problems(**settings: object) -> list[str]:
    with pytest.raises(UserError) as error:
        resolve(TrainConfig(**settings))
    return [line.strip() for line in str(error.value).splitlines()[1:]]


RANGED = [f.name for f in FIELDS.values() if f.metadata.get("low") is not None]


@pytest.mark.parametrize("name", RANGED)
def test_ranges_are_enforced(name: str) -> None:
    low, high = FIELDS[name].metadata["low"], FIELDS[name].metadata["high"]
    text = f"at least {low}" if high is None else f"from {low} to {high}"
    for value in (low - 1, float("nan"), *([] if high is None else [high * 1.01 + 1])):
        assert f"{name} = {value}: must be {text}" in problems(**{name: value})


@pytest.mark.parametrize("name", names_with("needs", *FIELDS))
def test_settings_without_effect_are_refused(name: str) -> None:
    field = FIELDS[name]
    value = not field.default if isinstance(field.default, bool) else field.default + 1
    needs = field.metadata["needs"]
    model = {"model_name": "cnnlstm"} if needs == "lstm_layers" else {}
    off = type(FIELDS[needs].default)()
    assert problems(**{name: value, needs: off}, **model) == [
        f"{name} has no effect without {needs}: leave it out, or give that too"
    ]
    on = 1 if needs != "feature_cache" else "folder"
    resolve(TrainConfig(**{name: value, needs: on}, **model))


@pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if f.metadata.get("only_with")])
def test_settings_of_other_choices_are_refused(name: str) -> None:
    field = FIELDS[name]
    choices = get_args(HINTS[name])
    value = choices[0] if choices else field.default + 1
    if not choices and HINTS[name] is float:
        value = field.default + field.metadata["high"] / 1e6
    ((other, users),) = field.metadata["only_with"].items()
    assert value != field.default
    for choice in choices_of(other):
        settings = {name: value, other: choice}
        if choice in users:
            resolve(TrainConfig(**settings))
        else:
            (problem,) = problems(**settings)
            assert problem.startswith(f"{name} is a setting of {other} {', '.join(users)}, not")


def test_a_resumed_run_may_change_resumable_settings_alone() -> None:
    saved = TrainConfig()
    resumable = set(names_with("resumable", True)) - {"feature_cache"}
    assert {"num_workers", "device", "early_stopping_patience", "skip_unreadable"} < resumable
    for field in FIELDS.values():
        changed = dataclasses.replace(saved, **{field.name: "another value"})
        assert [name for name, *_ in differences(saved, changed)] == [field.name]
        if field.name in resumable:
            refuse_changes(saved, changed)
        else:
            with pytest.raises(UserError, match=f"keeps its settings: {field.name} is"):
                refuse_changes(saved, changed)


REGISTRIES = {
    "test_crops": CROP_COUNTS,
    "precision": ("auto", *utils.device._DTYPES),
}


@pytest.mark.parametrize("name", REGISTRIES)
def test_choices_are_those_of_the_code(name: str) -> None:
    assert get_args(HINTS[name]) == tuple(REGISTRIES[name])


@pytest.mark.parametrize("name", OWN)
def test_the_help_names_every_model_and_loss(name: str) -> None:
    assert all(choice in field_docs(TrainConfig)[name] for choice in OWN[name])


CHOICES = [
    ("modality", Modality.parse),
    ("fusion", lambda fusion: FrameEncoder("resnet18", "rgb+flow", fusion)),
    ("shift_place", lambda place: TSM(shift_place=place)),
    ("shift_mode", lambda mode: TSM(shift_mode=mode)),
    ("temporal_pooling", lambda pooling: CNNLSTM(temporal_pooling=pooling)),
    ("sampling", lambda sampling: FrameSampler(4, sampling).indices(9, [0.5] * 4)),
    ("eval_sampling", lambda sampling: FrameSampler(4, sampling).indices(9)),
]


@pytest.mark.parametrize(("name", "function"), CHOICES, ids=[name for name, _ in CHOICES])
def test_every_choice_is_known_to_the_code_and_no_other(name: str, function: Callable) -> None:
    for choice in get_args(HINTS[name]):
        function(choice)
    with pytest.raises(ValueError, match="typo"):
        function("typo")


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_is_known_to_the_code_and_no_other(name: str) -> None:
    if name not in ("resnet18", "resnet50", "convnext_tiny", "convnext_large"):
        pytest.importorskip("timm", reason="requirements-optional.txt is not installed")
    with torch.device("meta"):
        build_backbone(name)
    assert name in field_docs(TrainConfig)["backbone"] or name in list_encoders()
    with pytest.raises(UserError, match=f"'typo': choose from .*{name}"):
        build_backbone("typo")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weights", get_args(HINTS["class_weights"]))
def test_every_loss_and_weighting_is_one_of_its_own(loss: str, weights: str) -> None:
    """Each choice gives other numbers than plain cross entropy on clips of unequal classes."""
    logits, labels = torch.tensor([[2.0, 0.5, 0.1], [0.3, 0.2, 1.0]]), torch.tensor([0, 1])
    config = TrainConfig(epochs=5, loss=loss, class_weights=weights)
    losses = Criterion(config, (30, 8, 2))(logits, labels, 4)
    plain = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert losses.isfinite().all()
    assert torch.equal(losses, plain) == (loss == "cross_entropy" and weights == "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name": "resnet"}, "model_name = 'resnet': choose from 'tsm_resnet', 'r2plus1d'"),
        ({"loss": "hinge"}, "loss = 'hinge': choose from 'cross_entropy', 'focal', 'ldam'"),
        ({"epochs": 0}, "epochs = 0: must be at least 1"),
        ({"hflip_prob": 1.5}, "hflip_prob = 1.5: must be from 0 to 1"),
        ({"hue": 0.7}, "hue = 0.7: must be from 0 to 0.5"),
        ({"learning_rate": float("nan")}, "learning_rate = nan"),
        ({"classes": ("a",)}, "at least two are needed"),
        ({"classes": ("a", "a")}, "a name occurs twice"),
        ({"classes": ("a", "time")}, "no class may be called 'time'"),
        ({"classes": ("a", "b\n")}, "begins or ends with a space"),
        ({"feature_cache": "x", "cutmix_alpha": 1.0}, "cutmix_alpha cuts pixels"),
        ({"ra_magnitude": 20}, "ra_magnitude has no effect without rand_augment"),
        ({"feature_augmentations": 2}, "feature_augmentations has no effect without feature_cache"),
        ({"learning_rate": float("inf")}, "learning_rate = inf"),
        (
            {"early_stopping_patience": 5, "monitor": "last"},
            "early_stopping_patience is a setting of monitor macro_f1",
        ),
        ({"shift_buffer_prob": 0.9}, "shift_buffer_prob is a setting of shift_mode causal"),
        ({"mixup_alpha": 0.2, "batch_size": 1}, "batch_size must be at least 2"),
        ({"test_views": 2, "eval_sampling": "first"}, "there is one view"),
        *(
            ({"model_name": name, "freeze_batchnorm": True}, f"{name} has no BatchNorm")
            for name in ("vivit", "video_swin", "mvit")
        ),
        ({"backbone": "convnext_tiny", "freeze_batchnorm": True}, "convnext_tiny has no BatchNorm"),
        (
            {"model_name": "cnnlstm", "lstm_layers": 0, "bidirectional": True},
            "bidirectional has no effect without lstm_layers",
        ),
        (
            {"feature_cache": "x", "gradient_checkpointing": True},
            "gradient_checkpointing saves nothing",
        ),
        ({"lstm_hidden": 64}, "lstm_hidden is a setting of cnnlstm, not tsm_resnet"),
        (
            {"model_name": "vivit", "shift_div": 4},
            "shift_div is a setting of tsm_resnet, not vivit",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(dataclasses.replace(TrainConfig(), **changes))
    assert message in str(error.value)


def test_all_wrong_settings_are_listed_at_once() -> None:
    with pytest.raises(UserError) as error:
        resolve(TrainConfig(epochs=0, batch_size=0, sampler_tau=-1))
    assert all(name in str(error.value) for name in ("epochs", "batch_size", "sampler_tau"))


def test_manifests_are_looked_up_below_data_root_first(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").touch()
    (tmp_path / "other.csv").touch()
    paths = manifest_paths(TrainConfig(data_root="data", val_csv="other.csv"))
    assert paths["train"] == Path("data/train.csv")
    assert paths["val"] == Path("other.csv")
    assert paths["test"] == Path("data/test.csv")


SCRIPTS = sorted(p.stem for p in ROOT.glob("*.py") if "\n@cli_main\n" in p.read_text("utf-8"))


def test_all_scripts_are_covered() -> None:
    assert {"train", "evaluate", "predict", "cross_validate", "report", "compare"} <= set(SCRIPTS)
    assert len(SCRIPTS) == 12


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_help(script: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).main()
    assert not end.value.code
    text = capsys.readouterr().out
    assert f"{script}.py" in text
    assert "--" in text


def test_help_has_the_sections_of_the_settings(monkeypatch, capsys) -> None:
    """Each setting is in its section of `--help`, with its help text and default."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main()
    parts = re.split(r"(?m)^\W*(\w+) options\W*$", capsys.readouterr().out)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    titles = [f.metadata["section"] for f in FIELDS.values() if f.metadata.get("section")]
    assert list(sections) == [title.lower() for title in titles]
    section = ""
    for field in FIELDS.values():
        section = field.metadata.get("section", "").lower() or section
        assert re.search(rf"--{field.name.replace('_', '-')}\b", sections[section]), field.name
    loss = " ".join(re.sub(r"[│\n]", " ", sections["loss"]).split())
    assert "--focal-gamma FLOAT focal: how much less a well classified clip counts" in loss
    assert "(default: 2.0)" in loss


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model-name", "resnet"], "cnnlstm"),
        (["--epochs", "0"], "epochs = 0: must be at least 1"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used here"),
        (["--data-root", "nowhere"], "nowhere/train.csv: no such manifest"),
        (["--resume", "nowhere"], "nowhere: no such checkpoint"),
        (["--no-such-flag"], "no-such-flag"),
    ],
)
def test_wrong_flags_are_an_error_for_people(flags, message, tmp_path: Path, mistake) -> None:
    code, stderr = mistake(main, *flags, cwd=tmp_path)
    assert code == 2
    assert message in " ".join(stderr.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("script", "old", "new"),
    [
        ("evaluate", "amp", "precision"),
        ("predict", "amp", "precision"),
        ("predict", "wanted-error", "target-error"),
        ("predict", "rate", "fps"),
        ("benchmark_latency", "amp", "precision"),
        ("compare", "amp", "precision"),
    ],
)
def test_earlier_flags_of_the_scripts_name_the_new_ones(
    script: str, old: str, new: str, tmp_path: Path, mistake
) -> None:
    main = importlib.import_module(script).main
    _, stderr = mistake(main, "run", f"--{old}", "1", cwd=tmp_path)
    assert stderr == f"error: --{old} is now called --{new}\n"


@pytest.mark.parametrize(
    ("model", "clips", "changes", "fits"),
    [
        ("tsm_resnet", 9, {}, False),
        ("tsm_resnet", 8, {}, True),
        ("tsm_resnet", 9, {"n_frames": 2}, True),
        ("tsm_resnet", 9, {"image_size": 64}, True),
        ("tsm_resnet", 9, {"freeze_batchnorm": True}, True),
        ("r2plus1d", 9, {"image_size": 16}, False),
        ("vivit", 9, {}, True),
        ("video_swin", 9, {"image_size": 16}, True),
        ("mvit", 9, {"image_size": 16}, True),
    ],
)
def test_a_last_batch_of_one_value_per_channel_is_refused(model, clips, changes, fits) -> None:
    settings = {"n_frames": 1, "image_size": 32, "batch_size": 4, "model_name": model}
    config = resolve(TrainConfig(**{**settings, **changes}))
    if fits:
        check_smallest_batch(config, clips)
        return
    with pytest.raises(UserError, match="the smallest batch of an epoch has 1 of 9 clips, too few"):
        check_smallest_batch(config, clips)
