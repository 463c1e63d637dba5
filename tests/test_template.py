"Where an answer ends, in the layouts of many families of models"
import json
import pytest
from hydramoe.models.encode import encode
from hydramoe.models.load import base_tokenizer, load_base
from hydramoe.models.packaged import smollm2_dir
from hydramoe.models.template import byte_tokenizer, end_ids, end_suffix, mark_tokens, render, render_split
from hydramoe.data.records import record
from hydramoe.foundations.core import HydraError, cache_dir
from transformers import AutoTokenizer
from templates import LAYOUTS, SHARPS, SPACE, TALKS, laid_out, last_label, with_template

@pytest.mark.parametrize('name', LAYOUTS)
def test_the_last_label_is_an_end(name, tmp_path):
    "Template, tokenizer and generation_config agree, whatever each says; letters are no ends"
    b = laid_out(name, tmp_path)
    assert {last_label(b.tokenizer, talk) for talk in TALKS} <= set(b.ends)
    assert set(b.tokenizer.convert_tokens_to_ids(LAYOUTS[name][3])) <= set(b.ends)
    assert set(b.ends) <= set(mark_tokens(b.tokenizer))
    assert b.ends==sorted(b.ends)==b.model.generation_config.eos_token_id
    assert not ({'<|user|>', '<|im_start|>'}-set(LAYOUTS[name][3])) & set(b.tokenizer.convert_ids_to_tokens(b.ends))
    assert b.tokenizer.decode(b.ends, skip_special_tokens=True)==''

@pytest.mark.parametrize('name', [n for n in LAYOUTS if LAYOUTS[n][1] is None])
def test_chatml_for_a_base_without_a_template(name, tmp_path):
    "One id ends an answer; a text begins as the tokenizer begins it; with an answer it only appends"
    t = laid_out(name, tmp_path).tokenizer
    ask = [dict(role='user', content='Hi.'), dict(role='assistant', content='Ahoy!'), dict(role='user', content='2+2?')]
    answer = [dict(role='assistant', content='4')]
    prompt, whole = render(t, ask), render(t, ask, answer)
    assert whole.startswith(prompt+'4')
    assert len(t(whole[len(prompt)+1:].strip(), add_special_tokens=False).input_ids)==1
    if t.bos_token: assert t(prompt, add_special_tokens=False).input_ids[:1]==t('x').input_ids[:1]
    else: assert prompt.startswith('<|im_start|>user')
    assert 'weather' in render(t, ask, tools=[dict(name='weather')])

def test_a_letter_is_never_made_an_end(tmp_path):
    """No eos anywhere but what the configuration class has by itself, which is a letter here; and plain text that the
    vocabulary does not know is no mark"""
    laid_out('no-eos', tmp_path)
    for file in (tmp_path/'config.json', tmp_path/'generation_config.json'):
        config = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(config | dict(eos_token_id=2)))
    with pytest.raises(HydraError, match='nothing says where an answer ends'): load_base(tmp_path, device='cpu')
    t = byte_tokenizer()
    t.unk_token = '<|im_start|>'
    t.eos_token = '<|endoftext|>'
    t.chat_template = SHARPS.replace('### end', '<|im_start|>')
    assert end_ids(t)==[0]
    assert end_suffix(t)=='<|endoftext|>'

def test_packaged_bases_end_as_they_did():
    "Neither their labels nor what is written change; gemma's only where it is there already"
    tokenizers = {'tiny': byte_tokenizer(), 'smollm2': base_tokenizer('smollm2')}
    if list((cache_dir()/'models').glob('gemma3-*')): tokenizers['gemma3'] = base_tokenizer('gemma3')
    for t in tokenizers.values():
        assert end_suffix(t)==''
        assert {last_label(t, talk) for talk in TALKS}=={t.eos_token_id}==set(end_ids(t))

# --- encoding

def test_a_prompt_keeps_its_own_ids_where_a_token_would_reach_across():
    "After 'Assistant: ' the space and the first word are one token in SmolLM2's vocabulary"
    t = with_template(AutoTokenizer.from_pretrained(smollm2_dir()), SPACE)
    row = record([dict(role='user', content='Who wrote Faust?')], 'Goethe.', source='x', domain='x', license='x')
    given, learned = render_split(t, row['prompt'], row['completion'])
    given_ids = t(given)['input_ids']
    assert t(given+learned)['input_ids'][:len(given_ids)]!=given_ids
    e = encode(row, t)
    assert e.ids[:e.n_prompt]==given_ids
    assert t.decode(e.ids[e.n_prompt:])=='Goethe.<|im_end|>\n'
