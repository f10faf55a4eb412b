"""What making pairs costs, beside what one would write oneself.

    python benchmarks/generation.py [--json FILE] [--parts bdhs,bdhs_576,mia,memory] [--rows 512] [--rows-576 16]

`bdhs`      the stage's `process` on scenes rows against a loop that finishes one sentence at a time, with cache, masks and
            positions alike, all greedy: interleaved block by block in this process, ratio of medians, answers compared. The
            loop is run twice: stopping where a sentence ends as the engine does (`speedup`), and as `generate` is called
            plainly, to the end of the answer, and cut afterwards (`speedup_over_unstopped`).
`bdhs_576`  the same with 576 image tokens on a LLaVA of random weights.
`mia`       attention share of answers about four pictures of 576 tokens, against `output_attentions=True`.
`memory`    peak resident memory of a stage over 1,000, 10,000 and 100,000 rows, each in a process of its own. Generation is
            replaced by recorded completions, and no model is loaded: what is measured is reading, checking, storing, resuming
            (`VmHWM`: needs Linux).

Times are wall time on one thread. `serving.py` measures requests to a vLLM server by picture, `executors.py` what shards and
Ray's actors cost.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from prefalign import bundled, config
from prefalign.engines import Completion, ImageMask, Request, Sampling
from prefalign.records import Pair, Prompt, message_text
from prefalign.text import first_sentence, load_similarity

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

PARTS = ("bdhs", "bdhs_576", "mia", "memory")
MEMORY_ROWS = (1_000, 10_000, 100_000)
Row = dict[str, Any]


def row(name: str, value: float, unit: str, baseline: float | None = None, goal: float | None = None) -> Row:
    """One line of the result file."""
    return {"name": f"generation/{name}", "value": value, "unit": unit, "baseline": baseline, "goal": goal}


class OneSentenceAtATime:
    """The obvious way to run BDHS: a loop over sentences around `generate`, with its KV cache, greedy.

    The same hidden image tokens and the same positions as the engine's. If it `stops`, a sentence ends as soon as its end shows;
    else the whole rest of the answer is drawn and cut.
    """

    capabilities = frozenset({"sample", "prefix", "image_mask"})

    def __init__(self, model: Any, processor: Any, fingerprint: str = "", *, stops: bool = True):
        self.stops = stops
        self.model = model
        self.processor = processor
        self.fingerprint = fingerprint
        tokenizer = processor.tokenizer
        self.banned = [tokenizer.pad_token_id, tokenizer.bos_token_id, model.config.image_token_id]

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, one after the other."""
        return [self._finish(request, sampling) for request in requests]

    def _finish(self, request: Request, sampling: Sampling) -> Completion:
        import torch
        from transformers import StoppingCriteriaList

        template = self.processor.apply_chat_template(request.messages, tokenize=False, add_generation_prompt=True)
        text = template + (f" {request.prefix.rstrip()}" if request.prefix else "")
        inputs = self.processor(text=[text], images=[request.images], add_special_tokens=False, return_tensors="pt")
        width = inputs["input_ids"].shape[1]
        inputs["position_ids"] = torch.arange(width)[None]
        if request.image_mask is not None:
            inputs["attention_mask"][0, self._hidden(inputs["input_ids"][0], request.image_mask)] = 0
        tokenizer = self.processor.tokenizer

        def said(ids: Any) -> str:
            before, whole = tokenizer.batch_decode([ids[width - 8 : width], ids[width - 8 :]], skip_special_tokens=True)
            return whole[len(before) :]

        def sentence_ended(ids: Any, scores: Any, **more: Any) -> Any:
            joined = request.prefix.rstrip() + said(ids[0])
            done = self.stops and request.stop_at_sentence and _end(request.prefix, joined) is not None
            return torch.tensor([done])

        with torch.no_grad():
            ids = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=sampling.max_new_tokens,
                suppress_tokens=self.banned,
                stopping_criteria=StoppingCriteriaList([sentence_ended]),
            )[0]
        text = said(ids)
        reason = "stop" if int(ids[-1]) == tokenizer.eos_token_id else "length"
        if request.stop_at_sentence and (cut := _end(request.prefix, request.prefix.rstrip() + text)) is not None:
            text, reason = cut[len(request.prefix.rstrip()) :], "sentence"
        joined = request.prefix and not request.prefix[-1].isspace()
        return Completion(request.id, text if joined else text.lstrip(), finish_reason=reason)

    def _hidden(self, ids: Any, mask: ImageMask) -> Any:
        import torch

        places = (ids == self.model.config.image_token_id).nonzero().squeeze(1)
        return places[torch.rand(len(places), generator=torch.Generator().manual_seed(mask.seed)) < mask.share]


