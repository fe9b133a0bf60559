from types import SimpleNamespace

import numpy as np
import pytest
import torch

from semantic_ep.serve.protocol import EngineRequest, SamplingParams
from semantic_ep.serve.sampler import logprobs, sample
from semantic_ep.serve.sequences import Sequence

VOCAB = 8


def sequence(**settings):
    request = EngineRequest(id="a", prompt_token_ids=[1], sampling=SamplingParams(**settings))
    return Sequence(request, stop_ids=frozenset({2}))


def draws(count, logits_V, **settings):
    subject = sequence(seed=0, **settings)
    return [sample(logits_V[None], [subject])[0] for _ in range(count)]


@pytest.fixture
def logits():
    return torch.tensor(np.random.default_rng(0).normal(0, 1.5, VOCAB), dtype=torch.float32)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({}, VOCAB), ({"top_k": 3}, 3), ({"temperature": 0.5}, VOCAB), ({"top_p": 0.7}, None)],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(logits, settings, kept):
    probability = (logits.double() / settings.get("temperature", 1)).softmax(0).numpy()
    order = np.argsort(-probability)
    if kept is None:
        kept = int(np.searchsorted(np.cumsum(probability[order]), settings["top_p"])) + 1
        assert 1 < kept < VOCAB
    probability[order[kept:]] = 0
    probability /= probability.sum()
    count = 4000
    seen = np.bincount(draws(count, logits, **settings), minlength=VOCAB) / count
    assert np.abs(seen - probability).max() < 4 * np.sqrt(0.25 / count)
    assert not seen[probability == 0].any()


def test_a_draw_does_not_depend_on_the_rest_of_the_batch(logits):
    alone = [sample(logits[None], [s])[0] for s in [sequence(seed=5)] for _ in range(20)]
    subject, other = sequence(seed=5), sequence(temperature=0)
    third = sequence(seed=9, top_k=2)
    batch = torch.stack([logits.flip(0), logits, logits * 2])
    together = [sample(batch, [other, subject, third]) for _ in range(20)]
    assert [row[1] for row in together] == alone
    assert {row[0] for row in together} == {int(logits.flip(0).argmax())}


def test_log_probabilities_are_the_models_own(logits):
    asked, silent = sequence(temperature=0.1, logprobs=3), sequence()
    (told,), nothing = logprobs(torch.stack([logits, logits]), [6, 0], [asked, silent])
    expected = logits.log_softmax(0)
    assert told.token_id == 6
    assert told.logprob == pytest.approx(float(expected[6]))
    assert [token for token, _ in told.top] == logits.argsort(descending=True)[:3].tolist()
    assert nothing == ()


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes as tokens, so that a character may take several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def written(tokenizer, text, **settings):
    """Pieces that arrive while the tokens of a text are generated, and how it ended."""
    ids = tokenizer(text)["input_ids"]
    sampling = SamplingParams(**{"max_tokens": len(ids), **settings})
    request = EngineRequest(id="a", prompt_token_ids=[1], sampling=sampling)
    subject = Sequence(request, stop_ids=frozenset(), tokenizer=tokenizer)
    pieces = []
    for token in ids:
        piece, reason, stop = subject.append(token)
        pieces.append(piece)
        if reason is not None:
            return pieces, SimpleNamespace(reason=reason, stop=stop)
    raise AssertionError("did not end")


def test_a_character_is_released_when_its_last_token_is_there(tokenizer):
    pieces, end = written(tokenizer, "aé€b")
    assert pieces == ["a", "", "é", "", "", "€", "b"]
    assert end.reason == "length"


def test_text_that_may_begin_a_stop_text_is_held_back_until_it_is_known(tokenizer):
    pieces, end = written(tokenizer, "one STO two STOP three", stop=("STOP", "!"))
    assert "".join(pieces) == "one STO two "
    assert pieces[4:8] == ["", "", "", "STO "]
    assert (end.reason, end.stop) == ("stop", "STOP")


def test_what_was_held_back_arrives_with_the_last_token(tokenizer):
    pieces, end = written(tokenizer, "to ST", stop=("STOP",))
    assert "".join(pieces) == "to ST"
    assert end.reason == "length"


def test_a_stop_id_is_a_token_but_no_text(tokenizer):
    stop = tokenizer("c")["input_ids"][0]
    pieces, end = written(tokenizer, "abcd", stop_token_ids=(stop,))
    assert pieces == ["a", "b", ""]
    assert (end.reason, end.stop) == ("stop", stop)
