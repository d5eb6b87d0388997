"""Checks before the first epoch: settings, cache, clips, model, changes of a resumed run."""

import contextlib
import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from clips.manifest import CLASSES, class_problems, classes_of, raise_problems
from clips.manifest_formats import ManifestOptions, read_records
from cnn_lstm import CNNLSTM
from config import (
    DEMO_DEFAULTS,
    OWN_DATA_DEFAULTS,
    TrainConfig,
    differences,
    fitted_splits,
    manifest_paths,
    wrong_values,
)
from dataset import ClipsDataset, require_readable
from modeling.frame_encoder import FrameEncoder
from modeling.weights import LoadedWeights, load_weights
from models import (
    BATCHNORMS,
    MODELS,
    apply_freezing,
    build_model,
    keep_frozen_in_eval,
    model_options,
)
from training.losses import LOSSES
from training.state import TrainState
from training.writers import require_packages
from utils import distributed
from utils.errors import ResultWarning, UserError, first_line
from utils.files import require_space, require_writable
from utils.lock import FolderLock
from utils.structure import short_repr
from utils.text_table import list_some
from utils.workers import show_batches
from video.container import ClipError
from video.motion import Modality

log = logging.getLogger(__name__)


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill in the settings that are None, and refuse settings that cannot work.

    A config that is resolved already is returned unchanged.

    Raises:
        UserError: all wrong settings at once, each with the allowed values.
    """
    if config.csv and not config.data_root:
        config = dataclasses.replace(config, data_root=str(Path(config.csv).parent))
    defaults = OWN_DATA_DEFAULTS if config.data_root else DEMO_DEFAULTS
    changes = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    # Absolute, because a run may be evaluated from another folder later.
    paths = {n: getattr(config, n) for n in ("data_root", "csv", "cache", "feature_cache")}
    paths |= _named_manifests(config)
    changes |= {name: os.path.abspath(path) for name, path in paths.items() if path}
    config = dataclasses.replace(config, **changes)
    problems = find_problems(config)
    if not problems and config.classes is None:
        config = dataclasses.replace(config, classes=_find_classes(config))
        problems = _class_problems(config.classes)
    if problems:
        raise UserError("\n  ".join(["these settings cannot work:", *problems]))
    return config


def _named_manifests(config: TrainConfig) -> dict[str, Path]:
    """The settings of manifests that are not found by their place below data_root."""
    found, root = manifest_paths(config), Path(config.data_root)
    if isinstance(found, Path):  # a table that was found is named, so that it is looked for once
        return {"csv": found} if found.is_file() else {}
    return {f"{s}_csv": path for s, path in found.items() if root not in path.parents}


def _find_classes(config: TrainConfig) -> tuple[str, ...]:
    """The classes that the labels of the manifests name.

    Raises:
        UserError: a manifest cannot be read, or a label has no training clip.
    """
    if not config.data_root:
        return CLASSES
    found, options = manifest_paths(config), ManifestOptions.of(config)
    sources = {"": found} if isinstance(found, Path) else found
    records, problems = {}, []
    for split, source in sources.items():
        records[split], new_problems = read_records(source, options)
        problems += new_problems
    raise_problems(problems)
    if not isinstance(found, Path):
        fitted = [record for split in fitted_splits(config) for record in records.pop(split)]
        records["train"] = fitted
    return classes_of(records)


def find_problems(config: TrainConfig) -> list[str]:
    """A line for each wrong setting, with the allowed values."""
    problems = wrong_values(config)
    for name, known in (("model_name", MODELS), ("loss", LOSSES)):
        if isinstance(value := getattr(config, name), str) and value not in known:
            choices = ", ".join(map(repr, known))
            problems.append(f"{name} = {short_repr(value)}: choose from {choices}")
    if not problems:
        problems = _of_other_models(config) + _without_effect(config) + _contradictions(config)
    if not problems:
        problems = _model_problems(config)
    return problems + _class_problems(CLASSES if config.classes is None else config.classes)


def _class_problems(classes: Sequence[str]) -> list[str]:
    few = [f"classes = {classes}: at least two are needed"] * (len(classes) < 2)
    return few + class_problems(classes)


def _contradictions(config: TrainConfig) -> list[str]:
    """Settings that do not go together."""
    problems, modality = [], Modality.parse(config.modality)
    if modality.stored_motion and (config.rand_augment or config.random_erase):
        problems.append(
            f"rand_augment and random_erase change RGB alone, not modality {config.modality}"
        )
    if config.fusion == "summary" and config.modality == "rgb+rgbdiff":
        problems.append("fusion summary needs a field of motion: modality rgb+flow or rgb+mv")
    if config.feature_cache and config.cutmix_alpha:
        problems.append(
            "cutmix_alpha cuts pixels, which cached features do not have: give --mixup-alpha"
        )
    if config.feature_cache and config.gradient_checkpointing:
        problems.append("gradient_checkpointing saves nothing with cached features: leave it out")
    if (config.mixup_alpha or config.cutmix_alpha) and config.batch_size == 1:
        problems.append("mixup and cutmix mix the clips of a batch: batch_size must be at least 2")
    if config.test_views > 1 and config.eval_sampling == "first":
        problems.append("test_views: with eval_sampling first there is one view, the first frames")
    if config.compile and config.gradient_checkpointing:
        problems.append("compile and gradient_checkpointing do not go together: choose one of them")
    return problems


def _of_other_models(config: TrainConfig) -> list[str]:
    """Settings of one model that were changed although another one is trained."""
    options = {name: model_options(name) for name in MODELS}
    problems = []
    for field in dataclasses.fields(config):
        if field.name in ("n_frames", "image_size"):  # some models are built for them, all use them
            continue
        owners = [model for model, accepted in options.items() if field.name in accepted]
        changed = getattr(config, field.name) != field.default
        if owners and config.model_name not in owners and changed and field.default is not None:
            problems.append(
                f"{field.name} is a setting of {', '.join(owners)}, not {config.model_name}"
            )
    return problems


def _without_effect(config: TrainConfig) -> list[str]:
    """Settings that were changed although nothing uses them; 0 switches each of them off."""
    problems = []
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        for other, users in field.metadata.get("only_with", {}).items():
            used_by = getattr(config, other)
            if used_by not in users and value not in (0, field.default):
                problems.append(
                    f"{name} is a setting of {other} {', '.join(users)}, not {used_by}: leave it "
                    "out"
                )
        defaults = [d.get(name) for d in (DEMO_DEFAULTS, OWN_DATA_DEFAULTS)]
        changed = value not in (0, field.default, *defaults)
        if config.head == "linear" and field.metadata.get("gradient") and changed:
            problems.append(
                f"{name} has no effect with head linear, which is fitted without gradient steps or "
                "augmentation: leave it out"
            )
        needs = field.metadata.get("needs")
        if needs and value != field.default and not getattr(config, needs):
            problems.append(f"{name} has no effect without {needs}: leave it out, or give that too")
    return problems


def _model_problems(config: TrainConfig) -> list[str]:
    """What the model itself cannot do with the settings.

    It is built on the meta device, where nothing is computed, and its backbone is shown a frame.
    """
    has_backbone = "backbone" in model_options(config.model_name)
    if not has_backbone and not config.freeze_batchnorm:
        return []
    name, size = config.backbone if has_backbone else config.model_name, config.image_size
    # The meta device lacks some operators: then there is nothing to tell.
    with torch.device("meta"), contextlib.suppress(NotImplementedError):
        try:
            model = build_model(config, num_classes=2).eval()
        except UserError as error:
            return [str(error)]
        if config.freeze_batchnorm and not any(isinstance(m, BATCHNORMS) for m in model.modules()):
            return [f"freeze_batchnorm: {name} has no BatchNorm"]
        if isinstance(model, FrameEncoder):
            try:
                model.forward_features(torch.zeros(1, 1, model.channels, size, size))
            except UserError as error:
                return [str(error)]
            except NotImplementedError:
                raise
            except Exception as error:  # each network has its own types
                reason, own_size = first_line(error).rstrip("."), model.backbone.frame_size
                return [
                    f"image_size = {size}: {name} takes no frames of {size} px ({reason}); it was "
                    f"made for {own_size}"
                ]
    return []


def refuse_changes(saved: TrainConfig, config: TrainConfig) -> None:
    """Refuse to resume a run with settings that would change its result.

    Raises:
        UserError: such a setting differs; the message names it.
    """
    fields = dataclasses.fields(config)
    resumable = {field.name for field in fields if field.metadata.get("resumable")}
    if not (saved.feature_cache and config.feature_cache):
        resumable.discard("feature_cache")  # without it, every epoch draws new augmentations
    for name, before, value in differences(saved, config, ignore=resumable):
        raise UserError(
            f"a resumed run keeps its settings: {name} is {before!r}, not {value!r} (only "
            f"{', '.join(sorted(resumable - {'resume'}))} may change; to train on from its "
            f"weights, start a new run with --weights {config.resume}/best.pt)"
        )


def keep_clips_per_step(config: TrainConfig, state: Mapping[str, Any]) -> TrainConfig:
    """The settings of a resumed run for the processes of now.

    Where another number of processes can share the clips of an optimizer step evenly, each adds up
    the gradients of more or fewer batches, so that a step has as many clips as before.
    """
    batches = config.gradient_accumulation_steps * len(state["rng"])
    if batches % distributed.world_size():
        return config
    batches_per_process = batches // distributed.world_size()
    return dataclasses.replace(config, gradient_accumulation_steps=batches_per_process)


def require_some_readable(loaders: Mapping[str, DataLoader], classes: Sequence[str]) -> None:
    """Check that each split has a clip that can be read, and the training split one of each class
    that it has clips of.

    It reads clips until it finds them, usually one per class and split.

    Raises:
        UserError: with the first few errors.
    """
    for split, loader in loaders.items():
        clips: ClipsDataset = loader.dataset
        wanted = {row.label for row in clips.rows} if split == "train" else {None}
        errors = []
        for index, row in enumerate(clips.rows):
            label = row.label if split == "train" else None
            if label in wanted:
                try:
                    clips[index, 0]  # seeded, so that nothing is drawn from the global generator
                    wanted.remove(label)
                except ClipError as error:
                    errors.append(str(error))
            if not wanted:
                break
        else:
            names = ", ".join(classes[label] for label in wanted if label is not None)
            listing = list_some(errors, separator="\n  ")
            raise UserError(
                f"none of the {split} clips{' of ' + names if names else ''} can be read:\n"
                f"  {listing}"
            )


def hold_outputs(
    config: TrainConfig, folder: str | Path | None
) -> contextlib.AbstractContextManager:
    """Check, before anything is decoded, that what the training writes can be written.

    Of torchrun's processes the first one writes and checks.

    Args:
        folder: the run folder (None: a new one below config.run_dir).

    Returns:
        What keeps other processes out of the run folder, if it is given.

    Raises:
        UserError: a folder cannot be written, another process works in it, or a package is missing.
    """
    if distributed.rank():
        return contextlib.nullcontext()
    require_writable(folder or config.run_dir, "--run-dir")
    if config.feature_cache:
        require_writable(config.feature_cache, "--feature-cache")
    require_packages(config)
    return FolderLock(folder, "last.pt") if folder else contextlib.nullcontext()


def check_space(state: TrainState, folder: str | Path) -> None:
    """Check that there is room for the checkpoints, before anything is decoded.

    last.pt holds the weights, with an EMA twice, and AdamW's two averages of each trained value;
    best.pt holds the weights. While a new last.pt is written, the old one is still there.

    Args:
        folder: the run folder, or the folder in which a new one will be made. Checkpoints that are
            in it will be replaced.

    Raises:
        UserError: there is less room.
    """
    if distributed.rank():
        return
    weights = sum(value.nbytes for value in state.model.state_dict().values())
    trained = [p for group in state.optimizer.param_groups for p in group["params"]]
    last = (2 if state.ema else 1) * weights + 2 * sum(p.nbytes for p in trained)
    paths = [Path(folder) / name for name in ("last.pt", "best.pt")]
    replaced = sum(path.stat().st_size for path in paths if path.is_file())
    what = "two checkpoints and the next one need"
    require_space(folder, 2 * last + weights - replaced, what, "--run-dir")


def check_cache(datasets: Sequence[ClipsDataset]) -> None:
    """Check that the cache, if one is used, holds all the clips as they are now.

    Raises:
        UserError: with the number of clips that are missing, and why; or a tar file of the cache
            was changed.
    """
    for shards in {
        id(s): s for d in datasets if d.cache and (s := d.cache.shards) is not None
    }.values():
        if changed := shards.check_contents():
            raise UserError(f"{'; '.join(changed)}: run python prepare_data.py cache again")
    problems = [
        (row.path, problem)
        for clips in datasets
        if clips.cache
        for row in tqdm(clips.rows, "checking the cache", leave=False, delay=1)
        if (problem := clips.cache.check(row.path))
    ]
    if problems:
        kinds = Counter(problem for _, problem in problems)
        counts = "; ".join(f"{count:,} {problem}" for problem, count in kinds.items())
        raise UserError(
            f"{datasets[0].cache.folder}: {counts} (e.g. {problems[0][0]}): "
            "run python prepare_data.py cache again"
        )


def check_clips(loaders: dict[str, DataLoader], skip_unreadable: bool) -> None:
    """Read every clip of these loaders once, before hours of training depend on them.

    Raises:
        UserError: listing all clips that cannot be read, unless they are to be skipped.
    """
    unreadable = []
    for name, loader in loaders.items():
        batches = show_batches(loader, f"reading {name} clips", quiet=distributed.rank() != 0)
        for lines in distributed.all_gather([line for b in batches for line in b.unreadable]):
            unreadable += lines
    if not skip_unreadable:
        require_readable(unreadable, "validation and test")
    elif unreadable:
        listing = "\n  ".join(unreadable)
        log.warning(f"{len(unreadable)} validation and test clips are left out:\n  {listing}")


def check_model(config: TrainConfig) -> LoadedWeights:
    """Build the model of a resolved config, with its weights and frozen stages, as training will.

    Returns:
        What was loaded.

    Raises:
        UserError: something about them would stop the training.
    """
    model = build_model(config, len(config.classes))
    loaded = load_weights(model, config.weights)
    warn_random_features(config, model, loaded)
    apply_freezing(model, config)
    if config.feature_cache:
        require_frozen(model)
    return loaded


def warn_random_features(
    config: TrainConfig, model: nn.Module, loaded: LoadedWeights, resumed: bool = False
) -> list[ResultWarning]:
    """A warning if a linear head gets the features of a network that was never trained.

    Args:
        resumed: the weights are those of the run, and were checked when it began.

    Raises:
        UserError: pretrained features would pass through an LSTM or an attention that was not.
    """
    if config.head != "linear":
        return []
    if config.weights == "none":
        text = "head linear: the features are those of random weights (--weights none)"
        return [{"kind": "other", "text": text}]
    if loaded.whole or resumed:
        return []
    new = {
        "lstm": "--lstm-layers 0",
        "attention": "another --temporal-pooling",
        "temporal": "--attention joint or another --model-name",
    }
    for name, flag in new.items():
        if isinstance(getattr(model, name, None), nn.Module):
            raise UserError(
                f"head linear: {name} would keep its random weights: give {flag}, or with "
                "--weights a run in which it was trained"
            )
    return []


def check_smallest_batch(config: TrainConfig, num_clips: int) -> None:
    """Check that BatchNorm can be trained on the smallest batch of an epoch.

    In a batch of one clip with few frames and pixels, its last layers get one value per channel,
    which has no variance. The model is tried on the meta device, where nothing is computed.

    Args:
        num_clips: number of training clips per epoch and process.

    Raises:
        UserError: with the remedy.
    """
    if config.head == "linear":  # nothing is trained in batches
        return
    smallest = num_clips % config.batch_size or min(num_clips, config.batch_size)
    modality, size = Modality.parse(config.modality), config.image_size
    with torch.device("meta"), contextlib.suppress(NotImplementedError, RuntimeError):
        model = build_model(config, len(config.classes)).train()
        apply_freezing(model, config)
        keep_frozen_in_eval(model, config.freeze_batchnorm)
        try:
            model(torch.zeros(smallest, config.n_frames, modality.channels, size, size))
        except ValueError:  # of torch.nn.functional.batch_norm, and of it alone
            raise UserError(
                f"batch_size = {config.batch_size}: the smallest batch of an epoch has {smallest} "
                f"of {num_clips} clips, too few for BatchNorm with {config.n_frames} frames of "
                f"{size} px: give another --batch-size, a larger --image-size or --n-frames, or "
                "--freeze-batchnorm"
            ) from None


def require_frozen(model: nn.Module) -> None:
    """Check that a model's frame features do not change in training.

    Raises:
        UserError: they do, or there are several processes.
    """
    if not isinstance(model, CNNLSTM):
        raise UserError("feature_cache: only cnnlstm has features of single frames to keep")
    stages = model.frame_stages()
    if any(p.requires_grad for modules in stages.values() for m in modules for p in m.parameters()):
        raise UserError(
            "feature_cache: the features change in training unless you give --head linear or "
            f"--freeze-until {list(stages)[-1]}"
        )
    if distributed.world_size() > 1:
        raise UserError("feature_cache: for one process only; an epoch on features takes a second")
