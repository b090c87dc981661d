"""Interleaved measuring: every case in turn, several times over, in reversed order every second
time, so that a machine that warms up or is disturbed favours none of them."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Samples:
    """What was measured of one case, one value a repetition."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles."""
        if len(self.values) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return (high - low) / 2

    def beside(self, other: "Samples") -> "Samples":
        """Ratios to the other's values of the same repetitions: what changes the machine's speed
        between repetitions changes both of a pair."""
        return Samples([mine / its for mine, its in zip(self.values, other.values, strict=True)])

    def __len__(self) -> int:
        return len(self.values)


def interleave(
    cases: Mapping[str, Callable[[], float]],
    repetitions: int,
    told: Callable[[str, float], None] = lambda name, value: None,
) -> dict[str, Samples]:
    """Run every case `repetitions` times; `told` of each value as it comes."""
    found = {name: Samples() for name in cases}
    for repetition in range(repetitions):
        for name in order(list(cases), repetition):
            value = cases[name]()
            found[name].values.append(value)
            told(name, value)
    return found


def order(names: Sequence[str], repetition: int) -> Sequence[str]:
    """The order of a repetition: as given, then reversed, and so on."""
    return names if repetition % 2 == 0 else names[::-1]
