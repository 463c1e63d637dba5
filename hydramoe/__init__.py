"One instruction data set and one base model become a mixture of swappable QLoRA experts"
__version__ = "0.1.0"

import importlib, os, sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

# Written by hand, the only module that no notebook exports; why it stands as it does is told in nbs/hydra/68_auto.ipynb.

# torch's threads spin while they wait for each other, and take a core from whatever else is running. These spin for a
# moment and then sleep (benchmarks/busy.py measures both). The library below torch reads the variables once, when torch is
# imported; processes started from here inherit them.
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ['OMP_WAIT_POLICY'] = 'PASSIVE'
    os.environ.setdefault('GOMP_SPINCOUNT', '1000')

_LAZY = dict(Hydra='hydramoe.hydra.build', HydraConfig='hydramoe.hydra.auto', HydraForCausalLM='hydramoe.hydra.auto', HydraTokenizer='hydramoe.hydra.auto')
_LIST = 'transformers.models.auto.configuration_auto' # where transformers keeps its list of model types

def __getattr__(name):
    "The classes above are imported when they are first asked for (PEP 562): they bring torch and transformers along"
    if name in _LAZY: return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'hydramoe' has no attribute {name!r}")

def _tell(listed):
    "Enter model_type `hydra_moe` in transformers' own lazy list: the class is looked up here when a bundle is opened"
    listed.CONFIG_MAPPING_NAMES['hydra_moe'] = 'HydraConfig'
    listed.CONFIG_MAPPING._modules['hydra_moe'] = sys.modules[__name__]

class _WhenItComes(MetaPathFinder):
    "Waits until transformers imports its list, lets it, and tells it"
    def find_spec(self, name, path, target=None):
        if name != _LIST: return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        run = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (run(module), _tell(module))
        return spec

if _LIST in sys.modules: _tell(sys.modules[_LIST])
else: sys.meta_path.insert(0, _WhenItComes())
