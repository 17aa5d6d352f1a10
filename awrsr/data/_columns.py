"""Finds the columns of users, items and times among those of a file, by the names that are usual or given."""

import re
from collections.abc import Collection, Sequence
from itertools import combinations

from .ids import DataError
from .times import UNTIMED

USUAL = {
    "user": "user userid uid users usr customer customerid client clientid visitor visitorid reviewerid member memberid",
    "item": "item itemid iid items movie movieid product productid asin parentasin sid song songid track trackid article articleid"
    " artist artistid business businessid venue venueid gmapid book bookid isbn page pageid",
    "time": "time timestamp ts datetime date unixtime unixreviewtime eventtime unixtimestamp utctimestamp timems createdat",
}
# A name that is not usual for times and yet might mean one: by a word in it, or by its end
TELLING = re.compile(
    r"(?:^|[^a-z])(times?|dates?|datetimes?|timestamps?|ts|dt|dat|when|epoch|unix|utc|created|updated)(?:[^a-z]|$)"
    r"|(time|date|stamp)s?[0-9]*$|(?:^|[^a-z])(at|on)$"
)
NO_TIMES = ("candidate", "update", "lifetime", "runtime", "overtime")  # in spite of their ends


def find_columns(
    source: str, header: Sequence[str], wanted: dict[str, str | None], moments: Collection[int] = (), headless: str = ""
) -> dict[str, int]:
    """The columns of users, items and, if there is one, times: those named in `wanted`, otherwise a guess. wanted: role -> name;
    other roles than these three have one.

    Case is ignored, and guesses consider only letters and digits. If a column may be the time but has an unusual name, the caller
    must decide, because a file without times is taken to be in order of time; UNTIMED as the name says that it is. moments: columns
    that hold dates by their type. headless: advice in case that there is no header.
    """
    names = [name.strip() for name in header]

    def refused(problem: str) -> DataError:
        return DataError(f"{source}: {problem}; columns: {', '.join(map(repr, names))}")

    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise refused(f"column {twice[0]!r} occurs more than once")
    chosen: dict[str, int] = {}
    for role, name in wanted.items():
        if role == "time" and name == UNTIMED and UNTIMED not in map(str.casefold, names):
            continue
        if name is not None:
            exact = [i for i, other in enumerate(names) if other == name]
            matches = exact or [i for i, other in enumerate(names) if other.casefold() == name.casefold()]
            problem = f"has more than one column {name!r} if case is ignored" if matches else f"has no column {name!r}"
        else:
            matches = guesses(role, names)
            problem = "has more than one column that may be" if matches else "has no column whose name suggests"
            problem = f"{problem} the {role}; name it with --{role}-column NAME (in Python {role}=NAME){headless}"
        if len(matches) > 1 or (not matches and (name is not None or role != "time")):
            raise refused(problem)
        if matches:
            chosen[role] = matches[0]
        elif maybe := [name for i, name in enumerate(names) if i not in chosen.values() and (i in moments or _may_be_time(name))]:
            untimed = f"--time-column {UNTIMED} if the lines are in order of time (in Python time=NAME)"
            raise refused(f"column {maybe[0]!r} may be the time; use --time-column {maybe[0]!r} if it is, or {untimed}")
    for (role, column), (other, its_column) in combinations(chosen.items(), 2):
        if column == its_column and role in USUAL and other in USUAL:
            raise refused(f"column {names[column]!r} is both {role} and {other}")
    return chosen


def item_column(source: str, names: Sequence[str], wanted: str | None = None) -> int:
    """The column of items of a table without users: the one named, or with a usual name, or the first of all."""
    if wanted is not None:
        return names.index(wanted)
    found = guesses("item", names)
    if len(found) > 1:
        raise DataError(f"{source}: more than one column may be the item: {', '.join(names[place] for place in found)}")
    return found[0] if found else 0


def guesses(role: str, names: Sequence[str]) -> list[int]:
    """Columns with a usual name of the user, item or time."""
    usual, plain = USUAL[role].split(), [re.sub(r"[\W_]", "", name.casefold()) for name in names]
    if role == "item" and "parentasin" in plain:  # in Amazon's reviews, asin is then but a variant of a product
        usual = ["parentasin"]
    return [i for i, name in enumerate(plain) if name in usual]


def _may_be_time(name: str) -> bool:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).casefold()  # a capital inside a name begins a word
    return TELLING.search(words) is not None and not words.endswith(NO_TIMES)
