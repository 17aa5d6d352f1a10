"""What each command of the command line does with its options. Each loads what it needs: torch and Lightning take seconds."""

import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from ..config import AWRSRConfig, TrainingOptions
from ..data.histories import Histories, Split
from ..data.prepare import DEMO, OF_SPLIT, DataOptions, divide, histories
from ..files import first_process, read_json, write_json

if TYPE_CHECKING:
    from ..recommender import AWRSR


COLUMNS = ("user_column", "item_column", "time_column")


def run_train(options: Any) -> None:
    data, config, training = (pick(kind, options) for kind in (DataOptions, AWRSRConfig, TrainingOptions))
    split = load(data)
    name = "-".join((data.name, config.backbone, config.refinement, training.loss, str(training.seed)))
    out = Path(options.out or Path("runs") / name)
    config = replace(config, num_items=split.histories.num_items)
    beside = options.baseline if options.baseline is not None else not data.data
    results = {}
    if beside and config.refinement != "none":
        results["plain"] = train_one(replace(config, refinement="none"), data, training, split, out / "plain")
    results["plain" if config.refinement == "none" else config.refinement] = train_one(config, data, training, split, out)
    if not all(results.values()):
        return  # a process beside the first
    held_out = all("test" in found for found in results.values())
    if held_out:
        show(results)
    print(f"\nIn {out}: the model, its metrics{' and the rank of every held-out event' if held_out else ''}. Next:\n")
    if not data.data:
        print(f"  awrsr explain --run {out}          # what the model pays attention to")
    print(f"  awrsr recommend --run {out} -k 5   # the best next items for every user")


def train_one(config: AWRSRConfig, data: DataOptions, training: TrainingOptions, split: Split, out: Path) -> dict[str, Any]:
    """Train, evaluate and report one model; what it wrote to metrics.json, or nothing in a process beside the first."""
    import torch

    from ..recommender import AWRSR
    from ..training.run import report, train

    seen = "left out of the ranking" if training.filters_seen(split) else "ranked too"
    whole = training.loss == "sampled_softmax" and training.num_negatives() >= config.num_items
    loss = f"{training.loss} over the whole catalogue" if whole else training.loss
    say(f"{config.backbone}, refinement {config.refinement}, {loss}, seen items {seen}: {out}")
    torch.manual_seed(training.seed)
    model = AWRSR(config)
    try:
        record = train(model, split, training, out, data=asdict(data))
        if not record:
            return {}
        best = f"the best on validation was {record['best_epoch']} (NDCG@10 {record['best']:.4f})"
        say(f"{record['epochs']} epochs, {best if len(split.targets('validation')[0]) else 'nothing held out'}")
        return report(model, split, training, record, out, asdict(data))
    except KeyboardInterrupt:
        say(f"\n{out} keeps every whole epoch; the same command goes on from there.", file=sys.stderr)
        raise


def show(results: dict[str, dict[str, Any]]) -> None:
    """A table of test metrics, a row per model."""
    metrics = list(next(iter(results.values()))["test"])
    columns = [*metrics, *(["HR@1 recall"] if all("recall" in r for r in results.values()) else [])]
    print("\ntest".ljust(12) + "".join(name.rjust(13 if " " in name else 9) for name in columns))
    for name, found in results.items():
        values = [f"{found['test'][metric]:.4f}".rjust(9) for metric in metrics]
        if len(columns) > len(metrics):
            values.append(f"{found['recall']['HR@1']:.4f}".rjust(13))
        print(name.ljust(11) + "".join(values))
    if len(columns) > len(metrics):
        found = next(iter(results.values()))["recall"]
        print(
            f"\nHR@1 recall: of the {found['targets']:,} held-out events where the current item had occurred before. "
            f"Naming what followed it then would give {found['rule HR@1']:.4f}."
        )


def run_evaluate(options: Any) -> None:
    from ..evaluation.ranking import evaluate, write_ranks

    model, data, config = open_run(options)
    split = divided(options, data, config)
    held_out = len(split.targets(options.part)[0])
    split, unknown = split.numbered_as(model.ids())
    if unknown:
        gone = held_out - len(split.targets(options.part)[0])
        print(f"{unknown:,} events left out, {gone:,} of them held out: the model does not know their items", file=sys.stderr)
    if not len(split.targets(options.part)[0]):
        raise ValueError(f"data: the model knows none of the {held_out:,} held-out items")
    seen = filters(options)
    ranked = evaluate(model, split, options.part, filter_seen=seen, progress=True)
    values = ranked.metrics()
    for name, value in values.items():
        print(f"{name:8} {value:.4f}")
    results = {options.part: values, "targets": len(ranked.ranks), "filter_seen": model.filter_seen if seen is None else seen}
    results["eval_users_per_cpu_second"] = ranked.users_per_cpu_second
    if options.json:
        write_json(options.json, results)
    if options.ranks:
        write_ranks(ranked, split, Path(options.ranks))


