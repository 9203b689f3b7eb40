"""Published tables in CSV files as a search space; see ``space`` in docs/experiment.md."""

from nas.tabular import TabularSpace

space = TabularSpace
