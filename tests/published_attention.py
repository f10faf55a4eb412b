"""Attention to image tokens as MIA-DPO's released code takes it: `generate(output_attentions=True)` with the eager kernel."""

import torch

from prefalign import families
from prefalign.engines import Request


def published_attention(
    model, processor, request: Request, banned: list[int], ends: list[int], *, layer: int, new_tokens: int
) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens (the end of the sequence excluded) and, for each fed token, its attention to the image tokens (A, N).

    Args:
        model: model on the eager kernel.
        processor: its processor.
        request: what is asked; its `prefix` is not used.
        banned: ids that are never drawn.
        ends: ids that end an answer.
        layer: decoder layer, 0-based.
        new_tokens: limit of the answer.
    """
    text = families.render(processor, request.messages)
    batch = processor(text=[text], images=[request.images], add_special_tokens=False, return_tensors="pt")
    batch = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        out = model.generate(
            **batch,
            max_new_tokens=new_tokens,
            do_sample=False,
            output_attentions=True,
            return_dict_in_generate=True,
            suppress_tokens=banned,
            eos_token_id=ends,
            pad_token_id=processor.tokenizer.pad_token_id,
        )
    families.clear_position_cache(model)
    pieces = families.image_token_mask(batch["input_ids"], model.config)[0].nonzero().squeeze(1)
    tokens = out.sequences[0, batch["input_ids"].shape[1] :].tolist()
    # step 0 is the prompt; step s the token drawn at step s - 1
    rows = [maps[layer][0].float().mean(0)[-1] for maps in out.attentions[1:]]
    read = [row[pieces] for row in rows]
    kept = [token for token in tokens if token not in ends]
    return kept, torch.stack(read) if read else torch.zeros(0, len(pieces))


def check_against_published(engine, requests, completions, found) -> None:
    """Assert that measured attention, layer by layer, is the published one to 1e-6, on the answers that it too draws.

    Args:
        engine: engine on the model; its kernel is put back.
        requests: what was asked.
        completions: its greedy answers of up to 10 tokens.
        found: by layer, an `ImageAttention` for each request.
    """
    kernel = engine.model.config._attn_implementation
    engine.model.set_attn_implementation("eager")
    try:
        for layer, measured in found.items():
            for request, completion, mine in zip(requests, completions, measured, strict=True):
                tokens, rows = published_attention(engine.model, engine.processor, request, engine.banned, engine.ends,
                                                   layer=layer, new_tokens=10)  # fmt: skip
                assert tokens == completion.token_ids
                assert len(rows) >= 5
                assert mine.error is None
                torch.testing.assert_close(mine.weights, rows.mean(0), atol=1e-6, rtol=0)
                assert mine.weights.sum() > 1e-3
    finally:
        engine.model.set_attn_implementation(kernel)
