"""A closed-form method over checkpoints of any size: recipes, plans, the lazy merge and its saving."""
