"What holds for all tests: one thread, and hypothesis draws the same examples in every run."
import os

os.environ.setdefault('OMP_NUM_THREADS', '1') # what they hold is small, and a second thread that waits for its core costs more than it brings

from hypothesis import settings # noqa: E402

settings.register_profile('same', derandomize=True)
settings.register_profile('search', max_examples=2000, deadline=None) # HYPOTHESIS_PROFILE=search looks for new ones
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'same'))
