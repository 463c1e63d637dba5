"Hydras whose experts are noise on the tiny base, a router that reads the first word, bundles that were forged."
import contextlib
import numpy as np
import torch
from hydramoe.models.base import hide_loading_bars, tiny_base
from hydramoe.domains.embed import prompt_text
from hydramoe.foundations.core import rng
from hydramoe.foundations.files import read_json
from hydramoe.hydra import Hydra
from hydramoe.hydra.bundle import seal_bundle
from hydramoe.hydra.route import uniform_router
from hydramoe.experts.stack import LoraSpec
from hydramoe.experts.model import gated

NAMES = ['law', 'sea', 'sum']
TEXTS = ['the court and the law', 'a ship at sea', 'add the numbers to a sum'] # one for each

def noisy(base, names=NAMES, seed=0, fork=0, shared=False):
    "Experts of noise on a base; above a fork, on a trunk of noise; with a shared expert of noise if you ask for it"
    model = gated(base, len(names), LoraSpec(rank=4, fork=fork), shared)
    if shared: model.stack.init_expert(model.stack.shared, seed=9)
    for e, name in enumerate(names): model.stack.init_expert(e, seed=seed, name=name)
    for t in (model.stack.theta, model.stack.trunk):
        noise = rng(seed, 'noise').normal(0, .1, t.shape)
        t += torch.from_numpy(noise).float()
    return model

def by_hand(base=None, fork=0, shared=False):
    "A Hydra of three experts of noise"
    base = base or tiny_base()
    return Hydra(base, noisy(base, fork=fork, shared=shared), uniform_router(NAMES))

class Fickle:
    "A router by the first word of the user"
    kind = 'fickle'
    names = NAMES
    params = {}
    def __call__(self, prompts):
        texts = [prompt_text(dict(prompt=p)) for p in prompts]
        return np.array([[float(t.startswith(n)) for n in NAMES] for t in texts])

def fickle(base=None, fork=0, shared=False):
    "A Hydra of noise that changes its expert with the first word; another word gets none"
    h = by_hand(base, fork, shared)
    h.router = Fickle()
    return h

def ids(hydra, text):
    "The token ids of a text"
    return hydra.base.tokenizer(text, return_tensors='pt').input_ids

@contextlib.contextmanager
def scripted(model, says):
    "The model says these ids, one a forward, whatever it is asked; gives how many it has said"
    said = [0]
    def told(module, args, out):
        out.logits[:, -1] = -1e4
        out.logits[:, -1, says[said[0]%len(says)]] = 1e4
        said[0] += 1
    hook = model.register_forward_hook(told)
    try: yield said
    finally: hook.remove()

def save_base(base, to, **kw):
    "The model and the tokenizer of a base in a folder"
    with hide_loading_bars(): base.model.save_pretrained(to, **kw)
    base.tokenizer.save_pretrained(to)
    return to

def reseal(bundle, change=lambda about: None):
    "Seal a bundle again as a forger would, with another manifest too: every digest is made to fit"
    about = {k: v for k, v in read_json(bundle/'hydra.json').items() if k not in ('format', 'files', 'seal')}
    change(about)
    (bundle/'hydra.json').unlink()
    seal_bundle(bundle, about)
