"""The data set: fetched, verified, mapped, and cut into batches."""
