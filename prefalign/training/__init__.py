"""Training on top of TRL: collator, trainer, resume. The only part of the library that imports TRL."""
