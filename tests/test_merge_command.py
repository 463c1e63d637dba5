"The command `merge`: what it writes, what it says, what it refuses; on experts of noise on the tiny base"
import contextlib, json, os, shlex
from pathlib import Path

import pytest
import torch

from hydramoe.foundations.core import HydraError
from hydramoe.foundations.files import read_json, write_json, write_jsonl
from hydramoe.models.base import tiny_base
from hydramoe.experts.adapters import with_adapters
from hydramoe.hydra import Hydra
from hydramoe.hydra.adopt import adopt
from hydramoe.hydra.bundle import check_bundle
from hydramoe.hydra.merge import METHOD_PARAMS, MERGES
from hydramoe.hydra import dense, merged
from hydramoe.use.cli import main
from hydramoe.use.merge_command import MERGE_COMMANDS, check_merge, parse_weights
from helpers import files_in, here, killed_at
from hydras import NAMES, TEXTS, by_hand

ROWS = [dict(prompt=text, completion=name, domain=name) for name, text in zip(NAMES, TEXTS)]

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder with a bundle of three experts of noise, one on a base in 4 bits, one with a gate, and held-out rows"
    d = tmp_path_factory.mktemp('merge')
    by_hand().save(d/'b')
    by_hand(tiny_base(quant='nf4')).save(d/'b4')
    adopt({name: d/'b'/'experts'/name for name in NAMES}, d/'gated', 'tiny', 'fp32', 'lag')
    write_jsonl(d/'rows.jsonl', ROWS)
    return d

@pytest.fixture
def place(made, tmp_path):
    "The same, in a folder of the test's own"
    for name in ('b', 'b4', 'gated', 'rows.jsonl'): (tmp_path/name).symlink_to(made/name)
    return tmp_path

def merge(place, *argv): return here('merge', *argv, '--quiet', cwd=place)

def done(place, *argv):
    out = merge(place, *argv, '--json')
    assert (out.returncode, out.stderr)==(0, ''), out.stderr
    return json.loads(out.stdout)

# ---- what it writes

def test_a_new_bundle_has_one_more_expert_and_the_suggested_command_asks_it(place):
    before = files_in(place/'b')
    out = merge(place, 'b')
    assert (out.returncode, out.stderr)==(0, ''), out.stderr
    assert [e['name'] for e in check_bundle(place/'b-merged')['experts']]==[*NAMES, 'merged']
    assert files_in(place/'b')==before # a bundle is never changed
    first, *_, last = out.stdout.splitlines()
    assert first.startswith('b-merged: merged by ties in full space')
    assert 'law 0.3333' in first
    assert '--rows FILE' in out.stdout
    words = shlex.split(last.removeprefix('try it: '))
    assert words[:3]==['hydramoe', 'ask', 'b-merged']
    assert words[-2:]==['--expert', 'merged']
    assert here(*words[1:], '--max-new-tokens', 2, cwd=place).returncode==0

def test_json_has_receipt_and_paths(place):
    how = ['--weights', 'law=1,sum=-.5', '--rank', 3, '--name', 'both', '--out', 'x']
    data = done(place, 'b', '--method', 'linear', *how)
    assert (data['to'], data['out'], data['bundle'], data['experts'])==('expert', 'x', 'x', [*NAMES, 'both'])
    receipt = read_json(place/'x'/'hydra.json')['built']['merges']['both']
    assert receipt==data['receipt']
    assert receipt['weights']==dict(law=1., sum=-.5)
    assert receipt['rank']==3
    assert data['rejects'] is None
    assert '--expert both' in data['next']

def test_an_adapter_is_the_expert_of_the_bundle(place):
    made = done(place, 'b', '--method', 'linear', '--to', 'adapter')
    assert made['adapter']==made['out']=='b-merged-adapter'
    files = sorted(p.name for p in (place/'b-merged-adapter').iterdir())
    assert files==['adapter_config.json', 'adapter_model.safetensors', 'receipt.json']
    done(place, 'b', '--method', 'linear')
    name = 'adapter_model.safetensors'
    assert (place/'b-merged-adapter'/name).read_bytes()==(place/'b-merged'/'experts'/'merged'/name).read_bytes()

