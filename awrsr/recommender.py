"""`AWRSR`, the public model: a network and the ids of its items. It fits, recommends, explains, saves and loads.

B users of a batch, N items, S features of what is multiplied for scores, H heads.
"""

import operator
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from .config import AWRSRConfig, TrainingOptions, check_names
from .data.containers import UserLists
from .data.histories import Histories, Split, spans, split
from .data.ids import Index, as_column, id_series, number_ids, warn
from .habits import meant, names_arguments
from .lock import locked
from .model_file import IDS, TRAINED, read_model
from .models.distance import rows_of_columns
from .models.network import AWRSRNetwork, in_evaluation
from .presets import AUTO, preset_options, suited, undecided
from .run_folder import save_model

METHODS = ("fit", "recommend", "similar_items", "attention_maps", "save")
SCORE_BLOCK = 1 << 24  # scores held at a time
Model = TypeVar("Model", bound="AWRSR")
UserHistories = Histories | UserLists


class AWRSR(nn.Module):
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

    network: AWRSRNetwork
    config: AWRSRConfig
    preset: str | None = None
    preset_reason: str = ""  # why the data chose the preset
    item_ids: np.ndarray | None = None
    trained: np.ndarray | None = None  # (N,) bool: items that occurred in training; None if that is not known
    _index: Index | None = None
    filter_seen: bool = True  # leave items of the history out of recommendations; training sets it from the data

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
        histories: UserHistories | Split,
        options: TrainingOptions | None = None,
        *,
        out: str | Path | None = None,
        **changes: Any,
    ) -> Model:
        """Train, keep the weights of the epoch with the best validation NDCG@10, and return self in evaluation mode.

        Args:
            histories: `Histories`, a mapping from users to items, a pandas Series of lists whose index is the users, or a list of
                lists of item ids, in time order. The last event of each history is held out for test, and the one before it for
                validation. Pass a `Split` to divide them differently;
                `split(histories, "none")` holds nothing out, and trains on everything for all epochs.
            options: how to train; by default `TrainingOptions()`.
            out: run folder, whose training resumes if it holds an unfinished run; without it, nothing is kept on disk.
            changes: single training options by name, such as epochs=20 or loss="bce".

        Raises:
            ValueError: an option is out of its range; `out` holds another run; a model fitted before does not know an item.
            BlockingIOError: another process writes into `out`.
            FloatingPointError: the loss became infinite or NaN.
        """
        if options is not None and not isinstance(options, TrainingOptions):
            by_name = {int: f"fit(histories, epochs={options!r})", dict: "fit(histories, **options)"}
            raise TypeError(_misplaced("options", options, "TrainingOptions", by_name, "fit(histories, epochs=20)"))
        check_names("fit", TrainingOptions, changes, "out")
        from .training.run import report, train  # Lightning takes seconds to import, and only training needs it

        parts = histories if isinstance(histories, Split) else split(Histories.from_lists(histories))
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
            record = train(self, parts, settings, out)
            if out is not None and record:
                report(self, parts, settings, record, Path(out))
        return self.eval()

    @names_arguments
    def recommend(
        self,
        histories: UserHistories,
        k: int = 10,
        *,
        filter_seen: bool | None = None,
        filter_untrained: bool = True,
        batch_size: int = 1024,
    ) -> pl.DataFrame:
        """The k best next items for each history. Users may be new to the model.

        Args:
            histories: as for `fit`. Items that the model does not know are left out with a `DataWarning`; a user without any known
                item gets no row.
            k: at least 1; where there are fewer items to recommend, all of them are.
            filter_seen: leave out the items of the history, so that a user who has seen almost all items may get fewer than k. None
                does what training did, where "auto" keeps these items if users take items again.
            filter_untrained: leave out items that occur in no event that trained the model (`untrained_items`), whose scores say
                little: held-out events alone hold them.
            batch_size: users scored at a time; fewer with a large catalogue.

        Returns:
            A row per recommendation, with users in the order given: user, item, rank (1 is the best) and score (with backbone
            stosa, the negative squared distance).

        Raises:
            ValueError: k is below 1; the model was not fitted.
        """
        given = Histories.from_lists(histories)
        known, unknown = given.numbered_as(self.index())
        if unknown:
            missing = given.item_ids[self.index().find(given.item_ids) < 0]
            examples = ", ".join(map(repr, missing[:3].tolist())) + ", ..." * (len(missing) > 3)
            alone = np.count_nonzero((known.lengths == 0) & (given.lengths > 0))
            warn(
                f"{unknown:,} of {len(given.items):,} events are left out, since the model does not know their items ({examples})"
                + (f"; {alone:,} of {given.num_users:,} users have no others and get no recommendation" if alone else "")
            )
        tables = self.top_items(known, k, filter_seen=filter_seen, filter_untrained=filter_untrained, batch_size=batch_size)
        table, *more = tables
        for each in more:
            table.vstack(each, in_place=True)
        return pl.DataFrame([column.rechunk() for column in table])  # for table.rechunk, or pl.concat, a forked process would wait

    @torch.inference_mode()
    def top_items(
        self,
        histories: Histories,
        k: int,
        *,
        filter_seen: bool | None = None,
        filter_untrained: bool = True,
        batch_size: int = 1024,
    ) -> Iterator[pl.DataFrame]:
        """Like `recommend`, for histories whose items are numbered as in this model. Yields tables of bounded size."""
        count = self.known_items()
        k = min(at_least_one(k), count)
        model = in_evaluation(self)
        step = max(1, min(batch_size, SCORE_BLOCK // count))
        users, item_table, ids = np.flatnonzero(histories.lengths), self.item_table(), self.ids()

        def table(user: np.ndarray, item: np.ndarray, rank: np.ndarray, score: np.ndarray) -> pl.DataFrame:
            return pl.DataFrame(
                {"user": as_column(histories.user_ids[user]), "item": as_column(ids[item]), "rank": rank, "score": score}
            )

        left_out = torch.from_numpy(self.untrained()).to(item_table.device) if filter_untrained else None
        nobody = np.empty(0, dtype=np.int64)
        yield table(nobody, nobody, nobody, item_table.new_empty(0).cpu().numpy())
        for first in range(0, len(users), step):
            chosen = users[first : first + step]
            scores = model.scores(histories, chosen, item_table)
            if self.filter_seen if filter_seen is None else filter_seen:
                events, _ = spans(histories.offsets[chosen], histories.lengths[chosen])
                row = np.repeat(np.arange(len(chosen)), histories.lengths[chosen])
                scores[torch.from_numpy(row), torch.from_numpy(histories.items[events])] = -torch.inf
            if left_out is not None and len(left_out):
                scores.index_fill_(1, left_out, -torch.inf)
            score, item = (x.cpu().numpy() for x in scores.topk(k))
            row, column = np.nonzero(score > -np.inf)
            yield table(chosen[row], item[row, column], column + 1, score[row, column])

    def scores(self, histories: Histories, users: np.ndarray, table: Tensor | None = None) -> Tensor:
        """(B, N) scores of every item as the next one of these users. Their histories must not be empty. table: `item_table`."""
        length = np.minimum(histories.lengths[users], self.config.max_len)
        events, cu_seqlens = spans(histories.offsets[users + 1] - length, length)
        device = self.items.weight.device
        ends = torch.from_numpy(cu_seqlens).to(device)
        states = self(torch.from_numpy(histories.items[events]).to(device), ends, int(length.max(initial=0)), last=True)
        return states @ (self.item_table() if table is None else table).T

    @names_arguments
    @torch.inference_mode()
    def similar_items(self, items: Sequence[Any], k: int = 10) -> pl.DataFrame:
        """The k items most similar to each given item, of those that occurred in training.

        Args:
            items: item ids.
            k: at least 1; N - 1 if it is more.

        Returns:
            A row per pair: item, similar, rank (1 = most similar), score: the cosine of their embeddings; for backbone stosa, the
            negative squared distance.

        Raises:
            ValueError: the model does not know an id; k is below 1.
        """
        count = self.known_items()
        k = min(at_least_one(k), count - 1)
        places = self.places(items)
        table = self.item_table()
        if not self.by_distance:
            table = nn.functional.normalize(table, dim=1)
        best, left_out = [], torch.from_numpy(self.untrained()).to(table.device)
        for block in torch.from_numpy(places).to(table.device).split(max(1, SCORE_BLOCK // count)):
            scores = (rows_of_columns(table[block]) if self.by_distance else table[block]) @ table.T
            best.append(scores.index_fill_(1, left_out, -torch.inf).scatter_(1, block[:, None], -torch.inf).topk(k))
        score, similar = (torch.cat(parts).cpu().numpy() for parts in zip(*best, strict=True))
        row, column = np.nonzero(score > -np.inf)
        ids = self.ids()
        columns = {"item": as_column(ids[places[row]]), "similar": as_column(ids[similar[row, column]])}
        return pl.DataFrame(columns | {"rank": column + 1, "score": score[row, column]})

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

    def known_items(self) -> int:
        """N. Raises ValueError if the model has no items yet."""
        if not self.config.num_items:
            raise ValueError("this model knows no items yet: fit or load it first")
        return self.config.num_items

    def ids(self) -> np.ndarray:
        """(N,) ids of the items, by their row in the table; the numbers of the rows if there are no ids."""
        return np.arange(self.config.num_items) if self.item_ids is None else self.item_ids

    def untrained(self) -> np.ndarray:
        """Rows of the items that occurred in no event that trained the model; none if that is not known."""
        return np.flatnonzero(~self.trained) if self.trained is not None else np.empty(0, dtype=np.int64)

    def untrained_items(self) -> list[Any]:
        """Ids of the items that `recommend` leaves out, because they occurred in no event that trained the model."""
        return self.ids()[self.untrained()].tolist()

    def index(self) -> Index:
        """Finds items of the catalogue by their ids. It is built when it is first needed."""
        known = self._index
        if known is None or (
            known.ids is not self.item_ids if self.item_ids is not None else len(known.ids) != self.config.num_items
        ):
            known = self._index = Index(self.ids())
        return known

    def places(self, items: Sequence[Any]) -> np.ndarray:
        """Rows of item ids in the table. Raises ValueError naming an id that is not there."""
        ids, place = number_ids(id_series("item", list(items)), lambda _: "item id", "keep")
        places = self.index().find(ids)[place]
        if not len(places) or (places < 0).any():
            unknown = "items is empty" if not len(places) else f"items hold {list(items)[int((places < 0).argmax())]!r}"
            raise ValueError(unknown + ", which this model does not know" * bool(len(places)))
        return places

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


def at_least_one(k: int) -> int:
    """k. Raises TypeError unless it is a whole number, and ValueError if it is below 1."""
    try:
        number = operator.index(k)
    except TypeError:
        raise TypeError(f"k is {k!r}, must be a whole number") from None
    if number < 1:
        raise ValueError(f"k is {number}, must be at least 1")
    return number


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
