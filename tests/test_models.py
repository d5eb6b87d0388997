"""All models: stages, parameter groups, freezing, contracts, and that each one can learn."""

import dataclasses
import inspect
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import make_model, only_run, train_flags
from torch import nn

import benchmark_latency
import cross_validate
import evaluate
import predict
import train
from config import TrainConfig
from evaluation.metrics import MORE_SCORES
from models import (
    MODELS,
    build_model,
    freeze,
    have_same_weights,
    keep_frozen_in_eval,
    model_options,
    summary,
)
from training.losses import LOSSES
from training.optim import param_groups
from utils.errors import UserError

# fmt: off
TINY = {
    "tsm_resnet": {},
    "cnnlstm": {"lstm_hidden": 16, "lstm_layers": 2, "temporal_pooling": "attention"},
    "r2plus1d": {},
    "vivit": {"n_frames": 4, "image_size": 32, "patch_size": 8, "dim": 24, "depth": 2,
              "dim_head": 8},
    "timesformer": {"n_frames": 4, "image_size": 32},
    "video_swin": {},
    "mvit": {},
}
STAGES = {
    "tsm_resnet": ["stem", "layer1", "layer2", "layer3", "layer4", "head"],
    "cnnlstm": ["stem", "layer1", "layer2", "layer3", "layer4", "lstm", "head"],
    "r2plus1d": ["stem", "layer1", "layer2", "layer3", "layer4", "head"],
    "vivit": ["embedding", "spatial1", "spatial2", "temporal1", "temporal2", "head"],
    "timesformer": ["embedding", *(f"block{number}" for number in range(1, 13)), "head"],
    "video_swin": ["patch_embed", "layer1", "layer2", "layer3", "layer4", "head"],
    "mvit": ["patch", *(f"block{number}" for number in range(1, 17)), "head"],
}
# fmt: on
# MViT's classifier reads the class token, whose query has no position and is not pooled; in the
# last block no other query is used.
UNUSED = ("backbone.blocks.15.attn.rel_pos", "backbone.blocks.15.attn.pool_q.pool")
every_model = pytest.mark.parametrize("name", MODELS)


def tiny(name: str, num_classes: int = 7, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return make_model(name, num_classes, **TINY[name], **options)


def clips(count: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 4, 3, 32, 32), dtype=torch.uint8, generator=generator)


@every_model
def test_stages_cover_every_parameter_once(name: str) -> None:
    with torch.device("meta"):
        model = tiny(name)
    stages = model.stages()
    listed = [id(p) for modules in stages.values() for m in modules for p in m.parameters()]
    assert list(stages) == STAGES[name]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters()}


@every_model
def test_dtypes_agree_and_dropout_sleeps_in_eval(name: str) -> None:
    model, x = tiny(name, num_classes=5, dropout=0.5), clips()
    model.train()
    with torch.no_grad():
        model(x)  # BatchNorm statistics of some clips
        model.eval()
        once, again, from_float = model(x), model(x), model(x.float() / 255)
    assert once.shape == (2, 5)
    assert once.dtype == torch.float32
    assert torch.equal(once, again)
    torch.testing.assert_close(once, from_float, atol=1e-4, rtol=1e-4)


