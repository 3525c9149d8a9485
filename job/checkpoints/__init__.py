"""What a run keeps, so that no work is lost."""
