"""Downloads public data sets once: Amazon Beauty, Toys and Sports, Yelp and LastFM as used by S3-Rec and STOSA, and edits of
Wikipedia (JODIE) as used by a port of SASRec, the only data set in which users take items again."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pooch
import requests

from ..files import atomic

S3REC = "https://raw.githubusercontent.com/RUCAIBox/CIKM2020-S3Rec/master/data/"
SASREC = "https://raw.githubusercontent.com/pmixer/SASRec.pytorch/777cccb3a39bef017d576bd669f3241ee43055bb/data/"
CACHE_VARIABLE = "AWRSR_CACHE"


class FetchError(OSError):
    """A data set could not be downloaded. The message says what to do."""


@dataclass(frozen=True)
class Remote:
    """A file below a base address, and its expected SHA-256."""

    file: str
    sha256: str
    base_url: str = S3REC


REGISTRY: Mapping[str, Remote] = {
    "beauty": Remote("Beauty.txt", "226cce9c3105299ca0db9615d7d3fb32b3175e90da43100ae352599f0f0107b8"),
    "toys": Remote("Toys_and_Games.txt", "176c680c688d497598c4a89a03b402c0fe78d795e5db335c2e78dd5f2d778a3f"),
    "sports": Remote("Sports_and_Outdoors.txt", "2a095e0648872beb9982408958290f5d655db5be2911c3756b5446de9f0b8de2"),
    "yelp": Remote("Yelp.txt", "724b219106b81dd2349027da997334ddb6da9fe2f152ad6e0d97a93170f7caed"),
    "lastfm": Remote("LastFM.txt", "9ded486adb5b0fe9dc761950afa0a9a05e93ff018992e0c52bf11afec529f802"),
    "wikipedia": Remote("wikipedia.txt", "ab5d5addedafb496a212d939cb595637f580e436f640916ba337edb03aa02bed", SASREC),
}


def cached_file(name: str, cache: str | os.PathLike[str] | None = None) -> Path:
    """The path at which the file of a data set is kept, whether it exists or not. cache: as in `fetch`."""
    return Path(cache or os.environ.get(CACHE_VARIABLE) or pooch.os_cache("awrsr")) / f"{name}.txt"


def fetch(
    name: str,
    *,
    cache: str | os.PathLike[str] | None = None,
    base_url: str = "",
    progress: bool = True,
    registry: Mapping[str, Remote] = REGISTRY,
    timeout: float = 30.0,
) -> Path:
    """The path of the file of a public data set. It is downloaded unless the cache has it with the right checksum.

    Args:
        name: one of REGISTRY.
        cache: folder that keeps the files; by default that of the environment variable AWRSR_CACHE, or else the system's usual
            cache folder.
        base_url: address of the folder to download from, such as a mirror; by default the source of each file.
        progress: show a progress bar on standard error if it is a terminal.
        registry: the data sets to choose from.
        timeout: seconds to wait for a response.

    Raises:
        ValueError: an unknown name.
        FetchError: there is no connection, the file does not exist there, the checksum is wrong (the download is then not kept), or
            the cache cannot be written.
    """
    if name not in registry:
        raise ValueError(f"data set is {name!r}, must be one of {', '.join(registry)}")
    remote = registry[name]
    target = cached_file(name, cache)
    if target.is_file() and pooch.file_hash(str(target)) == remote.sha256:
        return target
    url = (base_url or remote.base_url).rstrip("/") + "/" + remote.file
    by_hand = f"or download {url} by other means and put it at {target}"
    try:
        with atomic(target) as partial:
            bar = progress and sys.stderr.isatty()
            pooch.HTTPDownloader(progressbar=bar, timeout=timeout)(url, str(partial), None)
            if (sha256 := pooch.file_hash(str(partial))) != remote.sha256:
                problem = f"{url} has SHA-256 {sha256}, must have {remote.sha256}; the download was not kept"
                raise FetchError(f"{problem}. The download is incomplete or altered: try again, {by_hand}")
    except requests.HTTPError as error:
        raise FetchError(f"download failed: {error}. Give another base_url, {by_hand}") from None
    except requests.RequestException as error:
        problem = f"cannot reach {url} ({type(error).__name__})"
        raise FetchError(f"{problem}. Check the connection or the proxy and try again, {by_hand}") from None
    except FetchError:
        raise
    except OSError as error:
        problem = f"cannot write to the cache {target.parent} ({error.strerror or error})"
        raise FetchError(f"{problem}. Name another with cache or the environment variable {CACHE_VARIABLE}") from None
    return target
