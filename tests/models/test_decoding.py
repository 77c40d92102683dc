from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    JambaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.models.tiny import EOS, PAD, tiny_gpt2, tiny_llama
from tpmm_pl.models.decoding import (
    Decoded,
    Decoding,
    Tokens,
    decode,
    decode_with_generate,
    left_padded,
    shares_prefill,
)
from tpmm_pl.models.draws import row_keys

WINDOW = 4
"""Of the sliding attention; prompts are longer."""

SHAPE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
HEADS: dict[str, Any] = {**SHAPE, "head_dim": 8}
TYPES: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"]}


def built(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    for name, parameter in made.named_parameters():
        # spread the softmax, so that a wrong position or mask changes what is drawn
        parameter.data *= 1.0 if "norm" in name else 8.0
    made.eval()
    return made


def scaled(made: PreTrainedModel) -> PreTrainedModel:
    for parameter in made.parameters():
        parameter.data *= 4.0
    made.eval()
    return made


def neox() -> PreTrainedModel:
    settings = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
    return built(GPTNeoXConfig(**settings))


def opt() -> PreTrainedModel:
    config = OPTConfig(
        vocab_size=32, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
        word_embed_proj_dim=16,
    )  # fmt: skip
    return built(config)


def falcon(**changes: Any) -> PreTrainedModel:
    config = FalconConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, **changes
    )
    return built(config)


def t5() -> PreTrainedModel:
    torch.manual_seed(0)
    config = T5Config(vocab_size=32, d_model=16, d_ff=32, num_layers=1, num_heads=2)
    config.decoder_start_token_id = PAD
    made: PreTrainedModel = T5ForConditionalGeneration(config)
    made.eval()
    return made


def mamba() -> PreTrainedModel:
    return built(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2))


def jamba() -> PreTrainedModel:
    config = JambaConfig(
        **SHAPE, num_experts=1, num_experts_per_tok=1, use_mamba_kernels=False, mamba_dt_rank=4,
        attn_layer_period=2, attn_layer_offset=1,
    )  # fmt: skip
    return built(config)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: scaled(tiny_llama()),
    "gpt2": lambda: scaled(tiny_gpt2()),
    "neox": neox,
    "qwen2": lambda: built(Qwen2Config(**SHAPE)),
    "qwen3": lambda: built(Qwen3Config(**HEADS)),
    "mistral": lambda: built(MistralConfig(**SHAPE, sliding_window=WINDOW)),
    "gemma2": lambda: built(Gemma2Config(**HEADS, sliding_window=WINDOW)),
    "gemma3": lambda: built(Gemma3TextConfig(**HEADS, sliding_window=WINDOW, **TYPES)),
    "phi": lambda: built(PhiConfig(**SHAPE)),
    "mixtral": lambda: built(MixtralConfig(**SHAPE, output_router_logits=True)),
    "opt": opt,
    "falcon": falcon,
    # positions from the attention mask alone
    "bloom": lambda: built(BloomConfig(vocab_size=32, hidden_size=16, n_layer=2, n_head=2)),
    "falcon with alibi": lambda: falcon(alibi=True),
}


def prompts(samples: int = 3) -> list[Tokens]:
    generator = torch.Generator().manual_seed(0)
    drawn = [
        tuple(torch.randint(6, 32, (length,), generator=generator).tolist())
        for length in (3, 9, 1, 6)
    ]
    return [prompt for prompt in drawn for _ in range(samples)]


def keys(count: int) -> Tensor:
    return row_keys([f"0/1/{index}" for index in range(count)], torch.device("cpu"))


def settings(**changes: Any) -> Decoding:
    asked: dict[str, Any] = {"max_new_tokens": 12, "end_ids": (EOS, 9, 10), "pad_id": PAD}
    return Decoding(**{**asked, **changes})


