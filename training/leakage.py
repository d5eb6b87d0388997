"""Clips and patients of validation and test that a model was pretrained on."""

from collections.abc import Mapping, Sequence
from typing import Any

from clips.fingerprints import find_seen
from clips.manifest import ClipRow
from config import TrainConfig, fitted_splits
from utils import distributed
from utils.errors import ResultWarning, UserError
from utils.text_table import list_some


def pretraining_leaks(
    pretraining: Mapping[str, Any],
    splits: Mapping[str, Sequence[ClipRow]],
    config: TrainConfig,
) -> list[ResultWarning]:
    """Warnings of what pretrain.py has seen of the clips that a model is judged by.

    A model that was pretrained on a patient knows how this patient looks, although it has seen no
    label. All clips are read once, to find those whose file or patient has another name now.

    Args:
        pretraining: the entry of encoder.pt and of checkpoints (empty: not pretrained).
        splits: the clips of each split; those that the model is fitted to may be pretrained on.
        config: with allow_pretraining_leak what was seen is a warning.

    Raises:
        UserError: something was seen, and this is not allowed.
    """
    if not pretraining or distributed.rank():  # process 0 checks, as for the run folder
        return []
    warnings: list[ResultWarning] = []
    names: list[str] = []
    for split, rows in splits.items():
        if split in fitted_splits(config):
            continue
        seen = find_seen(rows, pretraining, config.num_workers)
        found = {"patients": seen.patients, "clips": [str(path) for path in seen.clips]}
        found = {what: items for what, items in found.items() if items}
        if found:
            counts = " and ".join(f"{len(items):,} {what}" for what, items in found.items())
            # Results may be passed on: they hold no names.
            text = f"{counts} of {split} were pretrained on: {split} numbers partly measure memory"
            warnings.append({"kind": "leakage", "text": text})
            for what, items in found.items():
                names.append(f"{len(items):,} {what} of {split}: {list_some(items, 3)}")
        if seen.unreadable:
            text = (
                f"{len(seen.unreadable):,} clips of {split} cannot be read and were not compared "
                "with those of the pretraining"
            )
            warnings.append({"kind": "other", "text": text})
    if names and not config.allow_pretraining_leak:
        raise UserError(
            f"the weights were pretrained on {'; '.join(names)}: pretrain without them (python "
            "pretrain.py ... --exclude MANIFEST), leave them out of these splits, or give "
            "--allow-pretraining-leak, and the results hold a warning"
        )
    return warnings
