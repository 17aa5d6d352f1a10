"""Training with Lightning: early stopping on full-ranking validation, exact resume, results in a run folder.

A run is decided by its options, its data, its seed and the weights it begins with: the order of sequences by (seed, epoch),
negatives and dropout by (seed, step). So a run that goes on after a kill ends with the numbers of one that was never stopped, and
several processes draw together what one would draw alone (dropout apart).
"""

import json
import math
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from ..config import WATCHED, AWRSRConfig, TrainingOptions, before_averaging, without_removed_options
from ..data.histories import Split
from ..evaluation.ranking import Targets, evaluate, metrics, rank_batch, recall, write_ranks
from ..files import first_process, read_json, sweep, write_json
from ..recommender import CONFIG, ITEMS, WEIGHTS, Recommender
from .batches import Batch, Windows
from .cooccurrence import begin_with_cooccurrence
from .losses import LOSSES, draw_negatives
from .trainer import STATE, AtomicCheckpoints, make_trainer, quiet

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

METRICS, RANKS = "metrics.json", "ranks_{part}.parquet"  # what a finished run adds to its folder
NEGATIVES_SEED = 1 << 48  # apart from the seeds of dropout on a GPU; a CPU's generator drops it, its draws differ in kind alone


class Training(L.LightningModule):
    """One training run of a `Recommender` as Lightning sees it."""

    def __init__(self, model: Recommender, split: Split, options: TrainingOptions, folder: Path, sections: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.options, self.folder, self.sections = model, options, folder, sections
        self.average = running_average(model, options.average) if options.average else None
        self.evaluated: Recommender = self.average.module if self.average else model  # type: ignore[assignment]
        self.windows = Windows(split, model.config.max_len, options.windows)
        self.validation = Targets(split, "validation", model.config.max_len, options.filters_seen(split))
        world = options.devices * options.nodes
        self.windows.batches(options.batch_size, options.seed, 0, 0, world)  # raises where there are too few sequences
        if 0 < len(self.validation) < world:
            raise ValueError(f"{len(self.validation)} validation targets are too few for {world} processes, must be one for each")
        if options.pvn_weight and not model.by_distance:
            backbone = f"backbone {model.config.backbone!r}, whose scores are no distances"
            raise ValueError(f"pvn_weight is {options.pvn_weight}, must be 0 with {backbone}")
        if options.loss in ("bce", "gbce") and model.by_distance:
            raise ValueError(f"loss is {options.loss!r}, must not be with backbone {model.config.backbone!r}: no score is above 0")
        draw_negatives(options.loss, torch.empty(0, dtype=torch.int64), model.config.num_items, 1, torch.Generator())  # likewise
        self.found = torch.zeros(len(self.validation), dtype=torch.int64)
        self.record: dict[str, Any] = {
            "best": -1.0,
            "best_epoch": 0,
            "epochs": 0,
            "sequences": 0,
            "seconds": 0.0,
            "cpu_seconds": 0.0,
        }
        self.curve: list[dict[str, float]] = []
        self.losses: list[Tensor] = []
        self.table: Tensor | None = None
        self.began = (0.0, 0.0)

    # ---- an epoch of training

    def train_dataloader(self) -> Iterable[Batch]:
        o, t = self.options, self.trainer
        return self.windows.batches(o.batch_size, o.seed, t.current_epoch, t.global_rank, t.world_size)

    def on_train_epoch_start(self) -> None:
        self.losses, self.began = [], (time.perf_counter(), time.process_time())

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """The mean over all events of the step; a process's share is scaled so that the average over processes comes to it."""
        o, world = self.options, self.trainer.world_size
        step = o.seed * 1_000_003 + self.trainer.global_step
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(step * world + self.trainer.global_rank)
            hidden = self.model(batch.items, batch.cu_seqlens, batch.max_seqlen)
        generator = torch.Generator(self.device).manual_seed(step + NEGATIVES_SEED)
        given = self.table_of(batch.targets, self.negatives(batch, generator))
        more: dict[str, Any] = {"calibration": o.calibration, "pvn_weight": o.pvn_weight, "num_items": self.model.config.num_items}
        with torch.autocast(self.device.type, enabled=False) if self.model.by_distance else nullcontext():  # squares would round
            values = LOSSES[o.loss](hidden, *given, **more)
        loss: Tensor = values.sum() * (world / batch.events)
        self.losses.append(loss.detach())
        return loss

    def table_of(self, targets: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Targets, item table and negatives as losses take them. Rows that are computed are those of these items alone, where the
        loss asks for no others; targets and negatives then are places among them."""
        if not self.model.computes_table or self.options.loss == "cross_entropy":
            return targets, self.model.item_table(), negatives
        needed, place = torch.cat([targets, negatives.flatten()]).unique(return_inverse=True)
        return place[: len(targets)], self.model.item_table(needed), place[len(targets) :].view_as(negatives)

    def negatives(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """What all processes draw for the whole step, this one's share of it."""
        k, count = self.options.num_negatives(), self.model.config.num_items
        if self.trainer.world_size == 1 or self.options.loss in ("sampled_softmax", "cross_entropy"):
            return draw_negatives(self.options.loss, batch.targets, count, k, generator)
        targets = batch.targets.new_full((batch.events,), count)
        mine = slice(batch.first, batch.first + len(batch.targets))
        targets[mine] = batch.targets
        return draw_negatives(self.options.loss, targets, count, k, generator)[mine]

    def configure_optimizers(self) -> "OptimizerLRScheduler":
        o = self.options
        fused = o.precision != "16-mixed"
        optimizer = torch.optim.AdamW(self.model.parameters(), o.learning_rate, weight_decay=o.weight_decay, fused=fused)
        if o.schedule == "constant":
            return optimizer
        steps = o.epochs * len(self.windows.batches(o.batch_size, o.seed, 0))
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * min(step / steps, 1))) / 2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.average:
            self.average.update_parameters(self.model)
        if self.trainer.is_last_batch:
            self.record["seconds"] += time.perf_counter() - self.began[0]
            self.record["cpu_seconds"] += time.process_time() - self.began[1]
            self.record["sequences"] += len(self.windows)
            if not len(self.validation):
                self.close_epoch({})

    # ---- validation after it

    def val_dataloader(self) -> Iterable[Any]:
        return self.validation.batches(1024, self.trainer.global_rank, self.trainer.world_size)

    def on_validation_start(self) -> None:
        self.found.zero_()
        self.table = self.evaluated.item_table().detach()  # once for all batches; what is a parameter would count as this module's

    def validation_step(self, batch: Any, _: int) -> None:
        chosen, inputs = batch
        self.found[torch.from_numpy(chosen)] = rank_batch(self.evaluated, inputs, self.table).cpu()

    def on_validation_epoch_end(self) -> None:
        found = self.trainer.strategy.reduce(self.found.to(self.device), reduce_op="sum")
        self.table = None
        self.close_epoch(metrics(found.cpu().numpy()))

    def close_epoch(self, values: dict[str, float]) -> None:
        """Note what the epoch reached, and keep its weights if that is the best so far, or if nothing says what it reached."""
        loss = self.trainer.strategy.reduce(torch.stack(self.losses).mean(), reduce_op="mean")
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} in epoch {self.current_epoch + 1}; lower learning_rate or set clip"
            )
        self.log_dict({"loss": loss} | values, on_step=False, on_epoch=True, batch_size=1)
        self.record["epochs"] = self.current_epoch + 1
        watched = {WATCHED: values[WATCHED]} if values else {}
        self.curve.append({"epoch": self.current_epoch + 1, "loss": loss.item()} | watched)
        if not values or values[WATCHED] > self.record["best"]:
            self.record |= {"best": values.get(WATCHED, 0.0), "best_epoch": self.current_epoch + 1}
            if self.trainer.is_global_zero:
                self.evaluated.save(self.folder, **self.sections)
        self.trainer.should_stop = finished(self.record, self.options)

    # ---- what a checkpoint holds beside weights and optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["awrsr"] = {"record": self.record, "curve": self.curve}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        whole = isinstance(checkpoint, dict) and {"awrsr", "state_dict"} <= checkpoint.keys()
        if not whole or shapes(checkpoint["state_dict"]) != shapes(self.state_dict()):
            raise ValueError(f"{self.folder / STATE} is no state of this run; remove it to begin anew")
        self.record, self.curve = checkpoint["awrsr"]["record"], checkpoint["awrsr"]["curve"]


