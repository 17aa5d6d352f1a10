"""`AWRSR`, what users hold: a network that knows its items by the ids of the data; it fits, recommends, explains, saves and loads.

B users of a batch, N items, S features of what is multiplied for scores, H heads.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from .config import AWRSRConfig, TrainingOptions
from .data.histories import Histories, Split, spans, split
from .models.distance import rows_of_columns
from .models.network import AWRSRNetwork
from .run_folder import load_model, save_model

SCORE_BLOCK = 1 << 24  # scores held at a time
Model = TypeVar("Model", bound="AWRSR")
UserHistories = Histories | Mapping[Any, Sequence[Any]] | Iterable[Sequence[Any]]


class AWRSR(nn.Module):
    """Sequential recommender whose attention weights attend to one another.

    It is a `torch.nn.Module` around a network, `model.network`. Called, it does what the network does, whose attributes (`items`,
    `blocks`, `forward_padded`, `scores_padded`, ...) and names of weights it shares.

    Args:
        config: what the network is made of; by default `AWRSRConfig()`.
    """

    network: AWRSRNetwork
    config: AWRSRConfig
    item_ids: np.ndarray | None = None
    filter_seen: bool = True  # whether items of the history are no candidates: training settles it by what its users do

    def __init__(self, config: AWRSRConfig | None = None) -> None:
        super().__init__()
        self.network = AWRSRNetwork(config or AWRSRConfig())
        self.register_load_state_dict_pre_hook(_to_network)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "network":  # a copy or a pickle that is being put together
                raise
            return getattr(self.network, name)

    def forward(self, items: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Packed histories -> (T, S): row t, times the rows of `item_table`, scores what follows event t."""
        return self.network(items, cu_seqlens, max_seqlen)

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
        """Train, keep the weights of the epoch with the best validation NDCG@10, and return self, in evaluation mode.

        Args:
            histories: `Histories`, a mapping user -> items or a list of lists of item ids of any one type, in time order; the last
                event of each is kept for testing, the one before it for validation. A `Split` divides them otherwise, or not at
                all: `split(histories, "none")` trains on everything for all epochs.
            options: how to train; by default `TrainingOptions()`.
            out: folder for the run, whose training resumes if the folder holds an unfinished one; without it nothing is left on
                disk.
            changes: single training options by name, such as epochs=20 or loss="bce".

        Raises:
            ValueError: an option out of its range; `out` holds another run; items that a model fitted before does not know.
            FloatingPointError: the loss is no number any more.
        """
        from .training.run import report, train  # Lightning takes seconds to load, and recommending does without

        parts = histories if isinstance(histories, Split) else split(Histories.from_lists(histories))
        settings = replace(options or TrainingOptions(), **changes)
        if not self.config.num_items:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed)
                self.network = AWRSRNetwork(replace(self.config, num_items=parts.histories.num_items))
        record = train(self, parts, settings, out)
        if out is not None and record:
            report(self, parts, settings, record, Path(out))
        return self.eval()

    def recommend(
        self, histories: UserHistories, k: int = 10, *, filter_seen: bool | None = None, batch_size: int = 1024
    ) -> pl.DataFrame:
        """The k best next items for each history, which need not be of users seen in training.

        Args:
            histories: as for `fit`. Items that the model does not know are passed over; a user it knows no item of gets no row.
            k: 1 to the number of items N.
            filter_seen: leave out what the history holds (a user who has seen almost all may get fewer than k); None does as in
                training, where "auto" keeps it for users who take items again.
            batch_size: users scored at a time; a large catalogue takes fewer.

        Returns:
            A row per recommendation, users in the order given: user, item, rank (1 = best), score (backbone stosa: the negative
            squared distance).

        Raises:
            ValueError: k out of range; the model was not fitted.
        """
        known, _ = Histories.from_lists(histories).numbered_as(self.ids())
        return pl.concat(self.top_items(known, k, filter_seen=filter_seen, batch_size=batch_size), rechunk=True)

    @torch.inference_mode()
    def top_items(
        self, histories: Histories, k: int, *, filter_seen: bool | None = None, batch_size: int = 1024
    ) -> Iterator[pl.DataFrame]:
        """The same for histories numbered as this model's items, in tables of bounded memory; nothing is gathered."""
        count = self.known_items()
        if not 1 <= k <= count:
            raise ValueError(f"k is {k}, must be in 1..{count}, the number of items this model knows")
        training = self.training
        self.eval()
        step = max(1, min(batch_size, SCORE_BLOCK // count))
        users, item_table, ids = np.flatnonzero(histories.lengths), self.item_table(), self.ids()

        def table(user: np.ndarray, item: np.ndarray, rank: np.ndarray, score: np.ndarray) -> pl.DataFrame:
            return pl.DataFrame({"user": histories.user_ids[user], "item": ids[item], "rank": rank, "score": score})

        nobody = np.empty(0, dtype=np.int64)
        yield table(nobody, nobody, nobody, item_table.new_empty(0).cpu().numpy())
        for first in range(0, len(users), step):
            chosen = users[first : first + step]
            scores = self.scores(histories, chosen, item_table)
            if self.filter_seen if filter_seen is None else filter_seen:
                events, _ = spans(histories.offsets[chosen], histories.lengths[chosen])
                row = np.repeat(np.arange(len(chosen)), histories.lengths[chosen])
                scores[torch.from_numpy(row), torch.from_numpy(histories.items[events])] = -torch.inf
            score, item = (x.cpu().numpy() for x in scores.topk(k))
            row, column = np.nonzero(score > -np.inf)
            yield table(chosen[row], item[row, column], column + 1, score[row, column])
        self.train(training)

    def scores(self, histories: Histories, users: np.ndarray, table: Tensor | None = None) -> Tensor:
        """(B, N) scores of every item as the next one of these users, whose histories must not be empty. table: `item_table`."""
        length = np.minimum(histories.lengths[users], self.config.max_len)
        events, cu_seqlens = spans(histories.offsets[users + 1] - length, length)
        device = self.items.weight.device
        ends = torch.from_numpy(cu_seqlens).to(device)
        hidden = self(torch.from_numpy(histories.items[events]).to(device), ends, int(length.max(initial=0)))
        return hidden[ends[1:] - 1] @ (self.item_table() if table is None else table).T

    @torch.inference_mode()
    def similar_items(self, items: Sequence[Any], k: int = 10) -> pl.DataFrame:
        """The k items most similar to each given item.

        Args:
            items: item ids.
            k: 1 to N - 1.

        Returns:
            A row per pair: item, similar, rank (1 = most similar), score: the cosine of their embeddings; for backbone stosa, the
            negative squared distance.

        Raises:
            ValueError: an id that the model does not know; k out of 1..N-1.
        """
        count = self.known_items()
        if not 1 <= k < count:
            raise ValueError(f"k is {k}, must be in 1..{count - 1}, the number of other items")
        places = self.places(items)
        table = self.item_table()
        if not self.by_distance:
            table = nn.functional.normalize(table, dim=1)
        best = []
        for block in torch.from_numpy(places).to(table.device).split(max(1, SCORE_BLOCK // count)):
            scores = (rows_of_columns(table[block]) if self.by_distance else table[block]) @ table.T
            best.append(scores.scatter_(1, block[:, None], -torch.inf).topk(k))
        score, similar = (torch.cat(parts).flatten().cpu().numpy() for parts in zip(*best, strict=True))
        ids = self.ids()
        columns = {"item": np.repeat(ids[places], k), "similar": ids[similar], "rank": np.tile(np.arange(1, k + 1), len(places))}
        return pl.DataFrame(columns | {"score": score})

    @torch.inference_mode()
    def attention_maps(self, history: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
        """For each block (P, M): first-order weights and the refined weights that meet the values, (H, n, n) each.

        Args:
            history: n item ids in time order; of more than max_len the last are looked at.

        Raises:
            ValueError: an id that the model does not know; an empty history.
        """
        training = self.training
        self.eval()
        items = torch.as_tensor(self.places(history)[-self.config.max_len :], device=self.items.weight.device)[None]
        maps = self.weights_padded(items, torch.tensor([items.shape[1]], device=items.device))
        self.train(training)
        return [(p[0], m[0]) for p, m in maps]

    def known_items(self) -> int:
        """N. Raises ValueError where there are none yet."""
        if not self.config.num_items:
            raise ValueError("this model knows no items yet: fit or load it first")
        return self.config.num_items

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

    def save(self, folder: str | Path, **sections: Any) -> None:
        """Write config.json, items.parquet and model.safetensors, which take their places when all are written.

        Args:
            folder: made if it does not exist.
            sections: further sections for config.json.
        """
        save_model(folder, self.network, self.ids(), self.filter_seen, **sections)

    @classmethod
    def load(cls: type[Model], folder: str | Path, **changes: Any) -> Model:
        """The model that `save` or `fit` wrote, in evaluation mode. Nothing is unpickled.

        Args:
            folder: a run folder.
            changes: options of the configuration to change, such as backend="torch".

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, or the weights are of another configuration.
        """
        with torch.random.fork_rng(devices=[]):  # the weights that it draws are replaced
            model = cls()
        model.network, model.item_ids, model.filter_seen = load_model(folder, **changes)
        return model.eval()


def _to_network(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: `state_dict` has the network's own names, on their way down modules have a longer one."""
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}network.{name.removeprefix(prefix)}"] = state.pop(name)
