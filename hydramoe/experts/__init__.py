"All experts of a base as one stack: stored, computed, trained and scored together"
