"""A model on disk: published checkpoints, the packed form that is run, and the way from one to the
other."""
