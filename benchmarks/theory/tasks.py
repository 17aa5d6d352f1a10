"""Tasks on which depth matters: induction heads, chains of hops, recall of many pairs; and text. Every batch is drawn anew.

B sequences, L positions. A batch is (tokens, answers), (B, L) each; answers are -1 where nothing is asked.
"""

import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor

Batch = tuple[Tensor, Tensor]
NOT_ASKED = -1


@dataclass(frozen=True)
class Induction:
    """Each item occurs twice, in a random order. At the second occurrence: what followed the first one?"""

    length: int

    @property
    def name(self) -> str:
        return f"induction {self.length}"

    @property
    def vocabulary(self) -> int:
        return self.length

    def draw(self, count: int, generator: Generator) -> Batch:
        """Items are drawn from a vocabulary that is twice as large as what a sequence holds."""
        chosen = _permutations(count, self.vocabulary, generator)[:, : self.length // 2]
        order = _permutations(count, self.length, generator)
        tokens = torch.cat([chosen, chosen], 1).gather(1, order)
        followed = one_hop(tokens)
        return tokens, torch.where(followed >= 0, tokens.gather(1, followed.clamp(min=0)), NOT_ASKED)


@dataclass(frozen=True)
class Hops:
    """k-hop induction heads (Sanford, Hsu and Telgarsky, arXiv 2402.09268): from each position to what followed the last earlier
    occurrence of its letter, k times, for k from 1 to `most`, which the first token says. Letters are random, but never the same
    twice in a row."""

    length: int = 100
    most: int = 8
    letters: int = 4

    @property
    def name(self) -> str:
        return f"up to {self.most} hops"

    @property
    def vocabulary(self) -> int:
        return self.letters + self.most

    def draw(self, count: int, generator: Generator) -> Batch:
        steps = torch.randint(1, self.letters, (count, self.length - 1), generator=generator)
        letters = steps.cumsum(1) % self.letters
        asked = torch.randint(1, self.most + 1, (count, 1), generator=generator)
        answers = torch.full_like(letters, NOT_ASKED)
        reached, target = torch.arange(letters.shape[1]).expand_as(letters), one_hop(letters)
        for hop in range(1, self.most + 1):
            reached = torch.where(reached >= 0, target.gather(1, reached.clamp(min=0)), -1)
            found = torch.where(reached >= 0, letters.gather(1, reached.clamp(min=0)), NOT_ASKED)
            answers = torch.where(asked == hop, found, answers)
        return torch.cat([self.letters - 1 + asked, letters], 1), torch.cat([torch.full_like(asked, NOT_ASKED), answers], 1)

    def kinds(self, tokens: Tensor) -> Tensor:
        """(B,) the number of hops that each sequence asks for."""
        return tokens[:, 0] - self.letters + 1


@dataclass(frozen=True)
class Recall:
    """Multi-query associative recall (MQAR; Arora, Eyuboglu and others, arXiv 2312.04927) as HazyResearch/zoology draws it: pairs
    of key and value, then each key once more, after gaps that favour short ones; all else is random. Defaults: its example."""

    length: int = 64
    pairs: int = 4
    vocabulary: int = 256
    power: float = 0.01

    @property
    def name(self) -> str:
        return f"recall of {self.pairs} pairs"

    def draw(self, count: int, generator: Generator) -> Batch:
        half, context = self.vocabulary // 2, 2 * self.pairs
        keys = 1 + _permutations(count, half - 1, generator)[:, : self.pairs]
        values = half + _permutations(count, self.vocabulary - half, generator)[:, : self.pairs]
        room = (self.length - context) // 2
        weights = self.power * torch.arange(1, room + 1, dtype=torch.float64) ** (self.power - 1)
        gaps = torch.multinomial(weights.expand(count, -1), self.pairs, generator=generator)
        tokens = torch.randint(self.vocabulary, (count, self.length), generator=generator)
        tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
        asked = context + 2 * gaps
        answers = torch.full_like(tokens, NOT_ASKED)
        return tokens.scatter(1, asked, keys), answers.scatter(1, asked, values)


@dataclass(frozen=True)
class Text:
    """The next byte of Python's own library, in windows at random places. A tenth of its files, by name, is held out."""

    length: int = 128
    vocabulary: int = 256
    tested: bool = False

    @property
    def name(self) -> str:
        return "text"

    def draw(self, count: int, generator: Generator) -> Batch:
        source = library()[self.tested]
        starts = torch.randint(len(source) - self.length, (count, 1), generator=generator)
        window = source[starts + torch.arange(self.length + 1)].long()
        return window[:, :-1], window[:, 1:]


@cache
def library() -> tuple[Tensor, Tensor]:
    """The bytes of the modules of Python's library: those to learn from, and those held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts = [b"".join(path.read_bytes() for nth, path in enumerate(files) if (nth % 10 == 0) is held) for held in (False, True)]
    return torch.frombuffer(bytearray(parts[0]), dtype=torch.uint8), torch.frombuffer(bytearray(parts[1]), dtype=torch.uint8)


Task = Induction | Hops | Recall | Text


def one_hop(tokens: Tensor) -> Tensor:
    """(B, L) the position after the last earlier occurrence of each token, -1 where there is none."""
    places = torch.arange(tokens.shape[1])
    same = (tokens[:, :, None] == tokens[:, None, :]) & (places < places[:, None])
    last = torch.where(same, places, -1).amax(2)
    return torch.where(last >= 0, last + 1, -1)


def _permutations(count: int, size: int, generator: Generator) -> Tensor:
    """(count, size) random orders of 0 .. size - 1."""
    return torch.rand(count, size, generator=generator).argsort(1)
