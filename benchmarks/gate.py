"""Trained gates, measured: `python benchmarks/gate.py --json` (some 15 minutes on two cores); `--fast` takes a minute.

One run measures all sides, each on its own copy of the same base in fp32, one step of each in turn and round after
round, so that whatever disturbs the machine disturbs all; medians, and of each round's ratios the quartiles. Decode
steps are short, so they get five times the rounds.

  step_vs_lora    seconds of a training step of a gate and nine experts, two of them for each token, ÷ of one LoRA's
                  step; both with their optimizers' steps, the same rows in the same passes
  vs_xlora        seconds of a step of PEFT's X-LoRA (two of nine for each token, a gate for each layer, experts
                  frozen) ÷ of a step of our gate alone on the same experts and rows, which are equally long, so that
                  nothing is padded
  decode_vs_base  seconds of a decode step, two of nine experts for each token, ÷ of the bare base's
  decode_256      the same with two of 256
"""
import json, statistics, sys, tempfile, warnings
from pathlib import Path
import torch
from hydramoe.models.encode import Example
import hydramoe.experts.adapters # noqa: F401, gives stacks save_peft
from hydramoe.experts.train import Optimizers, TrainSpec, fit_step, training_mode
from hydramoe.hydra.trained_gate import GateSpec, trained_gate
from hydramoe.hydra.train_gate import GateOptimizers, GateRows, GateRun, GateTraining
sys.path.insert(0, str(Path(__file__).parent))
from forward import decode, every_round, filled, opened, options, soft

def named(args, slots):
    "Our model with experts of noise, each with a name"
    model = filled(args, 'fp32', slots)
    model.stack.names = [f'e{e}' for e in range(slots)]
    return model

def made_up(args, vocabulary):
    "Rows of random tokens, half of each the answer"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (args.rows, args.length), generator=generator).tolist()
    return [Example(ids=row, n_prompt=args.length//2, id=str(i), domain='any') for i, row in enumerate(ids)]

def lora_step(args, rows):
    "A model of one LoRA, and its training step"
    model = named(args, 1)
    spec = TrainSpec(micro_tokens=args.micro)
    opt = Optimizers(model.stack, [1000], spec)
    return model, lambda: fit_step(model, opt, [(0, x) for x in rows], 0, ['single'])

def gate_step(args, rows, experts):
    "A model of nine experts, and a training step of a gate over them, two for each token; with the experts, or alone"
    model = named(args, 9)
    spec = TrainSpec(micro_tokens=args.micro)
    training = GateTraining(spec, experts=spec if experts else None)
    gate = trained_gate(model.stack, GateSpec(top_k=2))
    run = GateRun(gate, GateRows(rows, soft(len(rows), 9, 9)), training)
    opt = GateOptimizers(model.stack, gate, 1000, training)
    return model, lambda: run.take(model, opt, [(0, x) for x in rows], 0, ['gate'])

def xlora_step(args, rows, tmp):
    "A step of PEFT's X-LoRA on nine frozen adapters"
    from peft import XLoraConfig, get_peft_model
    base = opened(args, 'fp32')
    experts = named(args, 9)
    folders = {str(e): str(experts.stack.save_peft(Path(tmp)/f'e{e}', e)) for e in range(9)}
    config = base.model.config
    config.use_cache = False
    how = XLoraConfig(task_type='CAUSAL_LM', hidden_size=config.hidden_size, adapters=folders, layerwise_scalings=True,
                      top_k_lora=2, xlora_depth=1, xlora_dropout_p=0.)
    model = get_peft_model(base.model, how)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.tensor([x.ids for x in rows])
    answer = torch.arange(ids.shape[1])>=rows[0].n_prompt
    labels = ids.masked_fill(~answer, -100)
    n = max(1, args.micro//ids.shape[1])
    def step():
        opt.zero_grad()
        for part, wanted in zip(ids.split(n), labels.split(n)):
            (model(input_ids=part, labels=wanted).loss*len(part)/len(ids)).backward()
        opt.step()
    return step

def ratio(took, a, b):
    "Median of a ÷ median of b, and the quartiles of the rounds' own ratios"
    of_rounds = [x/y for x, y in zip(took[a], took[b])]
    low, _, high = statistics.quantiles(of_rounds, n=4)
    of_medians = statistics.median(took[a])/statistics.median(took[b])
    return round(of_medians, 4), [round(low, 4), round(high, 4)]

def decoding(args, base, rounds):
    "Seconds of decode steps, round by round: of the base and of two gated stacks, two experts for each token"
    config = base.model.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (args.rows, args.context), generator=generator)
    steps = {'base': decode(base.model, config, ids)}
    for E in (9, args.many):
        model = named(args, E)
        gate = trained_gate(model.stack, GateSpec(top_k=2, start=.02))
        work = gate.on(soft(args.rows, E, E))
        steps[f'decode_{E}'] = decode(model, model.config, ids, (model.keep, {}), gates=work)
    return every_round(steps, rounds)

def training(args, rows, tmp):
    "Seconds of training steps on the same rows, round by round: a LoRA, gate and experts, a gate alone, X-LoRA"
    one, lora = lora_step(args, rows)
    nine, gated = gate_step(args, rows, experts=True)
    frozen, alone = gate_step(args, rows, experts=False)
    with training_mode(one), training_mode(nine), training_mode(frozen):
        steps = dict(lora=lora, gated=gated, alone=alone, xlora=xlora_step(args, rows, tmp))
        return every_round(steps, args.rounds)

def measure(args):
    "Seconds of all steps, round by round: those of training, those of decoding"
    with warnings.catch_warnings(action='ignore'), tempfile.TemporaryDirectory() as tmp:
        base = opened(args, 'fp32')
        with torch.inference_mode(): of_decode = decoding(args, base, 5*args.rounds)
        rows = made_up(args, base.model.config.vocab_size)
        return training(args, rows, tmp), of_decode

def main():
    p = options(__doc__, '9', 20)
    p.add_argument('--length', type=int, default=150, help='tokens of a training row')
    p.add_argument('--micro', type=int, default=600, help='tokens of a pass')
    p.add_argument('--many', type=int, default=256, help='experts of the large stack')
    args = p.parse_args()
    if args.fast: vars(args).update(base='tiny', rounds=3, context=16, length=20, many=40)
    torch.set_num_threads(args.threads)
    of_step, of_decode = measure(args)
    found = dict(step_vs_lora=ratio(of_step, 'gated', 'lora'), vs_xlora=ratio(of_step, 'xlora', 'alone'),
                 decode_vs_base=ratio(of_decode, 'decode_9', 'base'),
                 decode_256=ratio(of_decode, f'decode_{args.many}', 'base'))
    result = {name: value for name, (value, _) in found.items()}
    result['quartiles'] = {name: spread for name, (_, spread) in found.items()}
    result['seconds'] = {k: round(statistics.median(v), 4) for k, v in (of_step|of_decode).items()}
    result['conditions'] = dict(vars(args), torch=torch.__version__)
    if args.json: print(json.dumps(result, indent=1, default=str))
    else: print('\n'.join(f'{name:15} {value:.2f}  {spread}' for name, (value, spread) in found.items()))

if __name__=='__main__': main()
