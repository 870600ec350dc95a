"""Numbers and pictures from a finished or running job."""
