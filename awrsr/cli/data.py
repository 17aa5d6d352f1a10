"""Fetch public data, make synthetic data, or describe a file of histories. The other
commands read such files.

  awrsr data fetch beauty
  awrsr data make --output recall.txt
  awrsr data stats recall.txt
"""

from typing import Any

from jsonargparse import ArgumentParser

from ..data import synthetic
from ..data.prepare import DEMO, OF_READING, DataOptions
from ..data.public import REGISTRY, table
from ..files import write_json
from .shared import COLUMNS, add_options, as_flags, options_of, typed


def add_fetch_flags(to: ArgumentParser) -> None:
    to.add_argument(
        "name", nargs="?", choices=tuple(REGISTRY), help="Which data set to download. Without a name, a table of all is printed."
    )
    to.add_argument("--list", action="store_true", help="Print the table.")
    to.add_argument(
        "--base-url", type=str, default="", help="Address to download from (default: the repositories that publish the files)."
    )
    to.add_argument(
        "--cache", type=str, default="", help="Folder to keep the file in (default: $AWRSR_CACHE, or else the user's cache)."
    )


def fetch(options: Any) -> None:
    """Download a public data set into a cache, or list what there is. Chords, tunes,
    source code and logs are converted to histories. A file is kept only if its SHA-256
    is the expected one.

      awrsr data fetch
      awrsr data fetch beauty
    """
    if options.list or not options.name:
        print(f"{table()}\n\nNext:\n\n  awrsr data fetch NAME")
        return
    from ..data import fetch

    path = fetch.fetch(options.name, cache=options.cache or None, **({"base_url": options.base_url} if options.base_url else {}))
    print(f"{path}\n\nNext:\n\n  {typed(['awrsr', 'data', 'stats', path])}\n  {typed(['awrsr', 'train', '--data', path])}")


def add_make_flags(to: ArgumentParser) -> None:
    to.add_argument("--output", type=str, default="synthetic.txt", help="File to write, one user per line.")
    add_options(to, synthetic.RecallTask)


def make(options: Any) -> None:
    """Make synthetic histories of the recall task. In them, the current item is
    followed by whatever followed its last occurrence, mixed with noise and popular
    items. One refined layer learns this rule; one plain layer cannot.

      awrsr data make --users 1000 --output recall.txt
      awrsr train --data recall.txt --baseline
    """
    synthetic.write(synthetic.make(**options_of(synthetic.RecallTask, options)), options.output)
    print(f"{options.output}\n\nNext:\n\n  {typed(['awrsr', 'data', 'stats', options.output])}")
    print(f"  {typed(['awrsr', 'train', '--data', options.output, '--baseline'])} {as_flags(DEMO)}")


def add_stats_flags(to: ArgumentParser) -> None:
    to.add_argument("file", type=str, help="File of histories.")
    add_options(to, DataOptions, ("format", *COLUMNS))
    to.add_argument("--no-headroom", action="store_true", help="Leave out the headroom, which takes seconds per million events.")
    to.add_argument("--json", type=str, default="", help="Also write the figures to this JSON file.")


def stats(options: Any) -> None:
    """Print how many users, items and events a file holds, how long histories are, how
    popular items are, and whether refinement can be expected to pay: how much better the
    next item is predicted by whoever knows what followed the current item earlier in the
    user's own history (headroom). If the file is malformed, the error names the line.

      awrsr data stats beauty.txt
      awrsr data stats ratings.csv --json stats.json
    """
    from ..data.headroom import headroom, sentence
    from ..data.readers import read
    from ..data.stats import stats
    from ..data.stats import table as table_of

    columns: dict[str, Any] = {name.removesuffix("_column"): options[name] or None for name in COLUMNS[:3]}
    columns |= {name: options[name] for name in OF_READING}
    histories = read(options.file, format=options.format, **columns)
    values = stats(histories)
    if not options.no_headroom:
        values["headroom"] = headroom(histories, progress=True)
    print(table_of(values))
    if not options.no_headroom:
        print(f"\n{sentence(values['headroom'])}")
    if options.json:
        write_json(options.json, values)
