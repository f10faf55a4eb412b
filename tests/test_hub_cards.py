"""Cards of every kind of run: imitation, weighted lists of losses, merged adapters and models."""

import json
import re
import shutil
import sys

import pytest
import yaml
from huggingface_hub import ModelCard
from trl import DPOConfig

from prefalign import bundled, config, hub
from prefalign.adapters import merge_adapters
from prefalign.hub import merges, methods
from prefalign.hub.model_card import model_card
from prefalign.hub.staging import Base, PublishError, resolve_base
from prefalign.losses import TERMS
from prefalign.merging import Arithmetic, merge_llm, merge_vlms
from prefalign.models import ModelConfig, load_processor
from tests.hub_folders import copy, save_pairs, save_trained
from tests.merging_cases import perturbed, save_adapter, save_text_llm

ROWS = {"rows_in": 9, "rows_used": 6, "too_long": {"row2": 900}, "unanswered": ["row3", "row4"], "earlier_answers": 0}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return save_pairs(tmp_path_factory.mktemp("cards") / "pairs")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llava, pairs):
    return save_trained(tmp_path_factory.mktemp("cards") / "aligned", tiny_llava, pairs)


def a_card(run, **more):
    given = {"base": Base("me/base", hub_id="me/base"), "adapter": False, "method": None, "license": None, "datasets": [],
             "config": yaml.safe_dump(run) if run else None, "data": None, "merge": None, "trainer_state": None,
             "evaluation": None, "baseline": None, "rows": None, "checked": {"picture_effect": 0.5, "text": "x"}}  # fmt: skip
    return ModelCard(model_card("me/x", **{**given, **more}))


def test_every_loss_has_the_papers_of_its_docstring():
    assert [*methods.PAPERS] == [name for name in TERMS if name != "text"]
    for name, found in methods.PAPERS.items():
        for _, number in found:
            assert number in sys.modules[TERMS[name].__module__].__doc__, name
    assert set(methods.WITHOUT_REFERENCE) == {name for name, term in TERMS.items() if not term.needs_reference}
    known = re.findall(r"'(\w+)'", DPOConfig.__dataclass_fields__["loss_type"].metadata["help"])
    assert "sigmoid" in known
    assert set(methods.TEXT_PAPERS) == set(known)


@pytest.mark.parametrize(
    ("name", "words", "named"),
    [
        ("train_preference", "DPO", ["DPO"]),
        ("train_preference_rdpo", "preference training on text (sigmoid) + visual", ["DPO", "mDPO", "Re-Align"]),
        ("train_preference_mdpo", "preference training on text (sigmoid) + visual + anchor (delta 0.0)",
         ["DPO", "mDPO", "Re-Align"]),
        ("train_preference_mpo", "preference training on text (0.8 x sigmoid + sft) + 0.2 x bco",
         ["DPO", "BCO", "MPO"]),
        ("train_preference_povid_stage2", "preference training on 0.5 x text (sigmoid) + 0.5 x povid_noise",
         ["DPO", "POVID"]),
        ("train_preference_s_vco", "preference training on s_vco (betas [0.1, 0.1, 0.1, 0.1])", ["S-VCO"]),
        ("train_sft", "supervised fine-tuning (SFT)", []),
    ],
)  # fmt: skip
def test_the_words_for_the_configs_that_ship(name, words, named):
    stage = bundled.load_stage("train_sft" if "sft" in name else "train_preference")
    run = config.to_mapping(config.build(stage.Config, config.read_yaml(bundled.find(f"recipes/{name}"))))
    assert methods.method_words(run) == words
    assert [paper for paper, _ in methods.papers(run)] == named
    card = a_card(run)
    for paper, number in methods.papers(run):
        assert card.content.count(f"[{paper}](https://arxiv.org/abs/{number})") == 1
    assert ("preference-alignment" in card.data.tags) == ("sft" not in card.data.tags) == (name != "train_sft")
    assert {paper.lower() for paper in named} <= set(card.data.tags)


