"""Found before the real one on the path of the lane daemon_plain, so that nothing runs with it."""

raise ImportError("hidden by tests/plain")
