"""What a vLLM server gains when requests about one picture come together, beside requests in any order.

    python benchmarks/serving.py [--json FILE] [--pictures 24] [--questions 6] [--held 8]

Run it in vLLM's environment (`make vllm-env`); it starts a server here, with a LLaVA of random weights and LLaVA-1.5's shape of
input: 576 image tokens a picture. Its KV cache holds the prompts of `--held` pictures, as a real one holds few of a data set's.

`ordered`   all requests about a picture after each other, as the engines send them, against the same requests shuffled.
`sharded`   two shards, each with a cache of its own and in the engines' order: rows dealt out by picture, against in turns.

Hits are the server's own count (/metrics): prompt tokens found in the prefix cache, as a share of those looked up. Times are of
one server on the machine at hand; between two runs its caches are emptied.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from prefalign import bundled
from prefalign.engines import Request, Sampling
from prefalign.records import user_message

Row = dict[str, Any]
QUESTIONS = (
    "What is in the image?",
    "Describe the picture in detail.",
    "How many objects are there?",
    "What colour is the largest shape?",
    "Is there a ring at the top left?",
    "Which shape is nearest to the centre?",
    "What stands beside the star?",
    "Name one thing that is missing.",
)
SAMPLING = Sampling(max_new_tokens=4, temperature=0)
CONCURRENCY = 2


def row(name: str, value: float, unit: str, baseline: float | None = None, goal: float | None = None) -> Row:
    """One line of the result file."""
    return {"name": f"serving/{name}", "value": value, "unit": unit, "baseline": baseline, "goal": goal}


class VllmServer:
    """vLLM's OpenAI-compatible server in a process group of its own, which can be killed and started again.

    Args:
        model: checkpoint folder.
        log: file that its output goes to.
        options: more of its command-line options.
        name: what it calls the model.
        python: of the environment that vLLM is in, if that is not this one.
        variables: what it has in its environment beside what this process has.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        options: Sequence[str] = (),
        *,
        name: str = "tiny",
        python: str | Path = sys.executable,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self.variables = variables or {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
                        "--served-model-name", name, "--host", "127.0.0.1", "--port", str(self.port), *options]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None
        self.output: IO[bytes] | None = None

    @property
    def address(self) -> str:
        """Up to `/v1`."""
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self, timeout: float = 400.0) -> float:
        """Start it and wait until it answers. Returns the seconds that took.

        Raises:
            RuntimeError: if it ends or does not answer in time, with the end of its log.
        """
        usual = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1"}
        self.output = self.log.open("ab")
        started = time.perf_counter()
        self.process = subprocess.Popen(self.command, stdout=self.output, stderr=subprocess.STDOUT,
                                        start_new_session=True, env={**usual, **os.environ, **self.variables})  # fmt: skip
        while time.perf_counter() - started < timeout:
            if self.process.poll() is not None:
                break
            try:
                self._ask("/health")
            except OSError:
                time.sleep(0.5)
            else:
                return time.perf_counter() - started
        self.kill()
        raise RuntimeError(f"the server did not start; its log ends with:\n{self.log.read_text()[-2000:]}")

    def kill(self) -> None:
        """End all of its processes at once (SIGKILL)."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
        if self.output is not None:
            self.output.close()
            self.output = None

    def forget(self) -> None:
        """Empty its prefix cache and its caches of pictures."""
        for cache in ("mm", "encoder"):
            self._ask(f"/reset_{cache}_cache", post=True)
        if not json.loads(self._ask("/reset_prefix_cache", post=True))["success"]:
            raise RuntimeError("the server did not empty its prefix cache: it still has requests under way.")

    def prefix_cache(self) -> tuple[float, float]:
        """Prompt tokens found in the prefix cache so far, and looked up."""
        return self._metric("prefix_cache_hits_total"), self._metric("prefix_cache_queries_total")

    def running(self) -> int:
        """Requests that it works on now."""
        return int(self._metric("num_requests_running"))

    def _metric(self, name: str) -> float:
        lines = [line for line in self._ask("/metrics").splitlines() if line.startswith(f"vllm:{name}{{")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def _ask(self, path: str, *, post: bool = False) -> str:
        request = urllib.request.Request(self.address.removesuffix("/v1") + path, method="POST" if post else "GET")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(answer.read().decode())

    def __enter__(self) -> VllmServer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


def large_checkpoint(folder: Path) -> Path:
    """The model of `generation.py` with 576 image tokens, on disk under the Hub's names."""
    import torch

    from prefalign.scenes import model as scenes_model

    generation = bundled.load_stage(str(Path(__file__).with_name("generation.py")))
    model, processor = generation.large_llava()
    scenes_model.save(model, processor, folder, torch.float32)
    return folder


