"""Whether a machine is fit for a run: facts, and checks of them."""
