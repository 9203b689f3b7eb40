"""Executors: where evaluations run; results arrive as they are done."""

from nas.executors.base import Executor, Serial
from nas.executors.processes import Processes, cores, die_with

__all__ = ["Executor", "Processes", "Serial", "cores", "die_with"]
