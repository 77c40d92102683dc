import torch
from lightning.fabric import Fabric
from torch import nn

from tpmm_pl.modules.fusion import FusionWeights


def test_coefficients_learn_in_float32_whatever_the_precision_of_the_weights() -> None:
    module = FusionWeights()
    module.weights = nn.Parameter(torch.tensor([[0.001, 1.0]]))
    start = module.weights.detach().clone()
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    fabric.setup(module, torch.optim.Adam([module.weights], lr=1e-4))
    assert module.weights.dtype == torch.float32
    assert torch.equal(module.weights.detach(), start)
    assert module.to(torch.bfloat16).weights.dtype == torch.float32
