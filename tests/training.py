"Three experts of unequal size in training: their rows, a run, a run that stops, and harm to what it has written."
from dataclasses import asdict, replace
import hydramoe.experts.train as train
from hydramoe.foundations.core import rng
from hydramoe.models.base import tiny_base
from hydramoe.models.encode import Example
from hydramoe.experts.stack import LoraSpec
from hydramoe.experts.model import gated
from hydramoe.experts.train import TrainSpec, fit
from rows import row

EXPERTS, LORA = ['large', 'middle', 'small'], LoraSpec(rank=4)
SPEC = TrainSpec(lr=3e-3, rows=2., epochs=2, clip=.5)

def examples(name, n):
    "Random encoded rows of one expert"
    g = rng(0, name)
    def one(i):
        s = int(g.integers(4, 40))
        ids = g.integers(3, 259, s).tolist()
        return Example(ids=ids, n_prompt=int(g.integers(1, s-1)), id=f'{name}{i}', domain=name)
    return [one(i) for i in range(n)]

ROWS = [examples('large', 30), examples('middle', 11), examples('small', 4)]

def letter_row(i, domain, letter):
    "A record whose answer repeats a letter"
    return row(f'question {i}', letter*(3+i%7), id=f'r{i}', domain=domain, source='test', license='CC0')

def job_of(**spec):
    "The parameters of a stage that trains on the tiny base"
    return dict(base='tiny', quant='fp32', lora=asdict(LORA), spec=asdict(replace(SPEC, **spec)))

def fresh(names=EXPERTS, quant='fp32', lora=LORA):
    "A model whose experts have learnt nothing yet"
    model = gated(tiny_base(quant=quant), slots=len(names), spec=lora)
    for e,n in enumerate(names): model.stack.init_expert(e, 0, n)
    model.stack.trainable()
    return model

def trained(spec=SPEC, rows=ROWS, names=EXPERTS, **kw):
    "A model after its training, and the history"
    model = fresh(names)
    return model, fit(model, rows, spec, names=names, **kw)

def far(a, b, start):
    "An error relative to the way covered"
    return ((a-b).norm()/(a-start).norm()).item()

class Stop(Exception): "Raised before a step by `stop_at`"

def stop_at(monkeypatch, k):
    "Let training stop before its step k"
    inner = train.fit_step
    def step(model, opt, step, i, names, cached=None):
        if i==k: raise Stop
        return inner(model, opt, step, i, names, cached)
    monkeypatch.setattr(train, 'fit_step', step)

def missing(p):
    "Take a file away"
    p.unlink()

def truncated(p):
    "Cut the end of a file off"
    p.write_bytes(p.read_bytes()[:-9])

def flipped(p):
    "Flip a bit in the middle of a file"
    b = bytearray(p.read_bytes())
    b[len(b)//2] ^= 1
    p.write_bytes(bytes(b))
