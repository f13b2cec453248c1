#!/usr/bin/env python3
"""The chat templates of published models as Jinja, and what transformers' apply_chat_template makes of some dialogues:
dev/golden/templates.json, which the test `templates` compares with run/templates.h. Needs transformers and sentencepiece.

    python3 dev/check_templates.py

Every template stands in a directory with the bundled tokenizer.model, to which the special tokens that it uses are added
as its publisher has them."""
import json, os, shutil, tempfile
import transformers

HERE = os.path.dirname(os.path.abspath(__file__))
BASE = os.path.join(HERE, "..", "base")

# As published, to the byte: a backslash at the end of a line joins it with the next.
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
{% set system_message = false %}{% endif %}{% for message in loop_messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if loop.index0 == 0 and system_message != false %}\
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}\
{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}\
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}\
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

# Llama 3.1's without the parts about tools; 3.2's has the day of use in place of 26 Jul 2024 where it knows it.
LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# v0.1 and v0.2
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate \
user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, \
with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""

# v0.3 without the parts about tools
MISTRAL3 = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or \
(message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate \
user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if (message == user_messages[-1]) and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, \
with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""

# Qwen2.5's and Qwen3's without the parts about tools
QWEN25 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or \
(message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

QWEN2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}\
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and \
not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + \
'\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}\
{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

CHATML = """{% for message in messages %}\
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

ZEPHYR = """{% for message in messages %}\n{% if message['role'] == 'user' %}\n\
{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n\
{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n\
{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n\
{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"""

IM = ["<|im_start|>", "<|im_end|>"]
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
# name, template, added special tokens, legacy, EOS
PUBLISHED = [
    ("llama2", LLAMA2, [], False, None),
    ("llama2", LLAMA2, [], True, None),
    ("llama3", LLAMA3, HEADERS, False, "<|eot_id|>"),
    ("llama3.1", LLAMA31, HEADERS, False, "<|eot_id|>"),
    ("mistral", MISTRAL, [], True, None),
    ("mistral-v3", MISTRAL3, ["[INST]", "[/INST]"], False, None),
    ("qwen3", QWEN3, IM + ["<think>", "</think>"], False, "<|im_end|>"),
    ("qwen2.5", QWEN25, IM, False, "<|im_end|>"),
    ("qwen2", QWEN2, IM, False, "<|im_end|>"),
    ("smollm2", SMOLLM2, IM, False, "<|im_end|>"),
    ("chatml-bos", "{{bos_token}}" + CHATML, IM, False, "<|im_end|>"),
    ("chatml", CHATML, IM, False, None),
    ("zephyr", ZEPHYR, [], True, None),
    ("zephyr", ZEPHYR, [], False, None),
]

def turns(*texts, system=None):
    roles = ["user", "assistant"]
    start = [] if system is None else [{"role": "system", "content": system}]
    return start + [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]

DIALOGUES = [
    turns("What is 3 minus 8?", "-5"),
    turns("Two shells and 3 shells?", "She had 5.\n#### 5", "And one more?", "6"),
    turns("Hello.", "Hi!", "How many?", "12 cups", "Why?", "Tom had none.", system="Answer in one word."),
    turns("  spaces in front and behind \n", " \n answers, too \u3000", system=" of the system\n"),
    turns("a</s>b", "A {text} with {eos}, 猫 and 🙂"),
    turns("No answer yet.", "One.", "A question without an answer"),
    [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}, {"role": "assistant", "content": "three"}],
    turns("one", "two") + turns("three", "four", system="in the middle"),
]

def through_last_answer(messages):
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:last + 1]

def ids_of(tokenizer, messages, **more):
    try: return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, enable_thinking=False, **more)
    except Exception as wrong:          # what these templates refuse is refused here, too
        if "must alternate" in str(wrong) or "Only user and" in str(wrong): return None
        raise

cases = []
for name, source, specials, legacy, eos in PUBLISHED:
    added = {str(768 + i): {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                            "special": True} for i, text in enumerate(specials)}
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": legacy, "added_tokens_decoder": added,
                "chat_template": source, **({"eos_token": eos} if eos else {})}
    with tempfile.TemporaryDirectory() as folder:
        for file in ("config.json", "tokenizer.model"): shutil.copy(os.path.join(BASE, file), folder)
        json.dump(settings, open(os.path.join(folder, "tokenizer_config.json"), "w"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token_id if "im_end" not in source else 769
    rows = []
    for messages in DIALOGUES:
        ids = ids_of(tokenizer, through_last_answer(messages))
        if name == "llama3.1" and any(message["role"] == "system" for message in messages[1:]):
            ids = None                                          # has a date in it: refused
        if ids is not None:
            while ids[-1] != end: ids = ids[:-1]                # what stands behind the last answer's end is never learnt
        prompt = ids and ids_of(tokenizer, through_last_answer(messages)[:-1], add_generation_prompt=True)
        rows.append({"messages": messages, "ids": ids, "prompt": prompt})
    cases.append({"name": name, "settings": settings, "rows": rows})
    print(f"{name:10} {sum(row['ids'] is not None for row in rows)} dialogues, {sum(row['ids'] is None for row in rows)} refused")
json.dump(cases, open(os.path.join(HERE, "golden", "templates.json"), "w"), ensure_ascii=False, separators=(",", ":"))
