"""The transformers engine: what it draws does not depend on the batch, what it hides is hidden, what it scores is TRL's."""

import itertools
from pathlib import Path

import pytest
import torch
from engine_cases import GREEDY, close, some_requests
from masked_reference import greedy
from PIL import Image
from scipy.stats import chisquare
from tiny_vlms import picture, save_tiny

from prefalign import families
from prefalign.engines import ImageMask, Request, Sampling
from prefalign.engines.sampling import RepetitionPenalty, gumbel_noise
from prefalign.engines.transformers import TransformersEngine, load_engine
from prefalign.models import ModelConfig, fingerprint
from prefalign.processors import processor_fingerprint
from prefalign.records import user_message


@pytest.fixture(scope="module", params=["llava", "idefics3", "gemma3"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    folder = save_tiny(request.param, tmp_path_factory.mktemp("engine") / request.param)
    return load_engine(ModelConfig(str(folder)), batch_size=8)


@pytest.fixture(scope="module")
def llava(tiny_llava: Path) -> TransformersEngine:
    return load_engine(ModelConfig(str(tiny_llava)), batch_size=8)


class TestSampling:
    SAMPLINGS = (
        Sampling(max_new_tokens=12),
        Sampling(max_new_tokens=12, temperature=0.7, top_p=0.9, top_k=50, repetition_penalty=1.2),
        GREEDY,
    )

    @pytest.mark.parametrize("sampling", SAMPLINGS)
    def test_neither_batch_nor_order_changes_what_is_drawn(
        self, engine: TransformersEngine, sampling: Sampling
    ) -> None:
        requests = some_requests(8)
        together = engine.generate(requests, sampling)
        assert [completion.id for completion in together] == [request.id for request in requests]
        alone = [engine.generate([request], sampling)[0] for request in requests]
        assert alone == together
        shuffled = [requests[index] for index in (5, 2, 7, 0, 1, 6, 3, 4)]
        assert {one.id: one for one in engine.generate(shuffled, sampling)} == {one.id: one for one in together}

    def test_seed_and_id_decide(self, llava: TransformersEngine) -> None:
        one, again, other_seed, other_id = (
            Request(name, [user_message("Q", 1)], [picture(0)], seed=seed)
            for name, seed in (("a", 1), ("a", 1), ("a", 2), ("b", 1))
        )
        tokens = [
            tuple(c.token_ids) for c in llava.generate([one, again, other_seed, other_id], Sampling(max_new_tokens=8))
        ]
        assert tokens[0] == tokens[1]
        assert len(set(tokens)) == 3

    def test_temperature_zero_is_the_argmax(self, llava: TransformersEngine) -> None:
        (request,) = some_requests(1)
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
        answers = engine.generate(requests, Sampling(max_new_tokens=1, temperature=0.25))
        drawn = torch.tensor([answer.token_ids[0] if answer.token_ids else answer.end_token for answer in answers])
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
            out = llava.generate(some_requests(6), Sampling(max_new_tokens=20, temperature=3.0))
        finally:
            llava.model.lm_head.weight.data.copy_(saved)
        assert not {token for completion in out for token in completion.token_ids} & set(llava.banned)

    def test_the_checkpoints_own_sampling_is_not_used(self, llava: TransformersEngine) -> None:
        before = llava.generate(some_requests(3), GREEDY)
        config = llava.model.generation_config
        config.temperature, config.do_sample, config.repetition_penalty = 9.0, True, 5.0
        config.suppress_tokens = [completion.token_ids[0] for completion in before]
        try:
            assert llava.generate(some_requests(3), GREEDY) == before
            assert llava.model.generation_config is config
        finally:
            config.temperature = config.do_sample = config.repetition_penalty = config.suppress_tokens = None

    def test_the_model_is_left_as_it_was(self, llava: TransformersEngine) -> None:
        llava.model.train()
        try:
            llava.generate(some_requests(1), GREEDY)
            assert llava.model.training
            llava.logprobs(some_requests(1), ["Yes."])
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
            llava.generate(some_requests(1), sampling)

    def test_a_repetition_penalty_does_not_count_padding(self) -> None:
        """Token 0 pads; the second row has said it, too."""
        ids, mask = torch.tensor([[0, 0, 3, 4], [2, 0, 3, 3]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
        found = RepetitionPenalty(2, mask)(ids, torch.tensor([[4.0, 4.0, 4.0, 4.0, -4.0]]).repeat(2, 1))
        assert found.tolist() == [[4, 4, 4, 2, -8], [2, 4, 2, 2, -4]]

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
        requests = [
            Request("a", [user_message("Q", 1)], [picture(1)], prefix=prefix)
            for prefix in ("", "Yes", "There is a large")
        ]
        last = [values[-1:] for values in engine.logprobs(requests, ["", "", ""])]
        assert not any(close([one], [other]) for one, other in itertools.combinations(last, 2))
        assert len({completion.text for completion in engine.generate(requests, GREEDY)}) > 1

    def test_an_answer_begins_without_a_blank(self, llava: TransformersEngine) -> None:
        """The open turn ends in `ASSISTANT:`, so the first token is written with the blank before it."""
        request = some_requests(1)[0]
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
                requests = [
                    Request("a", [user_message("Q", 1)], [picture(1)], prefix=prefix, stop_at_sentence=sentence)
                ]
                requests += some_requests(others)
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
        long, short = (
            Request(name, [user_message(text, 1)], [picture(1)]) for name, text in (("a", "dog " * 300), ("b", "Q"))
        )
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
        good = some_requests(3)
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

    def test_a_failure_of_the_whole_batch_is_raised(
        self, llava: TransformersEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = TransformersEngine(llava.model, llava.processor, batch_size=4)
        real = engine._process

        def only_one(rows):
            if len(rows) > 1:
                raise RuntimeError("batches are broken")
            return real(rows)

        monkeypatch.setattr(engine, "_process", only_one)
        with pytest.raises(RuntimeError, match="batches are broken"):
            engine.generate(some_requests(3), GREEDY)


def test_load_engine_knows_its_weights_and_processor(tiny_llava: Path) -> None:
    engine = load_engine(ModelConfig(str(tiny_llava)), batch_size=2)
    assert engine.fingerprint == f"{fingerprint(engine.model)}-{processor_fingerprint(engine.processor)}"
    assert engine.capabilities == {
        "sample",
        "logprobs",
        "prefix",
        "image_mask",
        "contrast",
        "attention",
        "vision_embed",
        "first_token",
    }
