"Builds with a shared expert: killed, repeated, one residual more and one less, merged, compared with plain experts"
import json, signal, time
from pathlib import Path

import pytest
import torch, yaml
from safetensors.torch import load_file

from hydramoe import Hydra
from hydramoe.foundations.core import HydraError, rng
from hydramoe.foundations.files import read_json, write_jsonl
from hydramoe.models.base import open_checkpoint, tiny_base
from hydramoe.models.encode import encode
from hydramoe.domains.examples import lesson_texts
from hydramoe.experts.adapters import find_adapters
from hydramoe.experts.stack import LoraSpec
from hydramoe.experts.model import gated
from hydramoe.hydra import build as built_by
from hydramoe.hydra.build import SHARED_ALONE, routed_perplexity
from hydramoe.hydra.bundle import check_bundle
from hydramoe.hydra.cascade import load_router
from hydramoe.hydra.change import add_expert, remove_expert, what_remains
from hydramoe.hydra.dense import write_dense, write_mergekit
from hydramoe.hydra.route import uniform_router
from hydramoe.hydra.propose import propose_domains
from hydramoe.hydra.merged import add_merged_expert, compare_merges, merge_hydra, save_merged_adapter
from hydramoe.hydra.spec import BuildSpec, spec_record, stored_spec
from hydramoe.proof.comparison import run_plain
from hydramoe.proof.verdict_page import find_stage, held_out_rows, run_single
from helpers import TINY, files_in, here
from hydras import NAMES
from stacks import peft
from test_build import BIRDS, lesson_rows, sealed, start_build

RANKS = dict(shared=4, rank=2)

USUAL = dict(base='tiny', quant='fp32', encoder='words', k=3, epochs=2, lr=3e-3, **RANKS)

def build(out, **kw): return Hydra.build(lesson_rows(), out, **(USUAL | kw))

@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    "A cache for this file"
    patch = pytest.MonkeyPatch()
    d = tmp_path_factory.mktemp('shared')
    patch.setenv('HYDRAMOE_CACHE', str(d/'cache'))
    yield d
    patch.undo()

@pytest.fixture(scope='module')
def made(cache):
    "A build with a shared expert, half of its rows held out; where it is"
    build(cache/'b', dev=.5)
    return cache/'b'

def stages(cache): return cache/'cache'/'stages'

def logits(hydra, gates=None):
    "Of a prompt, by these gates; None: the bare base"
    ids = torch.arange(3, 30)[None]
    with torch.no_grad(): return hydra.model(ids, gates=gates).logits

# ---- the spec

@pytest.mark.parametrize('golden', ['bundle-1', 'small_hydra'])
def test_a_bundle_from_before_is_read_as_one_without_a_shared_expert(golden):
    built = read_json(Path(__file__).parent/'data'/golden/'hydra.json')['built']
    record = built.get('spec') or spec_record(BuildSpec(shared=0))
    assert 'shared' not in record
    assert stored_spec('old', record).shared==0
    assert BuildSpec().shared>0
    assert spec_record(stored_spec('old', record))==record

def test_a_spec_with_a_shared_expert_comes_back(made):
    spec = stored_spec(made, check_bundle(made)['built']['spec'])
    assert (spec.shared, spec.rank)==(4, 2)
    assert spec_record(spec)['shared']==4

# ---- a build

