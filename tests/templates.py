"Chat templates, and the tokenizers of many families of models."
import copy, json
import torch
from hydramoe.models.base import hide_loading_bars
from hydramoe.models.encode import encode
from hydramoe.models.load import load_base
from hydramoe.models.packaged import gemma_chat
from hydramoe.models.template import byte_tokenizer, chatml
from hydramoe.data.records import record
from tokenizers import AddedToken, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# ---- templates of all kinds, on marks of ChatML

TURNS = "{% for m in messages %}{{ '<|im_start|>'+m['role']+'\\n'+m['content']+'<|im_end|>\\n' }}{% endfor %}"
SPACE = ("{% for m in messages %}{{ m['role'].capitalize()+': '+m['content']+'<|im_end|>\\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}")
THINKS = TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
SILENT = TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}"
# in STRIPS the past has no thoughts, in SAYS_SO it has them too
STRIPS = THINKS.replace("m['content']", "m['content'].split('</think>')[-1].lstrip()")
SAYS_SO = THINKS.replace("+m['content']", "+('<think>\\n' if m['role']=='assistant' else '')+m['content']")
NO_SYSTEM = "{% if messages[0]['role']=='system' %}{{ raise_exception('System role not supported') }}{% endif %}"
IN_TURN = ("{% for m in messages %}{% if (m['role']=='user')!=(loop.index0%2==0) %}"
           "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}")

def with_template(tok, template):
    "A copy of a tokenizer with another template"
    tok = copy.deepcopy(tok)
    tok.chat_template = template
    return tok

# ---- layouts of families

HEADED = (
    "{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content']|trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
BARRED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}")
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role']=='user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}")
ROLES = ( # nothing behind an answer
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
SHARPS = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n### end\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}")
L3 = ['<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eom_id|>', '<|eot_id|>']
L2 = ['<unk>', '<s>', '</s>']
CHAT = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
GEMMA = ['<pad>', '<eos>', '<bos>', '<start_of_turn>', '<end_of_turn>']
PHI = ['<|endoftext|>', '<|assistant|>', '<|user|>', '<|end|>']

def layout(marks, template, eos, listed, bos=None, plain=()):
    "The parts of a layout in their order"
    return marks, template, eos, listed, bos, plain

EOT = '<|endoftext|>'
# its marks, template, eos, what generation_config lists; bos if every text begins with it; marks that are not special
LAYOUTS = {
    'llama3': layout(L3, '{{ bos_token }}'+HEADED, L3[1], [L3[1], L3[4], L3[5]], L3[0]),
    'llama3-lists-none': layout(L3, HEADED, L3[1], [], L3[0]),
    'llama3-base': layout(L3, None, L3[1], [L3[1]], L3[0]),
    'llama2': layout(L2, INST, '</s>', ['</s>'], '<s>'),
    'llama2-base': layout(L2, None, '</s>', ['</s>'], '<s>'),
    'qwen': layout(CHAT, chatml, CHAT[2], [CHAT[2], CHAT[0]]),
    'qwen-base': layout(CHAT, chatml, CHAT[0], [CHAT[0]]),
    'smollm2-base': layout(CHAT, None, CHAT[0], [CHAT[0]]),
    'smollm2-edited': layout(CHAT, chatml, CHAT[0], [CHAT[0], CHAT[2]]),
    'gemma-it': layout(GEMMA, gemma_chat, '<eos>', ['<eos>', '<end_of_turn>'], '<bos>'),
    'gemma-base': layout(GEMMA, None, '<eos>', ['<eos>'], '<bos>'),
    'phi3': layout(PHI, BARRED, PHI[0], [PHI[0], PHI[1], PHI[3]]),
    'not-special': layout(PHI, BARRED, PHI[0], [PHI[0]], plain=PHI[1:]),
    'pythia': layout([EOT, '<|padding|>'], None, EOT, [EOT], plain=['  ', '    ']),
    'pythia-chatml': layout([EOT], chatml, EOT, [EOT]),
    'nothing-behind': layout(PHI, ROLES, PHI[0], [PHI[0], PHI[2]]),
    'text-behind': layout(['<eos>'], SHARPS, '<eos>', []),
    'spaces-behind': layout(['<eos>'], SHARPS.replace('### end\\n', '  '), '<eos>', [], plain=['\n', '  ']),
    'no-eos': layout(CHAT[:1], None, None, CHAT[:1]),
    'no-eos-but-chatml': layout(CHAT, chatml, None, [])}

def laid_out(name, to):
    "A random Llama in a folder, with a tokenizer of bytes and the marks, template and lists of a layout"
    marks, template, eos, listed, bos, plain = LAYOUTS[name]
    special = [m for m in marks if m not in plain]
    b = byte_tokenizer().backend_tokenizer
    raw = json.loads(b.to_str())
    letters = [c for c in raw['model']['vocab'] if len(c)==1]
    raw['model']['vocab'] = {c: i for i,c in enumerate(special+letters)}
    raw['added_tokens'] = []
    backend = type(b).from_str(json.dumps(raw))
    t = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos, chat_template=template)
    t.add_special_tokens({'additional_special_tokens': special})
    t.add_tokens([AddedToken(m, special=False, normalized=False) for m in plain])
    if bos:
        marked = [(bos, t.convert_tokens_to_ids(bos))]
        t.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f'{bos} $A', special_tokens=marked)
    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1)
    with torch.random.fork_rng(): model = LlamaForCausalLM(config)
    with hide_loading_bars(): model.save_pretrained(to)
    t.save_pretrained(to)
    ends = dict(eos_token_id=t.convert_tokens_to_ids(listed)) if listed else {}
    (to/'generation_config.json').write_text(json.dumps(ends))
    return load_base(to, device='cpu')

TALKS = [['2+2?'], ['Hi.', 'Ahoy!', 'Who are you?']]

def last_label(tokenizer, talk, answer='It is 4.'):
    "The last id of an encoded record that is not white space"
    asked = [dict(role=('user', 'assistant')[i%2], content=c) for i,c in enumerate(talk)]
    e = encode(record(asked, answer, source='x', domain='x', license='x'), tokenizer)
    return [i for i in e.ids[e.n_prompt:] if tokenizer.decode([i]).strip()][-1]