def _end(prefix: str, joined: str) -> str | None:
    """`joined` up to its first sentence end after `prefix`, once something follows that end."""
    start = 0
    while start < len(joined):
        end = start + len(first_sentence(joined[start:]))
        if end >= len(joined):
            return None
        if end > len(prefix.rstrip()):
            return joined[:end]
        start = end
    return None


def bdhs(rows: int) -> list[Row]:
    """The stage on the scenes model, as its config runs it, but greedy."""
    from prefalign.engines.transformers import load_engine
    from prefalign.scenes.data import rows as scenes_rows

    stage, settings = _bdhs_stage({"sampling": {"temperature": 0.0}})
    fast = load_engine(settings.model, batch_size=settings.batch_size)
    loops = {"loop": OneSentenceAtATime(fast.model, fast.processor, fast.fingerprint),
             "unstopped": OneSentenceAtATime(fast.model, fast.processor, fast.fingerprint, stops=False)}  # fmt: skip
    prompts = [Prompt(**row) for row in scenes_rows("caption", "train_biased", 0, rows, regime="seen")]
    speedups, same = _compare(stage, settings, prompts, fast, loops, block=settings.output.block_size)
    return [
        row("bdhs/speedup", speedups["loop"], "x", 1.0, 8.0),
        row("bdhs/speedup_over_unstopped", speedups["unstopped"], "x", 1.0, None),
        row("bdhs/identical_share", same, "share of rows", None, 1.0),
        row("bdhs/rows", rows, "rows", None, 512),
    ]


def bdhs_576(rows: int) -> list[Row]:
    """The same with 576 image tokens: prompts are long, answers short, so batching saves little on a CPU."""
    from prefalign.engines.transformers import TransformersEngine
    from prefalign.scenes.data import rows as scenes_rows

    changes = {"sampling": {"temperature": 0.0, "max_new_tokens": 32}, "bias": {"iterations": 1}, "batch_size": 16}
    stage, settings = _bdhs_stage(changes)
    model, processor = large_llava()
    fast = TransformersEngine(model, processor, batch_size=settings.batch_size)
    loops = {"loop": OneSentenceAtATime(model, processor)}
    prompts = [Prompt(**row) for row in scenes_rows("caption", "train_biased", 0, rows, regime="seen")]
    speedups, same = _compare(stage, settings, prompts, fast, loops, block=4)
    return [
        row("bdhs_576/speedup", speedups["loop"], "x", 1.0, None),
        row("bdhs_576/identical_share", same, "share of rows", None, 1.0),
        row("bdhs_576/rows", rows, "rows", None, None),
    ]


def _bdhs_stage(changes: dict[str, Any]) -> tuple[ModuleType, Any]:
    stage = bundled.load_stage("bdhs")
    values = config.merge(config.read_yaml(bundled.find("datagen/bdhs_scenes")), changes)
    return stage, config.build(stage.Config, values)


def _compare(
    stage: ModuleType, settings: Any, prompts: Sequence[Prompt], fast: Any, loops: dict[str, Any], *, block: int
) -> tuple[dict[str, float], float]:
    """All engines on each block in turn, in changing order.

    Returns:
        For each loop its median time over the stage's; and the share of rows on which all say the same.
    """
    similarity = load_similarity(settings.similarity)
    engines = {"stage": fast, **loops}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        stage.process(prompts[:2], engine, similarity, settings)
    equal = 0
    for number, start in enumerate(range(0, len(prompts), block)):
        said = {}
        for name in sorted(engines, reverse=bool(number % 2)):
            started = time.perf_counter()
            outcomes = stage.process(prompts[start : start + block], engines[name], similarity, settings)
            times[name].append(time.perf_counter() - started)
            said[name] = [_rejected(outcome) for outcome in outcomes]
        equal += sum(len(set(texts)) == 1 for texts in zip(*said.values(), strict=True))
        taken = ", ".join(f"{name} {seconds[-1]:.2f} s" for name, seconds in times.items())
        print(f"  block {number + 1}: {taken}; {equal} of {start + len(said['stage'])} rows equal", flush=True)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {name: medians[name] / medians["stage"] for name in loops}, equal / len(prompts)


def _rejected(outcome: Any) -> str:
    return message_text(outcome[0].rejected) if isinstance(outcome, list) else repr(outcome)


