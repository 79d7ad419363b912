"""The training run, its schedule and its checkpoints."""
