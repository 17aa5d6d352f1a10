"""`awrsr search`: a search for options, with equal budgets for several models."""

import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from ..config import AWRSRConfig, TrainingOptions
from ..data.prepare import DataOptions, prepare
from ..files import write_json
from ..presets import AUTO, PRESETS, suited
from .shared import UsageError, add_options, as_flags, options_of, say, typed

PATIENCE = 5  # of a trial, unless another is given


def add_flags(to: ArgumentParser) -> None:
    to.usage = "awrsr search --data FILE --out DIR (--minutes M | --trials N) [OPTION ...]"
    to.add_argument("--out", type=str, required=True, help="Folder of the search; the same command goes on where it was stopped.")
    to.add_argument("--minutes", type=float, default=0.0, help="Start no further trial after this time.")
    to.add_argument("--trials", type=int, default=0, help="Number of trials of each model.")
    help = "Presets to search for; auto is what the data suggest. All get as many trials or, with --minutes, as much time."
    to.add_argument("--models", nargs="+", choices=(AUTO, *PRESETS), default=["plain", AUTO], help=help)
    for title, kind in {"data": DataOptions, "model": AWRSRConfig, "training": TrainingOptions}.items():
        add_options(to.add_argument_group(title), kind)


def run(options: Any) -> None:
    """Search for the options that matter: learning rate, dropout, width, batch size and
    loss, for plain attention and for the refinement that suits the data, with the same
    budget for both. Only validation decides; test events are not looked at. Options that
    you set are kept. The best options of each model are printed as commands of awrsr train.

      awrsr search --data beauty.txt --out searches/beauty --minutes 30
      awrsr search --data beauty.txt --out searches/beauty --trials 20 --hidden 64
    """
    from ..search import Search

    if not options.minutes and not options.trials:
        raise UsageError("--minutes or --trials is missing")
    data = DataOptions(**options_of(DataOptions, options))
    if not data.files:
        raise UsageError("--data is missing")
    config, training = AWRSRConfig(**options_of(AWRSRConfig, options)), TrainingOptions(**options_of(TrainingOptions, options))
    known = [each for kind in (AWRSRConfig, TrainingOptions) for each in fields(kind) if each.name in options]
    fixed = [each.name for each in known if options[each.name] != each.default]
    if "patience" not in fixed:
        training = TrainingOptions(**options_of(TrainingOptions, options) | {"patience": PATIENCE})
    split = prepare(data)
    if not len(split.targets("validation")[0]):
        raise ValueError(f"split is {data.split!r}, which holds out no validation events, by which a search decides")
    models = dict.fromkeys(options.models)
    if AUTO in models:
        name, why = suited(split, config, progress=training.progress)
        say(f"{why} Hence --preset {name}.")
        models = dict.fromkeys(name if each == AUTO else each for each in models)
    search = Search(Path(options.out), split, list(models), config, training, fixed)
    end = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    while time.monotonic() < end and (model := search.next_model(options.trials)):
        reached = search.run_trial(model)
        said = "ended early" if reached is None else f"validation NDCG@10 {reached:.4f}"
        say(f"{model}: trial {search.done(model)}, {said}")
    found = search.found()
    if not found:
        raise ValueError("no trial came to an end: give more --minutes")
    write_json(Path(options.out) / "search.json", [each._asdict() for each in found])
    print("\nmodel         trials  minutes  validation NDCG@10")
    for each in found:
        print(f"{each.model:12} {each.trials:7} {each.seconds / 60:8.1f} {each.validation:19.4f}")
    print("\nThe best options of each:\n")
    kept = {name: options[name] for name in fixed}
    own = {name: options[name] for name in DataOptions.__dataclass_fields__ if options[name] != getattr(DataOptions(), name)}
    for each in found:
        print(f"  {typed(['awrsr', 'train'])} {as_flags(own | {'preset': each.model} | kept | each.options)}")
