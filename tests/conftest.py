"Tests run on one thread: what they hold is small, and a second thread that has to wait for its core costs more than it brings."
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
