"""Pretrain a model on clips without labels, for train.py to start from.

    python pretrain.py                                               the demo's training clips
    python pretrain.py /data/operations --model-name timesformer     videos of any length
    python pretrain.py /data/SLAM --method distil --model-name tsm_resnet --output encoder.pt
    python pretrain.py --resume runs/20260101-120000_mae_vivit       continue a stopped run
    python train.py --data-root /data/SLAM --model-name tsm_resnet --weights encoder.pt

mae hides most patches of a clip and predicts their pixels (vivit, timesformer); distil predicts
the features of a frozen image network (any model); order tells in which order three parts of a clip
are shown (tsm_resnet, cnnlstm, r2plus1d). encoder.pt knows which patients and videos were seen:
train.py refuses to validate or test on them. See docs/pretraining.md.
"""

import dataclasses
import hashlib
import logging
import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpoint import check_resume, find_wrong_weight
from clips.fingerprints import merge, pack
from clips.manifest import ClipRow
from clips.manifest_formats import ManifestOptions
from clips.splits import SPLITS
from config import (
    OLD_NAMES,
    OLD_VALUES,
    from_dict,
    manifest_paths,
)
from demo.data import render_demo
from modeling.encoders import licence_warning
from modeling.layers import enable_gradient_checkpointing
from modeling.weights import LoadedWeights, load_weights
from models import build_model, model_options, summary, use_normalization
from pretraining.clips import (
    CropFlip,
    PretrainingClips,
    Usable,
    cut_windows,
    exclude,
    exclude_copies,
    find_clips,
    keep_usable,
)
from pretraining.distil import (
    RANDOM_FEATURES,
    Distillation,
    DistillationLoss,
    feature_width,
    is_per_frame,
    load_teacher,
    make_targets,
    random_features,
    target_width,
    teacher_features,
    teacher_provenance,
)
from pretraining.mae import (
    MaskedAutoencoder,
    count_visible,
    encoder_gflops,
)
from pretraining.order import CLASSES, SegmentOrder, order_loss
from pretraining.results import (
    draw_loss,
    draw_reconstruction,
    load_last,
    save_encoder,
    write_clips,
)
from pretraining.settings import UNUSED, PretrainConfig, is_demo, resolve
from training import checks
from training.engine import train_one_epoch
from training.loaders import DEMO_ROOT, TrainSampler, batches_per_epoch, make_loader
from training.log import record_settings, resume_line, start_log, write_history
from training.optim import cosine_with_warmup, param_groups
from training.state import Progress, TrainState
from training.writers import open_writers, public_settings
from utils import distributed
from utils.cli import cli_main, parse
from utils.device import autocast_dtype, describe_device, get_device, prepare_model
from utils.errors import UserError, format_warning
from utils.files import require_writable
from utils.interrupt import Interrupt, Interrupted
from utils.run_dir import new_run_dir

log = logging.getLogger(__name__)


def pretrain(
    config: PretrainConfig,
    resume_from: dict[str, Any] | None = None,
    folder: Path | None = None,
    resume_command: str = "",
) -> Path:
    """Pretrain a model and write its encoder. Returns the encoder's file.

    Args:
        resume_from: the content of last.pt, to continue from it; see `load_last`.
        folder: the run folder (None: a new one below config.run_dir).
        resume_command: what to run after an interruption, for the log (empty: this script).

    Raises:
        UserError: the settings cannot work, or no clip can be used.
        SystemExit: interrupted; the run is saved.
    """
    with ExitStack() as stack:  # however it ends, the run folder is released
        return _pretrain(stack, config, resume_from, folder, resume_command)


