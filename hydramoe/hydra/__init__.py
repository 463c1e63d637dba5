"Routers and gates, the Hydra that holds them, conversations, bundles, and how one is built and changed"

# Written by hand. `from hydramoe.hydra import Hydra` gives the class with all its methods: `build` is added to it by the last of
# the modules below, so that one is imported when the name is first asked for (PEP 562), and torch and transformers with it.

import importlib

_LAZY = dict(Hydra='hydramoe.hydra.build', Chat='hydramoe.hydra.chat', BundleError='hydramoe.hydra.bundle')

def __getattr__(name):
    "The names above are imported when they are first asked for"
    if name in _LAZY: return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'hydramoe.hydra' has no attribute {name!r}")