@pytest.fixture
def written(monkeypatch):
    "What the functions that write whole models were called with"
    calls = []
    def write_dense(hydra, merge, out, original=False):
        calls.append(('dense', merge.receipt['method'], original))
        Path(out).mkdir()
        write_json(Path(out)/'receipt.json', dict(merge.receipt, rank=None, energy_lost=0.))
        return Path(out)
    def write_mergekit(bundle, hydra, merge, out):
        calls.append(('mergekit', str(bundle), merge.receipt['method']))
        Path(out).mkdir()
        return Path(out)
    for f in (write_dense, write_mergekit): monkeypatch.setattr(dense, f.__name__, f)
    return calls

def test_whole_models_are_written_by_their_functions(place, written):
    assert done(place, 'b', '--to', 'dense', '--method', 'linear')['model']=='b-merged-dense'
    done(place, 'b4', '--to', 'dense', '--method', 'linear', '--original', '--out', 'x')
    assert done(place, 'b', '--to', 'mergekit', '--variant', 'mergekit')['mergekit']=='b-merged-mergekit'
    assert written==[('dense', 'linear', False), ('dense', 'linear', True), ('mergekit', 'b', 'ties')]

def test_whole_models_are_not_cut_and_say_so(place):
    out = merge(place, 'b', '--to', 'dense', '--rows', 'rows.jsonl')
    assert out.returncode==0, out.stderr
    assert 'nothing cut to a rank' in out.stdout
    assert 'the losses are of the merge cut to rank 12; what is written is whole' in out.stdout
    assert out.stdout.splitlines()[-1]=="try it: transformers.AutoModelForCausalLM.from_pretrained('b-merged-dense')"
    assert {'model.safetensors', 'config.json', 'receipt.json'}<={p.name for p in (place/'b-merged-dense').iterdir()}
    data = done(place, 'b', '--to', 'mergekit', '--method', 'linear', '--out', 'x y')
    assert shlex.split(data['next'])==['mergekit-yaml', 'x y/mergekit_config.yml', 'MODEL']
    assert (place/'x y'/'mergekit_config.yml').is_file()

# ---- every option arrives

GIVEN = [
    ('ties', dict(density=.3, variant='mergekit')), ('average', dict(share=.5)), ('dare', dict(density=.6, seed=3)),
    ('dare_ties', dict(variant='peft')), ('tsv_m', dict(keep=2)), ('iso_c', dict(keep=1)),
    ('iso_cts', dict(common=.5)), ('lego', dict(seed=2, clusters=2)), ('knots', dict(density=.5)),
    ('prune', dict(density=.5)), ('concat', {})]

@pytest.mark.parametrize('method, params', GIVEN, ids=[m for m, _ in GIVEN])
def test_only_what_was_given_reaches_the_method(place, method, params):
    flags = [word for name, value in params.items() for word in (f'--{name}', value)]
    assert done(place, 'b', '--method', method, *flags, '--to', 'adapter')['receipt']['params']==params

def test_all_parameters_of_methods_are_options():
    flags = {names[-1] for names, _ in MERGE_COMMANDS['merge'].args}
    assert {f'--{name}' for known in METHOD_PARAMS.values() for name in known} <= flags|{'--keep_sum'}

def test_how_to_merge_reaches_the_library(place, monkeypatch):
    def caught(hydra, method, weights, rows, **how):
        raise HydraError(json.dumps(dict(how, method=method, weights=weights, rows=len(rows or ()))))
    monkeypatch.setattr(merged, 'merge_hydra', caught)
    seed = 'b/experts/law'
    how = ['--scale', '-.5', '--rank', 2, '--space', 'core', '--since', seed]
    out = merge(place, 'b', *how, '--rows', 'rows.jsonl', '--max-length', 77)
    said = json.loads(out.stderr.removeprefix('hydramoe: '))
    reached = dict(scale=-.5, rank=2, space='core', seed_expert=seed, max_length=77)
    assert said==dict(method='ties', weights=None, rows=3, **reached)

def test_the_seed_expert_is_taken_off_and_put_on_again(place):
    how = ['--weights', 'sea=1', '--rank', 8, '--since', 'b/experts/law', '--to', 'adapter']
    receipt = done(place, 'b', '--method', 'linear', *how)['receipt']
    assert receipt['since']
    assert receipt['length']==pytest.approx(1)
    stack = with_adapters(tiny_base(), dict(merged=place/'b-merged-adapter', sea=place/'b'/'experts'/'sea')).stack
    for i in stack.upper_layers:
        A, B = stack.leaves[i]
        torch.testing.assert_close(B[0]@A[0]*stack.scale[0], B[1]@A[1]*stack.scale[1], rtol=1e-4, atol=1e-5)

