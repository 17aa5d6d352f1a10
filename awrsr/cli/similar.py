"""`awrsr similar`: the items nearest to given ones, as CSV, JSON lines or Parquet."""

from typing import Any

from jsonargparse import ArgumentParser

from .recommend import add_output, write
from .shared import add_folder, add_titles, folder_of, identifier, titles_of


def add_flags(to: ArgumentParser) -> None:
    add_folder(to)
    to.add_argument("--item", nargs="+", type=identifier, required=True, help="Ids of the items.")
    to.add_argument("-k", type=int, default=10, help="Number of similar items of each; all if the model knows fewer.")
    add_titles(to)
    add_output(to)


def run(options: Any) -> None:
    """List the items that are most similar to given ones, by the cosine of their vectors
    (for backbone stosa, by their distance). The output has the columns item, similar,
    rank and score, with the ids of the data.

      awrsr similar runs/beauty --item 4 8 -k 5
    """
    from ..data.tables import with_titles
    from ..recommender import AWRSR

    table = AWRSR.load(folder_of(options)).similar_items(options.item, options.k)
    if (titles := titles_of(options)) is not None:
        table = with_titles(table.rename({"item": "of", "similar": "item"}), titles).rename({"item": "similar", "of": "item"})
    write(options, [table])
