"""Prompts that begin alike run once: the same answers as when every prompt runs by itself."""

import pytest
import torch
from tiny_vlms import picture, save_tiny

from prefalign.engines import ImageMask, Request, Sampling, sharing
from prefalign.engines.stopping import Row
from prefalign.engines.transformers import TransformersEngine
from prefalign.guided import BiasConfig, Item, guided_completions
from prefalign.models import ModelConfig, load_model, load_processor
from prefalign.records import user_message
from prefalign.scenes import world
from prefalign.scenes.language import caption

STARTS = (
    "",
    "There is a",
    "There is a large red circle at the",
    "There is a large red circle at the top left. A",
    "What",
)


def engines(model, processor, **settings):
    return [TransformersEngine(model, processor, share_prompts=share, **settings) for share in (True, False)]


@pytest.fixture(scope="module", params=["llava", "llava_next", "idefics3", "scenes"])
def loaded(request, tmp_path_factory):
    folder = request.param
    if folder != "scenes":
        folder = str(save_tiny(folder, tmp_path_factory.mktemp("tiny") / folder))
    config = ModelConfig(folder, device="cpu", dtype="float32")
    model = load_model(config)
    if request.param != "scenes":
        with torch.no_grad():  # a random model of small weights says the same whatever it is shown
            for name, weight in model.named_parameters():
                if weight.dim() >= 2 and "embed" not in name:
                    weight.mul_(3)
    return model, load_processor(config)


def asked(masked=True):
    requests = []
    for number in range(3):
        shown = [picture(number, size=(60, 60))]
        mask = ImageMask(0.5, number) if masked and number else None
        for part, start in enumerate(STARTS):
            requests.append(
                Request(
                    f"{number}/{part}",
                    [user_message("Describe the picture.", 1)],
                    shown,
                    prefix=start,
                    seed=1,
                    image_mask=mask,
                )
            )
    return requests


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch_size", [4, 64])
def test_the_same_answers_as_one_prompt_at_a_time(loaded, temperature, batch_size):
    sampling = Sampling(max_new_tokens=12, temperature=temperature)
    fast, slow = engines(*loaded, batch_size=batch_size)
    assert fast.shares
    requests = asked()
    alone = [slow.generate([request], sampling)[0] for request in requests]
    assert fast.generate(requests, sampling) == alone
    assert len({completion.text for completion in alone}) > 6


def test_each_stem_is_run_once_with_its_picture(loaded):
    model, _ = loaded
    (patches,) = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    tiles = []
    for engine in engines(*loaded, batch_size=64):
        seen = []
        hook = patches.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(len(inputs[0])))
        engine.generate(asked(), Sampling(max_new_tokens=4, temperature=0))
        hook.remove()
        tiles.append(sum(seen))
    assert tiles[1] % 15 == 0
    assert tiles[0] <= tiles[1] // 15 * 6  # three pictures; "What" may be a stem of its own


def test_several_answers_to_one_question(loaded):
    shown = [picture(1, size=(60, 60))]
    requests = [Request(f"sample {n}", [user_message("Describe the picture.", 1)], shown, seed=n) for n in range(5)]
    fast, slow = engines(*loaded)
    said = fast.generate(requests, Sampling(max_new_tokens=12))
    assert said == slow.generate(requests, Sampling(max_new_tokens=12))
    assert len({completion.text for completion in said}) > 1


def test_a_sentence_of_bdhs_is_the_same(loaded):
    scenes = [world.scene("train_biased", index) for index in range(4)]
    items = [
        Item(scene.id, [user_message("Describe the picture.", 1)], [world.draw(scene)], caption(scene))
        for scene in scenes
    ]
    fast, slow = engines(*loaded, batch_size=8)
    made = [
        guided_completions(one, items, BiasConfig(rho_th=0.5), Sampling(max_new_tokens=24), seed=0)
        for one in (fast, slow)
    ]
    assert made[0] == made[1]


def test_another_picture_is_another_stem(loaded):
    """Two questions alike in every word, about two pictures: each answer is that of its own picture."""
    fast, slow = engines(*loaded)
    requests = [
        Request(f"{number}/{part}", [user_message("Describe the picture.", 1)], [picture(number, size=(60, 60))], prefix=start)
        for number in (1, 2) for part, start in enumerate(STARTS[:2])
    ]  # fmt: skip
    assert fast.generate(requests, Sampling(max_new_tokens=8, temperature=0)) == slow.generate(
        requests, Sampling(max_new_tokens=8, temperature=0)
    )


def test_a_refused_stem_fails_its_rows_alone(loaded):
    fast, _ = engines(*loaded)
    context = fast.context or 4096
    long = [Request(f"long/{n}", [user_message("red " * context, 1)], [picture(0, size=(60, 60))], prefix=s)
            for n, s in enumerate(("", "A"))]  # fmt: skip
    said = fast.generate([*asked(), *long], Sampling(max_new_tokens=4, temperature=0))
    assert [completion.finish_reason == "error" for completion in said] == [False] * 15 + [True] * 2
    assert all("positions" in str(completion.error) for completion in said[-2:])


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_a_model_that_reads_its_prompt_both_ways_does_not_share(family, tmp_path):
    config = ModelConfig(str(save_tiny(family, tmp_path / family)), device="cpu")
    assert not TransformersEngine(load_model(config), load_processor(config)).shares


