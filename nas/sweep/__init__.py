"""Sweeps: many runs of one experiment with some of its keys varied, several at once in processes.

Reads as :mod:`nas.sweep.schedule`. A trial's process imports little, so this package imports nothing.
"""
