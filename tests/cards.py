"The data cards whose rows a package holds, each loaded once."
import functools

from hydramoe.data.cards import card_names
from hydramoe.data.load import load

FETCHED = card_names()
cached_load = functools.cache(load)
