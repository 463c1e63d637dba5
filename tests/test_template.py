"Where an answer ends, in the layouts of many families of models"
import json
import pytest, torch
from hydramoe.models.base import hide_loading_bars
from hydramoe.models.encode import encode
from hydramoe.models.load import base_tokenizer, load_base
from hydramoe.models.packaged import gemma_chat, smollm2_dir
from hydramoe.models.template import byte_tokenizer, chatml, end_ids, end_suffix, mark_tokens, render, render_split
from hydramoe.data.records import record
from hydramoe.foundations.core import HydraError, cache_dir
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
    'qwen': layout(CHAT, chatml, CHAT[2], [CHAT[2], CHAT[0]]), 'qwen-base': layout(CHAT, chatml, CHAT[0], [CHAT[0]]),
    'smollm2-base': layout(CHAT, None, CHAT[0], [CHAT[0]]), 'smollm2-edited': layout(CHAT, chatml, CHAT[0], [CHAT[0], CHAT[2]]),
    'gemma-it': layout(GEMMA, gemma_chat, '<eos>', ['<eos>', '<end_of_turn>'], '<bos>'), 'gemma-base': layout(GEMMA, None, '<eos>', ['<eos>'], '<bos>'),
    'phi3': layout(PHI, BARRED, PHI[0], [PHI[0], PHI[1], PHI[3]]), 'not-special': layout(PHI, BARRED, PHI[0], [PHI[0]], plain=PHI[1:]),
    'pythia': layout(['<|endoftext|>', '<|padding|>'], None, '<|endoftext|>', ['<|endoftext|>'], plain=['  ', '    ']), 'pythia-chatml': layout(['<|endoftext|>'], chatml, '<|endoftext|>', ['<|endoftext|>']),
    'nothing-behind': layout(PHI, ROLES, PHI[0], [PHI[0], PHI[2]]), 'text-behind': layout(['<eos>'], SHARPS, '<eos>', []), 'spaces-behind': layout(['<eos>'], SHARPS.replace('### end\\n', '  '), '<eos>', [], plain=['\n', '  ']),
    'no-eos': layout(CHAT[:1], None, None, CHAT[:1]), 'no-eos-but-chatml': layout(CHAT, chatml, None, [])}

def laid_out(name, to):
    "A random Llama in a folder, with a tokenizer of bytes and the marks, template and lists of a layout"
    marks, template, eos, listed, bos, plain = LAYOUTS[name]
    b = byte_tokenizer().backend_tokenizer
    raw = json.loads(b.to_str())
    letters = [c for c in raw['model']['vocab'] if len(c)==1]
    raw['model']['vocab'], raw['added_tokens'] = {c: i for i,c in enumerate([m for m in marks if m not in plain]+letters)}, []
    t = PreTrainedTokenizerFast(tokenizer_object=type(b).from_str(json.dumps(raw)), eos_token=eos, bos_token=bos, chat_template=template)
    t.add_special_tokens({'additional_special_tokens': [m for m in marks if m not in plain]})
    t.add_tokens([AddedToken(m, special=False, normalized=False) for m in plain])
    if bos: t.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f'{bos} $A', special_tokens=[(bos, t.convert_tokens_to_ids(bos))])
    with torch.random.fork_rng(): model = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1))
    with hide_loading_bars(): model.save_pretrained(to)
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
    assert set(b.tokenizer.convert_tokens_to_ids(LAYOUTS[name][3])) <= set(b.ends) and set(b.ends) <= set(mark_tokens(b.tokenizer))
    assert b.ends==sorted(b.ends)==b.model.generation_config.eos_token_id and not ({'<|user|>', '<|im_start|>'}-set(LAYOUTS[name][3])) & set(b.tokenizer.convert_ids_to_tokens(b.ends))
    assert b.tokenizer.decode(b.ends, skip_special_tokens=True)==''

@pytest.mark.parametrize('name', [n for n in LAYOUTS if LAYOUTS[n][1] is None])
def test_chatml_for_a_base_without_a_template(name, tmp_path):
    "One id ends an answer; a text begins as the tokenizer begins it; with an answer it only appends"
    t = laid_out(name, tmp_path).tokenizer
    ask, answer = [dict(role='user', content='Hi.'), dict(role='assistant', content='Ahoy!'), dict(role='user', content='2+2?')], [dict(role='assistant', content='4')]
    prompt, whole = render(t, ask), render(t, ask, answer)
    assert whole.startswith(prompt+'4') and len(t(whole[len(prompt)+1:].strip(), add_special_tokens=False).input_ids)==1
    assert t(prompt, add_special_tokens=False).input_ids[:1]==t('x').input_ids[:1] if t.bos_token else prompt.startswith('<|im_start|>user')
    assert 'weather' in render(t, ask, tools=[dict(name='weather')])

def test_a_letter_is_never_made_an_end(tmp_path):
    "No eos anywhere but what the configuration class has by itself, which is a letter here; and plain text that the vocabulary does not know is no mark"
    laid_out('no-eos', tmp_path)
    for f in ('config.json', 'generation_config.json'): (tmp_path/f).write_text(json.dumps((json.loads((tmp_path/f).read_text()) if (tmp_path/f).is_file() else {}) | dict(eos_token_id=2)))
    with pytest.raises(HydraError, match='nothing says where an answer ends'): load_base(tmp_path, device='cpu')
    t = byte_tokenizer()
    t.chat_template, t.unk_token, t.eos_token = SHARPS, '<|im_start|>', '<|endoftext|>'
    t.chat_template = SHARPS.replace('### end', '<|im_start|>')
    assert end_ids(t)==[0] and end_suffix(t)=='<|endoftext|>'

def test_packaged_bases_end_as_they_did():
    "Neither their labels nor what is written change; gemma's only where it is there already"
    tokenizers = {'tiny': byte_tokenizer(), 'smollm2': base_tokenizer('smollm2')}
    if list((cache_dir()/'models').glob('gemma3-*')): tokenizers['gemma3'] = base_tokenizer('gemma3')
    for t in tokenizers.values():
        assert end_suffix(t)=='' and {last_label(t, talk) for talk in TALKS}=={t.eos_token_id}==set(end_ids(t))

# --- encoding

def test_a_prompt_keeps_its_own_ids_where_a_token_would_reach_across():
    "After 'Assistant: ' the space and the first word are one token in SmolLM2's vocabulary"
    t = AutoTokenizer.from_pretrained(smollm2_dir())
    t.chat_template = ("{% for m in messages %}{{ m['role'].capitalize()+': '+m['content']+'<|im_end|>\n' }}{% endfor %}"
                       "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}")
    row = record([dict(role='user', content='Who wrote Faust?')], 'Goethe.', source='x', domain='x', license='x')
    given, learned = render_split(t, row['prompt'], row['completion'])
    given_ids = t(given)['input_ids']
    assert t(given+learned)['input_ids'][:len(given_ids)]!=given_ids
    e = encode(row, t)
    assert e.ids[:e.n_prompt]==given_ids and t.decode(e.ids[e.n_prompt:])=='Goethe.<|im_end|>\n'
