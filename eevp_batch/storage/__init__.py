"""Storage: knows Parquet and filesystems, nothing of tensors or Ray."""
