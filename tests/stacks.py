"Models whose experts are noise, batches for them, and the same experts in PEFT."
import warnings
import torch
from hydramoe.models.base import Base, tiny_base
from hydramoe.models.template import byte_tokenizer
from hydramoe.experts.stack import LoraSpec
from hydramoe.experts.model import gated
import hydramoe.experts.adapters # noqa: F401, gives a stack `save_peft`

def rand(seed):
    "A generator of its own"
    return torch.Generator().manual_seed(seed)

def fill(stack, seed=0):
    "A stack whose experts are noise"
    for e in range(stack.slots): stack.init_expert(e, e, f'expert{e}')
    with torch.no_grad(): stack.theta.add_(.05*torch.randn(stack.theta.shape, generator=rand(seed)))
    return stack

def filled(slots=4, rank=4, quant='fp32', **kw):
    "The tiny base with experts of noise"
    m = gated(tiny_base(quant=quant), slots, LoraSpec(rank, 2*rank, **kw))
    fill(m.stack)
    return m

def forked_model(fork=.5, slots=3, layers=4, make=None):
    "Experts of noise that part at a fork, on a trunk of noise; `make` makes another base than the tiny one"
    if make is None: b = tiny_base(layers=layers)
    else: b = Base(make().eval().requires_grad_(False), byte_tokenizer(), make.__name__, 'fp32', 'cpu', '')
    m = gated(b, slots, LoraSpec(4, 8, fork=fork))
    fill(m.stack)
    m.stack.trunk.add_(.05*torch.randn(m.stack.trunk.shape, generator=rand(9)))
    return m

def batch(rows=3, length=12, seed=0, vocab=250, pads=(0,3,5)):
    "Rows of random ids, padded on the left by so many each"
    ids = torch.randint(3, vocab, (rows,length), generator=rand(seed))
    mask = torch.ones_like(ids)
    for r in range(rows): mask[r,:pads[r%len(pads)]] = 0
    return dict(input_ids=ids, attention_mask=mask)

def peft(base_model, dir):
    "A model with an adapter that PEFT has opened"
    from peft import PeftModel
    with warnings.catch_warnings(action='ignore'): return PeftModel.from_pretrained(base_model, dir)

def contents(cache):
    "All keys and values of a cache"
    return [t for l in cache.layers for t in (l.keys, l.values)]
