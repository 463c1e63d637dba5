"""What a fork buys, measured: `python benchmarks/fork.py --json` (three minutes on one core); `--fast` takes seconds.

    train_speedup_half      tokens a second of training from the trunk's cached states ÷ of training at full depth: the
                            same rows in the same steps and micro-batches, the same precision; what is read from the
                            cache is in it, computing it is not: that stands in the tables (`build`), also spread over
                            some epochs (`with_build`)
    refill_vs_full          a cache filled again above the fork for another expert ÷ filled anew from the first block
    router_vs_prefill_half  a router on the trunk's hidden state (mean over tokens, ridge regression: one product)
                            ÷ a prefill

The base forks at half its depth, experts are LoRA of rank 8 on all linear layers, rows come from the data cards. Sides
are measured in one process, in turn, round after round; medians of the rounds' ratios. Tokens are counted without
padding.
"""
import argparse, json, statistics, tempfile, warnings
import torch
from transformers import DynamicCache
from hydramoe.models.load import load_base
from hydramoe.experts.train import Optimizers, TrainSpec, fit_step, plan_steps, training_mode
from hydramoe.experts.stages import cache_trunk
from hydramoe.experts.stack import LoraSpec
from hydramoe.experts.gates import one_hot
from hydramoe.experts.model import gated, logits
from hydramoe.experts.trunk import run_trunk, rebuild_cache
from forward import in_turn, seconds
from train import rows_of

def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--json', action='store_true', help='print one JSON object and nothing else')
    p.add_argument('--fast', action='store_true', help='a tiny base, few rows: does it run?')
    p.add_argument('--base', default='smollm2')
    p.add_argument('--quants', default='fp32,bf16', help='precisions; the keys are those of the first')
    p.add_argument('--fork', type=float, default=.5)
    p.add_argument('--domains', type=int, default=9, help='experts')
    p.add_argument('--rows', type=int, default=4, help='rows of each expert')
    p.add_argument('--length', type=int, default=300, help='tokens of the longest prompt, and of the longest answer')
    p.add_argument('--context', type=int, default=256, help='tokens in the cache that is filled again')
    p.add_argument('--rounds', type=int, default=5, help='of prefill, re-fill and router')
    p.add_argument('--micro', type=int, default=900,
                   help='tokens that go through one forward of training, with padding')
    p.add_argument('--threads', type=int, default=1)
    p.set_defaults(held=1)
    return p.parse_args()

def experts(a, quant, names, fork):
    "A stack of fresh experts on a base of its own, and above a fork a trunk that is not nothing"
    model = gated(load_base(a.base, quant), len(names), LoraSpec(8, fork=fork))
    model.stack.trunk.normal_(std=.01, generator=torch.Generator().manual_seed(0))
    for e,n in enumerate(names): model.stack.init_expert(e, 0, n)
    return model

def trained(a, full, forked, rows, states):
    "(full, forked, tokens) of each step: its seconds on both sides, in turn, and its tokens"
    names = list(rows)
    spec = TrainSpec(rows=1., micro_tokens=a.micro)
    steps = plan_steps(list(rows.values()), names, spec)
    took = []
    with training_mode(full), training_mode(forked):
        opt = [Optimizers(model.stack, [len(steps)]*len(names), spec) for model in (full, forked)]
        sides = (full, opt[0], None), (forked, opt[1], states)
        def one(side, k):
            "Seconds of step k of one side"
            model, optimizers, cached = sides[side]
            return seconds(lambda: fit_step(model, optimizers, steps[k], k, names, cached))
        for side in (0, 1): one(side, 0) # does not count
        for k,step in enumerate(steps):
            first = k%2 # who begins changes from step to step
            spent = {side: one(side, k) for side in (first, 1-first)}
            took.append((spent[0], spent[1], sum(len(x.ids) for _,x in step)))
    return took

