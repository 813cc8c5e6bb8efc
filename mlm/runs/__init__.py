"""The stages of a run, one after another, each from what the run folder holds."""
