"""The corpus is deterministic, free of near-duplicates, and never mixes its three parts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

LAUNCH = Path(__file__).resolve().parents[3] / "launch"


@pytest.fixture(scope="module")
def corpus(load_script):
    pytest.importorskip("tokenizers")
    return load_script("corpus")


def text(seed, words=400):
    rng = np.random.default_rng(seed)
    vocabulary = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "en", "ir", "os", "ut")]
    lines = rng.choice(vocabulary, (words // 8, 8))
    return "\n".join(" ".join(line) for line in lines)


def candidates(corpus, texts, kind="words"):
    return [
        corpus.Candidate(id=f"{kind}/{number}", kind=kind, read=lambda text=text: text)
        for number, text in enumerate(texts)
    ]


def test_near_duplicates_are_chosen_once(corpus):
    originals = [text(seed) for seed in range(6)]
    copies = [original.replace("ba", "bo", 2) + "\nlast line" for original in originals]
    chosen = corpus.choose(candidates(corpus, originals + copies), max_chars=10**6, seed=0)
    assert len(chosen) == 6


def test_short_texts_are_left_out_and_long_ones_cut_at_a_line(corpus):
    texts = [text(0), "too short", text(1, words=8000)]
    chosen = {
        d.id: d.text for d in corpus.choose(candidates(corpus, texts), max_chars=10**7, seed=0)
    }
    assert set(chosen) == {"words/0", "words/2"}
    assert len(chosen["words/2"]) <= corpus.MAX_CHARS
    assert texts[2].startswith(chosen["words/2"])
    assert chosen["words/2"].endswith("\n")


def test_a_small_corpus_still_has_many_documents(corpus):
    many = candidates(corpus, [text(seed, words=1200) for seed in range(200)])
    assert len(corpus.choose(many, max_chars=200_000, seed=0)) >= 160


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory):
    """A corpus of two user kinds alone, built twice."""
    root = tmp_path_factory.mktemp("corpus")
    with (root / "rows.jsonl").open("w") as stream:
        for seed in range(30):
            stream.write(json.dumps({"text": text(seed), "kind": "letters"}) + "\n")
    folder = root / "digits"
    folder.mkdir()
    for seed in range(30):
        numbers = np.random.default_rng(seed).integers(0, 10**6, (40, 8))
        (folder / f"{seed}.txt").write_text("\n".join(" ".join(map(str, r)) for r in numbers))
    settings = corpus.CorpusSettings(
        data=(str(root / "rows.jsonl"), str(folder)),
        max_megabytes=0.4,
        vocab_size=512,
        holdout_per_kind=4,
        prompts_per_kind=3,
        prompt_chars=100,
    )
    with pytest.MonkeyPatch.context() as patch:
        for source in ("standard_library", "torch_headers", "english_prose"):
            patch.setattr(corpus, source, lambda: iter(()))
        for name in ("one", "two"):
            corpus.build(root / name, settings)
    return root


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_same_sources_give_the_same_bytes(built):
    files = sorted(path.name for path in (built / "one").iterdir())
    assert files == [
        "corpus.json",
        "documents.jsonl",
        "holdout.jsonl",
        "prompts.jsonl",
        "tokenizer.json",
        "train.npy",
    ]
    for file in files:
        assert (built / "one" / file).read_bytes() == (built / "two" / file).read_bytes(), file


def test_no_document_is_in_two_parts(built):
    parts = [
        {row["id"] for row in rows(built / "one" / file)}
        for file in ("documents.jsonl", "holdout.jsonl", "prompts.jsonl")
    ]
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert [len(part) for part in parts[1:]] == [8, 6]
    assert {row["kind"] for row in rows(built / "one" / "prompts.jsonl")} == {"letters", "digits"}


def test_the_index_finds_each_document_in_the_tokens(built):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(built / "one" / "tokenizer.json"))
    tokens = np.load(built / "one" / "train.npy")
    end = tokenizer.token_to_id("<|endoftext|>")
    documents = rows(built / "one" / "documents.jsonl")
    assert sum(row["tokens"] for row in documents) == len(tokens)
    assert (tokens == end).sum() == len(documents)
    for row in documents:
        assert tokens[row["first"] + row["tokens"] - 1] == end
    first = documents[0]
    decoded = tokenizer.decode(tokens[: first["tokens"] - 1].tolist())
    texts = [text(seed) for seed in range(30)]
    texts += [path.read_text() for path in (built / "digits").iterdir()]
    assert any(original.startswith(decoded) for original in texts)


def test_requests_are_windows_of_the_length_asked_for(built):
    for row in rows(built / "one" / "prompts.jsonl"):
        assert 0 < len(row["text"]) <= 100


def test_the_sources_of_this_machine_hold_enough_of_each_kind(corpus):
    for source, kind in (
        (corpus.standard_library, "python"),
        (corpus.torch_headers, "cpp"),
        (corpus.english_prose, "english"),
    ):
        found = list(source())
        assert len(found) > 300
        assert {candidate.kind for candidate in found} == {kind}
        assert not any(str(Path.home()) in candidate.id for candidate in found)


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"text": "fine"}\n{"words": 1}\n', "data.jsonl:2"), ("not json\n", "data.jsonl:1")],
)
def test_a_malformed_row_is_named(corpus, tmp_path, content, message):
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(corpus.ConfigError, match=message):
        list(corpus.user_data(str(tmp_path / "data.jsonl")))


def test_the_command_names_missing_data_and_writes_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, LAUNCH / "corpus.py", "-o", tmp_path / "out", "--data", "nowhere"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "--data: no such file or directory (got nowhere)" in done.stderr
    assert not (tmp_path / "out").exists()
