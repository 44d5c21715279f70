"""A small byte-level tokenizer like the shipped one (digits in groups of up to three)."""

import numpy as np
import pytest

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}\n{% endgeneration %}"
    "{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
)


def make_tokenizer(vocabulary: int = 600, bos: bool = True):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
            pre_tokenizers.Split(Regex(r" ?[^\s\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = ["The pass key of is What import def return self None the of and a\n"] * 20
    backend.train_from_iterator([*words, *(str(n) for n in range(0, 1000, 3))], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def model(tmp_path_factory, tokenizer):
    """A model's folder with a config.json and a tokenizer but no weights, which is enough for the data verbs."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def writer(tokenizer):
    from longctx.data.haystack import NeedleWriter

    return NeedleWriter(tokenizer)


def text_haystack(texts, writer):
    """A haystack over a few texts; long requests repeat them."""
    from longctx.data.haystack import token_haystack

    return token_haystack(np.concatenate([writer.tokens(text) for text in texts]), writer.newline_after)


@pytest.fixture(scope="session")
def straw(writer):
    """A haystack of short lines of words."""
    rng = np.random.default_rng(0)
    words = ["apple", "river", "import", "return", "stone", "self", "window", "letter"]
    lines = [" ".join(rng.choice(words, size=int(rng.integers(2, 9)))) for _ in range(400)]
    return text_haystack(["\n".join(lines) + "\n"], writer)
