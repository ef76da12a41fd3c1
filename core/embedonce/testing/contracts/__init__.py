"""Test classes that check what every plugin must do; each requires pytest and hypothesis."""
