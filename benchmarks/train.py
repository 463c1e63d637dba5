"""Nine experts trained fused, against TRL's SFTTrainer + PEFT training them one after the other.

    python benchmarks/train.py                a table
    python benchmarks/train.py --json         vs_trl_bf16, vs_trl_fp32: tokens a second, ours ÷ TRL's; memory_vs_trl:
                                              peak memory, ours ÷ TRL's; quality_gap: held-out loss, ours ÷ TRL's − 1;
                                              bare_vs_trl_*: the base alone, forward and backward, ÷ TRL's: the most
                                              that ours could reach; shared_vs_fused: seconds of a step with a shared
                                              expert and as many residuals ÷ of a fused step of plain experts; and
                                              tables
    python benchmarks/train.py --base tiny --domains 3 --rows 6 --steps 3       seconds, to see that it works

Both sides get the same base in the same precision (bf16: weights and products in bf16, adapters, their gradients and
AdamW in fp32, on TRL's side through autocast), the same fresh adapters, the same rows in the same order with the same
batches for each expert, the same activation checkpointing. Tokens are counted without padding. The first steps of
every trainer are left out, and so is all preparation. For memory, TRL gets batches of as many tokens as ours has
under way at once, as if they were of one expert. Every measurement has a process of its own, since memory is its
peak. `shared_vs_fused` has one for both of its sides: they take the same steps of the same rows, in the same passes,
in turn.
"""
import argparse, json, os, resource, statistics, subprocess, sys, tempfile, time, warnings
from pathlib import Path

def options():
    how = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=how)
    p.add_argument('--base', default='smollm2', help="'smollm2', 'tiny', a path or a Hub id")
    p.add_argument('--domains', type=int, default=9, help='experts')
    p.add_argument('--rows', type=int, default=20, help='rows of each expert')
    p.add_argument('--batch', type=int, default=2, help='rows of an expert in a step')
    p.add_argument('--steps', type=int, default=None, help='stop after so many steps')
    p.add_argument('--warm', type=int, default=1, help='first steps of each trainer that are left out')
    p.add_argument('--held', type=int, default=6, help='held-out rows of each domain')
    p.add_argument('--length', type=int, default=300, help='tokens of the longest prompt, and of the longest answer')
    p.add_argument('--micro', type=int, default=1400,
                   help='tokens that ours has under way at once: in one forward, or in lanes of one thread each')
    p.add_argument('--rank', type=int, default=8)
    p.add_argument('--lr', type=float, default=5e-4)
    p.add_argument('--checkpointing', action='store_true', help='recompute activations, on both sides')
    p.add_argument('--quants', default='bf16,fp32', help='precisions to compare')
    p.add_argument('--trl-weights', choices=['same', 'fp32'], default='same',
                   help="the base under TRL's bf16: in bf16 as ours, or in fp32 under autocast, TRL's own default")
    p.add_argument('--threads', type=int, default=None, help='of torch; default: all of this machine')
    p.add_argument('--repeat', type=int, default=1, help='times each side is measured, in turn; the median counts')
    p.add_argument('--cpu-clock', action='store_true',
                   help='count processor time, for a machine that is not quiet (with --threads 1)')
    p.add_argument('--no-memory', action='store_true', help='leave memory out')
    p.add_argument('--json', action='store_true')
    p.add_argument('--side', help=argparse.SUPPRESS)
    p.add_argument('--quant', help=argparse.SUPPRESS)
    p.add_argument('--work', help=argparse.SUPPRESS)
    return p.parse_args()

def rows_of(a, base):
    "Training and held-out rows of each domain: records of the data cards, or made in code for the tiny base"
    from hydramoe.foundations.files import read_jsonl
    from hydramoe.models.encode import encode
    from hydramoe.data.records import DOMAINS
    from hydramoe.data.cards import cards_digest
    from hydramoe.foundations.store import stage
    from hydramoe.data.unified_card import toy_unify_stage, unify_stage
    toy = a.base=='tiny'
    params = dict(tokens_per_domain=400*a.rows, dev=1, test=a.held, max_length=a.length, seed=0,
                  cards='' if toy else cards_digest())
    data = stage(toy_unify_stage if toy else unify_stage, params)
    def encoded(part): return [encode(r, base.tokenizer, a.length, a.length) for r in read_jsonl(data/f'{part}.jsonl')]
    parts = dict(experts=encoded('experts'), test=encoded('test'))
    def of(part, most): return {d: [x for x in parts[part] if x and x.domain==d][:most] for d in DOMAINS[:a.domains]}
    train = of('experts', a.rows)
    short = [d for d,rows in train.items() if len(rows)<a.rows]
    if short: print(f'fewer than {a.rows} rows: {", ".join(short)}', file=sys.stderr)
    return train, of('test', a.held)