def inference_steps(a, model, router):
    "Steps to be timed above one trunk: a prefill, a cache filled again for another expert, and a route"
    ids = torch.randint(3, model.config.vocab_size, (1, a.context), generator=torch.Generator().manual_seed(0))
    one, other = (one_hot([e], model.stack.slots) for e in (0, 1))
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, gates=one, past_key_values=cache, use_cache=True, logits_to_keep=1)
    h = run_trunk(model, ids)
    def full():
        anew = DynamicCache(config=model.config)
        return model(input_ids=ids, gates=other, past_key_values=anew, use_cache=True, logits_to_keep=1)
    def refill(): return logits(model, rebuild_cache(model, h, cache, other)[:,-1:])
    def route(): return router(h)
    return dict(full=full, refill=refill, router=route)

def ridge(states, rows, strength=1e-2):
    "A router from the mean of the trunk's states to the experts, by ridge regression"
    x = torch.stack([states([row])[0].float().mean(0) for own in rows.values() for row in own])
    y = torch.cat([one_hot([e]*len(own), len(rows)) for e,own in enumerate(rows.values())])
    mean = x.mean(0)
    centred = x-mean
    penalty = strength*x.var()*len(x)*torch.eye(x.shape[1])
    W = torch.linalg.solve(centred.T@centred+penalty, centred.T@(y-y.mean(0)))
    b = y.mean(0)-mean@W
    W, b = W.to(states.states.dtype), b.to(states.states.dtype)
    def route(h): return torch.addmm(b, h.mean(1), W)
    return route

def measure(a, quant):
    "One table"
    rows = rows_of(a, load_base(a.base, quant))[0]
    names, examples = list(rows), sum(rows.values(), [])
    full = experts(a, quant, names, 0)
    forked = experts(a, quant, names, a.fork)
    with tempfile.TemporaryDirectory() as d:
        cache_trunk(forked, examples[:2], d, quant) # warm
        built = seconds(lambda: cache_trunk(forked, examples, d, quant))
        states = cache_trunk(forked, examples, d, quant)
        took = trained(a, full, forked, rows, states)
        size = (states.path/'trunk.bin').stat().st_size
        with torch.inference_mode():
            steps = inference_steps(a, forked, ridge(states, rows))
            inference = in_turn(steps, a.rounds)
    answers = sum(len(x.ids)-x.n_prompt for x in examples)
    about = dict(bytes_a_token=size/len(states.states), fork=forked.stack.fork, blocks=forked.config.num_hidden_layers)
    return table(took, built, inference, answers, about)

def table(took, built, inference, answers, about):
    "What the measurements say: of training, of building the cache, of inference"
    full, cached, tokens = (sum(x) for x in zip(*took))
    speedup = statistics.median(f/c for f,c,_ in took)
    with_build = {epochs: epochs*full/(built+epochs*cached) for epochs in (1, 3, 10)}
    prefill = inference['full']
    return dict(train_speedup_half=speedup, refill_vs_full=inference['refill']/prefill,
                router_vs_prefill_half=inference['router']/prefill,
                full_tokens_s=tokens/full, cached_tokens_s=tokens/cached, build_tokens_s=tokens/built,
                with_build=with_build, **about, steps=len(took), tokens=tokens, response_share=answers/tokens,
                prefill_ms=1e3*prefill)

def rounded(x):
    "All floats in it to four digits"
    if isinstance(x, dict): return {k: rounded(v) for k,v in x.items()}
    return float(f'{x:.4g}') if isinstance(x, float) else x

def main():
    a = options()
    if a.fast: vars(a).update(base='tiny', domains=3, rows=3, context=32)
    torch.set_num_threads(a.threads)
    with warnings.catch_warnings(action='ignore'): tables = {q: rounded(measure(a, q)) for q in a.quants.split(',')}
    first = next(iter(tables.values()))
    out = {k: first[k] for k in ('train_speedup_half', 'refill_vs_full', 'router_vs_prefill_half')}
    out |= dict(tables=tables, conditions=dict(vars(a), torch=torch.__version__))
    if a.json:
        print(json.dumps(out, indent=1))
        return
    for q,t in tables.items(): print(f'\n{q}', *(f'  {k:24} {v}' for k,v in t.items()), sep='\n')

if __name__=='__main__': main()
