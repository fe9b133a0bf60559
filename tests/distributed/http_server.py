"""Starts servers of real ranks for tests, with a model whose tokens are bytes."""

import subprocess
import sys
import threading
import time

import httpx
import openai

from tests.distributed.test_serve_engine import save_tiny_model
from tests.distributed.test_serve_launch import free_port, rank_environment

KEY = "a-key-for-tests"
BEYOND = "<beyond>"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def save_byte_model(path):
    """A tiny model whose tokens are bytes: its output is full of unfinished characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: n for n, c in enumerate(alphabet, 3)}
    save_tiny_model(path, "qwen3_moe", vocab_size=len(words), max_position_embeddings=512)
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    # As of a tokenizer that was extended, and the model's embedding was not.
    fast.add_tokens([BEYOND])
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)


def arguments(model, port):
    """Of a server that is soon full."""
    return [
        *("--model", str(model), "--port", str(port), "--max-waiting", "8"),
        *("--semantic-ep-serve-kv-cache-tokens", "2048", "--semantic-ep-serve-max-sequences", "8"),
    ]


def is_ready(url):
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


def wait_until(true, *, seconds=300, alive=lambda: True, said=lambda: ""):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, said()
        assert alive(), said()
        time.sleep(0.2)


class Server:
    """Processes of a serving group, and where it listens."""

    def __init__(self, model, ranks, *more):
        port, rendezvous = free_port(), free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "semantic_ep.serve.http"]
        self.ranks = [
            subprocess.Popen(
                [*command, *arguments(model, port), *more],
                env=rank_environment(rank, ranks, rendezvous) | {"SEMANTIC_EP_API_KEY": KEY},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        self.lines = [[] for _ in self.ranks]
        self.readers = [
            threading.Thread(target=lambda p=p, to=to: to.extend(p.stderr), daemon=True)
            for p, to in zip(self.ranks, self.lines, strict=True)
        ]
        for reader in self.readers:
            reader.start()
        self.http = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
        )
        self.openai = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60
        )
        wait_until(self.ready, alive=lambda: self.ranks[0].poll() is None, said=self.said)

    def ready(self):
        return is_ready(self.url)

    def said(self, rank=0):
        self.readers[rank].join(5)
        return "".join(self.lines[rank])

    def post(self, path="/v1/completions", **body):
        return self.http.post(path, json={"model": "tiny", **body})

    def close(self):
        self.http.close()
        for rank in self.ranks:
            rank.kill()
            rank.wait()
