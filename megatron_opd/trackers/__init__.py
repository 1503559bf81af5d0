"""Experiment trackers that a run's numbers go to, one module each; `logging` names them."""