def one_by_one(model: nn.Module, asked: list[Tokens], how: Decoding) -> list[Decoded]:
    """The oracle: ``generate`` on each row alone, without padding."""
    noise = keys(len(asked))
    rows = zip(asked, noise.split(1), strict=True)
    return [decode_with_generate(model, [prompt], key, how)[0] for prompt, key in rows]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_completions_are_those_of_generate_without_padding(family: str, temperature: float) -> None:
    model, asked, how = FAMILIES[family](), prompts(), settings(temperature=temperature)
    assert shares_prefill(model)
    made = decode(model, asked, keys(len(asked)), how)
    expected = one_by_one(model, asked, how)
    assert [row.ids for row in made] == [row.ids for row in expected]
    for row, other in zip(made, expected, strict=True):
        assert row.logps == pytest.approx(other.logps, abs=1e-5)
    assert len({row.ids for row in made}) > (6 if temperature else 1)


def test_adapters_count() -> None:
    base = FAMILIES["llama"]()
    asked, how = prompts(), settings()
    plain = decode(base, asked, keys(len(asked)), how)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    model.eval()
    assert shares_prefill(model)
    made = decode(model, asked, keys(len(asked)), how)
    expected = one_by_one(model, asked, how)
    assert [row.ids for row in made] == [row.ids for row in expected]
    for row, other in zip(made, expected, strict=True):
        assert row.logps == pytest.approx(other.logps, abs=1e-5)
    assert made != plain


@pytest.mark.parametrize("model", [mamba, jamba, t5])
def test_recurrent_states_and_encoders_are_left_to_generate(
    model: Callable[[], PreTrainedModel],
) -> None:
    made = model()
    assert not shares_prefill(made)
    asked = prompts()
    rows = decode_with_generate(made, asked, keys(len(asked)), settings())
    assert len(rows) == len(asked)
    assert all(len(row.ids) == len(row.logps) for row in rows)
    assert len({row.ids for row in rows}) > 3


class Passes:
    """Records the tokens of each forward pass of a model, ``(rows, tokens)``."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes: list[tuple[int, ...]] = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))


def test_equal_prompts_are_prefilled_once_and_only_rows_that_go_on_are_computed() -> None:
    model, asked = FAMILIES["llama"](), prompts(samples=5)
    passes = Passes(model)
    made = decode(model, asked, keys(len(asked)), settings())
    lengths = [len(row.ids) for row in made]
    # the last token of a completion is not read
    going = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert passes.shapes == [(4, 9), *((rows, 1) for rows in going)]
    assert going[0] > going[-1]


def test_one_token_takes_nothing_but_the_prefill() -> None:
    model, asked = FAMILIES["llama"](), prompts()
    passes = Passes(model)
    made = decode(model, asked, keys(len(asked)), settings(max_new_tokens=1))
    assert passes.shapes == [(4, 9)]
    assert {len(row.ids) for row in made} == {1}


def test_prompts_of_one_length_need_no_mask() -> None:
    model, masks = FAMILIES["llama"](), []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        masks.append(kwargs["attention_mask"])

    model.register_forward_pre_hook(note, with_kwargs=True)
    asked = [prompt for prompt in prompts() if len(prompt) == 6]
    made = decode(model, asked, keys(len(asked)), settings())
    assert set(masks) == {None}
    among = decode(model, [(7,) * 8, *asked], torch.cat([keys(1), keys(len(asked))]), settings())
    assert [row.ids for row in among[1:]] == [row.ids for row in made]
    assert masks[-1] is not None


def test_without_end_tokens_all_run_to_the_budget() -> None:
    model, asked = FAMILIES["llama"](), prompts()
    made = decode(model, asked, keys(len(asked)), settings(end_ids=()))
    assert {len(row.ids) for row in made} == {12}
    expected = one_by_one(model, asked, settings(end_ids=()))
    assert [row.ids for row in made] == [row.ids for row in expected]


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = left_padded([(7, 8), (9,)], PAD, torch.device("cpu"))
    assert ids.tolist() == [[7, 8], [PAD, 9]]
    assert mask.tolist() == [[1, 1], [0, 1]]
