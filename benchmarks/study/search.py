"""Equal searches for plain and for refined attention: which settings matter, and what each reaches at its best.

    python benchmarks/search.py --folder data --dataset wikipedia --trials 30
    python benchmarks/search.py --folder data --dataset beauty --models refined --trials 12 --set "--hidden 64 --epochs 20"

A trial is one training with settings that Optuna's tree-structured Parzen estimator proposes; its value is the best NDCG@10 on the
validation events, test events decide nothing. Both models get as many trials, over the same settings; the refined one chooses its
refinement and tables within them, too. Trials are kept in a journal: a search that was stopped goes on. How much a setting decides
is PED-ANOVA's importance (Watanabe et al. 2023): how far its distribution among the best quarter of the trials is from all of them.
"""

import argparse
import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

if __package__ is None:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import optuna  # noqa: E402
from optuna.storages import JournalStorage  # noqa: E402
from optuna.storages.journal import JournalFileBackend  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks.common.arguments import whole  # noqa: E402
from benchmarks.common.report import commit, device_name, versions, write_data  # noqa: E402
from benchmarks.study.plan import reading  # noqa: E402
from benchmarks.study.run import source, train_apart  # noqa: E402

KIND = "search"
MODELS = ("plain", "refined")
SHOWN = 3  # of the best trials of a model


def settings(trial: optuna.Trial, model: str) -> dict[str, Any]:
    """What a trial trains with: settings of both models, then those of the refined one."""
    found: dict[str, Any] = {
        "layers": trial.suggest_int("layers", 1, 2),
        "heads": trial.suggest_categorical("heads", [1, 2, 4]),
        "hidden_dropout": trial.suggest_float("hidden_dropout", 0.0, 0.6, step=0.05),
        "attention_dropout": trial.suggest_float("attention_dropout", 0.0, 0.4, step=0.1),
        "learning_rate": trial.suggest_float("learning_rate", 3e-4, 5e-3, log=True),
        "batch_size": trial.suggest_categorical("batch_size", [32, 64, 128]),
        "temperature": trial.suggest_categorical("temperature", [0.0, 0.05, 0.1]),
        "init": trial.suggest_categorical("init", ["normal", "match", "copy"]),
    }
    if model == "plain":
        return {"refinement": "none"} | found
    found["refinement"] = trial.suggest_categorical("refinement", ["simple", "value", "additive"])
    if found["refinement"] == "additive":
        found["gate"] = trial.suggest_categorical("gate", [0.0, 1.0])
        found["learned_gate"] = True
    found["tables"] = trial.suggest_categorical("tables", ["position", "content"])
    if found["tables"] == "position":
        found["per_head"] = trial.suggest_categorical("per_head", [True, False])
        found["table_init"] = trial.suggest_categorical("table_init", ["normal", "shifted"])
    found["table_std"] = trial.suggest_float("table_std", 0.02, 2.0, log=True)
    found["rank"] = trial.suggest_categorical("rank", [8, 32, 64])
    found["refine_scale"] = trial.suggest_categorical("refine_scale", [0.0, 1.0, 3.0])
    found["correlation_norm"] = trial.suggest_categorical("correlation_norm", [False, True])
    found["table_rate"] = trial.suggest_categorical("table_rate", [0.3, 1.0, 3.0])
    return found


def as_flags(found: dict[str, Any]) -> list[str]:
    """Settings as options of `awrsr train`."""
    flags = []
    for name, value in found.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", f"{value:.6g}" if isinstance(value, float) else str(value)]
    return flags


def objective(trial: optuna.Trial, model: str, options: argparse.Namespace) -> float:
    """Best validation NDCG@10 of one training."""
    out = options.runs / f"{options.dataset}_{model}_{trial.number}"
    data = [] if options.dataset == "synthetic" else ["--data", str(source(options.dataset, options.folder))]
    flags = [*reading(options.dataset), *as_flags(settings(trial, model)), *shlex.split(options.set), "--seed", str(options.seed)]
    trial.set_user_attr("options", shlex.join(flags))
    out.mkdir(parents=True, exist_ok=True)
    arguments = [*data, *flags, "--threads", "1", "--no-progress", "--out", str(out)]
    status = train_apart(arguments, out / "output.txt")
    if status:
        raise RuntimeError(f"awrsr train {shlex.join(arguments)} ended with status {status}; see {out / 'output.txt'}")
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    trial.set_user_attr("test", metrics["test"]["NDCG@10"])
    trial.set_user_attr("cpu_seconds", metrics["train_cpu_seconds"])
    return float(metrics["validation"]["NDCG@10"])


def study_of(model: str, options: argparse.Namespace) -> optuna.Study:
    """The search of a model, with whatever trials its journal holds."""
    options.out.mkdir(parents=True, exist_ok=True)
    journal = JournalFileBackend(str(options.out / "journal.log"))
    name = f"{options.dataset} {model} {options.set}"
    sampler = optuna.samplers.TPESampler(
        seed=options.seed, n_startup_trials=max(5, options.trials // 3), multivariate=True, group=True
    )
    storage = JournalStorage(journal)
    return optuna.create_study(storage=storage, study_name=name, sampler=sampler, direction="maximize", load_if_exists=True)


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials with a value, the best first."""
    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    return sorted(done, key=lambda trial: -(trial.value or 0))


def rows_of(dataset: str, model: str, study: optuna.Study) -> list[dict[str, Any]]:
    """Every trial as a row, the best first."""
    found = []
    for place, trial in enumerate(finished(study), 1):
        row = {"dataset": dataset, "model": model, "place": place, "trial": trial.number, "validation NDCG@10": trial.value}
        found.append(row | trial.user_attrs | {"settings": trial.params})
    return found


def importances(study: optuna.Study) -> dict[str, float]:
    """How much each setting decides, shares that sum to 1; empty where trials are too few to tell."""
    if len(finished(study)) < 8:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
    try:
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (RuntimeError, ValueError):
        return {}
    return {name: round(float(value), 4) for name, value in found.items()}


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
    for name, found in results["importances"].items():
        lines.append(f"| {' | '.join(name.split('/'))} | {', '.join(f'{k} {v:.2f}' for k, v in found.items())} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder with beauty.txt, lastfm.txt, wikipedia.txt; default: they are fetched")
    parser.add_argument(
        "--dataset", choices=("beauty", "lastfm", "wikipedia", "synthetic"), default="wikipedia", help="default %(default)s"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default both, in turn")
    parser.add_argument("--trials", type=whole(1), default=30, help="of each model, those before included; default %(default)s")
    parser.add_argument("--set", default="", help="options of awrsr train that every trial has")
    parser.add_argument("--seed", type=whole(0), default=0, help="of trainings and of the search; default %(default)s")
    parser.add_argument("--runs", type=Path, default=Path("bench-out/search-runs"), help="folder of the runs; default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("bench-out/search"), help="journal and results; default %(default)s")
    options = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    studies = {model: study_of(model, options) for model in options.models}
    total = options.trials * len(studies)
    with tqdm(
        total=total, initial=sum(min(len(finished(s)), options.trials) for s in studies.values()), unit="trial", disable=None
    ) as bar:
        for turn in range(options.trials):
            for model, study in studies.items():
                if len(finished(study)) <= turn:
                    study.optimize(partial(objective, model=model, options=options), n_trials=1)
                    bar.update()
                    bar.set_description(f"{model} best {finished(study)[0].value if finished(study) else 0:.4f}")
    shown = shlex.join(["python", "benchmarks/search.py", *(arguments if arguments is not None else sys.argv[1:])])
    results: dict[str, Any] = {
        "kind": KIND,
        "device": device_name("cpu").rpartition(",")[0] + ", 1 thread(s)",
        "versions": versions("optuna"),
        "commit": commit(),
        "command": shown,
    }
    results["importances"] = {f"{options.dataset}/{model}": importances(study) for model, study in studies.items()}
    results["rows"] = [row for model, study in studies.items() for row in rows_of(options.dataset, model, study)]
    write_data(options.out, results, markdown(results))
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