@every_model
def test_clips_of_a_batch_do_not_see_each_other(name: str) -> None:
    model = tiny(name)
    with torch.no_grad():
        model(clips(seed=2))  # BatchNorm statistics of some clips
        model.eval()
        one = clips(2)
        other = torch.stack((one[0], clips(1, seed=1)[0]))
        before, after = model(one), model(other)
    torch.testing.assert_close(before[0], after[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(before[1], after[1], atol=1e-5)


def test_options_are_the_constructors() -> None:
    assert model_options("tsm_resnet") == {
        "backbone",
        "modality",
        "fusion",
        "shift_place",
        "shift_div",
        "shift_mode",
        "shift_buffer_prob",
        "dropout",
    }
    for name, cls in MODELS.items():
        assert model_options(name) | {"num_classes"} == set(inspect.signature(cls).parameters)


def test_a_config_becomes_a_model() -> None:
    """Each option of the constructor comes from the setting of the same name."""
    lstm = build_model(TrainConfig(model_name="cnn_lstm", lstm_hidden=16, dropout=0.2), 4)
    assert (type(lstm), lstm.lstm.hidden_size) == (MODELS["cnnlstm"], 16)
    assert (lstm.dropout.p, lstm.head.out_features) == (0.2, 4)
    vivit = build_model(TrainConfig(model_name="vivit", n_frames=4, image_size=32))
    assert vivit.embedding.positions.shape[:3] == (1, 4, 5)
    tsm = build_model(TrainConfig(shift_mode="causal", shift_div=4, shift_buffer_prob=0.1))
    assert (tsm.causal, tsm.shift_div, tsm.shift_buffer_prob) == (True, 4, 0.1)


@pytest.mark.parametrize(
    ("name", "sizes", "same"),
    [("tsm_resnet", [""], True), ("cnnlstm", [""], True), ("vivit", [""], False),
     ("video_swin", ["tiny", "small"], True), ("mvit", ["small"], True), ("mvit", ["base"], False)],
)  # fmt: skip
def test_which_weights_are_made_for_a_number_of_frames(
    name: str, sizes: list[str], same: bool
) -> None:
    for size in sizes:
        config = TrainConfig(model_name=name, model_size=size, n_frames=16, image_size=64)
        assert have_same_weights(config, dataclasses.replace(config, n_frames=8)) == same
        assert have_same_weights(config, dataclasses.replace(config, image_size=96)) == same
        assert have_same_weights(config, dataclasses.replace(config, dropout=0.5))


def test_sizes_have_other_weights() -> None:
    sizes = [TrainConfig(model_name="video_swin", model_size=size) for size in ("", "small")]
    assert not have_same_weights(*sizes)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"'resnet'.*tsm_resnet, r2plus1d, cnnlstm, vivit"):
        build_model(TrainConfig(model_name="resnet"))


@every_model
def test_layer_decay_and_no_decay(name: str) -> None:
    with torch.device("meta"):
        model = tiny(name)
    groups = param_groups(model, 0.1, 0.05, layer_decay=0.5)
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    depth = len(STAGES[name]) - 1
    for number, modules in enumerate(model.stages().values()):
        for parameter in (p for module in modules for p in module.parameters()):
            assert settings[id(parameter)][0] == pytest.approx(0.1 * 0.5 ** (depth - number))

    norms = (nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm)
    in_norms = {id(p) for m in model.modules() if isinstance(m, norms) for p in m.parameters()}
    spared = 0
    for path, parameter in model.named_parameters():
        free = id(parameter) in in_norms or "bias" in path or "token" in path or "pos" in path
        free = free or path == "time_embed"
        spared += free
        assert settings[id(parameter)][1] == (0.0 if free else 0.05), path
    assert 0 < spared < len(settings)


def test_layer_decay_of_one_gives_one_rate() -> None:
    groups = param_groups(tiny("tsm_resnet"), 0.3, 0.05)
    assert {group["lr"] for group in groups} == {0.3}
    torch.optim.AdamW(groups)  # refuses a parameter that is in two groups


@every_model
def test_frozen_stages_stand_still(name: str) -> None:
    model, x, up_to = tiny(name, dropout=0.2), clips(), STAGES[name][2]
    freeze(model, up_to)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(param_groups(model, 0.1, 0.1))
    for _ in range(2):  # a second model.train() must not change them
        model.train()
        keep_frozen_in_eval(model)
        nn.functional.cross_entropy(model(x), torch.tensor([0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
    names = {id(value): key for key, value in model.state_dict(keep_vars=True).items()}
    for number, (stage, modules) in enumerate(model.stages().items()):
        values = [v for m in modules for v in m.state_dict(keep_vars=True).values()]
        same = {names[id(v)]: torch.equal(v, before[names[id(v)]]) for v in values}
        if number <= 2:
            assert all(same.values()), stage
            assert not any(m.training for module in modules for m in module.modules())
            assert all(value.grad is None for value in values)
        else:
            assert not any(is_same for key, is_same in same.items() if not key.startswith(UNUSED))
            assert all(module.training for module in modules)


def test_without_holding_the_statistics_would_drift() -> None:
    """The test above can fail: frozen weights alone do not hold BatchNorm."""
    model = tiny("tsm_resnet").train()
    freeze(model, "layer4")
    before = model.backbone.bn1.running_mean.clone()
    with torch.no_grad():
        model(clips())
    assert not torch.equal(model.backbone.bn1.running_mean, before)


@every_model
@pytest.mark.parametrize("up_to", ["head", "layer9", ""])
def test_what_cannot_be_frozen_is_refused(name: str, up_to: str) -> None:
    with torch.device("meta"):
        model = tiny(name)
    with pytest.raises(UserError, match=", ".join(STAGES[name][:-1])):
        freeze(model, up_to)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_frozen_parameters_are_in_no_group() -> None:
    model = tiny("tsm_resnet")
    freeze(model, "layer4")
    groups = param_groups(model, 0.1, 0.1)
    assert {id(p) for group in groups for p in group["params"]} == {
        id(model.head.weight), id(model.head.bias)
    }  # fmt: skip


def test_summary() -> None:
    model = make_model("tsm_resnet", 7)
    freeze(model, "stem")
    lines = [line.split() for line in summary(model).splitlines()]
    assert lines[0] == ["stem", "9,536", "frozen"]
    assert lines[1] == ["layer1", "147,968"]
    assert lines[5] == ["head", "3,591"]
    assert lines[6] == ["parameters", "11,180,103,", "trained", "11,170,567"]


@every_model
def test_eight_clips_overfit(name: str) -> None:
    """Gradients reach everything and eval agrees with training: 100 % within a few steps."""
    options = {"lstm_hidden": 64} if name == "cnnlstm" else TINY[name]
    torch.manual_seed(0)
    model, x = make_model(name, 7, **options), clips(8)
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0])
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            module.momentum = 0.5  # statistics that follow within so few steps
    rate = {"vivit": 3e-3, "video_swin": 3e-4, "mvit": 3e-4}.get(name, 1e-3)
    optimizer = torch.optim.AdamW(param_groups(model, rate, 0.01), fused=True)
    for step in range(1, 101):
        model.train()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2 == 0:
            model.eval()
            with torch.no_grad():
                if torch.equal(model(x).argmax(dim=1), labels):
                    return
    raise AssertionError(f"{name}: not learnt in {step} steps")


def test_wrong_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="shift_place must be"):
        make_model("tsm_resnet", 7, shift_place="typo")
    with pytest.raises(ValueError, match="no temporal_pooling"):
        make_model("cnnlstm", 7, temporal_pooling="typo")


class Mean(nn.Module):
    """The smallest model: a linear classifier of the mean colour."""

    def __init__(self, num_classes: int = 7) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 8), nn.Linear(8, num_classes)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        colour = clips.float().div(255 if clips.dtype == torch.uint8 else 1).mean((1, 3, 4))
        return self.head(self.stem(colour).relu())

    def stages(self) -> dict[str, list[nn.Module]]:
        return {"stem": [self.stem], "head": [self.head]}


