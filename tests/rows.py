"Rows of data: short ones, those that say the same in several forms, and bad ones."
import json

def row(prompt, answer, **fields):
    "A record of one question and its answer"
    return dict(fields, prompt=[dict(role='user', content=prompt)], completion=[dict(role='assistant', content=answer)])

def jsonl(rows):
    "Rows as JSON Lines, without an end of line behind the last"
    return '\n'.join(map(json.dumps, rows))

TALK = [dict(role='user', content='Hi'), dict(role='assistant', content='Yo')]
FORMS = [ # one record in the forms of the wild
    dict(prompt='Hi', completion='Yo'), dict(prompt=TALK[:1], completion=TALK[1:]), dict(messages=TALK),
    dict(conversations=[{'from': 'human', 'value': 'Hi'}, {'from': 'gpt', 'value': 'Yo'}]),
    dict(instruction='Hi', input='', output='Yo'), dict(instruction='Hi', output='Yo')]

# a line that is no record, and why
BAD = [
    ('{"prompt": 1, "completion": "x"}', 'prompt is 1'),
    ('[1, 2]', 'need an object'), ('"x"', 'need an object'),
    ('{"prompt": "x"}', 'has the fields prompt'),
    ('{"prompt": "x", "completion": "  "}', 'completion is empty'),
    ('{"prompt": [], "completion": "x"}', 'prompt is []'),
    ('{"prompt": [{"role": "user"}], "completion": "x"}', 'prompt holds'),
    ('{"prompt": [{"role": "wizard", "content": "x"}], "completion": "x"}', 'wizard'),
    ('{"messages": "hello"}', 'messages must be a list'),
    ('{"messages": [{"role": "user", "content": "x"}]}', 'no assistant turn'),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', 'no assistant turn'),
    ('{"prompt": "\\ud800", "completion": "x"}', 'surrogates'),
    ('{"prompt": "x", "completion": null}', 'completion is null'),
    ('{"conversations": [{"from": "human"}]}', "objects with 'from' and 'value'"),
    ('{}', 'none')]
