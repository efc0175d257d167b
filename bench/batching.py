"""transformers' continuous batching behind HTTP, as ``serving.py`` asks servers: greedy tokens, streamed.

usage: python bench/batching.py FOLDER --clients 8 --tokens 640

Prints ``port:N`` once it listens, and ends with its standard input.
"""

from __future__ import annotations

import argparse
import importlib
import json
import queue
import sys
import threading
from collections import defaultdict
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from consilium.machine.processors import threads

PAGE = 256
"""Tokens of a page of its cache, its default."""
PART = 512
"""Most tokens of a step; prompts are read in such parts."""


def begun(folder: str, clients: int, tokens: int) -> Any:
    """Return its manager, running, with a cache for as many sequences of as many tokens."""
    library: Any = importlib.import_module("transformers")
    model = library.AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").eval()
    pages = clients * (-(-tokens // PAGE) + 1)
    manager = model.init_continuous_batching(
        generation_config=library.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=library.generation.ContinuousBatchingConfig(
            num_blocks=pages, max_batch_tokens=PART
        ),
    )
    manager.start()
    return manager


def dealt(manager: Any, results: Mapping[str, queue.Queue[Any]]) -> None:
    for result in manager:
        results[result.request_id].put(result)


def handler(manager: Any, results: Mapping[str, queue.Queue[Any]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()
            number = manager.add_request(asked["prompt"], max_new_tokens=asked["max_tokens"], streaming=True)
            while not (found := results[number].get()).is_finished():
                self.told(found)
            assert found.error is None, found.error
            self.told(found)

        def told(self, found: Any) -> None:
            self.wfile.write(f"data: {json.dumps({'tokens': len(found.generated_tokens)})}\n\n".encode())
            self.wfile.flush()

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(threads())
    results: defaultdict[str, queue.Queue[Any]] = defaultdict(queue.Queue)
    manager = begun(options.folder, options.clients, options.tokens)
    threading.Thread(target=dealt, args=(manager, results), daemon=True).start()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(manager, results))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"port:{server.server_port}", flush=True)
    sys.stdin.read()
    manager.stop(block=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
