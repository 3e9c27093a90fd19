"""What the three training scripts share: arguments, stages, loading, checks, callbacks, checkpoints, model card."""
