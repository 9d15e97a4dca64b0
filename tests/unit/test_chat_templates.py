"""The method on the forms of families whose tokenizers are not at hand (C6).

Each form is the format's shape, written anew as a short template: how turns open and close, what is
stripped, what the template forces or forgets. The tokenizer is SmolLM2's with the form's control
tokens added. What is to be learned is written by hand, between ⟦ ⟧, in the render of the same
conversation; or the reason why the rows are refused.
"""

import re
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from packhorse.trainer.data.chat_template import ORDINARY_TEXT
from packhorse.trainer.data.mask import Masker
from packhorse.trainer.data.template_call import call_template
from packhorse.trainer.datatypes import BadInput, Conversation, Example, Message, RowError
from tests.unit.test_mask import CALL, TOOLS, agrees, chat, official, parse

TALK = chat("Say OK.", " OK.\n", "Why OK.?", "Größe")
LAST = chat("Say OK.", " OK.")
BRIEF = Conversation((Message("system", "Be brief."), *LAST.messages))
CALLING = Conversation(
    (
        Message("user", "2+2?"),
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", "4", tool_call_id="call00001"),
        Message("assistant", "Four"),
    ),
    TOOLS,
)
ARGUMENTS = '{"a": "2", "b": "say \\"zwölf\\""}'
PASTED = Conversation(
    (
        CALLING.messages[0],
        Message(
            "assistant",
            "",
            tool_calls=({**CALL, "function": {"name": "add", "arguments": ARGUMENTS}},),
        ),
        *CALLING.messages[2:],
    ),
    TOOLS,
)


@dataclass
class Form:
    controls: str  # the control tokens, the last one is EOS
    template: str
    expected: list[
        tuple[Conversation, str]
    ]  # conversations, and their renders or why they are refused
    kwargs: dict[str, Any] = field(default_factory=dict)  # of the template


def turns(
    question: str, answer: str, prompt: str = "", *, before: str = "", after: str = ""
) -> str:
    """A template of questions and answers, each with M for its text."""
    question, answer = (text.replace("M", "' + m.content + '") for text in (question, answer))
    return (
        f"{{{{ '{before}' }}}}{{% for m in messages %}}"
        f"{{% if m.role == 'assistant' %}}{{{{ '{answer}' }}}}"
        f"{{% else %}}{{{{ '{question}' }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{prompt}' }}}}"
        f"{{% else %}}{{{{ '{after}' }}}}{{% endif %}}"
    )


# Reasoning models: what a template does with the thought of an answer, and what its generation
# prompt ends with.
R1_CONTROLS = "<|User|> <|Assistant|> <|end_of_sentence|>"
INLINE = chat("Say OK.", "<think>\nHm.\n</think>\n\nOK.")
INLINE_TWICE = chat("Say OK.", INLINE.messages[1].content, "Why?", "<think>\n\n</think>\n\nSo.")
FIELD = Conversation((LAST.messages[0], Message("assistant", "OK.", reasoning_content="Hm.")))
ELSEWHERE = "refused: an answer does not begin where the generation prompt ends, with "
AGREE = (
    "; begin the answer with it, or set data.chat_template_kwargs or model.chat_template so that "
    "they agree"
)
LAST_TURN = "; data.train_on: last_turn leaves earlier answers out"
QWEN3_THINKING = (
    "{% set last = namespace(query=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.query = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% set content = m.content %}{% if m.role == 'assistant' "
    "%}"
    "{% set thought = m.reasoning_content or '' %}{% if not thought and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') "
    "%}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{% if loop.index0 > "
    "last.query %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}{% endif %}"
    "{{ content.lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
V3_1 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content %}{% if "
    "'</think>' in content %}"
    "{% set content = content.split('</think>', 1)[1] %}{% endif %}"
    "{{ '<|Assistant|></think>' + content + '<|end_of_sentence|>' }}{% else %}{{ '<|User|>' + "
    "m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>' if thinking else "
    "'<|Assistant|></think>' }}"
    "{% endif %}"
)

