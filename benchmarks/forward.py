"""Forward speed, measured: `python benchmarks/forward.py --json` (some 20 minutes on two cores); `--fast` takes a minute.

One run measures the bare base, ours (hydramoe.experts.stack) and PEFT, each on its own copy of the same base, one step of each in
turn and round after round, so that whatever disturbs the machine disturbs all; medians. Every number is relative to the
base's own step of the same kind, precision and mode.

Work, equal on all sides: `--rows` rows (8); prefill is one forward over `--context` tokens (128) with logits for the last
position only; decode is one token a row on a DynamicCache that holds the context, taken off again after each step. Experts
are random LoRA of rank 8 on all linear layers.
  decode_9, prefill_9     each row its own softmax mix of all 9; prefill makes the plan and gathers factors, as a generation does
  decode_E_top2           E experts in the stack, each row two of its own
  decode_one              all rows the same expert
  decode_shared           a shared expert and 9 residuals, each row its own softmax mix of all 9; decode_shared_alone: no residual
  swap                    time to change the expert of the next step (gates in, plan out) / the base's decode step
  gather                  milliseconds, once for a generation: plan and factors
  peft_*                  PEFT with 9 adapters: set_adapter (as swap), all rows one adapter, a mixed batch of 8 adapters
In compiled mode torch.compile compiles the base, ours and PEFT alike, the model as a whole, dynamic shapes off.
"""
import argparse, gc, json, statistics, time, warnings
import torch
from transformers import DynamicCache
from hydramoe.models.base import tiny_base
from hydramoe.models.load import load_base
from hydramoe.experts.stack import LoraSpec
from hydramoe.experts.gates import make_plan, one_hot
from hydramoe.experts.model import gated

def options(doc, experts, rounds):
    "What this benchmark and scale.py both ask"
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--json', action='store_true', help='print one JSON object and nothing else')
    p.add_argument('--fast', action='store_true', help='a tiny base, few rounds: does it run?')
    p.add_argument('--base', default='smollm2')
    p.add_argument('--device', default='cpu')
    p.add_argument('--experts', default=experts, help='sizes of the stack')
    p.add_argument('--rows', type=int, default=8)
    p.add_argument('--context', type=int, default=128)
    p.add_argument('--rounds', type=int, default=rounds)
    p.add_argument('--threads', type=int, default=2)
    return p

def opened(args, quant): return tiny_base(quant=quant) if args.base=='tiny' else load_base(args.base, quant, args.device)

def soft(B, E, slots, seed=0):
    "Each row its own mix of the first E experts"
    g = torch.softmax(torch.randn(B, E, generator=torch.Generator().manual_seed(seed)), -1)
    return torch.nn.functional.pad(g, (0, slots-E))

def top2(B, E, slots, seed=0):
    "Each row two experts of its own among the first E"
    r, g = torch.Generator().manual_seed(seed), torch.zeros(B, slots)
    for row in g: row[torch.randperm(E, generator=r)[:2]] = torch.tensor([.6, .4])
    return g

def seconds(f):
    torch.cuda.is_available() and torch.cuda.synchronize()
    t = time.perf_counter(); f()
    torch.cuda.is_available() and torch.cuda.synchronize()
    return time.perf_counter()-t

def every_round(steps, rounds):
    "Seconds of each step, round by round; every round runs each once, after one round that does not count"
    for f in steps.values(): f()
    took = {k: [] for k in steps}
    for _ in range(rounds):
        for k,f in steps.items(): took[k].append(seconds(f))
    return took

def in_turn(steps, rounds):
    "Median seconds of each step"
    return {k: statistics.median(v) for k,v in every_round(steps, rounds).items()}

def prefill(model, ids, **kw): return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1, **kw)

def decode(model, config, ids, within=None, **kw):
    "One decode step on a cache of the whole context, taken back; `within` holds what a generation keeps"
    cache, token = DynamicCache(config=config), ids[:,-1:]
    def step(ids=token):
        at = within[0].set(within[1]) if within else None
        try: model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **kw)
        finally: within and within[0].reset(at)
    step(ids)
    def one(): step(); cache.crop(-1)
    return one

def with_peft(model, rank=8, n=9):
    "The base with n random adapters by PEFT"
    from peft import LoraConfig, get_peft_model
    how = LoraConfig(r=rank, lora_alpha=2*rank, target_modules='all-linear', init_lora_weights=False, task_type='CAUSAL_LM')
    p = get_peft_model(model, how, adapter_name='e0')
    for e in range(1, n): p.add_adapter(f'e{e}', how)
    return p.eval()

def swaps(model, rows, slots, rounds):
    "Median seconds to change experts: new gates, their plan, and the way to its factors"
    gates, took = [one_hot([e]*rows, slots) for e in range(9)], []
    for _ in range(rounds):
        for g in gates: took.append(seconds(lambda: make_plan(g, model.stack).keep().factors(0, model.base.dtype)))
    return statistics.median(took[len(gates):])

