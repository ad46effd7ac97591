"""Training: a loop that knows no Ray, and Ray Train around it."""
