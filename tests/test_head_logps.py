"""The head as one differentiable function: values, gradients, memory and products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tpmm_pl import logps
from tpmm_pl.logps import head_logps

WIDTH, VOCABULARY = 8, 32
STATES = 7
# not in order; of state 3 three tokens, of which two are the same; of state 5 none
STATE_OF = torch.tensor([3, 0, 6, 3, 1, 3, 2, 4, 1])
TARGETS = torch.tensor([9, 31, 0, 4, 5, 9, 17, 17, 6])
GRADIENT = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 0.25, 2.0, -0.5, 1.5])

Inputs = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states, weight and bias of a head."""


def budget(rows: int) -> int:
    """Bytes of the float32 logits of so many states."""
    return 4 * VOCABULARY * rows


def inputs(*, bias: bool = True, frozen: bool = False) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(STATES, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    shift = torch.randn(VOCABULARY, generator=generator)
    for tensor in (weight, shift):
        tensor.requires_grad_(not frozen)
    return hidden.requires_grad_(), weight, shift if bias else None


def naive(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One log-softmax of everything, in the dtype that the logits have, float32 at least."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return logits.log_softmax(-1)[STATE_OF, TARGETS]


def in_float64(given: Inputs) -> Inputs:
    hidden, weight, bias = (
        None if one is None else one.detach().double().requires_grad_(one.requires_grad)
        for one in given
    )
    assert hidden is not None
    assert weight is not None
    return hidden, weight, bias


def gradients(values: Tensor, given: Inputs) -> list[Tensor]:
    wanted = [one for one in given if one is not None and one.requires_grad]
    return [*torch.autograd.grad(values, wanted, GRADIENT.to(values.dtype), retain_graph=True)]


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """The norm of the difference is within a share of the norm."""
    difference = (found.double() - expected.double()).norm()
    assert difference <= tolerance * expected.double().norm()


# blocks of 2 rows, and all rows in one
@pytest.fixture(params=[2 * VOCABULARY, 1 << 19], ids=["blocks", "whole"])
def _block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logps, "_CACHED", request.param)


@pytest.mark.usefixtures("_block_size")
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7, 1000])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_a_log_softmax_in_float64(rows: int, bias: bool) -> None:
    given = inputs(bias=bias)
    values = head_logps(*given, STATE_OF, TARGETS, budget=budget(rows))
    exact = in_float64(given)
    expected = naive(*exact)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, atol=5e-6, rtol=0)
    found = zip(gradients(values, given), gradients(expected, exact), strict=True)
    for ours, theirs in found:
        assert ours.dtype == torch.float32
        assert_near(ours, theirs, 1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5, 6])
def test_chunks_change_neither_values_nor_gradients(rows: int) -> None:
    given = inputs()
    kept = head_logps(*given, STATE_OF, TARGETS)
    cut = head_logps(*given, STATE_OF, TARGETS, budget=budget(rows))
    torch.testing.assert_close(cut, kept, atol=1e-6, rtol=0)
    for ours, theirs in zip(gradients(cut, given), gradients(kept, given), strict=True):
        assert_near(ours, theirs, 1e-6)
    with torch.no_grad():
        assert torch.equal(head_logps(*given, STATE_OF, TARGETS, budget=budget(rows)), cut)


def test_a_budget_below_one_state_still_works() -> None:
    given = inputs()
    values = head_logps(*given, STATE_OF, TARGETS, budget=1)
    torch.testing.assert_close(values, head_logps(*given, STATE_OF, TARGETS), atol=1e-6, rtol=0)


def test_the_gradient_is_the_slope() -> None:
    # sums are in float32, so at a step of 1e-2 a slope is known to about 1e-3 of its size
    given, generator = inputs(), torch.Generator().manual_seed(3)
    values = head_logps(*given, STATE_OF, TARGETS)
    for number, gradient in enumerate(gradients(values, given)):
        direction = torch.randn(gradient.shape, generator=generator)
        direction /= direction.norm()
        ends = []
        for step in (-1e-2, 1e-2):
            moved = [one.detach() for one in given if one is not None]
            moved[number] = moved[number] + step * direction
            logps = head_logps(moved[0], moved[1], moved[2], STATE_OF, TARGETS)
            ends.append(float((logps.double() * GRADIENT).sum()))
        slope = (ends[1] - ends[0]) / 2e-2
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=2e-3)


def test_two_branches_that_begin_alike_cancel() -> None:
    # chosen and rejected share a state and its token, with opposite gradients
    given = inputs()
    state, target = torch.tensor([2, 2]), torch.tensor([5, 5])
    values = head_logps(*given, state, target)
    assert values[0] == values[1]
    (values[0] - values[1]).backward()
    for tensor in given:
        assert tensor is not None
        assert tensor.grad is not None
        assert not tensor.grad.any()