def filled(args, quant, slots, shared=False):
    "Our model with experts of noise"
    model = gated(opened(args, quant), slots, LoraSpec(8), shared)
    model.stack.theta.normal_(std=.01, generator=torch.Generator(model.stack.theta.device).manual_seed(0))
    return model

def ours(args, quant, slots, ids):
    "Our model of `slots` experts and its steps"
    model = filled(args, quant, slots)
    mixes = {'decode_9': soft(args.rows, 9, slots), 'decode_one': one_hot([0]*args.rows, slots)} | {f'decode_{E}_top2': top2(args.rows, E, slots) for E in args.experts}
    return model, mixes

def measure(args, quant, mode):
    "One table: seconds of every step"
    torch.manual_seed(0)
    base = opened(args, quant)
    ids = torch.randint(3, base.model.config.vocab_size, (args.rows, args.context), device=base.device)
    model, mixes = ours(args, quant, max(9, *args.experts), ids)
    beside = filled(args, quant, 9, shared=True)
    peft = with_peft(opened(args, quant).model)
    run = (lambda m: torch.compile(m, dynamic=False)) if mode=='compiled' else (lambda m: m)
    cfg, bare, mine, theirs = base.model.config, run(base.model), run(model), run(peft)
    residuals = dict(decode_shared=soft(args.rows, 9, 9), decode_shared_alone=torch.zeros(args.rows, 9))
    who = dict(adapter_names=[f'e{e%9}' for e in range(args.rows)])
    steps = {'base': decode(bare, cfg, ids), **{k: decode(mine, cfg, ids, (model.keep, {}), gates=g.to(base.device)) for k,g in mixes.items()},
             **{k: decode(run(beside), cfg, ids, (beside.keep, {}), gates=g.to(base.device)) for k,g in residuals.items()},
             'peft_decode_one': decode(theirs, cfg, ids)}
    if mode=='eager': steps['peft_decode_mixed_8'] = decode(theirs, cfg, ids, **who)
    out, most = in_turn(steps, args.rounds), args.experts[-1]
    pre = {'base_prefill': prefill(bare, ids), 'prefill_9': prefill(mine, ids, gates=mixes['decode_9']), f'prefill_{most}_top2': prefill(mine, ids, gates=mixes[f'decode_{most}_top2'])}
    if mode=='eager': pre['peft_prefill_mixed_8'] = prefill(theirs, ids, **who)
    out |= in_turn(pre, max(3, args.rounds//3))
    out['swap'] = swaps(model, args.rows, model.stack.slots, args.rounds)
    out['gather'] = statistics.median(seconds(lambda: [make_plan(mixes['decode_9'], model.stack).keep().factors(g, model.base.dtype) for g in range(len(model.stack.groups))]) for _ in range(5))
    names = [f'e{e}' for e in range(9)]
    out['peft_set_adapter'] = statistics.median(seconds(lambda: peft.set_adapter(n)) for n in names+names)
    return out

def relative(s):
    "To the base's step of the same kind; gather stays milliseconds"
    r = {k: round(v/s['base_prefill' if 'prefill' in k else 'base'], 4) for k,v in s.items() if k not in ('base', 'base_prefill', 'gather')}
    return r | {'gather_ms': round(1e3*s['gather'], 1), 'base_decode_ms': round(1e3*s['base'], 2), 'base_prefill_ms': round(1e3*s['base_prefill'], 1)}

def main():
    p = options(__doc__, '9,64,256', 30)
    p.add_argument('--precisions', default='fp32,bf16')
    p.add_argument('--modes', default='eager', help='eager,compiled')
    args = p.parse_args()
    if args.fast: args.base, args.rounds, args.experts, args.context = 'tiny', 3, '9,64', 16
    args.experts = [int(e) for e in args.experts.split(',')]
    torch.set_num_threads(args.threads)
    tables = {}
    with torch.inference_mode(), warnings.catch_warnings(action='ignore'):
        for quant in args.precisions.split(','):
            for mode in args.modes.split(','):
                tables[f'{quant}_{mode}'] = relative(measure(args, quant, mode)); gc.collect()
    first = next(iter(tables.values()))
    keys = ['swap', 'decode_9', 'decode_shared', 'prefill_9', *(f'decode_{E}_top2' for E in args.experts)]
    out = {k: first[k] for k in keys} | dict(tables=tables, conditions=dict(vars(args), torch=torch.__version__, work=__doc__.split('\n\n')[2]))
    if args.json: print(json.dumps(out, indent=1)); return
    for name,t in tables.items(): print(f'\n{name} (base: decode {t["base_decode_ms"]} ms, prefill {t["base_prefill_ms"]} ms)', *(f'  {k:22} {v:8.4f}' for k,v in t.items()), sep='\n')

if __name__=='__main__': main()
