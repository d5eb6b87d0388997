"""What is looked at before the first epoch, so that hours of training do not rest on bad clips."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence

from torch.utils.data import DataLoader
from tqdm import tqdm

import distributed
from checkpoint import build_model_from_config
from config import TrainConfig
from dataset import ClipsDataset, require_readable
from errors import UserError
from frozen_features import require_frozen
from models import freeze
from weights import load_weights

log = logging.getLogger(__name__)


def check_cache(splits: Sequence[ClipsDataset]) -> None:
    """Look whether a cache, if one is named, has all the clips as they are now.

    Raises:
        UserError: saying how many it has not, and why.
    """
    problems = [
        (row.path, problem)
        for clips in splits
        if clips.cache
        for row in tqdm(clips.rows, "looking into the cache", leave=False, delay=1)
        if (problem := clips.cache.problem(row.path))
    ]
    if problems:
        kinds = Counter(problem for _, problem in problems)
        said = "; ".join(f"{count:,} {problem}" for problem, count in kinds.items())
        raise UserError(
            f"{splits[0].cache.folder}: {said} (e.g. {problems[0][0]}): "
            "run python prepare_data.py cache again"
        )


def check_clips(loaders: dict[str, DataLoader], skip_unreadable: bool) -> None:
    """Read every clip of these loaders once, before hours of training rest on them.

    Raises:
        UserError: listing all that cannot be read, unless they are to be skipped.
    """
    unreadable = []
    for name, loader in loaders.items():
        bar = tqdm(
            loader, f"reading {name} clips", leave=False, disable=distributed.rank() != 0, delay=1
        )
        for lines in distributed.gather([line for batch in bar for line in batch.unreadable]):
            unreadable += lines
    if not skip_unreadable:
        require_readable(unreadable, "validation and test")
    elif unreadable:
        listing = "\n  ".join(unreadable)
        log.warning(f"{len(unreadable)} validation and test clips are left out:\n  {listing}")


def check_model(config: TrainConfig) -> None:
    """Build the model of a resolved config, with its weights and what is frozen, as training will.

    Raises:
        UserError: something about them would stop it.
    """
    model = build_model_from_config(dataclasses.asdict(config), len(config.classes))
    load_weights(model, config.weights)
    if config.freeze_to:
        freeze(model, config.freeze_to)
    if config.features:
        require_frozen(model)
