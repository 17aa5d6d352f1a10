"""Files are written with the rights of any new file."""

import os
from pathlib import Path

from awrsr import files


def test_files_get_the_rights_that_any_new_file_gets(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        files.write_json(tmp_path / "a.json", {})
    finally:
        os.umask(old)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640
