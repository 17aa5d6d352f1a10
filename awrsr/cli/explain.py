"""`awrsr explain`: a picture of the attention on one history."""

from typing import Any

from jsonargparse import ArgumentParser

from .shared import OpenRun, add_run, add_titles, find_user, identifier, labels_of


def add_flags(to: ArgumentParser) -> None:
    add_run(to)
    to.add_argument(
        "--user",
        type=identifier,
        default="",
        help="Id of the user (default: the first user with 12 events or more, or else the one with the longest history).",
    )
    to.add_argument(
        "--history", nargs="+", type=identifier, default=[], help="Item ids of a history to explain, instead of a user's."
    )
    add_titles(to)
    to.add_argument("--layer", type=int, default=1, help="Block to draw, counted from 1.")
    to.add_argument("--output", type=str, default="attention.png", help="Picture to write: .png, .svg or .pdf.")


def run(options: Any) -> None:
    """Draw what a model pays attention to in one history. The picture shows first-order
    weights P, refined weights M and their difference, with items on the axes. The
    command also prints the items that the last event attends to most.

      awrsr explain runs/beauty --user 17 --output attention.svg
      awrsr explain runs/beauty --history 4 8 15 16 23 --titles items.csv
    """
    from ..analysis.explain import picture, save, summary

    opened = OpenRun(options)
    config = opened.model.config
    if not 1 <= options.layer <= config.layers:
        raise ValueError(f"layer is {options.layer}, must be in 1..{config.layers}")
    items = options.history
    if not items:  # of the user, or else of the first one with 12 events, or with the most if nobody has as many
        histories, user = opened.histories(everyone=bool(options.user)), options.user
        histories, _ = histories.numbered_as(opened.model.index())
        chosen = find_user(histories, user) if user else (histories.lengths >= min(12, histories.lengths.max())).argmax()
        items = histories.item_ids[histories.of(int(chosen))].tolist()
        if not items:
            who = f"user is {user!r}, must have" if user else "data: no user has"
            raise ValueError(f"{who} an item that the model knows")
    items = items[-config.max_len :]
    labels = labels_of(options, items)
    p, m = opened.model.attention_maps(items)[options.layer - 1]
    title = f"block {options.layer} of {config.layers}, refinement {config.refinement}"
    save(picture(p, m, labels, refinement=config.refinement, title=title), options.output)
    print(f"{summary(p, m, labels)}\n\nPicture: {options.output}")
