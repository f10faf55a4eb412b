"""Every config is executed: its own settings, the shipped tiny model, a few rows, one or two steps."""

import json

import pytest

from prefalign import bundled, config
from prefalign.blocks import NoRows
from prefalign.checkpoints import SCENES_BASE
from prefalign.manifest import read_manifest
from prefalign.records import Candidates, Prompt
from prefalign.scenes import labeller
from prefalign.scenes.export import export
from prefalign.store import OutputConfig, read_records, write_records
from tests.merging_cases import perturbed, save_adapter, save_text_llm

MODEL = {"model_name_or_path": "scenes", "dtype": "auto", "device": "cpu", "processor": None}


def start(name, stage, changes):
    module = bundled.load_stage(stage)
    values = config.merge(config.read_yaml(bundled.configs()[name]), changes)
    return module.main(config.build(module.Config, values, source=name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("smoke")


@pytest.fixture(scope="module")
def prompts(folder):
    export(folder / "prompts", split="train_biased", kind="caption", regime="seen", start=0, stop=6)
    return folder / "prompts"


@pytest.fixture(scope="module")
def pairs(folder, prompts):
    """Pairs with another picture (`noised`) and without (`none`)."""
    for kind in ("noised", "none"):
        changes = {"data": {"path": prompts}, "output": {"path": folder / "pairs" / kind}, "rejected_images": kind}
        start("datagen/povid_scenes", "povid", changes)
    return folder / "pairs"


def names(stage):
    return [name for name in bundled.configs() if name.split("/")[-1].startswith(stage)]


@pytest.mark.parametrize("name", names("bdhs") + names("povid"))
def test_pairs_config(name, prompts, tmp_path):
    changes = {"data": {"path": prompts, "limit": 3}, "output": {"path": tmp_path / "out"}, "batch_size": 4,
               "sampling": {"max_new_tokens": 64}}  # fmt: skip
    stage = name.split("/")[-1].split("_")[0]
    values = config.read_yaml(bundled.configs()[name])
    if values.get("model"):
        changes["model"] = MODEL
    if "similarity" in values:
        changes["similarity"] = "lexical"
    manifest = start(name, stage, changes)
    assert manifest.rows_in == 3 == manifest.rows_used + sum(manifest.dropped.values())
    assert manifest.rows_out >= 2


@pytest.mark.parametrize("name", names("train_preference"))
def test_training_config(name, pairs, tmp_path):
    values = config.read_yaml(bundled.configs()[name])
    one_picture = values.get("negative") or values["losses"] == [{"name": "two_pictures"}]
    changes = {"model": MODEL, "pairs": pairs / ("none" if one_picture else "noised"), "output": tmp_path / "out",
               "trainer": {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
                           "bf16": False, "save_steps": 1}}  # fmt: skip
    start(name, "train_preference", changes)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert history[-1]["step"] == 1


@pytest.mark.parametrize("name", names("train_sft"))
def test_sft_config(name, prompts, pairs, tmp_path):
    changes = {"model": MODEL, "data": pairs / "none", "output": tmp_path / "out",
               "trainer": {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
                           "bf16": False, "save_steps": 1}}  # fmt: skip
    if "stic" in name:
        start("datagen/stic_sft_scenes", "stic", {"data": {"path": prompts}, "output": {"path": tmp_path / "data"}})
        changes["data"] = tmp_path / "data"
    start(name, "train_sft", changes)
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["rows_in"] == 6 == results["rows_used"]


def test_evaluation_of_scenes(tmp_path):
    results = start("recipes/evaluate_scenes", "evaluate_model",
                    {"scenes": {"pictures": 6}, "reliance": {"items": 6}, "output": tmp_path / "out"})  # fmt: skip
    assert results["metrics"]["chair_i"]["n"] == 6


def test_evaluation_of_files(tmp_path):
    from prefalign.scenes import world

    questions = []
    for index in range(4):
        scene = world.scene("test_fair", index)
        (tmp_path / f"{index}.png").write_bytes(world.png(scene))
        shape = scene.objects[0].shape
        questions.append({"question_id": index, "image": f"{index}.png", "text": f"Is there a {shape} in the picture?",
                          "label": "yes"})  # fmt: skip
    (tmp_path / "pope.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    results = start("recipes/evaluate_files", "evaluate_model",
                    {"model": MODEL, "output": tmp_path / "out", "reliance": {"items": 4},
                     "files": {"chair": None, "short": None,
                               "pope": {"questions": [tmp_path / "pope.jsonl"], "images": tmp_path}}})  # fmt: skip
    assert results["metrics"]["yesno_accuracy"]["n"] == 4


@pytest.mark.usefixtures("warm_executable")
def test_demo(tmp_path, capsys):
    steps = {"max_steps": 2, "per_device_train_batch_size": 4, "save_steps": 2}
    changes = {"output": tmp_path / "demo", "prompts": 12, "training": {"trainer": steps},
               "evaluation": {"scenes": {"pictures": 12}, "reliance": {"items": 12}, "draws": 200}}  # fmt: skip
    results = start("recipes/demo", "demo", changes)
    assert results == json.loads((tmp_path / "demo" / "results.json").read_text())
    for run in ("base", "aligned", "sft_control", "difference"):
        for metric in ("chair_i", "chair_s", "recall", "recall_clear", "objects_per_caption", "accuracy", "reliance"):
            assert set(results[run][metric]) == {"value", "ci95"}
    assert results["verdict"] in capsys.readouterr().out
    for name in ("report.html", "pairs.html", "publish/README.md", "publish/model.safetensors"):
        assert (tmp_path / "demo" / name).stat().st_size > 1000
    written = (tmp_path / "demo" / "report.html").stat().st_mtime_ns
    assert start("recipes/demo", "demo", changes) == results
    assert (tmp_path / "demo" / "report.html").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="holds a demo with other settings"):
        start("recipes/demo", "demo", config.merge(changes, {"seed": 1}))


@pytest.mark.parametrize("name", names("image_contrast"))
def test_image_contrast_config(name, pairs, tmp_path):
    manifest = start(name, "image_contrast", {"data": {"path": pairs / "none"}, "output": {"path": tmp_path / "out"}})
    assert manifest.rows_in == 6 == manifest.rows_used + sum(manifest.dropped.values())
    assert manifest.rows_out == 6


@pytest.mark.parametrize("name", names("s_vco"))
def test_s_vco_config(name, tmp_path):
    export(tmp_path / "twins", kind="twin", start=0, stop=6)
    changes = {"data": {"path": tmp_path / "twins", "images": None}, "output": {"path": tmp_path / "out"}}
    if not name.endswith("scenes"):
        scenes = {"model_name_or_path": "scenes", "dtype": "auto", "feature": "cls"}
        changes["filter"] = {"semantic": scenes, "visual": scenes, "most_visual": 0.998}
    manifest = start(name, "s_vco", changes)
    assert manifest.rows_in == 6 == manifest.rows_used + sum(manifest.dropped.values())
    assert manifest.rows_out >= 4


@pytest.mark.parametrize("name", names("stic"))
def test_stic_config(name, prompts, tmp_path):
    changes = {"model": MODEL, "data": {"path": prompts}, "output": {"path": tmp_path / "out"}, "batch_size": 8,
               "sampling": {"max_new_tokens": 96}}  # fmt: skip
    manifest = start(name, "stic", changes)
    assert manifest.rows_in == 6 == manifest.rows_used + sum(manifest.dropped.values())
    assert manifest.rows_out >= (6 if "sft" in name else 1)


@pytest.mark.parametrize("name", names("m3id"))
def test_m3id_config(name, prompts, tmp_path):
    changes = {"model": MODEL, "data": {"path": prompts, "images": None}, "output": {"path": tmp_path / "out"},
               "batch_size": 8}  # fmt: skip
    manifest = start(name, "m3id", changes)
    assert manifest.rows_in == 6 == manifest.rows_used + sum(manifest.dropped.values())
    assert manifest.rows_out >= 4


def test_evaluation_with_m3id_decoding(tmp_path):
    changes = {"scenes": {"pictures": 6}, "reliance": {"items": 6}}
    start("recipes/evaluate_scenes", "evaluate_model", {**changes, "output": tmp_path / "base"})
    results = start("recipes/evaluate_model_m3id", "evaluate_model",
                    {**changes, "baseline": tmp_path / "base", "output": tmp_path / "out"})  # fmt: skip
    assert results["metrics"]["chair_i"]["n"] == 6
    assert results["settings"]["contrast"]["gate"] == 0.6


@pytest.mark.parametrize("name", names("re_align"))
def test_re_align_config(name, prompts, tmp_path):
    changes = {"data": {"path": prompts, "images": None}, "output": {"path": tmp_path / "out"}, "model": MODEL,
               "masker": None, "embedder": {"model_name_or_path": "scenes", "device": "cpu"},
               "retrieval": {"floor": -1.0, "ceiling": 0.9999}}  # fmt: skip
    if not name.endswith("scenes"):  # the tiny model speaks of shapes only: it cannot be asked to mask
        changes["masking"] = {"masker": "rules"}
    manifest = start(name, "re_align", changes)
    assert manifest.rows_in == 6 == manifest.rows_used + sum(manifest.dropped.values())
    assert manifest.rows_out >= 4


@pytest.mark.parametrize("name", names("mia_dpo"))
def test_mia_dpo_config(name, prompts, tmp_path):
    keep_all = {"sequence": {2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0}, "least_perplexity": 0.0, "most_length_ratio": 100.0}
    changes = {"model": MODEL, "data": {"path": prompts, "images": None}, "output": {"path": tmp_path / "out"},
               "batch_size": 8, "max_new_tokens": 96, "selection": keep_all}  # fmt: skip
    if not name.endswith("scenes"):
        scenes = "Describe the {ordinal} picture."
        changes["wording"] = {"line": "", "sequence": [scenes], "grid": [scenes], "pic_in_pic": [scenes]}
    manifest = start(name, "mia_dpo", changes)
    assert manifest.rows_in == 6 == manifest.rows_used + sum(manifest.dropped.values())
    assert manifest.rows_out >= 2


@pytest.mark.parametrize("name", names("filter_pairs"))
def test_filter_pairs_config(name, pairs, tmp_path):
    changes = {"model": MODEL, "data": {"path": pairs / "none"}, "output": {"path": tmp_path / "out"}, "batch_size": 4,
               "filters": {"evidence": {"floor": -1000.0}, "reliance": {"ceiling": 1000.0}}}  # fmt: skip
    if name.endswith("scenes"):
        changes["filters"]["claims"] = {"floor": -10.0}
    manifest = start(name, "filter_pairs", changes)
    assert manifest.rows_in == 6 == manifest.rows_used + sum(manifest.dropped.values())
    assert manifest.rows_out >= 2


def test_merge_adapter_config(tmp_path):
    made = save_adapter(SCENES_BASE, tmp_path / "adapter")
    start("recipes/merge_adapter", "merge_adapter", {"adapter": str(made), "output": tmp_path / "out"})
    assert {"model.safetensors", "processor_config.json", "chat_template.jinja"} <= {
        file.name for file in (tmp_path / "out").iterdir()
    }


@pytest.mark.parametrize("name", names("merge_models"))
def test_merge_models_config(name, tmp_path):
    policy = perturbed(SCENES_BASE, tmp_path / "policy", noise=0.01, seed=1)
    changes = {"models": str(policy), "output": tmp_path / "out"}
    if not name.endswith("scenes"):
        changes["text_model"] = str(save_text_llm(SCENES_BASE, tmp_path / "text", noise=0.0))
    made = start(name, "merge_models", changes)
    assert len(made) >= 4
    assert all((folder / "model.safetensors").is_file() for folder in made)


@pytest.fixture(scope="module")
def scored(folder, prompts):
    """Four answers to each prompt, scored by the truth and as a judge and people would."""
    changes = {"data": {"path": prompts}, "output": {"path": folder / "sampled"}, "batch_size": 8}
    start("datagen/sample_responses_scenes", "sample_responses", changes)
    changes = {"data": {"path": folder / "sampled"}, "output": {"path": folder / "truly"}}
    start("reward_models/score_responses_scenes", "score_responses", changes)
    rows = list(read_records(folder / "truly", Candidates))
    for row in rows:
        for place, response in enumerate(row.responses):
            response["scores"] |= {"human": 0.9 - 0.3 * place} | {
                f"judge/{name}": 4 - place
                for name in ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
            }
    write_records("t", rows, output=OutputConfig(folder / "scored"), record=Candidates, settings={}, seed=0)
    return folder / "scored"


@pytest.mark.parametrize("name", names("sample_responses"))
def test_sample_responses_config(name, prompts, tmp_path):
    changes = {"model": MODEL, "data": {"path": prompts, "images": None}, "output": {"path": tmp_path / "out"},
               "batch_size": 8, "sampling": {"max_new_tokens": 16}}  # fmt: skip
    manifest = start(name, "sample_responses", changes)
    assert manifest.rows_in == 6 == manifest.rows_out


@pytest.mark.parametrize("name", names("score_responses"))
def test_score_responses_config(name, scored, tmp_path):
    entries = config.read_yaml(bundled.configs()[name])["rewards"]
    for entry in entries:
        if "model" in entry:
            entry |= {"model": MODEL, "sampling": {"max_new_tokens": 8, "temperature": 0}}
    changes = {"data": {"path": scored, "limit": 2}, "output": {"path": tmp_path / "out"}, "rewards": entries}
    manifest = start(name, "score_responses", changes)
    assert manifest.rows_in == 2 == manifest.rows_out
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert found["responses"] == 8
    # the tiny model of drawn shapes cannot judge: what it says is missing, and no grade is made up
    assert found["scores"]["total"]["missing"] == (0 if name.endswith("scenes") else 8)


@pytest.mark.parametrize("name", names("import_published"))
def test_import_published_config(name, tmp_path):
    export(tmp_path / "twins", kind="twin", start=0, stop=6)
    changes = {"data": {"path": tmp_path / "twins", "images": None}, "output": {"path": tmp_path / "out"}}
    assert start(name, "import_published", changes).rows_out == 6


@pytest.mark.parametrize("name", names("select_responses"))
@pytest.mark.parametrize("produce", ["pairs", "best", "steerlm", "ranked"])
def test_select_responses_config(name, produce, scored, tmp_path):
    changes = {"data": {"path": scored}, "output": {"path": tmp_path / "out"}, "produce": produce}
    manifest = start(name, "select_responses", changes)
    assert manifest.rows_in == 6 == manifest.rows_used + sum(manifest.dropped.values())
    assert manifest.rows_used >= 4


@pytest.mark.parametrize("name", names("quality_pairs"))
def test_quality_pairs_config(name, prompts, tmp_path):
    rewards = config.read_yaml(bundled.configs()[name])["rewards"]
    for entry in rewards:
        if "model" in entry:
            entry |= {"model": MODEL, "sampling": {"max_new_tokens": 8, "temperature": 0}}
    changes = {"model": MODEL, "data": {"path": prompts, "images": None}, "output": {"path": tmp_path / "out"},
               "rewards": rewards, "batch_size": 8, "sampling": {"max_new_tokens": 32}}  # fmt: skip
    if name.endswith("scenes"):
        manifest = start(name, "quality_pairs", changes)
    else:  # the tiny model of drawn shapes cannot judge: no grade is made up, and so no pair
        with pytest.raises(
            NoRows, match="steerlm: 6 ungraded.* 24 of 24 answers lack a grade: in 3 attempts the judge"
        ):
            start(name, "quality_pairs", changes)
        manifest = read_manifest(tmp_path / "out" / "answers")
    assert manifest.rows_in == 6 == manifest.rows_out
    found = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert found["scores"]["total"]["missing"] == (0 if name.endswith("scenes") else 24)
    assert (found["pairs"]["rows"] > 0) == name.endswith("scenes") == (tmp_path / "out" / "pairs").is_dir()


@pytest.mark.parametrize("name", names("clinical_rules"))
@pytest.mark.parametrize("produce", ["sft", "pairs", "prompts"])
def test_clinical_rules_config(name, produce, prompts, tmp_path):
    rows = [{"image": f"{number}.png", "label": label} for number, label in enumerate(("AML", "MM", "NORMAL", "CLOT"))]
    changes = {"data": {"path": prompts, "images": None}, "output": {"path": tmp_path / "out"}, "produce": produce}
    if not name.endswith("scenes"):
        for prompt, row in zip(read_records(prompts, Prompt), rows, strict=False):
            (tmp_path / row["image"]).write_bytes(prompt.images[0]["bytes"])
        (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes["data"] = {"path": tmp_path / "labels.jsonl", "images": tmp_path}
    manifest = start(name, "clinical_rules", changes)
    assert manifest.rows_in == manifest.rows_used == (6 if name.endswith("scenes") else 4)


@pytest.mark.parametrize("name", names("curate_instructions"))
def test_curate_instructions_config(name, prompts, scored, tmp_path):
    values = config.read_yaml(bundled.configs()[name])
    changes = {"data": {"path": prompts, "images": None}, "output": {"path": tmp_path / "out"}}
    if values["produce"] == "pairs":
        manifest = start(name, "curate_instructions", config.merge(changes, {"data": {"path": scored}}))
        assert manifest.rows_used == 6
        return
    for stage in values["stages"]:
        if stage.get("rewards"):
            stage["rewards"] = [{"name": "objects", "weight": {"precision": 1.0, "recall": 1.0}}]
    changes |= {"stages": values["stages"], "model": MODEL, "batch_size": 8, "sampling": {"max_new_tokens": 24}}
    manifest = start(name, "curate_instructions", changes)
    assert manifest.rows_in == 6 == manifest.rows_used + sum(manifest.dropped.values())
    assert manifest.rows_used == (2 if name.endswith("scenes") else 1)


@pytest.mark.parametrize("name", names("train_reward_model"))
def test_reward_model_config(name, prompts, pairs, tmp_path):
    from prefalign.rewards.learned import LearnedReward
    from tests.reward_runs import graded_by_chance

    two_sided = config.read_yaml(bundled.configs()[name]).get("rejected_pictures")
    pairs = pairs / "noised" if two_sided else graded_by_chance(prompts, tmp_path / "pairs")
    trainer = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "bf16": False,
               "save_steps": 1, "eval_steps": 1}  # fmt: skip
    changes = {"model": MODEL, "pairs": pairs, "output": tmp_path / "out", "trainer": trainer}
    if config.read_yaml(bundled.configs()[name]).get("eval_pairs"):
        changes["eval_pairs"] = pairs
    start(name, "train_reward_model", changes)
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["rows_in"] == 6
    assert LearnedReward(tmp_path / "out", device="cpu").model.calibration.with_facts.rows == 12


@pytest.fixture(scope="module")
def reward_model(folder, prompts):
    """A reward model that is an adapter of the tiny model."""
    from tests.reward_runs import graded_by_chance

    pairs = graded_by_chance(prompts, folder / "reward_pairs")
    trainer = {"max_steps": 1, "per_device_train_batch_size": 2, "save_steps": 1, "bf16": False}
    changes = {
        "model": MODEL,
        "pairs": pairs,
        "output": folder / "reward",
        "trainer": trainer,
        "lora": {"r": 2, "alpha": 4},
    }
    start("reward_models/train_reward_model_scenes", "train_reward_model", changes)
    return folder / "reward"


@pytest.mark.parametrize("name", names("train_ppo"))
def test_ppo_config(name, prompts, tmp_path, request):
    values = config.read_yaml(bundled.configs()[name])
    updates = values["trainer"].get("num_ppo_epochs", 1) * 2
    trainer = {"max_steps": updates, "num_mini_batches": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
               "num_generations": 2, "save_steps": updates, "max_new_tokens": 8, "bf16": False}  # fmt: skip
    changes = {
        "model": {**MODEL, "load_in_4bit": False},
        "prompts": prompts,
        "output": tmp_path / "out",
        "trainer": trainer,
    }
    if "reward_model" in values:
        changes |= {"reward_model": request.getfixturevalue("reward_model"), "force_reward": True}
    if values["trainer"].get("conversations"):
        export(tmp_path / "linked", split="train_biased", kind="linked", start=0, stop=6)
        changes["prompts"] = tmp_path / "linked"
    start(name, "train_ppo", changes)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert history[-1]["step"] == updates
    assert abs(history[0]["objective/kl"]) < 1e-3
    lines = (tmp_path / "out" / "rollouts" / "000000-0.jsonl").read_text().splitlines()
    assert len(lines) == 4


@pytest.mark.parametrize("name", names("train_online"))
def test_online_config(name, folder, prompts, tmp_path):
    """Every algorithm; a judge's place is taken by a rule, since the tiny model cannot judge."""
    values = config.read_yaml(bundled.configs()[name])
    algorithm = values["trainer"]["algorithm"]
    changes = {"model": MODEL, "data": {"path": prompts}, "output": tmp_path / "out", "sampling": {"max_new_tokens": 96},
               "trainer": {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "bf16": False,
                           "save_steps": 1}}  # fmt: skip
    if algorithm == "online_dpo":
        changes |= {"rounds": {"count": 2, "prompts": 6}, "check": {"prompts": 1}}
    if values.get("evaluation"):
        changes["evaluation"] = {"scenes": {"pictures": 2}, "draws": 20}
    if values.get("offline"):
        start("datagen/povid_scenes", "povid", {"data": {"path": prompts}, "output": {"path": folder / "for_online"}})
        changes["offline"] = folder / "for_online"
    if values.get("annotator"):
        rule = {"name": "objects", "weight": {"invented": 1.0, "recall": 1.0}}
        values["annotator"] = {"name": "rewards", "rewards": [rule]}
    if "rlaif_v" in name:
        labeller.build(tmp_path / "labeller", steps=8, seeing=20, pictures=64, sample=2)
        values["rewards"][0]["labeller"]["model_name_or_path"] = str(tmp_path / "labeller")
    module = bundled.load_stage("train_online")
    results = module.main(config.build(module.Config, config.merge(values, changes), source=name))
    if algorithm == "online_dpo":
        assert [measured["round"] for measured in results["rounds"]] == [1, 2]
        assert all(sum(measured["pairs"].values()) >= 1 for measured in results["rounds"])
    else:
        history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
        assert history[-1]["step"] == 1


@pytest.mark.parametrize("name", names("grade_reward_model"))
def test_grading_config(name, prompts, tmp_path):
    from tests.reward_runs import graded_by_chance

    pairs = graded_by_chance(prompts, tmp_path / "pairs")
    trainer = {"max_steps": 1, "per_device_train_batch_size": 2, "save_steps": 1}
    changes = {"model": MODEL, "pairs": pairs, "output": tmp_path / "reward", "trainer": trainer}
    start("reward_models/train_reward_model_scenes", "train_reward_model", changes)
    sets = {kind: {"path": pairs} for kind in config.read_yaml(bundled.configs()[name])["sets"]}
    rewards = [{"name": "reward_model", "path": str(tmp_path / "reward")}]
    results = start(name, "grade_reward_model", {"rewards": rewards, "sets": sets, "output": tmp_path / "out"})
    assert results["sets"].keys() == sets.keys()
    assert all(found["metrics"]["accuracy"]["n"] == 6 for found in results["sets"].values())
    assert json.loads((tmp_path / "reward" / "grade.json").read_text())["sets"].keys() == sets.keys()
