"""Which rank serves each request of a list that is known from the start."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from semantic_ep.plan.requests import assign_requests
from semantic_ep.plan.schedule import Schedule


def round_robin(num_requests: int, ep_size: int) -> np.ndarray:
    """[R] int64, requests dealt to ranks in order of arrival."""
    return np.arange(num_requests) % ep_size


def by_affinity(
    prompts: Sequence[Sequence[int]],
    schedule: Schedule,
    *,
    max_new_tokens: int,
    decode_schedule: Schedule | None = None,
) -> np.ndarray:
    """[R] int64, requests on the ranks that hold the experts of their tokens.

    Tokens a rank are balanced first, the prompt and what may be generated counted together.

    Args:
        prompts: Token ids of each request.
        schedule: Of the plan that the experts are placed by.
        max_new_tokens: Tokens that each request may generate.
        decode_schedule: Of the plan for generated tokens, if they have one of their own; what a
            request generates is taken to resemble its prompt.
    """
    scores = [schedule.request_score(np.asarray(prompt)) for prompt in prompts]
    if decode_schedule is not None:
        for score, prompt in zip(scores, prompts, strict=True):
            generated = decode_schedule.request_score(np.asarray(prompt))
            score += generated * (max_new_tokens / len(prompt))
    tokens = np.array([len(prompt) + max_new_tokens for prompt in prompts])
    return assign_requests(np.stack(scores), tokens)
