"""What an exported file says about its network: everything of the checkpoint but the weights.

It is a dict of ASCII strings, which ONNX (`metadata_props`) and OpenVINO (`rt_info`) keep. Most of
them are for people and for programs in other languages; `checkpoint` is the JSON from which this
project evaluates the file like a run. Nothing in it names patients, clips or folders.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch

from checkpoint import FORMAT_VERSION as CHECKPOINT_VERSION
from checkpoint import check_all_but_weights
from clips.manifest_formats import ManifestOptions
from config import TrainConfig, from_dict
from evaluation.calibration import Calibration
from utils.errors import UserError
from utils.files import parse_json
from utils.structure import find_mismatch
from video.motion import Modality

FORMAT_VERSION = 1

# Settings that name folders and files of the machine of the training.
_PLACES = {
    *("data_root", "csv", "train_csv", "val_csv", "test_csv", "cache", "weights"),
    *("feature_cache", "run_dir", "resume"),
    *(field.name for field in dataclasses.fields(ManifestOptions)),
}
_KEPT = ("class_counts", "frame_rate", "calibration")
_EXPORTED = {
    "precision": str,
    "dynamic_batch": bool,
    "memory": [{"name": str, "shape": [int]}],
}


def pack(
    state: Mapping[str, Any],
    precision: str = "fp32",
    dynamic_batch: bool = False,
    memory: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, str]:
    """A checkpoint without its weights, as strings.

    Args:
        state: a checkpoint; its config says T.
        precision: of the network, `fp32` or `int8`.
        dynamic_batch: whether the network takes batches of any size, or of one.
        memory: for the network of one frame, see deployment/step.py: the shape of each memory
            without the batch, by its name.
    """
    config = from_dict(state["config"])
    novelty, provenance = state.get("novelty"), state.get("pretrained", {})
    described = {
        "format_version": CHECKPOINT_VERSION,
        "config": {name: value for name, value in vars(config).items() if name not in _PLACES},
        "classes": list(state["classes"]),
        # The name of a file of weights may say whose they are.
        "pretrained": {name: value for name, value in provenance.items() if name != "file"},
        **{name: state[name] for name in _KEPT if name in state},
        "exported": {
            "precision": precision,
            "dynamic_batch": dynamic_batch,
            "memory": [{"name": n, "shape": list(shape)} for n, shape in (memory or {}).items()],
        },
    }
    if novelty:
        described["novelty"] = {
            "means": novelty["means"].tolist(),
            "distances": list(novelty["distances"]),
        }
    return {**_describe(described, config), "checkpoint": json.dumps(described)}


def _describe(state: Mapping[str, Any], config: TrainConfig) -> dict[str, str]:
    """What people and other programs read in the file."""
    calibration = Calibration.from_state_dict(state.get("calibration"))
    channels, exported = Modality.parse(config.modality).channels, state["exported"]
    batch = "batch" if exported["dynamic_batch"] else "1"
    size = f"{config.image_size}, {config.image_size}"
    pixels = (
        "uint8, RGB; the whole frame is squeezed into the square, nothing is cut off; the network "
        "normalises the pixels itself"
    )
    if channels == 5:
        pixels += "; channels 4 and 5 are the motion to the right and down, coded as 128 + 127 m / "
        pixels += "0.05 with m in fractions of the frame's width and height since the frame before"
    if exported["memory"]:
        clips = f"frame ({batch}, {channels}, {size}): the newest frame, {pixels}"
    else:
        clips = f"clips ({batch}, {config.n_frames}, {channels}, {size}): {config.n_frames} frames "
        first = config.eval_sampling == "first"
        clips += "from its start" if first else "spread evenly over the clip"
        clips += f", {pixels}"
    names = "".join(f"{part['name']}, " for part in exported["memory"]).removesuffix(", ")
    return {
        "format_version": str(FORMAT_VERSION),
        "model_name": config.model_name,
        "classes": json.dumps(list(state["classes"])),
        "n_frames": str(config.n_frames),
        "image_size": str(config.image_size),
        "channels": str(channels),
        "frame_rate": str(state.get("frame_rate") or "unknown"),
        "temperature": repr(calibration.temperature),
        "threshold": repr(float(calibration.min_confidence)),
        "licence": json.dumps(state["pretrained"].get("licence", "unknown"))[1:-1],
        "precision": exported["precision"],
        "batch": "any" if exported["dynamic_batch"] else "1",
        "input": clips,
        **({"memory": names} if names else {}),
    }


def unpack(metadata: Mapping[str, str], source: str) -> dict[str, Any]:
    """The checkpoint, without weights, of an exported file's metadata.

    Args:
        source: the file, for messages.

    Returns:
        What `checkpoint.load_checkpoint` returns, without `model`, and with `exported`: precision,
        dynamic_batch and memory, see `pack`.

    Raises:
        UserError: it is no file of export.py, or damaged, or of a newer version.
    """
    version = metadata.get("format_version", "")
    if not version or "checkpoint" not in metadata:
        raise UserError(
            f"{source}: export.py has not written this file, so it does not say what its classes "
            "and clips are: export a run (python export.py RUN)"
        )
    if version != str(FORMAT_VERSION):
        raise UserError(
            f"{source}: of another version of this project (format {version[:20]!r}, this one "
            f"reads {FORMAT_VERSION}): export the run again"
        )
    state = parse_json(metadata["checkpoint"], source, {"exported": _EXPORTED})
    if "novelty" in state:
        shape = {"novelty": {"means": [[float]], "distances": [float]}}
        if mismatch := find_mismatch(state, shape):
            raise UserError(f"{source}: not one of this project's files ({mismatch})")
        means = state["novelty"]["means"]
        if len({len(mean) for mean in means}) != 1:
            raise UserError(f"{source}: is damaged: the means of its novelty differ in length")
        state["novelty"]["means"] = torch.tensor(means, dtype=torch.float64)
    check_all_but_weights(state, source)
    for name, text in _describe(
        {"pretrained": {}, **state}, from_dict(state["config"], source=source)
    ).items():
        if metadata.get(name) != text:
            raise UserError(
                f"{source}: is damaged: its metadata {name} is not what the checkpoint in it says"
            )
    return state
