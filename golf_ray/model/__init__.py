"""The model: its tensors, its layer order and the one forward that everything uses."""
