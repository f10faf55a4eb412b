"""Settings of the trainers on a policy's own answers; light enough to be read before torch is loaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefalign.config import ConfigError, nearest
from prefalign.engines import Sampling
from prefalign.engines.config import VllmConfig
from prefalign.guided import BiasConfig
from prefalign.models import ModelConfig
from prefalign.sources import DataConfig
from prefalign.training.lora import LoraSettings

ALGORITHMS = ("online_dpo", "online_dpo_step", "grpo", "rloo")


@dataclass
class Rounds:
    """The loop of `online_dpo`.

    Attributes:
        count: rounds.
        prompts: prompts of one round (2,000 to 8,000 are usual); after the last prompt the first comes again. 0: all of them.
        reference: `first` keeps the model that the run starts from as the reference, `previous` takes the policy before a round.
        block_size: prompts of one block of work: at most so many are sampled or judged again after an interruption.
    """

    count: int = 3
    prompts: int = 0
    reference: Literal["first", "previous"] = "first"
    block_size: int = 64

    def __post_init__(self) -> None:
        if self.count < 1 or self.prompts < 0:
            raise ValueError(
                f"rounds.count is {self.count} and rounds.prompts {self.prompts}: a run has at least 1 round, of some prompts "
                "or of all (0)."
            )


@dataclass
class Check:
    """What is looked at before and after a round, on the policy's answers to its first prompts.

    Attributes:
        prompts: how many; 0: no check of the engine and no KL.
        bound: largest difference of one token's log-prob between engine and trainer; null: what the precision explains.
    """

    prompts: int = 8
    bound: float | None = None


@dataclass
class OnlineConfig:
    """A run on the policy's own answers.

    Attributes:
        model: the policy's starting weights, which are the reference too.
        output: folder of the run; the final model or adapter is its `policy/` (with `grpo`, `rloo` and `online_dpo_step` itself).
        data: prompts; null: those of the offline pairs.
        offline: folder of offline pairs, for mixed DPO.
        p_offline: probability that a prompt with an offline pair takes it instead of the policy's answers: 0 is online DPO, 1
            offline DPO, 0.5 published.
        rounds: the loop of `online_dpo`.
        responses: answers to each prompt; of more than two, best and worst make the pair. `grpo` and `rloo` have
            `trainer.num_generations` instead.
        sampling: how answers are drawn. `grpo` and `rloo` have `trainer.temperature`, `trainer.top_p` and so on instead.
        annotator: a pairwise judge (`prefalign.rewards.COMPARATORS`), asked in both orders.
        rewards: weighted rewards (`prefalign.rewards.REWARDS`), in its place: the higher total is chosen.
        reward_floor: least accuracy of a reward model on every set that it was graded on (`grade_reward_model`).
        force_reward: train against a reward model that was not graded as it is used here, on enough pairs, or is below the floor.
        margin: least difference of two totals.
        bdhs: online BDHS: chosen is a row's reference answer, rejected what the policy says with its eyes nearly closed; in
            place of annotator and rewards.
        similarity: what compares answers for `bdhs`: `lexical` or a sentence-transformers model.
        engine: what samples: `transformers` in this process, or `vllm` in another one, started on the policy of each round.
        vllm: settings of vLLM.
        vllm_python: Python of the environment that has vLLM; null: this one.
        batch_size: rows in one forward pass of the transformers engine.
        check: checks before and after a round.
        evaluation: settings over `evaluation_config`, to evaluate the policy before the run and after every round; null: not.
        evaluation_config: a config of `evaluate_model`.
        losses: what DPO minimises, as in `train_preference`.
        trainer: `algorithm` (`online_dpo`, `online_dpo_step`, `grpo` or `rloo`), and fields of TRL's config by name: of
            `DPOConfig` (for one round; of 1 epoch, unless it says more), `GRPOConfig` or `RLOOConfig`.
        fast_path: as in `train_preference`.
        lora: train an adapter; without it all weights that are not frozen.
        freeze: towers that stay as they are.
        resume: "auto" goes on where the run stopped; true demands that it has begun, false refuses that.
        seed: of everything.
    """

    model: ModelConfig
    output: Path
    data: DataConfig | None = None
    offline: Path | None = None
    p_offline: float = 0.5
    rounds: Rounds = field(default_factory=Rounds)
    responses: int = 2
    sampling: Sampling = field(default_factory=Sampling)
    annotator: dict[str, Any] | None = None
    rewards: list[dict[str, Any]] = field(default_factory=list)
    reward_floor: float = 0.6
    force_reward: bool = False
    margin: float = 0.0
    bdhs: BiasConfig | None = None
    similarity: str = "lexical"
    engine: Literal["transformers", "vllm"] = "transformers"
    vllm: VllmConfig = field(default_factory=VllmConfig)
    vllm_python: Path | None = None
    batch_size: int = 16
    check: Check = field(default_factory=Check)
    evaluation: dict[str, Any] | None = None
    evaluation_config: str = "recipes/evaluate_scenes"
    losses: list[dict[str, Any]] = field(default_factory=lambda: [{"name": "text"}])
    trainer: dict[str, Any] = field(default_factory=dict, metadata={"fields_of": "trl.DPOConfig"})
    fast_path: Literal["auto", "off"] = "auto"
    lora: LoraSettings | None = None
    freeze: list[str] = field(default_factory=lambda: ["vision"])
    resume: Literal["auto"] | bool = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.p_offline <= 1:
            raise ValueError(
                f"p_offline {self.p_offline} is a probability: 0 takes no offline pair, 1 takes all, 0.5 is published."
            )
        if self.responses < 2:
            raise ValueError(f"responses is {self.responses}; a pair needs 2 answers to a prompt or more.")

    @property
    def algorithm(self) -> str:
        """`trainer.algorithm`."""
        return str(self.trainer.get("algorithm", "online_dpo"))

    @property
    def trl(self) -> dict[str, Any]:
        """`trainer` without `algorithm`: fields of TRL's config."""
        return {name: value for name, value in self.trainer.items() if name != "algorithm"}


