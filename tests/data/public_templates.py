"""Chat templates of public models, shortened to what writes plain conversations: tools and images are left out.

Each writes what the published one writes for turns of the system, the user and the assistant, quirks included: headers
that are written without being asked for, system prompts of its own, refusals, thoughts, EOS at odd places.
"""

# ruff: noqa: RUF001 (DeepSeek's tokens are spelled with full-width bars)

from __future__ import annotations

from dataclasses import dataclass

_INST = ("[INST]", "[/INST]")
_LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_CHATML = ("<|im_start|>", "<|im_end|>")
_ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
_SPLIT_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}{% endif %}"
)


@dataclass(frozen=True)
class Public:
    """A template with the special tokens of its tokenizer; `bos` None for a tokenizer without one."""

    template: str
    bos: str | None
    eos: str
    special: tuple[str, ...] = ()


def _llama3(header: str = "{% if add_generation_prompt %}", start: str = "") -> str:
    return (
        start + "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
        "m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
        "{% endif %}{{ content }}{% endfor %}"
        + header
        + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        + ("{% endif %}" if header else "")
    )


def _llama31(date: str) -> str:
    return (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] | trim "
        "%}{% set messages = messages[1:] %}{% else %}{% set system_message = '' %}{% endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}{{ 'Cutting Knowledge Date: December 2023\n' }}"
        "{{ 'Today Date: " + date + "\n\n' }}{{ system_message }}{{ '<|eot_id|>' }}"
        "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + "
        "'<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )


def _chatml(system: str | None = None, *, start: str = "", end: str = "<|im_end|>\n", when: str = "") -> str:
    default = (
        f"{{% if {when or 'loop.first and'} messages[0]['role'] != 'system' %}}"
        f"{{{{ '<|im_start|>system\n{system}<|im_end|>\n' }}}}{{% endif %}}"
        if system is not None
        else ""
    )
    return (
        start
        + "{% for m in messages %}"
        + default
        + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '"
        + end
        + "' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def _qwen3(generation: str, *, empty_thought: bool = True) -> str:
    last = "loop.last or (not loop.last and reasoning)" if empty_thought else "reasoning"
    return (
        "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
        "{%- endif %}{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}"
        "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
        "{%- if ns.multi_step_tool and message.role == 'user' %}{%- set ns.multi_step_tool = false %}"
        "{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}"
        "{%- for message in messages %}{%- set content = message.content %}"
        "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
        "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}"
        "{%- elif message.role == 'assistant' %}{%- set reasoning = '' %}{%- if '</think>' in content %}"
        "{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
        "{%- if loop.index0 > ns.last_query_index and (" + last + ") %}"
        "{{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
        "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n" + generation + "' }}{%- endif %}"
    )


def _mistral(user: str, assistant: str, *, system: str = "") -> str:
    refuses = "" if system else "{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    return (
        (_SPLIT_SYSTEM if system else "{% set loop_messages = messages %}") + "{{ bos_token }}"
        "{% for m in loop_messages %}"
        + _ALTERNATE
        + refuses
        + "{% if m['role'] == 'user' %}"
        + system
        + user
        + "{% elif m['role'] == 'assistant' %}"
        + assistant
        + "{% endif %}{% endfor %}"
    )


def _system_turn(when: str, opening: str = "[INST] ") -> str:
    return (
        "{% if " + when + " and system_message is defined %}{{ '" + opening + "' + system_message + '\n\n' }}"
        "{% else %}{{ '" + opening + "' }}{% endif %}"
    )


# The system prompt goes before the last turn, if that is the user's: a conversation with an answer has none.
_LAST_SYSTEM, _FIRST_SYSTEM = _system_turn("loop.last"), _system_turn("loop.first")


