"""What a run's config says of its method, for a model card: words, papers, and the settings that a reader looks for first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PAPERS: dict[str, tuple[tuple[str, str], ...]] = {
    "visual": (("mDPO", "2406.11839"), ("Re-Align", "2502.13146")),
    "two_pictures": (("DPO", "2305.18290"),),
    "anchor": (("mDPO", "2406.11839"),),
    "s_vco": (("S-VCO", "2502.13928"),),
    "povid_noise": (("POVID", "2402.11411"),),
    "ddpo": (("RLHF-V", "2312.00849"),),
    "chip": (("CHiP", "2501.16629"), ("TDPO", "2404.11999")),
    "v_dpo": (("V-DPO", "2411.02712"),),
    "opa_dpo": (("OPA-DPO", "2501.09695"),),
    "tpo": (("Token Preference Optimization", "2412.14487"),),
    "cdpo": (),
    "bco": (("BCO", "2404.04656"), ("MPO", "2411.10442")),
    "stic": (("STIC", "2405.19716"),),
    "simpo": (("SimPO", "2405.14734"),),
    "orpo": (("ORPO", "2403.07691"),),
}
"""Names and arXiv ids by loss; those of `text` go by TRL's `loss_type`."""
TEXT_PAPERS: dict[str, tuple[tuple[str, str], ...]] = {
    "sigmoid": (("DPO", "2305.18290"),),
    "sigmoid_norm": (("DPO", "2305.18290"),),
    "hinge": (("SLiC-HF", "2305.10425"),),
    "ipo": (("IPO", "2310.12036"),),
    "exo_pair": (("EXO", "2402.00856"),),
    "nca_pair": (("NCA", "2402.05369"),),
    "robust": (("robust DPO", "2403.00409"),),
    "bco_pair": (("BCO", "2404.04656"),),
    "sppo_hard": (("SPPO", "2405.00675"),),
    "aot": (("AOT", "2406.05882"),),
    "aot_unpaired": (("AOT", "2406.05882"),),
    "apo_zero": (("APO", "2408.06266"),),
    "apo_down": (("APO", "2408.06266"),),
    "discopop": (("DiscoPOP", "2406.08414"),),
    "sft": (),
}
ONLINE = {
    "online_dpo": ("online DPO", ("Amirloo et al.", "2407.02477")),
    "online_dpo_step": ("online DPO, sampled in every step,", ("Amirloo et al.", "2407.02477")),
    "grpo": ("GRPO", ("DeepSeekMath", "2402.03300")),
    "rloo": ("RLOO", ("RLOO", "2402.14740")),
    "ppo": ("PPO", ("PPO", "1707.06347")),
}
"""Words and paper by algorithm, of runs on the policy's own answers."""
WITHOUT_REFERENCE = ("stic", "simpo", "orpo")
"""Losses that read no reference; nor does `text` with `loss_type: [sft]`."""


def is_imitation(config: Mapping[str, Any]) -> bool:
    """Whether a run imitated answers: `train_sft`, or `train_preference` with nothing but TRL's `sft` on the chosen ones."""
    return _is_sft(config) or (bool(config) and _names(config) == ["text"] and _loss_types(config) == ["sft"])


def method_words(config: Mapping[str, Any]) -> str:
    """The training method of a run in words.

    Args:
        config: the run's `prefalign_config.yaml`; empty if there was none.
    """
    if not config:
        return "a method that was not recorded"
    if (algorithm := _algorithm(config)) is not None:
        judges = [str(entry.get("label", entry["name"])) for entry in config.get("rewards") or []]
        judges += [f"annotator {config['annotator']['name']}"] if config.get("annotator") else []
        judges += ["BDHS"] if config.get("bdhs") else []
        return f"{ONLINE[algorithm][0]} on {' + '.join(judges)}"
    if is_imitation(config):
        imitated = config.get("answer") if _is_sft(config) else "chosen"
        answers = {"chosen": " on the chosen answers of pairs", "answer": " on reference answers"}.get(
            str(imitated), ""
        )
        kind = (config.get("trainer") or {}).get("loss_type", "nll") if _is_sft(config) else "nll"
        return f"supervised fine-tuning (SFT){answers}{f', loss_type {kind}' if kind != 'nll' else ''}"
    if _names(config) == ["text"]:
        types = _loss_types(config)
        return "DPO" if types == ["sigmoid"] else f"preference training on TRL's {_text_words(config)}"
    return f"preference training on {loss_words(config)}"


