"""What a model answers about users and items: recommendations, similar items, vectors. `AWRSR` inherits these methods.

B users of a batch, U users, N items, S features of what is multiplied for scores.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from . import recommending
from .config import AWRSRConfig
from .data.histories import Histories, spans
from .data.ids import Index, as_column, id_series, number_ids, warn
from .data.splits import Split
from .data.tables import Names, as_given, histories_of, with_titles
from .habits import names_arguments
from .models.distance import rows_of_columns
from .models.network import AWRSRNetwork, in_evaluation
from .options import FALLBACKS
from .recommending import Rules, at_least_one, item_lists, numbers_of, top_items


class Answers:
    """The methods of a model that has a network and the ids of its items."""

    __call__: Callable[..., Tensor]
    network: AWRSRNetwork
    config: AWRSRConfig
    item_ids: np.ndarray | None = None
    trained: np.ndarray | None = None  # (N,) events of each item in training; bool of older files; None if that is not known
    filter_seen: bool = True  # leave out items of the history; training sets it from the data
    fitted: Split | None = None  # what the last `fit` was given
    names: Names | None = None  # of the columns, if that was a table
    _index: Index | None = None

    @names_arguments
    def recommend(
        self,
        histories: Any = None,
        k: Any = 10,
        *,
        users: Sequence[Any] | None = None,
        candidates: Any = None,
        exclude: Any = None,
        titles: Any = None,
        fallback: str = "popular",
        filter_seen: bool | None = None,
        filter_untrained: bool = True,
        batch_size: int = 1024,
        user: str | None = None,
        item: str | None = None,
        time: str | None = None,
    ) -> Any:
        """The k best next items for each history. Users may be new to the model.

        Args:
            histories: as for `fit`; by default those that the last `fit` was given. Items that the model does not know are left out
                with a `DataWarning`.
            k: at least 1, or a mapping from users to such numbers; where there are fewer items to recommend, all of them are.
            users: ids of the users to recommend to, by default all of `histories`.
            candidates: ids of the items to choose from; or those of each user, as a mapping, a Series of lists or a table with
                columns of users and items: then users who are not in it get none.
            exclude: ids of items to leave out, for all users or for each, likewise.
            titles: what to show beside each item: a mapping from ids to titles, or a table whose other columns are joined.
            fallback: what users without any known item get: "popular", the items with most training events, or "none".
            filter_seen: leave out the items of the history, so that a user who has seen almost all items may get fewer than k. None
                does what training did, where "auto" keeps these items if users take items again.
            filter_untrained: leave out items that occur in no event that trained the model (`untrained_items`), whose scores say
                little: held-out events alone hold them.
            batch_size: users scored at a time; fewer with a large catalogue.
            user, item, time: names of a table's columns, as for `fit`.

        Returns:
            A row per recommendation, with users in the order given: user, item, rank (1 is the best) and score (with backbone
            stosa, the negative squared distance; null where `fallback` chose). A table in the library of `histories` and with its
            names of user and item, if they are a table; otherwise a polars DataFrame with the names above.

        Raises:
            ValueError: k is below 1; the model was not fitted; it knows no candidate; there is no such user or column.
            TypeError: an argument is of no such form.
        """
        if fallback not in FALLBACKS:
            raise ValueError(f"fallback is {fallback!r}, must be one of {', '.join(FALLBACKS)}")
        self.known_items()
        if histories is None:
            fitted = self._fitted("histories")
            given, names = fitted.histories, fitted.names
        else:
            given, names = histories_of(histories, self.names, user=user, item=item, time=time)
        if users is not None:
            given = given.of_users(users)
        known, unknown = given.numbered_as(self.index())
        if unknown:
            self._warn_of_unknown(given, known, unknown, fallback)
        rules = Rules(
            item_lists("candidates", candidates, self.index(), given.user_ids),
            item_lists("exclude", exclude, self.index(), given.user_ids),
            self.filter_seen if filter_seen is None else filter_seen, filter_untrained, fallback,
        )  # fmt: skip
        table, *more = top_items(self, known, numbers_of("k", k, given.user_ids), rules, batch_size)
        for each in more:
            table.vstack(each, in_place=True)
        table = pl.DataFrame([column.rechunk() for column in table])  # for table.rechunk, a forked process would wait for ever
        return as_given(table if titles is None else with_titles(table, titles, names), histories, names)

    def _warn_of_unknown(self, given: Histories, known: Histories, unknown: int, fallback: str) -> None:
        missing = given.item_ids[self.index().find(given.item_ids) < 0]
        examples = ", ".join(map(repr, missing[:3].tolist())) + ", ..." * (len(missing) > 3)
        alone = np.count_nonzero((known.lengths == 0) & (given.lengths > 0))
        popular = fallback == "popular" and self.trained is not None and self.trained.dtype != bool
        get = "the most popular items" if popular else "no recommendation"
        warn(
            f"{unknown:,} of {len(given.items):,} events are left out, since the model does not know their items ({examples})"
            + (f"; {alone:,} of {given.num_users:,} users have no others and get {get}" if alone else "")
        )

    @torch.inference_mode()
    def user_vectors(
        self, histories: Any = None, *, batch_size: int = 1024, user: str | None = None, item: str | None = None,
        time: str | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """The ids of users and the vectors (U, S) that stand for what each of them will want next. The product with a vector of
        `item_vectors` is an item's score. Users without any known item have the vector 0. Arguments: as for `recommend`."""
        given = self._fitted("histories").histories if histories is None else None
        given = given if given is not None else histories_of(histories, self.names, user=user, item=item, time=time)[0]
        known, _ = given.numbered_as(self.index())
        model: Any = in_evaluation(self)  # type: ignore[type-var]
        chosen = np.flatnonzero(known.lengths)
        vectors = torch.zeros(known.num_users, self.network.item_table(torch.zeros(1, dtype=torch.int64)).shape[1])
        for first in range(0, len(chosen), batch_size):
            part = chosen[first : first + batch_size]
            vectors[torch.from_numpy(part)] = model.states(known, part).float().cpu()
        return given.user_ids, vectors.numpy()

    @torch.inference_mode()
    def item_vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the items and the vectors (N, S) that `user_vectors` are multiplied by, for an index of nearest neighbours by
        inner product."""
        self.known_items()
        return self.ids(), self.network.item_table().float().cpu().numpy()

    @torch.inference_mode()
    def states(self, histories: Histories, users: np.ndarray) -> Tensor:
        """(B, S) what each of these users is predicted from. Their histories must not be empty."""
        length = np.minimum(histories.lengths[users], self.config.max_len)
        events, cu_seqlens = spans(histories.offsets[users + 1] - length, length)
        device = self.network.items.weight.device
        ends = torch.from_numpy(cu_seqlens).to(device)
        return self(torch.from_numpy(histories.items[events]).to(device), ends, int(length.max(initial=0)), last=True)

    def scores(self, histories: Histories, users: np.ndarray, table: Tensor | None = None) -> Tensor:
        """(B, N) scores of every item as the next one of these users. Their histories must not be empty. table: `item_table`, or
        some rows of it."""
        return self.states(histories, users) @ (self.network.item_table() if table is None else table).T

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
        table = self.network.item_table()
        if not self.network.by_distance:
            table = nn.functional.normalize(table, dim=1)
        best, left_out = [], torch.from_numpy(self.untrained()).to(table.device)
        for block in torch.from_numpy(places).to(table.device).split(max(1, recommending.SCORE_BLOCK // count)):
            scores = (rows_of_columns(table[block]) if self.network.by_distance else table[block]) @ table.T
            best.append(scores.index_fill_(1, left_out, -torch.inf).scatter_(1, block[:, None], -torch.inf).topk(k))
        score, similar = (torch.cat(parts).cpu().numpy() for parts in zip(*best, strict=True))
        row, column = np.nonzero(score > -np.inf)
        ids = self.ids()
        columns = {"item": as_column(ids[places[row]]), "similar": as_column(ids[similar[row, column]])}
        return pl.DataFrame(columns | {"rank": column + 1, "score": score[row, column]})

    def _fitted(self, argument: str) -> Split:
        """What the last `fit` was given. Raises ValueError if there was none."""
        if self.fitted is None:
            raise ValueError(f"{argument} must be given: this model was loaded, so it does not hold what it was fitted to")
        return self.fitted

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
        return np.flatnonzero(self.trained == 0) if self.trained is not None else np.empty(0, dtype=np.int64)

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
