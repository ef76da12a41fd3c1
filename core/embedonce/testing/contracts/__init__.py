"""What every plugin must do, as test classes; each needs pytest and hypothesis."""
