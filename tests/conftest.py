"""One thread for every test: tiny tensors gain nothing from two, and two cores are shared."""

import torch

torch.set_num_threads(1)
