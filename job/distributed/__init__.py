"""The ranks: who is where, how they sum, and how a wait ends."""