def prepared(a, theirs=False):
    "Base, spec, training and held-out rows, and the steps of the fused run"
    import torch
    from hydramoe.foundations.core import default_threads
    from hydramoe.models.load import load_base
    from hydramoe.experts.train import TrainSpec, plan_steps
    torch.set_num_threads(a.threads or default_threads())
    base = load_base(a.base, 'fp32' if theirs and a.trl_weights=='fp32' else a.quant)
    rows, held = rows_of(a, base)
    spec = TrainSpec(lr=a.lr, rows=a.batch, micro_tokens=a.micro, warmup=2)
    steps = plan_steps(list(rows.values()), list(rows), spec)[:a.steps]
    return base, spec, rows, held, steps

def lora(a):
    "The shape of an expert"
    from hydramoe.experts.stack import LoraSpec
    return LoraSpec(rank=a.rank, alpha=2*a.rank)

def start(a, base, names):
    "Fresh adapters, the same for both sides"
    import hydramoe.experts.adapters # noqa: F401, gives stacks save_peft and load_peft
    from hydramoe.experts.model import gated
    if (Path(a.work)/'start').exists(): return
    model = gated(base, slots=1, spec=lora(a))
    for n in names:
        model.stack.init_expert(0, 0, n)
        model.stack.save_peft(Path(a.work)/'start'/n, 0)
    model.detach()

# ---- what each side is measured by

def clock(a):
    "The time of day, or that of the processor"
    return time.process_time() if a.cpu_clock else time.perf_counter()

def peak():
    "GiB that this process had at most"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20

def tokens(rows):
    "Of all rows, without padding"
    return sum(len(x.ids) for x in rows)

def result(a, steps, seconds):
    "Tokens and seconds of all steps but the first ones, and memory"
    counted = sum(tokens([x for _,x in step]) for step in steps[a.warm:])
    return dict(tokens=counted, seconds=sum(seconds[a.warm:]), memory=peak())

# ---- the sides, each in a process of its own

def ours(a):
    "All experts fused"
    from hydramoe.experts.train import Optimizers, fit_step
    from hydramoe.experts.train import training_mode
    from hydramoe.experts.model import gated
    base, spec, rows, _, steps = prepared(a)
    names = list(rows)
    start(a, base, names)
    model = gated(base, slots=len(names), spec=lora(a))
    for e,n in enumerate(names): model.stack.load_peft(Path(a.work)/'start'/n, e, n)
    with training_mode(model, a.checkpointing):
        opt = Optimizers(model.stack, [len(batches_of(steps, e)) for e in range(len(names))], spec)
        seconds = []
        for k,step in enumerate(steps):
            began = clock(a)
            fit_step(model, opt, step, k, names)
            seconds.append(clock(a)-began)
    for e,n in enumerate(names): model.stack.save_peft(Path(a.work)/a.quant/'ours'/n, e)
    return result(a, steps, seconds)

def batches_of(steps, expert):
    "The rows of one expert in each step that has any"
    batches = [[x for e,x in step if e==expert] for step in steps]
    return [batch for batch in batches if batch]

