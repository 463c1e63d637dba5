"What a Hydra promises beyond its lesson: two processes, kill -9, PEFT alone"
import gc, json, os, shutil, subprocess, sys, threading, time, tracemalloc
from pathlib import Path
import numpy as np
import pytest, torch
from safetensors.torch import load_file, save_file
from transformers import TextStreamer

from hydramoe.models.base import tiny_base
from hydramoe.models.load import load_base
from hydramoe.foundations.core import HydraError, rng
from hydramoe.foundations.files import file_sha256, read_json, write_json
from hydramoe.hydra.bundle import BundleError, check_bundle
from hydramoe.hydra.generation import Draw, Request, sampling_keywords
from hydramoe.hydra import Hydra
from hydramoe.hydra.chat import Chat
from hydramoe.hydra.route import uniform_router
from hydramoe.experts.gates import one_hot
from helpers import files_in, put, sign, spots
from hydras import NAMES, by_hand, ids, noisy, reseal, save_base, scripted
from templates import TALKS, laid_out, last_label

@pytest.fixture(scope='module')
def bundle(tmp_path_factory): return by_hand().save(tmp_path_factory.mktemp('bundle')/'h')

def test_same_logits_after_a_round_trip(bundle):
    a, b = by_hand(), Hydra.load(bundle)
    x, g = ids(a, 'A Hydra has nine heads'), torch.tensor([[.2, .5, .3]])
    with torch.no_grad(): assert torch.equal(a.model(x, gates=g).logits, b.model(x, gates=g).logits)
    prompts = ['ahoy', 'the law of the sea']
    assert a.generate(prompts, max_new_tokens=10) == b.generate(prompts, max_new_tokens=10)

@pytest.mark.parametrize('quant', ['bf16', 'nf4'])
def test_other_precisions_keep_the_fingerprint(bundle, quant):
    h = Hydra.load(bundle, quant=quant)
    assert h.base.quant == quant
    assert len(h.ask('ahoy', max_new_tokens=4)) >= 0

def test_expert_loads_in_peft_alone(bundle):
    from peft import PeftModel
    hydra = Hydra.load(bundle)
    x = ids(hydra, 'A Hydra has nine heads')
    for e, name in enumerate(NAMES):
        alone = PeftModel.from_pretrained(tiny_base().model, bundle/'experts'/name).eval()
        with torch.no_grad():
            ours, theirs = hydra.model(x, gates=one_hot([e], 3)).logits, alone(x).logits
            assert (ours-hydra.model(x).logits).abs().max() > .1
        assert torch.allclose(ours, theirs, atol=1e-4)

MAKE = """
import sys
sys.path.insert(0, {tests!r})
from hydras import by_hand
by_hand().save(sys.argv[1])
"""

@pytest.mark.parametrize('where', ['hydramoe', 'hydramoe.hydra'])
def test_wherever_it_is_imported_from_the_class_has_all_its_methods(where):
    "`build` is added by a later module, which a lazy import brings along; old model cards import from hydramoe.hydra"
    code = f"from {where} import Hydra; assert Hydra.build and Hydra.load and Hydra.save and Hydra.from_adapters"
    subprocess.run([sys.executable, '-c', code], check=True)

def test_two_processes_write_the_same_bytes(tmp_path, bundle):
    code = MAKE.format(tests=str(Path(__file__).parent))
    def start(seed):
        environment = os.environ | dict(PYTHONHASHSEED=seed)
        return subprocess.Popen([sys.executable, '-c', code, str(tmp_path/seed)], env=environment)
    both = [start(seed) for seed in ('1', '2')]
    assert [p.wait() for p in both] == [0, 0]
    assert files_in(tmp_path/'1') == files_in(tmp_path/'2') == files_in(bundle)

def test_a_mixed_batch_is_its_rows(bundle):
    h = Hydra.load(bundle)
    prompts = ['ahoy', 'what is the law of the sea?', 'sum up']
    experts = ['sea', 'base', {'law': .3, 'sum': .7}]
    alone = [h.ask(p, expert=e, max_new_tokens=8) for p, e in zip(prompts, experts)]
    assert h.generate(prompts, expert=experts, max_new_tokens=8) == alone
    with torch.no_grad():
        ours = h.model(ids(h, 'ahoy'), gates=h.gates(['ahoy'], 'base')).logits
        assert torch.equal(ours, tiny_base().model(ids(h, 'ahoy')).logits)