def _pretrain(
    stack: ExitStack,
    config: PretrainConfig,
    resume_from: dict | None,
    folder: Path | None,
    again: str,
) -> Path:
    """The same; the stack ends what begins here, and `again` is the `resume_command`."""
    config = resolve(config)
    stack.callback(distributed.cleanup)
    device = distributed.init(get_device(config.device))
    config = checks.keep_clips_per_step(config, resume_from) if resume_from else config
    dtype = autocast_dtype(config.precision, device)
    is_main = distributed.rank() == 0
    start_log(None)
    if not is_main:
        logging.disable()
    folder = Path(config.resume) if config.resume else folder
    stack.enter_context(checks.hold_outputs(config, folder))
    if config.output and is_main:
        require_writable(Path(config.output).absolute().parent)

    # data
    usable, videos = distributed.broadcast_object(prepare_clips(config) if is_main else None)
    rows = usable.rows
    clips = build_clips(config, rows)
    sampler = TrainSampler(
        [0] * len(rows), 0.0, config.seed, distributed.rank(), distributed.world_size()
    )
    loader = make_loader(clips, sampler, config, config.batch_size, persistent=True)

    # model
    torch.manual_seed(config.seed)
    teacher, taught = None, LoadedWeights("")
    if config.method == "distil" and config.teacher != "random":
        teacher, taught = load_teacher(config.teacher, config.teacher_weights)
    encoder = build_model(config, num_outputs(config, teacher))
    loaded = load_weights(encoder, config.weights if is_main and not resume_from else "none")
    loaded = distributed.broadcast_object(loaded)
    config = use_normalization(encoder, loaded.mean_std, config)
    model = build_task(config, encoder)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    prepare_model(model, device, dtype)

    # optimizer
    progress = Progress(batches_per_epoch(loader))
    steps_per_epoch = progress.steps_per_epoch(config.gradient_accumulation_steps)
    optimizer = torch.optim.AdamW(
        param_groups(model, config.learning_rate, config.weight_decay, config.layer_decay),
        lr=config.learning_rate,
        betas=(0.9, 0.95),  # of MAE: a shorter memory for the squares of noisy gradients
        fused=device.type in ("cpu", "cuda"),
    )
    warmup_steps = int(config.warmup_epochs * steps_per_epoch)
    scheduler = cosine_with_warmup(optimizer, config.epochs * steps_per_epoch, warmup_steps)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    provenance = loaded.provenance
    if teacher:
        provenance = teacher_provenance(config.teacher, taught, provenance)
    licence = provenance.get("licence", "")
    seen = {}  # a resumed run knows it
    if not resume_from:
        cut = [row.path for row in videos]
        seen = (config.method, len(rows), licence, [*rows, *videos], usable.fingerprints, cut)
        seen = distributed.broadcast_object(pack(*seen) if is_main else None)
    # By their contents: windows may lie elsewhere when a run is resumed.
    contents = " ".join(one.sha256 for one in usable.fingerprints)
    digest = {"train": hashlib.sha256(contents.encode()).hexdigest()}
    parts = config, model, optimizer, scheduler, scaler, None, progress
    state = TrainState(*parts, (), digest, provenance, merge(loaded.pretraining, seen))
    if resume_from:
        source = config.resume or folder
        if problem := find_wrong_weight(resume_from["model"], model.state_dict()):
            raise UserError(f"{source}: last.pt is damaged: {problem}")
        check_resume(resume_from, state.state_dict(), optimizer, source)
        state.load_state_dict(resume_from)
    else:
        torch.manual_seed(config.seed + distributed.rank())
    checks.check_space(state, folder or config.run_dir)

    # run folder and log
    if is_main and not folder:
        run = new_run_dir(config.run_dir, f"{config.method}_{config.model_name}", "last.pt")
        folder = stack.enter_context(run).folder
    folder = distributed.broadcast_object(folder)
    if is_main:
        stack.callback(start_log, None)
        start_log(folder)
        record_settings(folder, config, device)
    writers = stack.enter_context(open_writers(config, folder if is_main else None))
    log.info(header(config, model, rows, device, dtype))
    for warning in licence_warning(state.pretrained):
        log.warning(format_warning(warning))
    log.info(resume_line(resume_from, config, progress) if resume_from else loaded.line)

    # loop
    interrupt = stack.enter_context(Interrupt())
    state.save(folder)
    try:
        criterion = build_criterion(config, clips, teacher, folder, device, interrupt)
        ddp_model = distributed.wrap_ddp(model, device)
        while progress.epoch < config.epochs:
            start = time.perf_counter()
            loop = device, config, progress, None, ddp_model, interrupt
            train_one_epoch(model, criterion, optimizer, scheduler, scaler, loader, *loop)
            loss, correct, seen_clips = distributed.all_reduce_sum(progress.running_sums)
            progress.end_epoch()
            row = {"epoch": progress.epoch, "train_loss": loss / max(1, seen_clips)}
            if config.method == "order":
                row |= {"accuracy": correct / max(1, seen_clips), "chance": 1 / CLASSES}
            row["learning_rate"] = optimizer.param_groups[-1]["lr"]
            row["seconds"] = round(time.perf_counter() - start, 2)
            state.history.append(row)
            log.info(epoch_line(row, state.history, config))
            if is_main:
                write_history(folder / "metrics.csv", state.history)
            state.save(folder)
            writers.write_epoch(row)
    except Interrupted:
        command = again or shlex.join(["python", "pretrain.py", "--resume", str(folder)])
        raise state.save_interrupted(folder, interrupt, command) from None
    if left_out := set().union(*distributed.all_gather(progress.unreadable)):
        heading = f"{len(left_out):,} clips were left out of the loss:"
        log.warning("\n  ".join([heading, *sorted(left_out)]))

    # results
    output = Path(config.output) if config.output else folder / "encoder.pt"
    if is_main:
        settings = public_encoder_settings(config)
        save_encoder(output, encoder, settings, state.pretrained, state.pretraining)
        write_clips(folder / "clips.csv", usable, videos)
        draw_loss(folder / "curves.png", state.history)
        if config.method == "mae" and (config.with_frames or is_demo(config)):
            draw_reconstruction(folder / "reconstruction.png", model, clips, device)
        command = ["python", "train.py", "--model-name", config.model_name, "--weights", output]
        log.info(f"\nencoder: {output}\nto train from it: {shlex.join(map(str, command))} ...")
    distributed.broadcast_object()  # the other processes wait until it is written
    return output


