"""`awrsr train`: train a model on a file of histories and evaluate it."""

import sys
from dataclasses import asdict, fields, replace
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser

from ..config import MAY_CHANGE, OF_SASREC, WATCHED, AWRSRConfig, TrainingOptions
from ..data.ids import many
from ..data.prepare import DEMO, DataOptions, prepare
from ..data.splits import Split
from ..lock import locked
from ..presets import AUTO, NONE, PLAIN, PRESET_HELP, PRESETS, preset_options, suited
from ..progress import coloured
from .more import continue_run
from .shared import add_options, add_switch, as_flags, options_of, say, typed

OUT_HELP = (
    "Run folder (default: runs/<data>-<backbone>-<refinement>-<loss>-<seed>, and a short checksum of other options if they are not "
    "at their defaults)."
)
OPTIONS: dict[str, Any] = {"data": DataOptions, "model": AWRSRConfig, "training": TrainingOptions}


def add_flags(to: ArgumentParser) -> None:
    to.usage = "awrsr train [--data FILE] [--out DIR] [--config FILE] [OPTION ...]"
    to.description = f"{to.description}\n\n  {as_flags(DEMO)}"
    to.add_argument("--config", action=ActionConfigFile, help="YAML file of options, in the form that --print-config prints.")
    to.add_argument("--out", type=str, default="", help=OUT_HELP)
    add_switch(to, "baseline", None, "Also train plain attention, in the folder <out>/plain (default: only without --data).")
    help = "Run folder to train further on the events of --data, which come after its own; users and items may be new. The result "
    help += "goes into another folder (default: <RUN>-more). --epochs and the like then default to what suits that."
    to.add_argument("--continue", type=str, default="", metavar="RUN", help=help)
    to.add_argument("--preset", choices=(AUTO, NONE, *PRESETS), default=AUTO, help=PRESET_HELP)
    for title, kind in OPTIONS.items():
        add_options(to.add_argument_group(title), kind)


def run(options: Any) -> None:
    """Train a model on a file of histories and evaluate it. Training stops when
    validation no longer improves. The best epoch is evaluated on held-out events by
    ranking the whole catalogue. Without --data, a refined and a plain model are
    trained on synthetic histories, to show what refinement does; the end of this
    text lists the defaults for that case.

      awrsr train
      awrsr train --data beauty.txt --refinement additive --epochs 20 --out runs/beauty
      awrsr train --data beauty.txt --refinement none --print-config > plain.yaml
      awrsr train --config plain.yaml --seed 1
      awrsr train --continue runs/beauty --data new.csv

    The run folder then holds model.safetensors (weights, item ids and configuration),
    metrics.json and the rank of every held-out event. If training is interrupted or
    killed, rerun the same command to resume from the last completed epoch; the
    results are the same as without the interruption. To train a finished run
    further, rerun the command with more --epochs.

    Options that STOSA's authors use, for backbone stosa:

      --backbone stosa --refinement none --max-len 100 --layers 1 --heads 4
      --feedforward 4 --activation elu --norm post --init normal
      --hidden-dropout 0.3 --attention-dropout 0 --loss bpr --pvn-weight 0.005
      --batch-size 256

    Defaults without --data, unless you set the option yourself:
    """
    if options["continue"]:
        return continue_run(options)
    data, config, training = (kind(**options_of(kind, options)) for kind in OPTIONS.values())
    if data.train_data:  # other commands may be started in another folder
        data = replace(data, **{name: str(Path(file).absolute()) for name, file in data.files.items()})
    split = prepare(data)
    loaded = split.histories
    repeats = f"{loaded.repeat_share():.1%} of the events repeat an item of their history"
    order = "in the order of the file" if loaded.times is None and data.files else "in order of time"
    say(f"{data.name}: {loaded.num_users:,} users, {loaded.num_items:,} items, {len(loaded.items):,} events {order}; {repeats}")
    if count := int((split.trained_items() == 0).sum()):
        say(f"{count:,} items occur in held-out events only, and are not recommended.")
    out = Path(options.out or default_folder(data, config, training))
    if options.preset == AUTO:
        name, why = suited(split, config, progress=training.progress)
        say(f"{why} Hence --preset {name}.")
        config = replace(config, **preset_options(name) | {"layers": config.layers})
    config = replace(config, num_items=split.histories.num_items)
    with_baseline = options.baseline if options.baseline is not None else not data.files
    if training.device() == "cpu":
        import torch

        count = training.threads or torch.get_num_threads()
        say(f"Training on {count} CPU thread{'s' * (count > 1)}; --threads N changes that: beside other work, 1 may be faster.")
    results = {}
    if with_baseline and config.refinement != "none":
        results["plain"] = train_one(plain(config), data, training, split, out / "plain")
    results["plain" if config.refinement == "none" else config.refinement] = train_one(config, data, training, split, out)
    if not all(results.values()):
        return  # a process other than the first
    held_out = all("test" in result for result in results.values())
    if held_out:
        show(results)
    ranks = " and the rank of every held-out event" if held_out else ""
    print(f"\n{out} holds the model, its metrics{ranks}. Next:\n")
    if not data.files:
        print(f"  {typed(['awrsr', 'explain', out])}          # what the model pays attention to")
    print(f"  {typed(['awrsr', 'recommend', out, '-k', 5])}   # the best next items for every user")


