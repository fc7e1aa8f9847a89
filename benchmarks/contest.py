"""Fair comparison: who takes part, in which order, and what the figures say.

A machine's speed drifts while one measures. So the contestants take turns, round by round, each
round in another order, and what is compared are the figures of the same round: a ratio is the
median of the rounds' ratios, with the lowest and the highest beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class Contestant:
    key: str  # for --only
    label: str
    command: tuple[str, ...]  # without its arguments


class Spread(NamedTuple):
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}..{self.high:.{digits}f})"


class Target(NamedTuple):
    text: str
    measured: str
    met: bool


@dataclass
class Result:
    """The figures of one benchmark: for each measure and contestant, one per round."""

    title: str
    unit: str
    digits: int  # after the point, in the table
    contestants: Sequence[Contestant]
    references: tuple[str, ...] = ()  # the contestants that the others are compared with
    notes: list[str] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, measure: str, contestant: Contestant, value: float) -> None:
        self.samples.setdefault(measure, {}).setdefault(contestant.key, []).append(value)

    def took_part(self, *keys: str) -> bool:
        return {contestant.key for contestant in self.contestants}.issuperset(keys)

    def label(self, key: str) -> str:
        return next(one.label for one in self.contestants if one.key == key)

    def ratio(self, measure: str, key: str, reference: str) -> Spread:
        pairs = zip(self.samples[measure][key], self.samples[measure][reference])
        return Spread.of([value / other for value, other in pairs])

    def want(self, text: str, measured: str, met: bool) -> None:
        self.targets.append(Target(text, measured, met))

    def table(self) -> list[list[str]]:
        references = [key for key in self.references if self.took_part(key)]
        rows = [["", "loop", self.unit, *(f"times {self.label(key)}" for key in references)]]
        for measure, samples in self.samples.items():
            for key, values in samples.items():
                ratios = [
                    self.ratio(measure, key, reference).text(2)
                    if key != reference and reference in samples
                    else ""
                    for reference in references
                ]
                rows.append(
                    [measure, self.label(key), Spread.of(values).text(self.digits), *ratios]
                )
        return rows

    def text(self) -> str:
        heads, *rows = aligned(self.table())
        targets = [
            f"{'met' if target.met else 'NOT MET'}: {target.text}: {target.measured}"
            for target in self.targets
        ]
        lines = [self.title, *self.notes, "", heads, "-" * len(heads), *rows, "", *targets]
        return "\n".join(lines)

    def rst(self) -> str:
        """A simple table of reStructuredText, its title and the notes above it."""
        # In the first column an empty cell would continue the row above.
        cells = [[row[0] or "\\", *row[1:]] for row in self.table()]
        border = "  ".join("=" * max(map(len, column)) for column in zip(*cells))
        heads, *rows = aligned(cells)
        about = " ".join(f"{line.rstrip('.')}." for line in (self.title, *self.notes))
        return "\n".join([about, "", border, heads, border, *rows, border])

    def json(self) -> dict[str, object]:
        return {
            "title": self.title,
            "unit": self.unit,
            "contestants": {one.key: one.label for one in self.contestants},
            "samples": self.samples,
            "notes": self.notes,
            "targets": [target._asdict() for target in self.targets],
        }


def turns(contestants: Sequence[Contestant], rounds: int) -> Iterator[Contestant]:
    """Everybody once in each round; who begins changes from round to round."""
    for number in range(rounds):
        first = number % len(contestants)
        yield from (*contestants[first:], *contestants[:first])


def positive(text: str) -> int:
    """A number of something, from the command line."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table
    ]
