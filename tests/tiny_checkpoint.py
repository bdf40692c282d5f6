"""A local model folder as a user would have one: a small Llama with seeded weights, and a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BOS, EOS = "<s>", "</s>"
TRAINED_LENGTH = 64
TEXT = (
    "Danube\n\nThe river rises in the Black Forest, where two streams meet, and ends in a delta on the Black Sea. It "
    "passes ten countries; no other river passes more. Ships of the Café Zürich line have sailed it since 1830, and the "
    "oldest bridge, of stone, still stands near Regensburg.  Its water is green in spring, grey in winter, and blue in "
    "songs.\n"
)


def byte_tokenizer(*, adds_bos: bool = False, special: bool = True) -> Any:
    """One token a byte, then BOS (256) and EOS (257); ``adds_bos``: it begins every text with BOS by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if not special:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tokenizer.add_special_tokens([BOS, EOS])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def save_checkpoint(folder: Path, *, tokenizer: Any = None, seed: int = 0) -> Path:
    """Save model and tokenizer into ``folder``; ``tokenizer`` false leaves it out.

    The weights are wide, so that losses differ from token to token and from format to format.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=TRAINED_LENGTH, initializer_range=0.15,
        bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    if tokenizer is not False:
        (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder
