"""Search for options by optuna: several models with equal budgets, by validation alone. A search that was stopped goes on.

Each model is a study in one journal file; a trial is one training. The model that has had fewest trials, or least time, is next.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from .config import WATCHED, AWRSRConfig, TrainingOptions
from .data.splits import Split
from .presets import preset_options
from .recommender import AWRSR
from .training.run import train

JOURNAL = "search.journal"
STARTUP = 6  # trials of each model that are drawn at random before others guide the draws
SPACE: dict[str, Any] = {  # option -> (lowest, highest) on a logarithmic scale, or (lowest, highest, step), or choices
    "learning_rate": (5e-4, 2e-2),
    "hidden_dropout": (0.0, 0.5, 0.05),
    "attention_dropout": (0.0, 0.3, 0.1),
    "hidden": [32, 64, 128, 256],
    "batch_size": [32, 64, 128, 256],
    "loss": ["sampled_softmax", "cross_entropy"],
}


class Found(NamedTuple):
    """What a search found for a model. seconds: of all its trials. validation: NDCG@10 of the best one, whose options these are."""

    model: str
    trials: int
    seconds: float
    validation: float
    options: dict[str, Any]


class Prune(L.Callback):
    """Ends a trial that is worse than half of the earlier ones were after as many epochs."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_train_epoch_end(self, trainer: L.Trainer, training: Any) -> None:
        last = training.curve[-1]
        self.trial.report(last[WATCHED], int(last["epoch"]))
        if self.trial.should_prune():
            raise optuna.TrialPruned


class Search:
    """A search in a folder.

    Args:
        folder: of the journal; a search that it holds goes on.
        split: histories with validation events.
        models: names of presets.
        config, training: what is not searched for.
        fixed: names of options that are not searched for either.
    """

    def __init__(
        self,
        folder: Path,
        split: Split,
        models: Sequence[str],
        config: AWRSRConfig,
        training: TrainingOptions,
        fixed: Sequence[str] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.split, self.config, self.training = split, config, training
        self.space = {name: values for name, values in SPACE.items() if name not in fixed}
        storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
        about = {"data": split.fingerprint(), "space": {name: list(values) for name, values in self.space.items()}}
        self.studies = {}
        for name in models:
            sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=training.seed)
            pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=3)
            study = optuna.create_study(
                study_name=name, storage=storage, sampler=sampler, pruner=pruner, direction="maximize", load_if_exists=True
            )
            if study.user_attrs.get("about", about) != about:
                raise ValueError(f"{folder} holds a search on other data or for other options: choose another folder")
            study.set_user_attr("about", about)
            for trial in study.get_trials(states=[TrialState.RUNNING]):  # of a search that was killed
                study.tell(trial.number, state=TrialState.FAIL)
            self.studies[name] = study

    def done(self, model: str) -> int:
        """The number of trials that came to an end."""
        return len(self.studies[model].get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED]))

    def seconds(self, model: str) -> float:
        """What trials have taken."""
        return sum(float(trial.user_attrs.get("seconds", 0.0)) for trial in self.studies[model].get_trials())

    def next_model(self, trials: int) -> str | None:
        """The model that has had fewest trials, or, with no number of trials, least time; None if all have had theirs."""
        if not trials:
            return min(self.studies, key=self.seconds)
        model = min(self.studies, key=self.done)
        return model if self.done(model) < trials else None

    def run_trial(self, model: str) -> float | None:
        """Train once with options that the study asks for. Returns validation NDCG@10, or None if the trial was ended early."""
        study = self.studies[model]
        trial = study.ask()
        config, training = self.options(model, self.suggested(trial))
        began = time.monotonic()
        try:
            torch.manual_seed(training.seed)
            found = AWRSR(replace(config, num_items=self.split.histories.num_items))
            record = train(found, self.split, training, callbacks=[Prune(trial)])
        except optuna.TrialPruned:
            trial.set_user_attr("seconds", time.monotonic() - began)
            study.tell(trial, state=TrialState.PRUNED)
            return None
        except (FloatingPointError, ValueError) as error:  # such as a loss that became infinite
            trial.set_user_attr("error", str(error))
            study.tell(trial, state=TrialState.PRUNED)
            return None
        trial.set_user_attr("seconds", time.monotonic() - began)
        study.tell(trial, float(record["best"]))
        return float(record["best"])

    def suggested(self, trial: optuna.Trial) -> dict[str, Any]:
        """The values of a trial."""
        values: dict[str, Any] = {}
        for name, space in self.space.items():
            if isinstance(space, list):
                values[name] = trial.suggest_categorical(name, space)
            else:
                low, high, *step = space
                values[name] = trial.suggest_float(name, low, high, log=not step, step=step[0] if step else None)
        return values

    def options(self, model: str, values: dict[str, Any]) -> tuple[AWRSRConfig, TrainingOptions]:
        """All options of a trial."""
        of_model = {name: value for name, value in values.items() if name in AWRSRConfig.__dataclass_fields__}
        of_training = {name: value for name, value in values.items() if name not in of_model}
        preset = preset_options(model) | {"layers": self.config.layers}
        return replace(self.config, **preset | of_model), replace(self.training, **of_training)

    def found(self) -> list[Found]:
        """What was found so far, the best model first."""
        results = []
        for model, study in self.studies.items():
            if study.get_trials(states=[TrialState.COMPLETE]):
                best = study.best_trial
                results.append(Found(model, self.done(model), self.seconds(model), float(best.value or 0.0), dict(best.params)))
        return sorted(results, key=lambda each: -each.validation)
