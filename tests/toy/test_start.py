from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tpmm_pl.models.source import PolicySource
from tpmm_pl.toy.judges import LettersGold
from tpmm_pl.toy.letters import MAX_ANSWER_TOKENS, VOCABULARY, split_of
from tpmm_pl.toy.prompts import eval_prompts
from tpmm_pl.toy.start import LettersPolicy, demonstration_batches
from tpmm_pl.types import IGNORE_INDEX, Completion, InputError


class CountingPolicy(LettersPolicy):
    trained = 0

    def train(self) -> PreTrainedModel:
        type(self).trained += 1
        return super().train()


@pytest.fixture(autouse=True)
def _forget_count() -> None:
    CountingPolicy.trained = 0


def tiny(cache_dir: Path, **settings: Any) -> CountingPolicy:
    shape = {"hidden": 16, "layers": 1, "heads": 2, "ffn": 32, "steps": 5, "batch_size": 8}
    return CountingPolicy(**{**shape, **settings}, cache_dir=cache_dir)


def test_a_start_is_trained_once_and_shared(tmp_path: Path) -> None:
    tiny(tmp_path).prepare()
    tiny(tmp_path).prepare()
    assert CountingPolicy.trained == 1


def test_concurrent_runs_train_it_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(tiny(tmp_path).prepare) for _ in range(3)]:
            done.result()
    assert CountingPolicy.trained == 1


def test_an_unfinished_folder_of_a_killed_run_does_no_harm(tmp_path: Path) -> None:
    policy = tiny(tmp_path)
    left_over = tmp_path / f".{policy.folder.name}.partial"
    left_over.mkdir()
    (left_over / "model-00001-of-00002.safetensors").touch()
    policy.prepare()
    assert not left_over.exists()
    assert not (policy.folder / "model-00001-of-00002.safetensors").exists()
    policy.load_model()


def test_nothing_is_left_behind_when_training_fails(tmp_path: Path) -> None:
    class Failing(LettersPolicy):
        def train(self) -> PreTrainedModel:
            raise KeyboardInterrupt

    policy = Failing(cache_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        policy.prepare()
    assert not policy.folder.exists()


@pytest.mark.parametrize("change", [{"seed": 1}, {"lr": 1e-3}, {"steps": 4}, {"hidden": 32}])
def test_every_setting_has_its_own_folder(tmp_path: Path, change: dict[str, Any]) -> None:
    assert tiny(tmp_path, **change).folder != tiny(tmp_path).folder
    assert tiny(tmp_path, **change).describe() == {**tiny(tmp_path).describe(), **change}


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path: Path) -> None:
    first, again, other = (
        tiny(tmp_path, seed=seed).train().state_dict()["lm_head.weight"] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_global_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    tiny(tmp_path).prepare()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    batch = demonstration_batches(7, 1, 64)[0]
    short, long = (
        tiny(tmp_path, steps=steps, lr=1e-2).train()(batch.input_ids, labels=batch.labels).loss
        for steps in (1, 60)
    )
    assert long.item() < 0.8 * short.item()


def test_the_stored_folder_is_a_hugging_face_model(tmp_path: Path) -> None:
    policy: PolicySource = tiny(tmp_path)
    policy.prepare()
    loaded = policy.load_model()
    assert loaded.training
    assert loaded.config.attention_dropout == 0
    assert (loaded.generation_config.eos_token_id, loaded.generation_config.pad_token_id) == (1, 0)
    folder = tiny(tmp_path).folder
    same = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert torch.equal(same.lm_head.weight, loaded.lm_head.weight)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer.get_vocab() == policy.load_tokenizer().get_vocab()


def test_loading_before_preparing_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"prepare\(\)"):
        tiny(tmp_path).load_model()


def test_demonstrations_label_the_answer_and_come_from_the_train_split() -> None:
    for input_ids, attention_mask, labels in demonstration_batches(0, 3, 16):
        assert attention_mask.all()
        for row, label in zip(input_ids.tolist(), labels.tolist(), strict=True):
            start = row.index(2) + 1
            end = row.index(1) + 1
            assert split_of(" ".join(VOCABULARY[token] for token in row[:start])) == "train"
            assert label[:start] == [IGNORE_INDEX] * start
            assert label[start:end] == row[start:end]
            assert set(label[end:]) <= {IGNORE_INDEX}
            assert set(row[end:]) <= {0}


@pytest.mark.slow
def test_the_full_start_samples_half_of_the_gold(tmp_path: Path) -> None:
    policy = LettersPolicy(cache_dir=tmp_path)
    policy.prepare()
    model: Any = policy.load_model()
    tokenizer = policy.load_tokenizer()
    prompts = eval_prompts("in_domain", 0, 512, tokenizer)
    batch = tokenizer(
        [one.text for one in prompts], padding=True, padding_side="left", return_tensors="pt"
    )
    torch.manual_seed(0)
    rows = model.generate(**batch, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=True, top_k=0)
    answers = rows[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    gold = LettersGold()(
        [
            Completion(prompt, 0, tuple(ids), text, finished=1 in ids, logps=0.0)
            for prompt, ids, text in zip(prompts, answers.tolist(), texts, strict=True)
        ]
    )
    assert sum(gold) / len(gold) == pytest.approx(0.5, abs=0.06)
