"""Many experts on one base, measured: `python benchmarks/scale.py --json` (some ten minutes on two cores);
`--fast` takes a minute.

For E = 1, 2, 4 … 256 experts of rank 8 on all linear layers, in one stack, on one base, `--rows` rows (8),
`--context` tokens (128) of context, all relative to the bare base, measured in turn with it, medians:
  stack_mib      memory of the experts; rss_mib is the process's peak by then
  decode_one     a decode step, all rows one expert
  decode_top2    a decode step, each row two experts of its own
  swap_us        microseconds from new gates to a plan
And the shelf: E experts as PEFT adapters on disk, `--slots` (16) of them in the stack and half of them in RAM; requests
of one expert, drawn by Zipf's law: share found on device, in RAM, on disk, and milliseconds each.
`--plot FILE` draws latency and memory over E.
"""
import json, resource, statistics, sys, tempfile, warnings
from pathlib import Path
import torch
from hydramoe.foundations.core import rng
from hydramoe.experts.stack import LoraSpec
from hydramoe.experts.gates import make_plan, one_hot
from hydramoe.experts.model import gated
from hydramoe.experts.pool import ExpertPool
sys.path.insert(0, str(Path(__file__).parent))
from forward import decode, in_turn, opened, options, seconds, top2

def noise(expert, seed):
    "Make an expert random, in place"
    expert.normal_(std=.01, generator=torch.Generator(expert.device).manual_seed(seed))

def fill(stack):
    "Random experts, row by row"
    for e in range(stack.slots): noise(stack.theta[e], e)
    stack.names = [f'expert{e}' for e in range(stack.slots)]

def step_gates(rows, E):
    "One expert for all rows; two of its own for each row, if there are two"
    one = one_hot([0]*rows, E)
    return dict(decode_one=one, decode_top2=top2(rows, E, E) if E>1 else one)

def swap_seconds(model, rows, E):
    "Median seconds from new gates to a plan, all rows one expert"
    def swap(e): return seconds(lambda: make_plan(one_hot([e%E]*rows, E), model.stack).keep())
    return statistics.median(swap(e) for e in range(20))

def point(args, E, bare, ids):
    "One number of experts"
    model = gated(opened(args, args.quant), E, LoraSpec(8))
    fill(model.stack)
    gates = step_gates(args.rows, E)
    steps = {k: decode(model, model.config, ids, (model.keep, {}), gates=g) for k,g in gates.items()}
    took = in_turn(dict(base=bare, **steps), args.rounds)
    swap = swap_seconds(model, args.rows, E)
    stack_mib = model.stack.theta.nbytes/2**20
    rss_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**10
    decodes = {k: round(took[k]/took['base'], 4) for k in gates}
    return dict(E=E, stack_mib=round(stack_mib, 1), rss_mib=round(rss_mib), swap_us=round(1e6*swap, 1), **decodes,
                base_decode_ms=round(1e3*took['base'], 2))

def saved(stack, E, folder):
    "E random experts as PEFT adapters on disk: name → folder"
    folders = {}
    for e in range(E):
        noise(stack.theta[0], e)
        folders[f'expert{e}'] = stack.save_peft(Path(folder)/f'expert{e}', 0)
    return folders

def ask(pool, name):
    "Seconds until the stack holds an expert, and where it was found: on the device, in RAM, or on disk"
    before = dict(pool.found)
    def one():
        with pool.gates([{name: 1.}]): pass
    took = seconds(one)
    place = next(place for place in ('device', 'ram', 'disk') if pool.found[place]>before.get(place, 0))
    return place, took

def shelf(args, E, tmp):
    "E experts on disk, few in the stack"
    model = gated(opened(args, args.quant), min(args.slots, E), LoraSpec(8))
    fill(model.stack)
    folders = saved(model.stack, E, tmp)
    pool = ExpertPool(model.stack, folders, E//2*model.stack.theta[0].nbytes)
    took = dict(device=[], ram=[], disk=[])
    for e in (rng(0, 'zipf').zipf(1.3, args.requests)-1)%E:
        place, spent = ask(pool, f'expert{e}')
        took[place].append(spent)
    def told(spent): return dict(share=round(len(spent)/args.requests, 3), ms=round(1e3*statistics.median(spent), 3))
    return {place: told(spent) for place,spent in took.items() if spent}

def plot(points, path):
    "Latency and memory over E"
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, (latency, memory) = plt.subplots(1, 2, figsize=(8, 3))
    E = [p['E'] for p in points]
    latency.plot(E, [p['decode_top2'] for p in points], 'o-', label='two experts a row')
    latency.plot(E, [p['decode_one'] for p in points], 'o-', label='one expert')
    latency.axhline(1, color='gray', ls=':', label='bare base')
    latency.set(xscale='log', xlabel='experts', ylabel='decode step / base', ylim=(0, 1.4))
    latency.legend(frameon=False, loc='lower right')
    memory.plot(E, [p['stack_mib'] for p in points], 'o-')
    memory.set(xscale='log', yscale='log', xlabel='experts', ylabel='MiB of experts, fp32')
    fig.tight_layout()
    fig.savefig(path)

def main():
    p = options(__doc__, '1,2,4,8,16,32,64,128,256', 20)
    p.add_argument('--plot', help='a file to draw into')
    p.add_argument('--quant', default='fp32')
    p.add_argument('--slots', type=int, default=16)
    p.add_argument('--requests', type=int, default=300)
    args = p.parse_args()
    if args.fast: vars(args).update(base='tiny', experts='1,4,16', slots=4, rounds=3, requests=40, context=16)
    Es = [int(e) for e in args.experts.split(',')]
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.inference_mode(), warnings.catch_warnings(action='ignore'), tempfile.TemporaryDirectory() as tmp:
        base = opened(args, args.quant)
        ids = torch.randint(3, base.model.config.vocab_size, (args.rows, args.context), device=base.device)
        bare = decode(base.model, base.model.config, ids)
        points = [point(args, E, bare, ids) for E in Es]
        found = shelf(args, Es[-1], tmp)
    settings = {k: v for k,v in vars(args).items() if k!='plot'}
    out = dict(points=points, shelf=found, conditions=dict(settings, torch=torch.__version__))
    if args.plot: plot(points, args.plot)
    if args.json:
        print(json.dumps(out, indent=1))
        return
    for q in points: print(*(f'{k} {v}' for k,v in q.items()), sep='  ')
    print('shelf', out['shelf'])

if __name__=='__main__': main()
