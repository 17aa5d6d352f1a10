"""A training run: its folder, exact resume, early stopping on full-ranking validation, and the report of its results.

A run is decided by its options, its data, its seed and the weights it begins with: the order of sequences by (seed, epoch),
negatives and dropout by (seed, step). So a run that is resumed after a kill ends with the numbers of one that was never stopped,
and several processes draw together what one would draw alone (dropout apart).
"""

import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import Logger

from ..config import TrainingOptions
from ..data.splits import Split
from ..evaluation.baselines import BASELINES, baselines
from ..evaluation.ranking import OF_RANKS, Recommender, evaluate, recall, write_ranks
from ..files import checksum, first_process, sweep, write_json
from ..lock import locked
from ..model_file import CONFIG, ITEMS, WEIGHTS, SavedModel, read_model, write_model
from ..processes import set_threads
from ..run_folder import METRICS, RANKS, STATE, refuse_another_run, state_to_resume
from .cooccurrence import begin_with_cooccurrence
from .loop import TrainingLoop
from .nodes import agreed, check_launch
from .trainer import make_trainer, quiet


def train(
    model: Recommender,
    split: Split,
    options: TrainingOptions,
    out: str | Path | None = None,
    *,
    callbacks: Sequence[L.Callback] = (),
    logger: Logger | None = None,
    **sections: Any,
) -> dict[str, Any]:
    """Train a model in place. It then has the weights of its best epoch, or of the last one if the split has no validation.

    out: the run folder, for weights, configuration and the state to resume from. A folder that holds a state of the same run
        resumes it. callbacks, logger: further ones of Lightning. sections: further sections of the configuration.

    Returns:
        epochs, best_epoch, best (validation NDCG@10), seconds, cpu_seconds (training alone, first process) and curve: epoch, loss
        and NDCG@10 of each epoch. Empty in every process but the first.

    Raises:
        ValueError: the model is for other items; `out` holds another run. FloatingPointError: the loss is not a number.
        BlockingIOError: another process writes into `out`.
    """
    split = numbered_for(model, split)
    if out is None:
        with tempfile.TemporaryDirectory() as temporary:
            return _train_in(Path(temporary), model, split, options, sections, callbacks, logger)
    with locked(out):
        return _train_in(Path(out), model, split, options, sections, callbacks, logger)


def _train_in(
    folder: Path,
    model: Recommender,
    split: Split,
    options: TrainingOptions,
    sections: dict[str, Any],
    callbacks: Sequence[L.Callback],
    logger: Logger | None,
) -> dict[str, Any]:
    """`train` in a folder that no other process writes into."""
    network, filter_seen = model.network, options.filters_seen(split)
    data = sections.get("data", {}) | {"seen": not filter_seen, "fingerprint": split.fingerprint()}
    sections = json.loads(json.dumps({"training": asdict(options)} | sections | {"data": data}))
    config = {"model": asdict(network.config)} | sections
    check_launch(options)
    state = agreed(options, config, lambda: state_to_resume(folder, config))
    if options.item_init == "cooccurrence" and model.item_ids is None and not state:  # a new model's first step
        begin_with_cooccurrence(network.items.weight.data[:, : network.config.hidden], split, options.seed)
    if model.item_ids is None:
        model.trained = split.trained_items()
    elif model.trained is not None:  # fitted before, to what else is known
        model.trained = np.maximum(model.trained, split.trained_items())
    model.item_ids, model.filter_seen = split.histories.item_ids, filter_seen
    set_threads(options.threads)
    loop = TrainingLoop(network.train(), split, options, folder, sections, model.trained)
    if state:
        loop.on_load_checkpoint(state)
        if loop.record["epochs"] > options.epochs:
            raise ValueError(f"epochs is {options.epochs}, must be at least the {loop.record['epochs']} of the run in {folder}")
    finished = loop.finished()
    if state and first_process():
        best_model(folder, config, loop.record, may_be_ahead=not finished)
    with quiet():
        trainer = None if finished else make_trainer(options, folder, len(loop.validation) > 0, callbacks, logger)
    if first_process():
        sweep(folder, (CONFIG, WEIGHTS, ITEMS, STATE, METRICS, RANKS.format(part="*")))
        write_json(folder / CONFIG, config)
    if trainer is not None:
        with tempfile.TemporaryDirectory() as own:
            path = folder / STATE
            if state and options.nodes > 1 and not first_process():  # on a machine that may not see the folder
                torch.save(state, path := Path(own) / STATE)
            run_trainer(trainer, loop, path if state else None)
    if not (first_process() if trainer is None else trainer.is_global_zero):
        return {}
    saved = best_model(folder, config, loop.record)
    network.load_state_dict(saved.network.state_dict())
    model.sections = sections | {"epoch": loop.record["best_epoch"]}
    if first_process() and (saved.network.config, saved.sections) != (network.config, model.sections):  # or an older file
        write_model(folder, network, split.histories.item_ids, filter_seen, model.trained, model.sections)
    return loop.record | {"curve": loop.curve}