def questions_about(pictures: int, questions: int) -> list[Request]:
    """Requests by picture: each question about the first, then each about the second, and so on."""
    from PIL import Image

    from prefalign.scenes.world import draw, scene

    asked = []
    for number in range(pictures):
        image = draw(scene("train_fair", number)).resize((336, 336), Image.Resampling.NEAREST)
        asked += [
            Request(f"{number}/{place}", [user_message(QUESTIONS[place], 1)], [image]) for place in range(questions)
        ]
    return asked


def in_this_order(engine: Any, requests: Sequence[Request]) -> list[str]:
    """Answers asked for in the order given, which is what a loop around a client does."""
    from prefalign.engines.chat import Pictures

    pictures = Pictures(requests)
    pictures.count(requests)

    def ask(request: Request) -> str:
        return str(engine.server.complete(engine._body(request, SAMPLING, pictures, False)).choices[0].message.content)

    engine.server.open()
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        return list(pool.map(ask, requests))


def in_its_order(engine: Any, requests: Sequence[Request]) -> list[str]:
    """Answers asked for as the engine sends them."""
    return [completion.text for completion in engine.generate(requests, SAMPLING)]


def measured(server: VllmServer, work: Any) -> tuple[float, float, float, Any]:
    """Hits, tokens looked up, seconds and result of some work that begins with empty caches."""
    server.forget()
    before = server.prefix_cache()
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    after = server.prefix_cache()
    return after[0] - before[0], after[1] - before[1], seconds, result


def serving(pictures: int, questions: int, held: int, block: int) -> list[Row]:
    """Both comparisons on one server."""
    from prefalign.engines.config import EngineConfig, ServerConfig
    from prefalign.engines.loading import load_engine

    requests = questions_about(pictures, questions)
    shuffled = random.Random(0).sample(requests, len(requests))
    blocks = held * -(-620 // block) + 1
    with tempfile.TemporaryDirectory() as scratch:
        options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--no-enable-chunked-prefill",
                   "--block-size", str(block), "--num-gpu-blocks-override", str(blocks),
                   "--max-num-seqs", str(CONCURRENCY)]  # fmt: skip
        server = VllmServer(large_checkpoint(Path(scratch) / "model"), Path(scratch) / "log", options)
        with server:
            settings = ServerConfig(base_url=server.address, concurrency=CONCURRENCY)
            engine: Any = load_engine(EngineConfig(server.name, engine="openai", server=settings))
            in_its_order(engine, requests[:1])
            runs = {
                "unordered": [(in_this_order, shuffled)],
                "ordered": [(in_its_order, shuffled)],
                "in_turns": [(in_its_order, shuffled[shard::2]) for shard in range(2)],
                "by_picture": [(in_its_order, [one for one in shuffled if int(one.id.split("/")[0]) % 2 == shard])
                               for shard in range(2)],
            }  # fmt: skip
            rates, times, said = {}, {}, {}
            for name, parts in runs.items():
                found = [measured(server, lambda ask=ask, asked=asked: ask(engine, asked)) for ask, asked in parts]
                rates[name] = sum(part[0] for part in found) / sum(part[1] for part in found)
                times[name] = sum(part[2] for part in found)
                said[name] = {one.id: text for (_, asked), part in zip(parts, found, strict=True)
                              for one, text in zip(asked, part[3], strict=True)}  # fmt: skip
                print(f"  {name}: {rates[name]:.1%} of prompt tokens from the cache, {times[name]:.1f} s", flush=True)
    equal = sum(len({texts[one.id] for texts in said.values()}) == 1 for one in requests) / len(requests)
    return [
        row("ordered/prefix_hits", rates["ordered"], "share of prompt tokens", rates["unordered"], None),
        row("ordered/speedup", times["unordered"] / times["ordered"], "x", 1.0, None),
        row("sharded/prefix_hits", rates["by_picture"], "share of prompt tokens", rates["in_turns"], None),
        row("sharded/speedup", times["in_turns"] / times["by_picture"], "x", 1.0, None),
        row("identical_share", equal, "share of rows", None, 1.0),
        row("requests", len(requests), "requests", None, None),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--questions", type=int, default=6, help=f"about each picture, at most {len(QUESTIONS)}")
    parser.add_argument("--held", type=int, default=8, help="pictures whose prompts the cache holds")
    parser.add_argument("--block-size", type=int, default=32, help="tokens in one block of the cache")
    chosen = parser.parse_args()
    found = serving(chosen.pictures, chosen.questions, chosen.held, chosen.block_size)
    for line in found:
        beside = "" if line["baseline"] is None else f"  (beside {line['baseline']:.4g})"
        print(f"{line['name']:<32} {line['value']:.4g} {line['unit']}{beside}")
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
