"""Rows of published preference sets, written as their files hold them, for tests.

The picture of every row is `a.png`, or `a.png` and `b.png` where a layout shows two; `pictures` draws them.
"""

import json
from pathlib import Path

from PIL import Image

QUESTION = "What is on the table?"
GOOD = "There is a red cup on the table near the window."
BAD = "There is a blue vase on the table near the window."
VICUNA = "A chat between a curious user and an artificial intelligence assistant."


def talk(*turns):
    return [{"from": role, "value": text} for role, text in zip(("human", "gpt") * 4, turns, strict=False)]


def said(role, text):
    return {"role": role, "content": text}


ROWS = {
    "rlhf_v": [
        {"ds_name": "RLHF-V", "image": "a.png", "idx": 0, "image_path": "RLHF-V/a.jpg", "origin_dataset": "vqav2",
         "text": json.dumps({"question": QUESTION, "chosen": GOOD, "rejected": BAD}),
         "origin_split": json.dumps({"model": "Muffin", "type": "detail description"})},
        {"ds_name": "RLHF-V", "image": "a.png", "idx": 1, "image_path": "RLHF-V/b.jpg", "origin_dataset": "coco",
         "text": json.dumps({"question": "How many cups?", "chosen": "One cup.", "rejected": "Two cups."}),
         "origin_split": "{}"},
    ],
    "rlaif_v": [
        {"ds_name": "RLAIF-V", "image": "a.png", "question": QUESTION, "chosen": GOOD, "rejected": BAD,
         "origin_dataset": "COCO", "origin_split": "train", "idx": "12", "image_path": "coco/a.jpg"},
    ],
    "povid": [
        {"id": "000000033471", "image": "a.png", "conversations": talk(f"<image>\n{QUESTION}", GOOD),
         "rejected_conversations": talk(f"<image>\n{QUESTION}", BAD)},
    ],
    "stic": [
        {"image": "a.png", "image_corruption": True, "hallu_prompt": "",
         "chosen": [said("user", QUESTION), said("assistant", GOOD)],
         "rejected": [said("user", QUESTION), said("assistant", BAD)]},
        {"image": "a.png", "image_corruption": False, "hallu_prompt": "Imagine more.",
         "chosen": [said("user", "Explain it."), said("assistant", GOOD)],
         "rejected": [said("user", "Explain it."), said("assistant", BAD)]},
    ],
    "mia_dpo": [
        {"id": "7", "image": ["a.png", "b.png"], "prompt": f"Image1: <image>\nImage2: <image>\nIn Image2, {QUESTION}",
         "chosen": GOOD, "gt": GOOD, "rejected": BAD},
    ],
    "mdpo": [
        {"img_path": "a.png", "prompt": f"{VICUNA} USER: <image>\n{QUESTION} ASSISTANT:", "chosen": GOOD, "rejected": BAD},
    ],
    "mvc": [
        {"chosen_images": ["a.png"], "rejected_images": ["b.png"], "system_prompt": "", "instruction_prompt": QUESTION,
         "chosen_response": GOOD, "rejected_response": BAD, "category": "counting"},
    ],
    "llava_rlhf": [
        {"id": "5", "image": "a.png", "conversations": talk(f"<image>\n{QUESTION}", "A cup."), "preference": 2,
         "output_1": {"from": "llava", "value": BAD}, "output_2": {"from": "llava", "value": GOOD}, "hallucination": True},
        {"id": "6", "image": "a.png", "conversations": talk(f"{QUESTION}\n<image>", "A cup."), "preference": 1,
         "output_1": {"from": "llava", "value": GOOD}, "output_2": {"from": "llava", "value": BAD}, "hallucination": False},
    ],
    "trl": [
        {"images": ["a.png"], "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
         "chosen": [said("assistant", GOOD)], "rejected": [said("assistant", BAD)], "source": "mine"},
    ],
    "trl_implicit": [
        {"images": ["a.png"], "chosen": [said("user", QUESTION), said("assistant", GOOD)],
         "rejected": [said("user", QUESTION), said("assistant", BAD)]},
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": f"<image>{QUESTION}"}], "chosen": {"from": "gpt", "value": GOOD},
         "rejected": {"from": "gpt", "value": BAD}, "images": ["a.png"]},
    ],
    "ms_swift": [
        {"messages": [said("user", f"<image>{QUESTION}"), said("assistant", GOOD)], "images": ["a.png"],
         "rejected_response": BAD, "margin": 1.5, "chat_template_kwargs": {"max_pixels": 1003520}},
        {"messages": [said("user", f"<image>{QUESTION}"), said("assistant", GOOD)], "images": ["a.png"],
         "rejected_messages": [said("user", f"<image>{QUESTION}"), said("assistant", BAD)]},
        {"messages": [said("user", f"<image>{QUESTION}"), said("assistant", GOOD)], "images": ["a.png"],
         "rejected_images": ["b.png"]},
        {"messages": [said("user", f"<image>{QUESTION}"), said("assistant", GOOD)], "images": ["a.png"],
         "rejected_messages": [said("user", f"<image>{QUESTION}"), said("assistant", BAD)], "rejected_images": ["a.png"]},
    ],
    "vlfeedback": [
        {"id": "llava-0", "image": "a.png", "prompt": QUESTION, "models": ["gpt4_v", "qwen_vl_chat"],
         "completions": {
             "annotations": [
                 {"Helpfulness": {"Rating": "5", "Rationale": "Full."},
                  "Ethical Considerations": {"Rating": "5", "Rationale": "-"},
                  "Visual Faithfulness": {"Rating": "4", "Rationale": "True."}},
                 {"Helpfulness": {"Rating": "2", "Rationale": "Wrong."},
                  "Ethical Considerations": {"Rating": "N/A", "Rationale": "-"},
                  "Visual Faithfulness": {"Rating": "1", "Rationale": "No vase."}},
             ],
             "model": ["gpt4_v", "qwen_vl_chat"],
             "response": [GOOD, BAD],
         }},
    ],
    "kto": [
        {"images": ["a.png"], "prompt": [said("user", QUESTION)], "completion": [said("assistant", GOOD)], "label": True},
        {"images": ["a.png"], "prompt": [said("user", QUESTION)], "completion": [said("assistant", BAD)], "label": False},
    ],
    "verl": [{"images": ["a.png"], "problem": f"<image>{QUESTION}", "answer": GOOD}],
}  # fmt: skip
PAIRED = [name for name in ROWS if name not in ("vlfeedback", "kto", "verl")]


def pictures(folder: Path) -> Path:
    """Two pictures of 8 x 8: `a.png` red, `b.png` blue."""
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(folder / name)
    return folder


def write(folder: Path, rows, name="rows.jsonl") -> Path:
    """A JSON-lines file of rows beside the pictures."""
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name