def test_words_for_other_settings():
    def words(**run):
        return methods.method_words({"pairs": "p", **run})

    assert words(trainer={"loss_type": ["ipo"]}) == "preference training on TRL's ipo"
    assert words(trainer={"loss_type": "sft"}) == "supervised fine-tuning (SFT) on the chosen answers of pairs"
    assert words(term="visual") == "preference training on visual"  # a folder of an earlier version
    assert methods.method_words({"data": "d", "answer": "answer", "trainer": {"loss_type": "dft"}}) == (
        "supervised fine-tuning (SFT) on reference answers, loss_type dft"
    )
    ppo = {"prompts": "p", "rewards": [{"name": "objects"}, {"name": "length", "label": "short"}], "trainer": {}}
    assert methods.method_words(ppo) == "PPO on objects + short"
    grpo = {"data": "d", "p_offline": 0.5, "rewards": [{"name": "objects"}], "trainer": {"algorithm": "grpo"}}
    assert methods.method_words(grpo) == "GRPO on objects"
    assert methods.papers(grpo) == [("DeepSeekMath", "2402.03300")]
    assert methods.method_words({}) == "a method that was not recorded"


def test_a_preference_card_names_losses_pictures_reference_and_weights():
    run = {"pairs": "p", "losses": [{"name": "text"}, {"name": "visual", "weight": 0.5}], "negative": {"kind": "blur"},
           "reference": "cached", "lora": {"r": 8, "alpha": 16}, "freeze": ["vision"]}  # fmt: skip
    text = a_card(run, rows={"rows_in": 5, "rows_used": 5, "too_long": {}, "answers_cut": 2}).content
    for line in (
        "It was aligned by preference training on text (sigmoid) + 0.5 x visual from me/base.",
        "| method | preference training on text (sigmoid) + 0.5 x visual |",
        "| other pictures | `blur`, made in training from the row's own picture where a row brings none |",
        "| reference | the starting weights; their log-probs were computed once, before training |",
        "| trained weights | LoRA adapter, r 8, alpha 16 |",
        "| pairs trained on | 5 of 5 |",
        "| pairs whose answers were cut to max_length | 2 |",
    ):
        assert line in text, line
    assert (
        "| reference | none: these losses read none |" in a_card({"pairs": "p", "losses": [{"name": "simpo"}]}).content
    )
    synced = {
        "pairs": "p",
        "reference": "online",
        "trainer": {"sync_ref_model": True},
        "freeze": ["vision", "projector"],
    }
    assert "| reference | a copy of the policy that follows it (`sync_ref_model`) |" in a_card(synced).content
    assert "| trained weights | all but vision and projector |" in a_card(synced).content


@pytest.mark.usefixtures("warm_executable")
def test_an_sft_run_is_published_as_one(tmp_path, trained, pairs, tiny_llava):
    run = copy(trained, tmp_path / "sft")
    (run / "pairs_manifest.json").rename(run / "data_manifest.json")
    settings = {"model": {"model_name_or_path": str(tiny_llava)}, "data": str(pairs), "answer": "chosen", "freeze": []}
    (run / "prefalign_config.yaml").write_text(yaml.safe_dump(settings))
    (run / "rows.json").write_text(json.dumps(ROWS))
    written = hub.publish_model(run, "me/x", dry_run=True, pairs=pairs)
    assert (written / "data_manifest.json").is_file()
    card = ModelCard.load(written / "README.md")
    assert {"sft", "trl"} <= set(card.data.tags)
    assert not {"dpo", "preference-alignment"} & set(card.data.tags)
    for line in (
        "It was trained by supervised fine-tuning (SFT) on the chosen answers of pairs from a local checkpoint called",
        "| rows trained on | 6 of 9 (1 dropped: longer than max_length; 2 dropped: without a question and an answer) |",
        "| trained weights | all |",
        "| rows made | 5 |",
        "Imitation teaches the manner of its answers too",
    ):
        assert line in card.content, line
    for word in ("pairs trained on", "reference |", "Preference training"):
        assert word not in card.content, word
    other = copy(pairs, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "seed": 4}))
    with pytest.raises(PublishError, match=r"its manifest differs from data_manifest\.json in"):
        hub.publish_model(run, "me/x", dry_run=True, pairs=other)