# ---- with rows

IN_THE_TABLE = ('on 3 of 3 rows:', 'perplexity', 'best expert, ', 'uniform mix', 'routed',
                'chosen on these rows among 15 settings: density ')

def test_rows_choose_density_and_length_and_show_a_table(place):
    out = merge(place, 'b', '--rows', 'rows.jsonl')
    assert out.returncode==0, out.stderr
    for said in IN_THE_TABLE: assert said in out.stdout
    asked = shlex.split(out.stdout.splitlines()[-1].removeprefix('try it: '))
    assert asked[3] in TEXTS # a prompt of the user's own
    receipt = done(place, 'b', '--rows', 'rows.jsonl', '--density', .5, '--out', 'x')['receipt']
    losses = receipt['development']['losses']
    curve = receipt['development']['curve']
    assert len(curve)==5
    assert losses['merged']==pytest.approx(min(row['nll'] for row in curve), abs=1e-4)

def test_a_scale_that_is_given_is_not_searched(place):
    out = merge(place, 'b', '--rows', 'rows.jsonl', '--method', 'linear', '--scale', 2)
    assert out.returncode==0
    assert 'you gave the scale' in out.stdout

def test_rows_are_read_as_build_reads_them(place):
    (place/'sheet.csv').write_bytes('question;answer\nWer schrieb Faust?;Götz\n'.replace(';', ',').encode('latin-1'))
    (place/'broken.jsonl').write_text('{"prompt": "half\n'+json.dumps(ROWS[0]))
    how = ['--map', 'prompt=question,completion=answer', '--encoding', 'latin-1', '--method', 'linear']
    assert done(place, 'b', '--rows', 'sheet.csv', *how)['receipt']['development']['rows']==1
    rows = ['--rows', 'broken.jsonl', 'rows.jsonl']
    out = here('merge', 'b', *rows, '--method', 'linear', '--out', 'x', '--json', '--quiet', cwd=place)
    assert out.returncode==0
    assert 'line 1' in out.stderr
    assert json.loads(out.stdout)['rejects']=='x.rejects.jsonl'
    assert (place/'x.rejects.jsonl').exists()

def test_a_bundle_with_a_gate_gives_an_adapter(place):
    receipt = done(place, 'gated', '--to', 'adapter', '--method', 'linear', '--rows', 'rows.jsonl')['receipt']
    assert receipt['development']['losses']['routed']>0

def test_progress_is_on_standard_error_alone(place, monkeypatch):
    monkeypatch.delenv('HYDRAMOE_QUIET', raising=False)
    out = here('merge', 'b', '--json', cwd=place)
    assert out.returncode==0
    assert 'merge by ties' in out.stderr
    assert json.loads(out.stdout)

# ---- weights

WEIGHTS = [(None, None), ('law=1', dict(law=1)), ('law=1,sea=.5', dict(law=1, sea=.5)),
           (' law = -2 , sea=1e-2', dict(law=-2, sea=.01))]

@pytest.mark.parametrize('text, weights', WEIGHTS)
def test_weights_are_read(text, weights): assert parse_weights(text)==weights

@pytest.mark.parametrize('method', MERGES)
def test_no_method_is_refused_for_many_experts(method): check_merge([f'e{i}' for i in range(20)], method, None, {})

# ---- what is refused, before the base is loaded

COMPARE = ['--compare', '--rows', 'rows.jsonl']
NOT_WITH_COMPARE = [
    ['--out', 'x'], ['--to', 'expert'], ['--method', 'ties'], ['--density', '.3'], ['--seed', '0'], ['--share', '0'],
    ['--scale', '1'], ['--space', 'core'], ['--name', 'x'], ['--original']]
SINCE_LAW = ['--since', 'b/experts/law']

