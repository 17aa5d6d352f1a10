"""Fetches public data sets once: downloads the files of their source, checks them, and converts those that are no histories yet."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pooch
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from ..files import atomic
from ..progress import bar
from .public import REGISTRY, Remote

CACHE_VARIABLE = "AWRSR_CACHE"
BLOCK = 1 << 16  # bytes read at a time
TRIES_AGAIN = (429, 500, 502, 503, 504)  # what a server answers that is busy; 429 says when to ask again


class FetchError(OSError):
    """A data set could not be downloaded. The message says what to do."""


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
    """The path of the file of a public data set. Unless the cache has it with the right checksum, its source is downloaded and,
    where that is no file of histories, converted.

    Args:
        name: one of REGISTRY.
        cache: folder that keeps the files; by default that of the environment variable AWRSR_CACHE, or else the system's usual
            cache folder.
        base_url: address of the folder to download from, such as a mirror; by default the source of each data set.
        progress: show a progress bar on standard error if it is a terminal.
        registry: the data sets to choose from.
        timeout: seconds to wait for a response.

    Raises:
        ValueError: an unknown name.
        FetchError: there is no connection, a file does not exist there, a checksum is wrong (nothing is then kept), or the cache
            cannot be written.
    """
    if name not in registry:
        raise ValueError(f"data set is {name!r}, must be one of {', '.join(registry)}")
    remote = registry[name]
    target = cached_file(name, cache)
    if target.is_file() and pooch.file_hash(str(target)) == remote.kept_sha256:
        return target
    base = (base_url or remote.base_url).rstrip("/") + "/"
    urls = [base + file for file in remote.files]
    source = urls[0] if len(urls) == 1 else f"{len(urls)} files below {base}"
    by_hand = f"or take {name}.txt from elsewhere" if remote.convert else f"or download {source} by other means"
    by_hand = f"{by_hand} and put it at {target}"
    with _told(target, source, by_hand), atomic(target) as partial:
        files = _download(name, urls, progress, timeout)
        if (digest := sha256(b"".join(files)).hexdigest()) != remote.sha256:
            problem = f"{source} has SHA-256 {digest}, must have {remote.sha256}; the download was not kept"
            raise FetchError(f"{problem}. The download is incomplete or altered: try again, {by_hand}")
        content = remote.convert(files) if remote.convert else files[0]
        if (digest := sha256(content).hexdigest()) != remote.kept_sha256:
            problem = f"the conversion of {source} gave SHA-256 {digest}, must give {remote.kept_sha256}; the result was not kept"
            raise FetchError(f"{problem}. Please report this with the versions of Python, numpy and polars, {by_hand}")
        partial.write_bytes(content)
    return target


@contextmanager
def _told(target: Path, source: str, by_hand: str) -> Iterator[None]:
    """Errors as FetchError, with what to do."""
    try:
        yield
    except requests.HTTPError as error:
        raise FetchError(f"download failed: {error}. Give another base_url, {by_hand}") from None
    except requests.RequestException as error:
        problem = f"cannot reach {str(error.request.url) if error.request else source} ({type(error).__name__})"
        raise FetchError(f"{problem}. Check the connection or the proxy and try again, {by_hand}") from None
    except FetchError:
        raise
    except OSError as error:
        problem = f"cannot write to the cache {target.parent} ({error.strerror or error})"
        raise FetchError(f"{problem}. Name another with cache or the environment variable {CACHE_VARIABLE}") from None


def _download(name: str, urls: list[str], progress: bool, timeout: float) -> list[bytes]:
    """The contents of all addresses. progress: show it, in bytes of a single file, or else in files."""
    single = len(urls) == 1
    kind: dict[str, Any] = {"unit": "B", "unit_scale": True, "unit_divisor": 1024} if single else {"unit": "file"}
    retry = Retry(total=4, connect=0, read=0, status_forcelist=TRIES_AGAIN, backoff_factor=1, raise_on_status=False)
    with requests.Session() as session, bar(total=None if single else len(urls), desc=name, shown=progress, **kind) as shown:
        for scheme in ("https://", "http://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry))
        files = []
        for url in urls:
            with session.get(url, stream=True, timeout=timeout) as response:
                response.raise_for_status()
                if single and "Content-Encoding" not in response.headers:  # else the length is that of what is packed
                    shown.total = int(response.headers.get("Content-Length", 0)) or None
                blocks = []
                for block in response.iter_content(BLOCK):
                    blocks.append(block)
                    shown.update(len(block) if single else 0)
            files.append(b"".join(blocks))
            shown.update(0 if single else 1)
    return files