def large_llava() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """LLaVA-1.5's shape of input (336 pixels, 576 image tokens) on a model of 45 M random parameters."""
    import torch
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava
    from transformers import LlavaProcessor as Processor

    from prefalign.scenes import model as scenes_model

    words = scenes_model.tokenizer()
    small = scenes_model.config(words)
    ids = {f"{name}_token_id": getattr(small, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    vision = CLIPVisionConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6,
                              image_size=336, patch_size=14, projection_dim=384)  # fmt: skip
    text = LlamaConfig(vocab_size=len(words), hidden_size=512, intermediate_size=1376, num_hidden_layers=6,
                       num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=4096, **ids)  # fmt: skip
    torch.manual_seed(0)
    model = Llava(LlavaConfig(vision_config=vision, text_config=text, image_token_id=small.image_token_id,
                              image_seq_length=576, vision_feature_layer=-2, **ids)).eval()  # fmt: skip
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    processor = Processor(pictures, words, patch_size=14, vision_feature_select_strategy="default",
                          num_additional_image_tokens=1, image_token=scenes_model.IMAGE,
                          chat_template=scenes_model.CHAT_TEMPLATE)  # fmt: skip
    return model, processor


def mia() -> list[Row]:
    """What `attention_share.py` beside this file measures."""
    module = bundled.load_stage(str(Path(__file__).with_name("attention_share.py")))
    found: list[Row] = module.measure()
    return found


class Recorded:
    """An engine that says what was said once: stored completions in turn, no model."""

    capabilities = frozenset({"sample", "prefix", "image_mask"})
    fingerprint = "recorded"
    said = (" a large red ring at the top left.", " two small blue stars below.", " nothing else in the picture.")

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Completions of the record; which one is decided by the request's id."""
        return [Completion(request.id, self.said[len(request.id) % len(self.said)]) for request in requests]


def memory() -> list[Row]:
    """Peak resident memory at each number of rows, by processes of their own."""
    peaks: dict[int, float] = {}
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in MEMORY_ROWS:
            folder = Path(scratch) / str(count)
            write_prompts(folder, count)
            command = [sys.executable, __file__, "--measure-memory", str(folder)]
            peaks[count], seconds, rows_out = json.loads(
                subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            )
            assert rows_out == count, f"{rows_out} rows came out of {count}"
            print(f"  {count:,} rows: peak {peaks[count]:.0f} MiB, {seconds:.0f} s (generation recorded)", flush=True)
            found += [
                row(f"memory/peak_mib_{count}", peaks[count], "MiB"),
                row(f"memory/seconds_{count}", seconds, "s"),
            ]
    ratio = peaks[MEMORY_ROWS[-1]] / peaks[MEMORY_ROWS[0]]
    return [row("memory/ratio", ratio, "x of the peak at 1,000 rows, generation recorded", 1.0, 1.1), *found]


def write_prompts(folder: Path, count: int) -> None:
    """Rows of LLaVA's format about 64 tiny pictures."""
    from PIL import Image

    folder.mkdir(parents=True)
    for number in range(64):
        Image.new("RGB", (8, 8), (4 * number, 255 - 4 * number, 128)).save(folder / f"{number}.png")
    with (folder / "rows.jsonl").open("w") as stream:
        for number in range(count):
            turns = [
                {"from": "human", "value": "<image>\nWhat is in the picture?"},
                {
                    "from": "gpt",
                    "value": f"There is a thing number {number} on the left. I see a green ring beside it.",
                },
            ]
            stream.write(
                json.dumps({"id": f"row-{number:07}", "image": f"{number % 64}.png", "conversations": turns}) + "\n"
            )


def measure_memory(folder: Path) -> tuple[float, float, int]:
    """Run BDHS with recorded completions. Returns (peak MiB of this process, seconds, rows out)."""
    from prefalign import store

    stage, settings = _bdhs_stage({"data": {"path": folder / "rows.jsonl"}, "output": {"path": folder / "out"}})
    similarity = load_similarity(settings.similarity)
    started = time.perf_counter()
    manifest = store.run_stage(
        stage.METHOD,
        settings.data,
        lambda block: stage.process(block, Recorded(), similarity, settings),
        output=settings.output,
        record=Pair,
        settings=stage.row_settings(settings),
        seed=settings.seed,
    )
    seconds = time.perf_counter() - started
    # not getrusage, whose maximum begins with that of the process that started this one
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
    return peak, seconds, manifest.rows_out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        epilog="Requests to a vLLM server, by picture: serving.py. Ray's and shards' cost for each row: executors.py.",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rows", type=int, default=512, help="scenes rows of `bdhs`")
    parser.add_argument("--rows-576", type=int, default=16, help="rows of `bdhs_576`")
    parser.add_argument("--measure-memory", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure_memory:
        print(json.dumps(measure_memory(chosen.measure_memory)))
        return
    import torch

    torch.set_num_threads(1)
    parts: dict[str, Callable[[], list[Row]]] = {"bdhs": lambda: bdhs(chosen.rows), "mia": mia, "memory": memory,
                                                 "bdhs_576": lambda: bdhs_576(chosen.rows_576)}  # fmt: skip
    found: list[Row] = []
    for name in chosen.parts.split(","):
        print(f"{name} (load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores)", flush=True)
        found += parts[name]()
    for line in found:
        goal = "" if line["goal"] is None else f"  (goal {line['goal']})"
        print(f"{line['name']:<36} {line['value']:.4g} {line['unit']}{goal}")
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
