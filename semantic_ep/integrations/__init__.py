"""Adapters to Megatron-core, DeepSpeed and transformers; the only importers of the first two."""
