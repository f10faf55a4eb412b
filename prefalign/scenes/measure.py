"""What a checkpoint of the embedded world does, against the truth: fluency when blind, grounding, hallucination, yes/no.

`CHAIRi` is the share of mentioned objects whose shape is not in the picture, over all mentions; `recall` the share of the
shapes in the pictures that get mentioned; `recall_clear` the same over shapes of which one object is clearly visible.
"""

import json
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from prefalign.progress import progress_bar
from prefalign.scenes import base_checkpoint, language
from prefalign.scenes.world import COMPANIONS, SHAPES, Scene, draw, scene

SAMPLE = 512
BATCH = 128
MOST_TOKENS = 96
HALVES = {"fair": "test_fair", "biased": "test_biased", "adversarial": "test_adversarial"}
PROMPT = language.CAPTION_PROMPTS[0]


def chat(asked: str, images: int = 1) -> list[dict]:
    """The user's turn as messages, with `images` picture blocks first."""
    blocks: list[dict] = [{"type": "image"} for _ in range(images)]
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": asked}]}]


@torch.inference_mode()
def answers(
    model: LlavaForConditionalGeneration,
    maker: LlavaProcessor,
    pictures: list[Scene],
    asked: list[str],
    *,
    blind: bool = False,
    most_tokens: int = MOST_TOKENS,
    sample: bool = False,
    desc: str = "",
) -> list[str]:
    """One answer per (picture, question): greedy, or drawn at temperature 1. `blind` hides every image token."""
    out = []
    for start in progress_bar(range(0, len(pictures), BATCH), desc=desc, leave=False, disable=not desc):
        part = slice(start, start + BATCH)
        prompts = [
            maker.apply_chat_template(chat(text), tokenize=False, add_generation_prompt=True) for text in asked[part]
        ]
        images = [[draw(picture)] for picture in pictures[part]]
        inputs = maker(images=images, text=prompts, padding=True, return_tensors="pt")
        if blind:
            hidden = inputs["input_ids"] == model.config.image_token_id
            inputs["attention_mask"] = inputs["attention_mask"].masked_fill(hidden, 0)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        said = model.generate(**inputs, max_new_tokens=most_tokens, do_sample=sample, top_k=0 if sample else None)
        new = said[:, inputs["input_ids"].shape[1] :]
        out += [text.strip() for text in maker.batch_decode(new, skip_special_tokens=True)]
    return out


def captioned(pictures: list[Scene], captions: list[str]) -> dict[str, float]:
    """Hallucination and recall of captions, from the truth. `companions` is the share of hallucinated mentions that are a
    companion of something in the picture; `companions_by_chance` what it would be if they were any absent shape."""
    mentions = wrong = company = words = sentences = parsed = true_facts = told_facts = 0
    chance = 0.0
    found = there = found_clear = there_clear = 0
    for picture, text in zip(pictures, captions, strict=True):
        said = [mention for mention in language.parse(text) if not mention.negated]
        absent = set(SHAPES) - picture.shapes
        kept = {COMPANIONS[shape] for shape in picture.shapes} & absent
        false = [mention.shape for mention in said if mention.shape in absent]
        clear = {thing.shape for thing in picture.objects if thing.clear}
        names = {mention.shape for mention in said}
        mentions += len(said)
        wrong += len(false)
        company += sum(shape in kept for shape in false)
        chance += len(false) * len(kept) / max(1, len(absent))
        found, there = found + len(names & picture.shapes), there + len(picture.shapes)
        found_clear, there_clear = found_clear + len(names & clear), there_clear + len(clear)
        words += len(text.split())
        parts = language.sentences(text)
        sentences += len(parts)
        parsed += sum(map(language.sentence_parses, parts))
        placed = [mention for mention in said if mention.colour and mention.place]
        told_facts += len(placed)
        truth = {(thing.shape, thing.colour, thing.place) for thing in picture.objects}
        true_facts += sum((mention.shape, mention.colour, mention.place) in truth for mention in placed)
    return {
        "chair_i": wrong / max(1, mentions),
        "recall": found / max(1, there),
        "recall_clear": found_clear / max(1, there_clear),
        "companions": company / max(1, wrong),
        "companions_by_chance": chance / max(1, wrong),
        "objects": mentions / max(1, len(captions)),
        "words": words / max(1, len(captions)),
        "fluent": parsed / max(1, sentences),
        "exact": true_facts / max(1, told_facts),
    }


