"""Routes of a quickstart's model, recorded anew on its documents.

Shapes: N tokens, L MoE layers, K top-k, E experts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semantic_ep.errors import ConfigError, explain
from semantic_ep.observe.traces import RoutingTrace

# Documents that the model continues together.
_BATCH = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """One document of a quickstart.

    Attributes:
        ids: Token ids.
        kind: "python", "cpp" or "english"; "" if nothing says.
    """

    ids: list[int]
    kind: str


class Recording:
    """A Hugging Face model that tells its routes, and those seen ahead.

    Args:
        directory: Of the model and its tokenizer.
    """

    def __init__(self, directory: Path) -> None:
        if not (directory / "config.json").is_file():
            raise ConfigError(
                explain("there is no model", where=str(directory), do="Run launch/quickstart.sh")
            )
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from semantic_ep.integrations.look_ahead import LookAheadPredictor
        from semantic_ep.integrations.transformers import decoder_layer_of, find_moe_layers

        self._model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self._look_ahead = LookAheadPredictor.of_model(self._model)
        self._streams: list[Any] = []
        self._chosen: list[Any] = []
        for site in find_moe_layers(self._model):
            layer = decoder_layer_of(self._model, site)
            layer.register_forward_pre_hook(lambda _, args: self._streams.append(args[0][0]))
            self._model.get_submodule(site.router).register_forward_hook(
                lambda _, __, out: self._chosen.append(out[2])
            )

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self._model.config.vocab_size)

    def token_ids(self, text: str) -> list[int]:
        """As the model's tokenizer reads it."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def of_documents(
        self, documents: Sequence[Document], max_tokens: int
    ) -> tuple[RoutingTrace, np.ndarray]:
        """The routes of documents, a request each, and [N, L, E], what the look-ahead expects.

        Args:
            documents: With a token each.
            max_tokens: Of a document; longer ones are cut.
        """
        from semantic_ep.integrations.transformers import model_fingerprint

        cut = [document.ids[:max_tokens] for document in documents]
        runs = [self._run(ids) for ids in cut]
        chosen_NLK, ahead_NLE = (
            np.concatenate(one, axis=1).swapaxes(0, 1) for one in zip(*runs, strict=True)
        )
        trace = RoutingTrace(
            fingerprint=model_fingerprint(self._model),
            experts=chosen_NLK.astype(np.uint16),
            offsets=np.cumsum([0, *map(len, cut)]),
            token_id=np.concatenate(cut).astype(np.int32),
            requests=tuple({"kind": document.kind} for document in documents),
        )
        return trace, ahead_NLE

    def continued(
        self, documents: Sequence[Document], *, max_tokens: int, new_tokens: int, seed: int
    ) -> list[Document]:
        """Documents as the model goes on from their beginnings.

        Args:
            documents: With a token each.
            max_tokens: Of a beginning; longer ones are cut.
            new_tokens: Drawn from what the model predicts, at temperature 1, for each.
            seed: Of the draws.
        """
        import torch

        torch.manual_seed(seed)
        found = []
        for start in range(0, len(documents), _BATCH):
            batch = documents[start : start + _BATCH]
            beginnings = [document.ids[:max_tokens] for document in batch]
            longest = max(map(len, beginnings))
            # What comes before a beginning is masked, so that all of them end together.
            ids = [[0] * (longest - len(one)) + one for one in beginnings]
            mask = [[0] * (longest - len(one)) + [1] * len(one) for one in beginnings]
            with torch.inference_mode():
                whole = self._model.generate(
                    torch.tensor(ids),
                    attention_mask=torch.tensor(mask),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    min_new_tokens=new_tokens,
                    max_new_tokens=new_tokens,
                    pad_token_id=0,
                )
            self._streams.clear()
            self._chosen.clear()
            found += [
                Document(ids=one + new.tolist(), kind=document.kind)
                for document, one, new in zip(batch, beginnings, whole[:, longest:], strict=True)
            ]
        return found

    def _run(self, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        import torch

        self._streams.clear()
        self._chosen.clear()
        with torch.inference_mode():
            self._model(input_ids=torch.tensor([tokens]), use_cache=False)
            chosen = torch.stack(self._chosen).numpy()
            # Asking the routers again adds to what the hooks hold, which is cleared next time.
            streams = enumerate(list(self._streams))
            ahead = torch.stack([self._look_ahead.expert_scores(layer, x) for layer, x in streams])
        return chosen, ahead.numpy()


def by_phase(trace: RoutingTrace, new_tokens: int) -> RoutingTrace:
    """Each request as two, labelled by "phase": "prefill", and "decode" of its last tokens."""
    ends = trace.offsets[1:]
    labels = [
        {**request, "phase": phase} for request in trace.requests for phase in ("prefill", "decode")
    ]
    return dataclasses.replace(
        trace,
        offsets=np.append(0, np.stack([ends - new_tokens, ends], axis=1)),
        requests=tuple(labels),
    )


def training_documents(data: Path, *, limit: int) -> list[Document]:
    """Documents that the model was trained on."""
    tokens = np.load(data / "train.npy", mmap_mode="r")
    return [
        Document(
            ids=tokens[row["first"] : row["first"] + row["tokens"]].tolist(),
            kind=row.get("kind", ""),
        )
        for row in spread_over(data / "documents.jsonl", limit)
    ]


def held_out_documents(data: Path, recording: Recording, *, limit: int) -> list[Document]:
    """Documents that the model was not trained on."""
    rows = spread_over(data / "holdout.jsonl", limit)
    documents = [
        Document(ids=recording.token_ids(row["text"]), kind=row.get("kind", "")) for row in rows
    ]
    return [document for document in documents if document.ids]


def spread_over(path: Path, limit: int) -> list[dict[str, Any]]:
    """At most `limit` rows of a file, spread over it: it is sorted by kind."""
    lines = path.read_text(encoding="utf-8").splitlines()
    picked = np.linspace(0, len(lines) - 1, min(limit, len(lines))).astype(int)
    return [json.loads(lines[row]) for row in picked]
