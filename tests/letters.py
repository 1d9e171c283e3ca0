"""A tokenizer of 97 ids for tests: seven special tokens, then one token a character; its chat template is literal."""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<mask>", "<unk>", "<user>", "<assistant>")
LETTERS = string.ascii_letters + string.digits + " \n" + "!\"'(),-./:;<>?[]_{|}=+*#@&"
TEMPLATE = (
    "{% for m in messages %}<{{ 'assistant' if m.role == 'assistant' else 'user' }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def letters(chat: bool = True, ends: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer; `ends`: as T5 or BERT do, every text gets an end token."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *LETTERS])}
    assert len(vocab) == 97
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    more = {"additional_special_tokens": ["<user>", "<assistant>"], "clean_up_tokenization_spaces": False}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **names, **more)
    made.chat_template = TEMPLATE if chat else None
    return made
