"""`prefalign doctor` on rows and prompts: each check tells of the broken set-up that it is there for."""

import json
import shutil
from dataclasses import fields, replace

import pytest
import transformers
from packaging.version import Version
from PIL import Image
from tiny_vlms import picture
from transformers import LlavaProcessor

from prefalign.doctor import data, model, prompts
from prefalign.doctor.case import read_sample
from prefalign.doctor.checks import run_checks
from prefalign.doctor.findings import NotExaminedError
from prefalign.images import encode_png
from prefalign.records import assistant_message, user_message
from prefalign.training.collator import PreferenceCollator
from tests.doctor_runs import (
    by_name,
    edited,
    only,
    pair,
    template_of,
    write,
)


def test_a_row_that_cannot_be_read(doctor_case, tmp_path):
    broken = pair(1)
    broken.images[0]["bytes"] = broken.images[0]["bytes"][:200]
    found = only(data.check_rows(doctor_case(folder=write(tmp_path / "pairs", [pair(0), broken]))))
    assert (found.verdict, found.seen) == ("fail", "1 of a sample of 2 read (2 in the folder), 1 run as a batch")
    assert "The run stops at such a row. pair-1" in found.advice


def test_a_shard_that_is_lost(doctor_case, healthy_pairs, tmp_path):
    made = shutil.copytree(healthy_pairs, tmp_path / "pairs")
    max((made / "data").glob("*.parquet")).unlink()
    with pytest.raises(ValueError, match="hold 5 rows, but manifest.json says 8: a shard was lost or added"):
        doctor_case(folder=made)


def test_a_context_that_is_too_short(doctor_case, tiny_llava, tmp_path):
    text = json.loads((tiny_llava / "config.json").read_text())["text_config"]
    short = edited(tiny_llava, tmp_path / "short", config={"text_config": {**text, "max_position_embeddings": 16}})
    found = only(data.check_visual_tokens(doctor_case(short)))
    assert found.verdict == "fail"
    assert "the model has 16. Set trainer.max_length to 16." in found.advice


def test_pictures_that_the_template_leaves_out(doctor_case, tiny_llava, tmp_path):
    blind = edited(tiny_llava, tmp_path / "blind", template=template_of(tiny_llava).replace("<image>", ""))
    made = doctor_case(blind)
    if Version(transformers.__version__) < Version("5.23"):  # there the model notices, not the processor
        found = by_name(run_checks(made))["picture counts"]
        assert found.verdict == "fail"
        assert "Image features and image tokens do not match, tokens: 0, " in found.seen
        return
    found = only(data.check_rows(made))
    assert (found.verdict, found.seen) == ("fail", "0 of a sample of 8 read (8 in the folder)")
    assert "Found total 0 <image> tokens and 1 images" in found.advice
    skipped = by_name(run_checks(made))["visual tokens"]
    assert (skipped.verdict, skipped.seen) == ("skip", "no row of the sample could be read")


def test_rows_without_pictures(doctor_case, tmp_path):
    texts = [replace(pair(n), images=[], rejected_images=[], prompt=[user_message("what ?")]) for n in range(4)]
    made = doctor_case(folder=write(tmp_path / "pairs", texts))
    found = only(data.check_visual_tokens(made))
    assert (found.verdict, found.seen) == ("warn", "no row of the sample holds a picture")
    assert {f.check for f in run_checks(made) if f.verdict == "skip"} >= {"pictures", "picture counts"}


def test_max_length_that_drops_and_cuts(doctor_case):
    whole = [reading.total for reading in doctor_case().readings]
    prompts_ = sorted(reading.prompt for reading in doctor_case().readings)
    found = only(data.check_max_length(doctor_case(trainer={"max_length": prompts_[-1]})))
    assert found.verdict == "warn"
    assert f"{sum(length == prompts_[-1] for length in prompts_)} of 8 rows" not in found.seen
    assert "Dropped, since prompt and image tokens fill it: pair-" in found.advice
    assert f"({prompts_[-1]} tokens)" in found.advice
    assert "Without its end an answer does not teach to stop: pair-" in found.advice
    assert f"trainer.max_length {max(whole)} keeps all of the sample whole." in found.advice


def test_max_length_that_leaves_nothing(doctor_case):
    findings = {found.check: found for found in run_checks(doctor_case(trainer={"max_length": 5}))}
    assert findings["max_length"].verdict == "fail"
    assert findings["max_length"].seen == "5: 0 of 8 rows kept, 0 lose the end of an answer"
    assert (findings["gradients"].verdict, findings["gradients"].seen) == ("skip", "no row of the sample can be run")


