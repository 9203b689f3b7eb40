"""Contract checks that anybody can run on a plug-in of their own: space, strategy, reward, pass, evaluator, runtime.

Each raises AssertionError and says which clause of the contract is broken, and by what::

    from nas.testing import check_space

    def test_my_space():
        check_space(MySpace(TaskInfo((3, 32, 32), classes=10)))
"""

from nas.testing.evaluators import check_evaluator
from nas.testing.passes import check_pass
from nas.testing.rewards import check_reward
from nas.testing.runtimes import check_runtime
from nas.testing.spaces import check_space, synthetic_table
from nas.testing.strategies import check_strategy

__all__ = [
    "check_evaluator", "check_pass", "check_reward", "check_runtime", "check_space", "check_strategy",
    "synthetic_table",
]  # fmt: skip