def run_recommend(options: Any) -> None:
    from .output import writer

    model, data, config = open_run(options)
    if options.data:  # all its users, whatever the run left out
        data = replace(data, min_user_events=1, min_item_events=1)
    found = histories_of(options, data, config)
    if options.user:
        found = found.keep(np.isin(np.repeat(np.arange(found.num_users), found.lengths), [place(found, x) for x in options.user]))
    known, unknown = found.numbered_as(model.ids())
    empty = int((known.lengths == 0).sum())
    if empty == known.num_users:
        raise ValueError(f"data: none of the {empty:,} users has an item that the model knows")
    if unknown:
        users = f", and {empty:,} users with nothing else" if empty else ""
        print(f"{unknown:,} events passed over{users}: the model does not know their items", file=sys.stderr)
    with writer(options.output, model.ids(), known.user_ids) as write:
        for part in model.top_items(known, options.k, filter_seen=filters(options)):
            write(part)


def run_compare(options: Any) -> None:
    from ..evaluation.compare import compare

    settings = {name: options[name] for name in ("part", "metrics", "resamples")}
    found = compare([Path(run) for run in options.runs], baseline=options.baseline or None, **settings)
    print(found)
    if options.json:
        write_json(options.json, found.to_json())


def run_explain(options: Any) -> None:
    from ..analysis.explain import picture, save, summary

    model, data, config = open_run(options)
    layers = model.config.layers
    if not 1 <= options.layer <= layers:
        raise ValueError(f"layer is {options.layer}, must be in 1..{layers}")
    items = options.history or of_user(histories_of(options, data, config), options.user)
    items = items[-model.config.max_len :]
    p, m = model.attention_maps(items)[options.layer - 1]
    labels = [str(item) for item in items]
    title = f"block {options.layer} of {layers}, refinement {model.config.refinement}"
    save(picture(p, m, labels, refinement=model.config.refinement, title=title), options.output)
    print(summary(p, m, labels))
    print(f"\nPicture: {options.output}")


def of_user(found: Histories, user: str) -> list[Any]:
    """Item ids of a user, or of the first whose history is of middling length."""
    chosen = place(found, user) if user else int((found.lengths >= min(12, found.lengths.max())).argmax())
    return found.item_ids[found.of(chosen)].tolist()


def place(found: Histories, user: str) -> int:
    """Number of the user of an id."""
    places = np.flatnonzero(found.user_ids.astype(str) == user)
    if not len(places):
        raise ValueError(f"user is {user!r}, which the data do not hold")
    return int(places[0])


def run_analyse(options: Any) -> None:
    from ..analysis.analyse import analyse
    from ..analysis.page import page
    from ..files import atomic
    from ..recommender import AWRSR
    from ..run_folder import CONFIG

    model, data, config = open_run(options)
    baseline = AWRSR.load(options.baseline).to(model.items.weight.device) if options.baseline else None
    if baseline is not None:
        other = read_json(Path(options.baseline) / CONFIG).get("data", {})
        prints = {each.get("fingerprint") for each in (config.get("data", {}), other)}
        if len(prints - {None}) > 1:
            raise ValueError(
                f"baseline is {options.baseline}, of other data or another split ({other.get('split')}) than {options.run} "
                f"({data.split}): it may have been trained on what is held out here"
            )
    split, _ = divided(options, data, config).numbered_as(model.ids())
    settings = {name: options[name] for name in ("part", "users", "examples")}
    found = analyse(model, split, baseline=baseline, filter_seen=filters(options), progress=True, **settings)
    if options.baseline:
        found = replace(found, other=f"the baseline run {Path(options.baseline).name}")
    output = Path(options.output or Path(options.run) / "analysis.html")
    with atomic(output) as temporary:
        temporary.write_text(page(found, f"Attention of {Path(options.run).name}"), encoding="utf-8")
    if options.json:
        write_json(options.json, found.to_json())
    print(f"Report: {output}")


def run_export(options: Any) -> None:
    from ..export import export
    from ..recommender import AWRSR

    model = AWRSR.load(options.run)
    output = options.output or Path(options.run) / ("model.pt2" if options.format == "torch" else "model.onnx")
    print(f"Checked against the model and written: {export(model, output, format=options.format)}")


def run_fetch(options: Any) -> None:
    from ..data.fetch import fetch

    path = fetch(options.name, cache=options.cache or None, **({"base_url": options.base_url} if options.base_url else {}))
    print(f"{path}\n\nNext:\n\n  awrsr data stats {path}\n  awrsr train --data {path}")