def prepare_clips(config: PretrainConfig) -> tuple[Usable, list[ClipRow]]:
    """The clips that are pretrained on, and the long videos that windows were cut out of.

    Raises:
        UserError: the data is wrong, or no clip can be used.
    """
    options, root = ManifestOptions.of(config), config.data_root
    if config.data:
        rows = find_clips(config.data, root, options)
    elif is_demo(config):
        render_demo(DEMO_ROOT)
        rows = find_clips([str(DEMO_ROOT)])
    else:
        found = manifest_paths(config)
        source = found if isinstance(found, Path) else found[SPLITS[0]]
        rows = find_clips([str(source)], root, options)
    excluded = find_clips(config.exclude, root, options, whole=True) if config.exclude else []
    if excluded:
        rows = exclude(rows, excluded, log.info)
    cutting = config.seconds, config.stride, config.longest, config.num_workers, log.info
    clips, videos = cut_windows(rows, Path(config.windows), *cutting)
    usable = keep_usable(clips, config.num_workers, log.info)
    if excluded:
        usable = exclude_copies(usable, excluded, config.num_workers, log.info)
    return usable, videos


def build_clips(config: PretrainConfig, rows: Sequence[ClipRow]) -> PretrainingClips:
    """The data set of a method."""
    colours = config.brightness, config.contrast, config.saturation, config.hue
    transform = CropFlip(config.image_size, config.min_crop, config.hflip_prob, colours)
    shape = rows, config.n_frames, config.sampling, transform
    if config.method == "order":
        return SegmentOrder(*shape)
    views = config.views if config.method == "distil" else 0
    return PretrainingClips(*shape, config.shuffle_frames, views, config.seed)


def num_outputs(config: PretrainConfig, teacher: nn.Module | None) -> int:
    """The number of classes that the model is built for."""
    if config.method == "order":
        return CLASSES
    width = feature_width(teacher) if teacher else RANDOM_FEATURES
    return target_width(width, config.model_name) if config.method == "distil" else 2


def build_task(config: PretrainConfig, encoder: nn.Module) -> nn.Module:
    """The model as the method trains it; mae gives losses, the other methods outputs."""
    if config.method == "distil":
        return Distillation(encoder)
    if config.method == "order":
        return encoder
    size = config.n_frames, config.image_size, config.mask_ratio
    return MaskedAutoencoder(encoder, *size, config.decoder_width, config.decoder_depth)


