"""What a recipe may say: its options, their checks before a run, and the record of them that a run keeps."""
