"""What an exported file says about its network."""

import json

import pytest
import torch

from config import TrainConfig
from deployment.metadata import pack, unpack
from utils.errors import UserError

CLASSES = ("Schnitt é", 'a "quoted" <class>', "c")


def checkpoint() -> dict:
    config = TrainConfig(
        classes=CLASSES, n_frames=4, image_size=32, data_root="/data/hospital", csv="patients.csv",
        patient_pattern="(Mueller)", run_dir="/home/jane/runs", weights="/home/jane/w.pt",
        cache="/home/jane/cache",
    )  # fmt: skip
    return {
        "format_version": 1,
        "model": {"head.bias": torch.zeros(3)},
        "config": vars(config),
        "classes": list(CLASSES),
        "class_counts": [3, 4, 5],
        "clips": {"train": "Mueller.mp4"},
        "pretrained": {"file": "Mueller.pt", "encoder": "E", "licence": "CC-BY-NC-4.0"},
        "calibration": {
            "temperature": 1.7, "target_error": 0.1, "threshold": None, "confidence": [0.9],
            "correct": [True],
        },
        "novelty": {
            "means": torch.rand(3, 512, dtype=torch.float64), "distances": [0.1, 0.25],
        },
        "frame_rate": 25.0,
    }  # fmt: skip


def test_a_checkpoint_comes_back_without_weights_and_places() -> None:
    state = checkpoint()
    metadata = pack(state, dynamic_batch=True)
    assert all(isinstance(text, str) and text.isascii() for text in metadata.values())
    everything = " ".join(metadata.values())
    for private in ("hospital", "patients", "Mueller", "jane"):
        assert private not in everything
    again = unpack(metadata, "x.onnx")
    for name in ("classes", "class_counts", "calibration", "frame_rate"):
        assert again[name] == state[name]
    assert torch.equal(again["novelty"]["means"], state["novelty"]["means"])
    assert again["pretrained"] == {"encoder": "E", "licence": "CC-BY-NC-4.0"}
    assert again["exported"] == {"precision": "fp32", "dynamic_batch": True, "memory": []}
    assert "model" not in again


def test_people_and_other_programs_can_read_it() -> None:
    metadata = pack(checkpoint())
    assert tuple(json.loads(metadata["classes"])) == CLASSES
    assert metadata["n_frames"] == "4" and metadata["image_size"] == "32"
    assert float(metadata["temperature"]) == 1.7 and float(metadata["threshold"]) == float("inf")
    assert metadata["licence"] == "CC-BY-NC-4.0" and metadata["frame_rate"] == "25.0"
    assert metadata["input"].startswith("clips (1, 4, 3, 32, 32): 4 frames spread evenly")


def changed(**texts: str) -> dict[str, str]:
    return {**pack(checkpoint()), **texts}


def in_checkpoint(old: str, new: str) -> dict[str, str]:
    metadata = pack(checkpoint())
    assert old in metadata["checkpoint"]
    return {**metadata, "checkpoint": metadata["checkpoint"].replace(old, new)}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "export.py has not written this file"),
        ({"format_version": "1"}, "export.py has not written this file"),
        (changed(format_version="2"), "of another version"),
        (changed(checkpoint="{"), "is damaged"),
        (changed(checkpoint="[" * 100_000), "brackets in brackets"),
        (changed(checkpoint="[]"), "not one of this project's files"),
        (changed(threshold="0.5"), "threshold is not what the checkpoint in it says"),
        (changed(n_frames="8"), "n_frames is not what"),
        (in_checkpoint('"n_frames": 4', '"n_frames": 5'), "n_frames is not what"),
        (in_checkpoint('"n_frames": 4', '"n_frames": -4'), "n_frames"),
        (in_checkpoint('"c"]', '"c", "d"]'), "class_counts has another length"),
        (in_checkpoint('"temperature": 1.7', '"temperature": NaN'), "is damaged"),
        (in_checkpoint('"temperature": 1.7', '"temperature": -1'), "not above 0"),
        (in_checkpoint('"dynamic_batch": false', '"dynamic_batch": 3'), "dynamic_batch"),
        (in_checkpoint('"means": [[', '"means": [[0.5], ['), "differ in length"),
        (in_checkpoint('"means": [[', '"means": [[0.5, '), "differ in length"),
        (in_checkpoint('"model_name": "tsm_resnet"', '"model_name": "x"'), "describe no model"),
    ],
)
def test_what_is_damaged_is_refused_in_one_line(metadata: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        unpack(metadata, "x.onnx")
    assert str(caught.value).startswith("x.onnx: ") and "\n" not in str(caught.value)
