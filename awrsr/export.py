"""Exports the scoring path to a file that runs without this package, by torch.export or ONNX, and compares it with the model.

B histories of a batch, L window (1..max_len), N items.

Inputs of the program are items (B, L) int64, histories that end at the right with any id of 0..N-1 in front of shorter ones, and
lengths (B,) int64 in 0..L. Output is scores (B, N) of every item as the next one (backbone stosa: negative squared distances), seen
items included; column j is the item at place j of the catalogue, whose ids travel in the file. B and L may differ between calls.
"""

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import atomic
from .models.attention import RefinedAttention
from .models.network import AWRSRNetwork
from .recommender import AWRSR

SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}
ABOUT = "awrsr.json"  # of the file's extra files (torch) or its metadata (ONNX): the configuration, and the catalogue's ids
TOLERANCE = 1e-4  # difference to the model's scores, relative to the largest of them
ONNX_LIMIT = 2**31  # bytes of one ONNX file

Run = Callable[[Tensor, Tensor], Tensor]


def export(model: AWRSR, path: Path | str, *, format: str = "torch", check: bool = True) -> Path:
    """Write the scoring path of a trained model to a file, for use on a CPU. The file appears only when it is complete.

    Args:
        model: on any device; it is not changed.
        path: ends in .pt2 ("torch") or .onnx ("onnx").
        format: "torch" (`torch.export.load(path).module()(items, lengths)`, any device after
            `torch.export.passes.move_to_device_pass`) or "onnx" (any ONNX runtime; needs onnx and onnxscript to write).
        check: read the file back and compare its scores with the model's, on random histories of all kinds of lengths and in
            batches and windows of several sizes. ONNX needs onnxruntime for that; without it a warning says so.

    Returns:
        The path.

    Raises:
        ValueError: an unknown format, a suffix that does not fit, a model without items, an ONNX file of 2 GiB or more.
        ImportError: packages for ONNX are missing.
        RuntimeError: the file's scores are not the model's; nothing is written.
    """
    path = Path(path)
    if format not in SUFFIXES:
        raise ValueError(f"format is {format!r}, must be one of {', '.join(SUFFIXES)}")
    if path.suffix != SUFFIXES[format]:
        raise ValueError(f"path is {str(path)!r}, must end in {SUFFIXES[format]} for format {format!r}")
    if not model.config.num_items:
        raise ValueError("model has no items: it must be fitted or loaded before it can be exported")
    path.parent.mkdir(parents=True, exist_ok=True)
    network = copy.deepcopy(model.network).cpu().eval().requires_grad_(False)
    program = _traced(network)
    about = json.dumps({"config": asdict(model.config), "item_ids": model.ids().tolist()}, ensure_ascii=False, default=str)
    with atomic(path) as temporary:
        if format == "torch":
            content = io.BytesIO()  # not the file: when a disk is full, torch ends the process
            torch.export.save(program, content, extra_files={ABOUT: about})
            temporary.write_bytes(content.getbuffer())
        else:
            _write_onnx(program, temporary, about)
        run = (_load_torch if format == "torch" else _load_onnx)(temporary) if check else None
        if run is not None:
            _compare(run, network, path)
    return path


class _Scorer(nn.Module):
    """A copy of the network whose forward returns scores. Only the reference can be traced for any batch size and window: "torch"
    cuts a batch into chunks, and their number would be part of the trace."""

    def __init__(self, network: AWRSRNetwork) -> None:
        super().__init__()
        self.model = copy.deepcopy(network)
        for module in self.modules():
            if isinstance(module, RefinedAttention):
                module.backend = "reference"

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        return self.model.scores_padded(items, lengths)


def _traced(network: AWRSRNetwork) -> torch.export.ExportedProgram:
    window = network.config.max_len
    example = torch.zeros(2, window, dtype=torch.int64), torch.tensor([0, window])
    with torch.no_grad():
        return torch.export.export(_Scorer(network), example, dynamic_shapes=_shapes(window))


def _shapes(window: int) -> dict[str, Any]:
    """The dimensions that may differ between calls, by input."""
    batch = torch.export.Dim("batch", min=1)
    length = torch.export.Dim("length", min=1, max=window) if window > 1 else None
    return {"items": {0: batch, 1: length}, "lengths": {0: batch}}


def _load_torch(path: Path) -> Run:
    with _quiet():
        return torch.export.load(path).module()


def _write_onnx(program: torch.export.ExportedProgram, path: Path, about: str) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("export to ONNX needs the packages onnx and onnxscript: pip install onnx onnxscript") from error
    size = sum(x.numel() * x.element_size() for x in program.state_dict.values())
    if size >= ONNX_LIMIT:
        raise ValueError(f"model has {size / 2**30:.1f} GiB of weights, must be below 2 GiB for ONNX: choose format 'torch'")
    window = json.loads(about)["config"]["max_len"]
    with _quiet():
        converted = torch.onnx.export(program, dynamo=True, dynamic_shapes=_shapes(window), output_names=["scores"], verbose=False)
    assert converted is not None
    converted.model.metadata_props[ABOUT] = about
    converted.save(path, external_data=False)


def _load_onnx(path: Path) -> Run | None:
    try:
        import onnxruntime
    except ImportError:
        warnings.warn("the ONNX file was not checked against the model, since onnxruntime is not installed", stacklevel=3)
        return None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda items, lengths: torch.from_numpy(session.run(["scores"], {"items": items.numpy(), "lengths": lengths.numpy()})[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide torch's warnings about its own code and about unrelated packages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _batches(num_items: int, max_len: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches to compare on: one or several histories, from empty to full, in full windows and shorter ones."""
    generator = torch.Generator().manual_seed(0)
    for window in sorted({1, min(2, max_len), (max_len + 1) // 2, max_len}):
        some = sorted({0, 1, window // 3, window // 2, window - 1, window})
        for lengths in ([window], some, some * 3):
            yield torch.randint(num_items, (len(lengths), window), generator=generator), torch.tensor(lengths)


@torch.inference_mode()
def _compare(run: Run, network: AWRSRNetwork, path: Path) -> None:
    """Raise RuntimeError unless the scores of the file agree with those of the model."""
    for items, lengths in _batches(network.config.num_items, network.config.max_len):
        expected, actual = network.scores_padded(items, lengths), run(items, lengths)
        error, most = float((actual - expected).abs().max()), float((expected.amax(1) - expected.amin(1)).max())
        if not error <= TOLERANCE * most:  # false for NaN, too
            raise RuntimeError(
                f"{path} was not written: its scores differ from the model's by {error:.2e} where they span {most:.2e} "
                f"(batch of {len(lengths)}, window {items.shape[1]}); at most {TOLERANCE:g} times that is allowed"
            )
