"""Publishing on the Hugging Face Hub: stage a clean folder, check it, describe it, upload it."""

from prefalign.hub.publish import add_arguments, main, publish_dataset, publish_model

__all__ = ["add_arguments", "main", "publish_dataset", "publish_model"]
