"""The embedded world: pictures of coloured shapes with known truth, and a tiny VLM that hallucinates as real ones do.

`world` draws, `language` speaks and parses, `data` makes rows, `model` and `build` make the base VLM, `measure` grades it.
Importing this package needs neither torch nor transformers.
"""

from pathlib import Path


def base_checkpoint() -> Path:
    """The folder of the shipped base VLM."""
    folder = Path(__file__).parent / "base"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the base VLM is not in {folder}: this installation lacks its weights; "
            f"rebuild them with: prefalign scenes build --output {folder}"
        )
    return folder