def test_beams_and_several_answers_keep_the_gate(bundle):
    h = Hydra.load(bundle)
    how = dict(max_new_tokens=6, num_beams=2)
    out = h.generate(['ahoy', 'sum up'], expert=['sea', 'sum'], **how)
    assert out == [h.ask('ahoy', expert='sea', **how), h.ask('sum up', expert='sum', **how)]

# --- values and letters from strangers -------------------------------------------------------------------------------

REFUSED_WISHES = [
    dict(do_sample=True), dict(eos_token_id=2), dict(pad_token_id=0), dict(return_dict_in_generate=True),
    dict(output_scores=True), dict(input_ids=torch.ones(1, 2)), dict(gates=None), dict(max_length=5),
    dict(generation_config=3), dict(never_heard_of=1),
    dict(temperature=float('nan')), dict(temperature=-1), dict(temperature=float('inf')), dict(temperature=1e-40),
    dict(temperature='1'),
    dict(max_new_tokens=0), dict(max_new_tokens=2.5), dict(max_new_tokens=True), dict(seed='x'),
    dict(expert=dict(law='x')), dict(expert=dict(law=float('nan'))), dict(expert=dict(law=1e300)), dict(expert=3),
    dict(expert=[]), dict(expert=('law',)),
    dict(top_p=2.), dict(top_k=-1), dict(num_beams=0), dict(num_return_sequences=3),
    dict(streamer=print, num_beams=2), dict(streamer=3), dict(early_stopping='x'), dict(past_key_values=3),
    dict(stop_strings=['x']), dict(repetition_penalty=0)]

@pytest.mark.parametrize('wish', REFUSED_WISHES, ids=str)
def test_what_generate_cannot_do_is_refused(bundle, wish):
    said = next(iter(wish)) if 'expert' not in wish else None
    with pytest.raises(HydraError, match=said): Hydra.load(bundle).ask('ahoy', **{**dict(max_new_tokens=3), **wish})

TAKEN_WISHES = [
    dict(temperature=1), dict(temperature=np.float32(1), top_p=1), dict(max_new_tokens=np.int64(3)),
    dict(num_beams=2, num_return_sequences=2), dict(temperature=1., num_return_sequences=2),
    dict(repetition_penalty=2), dict(temperature=1e-3), dict(temperature=1e300), dict(top_k=None)]

@pytest.mark.parametrize('wish', TAKEN_WISHES, ids=str)
def test_numbers_of_any_kind_are_taken(bundle, wish):
    Hydra.load(bundle).ask('ahoy', **{**dict(max_new_tokens=3), **wish})

def test_prompts_that_are_none(bundle):
    h = Hydra.load(bundle)
    for bad in ([], (), 'ahoy', None, [3], [[]], ['caf\udce9'], [[dict(role='user', content='caf\udce9')]]):
        with pytest.raises(HydraError): h.generate(bad, max_new_tokens=2)
    with pytest.raises(HydraError): Chat(h, margin=float('nan'))
    with pytest.raises(HydraError): Chat(h, system='caf\udce9')

def resealed(bundle, tmp_path, change=lambda man: None, file=None, text=None):
    "A copy whose manifest was changed, with every digest right"
    d = Path(shutil.copytree(bundle, tmp_path/'copy', dirs_exist_ok=True))
    man = read_json(bundle/'hydra.json')
    change(man)
    if file:
        (d/file).write_text(text)
        man['files'][file] = file_sha256(d/file)
    write_json(d/'hydra.json', sign(man))
    return d

NO_BASES = [
    'tiny:x', 'tiny:', 'tiny:-1', 'tiny:'+'9'*40, 'tiny:١', 'hub:'+'x'*5000, 'path:/'+'x'*900, 'path:'+'x/'*300,
    'path:a\0b', 'hub:a/b c', 'hub:~nobody-at-all/x', 'pypi:x', '', 'zip:x', 'hub:', 'path:a\nb']

@pytest.mark.parametrize('id', NO_BASES, ids=lambda i: ascii(i[:20]))
def test_a_base_that_cannot_be_named(bundle, tmp_path, id):
    with pytest.raises(HydraError): Hydra.load(resealed(bundle, tmp_path, lambda man: man['base'].update(id=id)))

def test_a_stranger_names_an_expert_base_or_a_precision(bundle, tmp_path):
    for change in (lambda man: man['experts'][0].update(name='base'), lambda man: man['base'].update(quant='int3')):
        with pytest.raises(HydraError): check_bundle(resealed(bundle, tmp_path, change))