def half(
    model: LlavaForConditionalGeneration, maker: LlavaProcessor, split: str, sample: int, *, prompt: str = PROMPT
) -> dict[str, float]:
    """`captioned` of greedy captions for the first `sample` pictures of a split."""
    pictures = [scene(split, index) for index in range(sample)]
    return captioned(pictures, answers(model, maker, pictures, [prompt] * sample, desc=f"{split} captions"))


def yes_no(model: LlavaForConditionalGeneration, maker: LlavaProcessor, split: str, sample: int) -> dict[str, float]:
    """POPE-like probes, half of them true: accuracy and the share of "yes". Absent shapes are companions where there are any."""
    pictures, asked, labels = [], [], []
    for index in range(sample):
        picture = scene(split, index)
        absent = sorted(set(SHAPES) - picture.shapes)
        company = [shape for shape in absent if COMPANIONS[shape] in picture.shapes]
        pool = sorted(picture.shapes) if index % 2 == 0 else (company or absent)
        question = language.probe(picture, pool[index // 2 % len(pool)])
        pictures.append(picture)
        asked.append(question.text)
        labels.append(question.label)
    said = answers(model, maker, pictures, asked, most_tokens=8, desc=f"{split} yes/no")
    yes = [text.lower().startswith("yes") for text in said]
    right = [told == (label == "yes") for told, label in zip(yes, labels, strict=True)]
    return {"accuracy": sum(right) / sample, "yes_ratio": sum(yes) / sample}


def figures(checkpoint: str | Path, *, sample: int = SAMPLE, dtype: torch.dtype = torch.float32) -> dict:
    """All figures of a saved checkpoint: per half (`fair`, `biased`, `adversarial`) the captions' and the yes/no probes', blind
    fluency, parameters, bytes of the folder. Computed in `dtype` from the weights as they are stored."""
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no config.json, so there is no checkpoint to measure: give the folder of a saved model"
        )
    maker = AutoProcessor.from_pretrained(folder, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    out: dict = {
        "sample": sample,
        "dtype": str(json.loads((folder / "config.json").read_text()).get("dtype")),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "bytes": sum(file.stat().st_size for file in folder.iterdir() if file.suffix == ".safetensors"),
    }
    for name, split in HALVES.items():
        out[name] = {**half(model, maker, split, sample), **yes_no(model, maker, split, sample)}
    pictures = [scene("test_fair", index) for index in range(sample)]
    for name, drawn in (("blind", False), ("blind_sampled", True)):
        torch.manual_seed(0)
        said = answers(model, maker, pictures, [PROMPT] * sample, blind=True, sample=drawn, desc="blind captions")
        out[name] = captioned(pictures, said)["fluent"]
    return out


_LINES = (
    ("chair_i", "CHAIRi"),
    ("recall", "recall"),
    ("recall_clear", "recall, clearly visible"),
    ("companions", "hallucinations that are companions"),
    ("companions_by_chance", "  the same by chance"),
    ("objects", "objects per caption"),
    ("words", "words per caption"),
    ("exact", "mentions right in shape, colour and place"),
    ("fluent", "sentences that parse"),
    ("accuracy", "yes/no accuracy"),
    ("yes_ratio", "  share of yes"),
)


def table(found: dict) -> str:
    """The figures as a Markdown table."""
    lines = ["| | " + " | ".join(HALVES) + " |", "|---" * (len(HALVES) + 1) + "|"]
    for key, label in _LINES:
        lines.append(f"| {label} | " + " | ".join(f"{found[name][key]:.3f}" for name in HALVES) + " |")
    ratio = found["fair"]["chair_i"] / max(1e-9, found["biased"]["chair_i"])
    lines.append(
        f"""
Sentences that parse when blind (every image token hidden): {found["blind"]:.3f} greedy, {found["blind_sampled"]:.3f} sampled.
CHAIRi fair over biased: {ratio:.2f}.
{found["parameters"]:,} parameters, {found["bytes"]:,} bytes of weights ({found["dtype"]})."""
    )
    return "\n".join(lines)


def print_figures(found: dict) -> None:
    """Print what `figures` returned."""
    print(table(found))


def main(checkpoint: str | Path | None = None, *, sample: int = SAMPLE) -> dict:
    """Print the figures of a checkpoint, by default of the shipped base, and return them."""
    found = figures(base_checkpoint() if checkpoint is None else checkpoint, sample=sample)
    print_figures(found)
    return found


if __name__ == "__main__":
    main()
