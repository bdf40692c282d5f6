"""Options of engine `vllm`."""

# no postponed annotations: an option that is written wrongly is an error where it stands

from typing import Annotated

from kvsuite.options.option import Option, OptionGroup, auto_or, path, text, whole_number


class VllmOptions(OptionGroup, frozen=True, kw_only=True):
    """Where vLLM is, how long it may take, and what it is started with."""

    # fmt: off
    vllm_python: Annotated[str | None, Option(
        path, "",
        "Python interpreter whose environment has vLLM; without it this one.",
        example="/opt/vllm/bin/python",
    )]
    vllm_timeout: Annotated[int, Option(
        whole_number(1, 10**7), "900",
        "Seconds after which importing vLLM, a start of it, or requests sent together, are taken for hanging: it is "
        "killed and the case fails.",
    )]
    vllm_block_size: Annotated[int | None, Option(
        auto_or(whole_number(1, 4096)), "auto",
        "Tokens a block of vLLM's pool; auto is what vLLM takes by itself, 16 on CUDA and 128 on a CPU.",
        example="32",
    )]
    vllm_pool_bytes: Annotated[int | None, Option(
        auto_or(whole_number(1, 10**13)), "auto",
        "Bytes of vLLM's pool on each card, e.g. --kv-vllm-pool-bytes=1073741824; auto is what the case needs: its "
        "sequences at their full length at the same time.",
        example="1073741824",
    )]
    vllm_tensor_parallel_size: Annotated[int, Option(
        whole_number(1, 1024), "1",
        "Cards that share every layer of the model, from the one of --kv-device on.",
    )]
    vllm_attention_backend: Annotated[str | None, Option(
        auto_or(text), "auto",
        "Attention backend by vLLM's name, e.g. FLASH_ATTN or FLASHINFER; auto leaves the choice to vLLM. The record says "
        "which it was.",
        example="FLASH_ATTN",
    )]
    vllm_max_capture_size: Annotated[int | None, Option(
        auto_or(whole_number(1, 8192)), "auto",
        "Largest batch whose steps vLLM captures; auto leaves it to vLLM, which takes twice the case's batch, up to 512. "
        "What it compiles counts the captured sizes, so with one value, of at least the largest batch, all batches of a "
        "sweep share one compilation; each then captures all sizes up to it: 1, 2, 4, multiples of 8, from 256 on of 16. "
        "A case whose batch is none of them is invalid.",
        example="128",
    )]
    # fmt: on
