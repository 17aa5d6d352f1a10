"""A small model and small histories, for tests of the recommender."""

from typing import Any

import numpy as np
import torch

from awrsr import AWRSR, AWRSRConfig
from awrsr.data.histories import Histories

ITEMS, WINDOW = 23, 9
BACKBONES = ("sasrec", "stosa")
REFINEMENTS = {"sasrec": ("none", "simple", "value", "additive"), "stosa": ("none", "simple", "value", "additive", "stochastic")}
KINDS = [{"backbone": each, "refinement": name} for each in BACKBONES for name in REFINEMENTS[each]]  # of models
PUBLISHED = {"backbone": "stosa", "refinement": "none", "mean_branch": "published"}


def make_model(seed: int = 0, **changes: Any) -> AWRSR:
    """In evaluation mode, with weights large enough to tell items and positions apart."""
    torch.manual_seed(seed)
    usual = {"num_items": ITEMS, "max_len": WINDOW, "hidden": 8, "heads": 2, "layers": 2, "rank": 3, "backend": "torch"}
    usual |= {"sharpness": 0.0, "gate": 1.0, "learned_gate": False, "learned_scale": False}
    model = AWRSR(AWRSRConfig(**(usual | changes))).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name and weight.dim() > 1:
                weight.normal_(std=0.7)
            else:
                weight.add_(torch.randn_like(weight) * 0.3)
    return model


def make_lists(users: int, seed: int = 0, least: int = 1, most: int = 2 * WINDOW, items: int = ITEMS) -> list[list[int]]:
    """Histories of all lengths in least..most, with repeats."""
    rng = np.random.default_rng(seed)
    return [rng.integers(items, size=length).tolist() for length in rng.integers(least, most + 1, size=users)]


def as_numbered(lists: list[list[int]], items: int = ITEMS) -> Histories:
    """Histories whose items are called by their places."""
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in lists])]).astype(np.int64)
    flat = np.array([item for each in lists for item in each], dtype=np.int64)
    return Histories(flat, offsets, np.arange(items), np.arange(len(lists)))


def same_weights(one: AWRSR, other: AWRSR) -> bool:
    state = other.state_dict()
    return all(torch.equal(weight, state[name]) for name, weight in one.state_dict().items())
