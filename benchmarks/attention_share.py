"""Share of attention per picture: `generate(output_attentions=True)`, as MIA-DPO published it, against ours.

    python benchmarks/attention_share.py [--json FILE] [--rounds 3]

A LLaVA of random weights (8 layers of 16 heads) answers a question about 4 pictures of 576 tokens with 60 tokens; then the share
of each picture in the attention of layer 4 is taken. Both ways do all of it, picture preparation included: published runs the
eager kernel and keeps every map; ours generates with SDPA and reads one layer's row of each token meanwhile. Times are wall
time on one thread, the two taken in turn, ratio of medians. Memory is the peak above what the loaded model holds (`VmHWM` of a
process of its own for each way, in which glibc gives freed tensors back at once, or the figure moves by a third; needs Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from prefalign.engines import Request
    from prefalign.engines.transformers import TransformersEngine

LAYERS, HEADS, WIDTH, LAYER, PICTURES, NEW_TOKENS = 8, 16, 512, 4, 4, 60
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
Row = dict[str, Any]


def built() -> TransformersEngine:
    """The model behind an engine, answers as long as they are allowed to be."""
    import torch
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava
    from transformers import LlavaProcessor as Processor

    from prefalign.engines.transformers import TransformersEngine
    from prefalign.scenes import model as scenes

    torch.set_num_threads(1)
    words = scenes.tokenizer()
    words.model_max_length = 4096
    small = scenes.config(words)
    ids = {f"{name}_token_id": getattr(small, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    vision = CLIPVisionConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=6,
                              image_size=336, patch_size=14, projection_dim=384)  # fmt: skip
    text = LlamaConfig(vocab_size=len(words), hidden_size=WIDTH, intermediate_size=1376, num_hidden_layers=LAYERS,
                       num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=4096, **ids)  # fmt: skip
    torch.manual_seed(0)
    model = Llava(LlavaConfig(vision_config=vision, text_config=text, image_token_id=small.image_token_id,
                              image_seq_length=576, vision_feature_layer=-2, **ids)).eval()  # fmt: skip
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language_model" in name and weight.dim() == 2 and "embed" not in name:
                weight.mul_(4)  # so that attention is far from even
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    processor = Processor(pictures, words, patch_size=14, vision_feature_select_strategy="default",
                          num_additional_image_tokens=1, image_token=scenes.IMAGE,
                          chat_template=scenes.CHAT_TEMPLATE)  # fmt: skip
    engine = TransformersEngine(model, processor, batch_size=1)
    engine.ends = [words.pad_token_id]  # never drawn, so that answers do not end early
    return engine


def asked(pictures: int = PICTURES) -> Request:
    """A question of some 60 words about pictures of noise."""
    from PIL import Image

    from prefalign.engines import Request
    from prefalign.records import user_message

    draw = np.random.default_rng(0)
    shown = [Image.fromarray(draw.integers(0, 256, (336, 336, 3), dtype=np.uint8)) for _ in range(pictures)]
    return Request("benchmark", [user_message(10 * "Describe the second picture. ", pictures)], shown)


def published(engine: TransformersEngine, request: Request) -> tuple[list[int], torch.Tensor]:
    """All maps of all layers and steps on the eager kernel, then layer 4's, mean over heads and over the tokens fed back."""
    import torch

    from prefalign import families

    engine.model.set_attn_implementation("eager")
    text = families.render(engine.processor, request.messages)
    batch = engine.processor(text=[text], images=[request.images], add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        out = engine.model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False, output_attentions=True,
                                    output_scores=True, return_dict_in_generate=True, suppress_tokens=engine.banned,
                                    eos_token_id=engine.ends, pad_token_id=engine.pad)  # fmt: skip
    places = families.image_token_mask(batch["input_ids"], engine.config)[0].nonzero().squeeze(1)
    rows = torch.stack([step[LAYER][0].mean(0)[-1, places] for step in out.attentions[1:]])
    means = rows.mean(0).view(len(request.images), -1).mean(1)
    return out.sequences[0, batch["input_ids"].shape[1] :].tolist(), means / means.sum()


def ours(engine: TransformersEngine, request: Request) -> tuple[list[int], torch.Tensor]:
    """The engine's: generation with SDPA, in which the tokens fed back are watched in one layer."""
    import torch

    from prefalign.engines import Sampling

    engine.model.set_attn_implementation("sdpa")
    (answer,) = engine.generate([request], Sampling(max_new_tokens=NEW_TOKENS, temperature=0, attention_layer=LAYER))
    found = answer.attention
    assert found is not None
    means = torch.stack([found.weights[found.image == number].mean() for number in range(len(request.images))])
    return answer.token_ids, means / means.sum()


WAYS: dict[str, Callable[..., tuple[list[int], Any]]] = {"published": published, "ours": ours}


def peak_mib(way: str) -> float:
    """Peak resident memory of one way above that of the loaded model, in this process; a small request before loads libraries."""
    engine, request = built(), asked()
    WAYS[way](engine, asked(1))
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident now
    before = _status("VmRSS")
    WAYS[way](engine, request)
    return _status("VmHWM") - before


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def measure(rounds: int = 3) -> list[Row]:
    """The rows of the result file."""
    engine, request = built(), asked()
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    shares: dict[str, Any] = {}
    tokens: dict[str, list[int]] = {}
    for number in range(rounds):
        for name in ("published", "ours") if number % 2 else ("ours", "published"):
            started = time.perf_counter()
            tokens[name], shares[name] = WAYS[name](engine, request)
            times[name].append(time.perf_counter() - started)
        print(f"  round {number + 1}: published {times['published'][-1]:.1f} s, ours {times['ours'][-1]:.1f} s, "
              f"load average {os.getloadavg()[0]:.1f}", flush=True)  # fmt: skip
    assert tokens["ours"] == tokens["published"], "the two ways said different things"
    assert len(tokens["ours"]) == NEW_TOKENS
    print(f"  shares {[round(share, 4) for share in shares['ours'].tolist()]}")
    peaks = {}
    for name in WAYS:
        command = [sys.executable, __file__, "--peak", name]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **GIVE_BACK})
        peaks[name] = float(found.stdout)
        print(f"  {name}: peak {peaks[name]:.0f} MiB above the loaded model", flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    difference = float((shares["ours"] - shares["published"]).abs().max())
    return [
        _row("time_ratio", medians["ours"] / medians["published"], "x", 1.0, 0.3),
        _row("memory_ratio", peaks["ours"] / peaks["published"], "x", 1.0, 0.06),
        _row("max_difference", difference, "share", None, 1e-6),
        _row("seconds", medians["ours"], "s", medians["published"]),
        _row("peak_mib", peaks["ours"], "MiB", peaks["published"]),
    ]


def _row(name: str, value: float, unit: str, baseline: float | None = None, goal: float | None = None) -> Row:
    return {"name": f"generation/mia/{name}", "value": value, "unit": unit, "baseline": baseline, "goal": goal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", choices=list(WAYS), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.peak:
        print(peak_mib(chosen.peak))
        return
    found = measure(chosen.rounds)
    for line in found:
        goal = "" if line["goal"] is None else f"  (goal {line['goal']})"
        print(f"{line['name']:<32} {line['value']:.4g} {line['unit']}{goal}")
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
