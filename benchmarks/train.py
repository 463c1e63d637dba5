"""Nine experts trained fused, against TRL's SFTTrainer + PEFT training them one after the other.

    python benchmarks/train.py                a table
    python benchmarks/train.py --json         vs_trl_bf16, vs_trl_fp32: tokens a second, ours ÷ TRL's; memory_vs_trl: peak
                                              memory, ours ÷ TRL's; quality_gap: held-out loss, ours ÷ TRL's − 1; bare_vs_trl_*: the
                                              base alone, forward and backward, ÷ TRL's: the most that ours could reach; shared_vs_fused:
                                              seconds of a step with a shared expert and as many residuals ÷ of a fused step of plain experts; and tables
    python benchmarks/train.py --base tiny --domains 3 --rows 6 --steps 3       seconds, to see that it works

Both sides get the same base in the same precision (bf16: weights and products in bf16, adapters, their gradients and AdamW in
fp32, on TRL's side through autocast), the same fresh adapters, the same rows in the same order with the same batches for each expert, the same activation
checkpointing. Tokens are counted without padding. The first steps of every trainer are left out, and so is all preparation.
For memory, TRL gets batches of as many tokens as ours has under way at once, as if they were of one expert.
Every measurement has a process of its own, since memory is its peak. `shared_vs_fused` has one for both of its sides: they take
the same steps of the same rows, in the same passes, in turn.
"""
import argparse, json, os, resource, statistics, subprocess, sys, tempfile, time, warnings
from pathlib import Path

def options():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument('--base', default='smollm2', help="'smollm2', 'tiny', a path or a Hub id")
    p.add_argument('--domains', type=int, default=9, help='experts')
    p.add_argument('--rows', type=int, default=20, help='rows of each expert')
    p.add_argument('--batch', type=int, default=2, help='rows of an expert in a step')
    p.add_argument('--steps', type=int, default=None, help='stop after so many steps')
    p.add_argument('--warm', type=int, default=1, help='first steps of each trainer that are left out')
    p.add_argument('--held', type=int, default=6, help='held-out rows of each domain')
    p.add_argument('--length', type=int, default=300, help='tokens of the longest prompt, and of the longest answer')
    p.add_argument('--micro', type=int, default=1400, help='tokens that ours has under way at once: in one forward, or in lanes of one thread each')
    p.add_argument('--rank', type=int, default=8)
    p.add_argument('--lr', type=float, default=5e-4)
    p.add_argument('--checkpointing', action='store_true', help='recompute activations, on both sides')
    p.add_argument('--quants', default='bf16,fp32', help='precisions to compare')
    p.add_argument('--trl-weights', choices=['same', 'fp32'], default='same', help="the base under TRL's bf16: in bf16 as ours, or in fp32 under autocast, TRL's own default")
    p.add_argument('--threads', type=int, default=None, help='of torch; default: all of this machine')
    p.add_argument('--repeat', type=int, default=1, help='times each side is measured, in turn; the median counts')
    p.add_argument('--cpu-clock', action='store_true', help='count processor time, for a machine that is not quiet (with --threads 1)')
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
    params = dict(tokens_per_domain=400*a.rows, dev=1, test=a.held, max_length=a.length, seed=0, cards='' if toy else cards_digest())
    data = stage(toy_unify_stage if toy else unify_stage, params)
    parts = {p: [encode(r, base.tokenizer, a.length, a.length) for r in read_jsonl(data/f'{p}.jsonl')] for p in ('experts', 'test')}
    def of(part, most): return {d: [x for x in parts[part] if x and x.domain==d][:most] for d in DOMAINS[:a.domains]}
    train = of('experts', a.rows)
    if short := [d for d,rows in train.items() if len(rows)<a.rows]: print(f'fewer than {a.rows} rows: {", ".join(short)}', file=sys.stderr)
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
    return base, spec, rows, held, plan_steps(list(rows.values()), list(rows), spec)[:a.steps]

def lora(a):
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

