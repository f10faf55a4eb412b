"""`PPOTrainer`: PPO for vision-language models inside transformers' `Trainer`, which keeps checkpoints, schedule and processes.

One rollout is visited by all the forward and backward passes of its iteration; it is drawn at the first visit, as TRL's GRPO
trainer does. Each visit makes two backward passes, policy and value, one after the other: gradient checkpointing runs the forward
pass again with the adapter that is active then. `docs/ppo.md` has the algorithm and where it departs from released code.

Legend of shapes: `B` answers of this process in an iteration, `T` tokens of the longest.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers.trainer_utils import get_last_checkpoint, set_seed

from prefalign import families
from prefalign.config import ConfigError
from prefalign.engines import Sampling
from prefalign.engines.transformers import TransformersEngine
from prefalign.manifest import write_atomically
from prefalign.online import advantages as maths
from prefalign.online.conversations import linked, spread_turns, turn_rewards
from prefalign.online.monitoring import Alarms, Tally, correlation, distinct
from prefalign.online.roles import Roles
from prefalign.online.rollout import VIEW, Rollout, draw, encode_once
from prefalign.online.sampler import RolloutBatches
from prefalign.rewards.judged import JudgedAttributes
from prefalign.rewards.learned import LearnedReward
from prefalign.training.collator import PreferenceCollator
from prefalign.training.documents import Reader, decode
from prefalign.training.routes import find_route
from prefalign.training.upkeep import Upkeep

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedModel, ProcessorMixin

    from prefalign.online.arguments import PPOConfig
    from prefalign.rewards import Combined

STATE_FILE = "ppo_state.json"
"""Reward scale, KL coefficient and alarms, beside every saved model."""

PROBED = (LearnedReward, JudgedAttributes)
"""Rewards that are meant to look at the picture; the others judge by the facts."""

ROLLOUTS = "rollouts"
"""Folder of the answers that were drawn, a file for each iteration and process."""


class PPOTrainer(Upkeep):
    """Train a vision-language model on a reward of its own answers.

    Args:
        model: policy; a full model or a `PeftModel` whose adapter trains. May be built in memory.
        args: settings.
        train_dataset: prompts as `prompts.load_prompts` gives them.
        processing_class: the model's processor, saved with every checkpoint.
        rewards: what answers are worth, as `rewards.read_rewards` gives it.
        watch: rewards that are logged as `watch/...` and never trained on: an alarm goes off when they fall while the reward rises.
        peft_config: wrap `model` in a new adapter.
        reward_adapter: name of a reward model's adapter on `model`; the value adapter starts as a copy of it.
        value_model: where all weights train, what the value starts from; by default a copy of the policy.
        files: text files by name, written beside every saved model.
        fast_path: `auto` shares prompts and pictures where the family allows it exactly; `off` repeats them.

    Raises:
        ConfigError: settings that contradict each other, too few rows for one rollout, or weights that are shared out.
    """

    args: PPOConfig

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        args: PPOConfig,
        train_dataset: Dataset,
        processing_class: ProcessorMixin,
        rewards: Combined,
        watch: Combined | None = None,
        peft_config: PeftConfig | None = None,
        reward_adapter: str | None = None,
        value_model: PreTrainedModel | None = None,
        files: Mapping[str, str] | None = None,
        fast_path: Literal["auto", "off"] = "auto",
    ):
        args.check()
        _check_processes(args)
        set_seed(args.seed)  # the start of the adapters
        self.rewards = rewards
        self.watch = watch
        self.route = find_route(model, fast_path)
        config = families.core(model).config
        self.collator = PreferenceCollator(
            processing_class,
            [VIEW],
            layout=self.route.layout,
            image_token_id=families.image_token_ids(config)[0],
        )
        self.reader = Reader(processing_class, [VIEW], families.missing_end(processing_class))
        roles = Roles(
            model,
            layout=self.route.layout,
            temperature=args.temperature,
            peft_config=peft_config,
            reward_adapter=reward_adapter,
            value_model=value_model,
        )
        super().__init__(
            model=roles,
            args=args,
            data_collator=_numbers,
            train_dataset=train_dataset,
            processing_class=processing_class,
            files=files,
        )
        self.roles = roles
        trains = {families.tower(name) for name, p in roles.policy.named_parameters() if p.requires_grad}
        self.keeps_features = self.route.layout != "plain" and trains <= {"language_model"}
        prompts = args.answers_per_iteration // args.num_generations
        needed = prompts * args.world_size
        if len(train_dataset) < needed:
            raise ConfigError(
                f"a rollout asks {needed} prompts (num_mini_batches x gradient_accumulation_steps x per_device_train_batch_size / "
                f"num_generations in {args.world_size} process(es)) and there are {len(train_dataset)}. Give more prompts or lower one "
                "of these."
            )
        self.engine = TransformersEngine(
            roles.policy, processing_class, batch_size=args.rollout_batch_size or args.per_device_train_batch_size
        )
        self.sampling = Sampling(max_new_tokens=args.max_new_tokens, temperature=args.temperature)
        self.alarms = Alarms(exact=families.core(model).dtype == torch.float32 and not (args.bf16 or args.fp16))
        self.reward_scale: tuple[float, float] | None = None
        self.kl = maths.AdaptiveKL(args.kl_coef, args.kl_target or 1.0, args.kl_horizon)
        self.rollout: Rollout | None = None
        self._at = 0
        self._stopped = False
        self._schedule: list[list[int]] = []
        self._tokens: list[float] = []
        self._logged: dict[str, list[float]] = defaultdict(list)
        self._update = self._tally()

    # ---------------------------------------------------------------- data

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Numbers of rows; rows themselves are read once per rollout."""
        args = self.args
        sampler = RolloutBatches(
            len(self.train_dataset),
            prompts=args.answers_per_iteration // args.num_generations,
            visits=args.visits_per_iteration,
            seed=args.seed,
            process=args.process_index,
            processes=args.world_size,
        )
        return DataLoader(range(len(self.train_dataset)), batch_sampler=sampler, collate_fn=_numbers)  # type: ignore[arg-type]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One optimizer over the parameters of policy and value, which have a learning rate each."""
        if self.optimizer is None:
            args = self.args
            decay = set(self.get_decay_parameter_names(self.roles))
            rates = {"policy": args.learning_rate, "value": args.value_learning_rate or args.learning_rate}
            groups = [
                {"params": [p for name, p in self.roles.parameters_of(role) if (name in decay) == decays],
                 "weight_decay": args.weight_decay if decays else 0.0, "lr": rates[role]}
                for role in ("policy", "value") for decays in (True, False)
            ]  # fmt: skip
            kind, settings = self.get_optimizer_cls_and_kwargs(args, self.roles)
            self.optimizer = kind([group for group in groups if group["params"]], **settings)
        return self.optimizer

    # ---------------------------------------------------------------- one visit

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One visit to the rollout, drawn if it is the first: forward and backward pass of the policy, then of the value.

        Args:
            model: the roles, as they are wrapped for several processes.
            inputs: `rows`, numbers of the rows that this process asks.
            num_items_in_batch: not used; losses are sums over tokens of the whole minibatch.
        """
        args = self.args
        if self._at == 0:
            self._begin(inputs["rows"].tolist())
        assert self.rollout is not None
        at, self._at = self._at, (self._at + 1) % args.visits_per_iteration
        update, micro = divmod(at, args.gradient_accumulation_steps)
        loss = torch.zeros((), device=args.device)
        if not self._stopped:
            model.train()
            numbers = self._schedule[at]
            share = args.world_size / max(1.0, self._tokens[update])
            batch = self._prepared(numbers)
            if self.rollout.iteration >= args.value_warmup_iterations:
                with self._first_of_two(model):
                    policy = self._policy_loss(model, batch, numbers, first=at == 0) * share
                    self._backward(policy)
                loss = loss + policy.detach()
            value = self._value_loss(model, batch, numbers) * args.vf_coef * share
            self._backward(value)
            loss = loss + value.detach()
            if micro == args.gradient_accumulation_steps - 1:
                self._end_update()
        if self._at == 0:
            self.rollout = None
        return loss

    def _policy_loss(self, model: Any, batch: dict[str, Any], numbers: Sequence[int], *, first: bool) -> torch.Tensor:
        kept = self.rollout
        assert kept is not None
        mask, old = kept.mask[numbers], kept.logps[numbers]
        output = model("policy", batch)
        logps = kept.spread(output["log_probs"], batch, mask.shape[1])
        entropy = kept.spread(output["entropy"].detach(), batch, mask.shape[1])
        loss, sums = maths.policy_loss(logps, old, kept.advantages[numbers], mask, cliprange=self.args.cliprange)
        tokens = sums.pop("tokens")
        names = {"approxkl": "policy/approxkl_avg", "clipfrac": "policy/clipfrac_avg", "ratio": "val/ratio"}
        for name, total in sums.items():
            self._update.add(names[name], total, tokens)
        self._update.add("policy/entropy_avg", maths.masked_sum(entropy, mask), tokens)
        self._update.add("loss/policy_avg", loss, tokens)
        if first:
            furthest = ((logps.detach() - old).exp() - 1).masked_fill(~mask, 0.0).abs().max()
            self._note(self.alarms.first_ratio(float(self.accelerator.gather(furthest[None]).max())))
        return loss

    def _value_loss(self, model: Any, batch: dict[str, Any], numbers: Sequence[int]) -> torch.Tensor:
        kept = self.rollout
        assert kept is not None
        mask = kept.mask[numbers]
        values = kept.spread(model("value", batch)["values"], batch, mask.shape[1])
        loss, clipped = maths.value_loss(
            values, kept.values[numbers], kept.returns[numbers], mask, cliprange=self.args.cliprange_value
        )
        self._update.add("loss/value_avg", loss, mask.sum())
        self._update.add("val/clipfrac_avg", clipped, mask.sum())
        return loss

    def _backward(self, loss: torch.Tensor) -> None:
        settings = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(loss, **settings)

    @contextmanager
    def _first_of_two(self, model: Any) -> Iterator[None]:
        """A backward pass that another one follows before gradients are exchanged."""
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(before)

    def _end_update(self) -> None:
        means = self._update.means()
        if "policy/clipfrac_avg" in means:
            means |= self.alarms.update(means)
            target = self.args.target_kl
            if target is not None and means["policy/approxkl_avg"] > 1.5 * target:
                self._stopped = True
                means["policy/stopped_early"] = 1.0
        self._note(means)

    def _prepared(self, numbers: Sequence[int]) -> dict[str, Any]:
        assert self.rollout is not None
        batch = self.rollout.batch(numbers, self.collator)
        return self.rollout.with_features(self._prepare_inputs(batch))

    # ---------------------------------------------------------------- a rollout

    def _begin(self, numbers: Sequence[int]) -> None:
        """Draw, score and run through the models; plan the visits."""
        args = self.args
        iteration = self.state.global_step // args.updates_per_iteration
        self._stopped = False
        rows = [self.train_dataset[number] for number in numbers]
        self.roles.eval()
        with self.roles.as_policy():
            rollout = draw(rows, engine=self.engine, reader=self.reader, sampling=self.sampling, iteration=iteration,
                           seed=args.seed, generations=args.num_generations, plan=self._conversation())  # fmt: skip
        self.rollout = rollout
        self.saw_pictures = self.saw_pictures or any(document.vision for document in rollout.documents.documents)
        rollout.scores = dict(self.rewards.score([answer.response for answer in rollout.answers]))
        metrics = self._reward_metrics(rollout)
        self.roles.activate("policy")
        if self.keeps_features:
            encode_once(rollout, self.roles.policy, self.collator, device=args.device,
                        most=args.per_device_train_batch_size)  # fmt: skip
        self._run_through(rollout)
        metrics |= self._estimate(rollout)
        self._plan(rollout, random=iteration)
        metrics |= self.alarms.rollout(metrics, iteration)
        self._note(metrics)
        if args.log_rollouts:
            self._write(rollout)

    def _conversation(self) -> Any:
        args = self.args
        return partial(linked, permute=args.permute_questions, seed=args.seed) if args.conversations else None

    @torch.no_grad()
    def _run_through(self, rollout: Rollout) -> None:
        """Log-probs of policy and reference, and values, of all answers."""
        drawn = rollout.drawn().to(self.args.device)
        width = drawn.shape[1]
        kept: dict[str, list[torch.Tensor]] = defaultdict(list)
        size = self.args.per_device_train_batch_size
        batches = [list(range(start, min(start + size, len(drawn)))) for start in range(0, len(drawn), size)]
        # adapter by adapter, as switching walks the whole model
        for role, names in (
            ("policy", {"log_probs": "logps", "entropy": "entropy"}),
            ("reference", {"log_probs": "ref_logps"}),
            ("value", {"values": "values"}),
        ):
            for numbers in batches:
                batch = self._prepared(numbers)
                output = self.roles(role, batch)
                for name, target in names.items():
                    kept[target].append(rollout.spread(output[name].float(), batch, width))
        for name, parts in kept.items():
            setattr(rollout, name, torch.cat(parts))
        scored = ~rollout.scores["total"].isnan() & torch.tensor([answer.failed is None for answer in rollout.answers])
        rollout.mask = drawn & scored.to(drawn.device)[:, None]

    def _estimate(self, rollout: Rollout) -> dict[str, float]:
        """Rewards per token, advantages and returns."""
        args, mask, tally = self.args, rollout.mask, self._tally()
        answered = mask.any(dim=1)
        k1, k3 = maths.kl_terms(rollout.logps, rollout.ref_logps)
        scores = self._scores(rollout)
        placed = self._by_turn(rollout, scores) if args.conversations and args.turn_rewards else scores
        scores = scores.to(mask.device)
        rewards = maths.place_rewards(placed.to(mask.device), k1, mask, kl_coef=self.kl.coef)
        if args.whiten_rewards:
            rewards = maths.whiten(rewards, mask, shift_mean=False, total=self._sum)
        estimates, rollout.returns = maths.gae(rewards, rollout.values, mask, gamma=args.gamma, lam=args.lam)
        rollout.advantages = maths.whiten(estimates, mask, total=self._sum)

        def per_answer(values: torch.Tensor) -> torch.Tensor:
            return values.masked_fill(~mask, 0.0).sum(dim=1)[answered]

        tally.add("objective/kl", per_answer(k1))
        tally.add("objective/kl_k3", per_answer(k3))
        tally.add("objective/entropy", per_answer(rollout.entropy))
        tally.add("objective/entropy_per_token", rollout.entropy[mask])
        tally.add("objective/non_score_reward", per_answer(-self.kl.coef * k1))
        tally.add("objective/scores", rollout.scores["total"].to(mask.device)[answered])
        tally.add("objective/scores_shaped", scores[answered])
        tally.add("objective/rlhf_reward", per_answer(-self.kl.coef * k1) + scores[answered])
        tally.add("objective/missing", (~answered).float())
        tally.add("objective/length", rollout.drawn().sum(dim=1)[answered.cpu()].float())
        finished = torch.tensor([answer.response.finished for answer in rollout.answers])
        tally.add("objective/eos_rate", finished.float())
        tally.add("val/mean", rollout.values[mask])
        tally.add("returns/mean", rollout.returns[mask])
        tally.add("returns/var", (rollout.returns[mask] - rollout.returns[mask].mean()) ** 2)
        tally.add("val/error", (rollout.values[mask] - rollout.returns[mask]) ** 2)
        tally.add("val/explained_variance", _one(maths.explained_variance(rollout.values, rollout.returns, mask)))
        texts = [answer.tokens[answer.drawn].tolist() for answer in rollout.answers]
        tally.add("objective/distinct_1", _one(distinct(texts, 1)))
        tally.add("objective/distinct_2", _one(distinct(texts, 2)))
        lengths = rollout.drawn().sum(dim=1).float()
        tally.add("objective/score_length_correlation", _one(correlation(rollout.scores["total"], lengths)))
        metrics = tally.means()
        metrics["objective/kl_coef"] = self.kl.coef
        if args.kl_target is not None:
            self.kl.update(metrics["objective/kl"], args.answers_per_iteration * args.world_size)
        seen = (rollout.iteration + 1) * args.answers_per_iteration * args.world_size
        return metrics | {"episode": float(seen)}

    def _scores(self, rollout: Rollout) -> torch.Tensor:
        """(B,) what the answers are worth: total reward, normalised and clipped, and what an unfinished answer loses."""
        args = self.args
        scores = rollout.scores["total"].clone()
        if args.normalise_rewards:
            if self.reward_scale is None:
                self.reward_scale = self._measure(scores)
            mean, deviation = self.reward_scale
            scores = (scores - mean) / deviation
        if args.reward_clip is not None:
            scores = scores.clamp(-args.reward_clip, args.reward_clip)
        unfinished = torch.tensor([not answer.response.finished for answer in rollout.answers])
        if args.missing_eos_score is not None:
            scores = torch.where(unfinished & ~scores.isnan(), torch.full_like(scores, args.missing_eos_score), scores)
        elif args.missing_eos_penalty:
            scores = scores - args.missing_eos_penalty * unfinished
        return scores

    def _by_turn(self, rollout: Rollout, scores: torch.Tensor) -> torch.Tensor:
        """(B, T) the same scores, what a turn earns by itself at its own end."""
        earned = turn_rewards(self.rewards, [answer.response for answer in rollout.answers])
        deviation = self.reward_scale[1] if self.reward_scale is not None and self.args.normalise_rewards else 1.0
        rows = [
            spread_turns(one / deviation, score, answer.turn, answer.drawn)
            for one, score, answer in zip(earned, scores.tolist(), rollout.answers, strict=True)
        ]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def _measure(self, scores: torch.Tensor) -> tuple[float, float]:
        """Mean and deviation of the scores of the first rollout, whose policy is the reference, over all processes."""
        known = scores[~scores.isnan()].double().to(self.args.device)
        count, first = self._sum(torch.stack([_one(len(known), known.device), known.sum()])).tolist()
        if count < 2:
            raise ValueError(
                f"{int(count)} of the first rollout's answers got a score, and their mean and deviation are what later scores are "
                "measured by. Look at why the rewards are missing (the rollouts' JSON lines show the terms), or set "
                "normalise_rewards to false."
            )
        mean = first / count
        deviation = math.sqrt(float(self._sum(((known - mean) ** 2).sum()[None])) / count)
        if deviation < 1e-6:
            self.alarms._raise(
                "constant_reward",
                True,
                f"all {int(count)} answers of the first rollout got the same score ({mean:.4g}): there is nothing to learn yet, and "
                "scores are not divided by their deviation. Draw more answers, or look at the reward.",
            )
            deviation = 1.0
        return mean, deviation

    def _reward_metrics(self, rollout: Rollout) -> dict[str, float]:
        """Every term of the rewards and of what is watched, and the probe with blank pictures."""
        tally = self._tally()
        responses = [answer.response for answer in rollout.answers]
        watched = dict(self.watch.score(responses)) if self.watch is not None else {}
        watched.pop("total", None)
        for prefix, terms in (("rewards", rollout.scores), ("watch", watched)):
            for name, values in terms.items():
                if name != "total":
                    tally.add(f"{prefix}/{name}", values)
                    tally.add(f"{prefix}/{name}/std", _one(float(values[~values.isnan()].std(correction=0))))
        rollout.scores |= {f"watch/{name}": values for name, values in watched.items()}
        some = [number for number, response in enumerate(responses) if response.images][: self.args.blank_picture_probe]
        blanked = [replace(responses[number], images=_blank(responses[number].images)) for number in some]
        for entry in self.rewards.entries:
            if some and isinstance(entry.reward, PROBED):
                terms = entry.reward.score(blanked)
                gaps = [rollout.scores[f"{entry.name}/{term}"][some] - values.cpu() for term, values in terms.items()]
                tally.add(f"probe/{entry.name}/blank_picture_gap", torch.stack(gaps).abs().amax(dim=0))
                tally.add(f"probe/{entry.name}/blank_picture_drop", torch.stack(gaps).mean(dim=0))
        return tally.means()

    def _plan(self, rollout: Rollout, *, random: int) -> None:
        """Which answers each visit of the iteration takes: in each pass all prompts in a new order, answers of one together."""
        args = self.args
        generator = torch.Generator().manual_seed((args.seed * 1_000_003 + random) * 1_000_003 + args.process_index)
        together = args.num_generations
        prompts = len(rollout.answers) // together
        each = args.per_device_train_batch_size // together
        self._schedule = []
        for _ in range(args.num_ppo_epochs):
            order = torch.randperm(prompts, generator=generator).tolist()
            for start in range(0, prompts, each):
                some = order[start : start + each]
                self._schedule.append([together * prompt + number for prompt in some for number in range(together)])
        counts = [int(rollout.mask[numbers].sum()) for numbers in self._schedule]
        per_update = torch.tensor(counts, device=args.device).view(-1, args.gradient_accumulation_steps).sum(dim=1)
        self._tokens = self._sum(per_update.double()).tolist()

    def _write(self, rollout: Rollout) -> None:
        folder = Path(str(self.args.output_dir)) / ROLLOUTS
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{line}\n" for line in rollout.lines())
        write_atomically(folder / f"{rollout.iteration:06d}-{self.args.process_index}.jsonl", text.encode())

    # ---------------------------------------------------------------- logs and checkpoints

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values.to(self.args.device), "sum")

    def _tally(self) -> Tally:
        return Tally(self._sum, self.args.device)

    def _note(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._logged[name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as transformers does, with the means of all metrics since the last log."""
        if "loss" in logs:
            known = {
                name: [value for value in values if not math.isnan(value)] for name, values in self._logged.items()
            }
            logs |= {name: sum(values) / len(values) for name, values in known.items() if values}
            self._logged.clear()
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train as transformers does; the reward's scale, the KL coefficient and the alarms go on with the checkpoint's."""
        folder = (
            get_last_checkpoint(str(self.args.output_dir)) if resume_from_checkpoint is True else resume_from_checkpoint
        )
        if folder:
            self._load_state(json.loads((Path(str(folder)) / STATE_FILE).read_text(encoding="utf-8")))
        self._at = 0
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _state(self) -> dict[str, Any]:
        return {"reward_scale": self.reward_scale, "kl_coef": self.kl.coef, "alarms": asdict(self.alarms)}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self.reward_scale = tuple(state["reward_scale"]) if state["reward_scale"] else None  # type: ignore[assignment]
        self.kl.coef = state["kl_coef"]
        self.alarms = Alarms(**state["alarms"])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.roles.load(Path(resume_from_checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.roles.save(folder)
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")
        files = {**self.files, STATE_FILE: json.dumps(self._state(), indent=2)}
        for name, text in files.items():
            write_atomically(folder / name, text.encode())


def _numbers(rows: Sequence[int]) -> dict[str, torch.Tensor]:
    return {"rows": torch.tensor(list(rows))}


def _one(value: float, device: Any = None) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


def _blank(images: Sequence[Any]) -> list[Image.Image]:
    """Grey pictures of the same sizes."""
    return [Image.new("RGB", decode(image).size, (127, 127, 127)) for image in images]


def _check_processes(args: PPOConfig) -> None:
    stage = getattr(args.deepspeed_plugin, "zero_stage", 0) if args.deepspeed_plugin is not None else 0
    if stage == 3 or args.fsdp_plugin_args:
        raise ConfigError(
            "PPO runs on DDP and DeepSpeed ZeRO-1 and ZeRO-2: ZeRO-3 and FSDP share out the weights, which generation and the "
            "reference would gather for every token. Train an adapter, with ZeRO-2 or without."
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"one process sees {args.n_gpu} GPUs, and transformers would copy the model to all of them in every pass. Start the recipe "
            "with torchrun or `accelerate launch`, or make one GPU visible (CUDA_VISIBLE_DEVICES=0)."
        )
