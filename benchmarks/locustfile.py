"""Load on a server with locust: streamed completions, with the time to the first token.

    locust -f benchmarks/locustfile.py --host http://localhost:8000 --headless -u 16 -r 4 -t 60s

A request is reported as "/v1/completions" when its last token has come, and its first token as
"first token"; both times are in milliseconds since it was sent.
"""

from __future__ import annotations

import os
import random
import time

from locust import HttpUser, constant, events, task

PROMPTS = (
    "def main():",
    "The expert said",
    "In the beginning of the year",
    "#include <vector>",
    "Write to the log and return",
)
MAX_TOKENS = 32


class Completions(HttpUser):
    """A client that asks again as soon as it is answered."""

    wait_time = constant(0)

    def on_start(self) -> None:
        """Send the key, and ask for the model's name."""
        key = os.environ.get("SEMANTIC_EP_API_KEY")
        if key:
            self.client.headers["Authorization"] = f"Bearer {key}"
        self.model = self.client.get("/v1/models").json()["data"][0]["id"]

    @task
    def complete(self) -> None:
        """Stream one completion to its end."""
        body = {
            "model": self.model,
            "prompt": random.choice(PROMPTS),
            "max_tokens": MAX_TOKENS,
            "stream": True,
        }
        start = time.perf_counter()
        first = None
        with self.client.post(
            "/v1/completions", json=body, stream=True, catch_response=True
        ) as answer:
            if answer.status_code != 200:
                answer.failure(f"{answer.status_code}: {answer.text[:200]}")
                return
            last = ""
            for line in answer.iter_lines():
                if not line:
                    continue
                last = line.decode()
                if first is None:
                    first = time.perf_counter() - start
            if last != "data: [DONE]":
                answer.failure(f"the stream ended with {last[:200]}")
                return
            # Locust's own time ends with the headers.
            answer.request_meta["response_time"] = (time.perf_counter() - start) * 1e3
        events.request.fire(
            request_type="SSE",
            name="first token",
            response_time=first * 1e3,
            response_length=0,
            exception=None,
            context={},
        )