REFUSED = [
    (['--method', 'tie'], "did you mean 'ties'"),
    (['--method', 'linear', '--density', '.3'], "has no parameter 'density'"),
    (['--share', '.5'], "ties has no parameter 'share'"),
    (['--density', '0'], 'density'), (['--density', 'nan'], 'density'),
    (['--method', 'average', '--share', '2'], 'share=2'), (['--method', 'iso_cts', '--common=-1'], 'common=-1'),
    (['--method', 'tsv_m', '--keep', '0'], 'keep=0'), (['--rank', '0'], 'rank=0'),
    (['--scale', 'inf'], 'scale'), (['--scale', '1e9'], 'scale'), (['--max-length', '0'], 'max_length=0'),
    (['--weights', 'law'], 'write NAME=NUMBER'), (['--weights', 'law=x'], 'write NAME=NUMBER'),
    (['--weights', ''], 'write NAME=NUMBER'), (['--weights', 'law=1,'], 'write NAME=NUMBER'),
    (['--weights', 'law=1,law=2'], 'two weights'), (['--weights', 'lav=1'], "did you mean 'law'"),
    (['--weights', 'law=nan'], 'the weight of law'), (['--weights', 'law=0'], 'every weight is 0'),
    (['--weights', 'law=-1'], 'negative weight'), (['--method', 'average', '--weights', 'law=1,sea=-1'], 'sum to zero'),
    (['--name', 'law'], 'occurs twice'), (['--name', 'base'], 'is taken'), (['--name', 'a b'], 'cannot name a folder'),
    (['--name', 'x', '--to', 'adapter'], '--name names an expert'),
    (['--original'], '--to dense'), (['--original', '--to', 'dense'], 'in fp32'),
    (['--rank', '2', '--to', 'dense'], 'not cut to a rank'), (['--to', 'mergekit'], '--variant mergekit'),
    (['--to', 'mergekit', '--method', 'linear', *SINCE_LAW], 'seed expert'),
    (['--methods', 'ties'], 'add --compare'), (['--form', 'pairs'], '--rows FILE'), (['--map', 'a=b'], '--rows FILE'),
    (['--since', 'nowhere'], 'is not a PEFT adapter'), (['--rows', 'nowhere.jsonl'], 'nowhere.jsonl'),
    (['--rows', 'empty.jsonl'], 'empty.jsonl'), (['--out', ''], 'cannot be written'), (['--out', 'b'], 'exists'),
    (['--out', '/proc/x/y'], 'cannot be written'), (['--to', 'adapter', '--encoder', 'nowhere'], ''),
    (['--compare'], '--rows FILE'), *(([*COMPARE, *flags], flags[0]) for flags in NOT_WITH_COMPARE),
    ([*COMPARE, '--methods', 'linear,tie'], "did you mean 'ties'"), ([*COMPARE, '--methods', ''], 'method'),
    ([*COMPARE, '--weights', 'law=-1', '--methods', 'linear,knots'], 'knots: '),
    (['--compare', '--rows', 'nowhere.jsonl'], 'nowhere.jsonl')]

@pytest.mark.parametrize('flags, said', REFUSED, ids=[' '.join(f) for f, _ in REFUSED])
def test_what_cannot_be_merged_is_refused_first(place, flags, said, monkeypatch):
    def late(*a, **kw): raise AssertionError('too late')
    monkeypatch.setattr(Hydra, 'load', late)
    (place/'empty.jsonl').write_text('')
    before = sorted(place.rglob('*'))
    out = merge(place, 'b', *flags)
    assert (out.returncode, out.stdout, out.stderr.count('\n'))==(2, '', 1), out.stderr
    assert said in out.stderr
    assert sorted(place.rglob('*'))==before

NO_BUNDLES = [('nowhere', [], 'is not a directory'), ('.', ['--out', 'x'], ''), ('gated', [], 'chooses by a gate'),
              ('b', ['--base', 'nowhere'], 'nowhere')]

def test_bundles_that_cannot_be_merged(place):
    for bundle, flags, said in NO_BUNDLES:
        out = merge(place, bundle, *flags)
        assert (out.returncode, out.stdout, out.stderr.count('\n'))==(2, '', 1)
        assert said in out.stderr
        assert {p.name for p in place.iterdir()}=={'b', 'b4', 'gated', 'rows.jsonl'}

BAD_USAGE = [['--to', 'both'], ['--variant', 'other'], ['--space', 'half'], ['--rank', 'x'], ['--rows']]

