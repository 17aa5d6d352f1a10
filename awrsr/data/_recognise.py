"""What a file is, by its content: everything that is no table of events is named, with what to do about it, before it is read."""

import io
import json
import re
import zipfile

from .ids import DataError

NAME_IT = "if the words are ids all the same, name the format (--format lines or pairs)"
UNPACK = "unpack it first"
AS_CSV = "save it as CSV, or as Parquet"
MAGIC: dict[bytes, tuple[str, str]] = {  # first bytes -> what it is, what to do
    b"\x1f\x8b": ("a gzip archive inside another", UNPACK),
    b"BZh": ("a bzip2 archive", UNPACK),
    b"\xfd7zXZ": ("an xz archive", UNPACK),
    b"\x28\xb5\x2f\xfd": ("a zstd archive", UNPACK),
    b"\x04\x22\x4d\x18": ("an LZ4 archive", UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7-Zip archive", UNPACK),
    b"Rar!": ("a RAR archive", UNPACK),
    b"\x89HDF": ("an HDF5 file", AS_CSV),
    b"\x93NUMPY": ("a NumPy array", AS_CSV),
    b"SQLite format 3": ("an SQLite database", "export the table of events as CSV"),
    b"Obj\x01": ("an Avro file", AS_CSV),
    b"ORC": ("an ORC file", AS_CSV),
    b"ARROW1": ("an Arrow file (Feather)", "save it as Parquet, for example polars.read_ipc(FILE).write_parquet(...)"),
    b"\xff\xff\xff\xff": ("an Arrow stream", "save it as Parquet, for example polars.read_ipc_stream(FILE).write_parquet(...)"),
    b"FEA1": ("a Feather file", AS_CSV),
    b"PARE": ("an encrypted Parquet file", "save it without encryption"),
    b"\xd0\xcf\x11\xe0": ("an old Excel workbook or another Office file", AS_CSV),
    b"%PDF": ("a PDF document", "find the table that it was made from"),
    b"\x89PNG": ("a PNG picture", "it holds no events"),
    b"\xff\xd8\xff": ("a JPEG picture", "it holds no events"),
    b"GIF8": ("a GIF picture", "it holds no events"),
    b"\x7fELF": ("a program", "it holds no events"),
    b"MATLAB": ("a MATLAB file", AS_CSV),
    b"RDX": ("an R workspace", AS_CSV),
    b"X\n\x00\x00": ("an R object (.rds)", AS_CSV),
    b"$FL2": ("an SPSS file", AS_CSV),
    b"<stata_dta>": ("a Stata file", AS_CSV),
    b"\xff\xfe\x00\x00": ("UTF-32 text", "convert it to UTF-8, for example with iconv -f UTF-32 -t UTF-8"),
    b"\xff\xfe": ("UTF-16 text", "convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8"),
    **{bytes([0x80, p]): ("a Python pickle, which is never opened", AS_CSV) for p in range(2, 6)},
}
TEXTS = [  # pattern of the first lines, what it is, what to do
    (r"version https://git-lfs", "a Git LFS pointer, not the file that it stands for", "fetch the file with git lfs pull"),
    (r"\.\./.*annex/objects/|/annex/objects/", "a git-annex pointer", "fetch the file with git annex get"),
    (r"\(?[dl]p[0-9]+$|[(c]\S*(\n\S+)?\n?\(?[dl]p[0-9]", "a Python pickle, which is never opened", AS_CSV),
    (r"<(\?xml|!doctype|!--|html|[a-z][\w:.-]*(\s[^<>]*)?/?>)", "XML or HTML", "save the table in it as CSV"),
    (r"<https?:", "RDF triples", "save the events in it as CSV"),
    (r"\{\\rtf", "a Rich Text document", AS_CSV),
    (r"(--[^\n]*\s+|/\*.*?\*/;?\s*)*(create\s+\w+\s|insert\s+into\s|drop\s+table\s|copy\s.*\sfrom\s)", "SQL", "export it as CSV"),
    (r"(--[^\n]*\s+|/\*.*?\*/;?\s*)*(pragma|begin|start|set|use)\b[^\n]*;$", "SQL", "export it as CSV"),
    (
        r"[^\n]*\n[ |+]*:?-{3,}[-:+| ]*$|\s*[+|][-=+|]{4,}$|[┌╔]|shape: \(",
        "a printed table",
        "write the table as CSV instead of printing it",
    ),
    (r"\S+ \S+ \S+ \[\d+/\w{3}/\d{4}:", "a web server's log", "extract users, items and times as CSV"),
    (r"\[?\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d\S*\s.*\b(INFO|DEBUG|WARN|WARNING|ERROR)\b", "a log", "extract the events as CSV"),
    (r"(<\d+>)?[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d ", "a system log", "extract users, items and times as CSV"),
    (r"%%MatrixMarket", "a Matrix Market file", AS_CSV),
    (r"@(relation|attribute|data)\b", "an ARFF file", AS_CSV),
    (r"---\s*$|%YAML", "YAML", AS_CSV),
    (r"-----BEGIN ", "a key or certificate", "it holds no events"),
    (r"#!", "a program", "it holds no events"),
    (r"[#%](\s|$)", "text that begins with a comment", "remove the comments, for example with grep -v '^[#%]'"),
    (r"\S+( \d+:[-+.\deE]+)+\s*$", "a LibSVM file", "write a line per event, as CSV"),
    (r"\\(documentclass|begin)\b", "LaTeX", "it holds no events"),
    (r"structure\(|c\(", "R code", AS_CSV),
]
TO_JSON = "import ast, json, sys; [print(json.dumps(ast.literal_eval(line))) for line in sys.stdin]"


def refuse_binary(source: str, data: bytes) -> None:
    """Raise DataError if the first bytes are those of something else than text or Parquet."""
    kind = next((each for magic, each in MAGIC.items() if data.startswith(magic)), None)
    if data.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        kind = _in_zip(data)
    elif data[257:262] == b"ustar":
        kind = ("a tar archive", UNPACK)
    elif kind is None:
        ends = [name for start, name in ((1, "LE"), (0, "BE")) if data[start:400:2].count(0) > 0.4 * len(data[start:400:2])]
        kind = (
            ("UTF-16 text without a mark", f"convert it to UTF-8, for example with iconv -f UTF-16{ends[0]} -t UTF-8")
            if ends
            else None
        )
    if kind is not None:
        raise DataError(f"{source}: is {kind[0]}; must be text or Parquet: {kind[1]}")


def _in_zip(data: bytes) -> tuple[str, str]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return "a zip archive", UNPACK
    if any(name.startswith("xl/") for name in names):
        return "an Excel workbook", AS_CSV
    if "mimetype" in names:
        return "an OpenDocument file", AS_CSV
    if any(name.endswith("data.pkl") for name in names):
        return "a file of torch.save, which is never opened", AS_CSV
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays", AS_CSV
    return "a zip archive", UNPACK


def recognise_text(source: str, data: bytes) -> str | None:
    """ "jsonl" for JSON lines, None for what may be a table or words. Raises DataError for text that is neither."""
    head = data[:20000].decode(errors="replace").lstrip()
    if head.startswith(("{", "[")):
        return _json_kind(source, data.lstrip().partition(b"\n")[0].decode(errors="replace").strip(), head)
    for pattern, kind, advice in TEXTS:
        if re.match(pattern, head, re.IGNORECASE | re.MULTILINE):
            raise DataError(f"{source}: is {kind}; must be a table of events or lines of ids: {advice}; {NAME_IT}")
    return None


def _json_kind(source: str, line: str, head: str) -> str | None:
    """The same for text that begins like JSON. line: its first one."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        if re.match(r"\{\s*u?'", line):
            advice = f'python -c "{TO_JSON}" < {source} > {source}.jsonl'
            raise DataError(f"{source}: is lines of Python's dictionaries; must be JSON lines: {advice}") from None
        if not re.match(r"""\{\s*(["}]|$)|\[\s*([\[{"\]]|-?[0-9.]+\s*[,\]]|$)""", line) or re.match(r"\[[^\]\"{,]*\]\s*\S", line):
            return None
        value = [] if head.startswith("[") else None
    if isinstance(value, dict):
        return "jsonl"
    kind, recipe = ("a JSON array", "jq -c '.[]'") if isinstance(value, list) else ("JSON over several lines", "jq -c .")
    raise DataError(f"{source}: is {kind}; must be JSON lines, one object per event: {recipe} {source} > {source}.jsonl")
