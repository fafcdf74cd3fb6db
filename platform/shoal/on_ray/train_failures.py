"""When failures end a run: as Ray Train counts them, but for starts that fail, which are counted in a row.

Ray counts them over the life of a run. But each node that is lost may cost one, or some: until another is there the workers
cannot start, and for 20 seconds Ray takes a node that has just died for one that lives. So the fourth lost node would end a run
that may lose any number of them.
"""

from __future__ import annotations

from typing import Any

from ray.train import ControllerError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailurePolicy


def in_a_row(config: Any) -> FailurePolicy:
    """Ray's policy by a FailureConfig, whose `controller_failure_limit` is of starts that fail one after the other."""

    # Within a function it travels by value: Ray's controller need not find our package.
    class InARow(DefaultFailurePolicy):
        def make_decision(self, training_failed_error: Any) -> Any:
            if not isinstance(training_failed_error, ControllerError):
                self._controller_failures = 0  # workers had started
            return super().make_decision(training_failed_error)

    return InARow(config)


class Trainer(TorchTrainer):
    """Ray's, with the policy of `in_a_row`."""

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        given["failure_policy"] = in_a_row(self.run_config.failure_config)
        return super()._initialize_and_run_controller(**given)  # type: ignore[misc]  # Ray's older annotation