def test_pictures_of_one_colour(doctor_case, tmp_path):
    grey = [pair(n, images=[encode_png(Image.new("RGB", (40, 48), (99, 99, 99)))]) for n in range(4)]
    made = doctor_case(folder=write(tmp_path / "grey", grey))
    found = only(data.check_pictures(made))
    assert (found.verdict, found.advice[:33]) == ("fail", "All pictures are of one colour: t")
    found = only(model.check_picture(made))
    assert found.verdict == "fail"
    assert "nats with blank picture; no row of the sample has other pictures to swap with" in found.seen
    one = doctor_case(folder=write(tmp_path / "one", [grey[0], *(pair(n) for n in range(1, 4))]))
    found = only(data.check_pictures(one))
    assert (found.verdict, found.seen) == ("warn", "4 different in 4 rows, 40x48 pixels, 1 of one colour")
    assert "Nothing is to be seen in the pictures of pair-0." in found.advice


def test_one_picture_everywhere(doctor_case, tmp_path):
    same = [pair(n, images=[encode_png(picture(5))]) for n in range(4)]
    found = only(data.check_pictures(doctor_case(folder=write(tmp_path / "pairs", same))))
    assert (found.verdict, found.advice) == (
        "warn", "All rows of the sample show the same picture, so answers need not look at it."
    )  # fmt: skip


def test_another_picture_that_is_the_same(doctor_case, tmp_path):
    same = [pair(n, rejected_images=[encode_png(picture(n))]) for n in range(4)]
    made = doctor_case(folder=write(tmp_path / "pairs", same), losses=[{"name": "visual"}])
    found = only(data.check_other_picture(made))
    assert (found.verdict, found.seen[:24]) == ("fail", "differs in 0 of 4 rows, ")
    assert "such a loss stays where it starts" in found.advice
    found = only(model.check_gradients(made))
    assert (found.verdict, found.advice[:22]) == ("fail", "All gradients are zero")
    flagged = [replace(row, meta={"rejected_on_rejected_images": True}) for row in same]
    both = doctor_case(folder=write(tmp_path / "both", flagged), losses=[{"name": "visual"}, {"name": "two_pictures"}])
    assert only(data.check_other_picture(both)).verdict == "fail"


def test_the_rejected_answers_own_picture(doctor_case, tmp_path):
    """Rows without one are as good; the same picture again leaves two texts to compare."""
    apart = [replace(pair(number), meta={"rejected_on_rejected_images": True}) for number in (1, 2)]
    rows = [replace(pair(0), rejected_images=[]), *apart]
    losses = [{"name": "two_pictures"}]
    made = doctor_case(folder=write(tmp_path / "pairs", rows), losses=losses)
    found = only(data.check_other_picture(made))
    assert (found.verdict, found.seen[:24]) == ("pass", "differs in 2 of 2 rows, ")
    assert only(model.check_first_loss(made)).verdict == "pass"
    same = [replace(row, rejected_images=row.images) for row in apart]
    found = only(data.check_other_picture(doctor_case(folder=write(tmp_path / "same", same), losses=losses)))
    assert (found.verdict, found.advice[-40:]) == ("warn", ": two texts are compared on one picture.")
    alone = [replace(row, rejected_images=[], meta={}) for row in rows]
    made = doctor_case(folder=write(tmp_path / "alone", alone), losses=losses)
    with pytest.raises(NotExaminedError, match="no row of the sample has another picture"):
        data.check_other_picture(made)


def test_answers_of_other_lengths_equal_answers_and_copies(doctor_case, tmp_path):
    rows = [pair(0), pair(1, rejected=pair(1).chosen), replace(pair(0), id="again")]
    rows += [
        pair(n, chosen=[assistant_message("a large red square at the top left of the picture")]) for n in range(2, 6)
    ]
    lengths, differ, copies = data.check_pairs(doctor_case(folder=write(tmp_path / "pairs", rows)))
    assert [found.verdict for found in (lengths, differ, copies)] == ["warn"] * 3
    assert "the policy may learn longer ones" in lengths.advice
    assert (differ.seen, differ.advice) == (
        "in 6 of 7 rows",
        "Nothing is learned from one text as both answers: pair-1.",
    )
    assert copies.seen == "1 of 7 rows are copies of another"


