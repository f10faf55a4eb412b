"""`PPOConfig`: transformers' training arguments with the settings of PPO, under the names that TRL's PPO had."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from prefalign.config import ConfigError
from prefalign.training.arguments import shares_weights

WITHOUT_EFFECT = {
    "label_smoothing_factor": "the losses of PPO have no labels",
    "neftune_noise_alpha": "noise in the embeddings would make the first ratio another than 1",
    "dataloader_num_workers": "rows are read when a rollout is drawn",
    "dataloader_drop_last": "every rollout is whole",
    "auto_find_batch_size": "a batch size is a part of the rollout's shape",
    "eval_steps": "PPO has no loss on held-out rows",
}
"""Settings of `transformers.TrainingArguments` that PPO does not heed, and why."""


@dataclass
class PPOConfig(TrainingArguments):
    """Settings of a PPO run; what is not listed is as in `transformers.TrainingArguments`.

    One *iteration* draws answers and updates on them. Each process draws `num_mini_batches * gradient_accumulation_steps *
    per_device_train_batch_size` answers, and makes `num_ppo_epochs * num_mini_batches` optimizer steps on them.

    Attributes:
        num_ppo_epochs: passes over a rollout.
        num_mini_batches: optimizer steps in a pass.
        num_generations: answers drawn to each prompt of a rollout; they share one forward pass over prompt and pictures.
        max_new_tokens: longest answer.
        temperature: of sampling, and of every log-prob.
        kl_coef: beta, weight of the KL to the reference in the reward.
        kl_target: adapt beta towards this many nats per answer; None: beta stays.
        kl_horizon: answers over which beta adapts.
        gamma: discount.
        lam: lambda of GAE.
        cliprange: of the ratio.
        cliprange_value: of the values.
        vf_coef: weight of the value loss.
        value_learning_rate: of the value adapter, or model, and its head; None: `learning_rate`.
        value_warmup_iterations: first iterations that train the values alone.
        normalise_rewards: bring scores to mean 0 and deviation 1 of the first rollout, which is drawn from the reference.
        reward_clip: then clip them to plus and minus this; None: not clipped.
        whiten_rewards: bring the rewards per token to deviation 1 in each rollout, without shifting their mean.
        missing_eos_penalty: taken off the (normalised) score of an answer that ran into `max_new_tokens`; None: nothing.
        missing_eos_score: put in the place of that score instead; None: the score stays.
        target_kl: leave out the rest of an iteration's updates once the approximate KL to the policy that drew exceeds 1.5 times
            this; None: never.
        conversations: draw whole conversations: the questions of a row's `facts.rules.questions` one after the other.
        permute_questions: in an order drawn for each row and iteration; else that of the row.
        turn_rewards: give what a turn earns by itself (rewards with `turn_scores`) at the end of that turn; else all of it at the
            end of the conversation.
        rollout_batch_size: rows of one generation batch; None: `per_device_train_batch_size`.
        blank_picture_probe: answers of a rollout whose score is compared with that for a blank picture; 0: none.
        log_rollouts: write the answers of every rollout with their scores as JSON lines.
        max_length: longest prompt with an answer of `max_new_tokens`, or conversation with all its questions and answers;
            longer ones are dropped and counted. None: no limit.
    """

    num_ppo_epochs: int = 1
    num_mini_batches: int = 1
    num_generations: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    kl_coef: float = 0.05
    kl_target: float | None = None
    kl_horizon: float = 10_000.0
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    value_learning_rate: float | None = None
    value_warmup_iterations: int = 0
    normalise_rewards: bool = True
    reward_clip: float | None = 5.0
    whiten_rewards: bool = False
    missing_eos_penalty: float | None = 1.0
    missing_eos_score: float | None = None
    target_kl: float | None = None
    conversations: bool = False
    permute_questions: bool = True
    turn_rewards: bool = True
    rollout_batch_size: int | None = None
    blank_picture_probe: int = 8
    log_rollouts: bool = True
    max_length: int | None = None

    learning_rate: float = 1e-5
    gradient_checkpointing: bool = True
    logging_steps: float = 1
    save_steps: float = 100

    @property
    def answers_per_iteration(self) -> int:
        """Answers that one process draws in an iteration."""
        return self.num_mini_batches * self.gradient_accumulation_steps * self.per_device_train_batch_size

    @property
    def updates_per_iteration(self) -> int:
        """Optimizer steps of an iteration."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def visits_per_iteration(self) -> int:
        """Forward and backward passes of an iteration."""
        return self.updates_per_iteration * self.gradient_accumulation_steps

    def check(self) -> None:
        """Check that the settings agree with each other.

        Raises:
            ConfigError: one line for each that does not.
        """
        problems = [message for wrong, message in [*self._problems(), *self._process_problems()] if wrong]
        if problems:
            raise ConfigError("\n  ".join(problems))

    def _problems(self) -> list[tuple[bool, str]]:
        updates = self.updates_per_iteration
        saves = str(getattr(self.save_strategy, "value", self.save_strategy))
        positive = ("num_ppo_epochs", "num_mini_batches", "num_generations", "max_new_tokens", "temperature", "kl_horizon",
                    "cliprange", "cliprange_value")  # fmt: skip
        found: list[tuple[bool, str]] = [
            (getattr(self, name) <= 0, f"trainer.{name} must be above 0, got {getattr(self, name)}.")
            for name in positive
        ]
        found += [
            (
                not 0 <= getattr(self, name) <= 1,
                f"trainer.{name} must lie between 0 and 1, got {getattr(self, name)}.",
            )
            for name in ("gamma", "lam")
        ]
        found += [
            (bool(getattr(self, name)), f"trainer.{name}: has no effect in PPO ({reason}); leave it out.")
            for name, reason in WITHOUT_EFFECT.items()
        ]
        found += [
            (
                self.per_device_train_batch_size % max(1, self.num_generations) != 0,
                (
                    f"trainer.per_device_train_batch_size is {self.per_device_train_batch_size} answers and "
                    f"num_generations {self.num_generations}: the answers to one prompt would be cut apart. Make the "
                    "first a multiple of the second."
                ),
            ),
            (
                saves == "steps" and self.save_steps % max(1, updates) != 0,
                (
                    f"trainer.save_steps is {self.save_steps} and an iteration makes {updates} optimizer steps "
                    "(num_ppo_epochs x num_mini_batches): a checkpoint in the middle of one would lose its rollout, "
                    f"so a resumed run would draw anew and be another run. Set save_steps to a multiple of {updates}."
                ),
            ),
            (
                saves not in ("steps", "no"),
                (
                    f"trainer.save_strategy is {saves!r}; checkpoints are written at the end of iterations only, "
                    "counted in steps. Use 'steps' or 'no'."
                ),
            ),
            (
                self.max_steps > 0 and self.max_steps % max(1, updates) != 0,
                (
                    f"trainer.max_steps is {self.max_steps} and an iteration makes {updates} optimizer steps: the last "
                    f"rollout would be drawn and not be used up. Set max_steps to a multiple of {updates}."
                ),
            ),
            (
                self.missing_eos_penalty is not None and self.missing_eos_penalty < 0,
                (
                    "trainer.missing_eos_penalty is taken off the score and must be 0 or more, got "
                    f"{self.missing_eos_penalty}."
                ),
            ),
            (
                bool(self.missing_eos_penalty) and self.missing_eos_score is not None,
                (
                    f"trainer.missing_eos_penalty ({self.missing_eos_penalty}) and missing_eos_score "
                    f"({self.missing_eos_score}) both say what an unfinished answer is worth. Set one of them to null."
                ),
            ),
            (
                self.target_kl is not None and bool(self.fp16),
                "trainer.target_kl leaves out updates, which fp16's loss scale does not allow for. Use bf16, or set it to null.",
            ),
            (self.kl_coef < 0, f"trainer.kl_coef must be 0 or more, got {self.kl_coef}."),
            (
                self.kl_target is not None and self.kl_coef == 0,
                "trainer.kl_target adapts kl_coef by factors, and kl_coef is 0, which stays 0. Start from about 0.15.",
            ),
            (
                self.load_best_model_at_end or str(getattr(self.eval_strategy, "value", self.eval_strategy)) != "no",
                (
                    "trainer.eval_strategy and load_best_model_at_end: PPO has no loss on held-out rows. Evaluate the "
                    "checkpoints with `prefalign run evaluate_model`, and leave both out."
                ),
            ),
            (
                bool((self.gradient_checkpointing_kwargs or {}).get("use_reentrant")),
                (
                    "trainer.gradient_checkpointing_kwargs: reentrant checkpointing needs gradients at the embeddings "
                    "of a frozen base and recomputes its tower. Leave use_reentrant out."
                ),
            ),
        ]
        return found

    def _process_problems(self) -> list[tuple[bool, str]]:
        return [
            (
                shares_weights(self),
                (
                    "PPO runs on DDP and DeepSpeed ZeRO-1 and ZeRO-2: ZeRO-3 and FSDP share out the weights, which "
                    "generation and the reference would gather for every token. Train an adapter, with ZeRO-2 or "
                    "without."
                ),
            ),
            (
                self.n_gpu > 1,
                (
                    f"one process sees {self.n_gpu} GPUs, and transformers would copy the model to all of them in "
                    "every pass. Start the recipe with torchrun or `accelerate launch`, or make one GPU visible "
                    "(CUDA_VISIBLE_DEVICES=0)."
                ),
            ),
        ]
