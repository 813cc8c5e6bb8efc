"""Short-term memory: language models as functions of explicit weights, one set a lane."""
