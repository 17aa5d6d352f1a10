"""What a trained model is for: fitting, recommending, looking inside, saving and loading. `AWRSR` inherits it.

B users of a batch, N items, S features of what is multiplied for scores, H heads.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .config import without_removed_options
from .data.histories import Histories, Split
from .files import atomic, read_json, write_json
from .models.distance import rows_of_columns
from .training.batches import spans

if TYPE_CHECKING:
    import polars as pl

    from .config import TrainingOptions

WEIGHTS, CONFIG, ITEMS = "model.safetensors", "config.json", "items.parquet"
SCORE_BLOCK = 1 << 24  # scores held at a time
Model = TypeVar("Model", bound="Recommender")
Given = Histories | Mapping[Any, Sequence[Any]] | Iterable[Sequence[Any]]


class TopItems(NamedTuple):
    """Parallel (M,) arrays, a row per recommendation: place of the user, place of the item, rank from 1, score."""

    user: np.ndarray
    item: np.ndarray
    rank: np.ndarray
    score: np.ndarray


class Recommender(nn.Module):
    """A network of events with item embeddings `items`, and `config` that makes it. It knows its items by the ids of the data."""

    config: Any
    items: nn.Embedding
    item_ids: np.ndarray | None = None
    filter_seen: bool = True  # whether items of the history are no candidates: training settles it by what its users do
    by_distance = False  # whether scores are negative squared distances, whose products are those of `distance`
    computes_table = False  # whether `item_table` is something computed rather than the embeddings as they are

    def item_table(self, items: Tensor | None = None) -> Tensor:
        """What hidden states are multiplied with for scores: (N, S), or only the rows of some items."""
        return self.items.weight if items is None else self.items(items)

    def fit(
        self: Model,
        histories: Given | Split,
        options: "TrainingOptions | None" = None,
        *,
        out: str | Path | None = None,
        **changes: Any,
    ) -> Model:
        """Train, keep the weights of the epoch with the best validation NDCG@10, and return self, in evaluation mode.

        histories: `Histories`, a mapping user -> items or a list of lists of item ids of any one type, in time order; the last
            event of each is kept for testing, the one before it for validation. A `Split` divides them otherwise, or not at all:
            `split(histories, "none")` trains on everything for all epochs.
        options: `TrainingOptions`; changes: single options by name, such as epochs=20 or loss="bce".
        out: folder for the run (`awrsr.training.run`); without it nothing is left on disk.
        """
        from .data.histories import split
        from .training.run import TrainingOptions, report, train

        parts = histories if isinstance(histories, Split) else split(Histories.from_lists(histories))
        settings = replace(options or TrainingOptions(), **changes)
        if not self.config.num_items:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed)
                self.__init__(replace(self.config, num_items=parts.histories.num_items))  # type: ignore[misc]
        record = train(self, parts, settings, out)
        if out is not None and record:
            report(self, parts, settings, record, Path(out))
        return self.eval()

    def recommend(
        self, histories: Given, k: int = 10, *, filter_seen: bool | None = None, batch_size: int = 1024
    ) -> "pl.DataFrame":
        """The k best next items for each history, which need not be of users seen in training.

        histories: as for `fit`. Items that the model does not know are passed over; a user it knows no item of gets no row.
        k: 1 to the number of items N. filter_seen: leave out what the history holds (a user who has seen almost all may get fewer);
            None does as in training, where "auto" keeps it for users who take items again.

        Returns:
            A row per recommendation, users in the order given: user, item, rank (1 = best), score (backbone stosa: the negative
            squared distance).

        Raises:
            ValueError: k out of range; the model was not fitted.
        """
        import polars as pl

        known, _ = Histories.from_lists(histories).numbered_as(self.ids())
        parts = list(self.top_items(known, k, filter_seen=filter_seen, batch_size=batch_size))
        user, item, rank, score = (np.concatenate([getattr(part, name) for part in parts]) for name in TopItems._fields)
        return pl.DataFrame({"user": known.user_ids[user], "item": self.ids()[item], "rank": rank, "score": score})

    @torch.inference_mode()
    def top_items(
        self, histories: Histories, k: int, *, filter_seen: bool | None = None, batch_size: int = 1024
    ) -> Iterator[TopItems]:
        """The same for histories numbered as this model's items, in batches of bounded memory; nothing is gathered."""
        count = self.known_items()
        if not 1 <= k <= count:
            raise ValueError(f"k is {k}, must be in 1..{count}, the number of items this model knows")
        training = self.training
        self.eval()
        step = max(1, min(batch_size, SCORE_BLOCK // count))
        users, table = np.flatnonzero(histories.lengths), self.item_table()
        yield TopItems(*(np.empty(0, dtype) for dtype in (np.int64, np.int64, np.int64, np.float32)))
        for first in range(0, len(users), step):
            chosen = users[first : first + step]
            scores = self.scores(histories, chosen, table)
            if self.filter_seen if filter_seen is None else filter_seen:
                place, _ = spans(histories.offsets[chosen], histories.lengths[chosen])
                row = np.repeat(np.arange(len(chosen)), histories.lengths[chosen])
                scores[torch.from_numpy(row), torch.from_numpy(histories.items[place])] = -torch.inf
            score, item = (x.cpu().numpy() for x in scores.topk(k))
            row, nth = np.nonzero(score > -np.inf)
            yield TopItems(chosen[row], item[row, nth], nth + 1, score[row, nth])
        self.train(training)

    def scores(self, histories: Histories, users: np.ndarray, table: Tensor | None = None) -> Tensor:
        """(B, N) scores of every item as the next one of these users, whose histories must not be empty. table: `item_table`."""
        length = np.minimum(histories.lengths[users], self.config.max_len)
        place, cu_seqlens = spans(histories.offsets[users + 1] - length, length)
        device = self.items.weight.device
        ends = torch.from_numpy(cu_seqlens).to(device)
        hidden = self(torch.from_numpy(histories.items[place]).to(device), ends, int(length.max(initial=0)))
        return hidden[ends[1:] - 1] @ (self.item_table() if table is None else table).T

    @torch.inference_mode()
    def similar_items(self, items: Sequence[Any], k: int = 10) -> "pl.DataFrame":
        """The k items most similar to each given item: item, similar, rank, score. The score is the cosine of their embeddings; for
        backbone stosa, the negative squared distance.

        Raises:
            ValueError: an id that the model does not know; k out of 1..N-1.
        """
        import polars as pl

        count = self.known_items()
        if not 1 <= k < count:
            raise ValueError(f"k is {k}, must be in 1..{count - 1}, the number of other items")
        places = self.places(items)
        table = self.item_table()
        if not self.by_distance:
            table = nn.functional.normalize(table, dim=1)
        found = []
        for some in torch.from_numpy(places).to(table.device).split(max(1, SCORE_BLOCK // count)):
            rows = rows_of_columns(table[some]) if self.by_distance else table[some]
            scores = rows @ table.T
            found.append(scores.scatter_(1, some[:, None], -torch.inf).topk(k))
        score, similar = (torch.cat(parts).flatten().cpu().numpy() for parts in zip(*found, strict=True))
        ids = self.ids()
        columns = {"item": np.repeat(ids[places], k), "similar": ids[similar], "rank": np.tile(np.arange(1, k + 1), len(places))}
        return pl.DataFrame(columns | {"score": score})

    @torch.inference_mode()
    def attention_maps(self, history: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
        """For each block (P, M): first-order weights and the refined weights that meet the values, (H, n, n) each.

        history: n item ids in time order; of more than max_len the last are looked at.
        """
        training = self.training
        self.eval()
        items = torch.as_tensor(self.places(history)[-self.config.max_len :], device=self.items.weight.device)[None]
        maps = self.weights_padded(items, torch.tensor([items.shape[1]], device=items.device))
        self.train(training)
        return [(p[0], m[0]) for p, m in maps]

    def weights_padded(self, items: Tensor, lengths: Tensor) -> list[tuple[Tensor, Tensor]]:
        raise NotImplementedError

    def correlation_tables(self) -> list[nn.Parameter]:
        """The parameters that span the correlation space, which may learn at a rate of their own."""
        return []

    def known_items(self) -> int:
        """N. Raises ValueError where there are none yet."""
        if not self.config.num_items:
            raise ValueError("this model knows no items yet: fit or load it first")
        count: int = self.config.num_items
        return count

    def ids(self) -> np.ndarray:
        """(N,) ids of the data by place; the places themselves where no data gave any."""
        return np.arange(self.config.num_items) if self.item_ids is None else self.item_ids

    def places(self, items: Sequence[Any]) -> np.ndarray:
        """Places of item ids in the table. Raises ValueError naming one that is not there."""
        known = {str(key): place for place, key in enumerate(self.ids().tolist())}
        unknown = [item for item in items if str(item) not in known]
        if unknown or not len(items):
            raise ValueError(f"items hold {unknown[0]!r}, which this model does not know" if unknown else "items is empty")
        return np.array([known[str(item)] for item in items])

    def save(self, folder: str | Path, **more: Any) -> None:
        """Write config.json, items.parquet and model.safetensors, which take their places when all are written.

        more: sections of config.json.
        """
        import polars as pl
        from safetensors.torch import save

        folder = Path(folder)
        with atomic(folder / ITEMS) as items, atomic(folder / CONFIG) as config, atomic(folder / WEIGHTS) as weights:
            pl.DataFrame({"item": self.ids()}).write_parquet(items)
            data = more.get("data", {}) | {"seen": not self.filter_seen}
            write_json(config, {"model": asdict(self.config)} | more | {"data": data})
            weights.write_bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}))

    @classmethod
    def load(cls: type[Model], folder: str | Path, **changes: Any) -> Model:
        """The model that `save` wrote, in evaluation mode. Nothing is unpickled. changes: of the configuration, such as backend.

        Raises:
            FileNotFoundError: a file is missing. ValueError: a file is damaged, or the weights are of another configuration.
        """
        import polars as pl
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in (CONFIG, WEIGHTS, ITEMS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no trained model: {name} is missing")
        stored = without_removed_options(read_json(folder / CONFIG), folder / CONFIG)
        with torch.random.fork_rng(devices=[]):  # the weights that it draws are replaced
            try:
                config = type(cls().config)(**stored["model"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{folder / CONFIG} is no configuration of this model: {error}") from error
            model = cls(replace(config, **changes))
        model.filter_seen = not stored.get("data", {}).get("seen", False)
        try:
            model.item_ids = np.array(pl.read_parquet(folder / ITEMS)["item"].to_list())  # text of one width, never objects
            weights = load_file(folder / WEIGHTS)
        except (SafetensorError, pl.exceptions.PolarsError) as error:
            raise ValueError(f"{folder} is damaged: {error}") from error
        if len(model.item_ids) != model.config.num_items:
            count = f"{len(model.item_ids)} items, must hold {model.config.num_items}"
            raise ValueError(f"{folder / ITEMS} is of another model than {CONFIG}: it holds {count}")
        want = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if want != found:
            differs = sorted(name for name in want.keys() | found.keys() if want.get(name) != found.get(name))[0]
            raise ValueError(
                f"{folder / WEIGHTS} is of another configuration than {CONFIG}: {differs} is {found.get(differs, 'absent')}, "
                f"must be {want.get(differs, 'absent')}"
            )
        # As they were saved, float64 too; copied to where torch aligns memory, on which the last bits of products may depend
        model.load_state_dict({name: weight.clone() for name, weight in weights.items()}, assign=True)
        return model.eval()
