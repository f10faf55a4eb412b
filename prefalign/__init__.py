"""prefalign: preference alignment for vision-language models. Importing it loads nothing heavy."""

__version__ = "0.1.0"
