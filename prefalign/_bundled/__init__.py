"""Stages and configs inside a wheel; empty in a checkout, where they stand at the top of the tree."""