@pytest.mark.parametrize('depth', [150, 500, 950, 990, 3000, 100_000])
def test_deep_json_in_any_file(bundle, tmp_path, depth):
    text = '{"a":'*depth + '1' + '}'*depth
    for f in [f for f in read_json(bundle/'hydra.json')['files'] if f.endswith('.json')]:
        with pytest.raises(BundleError): check_bundle(resealed(bundle, tmp_path, file=f, text=text))
    d = resealed(bundle, tmp_path)
    (d/'hydra.json').write_text(text)
    with pytest.raises(BundleError): Hydra.load(d)

def test_an_expert_cannot_be_called_base(bundle, tmp_path):
    from hydramoe.domains.name import name_domains
    from hydramoe.domains.discover import Domains
    from hydramoe.hydra.adopt import adopt
    with pytest.raises(HydraError, match="'base' is taken"): adopt(dict(base=bundle/'experts'/'sea'))
    with pytest.raises(HydraError, match="'BASE' is taken"): Domains(np.eye(2), ['BASE', 'x'])
    texts = ['base base', 'base', 'height height', 'height']
    assert 'base' not in name_domains(texts, np.array([0, 0, 1, 1]))

# --- threads and long runs -------------------------------------------------------------------------------------------

def test_eight_threads_with_eight_gates_answer_as_one_does():
    h = by_hand()
    mixes = ['law', 'sea', 'sum', 'base',
             {'law': .5, 'sea': .5}, {'sum': 2.}, {'law': .2, 'sea': .3, 'sum': .5}, {'sea': -1.}]
    hows = [{}, dict(num_beams=2), {}, {}, dict(use_cache=False), {}, dict(num_beams=3), {}]
    jobs = [(e, dict(max_new_tokens=12, **kw)) for e, kw in zip(mixes, hows)]
    asks = ['ahoy', 'what is the law of the sea?']
    want = [h.generate(asks, expert=e, **kw) for e, kw in jobs]
    assert len({str(w) for w in want}) == 8
    got, gate = [[] for _ in jobs], threading.Barrier(8)
    def work(i):
        gate.wait()
        for _ in range(3): got[i].append(h.generate(asks, expert=jobs[i][0], **jobs[i][1]))
    ts = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert got == [[w]*3 for w in want]

@pytest.mark.slow
def test_five_hundred_swaps_leave_nothing_behind():
    "Tensors and bytes that are alive after 500 more swaps and mixtures are those of before"
    h = by_hand()
    x, rs = ids(h, 'ahoy'), rng(0, 'swaps')
    def swap(n):
        for i in range(n):
            g = torch.from_numpy(rs.random((1, 3))).float() if i%3 == 0 else one_hot([i%3], 3)
            h.model.generate(x, gates=g, max_new_tokens=2, do_sample=False, pad_token_id=0)
    def alive():
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
        return len(tensors), sum(t.nbytes for t in tensors)
    tracemalloc.start()
    swap(200) # what torch and transformers keep for themselves is full by then
    tensors, first = alive(), tracemalloc.get_traced_memory()[0]
    swap(500)
    after, grown = alive(), tracemalloc.get_traced_memory()[0]-first
    tracemalloc.stop()
    assert after[0] <= tensors[0]+2, (tensors, after)
    assert after[1] <= tensors[1]+4096, (tensors, after)
    assert grown < 500*100, f'{grown/500:.0f} bytes a swap'

@pytest.mark.parametrize('quant', ['fp32', 'bf16', 'nf4'])
def test_the_base_is_bit_equal_before_with_and_after(quant):
    base = tiny_base(quant=quant)
    x = base.tokenizer('A Hydra has nine heads', return_tensors='pt').input_ids
    def say(m, **kw): return m(x, **kw).logits
    with torch.no_grad():
        before, weights = say(base.model), {n: p.clone() for n, p in base.model.named_parameters()}
        model = noisy(base)
        h = Hydra(base, model, uniform_router(NAMES))
        assert torch.equal(say(model), before)
        assert torch.equal(say(model, gates=torch.zeros(1, 3)), before)
        assert torch.equal(say(base.model), before)
        h.generate(['ahoy', 'sum up'], expert=['sea', {'law': .3, 'sum': .7}], max_new_tokens=5)
        assert not torch.equal(say(model, gates=one_hot([1], 3)), before)
        assert torch.equal(say(model), before)
        assert torch.equal(say(model, gates=h.gates(['ahoy'], 'base')), before)
        free = model.detach()
        assert torch.equal(say(free), before)
        assert all(torch.equal(p, weights[n]) for n, p in free.named_parameters())