def clock(a): return time.process_time() if a.cpu_clock else time.perf_counter()
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
def tokens(rows): return sum(len(x.ids) for x in rows)

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
        opt, seconds = Optimizers(model.stack, [sum(any(f==e for f,_ in s) for s in steps) for e in range(len(names))], spec), []
        for k,step in enumerate(steps):
            t = clock(a)
            fit_step(model, opt, step, k, names)
            seconds.append(clock(a)-t)
    for e,n in enumerate(names): model.stack.save_peft(Path(a.work)/a.quant/'ours'/n, e)
    return dict(tokens=sum(tokens([x for _,x in s]) for s in steps[a.warm:]), seconds=sum(seconds[a.warm:]), memory=peak())

def bare(a):
    "The base alone on the passes of the fused run: forward, loss and the way back to its embeddings, which no training of adapters in all layers can do without"
    from concurrent.futures import ThreadPoolExecutor
    import torch
    from hydramoe.experts.train import deal_passes, n_replicas, make_passes, shard_passes, using_threads
    from hydramoe.experts.score import token_losses
    from hydramoe.experts.gates import base_plan
    from hydramoe.experts.model import gated, using
    from hydramoe.experts.packing import packed_attention
    base, spec, _, _, steps = prepared(a)
    base.model.enable_input_require_grads()
    model, seconds = gated(base, 1, lora(a)), []
    n = n_replicas(model, spec)
    def lane(step, passes):
        for b,_ in passes:
            with using(base_plan(model.stack)): token_losses(model, [step[i][1] for i in b], packed=True).sum().backward()
    with packed_attention(model), ThreadPoolExecutor(n) as pool:
        for step in steps:
            t, lengths = clock(a), [len(x.ids) for _,x in step]
            dealt = deal_passes(shard_passes(make_passes([e for e,_ in step], lengths, spec.micro_tokens//n, n)), lengths, n)
            with using_threads(max(1, torch.get_num_threads()//n)): list(pool.map(lambda passes: lane(step, passes), dealt))
            seconds.append(clock(a)-t)
    return dict(tokens=sum(tokens([x for _,x in s]) for s in steps[a.warm:]), seconds=sum(seconds[a.warm:]), memory=peak())

def timer(a):
    "A trainer's callback that notes when each step begins and ends"
    from transformers import TrainerCallback
    class Timer(TrainerCallback):
        began, seconds = None, []
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
        batches, watch = [b for s in steps if (b := [x for f,x in s if f==e])], timer(a)
        watch.seconds = []
        fit_trl(base, batches, Path(a.work)/'start'/n, Path(a.work)/a.quant/'trl'/n, spec, a.checkpointing, a.quant=='bf16', [watch])
        total['tokens'] += sum(map(tokens, batches[a.warm:])); total['seconds'] += sum(watch.seconds[a.warm:])
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
        turns = [('fused', lambda step, k: fit_step(plain, fused, step, k, names)),
                 ('shared', lambda step, k: shared_step(both, mixed, step, k, [*names, 'shared']))]
        for k,step in enumerate(steps):
            for name,take in turns[::1-k%2*2]: # who begins changes from step to step
                t = clock(a)
                take(step, k)
                seconds[name].append(clock(a)-t)
    seconds = {name: took[a.warm:] for name,took in seconds.items()}
    ratios = [s/f for s,f in zip(seconds['shared'], seconds['fused'])]
    return {name: statistics.median(took) for name,took in seconds.items()} | dict(ratio=statistics.median(ratios), ratios=ratios)

def trl_memory(a):
    "TRL with as many rows in a forward as ours"
    from hydramoe.experts.train import fit_trl
    from hydramoe.experts.score import micro_batches
    base, spec, rows, _, steps = prepared(a, True)
    start(a, base, rows)
    batches = [[s[i][1] for i in b] for s in steps[:2] for b in micro_batches([len(x.ids) for _,x in s], a.micro)]
    fit_trl(base, batches, Path(a.work)/'start'/next(iter(rows)), Path(a.work)/'scrap', spec, a.checkpointing, a.quant=='bf16')
    return dict(memory=peak())

def score(a):
    "Held-out loss of each side's experts, each on its own domain"
    import torch
    from hydramoe.experts.adapters import with_adapters
    from hydramoe.experts.score import response_losses
    base, _, rows, held, _ = prepared(a)
    out = {}
    for side in ('start', 'ours', 'trl'):
        folder = Path(a.work)/(side if side=='start' else f'{a.quant}/{side}')
        model = with_adapters(base, {n: folder/n for n in rows})
        gates = torch.eye(len(rows))
        loss = [float(sum(map(sum, response_losses(model, held[n], gates[e])))/sum(len(x.ids)-x.n_prompt for x in held[n])) for e,n in enumerate(rows)]
        out[side] = statistics.mean(loss)
        model.detach()
    return out

SIDES = dict(ours=ours, trl=trl, bare=bare, shared=shared, trl_memory=trl_memory, score=score)

def measured(side, quant, work):
    "One side in a process of its own"
    with tempfile.NamedTemporaryFile('r', suffix='.json') as out:
        command = [sys.executable, __file__, *sys.argv[1:], '--side', side, '--quant', quant, '--work', str(work)]
        subprocess.run(command, check=True, stdout=open(out.name, 'w'), env=dict(os.environ, HYDRAMOE_QUIET='1', TRANSFORMERS_VERBOSITY='error'))
        return json.loads(Path(out.name).read_text().splitlines()[-1])

def compared(a, quant, work):
    "The sides in turn, and what comes of it"
    runs = [[measured(s, quant, work) for s in ('ours', 'trl', 'bare')] for _ in range(a.repeat)]
    speed = [statistics.median(r[i]['tokens']/r[i]['seconds'] for r in runs) for i in range(3)]
    held = measured('score', quant, work)
    memory = max(r[0]['memory'] for r in runs)
    return dict(ours=speed[0], trl=speed[1], bare=speed[2], ratio=speed[0]/speed[1], held=held, gap=held['ours']/held['trl']-1, memory=memory)

def conditions(a):
    "What was measured, where, and on what work"
    from hydramoe.foundations.core import default_threads, machine, versions
    return dict({k: v for k,v in vars(a).items() if k not in ('side', 'quant', 'work', 'json')}, threads=a.threads or default_threads(),
                versions=versions('torch', 'transformers', 'peft', 'trl'), machine=machine(), work=__doc__.split('\n\n')[2])

def main():
    a = options()
    if a.side:
        warnings.simplefilter('ignore')
        print(json.dumps(SIDES[a.side](a))); return
    quants = a.quants.split(',')
    with tempfile.TemporaryDirectory() as work:
        out = {q: compared(a, q, work) for q in quants}
        theirs = None if a.no_memory else measured('trl_memory', quants[0], work)['memory']
        beside = {q: measured('shared', q, work) for q in quants}
    result = {f'vs_trl_{q}': x['ratio'] for q,x in out.items()} | {f'bare_vs_trl_{q}': x['bare']/x['trl'] for q,x in out.items()}
    if theirs: result['memory_vs_trl'] = out[quants[0]]['memory']/theirs
    result['shared_vs_fused'] = max(x['ratio'] for x in beside.values())
    result['quality_gap'] = max((x['gap'] for x in out.values()), key=abs)
    if a.json: print(json.dumps(result | dict(tables=out, shared=beside, trl_memory_gib=theirs, conditions=conditions(a)), indent=1)); return
    for q,x in out.items():
        print(f"{q}: ours {x['ours']:.0f} tokens/s, TRL {x['trl']:.0f}: {x['ratio']:.2f}×; the base alone {x['bare']:.0f}; held-out loss {x['held']['start']:.4f} before, "
              f"ours {x['held']['ours']:.4f}, TRL {x['held']['trl']:.4f}: {x['gap']:+.3%}")
    for q,x in beside.items(): print(f"{q}: a step with a shared expert takes {x['ratio']:.2f}× one of plain experts ({x['shared']:.2f} and {x['fused']:.2f} s)")
    if theirs: print(f"peak memory in {quants[0]}: ours {out[quants[0]]['memory']:.2f} GiB, TRL {theirs:.2f} at equal tokens a forward: {result['memory_vs_trl']:.2f}×")

if __name__=='__main__': main()
