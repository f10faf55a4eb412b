"""Pictures as vectors: each kind of model equals calling it by hand; its errors."""

import numpy as np
import pytest
import torch
import transformers as T
from tiny_vlms import picture, save_tiny
from transformers import CLIPModel, Dinov2Model, SiglipModel

from prefalign.checkpoints import ModelError
from prefalign.config import ConfigError, build
from prefalign.embeddings import Embedder, EmbedderConfig, load_embedder
from prefalign.engines.transformers import load_engine
from prefalign.models import ModelConfig, fingerprint, load_model, load_processor
from prefalign.processors import image_processor_fingerprint

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {
    **VISION,
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
SIDE = {"image_size": 28, "patch_size": 14}
SIZES = ((40, 48), (90, 30), (28, 28), (30, 90), (64, 64))


def pictures():
    return [picture(number, size) for number, size in enumerate(SIZES)]


def encoders():
    torch.manual_seed(0)
    crop = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    return {
        "clip": (
            CLIPModel(T.CLIPConfig(text_config=TEXT, vision_config={**VISION, **SIDE}, projection_dim=24)),
            T.CLIPImageProcessorPil(**crop),
        ),
        "siglip": (
            SiglipModel(T.SiglipConfig(text_config=TEXT, vision_config={**VISION, **SIDE})),
            T.SiglipImageProcessorPil(size={"height": 28, "width": 28}),
        ),
        "dinov2": (
            Dinov2Model(T.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **SIDE)),
            T.BitImageProcessorPil(**crop),
        ),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for name, (model, processor) in encoders().items():
        found[name] = tmp_path_factory.mktemp("encoders") / name
        model.save_pretrained(found[name])
        processor.save_pretrained(found[name])
    return found


def unit(values):
    return torch.nn.functional.normalize(values.float(), dim=-1).numpy()


def load(path, **more):
    return load_embedder(EmbedderConfig(str(path), device="cpu", **more))


def by_hand(name, folder):
    model, processor = {
        "clip": (CLIPModel, T.CLIPImageProcessorPil),
        "siglip": (SiglipModel, T.SiglipImageProcessorPil),
        "dinov2": (Dinov2Model, T.BitImageProcessorPil),
    }[name]
    return model.from_pretrained(folder).eval(), processor.from_pretrained(folder)


@pytest.mark.parametrize(("name", "feature"), [("clip", "image_embeds"), ("siglip", "image_embeds"), ("dinov2", "cls")])
def test_auto_takes_the_feature_each_model_was_made_for(name, feature, folders):
    embedder = load(folders[name], batch_size=2)
    assert embedder.feature == feature
    found = embedder.embed(pictures())
    model, processor = by_hand(name, folders[name])
    rows = []
    with torch.no_grad():
        for image in pictures():
            pixels = processor(images=image, return_tensors="pt")["pixel_values"]
            if name == "dinov2":
                rows.append(model(pixels).last_hidden_state[:, 0])
            else:
                rows.append(model.get_image_features(pixels).pooler_output)
    assert found.dtype == np.float32
    assert found.shape == (5, {"clip": 24, "siglip": 32, "dinov2": 32}[name])
    np.testing.assert_allclose(found, unit(torch.cat(rows)), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "feature"), [("clip", "cls"), ("clip", "mean"), ("siglip", "max"), ("dinov2", "mean")]
)
def test_other_features_are_those_of_the_last_hidden_state(name, feature, folders):
    embedder = load(folders[name], feature=feature)
    model, processor = by_hand(name, folders[name])
    with torch.no_grad():
        pixels = processor(images=pictures(), return_tensors="pt")["pixel_values"]
        hidden = (model if name == "dinov2" else model.vision_model)(pixels).last_hidden_state
    expected = {"cls": hidden[:, 0], "mean": hidden.mean(1), "max": hidden.max(1).values}[feature]
    np.testing.assert_allclose(embedder.embed(pictures()), unit(expected), atol=1e-6)
    assert embedder.fingerprint == f"{fingerprint(model)}-{image_processor_fingerprint(processor)}-{feature}"
    assert embedder.fingerprint != load(folders[name]).fingerprint


