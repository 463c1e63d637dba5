"""What a fork buys, measured: `python benchmarks/fork.py --json` (three minutes on one core); `--fast` takes seconds.

    train_speedup_half      tokens a second of training from the trunk's cached states ÷ of training at full depth: the same
                            rows in the same steps and micro-batches, the same precision; what is read from the cache is in it,
                            computing it is not: that stands in the tables (`build`), also spread over some epochs (`with_build`)
    refill_vs_full          a cache filled again above the fork for another expert ÷ filled anew from the first block
    router_vs_prefill_half  a router on the trunk's hidden state (mean over tokens, ridge regression: one product) ÷ a prefill

The base forks at half its depth, experts are LoRA of rank 8 on all linear layers, rows come from the data cards. Sides are
measured in one process, in turn, round after round; medians of the rounds' ratios. Tokens are counted without padding.
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
    p.add_argument('--micro', type=int, default=900, help='tokens that go through one forward of training, with padding')
    p.add_argument('--threads', type=int, default=1)
    p.set_defaults(held=1)
    return p.parse_args()

def experts(a, quant, names, fork):
    "A base of its own, a stack of fresh experts on it, and above a fork a trunk that is not nothing"
    base = load_base(a.base, quant)
    model = gated(base, len(names), LoraSpec(8, fork=fork))
    model.stack.trunk.normal_(std=.01, generator=torch.Generator().manual_seed(0))
    for e,n in enumerate(names): model.stack.init_expert(e, 0, n)
    return base, model

def trained(a, full, forked, rows, states):
    "Seconds and tokens of each step on both sides, in turn"
    names, spec = list(rows), TrainSpec(rows=1., micro_tokens=a.micro)
    steps, took = plan_steps(list(rows.values()), names, spec), []
    with training_mode(full), training_mode(forked):
        opt = [Optimizers(m.stack, [len(steps)]*len(names), spec) for m in (full, forked)]
        def one(side, k): return seconds(lambda: fit_step((full, forked)[side], opt[side], steps[k], k, names, states if side else None))
        for side in (0, 1): one(side, 0) # does not count
        for k in range(len(steps)):
            first = k%2
            t = {s: one(s, k) for s in (first, 1-first)}
            took.append((t[0], t[1], sum(len(x.ids) for _,x in steps[k])))
    return took

def filled(a, model, router):
    "Steps to be timed at inference, above one trunk"
    ids = torch.randint(3, model.config.vocab_size, (1, a.context), generator=torch.Generator().manual_seed(0))
    g, cache = [one_hot([e], model.stack.slots) for e in (0, 1)], DynamicCache(config=model.config)
    model(input_ids=ids, gates=g[0], past_key_values=cache, use_cache=True, logits_to_keep=1)
    h = run_trunk(model, ids)
    return {'full': lambda: model(input_ids=ids, gates=g[1], past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1),
            'refill': lambda: logits(model, rebuild_cache(model, h, cache, g[1])[:,-1:]), 'router': lambda: router(h)}

def ridge(states, rows, strength=1e-2):
    "A router from the mean of the trunk's states to the experts, by ridge regression"
    x = torch.stack([states([r])[0].float().mean(0) for rs in rows.values() for r in rs])
    y = torch.cat([one_hot([e]*len(rs), len(rows)) for e,rs in enumerate(rows.values())])
    mu = x.mean(0)
    W = torch.linalg.solve((x-mu).T@(x-mu)+strength*x.var()*len(x)*torch.eye(x.shape[1]), (x-mu).T@(y-y.mean(0)))
    W, b = W.to(states.states.dtype), (y.mean(0)-mu@W).to(states.states.dtype)
    return lambda h: torch.addmm(b, h.mean(1), W)

def measure(a, quant):
    "One table"
    names = list((rows := rows_of(a, load_base(a.base, quant))[0]))
    (_, full), (_, forked) = experts(a, quant, names, 0), experts(a, quant, names, a.fork)
    every, epochs = sum(rows.values(), []), (1, 3, 10)
    with tempfile.TemporaryDirectory() as d:
        cache_trunk(forked, every[:2], d, quant) # warm
        built = seconds(lambda: cache_trunk(forked, every, d, quant))
        states = cache_trunk(forked, every, d, quant)
        took, size = trained(a, full, forked, rows, states), (states.path/'trunk.bin').stat().st_size
        with torch.inference_mode(): at = filled(a, forked, ridge(states, rows)); t = in_turn(at, a.rounds)
    whole, part, tokens = (sum(x) for x in zip(*took))
    return dict(train_speedup_half=statistics.median(f/c for f,c,_ in took), refill_vs_full=t['refill']/t['full'], router_vs_prefill_half=t['router']/t['full'],
                full_tokens_s=tokens/whole, cached_tokens_s=tokens/part, build_tokens_s=tokens/built, with_build={n: n*whole/(built+n*part) for n in epochs},
                bytes_a_token=size/len(states.states), fork=forked.stack.fork, blocks=forked.config.num_hidden_layers, steps=len(took), tokens=tokens,
                response_share=sum(len(x.ids)-x.n_prompt for x in every)/tokens, prefill_ms=1e3*t['full'])

def rounded(x): return {k: rounded(v) for k,v in x.items()} if isinstance(x, dict) else float(f'{x:.4g}') if isinstance(x, float) else x

def main():
    a = options()
    if a.fast: a.base, a.domains, a.rows, a.context = 'tiny', 3, 3, 32
    torch.set_num_threads(a.threads)
    with warnings.catch_warnings(action='ignore'): tables = {q: rounded(measure(a, q)) for q in a.quants.split(',')}
    first = next(iter(tables.values()))
    out = {k: first[k] for k in ('train_speedup_half', 'refill_vs_full', 'router_vs_prefill_half')} | dict(tables=tables, conditions=dict(vars(a), torch=torch.__version__))
    if a.json: print(json.dumps(out, indent=1)); return
    for q,t in tables.items(): print(f'\n{q}', *(f'  {k:24} {v}' for k,v in t.items()), sep='\n')

if __name__=='__main__': main()
