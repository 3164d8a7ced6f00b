"""What trained models can do, and what the runs of a study show."""
