"""Settings of the whole suite."""

from hypothesis import settings

# Examples are timed by the suite's own time-out: a machine under load is slow, not wrong.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")