def bare(a):
    """The base alone on the passes of the fused run: forward, loss and the way back to its embeddings, which no
    training of adapters in all layers can do without"""
    from concurrent.futures import ThreadPoolExecutor
    import torch
    from hydramoe.experts.train import deal_passes, n_replicas, make_passes, shard_passes, using_threads
    from hydramoe.experts.score import token_losses
    from hydramoe.experts.gates import base_plan
    from hydramoe.experts.model import gated, using
    from hydramoe.experts.packing import packed_attention
    base, spec, _, _, steps = prepared(a)
    base.model.enable_input_require_grads()
    model = gated(base, 1, lora(a))
    seconds = []
    n = n_replicas(model, spec)
    def lane(step, passes):
        "Some passes, one after the other"
        for rows,_ in passes:
            with using(base_plan(model.stack)):
                token_losses(model, [step[i][1] for i in rows], packed=True).sum().backward()
    def take(step, pool):
        "A step, its passes dealt to lanes as the fused run deals them"
        lengths = [len(x.ids) for _,x in step]
        passes = shard_passes(make_passes([e for e,_ in step], lengths, spec.micro_tokens//n, n))
        dealt = deal_passes(passes, lengths, n)
        with using_threads(max(1, torch.get_num_threads()//n)):
            list(pool.map(lambda passes: lane(step, passes), dealt))
    with packed_attention(model), ThreadPoolExecutor(n) as pool:
        for step in steps:
            began = clock(a)
            take(step, pool)
            seconds.append(clock(a)-began)
    return result(a, steps, seconds)

def timer(a):
    "A trainer's callback that notes when each step begins and ends"
    from transformers import TrainerCallback
    class Timer(TrainerCallback):
        def __init__(self): self.seconds = []
        def on_step_begin(self, *args, **kw): self.began = clock(a)
        def on_step_end(self, *args, **kw): self.seconds.append(clock(a)-self.began)
    return Timer()

def trl(a):
    "One expert after the other"
    from hydramoe.experts.train import fit_trl
    base, spec, rows, _, steps = prepared(a, True)
    start(a, base, rows)
    total = dict(tokens=0, seconds=0.)
    for e,n in enumerate(rows):
        batches = batches_of(steps, e)
        watch = timer(a)
        begin, end = Path(a.work)/'start'/n, Path(a.work)/a.quant/'trl'/n
        fit_trl(base, batches, begin, end, spec, a.checkpointing, a.quant=='bf16', [watch])
        total['tokens'] += sum(map(tokens, batches[a.warm:]))
        total['seconds'] += sum(watch.seconds[a.warm:])
    return dict(total, memory=peak())

def shared(a):
    "Step by step in turn: a shared expert with residuals, and as many plain experts, on two copies of the base"
    from hydramoe.models.load import load_base
    from hydramoe.experts.train import Optimizers, fit_step, training_mode
    from hydramoe.experts.shared import ResidualSpec, SharedOptimizers, shared_step
    from hydramoe.experts.model import gated
    base, spec, rows, _, steps = prepared(a)
    names = list(rows)
    plain = gated(base, len(names), lora(a))
    both = gated(load_base(a.base, a.quant), len(names), lora(a), shared=True)
    for stack in (plain.stack, both.stack):
        for e in range(len(stack.theta)): stack.init_expert(e, e)
    totals = [len(steps)]*(len(names)+1)
    seconds = dict(fused=[], shared=[])
    with training_mode(plain, a.checkpointing), training_mode(both, a.checkpointing):
        fused = Optimizers(plain.stack, totals[1:], spec)
        mixed = SharedOptimizers(both.stack, totals, spec, ResidualSpec())
        def take_fused(step, k): fit_step(plain, fused, step, k, names)
        def take_shared(step, k): shared_step(both, mixed, step, k, [*names, 'shared'])
        turns = [('fused', take_fused), ('shared', take_shared)]
        for k,step in enumerate(steps):
            order = turns if k%2==0 else turns[::-1] # who begins changes from step to step
            for name,take in order:
                began = clock(a)
                take(step, k)
                seconds[name].append(clock(a)-began)
    seconds = {name: took[a.warm:] for name,took in seconds.items()}
    ratios = [s/f for s,f in zip(seconds['shared'], seconds['fused'])]
    medians = {name: statistics.median(took) for name,took in seconds.items()}
    return medians | dict(ratio=statistics.median(ratios), ratios=ratios)

def trl_memory(a):
    "TRL with as many rows in a forward as ours"
    from hydramoe.experts.train import fit_trl
    from hydramoe.experts.score import micro_batches
    base, spec, rows, _, steps = prepared(a, True)
    start(a, base, rows)
    batches = []
    for step in steps[:2]:
        together = micro_batches([len(x.ids) for _,x in step], a.micro)
        batches += [[step[i][1] for i in batch] for batch in together]
    begin, end = Path(a.work)/'start'/next(iter(rows)), Path(a.work)/'scrap'
    fit_trl(base, batches, begin, end, spec, a.checkpointing, a.quant=='bf16')
    return dict(memory=peak())

def mean_loss(model, rows, gates):
    "Over the tokens of all answers"
    from hydramoe.experts.score import response_losses
    total = sum(map(sum, response_losses(model, rows, gates)))
    return float(total/sum(len(x.ids)-x.n_prompt for x in rows))

def score(a):
    "Held-out loss of each side's experts, each on its own domain"
    import torch
    from hydramoe.experts.adapters import with_adapters
    base, _, rows, held, _ = prepared(a)
    gates = torch.eye(len(rows))
    out = {}
    for side in ('start', 'ours', 'trl'):
        folder = Path(a.work)/(side if side=='start' else f'{a.quant}/{side}')
        model = with_adapters(base, {n: folder/n for n in rows})
        out[side] = statistics.mean([mean_loss(model, held[n], gates[e]) for e,n in enumerate(rows)])
        model.detach()
    return out

SIDES = dict(ours=ours, trl=trl, bare=bare, shared=shared, trl_memory=trl_memory, score=score)

def measured(side, quant, work):
    "One side in a process of its own"
    command = [sys.executable, __file__, *sys.argv[1:], '--side', side, '--quant', quant, '--work', str(work)]
    env = dict(os.environ, HYDRAMOE_QUIET='1', TRANSFORMERS_VERBOSITY='error')
    with tempfile.NamedTemporaryFile('r', suffix='.json') as out:
        with open(out.name, 'w') as said: subprocess.run(command, check=True, stdout=said, env=env)
        return json.loads(Path(out.name).read_text().splitlines()[-1])

# ---- all of it

def compared(a, quant, work):
    "The sides in turn, and what comes of it"
    runs = [{side: measured(side, quant, work) for side in ('ours', 'trl', 'bare')} for _ in range(a.repeat)]
    def speed(side): return statistics.median(run[side]['tokens']/run[side]['seconds'] for run in runs)
    held = measured('score', quant, work)
    memory = max(run['ours']['memory'] for run in runs)
    return dict(ours=speed('ours'), trl=speed('trl'), bare=speed('bare'), ratio=speed('ours')/speed('trl'), held=held,
                gap=held['ours']/held['trl']-1, memory=memory)

def conditions(a):
    "What was measured, where, and on what work"
    from hydramoe.foundations.core import default_threads, machine, versions
    settings = {k: v for k,v in vars(a).items() if k not in ('side', 'quant', 'work', 'json')}
    libraries = versions('torch', 'transformers', 'peft', 'trl')
    return dict(settings, threads=a.threads or default_threads(), versions=libraries, machine=machine(),
                work=__doc__.split('\n\n')[2])

def measure(a, quants):
    "All sides in each precision; TRL's memory in the first one, or None; steps with a shared expert"
    with tempfile.TemporaryDirectory() as work:
        tables = {q: compared(a, q, work) for q in quants}
        memory = None if a.no_memory else measured('trl_memory', quants[0], work)['memory']
        beside = {q: measured('shared', q, work) for q in quants}
    return tables, memory, beside

def summary(tables, first, memory, beside):
    "The numbers that the first lines of this file name"
    out = {f'vs_trl_{q}': x['ratio'] for q,x in tables.items()}
    out |= {f'bare_vs_trl_{q}': x['bare']/x['trl'] for q,x in tables.items()}
    if memory: out['memory_vs_trl'] = tables[first]['memory']/memory
    out['shared_vs_fused'] = max(x['ratio'] for x in beside.values())
    out['quality_gap'] = max((x['gap'] for x in tables.values()), key=abs)
    return out

def show(tables, first, memory, beside):
    "A table"
    for q,x in tables.items():
        print(f"{q}: ours {x['ours']:.0f} tokens/s, TRL {x['trl']:.0f}: {x['ratio']:.2f}×; "
              f"the base alone {x['bare']:.0f}; held-out loss {x['held']['start']:.4f} before, "
              f"ours {x['held']['ours']:.4f}, TRL {x['held']['trl']:.4f}: {x['gap']:+.3%}")
    for q,x in beside.items():
        print(f"{q}: a step with a shared expert takes {x['ratio']:.2f}× one of plain experts "
              f"({x['shared']:.2f} and {x['fused']:.2f} s)")
    if memory:
        own = tables[first]['memory']
        print(f"peak memory in {first}: ours {own:.2f} GiB, TRL {memory:.2f} at equal tokens a forward: "
              f"{own/memory:.2f}×")

def main():
    a = options()
    if a.side:
        warnings.simplefilter('ignore')
        print(json.dumps(SIDES[a.side](a)))
        return
    quants = a.quants.split(',')
    tables, memory, beside = measure(a, quants)
    if not a.json: return show(tables, quants[0], memory, beside)
    parts = dict(tables=tables, shared=beside, trl_memory_gib=memory, conditions=conditions(a))
    print(json.dumps(summary(tables, quants[0], memory, beside) | parts, indent=1))

if __name__=='__main__': main()
