"""`PPOTrainer`: PPO for vision-language models inside transformers' `Trainer`, which keeps checkpoints, schedule and processes.

One rollout is visited by all the forward and backward passes of its iteration; it is drawn at the first visit, as TRL's GRPO
trainer does. Each visit makes two backward passes, policy and value, one after the other: gradient checkpointing runs the forward
pass again with the adapter that is active then. `docs/ppo.md` has the algorithm and where it departs from released code.

Legend of shapes: `B` answers of this process in an iteration, `T` tokens of the longest.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.data import DataLoader
from transformers.trainer_utils import get_last_checkpoint, set_seed

from prefalign import families
from prefalign.config import ConfigError
from prefalign.engines import Sampling
from prefalign.manifest import write_atomically
from prefalign.online import advantages as maths
from prefalign.online.conversations import linked
from prefalign.online.estimates import describe, estimate
from prefalign.online.monitoring import Alarms, Tally
from prefalign.online.prepared import PreparedEngine
from prefalign.online.reward_adapters import encodes_alike
from prefalign.online.roles import Roles, first_of_two
from prefalign.online.rollout import VIEW, Rollout, draw
from prefalign.online.sampler import RolloutBatches, visits
from prefalign.online.scores import Scorer
from prefalign.training.collator import PreferenceCollator
from prefalign.training.documents import Reader
from prefalign.training.routes import find_route
from prefalign.training.upkeep import Upkeep, check_finite

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedModel, ProcessorMixin

    from prefalign.online.arguments import PPOConfig
    from prefalign.rewards import Combined

STATE_FILE = "ppo_state.json"
"""Reward scale, KL coefficient and alarms, beside every saved model."""

ROLLOUTS = "rollouts"
"""Folder of the answers that were drawn, a file for each iteration and process."""


class PPOTrainer(Upkeep):
    """Train a vision-language model on a reward of its own answers.

    Args:
        model: policy; a full model or a `PeftModel` whose adapter trains. May be built in memory.
        args: settings.
        train_dataset: prompts as `prompt_rows.load_prompts` gives them.
        processing_class: the model's processor, saved with every checkpoint.
        rewards: what answers are worth, as `rewards.read_rewards` gives it.
        watch: rewards that are logged as `watch/...` and never learned: an alarm goes off when they fall while the reward rises.
        peft_config: wrap `model` in a new adapter.
        reward_adapter: name of a reward model's adapter on `model`; the value adapter starts as a copy of it.
        value_model: where all weights train, what the value starts from; by default a copy of the policy.
        files: text files by name, written beside every saved model.
        fast_path: `auto` shares prompts and pictures where the family allows it exactly; `off` repeats them.

    Raises:
        ConfigError: settings that contradict each other, too few rows for one rollout, or weights that are shared out.
    """

    args: PPOConfig
    optimizer: Any

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
        set_seed(args.seed)  # the start of the adapters
        self.route = find_route(model, fast_path)
        image_token = families.image_token_ids(families.core(model).config)[0]
        self.collator = PreferenceCollator(
            processing_class, [VIEW], layout=self.route.layout, image_token_id=image_token
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
                f"a rollout asks {needed} prompts (num_mini_batches x gradient_accumulation_steps x "
                f"per_device_train_batch_size / num_generations in {args.world_size} process(es)) and there are "
                f"{len(train_dataset)}. Give more prompts or lower one of these."
            )
        self.engine = PreparedEngine(
            roles.policy, processing_class, batch_size=args.rollout_batch_size or args.per_device_train_batch_size
        )
        self.sampling = Sampling(max_new_tokens=args.max_new_tokens, temperature=args.temperature)
        self.plan = partial(linked, permute=args.permute_questions, seed=args.seed) if args.conversations else None
        exact = families.core(model).dtype == torch.float32 and not (args.bf16 or args.fp16)
        self.alarms = Alarms(exact, args.answers_per_iteration * args.world_size)
        alike = partial(encodes_alike, policy=roles.policy, processor=processing_class)
        self.scorer = Scorer(rewards, watch, args, self._sum, alike)
        self.kl = maths.AdaptiveKL(args.kl_coef, args.kl_target or 1.0, args.kl_horizon)
        self.rollout: Rollout | None = None
        self._at = 0
        self._began = 0.0
        self._stopped = self._audited = False
        self._schedule: list[list[int]] = []
        self._tokens: list[float] = []
        self._logged: dict[str, list[float]] = defaultdict(list)
        self._update = Tally(self._sum, args.device)

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
            decay = self.get_decay_parameter_names(self.roles)
            rates = {"policy": args.learning_rate, "value": args.value_learning_rate or args.learning_rate}
            kind, settings = self.get_optimizer_cls_and_kwargs(args, self.roles)
            self.optimizer = kind(self.roles.groups(rates, decay, args.weight_decay), **settings)
        return self.optimizer

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One visit to the rollout, drawn if it is the first: forward and backward pass of the policy, then of the value.

        Args:
            model: the roles, as they are wrapped for several processes.
            inputs: `rows`, numbers of the rows that this process asks.
            num_items_in_batch: not used; losses are sums over tokens of the whole minibatch.
        """
        args = self.args
        if not self._at:
            self._begin(inputs["rows"].tolist())
            self.roles.set_decay(self.optimizer, args.weight_decay if self._policy_trains() else 0.0)
        assert self.rollout is not None
        at, self._at = self._at, (self._at + 1) % args.visits_per_iteration
        update, micro = divmod(at, args.gradient_accumulation_steps)
        loss, numbers = torch.zeros((), device=args.device), self._schedule[at]
        if not self._stopped:
            model.train()
            share = args.world_size / max(1.0, self._tokens[update])
            batch = self._prepared(numbers)
            if self._policy_trains():
                with first_of_two(self.accelerator, model):
                    policy = self._policy_loss(model, batch, numbers, first=at == 0) * share
                    self._backward(policy)
                self._audit(self.rollout, numbers)
                loss = loss + policy.detach()
            value = self._value_loss(model, batch, numbers) * args.vf_coef * share
            self._backward(value)
            loss = loss + value.detach()
            if micro + 1 == args.gradient_accumulation_steps:
                self._end_update()
        if self._at == 0:
            self._note({"time/updates": time.perf_counter() - self._began})
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
            distance = maths.masked_mean(((logps.detach() - old).exp() - 1).abs(), mask)
            self._note(self.alarms.first_ratio(float(self.accelerator.gather(distance[None]).max())))
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

    def _policy_trains(self) -> bool:
        return self.rollout is not None and self.rollout.iteration >= self.args.value_warmup_iterations

    def _audit(self, kept: Rollout, numbers: Sequence[int]) -> None:
        """Once: a policy whose tokens have advantages has to get a gradient; `Upkeep` sees only that there is one, 0 or not."""
        moves = kept.mask & (kept.advantages != 0) & (kept.entropy > 1e-3)
        if not self.is_deepspeed_enabled and not self._audited and bool(moves[numbers].any()):
            self._audited = True
            self.roles.audit()

    def _backward(self, loss: torch.Tensor) -> None:
        settings = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(loss, **settings)

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

    def _begin(self, numbers: Sequence[int]) -> None:
        """Draw, score and run through the models; plan the visits."""
        args, self._stopped, self.rollout = self.args, False, None
        iteration = self.state.global_step // args.updates_per_iteration
        rows = [self.train_dataset[number] for number in numbers]
        clock = [time.perf_counter()]
        self.roles.eval()
        self.roles.activate("policy")
        rollout = draw(rows, engine=self.engine, reader=self.reader, collator=self.collator, encodes=self.keeps_features,
                       sampling=self.sampling, iteration=iteration, seed=args.seed, generations=args.num_generations,
                       plan=self.plan)  # fmt: skip
        self.rollout = rollout
        clock.append(time.perf_counter())
        self.saw_pictures |= any(document.pictures for document in rollout.documents.documents)
        tally = Tally(self._sum, args.device)
        self.scorer.score(rollout, tally)
        clock.append(time.perf_counter())
        self._run_through(rollout)
        clock.append(time.perf_counter())
        shaped = self.scorer.shaped(rollout)
        estimate(rollout, self.scorer.placed(rollout, shaped), args, kl_coef=self.kl.coef, total=self._sum)
        describe(rollout, shaped, tally, kl_coef=self.kl.coef)
        drawn = self.alarms.answers
        metrics = tally.means() | {"objective/kl_coef": self.kl.coef, "episode": float((iteration + 1) * drawn)}
        if args.kl_target is not None:
            self.kl.update(metrics["objective/kl"], drawn)
        self._plan(rollout)
        metrics |= self.alarms.rollout(metrics, iteration)
        times = zip(("rollout", "scoring", "forwards"), itertools.pairwise(clock), strict=True)
        self._note(metrics | {f"time/{name}": end - start for name, (start, end) in times})
        self._began = time.perf_counter()
        if args.log_rollouts:
            rollout.write(Path(str(args.output_dir)) / ROLLOUTS, args.process_index)

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

    def _plan(self, rollout: Rollout) -> None:
        args = self.args
        self._schedule = visits(
            len(rollout.answers),
            passes=args.num_ppo_epochs,
            size=args.per_device_train_batch_size,
            together=args.num_generations,
            seed=(args.seed * 1_000_003 + rollout.iteration) * 1_000_003 + args.process_index,
        )
        counts = [int(rollout.mask[numbers].sum()) for numbers in self._schedule]
        per_update = torch.tensor(counts).view(-1, args.gradient_accumulation_steps).sum(dim=1)
        self._tokens = self._sum(per_update.double()).tolist()

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values.to(self.args.device), "sum")

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
            logs |= {"episode": known["episode"][-1]} if known.get("episode") else {}
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
        return {"reward_scale": self.scorer.scale, "kl_coef": self.kl.coef, "alarms": asdict(self.alarms)}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        scale = state["reward_scale"]
        self.scorer.scale = (scale[0], scale[1]) if scale else None
        self.kl.coef = state["kl_coef"]
        self.alarms = Alarms(**state["alarms"])

    # transformers' and Upkeep's own know one model, and these are several
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.roles.load(Path(resume_from_checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        check_finite({name: weight for name, weight in self.roles.named_parameters() if weight.requires_grad})
        self.roles.save(folder)
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")
        files = {**self.files, STATE_FILE: json.dumps(self._state(), indent=2)}
        for name, text in files.items():
            write_atomically(folder / name, text.encode())


def _numbers(rows: Sequence[int]) -> dict[str, torch.Tensor]:
    return {"rows": torch.tensor(list(rows))}
