"""What transformers generates by itself, in one process: the yardstick for parity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch


def generate_in_one_process(
    directory: Path,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool = False,
) -> list[list[int]]:
    """Greedy tokens of the whole, unpartitioned model, one request at a time.

    Args:
        directory: Hugging Face checkpoint.
        prompts: Token ids; the model is loaded only if there are any.
        max_new_tokens: Bound on the new tokens of each.
        dtype: Of the weights.
        device: Where to run; it must hold the whole model.
        progress: Whether to show a bar (on a terminal).
    """
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    if not prompts:
        return []
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    model = model.to(device).eval()
    outputs = []
    for prompt in tqdm(
        prompts, desc="Checking", unit="request", disable=None if progress else True
    ):
        ids = torch.tensor([prompt], device=device)
        new = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        outputs.append(new[0, len(prompt) :].tolist())
    return outputs
