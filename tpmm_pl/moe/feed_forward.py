"""Dense feed-forward layers, found by what they hold and compute, whatever they are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from tpmm_pl.modes import evaluating
from tpmm_pl.types import InputError

Activation = Callable[[Tensor], Tensor]
Linear = Callable[[str, Tensor], Tensor]
"""Applies the linear layer that plays a role: ``up``, ``down`` or ``gate``."""
Compute = Callable[[Linear, Activation, Tensor], Tensor]


def plain(linear: Linear, activation: Activation, x: Tensor) -> Tensor:
    """Compute ``down(activation(up(x)))``; GPT-2, GPT-NeoX, BERT."""
    return linear("down", activation(linear("up", x)))


def gated(linear: Linear, activation: Activation, x: Tensor) -> Tensor:
    """Compute ``down(activation(gate(x)) * up(x))`` (Shazeer 2020, eq. 6); Llama, Qwen3."""
    return linear("down", activation(linear("gate", x)) * linear("up", x))


def fused_gate_first(linear: Linear, activation: Activation, x: Tensor) -> Tensor:
    """Compute the gated layer whose ``up`` holds the gate, then the rest; Phi-3, ModernBERT."""
    gate, up = linear("up", x).chunk(2, dim=-1)
    return linear("down", activation(gate) * up)


def fused_gate_last(linear: Linear, activation: Activation, x: Tensor) -> Tensor:
    """Compute the gated layer whose ``up`` holds the gate in its second half."""
    up, gate = linear("up", x).chunk(2, dim=-1)
    return linear("down", activation(gate) * up)


_KINDS: dict[Compute, tuple[str, ...]] = {
    plain: ("up", "down"),
    fused_gate_first: ("up", "down"),
    fused_gate_last: ("up", "down"),
    gated: ("gate", "up", "down"),
}
_REFUSALS = (TypeError, RuntimeError, ValueError, AttributeError, IndexError)
"""What a module raises that is called with other arguments than it is built for."""
FUSED = (fused_gate_first, fused_gate_last)


@dataclass(frozen=True)
class FeedForward:
    """Where a dense feed-forward layer stands in its parent module, and how it computes."""

    replaced: tuple[str, ...]
    """Modules that an expert layer replaces: it stands in for the first, identities for others."""
    linears: Mapping[str, str]
    """The linear layer of every role; names are relative to the parent, as in ``replaced``."""
    compute: Compute
    activation: Activation
    dropouts: tuple[nn.Module, ...]


def find_feed_forwards(model: nn.Module) -> dict[str, FeedForward]:
    """Find the one feed-forward layer of every block.

    Blocks are the members of the model's outermost module lists. What a candidate computes is
    settled by comparing it with the rebuilt formula on random input.

    Returns:
        By the full name of the parent module, in the order of the blocks.

    Raises:
        InputError: If the model is a mixture of experts already, or a block has no feed-forward
            layer of a known form; the message names the modules looked at.
    """
    found: dict[str, FeedForward] = {}
    looked_at = [type(model).__name__]
    for list_name, blocks in _layer_lists(model):
        in_list = {
            f"{list_name}.{n}": _in_block(f"{list_name}.{n}", b) for n, b in enumerate(blocks)
        }
        looked_at += [f"{name} ({_contents_named(model, name)})" for name in list(in_list)[:1]]
        lacking = [name for name, parents in in_list.items() if not parents]
        if lacking and len(lacking) < len(in_list):
            raise _no_feed_forward([f"{lacking[0]} ({_contents_named(model, lacking[0])})"])
        for block, parents in in_list.items():
            found |= {f"{block}.{name}".rstrip("."): ff for name, ff in parents.items()}
    if not found:
        raise _no_feed_forward(looked_at)
    return found


def is_transposed(module: nn.Module) -> bool | None:
    """Say whether a linear layer keeps its weight as (in, out); ``None`` if it is none."""
    weight = getattr(module, "weight", None)
    names = {name for name, _ in module.named_parameters()}
    if (
        not isinstance(weight, Tensor)
        or weight.ndim != 2
        or not {"weight"} <= names <= {"weight", "bias"}
    ):
        return None
    if isinstance(module, nn.Linear):
        return False if weight.shape == (module.out_features, module.in_features) else None
    if isinstance(module, nn.Embedding) or not weight.is_floating_point():
        return None
    # transformers' Conv1D, for one
    rows = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        expected = F.linear(rows, weight.t(), getattr(module, "bias", None))
        return True if _computes(module, rows, expected) else None


def _no_feed_forward(looked_at: list[str]) -> InputError:
    return InputError(
        f"no feed-forward layer found in {', '.join(looked_at)}; a block needs one module, called "
        "with one tensor, of two or three linear layers and an activation (models that compute it "
        "in the block itself, as OPT, cannot be upcycled); choose another model"
    )


def _contents_named(model: nn.Module, name: str) -> str:
    children = model.get_submodule(name).named_children()
    return ", ".join(f"{child}: {type(module).__name__}" for child, module in children)


def _layer_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    inside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(inside)):
            inside.append(f"{name}.")
            if any(True for _ in module.parameters()):
                yield name, module


def _in_block(name: str, block: nn.Module) -> dict[str, FeedForward]:
    # a stack of experts is a tensor of three dimensions, in transformers and in ours
    for path, module in block.named_modules():
        stacked = [n for n, p in module.named_parameters(recurse=False) if p.ndim > 2]
        if stacked and not isinstance(module, _ConvNd):
            raise InputError(
                f"{name}.{path}.{stacked[0]} stacks several matrices, as a mixture of experts "
                "does; upcycling starts from a dense model"
            )
    found = [
        (path, feed_forward)
        for path, module in block.named_modules()
        for feed_forward in (*_single(module), *_paired(module))
    ]
    if len(found) > 1:
        names = ", ".join(".".join(filter(None, (name, p, f.replaced[0]))) for p, f in found)
        raise InputError(
            f"the block {name} has {len(found)} feed-forward layers ({names}), as a mixture of "
            "experts has; upcycling starts from a dense model with one a block"
        )
    return dict(found)


def _single(parent: nn.Module) -> Iterator[FeedForward]:
    """Yield the children that are feed-forward layers of their own."""
    for child, module in parent.named_children():
        contents = _contents(module)
        if contents is None or _arguments(module) != 1:
            continue
        linears, activation, dropouts = contents
        if (built := _rebuilt(module, linears, activation)) is not None:
            compute, roles = built
            names = {role: f"{child}.{linear}" for role, linear in roles.items()}
            yield FeedForward((child,), names, compute, activation, dropouts)


def _paired(parent: nn.Module) -> Iterator[FeedForward]:
    """Yield the pairs of children as BERT's: up and activation, then down, dropout and norm."""
    children = list(parent.named_children())
    for first, intermediate in children:
        contents = _contents(intermediate)
        if contents is None or len(contents[0]) != 1 or _arguments(intermediate) != 1:
            continue
        ((up_name, up),), activation = contents[0].items(), contents[1]
        x = _probe(up)
        with torch.no_grad():
            hidden = activation(up(x))
            if not _computes(intermediate, x, hidden):
                continue
            for second, output in children:
                for down_name, down in output.named_children():
                    if _shape(down) == _shape(up)[::-1] and _splits(output, down_name, hidden, x):
                        linears = {"up": f"{first}.{up_name}", "down": f"{second}.{down_name}"}
                        replaced = (first, f"{second}.{down_name}")
                        yield FeedForward(replaced, linears, plain, activation, contents[2])


