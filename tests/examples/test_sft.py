"""Instruction tuning: the chats, their format and packing, and what the trained ranks learn from."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.paths import EXAMPLES
from tests.training_runs import MODEL, launch_ranks

sys.path.insert(0, str(EXAMPLES))

from sft import cli, runs, samples
from sft.chat_format import END, END_OF_TEXT, PAD, START, encode, write_tokenizer
from sft.exact_match import exact_match
from sft.packing import PackedChats, read_chats

CHATS = [samples.chat("k", f">>> {i} + é", "x" * (3 + i % 7)) for i in range(40)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sets")
    assert samples.write_sets(directory, train=400, of_library=100, held_out=60) == {
        "train": 500,
        "valid": 60,
        "unseen": 60,
        "library": sum(1 for _ in (directory / "library.jsonl").open()),
    }
    return directory


def test_encoding_by_hand() -> None:
    ids, learned = encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}])
    assert ids == [START, *b"user\na", END, 10, START, *b"assistant\nbc", END, 10]
    assert [chr(token) for token, flag in zip(ids, learned, strict=True) if flag] == ["b", "c", chr(END)]


def test_the_template_is_the_encoding(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, 256)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n\treturn 'é Ā ✓ 😀'  # \x01\x7f\r\n"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4 ✓"}]
    rendered = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert (rendered["input_ids"], rendered["assistant_masks"]) == encode(messages)
    asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert asked == [*encode(messages[:1])[0], START, *b"assistant\n"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (END, PAD) and END_OF_TEXT == 0


def prompts(path: Path) -> list[str]:
    return [entry["messages"][0]["content"] for entry in read_chats([path])]


def test_sets_share_no_prompt_and_unseen_templates_are_not_trained(sets: Path) -> None:
    of_set = {name: prompts(sets / f"{name}.jsonl") for name in samples.SETS}
    everything = [prompt for found in of_set.values() for prompt in found]
    assert len(everything) == len(set(everything)) and min(map(len, of_set.values())) > 20
    kinds = {name: {entry["kind"] for entry in read_chats([sets / f"{name}.jsonl"])} for name in samples.SETS}
    assert kinds["unseen"] == set(samples.UNSEEN) and not kinds["unseen"] & kinds["train"]
    assert kinds["valid"] <= set(samples.TEMPLATES)


def test_answers_are_what_python_evaluates(sets: Path) -> None:
    for name in ("valid", "unseen"):
        for entry in read_chats([sets / f"{name}.jsonl"]):
            question, answer = (message["content"] for message in entry["messages"])
            assert repr(eval(question.removeprefix(">>> "))) == answer


def test_the_librarys_files_are_split(tmp_path: Path) -> None:
    for number in range(25):
        lines = [
            f'"""Says {number}."""',
            f"def f{number}(x, *, y=1):",
            f'    """Does {number}.',
            "",
            f"    >>> {number} + 1",
            f"    {number + 1}",
            '    """',
        ]
        (tmp_path / f"m{number:02}.py").write_text("\n".join(lines))
    train, held_out = samples.library(tmp_path)
    questions = {entry["messages"][0]["content"]: entry["messages"][1]["content"] for entry in held_out}
    assert questions == {
        "What is m10?": "Says 10.",
        "What does m10.f10 do?": "Does 10.",
        "Signature of m10.f10?": "def f10(x, *, y=1)",
        ">>> 10 + 1": "11",
    }
    assert len(train) == 24 * 4


def test_packs_hold_every_chat_once_an_epoch_and_keep_them_apart() -> None:
    length = 96
    packed = PackedChats(CHATS, length, 1000, 5, "train")
    encoded = sorted(tuple(encode(entry["messages"])[0]) for entry in CHATS)
    seen: list[tuple[int, ...]] = []
    for number in range(len(packed)):
        item = packed[number]
        tokens = [*item["tokens"].tolist(), int(item["labels"][-1])]
        assert item["labels"][:-1].tolist() == tokens[1:-1]
        starts = [at for at, token in enumerate(tokens) if bytes(tokens[at : at + 6]) == bytes([START, *b"user\n"])]
        ends = [*starts[1:], tokens.index(PAD) if PAD in tokens else len(tokens)]
        learned = [0] * len(tokens)
        for start, stop in zip(starts, ends, strict=True):
            ids, flags = tuple(tokens[start:stop]), encode_flags(tokens[start:stop])
            seen.append(ids)
            learned[start:stop] = flags
            allowed = ~item["attention_mask"][0]
            inside = allowed[start : min(stop, length), start : min(stop, length)]
            assert torch.equal(inside, torch.ones_like(inside).tril())
            assert not allowed[start : min(stop, length), :start].any()
        assert item["loss_mask"].tolist() == learned[1:]
        if len(seen) >= len(encoded):
            break
    assert sorted(seen[: len(encoded)]) == encoded