FORMS = {
    "gemma: texts are stripped, the system text joins the first question": Form(
        "<bos> <start_of_turn> <end_of_turn>",
        "{{ '<bos>' }}{% set first = '' %}{% if messages[0].role == 'system' %}"
        "{% set first = messages[0].content + '\\n\\n' %}{% set messages = messages[1:] %}{% endif "
        "%}"
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else "
        "'user') + '\\n' }}"
        "{{ (first if loop.first else '') + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        [
            (
                TALK,
                "<bos><start_of_turn>user\nSay "
                "OK.<end_of_turn>\n<start_of_turn>model\n⟦OK.<end_of_turn>⟧\n"
                "<start_of_turn>user\nWhy "
                "OK.?<end_of_turn>\n<start_of_turn>model\n⟦Größe<end_of_turn>⟧\n",
            ),
            (
                BRIEF,
                "<bos><start_of_turn>user\nBe brief.\n\nSay OK.<end_of_turn>\n"
                "<start_of_turn>model\n⟦OK.<end_of_turn>⟧\n",
            ),
        ],
    ),
    "phi-3: a conversation ends with a token of its own": Form(
        "<|user|> <|assistant|> <|end|> <|endoftext|>",
        turns(
            "<|user|>\\nM<|end|>\\n",
            "<|assistant|>\\nM<|end|>\\n",
            "<|assistant|>\\n",
            after="<|endoftext|>",
        ),
        [
            (
                TALK,
                "<|user|>\nSay OK.<|end|>\n<|assistant|>\n⟦ OK.\n<|end|>⟧\n"
                "<|user|>\nWhy OK.?<|end|>\n<|assistant|>\n⟦Größe<|end|>⟧\n<|endoftext|>",
            )
        ],
    ),
    "phi-4: a control token between role and text": Form(
        "<|im_start|> <|im_sep|> <|im_end|>",
        turns(
            "<|im_start|>user<|im_sep|>M<|im_end|>",
            "<|im_start|>assistant<|im_sep|>M<|im_end|>",
            "<|im_start|>assistant<|im_sep|>",
        ),
        [
            (
                LAST,
                "<|im_start|>user<|im_sep|>Say OK.<|im_end|><|im_start|>assistant<|im_sep|>⟦ "
                "OK.<|im_end|>⟧",
            )
        ],
    ),
    "mistral: no generation prompt, the answer's space is its own": Form(
        "<s> [INST] [/INST] </s>",
        turns("[INST] M[/INST]", " M</s>", before="<s>"),
        [(TALK, "<s>[INST] Say OK.[/INST]⟦  OK.\n</s>⟧[INST] Why OK.?[/INST]⟦ Größe</s>⟧")],
    ),
    "deepseek: nothing but control tokens between the turns": Form(
        "<|begin_of_sentence|> <|User|> <|Assistant|> <|end_of_sentence|>",
        turns(
            "<|User|>M",
            "<|Assistant|>M<|end_of_sentence|>",
            "<|Assistant|>",
            before="<|begin_of_sentence|>",
        ),
        [
            (
                TALK,
                "<|begin_of_sentence|><|User|>Say OK.<|Assistant|>⟦ OK.\n<|end_of_sentence|>⟧"
                "<|User|>Why OK.?<|Assistant|>⟦Größe<|end_of_sentence|>⟧",
            )
        ],
    ),
    "deepseek-r1, qwq: the generation prompt opens a thought, and thoughts are dropped": Form(
        R1_CONTROLS,
        turns("<|User|>M", "<|Assistant|>M<|end_of_sentence|>", "<|Assistant|><think>\\n").replace(
            "m.content + '<|end_of_sentence|>'",
            "m.content.split('</think>')[-1] + '<|end_of_sentence|>'",
        ),
        [
            (LAST, f"{ELSEWHERE}'<think>\\n'{AGREE}"),
            (TALK, f"{ELSEWHERE}'<think>\\n'{LAST_TURN}"),
            (
                INLINE,
                "refused: the template drops the content of an answer; give a model.chat_template "
                "that keeps it",
            ),
            (
                FIELD,
                "refused: the template drops the reasoning of an answer; give a "
                "model.chat_template that keeps it",
            ),
        ],
    ),
    "the generation prompt opens a thought, and answers bring their own": Form(
        R1_CONTROLS,
        turns("<|User|>M", "<|Assistant|>M<|end_of_sentence|>", "<|Assistant|><think>\\n"),
        [
            (
                INLINE,
                "<|User|>Say OK.<|Assistant|><think>\n⟦Hm.\n</think>\n\nOK.<|end_of_sentence|>⟧",
            ),
            (
                INLINE_TWICE,
                "<|User|>Say OK.<|Assistant|><think>\n⟦Hm.\n</think>\n\nOK.<|end_of_sentence|>⟧"
                "<|User|>Why?<|Assistant|><think>\n⟦\n</think>\n\nSo.<|end_of_sentence|>⟧",
            ),
            (
                chat("<think>\nWhy?", "<think>\nHm. <think>\n</think>So."),
                "<|User|><think>\nWhy?<|Assistant|><think>\n⟦Hm. "
                "<think>\n</think>So.<|end_of_sentence|>⟧",
            ),
            (LAST, f"{ELSEWHERE}'<think>\\n'{AGREE}"),
            (chat("Say OK.", "<think>Hm.</think>OK."), f"{ELSEWHERE}'<think>\\n'{AGREE}"),
            (chat("Say OK.", "Hm.\n</think>\n\nOK."), f"{ELSEWHERE}'<think>\\n'{AGREE}"),
            (chat("Say OK.", "<think>\n"), f"{ELSEWHERE}'<think>\\n'{AGREE}"),
            (
                FIELD,
                "refused: the template drops the reasoning of an answer; give a "
                "model.chat_template that keeps it",
            ),
        ],
    ),
    "qwen3-thinking: the template writes the thought of the last turn, an empty one where there is "
    "none": Form(
        "<|im_start|> <|im_end|>",
        QWEN3_THINKING,
        [
            (
                FIELD,
                "<|im_start|>user\nSay OK.<|im_end|>\n<|im_start|>assistant\n<think>\n"
                "⟦Hm.\n</think>\n\nOK.<|im_end|>⟧\n",
            ),
            (
                INLINE,
                "<|im_start|>user\nSay OK.<|im_end|>\n<|im_start|>assistant\n<think>\n"
                "⟦Hm.\n</think>\n\nOK.<|im_end|>⟧\n",
            ),
            (
                LAST,
                "<|im_start|>user\nSay "
                "OK.<|im_end|>\n<|im_start|>assistant\n<think>\n⟦\n</think>\n\n OK.<|im_end|>⟧\n",
            ),
            (TALK, f"{ELSEWHERE}'<think>\\n'{LAST_TURN}"),
            (
                INLINE_TWICE,
                "refused: the template drops the content of an answer; data.train_on: last_turn "
                "leaves",
            ),
        ],
    ),
    "deepseek-v3.1: a variable of the template says that there is no thought": Form(
        R1_CONTROLS,
        V3_1,
        [
            (
                TALK,
                "<|User|>Say OK.<|Assistant|></think>⟦ OK.\n<|end_of_sentence|>⟧"
                "<|User|>Why OK.?<|Assistant|></think>⟦Größe<|end_of_sentence|>⟧",
            ),
            (
                INLINE,
                "refused: the template drops the content of an answer; give a model.chat_template "
                "that keeps it",
            ),
        ],
        {"thinking": False},
    ),
    "the same, and the other way": Form(
        R1_CONTROLS, V3_1, [(LAST, f"{ELSEWHERE[:-7]}")], {"thinking": True}
    ),
    "command-r7b: two control tokens close an answer": Form(
        "<|START_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|START_RESPONSE|> "
        "<|END_RESPONSE|> "
        "<|END_OF_TURN_TOKEN|>",
        turns(
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>M<|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>M<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        ),
        [
            (
                LAST,
                "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Say "
                "OK.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>"
                "<|CHATBOT_TOKEN|>⟦<|START_RESPONSE|> OK.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧",
            )
        ],
    ),
    "olmo-2, zephyr: roles are plain text": Form(
        "<|endoftext|>",
        turns(
            "<|user|>\\nM\\n",
            "<|assistant|>\\nM<|endoftext|>\\n",
            "<|assistant|>\\n",
            before="<|endoftext|>",
        ),
        [
            (
                TALK,
                "<|endoftext|><|user|>\nSay OK.\n<|assistant|>\n⟦ OK.\n<|endoftext|>⟧\n"
                "<|user|>\nWhy OK.?\n<|assistant|>\n⟦Größe<|endoftext|>⟧\n",
            )
        ],
    ),
    "vicuna: plain words, and a stop token": Form(
        "</s>",
        turns("USER: M ", "ASSISTANT: M</s>", "ASSISTANT:", before="A chat. "),
        [
            (
                TALK,
                "A chat. USER: Say OK. ASSISTANT:⟦  OK.\n</s>⟧"
                "USER: Why OK.? ASSISTANT:⟦ Größe</s>⟧",
            )
        ],
    ),
    "a template that always ends with a header": Form(
        "<|im_start|> <|im_end|>",
        turns(
            "<|im_start|>user\\nM<|im_end|>\\n",
            "<|im_start|>assistant\\nM<|im_end|>\\n",
            after="<|im_start|>user\\n",
        )
        + "{{ '<|im_start|>assistant\\n' if add_generation_prompt }}",
        [
            (
                LAST,
                "<|im_start|>user\nSay OK.<|im_end|>\n<|im_start|>assistant\n⟦ "
                "OK.<|im_end|>⟧\n<|im_start|>user\n",
            )
        ],
    ),
    "the same, and another token is EOS": Form(
        "<|im_start|> <|im_end|> <|endoftext|>",
        turns(
            "<|im_start|>user\\nM<|im_end|>\\n",
            "<|im_start|>assistant\\nM<|im_end|>\\n",
            after="<|im_start|>user\\n",
        )
        + "{{ '<|im_start|>assistant\\n' if add_generation_prompt }}",
        [
            (
                LAST,
                "refused: several control tokens close an answer, and none is the tokenizer's EOS",
            )
        ],
    ),
    "harmony: an answer ends otherwise when more follows": Form(
        "<|start|> <|message|> <|channel|> <|end|> <|call|> <|return|>",
        "{% set last = namespace() %}{% for m in messages %}{% if m.role == 'tool' %}"
        "{{ '<|start|>functions.' + last.call.name + ' to=assistant<|message|>' + m.content | "
        "tojson + '<|end|>' }}"
        "{% elif m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}"
        "{% elif m.tool_calls %}{% set last.call = m.tool_calls[0].function %}"
        "{{ '<|start|>assistant to=functions.' + last.call.name + '<|message|>' }}"
        "{{ last.call.arguments | tojson + '<|call|>' }}"
        "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
        "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        [
            (
                LAST,
                "<|start|>user<|message|>Say "
                "OK.<|end|><|start|>assistant⟦<|channel|>final<|message|> OK.<|return|>⟧",
            ),
            (TALK, "refused: the template ends an answer otherwise when more follows"),
            (
                Conversation(CALLING.messages),
                "<|start|>user<|message|>2+2?<|end|><|start|>assistant"
                "⟦ to=functions.add<|message|>"
                + ARGUMENTS
                + '<|call|>⟧<|start|>functions.add to=assistant<|message|>"4"'
                "<|end|><|start|>assistant⟦<|channel|>final<|message|>Four<|return|>⟧",
            ),
            (CALLING, "refused: the template drops the tools"),
        ],
    ),
    "kimi, lfm2: control tokens close a call before the stop token": Form(
        "<|im_start|> <|call|> <|call_end|> <|im_end|>",
        "{{ 'Tools: ' + tools | tojson + '\\n' if tools }}{% for m in messages %}{{ '<|im_start|>' "
        "+ m.role + '\\n' }}"
        "{{ m.content }}{% for call in m.tool_calls or [] %}{{ '<|call|>' + call.function.name + "
        "'\\n' }}"
        "{{ call.function.arguments | tojson + '<|call_end|>\\n' }}{% endfor %}{{ '<|im_end|>\\n' "
        "}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        [
            (
                CALLING,
                "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦<|call|>add\n"
                + ARGUMENTS
                + "<|call_end|>\n"
                "<|im_end|>⟧\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n⟦Four<|im_end|>⟧\n",
            )
        ],
    ),
    "a template that pastes a call's arguments, and names the tool beside its result": Form(
        "<call> </call> </s>",
        "{{ 'Tools: ' + tools | tojson + '\\n' if tools }}{% set last = namespace() %}"
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{{ 'U: ' + m.content + '\\nA:\\n' }}{% elif m.role == 'tool' %}"
        "{{ last.name + ' says ' + m.content + '\\nA:\\n' }}"
        "{% elif m.tool_calls %}{% set last.name = m.tool_calls[0].function.name %}"
        "{{ '<call>' + last.name + ' ' + m.tool_calls[0].function.arguments + '</call></s>' }}"
        "{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}",
        [(CALLING, f"U: 2+2?\nA:\n⟦<call>add {ARGUMENTS}</call></s>⟧add says 4\nA:\n⟦Four</s>⟧")],
    ),
}


