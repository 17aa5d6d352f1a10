"""`AWRSR`, the public model: a network and the ids of its items. It fits, recommends, explains, saves and loads.

B users of a batch, N items, S features of what is multiplied for scores, H heads.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import polars as pl
import torch
from torch import Tensor, nn

from .answers import Answers
from .config import AWRSRConfig, TrainingOptions, check_names
from .data.ids import warn
from .data.splits import Split, split
from .data.tables import histories_of
from .habits import meant, names_arguments
from .lock import locked
from .model_file import IDS, TRAINED, read_model
from .models.network import AWRSRNetwork, in_evaluation
from .presets import AUTO, preset_options, suited, undecided
from .run_folder import save_model

if TYPE_CHECKING:
    from .evaluation.report import Metrics

METHODS = ("fit", "fit_more", "evaluate", "recommend", "similar_items", "user_vectors", "item_vectors", "attention_maps", "save")
Model = TypeVar("Model", bound="AWRSR")


class AWRSR(Answers, nn.Module):
    """Sequential recommender whose attention weights attend to one another.

    It is a `torch.nn.Module` around a network, `model.network`, and a call computes what the network does. The attributes of the
    network (`items`, `blocks`, `forward_padded`, `scores_padded`, ...) are also attributes of the model, and `state_dict` has the
    network's names of weights.

    Args:
        config: what the network is made of; by default `AWRSRConfig()`.
        preset: name of a bundle of options (`awrsr.presets.PRESETS`), such as "lagged", which replace those of `config`. "auto":
            the first `fit` chooses one that suits the histories (`awrsr.presets.suited`); `preset` then names it, and
            `preset_reason` says why. The default, unless you give `config`, num_items or an option that presets set, layers and
            refinement "additive" apart.
        options: single options of it by name, such as refinement="additive" or layers=1.
    """

    preset: str | None = None
    preset_reason: str = ""  # why the data chose the preset
    curve: Sequence[dict[str, float]] = ()  # of the last `fit`

    def __init__(self, config: AWRSRConfig | None = None, *, preset: str | None = None, **options: Any) -> None:
        super().__init__()
        if config is not None and not isinstance(config, AWRSRConfig):
            by_name = {str: f"AWRSR(refinement={config!r})", int: f"AWRSR(num_items={config!r})", dict: "AWRSR(**options)"}
            raise TypeError(_misplaced("config", config, "AWRSRConfig", by_name, "AWRSR(layers=1)"))
        check_names("AWRSR", AWRSRConfig, options, "preset")
        named = {} if preset in (None, AUTO) else preset_options(preset)
        self.network = AWRSRNetwork(replace(config or AWRSRConfig(), **named | options))
        open_to_data = config is None and not self.config.num_items and undecided(asdict(self.config), options)
        if preset == AUTO and not open_to_data:
            raise ValueError("preset is 'auto', with which config, num_items and options that presets set must not be given")
        self.preset = preset or (AUTO if open_to_data else None)
        self.sections: dict[str, Any] = {}  # how it was trained, and on what: saved with it
        self.register_load_state_dict_pre_hook(_to_network)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "network":  # while a copy or a pickle is being created
                raise
        try:
            return getattr(self.network, name)
        except AttributeError:
            if method := meant(name, METHODS):
                raise AttributeError(f"AWRSR has no attribute {name}: did you mean {method[0]}?") from None
            raise

    def __repr__(self) -> str:
        c = self.config
        preset = f", preset {self.preset}" if self.preset else ""
        kind = f"{c.backbone}, refinement {c.refinement}{preset}, {c.layers} x {c.heads} heads, {c.hidden} wide"
        return f"AWRSR({kind}, {c.num_items:,} items)" if c.num_items else f"AWRSR({kind}, not fitted)"

    def forward(self, items: Tensor, cu_seqlens: Tensor, max_seqlen: int, last: bool = False) -> Tensor:
        """Packed histories -> (T, S): the product of row t and `item_table` scores what follows event t. last: only the rows of the
        last event of each history, (B, S)."""
        return self.network(items, cu_seqlens, max_seqlen, last)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return self.network.state_dict(*args, **options)

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self.network.named_parameters(*args, **options)

    def fit(
        self: Model,
        histories: Any,
        options: TrainingOptions | None = None,
        *,
        validation: Any = None,
        user: str | None = None,
        item: str | None = None,
        time: str | None = None,
        callbacks: Sequence[Any] = (),
        logger: Any = None,
        out: str | Path | None = None,
        **changes: Any,
    ) -> Model:
        """Train, keep the weights of the epoch with the best validation NDCG@10, and return self in evaluation mode.

        Args:
            histories: a table of events, of pandas, polars, PyArrow or another library that narwhals knows, one row per event;
                `Histories`; a mapping from users to items, a pandas Series of lists whose index is the users, or a list of lists of
                item ids, in time order. The last event of each history is held out for test, and the one before it for validation.
                Pass a `Split` to divide them differently; `split(histories, "none")` holds nothing out, and trains on everything
                for all epochs.
            options: how to train; by default `TrainingOptions()`.
            validation: events that follow those of `histories`, in the same forms; then nothing of `histories` is held out.
            user, item, time: names of a table's columns, by default the usual ones ("user_id", "timestamp", ...). time "none": rows
                are in order of time.
            callbacks: callbacks of Lightning.
            logger: a logger of Lightning, which gets loss and NDCG@10 of each epoch; or a name, as in `TrainingOptions`.
            out: run folder, whose training resumes if it holds an unfinished run; without it, nothing is kept on disk.
            changes: single training options by name, such as epochs=20 or loss="bce".

        Raises:
            ValueError: an option is out of its range; `out` holds another run; a model fitted before does not know an item; a
                table has no such column.
            TypeError: histories are of no such form.
            BlockingIOError: another process writes into `out`.
            FloatingPointError: the loss became infinite or NaN.
        """
        if options is not None and not isinstance(options, TrainingOptions):
            by_name = {int: f"fit(histories, epochs={options!r})", dict: "fit(histories, **options)"}
            raise TypeError(_misplaced("options", options, "TrainingOptions", by_name, "fit(histories, epochs=20)"))
        if isinstance(logger, str):
            changes, logger = changes | {"logger": logger}, None
        check_names("fit", TrainingOptions, changes, "out", "validation", "user", "item", "time", "callbacks")
        from .training.run import report, train  # Lightning takes seconds to import, and only training needs it

        columns: dict[str, Any] = {"user": user, "item": item, "time": time}
        if isinstance(histories, Split):
            parts = histories
            if validation is not None:
                raise ValueError("validation must not be given with a Split, which has its own; Split.of_parts joins parts")
        elif validation is not None:
            training, names = histories_of(histories, **columns)
            parts = replace(Split.of_parts(training, histories_of(validation, names, **columns)[0]), names=names)
        else:
            parts = split(histories, **columns)
        self.names = parts.names or self.names
        settings = replace(options or TrainingOptions(), **changes)
        if not self.config.num_items:
            own: dict[str, Any] = {}
            if self.preset == AUTO:
                self.preset, self.preset_reason = suited(parts, self.config, progress=settings.progress)
                own = preset_options(self.preset) | {"layers": self.config.layers}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed)
                self.network = AWRSRNetwork(replace(self.config, **own, num_items=parts.histories.num_items))
        with nullcontext() if out is None else locked(out):
            record = train(self, parts, settings, out, callbacks=callbacks, logger=logger)
            if out is not None and record:
                report(self, parts, settings, record, Path(out))
        self.fitted, self.curve = parts, record.get("curve", [])
        return self.eval()

    def fit_more(
        self: Model,
        events: Any,
        *,
        histories: Any = None,
        replay: float = 1.0,
        user: str | None = None,
        item: str | None = None,
        time: str | None = None,
        callbacks: Sequence[Any] = (),
        logger: Any = None,
        **changes: Any,
    ) -> Model:
        """Train further on new events, at a small share of what a new training costs, and return self in evaluation mode.

        Users and items may be new; the row of a new item begins as the mean of the rows of what stands beside it. Training goes
        over the histories that have new events and over as many others, so that what was learned is not forgotten.

        Args:
            events: the new ones, in the forms of `fit`, which come after all earlier ones of their users.
            histories: all earlier events; by default those that the last `fit` or `fit_more` was given. Nothing is held out.
            replay: how many other histories are trained on, as a multiple of those with new events.
            user, item, time: names of a table's columns, as for `fit`.
            callbacks, logger: of Lightning, as for `fit`.
            changes: training options; by default those of `fit`, with 2 epochs, .3 times the learning rate and no average.

        Raises:
            ValueError: the model was not fitted, or loaded and `histories` are not given; an option is out of its range.
        """
        own = ("histories", "replay", "user", "item", "time", "callbacks", "logger")
        check_names("fit_more", TrainingOptions, changes, *own)
        from .training.more import train_more

        self.known_items()
        columns: dict[str, Any] = {"user": user, "item": item, "time": time}
        given = self._fitted("histories").histories if histories is None else histories_of(histories, self.names, **columns)[0]
        new, names = histories_of(events, self.names, **columns)
        if not replay >= 0:
            raise ValueError(f"replay is {replay}, must be 0 or more")
        self.fitted = replace(train_more(self, given, new, replay, changes, callbacks=callbacks, logger=logger), names=self.names)
        self.names = self.names or names
        return self.eval()

    @property
    def history(self) -> pl.DataFrame:
        """A row per epoch of the last `fit`: epoch, loss and, if events were held out for it, validation NDCG@10."""
        return pl.DataFrame(self.curve)

    @names_arguments
    def evaluate(
        self,
        test: Any = None,
        *,
        histories: Any = None,
        part: str = "test",
        metrics: Sequence[str] = (),
        per: str = "event",
        sampled_negatives: int = 0,
        filter_seen: bool | None = None,
        batch_size: int = 1024,
        user: str | None = None,
        item: str | None = None,
        time: str | None = None,
    ) -> "Metrics":
        """Rank the whole catalogue for held-out events, and average what is asked for. Ties count against the model.

        Args:
            test: events to predict, in the forms of `fit`, each from all events of its user before it: those of `histories`, then
                earlier ones of `test`. Or a `Split`. Without it, the events that the last `fit` held out.
            histories: what users did before `test`; by default all events that the last `fit` was given.
            part: of a `Split` or of the last `fit`: "test" or "validation".
            metrics: names with cut-offs, by default HR and NDCG at 5, 10 and 20, and MRR; per user those of
                `awrsr.evaluation.lists.list_metric` at 10, which says what each is.
            per: "event": each event is predicted from all before it. "user": each user gets one list, predicted from all events
                before the part, and what counts are all different items that the user took in it.
            sampled_negatives: rank each event among so many random items instead of the catalogue. This is not what users would
                get and may order models wrongly (Krichene and Rendle, KDD 2020): a warning says so, as do the metrics' names.
            filter_seen: leave out the items of the history; None does what training did.
            batch_size: targets ranked at a time.
            user, item, time: names of a table's columns, as for `fit`.

        Returns:
            A mapping from metrics to values, with those of simple baselines: the most popular items, a Markov chain and what
            followed last time. It prints as a table.

        Raises:
            ValueError: there is nothing to predict, or from; the model knows no item of it.
        """
        from .evaluation.report import event_metrics, user_metrics

        parts, columns = test, {"user": user, "item": item, "time": time}
        if test is None:
            parts = self._fitted("test")
        elif not isinstance(test, Split):
            before = self._fitted("histories").histories if histories is None else histories_of(histories, self.names, **columns)[0]
            parts, part = Split.of_parts(before, None, histories_of(test, self.names, **columns)[0]), "test"
        parts, unknown = parts.numbered_as(self.index())
        if unknown:
            warn(f"{unknown:,} events are left out, since the model does not know their items")
        filter_seen = self.filter_seen if filter_seen is None else filter_seen
        if not len(parts.targets(part)[0]):
            raise ValueError(f"{part} holds no event that the model knows and that follows another of its user")
        if per == "user" and not sampled_negatives:
            return user_metrics(self, parts, part, metrics, filter_seen, batch_size)
        if per != "event":
            raise ValueError(f"per is {per!r}, must be event or, without sampled_negatives, user")
        return event_metrics(self, parts, part, metrics, filter_seen, batch_size, sampled_negatives)

    @torch.inference_mode()
    def attention_maps(self, history: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
        """(P, M) for each block: first-order weights, and the refined weights that multiply the values, (H, n, n) each.

        Args:
            history: n item ids in time order; only the last max_len are used.

        Raises:
            ValueError: the model does not know an id; the history is empty.
        """
        items = torch.as_tensor(self.places(history)[-self.config.max_len :], device=self.items.weight.device)[None]
        maps = in_evaluation(self.network).weights_padded(items, torch.tensor([items.shape[1]], device=items.device))
        return [(p[0], m[0]) for p, m in maps]

    def save(self, folder: str | Path, **sections: Any) -> None:
        """Write model.safetensors, which holds the weights, the ids of the items and the configuration, and appears when it is
        complete; and config.json, a copy of the configuration to read.

        Args:
            folder: created if it does not exist.
            sections: further sections of the configuration.

        Raises:
            ValueError: a file of one of these names is there that awrsr did not write; two items have the same id.
            BlockingIOError: another process, such as a training, writes into the folder for more than ten seconds.
        """
        with locked(folder, patience=10):
            save_model(folder, self.network, self.ids(), self.filter_seen, self.trained, **self.sections | sections)

    @classmethod
    def load(cls: type[Model], folder: str | Path, **changes: Any) -> Model:
        """Load a model that `save` or `fit` wrote, in evaluation mode, without unpickling.

        Args:
            folder: a run folder.
            changes: options of the configuration to change, such as backend="torch".

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: it is damaged, or the weights do not fit the configuration.
        """
        with torch.random.fork_rng(devices=[]):  # the random weights are replaced
            model = cls()
        saved = read_model(folder, **changes)
        model.network, model.item_ids, model.filter_seen = saved.network, saved.item_ids, saved.filter_seen
        model.trained, model.sections, model.preset = saved.trained, saved.sections, None
        return model.eval()


def _misplaced(name: str, value: Any, kind: str, by_name: dict[type, str], otherwise: str) -> str:
    """What to write instead of a value that is no object of options. by_name: type of the value -> the call with names."""
    was = repr(value) if isinstance(value, str | int) else f"of type {type(value).__name__}"
    return f"{name} is {was}, must be {kind}; options go by name: {by_name.get(type(value), otherwise)}"


def _to_network(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading, prefix the names in `state_dict`, which are those of the network, with its name in this module. What the file
    of a model says of its items is no weights."""
    for name in (IDS, TRAINED):
        state.pop(prefix + name, None)
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}network.{name.removeprefix(prefix)}"] = state.pop(name)