def build_criterion(
    config: PretrainConfig,
    clips: PretrainingClips,
    teacher: Any,
    folder: Path,
    device: torch.device,
    interrupt: Interrupt,
) -> Any:
    """What gives the losses of a batch's clips, `(B,)`, from outputs, numbers and epoch."""
    if config.method == "mae":
        return lambda losses, *_: losses[:, 0]
    if config.method == "order":
        return order_loss
    if teacher is None:
        total = len(clips) * config.views
        features = random_features(total, config.n_frames, config.seed)
    else:
        cache = Path(config.teacher_cache or folder / "teacher")
        loading = config.batch_size, config.num_workers, interrupt
        arguments = teacher, clips, cache, device, *loading
        if distributed.rank() == 0:  # the other processes wait, and find the file
            teacher_features(*arguments)
        distributed.broadcast_object()
        features = teacher_features(*arguments)
    return DistillationLoss(make_targets(features, is_per_frame(config.model_name)))


def header(
    config: PretrainConfig,
    model: nn.Module,
    rows: Sequence[ClipRow],
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """What will be pretrained on how many clips, and where."""
    patients = {row.patient for row in rows if row.patient}
    lines = [
        f"{config.method}: {config.model_name}, {len(rows):,} clips of {len(patients):,} known "
        f"patients, {config.n_frames} frames of {config.image_size} px, on "
        f"{describe_device(device)}, {dtype}",
        summary(model),
    ]
    if config.method == "mae":
        with torch.device("meta"):
            encoder = build_model(config, 2)
        patches = (config.image_size // config.patch_size) ** 2
        visible = count_visible(patches, config.mask_ratio)
        few, all_patches = encoder_gflops(encoder, config.n_frames, config.image_size, visible)
        lines.append(
            f"encoder: {few:.3g} GFLOP per clip for {visible} visible of {patches} patches per "
            f"frame, {all_patches:.3g} for all"
        )
    if config.method == "order":
        lines.append(f"guessing is right in {1 / CLASSES:.1%} (6 orders, forward or backward)")
    return "\n".join(lines)


def epoch_line(
    row: dict[str, Any], history: Sequence[dict[str, Any]], config: PretrainConfig
) -> str:
    """A row of metrics.csv for people, and the time that is left, as the epochs so far took it."""
    line = f"epoch {row['epoch']:3d}/{config.epochs}  loss {row['train_loss']:.4f}"
    if "accuracy" in row:
        line += f"  accuracy {row['accuracy']:.3f} (chance {row['chance']:.3f})"
    mean = sum(earlier["seconds"] for earlier in history) / len(history)
    left = round(mean * (config.epochs - row["epoch"]))
    return f"{line}  {row['seconds']:.1f} s, {timedelta(seconds=left)} left"


def public_encoder_settings(config: PretrainConfig) -> dict[str, Any]:
    """The settings that an encoder is saved with: they name no patient, file or folder."""
    names = {*model_options(config.model_name), "pixel_mean", "pixel_std", "teacher"}
    return public_settings(config) | {n: getattr(config, n) for n in names if hasattr(config, n)}


def read_settings() -> tuple[PretrainConfig, dict[str, Any] | None]:
    """The settings of the command line, and with --resume the state to continue from."""

    def parse_with(default: PretrainConfig | None = None) -> PretrainConfig:
        aliases = ("model",)
        return parse(
            PretrainConfig, __doc__, default, OLD_NAMES, OLD_VALUES, aliases, hidden=UNUSED
        )

    config = parse_with()
    if not config.resume:
        return config, None
    run = Path(config.resume)
    run = run.parent if run.is_file() else run
    state = load_last(run)
    saved = from_dict(state["config"], PretrainConfig, str(run))
    saved = dataclasses.replace(saved, resume=str(run))
    config = dataclasses.replace(parse_with(saved), resume=str(run))
    checks.refuse_changes(saved, config)
    return config, state


@cli_main
def main() -> None:
    pretrain(*read_settings())


if __name__ == "__main__":
    main()