@pytest.fixture(scope="module")
def base(shared):
    return AutoTokenizer.from_pretrained(shared / "tokenizers" / "smollm2")


def tokenizer_of(base, controls: str, template: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(base.backend_tokenizer.to_str())
    backend.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in controls.split()]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=controls.split()[-1])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", FORMS)
def test_the_answers_with_their_stop_tokens_or_a_reason(base, name):
    form = FORMS[name]
    tokenizer = tokenizer_of(base, form.controls, form.template)
    masker = Masker(tokenizer, chat_template_kwargs=form.kwargs)
    for conversation, expected in form.expected:
        if expected.startswith("refused: "):
            with pytest.raises(RowError, match=re.escape(expected.removeprefix("refused: "))):
                masker.example(conversation)
            continue
        text, spans = parse(expected)
        whole = official(tokenizer, PASTED if "pastes" in name else conversation, **form.kwargs)
        head = len(whole) - len(text)  # tools are listed before the messages
        assert whole[head:] == text
        assert head == 0 or conversation.tools
        spans = [(start + head, stop + head) for start, stop in spans]
        assert agrees(tokenizer, masker.example(conversation), whole, spans)
        last = Masker(tokenizer, "completion", chat_template_kwargs=form.kwargs)
        assert agrees(tokenizer, last.example(conversation), whole, spans[-1:])
        assert generates(last, conversation)