def running_average(model: Recommender, decay: float) -> AveragedModel:
    """A copy of the model that begins as its weights after the first step and then follows them (Polyak's averaging), closely at
    first: after n steps it keeps (1 + n) / (10 + n) of itself, `decay` at most."""

    def follow(average: Tensor, weight: Tensor, steps: Tensor | int) -> Tensor:
        n = int(steps)
        return average.lerp(weight, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(model, avg_fn=follow).requires_grad_(False)


def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def train(
    model: Recommender, split: Split, options: TrainingOptions, out: str | Path | None = None, **sections: Any
) -> dict[str, Any]:
    """Train a model in place; afterwards it has the weights of its best epoch, or the last where the split has no validation.

    out: the run folder, for weights, configuration and the state to go on from. A folder that holds a state of the same run goes
        on with it. sections: further sections for its config.json.

    Returns:
        epochs, best_epoch, best (validation NDCG@10), seconds, cpu_seconds (training alone, first process) and curve: epoch, loss
        and NDCG@10 of each epoch. Empty in every process but the first.

    Raises:
        ValueError: the model is for other items; `out` holds another run. FloatingPointError: the loss is no number.
    """
    split = numbered_for(model, split)
    if out is None:
        with tempfile.TemporaryDirectory() as temporary:
            return train(model, split, options, temporary, **sections)
    folder, sections = Path(out), {"training": asdict(options)} | sections
    data = {"seen": not options.filters_seen(split), "fingerprint": split.fingerprint()}
    sections["data"] = sections.get("data", {}) | data
    config = {"model": asdict(model.config)} | sections
    resume = holds(folder, config)
    if options.item_init == "cooccurrence" and model.item_ids is None and not resume:  # a new model's first step
        begin_with_cooccurrence(model.items.weight.data[:, : model.config.hidden], split, options.seed)
    model.item_ids, model.filter_seen = split.histories.item_ids, options.filters_seen(split)
    if options.threads:
        torch.set_num_threads(options.threads)
    training = Training(model.train(), split, options, folder, sections)
    if resume:
        training.on_load_checkpoint(AtomicCheckpoints().load_checkpoint(folder / STATE))
        if training.record["epochs"] > options.epochs:
            raise ValueError(f"epochs is {options.epochs}, must be at least the {training.record['epochs']} of the run in {folder}")
    done, results = finished(training.record, options), (METRICS, RANKS.format(part="*"))
    with quiet():
        trainer = None if done else make_trainer(options, folder, validates=len(training.validation) > 0)
    if first_process():
        sweep(folder, (CONFIG, WEIGHTS, ITEMS, STATE, *results))
        write_json(folder / CONFIG, config)
        for old in () if done else [path for name in results for path in folder.glob(name)]:  # of fewer epochs
            old.unlink(missing_ok=True)
    if trainer is not None:
        with quiet():
            before = signal.getsignal(signal.SIGINT)
            try:
                trainer.fit(training, ckpt_path=folder / STATE if resume else None, weights_only=True)
            except SystemExit:  # Lightning's answer to Ctrl-C; it also leaves further ones ignored
                signal.signal(signal.SIGINT, before)
                raise KeyboardInterrupt from None
        if not trainer.is_global_zero:
            return {}
    model.load_state_dict(type(model).load(folder).state_dict())
    return training.record | {"curve": training.curve}


def finished(record: dict[str, Any], options: TrainingOptions) -> bool:
    """Whether nothing is left to train."""
    waited = record["epochs"] - record["best_epoch"]
    return bool(record["epochs"] >= options.epochs or options.patience and record["epochs"] and waited >= options.patience)


MAY_CHANGE = {"epochs", "patience", "progress", "logger", "threads", "data"}  # in a run that goes on; data: where they lie


def numbered_for(model: Recommender, split: Split) -> Split:
    """The split with items numbered as the model has them: those it was fitted to before, or any of the right number."""
    own, items = model.item_ids, split.histories.item_ids
    if own is not None:
        split, unknown = split.numbered_as(own)
        if unknown:
            raise ValueError(f"histories hold {unknown} events with items this model was not fitted to; make another for them")
    elif model.config.num_items != len(items):
        raise ValueError(f"num_items is {model.config.num_items}, must be {len(items)}, the number of items in the histories")
    return split


def holds(folder: Path, config: dict[str, Any]) -> bool:
    """Whether the folder holds a state of the same run to go on from. Raises ValueError where it holds another run or its model."""
    state = (folder / STATE).exists()
    if not (folder / CONFIG).exists() or not (state or (folder / WEIGHTS).exists()):
        return False
    usual = {"model": asdict(AWRSRConfig()), "training": asdict(before_averaging())}
    stored = without_removed_options(read_json(folder / CONFIG), folder / CONFIG)
    old, new = (flat(usual) | flat(each) for each in (stored, json.loads(json.dumps(config))))
    fixed = {"epochs"} if config["training"]["schedule"] == "cosine" else set()  # the rate of each step depends on them
    differs = sorted(
        name for name in old.keys() | new.keys() if old.get(name) != new.get(name) and name.split(".")[-1] not in MAY_CHANGE - fixed
    )
    if differs:
        of = "; ".join(f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in differs[:3])
        why = " (with schedule 'cosine' the rate of each step depends on them)" if differs == ["training.epochs"] else ""
        run = "another run" if state else "the model of another run"
        raise ValueError(f"{folder} holds {run}: {of}{why}. Give another folder, or remove this one")
    return state


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Section.name -> value; what is no section stands for itself."""
    sections = {name: values if isinstance(values, dict) else {"": values} for name, values in config.items()}
    return {f"{section}.{name}".rstrip("."): value for section, values in sections.items() for name, value in values.items()}


def report(
    model: Recommender,
    split: Split,
    options: TrainingOptions,
    record: dict[str, Any],
    out: Path,
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate a trained model on the targets that are held out; write their ranks and metrics.json, which is returned.

    more: further options for "config" in it.
    """
    split, filter_seen = numbered_for(model, split), options.filters_seen(split)
    model.to(options.device())
    held_out = [part for part in ("validation", "test") if len(split.targets(part)[0])]
    parts = {part: evaluate(model, split, part, filter_seen=filter_seen, progress=options.progress) for part in held_out}
    for part, found in parts.items():
        write_ranks(found, split, out / RANKS.format(part=part))
    recalled = {} if filter_seen or "test" not in parts else recall(parts["test"], split)
    speed = {"eval_users_per_cpu_second": parts["test"].users_per_cpu_second} if "test" in parts else {}
    results = (
        {part: found.metrics() for part, found in parts.items()}
        | {
            "epochs": record["epochs"],
            "best_epoch": record["best_epoch"],
            "train_seconds": record["seconds"],
            "train_cpu_seconds": record["cpu_seconds"],
            "train_sequences_per_cpu_second": record["sequences"] / max(record["cpu_seconds"], 1e-9),
            "peak_mib": peak_mib(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "filter_seen": filter_seen,
            "curve": record["curve"],
        }
        | speed
        | ({"recall": recalled} if recalled else {})
        | {"config": asdict(model.config) | asdict(options) | (more or {}) | {"out": str(out)}}
    )
    write_json(out / METRICS, results)
    return results


def peak_mib() -> float | None:
    """Most memory this process had, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)
