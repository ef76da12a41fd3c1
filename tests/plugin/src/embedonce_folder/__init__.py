"""A third-party plugin for the tests."""