def run_make(options: Any) -> None:
    from ..data.synthetic import make, write

    names = ("users", "items", "length", "noise", "popularity", "gap", "seed")
    write(make(**{name: options[name] for name in names}), options.output)
    print(f"{options.output}\n\nNext:\n\n  awrsr data stats {options.output}")
    print(f"  awrsr train --data {options.output} --baseline {flags(DEMO)}")


def run_stats(options: Any) -> None:
    from ..data.readers import read
    from ..data.stats import stats, table

    columns = {role: options[f"{role}_column"] or None for role in ("user", "item", "time")}
    values = stats(read(options.file, format=options.format, **columns))
    print(table(values))
    if options.json:
        write_json(options.json, values)


COMMANDS: dict[str, Callable[[Any], None]] = {
    "train": run_train,
    "evaluate": run_evaluate,
    "recommend": run_recommend,
    "compare": run_compare,
    "explain": run_explain,
    "analyse": run_analyse,
    "export": run_export,
    "data fetch": run_fetch,
    "data make": run_make,
    "data stats": run_stats,
}


def pick(kind: type, options: Any) -> Any:
    """A dataclass of options from the flags that are its fields."""
    return kind(**{each.name: options[each.name] for each in fields(kind) if each.name in options})


def flags(options: dict[str, Any]) -> str:
    """Options as one would give them."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())


def say(text: str, file: TextIO | None = None) -> None:
    """Print in the first of several processes."""
    if first_process():
        print(text, file=file, flush=True)


def load(options: DataOptions) -> Split:
    found = histories(options)
    again = f"{found.repeat_share():.1%} of the events repeat an item of their history"
    order = "as they stand in the file" if found.times is None and options.data else "in order of time"
    say(f"{options.name}: {found.num_users:,} users, {found.num_items:,} items, {len(found.items):,} events {order}; {again}")
    return divide(found, options)


def open_run(options: Any) -> tuple["AWRSR", DataOptions, dict[str, Any]]:
    """The model of a run, on a GPU where there is one; how its data were read; its configuration."""
    import torch

    from ..recommender import AWRSR
    from ..run_folder import CONFIG

    if options.threads:
        torch.set_num_threads(options.threads)
    model = AWRSR.load(options.run)
    config = read_json(Path(options.run) / CONFIG)
    data = {name: value for name, value in config.get("data", {}).items() if name in DataOptions.__dataclass_fields__}
    for name in [name for name, of in OF_SPLIT.items() if data.get("split") != of]:
        data.pop(name, None)  # older runs may have some, without effect
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model, DataOptions(**data), config


def histories_of(options: Any, data: DataOptions, config: dict[str, Any]) -> Histories:
    """Those of --data, or the run's own, filtered as in the run."""
    if not options.data:
        if "data" not in config.get("data", {}):
            raise ValueError(f"data: {options.run} was fitted in Python and does not say where its histories lie; give --data FILE")
        for name in ("format", *COLUMNS):
            if options[name] not in ("", "auto"):
                raise ValueError(f"{name} is {options[name]!r}, which is of --data FILE: the run's own are read as they were then")
    if options.data:
        like = Path(options.data).suffix == Path(data.data).suffix  # then the run's format and columns serve
        named: dict[str, Any] = {name: options[name] or (getattr(data, name) if like else "") for name in COLUMNS}
        format = data.format if options.format == "auto" and like else options.format
        data = replace(data, data=options.data, format=format, **named)
    elif data.data not in ("", "-") and not Path(data.data).exists():
        raise ValueError(f"{data.data}, the run's own data, is not there; give --data FILE, or go where the run was started")
    return histories(data)


def divided(options: Any, data: DataOptions, config: dict[str, Any]) -> Split:
    """Those histories, divided as in the run. Says so where they are not what the run was given."""
    split = divide(histories_of(options, data, config), data)
    given = config.get("data", {}).get("fingerprint")  # older runs do not tell
    if given != split.fingerprint() and (given or options.data):
        name = "Other data than the run's" if options.data else f"{data.data or data.name} is no longer what the run was given"
        print(f"{name}: what is held out here may have been trained on", file=sys.stderr)
    if not len(split.targets(options.part)[0]):
        raise ValueError(f"part is {options.part!r}, of which the run's split, {data.split!r}, holds nothing out to evaluate on")
    return split


def filters(options: Any) -> bool | None:
    """Whether items of the history are left out, as the flag says; None: as in the run."""
    return None if options.filter_seen == "auto" else bool(options.filter_seen == "yes")