def test_the_bundle_holds_what_the_stages_trained(made):
    manifest = check_bundle(made)
    assert manifest['format']==2
    assert manifest['shared']==dict(rank=4, alpha=8)
    assert {(e['rank'], e['alpha']) for e in manifest['experts']}=={(2, 4)}
    about = dict(built=manifest['built'])
    experts, seed = (find_stage(about, what) for what in ('experts', 'seed'))
    def tensors(folder): return load_file(folder/'adapter_model.safetensors')
    pairs = [(made/'shared', experts/'shared'/'adapter')]
    pairs += [(made/'experts'/e['name'], experts/e['name']) for e in manifest['experts']]
    for ours, theirs in pairs:
        assert all(torch.equal(t, tensors(theirs)[k]) for k, t in tensors(ours).items())
    started = tensors(seed/'seed')
    ended = tensors(made/'shared')
    assert all(t.shape==started[k].shape for k, t in ended.items())
    key = 'base_model.model.model.layers.0.mlp.down_proj.lora_B.weight'
    assert not torch.equal(started[key], ended[key])
    note = manifest['built']['shared']
    counts = manifest['built']['counts']
    assert note['rows']==counts['train']==sum(e['rows'] for e in manifest['experts'])
    assert note['tokens']==counts['tokens']
    assert note['steps']==len(read_json(experts/'history.json')['history'])==-(-2*note['rows']//2)

def test_the_seed_expert_does_not_depend_on_residuals(cache, made):
    before = set(stages(cache).glob('seed_expert-*'))
    build(None, dev=.5, rank=3, k=2)
    assert set(stages(cache).glob('seed_expert-*'))==before
    build(None, dev=.5, shared=3, k=2)
    assert len(set(stages(cache).glob('seed_expert-*')))==len(before)+1

def test_a_second_build_makes_nothing_and_gives_the_same(cache, made):
    before = set(stages(cache).iterdir())
    files = files_in(made)
    build(cache/'again', dev=.5)
    assert set(stages(cache).iterdir())==before
    assert files_in(cache/'again')==files

def test_the_scores_are_those_of_the_hydra(made):
    hydra = Hydra.load(made)
    rows = held_out_rows(hydra.about)
    examples = [encode(r, hydra.base.tokenizer, 300, 300) for r in rows]
    scores = {s['system']: s['ppl'] for s in hydra.about['built']['scores']}
    assert list(scores)[:2]==['base', SHARED_ALONE]
    n = len(rows)
    weights = {'base': None, SHARED_ALONE: torch.zeros(n, 3), 'uniform mix': torch.full((n, 3), 1/3)}
    for name, gates in weights.items():
        assert routed_perplexity(hydra.model, examples, gates)==pytest.approx(scores[name], rel=1e-4)
    assert len({round(p, 6) for name, p in scores.items() if name in weights})==3

def test_the_shared_expert_alone_is_never_chosen_for_a_router(cache, monkeypatch):
    "Whatever it scores: no router gives zero to all"
    values = iter([.1, *range(2, 99)]) # it is measured first
    monkeypatch.setattr(built_by, 'routed_perplexity', lambda model, examples, gates: float(next(values)))
    hydra = build(None, dev=.5, root=cache/'never')
    assert min(hydra.about['built']['scores'], key=lambda s: s['ppl'])['system']==SHARED_ALONE
    assert (hydra.router.kind, hydra.router.params['temperature'])==('similarity', .02)

class Stopped(Exception): pass

@pytest.mark.parametrize('at', [2])
def test_stopped_in_the_joint_run_it_goes_on_to_the_same_bundle(cache, monkeypatch, at):
    from hydramoe.experts import train
    monkeypatch.setenv('HYDRAMOE_CACHE', str(cache/f'whole{at}'))
    how = dict(epochs=4)
    build(cache/f'whole-{at}', **how)
    monkeypatch.setenv('HYDRAMOE_CACHE', str(cache/f'stopped{at}'))
    built_by.run_seed(*_seeded(how))
    save = train.save_checkpoint
    left = [at]
    def stop(*args):
        path = save(*args)
        left[0] -= 1
        if not left[0]: raise Stopped
        return path
    with monkeypatch.context() as m:
        m.setattr(train, 'save_checkpoint', stop)
        with pytest.raises(Stopped): build(cache/f'stopped-{at}', **how)
    assert not (cache/f'stopped-{at}').exists()
    assert not list((cache/f'stopped{at}'/'stages').glob('shared_stage-*/seal.json'))
    seen = []
    def note_steps(work, opt, history, job):
        seen.append(len(history))
        return save(work, opt, history, job)
    with monkeypatch.context() as m:
        m.setattr(train, 'save_checkpoint', note_steps)
        build(cache/f'stopped-{at}', **how)
    assert seen[0]>10*at # it went on, and did not begin again
    assert files_in(cache/f'stopped-{at}')==files_in(cache/f'whole-{at}')

def _seeded(how):
    "Rows and spec of `build`"
    from hydramoe.hydra.rows import run_deal
    from hydramoe.hydra.spec import resolve_spec
    spec = BuildSpec(base='tiny', quant='fp32', encoder='words', k=3, lr=3e-3, **RANKS, **how)
    rows, counts = run_deal(lesson_rows(), spec)
    return rows, resolve_spec(spec, counts['train'], counts['prompts'])

@pytest.mark.slow
def test_killed_at_any_moment_the_bundle_is_the_same(tmp_path):
    from hydramoe.hydra.spec import BuildSpec
    assert BuildSpec().shared
    assert start_build(tmp_path/'whole', tmp_path/'cache', '1', shared=8).wait()==0
    want = files_in(tmp_path/'whole')
    rounds = 0 # how often a build was killed while it ran
    for wait in (4, 6, 7, 8, 9, 10, 11):
        p = start_build(tmp_path/'killed', tmp_path/'cache2', '2', shared=8)
        time.sleep(wait)
        rounds += p.poll() is None
        p.send_signal(signal.SIGKILL)
        p.wait()
    assert rounds
    assert start_build(tmp_path/'killed', tmp_path/'cache2', '3', shared=8).wait()==0
    assert files_in(tmp_path/'killed')==want

def test_what_one_job_does_not_hold_is_refused_before_training(cache, tmp_path):
    said = r'memory=0.0005 GB do not hold a shared expert and 3 residuals.*--shared 0'
    for out in (None, tmp_path/'x'):
        with pytest.raises(HydraError, match=said): build(out, memory=.0005, root=tmp_path/'stages')
    assert not list((tmp_path/'stages').glob('seed_expert-*'))
    assert not (tmp_path/'x').exists()
    plain = build(None, memory=.0002, shared=0, rank=4, epochs=1, root=tmp_path/'stages')
    assert not plain.shared
    assert len(list((tmp_path/'stages').glob('experts_stage-*/seal.json')))>1

WISHES = [(dict(shared=-1), 'shared=-1'), (dict(shared=1.5), 'shared=1.5'),
          (dict(shared=65), 'shared=65: no layer of tiny')]

@pytest.mark.parametrize('kw, words', WISHES)
def test_wishes_that_cannot_be_met(cache, kw, words):
    with pytest.raises(HydraError, match=words): build(None, **kw)

def test_on_another_process_the_same(cache):
    here_made = build(None, epochs=1, root=cache/'one')
    local = build(None, epochs=1, root=cache/'two', run=dict(executor='local', workers=2))
    assert torch.equal(here_made.model.stack.theta, local.model.stack.theta)

# ---- one more, one less

def test_one_more_and_one_less_leave_the_shared_expert_alone(cache, made):
    """Its bytes and those of the other residuals are the same in the larger bundle and in the smaller one;
    it needs no stage of the build"""
    new = add_expert(made, BIRDS, 'birds', cache/'six', root=cache/'elsewhere')
    before = sealed(made, 'experts/', 'shared/')
    after = sealed(cache/'six', 'experts/', 'shared/')
    assert any(f.startswith('shared/') for f in before)
    assert before.items()<=after.items()
    assert {f.split('/')[1] for f in after.keys()-before}=={'birds'}
    assert new.model.stack.ranks==[2]*4+[4]
    old = Hydra.load(made)
    for e in range(3): assert torch.equal(logits(old, torch.eye(3)[e:e+1]), logits(new, torch.eye(4)[e:e+1]))
    assert not torch.equal(logits(new, torch.eye(4)[3:]), logits(new, torch.zeros(1, 4)))
    remove_expert(cache/'six', 'birds', cache/'back')
    assert sealed(cache/'back', 'experts/', 'shared/', 'router/')==sealed(made, 'experts/', 'shared/', 'router/')
    gone = old.names[0]
    remove_expert(made, gone, cache/'less')
    assert sealed(cache/'less', 'shared/')==sealed(made, 'shared/')
    assert load_router(cache/'less'/'router').names==old.names[1:]
    assert check_bundle(cache/'less')['format']==2

def test_a_residual_learns_on_the_shared_expert(cache, made):
    "Its rows are better with it than with the shared expert alone, and it was trained as the spec says"
    new = add_expert(made, BIRDS, 'birds', cache/'more', root=cache/'elsewhere')
    examples = [encode(r, new.base.tokenizer, 300, 300) for r in BIRDS]
    def ppl(gates): return routed_perplexity(new.model, examples, gates.expand(len(BIRDS), -1))
    own = ppl(torch.eye(4)[3])
    alone = ppl(torch.zeros(4))
    assert own<alone
    history = read_json(next((cache/'elsewhere').glob('residuals_stage-*/history.json')))
    assert 'shared' not in history['history'][0]['loss']
    assert history['experts']['birds']['steps']==min(20, len(history['history']))

def test_a_residual_branches_from_nothing(cache, made):
    for start in ('fresh', made/'shared'):
        with pytest.raises(HydraError, match='leave start .--start. out'):
            add_expert(made, BIRDS, 'birds', cache/'x', start=start)
    assert not (cache/'x').exists()

def test_what_remains_of_an_expert(cache, made):
    build(cache/'plain', dev=.5, shared=0)
    add_expert(made, BIRDS, 'birds', cache/'with-birds', root=cache/'elsewhere')
    experts = check_bundle(made)['experts']
    name = experts[0]['name']
    by_shared = 'the shared expert'
    by_seed = 'the seed expert that the others branched from'
    for bundle, seen in ((made, by_shared), (cache/'plain', by_seed), (cache/'with-birds', by_shared)):
        found = what_remains(bundle, name)
        assert found['seen_by']==[seen]
        assert f'{seen} learnt from the rows of {name} too' in found['text']
        assert found['rebuild']['seconds']>=0
        assert f"{found['rebuild']['tokens']:,} tokens" in found['text']
    others = [e for e in experts if e['name']!=name]
    rebuild = what_remains(made, name)['rebuild']
    assert rebuild['rows']==sum(e['rows'] for e in others)
    assert rebuild['tokens']==sum(e['tokens'] for e in others)
    added = what_remains(cache/'with-birds', 'birds')
    assert added==dict(text='nothing else was trained on the rows of birds', seen_by=[], rebuild=None)
    hydra = Hydra.load(cache/'with-birds')
    merge = merge_hydra(hydra, 'linear', {'birds': 1., name: 1.})
    with pytest.raises(HydraError, match="'Shared' is taken"):
        add_merged_expert(cache/'with-birds', hydra, merge, cache/'never', name='Shared')
    add_merged_expert(cache/'with-birds', hydra, merge, cache/'merged-birds')
    assert what_remains(cache/'merged-birds', 'birds')['seen_by']==['merged']
    assert what_remains(cache/'merged-birds', name)['seen_by']==['the shared expert', 'merged']
    assert what_remains(cache/'merged-birds', 'merged')['seen_by']==[]
    with pytest.raises(HydraError, match='nobody'): what_remains(made, 'nobody')

@pytest.mark.parametrize('ranks', [RANKS, dict(shared=2, rank=4)])
def test_forked(cache, ranks):
    """The trunk is the seed expert below the fork, in the shared expert and all residuals; whoever joins later
    stands on it too"""
    name = f"half-{ranks['rank']}"
    hydra = build(cache/name, fork=.5, **ranks)
    more = add_expert(cache/name, BIRDS, 'birds', cache/f'{name}-more', root=cache/'elsewhere')
    assert hydra.model.stack.fork==1
    assert torch.equal(hydra.model.stack.trunk, more.model.stack.trunk)
    before = sealed(cache/name, 'experts/', 'shared/')
    assert before.items()<=sealed(cache/f'{name}-more', 'experts/', 'shared/').items()
    seed = load_file(find_stage(hydra.about, 'seed')/'seed'/'adapter_model.safetensors')
    shared = load_file(cache/name/'shared'/'adapter_model.safetensors')
    below = [k for k in seed if '.layers.0.' in k]
    r = ranks['shared']
    for k in below:
        cut = (slice(r), slice(None)) if 'lora_A' in k else (slice(None), slice(r))
        assert torch.equal(shared[k][cut], seed[k])
        assert torch.isclose(shared[k].norm(), seed[k].norm())
    again = Hydra.load(cache/name)
    assert torch.equal(again.model.stack.theta, hydra.model.stack.theta)

# ---- merges

def noisy_shared(fork=0):
    "A Hydra of noise: three residuals of rank 2 on a shared expert of rank 4"
    base = tiny_base()
    model = gated(base, 3, LoraSpec(rank=4, fork=fork), shared=True)
    for e, name in enumerate(NAMES): model.stack.init_expert(e, e, name, *(() if fork else (2, 8)))
    model.stack.init_expert(3, 3)
    for e in range(4):
        rank = model.stack.ranks[e]
        for i in model.stack.upper_layers:
            _, B = model.stack.leaves[i]
            noise = rng(e, 'noise', i).normal(0, .1, B[e,:,:rank].shape)
            B[e,:,:rank] += torch.from_numpy(noise).float()
    model.stack.trunk += torch.from_numpy(rng(fork, 'trunk').normal(0, .1, model.stack.trunk.shape)).float()
    return Hydra(base, model, uniform_router(NAMES))

@pytest.fixture(scope='module', params=[0, 1], ids=['whole', 'forked'])
def noise(request, tmp_path_factory):
    "A bundle of noise; where it is"
    place = tmp_path_factory.mktemp('noise')/'b'
    noisy_shared(request.param).save(place)
    return place

def merged(bundle, method='linear', **kw):
    "A Hydra without its experts, and their merge"
    hydra = Hydra.load(bundle)
    return hydra, merge_hydra(hydra, method, **kw)

def asked(text): return [dict(role='user', content=text)]
def answered(text): return [dict(role='assistant', content=text)]

SAID = [dict(id=str(i), prompt=asked(f'{name} {i}?'), completion=answered(f'{name} it is'), domain=name)
        for i, name in enumerate(NAMES*2)] # held out

def test_a_merge_of_residuals_is_one_more_on_the_same_shared_expert(noise, tmp_path):
    weights = dict(zip(NAMES, (.5, 1., -.25)))
    mixed = logits(Hydra.load(noise), torch.tensor([list(weights.values())]))
    larger = add_merged_expert(noise, *merged(noise, weights=weights), tmp_path/'larger')
    gates = torch.eye(4)[3:]
    torch.testing.assert_close(logits(larger, gates), mixed, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(Hydra.load(tmp_path/'larger'), gates), mixed, rtol=1e-4, atol=1e-4)
    assert sealed(noise, 'experts/').items()<=sealed(tmp_path/'larger', 'experts/').items()
    assert sealed(noise, 'shared/')==sealed(tmp_path/'larger', 'shared/')
    assert (mixed-logits(Hydra.load(noise), torch.zeros(1, 3))).abs().max()>1e-2

def test_a_merged_adapter_and_a_dense_model_hold_the_shared_expert(noise, tmp_path):
    want = logits(Hydra.load(noise), torch.full((1, 3), 1/3))
    hydra, merge = merged(noise)
    ids = torch.arange(3, 30)[None]
    adapter = save_merged_adapter(hydra, merge, tmp_path/'adapter')
    assert read_json(adapter/'receipt.json')['shared_rank']==4
    with torch.no_grad():
        torch.testing.assert_close(peft(tiny_base().model, adapter)(ids).logits, want, rtol=1e-4, atol=1e-4)
        dense = open_checkpoint(write_dense(hydra, merge, tmp_path/'dense'), 'fp32', 'cpu')
        torch.testing.assert_close(dense(ids).logits, want, rtol=1e-4, atol=1e-4)

def test_the_search_scores_a_merge_beside_the_shared_expert(noise):
    "A linear merge is the uniform mix, and so are its losses"
    losses = merge_hydra(Hydra.load(noise), 'linear', rows=SAID, scale=1.).receipt['development']['losses']
    assert losses['merged']==pytest.approx(losses['uniform mix'], abs=1e-4)
    assert abs(losses[SHARED_ALONE]-losses['merged'])>1e-3
    table = compare_merges(Hydra.load(noise), SAID, ('linear',), lengths=(1.,))
    assert {row['system'] for row in table}=={'base', SHARED_ALONE, *NAMES, 'uniform mix', 'routed', 'merge: linear'}

def test_what_residuals_cannot_be_is_refused_by_name(noise, tmp_path):
    said = 'mergekit merges adapters whole.*--to dense.*--to adapter'
    with pytest.raises(HydraError, match=said): write_mergekit(noise, *merged(noise), tmp_path/'recipe')
    since = 'residuals on a shared expert.*--since'
    seed = noise/'shared'
    with pytest.raises(HydraError, match=since): merge_hydra(Hydra.load(noise), 'linear', seed_expert=seed)
    with pytest.raises(HydraError, match=since): compare_merges(Hydra.load(noise), SAID, ('linear',), seed_expert=seed)
    to_mergekit = ['--to', 'mergekit', '--method', 'linear']
    on_seed = ['--method', 'linear', '--since', seed]
    for flags, said in ((to_mergekit, '--to dense'), (on_seed, 'leave seed_expert (--since) out')):
        out = here('merge', noise, *flags, '--out', tmp_path/'recipe', '--quiet', cwd=tmp_path)
        assert (out.returncode, out.stderr.count('\n'))==(2, 1), out.stderr
        assert said in out.stderr, out.stderr
    assert not (tmp_path/'recipe').exists()

# ---- compared

def test_plain_experts_are_made_of_the_edited_domains(cache):
    file = cache/'edited.yaml'
    how = {name: value for name, value in USUAL.items() if name in BuildSpec.__dataclass_fields__}
    propose_domains(lesson_rows(), file, **how)
    body = yaml.safe_load(file.read_text())
    for domain in body['domains']: domain['name'] = f"my-{domain['name']}"
    file.write_text(yaml.safe_dump(body))
    about = build(cache/'edited', domains=file).about
    text = (cache/'edited'/'hydra.json').read_text()
    assert not [row for row in lesson_rows() if row['prompt'][0]['content'] in text] # of the file only its hash
    plain, _ = run_plain(about)
    names = [folder.name for folder in find_adapters(plain['experts'])]
    assert names and all(name.startswith('my-') for name in names)

def test_all_three_have_equal_tokens_start_and_active_rank(made):
    about = dict(built=check_bundle(made)['built'])
    plain, spec = run_plain(about)
    single = run_single(about)
    joint = find_stage(about, 'experts')
    folders = (joint, plain['experts'], single.parent)
    def tokens_of(folder): return sum(step['tokens'] for step in read_json(folder/'history.json')['history'])
    assert len({tokens_of(f) for f in folders})==1
    assert (spec.shared, spec.rank)==(0, 6)
    adapters = [single, *(plain['experts']/e['name'] for e in check_bundle(made)['experts'])]
    assert {read_json(a/'adapter_config.json')['r'] for a in adapters}=={6}
    assert run_plain(about)[0]==plain
    starts = {read_json(f/'seal.json')['meta']['inputs']['start'] for f in folders}
    assert starts=={about['built']['seals']['seed']}

def test_there_is_nothing_to_compare_plain_experts_with(cache):
    with pytest.raises(HydraError, match='plain ones already'): run_plain(build(None, dev=.5, shared=0, epochs=1).about)

# ---- the command

@pytest.fixture(scope='module')
def rows(cache):
    pairs = [(f'{start}{t}', topic) for start in ('', 'Please: ') for t, topic in zip(*lesson_texts())]
    write_jsonl(cache/'mine.jsonl', [dict(prompt=t, completion=topic) for t, topic in pairs])
    return cache/'mine.jsonl'

def test_help_has_both_options(cache):
    said = here('build', '--help', cwd=cache).stdout
    assert '--shared N' in said
    assert '--compare' in said
    assert 'residual' not in here('adopt', '--help', cwd=cache).stdout

CANNOT_BE_BUILT = [
    (['--compare', '--shared', 0], 'leave --shared 0 out'), (['--compare', '--no-verdict'], 'leave --no-verdict out'),
    (['--shared', -1], 'shared=-1'), (['--memory', '.0001'], '--shared 0')]

@pytest.mark.parametrize('flags, said', CANNOT_BE_BUILT)
def test_what_cannot_be_built_is_refused(cache, rows, flags, said):
    for dry in ([], ['--dry-run']):
        out = here('build', rows, *TINY, '--k', 2, *flags, *dry, '--out', 'refused', '--quiet', cwd=cache)
        assert (out.returncode, out.stderr.count('\n'))==(2, 1), out.stderr
        assert said in out.stderr, out.stderr
    assert not (cache/'refused').exists()

def test_a_dry_run_says_what_it_takes(cache, rows):
    how = ['--shared', 16, '--rank', 4, '--dry-run', '--json']
    found = json.loads(here('build', rows, *TINY, '--k', 2, *how, cwd=cache).stdout)
    assert found['weights_of_the_shared']==4*found['weights_of_an_expert']
    assert found['disk_gb']>0
    assert found['spec']['shared']==16
    plain = here('build', rows, *TINY, '--k', 2, '--shared', 0, '--dry-run', cwd=cache).stdout
    assert 'shared expert' not in plain

def test_compare_puts_three_ways_into_one_table(cache, rows, monkeypatch):
    monkeypatch.setattr('hydramoe.hydra.card.MIN_DEV_ROWS', 4)
    how = ['--lr', '5e-3', '--epochs', 1, '--compare', '--out', 'compared', '--json', '--quiet']
    out = here('build', rows, *TINY, '--k', 2, *how, cwd=cache)
    assert out.returncode==0, out.stderr
    found = json.loads(out.stdout)['verdict']
    table = {row['system']: row for row in found['comparison']}
    assert list(table)==['base', 'single adapter', 'plain experts', SHARED_ALONE, 'shared expert and residuals']
    assert table['single adapter']['percent']==0
    assert table['base']['ppl']>table['single adapter']['ppl']
    verdict = {row['system']: row['ppl'] for row in found['systems']}
    assert verdict['routed']==table['shared expert and residuals']['ppl']
    assert found['one_adapter']=='single adapter'

def test_remove_says_what_stays(cache, made):
    name = check_bundle(made)['experts'][0]['name']
    out = here('remove', made, name, '--out', 'removed', '--quiet', cwd=cache)
    assert out.returncode==0
    assert f'the shared expert learnt from the rows of {name} too' in out.stdout
    assert 'build again without them' in out.stdout