def plain(config: AWRSRConfig) -> AWRSRConfig:
    """The same model with plain attention. It keeps the options of tables, which nothing reads."""
    return replace(config, refinement="none", **{name: PLAIN[name] for name in OF_SASREC})


def default_folder(data: DataOptions, config: AWRSRConfig, training: TrainingOptions) -> Path:
    """runs/<data>-<backbone>-<refinement>-<loss>-<seed>, and a checksum of all other options that are not at their defaults and
    belong to a run, so that each run has a folder of its own."""
    named = {"num_items", "data", "backbone", "refinement", "loss", "seed"}
    ignored = named | MAY_CHANGE - ({"epochs"} if training.schedule == "cosine" else set())  # cosine depends on the epochs
    usual = {"train_data": data.train_data} if data.train_data else {"data": data.data} | ({} if data.data else DEMO)
    defaults = [kind(**{name: usual[name] for name in usual.keys() & kind.__dataclass_fields__}) for kind in OPTIONS.values()]
    pairs: list[tuple[Any, Any]] = list(zip((data, config, training), defaults, strict=True))
    changed = [
        (each.name, getattr(chosen, each.name))
        for chosen, default in pairs
        for each in fields(chosen)
        if each.name not in ignored and getattr(chosen, each.name) != getattr(default, each.name)
    ]
    parts = [data.name, config.backbone, config.refinement, training.loss, str(training.seed)]
    return Path("runs") / "-".join(parts + [sha256(repr(changed).encode()).hexdigest()[:6]] * bool(changed))


def train_one(config: AWRSRConfig, data: DataOptions, training: TrainingOptions, split: Split, out: Path) -> dict[str, Any]:
    """Train, evaluate and report one model. Returns what metrics.json holds, or nothing in a process other than the first."""
    import torch

    from ..recommender import AWRSR
    from ..training.run import report, train
    from ..training.trainer import EpochLines

    seen = "left out of the ranking" if training.filters_seen(split) else "ranked as well"
    whole = training.loss == "sampled_softmax" and training.num_negatives() >= config.num_items
    loss = f"{training.loss} over the whole catalogue" if whole else training.loss
    say(f"{config.backbone}, refinement {config.refinement}, {loss}, seen items {seen}: {out}")
    torch.manual_seed(training.seed)
    model = AWRSR(config)
    try:
        with locked(out):
            lines = [] if training.progress else [EpochLines()]
            record = train(model, split, training, out, callbacks=lines, data=asdict(data) | place_of(data))
            if not record:
                return {}
            validates = len(split.targets("validation")[0]) > 0
            best = f"epoch {record['best_epoch']} is the best on validation ({WATCHED} {record['best']:.4f})"
            say(f"{many(record['epochs'], 'epoch')}, {best if validates else 'nothing held out'}")
            if validates and record["best_epoch"] == training.epochs:
                say(f"The best epoch was the last one, so more may help: --epochs {2 * training.epochs}")
            return report(model, split, training, record, out, asdict(data))
    except KeyboardInterrupt:
        say(f"\nRerun the same command to resume from the last completed epoch in {out}.", file=sys.stderr)
        raise


def place_of(data: DataOptions) -> dict[str, str]:
    """The place of the file of histories, for commands that are started in another folder."""
    return {"path": str(Path(data.data).absolute())} if data.data not in ("", "-") else {}


def show(results: dict[str, dict[str, Any]]) -> None:
    """Print a table of test metrics, a row per model and per baseline."""
    from ..evaluation.baselines import BASELINES
    from ..evaluation.report import table_lines

    first = next(iter(results.values()))
    with_recall = all("recall" in result for result in results.values())
    recalled = ["HR@1 recall".rjust(13)] * with_recall
    recalled += [f"{result['recall']['HR@1']:13.4f}" for result in results.values() if with_recall]
    lines = table_lines({name: result["test"] for name, result in results.items()} | first[BASELINES]["test"], "test")
    lines = [line + more for line, more in zip_longest(lines, recalled, fillvalue="")]
    print("\n" + "\n".join(coloured(line, "bold") if 0 < nth <= len(results) else line for nth, line in enumerate(lines)))
    for name, result in results.items():
        better = [other for other, reached in first[BASELINES]["test"].items() if reached[WATCHED] >= result["test"][WATCHED]]
        if better:
            need = "needs" if len(better) == 1 else "need"
            print(coloured(f"\nBy {WATCHED}, {name} is no better than {' and '.join(better)}, which {need} no training.", "yellow"))
    if with_recall:
        recall = next(iter(results.values()))["recall"]
        print(
            f"\nHR@1 recall: HR@1 on the {recall['targets']:,} held-out events whose current item had occurred before. "
            f"Predicting what followed it then would give {recall['rule HR@1']:.4f}."
        )