@pytest.mark.parametrize('argv', BAD_USAGE)
def test_bad_usage_is_exit_2(place, argv): assert merge(place, 'b', *argv).returncode==2

def test_rows_that_are_too_long_leave_nothing(place):
    out = merge(place, 'b', '--rows', 'rows.jsonl', '--max-length', 1)
    assert (out.returncode, out.stdout)==(2, '')
    assert 'longer than 1 tokens' in out.stderr
    assert not (place/'b-merged').exists()

# ---- whole or not at all

@pytest.mark.parametrize('to', ['expert', 'adapter'])
def test_ctrl_c_while_writing_leaves_nothing(place, to, monkeypatch):
    def interrupted(*a, **kw): raise KeyboardInterrupt
    monkeypatch.setattr('hydramoe.foundations.files.fsync_tree', interrupted)
    monkeypatch.setattr('hydramoe.hydra.saving.seal_bundle', interrupted)
    assert merge(place, 'b', '--to', to).returncode==130
    assert {p.name for p in place.iterdir()}=={'b', 'b4', 'gated', 'rows.jsonl'}

@pytest.mark.parametrize('to', ['expert', 'adapter'])
def test_killed_anywhere_it_leaves_a_whole_result_or_none(place, to, monkeypatch):
    monkeypatch.setenv('HYDRAMOE_QUIET', '1')
    out = place/'x'
    def work():
        argv = ['merge', str(place/'b'), '--method', 'linear', '--to', to, '--out', str(out)]
        with open(os.devnull, 'w') as nothing, contextlib.redirect_stdout(nothing): main(argv)
    k = 40 # the file operation at which it is killed
    cuts = 0
    while killed_at(k, work):
        k += 25
        cuts += 1
        if not out.exists(): continue
        if to=='expert': check_bundle(out)
        else:
            files = {p.name for p in out.iterdir()}
            assert files=={'adapter_config.json', 'adapter_model.safetensors', 'receipt.json'}
        out.rename(place/f'whole-{k}')
    assert cuts>2
    assert out.exists()

# ---- all methods in one table

def test_a_comparison_names_the_best_merge_and_the_command_that_makes_it(place):
    before = sorted(place.rglob('*'))
    two = [*COMPARE, '--methods', 'linear,prune', '--weights', 'law=1,sea=2']
    out = merge(place, 'b', *two)
    assert out.returncode==0, out.stderr
    head, *rows, answer, careful, make_it = out.stdout.splitlines()
    columns = ('system', 'perplexity', 'against routed', 'parameters', 'length', 'energy lost')
    assert all(column in head for column in columns)
    assert len(rows)==3+3+2
    assert 'density 0.' in next(row for row in rows if row.startswith('merge: prune'))
    assert sorted(place.rglob('*'))==before
    data = done(place, 'b', *two)
    merges = [row for row in data['table'] if row['system'].startswith('merge: ')]
    best = min(merges, key=lambda row: row['ppl'])
    assert data['best']==best
    assert answer.startswith(f"the best merge is {best['system'][7:]}, ")
    assert data['verdict'] in answer
    assert data['next']==make_it.removeprefix('make it: ')
    receipt = done(place, *shlex.split(data['next'])[2:])['receipt'] # without rows it makes what was found with them
    assert receipt['weights']==dict(law=1., sea=2.)
    assert receipt['params']==best['params']
    assert receipt['length']==pytest.approx(best['length'], rel=1e-4)

def test_a_comparison_of_a_bundle_with_a_gate_suggests_an_adapter(place):
    line = done(place, 'gated', '--compare', '--rows', 'rows.jsonl', '--methods', 'linear', '--rank', 2)['next']
    assert line.endswith('--rank 2 --to adapter')
    assert done(place, *shlex.split(line)[2:])['receipt']['rank']==2

def test_a_comparison_says_what_it_could_not_read(place):
    (place/'broken.jsonl').write_text('{"prompt": "half\n'+json.dumps(ROWS[0]))
    out = merge(place, 'b', '--compare', '--rows', 'broken.jsonl', '--methods', 'linear', '--json')
    assert out.returncode==0
    assert 'line 1' in out.stderr
    assert [r['line'] for r in json.loads(out.stdout)['rejects']]==[1]
    assert {p.name for p in place.iterdir()}=={'b', 'b4', 'gated', 'rows.jsonl', 'broken.jsonl'}