@pytest.mark.usefixtures("warm_executable")
def test_a_merged_adapter_of_a_run(tmp_path, tiny_llava, pairs):
    base = copy(tiny_llava, tmp_path / "base")
    (base / "LICENSE.txt").write_text("terms")
    (base / "USE_POLICY.md").write_text("what not to do")
    (base / "README.md").write_text("---\nlicense: llama3\n---\n# base\n")
    run = save_adapter(base, tmp_path / "policy")
    load_processor(ModelConfig(str(base))).save_pretrained(run)
    settings = {
        "model": {"model_name_or_path": "an/earlier-adapter"},
        "pairs": "runs/pairs",
        "lora": {"r": 4, "alpha": 8},
    }
    (run / "prefalign_config.yaml").write_text(yaml.safe_dump(settings))
    shutil.copyfile(pairs / "manifest.json", run / "pairs_manifest.json")
    merged = merge_adapters([str(run)], tmp_path / "merged", scale=0.5)
    found = resolve_base(merged, "full", settings, None)
    assert (found.hub_id, found.local) == (None, base)
    written = hub.publish_model(merged, "me/x", dry_run=True, base_model="me/base")
    assert {"LICENSE.txt", "USE_POLICY.md", "merge.json", "pairs_manifest.json"} <= {f.name for f in written.iterdir()}
    note = json.loads((written / "merge.json").read_text())
    assert (note["base"]["name"], note["adapters"][0]["name"]) == ("me/base", "policy")
    card = ModelCard.load(written / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("me/base", "finetune")
    assert {"merge", "dpo", "lora"} <= set(card.data.tags)
    mixture = "the LoRA adapter `policy` merged into its base, multiplied by 0.5 in the language model"
    for line in (
        f"It was aligned by DPO from me/base. This is {mixture}, published as full weights.",
        f"| merged | {mixture} |",
        "| trained weights | LoRA adapter, r 4, alpha 8 |",
        "weight tensors differ from the base",
        "those of its parts apply at least (`me/base`: llama3)",
    ):
        assert line in card.content, line


@pytest.mark.usefixtures("warm_executable")
def test_merged_models(tmp_path, tiny_llava):
    tuned = perturbed(tiny_llava, tmp_path / "tuned", noise=0.05, seed=1)
    merged = merge_vlms([str(tuned)], tmp_path / "out", base=str(tiny_llava), alpha=0.4)
    found = resolve_base(merged, "full", {}, None)
    assert (found.hub_id, found.local) == (None, tiny_llava)
    written = hub.publish_model(merged, "me/x", dry_run=True)
    card = ModelCard.load(written / "README.md")
    assert card.data.base_model is None
    assert "merge" in card.data.tags
    assert "trl" not in card.data.tags
    words = f"a merge: the base and 0.4 times the change from it to `{tuned.name}`"
    for line in (
        f"It is {words}, without further training. It starts from a local checkpoint called `{tiny_llava.name}`",
        f"| method | {words} |",
        "Nothing was trained in this step; `merge.json` holds all settings",
        "No data was used to merge.",
        "A mixture can lose what its parts were good at",
    ):
        assert line in card.content, line
    assert str(tmp_path) not in (written / "merge.json").read_text()


def test_the_words_for_a_merge(tmp_path, tiny_llava):
    llm = save_text_llm(tiny_llava, tmp_path / "llm", noise=0.1)
    out = merge_llm(str(tiny_llava), str(llm), tmp_path / "aya", 0.4, arithmetic=Arithmetic("dare_ties", 0.5))
    note = merges.read_merge(out)
    assert merges.start_of(note)["name"] == str(tiny_llava)
    assert merges.merge_words(note) == (
        f"a merge of the language model, 0.4 of `{tiny_llava}` and 0.6 of `{llm}`, by dare_ties, density 0.5; the other weights "
        f"are those of `{tiny_llava}`"
    )
    assert merges.merge_papers(note) == [
        ("Aya Vision", "2505.08751"), ("TIES", "2306.01708"), ("DARE", "2311.03099"),
    ]  # fmt: skip
    record = {"revision": "f" * 40, "license": None}
    mean = {"stage": "merge_vlms", "alpha": 1, "weights": [0.25, 0.75], "method": "linear", "density": None, "base": None,
            "sources": [{"name": "a/one", **record}, {"name": "b/two", **record}]}  # fmt: skip
    assert merges.merge_words(mean) == "a weighted mean of models, 0.25 x `a/one` + 0.75 x `b/two`"
    card = a_card({}, base=Base("a/one", hub_id="a/one"), merge=mean)
    assert (card.data.base_model, card.data.base_model_relation) == (["a/one", "b/two"], "merge")
    (tmp_path / "merge.json").write_text(json.dumps(mean))
    assert resolve_base(tmp_path, "full", {}, None).hub_id == "a/one"
    adapters = {"stage": "merge_adapter", "scale": 1.0, "weights": [0.5, 0.5], "combination_type": "ties", "density": 0.2,
                "base": {"name": "b", **record}, "adapters": [{"name": "x"}, {"name": "y"}]}  # fmt: skip
    assert merges.merge_words(adapters) == (
        "LoRA adapters merged into their base, 0.5 x `x` + 0.5 x `y`, combined by ties, density 0.2"
    )
    assert [name for name, _ in merges.merge_papers(adapters)] == ["LoRA", "TIES"]