def _tagged(user: str, assistant: str, system: str, header: str, *, start: str = "", end: str = "") -> str:
    roles = {"system": system, "user": user, "assistant": assistant}
    cases = "".join(f"{{% if m['role'] == '{role}' %}}{{{{ {text} }}}}{{% endif %}}" for role, text in roles.items())
    asked = f"{{% if add_generation_prompt %}}{{{{ '{header}' }}}}{{% else %}}{end}{{% endif %}}" if header else end
    return start + "{% for m in messages %}" + cases + "{% endfor %}" + asked


_ZEPHYR = _tagged(
    "'<|user|>\n' + m['content'] + eos_token + '\n'",
    "'<|assistant|>\n' + m['content'] + eos_token + '\n'",
    "'<|system|>\n' + m['content'] + eos_token + '\n'",
    "<|assistant|>\n",
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}" + _ALTERNATE + "{% if m['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = m['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
_GEMMA3 = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set first = messages[0]['content'] + '\n\n' -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set loop_messages = messages -%}"
    "{%- endif -%}{%- for m in loop_messages -%}"
    + _ALTERNATE
    + "{%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}{{ m['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}"
)
_PHI3 = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
_GEMMA_TURNS = ("<start_of_turn>", "<end_of_turn>")
_DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>")
_COMMAND = ("<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
_GRANITE = ("<|start_of_role|>", "<|end_of_role|>")
_INST_CONTENT = "{{ m['content'] + ' [/INST]' }}"


def _command(system: str, end: str = "<|END_OF_TURN_TOKEN|>", inside: str = "") -> str:
    turn = "'<|START_OF_TURN_TOKEN|><|{}_TOKEN|>' + {}m['content'].strip() + '{}'"
    return (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = " + system + " %}{% endif %}{% if system_message != false %}"
        "{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system_message + '" + end + "' }}{% endif %}"
        "{% for m in loop_messages %}"
        + _ALTERNATE
        + "{% if m['role'] == 'user' %}{{ "
        + turn.format("USER", "", end)
        + " }}{% else %}{{ "
        + turn.format(
            "CHATBOT",
            f"'{inside}' + " if inside else "",
            end.replace("<|END", f"{inside.replace('START', 'END')}<|END"),
        )
        + " }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}"
        "{% endif %}"
    )


def _deepseek_r1(start: str = "") -> str:
    return (
        start + "{% set ns = namespace(system_prompt='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{% set ns.system_prompt = m['content'] %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.system_prompt }}"
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}"
        "{% if m['role'] == 'assistant' %}{% set content = m['content'] %}{% if '</think>' in content %}"
        "{% set content = content.split('</think>')[-1] %}{% endif %}"
        "{{ '<｜Assistant｜>' + content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
    )


