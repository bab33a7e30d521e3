"""Training: one learner, one loop, one checkpoint format for every stage."""
