"""Show why a model answered as it did: which frames, and which parts of them.

    python explain.py runs/20260101-120000_tsm_resnet              10 mistakes and 10 right answers
    python explain.py RUN --split test --mistakes 20               the most confident mistakes
    python explain.py RUN clip.mp4 /data/more_clips --html         these clips, and a page to sort
    python explain.py RUN --csv other_hospital.csv --method integrated-gradients
    python explain.py RUN clip.mp4 --target Suction --against HookCut
    python explain.py RUN --shortcut                               does it look at borders or logos?

For each clip you get a filmstrip (.png) and a video (.mp4) with the map over the frames, and for
all of them relevance.csv. The pictures are images of patients. What the methods are worth for each
model was measured: docs/explanations.md.
"""

# What imports torch is imported where it is used: --help does without.
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro

from clips.manifest_formats import ManifestOptions
from utils.cli import cli_main, parse
from utils.errors import UserError
from utils.tables import require_own_table
from utils.text_table import list_some

if TYPE_CHECKING:
    import torch
    from torch.utils.data import DataLoader

    from clips.manifest import ClipRow
    from config import TrainConfig
    from evaluation.predictions import Predictions
    from explanation.relevance import ExplainedClip, Method

SELECTED = 10
"""mistakes, and right answers, that are explained where no number is given"""

SHORTCUT_CLIPS = 10
"""clips of each class that --shortcut looks at, spread evenly over the split"""

SLOW = 8.0
"""frames per second that can be looked at one by one"""


