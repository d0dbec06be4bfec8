"""A daemon that takes HTTP clients over from Apache and streams language model answers to them.

Data goes one way: listener -> handoff -> session -> backend -> client. See README.md for signals and configuration.
"""

__version__ = "0.1.0"