# --- where an answer ends -------------------------------------------------------------------------------------------

def rambling(tokenizer, end):
    "An answer, its end, and the next user whom a model invents"
    answer = tokenizer('Hm.', add_special_tokens=False).input_ids
    more = tokenizer('and then user?', add_special_tokens=False).input_ids
    return answer + [end] + more

FAMILIES = ['llama3', 'qwen-base', 'gemma-it', 'phi3', 'not-special', 'pythia', 'smollm2-base', 'no-eos']

@pytest.mark.parametrize('name', FAMILIES)
def test_an_answer_ends_where_training_ends_it(name, tmp_path):
    """Asked alone, in a batch, sampled, with beams, in a conversation, by the base: it stops, and no mark is in the
    answer or in the stream"""
    b = laid_out(name, tmp_path)
    h, t = by_hand(b), b.tokenizer
    asks = [lambda **kw: h.ask('?', **kw),
            lambda **kw: h.ask('?', expert='base', **kw),
            lambda **kw: h.ask('?', temperature=1., **kw),
            lambda **kw: h.generate(['?', 'What is the law?'], **kw)[1],
            lambda **kw: Chat(h)('?', **kw)]
    for end in {last_label(t, TALKS[0]), *b.ends}:
        says = [i for i in rambling(t, end) if b.tokenizer.bos_token is None or i != b.tokenizer.bos_token_id]
        for ask in asks:
            with scripted(b.model, says) as said: assert ask(max_new_tokens=12) == 'Hm.'
            assert said[0] == 4
        with scripted(b.model, says): assert h.ask('?', max_new_tokens=12, num_beams=2) == 'Hm.'
        seen = []
        class Stream(TextStreamer):
            def on_finalized_text(self, text, stream_end=False): seen.append(text)
        stream = Stream(t, skip_prompt=True, skip_special_tokens=True)
        with scripted(b.model, says): h.ask('?', max_new_tokens=12, streamer=stream)
        assert ''.join(seen).strip() == 'Hm.'

def test_marks_written_as_text_are_no_part_of_the_answer(tmp_path):
    "ChatML on a vocabulary that has its marks as letters: they are said, then the end of text; the answer has neither"
    b = laid_out('pythia-chatml', tmp_path)
    h, t = by_hand(b), b.tokenizer
    says = t('Hm.<|im_end|>\n').input_ids + [last_label(t, TALKS[0])] + t('more').input_ids
    with scripted(b.model, says): assert h.ask('?', max_new_tokens=40) == 'Hm.'
    assert h.base.ends == [t.eos_token_id]

def test_smollm2_with_another_end_of_text_stops_after_its_answer():
    "Laid out as Gemma-it and Phi-3 are: the tokenizer ends texts, generation_config lists both ends"
    b = load_base('smollm2', 'fp32', 'cpu')
    ask, tok = 'What is the capital of France?', b.tokenizer
    h = by_hand(b)
    want = h.ask(ask, expert='base', max_new_tokens=40)
    tok.eos_token, b.model.generation_config.eos_token_id = '<|endoftext|>', [0, 2]
    assert tok.eos_token_id == 0
    assert h.base.ends == [0, 2]
    assert h.ask(ask, expert='base', max_new_tokens=40) == want
    assert len(tok(want).input_ids) < 38

# --- a seed for each call ---------------------------------------------------------------------------------------------

def test_eight_threads_draw_what_each_draws_alone():
    "And torch's own generator is as it was, also for whoever draws from it meanwhile"
    h = by_hand()
    questions = ['ahoy', 'what is the law of the sea?']
    more = [{}, dict(top_p=.9), dict(num_return_sequences=2)]
    def job(i):
        temperature = (.7, 1., 2.)[i%3]
        return dict(prompts=questions[:1+i%2], seed=i, temperature=temperature, max_new_tokens=12, **more[i%3])
    jobs = [job(i) for i in range(8)]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    want = [h.generate(**j) for j in jobs]
    assert len({str(w) for w in want}) == 8
    got, foreign = [[] for _ in jobs], []
    gate = threading.Barrier(9)
    def work(i):
        gate.wait()
        for _ in range(3): got[i].append(h.generate(**jobs[i]))
    ts = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in ts: t.start()
    gate.wait()
    while any(t.is_alive() for t in ts):
        foreign.append(torch.rand(1).item())
        time.sleep(.002)
    for t in ts: t.join()
    assert got == [[w]*3 for w in want]
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    assert foreign == [torch.rand(1).item() for _ in foreign]
    assert torch.equal(torch.get_rng_state(), after)