Contents = tuple[dict[str, nn.Module], Activation, tuple[nn.Module, ...]]


def _contents(module: nn.Module) -> Contents | None:
    """Return linear layers, the activation and dropouts of a module that holds nothing else."""
    linears, activations, dropouts = {}, [], []
    if any(True for _ in (*module.parameters(recurse=False), *module.buffers())):
        return None
    for name, child in module.named_children():
        if isinstance(child, _DropoutNd):
            dropouts.append(child)
        elif not any(True for _ in child.parameters()):
            activations.append(child)
        elif is_transposed(child) is not None:
            linears[name] = child
        else:
            return None
    functions = [f for n, f in vars(module).items() if n != "forward" and inspect.isroutine(f)]
    activation: list[Activation] = [*activations] or [*functions]
    if len(activation) != 1 or not 1 <= len(linears) <= 3:
        return None
    return linears, activation[0], tuple(dropouts)


def _rebuilt(
    module: nn.Module, linears: Mapping[str, nn.Module], activation: Activation
) -> tuple[Compute, dict[str, str]] | None:
    """Return the first kind and roles that compute what the module does."""
    for compute, kind_roles in _KINDS.items():
        for names in permutations(linears):
            roles = dict(zip(kind_roles, names, strict=False))
            if len(linears) != len(kind_roles) or not _chains(compute, linears, roles):
                continue
            x = _probe(linears[roles["up"]])
            with torch.no_grad():
                # the loop's variable is bound now: the function does not outlive the round
                expected = compute(lambda r, rows: linears[roles[r]](rows), activation, x)  # noqa: B023
                if _computes(module, x, expected):
                    return compute, roles
    return None


def _chains(compute: Compute, linears: Mapping[str, nn.Module], roles: Mapping[str, str]) -> bool:
    (width, inner), down = _shape(linears[roles["up"]]), _shape(linears[roles["down"]])
    if compute is gated and _shape(linears[roles["gate"]]) != (width, inner):
        return False
    if compute in FUSED:
        return inner % 2 == 0 and down == (inner // 2, width)
    return down == (inner, width)


def _shape(linear: nn.Module) -> tuple[int, ...]:
    """Return the widths in and out; nothing for a module that is no linear layer."""
    transposed = is_transposed(linear)
    if transposed is None:
        return ()
    shape = tuple(linear.get_parameter("weight").shape)
    return shape if transposed else shape[::-1]


def _probe(linear: nn.Module) -> Tensor:
    """Draw rows that make outputs of about 2: there every activation bends, so that roles show."""
    weight = linear.get_parameter("weight")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, _shape(linear)[0], generator=generator).to(weight)
    with torch.no_grad():
        spread = float(linear(x).float().std())
    return x * (2 / spread) if spread else x


def _computes(module: nn.Module, x: Tensor, expected: Tensor) -> bool:
    """Say whether a module maps ``x`` to ``expected``, within what its dtype resolves."""
    try:
        with evaluating(module):
            found = module(x)
    except _REFUSALS:
        return False  # built for other arguments: no feed-forward layer
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    error = (found.double() - expected.double()).norm()
    return bool(error <= tolerance * expected.double().norm())


def _splits(output: nn.Module, down_name: str, hidden: Tensor, residual: Tensor) -> bool:
    """Say whether ``output(hidden, residual)`` starts with its linear layer and needs it once."""
    if _arguments(output) != 2:
        return False
    down = output.get_submodule(down_name)
    try:
        with evaluating(output):
            whole = output(hidden, residual)
            output.set_submodule(down_name, nn.Identity())
            split = output(down(hidden), residual)
    except _REFUSALS:
        return False
    finally:
        output.set_submodule(down_name, down)
    return torch.equal(whole, split)


def _arguments(module: nn.Module) -> int:
    """Count the arguments that a call must have."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)
