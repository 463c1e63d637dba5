"""Many experts on one base, measured: `python benchmarks/scale.py --json` (some ten minutes on two cores); `--fast` takes a minute.

For E = 1, 2, 4 … 256 experts of rank 8 on all linear layers, in one stack, on one base, `--rows` rows (8), `--context`
tokens (128) of context, all relative to the bare base, measured in turn with it, medians:
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

def fill(stack, seed=0):
    "Random experts, row by row"
    for e in range(stack.slots): stack.theta[e].normal_(std=.01, generator=torch.Generator(stack.theta.device).manual_seed(e))
    stack.names = [f'expert{e}' for e in range(stack.slots)]

def point(args, E, bare, ids):
    "One number of experts"
    model = gated(opened(args, args.quant), E, LoraSpec(8))
    fill(model.stack)
    cfg, gates = model.config, {'decode_one': one_hot([0]*args.rows, E), 'decode_top2': top2(args.rows, E, E) if E>1 else one_hot([0]*args.rows, E)}
    took = in_turn({'base': bare, **{k: decode(model, cfg, ids, (model.keep, {}), gates=g) for k,g in gates.items()}}, args.rounds)
    swap = [seconds(lambda: make_plan(one_hot([e%E]*args.rows, E), model.stack).keep()) for e in range(20)]
    return dict(E=E, stack_mib=round(model.stack.theta.nbytes/2**20, 1), rss_mib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**10),
                swap_us=round(1e6*statistics.median(swap), 1), **{k: round(took[k]/took['base'], 4) for k in gates}, base_decode_ms=round(1e3*took['base'], 2))

def shelf(args, E, tmp):
    "E experts on disk, few in the stack"
    model = gated(opened(args, args.quant), min(args.slots, E), LoraSpec(8))
    fill(model.stack)
    folders = {}
    for e in range(E):
        model.stack.theta[0].normal_(std=.01, generator=torch.Generator(model.stack.theta.device).manual_seed(e))
        folders[f'expert{e}'] = model.stack.save_peft(Path(tmp)/f'expert{e}', 0)
    s, took = ExpertPool(model.stack, folders, E//2*model.stack.theta[0].nbytes), {'device': [], 'ram': [], 'disk': []}
    for e in (rng(0, 'zipf').zipf(1.3, args.requests)-1)%E:
        before = dict(s.found)
        def ask():
            with s.gates([{f'expert{e}': 1.}]): pass
        t = seconds(ask)
        took[next(k for k in took if s.found[k]>before.get(k, 0))].append(t)
    return {k: dict(share=round(len(v)/args.requests, 3), ms=round(1e3*statistics.median(v), 3)) for k,v in took.items() if v}

def plot(points, path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, (a, b) = plt.subplots(1, 2, figsize=(8, 3))
    for k,label in (('decode_top2', 'two experts a row'), ('decode_one', 'one expert')): a.plot([p['E'] for p in points], [p[k] for p in points], 'o-', label=label)
    a.axhline(1, color='gray', ls=':', label='bare base')
    b.plot([p['E'] for p in points], [p['stack_mib'] for p in points], 'o-')
    a.set(xscale='log', xlabel='experts', ylabel='decode step / base', ylim=(0, 1.4)); a.legend(frameon=False, loc='lower right')
    b.set(xscale='log', yscale='log', xlabel='experts', ylabel='MiB of experts, fp32')
    fig.tight_layout(); fig.savefig(path)

def main():
    p = options(__doc__, '1,2,4,8,16,32,64,128,256', 20)
    p.add_argument('--plot', help='a file to draw into')
    p.add_argument('--quant', default='fp32')
    p.add_argument('--slots', type=int, default=16)
    p.add_argument('--requests', type=int, default=300)
    args = p.parse_args()
    if args.fast: args.base, args.experts, args.slots, args.rounds, args.requests, args.context = 'tiny', '1,4,16', 4, 3, 40, 16
    Es = [int(e) for e in args.experts.split(',')]
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.inference_mode(), warnings.catch_warnings(action='ignore'), tempfile.TemporaryDirectory() as tmp:
        base = opened(args, args.quant)
        ids = torch.randint(3, base.model.config.vocab_size, (args.rows, args.context), device=base.device)
        bare = decode(base.model, base.model.config, ids)
        points = [point(args, E, bare, ids) for E in Es]
        out = dict(points=points, shelf=shelf(args, Es[-1], tmp), conditions=dict({k: v for k,v in vars(args).items() if k!='plot'}, torch=torch.__version__))
    if args.plot: plot(points, args.plot)
    if args.json: print(json.dumps(out, indent=1)); return
    for q in points: print(*(f'{k} {v}' for k,v in q.items()), sep='  ')
    print('shelf', out['shelf'])

if __name__=='__main__': main()