def generates(last: Masker, conversation: Conversation) -> bool:
    """Return whether the prompt of the last answer and its trained tokens are, token by token, the
    example; `last` trains that answer alone."""
    example = last.example(conversation)
    prompt, _ = last.prompt(conversation)
    return prompt == example.input_ids[: int(np.argmax(example.trained))].tolist()


def test_an_empty_thought_is_cut_where_the_prompt_ends(shared):
    """Two newlines are one token, and the prompt ends with the first of them."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen3")
    tokenizer.chat_template = QWEN3_THINKING
    masker = Masker(tokenizer)
    example = masker.example(LAST)
    assert official(tokenizer, LAST) == tokenizer.decode(example.input_ids)
    assert tokenizer.decode(example.input_ids[example.trained]) == "\n</think>\n\n OK.<|im_end|>"
    assert generates(masker, LAST)
    assert generates(masker, FIELD)
    whole = tokenizer.backend_tokenizer.encode(
        official(tokenizer, LAST), add_special_tokens=False
    ).ids
    assert len(example.input_ids) == len(whole) + 1


def test_the_stop_token_is_known_where_answers_bring_their_thought(base):
    template = turns(
        "<|im_start|>user\\nM<|im_end|>", "<|im_start|>M<|im_end|>", "<|im_start|><think>\\n"
    )
    tokenizer = tokenizer_of(base, "<|im_start|> <|im_end|> <|endoftext|>", template)
    assert tokenizer.decode(list(Masker(tokenizer).stop_token_ids)) == "<|im_end|><|endoftext|>"


@pytest.mark.parametrize("train_on", ["last_turn", "completion"])
def test_where_earlier_answers_stand_otherwise_the_last_is_learned(base, train_on):
    tokenizer = tokenizer_of(base, "<|im_start|> <|im_end|>", QWEN3_THINKING)
    example = Masker(tokenizer, train_on).example(TALK)
    assert tokenizer.decode(example.input_ids[example.trained]) == "\n</think>\n\nGröße<|im_end|>"


# ------------------------------------------------------------------------------------ its variables


def test_without_thinking_the_answer_begins_after_the_empty_thought(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen3")
    for kwargs, learned in [
        ({}, "<think>\n\n</think>\n\n OK.<|im_end|>"),
        ({"enable_thinking": True}, "<think>\n\n</think>\n\n OK.<|im_end|>"),
        ({"enable_thinking": False}, " OK.<|im_end|>"),
    ]:
        masker = Masker(tokenizer, chat_template_kwargs=kwargs)
        example = masker.example(LAST)
        assert tokenizer.decode(example.input_ids[example.trained]) == learned
        assert generates(masker, LAST)
        assert tokenizer.decode(masker.prompt(LAST)[0]) == official(
            tokenizer, LAST, upto=1, **kwargs
        )


@pytest.mark.parametrize("assistant", ["<|Assistant|>", "<|Assistant|></think>"])
@pytest.mark.parametrize("token", ["<|User|>", "<|Assistant|>"])
def test_a_text_that_opens_a_turn_is_refused_though_its_token_is_not_called_special(
    base, assistant, token
):
    template = turns("<|User|>M", f"{assistant}M<|end_of_sentence|>", assistant)
    tokenizer = tokenizer_of(base, "<|end_of_sentence|>", template)
    tokenizer.add_tokens(["<|User|>", "<|Assistant|>", "</think>"], special_tokens=False)
    masker = Masker(tokenizer)
    with pytest.raises(RowError, match="control token"):
        masker.example(chat(f"Say{token}OK", "OK"))
    assert masker.example(chat("Say</think>OK", "OK")).trained.any()  # it opens and closes no turn


GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
    "{{ m.content | trim }}{{ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
# What Gemma's tokenizers list as added tokens, and others like them. None ends or opens a turn.
ORDINARY = ["\n", "\n\n", "\t", "  ", "▁▁", "model", "user", "the", "step 1", "###", "-", "2 + 3"]


@pytest.fixture(params=[False, True], ids=["not special", "special"])
def gemma(request, base):
    tokenizer = tokenizer_of(base, "<bos> <start_of_turn> <end_of_turn>", GEMMA)
    tokenizer.bos_token = "<bos>"
    # some conversions mark all of them as special; what holds more than words stays a control token
    words = [text for text in ORDINARY if not request.param or ORDINARY_TEXT.fullmatch(text)]
    added = [AddedToken(text, special=request.param, normalized=False) for text in words]
    tokenizer.add_tokens(list[Any](added), special_tokens=request.param)
    return tokenizer


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Add 2 and 3.\nShow the steps.", "2 + 3 = 5\nSo it is 5."),
        ("\n\nthe user", "the model says:\n\n### step 1\n\t-  the"),
        ("▁▁the▁▁", "- user  model -"),
    ],
)
def test_white_space_and_words_that_are_added_tokens_are_ordinary_text(gemma, question, answer):
    masker = Masker(gemma)
    example = masker.example(chat(question, answer))
    learned = gemma.decode(example.input_ids[example.trained], skip_special_tokens=False)
    assert learned == f"{answer}<end_of_turn>"
    assert generates(masker, chat(question, answer))


def test_true_control_tokens_stay_refused_beside_added_words(gemma):
    for marker in ("<start_of_turn>", "<end_of_turn>", "<bos>"):
        with pytest.raises(RowError, match="control token"):
            Masker(gemma).example(chat(f"Say\n{marker}", "the\nmodel"))


def test_the_date_can_be_given(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "llama3_2")
    masker = Masker(tokenizer, chat_template_kwargs={"date_string": "1 Jan 2031"})
    assert "Today Date: 1 Jan 2031\n" in tokenizer.decode(masker.example(LAST).input_ids)
    assert "Today Date: 1 Jan 2031\n" in tokenizer.decode(masker.prompt(LAST)[0])


def test_a_variable_that_the_template_does_not_read_is_refused(base):
    tokenizer = tokenizer_of(base, R1_CONTROLS, V3_1)
    with pytest.raises(
        BadInput, match=r"the chat template reads no `thinkng`; it reads content, thinking$"
    ):
        Masker(tokenizer, chat_template_kwargs={"thinkng": True})
    tokenizer.chat_template = {
        "default": turns("M", "M"),
        "tool_use": V3_1,
    }  # read by one of several
    assert Masker(tokenizer, chat_template_kwargs={"thinking": True})


# ----------------------------------------------------------------------------------- marked answers

CHATML = (
    "{% for m in messages %}{% if m.role == 'assistant' %}ANSWER{% else %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HEADER, MARK, END = "{{ '<|im_start|>assistant\\n' }}", "{% generation %}", "{% endgeneration %}"


@pytest.mark.parametrize(
    ("answer", "options", "beyond"),
    # what transformers' mask has beside ours: a newline that is trained on request, and the
    # generation prompt
    [
        (HEADER + MARK + "{{ m.content + '<|im_end|>' }}" + END + "{{ '\\n' }}", {}, ""),
        (HEADER + MARK + "{{ m.content + '<|im_end|>\\n' }}" + END, {}, "\n"),
        (
            HEADER + MARK + "{{ m.content + '<|im_end|>\\n' }}" + END,
            {"train_on_eot": "with_newline"},
            "",
        ),
        (
            HEADER + MARK + "{{ m.content }}" + END + "{{ '<|im_end|>\\n' }}",
            {"train_on_eot": False},
            "",
        ),
        (
            HEADER
            + MARK
            + "{{ m.content }}"
            + END
            + MARK
            + "{{ '<|im_end|>' }}"
            + END
            + "{{ '\\n' }}",
            {},
            "",
        ),
        (
            MARK + HEADER + "{{ m.content + '<|im_end|>' }}" + END + "{{ '\\n' }}",
            {},
            "<|im_start|>assistant\n",
        ),
    ],
)
@pytest.mark.parametrize("conversation", [TALK, LAST, BRIEF])
def test_marked_answers_are_what_transformers_marks_after_the_generation_prompt(
    base, answer, options, beyond, conversation
):
    tokenizer = tokenizer_of(base, "<|im_start|> <|im_end|>", CHATML.replace("ANSWER", answer))
    theirs: Any = tokenizer.apply_chat_template(
        [message.as_dict() for message in conversation.messages],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    example = Masker(tokenizer, **options).example(conversation)
    assert example.input_ids.tolist() == theirs["input_ids"]
    marks = np.array(theirs["assistant_masks"], bool)
    answers = sum(message.role == "assistant" for message in conversation.messages)
    assert (
        tokenizer.decode(example.input_ids[marks & ~example.trained].tolist()) == beyond * answers
    )
    assert not (example.trained & ~marks).any()


# ------------------------------------------------------------------------ a document of each answer

# Templates of the trl package, whose history shows answers otherwise than they are generated: the
# control tokens, and whether answers without reasoning are affected, too.
OF_TRL = {
    "gptoss": ("<|start|> <|message|> <|channel|> <|end|> <|return|>", True),
    "qwen3_5_think": ("<|im_start|> <|im_end|>", True),
    "qwen3_6": ("<|im_start|> <|im_end|>", True),
    "qwen3": ("<|im_start|> <|im_end|>", False),
    "glm4moe_training": ("[gMASK] <sop> <|user|> <|assistant|> <|endoftext|>", False),
    "lfm2_2_5": ("<|startoftext|> <|im_start|> <|im_end|>", False),
}
PLAIN = chat("Say OK.", "OK.", "Why?", " No reason. ", "So?", "Well.")
THOUGHT = Conversation(
    tuple(
        replace(message, reasoning_content="Let me see.")
        if message.role == "assistant"
        else message
        for message in PLAIN.messages
    )
)


def documents(masker: Masker, conversation: Conversation) -> tuple[Example, ...]:
    (made,) = masker.documents([conversation])
    assert not isinstance(made, RowError), made
    return made


def of_trl(base, name: str) -> PreTrainedTokenizerFast:
    # without importing trl, which takes seconds
    template = distribution("trl").locate_file(f"trl/chat_templates/{name}.jinja")
    tokenizer = tokenizer_of(base, OF_TRL[name][0], Path(str(template)).read_text())
    tokenizer.bos_token = OF_TRL[name][0].split()[0]
    return tokenizer


@pytest.mark.parametrize("conversation", [PLAIN, THOUGHT], ids=["plain", "thought"])
@pytest.mark.parametrize("name", OF_TRL)
def test_each_answer_is_trained_as_it_is_generated(base, name, conversation):
    """A server sends the turns before an answer with the generation prompt; the rest is learned."""
    tokenizer = of_trl(base, name)
    made = documents(Masker(tokenizer, turns="apart"), conversation)
    assert len(made) == 3
    for number, example in zip((1, 3, 5), made, strict=True):
        prompt = official(tokenizer, conversation, upto=number)
        # data is tokenized with a fixed date, and gptoss writes today's
        prompt = prompt.replace(date.today().isoformat(), "2024-07-26")
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        first = int(np.argmax(example.trained))
        assert example.input_ids[:first].tolist() == ids
        assert np.flatnonzero(np.diff(example.trained)).size <= 2, "one span is trained"
        learned = tokenizer.decode(example.input_ids[example.trained])
        message = conversation.messages[number]
        assert message.content.strip() in learned
        if message.reasoning_content:
            assert message.reasoning_content in learned


@pytest.mark.parametrize("name", OF_TRL)
def test_auto_keeps_a_row_together_where_its_history_is_as_generated(base, name):
    auto = Masker(of_trl(base, name), turns="auto")
    together = Masker(of_trl(base, name))
    affected = OF_TRL[name][1]
    assert len(documents(auto, PLAIN)) == (3 if affected else 1)
    assert len(documents(auto, THOUGHT)) == 3
    plain, thought = together.documents([PLAIN, THOUGHT])
    assert isinstance(plain, RowError) == affected
    assert isinstance(thought, RowError)


def test_only_trained_answers_have_a_document(base):
    tokenizer = of_trl(base, "qwen3_6")
    first, second, third = (PLAIN.messages[n] for n in (1, 3, 5))
    messages = list(PLAIN.messages)
    messages[3] = replace(second, weight=0)
    masker = Masker(tokenizer, turns="apart")
    made = documents(masker, Conversation(tuple(messages)))
    learned = [str(tokenizer.decode(example.input_ids[example.trained])) for example in made]
    assert [text.split("</think>")[1].strip() for text in learned] == [
        f"{first.content}<|im_end|>",
        f"{third.content}<|im_end|>",
    ]
    assert len(documents(Masker(tokenizer, "last_turn", turns="apart"), PLAIN)) == 1
    bad = replace(PLAIN, messages=(*PLAIN.messages[:4], Message("user", "<|im_end|>"), third))
    assert isinstance(masker.documents([bad])[0], RowError), "a row is whole or rejected"
    assert len(Masker(tokenizer, "all", turns="apart").documents([PLAIN])) == 1


def test_a_template_that_does_not_end_rejects_the_row(base, monkeypatch) -> None:
    monkeypatch.setattr("packhorse.trainer.data.template_call.RENDER_S", 0.2)
    forever = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = tokenizer_of(base, "<|im_end|>", forever)
    conversation = Conversation((Message("user", "a"), Message("assistant", "b")))
    (found,) = Masker(tokenizer).documents([conversation])
    assert isinstance(found, RowError)
    assert str(found) == "the template is not finished within 0.2 s of computing"


@pytest.mark.parametrize("content", ["Hi \U0001f600", [{"type": "text", "text": "Hi"}]])
@pytest.mark.parametrize("more", [{}, {"name": "Ann"}, {"reasoning_content": "Greet."}])
@pytest.mark.parametrize("value", [None, True, 1, 0.5, "x", date(2026, 1, 2), ["a"]])
@pytest.mark.parametrize("tools", [None, [], [{"type": "function", "function": {"name": "f"}}]])
def test_plain_messages_are_rendered_as_transformers_renders_them(content, more, value, tools):
    source = (
        "{{ messages }}{{ tools }}{{ documents is none }}{{ value }}{{ add_generation_prompt }}"
    )
    messages = [{"role": "user", "content": content, **more}]
    variables = {"value": value, "add_generation_prompt": True}
    assert call_template(source, messages, tools, variables) == render_jinja_template(
        [messages], tools=tools, chat_template=source, **variables
    )
