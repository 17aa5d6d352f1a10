"""The README's example runs as it is printed."""

import re
from pathlib import Path


def test_the_example_runs(capsys) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(snippet, {})
    assert "torch.Size([8, 4, 50, 32]) torch.Size([50, 32])" in capsys.readouterr().out
