"""DeepSpeed: training with observation, and inference with semantic expert parallelism."""

from semantic_ep.integrations.deepspeed.balance import LoadBalancingLoss
from semantic_ep.integrations.deepspeed.export import save_huggingface_checkpoint
from semantic_ep.integrations.deepspeed.training import initialize, peers_must_answer, read_config

__all__ = [
    "LoadBalancingLoss",
    "initialize",
    "peers_must_answer",
    "read_config",
    "save_huggingface_checkpoint",
]
