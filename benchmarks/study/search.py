"""Equal searches for plain and for refined attention: which settings matter, and how good each model gets.

    python benchmarks/search.py --folder data --dataset wikipedia --trials 30
    python benchmarks/search.py --folder data --dataset beauty --models refined --trials 12 --set "--hidden 64 --epochs 20"

A trial is one training with settings that Optuna's tree-structured Parzen estimator proposes; its value is the best NDCG@10 on the
validation events, test events decide nothing. Both models get equally many trials over the same settings; within them, the refined
one also chooses its refinement and tables. Trials are kept in a journal: rerun the command to resume a search. How much a setting
decides is PED-ANOVA's importance (Watanabe et al. 2023): how far its distribution among the best quarter of the trials is from all.
"""

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from tqdm import tqdm

from benchmarks.common.arguments import whole
from benchmarks.common.report import commit, write_data
from benchmarks.study.plan import BASE, reading
from benchmarks.study.run import machine, source, trained

KIND = "search"
MODELS = ("plain", "refined")
SHOWN = 3  # of the best trials of a model


def settings(trial: optuna.Trial, model: str) -> dict[str, Any]:
    """What a trial trains with: settings of both models, then those of the refined one."""
    choose = trial.suggest_categorical
    both: dict[str, Any] = {
        "layers": trial.suggest_int("layers", 1, 2),
        "heads": choose("heads", [1, 2, 4]),
        "hidden_dropout": trial.suggest_float("hidden_dropout", 0.0, 0.6, step=0.05),
        "attention_dropout": trial.suggest_float("attention_dropout", 0.0, 0.4, step=0.1),
        "learning_rate": trial.suggest_float("learning_rate", 3e-4, 5e-3, log=True),
        "batch_size": choose("batch_size", [32, 64, 128]),
        "temperature": choose("temperature", [0.0, 0.05, 0.1]),
        "init": choose("init", ["normal", "match", "copy"]),
    }
    if model == "plain":
        return {"refinement": "none"} | both
    refined: dict[str, Any] = {"refinement": choose("refinement", ["simple", "value", "additive"])}
    if refined["refinement"] == "additive":
        refined |= {"gate": choose("gate", [0.0, 1.0]), "learned_gate": True}
    refined["tables"] = choose("tables", ["position", "content"])
    if refined["tables"] == "position":
        refined |= {"per_head": choose("per_head", [True, False]), "table_init": choose("table_init", ["normal", "shifted"])}
    refined["table_std"] = trial.suggest_float("table_std", 0.02, 2.0, log=True)
    return both | refined | {"rank": choose("rank", [8, 32, 64]), "refine_scale": choose("refine_scale", [0.0, 1.0, 3.0])}


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Settings as options of `awrsr train`."""
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", f"{value:.6g}" if isinstance(value, float) else str(value)]
    return flags


def objective(trial: optuna.Trial, model: str, options: argparse.Namespace) -> float:
    """Best validation NDCG@10 of one training."""
    flags = [*reading(options.dataset), *as_flags(settings(trial, model)), *shlex.split(options.set), "--seed", str(options.seed)]
    trial.set_user_attr("options", shlex.join(flags))
    out = options.runs / f"{options.dataset}_{model}_{trial.number}"
    metrics = trained(flags, source(options.dataset, options.folder), out)
    trial.set_user_attr("test", metrics["test"]["NDCG@10"])
    trial.set_user_attr("cpu_seconds", metrics["train_cpu_seconds"])
    return float(metrics["validation"]["NDCG@10"])


def study_of(model: str, options: argparse.Namespace) -> optuna.Study:
    """The search of a model, with the trials that its journal holds."""
    options.out.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(options.out / "journal.log")))
    startup = max(5, options.trials // 3)
    sampler = optuna.samplers.TPESampler(seed=options.seed, n_startup_trials=startup, multivariate=True, group=True)
    name = f"{options.dataset} {model} {options.set}"
    return optuna.create_study(storage=storage, study_name=name, sampler=sampler, direction="maximize", load_if_exists=True)


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials with a value, the best first."""
    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    return sorted(done, key=lambda trial: -(trial.value or 0))


def rows_of(dataset: str, model: str, study: optuna.Study) -> list[dict[str, Any]]:
    """Every trial as a row, the best first."""
    return [
        {"dataset": dataset, "model": model, "place": place, "trial": trial.number, "validation NDCG@10": trial.value}
        | trial.user_attrs
        | {"settings": trial.params}
        for place, trial in enumerate(finished(study), 1)
    ]


def importances(study: optuna.Study) -> dict[str, float]:
    """How much each setting decides, shares that sum to 1; empty where trials are too few to tell."""
    if len(finished(study)) < 8:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
    try:
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (RuntimeError, ValueError):
        return {}
    return {name: round(float(value), 4) for name, value in shares.items()}


def markdown(results: dict[str, Any]) -> str:
    """The best trials of each search, and what decided."""
    lines = [f"Searches of equal length; {results['device']}, commit {results['commit'][:12]}. Test figures decided nothing.", ""]
    lines += ["| data | model | trials | place | validation NDCG@10 | test NDCG@10 | settings |", "|--|--|--|--|--|--|--|"]
    count = {(row["dataset"], row["model"]): row["place"] for row in results["rows"]}
    for row in results["rows"]:
        if row["place"] <= SHOWN:
            chosen = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row["settings"].items())
            cells = [row["dataset"], row["model"], count[row["dataset"], row["model"]], row["place"]]
            cells += [f"{row['validation NDCG@10']:.4f}", f"{row['test']:.4f}", chosen]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "What decided, by PED-ANOVA's importance:", "", "| data | model | settings |", "|--|--|--|"]
    for name, shares in results["importances"].items():
        lines.append(f"| {' | '.join(name.split('/'))} | {', '.join(f'{k} {v:.2f}' for k, v in shares.items())} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, help="Folder with beauty.txt, lastfm.txt and wikipedia.txt; without one they are downloaded.")
    add("--dataset", choices=sorted(BASE), default="wikipedia", help="Default: %(default)s.")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="Default: both, in turn.")
    add("--trials", type=whole(1), default=30, help="Trials of each model, including earlier ones; default %(default)s.")
    add("--set", default="", help="Options of awrsr train for every trial.")
    add("--seed", type=whole(0), default=0, help="Seed of trainings and of the search; default %(default)s.")
    add("--runs", type=Path, default=Path("bench-out/search-runs"), help="Folder of the runs; default %(default)s.")
    add("--out", type=Path, default=Path("bench-out/search"), help="Folder of the journal and the results; default %(default)s.")
    options = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    studies = {model: study_of(model, options) for model in options.models}
    done = sum(min(len(finished(study)), options.trials) for study in studies.values())
    with tqdm(total=options.trials * len(studies), initial=done, unit="trial", disable=None) as bar:
        for turn in range(options.trials):
            for model, study in studies.items():
                if len(finished(study)) <= turn:
                    study.optimize(partial(objective, model=model, options=options), n_trials=1)
                    bar.update()
                    bar.set_description(f"{model} best {study.best_value:.4f}")
    command = shlex.join(["python", "benchmarks/search.py", *(arguments if arguments is not None else sys.argv[1:])])
    results: dict[str, Any] = {"kind": KIND, **machine("optuna"), "commit": commit(), "command": command}
    results["importances"] = {f"{options.dataset}/{model}": importances(study) for model, study in studies.items()}
    results["rows"] = [row for model, study in studies.items() for row in rows_of(options.dataset, model, study)]
    write_data(options.out, results, markdown(results))
    print(markdown(results))
    return 0
