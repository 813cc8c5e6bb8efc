"""Reading: predict, score, update, carry; the guard, the cache and the meta-gradients."""
