"""Forward speed, measured: `python benchmarks/forward.py --json` (20 minutes); `--fast` takes one.

One run measures the bare base, ours (hydramoe.experts.stack) and PEFT, each on its own copy of the same base, one
step of each in turn and round after round, so that whatever disturbs the machine disturbs all; medians. Every number
is relative to the base's own step of the same kind, precision and mode.

Work, equal on all sides: `--rows` rows (8); prefill is one forward over `--context` tokens (128) with logits for the
last position only; decode is one token a row on a DynamicCache that holds the context, taken off again after each
step. Experts are random LoRA of rank 8 on all linear layers.
  decode_9, prefill_9     each row its own softmax mix of all 9; prefill makes the plan and gathers factors, as a
                          generation does
  decode_E_top2           E experts in the stack, each row two of its own
  decode_one              all rows the same expert
  decode_shared           a shared expert and 9 residuals, each row its own softmax mix of all 9; decode_shared_alone:
                          no residual
  swap                    time to change the expert of the next step (gates in, plan out) / the base's decode step
  gather                  milliseconds, once for a generation: plan and factors
  peft_*                  PEFT with 9 adapters: set_adapter (as swap), all rows one adapter, a mixed batch of 8
                          adapters
In compiled mode torch.compile compiles the base, ours and PEFT alike, the model as a whole, dynamic shapes off.
"""
import argparse, gc, json, statistics, time, warnings
from types import SimpleNamespace
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

def opened(args, quant):
    "A copy of the base of its own"
    if args.base=='tiny': return tiny_base(quant=quant)
    return load_base(args.base, quant, args.device)

def soft(B, E, slots, seed=0):
    "Each row its own mix of the first E experts"
    g = torch.softmax(torch.randn(B, E, generator=torch.Generator().manual_seed(seed)), -1)
    return torch.nn.functional.pad(g, (0, slots-E))

def top2(B, E, slots, seed=0):
    "Each row two experts of its own among the first E"
    generator = torch.Generator().manual_seed(seed)
    g = torch.zeros(B, slots)
    for row in g:
        two = torch.randperm(E, generator=generator)[:2]
        row[two] = torch.tensor([.6, .4])
    return g

# ---- seconds

def seconds(f):
    "Of one call, until the device has done all of it"
    if torch.cuda.is_available(): torch.cuda.synchronize()
    began = time.perf_counter()
    f()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter()-began

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

# ---- steps that are timed, the same on all sides

def prefill(model, ids, **kw):
    "One forward over the whole context, with logits for its last position"
    return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1, **kw)

def decode(model, config, ids, within=None, **kw):
    "One decode step on a cache of the whole context, taken back; `within` holds what a generation keeps"
    cache = DynamicCache(config=config)
    token = ids[:,-1:]
    def step(ids=token):
        at = within[0].set(within[1]) if within else None
        try: model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **kw)
        finally:
            if within: within[0].reset(at)
    step(ids)
    def one():
        step()
        cache.crop(-1)
    return one

# ---- the sides

def with_peft(model, rank=8, n=9):
    "The base with n random adapters by PEFT"
    from peft import LoraConfig, get_peft_model
    how = LoraConfig(r=rank, lora_alpha=2*rank, target_modules='all-linear', init_lora_weights=False,
                     task_type='CAUSAL_LM')
    p = get_peft_model(model, how, adapter_name='e0')
    for e in range(1, n): p.add_adapter(f'e{e}', how)
    return p.eval()

def filled(args, quant, slots, shared=False):
    "Our model with experts of noise"
    model = gated(opened(args, quant), slots, LoraSpec(8), shared)
    generator = torch.Generator(model.stack.theta.device).manual_seed(0)
    model.stack.theta.normal_(std=.01, generator=generator)
    return model

def all_sides(args, quant, mode):
    "The bare base, ours, ours with a shared expert, and PEFT, each on its own copy of the base; tokens for all of them"
    torch.manual_seed(0)
    base = opened(args, quant)
    ids = torch.randint(3, base.model.config.vocab_size, (args.rows, args.context), device=base.device)
    ours = filled(args, quant, max(9, *args.experts))
    shared = filled(args, quant, 9, shared=True)
    peft = with_peft(opened(args, quant).model)
    return SimpleNamespace(ids=ids, base=base.model, ours=ours, shared=shared, peft=peft, config=base.model.config,
                           run_base=as_run(base.model, mode), run_ours=as_run(ours, mode), run_peft=as_run(peft, mode))

def as_run(model, mode):
    "A model as it is timed: compiled as a whole, or as it is"
    return torch.compile(model, dynamic=False) if mode=='compiled' else model

def our_gates(args, slots):
    "Which experts each row has in the steps of ours"
    gates = dict(decode_9=soft(args.rows, 9, slots), decode_one=one_hot([0]*args.rows, slots))
    return gates | {f'decode_{E}_top2': top2(args.rows, E, slots) for E in args.experts}

def mixed_batch(rows):
    "What PEFT is told if each row has an adapter of its own"
    return dict(adapter_names=[f'e{e%9}' for e in range(rows)])

# ---- what is measured, one kind of steps after the other

