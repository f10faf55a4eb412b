"""The transformers engine: what it draws does not depend on the batch, what it hides is hidden, what it scores is TRL's."""

import itertools
from pathlib import Path

import pytest
import torch
from masked_reference import greedy, hidden_places
from PIL import Image
from scipy.stats import chisquare
from tiny_vlms import picture, save_tiny

from prefalign import families
from prefalign.engines import ImageMask, Request, Sampling
from prefalign.engines.sampling import gumbel_noise
from prefalign.engines.transformers import TransformersEngine, load_engine
from prefalign.models import ModelConfig, fingerprint
from prefalign.records import assistant_message, user_message

QUESTIONS = ("What is in the image?", "Describe the picture in detail.", "How many objects are there? Yes or no?")
GREEDY = Sampling(max_new_tokens=10, temperature=0)


@pytest.fixture(scope="module", params=["llava", "idefics3", "gemma3"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    folder = save_tiny(request.param, tmp_path_factory.mktemp("engine") / request.param)
    return load_engine(ModelConfig(str(folder)), batch_size=8)


@pytest.fixture(scope="module")
def llava(tiny_llava: Path) -> TransformersEngine:
    return load_engine(ModelConfig(str(tiny_llava)), batch_size=8)


def _requests(count: int, **more) -> list[Request]:
    return [
        Request(
            f"row-{index}",
            [user_message(QUESTIONS[index % 3], 1 + index % 2)],
            [picture(10 * index + number, (40 + 8 * (index % 4), 48)) for number in range(1 + index % 2)],
            seed=3,
            **more,
        )
        for index in range(count)
    ]


def _close(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=2e-5) for a, b in zip(one, other, strict=True))


class TestSampling:
    SAMPLINGS = (
        Sampling(max_new_tokens=12),
        Sampling(max_new_tokens=12, temperature=0.7, top_p=0.9, top_k=50, repetition_penalty=1.2),
        GREEDY,
    )

    @pytest.mark.parametrize("sampling", SAMPLINGS)
    def test_neither_batch_nor_order_changes_what_is_drawn(self, engine: TransformersEngine, sampling: Sampling) -> None:
        requests = _requests(8)
        together = engine.generate(requests, sampling)
        assert [completion.id for completion in together] == [request.id for request in requests]
        alone = [engine.generate([request], sampling)[0] for request in requests]
        assert alone == together
        shuffled = [requests[index] for index in (5, 2, 7, 0, 1, 6, 3, 4)]
        assert {one.id: one for one in engine.generate(shuffled, sampling)} == {one.id: one for one in together}

    def test_seed_and_id_decide(self, llava: TransformersEngine) -> None:
        one, again, other_seed, other_id = (
            Request(name, [user_message("Q", 1)], [picture(0)], seed=seed) for name, seed in (("a", 1), ("a", 1), ("a", 2), ("b", 1))
        )
        tokens = [tuple(c.token_ids) for c in llava.generate([one, again, other_seed, other_id], Sampling(max_new_tokens=8))]
        assert tokens[0] == tokens[1]
        assert len(set(tokens)) == 3

    def test_temperature_zero_is_the_argmax(self, llava: TransformersEngine) -> None:
        (request,) = _requests(1)
        expected, _ = greedy(
            llava.model,
            llava.processor,
            families.render(llava.processor, request.messages),
            request.images,
            ImageMask(0.0, 0),
            10,
            llava.banned,
        )
        assert llava.generate([request], GREEDY)[0].token_ids == expected
        cold = llava.generate([request], Sampling(max_new_tokens=10, temperature=1e-4))[0]
        assert cold.token_ids == expected
        assert llava.generate([request], Sampling(max_new_tokens=10, top_k=1))[0].token_ids == expected

    def test_frequencies_are_those_of_the_softmax(self, llava: TransformersEngine) -> None:
        """600 first tokens at low temperature, so that a few tokens carry the mass; chi-square over them."""
        requests = [Request(f"r{index}", [user_message("Q", 1)], [picture(0)]) for index in range(600)]
        engine = TransformersEngine(llava.model, llava.processor, batch_size=200)
        drawn = torch.tensor([c.token_ids[0] for c in engine.generate(requests, Sampling(max_new_tokens=1, temperature=0.25))])
        _, logits = greedy(llava.model, llava.processor, families.render(llava.processor, requests[0].messages),
                           requests[0].images, ImageMask(0.0, 0), 1, [])  # fmt: skip
        logits[0, llava.banned] = float("-inf")
        shares = (logits[0] / 0.25).softmax(0)
        common = (shares * 600 >= 5).nonzero().squeeze(1)
        expected = torch.cat([shares[common], (1 - shares[common].sum())[None]]) * 600
        counts = torch.stack([(drawn == token).sum() for token in common] + [(~torch.isin(drawn, common)).sum()])
        assert len(common) >= 5
        assert chisquare(counts.numpy(), (expected.double() * 600 / expected.double().sum()).numpy()).pvalue > 0.001

    def test_marks_are_never_drawn(self, llava: TransformersEngine) -> None:
        with torch.no_grad():
            saved = llava.model.lm_head.weight.clone()
            llava.model.lm_head.weight[llava.banned] *= 1000
        try:
            out = llava.generate(_requests(6), Sampling(max_new_tokens=20, temperature=3.0))
        finally:
            llava.model.lm_head.weight.data.copy_(saved)
        assert not {token for completion in out for token in completion.token_ids} & set(llava.banned)

    def test_the_checkpoints_own_sampling_is_not_used(self, llava: TransformersEngine) -> None:
        before = llava.generate(_requests(3), GREEDY)
        config = llava.model.generation_config
        config.repetition_penalty, config.temperature, config.do_sample, config.min_new_tokens = 5.0, 9.0, True, 3
        try:
            assert llava.generate(_requests(3), GREEDY) == before
            assert llava.model.generation_config is config
        finally:
            config.repetition_penalty = config.temperature = config.do_sample = config.min_new_tokens = None

    def test_the_model_is_left_as_it_was(self, llava: TransformersEngine) -> None:
        llava.model.train()
        try:
            llava.generate(_requests(1), GREEDY)
            assert llava.model.training
            llava.logprobs(_requests(1), ["Yes."])
            assert llava.model.training
        finally:
            llava.model.eval()

    @pytest.mark.parametrize(
        ("sampling", "message"),
        [
            (Sampling(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
            (Sampling(temperature=-1.0), r"temperature must be 0 \(greedy\) or more, got -1.0"),
            (Sampling(top_p=0.0), r"top_p must be in \(0, 1\], got 0.0"),
            (Sampling(top_k=-1), r"top_k must be 0 \(cuts nothing\) or more, got -1"),
            (Sampling(repetition_penalty=0.0), "repetition_penalty must be above 0, got 0.0"),
        ],
    )
    def test_settings_that_mean_nothing(self, llava: TransformersEngine, sampling: Sampling, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            llava.generate(_requests(1), sampling)

    def test_batch_size_is_checked(self, llava: TransformersEngine) -> None:
        with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
            TransformersEngine(llava.model, llava.processor, batch_size=0)


class TestNoise:
    def test_it_is_standard_gumbel(self) -> None:
        noise = gumbel_noise(torch.arange(500), 7, 400)
        assert noise.isfinite().all()
        assert abs(noise.mean().item() - 0.57722) < 0.01  # Euler's constant; standard error 0.003
        assert abs(noise.var().item() - 1.64493) < 0.03  # pi squared / 6
        for point in (-1.0, 0.0, 2.0):
            expected = torch.exp(-torch.exp(torch.tensor(-point))).item()
            assert abs((noise < point).float().mean().item() - expected) < 0.005

    def test_neighbouring_seeds_steps_and_tokens_are_independent(self) -> None:
        noise = torch.stack([gumbel_noise(torch.arange(100), step, 200) for step in range(10)])
        noise = (noise - noise.mean()) / noise.std()
        for one, other in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise[..., 1:], noise[..., :-1])):
            assert abs((one * other).mean().item()) < 0.01

    def test_it_does_not_depend_on_the_batch_or_the_vocabulary_size(self) -> None:
        whole = gumbel_noise(torch.tensor([5, 6]), 3, 50)
        assert torch.equal(gumbel_noise(torch.tensor([6]), 3, 20)[0], whole[1, :20])


class TestImageMask:
    def test_it_equals_the_slow_loop_with_a_4d_mask(self, engine: TransformersEngine) -> None:
        requests = _requests(4)
        for index, request in enumerate(requests):
            request.image_mask = ImageMask((0.3, 0.5, 0.7, 1.0)[index], 100 + index)
        fast = engine.generate(requests, GREEDY)
        scores = engine.logprobs(requests, [""] * 4)
        for request, completion, score in zip(requests, fast, scores, strict=True):
            assert request.image_mask is not None
            text = families.render(engine.processor, request.messages)
            tokens, logits = greedy(engine.model, engine.processor, text, request.images, request.image_mask, 10, engine.banned)
            assert completion.token_ids == tokens[: len(completion.token_ids)]
            _, closing = families.render_answer(engine.processor, request.messages, "")
            first = engine.tokenizer(closing, add_special_tokens=False).input_ids[0]
            assert logits[0].log_softmax(0)[first].item() == pytest.approx(score[0].item(), abs=2e-5)

    def test_positions_do_not_shift(self, llava: TransformersEngine) -> None:
        """With positions counted over what is visible the numbers would be others."""
        request = Request("a", [user_message("Q", 1)], [picture(1)], image_mask=ImageMask(0.7, 5))
        batch = llava._encode([llava._row(0, request, "Yes.", score=True)], {})
        hidden = int((batch.tensors["attention_mask"] == 0).sum())
        assert hidden == int(hidden_places(batch.tensors["input_ids"][0], ImageMask(0.7, 5), llava.config).sum()) > 0
        length = batch.tensors["input_ids"].shape[1]
        assert batch.tensors["position_ids"].tolist() == [list(range(length))]
        (right,) = llava._score(batch)
        batch.tensors["position_ids"] = (batch.tensors["attention_mask"].cumsum(1) - 1).clamp(min=0)
        (shifted,) = llava._score(batch)
        assert (right - shifted).abs().max() > 1e-3

    def test_share_zero_is_no_mask_to_the_bit(self, engine: TransformersEngine) -> None:
        plain, masked = _requests(4), _requests(4, image_mask=ImageMask(0.0, 9))
        assert engine.generate(plain, Sampling(max_new_tokens=8)) == engine.generate(masked, Sampling(max_new_tokens=8))
        for one, other in zip(engine.logprobs(plain, ["Yes."] * 4), engine.logprobs(masked, ["Yes."] * 4), strict=True):
            assert torch.equal(one, other)

    def test_all_hidden_is_blind_and_finite(self, engine: TransformersEngine) -> None:
        pictures = [picture(1), picture(2), picture(3, (40, 48))]
        blind = [Request("a", [user_message("Q", 1)], [p], image_mask=ImageMask(1.0, 4)) for p in pictures]
        scores = engine.logprobs(blind, ["A red dog."] * 3)
        assert all(values.isfinite().all() for values in scores)
        assert _close(scores[1:], scores[:1] * 2)
        assert len({completion.text for completion in engine.generate(blind, Sampling(max_new_tokens=8))}) == 1
        seeing = engine.logprobs([Request("a", [user_message("Q", 1)], [p]) for p in pictures], ["A red dog."] * 3)
        assert not _close(seeing[1:], seeing[:1] * 2)
        assert not _close(seeing[:1], scores[:1])

    def test_the_seed_of_the_mask_draws_it(self, llava: TransformersEngine) -> None:
        one, same, other = (
            Request(name, [user_message("Q", 2)], [picture(1), picture(2)], image_mask=ImageMask(0.5, seed))
            for name, seed in (("a", 1), ("b", 1), ("a", 2))
        )
        scores = llava.logprobs([one, same, other], ["Yes."] * 3)
        assert torch.equal(scores[0], scores[1])
        assert not torch.allclose(scores[0], scores[2], atol=1e-4)

    def test_a_share_outside_the_unit_interval(self, llava: TransformersEngine) -> None:
        (completion,) = llava.generate(_requests(1, image_mask=ImageMask(1.5, 0)), GREEDY)
        assert completion.error is not None
        assert "the share of image tokens to hide must be in [0, 1], got 1.5" in completion.error


class TestLogprobs:
    def test_they_equal_the_plain_forward_pass(self, engine: TransformersEngine) -> None:
        requests = _requests(5)
        answers = ["A red dog.", "Yes", "There is a large red circle at the top left. No.", "3.5", "Two\nlines"]
        for request, answer, scores in zip(requests, answers, engine.logprobs(requests, answers), strict=True):
            prompt, completion = families.render_answer(engine.processor, request.messages, answer)
            batch = engine.processor(
                text=[prompt + completion], images=[request.images], add_special_tokens=False, return_tensors="pt"
            )
            with torch.no_grad():
                logits = engine.model(**batch).logits[0]
            targets = engine.tokenizer(completion, add_special_tokens=False).input_ids
            assert batch["input_ids"][0, -len(targets) :].tolist() == targets
            by_hand = [
                logits[len(logits) - len(targets) + place - 1].log_softmax(0)[token] for place, token in enumerate(targets)
            ]
            assert scores.dtype == torch.float32
            torch.testing.assert_close(scores, torch.stack(by_hand), atol=2e-5, rtol=0)

    def test_the_tokens_are_those_that_trl_trains_on(self, engine: TransformersEngine) -> None:
        from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

        answers = ["A red dog.", "There is a large red circle at the top left."]
        request = _requests(1)[0]
        row = {
            "images": request.images,
            "prompt": request.messages,
            "chosen": [assistant_message(answers[0])],
            "rejected": [assistant_message(answers[1])],
        }
        batch = DataCollatorForVisionPreference(engine.processor)([row])
        completion_mask = batch.pop("completion_mask").bool()
        with torch.no_grad():
            logits = engine.model(**batch).logits.log_softmax(-1)
        gathered = logits[:, :-1].gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
        theirs = [values[mask] for values, mask in zip(gathered, completion_mask[:, 1:], strict=True)]
        ours = engine.logprobs([request, request], answers)
        assert [len(values) for values in ours] == [len(values) for values in theirs]
        assert _close(ours, theirs)

    def test_they_are_those_of_generation(self, engine: TransformersEngine) -> None:
        """A greedy answer has the highest log-prob at each of its tokens that any token has."""
        request = Request("a", [user_message("Q", 1)], [picture(4)], prefix="There is")
        completion = engine.generate([request], Sampling(max_new_tokens=6, temperature=0))[0]
        tokens = completion.token_ids
        row = engine._row(0, request, "", score=True)
        row.tail = tokens
        batch = engine._encode([row], {})
        (scores,) = engine._score(batch)
        for place in range(len(tokens)):
            for rival in (20, 50, 90, 200):
                if rival in engine.banned or rival == tokens[place]:
                    continue
                row.tail = [*tokens[:place], rival]
                assert engine._score(engine._encode([row], {}))[0][-1] < scores[place]

    def test_the_picture_matters(self, engine: TransformersEngine) -> None:
        messages = [user_message("What is in the image?", 1)]
        blank = picture(1).point(lambda _: 127)
        scores = engine.logprobs([Request("a", messages, [shown]) for shown in (picture(1), picture(2), blank)], ["A red dog."] * 3)
        sums = [values.sum().item() for values in scores]
        assert min(abs(sums[0] - sums[1]), abs(sums[0] - sums[2]), abs(sums[1] - sums[2])) > 1e-3
        two = [user_message("Which?", 2)]
        swapped = engine.logprobs([Request("a", two, [picture(1), picture(2)]), Request("a", two, [picture(2), picture(1)])], ["A"] * 2)
        assert not _close(swapped[:1], swapped[1:])

    def test_a_prefix_is_not_scored(self, llava: TransformersEngine) -> None:
        messages = [user_message("Q", 1)]
        whole = llava.logprobs([Request("a", messages, [picture(1)])], ["There is a red dog."])[0]
        rest = llava.logprobs([Request("a", messages, [picture(1)], prefix="There is a")], [" red dog."])[0]
        torch.testing.assert_close(whole[-len(rest) :], rest, atol=2e-5, rtol=0)
        assert len(rest) < len(whole)

    def test_text_without_pictures(self, llava: TransformersEngine) -> None:
        mixed = [Request("a", [user_message("Q")], []), Request("b", [user_message("Q", 1)], [picture(1)])]
        scores = llava.logprobs(mixed, ["Yes."] * 2)
        assert torch.equal(scores[0], llava.logprobs(mixed[:1], ["Yes."])[0])
        assert not torch.allclose(scores[0], scores[1], atol=1e-4)

    def test_a_request_that_cannot_be_scored_is_nan_alone(self, llava: TransformersEngine) -> None:
        good, bad = _requests(2)
        scores = llava.logprobs([good, bad], ["Yes.", "An <image> of a dog."])
        assert scores[0].isfinite().all()
        assert scores[1].shape == (1,)
        assert scores[1].isnan().all()
        assert "the text holds '<image>'" in (llava.problem(bad, "An <image> of a dog.") or "")
        with pytest.raises(ValueError, match="there are 1 requests for 2 answers"):
            llava.logprobs([good], ["a", "b"])


class TestPrefix:
    def test_prefix_and_text_join(self, engine: TransformersEngine) -> None:
        for prefix in ("There is a", "There is a ", "There is a \n"):
            request = Request("a", [user_message("Q", 1)], [picture(1)], prefix=prefix)
            completion = engine.generate([request], Sampling(max_new_tokens=6, temperature=0))[0]
            # what the model wrote after the open turn that ends without a blank
            ids = engine.tokenizer("There is a", add_special_tokens=False).input_ids
            written = engine.tokenizer.decode(ids + completion.token_ids, skip_special_tokens=True)
            assert written.startswith("There is a")
            if prefix[-1].isspace():
                assert not completion.text[:1].isspace()
                assert "".join((prefix + completion.text).split()) == "".join(written.split())
            else:
                assert prefix + completion.text == written

    def test_the_prefix_is_read(self, engine: TransformersEngine) -> None:
        requests = [Request("a", [user_message("Q", 1)], [picture(1)], prefix=prefix) for prefix in ("", "Yes", "There is a large")]
        last = [values[-1:] for values in engine.logprobs(requests, ["", "", ""])]
        assert not any(_close([one], [other]) for one, other in itertools.combinations(last, 2))
        assert len({completion.text for completion in engine.generate(requests, GREEDY)}) > 1

    def test_an_answer_begins_without_a_blank(self, llava: TransformersEngine) -> None:
        """The open turn ends in `ASSISTANT:`, so the first token is written with the blank before it."""
        request = _requests(1)[0]
        there = llava.tokenizer(" There", add_special_tokens=False).input_ids
        tail = llava.tokenizer("ASSISTANT:", add_special_tokens=False).input_ids
        assert llava.new_text(request, tail, there) == "There"
        request.prefix = "Yes."
        assert llava.new_text(request, llava.tokenizer(" Yes.", add_special_tokens=False).input_ids, there) == " There"


def _say(engine: TransformersEngine, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the model's output layer speak a fixed text: the only way to have a random model end a sentence."""
    ids = [*engine.tokenizer(text, add_special_tokens=False).input_ids, engine.tokenizer.eos_token_id]
    spoken = {"step": 0}

    def forced(module, arguments, output):
        step = min(spoken["step"], len(ids) - 1)
        spoken["step"] += 1
        output = torch.full_like(output, -100.0)
        output[..., ids[step]] = 100.0
        return output

    handle = engine.model.lm_head.register_forward_hook(forced)
    monkeypatch.setattr(engine, "_restore", handle.remove, raising=False)


class TestStopping:
    @pytest.fixture
    def say(self, llava: TransformersEngine, monkeypatch: pytest.MonkeyPatch):
        def generate(text: str, *, prefix: str = "", sentence: bool = True, limit: int = 60, others: int = 0):
            _say(llava, text, monkeypatch)
            try:
                requests = [Request("a", [user_message("Q", 1)], [picture(1)], prefix=prefix, stop_at_sentence=sentence)]
                requests += _requests(others)
                return llava.generate(requests, Sampling(max_new_tokens=limit, temperature=0))[0]
            finally:
                llava._restore()

        return generate

    @pytest.mark.parametrize(
        ("spoken", "prefix", "text", "reason"),
        [
            (" A red dog. It sleeps.", "", "A red dog.", "sentence"),
            (" It is 3.5 m tall. It sleeps.", "", "It is 3.5 m tall.", "sentence"),
            (" Dr. Who is there. It sleeps.", "", "Dr. Who is there.", "sentence"),
            (" Is it red? Yes.", "", "Is it red?", "sentence"),
            (" A red dog.", "", "A red dog.", "stop"),
            (" A red dog", "", "A red dog", "stop"),
            (" dog. It sleeps.", "A cat. A red", " dog.", "sentence"),
            (" dog. It sleeps.", "A cat. A red ", "dog.", "sentence"),
            (" Who is there. It sleeps.", "This is Dr.", " Who is there.", "sentence"),
            (".5 m tall. It sleeps.", "It is 3", ".5 m tall.", "sentence"),
            (" It sleeps. It eats.", "A cat.", " It sleeps.", "sentence"),
        ],
    )
    def test_the_first_sentence_end(self, say, spoken: str, prefix: str, text: str, reason: str) -> None:
        completion = say(spoken, prefix=prefix)
        assert (completion.text, completion.finish_reason) == (text, reason)

    def test_it_stops_the_work_and_cuts_the_tokens(self, say, llava: TransformersEngine) -> None:
        completion = say(" A red dog. It sleeps. It eats. It is a large red circle at the top left.", others=2)
        assert completion.token_ids == llava.tokenizer(" A red dog.", add_special_tokens=False).input_ids

    def test_end_and_length(self, say, llava: TransformersEngine) -> None:
        whole = say(" A red dog. It sleeps.", sentence=False)
        assert (whole.text, whole.finish_reason) == ("A red dog. It sleeps.", "stop")
        assert llava.tokenizer.eos_token_id not in whole.token_ids
        cut = say(" A red dog. It sleeps.", sentence=False, limit=3)
        assert len(cut.token_ids) == 3
        assert cut.finish_reason == "length"

    def test_a_full_context_ends_a_row_alone(self, llava: TransformersEngine) -> None:
        context = llava.context
        long, short = (Request(name, [user_message(text, 1)], [picture(1)]) for name, text in (("a", "dog " * 300), ("b", "Q")))
        length = int(llava._encode([llava._row(0, long, "", score=False)], {}).tensors["attention_mask"].sum())
        try:
            llava.context = length + 4
            out = llava.generate([short, long], Sampling(max_new_tokens=12))
        finally:
            llava.context = context
        assert [len(completion.token_ids) for completion in out] == [12, 4]
        assert out[1].finish_reason == "length"


class TestFailures:
    def test_one_bad_request_fails_alone(self, llava: TransformersEngine) -> None:
        good = _requests(3)
        bad = [
            Request("no-picture", [user_message("Q", 2)], [picture(1)]),
            Request("image-text", [user_message("What does <image> mean?", 1)], [picture(1)]),
            Request("image-prefix", [user_message("Q", 1)], [picture(1)], prefix="An <image>"),
            Request("too-long", [user_message("dog " * 2000, 1)], [picture(1)]),
            Request("empty", [user_message("Q", 1)], [Image.new("RGB", (0, 5))]),
        ]
        mixed = [bad[0], good[0], bad[1], bad[2], good[1], bad[3], bad[4], good[2]]
        out = {completion.id: completion for completion in llava.generate(mixed, GREEDY)}
        assert [out[request.id] for request in good] == llava.generate(good, GREEDY)
        errors = {request.id: out[request.id].error or "" for request in bad}
        assert {out[request.id].finish_reason for request in bad} == {"error"}
        assert "has 2 image placeholder(s) for 1 picture(s)" in errors["no-picture"]
        assert "the text holds '<image>', which the model reads as a place for a picture" in errors["image-text"]
        assert "the text holds '<image>'" in errors["image-prefix"]
        assert "the model has 1024 positions" in errors["too-long"]
        assert "the processor refused the prompt or its picture" in errors["empty"]

    def test_nothing_asked(self, llava: TransformersEngine) -> None:
        assert llava.generate([], GREEDY) == []
        assert llava.logprobs([], []) == []

    def test_a_failure_of_the_whole_batch_is_raised(self, llava: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = TransformersEngine(llava.model, llava.processor, batch_size=4)
        real = engine._process

        def only_one(rows):
            if len(rows) > 1:
                raise RuntimeError("batches are broken")
            return real(rows)

        monkeypatch.setattr(engine, "_process", only_one)
        with pytest.raises(RuntimeError, match="batches are broken"):
            engine.generate(_requests(3), GREEDY)


def test_load_engine_knows_its_weights(tiny_llava: Path) -> None:
    engine = load_engine(ModelConfig(str(tiny_llava)), batch_size=2)
    assert engine.fingerprint == fingerprint(engine.model)
    assert engine.capabilities == {"sample", "logprobs", "prefix", "image_mask"}


def test_an_adapter_is_used(tiny_llava: Path, llava: TransformersEngine) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = load_engine(ModelConfig(str(tiny_llava))).model
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    engine = TransformersEngine(get_peft_model(base, lora), llava.processor)
    requests = _requests(3)
    plain = llava.logprobs(requests, ["A red dog."] * 3)
    assert not _close(engine.logprobs(requests, ["A red dog."] * 3), plain)
    assert engine.generate(requests, GREEDY) != llava.generate(requests, GREEDY)
    with engine.model.disable_adapter():
        assert _close(engine.logprobs(requests, ["A red dog."] * 3), plain)


def test_paligemma_which_sees_its_prompt_both_ways(tmp_path: Path) -> None:
    """Its processor ends the prompt with a newline, so a prefix follows as tokens; the prompt is not causal, the answer is."""
    engine = load_engine(ModelConfig(str(save_tiny("paligemma", tmp_path))), batch_size=4)
    requests = _requests(3)
    answers = ["A red dog.", "Yes", "There is a large red circle."]
    scores = engine.logprobs(requests, answers)
    for request, answer, values in zip(requests, answers, scores, strict=True):
        prompt = families.render(engine.processor, request.messages)
        batch = engine.processor(text=[prompt], images=[request.images], suffix=[answer], return_tensors="pt")
        targets = engine.tokenizer(answer + "<eos>", add_special_tokens=False).input_ids
        assert batch["input_ids"][0, -len(targets) :].tolist() == targets
        with torch.no_grad():
            logits = engine.model(**{name: value for name, value in batch.items() if name != "labels"}).logits[0]
        by_hand = logits[-len(targets) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(targets)[:, None]).squeeze(1)
        torch.testing.assert_close(values, by_hand, atol=2e-5, rtol=0)
    assert not torch.allclose(*engine.logprobs([requests[0], Request("b", requests[0].messages, [picture(77)])], ["A"] * 2))
    requests[1].prefix = "Yes, "
    together = engine.generate(requests, Sampling(max_new_tokens=6))
    assert [engine.generate([request], Sampling(max_new_tokens=6))[0] for request in requests] == together
    for completion in engine.generate([Request("a", [user_message("Q")], [])], GREEDY):
        assert "`images` are expected as arguments" in (completion.error or "")
