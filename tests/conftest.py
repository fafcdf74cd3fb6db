import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # two compute threads on two cores stall each other as soon as anything else runs
# Nothing is timed: a busy machine must not fail a test.
settings.register_profile("shoal", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shoal")