def test_one_entry_is_enough_for_every_script(
    tiny_data: Path, tmp_path: Path, run_main, mistake, no_figures, monkeypatch
) -> None:
    """An own model, loss and score: trained, resumed, cross-validated, evaluated, benchmarked, and
    used for a whole video."""
    flags = train_flags(tiny_data, "--model-name", "mean", "--epochs", 1, "--loss", "own")
    flags[flags.index("--dropout") : flags.index("--dropout") + 2] = []  # it has none
    assert "model_name = 'mean': choose from" in mistake(train.main, *flags, cwd=tmp_path).stderr
    monkeypatch.setitem(MODELS, "mean", Mean)
    monkeypatch.setitem(
        LOSSES, "own", lambda *_: lambda z, y: nn.functional.cross_entropy(z, y, reduction="none")
    )
    monkeypatch.setitem(MORE_SCORES, "errors", lambda m: 1 - m.trace(0, -2, -1) / m.sum((-2, -1)))

    done = run_main(train.main, *flags, "--freeze-until", "stem", cwd=tmp_path)
    run = only_run(tmp_path)
    results = json.loads((run / "test_metrics.json").read_text())
    assert results["errors"] == pytest.approx(1 - results["accuracy"])
    assert results["intervals"]["errors"]["clips"] is not None
    assert f"errors {results['errors']:.4f}: " in done.stdout
    assert "resumed" in run_main(train.main, "--resume", run, cwd=tmp_path).stdout
    run_main(evaluate.main, run, "--num-workers", 0, "--device", "cpu", cwd=tmp_path)
    video = next((tiny_data / "clips").rglob("*.mp4"))
    run_main(predict.main, run, video, "--device", "cpu", "--output", "seen", cwd=tmp_path)
    assert list((tmp_path / "seen").rglob("timeline.csv"))
    quick = ["--repeats", 1, "--warmup", 0, "--image-size", 32, "--n-frames", 4, "--batch-size", 2]
    models = ["--model-names", "mean", run, "--device", "cpu", "--output", "speed"]
    run_main(benchmark_latency.main, *models, *quick, cwd=tmp_path)
    table = pd.read_csv(tmp_path / "speed" / "latency.csv")
    assert table["Model"].tolist() == ["mean", f"mean ({run.name})"]
    folds = tmp_path / "folds" / "fold1"
    folds.mkdir(parents=True)
    for split in ("train", "val", "test"):
        (folds / f"{split}.csv").write_text((tiny_data / f"{split}.csv").read_text())
    run_main(cross_validate.main, "--folds", folds.parent, *flags, cwd=tmp_path)