def test_one_answer_on_two_pictures_that_are_compared(doctor_case, tmp_path):
    """No fault under losses that read both pictures; it is one without the other picture, or where both are the same."""
    losses = [{"name": "text"}, {"name": "visual"}]
    rows = [pair(0), *(pair(number, rejected=pair(number).chosen) for number in (1, 2))]

    def differ(name, rows, losses):
        return data.check_pairs(doctor_case(folder=write(tmp_path / name, rows), losses=losses))[1]

    apart = [replace(pair(0), rejected_images=[]), *rows[1:]]
    for name, given, chosen in (("text", rows, losses), ("two", apart, [{"name": "two_pictures"}])):
        found = differ(name, given, chosen)
        assert (found.verdict, found.seen) == ("pass", "in 1 of 3 rows, 2 have one answer on two pictures")
    again = [*rows[:2], replace(rows[2], rejected_images=rows[2].images)]
    found = differ("again", again, losses)
    assert (found.verdict, found.advice) == ("warn", "Nothing is learned from one text as both answers: pair-2.")
    found = differ("alone", rows, losses[:1])
    assert (found.verdict, found.advice) == (
        "warn",
        "Nothing is learned from one text as both answers: pair-1, pair-2.",
    )


def test_rejected_answers_that_are_always_longer(doctor_case, tmp_path):
    """By little, but always."""
    longer = [assistant_message("a red circle and a blue square and then a green circle now")]
    shorter = [assistant_message("a red circle and a blue square and then a green circle")]
    rows = [pair(n, chosen=shorter, rejected=longer) for n in range(20)]
    found = data.check_pairs(doctor_case(folder=write(tmp_path / "pairs", rows)))[0]
    assert found.verdict == "warn"
    assert found.seen.endswith("chosen longer in 0, rejected in 20 of 20 rows")
    assert "the policy may learn shorter ones" in found.advice
    mixed = [*rows, *(pair(n, chosen=longer, rejected=shorter) for n in range(20, 24))]
    assert data.check_pairs(doctor_case(folder=write(tmp_path / "mixed", mixed)))[0].verdict == "pass"


def test_a_begin_mark_that_is_doubled(doctor_case, tiny_llava, tmp_path):
    twice = edited(tiny_llava, tmp_path / "twice", template="{{ bos_token }}{{ bos_token }}" + template_of(tiny_llava))
    found = by_name(prompts.check_template(doctor_case(twice)))["one begin mark"]
    assert (found.verdict, found.seen) == ("fail", "8 of 8 rows begin with two <bos>")


def test_a_generation_prompt_that_training_never_shows(doctor_case, tiny_llava, tmp_path):
    asks = template_of(tiny_llava).replace("{{ 'ASSISTANT:' }}", "{{ 'ASSISTANT: Well' }}")
    found = by_name(prompts.check_template(doctor_case(edited(tiny_llava, tmp_path / "asks", template=asks))))
    assert found["generation prompt"].verdict == "fail"
    assert found["generation prompt"].seen == "equal to the prompt of training in 0 of 8 rows"
    assert "what is trained is not what is asked later" in found["generation prompt"].advice


def test_a_loss_that_covers_the_role(doctor_case, tiny_llava, tmp_path):
    start = template_of(tiny_llava).index("{% if add_generation_prompt")
    deaf = edited(tiny_llava, tmp_path / "deaf", template=template_of(tiny_llava)[:start])
    found = by_name(prompts.check_template(doctor_case(deaf)))["template round trip"]
    assert (found.verdict, found.seen) == ("warn", "answers begin with 'ASSISTANT: ' in 8 of 8 rows")


def test_tokens_that_merge_at_the_seam(doctor_case, tiny_llava, tmp_path):
    """A prompt that ends inside a word: `is` and `There is` are other tokens apart than together."""
    merged = template_of(tiny_llava).replace("{{ 'ASSISTANT: ' }}", "{{ 'ASSISTANT:' }}")
    merged = merged.replace("ASSISTANT:' }}", "ASSISTANT: Th' }}")
    rows = [
        pair(n, chosen=[assistant_message("ere is a square")], rejected=[assistant_message("ere is a dog")])
        for n in (0, 1)
    ]
    made = doctor_case(edited(tiny_llava, tmp_path / "merged", template=merged), write(tmp_path / "pairs", rows))
    found = by_name(prompts.check_template(made))["template round trip"]
    assert (found.verdict, found.seen) == ("warn", "prompt + answer, tokenised as one text, in 0 of 2 rows")


def test_a_template_that_ends_no_turn(doctor_case, tiny_llava, tmp_path):
    open_end = template_of(tiny_llava).replace("{{ eos_token }}", "")
    made = doctor_case(edited(tiny_llava, tmp_path / "open", template=open_end))
    found = only(prompts.check_end_of_turn(made))
    assert (found.verdict, found.seen) == ("warn", "<eos> ends 16 of 16 answers")
    assert found.advice.startswith("The chat template closes an answer with nothing. Training here adds <eos>;")
    assert {found.verdict for found in prompts.check_template(made)} == {"pass"}