class Settings:
    model_type = "llava"
    is_encoder_decoder = False

    def __init__(self, **known):
        vars(self).update(known)

    def get_text_config(self):
        return self


@pytest.mark.parametrize(
    ("known", "shares"),
    [
        ({}, True),
        ({"layer_types": ["full_attention"] * 2}, True),
        ({"layer_types": ["linear_attention", "full_attention"]}, False),
        ({"sliding_window": 4096}, False),
        ({"sliding_window": 4096, "use_sliding_window": False}, True),
        ({"cross_attention_layers": [1]}, False),
        ({"model_type": "never_tried"}, False),
    ],
)
def test_which_models_may_share(known, shares):
    assert sharing.can_share(Settings(**known)) is shares


def on_stems(given, tokens):
    return sharing.on_stems(given, tokens, {index: len(ids) for index, ids in tokens.items()})


def rows(*prompts):
    return [Row(index, Request(str(index), [], []), prompt, []) for index, prompt in enumerate(prompts)]


def test_rows_are_put_on_the_longest_prompt_that_begins_like_them():
    """abcdef takes abc (cut 4: its last token is fed anew) and abcdx (cut 2, goes on with x); zz is a stem of its own."""
    tokens = {0: [1, 2, 3], 1: [1, 2, 3, 4, 5, 6], 2: [1, 2, 3, 4, 9], 3: [8, 8]}
    stems = on_stems(rows("abc", "abcdef", "abcdx", "zz"), tokens)
    assert [[row.index for row in stem.rows] for stem in stems] == [[1, 2, 0], [3]]
    assert stems[0].cut == [1, 2, 4]
    assert stems[0].own == [[6], [9], [3]]
    assert stems[0].tails() == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9], [1, 2, 3]]


def test_a_row_with_many_tokens_of_its_own_is_a_stem_itself():
    many = sharing.MOST_OWN_TOKENS
    tokens = {0: [1, 2, *range(10, 40)], 1: [1, 2, *range(50, 50 + many)], 2: [1, 2, *range(50, 51 + many)]}
    stems = on_stems(rows(*"abc"), tokens)
    assert [[row.index for row in stem.rows] for stem in stems] == [[0, 1], [2]]


def test_a_stem_goes_on_in_the_next_batch():
    tokens = {index: [1, 2, 3, 4][: index % 3 + 2] for index in range(5)}
    (stem,) = on_stems(rows(*"abcde"), tokens)
    parts = sharing.in_batches([stem], 2)
    assert [[row.index for one in part for row in one.rows] for part in parts] == [[2, 1], [4, 0], [3]]
    assert all(one.row is stem.row for part in parts for one in part)


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_hidden_image_tokens_are_left_out_of_the_decoder(loaded, share):
    """Nobody sees them: the answers are the same, and the decoder reads fewer columns."""
    model, _ = loaded
    requests = [
        Request(f"{n}", [user_message("Describe the picture.", 1)], [picture(n, size=(60, 60))], prefix=STARTS[n], seed=1,
                image_mask=ImageMask(share, n))
        for n in range(3)
    ]  # fmt: skip
    decoder = getattr(model.model, "language_model", None) or model.model.text_model
    widths, said = [], []
    for engine in engines(*loaded):
        seen = []
        hook = decoder.register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.append(output.last_hidden_state.shape[1])
        )
        said.append(engine.generate(requests, Sampling(max_new_tokens=12)))
        hook.remove()
        widths.append(max(seen))
    assert said[0] == said[1]
    assert widths[0] < widths[1] if share else widths[0] == widths[1]


def test_stems_of_one_width_run_together(tmp_path):
    """The wide pictures first: their prompts are longer by image tokens, though their texts are all alike."""
    config = ModelConfig(str(save_tiny("llava_next", tmp_path / "next")), device="cpu", dtype="float32")
    engine = TransformersEngine(load_model(config), load_processor(config), batch_size=4)
    requests = [
        Request(f"{n}/{draw}", [user_message("Q", 1)], [shown], seed=draw)
        for n in range(4) for shown in [picture(n, size=(56, 56) if n % 2 else (112, 28))] for draw in range(2)
    ]  # fmt: skip
    lengths = [batch.lengths for batch in engine.batches(requests, [""] * 8, {}, share=True)]
    assert all(len(set(batch)) == 1 for batch in lengths)
    assert len({batch[0] for batch in lengths}) == 2
    assert lengths == sorted(lengths, reverse=True)


def test_two_pictures_text_alone_and_a_model_in_training(loaded):
    model, processor = loaded
    shown = [picture(1, size=(60, 60)), picture(2, size=(48, 60))]
    requests = [
        Request(f"{name}/{part}", [user_message("Compare.", len(images))], images, prefix=start, seed=3, stop_at_sentence=True,
                image_mask=ImageMask(0.5, 1) if images else None)
        for name, images in (("two", shown), ("swapped", shown[::-1]), ("text", []))
        for part, start in enumerate(STARTS[:3])
    ]  # fmt: skip
    model.train()
    try:
        fast, slow = engines(model, processor, batch_size=5)
        sampling = Sampling(max_new_tokens=12)
        assert fast.generate(requests, sampling) == [slow.generate([one], sampling)[0] for one in requests]
        assert model.training
    finally:
        model.eval()
