"""Options of engine `llamacpp`."""

# no postponed annotations: an option that is written wrongly is an error where it stands

from typing import Annotated

from kvsuite.options.option import Option, OptionGroup, choice, whole_number


class LlamacppOptions(OptionGroup, frozen=True, kw_only=True):
    """How llama.cpp attends, cuts prompts, and stores weights that it did not bring."""

    # fmt: off
    flash_attention: Annotated[str, Option(
        choice("auto", "on", "off"), "auto",
        "Flash attention of engine llamacpp; auto is llama.cpp's own choice, which the record says. Values in fewer bits "
        "than 16 need it.",
    )]
    ubatch: Annotated[int, Option(
        whole_number(1, 1 << 16), "512",
        "Tokens that engine llamacpp computes together at most (its n_ubatch): a prompt chunk is cut into such pieces.",
    )]
    gguf_type: Annotated[str, Option(
        choice("f16", "q8_0", "f32"), "f16",
        "Weights of a checkpoint that is written to GGUF for engine llamacpp; a .gguf, and the default model, keep their own.",
    )]
    # fmt: on