PUBLIC = {
    # --- Llama
    "llama-2-chat": Public(
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = false %}{% endif %}{% for m in loop_messages %}"
        + _ALTERNATE
        + "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + m['content'] %}{% else %}"
        "{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
        "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        "<s>",
        "</s>",
    ),
    "llama-3-8b-instruct": Public(_llama3(), "<|begin_of_text|>", "<|eot_id|>", _LLAMA3),
    "llama-3-8b-instruct, eos of the base": Public(_llama3(), "<|begin_of_text|>", "<|end_of_text|>", _LLAMA3),
    "llama-3-8b-instruct, first version": Public(_llama3(""), "<|begin_of_text|>", "<|eot_id|>", _LLAMA3),
    "llama-3.1-8b-instruct": Public(_llama31("26 Jul 2024"), "<|begin_of_text|>", "<|eot_id|>", _LLAMA3),
    "llama-3.2-1b-instruct": Public(
        _llama31("' + strftime_now('%d %b %Y') + '"), "<|begin_of_text|>", "<|eot_id|>", _LLAMA3
    ),
    # --- ChatML
    "chatml": Public(_chatml(), "<s>", "<|im_end|>", _CHATML),
    "chatml, no line end": Public(_chatml(end="<|im_end|>"), "<s>", "<|im_end|>", _CHATML),
    "chatml, bos": Public(_chatml(start="{{ bos_token }}"), "<s>", "<|im_end|>", _CHATML),
    "chatml, eos of the base": Public(_chatml(), None, "<|endoftext|>", _CHATML),
    "openhermes-2.5": Public(_chatml("You are a helpful assistant."), "<s>", "<|im_end|>", _CHATML),
    "dolphin-2.9": Public(
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}" + _chatml(),
        "<|begin_of_text|>",
        "<|im_end|>",
        _CHATML,
    ),
    "internlm-2": Public(_chatml(start="{{ bos_token }}"), "<s>", "</s>", _CHATML),
    "yi-chat": Public(
        "{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}{% endif %}"
        "{% if system_message is defined %}{{ system_message }}{% endif %}{% for m in messages %}"
        "{% if m['role'] == 'user' %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n<|im_start|>assistant\n' }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}",
        "<|startoftext|>",
        "<|im_end|>",
        _CHATML,
    ),
    "smollm-instruct": Public(_chatml(), "<|im_start|>", "<|im_end|>", _CHATML),
    "smollm2-instruct": Public(
        _chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        "<|im_start|>",
        "<|im_end|>",
        _CHATML,
    ),
    "smollm3": Public(
        "{%- if messages[0].role == 'system' -%}{%- set own = messages[0].content.rstrip() -%}{%- else -%}"
        "{%- set own = 'You are a helpful AI assistant named SmolLM.' -%}{%- endif -%}"
        "{{- '<|im_start|>system\n## Metadata\n\nReasoning Mode: /think\n\n## Custom Instructions\n\n' + own + "
        "'\n\n<|im_end|>\n' -}}{%- for m in messages -%}{%- if m.role == 'user' -%}"
        "{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{%- elif m.role == 'assistant' -%}"
        "{{ '<|im_start|>assistant\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}",
        None,
        "<|im_end|>",
        _CHATML,
    ),
    # --- Qwen
    "qwen-1.5-chat": Public(_chatml("You are a helpful assistant.", end="<|im_end|>\n"), None, "<|im_end|>", _CHATML),
    "qwen-2-instruct": Public(_chatml("You are a helpful assistant."), None, "<|im_end|>", _CHATML),
    "qwen-2-base": Public(_chatml("You are a helpful assistant."), None, "<|endoftext|>", _CHATML),
    "qwen-2.5-instruct": Public(
        _chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."), None, "<|im_end|>", _CHATML
    ),
    "qwen-3": Public(_qwen3(""), None, "<|im_end|>", _CHATML),
    "qwen-3, no thinking": Public(_qwen3("<think>\n\n</think>\n\n"), None, "<|im_end|>", _CHATML),
    "qwen-3-instruct-2507": Public(_chatml(), None, "<|im_end|>", _CHATML),
    "qwen-3-thinking-2507": Public(_qwen3("<think>\n"), None, "<|im_end|>", _CHATML),
    "qwq": Public(_qwen3("<think>\n", empty_thought=False), None, "<|im_end|>", _CHATML),
    # --- Mistral
    "mistral-v1": Public(_mistral("{{ '[INST] ' }}" + _INST_CONTENT, "{{ m['content'] + eos_token }}"), "<s>", "</s>"),
    "mixtral-8x7b": Public(
        _mistral("{{ '[INST] ' }}" + _INST_CONTENT, "{{ ' ' + m['content'] + eos_token }}", system=" "),
        "<s>",
        "</s>",
    ),
    "mistral-v2": Public(
        _mistral(_INST_CONTENT, "{{ ' ' + m['content'] + eos_token }}", system=_FIRST_SYSTEM), "<s>", "</s>"
    ),
    "mistral-v3": Public(
        _mistral("{{ m['content'] + '[/INST]' }}", "{{ ' ' + m['content']|trim + eos_token }}", system=_LAST_SYSTEM),
        "<s>",
        "</s>",
        _INST,
    ),
    "mistral-nemo (v3-tekken)": Public(
        _mistral(
            "{{ m['content'] + '[/INST]' }}",
            "{{ m['content'] + eos_token }}",
            system=_system_turn("loop.last", "[INST]"),
        ),
        "<s>",
        "</s>",
        _INST,
    ),
    "mistral-v7": Public(
        _SPLIT_SYSTEM + "{{ bos_token }}{% if system_message is defined %}"
        "{{ '[SYSTEM_PROMPT] ' + system_message + '[/SYSTEM_PROMPT]' }}{% endif %}{% for m in loop_messages %}"
        + _ALTERNATE
        + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% else %}"
        "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
        "<s>",
        "</s>",
        (*_INST, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    ),
    "mistral-small-3 (v7-tekken)": Public(
        _SPLIT_SYSTEM + "{% if system_message is not defined %}{% set system_message = 'You are Mistral Small 3, a "
        "Large Language Model created by Mistral AI.' %}{% endif %}{{ bos_token }}"
        "{{ '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}{% for m in loop_messages %}"
        "{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}{% else %}"
        "{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
        "<s>",
        "</s>",
        (*_INST, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    ),
    # --- Zephyr and its like
    "zephyr-7b-beta": Public(_ZEPHYR, "<s>", "</s>"),
    "zephyr-7b-gemma": Public(_chatml(start="{{ bos_token }}"), "<bos>", "<|im_end|>", _CHATML),
    "stablelm-zephyr": Public(
        _tagged(
            *[f"'<|{role}|>\n' + m['content'] + eos_token + '\n'" for role in ("user", "assistant", "system")],
            "<|assistant|>\n",
        ),
        None,
        "<|endoftext|>",
    ),
    "tulu-2": Public(
        _tagged(
            "'<|user|>\n' + m['content'] + '\n'",
            "'<|assistant|>\n' + m['content'] + eos_token + '\n'",
            "'<|system|>\n' + m['content'] + '\n'",
            "<|assistant|>\n",
        ),
        "<s>",
        "</s>",
    ),
    "tulu-3": Public(
        _tagged(
            "'<|user|>\n' + m['content'] + '\n'",
            "'<|assistant|>\n' + m['content'] + (eos_token if loop.last else eos_token + '\n')",
            "'<|system|>\n' + m['content'] + '\n'",
            "<|assistant|>\n",
        ),
        "<|begin_of_text|>",
        "<|end_of_text|>",
    ),
    # --- Gemma
    "gemma-2-it": Public(_GEMMA, "<bos>", "<eos>", _GEMMA_TURNS),
    "gemma-3-it": Public(_GEMMA3, "<bos>", "<eos>", _GEMMA_TURNS),
    "gemma-3-it, eos of a turn": Public(_GEMMA3, "<bos>", "<end_of_turn>", ("<start_of_turn>",)),
    # --- Phi
    "phi-3-mini": Public(
        _tagged(
            "'<|user|>\n' + m['content'] + '<|end|>\n'",
            "'<|assistant|>\n' + m['content'] + '<|end|>\n'",
            "'<|system|>\n' + m['content'] + '<|end|>\n'",
            "<|assistant|>\n",
            end="{{ eos_token }}",
        ),
        "<s>",
        "<|endoftext|>",
        _PHI3,
    ),
    "phi-3-small": Public(
        _tagged(
            "'<|user|>\n' + m['content'] + '<|end|>\n'",
            "'<|assistant|>\n' + m['content'] + '<|end|>\n'",
            "'<|system|>\n' + m['content'] + '<|end|>\n'",
            "<|assistant|>\n",
            start="{{ bos_token }}",
            end="{{ eos_token }}",
        ),
        "<|endoftext|>",
        "<|endoftext|>",
        _PHI3,
    ),
    "phi-3-medium": Public(
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + '<|end|>\n' }}"
        "{{ '<|assistant|>\n' }}{% elif m['role'] == 'assistant' %}{{ m['content'] + '<|end|>\n' }}{% endif %}"
        "{% endfor %}",
        "<s>",
        "<|endoftext|>",
        _PHI3,
    ),
    "phi-4": Public(
        _tagged(
            *[
                f"'<|im_start|>{role}<|im_sep|>' + m['content'] + '<|im_end|>'"
                for role in ("user", "assistant", "system")
            ],
            "<|im_start|>assistant<|im_sep|>",
        ),
        "<|endoftext|>",
        "<|endoftext|>",
        (*_CHATML, "<|im_sep|>"),
    ),
    "phi-4-mini": Public(
        _tagged(
            *[f"'<|{role}|>' + m['content'] + '<|end|>'" for role in ("user", "assistant", "system")],
            "<|assistant|>",
            end="{{ eos_token }}",
        ),
        "<|endoftext|>",
        "<|endoftext|>",
        _PHI3,
    ),
    # --- OLMo
    "olmo-7b-instruct": Public(
        _tagged(
            "'<|user|>\n' + m['content'] + '\n'",
            "'<|assistant|>\n' + m['content'] + eos_token + '\n'",
            "''",
            "<|assistant|>\n",
            start="{{ eos_token }}",
        ),
        None,
        "<|endoftext|>",
    ),
    "olmo-2-instruct": Public(
        _tagged(
            "'<|user|>\n' + m['content'] + '\n'",
            "'<|assistant|>\n' + m['content'] + (eos_token if loop.last else eos_token + '\n')",
            "'<|system|>\n' + m['content'] + '\n'",
            "<|assistant|>\n",
            start="{{ bos_token }}",
        ),
        "<|endoftext|>",
        "<|endoftext|>",
    ),
    # --- Command R, DeepSeek, Granite
    "command-r": Public(_command("false"), "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", _COMMAND),
    "command-r, default system": Public(
        _command("'You are Command-R, a brilliant assistant trained by Cohere.'"),
        "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
        _COMMAND,
    ),
    "command-r7b": Public(
        _command("'You are Command.'", inside="<|START_RESPONSE|>"),
        "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
        (*_COMMAND, "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
    "deepseek-v2-chat": Public(
        _tagged(
            "'User: ' + m['content'] + '\n\n'",
            "'Assistant: ' + m['content'] + eos_token",
            "m['content'] + '\n\n'",
            "Assistant:",
            start="{{ bos_token }}",
        ),
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
    ),
    "deepseek-v3": Public(
        _tagged(
            "'<｜User｜>' + m['content']",
            "'<｜Assistant｜>' + m['content'] + eos_token",
            "m['content']",
            "<｜Assistant｜>",
            start="{{ bos_token }}",
        ),
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        _DEEPSEEK,
    ),
    "deepseek-r1-distill": Public(_deepseek_r1(), "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", _DEEPSEEK),
    "granite-3.0": Public(
        _tagged(
            *[
                f"'<|start_of_role|>{role}<|end_of_role|>' + m['content'] + '<|end_of_text|>\n'"
                for role in ("user", "assistant", "system")
            ],
            "<|start_of_role|>assistant<|end_of_role|>",
        ),
        "<|end_of_text|>",
        "<|end_of_text|>",
        _GRANITE,
    ),
    "granite-3.3": Public(
        "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
        "{%- set loop_messages = messages[1:] %}{%- else %}{%- set system_message = 'Knowledge Cutoff Date: April "
        "2024.\nYou are Granite, developed by IBM. You are a helpful AI assistant.' %}{%- set loop_messages = messages "
        "%}{%- endif %}{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\n' }}"
        "{%- for m in loop_messages %}{{- '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + "
        "'<|end_of_text|>\n' }}{%- if loop.last and add_generation_prompt %}"
        "{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}{%- endfor %}",
        "<|end_of_text|>",
        "<|end_of_text|>",
        _GRANITE,
    ),
}
