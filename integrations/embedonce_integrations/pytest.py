"""The pytest plugin: records the vectors that tests need in a bundle, and replays them without a provider.

pytest imports this module in every session, so it imports nothing itself.
"""