def decode_steps(args, sides, gates, mode):
    "A decode step of the base, of ours under each of its gates, of a shared expert, and of PEFT"
    def ours(run, model, g):
        return decode(run, sides.config, sides.ids, (model.keep, {}), gates=g.to(sides.ids.device))
    residuals = dict(decode_shared=soft(args.rows, 9, 9), decode_shared_alone=torch.zeros(args.rows, 9))
    steps = {'base': decode(sides.run_base, sides.config, sides.ids)}
    steps |= {name: ours(sides.run_ours, sides.ours, g) for name,g in gates.items()}
    steps |= {name: ours(as_run(sides.shared, mode), sides.shared, g) for name,g in residuals.items()}
    steps['peft_decode_one'] = decode(sides.run_peft, sides.config, sides.ids)
    if mode=='eager':
        steps['peft_decode_mixed_8'] = decode(sides.run_peft, sides.config, sides.ids, **mixed_batch(args.rows))
    return steps

def prefill_steps(args, sides, gates, mode):
    "A prefill of the base, of ours with a mix of nine and with two of the largest stack, and of PEFT"
    top = f'{args.experts[-1]}_top2'
    steps = {'base_prefill': prefill(sides.run_base, sides.ids),
             'prefill_9': prefill(sides.run_ours, sides.ids, gates=gates['decode_9']),
             f'prefill_{top}': prefill(sides.run_ours, sides.ids, gates=gates[f'decode_{top}'])}
    if mode=='eager': steps['peft_prefill_mixed_8'] = prefill(sides.run_peft, sides.ids, **mixed_batch(args.rows))
    return steps

def swaps(model, rows, rounds):
    "Median seconds to change experts: new gates, their plan, and the way to its factors"
    gates = [one_hot([e]*rows, model.stack.slots) for e in range(9)]
    took = []
    for _ in range(rounds):
        for g in gates: took.append(seconds(lambda: make_plan(g, model.stack).keep().factors(0, model.base.dtype)))
    return statistics.median(took[len(gates):]) # the first round does not count

def gathers(model, gates):
    "Median seconds of a plan made anew for each group of layers, and of its factors"
    def gather():
        groups = range(len(model.stack.groups))
        return [make_plan(gates, model.stack).keep().factors(g, model.base.dtype) for g in groups]
    return statistics.median(seconds(gather) for _ in range(5))

def peft_swaps(peft):
    "Median seconds in which PEFT changes to each of its nine adapters, twice"
    names = [f'e{e}' for e in range(9)]
    return statistics.median(seconds(lambda: peft.set_adapter(name)) for name in names+names)

def measure(args, quant, mode):
    "One table: seconds of every step"
    sides = all_sides(args, quant, mode)
    gates = our_gates(args, sides.ours.stack.slots)
    decodes = decode_steps(args, sides, gates, mode)
    prefills = prefill_steps(args, sides, gates, mode)
    took = in_turn(decodes, args.rounds)
    took |= in_turn(prefills, max(3, args.rounds//3))
    took['swap'] = swaps(sides.ours, args.rows, args.rounds)
    took['gather'] = gathers(sides.ours, gates['decode_9'])
    took['peft_set_adapter'] = peft_swaps(sides.peft)
    return took

def relative(took):
    "To the base's step of the same kind; gather stays milliseconds"
    def of_base(name): return took['base_prefill' if 'prefill' in name else 'base']
    others = [name for name in took if name not in ('base', 'base_prefill', 'gather')]
    table = {name: round(took[name]/of_base(name), 4) for name in others}
    return table | dict(gather_ms=round(1e3*took['gather'], 1), base_decode_ms=round(1e3*took['base'], 2),
                        base_prefill_ms=round(1e3*took['base_prefill'], 1))

def main():
    p = options(__doc__, '9,64,256', 30)
    p.add_argument('--precisions', default='fp32,bf16')
    p.add_argument('--modes', default='eager', help='eager,compiled')
    args = p.parse_args()
    if args.fast: vars(args).update(base='tiny', rounds=3, experts='9,64', context=16)
    args.experts = [int(e) for e in args.experts.split(',')]
    torch.set_num_threads(args.threads)
    tables = {}
    with torch.inference_mode(), warnings.catch_warnings(action='ignore'):
        for quant in args.precisions.split(','):
            for mode in args.modes.split(','):
                tables[f'{quant}_{mode}'] = relative(measure(args, quant, mode))
                gc.collect()
    first = next(iter(tables.values()))
    keys = ['swap', 'decode_9', 'decode_shared', 'prefill_9', *(f'decode_{E}_top2' for E in args.experts)]
    conditions = dict(vars(args), torch=torch.__version__, work=__doc__.split('\n\n')[2])
    out = {k: first[k] for k in keys} | dict(tables=tables, conditions=conditions)
    if args.json:
        print(json.dumps(out, indent=1))
        return
    for name,t in tables.items():
        print(f'\n{name} (base: decode {t["base_decode_ms"]} ms, prefill {t["base_prefill_ms"]} ms)')
        for k,v in t.items(): print(f'  {k:22} {v:8.4f}')

if __name__=='__main__': main()
