"""Evaluators: candidate → quality, by distilling a student or by looking up a published table."""

from nas.evaluators.base import Evaluation, Evaluator, evaluators
from nas.evaluators.distil import Distil
from nas.evaluators.lookup import Lookup

__all__ = ["Distil", "Evaluation", "Evaluator", "Lookup", "evaluators"]
