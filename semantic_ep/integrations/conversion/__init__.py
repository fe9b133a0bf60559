"""Convert checkpoints between Hugging Face and Megatron; docs/conversion.md has the families."""

from semantic_ep.integrations.conversion.convert import (
    ConversionSummary,
    huggingface_to_megatron,
    megatron_to_huggingface,
)

__all__ = ["ConversionSummary", "huggingface_to_megatron", "megatron_to_huggingface"]
