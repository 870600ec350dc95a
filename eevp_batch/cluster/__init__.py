"""The cluster: the only part that knows Ray."""