def encode_flags(ids: list[int]) -> list[int]:
    """What of a chat's ids is learned: from after the assistant's head to its end."""
    head = [START, *b"assistant\n"]
    at = next(i for i in range(len(ids)) if ids[i : i + len(head)] == head) + len(head)
    return [int(at <= i < len(ids) - 1) for i in range(len(ids))]


def test_chats_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--seq-length: got 8, expected room for any of the 40 chats; none fits"):
        PackedChats(CHATS, 8, 1, 0, "train")
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:2: got .* expected a JSON object with messages"):
        read_chats([tmp_path / "bad.jsonl"])


def test_two_ranks_fine_tune_with_muon(sets: Path) -> None:
    """Through the launcher and Megatron's loop; the first loss is that of a uniform distribution over the bytes."""
    data = ["--train-data-path", str(sets / "train.jsonl"), "--valid-data-path", str(sets / "valid.jsonl")]
    sizes = "--seq-length 256 --max-position-embeddings 256 --vocab-size 256 --eval-global-batch-size 4"
    muon = ["--distributed-muon", "--muon-exchange-dtype", "fp32", "--train-iters", "6"]
    model = [word for word in MODEL if word != "--mock-data"]
    traces = launch_ranks(*muon, *data, *sizes.split(), script=str(runs.SCRIPT), model=model)
    losses = [trace["lm loss"] for trace in traces[0].losses.values()]
    assert len(losses) == 6 and losses[0] == pytest.approx(math.log(256), rel=0.05)
    assert losses[-1] < 0.8 * losses[0]


class Parrot:
    """Stands in for a model: answers what a table says, or goes on for ever."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers

    def eval(self) -> Parrot:
        return self

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
        out = torch.full((len(input_ids), max_new_tokens), ord("z"))
        for row, ids in enumerate(input_ids.tolist()):
            asked = bytes(ids).split(b"user\n")[1].split(bytes([END]))[0].decode()
            if asked in self.answers:
                said = [*self.answers[asked].encode(), END]
                out[row, : len(said)] = torch.tensor(said)
        return torch.cat([input_ids, out], dim=1)


def test_exact_match_counts_ended_and_right_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    write_tokenizer(tmp_path, 256)
    parrot = Parrot({"a": "1", "b": "wrong", "c": "3"})
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: parrot)
    chats = [samples.chat("x", "a", "1"), samples.chat("x", "b", "2"), samples.chat("y", "c", "3")]
    outcome = exact_match(tmp_path, [*chats, samples.chat("y", "d", "zzz")], max_new_tokens=8, shown=2)
    assert (outcome.chats, outcome.exact, outcome.ended) == (4, 2, 3)
    assert outcome.exact_by_kind == {"x": (1, 2), "y": (1, 2)}
    assert outcome.examples == [("a", "1", "1"), ("b", "wrong", "2")]


def test_the_commands_flags(sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuning = runs.Tuning("adamw", 1e-3, 40)
    flags = runs.tuning_flags(tuning, load=Path("P"), data=sets, out=tmp_path)
    last = {
        flag: flags[len(flags) - flags[::-1].index(flag)]
        for flag in flags
        if flag.startswith("--lr") or flag == "--load"
    }
    assert last == {"--lr": "0.001", "--lr-decay-style": "cosine", "--lr-warmup-iters": "2", "--load": "P"}
    assert "--distributed-muon" not in flags and "--finetune" in flags
    assert "--distributed-muon" in runs.tuning_flags(runs.Tuning(), load=Path("P"), data=sets, out=tmp_path)
    assert cli.main(["chat", "--pretrained", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    assert "expected a run's checkpoint directory" in " ".join(capsys.readouterr().out.split())


@pytest.mark.exhaustive
def test_chat_from_nothing(tmp_path: Path) -> None:
    """A few steps of everything, and a served answer."""
    words = f"chat --out {tmp_path} --pretraining-steps 4 --steps 4 --limit 4"
    assert cli.main(words.split()) == 0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "deepseek_v3"
