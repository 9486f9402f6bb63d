"""Studies of merges, independent of the model and the tasks: see `base`."""
