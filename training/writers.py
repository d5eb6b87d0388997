"""The scores of a training run for other programs: TensorBoard, Weights & Biases.

A writer gets the row of each epoch and the results of the final test. Scores leave this machine
with Weights & Biases alone, and with them only what `public_settings` and `numbers` let through:
no paths, no names of patients or clips, no frames, no output of the program.
"""

import contextlib
import dataclasses
import importlib
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_origin, get_type_hints

from config import TrainConfig
from utils.errors import UserError, first_line, require_package
from utils.files import write_text

log = logging.getLogger(__name__)


class Writer(Protocol):
    """What a program for scores must be able to do."""

    def write_epoch(self, row: Mapping[str, float]) -> None:
        """Write a row of metrics.csv."""

    def write_results(self, results: Mapping[str, float], epoch: int) -> None:
        """Write the numbers of test_metrics.json, for the epoch that was tested."""

    def close(self, failed: bool) -> None:
        """End, after an error or an interruption as well (`failed`)."""


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder)

    def write_epoch(self, row: Mapping[str, float]) -> None:
        self._write(row, row["epoch"])

    def write_results(self, results: Mapping[str, float], epoch: int) -> None:
        self._write({f"test/{name}": value for name, value in results.items()}, epoch)

    def close(self, failed: bool) -> None:
        self.writer.close()

    def _write(self, scores: Mapping[str, float], epoch: int) -> None:
        for name, value in scores.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()


class WeightsAndBiases:
    """A run of Weights & Biases, whose id is kept in the run folder: a resumed training goes on.

    Raises:
        UserError: the run cannot be started, for example without an account.
    """

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # tracebacks hold paths
        wandb = importlib.import_module("wandb")
        id_file = folder / "wandb_id.txt"
        known = id_file.read_text("utf-8").strip() if id_file.exists() else ""
        if known and not re.fullmatch(r"[\w-]{1,64}", known, re.ASCII):
            raise UserError(f"{id_file}: holds no id of a run: delete it to start a new one")
        run_id = known or secrets.token_hex(4)
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "surgical-clips"),
                id=run_id,
                name=None if known else folder.name,
                resume="allow",
                dir=folder,
                config=public_settings(config),
                settings=wandb.Settings(
                    console="off",  # the output names clips that cannot be read
                    disable_code=True,
                    disable_git=True,
                    disable_job_creation=True,
                    x_disable_meta=True,  # command line, user and host
                    x_disable_machine_info=True,
                    x_disable_stats=True,
                    x_save_requirements=False,
                ),
            )
        except Exception as error:  # of many kinds: no account, no network, an earlier version
            raise UserError(
                f"--wandb: {first_line(error)}: run `wandb login` first, or set WANDB_MODE=offline "
                "to send nothing"
            ) from None
        write_text(id_file, run_id + "\n")

    def write_epoch(self, row: Mapping[str, float]) -> None:
        self.run.log(dict(row), step=row["epoch"])

    def write_results(self, results: Mapping[str, float], epoch: int) -> None:
        # In the summary: a row of an epoch before the last one would be refused.
        self.run.summary.update({f"test/{name}": value for name, value in results.items()})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def require_packages(config: TrainConfig) -> None:
    """Check that the packages of the writers that a config asks for are there.

    Raises:
        UserError: one is missing.
    """
    if config.tensorboard:
        require_package("torch.utils.tensorboard", "--tensorboard")
    if config.wandb:
        require_package("wandb", "--wandb", "pip install 'wandb>=0.19'")


class Writers:
    """All writers of a run, possibly none. A failure of one is told and stops no training."""

    def __init__(self, writers: Sequence[Writer] = ()) -> None:
        self.writers = writers

    def write_epoch(self, row: Mapping[str, float]) -> None:
        """Write a row of metrics.csv."""
        self._each("write_epoch", row)

    def write_results(self, results: Mapping[str, Any], epoch: int) -> None:
        """Write the numbers of test_metrics.json."""
        self._each("write_results", numbers(results), epoch)

    def close(self, failed: bool) -> None:
        """End all of them."""
        self._each("close", failed)

    def _each(self, method: str, *arguments: Any) -> None:
        for writer in self.writers:
            try:
                getattr(writer, method)(*arguments)
            except Exception as error:
                log.warning(f"{type(writer).__name__} got no scores: {first_line(error)}")


@contextlib.contextmanager
def open_writers(config: TrainConfig, folder: Path | None) -> Iterator[Writers]:
    """The writers that a config asks for, until the block ends; none without a folder.

    Raises:
        UserError: a package is missing, or Weights & Biases cannot be reached.
    """
    writers = Writers([])
    if folder:
        require_packages(config)
        kinds = {TensorBoard: config.tensorboard, WeightsAndBiases: config.wandb}
        writers = Writers([kind(config, folder) for kind, wanted in kinds.items() if wanted])
    try:
        yield writers
    except BaseException:
        writers.close(failed=True)
        raise
    writers.close(failed=False)


_NAMES = ("model_name", "loss", "freeze_until", "classes")


def public_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that name no patient: numbers, choices, and names of models and classes.

    Other texts may be paths, which often hold the names of patients.
    """
    hints, values = get_type_hints(type(config)), dataclasses.asdict(config)
    return {
        name: value
        for name, value in values.items()
        if name in _NAMES
        or get_origin(hints[name]) is Literal
        or isinstance(value, int | float | None)
        or (name == "weights" and value in ("none", "default"))
    }


def numbers(results: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of nested results by their path, such as `per_class/cut/f1`; nothing else."""
    found: dict[str, float] = {}
    for name, value in results.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = value
    return found