def test_a_tokenizer_without_an_end(doctor_case, tiny_llava, tmp_path):
    open_end = template_of(tiny_llava).replace("{{ eos_token }}", "")
    endless = edited(tiny_llava, tmp_path / "endless", template=open_end, tokenizer_config={"eos_token": None})
    with pytest.raises(ValueError, match="neither the chat template nor the tokenizer ends an answer.*an eos_token"):
        doctor_case(endless)


def test_a_turn_that_generation_does_not_stop_at(doctor_case, tiny_idefics3):
    found = only(prompts.check_end_of_turn(doctor_case(tiny_idefics3)))
    assert (found.verdict, found.seen) == ("warn", "<end_of_utterance> ends 16 of 16 answers")
    assert "`generate` does not stop at <end_of_utterance>. Add its id" in found.advice


class MasksById(PreferenceCollator):
    """A collator that leaves end marks out of the loss, as masks built from ids do where padding is the end mark."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        ends = batch["input_ids"] == self.processor.tokenizer.eos_token_id
        return {**batch, "completion_mask": batch["completion_mask"].masked_fill(ends, 0)}


def test_an_end_outside_the_loss(doctor_case):
    made = doctor_case()
    made.collator = MasksById(**{f.name: getattr(made.collator, f.name) for f in fields(made.collator) if f.init})
    found = only(prompts.check_end_of_turn(made))
    assert (found.verdict, found.seen) == ("fail", "<eos> ends 12 of 16 answers")
    assert found.advice.startswith("No <eos> is in the loss of pair-")
    found = only(prompts.check_padding(made))
    assert (found.verdict, found.advice) == ("fail", "Padding is in the loss, or answers are not.")


def test_padding_that_is_the_end_mark(doctor_case, tiny_llava, tmp_path):
    same = edited(tiny_llava, tmp_path / "same", tokenizer_config={"pad_token": "<eos>"})
    found = only(prompts.check_padding(doctor_case(same)))
    assert found.verdict == "warn"
    assert "<eos> is padding and an end mark. Here masks come from lengths" in found.advice


def test_marks_in_answers(doctor_case, tmp_path):
    ends = [pair(0), pair(1, chosen=[assistant_message("a <eos> square")])]
    found = only(prompts.check_marks_in_answers(doctor_case(folder=write(tmp_path / "ends", ends))))
    assert (found.verdict, found.seen) == ("warn", "1 of 2 rows have some inside an answer")
    assert "<eos> in the text of an answer is read as a mark, not as text (pair-1)" in found.advice
    shows = [pair(0), pair(1, rejected=[assistant_message("an <image> of a dog")])]
    found = only(prompts.check_marks_in_answers(doctor_case(folder=write(tmp_path / "shows", shows))))
    assert found.verdict == "fail"
    assert "<image> in an answer is read as a place for a picture that is not there (pair-1)" in found.advice


def test_an_error_is_a_finding_and_the_other_checks_go_on(doctor_case, tmp_path):
    shows = [pair(n, rejected=[assistant_message("an <image> of a dog")]) for n in range(2)]
    findings = by_name(run_checks(doctor_case(folder=write(tmp_path / "shows", shows), fast_path="off")))
    assert findings["gradients"].verdict == "fail"
    assert "Image features and image tokens do not match" in findings["gradients"].seen
    assert findings["gradients"].advice.startswith("The run would most likely stop with this error.")
    assert findings["disk"].verdict == "pass"


class Mirrored(LlavaProcessor):
    """A processor of somebody's own, which a checkpoint does not hold."""


def test_a_processor_that_is_lost_when_saved(doctor_case):
    made = doctor_case()
    made.processor.__class__ = Mirrored
    found = only(prompts.check_processor_saved(made))
    assert found.verdict == "fail"
    assert found.seen.endswith(
        ("a Mirrored could not be loaded again", "loaded again as TokenizersBackend, it cannot prepare a row")
    )


class Inverting(LlavaProcessor):
    """Somebody's own edit of a class, under the name of the original."""

    def __call__(self, *args, **kwargs):
        prepared = super().__call__(*args, **kwargs)
        prepared["pixel_values"] = -prepared["pixel_values"]
        return prepared


Inverting.__name__ = "LlavaProcessor"


def test_a_processor_that_is_saved_as_another(doctor_case):
    made = doctor_case()
    made.processor.__class__ = Inverting
    made.readings.clear()
    read_sample(made, 4)
    found = only(prompts.check_processor_saved(made))
    assert (found.verdict, found.seen) == ("fail", "LlavaProcessor loaded again gives other pixels")
    assert found.advice.startswith("Whoever loads the trained model would show it something else.")
