"""What the three training scripts share: arguments, stages, loading, checks, callbacks, checkpoints and the model card."""