SHAPES = [dict(top_k=0), dict(top_k=3), dict(top_k=0, top_p=.7), dict(min_p=.3), dict(top_k=0, temperature=2.),
          dict(top_k=2, temperature=.5)]

@pytest.mark.parametrize('how', SHAPES, ids=str)
def test_draws_have_the_distribution_of_the_scores(how):
    "Chi-square of 20,000 rows, after what shapes the distribution; what is ruled out is never drawn"
    from scipy.stats import chisquare
    from transformers import GenerationConfig
    asked = {**how}
    made = sampling_keywords(Request(8, asked.pop('temperature', 1.), 5, asked), 'cpu', GenerationConfig())
    p = made['logits_processor']
    assert made.keys() == {'logits_processor'}
    assert type(p[-1]) is Draw
    scores = torch.tensor([[1., 0., -1., .5, -3., 2.]]).repeat(20_000, 1)
    want = type(p)(p[:-1])(None, scores[:1].clone())[0].softmax(-1)
    seen = torch.bincount(p(None, scores).argmax(1), minlength=6)
    possible = want > 0
    expected = want[possible].double()/want.double().sum()*20_000
    assert not seen[want == 0].any()
    assert chisquare(seen[possible], expected).pvalue > .001

def test_beams_that_are_drawn_are_refused():
    with pytest.raises(HydraError, match='num_beams=2 with temperature=0.5.*temperature=0'):
        by_hand().ask('ahoy', temperature=.5, num_beams=2)

# --- refused ---------------------------------------------------------------------------------------------------------

def tensors(d, change, expert='law'):
    f = d/'experts'/expert/'adapter_model.safetensors'
    t = load_file(f)
    change(t)
    save_file(t, f, metadata={'format': 'pt'})

def first(t): return sorted(t)[0]
def drop(t): t.pop(first(t))
def nan(t): t[first(t)][0, 0] = float('nan')
def inf(t): t[first(t)][0, 0] = float('inf')
def nudge(t): t[first(t)][0, 0] += 1e-3
def both(t):
    name = first(t).rsplit('.lora', 1)[0]
    for k in list(t):
        if k.startswith(name): t.pop(k)
def wide(t):
    k = first(t).replace('lora_A', 'lora_B')
    t[k] = torch.cat([t[k]]*2)
def no_such_layer(t):
    layer = 'base_model.model.model.layers.9.mlp.up_proj'
    t[f'{layer}.lora_A.weight'] = torch.zeros(4, 64)
    t[f'{layer}.lora_B.weight'] = torch.zeros(128, 4)

@pytest.fixture
def copy(bundle, tmp_path): return Path(shutil.copytree(bundle, tmp_path/'copy'))

@pytest.mark.parametrize('change', [drop, nan, nudge, wide, no_such_layer])
def test_accident_names_file_and_tensor(copy, change):
    tensors(copy, change)
    with pytest.raises(BundleError, match=r'law/adapter_model.safetensors was altered: .*lora_'): check_bundle(copy)

@pytest.mark.parametrize('change', [drop, nan, inf, both, wide, no_such_layer])
def test_a_resealed_lie_is_refused_by_the_tensors_themselves(copy, change):
    tensors(copy, change)
    reseal(copy)
    with pytest.raises(HydraError, match=r'law.*lora_[AB]'): Hydra.load(copy)

@pytest.mark.parametrize('name', ['adapter_model.bin', 'model.pt', 'x.pkl', 'run.py', 'noext'])
def test_strangers_are_refused_by_name(copy, name):
    (copy/'experts'/'sea'/name).write_bytes(b'x')
    with pytest.raises(BundleError, match=name): check_bundle(copy)
    with pytest.raises(BundleError, match=name):
        reseal(copy)
        check_bundle(copy)

@pytest.mark.parametrize('target', ['/etc/hostname', '../../outside', 'config.json'])
def test_links_are_refused(copy, target):
    (copy/'router'/'more.json').symlink_to(target)
    with pytest.raises(BundleError, match='more.json is a link'): check_bundle(copy)

