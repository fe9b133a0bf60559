"""Choose the next token of each sequence, each in its own way, in one go.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from semantic_ep.serve.protocol import TokenLogprob
from semantic_ep.serve.sequences import Sequence

# Below it the most probable token is all but certain, and dividing by it would overflow.
_GREEDY = 1e-5


def sample(logits_BV: Tensor, sequences: Rows[Sequence]) -> list[int]:
    """Next token of each sequence.

    A sequence's draw depends on its own logits and random numbers only, not on what else is in the
    batch.
    """
    token_B = logits_BV.argmax(dim=-1)
    drawn = [row for row, s in enumerate(sequences) if s.request.sampling.temperature > _GREEDY]
    if drawn:
        token_B[drawn] = _draw(logits_BV[drawn].double(), [sequences[row] for row in drawn])
    return token_B.tolist()


def logprobs(
    logits_BV: Tensor, tokens: Rows[int], sequences: Rows[Sequence]
) -> list[tuple[TokenLogprob, ...]]:
    """The log-probabilities that each sequence asked for, of the model's own distribution."""
    wanted = [row for row, s in enumerate(sequences) if s.request.sampling.logprobs is not None]
    found: list[tuple[TokenLogprob, ...]] = [()] * len(sequences)
    for row in wanted:
        logprob_V = logits_BV[row].float().log_softmax(dim=-1)
        count = min(sequences[row].request.sampling.logprobs, len(logprob_V))
        value, index = logprob_V.topk(count)
        top = tuple(zip(index.tolist(), value.tolist()))
        own = float(logprob_V[tokens[row]])
        found[row] = (TokenLogprob(token_id=tokens[row], logprob=own, top=top),)
    return found


def _draw(logits_BV: Tensor, sequences: Rows[Sequence]) -> Tensor:
    """Draw by inverting the cumulative distribution of tokens in falling order: [B] int64."""
    settings = [s.request.sampling for s in sequences]
    device, vocabulary = logits_BV.device, logits_BV.shape[1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

    temperature, top_p = (
        column([getattr(s, name) for s in settings]) for name in ("temperature", "top_p")
    )
    top_k = column([min(s.top_k or vocabulary, vocabulary) for s in settings])
    value, order = (logits_BV / temperature).sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(vocabulary, device=device)
    probability = value.masked_fill(rank_V >= top_k, -torch.inf).softmax(dim=-1)
    # A token belongs to the nucleus if those before it do not reach top_p; the first always does.
    before = probability.cumsum(dim=-1) - probability
    probability = probability.masked_fill((before >= top_p) & (rank_V > 0), 0)
    cumulative = probability.cumsum(dim=-1)
    draw = column([s.draws.random() for s in sequences]) * cumulative[:, -1:]
    # Rounding must not lead past the last token that can be drawn.
    last = (probability > 0).sum(dim=-1, keepdim=True) - 1
    chosen = torch.searchsorted(cumulative, draw, right=True).minimum(last)
    return order.gather(1, chosen)[:, 0]