@dataclass(frozen=True)
class ExplainConfig(ManifestOptions):
    """The checkpoint, the clips to explain, and how."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """a run folder (its best.pt is used) or a checkpoint file"""
    clips: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """video files, folders and manifests, all of which are explained, without looking at labels"""
    split: Literal["train", "val", "test"] = "test"
    """split of the run that clips are chosen from, where no clips are named"""
    csv: str = ""
    """a manifest, or a folder of clips per class, instead of a split of the run"""
    data_root: str = ""
    """folder of the clips (empty: the one of the training; for manifests, their own)"""
    mistakes: int | None = None
    """explain as many of the most confident mistakes (None: 10; with --right alone 0)"""
    right: int | None = None
    """explain as many of the most confident right answers (None: 10; with --mistakes alone 0)"""
    method: Literal["auto", "gradcam++", "rollout", "occlusion", "integrated-gradients"] = "auto"
    """auto: the one that did best for this kind of model"""
    target: str = ""
    """explain this class (empty: the predicted one)"""
    against: str = ""
    """why the class, and not this one"""
    html: bool = False
    """also write explanations.html, one page of all clips, sortable"""
    with_names: bool = False
    """show the names of the clips on the page; they may name patients"""
    shortcut: bool = False
    """instead of pictures: how much relevance lies on borders, texts and logos, per class"""
    num_workers: int = 2
    """processes that read clips"""
    batch_size: int = 4
    """clips that are explained at once"""
    device: str = "auto"
    """device: auto, cpu, cuda, cuda:1, mps"""
    output: str = ""
    """folder for the results (empty: a folder inside the run, named after what was explained)"""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_workers < 0:
            raise UserError("batch_size must be at least 1, num_workers at least 0")
        if min(self.mistakes or 0, self.right or 0) < 0:
            raise UserError("mistakes and right must be at least 0")
        if self.clips and self.csv:
            raise UserError("give clips or --csv, not both")
        if self.clips and not (self.mistakes is self.right is None):
            raise UserError(
                "--mistakes and --right choose among labelled clips: give --csv, or leave them out"
            )
        if self.with_names and not self.html:
            raise UserError("--with-names is for the page: give --html too, or leave it out")
        if self.against and self.against == self.target:
            raise UserError(f"--against {self.against}: is the target itself")
        if self.shortcut and (self.target or self.against or self.html):
            raise UserError("--shortcut explains predicted classes in a table: leave out --target, "
                            "--against and --html")  # fmt: skip
        if self.shortcut and not (self.mistakes is self.right is None):
            raise UserError(f"--shortcut looks at {SHORTCUT_CLIPS} clips of each class, whatever "
                            "their answers: leave out --mistakes and --right")  # fmt: skip

    @property
    def counts(self) -> tuple[int, int]:
        """How many mistakes and how many right answers."""
        if self.mistakes is None and self.right is None:
            return SELECTED, SELECTED
        return self.mistakes or 0, self.right or 0


def output_folder(config: ExplainConfig, method: "Method") -> Path:
    """A folder whose name says what was explained."""
    if config.output:
        return Path(config.output)
    checkpoint = Path(config.checkpoint)
    source = "clips" if config.clips else Path(config.csv).stem if config.csv else config.split
    parts = ["shortcut" if config.shortcut else "explain", source, method.replace("+", "p")]
    return (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "_".join(parts)


def class_number(name: str, classes: Sequence[str], flag: str) -> int | None:
    """The number of a class; None: no class is named.

    Raises:
        UserError: there is no such class.
    """
    if name and name not in classes:
        raise UserError(f"{flag} {name}: no class of this model: choose from {', '.join(classes)}")
    return classes.index(name) if name else None


def load_rows(config: ExplainConfig, training: "TrainConfig") -> "list[ClipRow]":
    """The clips to choose from; those that are named have no label.

    Raises:
        UserError: a source or a manifest is wrong.
    """
    from clips.manifest import ClipRow, read_manifest
    from training.loaders import load_splits
    from training.predict_clips import find_clips

    if config.clips:
        clips = find_clips(config.clips, config.data_root, config.path_column)
        return [ClipRow(path, 0) for path in clips]
    if config.csv:
        options, root = ManifestOptions.of(config), config.data_root or None
        return read_manifest(config.csv, root, training.classes, options, config.split)
    return load_splits(training)[config.split]


def choose(predictions: "Predictions", mistakes: int, right: int) -> list[int]:
    """The numbers of the most confident mistakes, and then of the most confident right answers."""
    order = np.argsort(-predictions.confidence, kind="stable")
    wrong = order[~predictions.correct[order]][:mistakes]
    return [*wrong.tolist(), *order[predictions.correct[order]][:right].tolist()]


def explain_clips(config: ExplainConfig) -> None:
    """Explain the clips, and write and print the results.

    Raises:
        UserError: something is wrong with the checkpoint, the clips or the settings.
    """
    from checkpoint import load_checkpoint, rebuild_model
    from config import from_dict
    from evaluation.calibration import load_calibration
    from explanation.clips import explain_batch
    from explanation.methods import advice, default_method, require_method
    from modeling.inference import prepare_for_inference
    from training.engine import evaluate
    from training.loaders import eval_loader, open_cache
    from utils.device import describe_device, get_device
    from utils.files import make_folder, require_writable

    # checkpoint
    state = load_checkpoint(config.checkpoint)
    training = from_dict(state["config"])
    classes = tuple(state["classes"])
    target = class_number(config.target, classes, "--target")
    against = class_number(config.against, classes, "--against")
    method = config.method
    if method == "auto":
        method = default_method(training.model_name, bool(config.target or config.against))
        if config.shortcut:  # only these maps have cells that are smaller than a border
            method = "integrated-gradients"
    model = rebuild_model(state)
    require_method(model, method)
    if method == "rollout" and (config.target or config.against):
        raise UserError("rollout is the same for all classes: leave --target and --against out")
    temperature = load_calibration(state, None, config.checkpoint).temperature
    device = get_device(config.device)
    folder = output_folder(config, method)
    require_writable(folder)

    # data
    settings = dataclasses.replace(
        training,
        data_root=config.data_root or training.data_root,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        cache="" if config.clips or config.csv else training.cache,
    )
    rows = load_rows(config, settings)
    cache = open_cache(settings)
    unreadable: list[str] = []
    print(f"{training.model_name} by {method}, {describe_device(device)}")
    for line in advice(training.model_name, method) if not config.shortcut else []:
        print(line)
    if not config.clips and not config.shortcut:
        loader = eval_loader(rows, settings, cache)
        split = Path(config.csv).stem if config.csv else config.split
        predictions = evaluate(model, loader, device, description=split, skip_unreadable=True,
                               temperature=temperature)  # fmt: skip
        unreadable += [f"error: {line}" for line in predictions.unreadable]
        chosen = choose(predictions, *config.counts)
        if settings.test_views * settings.test_crops > 1:
            print("one view of each clip is looked at; evaluate.py averages several")
        print(
            f"{sum(~predictions.correct)} of {len(predictions)} {split} clips are classified "
            f"wrongly; explained: {len(chosen)}"
        )
        rows = [predictions.rows[i] for i in chosen]
        if not rows:
            raise UserError("there is no such clip: choose other numbers of --mistakes and --right")
    elif config.shortcut:
        count = len(rows)
        rows = spread(rows, SHORTCUT_CLIPS)
        print(f"{len(rows)} of {count} clips are looked at, spread evenly")

    if folder.resolve() in {Path(row.path).resolve().parent for row in rows}:
        raise UserError(f"--output {folder}: holds clips that are explained: give another folder")
    if not config.shortcut:
        earlier_results(folder)

    # explanation
    model = prepare_for_inference(model, device)
    loader = eval_loader(rows, settings, cache)
    explain = functools.partial(
        explain_batch,
        model,
        classes=classes,
        method=method,
        sampler=loader.dataset.sampler,
        temperature=temperature,
        target=target,
        against=against,
        labelled=not config.clips,
        # A logo stands still: compared with a still picture it would have no relevance.
        reference="blurred" if config.shortcut else "still",
    )
    explained = explain_loader(loader, device, explain, unreadable)
    make_folder(folder)
    if config.shortcut:
        write_shortcuts(folder, explained, classes, rows)
    else:
        write_explanations(folder, explained, config, training.model_name, rows)
    print(f"results: {folder}")
    if unreadable:
        print(list_some(unreadable, 20, "\n"), file=sys.stderr)
        raise UserError(
            f"{len(unreadable)} clips could not be read (see above); the others are done"
        )


def explain_loader(
    loader: "DataLoader",
    device: "torch.device",
    explain: "Callable[[torch.Tensor, Sequence[ClipRow]], list[ExplainedClip]]",
    unreadable: list[str],
) -> "Iterator[ExplainedClip]":
    """The explained clips, one after another.

    Args:
        unreadable: gets an error message for each clip that cannot be read.

    Raises:
        UserError: none of the clips can be read.
    """
    from utils.workers import show_batches

    count = 0
    for batch in show_batches(loader, "explaining"):
        unreadable += [f"error: {line}" for line in batch.unreadable]
        if batch.indices:
            rows = [loader.dataset.rows[index] for index in batch.indices]
            yield from explain(batch.clips.to(device), rows)
            count += len(rows)
    if not count:
        raise UserError("\n  ".join(["none of the clips can be read:", *unreadable]))


def write_explanations(
    folder: Path,
    explained: "Iterator[ExplainedClip]",
    config: ExplainConfig,
    model_name: str,
    rows: "Sequence[ClipRow]",
) -> None:
    """Write the filmstrip and the video of each clip, relevance.csv, and the page if wanted.

    Args:
        rows: the clips; the page names neither them nor their patients, unless it is to.
    """
    from explanation.overlay import write_overlay
    from explanation.pictures import write_filmstrip, write_relevance

    kept = []
    for number, clip in enumerate(explained, 1):
        if number == 1:
            for path in earlier_results(folder):
                path.unlink()
            write_relevance(folder / "relevance.csv", [])  # this folder is ours from here on
        # Numbers, because the names of clips may name patients.
        write_filmstrip(folder / f"clip{number:03d}.png", clip)
        write_overlay(folder / f"clip{number:03d}.mp4", clip, playback_rate(clip.times))
        # Only the page needs the pictures again. A view of them would keep the whole batch.
        empty = {"frames": clip.frames[:0].copy(), "maps": clip.maps[:0].copy()}
        kept.append(clip if config.html else dataclasses.replace(clip, **empty))
    write_relevance(folder / "relevance.csv", kept)
    if config.html:
        from utils.run_dir import command
        from web.anonymize import identifiers
        from web.explanation_page import write_explanation_page

        page, metadata = folder / "explanations.html", {"command": command(), "model": model_name}
        write_explanation_page(page, kept, config.with_names, metadata, identifiers(rows))
        print(f"page: {page} (contains images of patients)")


def earlier_results(folder: Path) -> list[Path]:
    """The results of an earlier call in its folder, which go: pictures of other clips, beside those
    of this one, would be taken for its own.

    Raises:
        UserError: they are not of an earlier call; nobody's clip001.mp4 is to be lost.
    """
    from explanation.pictures import HEADER

    pattern = r"clip[0-9]{3,}\.(png|mp4)|relevance\.csv|explanations\.html"
    paths = folder.iterdir() if folder.is_dir() else []
    earlier = [path for path in paths if re.fullmatch(pattern, path.name)]
    table = folder / "relevance.csv"
    require_own_table(table, HEADER)
    if earlier and table not in earlier:
        raise UserError(
            f"--output {folder}: holds {earlier[0].name}, and no relevance.csv of an earlier call: "
            "give another folder"
        )
    return earlier


def spread(rows: "Sequence[ClipRow]", most: int) -> "list[ClipRow]":
    """At most so many clips of each class, spread evenly over the rows."""
    chosen: set[int] = set()
    for label in {row.label for row in rows}:
        mine = [i for i, row in enumerate(rows) if row.label == label]
        chosen |= (
            {mine[i * len(mine) // most] for i in range(most)} if len(mine) > most else {*mine}
        )
    return [rows[i] for i in sorted(chosen)]


def write_shortcuts(
    folder: Path,
    explained: "Iterator[ExplainedClip]",
    classes: Sequence[str],
    rows: "Sequence[ClipRow]",
) -> None:
    """Print and write how much relevance lies on borders and static pixels, for each predicted
    class."""
    import torch

    from explanation.shortcut import find_shortcuts, shortcut_shares, shortcut_table, write_shares

    patients = {str(row.path): row.patient for row in rows}
    clips = list(explained)
    shares = shortcut_shares(
        torch.from_numpy(np.stack([clip.maps for clip in clips])),
        [torch.from_numpy(clip.frames).permute(0, 3, 1, 2) for clip in clips],
        np.array([classes.index(clip.predicted) for clip in clips]),
        classes,
        np.array([patients[clip.name] for clip in clips], object),
    )
    write_shares(folder / "shortcut.csv", shares)
    print(shortcut_table(shares))
    if not any(share.verdict in ("look", "no sign") for share in shares):
        print("warning: neither borders nor static pixels could be measured: see the last column")
        return
    if not (found := find_shortcuts(shares)):
        print("no sign of a shortcut on borders or static pixels, where they could be measured")
        return
    for share in found:
        where = "the border" if share.region == "border" else "pixels that stand still"
        print(
            f"warning: {share.label}: {share.share:.0%} of the relevance lies on {where}, "
            f"{share.ratio:.1f} times as much as an even map has there: look at such clips "
            f"(logos, time stamps, the edge of the endoscope) before you trust this class"
        )


def playback_rate(times: "np.ndarray") -> float:
    """Frames per second of a video of the explained frames: those of the clip, where it is not too
    fast to be looked at."""
    steps = np.diff(times)
    rate = 1 / steps.mean() if len(steps) and steps.mean() > 0 else SLOW
    return min(rate, SLOW)


@cli_main
def main() -> None:
    explain_clips(parse(ExplainConfig, __doc__))


if __name__ == "__main__":
    main()
