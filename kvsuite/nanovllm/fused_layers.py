"""Decoders of the Llama kind in fewer, larger steps than transformers takes, on the same weights.

A layer is nine kernels: norm, one product for queries, keys and values, norm + rotation + write into the cache, attention,
output product, norm, one product for gate and up, their activation, down product. Torch's products of output and down add to
the residual themselves; the norms behind our own, whose sums come in parts, do that.
Where all products of a captured step of single tokens are our own it is five: norms, additions and the activation are parts
of the products, rotation, the write and merging of attention (`FusedDecoder._short_step`). The merged weights are the storage
of the model's own parameters, so the model goes on working and nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .batch import StepBatch
from .layer_pages import LayerPages, plain_pages
from .paged_attention import AttentionBackend
from .side_streams import processors

if TYPE_CHECKING:
    from .row_linear import Tiling
    from .whole_rows import WholeRows

_ARCHITECTURES = {"LlamaModel", "MistralModel", "Qwen3Model"}
# rotary embeddings whose angles depend on the position alone, so that a table can hold them
_FIXED_ROTARY = {"default", "linear", "llama3", "yarn"}
_FEW_ROWS = 1024
#: sequences up to which a short step is no slower, of models of 0.6 to 8 billion parameters on an H200 (docs/measurements.md)
MOST_SHORT = 32
#: where keys and values of a layer go: its pages, and the tokens' slots in them
Destination = Callable[[int], tuple[LayerPages, LayerPages, Tensor]]
#: products of a layer, and of the final layer
PRODUCTS = ("qkv", "output", "gate_up", "down", "final")


@dataclass(frozen=True)
class FusedLayer:
    """Weights of a layer: RMS norms, merged projections ``[features, width]``, norms of a head (``None`` without)."""

    input_norm: Tensor
    qkv: Tensor
    head_norms: tuple[Tensor, Tensor] | None
    output: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


def not_fusable(model: Any, text_config: Any) -> str | None:
    """Why a transformers model has to stay as it is, or ``None`` if it can be fused."""
    decoder = model.get_decoder()
    if type(decoder).__name__ not in _ARCHITECTURES:
        return f"{type(decoder).__name__} is not of the Llama kind"
    try:
        import triton  # type: ignore[import-not-found, import-untyped, unused-ignore] # noqa: F401
    except ImportError:
        return "triton is not installed"
    rotary = getattr(decoder.rotary_emb, "rope_type", "default")
    if rotary not in _FIXED_ROTARY:
        return f"rotary embedding {rotary} changes with the length"
    head_dim = decoder.layers[0].self_attn.head_dim
    if head_dim < 16 or head_dim & (head_dim - 1):
        return f"head_dim {head_dim} is not a power of two from 16 on"
    if text_config.hidden_act != "silu":
        return f"activation {text_config.hidden_act}"
    final = model.get_output_embeddings()
    for name, linear in [("final layer", final), *_projections(decoder)]:
        # packed weights are other modules, and a bias would need another kernel
        if type(linear) is not nn.Linear or linear.bias is not None:
            return f"{name} is not a plain linear layer without bias"
    return None


def _projections(decoder: Any) -> list[tuple[str, nn.Module]]:
    return [
        (f"layer {index} {name}", getattr(block, name))
        for index, layer in enumerate(decoder.layers)
        for block, names in (
            (layer.self_attn, ("q_proj", "k_proj", "v_proj", "o_proj")),
            (layer.mlp, ("gate_proj", "up_proj", "down_proj")),
        )
        for name in names
    ]


def _merge(linears: list[nn.Linear]) -> Tensor:
    """Put the weights into one tensor ``[sum of features, width]``, of which the layers keep views."""
    merged = torch.cat([linear.weight.data for linear in linears])
    at = 0
    for linear in linears:
        features = linear.weight.shape[0]
        linear.weight.data = merged[at : at + features]
        at += features
    return merged


class FusedDecoder:
    """A decoder whose layers run fused; made for a model for which `not_fusable` has no objection.

    Parameters
    ----------
    model
        The transformers model. Its projections become views of merged weights.
    text_config
        Configuration of its language part.
    max_positions
        Positions that the rotary table holds.
    """

    def __init__(self, model: Any, text_config: Any, max_positions: int) -> None:
        decoder = model.get_decoder()
        first = decoder.layers[0].self_attn
        self._embedding: Tensor = decoder.embed_tokens.weight
        self._padding = decoder.embed_tokens
        self._final_norm: Tensor = decoder.norm.weight
        self._final: Tensor = model.get_output_embeddings().weight
        self._eps = float(decoder.norm.variance_epsilon)
        self.scale = float(first.scaling)
        self.head_dim = int(first.head_dim)
        self.query_heads = first.q_proj.weight.shape[0] // self.head_dim
        self._kv_heads = first.k_proj.weight.shape[0] // self.head_dim
        self.width = self._embedding.shape[1]
        self.dtype = self._embedding.dtype
        self.device = self._embedding.device
        with torch.inference_mode():
            self._table = _rotary_table(decoder.rotary_emb, max_positions, self._embedding)
            self.layers = [self._layer(layer) for layer in decoder.layers]
        # overlapping launches need Hopper
        major = torch.cuda.get_device_capability(self.device)[0] if self.device.type == "cuda" else 0
        self.pdl = major >= 9
        self.gates = major == 9 and self._takes_gated_linear()
        self.tilings: dict[tuple[str, int], Tiling | None] = {}
        self._short: set[int] = set()
        self._whole = self._gated = False

    def _takes_gated_linear(self) -> bool:
        """Whether the kernel for gate and up with their activation is there, and multiplies with these weights."""
        try:
            from .gated_linear import takes
        except ImportError:
            # a release of triton from before tensor descriptors
            return False
        return all(takes(weight) for weight in self.weights("gate_up"))

    def _layer(self, layer: Any) -> FusedLayer:
        attention, mlp = layer.self_attn, layer.mlp
        norms = None
        if hasattr(attention, "q_norm"):
            norms = (attention.q_norm.weight.data, attention.k_norm.weight.data)
        return FusedLayer(
            input_norm=layer.input_layernorm.weight.data,
            qkv=_merge([attention.q_proj, attention.k_proj, attention.v_proj]),
            head_norms=norms,
            output=attention.o_proj.weight.data,
            post_norm=layer.post_attention_layernorm.weight.data,
            gate_up=_merge([mlp.gate_proj, mlp.up_proj]),
            down=mlp.down_proj.weight.data,
        )

    @property
    def effective(self) -> dict[str, Any]:
        """What was fused, sequences of steps that were short, and which of torch's product and our own runs, by rows."""
        own = {
            f"{name} <= {rows} rows": "torch" if tiling is None else str(tiling)
            for (name, rows), tiling in sorted(self.tilings.items())
        }
        if self._gated:
            own |= {"gate_up, many rows": "with its activation"}
        if self._whole:
            own |= {"qkv, output, down, 1 row": "whole rows"}
        return {
            "fused": ["qkv", "gate_up", "add_norm", "head_norm_rotary_write", "silu_mul"],
            "short_steps": sorted(self._short),
            "overlapped_launches": self.pdl,
            "products": dict(own) or "torch",
        }

    def weights(self, product: str) -> list[Tensor]:
        """The weights of one of `PRODUCTS`, one a layer."""
        return [self._final] if product == "final" else [getattr(layer, product) for layer in self.layers]

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads: all but the embedding table, of which it reads a few rows."""
        products = [weight for product in PRODUCTS for weight in self.weights(product)]
        norms = [norm for layer in self.layers for norm in (layer.input_norm, layer.post_norm)]
        return sum(tensor.nbytes for tensor in (*products, *norms, self._final_norm))

    def logits(self, batch: StepBatch, backend: AttentionBackend) -> Tensor:
        """Logits ``[R, vocab]`` of ``batch.sample_rows``; the backend has begun the step."""
        return self.head(self.hidden(batch, backend))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits ``[n, vocab]`` of rows of `hidden`."""
        if not hidden.shape[0]:
            return hidden.new_empty(0, self._final.shape[0])
        with torch.inference_mode():
            found = self._product("final", hidden, self._final)
            return found[0] if found.shape[0] == 1 else found.sum(0).to(hidden.dtype)

    def hidden(self, batch: StepBatch, backend: AttentionBackend) -> Tensor:
        """What the final layer reads, ``[R, hidden]`` of ``batch.sample_rows``; the backend has begun the step."""
        destination = getattr(backend, "destination", None) or self._apart(batch.tokens)
        wanted = batch.sample_rows
        if batch.decode_only and len(wanted) == batch.tokens and (own := self._own_tilings(batch.tokens, backend)):
            return self._short_step(own, batch, backend)
        with torch.inference_mode():
            residual = self.embedded(batch)
            delta: Tensor | None = None
            for layer, weights in enumerate(self.layers):
                mixed = self._attend(layer, delta, residual, batch, backend, destination)
                if weights is self.layers[-1] and not (batch.decode_only and len(wanted) == batch.tokens):
                    # behind the last attention no token looks at another
                    mixed, residual = mixed[wanted], residual[wanted]
                    if not len(wanted):
                        return residual
                delta = self._added("output", mixed, weights.output, residual)
                del mixed
                delta = self._feed_forward(weights, delta, residual)
            return self._norm(delta, residual, self._final_norm)

    def rehearse(self) -> None:
        """Launch once what only steps of some numbers of rows launch, where what that computes means nothing."""
        if self.gates:
            from .gated_linear import gated_linear

            weight = self.layers[0].gate_up
            gated_linear(weight.new_empty(1, weight.shape[1]), weight, 1)

    def embedded(self, batch: StepBatch) -> Tensor:
        """What the first layer reads, ``[T, hidden]``."""
        found = functional.embedding(batch.ids, self._embedding)
        return found if batch.images is None else batch.images.into(found)

    def _own_tilings(self, rows: int, backend: AttentionBackend) -> dict[str, Tiling | WholeRows]:
        """Tilings of a layer's products, if all are our own and attention takes what they make; none otherwise."""
        # a residual times the weights of a norm may be more than float16 holds
        if rows > MOST_SHORT or self.dtype == torch.float16 or not getattr(backend, "takes_products", False):
            return {}
        found = {product: self._tiling(product, rows) for product in PRODUCTS if product != "final"}
        own = {product: tiling for product, tiling in found.items() if tiling is not None}
        if len(own) < len(found) or own["output"].parts > 1 or own["down"].parts > 1:
            return {}
        return {**own, **self._whole_rows(rows, backend)}

    def _whole_rows(self, rows: int, backend: Any) -> dict[str, WholeRows]:
        """Products that one row makes with whole rows of the weight, where that is faster."""
        from .whole_rows import PROJECTED, SUMMED

        if rows > 1 or not self.pdl or not backend.loads_at_once:
            return {}
        found = {"qkv": PROJECTED, "output": SUMMED, "down": SUMMED}
        features = {product: self.weights(product)[0].shape[0] for product in found}
        filled = [found[product].fills(features[product], backend.processors) for product in found]
        return found if all(filled) else {}

    @torch.inference_mode()
    def _short_step(self, tilings: Mapping[str, Any], batch: StepBatch, backend: Any) -> Tensor:
        """`hidden` of single tokens in five kernels a layer: norms and additions are parts of the products."""
        from .fused_kernels import open_residual
        from .row_linear import Tiling, row_linear
        from .step_attention import Heads
        from .whole_rows import whole_rows

        rows, eps, layers = batch.tokens, self._eps, self.layers
        self._short.add(rows)
        whole = not isinstance(tilings["qkv"], Tiling)
        self._whole |= whole
        tiles = tilings["down"].tiles(self.width)
        counters = max(tiles, tilings["output"].tiles(self.width), rows * self._kv_heads)
        pdl = self._overlapped(rows)
        # attention reads the order of several sequences before it waits: here all kernels up to that of the order are over
        residual, x, squares, arrivals = open_residual(
            batch.ids, self._embedding, layers[0].input_norm, tiles, counters, pdl=pdl and rows == 1
        )
        following = [*(layer.input_norm for layer in layers[1:]), self._final_norm]
        for index, (layer, next_norm) in enumerate(zip(layers, following, strict=True)):
            heads = Heads(self.query_heads, layer.head_norms, eps, self._table)
            # rounded when the norm's scale is known, as transformers rounds
            if whole:
                qkv = whole_rows(x, layer.qkv, tilings["qkv"], pdl=pdl)
            else:
                qkv = row_linear(x, layer.qkv, tilings["qkv"], dtype=torch.float32, pdl=pdl)
            mixed = backend.attend_product(index, qkv, squares, heads, self.scale, arrivals, at_once=whole).flatten(1)
            x, squares = _add(mixed, layer.output, tilings["output"], residual, layer.post_norm, arrivals, pdl)
            active = row_linear(x, layer.gate_up, tilings["gate_up"], squares=squares, eps=eps, gated=True, pdl=pdl)[0]
            x, squares = _add(active, layer.down, tilings["down"], residual, next_norm, arrivals, pdl)
        return self._norm(None, residual, self._final_norm)

    # a method for each half of a layer: of a long prompt every tensor counts, and what a method made is gone when it ends
    def _attend(
        self,
        index: int,
        delta: Tensor | None,
        residual: Tensor,
        batch: StepBatch,
        backend: AttentionBackend,
        destination: Destination,
    ) -> Tensor:
        query = self.queries(index, delta, residual, batch.positions, destination)
        if not hasattr(backend, "destination"):
            keys, values, _ = destination(index)
            backend.write(index, keys.codes[:, 0], values.codes[:, 0])
        return backend.attend(index, query, self.scale).reshape(batch.tokens, -1)

    def queries(
        self,
        index: int,
        delta: Tensor | None,
        residual: Tensor,
        positions: Tensor,
        destination: Destination,
        out: Tensor | None = None,
    ) -> Tensor:
        """The first half of a layer: queries ``[T, heads, head_dim]``, and keys and values to where they go.

        Parameters
        ----------
        index
            Of the layer.
        delta
            What the layer before has still to add to ``residual``, partial sums ``[parts, T, hidden]``; ``None`` for nothing.
        residual
            ``[T, hidden]``, overwritten.
        positions
            int64 ``[T]``.
        destination
            Pages of a layer, and the slots of the tokens in them.
        out
            Where the queries are written, if given.
        """
        from .fused_kernels import rotate_store

        layer = self.layers[index]
        qkv = self._product("qkv", self._norm(delta, residual, layer.input_norm), layer.qkv)
        keys, values, slots = destination(index)
        return rotate_store(
            qkv, positions, slots, self._table, layer.head_norms, self._eps, keys, values,
            query_heads=self.query_heads, out=out, pdl=self._overlapped(qkv.shape[1]),
        )  # fmt: skip

    def feed_forward(self, index: int, mixed: Tensor, residual: Tensor) -> Tensor | None:
        """The second half of a layer, from its attention ``[T, heads * head_dim]``: the ``delta`` of `queries`."""
        layer = self.layers[index]
        return self._feed_forward(layer, self._added("output", mixed, layer.output, residual), residual)

    def last(self, mixed: Tensor, residual: Tensor) -> Tensor:
        """What the final layer reads ``[R, hidden]``, from the last layer's attention of these rows."""
        if not len(residual):
            return residual
        return self._norm(self.feed_forward(len(self.layers) - 1, mixed, residual), residual, self._final_norm)

    def _feed_forward(self, layer: FusedLayer, delta: Tensor | None, residual: Tensor) -> Tensor | None:
        x = self._norm(delta, residual, layer.post_norm)
        return self._added("down", self._active(x, layer.gate_up), layer.down, residual)

    def _active(self, x: Tensor, weight: Tensor) -> Tensor:
        """The product of gate and up with its activation, ``[T, features]``."""
        from .fused_kernels import silu_mul
        from .row_linear import row_linear

        rows, tiling = x.shape[0], self._tiling("gate_up", x.shape[0])
        if tiling is not None:
            return row_linear(x, weight, tiling, gated=True, pdl=self._overlapped(rows))[0]
        if self.gates:
            from .gated_linear import gated_linear, is_faster

            own = processors(self.device)
            if is_faster(rows, weight.shape[0] // 2, own):
                self._gated = True
                return gated_linear(x, weight, own)
        return silu_mul(functional.linear(x, weight)[None], x.dtype, pdl=self._overlapped(rows))

    def _norm(self, delta: Tensor | None, residual: Tensor, weight: Tensor) -> Tensor:
        from .fused_kernels import add_norm

        return add_norm(delta, residual, weight, self._eps, pdl=self._overlapped(residual.shape[0]))

    def _overlapped(self, rows: int) -> bool:
        """Whether kernels over so many rows start before their predecessors end: where launches are a part of the time."""
        return self.pdl and rows <= _FEW_ROWS

    def _apart(self, rows: int) -> Destination:
        """Where keys and values go when the backend stores them itself."""
        shape = (rows, 1, self._kv_heads, self.head_dim)
        keys, values = (plain_pages(torch.empty(shape, dtype=self.dtype, device=self.device)) for _ in range(2))
        slots = torch.arange(rows, device=self.device)
        return lambda layer: (keys, values, slots)

    def _tiling(self, product: str, rows: int) -> Tiling | None:
        return self.tilings.get((product, rows_bucket(rows)))

    def _product(self, product: str, x: Tensor, weight: Tensor) -> Tensor:
        from .row_linear import row_linear

        tiling = self._tiling(product, x.shape[0])
        if tiling is None:
            return functional.linear(x, weight)[None]
        return row_linear(x, weight, tiling, pdl=self._overlapped(x.shape[0]))

    def _added(self, product: str, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor | None:
        """Add a product to ``residual``, or return what the next norm has to add, partial sums ``[parts, T, hidden]``."""
        if self._tiling(product, x.shape[0]) is not None:
            return self._product(product, x, weight)
        # in place: the norm behind has half as much to read and to write
        residual.addmm_(x, weight.t())
        return None


def _add(
    x: Tensor, weight: Tensor, tiling: Tiling | WholeRows, residual: Tensor, norm: Tensor, arrivals: Tensor, pdl: bool
) -> tuple[Tensor, Tensor]:
    """Add a product to the residual and begin the next norm, see `row_linear.add_linear`."""
    from .row_linear import Tiling, add_linear
    from .whole_rows import add_whole_rows

    if isinstance(tiling, Tiling):
        return add_linear(x, weight, tiling, residual, norm, arrivals, pdl=pdl)
    return add_whole_rows(x, weight, tiling, residual, norm, pdl=pdl)


def rows_bucket(rows: int) -> int:
    """Rows that one tiling is chosen for: powers of two from 16 on."""
    return max(16, 1 << (rows - 1).bit_length())


def _rotary_table(rotary: Any, positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[positions, head_dim / 2]`` as the model's own module makes them."""
    places = torch.arange(positions, device=like.device)[None]
    cosines, sines = rotary(like[:1], places)
    # both halves of a head turn by the same angles
    half = cosines.shape[-1] // 2
    return cosines[0, :, :half].contiguous(), sines[0, :, :half].contiguous()
