"""Compressing one trained model step by step: a pass, fine-tuning, the next pass, and a record of what each did."""

from nas.pipeline.run import Pipeline, Tuning, execute
from nas.pipeline.steps import Step, parse_step, read_plan, steps_of

__all__ = ["Pipeline", "Step", "Tuning", "execute", "parse_step", "read_plan", "steps_of"]
