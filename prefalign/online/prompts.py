"""The prompts of a run: read once into a folder of the run, and as the rows that TRL's online trainers want."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefalign import store
from prefalign.images import open_image
from prefalign.online.mixing import prompts_of
from prefalign.records import Prompt, normalise_messages
from prefalign.store import OutputConfig, write_records

if TYPE_CHECKING:
    from datasets import Dataset

    from prefalign.online.settings import OnlineConfig

PROMPTS = "online_prompts"


def gather_prompts(config: OnlineConfig) -> Path:
    """Read `data` (or the prompts of the offline pairs) once into `prompts/` of the run; what cannot be read is counted.

    Returns:
        The folder.
    """
    folder = config.output / "prompts"
    if config.data is not None:
        store.run_stage(PROMPTS, config.data, lambda block: [[prompt] for prompt in block], output=OutputConfig(folder),
                        record=Prompt, settings={}, seed=config.seed)  # fmt: skip
    else:
        assert config.offline is not None, "checked by `settings.check_settings`"
        write_records(PROMPTS, prompts_of(config.offline), output=OutputConfig(folder), record=Prompt,
                      settings={"prompts_of": "offline"}, seed=config.seed)  # fmt: skip
    return folder


def load_prompts(folder: Path) -> Dataset:
    """Prompts as TRL's `GRPOTrainer` and `RLOOTrainer` read them.

    Columns `prompt`, `images` (decoded when a row is used), `id`, `answer` and `facts` (JSON text).

    Args:
        folder: from `gather_prompts`.
    """
    from datasets import Features, Image, List, load_dataset

    shards = sorted(str(shard) for shard in folder.glob("data/*.parquet"))
    features = Features({**Prompt.features(), "images": List(Image(decode=False))})
    dataset = load_dataset("parquet", data_files=shards, features=features, split="train")
    dataset = dataset.rename_column("messages", "prompt")
    return dataset.with_transform(_decoded)


def _decoded(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Messages without Arrow's nulls, pictures as RGB."""
    known = {
        "prompt": lambda turns: normalise_messages(turns),
        "images": lambda pictures: [open_image(picture) for picture in pictures],
    }
    return {
        name: [known[name](value) for value in values] if name in known else values for name, values in batch.items()
    }
