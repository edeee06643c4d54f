"""A small byte-level vocabulary with a chat template, trained in a moment: the text side of a model, without the model."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from router.chat_template import ChatTemplate
from router.prompts import TextModel
from router.tokenizer import TextTokenizer
from runtime.models.model_files import SamplingDefaults

EOS, START = 0, 1
SPECIAL_TOKENS = ["<|end|>", "<|start|>"]
TEMPLATE = """{%- for message in messages %}
{%- if message['role'] == 'refused' %}{{ raise_exception('roles must be known') }}{% endif %}
{{- '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""
TEXTS = [
    "The prefill node computes the prompt and the decode node continues the answer token by token.",
    "Ein Mühlrad dreht sich, 水は流れる, вода течёт, le moulin tourne. 🎉👩‍👩‍👧‍👦 नमस्ते",
]


@cache
def make_tokenizer(vocab_size: int = 400) -> TextTokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return TextTokenizer(tokenizer)


def make_text_model(name: str = "tiny", *, template: str | None = TEMPLATE, max_model_len: int = 256) -> TextModel:
    tokenizer = make_tokenizer()
    return TextModel(
        name=name,
        tokenizer=tokenizer,
        template=None if template is None else ChatTemplate(template, {"eos_token": SPECIAL_TOKENS[EOS]}),
        eos_token_ids=(EOS,),
        max_model_len=max_model_len,
        vocab_size=tokenizer.vocab_size,
        sampling=SamplingDefaults(),
    )
