"""Any model of ours inside other people's tools; each is imported only when it is asked for."""
