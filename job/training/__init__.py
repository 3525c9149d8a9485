"""A step of learning, its schedule, and what it measures."""