FREE = ("check", "batch_size", "vllm", "vllm_python")
"""Settings that a run may change when it goes on: they stop it, speed it up or measure it, and decide no weight."""

UNREAD = {
    "online_dpo_step": ("rounds", "check", "evaluation"),
    "grpo": ("rounds", "check", "evaluation", "responses", "sampling", "margin", "batch_size", "losses", "fast_path",
             "p_offline", "similarity"),
}  # fmt: skip
UNREAD["rloo"] = UNREAD["grpo"]
"""Settings that an algorithm has no use for; `bdhs` leaves more unread, as `unread` says."""


def unread(config: OnlineConfig) -> list[str]:
    """Names of the settings that are not at their default and that the run's algorithm does not read."""
    start = OnlineConfig(config.model, config.output)
    names = list(UNREAD.get(config.algorithm, ()))
    if config.algorithm in ("online_dpo", "online_dpo_step"):
        names += ["similarity"] if config.bdhs is None else ["responses", "margin"]
    names += ["vllm", "vllm_python"] if config.engine != "vllm" else []
    return [name for name in names if getattr(config, name) != getattr(start, name)]


def check_settings(config: OnlineConfig) -> None:
    """Check that settings do not contradict each other, before anything is loaded.

    Raises:
        ConfigError: says what contradicts what, and what to do.
    """
    if config.algorithm not in ALGORITHMS:
        raise ConfigError(
            f"trainer.algorithm: no algorithm {config.algorithm!r}; {nearest(config.algorithm, list(ALGORITHMS))}"
        )
    if config.engine == "vllm":
        _check_vllm(config)
    if config.data is None and config.offline is None:
        raise ConfigError("data: neither `data` nor `offline` is given, so there is no prompt. Give one of them.")
    if config.algorithm in ("grpo", "rloo"):
        others = [name for name in ("offline", "annotator", "bdhs") if getattr(config, name) is not None]
        if others or not config.rewards or config.data is None:
            raise ConfigError(
                f"trainer.algorithm is {config.algorithm!r}, which needs `data` and `rewards`"
                f"{', and does not read ' + ', '.join(others) if others else ''}: it learns from scores of the policy's own "
                "answers, not from pairs. Give these two, and leave the others out."
            )
        return
    if config.offline is None and config.p_offline not in (0, OnlineConfig.p_offline):
        raise ConfigError(
            f"p_offline is {config.p_offline}, and there is no `offline`: no prompt has a stored pair, so all would be drawn "
            "online. Name the folder of offline pairs, or leave p_offline out (or at 0)."
        )
    if config.bdhs is not None and (config.annotator is not None or config.rewards):
        raise ConfigError(
            "bdhs: its pairs need no annotator (chosen is the reference answer), and one is given. Leave `annotator` and "
            "`rewards` out, or `bdhs`."
        )
    never_draws = config.p_offline == 1 and config.offline is not None
    if config.bdhs is None and config.sampling.temperature == 0 and not never_draws:
        raise ConfigError(
            f"sampling.temperature is 0, so all {config.responses} answers to a prompt are the same one and none is better. Give "
            "a temperature above 0 (1.0 is the default)."
        )


def engine_python(config: OnlineConfig) -> str:
    """The Python that vLLM runs in."""
    return sys.executable if config.vllm_python is None else str(config.vllm_python)


def _check_vllm(config: OnlineConfig) -> None:
    """Refuse what vLLM cannot sample for, and a Python that does not have it."""
    if config.algorithm != "online_dpo":
        raise ConfigError(
            f"engine is 'vllm' and trainer.algorithm {config.algorithm!r}, which changes the policy in every step: vLLM is given "
            "its weights between rounds only, and would sample from old ones. Set trainer.algorithm to online_dpo, or engine to "
            "transformers."
        )
    if config.bdhs is not None:
        raise ConfigError(
            "engine is 'vllm' and `bdhs` is given, which hides image tokens while it draws: vLLM takes no such mask, so rejected "
            "answers would be drawn with the picture in view. Set engine to transformers."
        )
    if config.model.load_in_4bit:
        raise ConfigError(
            "engine is 'vllm' and model.load_in_4bit is true: vLLM would be served the adapter merged into weights that are not "
            "rounded, another policy than the one that trains. Set load_in_4bit to false, or engine to transformers."
        )
    python = engine_python(config)
    cure = "`make vllm-env` builds the environment of vLLM, which has no TRL; set vllm_python to its bin/python."
    if shutil.which(python) is None:
        raise ConfigError(f"vllm_python is {python}, and there is no such program, so nothing could sample. {cure}")
    asked = subprocess.run([python, "-c", "import vllm, prefalign.engines.vllm"], capture_output=True, text=True)
    if asked.returncode:
        lines = asked.stderr.strip().splitlines()
        raise ConfigError(
            f"engine is 'vllm', and {python} cannot import it together with prefalign "
            f"({lines[-1] if lines else f'it ended with code {asked.returncode}'}). {cure}"
        )
