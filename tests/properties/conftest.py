"""How many examples hypothesis draws: few and always the same ones, or many and new ones by hand.

``pytest tests/properties --hypothesis-profile long`` searches for some minutes.
"""

from hypothesis import HealthCheck, settings

EVERY = {
    "deadline": None,  # Triton's interpreter is slow
    "database": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow],
}
settings.register_profile("short", max_examples=25, derandomize=True, **EVERY)
settings.register_profile("long", max_examples=400, **EVERY)
settings.load_profile("short")  # pytest loads the one that its command line names after this
