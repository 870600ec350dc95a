"""The engine: knows tensors, nothing of Parquet or Ray."""
