"""What a user can get wrong: one exception family whose messages say found, expected and remedy."""

from __future__ import annotations


class NasError(Exception):
    """Base of every error that a user can cause and mend.

    Args:
        found: what was found, in one sentence.
        expected: what was expected instead (optional).
        remedy: what to do about it (optional).
    """

    def __init__(self, found: str, *, expected: str = "", remedy: str = "") -> None:
        self.found, self.expected, self.remedy = found, expected, remedy
        lines = [found]
        if expected:
            lines.append(f"Expected: {expected}")
        if remedy:
            lines.append(f"Try: {remedy}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (workers); the default protocol would lose the keywords.
        return (_rebuild, (type(self), self.found, self.expected, self.remedy))


def _rebuild(kind: type[NasError], found: str, expected: str, remedy: str) -> NasError:
    return kind(found, expected=expected, remedy=remedy)


class ExperimentError(NasError):
    """An experiment file or an option is wrong."""


class ContentError(NasError):
    """A space, table, experiment or plug-in cannot be found or loaded."""


class SpaceError(NasError):
    """A search space, candidate or genome is malformed."""


class DataError(NasError):
    """Data cannot be read or have the wrong sizes, classes or values."""


class TableError(NasError):
    """A latency table is missing, damaged, or does not fit the space or the device."""


class BudgetError(NasError):
    """No candidate of the space can meet the budget."""


class RewardError(NasError):
    """A reward is configured wrongly or is given values it is not defined for."""


class StudyError(NasError):
    """The record of trials cannot be opened, is in use, or belongs to another experiment."""


class CompressionError(NasError):
    """A compression pass was asked for something that it cannot do to this model."""


class TrainingError(NasError):
    """A training went wrong: loss not finite, or out of time."""


class StudentError(NasError):
    """A student folder cannot be made or read."""


class ExtraError(NasError):
    """An optional dependency is missing."""