def best_model(folder: Path, config: dict[str, Any], record: dict[str, Any], may_be_ahead: bool = False) -> SavedModel:
    """The model of the best epoch of the run with this configuration.

    may_be_ahead: a training that was killed between model and state is going to repeat the last epoch.

    Raises:
        FileNotFoundError, ValueError: it is missing, damaged, or of another run or epoch.
    """
    try:
        saved = read_model(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}, but {STATE} belongs to it: restore it, or remove {STATE} to start again") from None
    stored = {"model": asdict(saved.network.config)} | saved.sections
    refuse_another_run(folder, stored, config, "a model of another run than its state")
    epoch = stored.get("epoch", record["best_epoch"])  # older files have none
    if epoch != record["best_epoch"] and not (may_be_ahead and epoch == record["epochs"] + 1):
        advice = f"rerun with at least {epoch} epochs" if epoch == record["epochs"] + 1 else f"remove {STATE} to start again"
        raise ValueError(
            f"{folder / WEIGHTS} holds epoch {epoch}, but the best one of the state in {STATE} is {record['best_epoch']}: {advice}"
        )
    return saved


def run_trainer(trainer: L.Trainer, loop: TrainingLoop, state: Path | None) -> None:
    """Train to the end, from a state if there is one. Raises KeyboardInterrupt after Ctrl-C, and restores its handler."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        with quiet():
            trainer.fit(loop, ckpt_path=state, weights_only=True)
    except SystemExit:  # Lightning's answer to Ctrl-C; it also leaves further ones ignored
        signal.signal(signal.SIGINT, on_interrupt)
        raise KeyboardInterrupt from None


def numbered_for(model: Recommender, split: Split) -> Split:
    """The split with items numbered as in the model: its own items if it was fitted before, otherwise any of the right number."""
    own, items = model.item_ids, split.histories.item_ids
    if own is not None:
        split, unknown = split.numbered_as(own)
        if unknown:
            raise ValueError(f"histories hold {unknown} events with items that this model was not fitted to; fit a new one")
    elif model.network.config.num_items != len(items):
        raise ValueError(
            f"num_items is {model.network.config.num_items}, must be {len(items)}, the number of items in the histories"
        )
    return split


def report(
    model: Recommender,
    split: Split,
    options: TrainingOptions,
    record: dict[str, Any],
    out: Path,
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate a trained model on the held-out targets. Write their ranks and metrics.json, and return the latter.

    more: further options for "config" in it.
    """
    split, filter_seen = numbered_for(model, split), options.filters_seen(split)
    model.network.to(options.device())
    held_out = [part for part in ("validation", "test") if len(split.targets(part)[0])]
    parts = {part: evaluate(model, split, part, filter_seen=filter_seen, progress=options.progress) for part in held_out}
    results: dict[str, Any] = {part: ranked.metrics() for part, ranked in parts.items()}
    results[BASELINES] = {part: baselines(split, ranked, filter_seen) for part, ranked in parts.items()}
    results |= {
        "epochs": record["epochs"],
        "best_epoch": record["best_epoch"],
        "train_seconds": record["seconds"],
        "train_cpu_seconds": record["cpu_seconds"],
        "train_sequences_per_cpu_second": record["sequences"] / max(record["cpu_seconds"], 1e-9),
        "peak_mib": peak_mib(),
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "filter_seen": filter_seen,
        "curve": record["curve"],
    }
    if "test" in parts:
        results["eval_users_per_cpu_second"] = parts["test"].users_per_cpu_second
        if not filter_seen and (recalled := recall(parts["test"], split)):
            results["recall"] = recalled
    results["config"] = asdict(model.network.config) | asdict(options) | (more or {}) | {"out": str(out)}
    with locked(out):
        for part, ranked in parts.items():
            write_ranks(ranked, split, out / RANKS.format(part=part))
        results[OF_RANKS] = {part: checksum(out / RANKS.format(part=part)) for part in parts}
        write_json(out / METRICS, results, seal=True)
    return results


def peak_mib() -> float | None:
    """Peak memory of this process, if the system reports it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)
