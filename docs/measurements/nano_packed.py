"""How long does a decode step of the nano runtime take over packed pages, and how many tokens do they hold?

    python docs/measurements/nano_packed.py --out OUT                  # about a minute a format
    python docs/measurements/nano_packed.py --device cpu --tiny        # the same code on small shapes

For every format and every point of nano_serving.py: the median of three rounds of steps, driven by the runtime, over random
keys and values packed as the format has it. The floor of a step: bytes of the weights that it reads and of all live keys and
values, scales included, over the copy bandwidth measured in the same process. Results are printed as they come, and appended
to OUT/nano_serving.jsonl.
"""

from __future__ import annotations

import argparse
import traceback
from statistics import median

import torch
from nano_session import BLOCK, Session, serving
from nano_steps import Decoding, scatter

from kvsuite.cache_formats.cache_format import CacheFormat
from kvsuite.nanovllm.groups import token_bytes

FORMATS = ("auto", "fp8_e4m3", "int8", "int4", "int8:int4", "int4+hadamard")
_ROUNDS = 3


def steps(session: Session, name: str) -> None:
    shapes = session.shapes
    sizes = sorted({batch for batch, _ in shapes.points})
    blocks = max(batch * -(-(length + shapes.margin) // BLOCK) for batch, length in shapes.points) + max(sizes)
    limits = {
        "max_model_len": max(length for _, length in shapes.points) + shapes.margin, "max_num_seqs": max(sizes),
        "max_num_batched_tokens": 1 << 20, "prefix_caching": False, "num_blocks": blocks,
        "cache_format": CacheFormat.parse(name),
    }  # fmt: skip
    with serving(session, shapes.large, sizes=sizes, **limits) as runtime:
        scatter(runtime)
        for batch, length in shapes.points:
            decoding = Decoding(session, runtime, batch, length)
            # of the shortest contexts that are timed
            floor = decoding.floor_s()
            found = [decoding.time(shapes.steps // _ROUNDS)[0] for _ in range(_ROUNDS)]
            decoding.end()
            session.say(
                "packed", format=name, batch=batch, context=length, step_ms=1e3 * median(found),
                slowest_ms=1e3 * max(found), floor_ms=1e3 * floor, share=floor / median(found),
            )  # fmt: skip


def capacity(session: Session, names: list[str]) -> None:
    """Tokens that as many bytes hold as 100000 tokens take in the model's own dtype."""
    loaded = session.model(session.shapes.large)
    config = loaded.text_config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    one = {
        name: token_bytes(config.num_key_value_heads, head_dim, loaded.dtype.itemsize, CacheFormat.parse(name))
        for name in ("auto", *names)
    }
    for name in names:
        session.say("capacity", format=name, bytes_a_token_and_layer=one[name], times_auto=one["auto"] / one[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out")
    session = Session(parser.parse_args())
    _ = session.bandwidth
    capacity(session, session.options.formats)
    for name in session.options.formats:
        try:
            steps(session, name)
        except Exception:
            # the other formats are worth having
            traceback.print_exc()
    if torch.cuda.is_available():
        session.say("memory", peak_gb=torch.cuda.max_memory_allocated() / 1e9)


if __name__ == "__main__":
    main()
