"""Joint search against one technique after the other, at equal training seconds, screening and latencies."""

ARMS = ("joint", "sequential", "uniform", "random")
TARGETS = "50%,25%,12.5%"