@pytest.mark.parametrize("rows", [3, 1000])
def test_a_second_backward_pass_gives_the_same_gradient(rows: int) -> None:
    given = inputs()
    values = head_logps(*given, STATE_OF, TARGETS, budget=budget(rows))
    first, second = gradients(values, given), gradients(values, given)
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)


def test_a_derivative_of_the_gradient_is_refused() -> None:
    hidden, weight, bias = inputs()
    values = head_logps(hidden, weight, bias, STATE_OF, TARGETS)
    (gradient,) = torch.autograd.grad(values.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("rows", [3, 1000])
def test_a_frozen_head_gets_no_gradient(rows: int) -> None:
    given = inputs(frozen=True)
    head_logps(*given, STATE_OF, TARGETS, budget=budget(rows)).backward(GRADIENT)
    hidden, weight, bias = given
    assert bias is not None
    assert weight.grad is None
    assert bias.grad is None
    learning = inputs()
    head_logps(*learning, STATE_OF, TARGETS, budget=budget(rows)).backward(GRADIENT)
    assert torch.equal(hidden.grad, learning[0].grad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("frozen", "rows", "products"), [(False, 1000, 3), (True, 1000, 2), (False, 3, 4), (True, 3, 3)]
)
def test_a_step_costs_so_many_products_of_the_head(frozen: bool, rows: int, products: int) -> None:
    given = inputs(frozen=frozen)
    with FlopCounterMode(display=False) as counter:
        values = head_logps(*given, STATE_OF, TARGETS, budget=budget(rows))
        assert counter.get_total_flops() == 2 * STATES * VOCABULARY * WIDTH
        values.backward(GRADIENT)
    assert counter.get_total_flops() == products * 2 * STATES * VOCABULARY * WIDTH


LOGITS = {(rows, VOCABULARY) for rows in range(1, STATES + 1)}
"""Shapes; H is larger, so that no weight has one of them."""


class Watch(TorchDispatchMode):
    """Notes the logits that operations make, and how many states products make them of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.logits: list[Tensor] = []
        self.states: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.shape in LOGITS:
            self.logits.append(out)
            if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
                self.states.append(len(out))
        return out

    def buffers(self, rows: int) -> set[tuple[int, torch.dtype]]:
        """Memory that holds logits of so many states and more."""
        held = [one for one in self.logits if len(one) >= rows]
        return {(one.untyped_storage().data_ptr(), one.dtype) for one in held}


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_are_held_once_and_become_their_own_gradient(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logps, "_CACHED", 2 * VOCABULARY)
    given = inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Watch() as watch:
        head_logps(*given, STATE_OF, TARGETS).backward(GRADIENT)
    # what the head's own products give, and blocks of two rows, are all that is made
    ((_, dtype),) = watch.buffers(rows=3)
    assert dtype == (torch.bfloat16 if autocast else torch.float32)


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_the_head_never_sees_more_states_than_the_budget_holds(rows: int) -> None:
    given = inputs()
    with Watch() as watch:
        values = head_logps(*given, STATE_OF, TARGETS, budget=budget(rows))
        assert sum(watch.states) == STATES
        values.backward(GRADIENT)
    assert sum(watch.states) == 2 * STATES, "once more in the backward pass"
    assert max(watch.states) == rows
    assert not watch.buffers(rows=rows + 1)


# logits are of bfloat16 in both, so values agree as sums in float32 do; chunks add up the weight's
# gradient in bfloat16, which has 8 bits
@pytest.mark.usefixtures("_block_size")
@pytest.mark.parametrize(("rows", "tolerance"), [(1000, 1e-4), (2, 1e-2)])
def test_under_autocast_it_is_what_the_plain_form_is(rows: int, tolerance: float) -> None:
    given = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        values = head_logps(*given, STATE_OF, TARGETS, budget=2 * VOCABULARY * rows)
        expected = naive(*given)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, expected, atol=5e-6, rtol=0)
    for ours, theirs in zip(gradients(values, given), gradients(expected, given), strict=True):
        assert_near(ours, theirs, tolerance)


def test_the_gradient_of_a_likely_token_keeps_its_bits_under_autocast() -> None:
    # p is 0.9990 and 1 - p is what is left of 1: in bfloat16 steps of 1/256 beside 1
    weight = torch.zeros(3, 2).requires_grad_()
    hidden = torch.tensor([[1.0, 0.0]])
    bias = torch.tensor([7.625, 0.0, 0.0])
    state, target = torch.tensor([0]), torch.tensor([0])
    with torch.autocast("cpu", torch.bfloat16):
        head_logps(hidden, weight, bias, state, target).backward()
    assert weight.grad is not None
    left = 1 - bias.softmax(0)[0].item()
    assert weight.grad[0, 0].item() == pytest.approx(left, rel=2**-8)
    assert weight.grad[1, 0].item() == pytest.approx(-left / 2, rel=2**-8)


def test_nothing_to_score_gives_nothing() -> None:
    _, weight, bias = inputs()
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    values = head_logps(hidden, weight, bias, none, none)
    assert values.tolist() == []
    values.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