def loss_words(config: Mapping[str, Any]) -> str:
    """The weighted list of losses, as in `text (sigmoid) + 0.5 x visual (beta 0.2)`."""
    parts = []
    for entry in _losses(config):
        settings = [f"{key} {value}" for key, value in entry.items() if key not in ("name", "weight")]
        settings = [_text_words(config), *settings] if entry["name"] == "text" else settings
        words = f"{entry['name']} ({', '.join(settings)})" if settings else str(entry["name"])
        parts.append(words if entry.get("weight", 1) == 1 else f"{entry['weight']:g} x {words}")
    return " + ".join(parts)


def papers(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and arXiv ids of the papers that a run's losses come from, each once."""
    if not config or _is_sft(config):
        return []
    if (algorithm := _algorithm(config)) is not None:
        return [ONLINE[algorithm][1]]
    found: list[tuple[str, str]] = []
    for name in _names(config):
        if name == "text":
            found += [paper for kind in _loss_types(config) for paper in TEXT_PAPERS.get(kind, ())]
        else:
            found += PAPERS.get(name, ())
    return list(dict.fromkeys(found))


def settings_table(config: Mapping[str, Any], *, named: bool = False) -> dict[str, str]:
    """Name to text: the other pictures, the reference, and which weights were trained.

    Args:
        config: the run's config; empty if there was none.
        named: whether the publisher gave words for the method, which then do not tell the losses.
    """
    if not config:
        return {}
    table = {}
    if _algorithm(config) is not None:
        table["reference"] = "the starting weights"
    elif not _is_sft(config):
        if named:
            table["losses"] = f"`{loss_words(config)}`"
        if config.get("negative"):
            table["other pictures"] = (
                f"`{config['negative'].get('kind', 'crop')}`, made in training from the row's own picture where a row "
                "brings none"
            )
        table["reference"] = _reference_words(config)
    lora = config.get("lora")
    frozen = " and ".join(name.replace("_", " ") for name in config.get("freeze") or [])
    table["trained weights"] = (
        f"LoRA adapter, r {lora.get('r', 64)}, alpha {lora.get('alpha', 128)}"
        if lora
        else f"all but {frozen}"
        if frozen
        else "all"
    )
    return table


def tags(config: Mapping[str, Any]) -> list[str]:
    """Tags for the Hub: what kind of training, and the names of its papers."""
    if not config:
        return []
    names = [name.lower().replace(" ", "-") for name, _ in papers(config)]
    kind = ["sft"] if is_imitation(config) else ["preference-alignment", *names]
    return [*kind, *(["lora"] if config.get("lora") else [])]


def _reference_words(config: Mapping[str, Any]) -> str:
    names, trainer = _names(config), config.get("trainer") or {}
    free = {name for name in names if name in WITHOUT_REFERENCE or (name == "text" and _loss_types(config) == ["sft"])}
    if free == set(names):
        return "none: these losses read none"
    if trainer.get("sync_ref_model"):
        return "a copy of the policy that follows it (`sync_ref_model`)"
    if config.get("reference") == "cached":
        return "the starting weights; their log-probs were computed once, before training"
    return "the starting weights"


def _is_sft(config: Mapping[str, Any]) -> bool:
    return "data" in config and "pairs" not in config and _algorithm(config) is None


def _algorithm(config: Mapping[str, Any]) -> str | None:
    """Key of `ONLINE` for a run on the policy's own answers (`train_online`, `train_ppo`), else None."""
    if "p_offline" in config:
        return str((config.get("trainer") or {}).get("algorithm", "online_dpo"))
    return "ppo" if "prompts" in config and "rewards" in config else None


def _losses(config: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The entries of `losses`; configs of earlier versions named one `term`."""
    return config.get("losses") or [{"name": config.get("term") or "text"}]


def _names(config: Mapping[str, Any]) -> list[str]:
    return [str(entry["name"]) for entry in _losses(config)]


def _loss_types(config: Mapping[str, Any]) -> list[str]:
    types = (config.get("trainer") or {}).get("loss_type") or ["sigmoid"]
    return [types] if isinstance(types, str) else list(types)


def _text_words(config: Mapping[str, Any]) -> str:
    types = _loss_types(config)
    weights = (config.get("trainer") or {}).get("loss_weights") or [1.0] * len(types)
    return " + ".join(
        name if weight == 1 else f"{weight:g} x {name}" for name, weight in zip(types, weights, strict=True)
    )