def test_a_linked_folder_is_refused(copy):
    shutil.move(copy/'experts', copy.parent/'moved')
    (copy/'experts').symlink_to(copy.parent/'moved')
    with pytest.raises(BundleError, match='experts is a link'): check_bundle(copy)

@pytest.mark.parametrize('format', [0, 2, '1', None, True, 1.0])
def test_unknown_format(copy, format):
    write_json(copy/'hydra.json', read_json(copy/'hydra.json') | dict(format=format))
    with pytest.raises(BundleError, match='format'): check_bundle(copy)

@pytest.mark.parametrize('text', ['', '[]', '{}', 'null', '{"format": 1}', '{"format": 1, "files": []', '[' * 2000])
def test_broken_manifests(copy, text):
    (copy/'hydra.json').write_text(text)
    with pytest.raises(HydraError, match='hydra.json'): check_bundle(copy)

@pytest.mark.parametrize('cut', [1, 8, 100, -1])
def test_truncated_tensors(copy, cut):
    f = copy/'experts'/'sum'/'adapter_model.safetensors'
    f.write_bytes(f.read_bytes()[:cut])
    with pytest.raises(BundleError, match='sum/adapter_model.safetensors'): check_bundle(copy)
    with pytest.raises(BundleError, match='sum/adapter_model.safetensors'):
        reseal(copy)
        check_bundle(copy)

@pytest.mark.parametrize('key', ['auto_map', 'trust_remote_code'])
@pytest.mark.parametrize('file', ['config.json', 'experts/law/adapter_config.json'])
def test_code_from_elsewhere(copy, key, file):
    write_json(copy/file, read_json(copy/file) | dict(nested=[dict(deep={key: True})]))
    reseal(copy)
    with pytest.raises(BundleError, match=f'{file} holds {key}'): check_bundle(copy)

def test_changed_scale(copy):
    f = copy/'experts'/'law'/'adapter_config.json'
    write_json(f, read_json(f) | dict(lora_alpha=1600))
    with pytest.raises(BundleError, match='adapter_config.json was altered'): check_bundle(copy)
    reseal(copy)
    with pytest.raises(BundleError, match='lora_alpha=1600'): check_bundle(copy)

def test_another_base_of_the_same_shape(bundle, tmp_path):
    with pytest.raises(BundleError, match='another base'): Hydra.load(bundle, base=tiny_base(seed=1))
    save_base(tiny_base(seed=1), tmp_path)
    with pytest.raises(BundleError, match='another base'): Hydra.load(bundle, base=str(tmp_path))

def test_an_expert_that_nobody_lists(copy):
    shutil.copytree(copy/'experts'/'sea', copy/'experts'/'spy')
    reseal(copy)
    with pytest.raises(BundleError, match='experts/spy is extra'): check_bundle(copy)

def test_config_names_no_field_that_transformers_cannot_save(bundle):
    cfg = read_json(bundle/'config.json')
    assert cfg['model_type'] == 'hydra_moe'
    assert cfg['text_config']['model_type'] == 'llama'
    assert not {'top_k', 'temperature'} & set(cfg)
    assert 'auto_map' not in json.dumps(cfg)

def rewritten(d, name, text):
    "One JSON file replaced, every digest made to fit"
    write_json(d/name, text)
    man = read_json(d/'hydra.json')
    if not isinstance(man, dict) or not isinstance(man.get('files'), dict): return
    if name != 'hydra.json': man['files'][name] = file_sha256(d/name)
    write_json(d/'hydra.json', sign(man))

FORGED = ['hydra.json', 'config.json', 'tensors.json', 'experts/law/adapter_config.json', 'router/router.json']

@pytest.mark.parametrize('name', FORGED)
def test_any_forged_value_is_refused_or_harmless(copy, bundle, name):
    "No forgery ends in anything but a refusal that says why, or in the same Hydra"
    whole, manifest = read_json(copy/name), read_json(copy/'hydra.json')
    want = Hydra.load(bundle).model.stack.theta
    for at in [*spots(whole)][:40]:
        for v in (..., None, True, 'x', [{}]):
            if at == () and v is ...: continue
            rewritten(copy, name, put(whole, at, v))
            try: assert torch.equal(Hydra.load(copy).model.stack.theta, want), (at, v)
            except HydraError as e: assert str(e)
            write_json(copy/'hydra.json', manifest)
