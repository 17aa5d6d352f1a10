"""Lightning's Trainer for a run: devices, precision, progress, loggers, and states that are saved completely or not at all."""

import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ..config import WATCHED, TrainingOptions
from ..files import atomic
from ..progress import bar, on_screen
from ..run_folder import STATE, read_state, seal_state


def make_trainer(
    o: TrainingOptions,
    folder: Path,
    validates: bool = True,
    callbacks: Sequence[L.Callback] = (),
    logger: Logger | None = None,
) -> L.Trainer:
    """A Trainer for a run. validates: whether there are validation targets. callbacks: further ones. logger: instead of the named
    one."""
    loggers = {"csv": CSVLogger, "tensorboard": TensorBoardLogger}
    return L.Trainer(
        accelerator=o.accelerator,
        devices=o.devices,
        num_nodes=o.nodes,
        strategy="ddp" if o.devices * o.nodes > 1 else "auto",
        precision=o.precision,  # type: ignore[arg-type]
        gradient_clip_val=o.clip or None,
        max_epochs=o.epochs,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if validates else 0,
        log_every_n_steps=1,  # epochs are logged, steps have nothing to log; a larger number than an epoch's steps is warned of
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SaveState(folder / STATE), *([progress()] if o.progress else []), *callbacks],
        logger=logger or (loggers[o.logger](folder, "logs") if o.logger in loggers else False),
        plugins=[AtomicCheckpoints()],
        default_root_dir=folder,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Hide Lightning's messages of level INFO (devices, processes, states), which no option of the Trainer turns off."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric"))}
    for logger in levels:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Lightning 2.6 flattens its loaders with a class that torch 2.13 deprecates
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


class SaveState(Checkpoint):
    """Saves the state after every epoch. As a `Checkpoint` it runs after other callbacks, and Lightning adds none of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: L.Trainer, training: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)


class Bar(L.Callback):
    """One bar over all epochs, with loss, NDCG@10 and the best so far."""

    def on_train_start(self, trainer: L.Trainer, training: L.LightningModule) -> None:
        steps = int(trainer.num_training_batches)
        total, done = steps * (trainer.max_epochs or 1), steps * trainer.current_epoch
        self.bar = bar(total=total, initial=done, unit="step", shown=trainer.is_global_zero)

    def on_train_batch_end(self, trainer: L.Trainer, training: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.bar.update()
        if not self.bar.disable and batch_idx % 10 == 0:
            self.describe(trainer, training)

    def describe(self, trainer: L.Trainer, training: Any) -> None:
        self.bar.set_description(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", refresh=False)
        last, best = training.curve[-1] if training.curve else {}, training.record["best"]
        reached = {WATCHED: f"{last[WATCHED]:.4f}", "best": f"{best:.4f}"} if WATCHED in last else {}
        self.bar.set_postfix({"loss": f"{training.losses[-1].item():.3f}"} | reached, refresh=False)

    def on_train_epoch_end(self, trainer: L.Trainer, training: Any) -> None:  # after validation, if there is any
        if not self.bar.disable:
            self.describe(trainer, training)

    def on_train_end(self, trainer: L.Trainer, training: L.LightningModule) -> None:
        self.bar.close()

    def on_exception(self, trainer: L.Trainer, training: L.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.close()  # or it is drawn again below the message


class EpochLines(L.Callback):
    """A line per epoch, for what is no screen."""

    def on_train_epoch_end(self, trainer: L.Trainer, training: Any) -> None:
        if trainer.is_global_zero:
            last, best = training.curve[-1], f"best {training.record['best']:.4f} in epoch {training.record['best_epoch']}"
            reached = f"  {WATCHED} {last[WATCHED]:.4f}  {best}" if WATCHED in last else ""
            print(f"epoch {last['epoch']}/{trainer.max_epochs}  loss {last['loss']:.4f}{reached}", flush=True)


def progress() -> L.Callback:
    """What shows how far training is: a bar on a screen, lines elsewhere."""
    return Bar() if on_screen() else EpochLines()


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that are complete or absent, and loaded without unpickling code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic(path) as temporary:
            try:
                torch.save(checkpoint, temporary)
                seal_state(temporary)
            except RuntimeError as error:  # torch's own words do not name what the system said
                free = shutil.disk_usage(Path(path).parent).free >> 20
                what = f"{path} could not be written ({error}), {free} MiB are free there"
                raise OSError(f"{what}; rerun the same command to resume from the last completed epoch") from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_state(path)
