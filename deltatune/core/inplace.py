"""In-place deltas: base parameters trained where they are, the originals kept to be put back bitwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from .delta import Delta, Refusal
from .quant import is_quantised
from .site import Site, layers


class InPlace(Delta):
    """Trains the named parameters of one layer. Switching swaps pointers, so nothing is copied or rounded.

    The layer's Parameter objects never change identity: optimizers, tied weights and autograd keep working.
    """

    inplace = True

    def __init__(self, layer: nn.Module, names: tuple[str, ...]):
        super().__init__()
        refuse_packed(layer, names)
        self.names, self.on = names, False
        # what is not in the layer now: the trained tensors while off, the originals while on
        self.other: dict[str, Tensor] = {n: layer.get_parameter(n).data.clone() for n in names}

    def keep(self, names: tuple[str, ...]) -> None:
        """Train only these of the parameters, before anything was trained."""
        self.names = names
        self.other = {name: self.other[name] for name in names}

    def swap(self, layer: nn.Module, on: bool) -> None:
        if on == self.on:
            return
        for name in self.names:
            parameter = layer.get_parameter(name)
            parameter.data, self.other[name] = self.other[name], parameter.data
        self.on = on

    def stored(self, layer: nn.Module) -> dict[str, Tensor]:
        return {n: (layer.get_parameter(n).detach() if self.on else self.other[n]) for n in self.names}

    def put(self, layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Into new memory while they are not in the layer: the layer's parameter does not count writes to what is not
        in it, and a weight is known by where it lies and how often it was written (DoRA's norm)."""
        if self.on:
            super().put(layer, tensors)
        else:
            self.other = {n: t.clone().copy_(tensors[n]) for n, t in self.other.items()}

    def trained(self, layer: nn.Module) -> dict[str, nn.Parameter]:
        return {n: layer.get_parameter(n) for n in self.names}

    def _apply(self, fn: Callable, recurse: bool = True) -> InPlace:
        super()._apply(fn, recurse)
        self.other = {n: fn(t) for n, t in self.other.items()}
        return self


class InPlaceBias(InPlace):
    """A trained bias. It is additive, so rows of one batch can each have their own."""

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Only run per row, with the original bias in the layer."""
        (name,) = self.names
        change = (self.other[name] - layer.get_parameter(name)).to(y.dtype)
        features_last = not isinstance(layer, nn.Conv1d | nn.Conv2d)
        return y + (change if features_last else change.view(-1, *[1] * (y.ndim - 2)))


def refuse_packed(layer: nn.Module, names: tuple[str, ...]) -> None:
    """4-bit codes have no gradient, and no small step between them."""
    if is_quantised(layer) and "weight" in names:
        raise Refusal(
            "a packed 4-bit weight cannot be trained in place.",
            found=f"{type(layer).__name__} with {', '.join(names)}",
            instead="LoRA or another added method over it, biases or norms (bitfit, the preset norm-tuning), or a base "
            "in bf16 or fp32",
        )


def refuse_rows(delta: InPlace) -> None:
    """A per-row weight would need a copy of the whole weight per adapter: not a thing this mechanism hides."""
    raise Refusal(
        "rows() cannot give each row its own weights: this adapter trained the base's weights in place.",
        found=f"{delta.site.write} ({', '.join(delta.names)})",
        instead="activate() one adapter at a time; mixed batches take BitFit, LoRA, (IA)^3, Adapter, Prefix and Prompt",
    )


def pick(model: nn.Module, chosen: Callable[[str, nn.Module], bool]) -> Iterator[tuple[Site, Delta]]:
    """One in-place delta per layer that owns a chosen parameter; tied parameters are taken once."""
    seen: set[int] = set()
    for name, layer in list(layers(model)):
        names = []
        for own, parameter in layer.named_parameters(recurse=False):
            if id(parameter) not in seen and chosen(f"{name}.{own}" if name else own, layer):
                seen.add(id(parameter))
                names.append(own)
        if names == ["bias"]:
            yield Site(name, name), InPlaceBias(layer, ("bias",))
        elif names:
            yield Site(name, name), InPlace(layer, tuple(names))
