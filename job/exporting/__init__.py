"""The model that a run has learned, as files that leave this project, and what they say of a picture."""
