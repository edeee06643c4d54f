"""Tiny random-weight models of each supported family, as Hugging Face folders with a working tokenizer.

Weights are scaled up so that greedy decoding is decided by clear margins, not by the last bit of a sum.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 512
EOS, BOS = 0, 1
SPECIAL_TOKENS = ["<|end|>", "<|start|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "initializer_range": 0.2,
}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "mistral": MistralConfig(**SHAPE, sliding_window=48, head_dim=16),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
}


def make_model(family: str, folder: Path, seed: int = 0) -> Path:
    """Write the family's tiny model into `folder / family` and return that folder."""
    return write_model(CONFIGS[family], folder / family, seed)


def write_model(config: PretrainedConfig, target: Path, seed: int = 0) -> Path:
    """Write a model of this configuration, random in all its parameters, into `target` and return it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zeros, as transformers makes them, would hide that nobody adds them
                parameter.normal_(0.0, 0.5)
            elif name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(target)
    _make_tokenizer().save(str(target / "tokenizer.json"))
    (target / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": SPECIAL_TOKENS[BOS],
                "eos_token": SPECIAL_TOKENS[EOS],
                "chat_template": CHAT_TEMPLATE,
            }
        )
    )
    return target


def load_reference(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def greedy_reference(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """What the transformers library generates greedily, ignoring end-of-sequence."""
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=num_tokens,
            eos_token_id=None,
            pad_token_id=EOS,
        )
    return output[0, len(prompt) :].tolist()


def _make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [
        "The prefill node computes the prompt and the decode node continues the answer token by token.",
        "Water runs through the headrace to the wheel, and the wheel turns the mill.",
        "Ein Mühlrad dreht sich, 水は流れる, вода течёт, le moulin tourne.",
    ]
    tokenizer.train_from_iterator(text * 4, trainer)
    return tokenizer
