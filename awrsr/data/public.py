"""Public data sets: where each comes from, what it is, under which licence, and how its source becomes a file of histories.

Every address is pinned to a commit or a release, and every source and result to a checksum. Nothing of them is in this repository.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import _convert

S3REC = "https://raw.githubusercontent.com/RUCAIBox/CIKM2020-S3Rec/master/data/"
SASREC = "https://raw.githubusercontent.com/pmixer/SASRec.pytorch/777cccb3a39bef017d576bd669f3241ee43055bb/data/"
JAZZ = "https://raw.githubusercontent.com/mikeoliphant/JazzStandards/47ca0d6b624514b065413ab3c480b36ed0c5b64e/"
NOTTINGHAM = "https://raw.githubusercontent.com/jukedeck/nottingham-dataset/0992bb6cd864f6d4b90d6663e08c0ef53ffaa08f/ABC_cleaned/"
MUSIC21 = "https://raw.githubusercontent.com/cuthbertLab/music21/3146cb08762979cd6aae7dc95f246144026eb3cd/music21/corpus/"
CPYTHON = "https://raw.githubusercontent.com/python/cpython/v3.11.7/Lib/"
REDIS = "https://raw.githubusercontent.com/redis/redis/d2c8a4b91e8c0e6aefd1f5bc0bf582cddbe046b7/src/"  # 7.2.4
PM4PY = "https://raw.githubusercontent.com/pm4py/pm4py-core/a8cfff15107bc17a6463d70e872d426b752f07a3/tests/"
WIKISPEEDIA = "https://raw.githubusercontent.com/PJRele/Webtech-Viz-project/4a345c020c9f67e0d6eeb05b4911ef1c2bcb27e8/databases/"
DKVMN = "https://raw.githubusercontent.com/jennyzhang0215/DKVMN/96c2834ae6968fbfb761b5ba96be26b054c7c1c3/data/assist2009_updated/"

Converter = Callable[[list[bytes]], bytes]


@dataclass(frozen=True)
class Remote:
    """A public data set.

    Args:
        file: its file below `base_url`, or several, in order, separated by blanks.
        sha256: of the file, or of all files one after another.
        base_url: the address of a folder.
        convert: makes the lines of a file of histories from the contents of the files; None: the file is kept as it is.
        made_sha256: of what `convert` makes.
        about: what a history and its items are.
        licence: of the source.
        sizes: numbers of users, items and events.
    """

    file: str
    sha256: str
    base_url: str = S3REC
    convert: Converter | None = None
    made_sha256: str = ""
    about: str = ""
    licence: str = "none stated"
    sizes: tuple[int, int, int] | None = None

    @property
    def files(self) -> list[str]:
        """The files below `base_url`, in order."""
        return self.file.split()

    @property
    def kept_sha256(self) -> str:
        """SHA-256 of the file of histories."""
        return self.made_sha256 if self.convert else self.sha256


def made(words: Callable[[list[bytes]], _convert.Sequences], **options: Any) -> Converter:
    """A converter from `words`, which makes sequences of words of files, and the options of `_convert.lines`."""
    return partial(_made, words, options)


def _made(words: Callable[[list[bytes]], _convert.Sequences], options: dict[str, Any], files: list[bytes]) -> bytes:
    return _convert.lines(words(files), **options)


def _names(folder: str, names: str, ending: str) -> str:
    return " ".join(f"{folder}{name}{ending}" for name in names.split())


REGISTRY: Mapping[str, Remote] = {
    "beauty": Remote(
        "Beauty.txt",
        "226cce9c3105299ca0db9615d7d3fb32b3175e90da43100ae352599f0f0107b8",
        about="products that users reviewed (Amazon, Beauty)",
        sizes=(22363, 12101, 198502),
    ),
    "toys": Remote(
        "Toys_and_Games.txt",
        "176c680c688d497598c4a89a03b402c0fe78d795e5db335c2e78dd5f2d778a3f",
        about="products that users reviewed (Amazon, Toys)",
        sizes=(19412, 11924, 167597),
    ),
    "sports": Remote(
        "Sports_and_Outdoors.txt",
        "2a095e0648872beb9982408958290f5d655db5be2911c3756b5446de9f0b8de2",
        about="products that users reviewed (Amazon, Sports)",
        sizes=(35598, 18357, 296337),
    ),
    "yelp": Remote(
        "Yelp.txt",
        "724b219106b81dd2349027da997334ddb6da9fe2f152ad6e0d97a93170f7caed",
        about="places that users reviewed (Yelp)",
        licence="Yelp's terms",
        sizes=(30431, 20033, 316354),
    ),
    "lastfm": Remote(
        "LastFM.txt",
        "9ded486adb5b0fe9dc761950afa0a9a05e93ff018992e0c52bf11afec529f802",
        about="artists that users listened to (HetRec 2011)",
        licence="non-commercial",
        sizes=(1090, 3646, 52551),
    ),
    "wikipedia": Remote(
        "wikipedia.txt",
        "ab5d5addedafb496a212d939cb595637f580e436f640916ba337edb03aa02bed",
        SASREC,
        about="pages that users edited (JODIE)",
        sizes=(8227, 1000, 157474),
    ),
    "jazz": Remote(
        "JazzStandards.json",
        "27c4c843bb003ac92595cf6d64374737854794c5102ed7cb6293c5ea51b039b0",
        JAZZ,
        made(_convert.chords, min_length=12, min_uses=3, collapse=True),
        "52b7daaefbb69d49ce43e39208eccfdad28c1deca0d962f1cab41ef193cf9e8a",
        "chords of jazz standards",
        sizes=(1304, 732, 54598),
    ),
    "nottingham": Remote(
        _names(
            "",
            "ashover hpps jigs morris playford reelsa-c reelsd-g reelsh-l reelsm-q reelsr-t reelsu-z slip waltzes xmas",
            ".abc",
        ),
        "b1c9a8ec080e9a81ce22f3d8ce014f23d381ba59e5a6119b44f162b12b910824",
        NOTTINGHAM,
        made(_convert.notes, min_length=20, min_uses=5),
        "2bacaea732f2602ad3389af3f939f7176be2f816195a0777e1e750971a452ff0",
        "notes of folk tunes, most of them British and American",
        "GPL-3.0",
        (1033, 198, 105818),
    ),
    "essen": Remote(
        _names(
            "essenFolksong/",
            "altdeu10 altdeu20 ballad10 ballad20 ballad30 ballad40 ballad50 ballad60 ballad70 ballad80 boehme10 boehme20 "
            "dva0 erk10 erk20 erk30 erk5 fink0 folkHaydn han1 han2 irl kinder0 lot lux variant0 zuccal0",
            ".abc",
        ),
        "bd1dbcbc11c8a4eab7b729635c3f072462229222d89771300e1abab4378ca370",
        MUSIC21,
        made(_convert.notes, min_length=20, min_uses=5),
        "b02c2c521ebcc2051280d1acd373b09b4e40429e88e6e5f099c96805f7a8472b",
        "notes of folk songs, most of them German or Chinese",
        "non-commercial",
        sizes=(8331, 288, 461938),
    ),
    "oneill": Remote(
        _names(
            "oneills1850/",
            "0001-0050 0051-0100 0101-0200 0201-0300 0301-0350 0351-0400 0401-0486 0487-0500 0501-0550 0550-0625 0626-0700 "
            "0701-0720 0721-0730 0731-0731 0732-0758_bs 0759-0810 0811-0899 0900-0950 0951-0981 0981-1000 1001-1031 "
            "1031-1115 1116-1135_mh 1136-1175 1176-1275 1276-1375 1376-1475 1476-1555 1556-1624 1625-1700 1701-1780 "
            "1781-1800 1801-1850",
            ".abc",
        ),
        "cad9ee7642633a854eb1c07a08d97e10ebcc2f7f46219943d42ade300b299d9f",
        MUSIC21,
        made(_convert.notes, min_length=20, min_uses=5),
        "4151513349be2356d5fae8537752b7b2257a30e88951f14b59736f223903644d",
        "notes of Irish tunes (O'Neill, 1903)",
        sizes=(1843, 191, 198120),
    ),
    "python": Remote(
        _names(
            "",
            "_pydecimal _pyio aifc argparse ast asyncio/base_events asyncio/proactor_events asyncio/selector_events "
            "asyncio/tasks asyncio/unix_events asyncio/windows_events bdb cgi codecs collections/__init__ "
            "concurrent/futures/process configparser dataclasses datetime difflib distutils/ccompiler distutils/dist "
            "doctest email/_header_value_parser email/message enum ftplib functools html/entities http/client "
            "http/cookiejar http/server imaplib importlib/_bootstrap importlib/_bootstrap_external inspect ipaddress locale "
            "logging/__init__ logging/config logging/handlers mailbox multiprocessing/connection multiprocessing/managers "
            "multiprocessing/pool nntplib optparse os pathlib pdb pickle pickletools platform pydoc random re/_parser "
            "shutil smtplib socket ssl statistics subprocess tarfile threading tkinter/__init__ tkinter/tix tkinter/ttk "
            "traceback turtle typing unittest/case unittest/mock urllib/parse urllib/request xml/dom/expatbuilder "
            "xml/dom/minidom xml/etree/ElementTree xmlrpc/client xmlrpc/server zipfile",
            ".py",
        ),
        "c5db0935cec984d5341140b0114a93285a6352660ece00f40f09072aa4b0ffc1",
        CPYTHON,
        made(_convert.python_names, min_length=15, min_uses=20),
        "c990945b230559873cdba4291b53b0fd8ef4870a675fd4c2ff2df4fc3e2c82de",
        "identifiers of functions in Python 3.11's library",
        "PSF-2.0",
        sizes=(2759, 949, 100091),
    ),
    "redis": Remote(
        _names(
            "",
            "acl aof bitops blocked cluster config db debug defrag dict eval evict expire functions geo hyperloglog latency "
            "listpack module networking object quicklist rax rdb redis-benchmark redis-cli replication script_lua sds "
            "sentinel server t_hash t_list t_set t_stream t_string t_zset tls util ziplist",
            ".c",
        ),
        "0125084c15f5ca251843e69b6436199502f63e0c9699bfd0b779201cc18f33f4",
        REDIS,
        made(_convert.c_names, min_length=15, min_uses=20),
        "acdcd3e71cdb2b56bcb67e06cc6be808086d0c056145be752a95599211b89ace",
        "identifiers of functions in Redis 7.2, in C",
        "BSD-3-Clause",
        sizes=(2049, 997, 125027),
    ),
    "loans": Remote(
        "input_data/bpic2012.xes.gz",
        "fdc916898cd56f0fb65f0c6c2f69140e6345fe9fc8be2ef1dde0647107db050b",
        PM4PY,
        made(_convert.activities, min_length=6, min_uses=5),
        "6a79797eb8d20eddc11a445ae9b46d666e1523e22e4ac26aa25269c9d316fd5e",
        "activities of applications for a loan (BPI Challenge 2012)",
        "4TU's terms of use",
        sizes=(9658, 36, 251913),
    ),
    "sepsis": Remote(
        "compressed_input_data/13_SEPSIS_1t_per_variant.xes.gz",
        "cba69e403106278e2e45125475cfcf50d058e828d75dc58bb54cd2c38defa8fa",
        PM4PY,
        made(_convert.activities, min_length=6, min_uses=5),
        "47082ee53ed0b5a6654bbded34906a1264d3bbd0c4a83ab1ea94c6f4652ef18a",
        "activities of hospital patients with sepsis, one of each variant",
        "4TU's terms of use",
        sizes=(835, 16, 13723),
    ),
    "wikispeedia": Remote(
        "wikispeedia/paths_unfinished.tsv",
        "d63f4925546ef798b118f318e18ffe7de01a51f94525d7e887814dd64f812fe5",
        WIKISPEEDIA,
        made(_convert.pages, min_length=6, min_uses=5),
        "c79f75cf8ff99af2ac25e1cfff54a0d57f3db0662f784ac4837d3e5a89207d72",
        "pages that players clicked on, in games that they gave up (SNAP)",
        sizes=(7461, 2224, 78302),
    ),
    "assistments": Remote(
        "assist2009_updated_train.csv assist2009_updated_test.csv",
        "c891e8cfb2f6cb710fb6aaf1f66a7fb3b3743364e72dc69038221fc99036a8f5",
        DKVMN,
        made(_convert.exercises, min_length=6, min_uses=5),
        "53b94234609fd6d6fbaf88a6da25a615e735de585900dc9cc9879dca4be5d8cf",
        "skills of the exercises that students answered (ASSISTments 2009)",
        sizes=(3510, 110, 323687),
    ),
}


def table(registry: Mapping[str, Remote] = REGISTRY) -> str:
    """A line per data set: its name, sizes, licence, and what it is."""
    head: tuple[str, ...] = ("name", "users", "items", "events", "licence", "a history is of")
    rows = [head]
    for name, remote in registry.items():
        sizes = [f"{size:,}" for size in remote.sizes] if remote.sizes else ["-"] * 3
        rows.append((name, *sizes, remote.licence, remote.about))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = range(1, 4)
    lines = (
        "  ".join(
            f"{cell:>{width}}" if i in numbers else f"{cell:<{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
