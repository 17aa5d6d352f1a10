"""The steps of an epoch: batches, losses, the optimizer, validation by full ranking, and the choice of weights to keep."""

import math
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from ..config import WATCHED, TrainingOptions
from ..data.splits import Split
from ..evaluation.ranking import Targets, metrics, rank_batch
from ..model_file import write_model
from ..models.network import AWRSRNetwork
from ..run_folder import STATE
from .batches import Batch, Windows
from .losses import LOSSES, draw_negatives
from .nodes import let_sigterm_end_it

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

NEGATIVES_SEED = 1 << 48  # apart from the seeds of dropout on a GPU; a CPU's generator drops it, its draws differ in kind alone


class TrainingLoop(L.LightningModule):
    """The training of a network, called by Lightning. Methods are in the order in which an epoch calls them:

    1. `train_dataloader` orders the sequences by (seed, epoch), and `on_train_epoch_start` starts the clock.
    2. Each batch: `training_step` encodes the sequences, draws `negatives`, takes the item table (`table_of`) and returns the loss;
       Lightning computes gradients and steps the optimizer of `configure_optimizers`; `on_train_batch_end` averages weights.
    3. `val_dataloader`, `on_validation_start`, `validation_step` for each batch, `on_validation_epoch_end`: the rank of each
       validation target, by the averaged weights if there are any.
    4. `close_epoch` notes the results, saves the weights if they are the best so far, and decides whether training stops.
    5. Lightning saves the state to resume from, to which `on_save_checkpoint` adds the results; `on_load_checkpoint` reads them.
    """

    def __init__(
        self,
        network: AWRSRNetwork,
        split: Split,
        options: TrainingOptions,
        folder: Path,
        sections: dict[str, Any],
        trained: np.ndarray | None = None,
    ) -> None:
        """folder: folder for the best weights. sections, trained: what else goes into their file, as for `save_model`."""
        super().__init__()
        self.trained = trained
        self.model, self.split, self.options, self.folder, self.sections = network, split, options, folder, sections
        self.average = running_average(network, options.average) if options.average else None
        self.evaluated: AWRSRNetwork = self.average.module if self.average else network  # type: ignore[assignment]
        self.windows = Windows(split, network.config.max_len, options.windows)
        self.validation = Targets(split, "validation", network.config.max_len, options.filters_seen(split))
        self.check()
        self.ranks = torch.zeros(len(self.validation), dtype=torch.int64)  # of the validation targets
        self.record: dict[str, Any] = {"best": -1.0, "best_epoch": 0, "epochs": 0}
        self.record |= {"sequences": 0, "seconds": 0.0, "cpu_seconds": 0.0}  # trained on, and what that took
        self.curve: list[dict[str, float]] = []
        self.losses: list[Tensor] = []  # of this epoch's steps
        self.table: Tensor | None = None
        self.clock = (0.0, 0.0)

    def check(self) -> None:
        """Raise ValueError for options that do not suit the data or the network."""
        o, network, world = self.options, self.model, self.options.devices * self.options.nodes
        self.windows.batches(o.batch_size, o.seed, 0, 0, world)  # raises where there are too few sequences
        if 0 < len(self.validation) < world:
            raise ValueError(
                f"{len(self.validation)} validation targets are too few for {world} processes, must be one or more each"
            )
        if o.pvn_weight and not network.by_distance:
            backbone = f"backbone {network.config.backbone!r}, whose scores are not distances"
            raise ValueError(f"pvn_weight is {o.pvn_weight}, must be 0 with {backbone}")
        if o.loss in ("bce", "gbce") and network.by_distance:
            raise ValueError(f"loss is {o.loss!r}, which does not suit backbone {network.config.backbone!r}: no score is above 0")
        draw_negatives(o.loss, torch.empty(0, dtype=torch.int64), network.config.num_items, 1, torch.Generator())  # likewise

    # 1. Before the first batch

    def train_dataloader(self) -> Iterable[Batch]:
        o, t = self.options, self.trainer
        return self.windows.batches(o.batch_size, o.seed, t.current_epoch, t.global_rank, t.world_size)

    def on_train_start(self) -> None:
        if self.trainer.world_size > 1:
            let_sigterm_end_it()

    def on_train_epoch_start(self) -> None:
        self.losses, self.clock = [], (time.perf_counter(), time.process_time())

    # 2. A batch

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """The mean over all events of the step. A process's share is scaled so that the average over processes equals it."""
        o, world = self.options, self.trainer.world_size
        step = o.seed * 1_000_003 + self.trainer.global_step
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(step * world + self.trainer.global_rank)
            hidden = self.model(batch.items, batch.cu_seqlens, batch.max_seqlen)
        negatives = self.negatives(batch, torch.Generator(self.device).manual_seed(step + NEGATIVES_SEED))
        targets, table, negatives = self.table_of(batch.targets, negatives)
        more: dict[str, Any] = {"calibration": o.calibration, "pvn_weight": o.pvn_weight, "num_items": self.model.config.num_items}
        with torch.autocast(self.device.type, enabled=False) if self.model.by_distance else nullcontext():  # squares would round
            values = LOSSES[o.loss](hidden, targets, table, negatives, **more)
        loss: Tensor = values.sum() * (world / batch.events)
        self.losses.append(loss.detach())
        return loss

    def negatives(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """This process's share of the negatives that are drawn for the whole step."""
        k, count = self.options.num_negatives(), self.model.config.num_items
        if self.trainer.world_size == 1 or self.options.loss in ("sampled_softmax", "cross_entropy"):
            return draw_negatives(self.options.loss, batch.targets, count, k, generator)
        targets = batch.targets.new_full((batch.events,), count)
        share = slice(batch.first, batch.first + len(batch.targets))
        targets[share] = batch.targets
        return draw_negatives(self.options.loss, targets, count, k, generator)[share]

    def table_of(self, targets: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Targets, item table and negatives as arguments of a loss. If the loss needs no other items, only the rows of these items
        are computed, and targets and negatives are then positions among them."""
        if not self.model.computes_table or self.options.loss == "cross_entropy":
            return targets, self.model.item_table(), negatives
        needed, row = torch.cat([targets, negatives.flatten()]).unique(return_inverse=True)
        return row[: len(targets)], self.model.item_table(needed), row[len(targets) :].view_as(negatives)

    def configure_optimizers(self) -> "OptimizerLRScheduler":
        o = self.options
        unfused = o.precision == "16-mixed" or o.precision == "bf16-mixed" and o.clip > 0  # Lightning clips no fused, mixed ones
        optimizer = torch.optim.AdamW(self.model.parameters(), o.learning_rate, weight_decay=o.weight_decay, fused=not unfused)
        if o.schedule == "constant":
            return optimizer
        steps = o.epochs * len(self.windows.batches(o.batch_size, o.seed, 0))
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * min(step / steps, 1))) / 2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.average:
            self.average.update_parameters(self.model)
        if self.trainer.is_last_batch:
            self.record["seconds"] += time.perf_counter() - self.clock[0]
            self.record["cpu_seconds"] += time.process_time() - self.clock[1]
            self.record["sequences"] += len(self.windows)
            if not len(self.validation):
                self.close_epoch({})  # not in on_train_epoch_end, before which Lightning calls the callbacks that show the results

    # 3. Validation

    def val_dataloader(self) -> Iterable[Any]:
        return self.validation.batches(1024, self.trainer.global_rank, self.trainer.world_size)

    def on_validation_start(self) -> None:
        self.ranks.zero_()
        self.table = self.evaluated.item_table().detach()  # once for all batches; what is a parameter would count as this module's

    def validation_step(self, batch: Any, _: int) -> None:
        chosen, inputs = batch
        self.ranks[torch.from_numpy(chosen)] = rank_batch(self.evaluated, inputs, self.table).cpu()

    def on_validation_epoch_end(self) -> None:
        ranks = self.trainer.strategy.reduce(self.ranks.to(self.device), reduce_op="sum")
        self.table = None
        self.close_epoch(metrics(ranks.cpu().numpy()))

    # 4. The end

    def close_epoch(self, values: dict[str, float]) -> None:
        """Record the results of the epoch, and keep its weights if it is the best so far or if there is no validation."""
        loss = self.trainer.strategy.reduce(torch.stack(self.losses).mean(), reduce_op="mean")
        epoch = self.current_epoch + 1
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} in epoch {epoch}; lower learning_rate or set clip")
        self.log_dict({"loss": loss} | values, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        self.record["epochs"] = epoch
        self.curve.append({"epoch": epoch, "loss": loss.item()} | ({WATCHED: values[WATCHED]} if values else {}))
        if not values or values[WATCHED] > self.record["best"]:
            self.record |= {"best": values.get(WATCHED, 0.0), "best_epoch": epoch}
            if self.trainer.is_global_zero:
                item_ids, filter_seen = self.split.histories.item_ids, self.options.filters_seen(self.split)
                sections = self.sections | {"epoch": epoch}
                write_model(self.folder, self.evaluated, item_ids, filter_seen, self.trained, sections)
        self.trainer.should_stop = self.finished()

    def finished(self) -> bool:
        """Whether training is complete."""
        o, epochs, waited = self.options, self.record["epochs"], self.record["epochs"] - self.record["best_epoch"]
        return bool(epochs >= o.epochs or o.patience and epochs and waited >= o.patience)

    # 5. The state to resume from

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        config = {"model": asdict(self.model.config)} | self.sections
        checkpoint["awrsr"] = {"record": self.record, "curve": self.curve, "config": config}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if shapes(checkpoint["state_dict"]) != shapes(self.state_dict()):
            raise ValueError(f"{self.folder / STATE} is not a state of this run; remove it to start again")
        for name in [name for name in checkpoint.get("callbacks", {}) if name.startswith("ModelCheckpoint")]:
            del checkpoint["callbacks"][name]  # Lightning's own callback, which older runs used: it would be missed
        self.record, self.curve = checkpoint["awrsr"]["record"], checkpoint["awrsr"]["curve"]


def running_average(network: AWRSRNetwork, decay: float) -> AveragedModel:
    """A running average of the network's weights (Polyak averaging), which starts as the weights after the first step. After n
    steps its decay is (1 + n) / (10 + n), at most `decay`, so that it follows the weights closely at first."""

    def follow(average: Tensor, weight: Tensor, steps: Tensor | int) -> Tensor:
        n = int(steps)
        return average.lerp(weight, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(network, avg_fn=follow).requires_grad_(False)


def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}