def test_a_vlm_embeds_with_the_mean_of_its_vision_tower(tiny_llava):
    embedder = load(tiny_llava)
    config = ModelConfig(str(tiny_llava), device="cpu")
    model, processor = load_model(config), load_processor(config)
    pixels = processor.image_processor(images=pictures(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        hidden = model.model.vision_tower(pixels).last_hidden_state
    assert hidden.shape == (5, 5, 32)  # a class token and 2 x 2 patches
    np.testing.assert_allclose(embedder.embed(pictures()), unit(hidden.mean(1)), atol=1e-6)
    classes = load(tiny_llava, feature="cls")
    np.testing.assert_allclose(classes.embed(pictures()), unit(hidden[:, 0]), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "feature"),
    [("llava_next", "mean"), ("llava_next", "max"), ("llava_next", "cls"), ("idefics3", "mean"), ("idefics3", "max")],
)
def test_tiles_of_a_picture_are_taken_together(name, feature, tmp_path):
    """Pictures of other shapes have other numbers of tiles; each vector is that of its picture alone."""
    folder = save_tiny(name, tmp_path / name)
    embedder = load(folder, batch_size=4, feature=feature)
    found = embedder.embed(pictures())
    processor = load_processor(ModelConfig(str(folder), device="cpu"))
    for row, image in zip(found, pictures(), strict=True):
        given = processor.image_processor(images=[image], return_tensors="pt")
        tiles = given["pixel_values"][0]
        tower = embedder.model.model.vision_tower if name == "llava_next" else embedder.model.model.vision_model
        with torch.no_grad():
            hidden = tower(tiles[tiles.flatten(1).abs().sum(1) > 0]).last_hidden_state
        assert len(hidden) >= 1
        tokens = hidden.flatten(0, 1)
        expected = {"mean": tokens.mean(0), "max": tokens.max(0).values, "cls": hidden[:, 0].mean(0)}[feature]
        np.testing.assert_allclose(row, unit(expected), atol=1e-5)


def test_patches_in_one_sequence_are_told_apart():
    """Qwen2.5-VL: the patches of all pictures stand behind one another, as many as each has pixels for."""
    torch.manual_seed(0)
    config = T.Qwen2_5_VLConfig(
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32,
                       "fullatt_block_indexes": [1], "window_size": 56},
        text_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
                     "num_key_value_heads": 2, "vocab_size": 64,
                     "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}},
    )  # fmt: skip
    model = T.Qwen2_5_VLForConditionalGeneration(config).eval()
    processor = T.Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 140 * 140})
    embedder = Embedder(model, processor, feature="auto", batch_size=5)
    assert embedder.feature == "mean"
    rows = []
    for image in pictures():
        given = processor(images=[image], return_tensors="pt")
        with torch.no_grad():
            rows.append(model.model.visual(given["pixel_values"], given["image_grid_thw"]).last_hidden_state.mean(0))
    np.testing.assert_allclose(embedder.embed(pictures()), unit(torch.stack(rows)), atol=1e-6)


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2"])
def test_batch_size_and_company_change_no_vector(name, folders):
    whole = load(folders[name], batch_size=5).embed(pictures())
    for size in (1, 2):
        np.testing.assert_allclose(load(folders[name], batch_size=size).embed(pictures()), whole, atol=1e-6)
    np.testing.assert_allclose(load(folders[name]).embed(pictures()[3:]), whole[3:], atol=1e-6)
    other = [picture(77), *pictures()[1:]]
    assert np.abs(load(folders[name]).embed(other)[0] - whole[0]).max() > 1e-4
    assert load(folders[name]).embed([]).shape == (0, 0)


def test_own_is_the_generators_encoder_and_leaves_it_as_it_was(tiny_llava):
    engine = load_engine(ModelConfig(str(tiny_llava), device="cpu"))
    engine.model.train()
    embedder = load_embedder(EmbedderConfig(), engine)
    found = embedder.embed(pictures())
    np.testing.assert_allclose(found, load(tiny_llava).embed(pictures()), atol=1e-6)
    assert engine.model.training
    prepares = image_processor_fingerprint(engine.processor.image_processor)
    assert embedder.fingerprint == f"{fingerprint(engine.model)}-{prepares}-mean"
    assert load(tiny_llava).fingerprint == embedder.fingerprint


def test_half_precision_is_raised_on_a_cpu(folders, tmp_path):
    CLIPModel.from_pretrained(folders["clip"]).half().save_pretrained(tmp_path)
    T.CLIPImageProcessorPil.from_pretrained(folders["clip"]).save_pretrained(tmp_path)
    embedder = load(tmp_path)
    assert next(embedder.model.parameters()).dtype == torch.float32
    assert load(tmp_path, dtype="bfloat16").embed(pictures()).dtype == np.float32


def test_errors_say_what_to_do(folders, tiny_llava, tmp_path):
    with pytest.raises(ValueError, match="no generator is loaded in this process to take it from. Name a model"):
        load_embedder(EmbedderConfig())
    with pytest.raises(ConfigError, match="image_embeds"):
        build(EmbedderConfig, {"feature": "pooled"})
    with pytest.raises(ValueError, match="feature 'pooled' is none that pictures are embedded by; use one of auto"):
        EmbedderConfig(feature="pooled")
    with pytest.raises(ValueError, match="batch_size is 0; at least 1 picture"):
        EmbedderConfig(batch_size=0)
    with pytest.raises(ModelError, match="has no space that it shares with text, so there are no image_embeds"):
        load(tiny_llava, feature="image_embeds")
    with pytest.raises(ModelError, match="has no class token, so `cls` would be the vector of its first patch"):
        load(folders["siglip"], feature="cls")
    with pytest.raises(ModelError, match="there is no folder"):
        load(tmp_path / "nowhere")
    llama = tmp_path / "llama"
    T.LlamaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=8).save_pretrained(llama)
    with pytest.raises(
        ModelError, match="model_type 'llama', which has no vision encoder, so it cannot embed pictures"
    ):
        load(llama)
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(ModelError, match="config.json of .*unknown.* could not be read"):
        load(tmp_path / "unknown")
    with pytest.raises(ModelError, match="a LlamaModel has no vision encoder that could be found"):
        Embedder(T.LlamaModel(T.LlamaConfig.from_pretrained(llama, intermediate_size=32)), None,
                 feature="auto", batch_size=1)  # fmt: skip
    bare = tmp_path / "bare"
    CLIPModel.from_pretrained(folders["clip"]).save_pretrained(bare)
    with pytest.raises(ModelError, match="the picture encoder .*bare.* could not be loaded"):
        load(bare)


def test_a_checkpoint_with_tensors_missing_is_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in folders["clip"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("visual_projection.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensor\(s\) that a CLIPModel has \(visual_projection.weight\)"):
        load(tmp_path)
