"""Stages 1 and 2: the language model, its Fisher, tuned rules and learned rules."""
